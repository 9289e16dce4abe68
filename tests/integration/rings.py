"""Who is connected to whom: the engines of real runner processes, by what the kernel says of their connections."""

from __future__ import annotations

import psutil

from planner import Instance
from tests.integration.cluster import Process


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def serves_with(instance: Instance, processes: list[Process]) -> bool:
    """Whether the instance serves, and it is by these runners."""
    state = instance.state
    assert not state.over, state.reason
    if not state.serving or state.snapshot is None:
        return False
    return [view.report and view.report.pid for view in state.snapshot.ranks] == [one.pid for one in processes]


def engines_of(runner: Process) -> list[psutil.Process]:
    """The engine and the spare."""
    return [one for one in psutil.Process(runner.pid).children() if "engine-of-rank" in " ".join(one.cmdline())]


def ends(process: psutil.Process) -> set[tuple[tuple[str, int], tuple[str, int]]]:
    """Its end of each of its connections: its own address, and the other side's."""
    return {
        ((one.laddr.ip, one.laddr.port), (one.raddr.ip, one.raddr.port))
        for one in process.net_connections("tcp4")
        if one.status == psutil.CONN_ESTABLISHED
    }


def engine_in_ring(runner: Process) -> psutil.Process:
    """The engine that is connected to others; a spare is not."""
    found = [one for one in engines_of(runner) if ends(one)]
    assert len(found) == 1, found
    return found[0]


def neighbours(engine: psutil.Process) -> set[int]:
    """The processes at the other ends of an engine's connections, of all engines on this machine."""
    wanted = {(there, here) for here, there in ends(engine)}
    found: set[int] = set()
    for one in psutil.process_iter(["cmdline"]):
        if "engine-of-rank" in " ".join(one.info["cmdline"] or ()) and is_alive(one) and ends(one) & wanted:
            found.add(one.pid)
    return found

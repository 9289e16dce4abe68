"""Forks runners and planners for the chaos runs. They run the real command line, and a runner also notes what it accepts.

It is the nursery of `tests.integration.cluster` with two additions in the forked process: the note, which the call that accepts a
judged task makes itself, and the network namespace that the driver may name.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import planner.cli
from planner.launcher import leave_with_parent
from runner.runner import Runner
from tests.chaos.journal import write
from tests.integration.cluster import nursery_main

DIRECTORY = "CHAOS_DIRECTORY"
NETWORK = "CHAOS_NETWORK"

_CLONE_NEWNET = 0x40000000


def _observe_what_runners_accept() -> None:
    untyped: Any = Runner
    accept = untyped._accept

    async def observed(self: Any, work: Any) -> None:
        write(
            Path(os.environ[DIRECTORY]) / "journal",
            "accept",
            self._session.instance,
            self._member.rank,
            os.getpid(),
            epoch=work.task.epoch,
            task=work.task.kind,
            task_id=work.task.task_id,
        )
        await accept(self, work)

    untyped._accept = observed


def _enter_network(name: str) -> None:
    descriptor = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns to the network namespace {name} failed")
    finally:
        os.close(descriptor)


def _show_tasks(number: int, frame: FrameType | None) -> None:
    """What every task of this process waits for, to its log: the driver asks for it where something hangs."""
    for task in asyncio.all_tasks():
        task.print_stack(file=sys.stderr)
    sys.stderr.flush()


def main() -> None:
    """Prepare what every forked process inherits, and serve."""
    _observe_what_runners_accept()
    command_line = planner.cli.main

    def in_the_child(arguments: list[str] | None = None) -> int:
        words = list(arguments or ())
        signal.signal(signal.SIGUSR1, _show_tasks)
        if network := os.environ.pop(NETWORK, ""):
            _enter_network(network)  # of this thread, and of all that it starts: so before there is another
        if words[0] == "planner":  # the command for people knows no parent
            *words, _, parent = words
            leave_with_parent(int(parent))
        return command_line(words)

    planner.cli.main = in_the_child
    nursery_main()


if __name__ == "__main__":
    main()

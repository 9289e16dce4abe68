"""How long one call of a verb holds the server, by the server's own clocks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from barrier import Barrier, Concluded, Dispatched, EpochId, NotReady, Opened, Store, Verdict, connect
from barrier.store.script import script
from tests.benchmarks.group import Absent, load_task, open_epoch
from tests.benchmarks.readers import SETTINGS
from tests.benchmarks.stats import Samples

_ENTRIES_PER_CALL = (
    5_000  # every command that a script runs is an entry of its own, and `inspect` asks each rank's PTTL
)


@dataclass
class HoldFigures:
    """Of one verb at one world size.

    Attributes:
        held: how long each call of the script held the server (SLOWLOG): wall-clock time, so a busy machine adds to it.
        cpu_us: CPU time of the server's main thread a call, in microseconds (INFO cpu): reading and parsing the call included.
    """

    name: str
    world_size: int
    held: Samples = field(default_factory=Samples)
    cpu_us: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "verb": self.name,
            "world_size": self.world_size,
            "held": self.held.as_json(),
            "held_us_per_rank": round(self.held.p50 / self.world_size, 3),
            "cpu_us": round(self.cpu_us, 1),
            "cpu_us_per_rank": round(self.cpu_us / self.world_size, 3),
        }


async def measure_holds(url: str, world_size: int, *, calls: int) -> list[HoldFigures]:
    """`dispatch` that goes through, `dispatch` with nobody there, `inspect`, and `open`."""
    store = await connect(url, settings=SETTINGS)
    barrier = Barrier(store, f"hold-{world_size}", world_size=world_size)
    try:
        absent = Absent(store, barrier, range(world_size), world_size)
        await absent.report("Idle", None)
        epoch = await open_epoch(barrier)

        async def refused(call: int) -> None:
            outcome = await _dispatch(barrier, epoch, f"early {call}")
            assert isinstance(outcome, NotReady), outcome
            assert len(outcome.ranks) == world_size

        async def dispatched(call: int) -> None:
            outcome = await _dispatch(barrier, epoch, f"load {call}")
            assert isinstance(outcome, Dispatched), outcome

        async def inspected(_: int) -> None:
            assert len((await barrier.inspect()).ranks) == world_size

        async def opened(_: int) -> None:
            nonlocal epoch
            assert isinstance(await barrier.conclude(epoch, Verdict.stopped("the benchmark goes on")), Concluded)
            outcome = await barrier.open()
            assert isinstance(outcome, Opened), outcome
            epoch = outcome.epoch

        nobody = await _hold(store, "dispatch", "dispatch, nobody there", world_size, calls, refused)
        await absent.report("Connected", epoch)
        return [
            await _hold(store, "dispatch", "dispatch", world_size, calls, dispatched),
            nobody,
            await _hold(store, "inspect", "inspect", world_size, calls, inspected),
            await _hold(store, "open", "open", world_size, calls, opened),
        ]
    finally:
        await barrier.close()
        await store.close()


async def _dispatch(barrier: Barrier, epoch: EpochId, step: str) -> object:
    return await barrier.dispatch(epoch, step, load_task(barrier.keys.group, epoch, step), "Connected")


async def _hold(
    store: Store, verb: str, name: str, world_size: int, calls: int, call: Callable[[int], Awaitable[None]]
) -> HoldFigures:
    figures = HoldFigures(name, world_size)
    await call(-1)  # teaches the server the script
    await store.commands.config_set("slowlog-max-len", _ENTRIES_PER_CALL * calls)
    await store.commands.config_set("slowlog-log-slower-than", -1)
    before = await _cpu_us(store)
    for number in range(calls):
        await call(number)
    figures.cpu_us = (await _cpu_us(store) - before) / calls
    await store.commands.slowlog_reset()
    await store.commands.config_set("slowlog-log-slower-than", 0)
    for number in range(calls, 2 * calls):
        await call(number)
    await store.commands.config_set("slowlog-log-slower-than", -1)
    sha = script(verb).sha.encode()
    entries: list[dict[str, Any]] = await store.commands.slowlog_get(_ENTRIES_PER_CALL * calls)
    for entry in entries:
        if entry["command"].startswith((b"EVALSHA " + sha, b"EVALSHA_RO " + sha)):
            figures.held.add(entry["duration"] / 1e6)
    assert len(figures.held.seconds) == calls, f"SLOWLOG has {len(figures.held.seconds)} of {calls} calls of {verb}"
    return figures


async def _cpu_us(store: Store) -> float:
    info: dict[str, float] = await store.commands.info("cpu")
    return (info["used_cpu_sys_main_thread"] + info["used_cpu_user_main_thread"]) * 1e6

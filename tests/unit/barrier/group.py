"""A planner's barrier and its ranks on one fake store, to keep tests short."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from barrier import (
    Barrier,
    Concluded,
    Dispatched,
    EpochId,
    Leadership,
    Leading,
    LogId,
    Opened,
    Report,
    Settings,
    Snapshot,
    Verdict,
)
from barrier.store.keys import Keys
from barrier.testing import FakeStore, FaultPlan, ManualClock, ScriptedRank, scripted_ranks

NONCE = "0" * 32
"""Of an epoch that a test makes up."""


def epoch_of(report: Report) -> EpochId:
    """The epoch that a report names, which it must."""
    assert report.epoch is not None
    return report.epoch


@dataclass
class Group:
    """One group under test."""

    store: FakeStore
    clock: ManualClock
    barrier: Barrier
    ranks: list[ScriptedRank]

    @property
    def keys(self) -> Keys:
        return self.barrier.keys

    @property
    def leadership(self) -> Leadership:
        assert self.barrier.leadership is not None, "this planner does not lead"
        return self.barrier.leadership

    async def open(self, **options: Any) -> EpochId:
        """Open an epoch; its id."""
        outcome = await self.barrier.open(len(self.ranks), **options)
        assert isinstance(outcome, Opened), outcome
        return outcome.epoch

    async def arrive(self, status: str = "Connected", ranks: Sequence[int] | None = None) -> None:
        """Have all ranks, or some, report a status in the current epoch."""
        for rank in range(len(self.ranks)) if ranks is None else ranks:
            await self.ranks[rank].arrive(status)

    async def all_connected(self) -> EpochId:
        """Open an epoch in which all ranks are Connected."""
        epoch = await self.open()
        await self.arrive("Connected")
        return epoch

    async def load(self, epoch: EpochId, **options: Any) -> LogId:
        """Dispatch the step load, which must succeed; its place in the log."""
        outcome = await self.barrier.dispatch(epoch, "load", "{}", "Connected", **options)
        assert isinstance(outcome, Dispatched), outcome
        return outcome.id

    async def conclude(self, epoch: EpochId, reason: str = "asked for") -> Verdict:
        """End an epoch; the verdict that stands."""
        outcome = await self.barrier.conclude(epoch, Verdict.stopped(reason))
        assert isinstance(outcome, Concluded), outcome
        return outcome.verdict

    async def inspect(self) -> Snapshot:
        return await self.barrier.inspect()

    async def log(self) -> list[tuple[str, dict[str, str]]]:
        """The whole task log, readable."""
        entries: list[tuple[bytes, dict[bytes, bytes]]] = await self.barrier.store.commands.xrange(self.keys.tasks)
        return [
            (entry_id.decode(), {name.decode(): value.decode() for name, value in fields.items()})
            for entry_id, fields in entries
        ]

    async def tasks(self) -> list[str]:
        """The ids of the tasks in the log."""
        return [entry_id for entry_id, fields in await self.log() if fields["kind"] == "task"]

    def planner(self, name: str, *, faults: FaultPlan | None = None, **options: Any) -> Barrier:
        """Another planner's barrier for the same group; the caller closes it."""
        return Barrier(
            self.store.client(name, faults=faults),
            self.keys.group,
            world_size=len(self.ranks),
            clock=self.clock,
            holder=name,
            **options,
        )


@asynccontextmanager
async def started_group(
    store: FakeStore, world_size: int, *, faults: FaultPlan | None = None, settings: Settings | None = None
) -> AsyncGenerator[Group]:
    """Ranks that have said hello, and a planner that leads."""
    assert store.clock is not None
    barrier = Barrier(
        store.client("planner", faults=faults),
        "demo",
        world_size=world_size,
        clock=store.clock,
        holder="planner",
        settings=settings,
    )
    async with barrier, scripted_ranks(store, "demo", world_size, settings=settings) as ranks:
        assert isinstance(await barrier.lead(), Leading)
        yield Group(store, store.clock, barrier, ranks)

"""A runner that was given no rank claims one first, and starts its engine then: nobody else gets the rank meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import pytest

from barrier import Member, RankTaken, Settings, Store, adopt
from barrier.testing import FakeStore, ManualClock
from barrier.testing.waiting import settle
from planner.cli.runner_process import EngineChoice, RunnerOptions, _started  # pyright: ignore[reportPrivateUsage]
from runner import EngineFailure, EngineHost, InlineHost
from runner.testing import ScriptedEngine

pytestmark = pytest.mark.anyio


class SlowToStart(InlineHost):
    """One whose engine starts when the test says so, as a process with many imports does."""

    def __init__(self) -> None:
        super().__init__(ScriptedEngine().fresh)
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.was_shut_down = False

    async def start(self) -> None:
        await self.started

    async def shut_down(self) -> None:
        self.was_shut_down = True
        await super().shut_down()


@dataclass(frozen=True, slots=True)
class Chosen(EngineChoice):
    """The engine that the test holds."""

    held: SlowToStart | None = None

    def host(self, rank: int, world_size: int | None) -> EngineHost:
        assert self.held is not None
        return self.held


class Starting:
    """A rank that is claimed, and whose engine is being started."""

    def __init__(self, store: FakeStore, clock: ManualClock, member: Member) -> None:
        self._store, self._clock = store, clock
        self.member, self.rank = member, member.rank
        self.host = SlowToStart()
        options = RunnerOptions(
            instance="demo",
            ranks=None,
            world_size=1,
            url="",
            namespace="rankgate",
            settings=Settings(),
            engine=Chosen(held=self.host),
        )
        self.task = asyncio.create_task(_started(options, member, member.rank))

    async def is_taken_by_another(self) -> bool:
        other = Member(self._store.client(), "demo", rank=self.rank, world_size=1, clock=self._clock)
        try:
            await other.claim(timeout=0.0)
        except RankTaken:
            return False
        finally:
            await other.close()
        return True


@pytest.fixture
async def starting(store: FakeStore, clock: ManualClock) -> AsyncGenerator[Starting]:
    client: Store = adopt(store.client())
    member = Member(client, "demo", rank=None, world_size=1, clock=clock)
    await member.claim()
    made = Starting(store, clock, member)
    await settle()
    yield made
    made.task.cancel()
    await asyncio.gather(made.task, return_exceptions=True)
    await member.close()


async def test_a_claim_is_kept_for_as_long_as_the_engine_takes_to_start(starting: Starting, clock: ManualClock) -> None:
    lease = starting.member.settings.lease
    for _ in range(10):
        await clock.advance(lease / 2)
    assert not await starting.is_taken_by_another()
    starting.host.started.set_result(None)
    assert await starting.task is starting.host
    assert not await starting.is_taken_by_another(), "it is claimed once more, under the same name"


async def test_an_engine_that_fails_for_now_keeps_its_rank_and_is_tried_in_each_attempt(starting: Starting) -> None:
    starting.host.started.set_exception(EngineFailure("the device is busy"))
    assert await starting.task is starting.host
    assert not starting.host.was_shut_down
    assert not await starting.is_taken_by_another()


async def test_an_engine_that_is_unfit_gives_its_rank_back(starting: Starting) -> None:
    starting.host.started.set_exception(EngineFailure("no such model", permanent=True))
    with pytest.raises(EngineFailure, match="no such model"):
        await starting.task
    assert starting.host.was_shut_down
    assert await starting.is_taken_by_another()


async def test_a_runner_that_is_asked_to_end_meanwhile_gives_its_rank_back(starting: Starting) -> None:
    starting.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting.task
    assert starting.host.was_shut_down
    assert await starting.is_taken_by_another()

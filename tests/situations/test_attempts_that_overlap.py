"""Situations from clusters that ran: something of the last attempt is still there while the next one begins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from barrier import Barrier, Concluded, EpochId, Member, NotReady, Opened, Released, Verdict, all_ranks, explain
from barrier.testing import FakeStore, ManualClock, ScriptedRank
from planner import InstanceSpec, Planner, explain_instance
from runner import Runner
from runner.testing import ScriptedEngine, ScriptedHost

pytestmark = pytest.mark.anyio

EXO_WOULD_DISPATCH = ("Connected", "Loading", "Loaded", "WarmingUp", "Ready", "Running")
"""Statuses of the other ranks at which a planner that looks at statuses alone sends LoadModel to a connected rank."""


async def opened(barrier: Barrier) -> EpochId:
    outcome = await barrier.open()
    assert isinstance(outcome, Opened), outcome
    return outcome.epoch


@pytest.mark.parametrize("statuses", [("Connected",), EXO_WOULD_DISPATCH])
async def test_rank_0_is_connected_while_rank_1s_old_loaded_of_an_earlier_attempt_is_still_visible(
    store: FakeStore, clock: ManualClock, statuses: tuple[str, ...]
) -> None:
    """exo dispatches: rank 1 looks further than connected. Here a status counts in its own attempt only."""
    async with (
        Barrier(store.client("planner"), "demo", world_size=2, clock=clock) as barrier,
        ScriptedRank(store, "demo", 0) as zero,
        ScriptedRank(store, "demo", 1) as one,
    ):
        first = await opened(barrier)
        await zero.arrive("Connected", epoch=first)
        await one.arrive("Loaded", epoch=first)
        assert isinstance(await barrier.conclude(first, Verdict.aborted("rank 0 failed", 0)), Concluded)
        second = await opened(barrier)
        await zero.retire()
        await zero.arrive("Connected", epoch=second)
        assert one.member.report_now.status == "Loaded", "it has not heard of the end yet"

        assert await barrier.dispatch(second, "load", "{}", statuses) == NotReady((1,))
        releasing = asyncio.create_task(barrier.release(second, "load", "{}", statuses, timeout=60))
        async with zero.heartbeat(), one.heartbeat():
            for _ in range(10):
                await clock.advance(3)
                await barrier.lead()  # or another planner may take the lead
            assert not releasing.done(), "however long rank 1 says so"
            assert "waiting for 1 of 2 ranks: rank 1 on node-1" in explain(
                await barrier.inspect(), all_ranks(2, statuses)
            )
            await one.retire()
            await one.arrive("Connected", epoch=second)
            assert isinstance(await clock.run(releasing), Released), "once it has arrived in this attempt"


@dataclass
class Rank:
    """A real runner whose engine the test holds in whatever call it likes, `close` included."""

    engine: ScriptedEngine
    member: Member
    runner: Runner
    running: asyncio.Task[None]


@asynccontextmanager
async def ranks_with_stubborn_engines(store: FakeStore, clock: ManualClock) -> AsyncGenerator[list[Rank]]:
    made: list[Rank] = []
    for number in range(2):
        engine = ScriptedEngine(auto=True)
        member = Member(
            store.client(f"rank {number}"), "demo", rank=number, world_size=2, clock=clock, node=f"node-{number}"
        )
        # Real seconds: a close is waited for as long as the test takes.
        runner = Runner(member, ScriptedHost(engine, rank=number, grace_seconds=3_600), clock=clock)
        made.append(Rank(engine, member, runner, asyncio.create_task(runner.run())))
    try:
        yield made
    finally:
        for rank in made:
            rank.engine.release()
            rank.runner.stop()
        await clock.run(asyncio.gather(*(rank.running for rank in made)))
        for rank in made:
            await rank.member.close()


async def test_the_next_attempt_does_not_start_before_the_last_one_is_torn_down(
    store: FakeStore, clock: ManualClock
) -> None:
    """Rank 1's engine holds its memory and its port until it has closed: rank 0 must not connect to it before that."""
    async with ranks_with_stubborn_engines(store, clock) as (zero, one):
        async with Planner(store.client("planner"), clock=clock) as planner:
            one.engine.hold("close")
            zero.engine.fail("load", "out of memory")
            instance = await clock.run(planner.launch(InstanceSpec(name="demo", world_size=2), wait=False))
            await clock.advance(30)

            snapshot = await instance.inspect()
            assert snapshot.epoch is not None
            assert snapshot.epoch.ordinal == 2, "the next attempt is there for those who are ready for it"
            assert one.engine.active("close")
            assert zero.runner.status.kind == "Idle"
            assert one.runner.status.kind == "Loaded"
            assert snapshot.epoch.steps == {}, "and nobody is told to do anything in it"
            assert zero.engine.calls.count("connect") == 1
            assert (
                "waiting for 1 of 2 ranks: rank 1 on node-1 (Loaded for 30.0 s, wanted Idle; not in this attempt"
                in (explain_instance(snapshot))
            )

            one.engine.release("close")
            await clock.run(instance.ready(), limit=60)
            for rank in (zero, one):
                assert rank.engine.calls.count("connect") == 2
                assert rank.engine.calls.count("load") == 2
            again = [place for place, call in enumerate(one.engine.calls) if call == "connect"][1]
            assert "close" in one.engine.calls[:again]

"""Situations from clusters that ran: a rank dies, fails or restarts, and is back before anybody has looked."""

from __future__ import annotations

import json
from typing import Literal

import pytest

from barrier import Aborted, Barrier, NotPromised, Opened, Settings
from barrier.testing import FakeStore, ManualClock, ScriptedRank
from planner import InstanceSpec, Planner, Policy
from runner.testing import scripted_runners
from tests.situations.verdicts import verdicts
from tests.unit.planner.cluster import Cluster, cluster

pytestmark = pytest.mark.anyio

LEASE, HEARTBEAT, BACKSTOP = Settings().lease, Settings().heartbeat, Settings().backstop


async def come_back(made: Cluster, rank: int, how: Literal["killed", "stopped"]) -> None:
    """The rank's process ends, and its service manager starts it again at once."""
    await (made.kill(rank) if how == "killed" else made.stop(rank))
    made.start(rank)


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_rank_1_died_and_came_back_idle_while_rank_0_is_connected(
    store: FakeStore, clock: ManualClock, how: Literal["killed", "stopped"]
) -> None:
    """exo's planner waits for ever: rank 0 never becomes Idle again, and rank 1 is never told to connect."""
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        made.scripts[1].hold("connect")
        instance = await made.run(planner.launch(made.spec, wait=False))
        await made.until(lambda: made.statuses == ["Connected", "Connecting"], "rank 0 to be connected")
        healthy, died_at = made.ranks[0], clock.now()

        await come_back(made, 1, how)
        made.scripts[1].let("connect")
        await made.until(made.verdicts, "the attempt to end")
        assert clock.now() - died_at <= LEASE + HEARTBEAT
        assert '"culprit":1' in made.verdicts()[0]

        await made.run(instance.ready(), limit=600)
        assert made.statuses == ["Ready", "Ready"]
        [only] = made.dispatched("LoadModel")
        assert only.epoch == made.epochs()[-1], "nothing was loaded in the attempt that rank 1 had left"
        assert made.ranks[0] is healthy, "the healthy rank is the same process"
        assert made.rejections() == 0


async def test_a_planner_of_your_own_learns_at_the_barrier_that_rank_1_came_back(
    store: FakeStore, clock: ManualClock
) -> None:
    """The same with nothing but the barrier: it answers at once, and does not wait for a rank that will not arrive."""
    async with (
        Barrier(store.client("planner"), "demo", world_size=2, clock=clock) as barrier,
        ScriptedRank(store, "demo", 0) as zero,
        ScriptedRank(store, "demo", 1) as one,
    ):
        opened = await barrier.open()
        assert isinstance(opened, Opened)
        await zero.arrive("Connected")
        await one.promise()
        await one.restart()
        began = clock.now()
        outcome = await clock.run(barrier.release(opened.epoch, "load", "{}", "Connected", timeout=20))
        assert isinstance(outcome, Aborted)
        assert (outcome.verdict.culprit, outcome.verdict.reason) == (1, "rank 1 on node-1 was restarted")
        assert clock.now() - began < 1


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_a_failure_that_is_followed_at_once_by_a_restart_is_not_missed(
    store: FakeStore, clock: ManualClock, how: Literal["killed", "stopped"]
) -> None:
    """Whoever looks only now and then sees rank 1 before its failure, and then an innocent Idle: as if nothing had been."""
    async with (
        scripted_runners(store, "demo", 2) as (zero, one),
        Planner(store.client("planner"), clock=clock) as planner,
    ):
        zero.hold("load")
        one.hold("load")
        instance = await clock.run(planner.launch(InstanceSpec(name="demo", world_size=2), wait=False))
        await clock.advance(1)
        assert (zero.status.kind, one.status.kind) == ("Loading", "Loading")

        store.partition("planner")  # it looks away …
        one.fail("load", "the GPU fell off the bus")
        await one.until("Failed")
        await (one.die() if how == "killed" else one.stop())
        await clock.run(one.start())
        one.let("load")
        zero.let("load")
        await clock.advance(1)
        assert (zero.status.kind, one.status.kind) == ("Loaded", "Idle")
        store.heal("planner")  # … and looks again
        looks_at = clock.now()

        assert verdicts(store) == []
        while not verdicts(store) and clock.now() < looks_at + 600:
            await clock.advance(0.5)
        assert clock.now() - looks_at <= LEASE + BACKSTOP, "noticed for what it was, and not as a stall"
        [verdict] = verdicts(store)
        assert (verdict.culprit, verdict.reason) == (1, "rank 1 on node-1 was restarted")
        await clock.run(instance.ready(), limit=600)
        assert [zero.kinds.count("LoadModel"), one.kinds.count("LoadModel")] == [2, 2]


async def test_a_rank_that_was_restarted_cannot_return_to_the_attempt_that_it_failed_in(
    store: FakeStore, clock: ManualClock
) -> None:
    """Even one that says again just what its earlier life said is another rank to this attempt."""
    async with (
        Barrier(store.client("planner"), "demo", world_size=2, clock=clock) as barrier,
        ScriptedRank(store, "demo", 0) as zero,
        ScriptedRank(store, "demo", 1) as one,
    ):
        opened = await barrier.open()
        assert isinstance(opened, Opened)
        await zero.arrive("Connected")
        await one.arrive("Connected")
        await one.fail("the GPU fell off the bus")
        await one.restart()
        refused = await one.member.promise(opened.epoch)
        assert isinstance(refused, NotPromised)
        assert "not this process" in refused.reason
        outcome = await clock.run(barrier.release(opened.epoch, "load", "{}", "Connected", timeout=20))
        assert isinstance(outcome, Aborted)
        assert outcome.verdict.culprit == 1


async def test_the_healthy_rank_does_not_pay_for_its_neighbours_restarts(store: FakeStore, clock: ManualClock) -> None:
    """Failures are charged to the rank that caused them: rank 1's do not use up those that rank 0 may have."""
    policy = Policy(max_failures=2, backoff_base=0.1, backoff_cap=0.1, stable_after=10**6)
    async with cluster(store, clock, 2) as made, made.planner(policy=policy) as planner:
        healthy = made.ranks[0]
        for _ in range(2):
            made.scripts[0].fail("load", "a bad sector", after=1)  # its second and its fourth load
        made.scripts[1].hold("load")
        instance = await made.run(planner.launch(made.spec, wait=False))
        for attempt in (1, 3):  # in the first and the third attempt it is rank 1 whose process dies
            await made.until(lambda n=attempt: len(made.epochs()) == n and made.statuses[1] == "Loading", "the load")
            await made.kill(1)
            made.scripts[1].let("load")
            made.start(1)
            await made.until(lambda n=attempt: len(made.verdicts()) == n + 1, "rank 0 to fail, too")
            made.scripts[1].hold("load")
        made.scripts[1].let("load")
        await made.run(instance.ready(), limit=600)
        culprits = [json.loads(verdict)["culprit"] for verdict in made.verdicts()]
        assert culprits == [1, 0, 1, 0], "four failures in a row, and nobody has spent the two that each may have"
        assert made.ranks[0] is healthy, "nobody has restarted it"

        await come_back(made, 1, "stopped")  # who was asked to end has not failed
        await made.until(lambda: len(made.verdicts()) == 5 and instance.state.serving, "the instance to serve again")
        await come_back(made, 1, "killed")  # once too often
        await made.until(lambda: instance.state.over, "the planner to give up")
        assert "given up after 3 failed attempts in a row (each time by rank 1" in instance.state.failure

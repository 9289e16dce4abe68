"""Situations from clusters that ran: a load that takes hours and is well, and one that will never end."""

from __future__ import annotations

import pytest

from barrier import Settings
from barrier.testing import FakeStore, ManualClock
from planner import InstanceSpec, Planner, Policy
from runner.messages import ModelSpec
from runner.testing import scripted_runners
from tests.situations.verdicts import verdicts
from tests.unit.planner.cluster import cluster

pytestmark = pytest.mark.anyio

PATIENT = Settings(lease=90, heartbeat=30, backstop=30, reader_block=600)
"""So that hours are few heartbeats."""
HUNDRED_GB = ModelSpec(model_id="hundred-gigabytes", total_layers=40)


async def test_a_load_of_100_gb_that_is_slow_but_moves_is_not_killed(store: FakeStore, clock: ManualClock) -> None:
    """Two and a half a layer from a slow disk, each within the limit and all together far beyond it: hours, and one attempt."""
    policy = Policy(load_stall=120)
    async with cluster(store, clock, 2, settings=PATIENT, told=False) as made, made.planner(policy=policy) as planner:
        made.scripts[1].pace = 80.0
        began = clock.now()
        instance = await made.run(planner.launch(made.spec.model_copy(update={"model": HUNDRED_GB})), limit=86_400)
        assert clock.now() - began >= 40 * 80 > 26 * policy.load_stall
        assert instance.state.serving
        assert made.verdicts() == []
        assert made.loads_per_epoch() == [1]
        assert [script.calls.count("load") for script in made.scripts] == [1, 1]


async def test_a_load_that_stands_still_is_ended_and_the_rank_that_stood_still_is_named(
    store: FakeStore, clock: ManualClock
) -> None:
    """Its process is well and its heartbeats come, so no lease lapses: only that nothing moves tells it."""
    spec = InstanceSpec(name="demo", world_size=2, model=HUNDRED_GB)
    policy = Policy(load_stall=120)
    async with (
        scripted_runners(store, "demo", 2, settings=PATIENT) as (zero, one),
        Planner(store.client("planner"), clock=clock, policy=policy, settings=PATIENT) as planner,
    ):
        one.hold("load")
        instance = await clock.run(planner.launch(spec, wait=False))
        await one.until("Loading")
        for layers in range(10, 31, 10):
            await clock.advance(100)
            one.engine.progress(layers)
        moved_at = clock.now()
        await clock.advance(110)
        snapshot = await instance.inspect()
        assert snapshot.epoch is not None
        assert verdicts(store) == [], "410 s under a limit of 120 s, because it moved"
        assert snapshot.ranks[1].report is not None
        assert snapshot.ranks[1].report.progress == (30, 40)

        while not verdicts(store) and clock.now() < moved_at + 600:
            await clock.advance(5)
        # It was told with a heartbeat, and seen when the planner looked.
        assert 120 <= clock.now() - moved_at <= 120 + PATIENT.heartbeat + PATIENT.backstop + 5
        [verdict] = verdicts(store)
        assert verdict.culprit == 1
        assert verdict.reason.startswith("nothing moved for 120 s: demo, attempt 1: waiting for 1 of 2")
        assert "rank 1 on node-1 (Loading 30/40" in verdict.reason
        assert "load cancelled" in one.engine.calls, "its engine is made to stop"

        lives = (zero.incarnation, one.incarnation)
        one.let("load")
        await clock.run(instance.ready())
        assert (zero.incarnation, one.incarnation) == lives, "the processes live on"
        assert [rank.kinds.count("LoadModel") for rank in (zero, one)] == [2, 2], "once in each attempt"

"""Situations from clusters that ran: more runners than the instance has ranks, left over from launches before."""

from __future__ import annotations

import asyncio

import pytest

from barrier import Member, RankTaken
from barrier.testing import FakeStore, ManualClock
from runner import InlineHost, Runner
from tests.unit.planner.cluster import Script, TinyEngine, cluster

pytestmark = pytest.mark.anyio


async def test_of_16_runners_left_over_for_4_ranks_four_serve_and_twelve_step_back(
    store: FakeStore, clock: ManualClock
) -> None:
    """Each of them would take any rank. A rank has one holder, and whoever gets none says so and leaves the others alone."""
    async with cluster(store, clock, 4, started=False) as made, made.planner() as planner:
        scripts = [Script(clock) for _ in range(16)]
        members = [
            Member(store.client(f"runner {number}"), "demo", world_size=4, clock=clock, node=f"node-{number}")
            for number in range(16)
        ]
        runners = [
            Runner(member, InlineHost(lambda script=script: TinyEngine(script)), clock=clock)
            for member, script in zip(members, scripts, strict=True)
        ]
        running = [asyncio.create_task(runner.run()) for runner in runners]
        await made.run(planner.launch(made.spec))
        serving = [number for number, runner in enumerate(runners) if runner.status.kind == "Ready"]
        assert len(serving) == 4
        assert sorted(members[number].rank for number in serving) == [0, 1, 2, 3]
        assert [script.calls.count("load") for script in scripts] == [int(number in serving) for number in range(16)]
        assert made.loads_per_epoch() == [1]

        await made.until(lambda: sum(task.done() for task in running) == 12, "the others to step back")
        for number, task in enumerate(running):
            if number not in serving:
                error = task.exception()
                assert isinstance(error, RankTaken)
                assert "Stop one, or start no more runners than there are ranks" in str(error)
        assert planner.instances["demo"].serving, "and nobody has disturbed the four"
        for runner in runners:
            runner.stop()
        await made.run(asyncio.gather(*running, return_exceptions=True))
        for member in members:
            await member.close()


async def test_a_left_over_runner_takes_the_place_of_one_that_dies_while_it_waits(
    store: FakeStore, clock: ManualClock
) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        spare = Member(store.client("spare"), "demo", world_size=2, clock=clock)
        script = Script(clock)
        runner = Runner(spare, InlineHost(lambda: TinyEngine(script)), clock=clock)
        waiting = asyncio.create_task(runner.run())
        await made.kill(1)
        await made.until(lambda: not instance.state.serving, "the death to be noticed")
        await made.run(instance.ready())
        assert spare.rank == 1
        assert script.calls.count("load") == 1
        runner.stop()
        await made.run(waiting)
        await spare.close()


async def test_runners_of_a_launch_with_16_ranks_that_live_on_are_no_part_of_a_launch_with_4(
    store: FakeStore, clock: ManualClock
) -> None:
    """Ranks are counted by identity: the twelve that nobody asked for are neither waited for nor told to load."""
    async with cluster(store, clock, 16, told=False) as made, made.planner() as planner:
        await made.run(planner.launch(made.spec))
        assert made.statuses == ["Ready"] * 16
        four = made.spec.model_copy(update={"world_size": 4})
        await made.run(planner.launch(four))
        assert made.statuses == ["Ready"] * 4 + ["Idle"] * 12, "the twelve have torn down, too"
        assert [script.calls.count("load") for script in made.scripts] == [2] * 4 + [1] * 12
        assert {(one.first, one.last) for one in made.dispatched("LoadModel")} == {(0, 15), (0, 3)}

        for left_over in range(4, 16):
            await made.kill(left_over)  # what they do is nobody's business any more
        await clock.advance(30)
        assert planner.instances["demo"].serving
        assert made.loads_per_epoch() == [1, 1]

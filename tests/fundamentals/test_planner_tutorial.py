"""Plan a model over four ranks, in a unit test, without a server. Read from top to bottom.

The ranks are `ScriptedRunner`: real runners with an engine that does what the test says. The store is a `FakeStore`: it runs the real
scripts, in this process. Time is a `ManualClock`: it stands still until the test lets it pass, so nothing here sleeps.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from barrier import Aborted, RankView, Released, Settings, Snapshot, TimedOut
from barrier.testing import FakeStore, ManualClock
from planner import GenerationFailed, InstanceFailed, InstanceSpec, LoadGate, Planner, Policy
from planner.decide import GiveUp, View, Wait, decide
from planner.recovery import Memory
from runner.testing import ScriptedRunner, scripted_runners

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """anyio's plugin for pytest runs the tests; on asyncio, whatever else is installed."""
    return "asyncio"


SPEC = InstanceSpec(name="demo", world_size=4)


@pytest.fixture
def clock() -> ManualClock:
    """Time stands still until `clock.run` or `clock.advance` lets it pass."""
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> FakeStore:
    """One store for everybody; its leases and its TIME follow the same clock."""
    return FakeStore(clock)


@pytest.fixture
async def ranks(store: FakeStore) -> AsyncGenerator[list[ScriptedRunner]]:
    """Four ranks that have claimed their places and wait for work, as four processes on four machines would."""
    async with scripted_runners(store, "demo", 4) as runners:
        yield runners


def statuses(ranks: list[ScriptedRunner]) -> list[str]:
    return [rank.status.kind for rank in ranks]


async def test_1_launch_brings_every_rank_up(store: FakeStore, clock: ManualClock, ranks: list[ScriptedRunner]) -> None:
    """`launch` returns once all four ranks serve. `clock.run` awaits it while time passes."""
    async with Planner(store.client("planner"), clock=clock) as planner:
        await clock.run(planner.launch(SPEC))
        assert statuses(ranks) == ["Ready", "Ready", "Ready", "Ready"]


async def test_2_every_rank_is_told_the_same_steps(
    store: FakeStore, clock: ManualClock, ranks: list[ScriptedRunner]
) -> None:
    """Connect, load, warm up: each rank reads the steps from one log, in one order, once each."""
    async with Planner(store.client("planner"), clock=clock) as planner:
        await clock.run(planner.launch(SPEC))
        for rank in ranks:
            assert rank.kinds == ["ConnectToGroup", "LoadModel", "StartWarmup"]


async def test_3_nothing_is_loaded_while_one_rank_is_still_connecting(
    store: FakeStore, clock: ManualClock, ranks: list[ScriptedRunner]
) -> None:
    """The barrier. Three ranks are connected, one is not: LoadModel waits, for as long as it takes, and nobody crashes."""
    ranks[3].hold("connect")
    async with Planner(store.client("planner"), clock=clock) as planner:
        launching = asyncio.create_task(planner.launch(SPEC))
        await clock.advance(30)
        assert statuses(ranks) == ["Connected", "Connected", "Connected", "Connecting"]
        assert all("LoadModel" not in rank.kinds for rank in ranks)

        ranks[3].let("connect")
        await clock.run(launching)
        assert all(rank.kinds.count("LoadModel") == 1 for rank in ranks)


async def test_4_it_says_whom_it_waits_for(store: FakeStore, clock: ManualClock, ranks: list[ScriptedRunner]) -> None:
    """One sentence names every missing rank, its machine and what it is doing. The log and the timeout say the same one."""
    ranks[3].hold("connect")
    async with Planner(store.client("planner"), clock=clock) as planner:
        instance = await planner.launch(SPEC, wait=False)
        await clock.advance(30)
        sentence = await instance.explain()
        assert sentence.startswith("demo, attempt 1: waiting for 1 of 4 ranks: rank 3 on node-3 (Connecting for 30.0 s")


async def test_5_text_comes_out(store: FakeStore, clock: ManualClock, ranks: list[ScriptedRunner]) -> None:
    """`generate` yields the text piece by piece."""
    async with Planner(store.client("planner"), clock=clock) as planner:
        instance = await clock.run(planner.launch(SPEC))

        async def read() -> list[str]:
            return [piece async for piece in instance.generate("Why do all ranks have to wait for one another?")]

        assert await clock.run(read()) == list(ranks[0].engine.text)


async def test_6_a_rank_that_fails_once_costs_one_attempt_and_no_process(
    store: FakeStore, clock: ManualClock, ranks: list[ScriptedRunner]
) -> None:
    """A failure ends the attempt for all four ranks. They tear down, the planner pauses, and the next attempt succeeds."""
    ranks[1].fail("load", "out of memory")
    lives = [rank.incarnation for rank in ranks]
    async with Planner(store.client("planner"), clock=clock) as planner:
        instance = await clock.run(planner.launch(SPEC))
        snapshot = await instance.inspect()
        assert snapshot.epoch is not None
        assert snapshot.epoch.ordinal == 2, "the second attempt"
        assert [rank.incarnation for rank in ranks] == lives, "the same four processes"


async def test_7_a_hopeless_rank_is_named_and_the_work_is_bounded(
    store: FakeStore, clock: ManualClock, ranks: list[ScriptedRunner]
) -> None:
    """A rank that always fails spends its budget. The instance is given up with one sentence: which rank, how often, why."""
    ranks[1].fail("load", "out of memory", times=None)
    async with Planner(store.client("planner"), clock=clock, policy=Policy(max_failures=2)) as planner:
        with pytest.raises(InstanceFailed) as given_up:
            await clock.run(planner.launch(SPEC))
    assert str(given_up.value) == (
        "demo is given up after 3 failed attempts in a row (each time by rank 1; the limit is 2 retries). "
        "The last one: rank 1 on node-1 failed: out of memory"
    )
    assert [rank.kinds.count("LoadModel") for rank in ranks] == [3, 3, 3, 3]


async def test_8_a_permanent_failure_is_not_tried_again(
    store: FakeStore, clock: ManualClock, ranks: list[ScriptedRunner]
) -> None:
    """An engine may say that trying again cannot help."""
    ranks[2].fail("load", "there is no such model", permanent=True)
    async with Planner(store.client("planner"), clock=clock) as planner:
        with pytest.raises(InstanceFailed, match="rank 2 on node-2 failed: there is no such model"):
            await clock.run(planner.launch(SPEC))
    assert ranks[2].kinds.count("LoadModel") == 1


async def test_9_a_rank_that_dies_is_missed_and_comes_back(
    store: FakeStore, clock: ManualClock, ranks: list[ScriptedRunner]
) -> None:
    """`die` is SIGKILL: nothing more is said, and the rank's lease runs out. Its restart is a new incarnation, for which the
    planner opens a new attempt.
    """
    async with Planner(store.client("planner"), clock=clock) as planner:
        instance = await clock.run(planner.launch(SPEC))
        await ranks[2].die()
        await clock.advance(8)  # a lease and a heartbeat
        assert not instance.state.serving
        await clock.run(ranks[2].restart())
        await clock.run(instance.ready())
        assert statuses(ranks) == ["Ready"] * 4


async def test_10_whoever_waits_for_text_is_told_when_the_attempt_ends(
    store: FakeStore, clock: ManualClock, ranks: list[ScriptedRunner]
) -> None:
    """A generation never hangs because a rank is gone: it ends with the reason."""
    async with Planner(store.client("planner"), clock=clock) as planner:
        instance = await clock.run(planner.launch(SPEC))
        ranks[0].hold("generate")

        async def read() -> list[str]:
            return [piece async for piece in instance.generate("Why?")]

        reading = asyncio.create_task(read())
        await clock.advance(1)
        await ranks[3].die()
        with pytest.raises(GenerationFailed, match="rank 3 fell silent"):
            await clock.run(reading)


async def test_11_a_store_that_forgets_everything_costs_no_loaded_model(
    store: FakeStore, clock: ManualClock, ranks: list[ScriptedRunner]
) -> None:
    """After a flush every rank says again where it is. They all agree, so the record is written back as it was."""
    async with Planner(store.client("planner"), clock=clock) as planner:
        instance = await clock.run(planner.launch(SPEC))
        before = await instance.inspect()
        store.flush()
        await clock.advance(20)
        after = await instance.inspect()
        assert before.epoch is not None
        assert after.epoch is not None
        assert after.epoch.id == before.epoch.id
        assert all(rank.kinds.count("LoadModel") == 1 for rank in ranks)


async def test_12_another_planner_takes_over(store: FakeStore, clock: ManualClock, ranks: list[ScriptedRunner]) -> None:
    """Everything that a planner must know is in the store. One that is cut off is succeeded, and no rank notices."""
    async with Planner(store.client("first"), clock=clock) as first:
        await clock.run(first.launch(SPEC))
        store.partition("first")
        async with Planner(store.client("second"), clock=clock) as second:
            instance = await clock.run(second.launch(SPEC))
            await clock.advance(10)
            assert instance.state.leading
            assert all(rank.kinds.count("LoadModel") == 1 for rank in ranks)


async def test_13_the_policy_is_a_pure_function() -> None:
    """What the planner does next, and why, is computed from a picture. So a branch of the policy needs no cluster to be tested,
    and an hour-long wait takes no time.
    """
    nobody_is_here = Snapshot(
        group="demo", world_size=4, now_ms=0, epoch=None, ranks=tuple(RankView(rank) for rank in range(4))
    )
    view = View(SPEC, Policy(assemble_timeout=3_600), Settings(), nobody_is_here, Memory.fresh(now=0.0))

    at_first = decide(view, now=1.0)
    assert isinstance(at_first, Wait)
    assert at_first.reason == "no attempt is under way; waiting for rank 0, rank 1, rank 2, rank 3 to come"

    an_hour_later = decide(view, now=3_600.0)
    assert isinstance(an_hour_later, Wait)  # a rank that is away may come at any time, unless a limit is set
    assert an_hour_later.overdue
    assert "did not come within 3,600 s" in an_hour_later.reason

    limited = replace(view, policy=Policy(assemble_timeout=60, absence_limit=3_600))
    assert isinstance(decide(limited, now=3_599.0), Wait)
    assert isinstance(decide(limited, now=3_600.0), GiveUp)


async def test_14_the_gate_can_stand_in_front_of_your_own_planner(
    store: FakeStore, clock: ManualClock, ranks: list[ScriptedRunner]
) -> None:
    """If you have a planner already, keep it, and let each step pass the gate. Its answer is a value that says what happened."""
    ranks[3].hold("connect")
    async with LoadGate(store.client("yours"), "demo", world_size=4, clock=clock) as gate:
        await clock.run(gate.open(timeout=10))
        await clock.run(gate.pass_step("connect", timeout=10))

        too_early = await clock.run(gate.pass_step("load", timeout=10))
        assert isinstance(too_early, TimedOut)
        assert too_early.missing == (3,)

        ranks[3].let("connect")
        assert isinstance(await clock.run(gate.pass_step("load", timeout=10)), Released)

        ranks[0].fail("warm_up", "the fan is loud")
        await clock.run(gate.pass_step("warm up followers", timeout=10))
        await clock.run(gate.pass_step("warm up leader", timeout=10))
        ended = await clock.run(gate.arrived("warm up leader", timeout=10))
        assert isinstance(ended, Aborted)
        assert ended.verdict.culprit == 0

"""The planner's shell against real runners when things go wrong: ranks that fail, refuse, die and come back; stores that forget;
planners that die at every point and several that plan at once.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from barrier import Barrier, Leading, Opened, Settings, adopt
from barrier.store.keys import NamespaceKeys
from barrier.testing import FakeStore, FaultPlan, ManualClock
from planner import Instance, InstanceFailed, InstanceSpec, Planner, Policy
from planner.registry import Registry
from runner.admission import Invalid, NotYet, Stale
from runner.messages import TaskKind
from tests.unit.planner.cluster import WORDS, Cluster, Phase, Tripwire, cluster, text_of

pytestmark = pytest.mark.anyio

TEXT = "".join(WORDS)
PHASES: list[Phase] = ["connect", "load", "warm_up"]


async def serves(made: Cluster, instance: Instance) -> None:
    """The proof that an instance is up: it is Ready, and text comes out."""
    await made.run(instance.ready(), limit=600)
    assert await made.run(text_of(instance.generate("Why?")), limit=60) == TEXT
    assert max(made.loads_per_epoch()) == 1, "LoadModel goes out once in an attempt"


def with_layers(made: Cluster, layers: int) -> InstanceSpec:
    """The same instance with another model."""
    return made.spec.model_copy(update={"model": made.spec.model.model_copy(update={"total_layers": layers})})


# --- ranks that fail ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("phase", PHASES)
async def test_a_rank_that_fails_once_is_tried_again_and_the_other_processes_live_on(
    store: FakeStore, clock: ManualClock, world_size: int, phase: Phase
) -> None:
    if world_size == 1 and phase == "connect":
        phase = "load"  # a single rank has nobody to connect to
    async with cluster(store, clock, world_size) as made, made.planner() as planner:
        processes = dict(made.ranks)
        made.scripts[-1].fail(phase, "the cable is loose")
        instance = await made.run(planner.launch(made.spec))
        await serves(made, instance)
        assert len(made.epochs()) == 2
        assert f"rank {world_size - 1} on node-{world_size - 1} failed: the cable is loose" in made.verdicts()[0]
        assert made.ranks == processes
        assert all(not rank.task.done() for rank in made.ranks.values())
        assert made.rejections() == 0
        if phase == "connect":
            assert made.loads_per_epoch() == [1]
        else:
            assert made.loads_per_epoch() == [1, 1]


@pytest.mark.parametrize("phase", PHASES)
async def test_a_rank_that_always_fails_ends_the_instance_with_the_rank_the_reason_and_bounded_work(
    store: FakeStore, clock: ManualClock, phase: Phase
) -> None:
    policy = Policy(max_failures=2)
    async with cluster(store, clock, 3) as made, made.planner(policy=policy) as planner:
        processes = dict(made.ranks)
        made.scripts[1].fail_always(phase, "the cable is cut")
        with pytest.raises(InstanceFailed) as told:
            await made.run(planner.launch(made.spec))
        assert str(told.value) == (
            "demo is given up after 3 failed attempts in a row (each time by rank 1; the limit is 2 retries). "
            "The last one: rank 1 on node-1 failed: the cable is cut"
        )
        per_attempt = {"connect": 1, "load": 2, "warm_up": 4}[phase]
        assert len(made.dispatched()) <= 3 * per_attempt
        assert len(made.dispatched("LoadModel")) == (0 if phase == "connect" else 3)
        await clock.advance(60)
        assert len(made.epochs()) == 3, "given up means that nothing more is tried"
        assert made.ranks == processes


async def test_a_permanent_failure_ends_the_instance_at_the_first_attempt(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        made.scripts[1].fail("load", "no such model: tiny", permanent=True)
        with pytest.raises(
            InstanceFailed, match="^demo cannot be brought up: rank 1 on node-1 failed: no such model: tiny$"
        ):
            await made.run(planner.launch(made.spec))
        assert made.loads_per_epoch() == [1]
        assert made.statuses == ["Idle", "Idle"], "the runners live and are free for something else"


async def test_an_instance_that_was_given_up_can_be_launched_again(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        made.scripts[1].fail("load", "no such model", permanent=True)
        with pytest.raises(InstanceFailed):
            await made.run(planner.launch(made.spec))
        instance = await made.run(planner.launch(made.spec))  # somebody has put the model there
        await serves(made, instance)


async def test_one_failure_each_of_many_ranks_does_not_spend_the_budget_of_any(
    store: FakeStore, clock: ManualClock
) -> None:
    policy = Policy(max_failures=1, backoff_base=0.01, backoff_cap=0.01)
    async with cluster(store, clock, 6) as made, made.planner(policy=policy) as planner:
        for number, script in enumerate(made.scripts):
            script.fail("load", f"rank {number} has its turn", after=number)
        instance = await made.run(planner.launch(made.spec))
        await serves(made, instance)
        assert [f"rank {number} has its turn" in verdict for number, verdict in enumerate(made.verdicts())] == [
            True
        ] * 6
        assert len(made.epochs()) == 7


async def test_success_resets_the_budget(store: FakeStore, clock: ManualClock) -> None:
    policy = Policy(max_failures=1)
    async with cluster(store, clock, 2) as made, made.planner(policy=policy) as planner:
        instance = await made.run(planner.launch(made.spec))
        for failures in range(1, 6):  # more than the budget, each after a success
            made.scripts[1].fail("generate", "the engine coughs")
            made.scripts[0].hold("generate")
            with pytest.raises(Exception, match="the engine coughs"):
                await made.run(text_of(instance.generate("Why?")))
            made.scripts[0].let("generate")
            await made.until(lambda n=failures: len(made.verdicts()) == n, "the attempt to end")
            await serves(made, instance)


async def test_being_ready_for_long_enough_resets_the_budget(store: FakeStore, clock: ManualClock) -> None:
    policy = Policy(max_failures=1, stable_after=30)
    async with cluster(store, clock, 2) as made, made.planner(policy=policy) as planner:
        instance = await made.run(planner.launch(made.spec))
        for _ in range(4):
            await made.kill(1)
            await made.until(lambda: not instance.state.serving, "the death to be noticed")
            made.start(1)
            await made.run(instance.ready())
            await clock.advance(policy.stable_after + 10)
        await serves(made, instance)


async def test_failing_over_and_over_without_success_in_between_does_not(store: FakeStore, clock: ManualClock) -> None:
    policy = Policy(max_failures=1, stable_after=10**6)
    async with cluster(store, clock, 2) as made, made.planner(policy=policy) as planner:
        instance = await made.run(planner.launch(made.spec))
        for _ in range(2):
            await made.kill(1)
            await made.until(lambda: not instance.state.serving, "the death to be noticed")
            made.start(1)
            await made.until(lambda: instance.state.serving or instance.state.over, "the outcome")
        with pytest.raises(InstanceFailed, match="given up after 2 failed attempts in a row .each time by rank 1"):
            await made.run(instance.ready())


async def test_the_pause_before_the_next_attempt_follows_the_policy(store: FakeStore, clock: ManualClock) -> None:
    seed = random.randrange(10**6)
    policy = Policy(backoff_base=64.0, backoff_cap=64.0, max_failures=5)
    async with cluster(store, clock, 2) as made, made.planner(policy=policy, seed=seed) as planner:
        for _ in range(3):
            made.scripts[1].fail("load", "the cable is loose")
        instance = await made.run(planner.launch(made.spec, wait=False))
        pauses: list[float] = []
        for attempt in range(1, 4):
            await made.until(lambda n=attempt: len(made.verdicts()) == n, "the attempt to fail")
            failed_at = clock.now()
            assert instance.state.reason
            await made.until(lambda n=attempt: len(made.epochs()) == n + 1, "the next attempt")
            pauses.append(clock.now() - failed_at)
        await serves(made, instance)
        assert all(0 <= pause <= 64.2 for pause in pauses), f"seed {seed}: {pauses}"
        assert len({round(pause, 1) for pause in pauses}) > 1, f"seed {seed}: no jitter in {pauses}"


# --- ranks that refuse ----------------------------------------------------------------------------------------------------


async def test_what_all_ranks_refuse_as_not_yet_possible_is_asked_again_in_the_same_attempt(
    store: FakeStore, clock: ManualClock
) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        for refusals in made.refusals:
            refusals.refuse("LoadModel", 2)
        instance = await made.run(planner.launch(made.spec))
        await serves_after_retries(made, instance)
        assert len(made.epochs()) == 1
        assert len(made.dispatched("LoadModel")) == 3
        assert len({one.task_id for one in made.dispatched("LoadModel")}) == 1, "it is one task, however often asked"
        assert [script.calls.count("load") for script in made.scripts] == [1, 1]


async def test_a_rank_that_refuses_for_ever_ends_the_instance_with_rank_status_and_reason_and_bounded_work(
    store: FakeStore, clock: ManualClock
) -> None:
    policy = Policy(max_failures=2, max_rejections=3)
    async with cluster(store, clock, 1) as made, made.planner(policy=policy) as planner:
        made.refusals[0].refuse("LoadModel", 10**6, NotYet("the disk is asleep"))
        with pytest.raises(InstanceFailed) as told:
            await made.run(planner.launch(made.spec))
        assert str(told.value) == (
            "demo is given up after 3 failed attempts in a row (each time by rank 0; the limit is 2 retries). The last one: "
            "rank 0 on node-0, which is Idle, rejected LoadModel 4 times (NotYet: the disk is asleep)"
        )
        assert len(made.dispatched("LoadModel")) == 3 * 4
        assert made.rejections() == 3 * 4


@pytest.mark.parametrize("kind", ["ConnectToGroup", "LoadModel", "StartWarmup"])
async def test_one_rank_that_refuses_for_ever_is_charged_and_not_the_others_that_wait_for_it(
    store: FakeStore, clock: ManualClock, kind: TaskKind
) -> None:
    policy = Policy(max_failures=1, backoff_base=0.1)
    async with cluster(store, clock, 3) as made, made.planner(policy=policy) as planner:
        made.refusals[1].refuse(kind, 10**6)
        phases: dict[TaskKind, Phase] = {"ConnectToGroup": "connect", "LoadModel": "load", "StartWarmup": "warm_up"}
        for number in (0, 2):
            made.scripts[number].hold(phases[kind])
        began = clock.now()
        with pytest.raises(
            InstanceFailed, match=rf"each time by rank 1; .*rank 1 on node-1, which is \w+, rejected {kind}"
        ):
            await made.run(planner.launch(made.spec))
        assert clock.now() - began < 10, "nobody waited for a stall"
        assert len(made.dispatched()) <= 2 * 4
        assert len(made.dispatched("LoadModel")) <= 2
        for number in (0, 2):
            made.scripts[number].held.clear()


async def test_a_rank_that_refuses_twice_and_then_does_it_is_ready_in_the_end(
    store: FakeStore, clock: ManualClock
) -> None:
    async with cluster(store, clock, 3) as made, made.planner() as planner:
        made.refusals[1].refuse("LoadModel", 2)
        instance = await made.run(planner.launch(made.spec))
        assert made.rejections() == 2
        await serves_after_retries(made, instance)


async def serves_after_retries(made: Cluster, instance: Instance) -> None:
    """As `serves`, where refusals may have made a second asking necessary."""
    await made.run(instance.ready())
    assert await made.run(text_of(instance.generate("Why?"))) == TEXT


@pytest.mark.parametrize(("how", "attempts"), [(Stale("too late"), 2), (Invalid("never"), 1)])
async def test_a_refusal_for_good_ends_the_attempt(
    store: FakeStore, clock: ManualClock, how: Any, attempts: int
) -> None:
    policy = Policy(max_failures=1)
    async with cluster(store, clock, 2) as made, made.planner(policy=policy) as planner:
        made.refusals[1].refuse("LoadModel", 10**6, how)
        with pytest.raises(
            InstanceFailed, match=f"rank 1 on node-1, which is Connected, rejected LoadModel.*{how.hint}"
        ):
            await made.run(planner.launch(made.spec))
        assert len(made.epochs()) == attempts


# --- ranks that die -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def held_at(made: Cluster, status: str) -> AsyncGenerator[None]:
    """Keep the group so that rank 1 is in this status and stays there."""
    phase: dict[str, tuple[int, Phase] | None] = {
        "Idle": None,
        "Connecting": (1, "connect"),
        "Connected": (0, "connect"),
        "Loading": (1, "load"),
        "Loaded": (0, "load"),
        "WarmingUp": (1, "warm_up"),
        "Ready": (0, "warm_up"),
        "Running": (1, "generate"),
    }
    held = phase[status]
    if held is not None:
        made.scripts[held[0]].hold(held[1])
    yield
    if held is not None:
        made.scripts[held[0]].let(held[1])


STATUSES = ["Connecting", "Connected", "Loading", "Loaded", "WarmingUp", "Ready", "Running"]


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_a_rank_that_is_restarted_in_any_status_is_ready_again_and_the_others_are_the_same_processes(
    store: FakeStore, clock: ManualClock, status: str, how: str
) -> None:
    async with cluster(store, clock, 3) as made, made.planner() as planner:
        async with held_at(made, status):
            instance = await made.run(planner.launch(made.spec, wait=False))
            text = None
            if status == "Running":
                await made.run(instance.ready())
                text = asyncio.create_task(text_of(instance.generate("Why?")))
            await made.until(lambda: made.statuses[1] == status, f"rank 1 to be {status}")
            others = {number: rank for number, rank in made.ranks.items() if number != 1}
            await (made.kill(1) if how == "killed" else made.stop(1))
        made.start(1)
        await made.until(lambda: len(made.epochs()) == 2, "the next attempt")
        await serves(made, instance)
        if text is not None:
            await made.run(asyncio.gather(text, return_exceptions=True))
        assert made.ranks.items() >= others.items()
        assert len(made.epochs()) == 2
        assert '"culprit":1' in made.verdicts()[0]
        assert made.rejections() == 0


async def test_a_silent_death_is_noticed_within_one_lease_and_one_heartbeat(
    store: FakeStore, clock: ManualClock
) -> None:
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    async with cluster(store, clock, 3) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        await clock.advance(rng.uniform(0, 20))
        await made.kill(2)
        died = clock.now()
        await made.until(lambda: len(made.verdicts()) == 1, "the death to be noticed")
        assert clock.now() - died <= Settings().lease + Settings().heartbeat, f"seed {seed}"
        assert "rank 2 fell silent" in made.verdicts()[0]
        made.start(2)
        await serves(made, instance)


async def test_a_rank_that_leaves_politely_is_noticed_at_once(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 3) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        began = clock.now()
        await made.stop(1)
        await made.until(lambda: len(made.verdicts()) == 1, "the leave to be noticed")
        assert clock.now() - began < 0.2
        made.start(1)
        await serves(made, instance)


async def test_a_rank_that_stays_away_is_waited_for_and_taken_up_again_when_it_comes(
    store: FakeStore, clock: ManualClock
) -> None:
    policy = Policy(assemble_timeout=60)
    async with cluster(store, clock, 2) as made, made.planner(policy=policy) as planner:
        instance = await made.run(planner.launch(made.spec))
        await made.kill(1)
        await made.until(lambda: instance.state.overdue, "the planner to say that it takes long")
        with pytest.raises(InstanceFailed, match="rank 1 did not come within 60 s.*The planner waits on"):
            await made.run(instance.ready())
        await clock.advance(10 * policy.assemble_timeout)
        assert not instance.state.over
        made.start(1)
        await serves(made, instance)
        assert not instance.state.overdue


async def test_a_planner_that_takes_over_while_a_rank_is_away_takes_the_instance_up_when_it_comes(
    store: FakeStore, clock: ManualClock
) -> None:
    async with cluster(store, clock, 2) as made, made.planner("b") as second:
        async with made.planner("a") as first:
            instance = await made.run(first.launch(made.spec))
            await made.kill(1)
            await made.until(lambda: instance.state.overdue, "the first planner to say that it takes long")
        running = asyncio.create_task(second.run())
        await made.until(lambda: second.instances and second.instances["demo"].overdue, "the second one to say so too")
        assert "rank 1 fell silent" in second.instances["demo"].reason, "what happened is not forgotten"
        made.start(1)
        await made.until(lambda: second.instances["demo"].serving, "the second planner to take it up")
        running.cancel()


async def test_an_instance_of_which_all_ranks_are_away_is_taken_up_when_they_come(
    store: FakeStore, clock: ManualClock
) -> None:
    async with cluster(store, clock, 2) as made, made.planner(policy=Policy(max_failures=1)) as planner:
        instance = await made.run(planner.launch(made.spec))
        for rank in range(2):
            await made.kill(rank)
        await made.until(lambda: instance.state.overdue, "the planner to say that it takes long")
        assert "rank 0, rank 1 did not come within 120 s" in instance.state.reason
        made.start_all()
        await serves(made, instance)


async def test_an_absence_neither_costs_nor_gives_back_what_failures_cost(store: FakeStore, clock: ManualClock) -> None:
    policy = Policy(max_failures=1, backoff_base=0.01, backoff_cap=0.01)
    async with cluster(store, clock, 2) as made, made.planner(policy=policy) as planner:
        made.scripts[1].fail("load", "the cable is loose")
        made.scripts[0].hold("warm_up")
        instance = await made.run(planner.launch(made.spec, wait=False))
        await made.until(lambda: len(made.epochs()) == 2 and "WarmingUp" in made.statuses, "the second attempt")
        await made.stop(1)
        await made.until(lambda: instance.state.overdue, "the planner to say that it takes long")
        made.scripts[0].let("warm_up")
        made.scripts[1].fail("load", "the cable is loose again")
        made.start(1)
        with pytest.raises(
            InstanceFailed, match="given up after 2 failed attempts in a row .each time by rank 1.*loose again"
        ):
            await made.run(instance.ready())
        assert len(made.verdicts()) == 3


async def test_a_limit_for_absence_may_be_set_while_the_instance_serves(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        patient = made.spec.model_copy(update={"absence_limit": 90.0})
        assert (await made.run(planner.launch(patient))).spec == patient
        assert (made.verdicts(), len(made.epochs())) == ([], 1)
        await made.kill(1)
        await made.until(lambda: instance.state.over, "the verdict of the planner")
        assert "rank 1 did not come within 90 s" in instance.state.failure


async def test_a_rank_that_stays_away_for_longer_than_the_limit_ends_the_instance(
    store: FakeStore, clock: ManualClock
) -> None:
    policy = Policy(assemble_timeout=60, absence_limit=90)
    async with cluster(store, clock, 2) as made, made.planner(policy=policy) as planner:
        instance = await made.run(planner.launch(made.spec))
        await made.kill(1)
        await made.until(lambda: instance.state.over, "the verdict of the planner")
        with pytest.raises(InstanceFailed, match="rank 1 did not come within 90 s, which is the absence limit"):
            await made.run(instance.ready())


@pytest.mark.parametrize("away", ["the one that leaves", "the one that is cut off"])
async def test_a_node_that_comes_and_goes_is_never_given_up(store: FakeStore, clock: ManualClock, away: str) -> None:
    policy = Policy(max_failures=0, stable_after=10**6)
    async with cluster(store, clock, 2) as made, made.planner(policy=policy) as planner:
        instance = await made.run(planner.launch(made.spec))
        for _ in range(4):
            if away == "the one that leaves":
                await made.stop(1)
                await made.until(lambda: not instance.state.serving, "the leave to be noticed")
                made.start(1)
            else:
                store.partition("demo rank 1")
                await made.until(lambda: not instance.state.serving, "the silence to be noticed")
                store.heal("demo rank 1")
            await made.until(lambda: instance.state.serving or instance.state.over, "the rank to be back", limit=600)
        await serves(made, instance)


@pytest.mark.parametrize("phase", PHASES)
async def test_a_rank_that_hangs_is_blamed_when_its_step_has_stalled(
    store: FakeStore, clock: ManualClock, phase: Phase
) -> None:
    policy = Policy(connect_stall=20, load_stall=20, warmup_stall=20, max_failures=1)
    async with cluster(store, clock, 3) as made, made.planner(policy=policy) as planner:
        made.scripts[1].hold(phase)
        instance = await made.run(planner.launch(made.spec, wait=False))
        began = clock.now()
        await made.until(made.verdicts, "the stall to be noticed")
        assert 20 <= clock.now() - began <= 26
        assert '"culprit":1' in made.verdicts()[0]
        assert "nothing moved for 20 s" in made.verdicts()[0]
        made.scripts[1].let(phase)
        await serves(made, instance)


async def test_a_slow_load_is_not_a_stall(store: FakeStore, clock: ManualClock) -> None:
    policy = Policy(load_stall=20)
    async with cluster(store, clock, 2) as made, made.planner(policy=policy) as planner:
        made.scripts[1].pace = 15.0
        began = clock.now()
        instance = await made.run(planner.launch(made.spec))
        assert clock.now() - began >= 4 * 15
        assert made.verdicts() == []
        assert instance.state.serving


# --- stores that forget ---------------------------------------------------------------------------------------------------


async def test_a_flush_costs_no_loaded_model(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 3) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        before = await made.run(instance.inspect())
        store.flush()
        await clock.advance(20)
        after = await made.run(instance.inspect())
        assert before.epoch is not None
        assert after.epoch is not None
        assert after.epoch.id == before.epoch.id
        assert await made.run(text_of(instance.generate("Why?"))) == TEXT
        assert made.dispatched("LoadModel") == [], "the new log has none, so nobody was asked again"
        assert [script.calls.count("load") for script in made.scripts] == [1, 1, 1]
        await made.run(instance.stop())
        assert made.statuses == ["Idle"] * 3


async def test_a_flush_is_healed_of_the_desired_state_before_anything_is_decided(
    store: FakeStore, clock: ManualClock
) -> None:
    """Else a planner that began after the flush could not succeed one that is killed meanwhile. Found by make chaos."""
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        made.scripts[0].hold("connect")
        await made.run(planner.launch(made.spec, wait=False))
        await made.until(lambda: made.statuses == ["Connecting", "Connected"], "rank 1 to connect")
        store.flush()
        await clock.advance(
            Settings().backstop + 1
        )  # seen by then; the ranks disagree, so one lease passes before a new record
        assert made.keys.epoch not in store.contents()
        assert NamespaceKeys("rankgate").instances in store.contents()
        made.scripts[0].let("connect")


async def test_a_restart_without_the_data_costs_no_loaded_model(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        store.restart(keep_data=False)
        await clock.advance(30)
        assert await made.run(text_of(instance.generate("Why?"))) == TEXT
        assert [script.calls.count("load") for script in made.scripts] == [1, 1]


@pytest.mark.parametrize("status", STATUSES[:-1])
async def test_a_flush_in_any_status_ends_in_ready(store: FakeStore, clock: ManualClock, status: str) -> None:
    async with cluster(store, clock, 3) as made, made.planner() as planner:
        async with held_at(made, status):
            instance = await made.run(planner.launch(made.spec, wait=False))
            await made.until(lambda: made.statuses[1] == status, f"rank 1 to be {status}")
            store.flush()
            await clock.advance(1)
        await serves(made, instance) if made.dispatched("LoadModel") else await serves_after_retries(made, instance)
        assert made.rejections() == 0
        await made.run(instance.stop())
        assert made.statuses == ["Idle"] * 3


@pytest.mark.parametrize("key", ["epoch", "leader", "tasks", "signals", "events", "requests"])
async def test_a_single_key_that_is_lost_costs_no_loaded_model(store: FakeStore, clock: ManualClock, key: str) -> None:
    async with cluster(store, clock, 3) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        assert await made.run(text_of(instance.generate("Why?"))) == TEXT  # so that there is a key for requests
        await clock.advance(7)
        store.delete(getattr(made.keys, key))
        await clock.advance(20)
        assert await made.run(text_of(instance.generate("Why?"))) == TEXT
        assert [script.calls.count("load") for script in made.scripts] == [1, 1, 1]
        assert made.rejections() == 0


async def test_a_report_that_is_lost_heals_with_the_next_heartbeat(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 3) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        for seconds in (0.1, 1.0, 1.9):
            await clock.advance(seconds)
            store.delete(made.keys.rank(1))
            await clock.advance(20)
            await serves(made, instance)


async def test_a_claim_that_is_lost_heals_with_the_next_heartbeat(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        store.delete(made.keys.claim(1))
        await clock.advance(5)
        assert made.keys.claim(1) in store.contents()
        await serves(made, instance)
        assert made.loads_per_epoch() == [1]


async def test_desired_state_that_is_lost_comes_back(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        store.delete("{rankgate:-}:instances", "{rankgate:-}:changes")
        await clock.advance(60)
        assert "{rankgate:-}:instances" in store.contents()
        await serves(made, instance)


async def test_a_stop_right_after_a_flush_still_tears_every_rank_down(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 3) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        store.flush()
        await made.run(instance.stop())
        await clock.advance(20)
        assert made.statuses == ["Idle"] * 3
        assert instance.state.stopped


async def test_a_roll_back_of_the_store_ends_in_ready_without_loading_twice_in_an_attempt(
    store: FakeStore, clock: ManualClock
) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        made.scripts[1].hold("connect")
        instance = await made.run(planner.launch(made.spec, wait=False))
        await made.until(lambda: made.statuses == ["Connected", "Connecting"], "rank 0 to connect")
        earlier = store.snapshot()
        made.scripts[1].let("connect")
        await made.run(instance.ready())
        store.roll_back(earlier)
        await clock.advance(30)
        await serves(made, instance)
        assert max(script.calls.count("load") for script in made.scripts) <= 2
        assert len(made.epochs()) == 2


async def test_an_outage_of_the_store_is_waited_out(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        store.partition()
        await clock.advance(60)
        assert "the store does not answer" in instance.state.reason
        assert not instance.state.over
        store.heal()
        await clock.advance(20)
        assert await made.run(text_of(instance.generate("Why?"))) == TEXT
        assert [script.calls.count("load") for script in made.scripts] == [1, 1], "the ranks were well all the time"


async def test_a_planner_that_is_cut_off_waits_and_goes_on(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        store.partition("planner")
        await clock.advance(100)
        store.heal("planner")
        await clock.advance(10)
        assert await made.run(text_of(instance.generate("Why?"))) == TEXT
        assert made.loads_per_epoch() == [1]


@pytest.mark.parametrize("verb", ["lead", "inspect", "open", "dispatch", "conclude"])
@pytest.mark.parametrize("fault", ["lose_reply", "refuse", "duplicate"])
async def test_a_verb_that_fails_once_is_repeated_and_nothing_happens_twice(
    store: FakeStore, clock: ManualClock, verb: str, fault: str
) -> None:
    plan: FaultPlan = getattr(FaultPlan(), fault)(verb)
    async with cluster(store, clock, 2) as made, made.planner(faults=plan) as planner:
        made.scripts[1].fail("load", "the cable is loose")  # so that an attempt is concluded, too
        instance = await made.run(planner.launch(made.spec))
        await serves(made, instance)
        plan.assert_fired()
        assert made.loads_per_epoch() == [1, 1]
        assert len(made.epochs()) == 2
        assert made.rejections() == 0


@pytest.mark.parametrize(
    "said",
    [
        "OOM command not allowed when used memory > 'maxmemory'.",
        "NOREPLICAS Not enough good replicas to write.",
        "READONLY You can't write against a read only replica.",
        "NOAUTH Authentication required.",
        "WRONGPASS invalid username-password pair or user is disabled.",
        "NOPERM this user has no permissions to run the 'evalsha' command",
        "DENIED Redis is running in protected mode because protected mode is enabled.",
        "upstream failure",
        "ERR unknown command 'EVALSHA'",
        "ERR DB index is out of range",
    ],
)
async def test_whatever_a_store_answers_that_is_no_key_of_the_wrong_type_is_waited_out(
    store: FakeStore, clock: ManualClock, said: str
) -> None:
    """Regression: each of these but the first ended the planning of the instance for good."""
    plan = FaultPlan()
    for nth in (1, 2, 3):
        plan.answer("dispatch", said, nth=nth)
    async with cluster(store, clock, 2) as made, made.planner(faults=plan) as planner:
        instance = await made.run(planner.launch(made.spec))
        await serves(made, instance)
        plan.assert_fired()
        assert made.loads_per_epoch() == [1]


# --- several planners -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def running(planner: Planner) -> AsyncGenerator[asyncio.Task[None]]:
    """A planner that serves whatever the desired state names."""

    async def run() -> None:
        async with planner:
            await planner.run()

    task = asyncio.create_task(run())
    yield task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_planner_that_could_not_read_what_is_wanted_looks_again_soon(
    store: FakeStore, clock: ManualClock
) -> None:
    """Regression: it knew of no instance for 20 s; a flush and the end of the one other planner, and nobody did."""
    plan = FaultPlan().answer("exec", "OOM command not allowed when used memory > 'maxmemory'.", touching="instances")
    async with cluster(store, clock, 2) as made, made.planner("first") as first:
        await made.run(first.launch(made.spec))
        standby = made.planner("standby", faults=plan)
        async with running(standby):
            await clock.advance(3)
            plan.assert_fired()
            assert list(standby.instances) == ["demo"]


async def test_two_planners_on_one_instance_load_once(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 3) as made:
        async with made.planner("a") as first, made.planner("b") as second:
            one, two = await made.run(asyncio.gather(first.launch(made.spec), second.launch(made.spec)))
            assert [one.state.leading, two.state.leading].count(True) == 1
            await serves(made, one)
            await serves(made, two)
            assert made.loads_per_epoch() == [1]
            assert len(made.epochs()) == 1


async def test_two_planners_on_one_instance_with_a_rank_that_fails_charge_it_once_each_time(
    store: FakeStore, clock: ManualClock
) -> None:
    policy = Policy(max_failures=2)
    async with cluster(store, clock, 2) as made:
        made.scripts[1].fail_always("load", "the cable is cut")
        async with made.planner("a", policy=policy) as first, made.planner("b", policy=policy) as second:
            told = await made.run(
                asyncio.gather(first.launch(made.spec), second.launch(made.spec), return_exceptions=True)
            )
            assert {type(one) for one in told} == {InstanceFailed}
            assert len({str(one) for one in told}) == 1, "both say the same"
            assert made.loads_per_epoch() == [1, 1, 1]


async def test_a_standby_takes_over_from_a_leader_that_was_cut_off_without_resigning(
    store: FakeStore, clock: ManualClock
) -> None:
    async with cluster(store, clock, 3) as made:
        async with made.planner("a") as first:
            await made.run(first.launch(made.spec))
            async with running(made.planner("b")):
                await clock.advance(10)
                processes = dict(made.ranks)
                store.partition("a")
                await clock.advance(20)
                async with made.planner("client") as client:
                    instance = await made.run(client.launch(made.spec))
                    await serves(made, instance)
                    snapshot = await made.run(instance.inspect())
                assert snapshot.leader is not None
                assert snapshot.leader.holder == "b"
                assert made.ranks == processes
                assert made.loads_per_epoch() == [1]
                assert len(made.epochs()) == 1, "a takeover does not disturb what is up"
                store.heal("a")
                await clock.advance(20)
                assert first.instances["demo"].leading is False, "the former leader stands by now"
                assert made.loads_per_epoch() == [1]


async def test_a_standby_takes_over_at_once_from_a_leader_that_ends(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, running(made.planner("b")):
        async with made.planner("a") as first:
            await made.run(first.launch(made.spec))
        await clock.advance(3)
        async with made.planner("client") as client:
            instance = await made.run(client.launch(made.spec))
            await serves(made, instance)
        assert made.loads_per_epoch() == [1]


async def bring_up_with_a_planner_that_dies(store: FakeStore, clock: ManualClock, nth: int, *, standby: bool) -> bool:
    """Kill a planner right after its nth call to the store was carried out, and let another one finish.

    Returns:
        Whether the planner made so many calls at all.
    """
    async with cluster(store, clock, 2) as made:
        wire = Tripwire("a", nth, lambda: store.partition("a"))
        store.sent = wire

        async def launch() -> None:
            async with made.planner("a") as first:
                instance = await first.launch(made.spec)
                await text_of(instance.generate("Why?"))

        async with AsyncExitStack() as stack:
            if standby:
                await stack.enter_async_context(running(made.planner("b")))
                await clock.advance(1)
            doing = asyncio.create_task(launch())
            await made.until(lambda: wire.fired or doing.done(), f"call {nth}", limit=60)
            doing.cancel()
            await asyncio.gather(doing, return_exceptions=True)
            successor = await stack.enter_async_context(made.planner("successor"))
            instance = await made.run(successor.launch(made.spec), limit=60)
            assert await made.run(text_of(instance.generate("Why?")), limit=60) == TEXT, f"after call {nth}"
            assert made.loads_per_epoch() == [1], f"after call {nth}"
            assert len(made.epochs()) == 1, f"after call {nth}"
            assert made.rejections() == 0, f"after call {nth}"
            assert [script.calls.count("load") for script in made.scripts] == [1, 1], f"after call {nth}"
        return wire.fired


@pytest.mark.parametrize("standby", [False, pytest.param(True, marks=pytest.mark.slow)])
async def test_a_planner_that_dies_between_any_two_calls_is_succeeded_without_a_second_load(standby: bool) -> None:
    nth, fired = 0, True
    while fired:
        nth += 1
        clock = ManualClock()
        store = FakeStore(clock)
        fired = await bring_up_with_a_planner_that_dies(store, clock, nth, standby=standby)
        assert store.keys_without_lifetime() == []
    assert nth > 20, f"a bring-up has more than {nth} calls, so the wire was not in the way"


@pytest.mark.parametrize("nth", range(2, 26, 2))
async def test_a_planner_that_dies_while_it_recovers_is_succeeded(
    store: FakeStore, clock: ManualClock, nth: int
) -> None:
    async with cluster(store, clock, 2) as made, running(made.planner("b")):
        made.scripts[1].fail("load", "the cable is loose")
        await clock.advance(1)
        wire = Tripwire("a", nth, lambda: store.partition("a"))
        store.sent = wire

        async def launch() -> None:
            async with made.planner("a") as first:
                await first.launch(made.spec)

        doing = asyncio.create_task(launch())
        await made.until(lambda: wire.fired or doing.done(), f"call {nth}", limit=60)
        doing.cancel()
        await asyncio.gather(doing, return_exceptions=True)
        async with made.planner("client") as client:
            instance = await made.run(client.launch(made.spec), limit=120)
            await serves(made, instance)
        assert made.loads_per_epoch() == [1, 1]
        assert len(made.epochs()) == 2
        assert wire.fired


async def test_charges_survive_the_planner(store: FakeStore, clock: ManualClock) -> None:
    policy = Policy(max_failures=3)
    async with cluster(store, clock, 2) as made:
        made.scripts[1].fail_always("load", "the cable is cut")
        planners = iter("abcdefgh")
        messages: list[str] = []
        for _ in range(8):  # each planner lives for one attempt
            name = next(planners)
            async with made.planner(name, policy=policy) as planner:
                instance = await made.run(planner.launch(made.spec, wait=False))
                attempts = len(made.verdicts())
                await made.until(
                    lambda n=attempts, i=instance: len(made.verdicts()) > n or i.state.over, "an attempt to fail"
                )
                if instance.state.over:
                    messages.append(instance.state.failure)
                    break
            await clock.advance(7)
        assert messages, "four planners had one attempt each, and nobody gave up"
        assert "given up after 4 failed attempts in a row" in messages[0]
        assert made.loads_per_epoch() == [1, 1, 1, 1]


async def test_a_planner_whose_instance_was_launched_anew_elsewhere_lets_go_of_it(
    store: FakeStore, clock: ManualClock
) -> None:
    async with cluster(store, clock, 2, told=False) as made, made.planner("a") as first, made.planner("b") as second:
        old = await made.run(first.launch(made.spec))
        another = with_layers(made, 2)
        new = await made.run(second.launch(another), limit=60)
        await serves(made, new)
        assert old.state.left
        assert first.instances == {}
        assert len(made.epochs()) == 2


async def test_planners_that_adopt_follow_what_is_launched_stopped_and_launched_anew(
    store: FakeStore, clock: ManualClock
) -> None:
    async with cluster(store, clock, 2, told=False) as made:
        async with running(made.planner("a")), running(made.planner("b")):
            async with made.planner("client") as client:
                instance = await made.run(client.launch(made.spec))
                another = with_layers(made, 2)
                again = await made.run(client.launch(another), limit=60)
                await serves(made, again)
                await made.run(again.stop())
                assert made.statuses == ["Idle", "Idle"]
                await clock.advance(60)
                assert made.statuses == ["Idle", "Idle"], "what was stopped stays down"
                last = await made.run(client.launch(made.spec))
                await serves(made, last)
                assert instance.state.left
        names = {task.get_name() for task in asyncio.all_tasks()}
        assert "rankgate plan demo" not in names, "no loop is left behind"


async def test_a_planner_that_adopts_and_launches_itself_plans_each_instance_once(
    store: FakeStore, clock: ManualClock
) -> None:
    async with cluster(store, clock, 2, told=False) as made, made.planner() as planner:
        adopting = asyncio.create_task(planner.run())
        for layers in (2, 3, 4):
            model = made.spec.model.model_copy(update={"total_layers": layers})
            instance = await made.run(planner.launch(made.spec.model_copy(update={"model": model})), limit=60)
        await serves(made, instance)
        names = [task.get_name() for task in asyncio.all_tasks()]
        assert names.count("rankgate plan demo") == 1
        adopting.cancel()
        await asyncio.gather(adopting, return_exceptions=True)


async def test_launches_at_the_same_time_are_one_launch_and_one_loop(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2, told=False) as made, made.planner() as planner:
        await made.run(planner.launch(made.spec))
        another = with_layers(made, 2)
        first, second = await made.run(asyncio.gather(planner.launch(another), planner.launch(another)))
        assert first.state is second.state
        assert [task.get_name() for task in asyncio.all_tasks()].count("rankgate plan demo") == 1
        await serves(made, first)
        assert len(made.epochs()) == 2


async def test_of_different_launches_at_the_same_time_the_last_one_wins(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2, told=False) as made, made.planner() as planner:
        await made.run(planner.launch(made.spec))
        launches = (planner.launch(with_layers(made, layers)) for layers in (2, 3, 5))
        found = await made.run(asyncio.gather(*launches, return_exceptions=True))
        assert {type(one) for one in found} <= {Instance, InstanceFailed}
        (winner,) = [one for one in found if isinstance(one, Instance) and not one.state.left]
        adopted = adopt(store.client("reader"))
        record = await Registry(adopted, "rankgate").get("demo")
        await adopted.close()
        assert record is not None
        assert winner.spec == record.spec, "it is the one on record"
        assert [task.get_name() for task in asyncio.all_tasks()].count("rankgate plan demo") == 1
        await serves(made, winner)


async def test_a_launch_that_is_overtaken_by_a_later_one_does_not_replace_it(
    store: FakeStore, clock: ManualClock
) -> None:
    later: list[Instance] = []
    faults = FaultPlan()
    async with cluster(store, clock, 2, told=False) as made, made.planner(faults=faults) as planner:
        await made.run(planner.launch(made.spec))

        async def overtake() -> None:
            later.append(await planner.launch(with_layers(made, 3)))

        faults.before("xadd", overtake, touching=":signals")  # it is on record, and the planner does not plan it yet
        with pytest.raises(InstanceFailed, match="demo was launched again while this launch began"):
            await made.run(planner.launch(with_layers(made, 2)))
        faults.assert_fired()
        await serves(made, later[0])


async def test_a_stop_that_is_overtaken_by_a_launch_leaves_it_alone(store: FakeStore, clock: ManualClock) -> None:
    later: list[Instance] = []
    faults = FaultPlan()
    async with cluster(store, clock, 2) as made:
        async with made.planner(faults=faults) as planner:
            instance = await made.run(planner.launch(made.spec))

            async def overtake() -> None:
                later.append(await planner.launch(made.spec))

            # The third look at the record: after the stop was asked for and carried out, before the planner lets go.
            faults.before("watch", overtake, nth=3)
            await made.run(instance.stop())
            faults.assert_fired()
            assert planner.instances.keys() == {"demo"}
            await serves(made, later[0])
        assert "rankgate plan demo" not in [task.get_name() for task in asyncio.all_tasks()]


async def test_an_adopting_planner_keeps_what_a_client_launched_and_left(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, running(made.planner("a")):
        async with made.planner("client") as client:
            await made.run(client.launch(made.spec))
        await made.kill(1)
        await clock.advance(10)
        made.start(1)
        await made.until(lambda: made.statuses == ["Ready", "Ready"], "the instance to be up again")
        assert made.loads_per_epoch() == [1, 1]


async def test_an_adopting_planner_survives_a_flush(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, running(made.planner("a")):
        async with made.planner("client") as client:
            await made.run(client.launch(made.spec))
        await clock.advance(10)
        store.flush()
        await clock.advance(90)
        assert made.statuses == ["Ready", "Ready"]
        assert [script.calls.count("load") for script in made.scripts] == [1, 1]
        async with made.planner("client") as client:
            instance = await made.run(client.launch(made.spec))
            assert await made.run(text_of(instance.generate("Why?"))) == TEXT


# --- what must never become a busy loop -----------------------------------------------------------------------------------


async def busy(store: FakeStore, clock: ManualClock, seconds: float, *names: str) -> float:
    """Calls to the store per second of these clients, over so many seconds."""
    before = sum(store.sent[name] for name in names)
    await clock.advance(seconds)
    return (sum(store.sent[name] for name in names) - before) / seconds


@pytest.mark.parametrize("situation", ["waiting for ranks", "a rank that connects", "serving", "standing by"])
async def test_a_planner_with_nothing_to_do_is_quiet(store: FakeStore, clock: ManualClock, situation: str) -> None:
    async with cluster(store, clock, 2, started=situation != "waiting for ranks") as made:
        async with made.planner("a", policy=Policy(connect_stall=10**6, assemble_timeout=10**6)) as planner:
            if situation == "a rank that connects":
                made.scripts[1].hold("connect")
            await made.run(planner.launch(made.spec, wait=situation in ("serving", "standing by")))
            await clock.advance(10)
            if situation == "standing by":
                async with made.planner("b") as second:
                    await made.run(second.launch(made.spec))
                    assert await busy(store, clock, 60, "b") < 3
            else:
                assert await busy(store, clock, 60, "a") < 1.5
            made.scripts[1].held.clear() if situation != "a rank that connects" else made.scripts[1].let("connect")


async def test_a_leader_that_was_fenced_does_not_insist(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner("a") as planner:
        instance = await made.run(planner.launch(made.spec))
        rival = Barrier(store.client("rival"), "demo", world_size=2, clock=clock, holder="rival")
        store.delete(made.keys.leader)
        assert isinstance(await rival.lead(), Leading)
        await made.kill(1)  # so that there is something to conclude
        quiet = await busy(store, clock, 20, "a")
        assert quiet < 10, f"{quiet:.0f} calls a second"
        await rival.resign()
        await rival.close()
        made.start(1)
        await serves(made, instance)


@pytest.mark.parametrize("field", ["number", "nonce", "world_size", "roster:0", "digest", "last_n", "step:load"])
async def test_a_record_that_is_damaged_never_becomes_a_busy_loop(
    store: FakeStore, clock: ManualClock, field: str
) -> None:
    async with cluster(store, clock, 2) as made, made.planner("a") as planner:
        await made.run(planner.launch(made.spec))
        somebody: Any = store.client("somebody")
        await somebody.hdel(made.keys.epoch, field)
        await somebody.aclose()
        assert await busy(store, clock, 30, "a") < 5


async def test_a_record_of_another_world_size_is_ended_and_not_restored_for_ever(
    store: FakeStore, clock: ManualClock
) -> None:
    async with cluster(store, clock, 2, told=False) as made:
        old = Barrier(store.client("old"), "demo", world_size=2, clock=clock, holder="old")
        await made.until(lambda: len([key for key in store.contents() if ":rank:" in key]) == 2, "both ranks")
        assert isinstance(await old.open(), Opened)
        await made.until(lambda: made.statuses == ["Idle", "Idle"], "the ranks")
        await old.resign()
        await old.close()
        async with made.planner("a") as planner:
            alone = made.spec.model_copy(update={"world_size": 1})
            await made.run(planner.launch(alone), limit=60)
            assert store.sent["a"] < 100
            assert made.statuses == ["Ready", "Idle"]

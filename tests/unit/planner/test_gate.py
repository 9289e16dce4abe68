"""The gate alone, in front of somebody else's planner."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from barrier import (
    Aborted,
    Barrier,
    Concluded,
    Disagree,
    Fenced,
    InvalidName,
    Leading,
    LogId,
    Member,
    NotReady,
    Opened,
    Promised,
    Released,
    StoreCorrupt,
    StoreUnavailable,
    Superseded,
    TimedOut,
    Unknown,
    Verdict,
)
from barrier.store.keys import Keys
from barrier.testing import FakeStore, FaultPlan, ManualClock
from planner import LoadGate, ModelSpec
from planner.lifecycle import StepName
from runner.messages import LoadModel, decode_event, encode
from runner.testing import ScriptedRunner, scripted_runners

pytestmark = pytest.mark.anyio

KEYS = Keys("rankgate", "demo")
STEPS: list[StepName] = ["connect", "load", "warm up followers", "warm up leader"]


def gate_of(store: FakeStore, clock: ManualClock, world_size: int, name: str = "gate", **options: Any) -> LoadGate:
    faults = options.pop("faults", None)
    return LoadGate(
        store.client(name, faults=faults), "demo", world_size=world_size, clock=clock, holder=name, **options
    )


@asynccontextmanager
async def opened(store: FakeStore, clock: ManualClock, world_size: int = 3) -> AsyncGenerator[LoadGate]:
    """A gate in whose attempt all ranks are, or will be as soon as time passes."""
    async with gate_of(store, clock, world_size) as gate:
        outcome = await clock.run(gate.open(timeout=10))
        assert isinstance(outcome, Opened)
        assert gate.epoch == outcome.epoch
        yield gate


async def passed(clock: ManualClock, gate: LoadGate, step: StepName, **options: Any) -> LogId:
    outcome = await clock.run(gate.pass_step(step, timeout=60, **options))
    assert isinstance(outcome, Released), outcome
    assert outcome.id is not None
    return outcome.id


def rejections(store: FakeStore) -> int:
    """How many tasks the ranks refused, by the history that they wrote."""
    lines = [fields[b"event"] for _, fields in store.contents()[KEYS.events] if fields[b"kind"] == b"TaskStatusUpdated"]
    return sum(getattr(decode_event(line), "rejection", None) is not None for line in lines)


def dispatched(store: FakeStore, step: str) -> int:
    entries = store.contents()[KEYS.tasks]
    return sum(fields[b"kind"] == b"task" and fields[b"step"] == step.encode() for _, fields in entries)


# --- somebody else's planner ----------------------------------------------------------------------------------------------


class PollingPlanner:
    """A planner as there are many: every 100 ms it acts on statuses that it last read up to two seconds ago.

    Args:
        clock: the ranks'.
        read: gives every rank's status.
        send_load: what it does when it believes that all are connected.
    """

    def __init__(
        self,
        clock: ManualClock,
        read: Callable[[], Awaitable[list[str]]],
        send_load: Callable[[], Awaitable[object]],
    ) -> None:
        self._clock, self._read, self._send_load = clock, read, send_load
        self.believes: list[str] = []
        self.decisions = 0

    async def run(self) -> None:
        for poll in itertools.count(1):
            if poll % 20 == 0:
                self.believes = await self._read()
            if all(status == "Connected" for status in self.believes):
                self.decisions += 1
                await self._send_load()
            await self._clock.sleep(0.1)


@pytest.mark.parametrize("gated", [False, True])
async def test_a_planner_that_acts_on_stale_statuses_is_harmless_behind_the_gate(
    store: FakeStore, clock: ManualClock, gated: bool
) -> None:
    async with scripted_runners(store, "demo", 3) as runners, gate_of(store, clock, 3) as gate:
        barrier = Barrier(store.client("naive"), "demo", world_size=3, clock=clock, holder="gate")

        async def statuses() -> list[str]:
            return [view.report.status if view.report else "-" for view in (await barrier.inspect()).ranks]

        async def through_the_gate() -> object:
            return await gate.pass_step("load", timeout=60)

        attempts = 0

        async def without_looking() -> object:
            nonlocal attempts
            attempts += 1
            leading = await barrier.lead()  # under the gate's own name
            assert isinstance(leading, Leading)
            assert gate.epoch is not None
            task = LoadModel(
                task_id="load.naive",
                instance="demo",
                epoch=str(gate.epoch),
                term=leading.leadership.term,
                model=ModelSpec(model_id="m"),
            )
            anything = ("Idle", "Connecting", "Connected", "Loading", "Loaded")
            return await barrier.dispatch(gate.epoch, "load", encode(task).decode(), anything, attempt=attempts)

        # The first attempt: all connect, and the planner has seen it.
        assert isinstance(await clock.run(gate.open(timeout=10)), Opened)
        await passed(clock, gate, "connect")
        await clock.advance(0)
        assert [runner.status.kind for runner in runners] == ["Connected"] * 3
        planner = PollingPlanner(clock, statuses, through_the_gate if gated else without_looking)
        planner.believes = await statuses()

        # It ends, and in the second one a rank is slow to connect. What the planner believes is now about the past.
        assert isinstance(await gate.conclude(Verdict.aborted("a node was exchanged")), Concluded)
        await clock.advance(0)
        runners[2].hold("connect")
        assert isinstance(await clock.run(gate.open(timeout=10)), Opened)
        await passed(clock, gate, "connect")
        polling = asyncio.create_task(planner.run())
        await clock.advance(5)
        assert runners[2].status.kind == "Connecting"
        assert planner.decisions >= 1, "the planner did decide to load while a rank was still connecting"
        if gated:
            assert dispatched(store, "load") == 0
        runners[2].let("connect")
        await clock.advance(5)
        polling.cancel()
        await asyncio.gather(polling, return_exceptions=True)
        await barrier.close()

        if gated:
            assert rejections(store) == 0
            assert dispatched(store, "load") == 1
            assert [runner.status.kind for runner in runners] == ["Loaded"] * 3
        else:
            assert rejections(store) >= 1, "without the gate the same planner is refused, so the scenario is a race"
            assert all(runner.alive for runner in runners), "and the second line holds: nobody died of it"


# --- the steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 8])
async def test_every_step_passes_in_order_until_all_ranks_are_ready(
    store: FakeStore, clock: ManualClock, world_size: int
) -> None:
    async with scripted_runners(store, "demo", world_size) as runners, opened(store, clock, world_size) as gate:
        for step in STEPS if world_size > 1 else (STEPS[1], STEPS[3]):
            await passed(clock, gate, step)
        await clock.advance(0)
        assert [runner.status.kind for runner in runners] == ["Ready"] * world_size
        assert rejections(store) == 0


async def test_a_step_goes_out_once_however_often_and_by_whomever_it_is_asked_for(
    store: FakeStore, clock: ManualClock
) -> None:
    async with scripted_runners(store, "demo", 3) as runners, opened(store, clock) as gate:
        runners[1].hold("connect")
        await passed(clock, gate, "connect")
        asking = [asyncio.create_task(gate.pass_step("load", timeout=60)) for _ in range(5)]
        await clock.advance(1)
        runners[1].let("connect")
        places = {outcome.id for outcome in await clock.run(asyncio.gather(*asking)) if isinstance(outcome, Released)}
        assert places == {await passed(clock, gate, "load")}
        assert dispatched(store, "load") == 1
        assert [runner.kinds.count("LoadModel") for runner in runners] == [1, 1, 1]


async def test_the_task_may_be_ones_own_or_any_text(store: FakeStore, clock: ManualClock) -> None:
    async with scripted_runners(store, "demo", 2) as runners, opened(store, clock, 2) as gate:
        await passed(clock, gate, "connect")
        own = LoadModel(
            task_id="load.own", instance="demo", epoch=str(gate.epoch), term=1, model=ModelSpec(model_id="mine")
        )
        await passed(clock, gate, "load", task=own)
        await clock.advance(0)
        assert runners[0].received[-1] == own
        await passed(clock, gate, "warm up followers", task="warm yourself up, in words of mine")
        await clock.advance(0)
        assert rejections(store) == 1, "which a runner of ours refuses, and survives"
        assert runners[1].alive


async def test_the_gates_own_load_task_names_the_model_that_the_gate_was_made_for(
    store: FakeStore, clock: ManualClock
) -> None:
    model = ModelSpec(model_id="some/model", total_layers=3)
    async with scripted_runners(store, "demo", 1) as runners, gate_of(store, clock, 1, model=model) as gate:
        await clock.run(gate.open(timeout=10))
        await passed(clock, gate, "load")
        await clock.advance(0)
        assert runners[0].engine.model == model


async def test_arrived_waits_for_the_same_and_dispatches_nothing(store: FakeStore, clock: ManualClock) -> None:
    async with scripted_runners(store, "demo", 2) as runners, opened(store, clock, 2) as gate:
        runners[1].hold("connect")
        await passed(clock, gate, "connect")
        waiting = asyncio.create_task(gate.arrived("load", timeout=60))
        await clock.advance(3)
        assert not waiting.done()
        runners[1].let("connect")
        outcome = await clock.run(waiting)
        assert outcome == Released(gate.epoch) if gate.epoch else False
        assert dispatched(store, "load") == 0


async def test_a_step_out_of_order_is_not_dispatched(store: FakeStore, clock: ManualClock) -> None:
    async with scripted_runners(store, "demo", 2), opened(store, clock, 2) as gate:
        outcome = await clock.run(gate.pass_step("load", timeout=5))
        assert isinstance(outcome, TimedOut), "nobody is Connected"
        assert outcome.missing == (0, 1)
        assert dispatched(store, "load") == 0


@pytest.mark.parametrize("statuses", [("Idle", "Connected"), ("RunnerIdle", "RunnerConnecting", "RunnerConnected")])
async def test_ranks_that_connect_by_themselves_need_only_the_load_gated(
    store: FakeStore, clock: ManualClock, statuses: tuple[str, ...]
) -> None:
    """Regression: "step connect was not dispatched in this epoch", while every rank was Connected."""
    ranks = [Member(store.client(f"rank {rank}"), "demo", rank=rank, clock=clock) for rank in range(2)]
    for member in ranks:
        await member.claim()
    async with opened(store, clock, 2) as gate:
        assert gate.epoch is not None
        for member in ranks:
            assert isinstance(await member.promise(gate.epoch), Promised)
        for status in statuses:
            assert dispatched(store, "load") == 0
            early = await clock.run(gate.pass_step("load", timeout=0.5))
            assert isinstance(early, TimedOut)
            await ranks[0].report(status)
            early = await clock.run(gate.pass_step("load", timeout=0.5))
            assert isinstance(early, TimedOut)
            assert 1 in early.missing
            await ranks[1].report(status)
        assert isinstance(await clock.run(gate.arrived("load", timeout=5)), Released)
        await passed(clock, gate, "load")
        assert dispatched(store, "load") == 1
    for member in ranks:
        await member.close()


async def test_what_the_gate_passed_in_one_attempt_is_not_asked_for_in_the_next(
    store: FakeStore, clock: ManualClock
) -> None:
    member = Member(store.client("rank 0"), "demo", rank=0, clock=clock)
    other = Member(store.client("rank 1"), "demo", rank=1, clock=clock)
    ranks = (member, other)
    for one in ranks:
        await one.claim()
    async with opened(store, clock, 2) as gate:
        for step, status in (("connect", "Idle"), ("load", "Connected")):
            if step == "load":  # they connect by themselves in the second attempt
                assert isinstance(await clock.run(gate.open(timeout=10)), Opened)
            assert gate.epoch is not None
            for one in ranks:
                one.retire()
                assert isinstance(await one.promise(gate.epoch), Promised)
                await one.report(status)
            await passed(clock, gate, cast("StepName", step))
        assert dispatched(store, "load") == 1
    for one in ranks:
        await one.close()


@pytest.mark.parametrize("method", ["pass_step", "arrived"])
@pytest.mark.parametrize("failed", ["Failed", "RunnerFailed"])
async def test_a_rank_that_says_that_it_failed_ends_the_attempt_under_either_name(
    store: FakeStore, clock: ManualClock, method: str, failed: str
) -> None:
    """Regression: RunnerFailed was one more status that is not Connected, and the gate waited on."""
    member = Member(store.client("rank 0"), "demo", rank=0, clock=clock)
    await member.claim()
    async with opened(store, clock, 1) as gate:
        assert gate.epoch is not None
        assert isinstance(await member.promise(gate.epoch), Promised)
        await member.report(failed, error="boom")
        outcome = await clock.run(getattr(gate, method)("load", timeout=5))
        assert isinstance(outcome, Aborted), outcome
        assert outcome.verdict.culprit == 0
        assert "boom" in outcome.verdict.reason
        assert dispatched(store, "load") == 0
    await member.close()


async def test_once_the_gate_has_passed_connect_the_record_must_say_so(store: FakeStore, clock: ManualClock) -> None:
    """A store that went back to before it is not believed."""
    async with scripted_runners(store, "demo", 2), opened(store, clock, 2) as gate:
        await passed(clock, gate, "connect")
        assert isinstance(await clock.run(gate.arrived("load", timeout=5)), Released)
        await store.client("admin").hdel(KEYS.epoch, "step:connect")
        outcome = await clock.run(gate.pass_step("load", timeout=5))
        assert isinstance(outcome, Unknown)
        assert dispatched(store, "load") == 0


@pytest.mark.parametrize("method", ["pass_step", "arrived"])
async def test_there_are_no_other_steps(store: FakeStore, clock: ManualClock, method: str) -> None:
    async with scripted_runners(store, "demo", 1), opened(store, clock, 1) as gate:
        with pytest.raises(InvalidName, match="step 'connect' is none of those for 1 ranks: load, warm up leader"):
            await getattr(gate, method)("connect", timeout=1)


# --- the ways in which it ends --------------------------------------------------------------------------------------------


async def test_before_an_attempt_is_opened_nothing_passes(store: FakeStore, clock: ManualClock) -> None:
    async with gate_of(store, clock, 2) as gate:
        for outcome in (
            await gate.pass_step("load", timeout=1),
            await gate.arrived("load", timeout=1),
            await gate.conclude(Verdict.stopped()),
        ):
            assert isinstance(outcome, Unknown)
            assert "call open() first" in outcome.reason
        assert store.keys() == []


async def test_a_timeout_names_every_rank_that_is_missing(store: FakeStore, clock: ManualClock) -> None:
    async with scripted_runners(store, "demo", 3) as runners, opened(store, clock) as gate:
        for number in (0, 2):
            runners[number].hold("connect")
        await passed(clock, gate, "connect")
        outcome = await clock.run(gate.pass_step("load", timeout=8))
        assert isinstance(outcome, TimedOut)
        assert outcome.missing == (0, 2)
        assert "rank 0 on node-0 (Connecting" in outcome.explanation
        assert "rank 2 on node-2 (Connecting" in outcome.explanation
        assert "rank 1" not in outcome.explanation
        for number in (0, 2):
            runners[number].let("connect")
        await passed(clock, gate, "load")


async def test_a_rank_that_fails_ends_the_attempt_for_all_and_is_named(store: FakeStore, clock: ManualClock) -> None:
    async with scripted_runners(store, "demo", 3) as runners, opened(store, clock) as gate:
        runners[1].fail("connect", "the cable is loose")
        await passed(clock, gate, "connect")
        outcome = await clock.run(gate.pass_step("load", timeout=60))
        assert isinstance(outcome, Aborted)
        assert (outcome.verdict.culprit, outcome.verdict.reason) == (1, "rank 1 on node-1 failed: the cable is loose")
        await clock.advance(0)
        assert [runner.status.kind for runner in runners] == ["Idle"] * 3
        assert await clock.run(gate.pass_step("load", timeout=60)) == outcome, "everybody gets the same verdict"
        assert isinstance(await clock.run(gate.open(timeout=10)), Opened)
        await passed(clock, gate, "connect")
        await passed(clock, gate, "load")


async def test_a_rank_that_is_restarted_ends_the_attempt(store: FakeStore, clock: ManualClock) -> None:
    async with scripted_runners(store, "demo", 2) as runners, opened(store, clock, 2) as gate:
        runners[1].hold("connect")
        await passed(clock, gate, "connect")
        waiting = asyncio.create_task(gate.pass_step("load", timeout=60))
        await clock.advance(1)
        await clock.run(runners[1].restart())
        outcome = await clock.run(waiting)
        assert isinstance(outcome, Aborted)
        assert outcome.verdict.culprit == 1


async def test_to_conclude_ends_every_wait_with_the_same_verdict(store: FakeStore, clock: ManualClock) -> None:
    async with scripted_runners(store, "demo", 2) as runners, opened(store, clock, 2) as gate:
        runners[1].hold("connect")
        await passed(clock, gate, "connect")
        waiting = asyncio.create_task(gate.pass_step("load", timeout=60))
        await clock.advance(1)
        verdict = Verdict.stopped("the user went home")
        assert await gate.conclude(verdict) == Concluded(verdict, first=True)
        assert await clock.run(waiting) == Aborted(verdict)
        assert await gate.conclude(Verdict.aborted("too late")) == Concluded(verdict, first=False)
        await clock.advance(0)
        assert [runner.status.kind for runner in runners] == ["Idle", "Idle"]


async def test_an_attempt_that_somebody_else_opened_supersedes(store: FakeStore, clock: ManualClock) -> None:
    async with scripted_runners(store, "demo", 2), opened(store, clock, 2) as gate:
        store.partition("gate")
        await clock.advance(7)
        store.heal("gate")
        async with gate_of(store, clock, 2, "other") as other:
            assert isinstance(await clock.run(other.open(timeout=10)), Opened)
            assert isinstance(await clock.run(gate.pass_step("connect", timeout=5)), Fenced)
            assert isinstance(await clock.run(gate.arrived("load", timeout=5)), Superseded)
            assert isinstance(await clock.run(gate.conclude(Verdict.stopped())), Fenced)


async def test_a_flush_reads_unknown_and_never_released(store: FakeStore, clock: ManualClock) -> None:
    async with scripted_runners(store, "demo", 2) as runners, opened(store, clock, 2) as gate:
        runners[1].hold("connect")
        await passed(clock, gate, "connect")
        store.flush()
        assert isinstance(await clock.run(gate.pass_step("load", timeout=5)), Fenced | Unknown)
        assert isinstance(await clock.run(gate.arrived("load", timeout=5)), Unknown)
        runners[1].let("connect")
        await clock.advance(3)
        assert isinstance(await clock.run(gate.open(timeout=10)), Opened)
        await passed(clock, gate, "connect")
        await passed(clock, gate, "load")


# --- opening --------------------------------------------------------------------------------------------------------------


async def test_open_waits_for_ranks_that_are_not_here_yet(store: FakeStore, clock: ManualClock) -> None:
    async with ScriptedRunner(store, "demo", 0), gate_of(store, clock, 2) as gate:
        opening = asyncio.create_task(gate.open(timeout=60))
        await clock.advance(4)
        assert not opening.done()
        async with ScriptedRunner(store, "demo", 1):
            assert isinstance(await clock.run(opening), Opened)


async def test_open_says_which_ranks_did_not_come(store: FakeStore, clock: ManualClock) -> None:
    async with ScriptedRunner(store, "demo", 1), gate_of(store, clock, 3) as gate:
        began = clock.now()
        assert await clock.run(gate.open(timeout=20)) == NotReady((0, 2))
        assert clock.now() - began == pytest.approx(20, abs=0.1)
        assert gate.epoch is None


async def test_open_ends_the_attempt_that_goes_on(store: FakeStore, clock: ManualClock) -> None:
    async with scripted_runners(store, "demo", 2), opened(store, clock, 2) as gate:
        first = gate.epoch
        assert isinstance(await clock.run(gate.open(timeout=10)), Opened)
        assert gate.epoch is not None
        assert first is not None
        assert gate.epoch.number > first.number
        verdicts = [fields[b"verdict"] for _, fields in store.contents()[KEYS.tasks] if fields[b"kind"] == b"verdict"]
        assert len(verdicts) == 1
        assert b"a new attempt was asked for" in verdicts[0]
        await passed(clock, gate, "connect")


async def test_open_does_not_take_the_lead_from_another_planner(store: FakeStore, clock: ManualClock) -> None:
    async with scripted_runners(store, "demo", 2), opened(store, clock, 2) as gate:
        async with gate_of(store, clock, 2, "other") as other:
            assert isinstance(await clock.run(other.open(timeout=10)), Fenced)
            assert other.epoch is None
        await passed(clock, gate, "connect")


async def test_ranks_that_were_started_for_something_else_are_named(store: FakeStore, clock: ManualClock) -> None:
    async with scripted_runners(store, "demo", 2, digest="abc123"), gate_of(store, clock, 2) as gate:
        outcome = await clock.run(gate.open(timeout=10))
        assert isinstance(outcome, Disagree)
        assert outcome.found == {0: "abc123", 1: "abc123"}


async def test_an_attempt_that_cannot_be_ended_is_told_and_not_asked_for_again_and_again(
    store: FakeStore, clock: ManualClock
) -> None:
    faults = FaultPlan().before("conclude", lambda: store.delete(KEYS.epoch))
    async with scripted_runners(store, "demo", 2), gate_of(store, clock, 2, faults=faults) as gate:
        await clock.run(gate.open(timeout=10))
        outcome = await clock.run(gate.open(timeout=10))
        faults.assert_fired()
        assert type(outcome).__name__ == "Unconcluded"
        assert isinstance(await clock.run(gate.open(timeout=10)), Opened)


# --- leadership -----------------------------------------------------------------------------------------------------------


async def test_the_lead_is_kept_while_a_step_is_waited_for(store: FakeStore, clock: ManualClock) -> None:
    async with scripted_runners(store, "demo", 2) as runners, opened(store, clock, 2) as gate:
        runners[1].hold("connect")
        await passed(clock, gate, "connect")
        waiting = asyncio.create_task(gate.pass_step("load", timeout=10**4))
        async with gate_of(store, clock, 2, "other") as other:
            for _ in range(5):
                await clock.advance(20)
                assert isinstance(await clock.run(other.open(timeout=0.1)), Fenced)
        runners[1].let("connect")
        assert isinstance(await clock.run(waiting), Released)


async def test_leaving_gives_the_lead_back_and_the_attempt_goes_on(store: FakeStore, clock: ManualClock) -> None:
    async with scripted_runners(store, "demo", 2) as runners:
        async with opened(store, clock, 2) as gate:
            await passed(clock, gate, "connect")
        await clock.advance(0)
        assert [runner.status.kind for runner in runners] == ["Connected", "Connected"]
        successor = Barrier(store.client("successor"), "demo", world_size=2, clock=clock, holder="successor")
        began = clock.now()
        assert isinstance(await clock.run(successor.lead()), Leading)
        assert clock.now() == began
        await successor.close()


async def test_an_outage_while_the_lead_is_renewed_is_waited_out(store: FakeStore, clock: ManualClock) -> None:
    async with scripted_runners(store, "demo", 2), opened(store, clock, 2) as gate:
        store.partition("gate")
        with pytest.raises(StoreUnavailable):
            await clock.run(gate.pass_step("connect", timeout=5))
        await clock.advance(10)
        store.heal("gate")
        await clock.advance(10)
        await passed(clock, gate, "connect")


async def test_once_another_planner_leads_the_gate_does_not_fight_for_it(store: FakeStore, clock: ManualClock) -> None:
    async with scripted_runners(store, "demo", 2), opened(store, clock, 2) as gate:
        store.partition("gate")
        await clock.advance(7)
        async with gate_of(store, clock, 2, "other") as other:
            assert isinstance(await clock.run(other.open(timeout=10)), Opened)
            store.heal("gate")
            await clock.advance(20)
            asked = store.sent["gate"]
        await clock.advance(20)
        assert store.sent["gate"] == asked, "it asks for the lead no more"
        assert isinstance(await clock.run(gate.pass_step("connect", timeout=5)), Fenced)


async def test_a_store_that_is_not_fit_is_refused_and_nothing_is_left_open(
    store: FakeStore, clock: ManualClock
) -> None:
    store.partition("gate")
    with pytest.raises(StoreUnavailable):
        async with gate_of(store, clock, 2):
            pytest.fail("it entered")
    store.heal()
    other = store.client("somebody else")
    await other.set(KEYS.leader, "not yours", px=10**9)
    with pytest.raises(StoreCorrupt):
        async with gate_of(store, clock, 2) as gate:
            await gate.open(timeout=1)
    await other.aclose()


@pytest.mark.parametrize(("name", "world_size"), [("}", 1), ("demo", 0), ("", 4), ("demo", -1)])
def test_impossible_gates_are_refused(store: FakeStore, clock: ManualClock, name: str, world_size: int) -> None:
    with pytest.raises(ValueError, match="is not a name|must be a whole number from 1 to 16,384"):
        LoadGate(store.client(), name, world_size=world_size, clock=clock)

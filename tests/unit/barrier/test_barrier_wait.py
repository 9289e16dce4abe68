"""Waiting at the barrier: every wait ends by its deadline, in a release or in a named verdict that is the same for everybody."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from barrier import (
    Aborted,
    Barrier,
    Dispatched,
    EpochId,
    Fenced,
    InvalidName,
    InvalidSettings,
    Leading,
    LogId,
    RankRule,
    Released,
    Settings,
    StoreUnavailable,
    Superseded,
    TimedOut,
    Unknown,
    Verdict,
    Wake,
)
from barrier.protocol.outcomes import DispatchOutcome, ReleaseOutcome, WaitOutcome
from barrier.testing import FakeStore, FaultPlan, ManualClock, ScriptedRank
from tests.unit.barrier.group import NONCE, Group, started_group

pytestmark = pytest.mark.anyio


def waiting(
    group: Group, epoch: EpochId, timeout: float = 60.0, status: str = "Connected"
) -> asyncio.Task[WaitOutcome]:
    return asyncio.create_task(group.barrier.wait(epoch, status, timeout=timeout))


def releasing(group: Group, epoch: EpochId, timeout: float = 60.0) -> asyncio.Task[ReleaseOutcome]:
    return asyncio.create_task(group.barrier.release(epoch, "load", "{}", "Connected", timeout=timeout))


async def verdict_in_store(group: Group) -> Verdict | None:
    epoch = (await group.inspect()).epoch
    assert epoch is not None
    return epoch.verdict


# --- release ------------------------------------------------------------------------------------------------------------


async def test_ranks_that_have_arrived_already_are_released_at_once(group: Group) -> None:
    epoch = await group.all_connected()
    assert await group.barrier.wait(epoch, "Connected", timeout=1.0) == Released(epoch)


async def test_the_last_arrival_releases_without_a_tick(group: Group) -> None:
    epoch = await group.open()
    wait = waiting(group, epoch)
    await group.arrive("Connected", [0, 1])
    await group.clock.advance(0.0)
    assert not wait.done()
    began = group.clock.now()
    await group.arrive("Connected", [2])
    await group.clock.advance(0.0)
    assert await wait == Released(epoch)
    assert group.clock.now() == began


async def test_release_dispatches_at_the_instant_at_which_all_have_arrived(group: Group) -> None:
    epoch = await group.open()
    release = releasing(group, epoch)
    await group.arrive("Connected", [0, 1])
    await group.clock.advance(3.0)
    assert await group.tasks() == []
    await group.barrier.lead()
    for rank in (0, 1):
        await group.ranks[rank].beat()
    await group.arrive("Connected", [2])
    await group.clock.advance(0.0)
    assert await release == Released(epoch, LogId(epoch.number, 2))
    assert await group.tasks() == [f"{epoch.number}-2"]


async def test_the_store_itself_dispatches_when_the_last_rank_arrives(store: FakeStore) -> None:
    """No round trip of the planner lies between the last arrival and the task in the log."""
    faults = FaultPlan().refuse("dispatch", nth=3)  # the first finds ranks missing, the second waits in the store
    async with started_group(store, 3, faults=faults) as group:
        epoch = await group.open()
        release = releasing(group, epoch)
        await group.clock.advance(0.0)
        await group.arrive("Idle", [2])  # its first report in the epoch is a hint of its own
        await group.arrive("Connected", [0, 1])
        await group.clock.advance(0.0)
        await group.arrive("Connected", [2])
        await group.clock.advance(0.0)
        assert await release == Released(epoch, LogId(epoch.number, 2))
        assert faults.fired == ()


async def test_a_dispatch_left_with_the_store_is_refused_when_another_rank_withdraws(group: Group) -> None:
    epoch = await group.open()
    release = releasing(group, epoch)
    await group.arrive("Connected", [0, 1])
    await group.clock.advance(0.0)
    await group.arrive("Connecting", [1])
    await group.arrive("Connected", [2])
    await group.clock.advance(0.0)
    assert await group.tasks() == []
    assert not release.done()
    await group.arrive("Connected", [1])
    await group.clock.advance(0.0)
    assert await release == Released(epoch, LogId(epoch.number, 2))


async def test_a_dispatch_left_with_the_store_is_fenced_with_its_planner(group: Group) -> None:
    """A planner that is stopped past its lease leaves nothing behind that acts for it."""
    epoch = await group.open()
    release = releasing(group, epoch)
    await group.arrive("Connected", [0, 1])
    await group.clock.advance(0.0)
    async with group.planner("successor") as successor:
        await group.barrier.resign()
        new = await successor.lead()
        assert isinstance(new, Leading)
        await group.arrive("Connected", [2])
        assert await group.clock.run(release) == Fenced(new.leadership.term, "successor")
        assert await group.tasks() == []


async def test_a_release_that_is_cancelled_takes_its_dispatch_back(group: Group) -> None:
    epoch = await group.open()
    release = releasing(group, epoch)
    await group.arrive("Connected", [0, 1])
    await group.clock.advance(0.0)
    release.cancel()
    await asyncio.gather(release, return_exceptions=True)
    await group.arrive("Connected", [2])
    await group.clock.advance(0.0)
    assert await group.tasks() == []


async def test_a_server_that_forgot_the_script_is_given_it_anew(group: Group) -> None:
    epoch = await group.open()
    release = releasing(group, epoch)
    await group.arrive("Connected", [0, 1])
    await group.clock.advance(0.0)
    group.store.forget_scripts()
    await group.arrive("Connected", [2])
    await group.clock.advance(0.0)
    assert await release == Released(epoch, LogId(epoch.number, 2))


async def test_a_script_that_was_forgotten_is_missed_before_the_last_arrival(store: FakeStore) -> None:
    """The dispatch is tried when it is left with the store; if not, a round trip lay between the last arrival and the task."""
    faults = FaultPlan()
    async with started_group(store, 3, faults=faults) as group:
        epoch = await group.open()
        release = releasing(group, epoch)
        await group.clock.advance(0.0)
        await group.arrive("Idle", [2])
        store.forget_scripts()
        await group.arrive("Connected", [0, 1])
        await group.clock.advance(0.0)
        faults.refuse("dispatch")
        await group.arrive("Connected", [2])
        await group.clock.advance(0.0)
        assert await release == Released(epoch, LogId(epoch.number, 2))
        assert faults.fired == ()


async def test_a_script_that_was_forgotten_is_brought_along_and_then_waited_with(group: Group) -> None:
    """Whoever asks again at once, as the planner's loop does, must not run in circles. Found by simulated history 3."""
    epoch = await group.open()
    await group.arrive("Connected", [0, 1])

    async def leave() -> DispatchOutcome | Wake:
        picture = await group.inspect()
        return await group.barrier.dispatch_on_arrival(picture, epoch, "load", "{}", "Connected", seconds=5.0)

    group.store.forget_scripts()
    assert await leave() == Wake.DISTURBED
    again = asyncio.create_task(leave())
    await group.clock.advance(0.0)
    assert not again.done()
    await group.arrive("Connected", [2])
    assert await group.clock.run(again) == Dispatched(LogId(epoch.number, 2))


async def test_a_reply_that_is_lost_after_the_store_has_dispatched_is_asked_for_again(group: Group) -> None:
    epoch = await group.open()
    await group.arrive("Connected", [0, 1])
    async with group.planner("unlucky", faults=FaultPlan().lose_reply("dispatch", nth=2)) as unlucky:
        await group.barrier.resign()
        assert isinstance(await unlucky.lead(), Leading)
        release = asyncio.create_task(unlucky.release(epoch, "load", "{}", "Connected", timeout=60.0))
        await group.clock.advance(0.0)
        await group.arrive("Connected", [2])
        with pytest.raises(StoreUnavailable):
            await group.clock.run(release)
        assert await unlucky.release(epoch, "load", "{}", "Connected", timeout=60.0) == Released(
            epoch, LogId(epoch.number, 2)
        )
        assert len(await group.tasks()) == 1


async def test_release_of_a_step_that_is_out_already_says_where_it_is(group: Group) -> None:
    epoch = await group.all_connected()
    first = await group.load(epoch)
    assert await group.barrier.release(epoch, "load", "{}", "Connected", timeout=1.0) == Released(epoch, first)
    assert len(await group.tasks()) == 1


async def test_two_planners_that_release_at_once_dispatch_once(group: Group) -> None:
    epoch = await group.open()
    async with group.planner("second") as second:
        first = releasing(group, epoch)
        await group.clock.advance(0.0)
        other = asyncio.create_task(second.release(epoch, "load", "{}", "Connected", timeout=60.0))
        await group.clock.advance(0.0)
        assert isinstance(await other, Fenced)
        await group.arrive("Connected")
        await group.clock.advance(0.0)
        assert isinstance(await first, Released)
        assert len(await group.tasks()) == 1


async def test_a_planner_that_is_overtaken_while_it_waits_is_fenced_and_dispatches_nothing(group: Group) -> None:
    epoch = await group.open()
    release = releasing(group, epoch)
    await group.clock.advance(0.0)
    group.store.delete(group.keys.leader)  # the store forgot who leads
    async with group.planner("successor") as successor:
        new = await successor.lead()
        assert isinstance(new, Leading)
        await group.arrive("Connected")
        assert await group.clock.run(release) == Fenced(new.leadership.term, "successor")
        assert await group.tasks() == []
        assert isinstance(await successor.dispatch(epoch, "load", "{}", "Connected"), Dispatched)


async def test_a_wait_for_longer_than_the_lease_keeps_the_lead(group: Group) -> None:
    epoch = await group.open()
    release = releasing(group, epoch, timeout=600.0)
    for _ in range(10):
        await group.clock.advance(2.0)
        for rank in group.ranks:
            await rank.beat()
    await group.arrive("Connected")
    assert isinstance(await group.clock.run(release), Released)


async def test_different_ranks_may_be_waited_for_in_different_statuses(group: Group) -> None:
    epoch = await group.open()
    rules = (RankRule(0, 0, ("Loaded",)), RankRule(1, 2, ("WarmingUp", "Ready")))
    wait = asyncio.create_task(group.barrier.wait(epoch, rules, timeout=60))
    await group.arrive("Loaded", [0])
    await group.arrive("Ready", [1])
    await group.arrive("WarmingUp", [2])
    await group.clock.advance(0.0)
    assert await wait == Released(epoch)


async def test_a_hint_that_is_lost_costs_one_backstop_at_most(group: Group) -> None:
    epoch = await group.open()
    await group.arrive("Connected", [0, 1])
    async with group.ranks[0].heartbeat(), group.ranks[1].heartbeat():
        wait = waiting(group, epoch)
        await group.clock.advance(0.0)
        said = group.ranks[2].member.report_now._replace(epoch=epoch, floor=epoch.number, applied=1, status="Connected")
        await group.barrier.store.commands.set(group.keys.rank(2), said.encode(), px=60_000)
        began = group.clock.now()
        assert await group.clock.run(wait) == Released(epoch)
        assert 0 < group.clock.now() - began <= group.barrier.settings.backstop


async def test_hints_that_went_back_are_found_again_by_the_next_look(group: Group) -> None:
    """A failover to a server whose clock is behind: new hints stand before the place up to which the planner has read."""
    epoch = await group.open()
    async with group.ranks[0].heartbeat(), group.ranks[1].heartbeat(), group.ranks[2].heartbeat():
        wait = waiting(group, epoch)
        await group.clock.advance(10.0)
        await group.arrive("Connected", [0, 1])
        await group.clock.advance(0.0)
        group.store.shift_time(-5.0)
        group.store.delete(group.keys.signals)
        await group.ranks[2].promise(epoch)
        await group.clock.advance(group.barrier.settings.backstop)
        began = group.clock.now()
        await group.ranks[2].report("Connecting")
        await group.ranks[2].report("Connected")
        await group.clock.advance(0.0)
        assert wait.done(), "the last arrival was a push again"
        assert await wait == Released(epoch)
        assert group.clock.now() == began


async def test_an_idle_wait_costs_less_than_one_command_a_second(store: FakeStore) -> None:
    async with started_group(store, 2) as group:
        epoch = await group.open()
        async with group.ranks[0].heartbeat(), group.ranks[1].heartbeat():
            wait = waiting(group, epoch, timeout=3_600)
            await group.clock.advance(0.0)
            sent = store.sent["planner"]
            await group.clock.advance(60.0)
            assert store.sent["planner"] - sent < 60
            wait.cancel()
            await asyncio.gather(wait, return_exceptions=True)


async def test_64_ranks_that_arrive_one_by_one_do_not_make_the_planner_look_64_times(store: FakeStore) -> None:
    async with started_group(store, 64) as group:
        epoch = await group.open()
        wait = waiting(group, epoch)
        await group.clock.advance(0.0)
        sent = store.sent["planner"]
        for rank in group.ranks:
            await rank.arrive("Connected")
            await group.clock.advance(0.0)
        assert await wait == Released(epoch)
        looks = store.sent["planner"] - sent
        assert looks <= 2 * 64 + 5, "one read of hints for each of a rank's two reports, and the last check"


# --- deadlines ----------------------------------------------------------------------------------------------------------


async def test_a_wait_ends_by_its_deadline_and_names_every_missing_rank(group: Group) -> None:
    epoch = await group.open()
    await group.arrive("Connected", [1])
    began = group.clock.now()
    async with group.ranks[0].heartbeat(), group.ranks[1].heartbeat(), group.ranks[2].heartbeat():
        outcome = await group.clock.run(group.barrier.wait(epoch, "Connected", timeout=12.0))
    assert group.clock.now() - began == pytest.approx(12.0)
    assert isinstance(outcome, TimedOut)
    assert (outcome.epoch, outcome.missing) == (epoch, (0, 2))
    assert "waiting for 2 of 3 ranks: rank 0 on node-0 (Idle for 12.0 s, wanted Connected" in outcome.explanation
    assert "rank 2 on node-2" in outcome.explanation


async def test_a_timeout_is_no_verdict_and_the_wait_may_be_repeated(group: Group) -> None:
    epoch = await group.open()
    assert isinstance(await group.clock.run(group.barrier.wait(epoch, "Connected", timeout=1.0)), TimedOut)
    assert await verdict_in_store(group) is None
    for rank in group.ranks:
        await rank.beat()
    await group.arrive("Connected")
    assert await group.barrier.wait(epoch, "Connected", timeout=1.0) == Released(epoch)


async def test_an_hour_is_tested_in_an_instant(group: Group) -> None:
    epoch = await group.open()
    began = group.clock.now()
    outcome = await group.clock.run(group.barrier.wait(epoch, "Connected", timeout=600.0))
    assert isinstance(outcome, TimedOut)
    assert group.clock.now() - began >= 600.0
    assert "no live report" in outcome.explanation, "their leases were over long ago"


async def test_progress_renews_the_deadline_slow_is_not_stalled(group: Group) -> None:
    epoch = await group.open()
    await group.arrive("Loaded", [1, 2])
    wait = waiting(group, epoch, 10.0, "Loaded")
    for layer in range(1, 8):
        await group.ranks[0].promise(epoch) if layer == 1 else None
        await group.ranks[0].report("Loading", progress=(layer, 32))
        for rank in group.ranks[1:]:
            await rank.beat()
        await group.clock.advance(5.0)
    assert not wait.done(), "35 s, and never 10 without progress"
    async with group.ranks[0].heartbeat(), group.ranks[1].heartbeat(), group.ranks[2].heartbeat():
        assert isinstance(await group.clock.run(wait, limit=20.0), TimedOut)


async def test_heartbeats_alone_are_no_progress(group: Group) -> None:
    epoch = await group.open()
    await group.arrive("Loading")
    began = group.clock.now()
    async with group.ranks[0].heartbeat(), group.ranks[1].heartbeat(), group.ranks[2].heartbeat():
        assert isinstance(await group.clock.run(group.barrier.wait(epoch, "Loaded", timeout=10.0)), TimedOut)
    assert group.clock.now() - began == pytest.approx(10.0, abs=0.1)


async def test_falling_silent_and_coming_back_is_no_progress(group: Group) -> None:
    epoch = await group.open()
    began = group.clock.now()
    async with group.ranks[0].heartbeat(), group.ranks[1].heartbeat():
        wait = waiting(group, epoch, timeout=20.0)
        await group.clock.advance(12.0)
        assert (await group.inspect()).ranks[2].report is None
        await group.ranks[2].beat()
        assert isinstance(await group.clock.run(wait), TimedOut)
    assert group.clock.now() - began == pytest.approx(20.0, abs=0.1)


@pytest.mark.parametrize("timeout", [0, -1.0, float("inf"), float("nan")])
async def test_every_wait_needs_a_deadline(group: Group, timeout: float) -> None:
    epoch = await group.open()
    with pytest.raises(InvalidSettings, match="it must be a finite number of seconds above 0"):
        await group.barrier.wait(epoch, "Connected", timeout=timeout)
    with pytest.raises(InvalidSettings):
        await group.barrier.release(epoch, "load", "{}", "Connected", timeout=timeout)


async def test_a_status_that_nobody_could_have_is_refused(group: Group) -> None:
    epoch = await group.open()
    with pytest.raises(InvalidName):
        await group.barrier.wait(epoch, "Not a status", timeout=1.0)
    with pytest.raises(InvalidName):
        await group.barrier.wait(epoch, [], timeout=1.0)


# --- what breaks an epoch -----------------------------------------------------------------------------------------------


async def test_a_failure_is_pushed_and_ends_the_epoch_for_all(group: Group) -> None:
    epoch = await group.open()
    wait = waiting(group, epoch)
    await group.arrive("Connected", [0, 2])
    await group.ranks[1].promise(epoch)
    began = group.clock.now()
    await group.ranks[1].fail("no route to host", permanent=True)
    await group.clock.advance(0.0)
    verdict = Verdict.aborted("rank 1 on node-1 failed: no route to host", 1, "permanent")
    assert await wait == Aborted(verdict)
    assert group.clock.now() == began
    assert await verdict_in_store(group) == verdict
    assert await group.barrier.dispatch(epoch, "load", "{}", "Connected") == Aborted(verdict)


async def test_a_broken_epoch_stays_broken_when_the_rank_recovers(group: Group) -> None:
    epoch = await group.all_connected()
    await group.ranks[1].fail("boom")
    broken = await group.barrier.wait(epoch, "Connected", timeout=1.0)
    assert isinstance(broken, Aborted)
    await group.ranks[1].report("Connected")
    assert await group.barrier.wait(epoch, "Connected", timeout=1.0) == broken
    assert await group.barrier.release(epoch, "load", "{}", "Connected", timeout=1.0) == broken


async def test_which_statuses_mean_failure_can_be_said(group: Group) -> None:
    epoch = await group.open()
    await group.arrive("Broken", [0])
    outcome = await group.barrier.wait(epoch, "Connected", timeout=1.0, failed_statuses=("Broken",))
    assert isinstance(outcome, Aborted)


async def test_a_rank_that_was_restarted_breaks_its_epoch_for_good(group: Group) -> None:
    epoch = await group.all_connected()
    wait = waiting(group, epoch, status="Loaded")
    await group.clock.advance(0.0)
    await group.ranks[2].restart()
    await group.clock.advance(0.0)
    assert await wait == Aborted(Verdict.aborted("rank 2 on node-2 was restarted", 2))


async def test_an_earlier_life_that_comes_back_late_breaks_nothing_and_counts_as_missing(group: Group) -> None:
    epoch = await group.all_connected()
    stale = group.ranks[1].member.report_now._replace(incarnation="0" * 28)
    await group.barrier.store.commands.set(group.keys.rank(1), stale.encode(), px=60_000)
    wait = waiting(group, epoch)
    await group.clock.advance(0.0)
    assert not wait.done()
    await group.ranks[1].report("Connecting")
    await group.ranks[1].report("Connected")
    await group.clock.advance(0.0)
    assert await wait == Released(epoch)


async def test_a_store_that_went_back_breaks_the_attempt_at_once(group: Group) -> None:
    """The record forgets a step that a rank has taken already."""
    epoch = await group.all_connected()
    earlier = group.store.snapshot()
    await group.load(epoch)
    for rank in group.ranks:
        await rank.next_task()
    group.store.roll_back(earlier)
    for rank in group.ranks:
        await rank.report("Loading")
    await group.barrier.resign()
    async with group.planner("successor") as successor:  # the one that dispatched would know
        await successor.lead()
        outcome = await successor.wait(epoch, "Loaded", timeout=60.0)
    assert isinstance(outcome, Aborted)
    assert outcome.verdict.reason.startswith("the store went back: rank 0 on node-0 has read log entry 2")
    assert outcome.verdict.culprit is None, "no rank is at fault"


async def test_a_rank_with_a_higher_promise_breaks_the_attempt(group: Group) -> None:
    first = await group.open()
    earlier = group.store.snapshot()
    await group.conclude(first)
    second = await group.all_connected()
    group.store.roll_back(earlier)
    for rank in group.ranks:
        await rank.beat()
    await group.barrier.lead()
    outcome = await group.barrier.wait(first, "Connected", timeout=60.0)
    assert isinstance(outcome, Aborted)
    assert outcome.verdict.reason == f"the store went back: rank 0 on node-0 has promised epoch {second.number} already"


async def test_silence_is_no_verdict(group: Group) -> None:
    epoch = await group.all_connected()
    await group.ranks[1].vanish()
    async with group.ranks[0].heartbeat(), group.ranks[2].heartbeat():
        outcome = await group.clock.run(group.barrier.wait(epoch, "Loaded", timeout=20.0))
    assert isinstance(outcome, TimedOut)
    assert "rank 1 (no live report, wanted Loaded)" in outcome.explanation
    assert await verdict_in_store(group) is None


async def test_a_verdict_by_somebody_else_ends_the_wait_at_once(group: Group) -> None:
    epoch = await group.open()
    wait = waiting(group, epoch)
    release = releasing(group, epoch)
    await group.clock.advance(0.0)
    verdict = await group.conclude(epoch, "changed our mind")
    await group.clock.advance(0.0)
    assert await wait == Aborted(verdict)
    assert await release == Aborted(verdict)


async def test_every_waiter_gets_the_same_verdict_though_both_find_the_break(group: Group) -> None:
    epoch = await group.open()
    waits = [waiting(group, epoch), waiting(group, epoch), releasing(group, epoch)]
    await group.clock.advance(0.0)
    await group.arrive("Connected", [0, 1])
    await group.ranks[2].promise(epoch)
    await group.ranks[2].fail("boom")
    await group.clock.advance(0.0)
    outcomes = [await wait for wait in waits]
    assert outcomes == [Aborted(Verdict.aborted("rank 2 on node-2 failed: boom", 2))] * 3
    assert [fields["kind"] for _, fields in await group.log()] == ["opened", "verdict"]


async def test_a_waiter_that_may_not_conclude_gets_the_leaders_verdict_and_not_its_own(group: Group) -> None:
    epoch = await group.open()
    async with group.planner("watcher") as watcher:
        wait = asyncio.create_task(watcher.wait(epoch, "Connected", timeout=60.0))
        await group.clock.advance(0.0)
        await group.ranks[1].promise(epoch)
        await group.ranks[1].fail("boom")
        await group.clock.advance(0.0)
        verdict = await group.conclude(epoch, "the leader's word")
        await group.clock.advance(0.0)
        assert await wait == Aborted(verdict)


async def test_a_waiter_that_may_not_conclude_still_ends_by_its_deadline(group: Group) -> None:
    epoch = await group.open()
    await group.ranks[1].promise(epoch)
    await group.ranks[1].fail("boom")
    async with group.planner("watcher") as watcher:
        outcome = await group.clock.run(watcher.wait(epoch, "Connected", timeout=3.0))
        assert isinstance(outcome, TimedOut)
        assert "last error: boom" in outcome.explanation
        assert await verdict_in_store(group) is None


async def test_a_conclusion_whose_reply_is_lost_is_an_error_and_then_the_same_verdict(store: FakeStore) -> None:
    plan = FaultPlan().lose_reply("conclude")
    async with started_group(store, 2, faults=plan) as group:
        epoch = await group.all_connected()
        await group.ranks[1].fail("boom")
        with pytest.raises(StoreUnavailable):
            await group.barrier.wait(epoch, "Connected", timeout=1.0)
        outcome = await group.barrier.wait(epoch, "Connected", timeout=1.0)
        assert outcome == Aborted(Verdict.aborted("rank 1 on node-1 failed: boom", 1))
        plan.assert_fired()


# --- what happens to the record ------------------------------------------------------------------------------------------


async def ends_after(
    group: Group, change: Callable[[EpochId], Awaitable[object]]
) -> tuple[EpochId, WaitOutcome, ReleaseOutcome]:
    """A wait and a release that are under way when something happens to the record."""
    epoch = await group.open()
    wait, release = waiting(group, epoch), releasing(group, epoch)
    await group.clock.advance(0.0)
    await change(epoch)
    return epoch, await group.clock.run(wait, limit=61.0), await group.clock.run(release, limit=61.0)


async def test_a_record_that_disappears_is_unknown_and_never_a_release(group: Group) -> None:
    async def flush(_: EpochId) -> None:
        leadership = group.leadership
        group.store.flush()
        for rank in group.ranks:
            await rank.beat()
        # Only the record is to be missing here.
        fields = {"term": str(leadership.term), "holder": leadership.holder, "until_ms": "9999999999999"}
        await group.barrier.store.commands.hset(group.keys.leader, mapping=fields)
        await group.barrier.store.commands.pexpire(group.keys.leader, 60_000)

    _, waited, released = await ends_after(group, flush)
    assert waited == Unknown("the store has no epoch record")
    assert released == Unknown("the store has no epoch record")


async def test_a_later_epoch_supersedes(group: Group) -> None:
    newer: list[EpochId] = []

    async def supersede(epoch: EpochId) -> None:
        await group.conclude(epoch)
        newer.append(await group.open())

    _, waited, released = await ends_after(group, supersede)
    # The waiters may have seen the verdict before its successor.
    assert waited in (Superseded(newer[0]), Aborted(Verdict.stopped("asked for")))
    assert released in (Superseded(newer[0]), Aborted(Verdict.stopped("asked for")))
    old = await group.barrier.wait(EpochId(newer[0].number, NONCE), "Connected", timeout=1.0)
    assert old == Superseded(newer[0])


async def test_an_epoch_above_the_stored_one_is_unknown(group: Group) -> None:
    epoch = await group.open()
    later = EpochId(epoch.number + 7, NONCE)
    assert await group.barrier.wait(later, "Connected", timeout=1.0) == Unknown(
        f"the store went back to epoch {epoch.number}"
    )


@pytest.mark.parametrize("field", ["ordinal", "last_n", "opened_ms", "digest"])
async def test_a_record_that_cannot_be_read_ends_the_wait_and_does_not_spin(group: Group, field: str) -> None:
    """The scripts need less of the record than a picture does: only the picture fails."""

    async def damage(_: EpochId) -> None:
        await group.barrier.store.commands.hdel(group.keys.epoch, field)
        await group.ranks[0].report("Connecting")  # so that somebody looks

    _, waited, released = await ends_after(group, damage)
    assert waited == Unknown("the record cannot be read: it is damaged (KeyError)")
    assert released == Unknown("the record cannot be read: it is damaged (KeyError)")


async def test_a_store_that_goes_away_is_an_error_and_never_a_release(group: Group) -> None:
    epoch = await group.open()
    wait = waiting(group, epoch)
    await group.clock.advance(0.0)
    group.store.partition("planner")
    with pytest.raises(StoreUnavailable):
        await group.clock.run(wait)
    group.store.heal()


# --- a planner and its client -------------------------------------------------------------------------------------------


async def test_cancelling_a_wait_leaves_the_barrier_usable(group: Group) -> None:
    epoch = await group.open()
    wait = waiting(group, epoch)
    await group.clock.advance(0.0)
    wait.cancel()
    await asyncio.gather(wait, return_exceptions=True)
    assert wait.cancelled()
    await group.arrive("Connected")
    assert await group.barrier.wait(epoch, "Connected", timeout=1.0) == Released(epoch)


async def test_the_users_own_client_is_left_alone(store: FakeStore, clock: ManualClock) -> None:
    mine: Any = store.client("mine")
    async with Barrier(mine, "demo", world_size=1, clock=clock) as barrier:
        await barrier.lead()
    assert await mine.ping(), "closing the barrier closed what it had made"
    await mine.aclose()


async def test_a_barrier_takes_the_settings_of_its_store(store: FakeStore) -> None:
    settings = Settings(lease=12.0)
    barrier = Barrier(store.client(), "demo", settings=settings, clock=store.clock)
    assert barrier.settings is settings
    assert Barrier(barrier.store, "other").settings is settings
    await barrier.close()


async def test_a_stranger_in_a_ranks_place_releases_nobody(group: Group) -> None:
    """A rank that was configured for the group but was not there when it was opened."""
    epoch = await group.all_connected()
    group.store.delete(group.keys.claim(1), group.keys.rank(1))
    async with ScriptedRank(group.store.client("stranger"), "demo", 1, clock=group.clock) as stranger:
        await stranger.report("Connected")
        outcome = await group.barrier.release(epoch, "load", "{}", "Connected", timeout=1.0)
        assert isinstance(outcome, Aborted)
        assert outcome.verdict.culprit == 1
        assert await group.tasks() == []

"""The gate: it checks every rank and appends the task at one instant, once per step, or says why not and writes nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import product

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings

from barrier import (
    Aborted,
    Already,
    Concluded,
    Dispatched,
    EpochId,
    InvalidName,
    LogId,
    NotReady,
    RankRule,
    Report,
    Settings,
    StoreUnavailable,
    Superseded,
    Unknown,
    Verdict,
    all_ranks,
)
from barrier.protocol.outcomes import DispatchOutcome
from barrier.store import verbs
from barrier.testing import FakeStore, FaultPlan, ManualClock
from tests.unit.barrier.group import NONCE, Group, epoch_of, started_group
from tests.unit.barrier.test_report import reports

pytestmark = pytest.mark.anyio


async def load(group: Group, epoch: EpochId) -> DispatchOutcome:
    return await group.barrier.dispatch(epoch, "load", "{}", "Connected")


async def refused(group: Group, epoch: EpochId) -> DispatchOutcome:
    """The answer to a dispatch that must write nothing."""
    before = group.store.contents()
    outcome = await load(group, epoch)
    assert group.store.contents() == before, "a refusal writes nothing"
    return outcome


# --- what goes out ------------------------------------------------------------------------------------------------------


async def test_when_all_have_arrived_the_task_is_in_the_log(group: Group) -> None:
    epoch = await group.all_connected()
    outcome = await group.barrier.dispatch(epoch, "load", '{"kind":"LoadModel"}', "Connected", to=(1, 2))
    assert outcome == Dispatched(LogId(epoch.number, 2))
    assert (await group.log())[-1] == (
        f"{epoch.number}-2",
        {
            "kind": "task",
            "nonce": epoch.nonce,
            "prev": "1",
            "term": str(group.leadership.term),
            "step": "load",
            "to": "1-2",
            "task": '{"kind":"LoadModel"}',
        },
    )
    record = (await group.inspect()).epoch
    assert record is not None
    assert (record.steps["load"].n, record.steps["load"].attempt, record.last_n) == (2, 1, 2)


async def test_without_a_range_it_goes_to_all_ranks(group: Group) -> None:
    await group.load(await group.all_connected())
    assert (await group.log())[-1][1]["to"] == "0-2"


async def test_every_rank_reads_the_same_task(group: Group) -> None:
    epoch = await group.all_connected()
    await group.load(epoch)
    for rank in group.ranks:
        task = await rank.next_task()
        assert (task.epoch, task.id, task.step, task.payload) == (epoch, LogId(epoch.number, 2), "load", b"{}")


# --- who counts ---------------------------------------------------------------------------------------------------------


async def test_ranks_that_have_not_arrived_are_all_named(group: Group) -> None:
    epoch = await group.open()
    assert await refused(group, epoch) == NotReady((0, 1, 2))
    await group.arrive("Connected", [1])
    assert await refused(group, epoch) == NotReady((0, 2))
    await group.arrive("Connected", [0, 2])
    assert isinstance(await load(group, epoch), Dispatched)


async def test_an_arrival_that_was_withdrawn_does_not_count(group: Group) -> None:
    epoch = await group.all_connected()
    await group.ranks[1].report("Failed", error="boom")
    assert await refused(group, epoch) == NotReady((1,))


async def test_the_status_must_be_the_wanted_one_exactly(group: Group) -> None:
    epoch = await group.all_connected()
    for near_miss in ("Connecte", "Connecteds", "connected", "Connecting"):
        await group.ranks[0].report(near_miss)
        assert await refused(group, epoch) == NotReady((0,))


async def test_a_live_report_is_needed_a_lapsed_one_does_not_count(group: Group) -> None:
    epoch = await group.all_connected()
    await group.clock.advance(4.0)
    await group.barrier.lead()
    await group.ranks[0].beat()
    await group.ranks[2].beat()
    await group.clock.advance(2.5)
    assert await refused(group, epoch) == NotReady((1,))


async def test_a_report_of_an_earlier_epoch_does_not_count(group: Group) -> None:
    first = await group.all_connected()
    await group.conclude(first)
    second = await group.open()
    assert await refused(group, second) == NotReady((0, 1, 2))


OTHERWISE: dict[str, Callable[[Report], Report]] = {
    "no epoch": lambda report: report._replace(epoch=None),
    "later number": lambda report: report._replace(epoch=EpochId(epoch_of(report).number + 1, epoch_of(report).nonce)),
    "earlier number": lambda report: report._replace(
        epoch=EpochId(epoch_of(report).number - 1, epoch_of(report).nonce)
    ),
    "other nonce": lambda report: report._replace(epoch=EpochId(epoch_of(report).number, NONCE)),
    "other life": lambda report: report._replace(incarnation="f" * 28),
    "reversed life": lambda report: report._replace(incarnation=report.incarnation[::-1]),
    "other status": lambda report: report._replace(status="Idle"),
}


@pytest.mark.parametrize("rank", [0, 1, 2], ids=["the first", "the middle one", "the last"])
@pytest.mark.parametrize("said", OTHERWISE)
async def test_a_report_counts_for_exactly_this_epoch_roster_and_status(group: Group, said: str, rank: int) -> None:
    epoch = await group.all_connected()
    mine = group.ranks[rank].member.report_now
    await group.barrier.store.commands.set(group.keys.rank(rank), OTHERWISE[said](mine).encode(), px=60_000)
    assert await refused(group, epoch) == NotReady((rank,))
    await group.barrier.store.commands.set(group.keys.rank(rank), mine.encode(), px=60_000)
    assert isinstance(await load(group, epoch), Dispatched)


async def test_ranks_that_exchanged_their_lives_are_both_missing(group: Group) -> None:
    epoch = await group.all_connected()
    first, last = (group.ranks[rank].member.report_now for rank in (0, 2))
    await group.barrier.store.commands.set(group.keys.rank(0), last.encode(), px=60_000)
    await group.barrier.store.commands.set(group.keys.rank(2), first.encode(), px=60_000)
    assert await refused(group, epoch) == NotReady((0, 2))


async def test_ranks_count_in_any_mixture_of_the_wanted_statuses_and_of_places_in_the_log(group: Group) -> None:
    epoch = await group.all_connected()
    for rank, (status, applied) in enumerate([("Ready", 7), ("WarmingUp", 9), ("Ready", 8)]):
        said = group.ranks[rank].member.report_now._replace(status=status, applied=applied)
        await group.barrier.store.commands.set(group.keys.rank(rank), said.encode(), px=60_000)
    rules = all_ranks(3, ("WarmingUp", "Ready"))
    dispatched = await group.barrier.dispatch(epoch, "serve", "{}", rules)
    assert dispatched == Dispatched(LogId(epoch.number, 10)), "above the place that the furthest has read to"


async def test_ranks_that_the_group_does_not_have_are_missing(group: Group) -> None:
    epoch = await group.all_connected()
    rules = (RankRule(1, 4, ("Connected",)),)
    assert await group.barrier.dispatch(epoch, "load", "{}", rules) == NotReady((3, 4))


async def test_a_rank_that_was_restarted_is_not_on_the_roster(group: Group) -> None:
    epoch = await group.all_connected()
    await group.ranks[1].restart()
    forged = group.ranks[1].member.report_now._replace(epoch=epoch, floor=epoch.number, status="Connected")
    await group.barrier.store.commands.set(group.keys.rank(1), forged.encode(), px=60_000)
    assert await refused(group, epoch) == NotReady((1,))


async def test_one_ranks_report_does_not_count_for_another(group: Group) -> None:
    epoch = await group.all_connected()
    stolen = await group.barrier.store.commands.get(group.keys.rank(0))
    await group.barrier.store.commands.set(group.keys.rank(1), stolen, px=60_000)
    assert await refused(group, epoch) == NotReady((1,))


@pytest.mark.parametrize("garbage", [b"", b"garbage", b"\xff" * 100, b"2|" * 50])
async def test_garbage_counts_as_missing(group: Group, garbage: bytes) -> None:
    epoch = await group.all_connected()
    await group.barrier.store.commands.set(group.keys.rank(2), garbage, px=60_000)
    assert await refused(group, epoch) == NotReady((2,))


async def test_the_script_counts_exactly_the_reports_that_python_counts(clock: ManualClock) -> None:
    """Hypothesis chooses the report, the scripts' and Python's judgements must agree."""
    store = FakeStore(clock)
    async with started_group(store, 1) as group:
        epoch = await group.all_connected()
        mine = group.ranks[0].member.report_now
        cases: list[Report] = []

        @hypothesis_settings(max_examples=20, deadline=None, database=None)
        @given(reports)
        def collect(other: Report) -> None:
            for epoch_too, life_too, status_too in product((True, False), repeat=3):
                cases.append(
                    other._replace(
                        rank=0,
                        epoch=mine.epoch if epoch_too else other.epoch,
                        incarnation=mine.incarnation if life_too else other.incarnation,
                        status=mine.status if status_too else other.status,
                    )
                )

        collect()
        counted = 0
        for report in cases:
            await group.barrier.store.commands.set(group.keys.rank(0), report.encode(), px=60_000)
            right = (report.epoch, report.incarnation, report.status) == (epoch, mine.incarnation, "Connected")
            outcome = await verbs.check(
                group.barrier.store,
                group.keys,
                epoch=epoch,
                requirement=all_ranks(1, "Connected"),
                world_size=1,
            )
            assert (not isinstance(outcome, NotReady)) == right, report
            counted += right
        assert 0 < counted < len(cases), "the cases must hold both kinds"


async def test_rules_ask_each_rank_for_its_own(group: Group) -> None:
    epoch = await group.open()
    await group.arrive("WarmingUp", [1])
    await group.arrive("Ready", [2])
    await group.arrive("Loaded", [0])
    rules = (RankRule(1, 2, ("WarmingUp", "Ready")),)
    assert isinstance(await group.barrier.dispatch(epoch, "warm-up-leader", "{}", rules, to=(0, 0)), Dispatched)
    rules = (RankRule(0, 0, ("Connected",)), RankRule(1, 2, ("Ready",)))
    assert await group.barrier.dispatch(epoch, "other", "{}", rules) == NotReady((0, 1))


async def test_ranks_beyond_a_slice_and_a_chunk_are_checked_too(store: FakeStore) -> None:
    """2,000 keys go into one MGET and 64 incarnations into one field: the last rank of 2,100 must count as the first does."""
    async with started_group(store, 1) as group:
        size, mine = 2_100, group.ranks[0].member.report_now
        lives = [f"{1:012x}{rank:016x}" for rank in range(size)]

        async def say(epoch: EpochId | None, status: str) -> None:
            pipe = group.barrier.store.commands.pipeline(transaction=True)
            for rank, life in enumerate(lives):
                said = mine._replace(rank=rank, incarnation=life, epoch=epoch, status=status)
                pipe.set(group.keys.rank(rank), said.encode(), px=60_000)
            await pipe.execute()

        await say(None, "Idle")
        async with group.planner("big") as big:
            store.delete(group.keys.leader)
            await big.open(size)
            snapshot = await big.inspect()
            assert snapshot.epoch is not None
            assert snapshot.epoch.roster == tuple(lives)
            epoch = snapshot.epoch.id
            await say(epoch, "Connected")
            for rank in (63, 64, 1_999, 2_000, 2_099):
                key = group.keys.rank(rank)
                kept = await big.store.commands.get(key)
                store.delete(key)
                assert await big.dispatch(epoch, "load", "{}", "Connected") == NotReady((rank,))
                await big.store.commands.set(key, kept, px=60_000)
            assert isinstance(await big.dispatch(epoch, "load", "{}", "Connected"), Dispatched)


# --- once per step ------------------------------------------------------------------------------------------------------


async def test_a_step_goes_out_once_and_says_where_it_is(group: Group) -> None:
    epoch = await group.all_connected()
    first = await group.load(epoch)
    for _ in range(3):
        assert await refused(group, epoch) == Already(first)
    assert await group.tasks() == [str(first)]


async def test_it_says_already_even_when_the_ranks_have_gone_on(group: Group) -> None:
    epoch = await group.all_connected()
    first = await group.load(epoch)
    await group.arrive("Loading")
    assert await refused(group, epoch) == Already(first)


async def test_another_planner_with_authority_does_not_dispatch_it_again(group: Group) -> None:
    epoch = await group.all_connected()
    first = await group.load(epoch)
    await group.barrier.resign()
    async with group.planner("successor") as successor:
        await successor.lead()
        assert await successor.dispatch(epoch, "load", "{}", "Connected") == Already(first)
    assert len(await group.tasks()) == 1


async def test_after_a_lost_reply_the_same_call_says_already_and_the_log_has_one_entry(store: FakeStore) -> None:
    plan = FaultPlan().lose_reply("dispatch")
    async with started_group(store, 2, faults=plan) as group:
        epoch = await group.all_connected()
        with pytest.raises(StoreUnavailable, match="no answer from the store"):
            await load(group, epoch)
        assert await load(group, epoch) == Already(LogId(epoch.number, 2))
        assert len(await group.tasks()) == 1
        plan.assert_fired()


async def test_a_call_that_reaches_the_server_twice_dispatches_once(store: FakeStore) -> None:
    plan = FaultPlan().duplicate("dispatch")
    async with started_group(store, 2, faults=plan) as group:
        epoch = await group.all_connected()
        assert isinstance(await load(group, epoch), Already)
        assert len(await group.tasks()) == 1
        plan.assert_fired()


async def test_a_further_attempt_of_a_step_goes_out_again_once(group: Group) -> None:
    epoch = await group.all_connected()
    first = await group.load(epoch)
    second = await group.load(epoch, attempt=2)
    assert second.n == first.n + 1
    assert await group.barrier.dispatch(epoch, "load", "{}", "Connected", attempt=2) == Already(second)
    assert await group.barrier.dispatch(epoch, "load", "{}", "Connected", attempt=1) == Already(second)
    assert len(await group.tasks()) == 2


async def test_repeatable_steps_are_once_by_their_name(group: Group) -> None:
    epoch = await group.open()
    await group.arrive("Ready")

    async def generate(name: str) -> DispatchOutcome:
        return await group.barrier.dispatch(epoch, name, "{}", "Ready", repeatable=True)

    first = await generate("generate:1")
    assert first == Dispatched(LogId(epoch.number, 2))
    assert await generate("generate:1") == Already(LogId(epoch.number, 2))
    assert await generate("generate:2") == Dispatched(LogId(epoch.number, 3))
    record = (await group.inspect()).epoch
    assert record is not None
    assert record.steps == {}, "generations come without end and must not fill the record"
    assert record.last_n == 3


async def test_a_repeatable_step_is_once_over_all_epochs_and_says_where_it_was(group: Group) -> None:
    """A request is one request: an answer that a client has had, or half of it, must not come twice."""
    first = await group.all_connected()
    await group.barrier.dispatch(first, "generate:1", "{}", "Connected", repeatable=True)
    await group.conclude(first)
    second = await group.open()
    for rank in group.ranks:
        await rank.retire()
        await rank.arrive("Connected")
    again = await group.barrier.dispatch(second, "generate:1", "{}", "Connected", repeatable=True)
    assert again == Already(LogId(first.number, 2))
    assert len(await group.tasks()) == 1


async def test_a_mark_that_cannot_be_read_never_leads_to_a_second_dispatch(group: Group) -> None:
    epoch = await group.all_connected()
    await group.barrier.store.commands.hset(group.keys.epoch, "step:load", "garbage")
    assert await refused(group, epoch) == Unknown("the record of step load is not readable")


# --- order --------------------------------------------------------------------------------------------------------------


async def test_a_step_waits_for_the_one_before(group: Group) -> None:
    epoch = await group.all_connected()
    before = group.store.contents()
    outcome = await group.barrier.dispatch(epoch, "load", "{}", "Connected", after="connect")
    assert outcome == Unknown("step connect was not dispatched in this epoch")
    assert group.store.contents() == before
    await group.barrier.dispatch(epoch, "connect", "{}", "Connected")
    assert isinstance(await group.barrier.dispatch(epoch, "load", "{}", "Connected", after="connect"), Dispatched)


async def test_each_entry_names_the_one_before_it(group: Group) -> None:
    epoch = await group.all_connected()
    for step in ("connect", "load", "warm-up"):
        await group.barrier.dispatch(epoch, step, "{}", "Connected")
    log = await group.log()
    assert [(entry_id, fields["prev"]) for entry_id, fields in log] == [
        (f"{epoch.number}-{n}", str(n - 1)) for n in range(1, 5)
    ]


# --- the record ---------------------------------------------------------------------------------------------------------


async def test_after_the_verdict_nothing_goes_out(group: Group) -> None:
    epoch = await group.all_connected()
    verdict = await group.conclude(epoch)
    assert await refused(group, epoch) == Aborted(verdict)


async def test_an_epoch_that_was_followed_by_another_is_superseded(group: Group) -> None:
    first = await group.all_connected()
    await group.conclude(first)
    second = await group.open()
    assert await refused(group, first) == Superseded(second)


async def test_the_same_number_with_another_nonce_is_superseded_too(group: Group) -> None:
    epoch = await group.all_connected()
    assert await refused(group, EpochId(epoch.number, NONCE)) == Superseded(epoch)


async def test_without_a_record_it_is_unknown(group: Group) -> None:
    epoch = await group.all_connected()
    group.store.delete(group.keys.epoch)
    assert await refused(group, epoch) == Unknown("the store has no epoch record")


async def test_a_flushed_store_never_releases(group: Group) -> None:
    epoch = await group.all_connected()
    group.store.flush()
    for rank in group.ranks:
        await rank.beat()
    await group.barrier.lead()
    assert await refused(group, epoch) == Unknown("the store has no epoch record")


@pytest.mark.parametrize("field", ["number", "nonce", "world_size", "roster:0"])
async def test_a_record_with_a_field_missing_never_releases(group: Group, field: str) -> None:
    epoch = await group.all_connected()
    await group.barrier.store.commands.hdel(group.keys.epoch, field)
    assert isinstance(await refused(group, epoch), Unknown)


@pytest.mark.parametrize("roster", ["", "f" * 27, "f" * 28, "f" * 83, "f" * 85])
async def test_a_roster_that_is_not_whole_never_releases(group: Group, roster: str) -> None:
    epoch = await group.all_connected()
    await group.barrier.store.commands.hset(group.keys.epoch, "roster:0", roster)
    assert await refused(group, epoch) == Unknown("the record has no whole roster")


async def test_a_store_that_went_back_to_an_earlier_epoch_is_unknown(group: Group) -> None:
    first = await group.open()
    earlier = group.store.snapshot()
    await group.conclude(first)
    second = await group.all_connected()
    group.store.roll_back(earlier)
    assert await refused(group, second) == Unknown(f"the store went back to epoch {first.number}")


async def test_another_world_size_than_the_records_is_unknown(group: Group) -> None:
    epoch = await group.all_connected()
    outcome = await verbs.dispatch(
        group.barrier.store,
        group.keys,
        leadership=group.leadership,
        epoch=epoch,
        step="load",
        payload="{}",
        requirement=all_ranks(2, "Connected"),
        to=(0, 1),
        world_size=2,
    )
    assert outcome == Unknown("the record says world_size 3, the caller 2")
    assert await group.tasks() == []


# --- the place in the log -----------------------------------------------------------------------------------------------


async def test_a_step_that_a_rollback_forgot_gets_the_place_it_had(group: Group) -> None:
    """A rank that took it before the rollback recognises it; one that did not takes it now."""
    epoch = await group.all_connected()
    earlier = group.store.snapshot()
    first = await group.load(epoch)
    group.store.roll_back(earlier)
    assert await group.load(epoch) == first


async def test_a_step_that_gets_the_place_it_had_names_the_entry_before_it(group: Group) -> None:
    """The record may remember less than the log; a rank that has not read that entry must find out that it is missing."""
    epoch = await group.all_connected()
    other = await group.barrier.dispatch(epoch, "other", "{}", "Connected")
    assert isinstance(other, Dispatched)
    earlier = group.store.snapshot()
    first = await group.load(epoch)
    group.store.roll_back(earlier)
    await group.barrier.store.commands.hset(group.keys.epoch, "last_n", "1")
    assert await group.load(epoch) == first
    entry_id, fields = (await group.log())[-1]
    assert (entry_id, fields["prev"]) == (str(first), str(other.id.n))


async def test_a_new_step_after_a_rollback_gets_a_place_that_nobody_has_read(group: Group) -> None:
    epoch = await group.all_connected()
    earlier = group.store.snapshot()
    first = await group.load(epoch)
    group.store.roll_back(earlier)
    assert (await group.inspect()).applied < first.n, "what the store says now is not all that this planner knows"
    other = await group.barrier.dispatch(epoch, "other", "{}", "Connected")
    assert other == Dispatched(LogId(epoch.number, first.n + 1))


async def test_a_successor_stays_above_what_any_rank_has_read(group: Group) -> None:
    epoch = await group.all_connected()
    earlier = group.store.snapshot()
    first = await group.load(epoch)
    for rank in group.ranks:
        await rank.next_task()
    group.store.roll_back(earlier)
    for rank in group.ranks:
        await rank.beat()  # now saying that they have read it
    await group.barrier.resign()
    async with group.planner("successor") as successor:
        await successor.lead()
        outcome = await successor.dispatch(epoch, "other", "{}", "Connected")
        assert outcome == Dispatched(LogId(epoch.number, first.n + 1))


@pytest.mark.parametrize("remembers", ["log", "record"])
async def test_a_successor_stays_above_what_either_the_log_or_the_record_remembers(
    group: Group, remembers: str
) -> None:
    epoch = await group.all_connected()
    first = await group.load(epoch)  # and no rank has read it yet
    if remembers == "log":
        await group.barrier.store.commands.hset(group.keys.epoch, "last_n", "1")
    else:
        group.store.delete(group.keys.tasks)
    await group.barrier.resign()
    async with group.planner("successor") as successor:
        await successor.lead()
        outcome = await successor.dispatch(epoch, "other", "{}", "Connected")
        assert outcome == Dispatched(LogId(epoch.number, first.n + 1))


async def test_a_log_that_was_trimmed_to_nothing_goes_on_where_it_was(group: Group) -> None:
    epoch = await group.all_connected()
    await group.load(epoch)
    await group.barrier.store.commands.xtrim(group.keys.tasks, maxlen=0, approximate=False)
    await group.barrier.store.commands.hset(group.keys.epoch, "last_n", "1")
    outcome = await group.barrier.dispatch(epoch, "other", "{}", "Connected")
    assert outcome == Dispatched(LogId(epoch.number, 3))


async def test_a_log_that_is_ahead_of_the_record_is_unknown(group: Group) -> None:
    epoch = await group.all_connected()
    await group.barrier.store.commands.xadd(
        group.keys.tasks, {"kind": "opened", "nonce": NONCE, "prev": "0", "term": "1"}, id=f"{epoch.number + 1}-1"
    )
    assert await refused(group, epoch) == Unknown(f"the log has entries of epoch {epoch.number + 1}")


async def test_the_log_is_capped(store: FakeStore) -> None:
    async with started_group(store, 1, settings=Settings(log_entries=5, event_entries=5, signal_entries=5)) as group:
        epoch = await group.all_connected()
        for n in range(20):
            await group.barrier.dispatch(epoch, f"generate:{n}", "{}", "Connected", repeatable=True)
        assert len(await group.log()) == 5


# --- bad arguments ------------------------------------------------------------------------------------------------------


async def test_bad_arguments_are_refused_and_nothing_is_sent(group: Group) -> None:
    epoch = await group.all_connected()
    sent = group.store.sent["planner"]
    attempts: list[tuple[Awaitable[object], str]] = [
        (group.barrier.dispatch(epoch, "lo}ad", "{}", "Connected"), "is not a step name"),
        (group.barrier.dispatch(epoch, "load", "{}", "Not Ready"), "is not a status name"),
        (group.barrier.dispatch(epoch, "load", "{}", []), "names no status"),
        (
            group.barrier.dispatch(epoch, "load", "é" * 131_073, "Connected"),
            "the payload has 262,146 bytes; at most 262,144",
        ),
    ]
    for attempt, said in attempts:
        with pytest.raises(InvalidName, match=said):
            await attempt
    assert group.store.sent["planner"] == sent


async def test_it_takes_one_round_trip(group: Group) -> None:
    epoch = await group.all_connected()
    await load(group, epoch)
    sent = group.store.sent["planner"]
    await load(group, epoch)
    assert group.store.sent["planner"] == sent + 1


async def test_a_server_that_forgot_the_script_is_given_it_again(group: Group) -> None:
    epoch = await group.all_connected()
    group.store.forget_scripts()
    assert isinstance(await load(group, epoch), Dispatched)
    group.store.forget_scripts()
    assert isinstance(await load(group, epoch), Already)
    group.store.forget_scripts()
    assert isinstance(await group.barrier.conclude(epoch, Verdict.stopped()), Concluded)
    group.store.forget_scripts()
    assert (await group.inspect()).epoch is not None

"""Reporting: one MULTI says everything, a changed status is a hint, heartbeats rewrite the whole, and nothing is said halfway."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from barrier import ClaimLost, InvalidName, Member, Report, StoreFull, StoreUnavailable, StoreUnsuitable, TaskOutcome
from barrier.protocol.report import MAX_OUTCOMES
from barrier.testing import FakeStore, FaultPlan, ManualClock, ScriptedRank, wait_until
from tests.unit.barrier.group import Group, started_group

pytestmark = pytest.mark.anyio


async def stored(group: Group, rank: int = 0) -> Report:
    found = (await group.inspect()).ranks[rank].report
    assert found is not None
    return found


async def hints(group: Group) -> list[dict[str, str]]:
    entries: Any = await group.barrier.store.commands.xrange(group.keys.signals)
    return [{name.decode(): value.decode() for name, value in fields.items()} for _, fields in entries]


async def claim_left(group: Group) -> int:
    return await group.barrier.store.commands.pttl(group.keys.claim(0))


async def history(group: Group) -> list[dict[str, str]]:
    entries: Any = await group.barrier.store.commands.xrange(group.keys.events)
    return [{name.decode(): value.decode() for name, value in fields.items()} for _, fields in entries]


async def test_a_report_is_one_round_trip(group: Group) -> None:
    sent = group.store.sent["rank 0"]
    await group.ranks[0].report("Connecting", progress=(1, 4))
    assert group.store.sent["rank 0"] == sent + 1


async def test_a_status_between_two_heartbeats_renews_no_claim(group: Group) -> None:
    """It lies between an arrival and the dispatch, so it leaves out what the heartbeats do."""
    left = await claim_left(group)
    await group.clock.advance(0.5)
    await group.ranks[0].report("Connecting")
    assert await claim_left(group) == left - 500
    await group.ranks[0].beat()
    assert await claim_left(group) == left


async def test_a_status_looks_as_well_once_a_heartbeat_is_due(group: Group) -> None:
    """Whoever reports statuses and never beats keeps the rank all the same."""
    left = await claim_left(group)
    await group.clock.advance(group.barrier.settings.heartbeat)
    await group.ranks[0].report("Connecting")
    assert await claim_left(group) == left


async def test_a_status_heals_a_claim_that_is_gone_and_tells_its_history_once(group: Group) -> None:
    claim = group.keys.claim(0)
    group.store.delete(claim)
    await group.ranks[0].member.report("Connecting", events=[{"kind": "Said"}])
    assert await group.barrier.store.commands.get(claim) == group.ranks[0].member.incarnation.encode()
    assert (await stored(group)).status == "Connecting"
    assert [event["kind"] for event in await history(group)].count("Said") == 1


async def test_a_status_finds_out_that_another_process_holds_the_rank(group: Group) -> None:
    await group.barrier.store.commands.set(group.keys.claim(0), "f" * 28, px=60_000)
    with pytest.raises(ClaimLost, match="f" * 28):
        await group.ranks[0].report("Connecting")


async def test_it_says_everything(group: Group) -> None:
    epoch = await group.open()
    await group.ranks[0].promise(epoch)
    outcome = TaskOutcome(task_id="t1", step="load", n=2, result="rejected", code="NotYet", detail="still connecting")
    await group.clock.advance(1.0)
    await group.ranks[0].report("Loading", progress=(3, 32), error="slow disk", permanent=True, outcome=outcome)
    found = await stored(group)
    assert (found.status, found.epoch, found.floor, found.applied) == ("Loading", epoch, epoch.number, 1)
    assert (found.progress, found.error, found.permanent, found.outcomes) == ((3, 32), "slow disk", True, (outcome,))


async def test_without_a_status_it_keeps_the_one_it_had(group: Group) -> None:
    await group.ranks[0].report("Connecting")
    await group.ranks[0].report()
    assert (await stored(group)).status == "Connecting"


async def test_progress_and_error_are_said_anew_each_time(group: Group) -> None:
    await group.ranks[0].report("Loading", progress=(1, 2), error="odd")
    await group.ranks[0].report("Loaded")
    found = await stored(group)
    assert (found.progress, found.error) == (None, "")


async def test_progress_that_was_noted_goes_with_the_next_heartbeat(group: Group) -> None:
    sent = group.store.sent["rank 0"]
    group.ranks[0].member.note_progress(5, 32)
    assert group.store.sent["rank 0"] == sent
    async with group.ranks[0].heartbeat():
        await group.clock.advance(2.0)
    assert (await stored(group)).progress == (5, 32)


async def test_the_time_in_a_status_is_told_by_the_ranks_own_clock(group: Group) -> None:
    await group.ranks[0].report("Connecting")
    await group.clock.advance(3.0)
    await group.ranks[0].beat()
    assert (await stored(group)).status_ms == 3_000
    await group.ranks[0].report("Connected")
    assert (await stored(group)).status_ms == 0


async def test_every_report_has_a_higher_number(group: Group) -> None:
    first = (await stored(group)).seq
    await group.ranks[0].beat()
    await group.ranks[0].report("Connecting")
    assert (await stored(group)).seq == first + 2


async def test_only_the_last_outcomes_are_kept_and_one_task_has_one(group: Group) -> None:
    for n in range(MAX_OUTCOMES + 2):
        await group.ranks[0].report(outcome=TaskOutcome(task_id=f"t{n}", step="generate", n=n, result="running"))
    await group.ranks[0].report(outcome=TaskOutcome(task_id="t9", step="generate", n=9, result="done"))
    outcomes = (await stored(group)).outcomes
    assert [(one.task_id, one.result) for one in outcomes][-2:] == [("t8", "running"), ("t9", "done")]
    assert len(outcomes) == MAX_OUTCOMES


async def test_a_status_that_could_not_be_written_changes_nothing(group: Group) -> None:
    with pytest.raises(InvalidName, match="is not a status name"):
        await group.ranks[0].report("Not Ready")
    await group.ranks[0].beat()
    assert (await stored(group)).status == "Idle"


# --- hints --------------------------------------------------------------------------------------------------------------


async def test_a_changed_status_is_a_hint_and_a_heartbeat_is_none(group: Group) -> None:
    before = len(await hints(group))
    await group.ranks[0].beat()
    await group.ranks[0].report("Idle")
    assert len(await hints(group)) == before
    await group.ranks[0].report("Connecting")
    assert (await hints(group))[before:] == [
        {"kind": "report", "rank": "0", "epoch": "-", "inc": group.ranks[0].incarnation, "status": "Connecting"}
    ]


async def test_a_promise_is_a_hint_with_the_epoch(group: Group) -> None:
    epoch = await group.open()
    await group.ranks[0].promise(epoch)
    assert (await hints(group))[-1]["epoch"] == str(epoch)


@pytest.mark.parametrize(
    "said",
    [
        {"error": "boom"},
        {"outcome": TaskOutcome(task_id="t", step="load", n=2, result="rejected", code="NotYet")},
        {"outcome": TaskOutcome(task_id="t", step="load", n=2, result="failed")},
    ],
)
async def test_an_error_or_a_rejection_is_an_alarm_even_in_the_same_status(group: Group, said: dict[str, Any]) -> None:
    before = len(await hints(group))
    await group.ranks[0].report(**said)
    assert [one.get("alarm") for one in (await hints(group))[before:]] == ["1"]
    await group.ranks[0].report()
    assert len(await hints(group)) == before + 1, "an alarm is given once"


async def test_a_done_task_is_no_alarm(group: Group) -> None:
    before = len(await hints(group))
    await group.ranks[0].report(outcome=TaskOutcome(task_id="t", step="load", n=2, result="done"))
    assert len(await hints(group)) == before


async def test_a_second_alarm_while_the_first_is_under_way_is_given_too(store: FakeStore, clock: ManualClock) -> None:
    gate = asyncio.Event()
    plan = FaultPlan().after("exec", gate.wait, nth=4)  # 1 to 3 are the claim
    async with started_group(store, 1) as group:
        await group.ranks[0].close()
        member = Member(store.client(faults=plan), "demo", rank=0, clock=clock)
        await member.claim()
        before = len(await hints(group))

        def rejected(name: str) -> TaskOutcome:
            return TaskOutcome(task_id=name, step="load", n=2, result="rejected", code="NotYet")

        first = asyncio.create_task(member.report(outcome=rejected("t1")))
        await wait_until(lambda: plan.fired, "the first report to be under way")
        second = asyncio.create_task(member.report(outcome=rejected("t2")))
        await clock.advance(0.0)
        gate.set()
        await asyncio.gather(first, second)
        assert [one.get("alarm") for one in (await hints(group))[before:]] == ["1", "1"]
        await member.leave()
        await member.close()


# --- when the store cannot tell -----------------------------------------------------------------------------------------


@pytest.fixture
def plan() -> FaultPlan:
    return FaultPlan()


async def faulty_rank(store: FakeStore, plan: FaultPlan) -> Member:
    member = Member(store.client("rank 0", faults=plan), "demo", rank=0, clock=store.clock)
    await member.claim()
    return member


async def test_a_report_that_did_not_arrive_is_said_by_the_next_one_whole(group: Group, plan: FaultPlan) -> None:
    await group.ranks[0].close()
    member = await faulty_rank(group.store, plan)
    plan.refuse("exec")
    before = len(await hints(group))
    with pytest.raises(StoreUnavailable):
        await member.report("Connected", error="odd", events=[{"kind": "RunnerStatusUpdated"}])
    assert (await stored(group)).status == "Idle"
    await member.report(error="odd")
    assert (await stored(group)).status == "Connected"
    assert [one["status"] for one in (await hints(group))[before:]] == ["Connected"]
    assert [one["kind"] for one in await history(group)] == ["RunnerStatusUpdated"]
    plan.assert_fired()
    await member.leave()
    await member.close()


async def test_a_reply_lost_after_the_commit_says_it_twice_and_events_carry_their_number(
    group: Group, plan: FaultPlan
) -> None:
    await group.ranks[0].close()
    member = await faulty_rank(group.store, plan)
    plan.lose_reply("exec")
    with pytest.raises(StoreUnavailable):
        await member.report("Connected", events=[{"kind": "A"}, {"kind": "B"}])
    assert (await stored(group)).status == "Connected"
    await member.report(events=[{"kind": "C"}])
    assert [(one["kind"], one["seq"]) for one in await history(group)] == [
        ("A", "1"), ("B", "2"), ("A", "1"), ("B", "2"), ("C", "3")
    ]  # fmt: skip
    assert {one["source"] for one in await history(group)} == {"rank"}
    plan.assert_fired()
    await member.leave()
    await member.close()


async def test_an_alarm_that_did_not_arrive_is_given_later(group: Group, plan: FaultPlan) -> None:
    await group.ranks[0].close()
    member = await faulty_rank(group.store, plan)
    plan.refuse("exec")
    with pytest.raises(StoreUnavailable):
        await member.report(error="boom")
    before = len(await hints(group))
    await member.report()
    assert [one.get("alarm") for one in (await hints(group))[before:]] == ["1"]
    await member.leave()
    await member.close()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("OOM command not allowed when used memory > 'maxmemory'.", StoreFull),
        ("READONLY You can't write against a read only replica.", StoreUnsuitable),
        ("LOADING Redis is loading the dataset in memory", StoreUnavailable),
    ],
)
async def test_a_servers_refusal_has_its_own_error(
    group: Group, plan: FaultPlan, answer: str, error: type[Exception]
) -> None:
    await group.ranks[0].close()
    member = await faulty_rank(group.store, plan)
    plan.answer("exec", answer)
    with pytest.raises(error):
        await member.report("Connected")
    plan.assert_fired()
    await member.leave()
    await member.close()


# --- heartbeats ---------------------------------------------------------------------------------------------------------


async def test_a_heartbeat_keeps_the_lease_for_as_long_as_it_beats(group: Group) -> None:
    async with group.ranks[0].heartbeat():
        await group.clock.advance(60.0)
        views = (await group.inspect()).ranks
        assert [view.report is not None for view in views] == [True, False, False]
        assert group.ranks[0].member.trusted
    await group.clock.advance(6.5)
    assert (await group.inspect()).ranks[0].report is None


async def test_a_heartbeat_heals_a_flushed_store_by_itself(group: Group) -> None:
    epoch = await group.all_connected()
    before = await stored(group)
    async with group.ranks[0].heartbeat():
        group.store.flush()
        await group.clock.advance(2.0)
        after = await stored(group)
        assert (after.status, after.epoch, after.floor) == (before.status, epoch, epoch.number)
        assert await group.barrier.store.commands.get(group.keys.claim(0)) == group.ranks[0].incarnation.encode()


async def test_a_heartbeat_survives_a_partition_and_comes_back_within_a_command_timeout(group: Group) -> None:
    async with group.ranks[0].heartbeat():
        group.store.partition("rank 0")
        await group.clock.advance(20.0)
        assert (await group.inspect()).ranks[0].report is None
        assert not group.ranks[0].member.trusted
        group.store.heal("rank 0")
        await group.clock.advance(group.barrier.settings.command_seconds)
        assert (await stored(group)).status == "Idle"
        assert group.ranks[0].member.trusted


async def test_while_the_store_is_away_a_rank_asks_at_a_bounded_rate(group: Group) -> None:
    async with group.ranks[0].heartbeat():
        group.store.partition()
        await group.clock.advance(60.0)
        assert 60 / 1.2 <= group.store.refused["rank 0"] <= 60 / 0.6 + 1, "sooner than a heartbeat, and with jitter"
        group.store.heal()
        sent = group.store.sent["rank 0"]
        await group.clock.advance(10.0)
        assert group.store.sent["rank 0"] - sent <= 10 / 2 + 3


async def test_a_server_restart_without_its_data_is_healed_too(group: Group) -> None:
    async with group.ranks[0].heartbeat(), group.ranks[1].heartbeat(), group.ranks[2].heartbeat():
        group.store.restart(keep_data=False)
        await group.clock.advance(2.5)
        assert all(view.report for view in (await group.inspect()).ranks)


async def test_trust_ends_a_margin_before_the_lease(group: Group) -> None:
    member = group.ranks[0].member
    await member.report()
    await group.clock.advance(group.barrier.settings.distrust_after - 0.01)
    assert member.trusted
    await group.clock.advance(0.02)
    assert not member.trusted
    view = (await group.inspect()).ranks[0]
    assert view.lease_left_ms > 0, "the store still counts it: the rank doubts itself first"


async def test_trust_counts_from_when_the_renewal_was_sent(store: FakeStore, clock: ManualClock) -> None:
    """The server may have carried it out at once, and its lease runs from then, however late the reply is."""
    plan = FaultPlan().after("exec", lambda: clock.advance(4.0), nth=4)
    member = Member(store.client(faults=plan), "demo", rank=0, clock=clock)
    await member.claim()
    await member.report()
    plan.assert_fired()
    await clock.advance(0.7)
    assert member.trusted
    await clock.advance(0.2)
    assert not member.trusted
    await member.leave()
    await member.close()


async def test_a_heartbeat_that_loses_its_claim_ends(group: Group) -> None:
    rank = group.ranks[0]
    async with rank.heartbeat():
        await group.clock.advance(0.0)
        group.store.delete(group.keys.claim(0))
        async with ScriptedRank(group.store.client(), "demo", 0, clock=group.clock) as successor:
            await group.clock.advance(2.5)
            sent = group.store.sent["rank 0"]
            await group.clock.advance(20.0)
            assert group.store.sent["rank 0"] == sent, "it beats no more"
            await successor.beat()


# --- answers ------------------------------------------------------------------------------------------------------------


async def test_an_answer_is_one_round_trip_and_short_lived(group: Group) -> None:
    sent = group.store.sent["rank 0"]
    await group.ranks[0].member.write_output("generate:1", [b"Hello", b" ", b"world"])
    assert group.store.sent["rank 0"] == sent + 1
    key = group.keys.out("generate:1")
    entries: Any = await group.barrier.store.commands.xrange(key)
    assert [fields[b"chunk"] for _, fields in entries] == [b"Hello", b" ", b"world"]
    assert await group.barrier.store.commands.pttl(key) == 600_000


async def test_an_answer_to_a_hostile_name_is_refused(group: Group) -> None:
    with pytest.raises(InvalidName, match="is not a step name"):
        await group.ranks[0].member.write_output("}{", [b"x"])

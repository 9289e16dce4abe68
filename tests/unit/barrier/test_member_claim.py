"""Claiming a rank: one life at a time holds it, a successor waits for the lease, and whoever lost it writes no more."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from barrier import ClaimLost, InvalidName, Member, RankTaken, Report, Settings, StoreCorrupt, StoreUnavailable
from barrier.store.keys import Keys
from barrier.testing import FakeStore, FaultPlan, ManualClock, ScriptedRank, wait_until
from tests.unit.barrier.group import Group, started_group

pytestmark = pytest.mark.anyio


def member(store: FakeStore, rank: int | None = 0, *, world_size: int | None = 3, name: str = "") -> Member:
    return Member(store.client(name), "demo", rank=rank, world_size=world_size, clock=store.clock)


async def test_a_claim_says_hello_with_a_first_report(store: FakeStore) -> None:
    async with started_group(store, 1) as group:
        found = (await group.inspect()).ranks[0].report
        assert found is not None
        assert (found.status, found.epoch, found.seq, found.incarnation) == (
            "Idle",
            None,
            1,
            group.ranks[0].incarnation,
        )
        assert (found.node, found.world_size, found.lease_ms) == ("node-0", 1, 6_000)


async def test_the_hello_is_a_hint_for_waiting_planners(group: Group) -> None:
    hints = await group.barrier.store.commands.xrange(group.keys.signals)
    assert [(fields[b"rank"], fields[b"status"], fields[b"epoch"]) for _, fields in hints] == [
        (b"0", b"Idle", b"-"), (b"1", b"Idle", b"-"), (b"2", b"Idle", b"-"),
    ]  # fmt: skip


async def test_before_the_claim_a_member_has_no_rank(store: FakeStore) -> None:
    fresh = member(store)
    with pytest.raises(RankTaken, match="no rank is claimed yet"):
        _ = fresh.rank
    with pytest.raises(RankTaken):
        await fresh.report("Idle")
    assert not fresh.trusted
    await fresh.leave()
    await fresh.close()
    assert store.keys() == []


async def test_a_held_rank_is_refused_with_its_holder_and_a_way_out(group: Group) -> None:
    rival = member(group.store, 1)
    with pytest.raises(RankTaken) as refusal:
        await rival.claim(timeout=0)
    assert str(refusal.value) == (
        f"group demo: held by other processes (rank 1: {group.ranks[1].incarnation}). "
        "Stop one, or start no more runners than there are ranks"
    )
    found = (await group.inspect()).ranks[1].report
    assert found is not None
    assert found.incarnation == group.ranks[1].incarnation, "the holder's report stays as it was"
    await rival.close()


async def test_two_that_claim_at_once_get_one_rank_each(store: FakeStore) -> None:
    pair = [member(store, None, world_size=2) for _ in range(2)]
    ranks = await asyncio.gather(*(one.claim(timeout=0) for one in pair))
    assert sorted(ranks) == [0, 1]
    late = member(store, None, world_size=2)
    with pytest.raises(RankTaken, match=r"rank 0: .*; rank 1: "):
        await late.claim(timeout=0)
    for one in (*pair, late):
        await one.leave()
        await one.close()


async def test_a_successor_gets_the_rank_when_the_lease_is_over_and_not_before(
    store: FakeStore, clock: ManualClock
) -> None:
    async with started_group(store, 1) as group:
        await clock.advance(2.0)
        await group.ranks[0].beat()
        successor = member(store)
        claiming = asyncio.create_task(successor.claim())
        await clock.advance(5.9)
        assert not claiming.done()
        await clock.advance(0.2)
        assert await claiming == 0
        await successor.leave()
        await successor.close()


async def test_waiting_for_a_claim_ends_by_its_deadline(group: Group) -> None:
    began = group.clock.now()
    rival = member(group.store)
    async with group.ranks[0].heartbeat():
        with pytest.raises(RankTaken):
            await group.clock.run(rival.claim(timeout=9.0))
    assert group.clock.now() - began == pytest.approx(9.0, abs=0.1)
    await rival.close()


async def test_without_a_timeout_a_claim_waits_for_two_leases(group: Group) -> None:
    began = group.clock.now()
    rival = member(group.store)
    async with group.ranks[0].heartbeat():
        with pytest.raises(RankTaken):
            await group.clock.run(rival.claim())
    assert group.clock.now() - began == pytest.approx(12.0, abs=0.1)
    await rival.close()


async def test_a_rank_that_left_is_free_at_once(group: Group) -> None:
    await group.ranks[0].member.leave()
    assert (await group.inspect()).ranks[0].report is None
    successor = member(group.store)
    assert await successor.claim(timeout=0) == 0
    await successor.leave()
    await successor.close()


async def test_leaving_is_a_hint_with_an_alarm_and_may_be_repeated(group: Group) -> None:
    await group.ranks[0].member.leave()
    await group.ranks[0].member.leave()
    hints = await group.barrier.store.commands.xrange(group.keys.signals)
    assert [b"alarm" in fields for _, fields in hints] == [False, False, False, True]


async def test_leaving_takes_nothing_from_a_successor(group: Group) -> None:
    old = group.ranks[0].member
    await group.clock.advance(6.5)
    successor = member(group.store)
    await successor.claim(timeout=0)
    await old.leave()
    assert (await group.inspect()).ranks[0].report == successor.report_now
    assert await group.barrier.store.commands.get(group.keys.claim(0)) == successor.incarnation.encode()
    await successor.leave()
    await successor.close()


async def test_leaving_takes_nothing_from_a_successor_that_comes_in_between(
    store: FakeStore, clock: ManualClock
) -> None:
    """Between the look at the claim and its deletion, the claim lapses and another life takes it."""
    successor = member(store, name="successor")

    async def overtaken() -> None:
        store.delete(old.keys.claim(0))
        await successor.claim(timeout=0)

    plan = FaultPlan().before("del", overtaken)
    old = Member(store.client(faults=plan), "demo", rank=0, clock=clock)
    await old.claim()
    await old.leave()
    plan.assert_fired()
    assert await store.client().get(old.keys.claim(0)) == successor.incarnation.encode()
    assert await store.client().exists(old.keys.rank(0)) == 1
    for one in (old, successor):
        await one.leave()
        await one.close()


# --- losing it ----------------------------------------------------------------------------------------------------------


async def replaced_while_stopped(group: Group) -> Member:
    """Rank 0's process is stopped for longer than its lease, and another life takes the rank."""
    group.clock.jump(6.5)
    successor = member(group.store, name="successor")
    await successor.claim(timeout=0)
    return successor


async def test_after_a_pause_a_replaced_rank_writes_nothing(group: Group) -> None:
    successor = await replaced_while_stopped(group)
    before = group.store.contents()
    with pytest.raises(ClaimLost) as lost:
        await group.ranks[0].report("Connected")
    assert group.store.contents() == before, "it read before it wrote"
    assert successor.incarnation in str(lost.value)
    assert group.ranks[0].incarnation in str(lost.value)
    with pytest.raises(ClaimLost):
        await group.ranks[0].report()
    await successor.leave()
    await successor.close()


async def test_a_replaced_rank_finds_out_even_if_nothing_told_it_to_read_first(group: Group) -> None:
    """Its claim vanished without a pause (a flush) and another life was faster."""
    group.store.delete(group.keys.claim(0))
    successor = member(group.store)
    await successor.claim(timeout=0)
    with pytest.raises(ClaimLost):
        await group.ranks[0].report("Connected")
    await successor.report()  # rewrites what was overwritten
    assert (await group.inspect()).ranks[0].report == successor.report_now
    await successor.leave()
    await successor.close()


async def test_the_heartbeat_of_a_replaced_rank_ends_its_task_log(group: Group) -> None:
    rank = group.ranks[0]
    async with rank.heartbeat():
        waiting = asyncio.create_task(rank.next_task())
        await group.clock.advance(0.0)
        successor = await replaced_while_stopped(group)
        with pytest.raises(ClaimLost):
            await group.clock.run(waiting)
    await successor.leave()
    await successor.close()


async def test_a_replaced_rank_is_given_no_task_any_more(group: Group) -> None:
    """Regression: until its next heartbeat it was, although a report had told it already."""
    rank = group.ranks[0]
    epoch = await group.all_connected()
    waiting = asyncio.create_task(rank.next_task())
    await group.clock.advance(0.0)
    group.store.delete(group.keys.claim(0))
    successor = member(group.store)
    await successor.claim(timeout=0)
    with pytest.raises(ClaimLost):
        await rank.report("Connected")
    with pytest.raises(ClaimLost):
        await group.clock.run(waiting)
    with pytest.raises(ClaimLost):
        await group.clock.run(anext(rank.member.tasks()))
    await group.load(epoch)
    assert rank.member.trusted, "its lease was renewed a moment ago"
    with pytest.raises(ClaimLost):
        await group.clock.run(anext(rank.member.tasks()))
    await successor.leave()
    await successor.close()


async def test_a_replaced_rank_leaves_its_successor_alone(group: Group) -> None:
    successor = await replaced_while_stopped(group)
    with pytest.raises(ClaimLost):
        await group.ranks[0].report()
    before = group.store.contents()
    await group.ranks[0].close()
    assert group.store.contents() == before
    await successor.leave()
    await successor.close()


async def test_after_half_a_lease_it_reads_before_it_writes(store: FakeStore) -> None:
    async with started_group(store, 1) as group:
        sent = store.sent["rank 0"]
        await group.clock.advance(3.0)
        await group.ranks[0].beat()
        assert store.sent["rank 0"] == sent + 1, "a report within half a lease is one round trip"
        await group.clock.advance(3.1)
        await group.ranks[0].beat()
        assert store.sent["rank 0"] == sent + 3, "after that, one to look and one to write"


async def test_a_lease_that_lapsed_without_a_successor_is_simply_renewed(group: Group) -> None:
    await group.clock.advance(6.5)
    assert (await group.inspect()).ranks[0].report is None
    await group.ranks[0].beat()
    assert (await group.inspect()).ranks[0].report is not None


# --- when the store cannot tell -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("nth", [1, 2, 3])
async def test_a_claim_whose_reply_was_lost_is_simply_repeated(store: FakeStore, clock: ManualClock, nth: int) -> None:
    """MULTIs of a claim: the claim itself, the look at the types, the hello."""
    plan = FaultPlan().lose_reply("exec", nth=nth)
    one = Member(store.client(faults=plan), "demo", rank=0, clock=clock)
    with pytest.raises(StoreUnavailable):
        await one.claim(timeout=0)
    assert await one.claim(timeout=0) == 0
    plan.assert_fired()
    await one.leave()
    await one.close()


async def test_a_store_that_does_not_answer_is_told_at_once(store: FakeStore) -> None:
    store.partition()
    one = member(store)
    with pytest.raises(StoreUnavailable, match="no answer from the store at fakestore:6379"):
        await one.claim()
    await one.close()
    store.heal()


# --- arguments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "neither rank nor world_size is given"),
        ({"rank": -1}, "rank is -1; it must be from 0 to 16383"),
        ({"rank": 3, "world_size": 3}, "rank is 3; it must be from 0 to 2"),
        ({"world_size": 0}, "world_size is 0; it must be a whole number"),
        ({"rank": 0, "namespace": "Nope"}, "namespace 'Nope' is not a name"),
        ({"rank": 0, "digest": "not hexadecimal"}, "digest 'not hexadecimal' is not"),
        ({"rank": 0, "digest": "a|b"}, r"digest 'a\|b' is not"),
    ],
)
def test_bad_arguments_are_refused(store: FakeStore, options: dict[str, int], said: str) -> None:
    with pytest.raises(InvalidName, match=said):
        Member(store.client(), "demo", clock=store.clock, **options)  # pyright: ignore[reportArgumentType]  bad on purpose


async def test_settings_of_a_shorter_lease_make_shorter_claims(store: FakeStore) -> None:
    quick = Settings(lease=0.6, heartbeat=0.2)
    async with ScriptedRank(store, "demo", 0, settings=quick):
        assert store.clock is not None
        rival = member(store)
        claiming = asyncio.create_task(rival.claim())
        await store.clock.advance(0.7)
        assert await claiming == 0
        await wait_until(lambda: rival.trusted, "the successor's first renewal")
        await rival.leave()
        await rival.close()


async def test_a_clock_that_was_set_back_keeps_a_dead_process_in_its_rank_for_one_lease_and_no_longer(
    store: FakeStore, clock: ManualClock
) -> None:
    killed = member(store, 0, world_size=1)
    await killed.claim()
    await killed.close()  # which gives nothing back
    store.shift_time(-3_600)
    successor = member(store, 0, world_size=1)
    claiming = asyncio.create_task(successor.claim(timeout=60))
    await clock.advance(0.0)
    await clock.advance(6.1)
    assert await clock.run(claiming) == 0
    await successor.close()


async def test_a_claim_with_a_longer_lease_of_its_own_is_not_shortened(store: FakeStore) -> None:
    patient = Member(
        store.client(), "demo", rank=0, world_size=1, clock=store.clock, settings=Settings(lease=60, heartbeat=20)
    )
    await patient.claim()
    rival = member(store, 0, world_size=1)
    with pytest.raises(RankTaken):
        await rival.claim(timeout=0)
    left = await rival.store.commands.pttl(rival.keys.claim(0))
    assert left == 60_000
    await rival.close()
    await patient.close()


async def test_a_leave_that_failed_can_be_repeated(store: FakeStore) -> None:
    faults = FaultPlan()
    one = Member(store.client(faults=faults), "demo", rank=0, world_size=1, clock=store.clock)
    await one.claim()
    faults.refuse("watch")
    with pytest.raises(StoreUnavailable):
        await one.leave()
    assert one.keys.claim(0) in store.contents()
    await one.leave()
    assert one.keys.claim(0) not in store.contents()
    await one.close()


async def test_a_connection_that_breaks_in_the_middle_of_a_leave_leaves_no_claim_behind(store: FakeStore) -> None:
    faults = FaultPlan()
    one = Member(store.client(faults=faults), "demo", rank=0, world_size=1, clock=store.clock)
    await one.claim()
    faults.refuse("exec")
    await one.leave()
    faults.assert_fired()
    assert one.keys.claim(0) not in store.contents()
    await one.close()


@pytest.mark.parametrize("lease_ms", [0, 10**15])
async def test_a_claim_without_an_end_lapses_like_any_other(
    store: FakeStore, clock: ManualClock, lease_ms: int
) -> None:
    """Whoever may write a claim may write one that nobody renews, and a report that says what it likes of its lease."""
    raw: Any = store.client("raw")
    keys = Keys("rankgate", "demo")
    await raw.set(keys.claim(0), b"\x1b[2J" * 1_000)
    said = Report(rank=0, incarnation="f" * 28, status="Idle", lease_ms=lease_ms)
    await raw.set(keys.rank(0), said.encode())
    late = Member(store.client(), "demo", rank=0, world_size=1, clock=clock)
    with pytest.raises(RankTaken) as refusal:
        await late.claim(timeout=0)
    assert "\x1b" not in str(refusal.value)
    assert len(str(refusal.value)) < 600
    await clock.advance(601 if lease_ms else late.settings.lease + 0.1)
    assert await late.claim(timeout=0) == 0
    await late.leave()
    await late.close()
    await raw.aclose()


async def test_a_claim_waits_out_what_time_mends_where_it_is_told_to(store: FakeStore, clock: ManualClock) -> None:
    """Regression: a server that paused just after a fresh runner had connected ended that runner."""
    plan = FaultPlan().answer("info", "LOADING Redis is loading the dataset in memory")
    for nth, said in enumerate(("NOREPLICAS Not enough good replicas to write.", "NOAUTH Authentication required."), 1):
        plan.answer("exec", said, nth=nth)
    plan.refuse("xrevrange").refuse("exec", nth=3, touching="rank:0")
    fresh = Member(store.client(faults=plan), "demo", rank=0, world_size=1, clock=clock)
    assert await clock.run(fresh.claim(wait_for_store=30)) == 0
    plan.assert_fired()
    assert fresh.trusted
    await fresh.leave()
    await fresh.close()


async def test_a_claim_that_waits_for_its_store_has_an_end(store: FakeStore, clock: ManualClock) -> None:
    store.partition()
    fresh = member(store)
    began = clock.now()
    with pytest.raises(StoreUnavailable):
        await clock.run(fresh.claim(wait_for_store=30))
    assert 29 < clock.now() - began <= 31
    store.heal()
    await fresh.close()


async def test_without_being_told_a_claim_fails_at_once_and_a_wrong_type_always_does(
    store: FakeStore, clock: ManualClock
) -> None:
    began = clock.now()
    store.partition()
    fresh = member(store)
    with pytest.raises(StoreUnavailable):
        await fresh.claim()
    store.heal()
    other = store.client("somebody else")
    await other.rpush("{rankgate:demo}:tasks", "not ours")
    with pytest.raises(StoreCorrupt):
        await fresh.claim(wait_for_store=30)
    assert clock.now() == began
    await other.delete("{rankgate:demo}:tasks")
    await other.aclose()
    await fresh.close()

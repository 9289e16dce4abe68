"""Opening an epoch: who is on the roster, which number it gets, and what stands in its way."""

from __future__ import annotations

import asyncio

import pytest

from barrier import (
    Barrier,
    Disagree,
    EpochId,
    Fenced,
    InvalidName,
    InvalidSettings,
    NotReady,
    Opened,
    StoreUnavailable,
    Unconcluded,
)
from barrier.testing import FakeStore, FaultPlan, ScriptedRank
from tests.unit.barrier.group import Group, started_group

pytestmark = pytest.mark.anyio


async def opened(barrier: Barrier, world_size: int, **options: int) -> EpochId:
    outcome = await barrier.open(world_size, **options)  # pyright: ignore[reportArgumentType]  only `ordinal` is passed
    assert isinstance(outcome, Opened), outcome
    return outcome.epoch


async def test_it_fixes_the_roster_and_says_so_in_record_log_and_history(group: Group) -> None:
    epoch = await group.open(digest="ab", notes="for whoever comes next")
    found = (await group.inspect()).epoch
    assert found is not None
    assert found.id == epoch
    assert found.ordinal == 1
    assert found.world_size == 3
    assert found.roster == tuple(rank.incarnation for rank in group.ranks)
    assert found.term == group.leadership.term
    assert (found.digest, found.notes, found.steps, found.verdict) == ("ab", "for whoever comes next", {}, None)
    assert [(entry_id, fields["kind"], fields["nonce"]) for entry_id, fields in await group.log()] == [
        (f"{epoch.number}-1", "opened", epoch.nonce)
    ]


async def test_any_status_will_do(group: Group) -> None:
    await group.ranks[1].report("Failed", error="boom")
    assert await group.open()


async def test_ranks_without_a_live_report_are_named(group: Group) -> None:
    await group.ranks[0].vanish()
    await group.ranks[2].vanish()
    group.store.delete(group.keys.rank(0), group.keys.rank(2))
    before = group.store.contents()
    assert await group.barrier.open(3) == NotReady((0, 2))
    assert group.store.contents() == before, "a refusal writes nothing"


async def test_a_report_whose_lease_is_over_is_no_live_report(group: Group) -> None:
    await group.clock.advance(5.0)
    await group.ranks[0].beat()
    await group.barrier.lead()
    await group.clock.advance(1.5)
    assert await group.barrier.open(3) == NotReady((1, 2))


@pytest.mark.parametrize(
    "garbage",
    [b"", b"hello", b"2|-|Idle|0000000000|abc|0000000000000000|-|{}", b"1|-|Idle|0|" + b"1" * 28 + b"|0|-|{}"],
)
async def test_what_is_not_a_report_counts_as_missing(group: Group, garbage: bytes) -> None:
    await group.barrier.store.commands.set(group.keys.rank(1), garbage, px=60_000)
    assert await group.barrier.open(3) == NotReady((1,))


async def test_the_number_is_the_servers_clock_in_ms_when_nothing_is_above_it(group: Group) -> None:
    epoch = await group.open()
    assert epoch.number == (await group.inspect()).now_ms


async def test_the_number_is_above_the_last_record(group: Group) -> None:
    first = await group.open()
    await group.conclude(first)
    second = await group.open()
    assert second.number == first.number + 1
    assert second.nonce != first.nonce


async def test_the_number_is_above_the_record_even_if_nobody_else_remembers_it(group: Group) -> None:
    epoch = await group.open()
    await group.conclude(epoch)
    group.store.delete(group.keys.tasks)
    group.store.shift_time(-3_600)
    async with fresh_planner(group) as planner:
        assert (await opened(planner, 3)).number == epoch.number + 1


async def test_the_number_is_above_what_any_rank_has_promised(group: Group) -> None:
    epoch = await group.open()
    await group.ranks[2].arrive("Connected")
    group.store.delete(group.keys.epoch, group.keys.tasks)
    group.store.shift_time(-3_600)
    async with fresh_planner(group) as planner:
        assert (await opened(planner, 3)).number == epoch.number + 1


async def test_the_number_is_above_what_the_log_has_seen(group: Group) -> None:
    epoch = await group.open()
    group.store.delete(group.keys.epoch)
    group.store.shift_time(-3_600)
    async with fresh_planner(group) as planner:
        assert (await opened(planner, 3)).number == epoch.number + 1


async def test_the_number_is_above_what_a_log_that_was_trimmed_to_nothing_has_seen(group: Group) -> None:
    epoch = await group.open()
    group.store.delete(group.keys.epoch)
    await group.barrier.store.commands.xtrim(group.keys.tasks, maxlen=0, approximate=False)
    group.store.shift_time(-3_600)
    async with fresh_planner(group) as planner:
        assert (await opened(planner, 3)).number == epoch.number + 1


async def test_the_number_is_above_what_this_planner_has_seen(group: Group) -> None:
    epoch = await group.open()
    group.store.flush()
    group.store.shift_time(-3_600)
    for rank in group.ranks:
        await rank.beat()
    await group.barrier.lead()
    assert (await group.open()).number == epoch.number + 1


async def test_the_ordinal_counts_attempts_and_takes_the_callers_word_after_a_loss(group: Group) -> None:
    await group.conclude(await group.open())
    outcome = await group.barrier.open(3)
    assert isinstance(outcome, Opened)
    assert outcome.ordinal == 2
    await group.conclude(outcome.epoch)
    group.store.delete(group.keys.epoch)
    outcome = await group.barrier.open(3, ordinal=7)
    assert isinstance(outcome, Opened)
    assert outcome.ordinal == 8


async def test_an_epoch_without_a_verdict_stands_in_the_way(group: Group) -> None:
    epoch = await group.open()
    before = group.store.contents()
    assert await group.barrier.open(3) == Unconcluded(epoch)
    assert group.store.contents() == before


async def test_nothing_of_the_old_record_stays_in_the_new_one(group: Group) -> None:
    epoch = await group.all_connected()
    await group.load(epoch)
    await group.conclude(epoch)
    await group.open()
    found = (await group.inspect()).epoch
    assert found is not None
    assert (found.steps, found.verdict, found.last_n) == ({}, None, 1)


async def test_the_roster_names_the_lives_of_now(group: Group) -> None:
    await group.conclude(await group.open())
    await group.ranks[1].restart()
    await group.open()
    found = (await group.inspect()).epoch
    assert found is not None
    assert found.roster == tuple(rank.incarnation for rank in group.ranks)


async def test_ranks_that_were_configured_for_something_else_are_named_with_both_digests(store: FakeStore) -> None:
    async with started_group(store, 2) as group, ScriptedRank(store, "demo", 2, digest="cafe") as odd:
        assert odd.rank == 2
        before = store.contents()
        assert await group.barrier.open(3, digest="beef") == Disagree("beef", {2: "cafe"})
        assert await group.barrier.open(3) == Disagree("", {2: "cafe"})
        assert store.contents() == before
        assert isinstance(await group.barrier.open(3, digest="cafe"), Opened)


async def test_missing_ranks_come_before_disagreeing_ones(store: FakeStore) -> None:
    async with started_group(store, 1) as group, ScriptedRank(store, "demo", 1, digest="cafe"):
        assert await group.barrier.open(3, digest="beef") == NotReady((2,))


async def test_a_reply_lost_after_the_commit_leads_to_unconcluded_and_one_log_entry(store: FakeStore) -> None:
    plan = FaultPlan().lose_reply("open")
    async with started_group(store, 2, faults=plan) as group:
        with pytest.raises(StoreUnavailable):
            await group.barrier.open(2)
        record = (await group.inspect()).epoch
        assert record is not None
        assert await group.barrier.open(2) == Unconcluded(record.id)
        assert len(await group.log()) == 1
        plan.assert_fired()


async def test_a_call_that_reaches_the_server_twice_opens_one_epoch(store: FakeStore) -> None:
    plan = FaultPlan().duplicate("open")
    async with started_group(store, 2, faults=plan) as group:
        outcome = await group.barrier.open(2)
        assert isinstance(outcome, Opened)
        assert outcome.ordinal == 1
        assert len(await group.log()) == 1
        plan.assert_fired()


async def test_rosters_of_many_chunks_come_back_whole(store: FakeStore) -> None:
    async with started_group(store, 130) as group:
        epoch = await group.open()
        found = (await group.inspect()).epoch
        assert found is not None
        assert found.roster == tuple(rank.incarnation for rank in group.ranks)
        await group.ranks[129].promise(epoch)


# --- waiting for ranks --------------------------------------------------------------------------------------------------


async def test_with_a_timeout_it_waits_for_ranks_that_come_later(store: FakeStore) -> None:
    async with started_group(store, 2) as group:
        opening = asyncio.create_task(group.barrier.open(3, timeout=60))
        await group.clock.advance(1.0)
        assert not opening.done()
        async with ScriptedRank(store, "demo", 2):
            await group.clock.advance(0.0)
            assert isinstance(await opening, Opened), "the last hello wakes it, no tick is needed"


async def test_without_a_rank_it_gives_up_by_the_deadline_and_names_it(store: FakeStore) -> None:
    async with started_group(store, 2) as group:
        began = group.clock.now()
        async with group.ranks[0].heartbeat(), group.ranks[1].heartbeat():
            assert await group.clock.run(group.barrier.open(3, timeout=5.5)) == NotReady((2,))
        assert group.clock.now() == pytest.approx(began + 5.5)


async def test_a_waiting_open_finds_out_that_it_was_fenced(store: FakeStore) -> None:
    async with started_group(store, 1) as group, group.planner("standby") as standby:
        opening = asyncio.create_task(group.barrier.open(2, timeout=60))
        await group.clock.advance(6.5)
        await standby.lead()
        assert isinstance(await group.clock.run(opening), Fenced)


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
async def test_an_impossible_timeout_is_refused(group: Group, timeout: float) -> None:
    with pytest.raises(InvalidSettings, match=f"timeout is {timeout!r}"):
        await group.barrier.open(3, timeout=timeout)


# --- bad arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -1, 16_385])
async def test_an_impossible_world_size_is_refused_and_nothing_is_sent(group: Group, size: int) -> None:
    sent = group.store.sent["planner"]
    with pytest.raises(InvalidName, match="must be a whole number from 1 to 16,384"):
        await group.barrier.open(size)
    assert group.store.sent["planner"] == sent


async def test_the_first_open_needs_a_world_size(store: FakeStore) -> None:
    async with Barrier(store.client(), "demo", clock=store.clock) as barrier:
        with pytest.raises(InvalidName, match="open needs a world_size the first time"):
            await barrier.open()


async def test_later_opens_remember_the_world_size(group: Group) -> None:
    await group.conclude(await group.open())
    assert isinstance(await group.barrier.open(), Opened)


async def test_notes_have_a_limit(group: Group) -> None:
    with pytest.raises(InvalidName, match="notes have 65,538 bytes; at most 65,536 are kept"):
        await group.barrier.open(3, notes="é" * 32_769)


def fresh_planner(group: Group) -> Barrier:
    """A planner that has seen nothing, and takes over because the leader gave up."""
    group.store.delete(group.keys.leader)
    return group.planner("fresh")


@pytest.mark.parametrize("digest", ["xyz", "AB", "a" * 65, "a|b", "-", "a\n"])
async def test_a_digest_that_no_report_could_carry_is_refused(group: Group, digest: str) -> None:
    with pytest.raises(InvalidName, match="is not a digest: use up to 64 of 0-9 and a-f"):
        await group.barrier.open(3, digest=digest)


@pytest.mark.parametrize("field", ["nonce", "world_size"])
async def test_a_record_that_lacks_a_field_is_opened_over(group: Group, field: str) -> None:
    epoch = await group.all_connected()
    await group.barrier.store.commands.hdel(group.barrier.keys.epoch, field)
    outcome = await group.barrier.open()
    assert isinstance(outcome, Opened), "it could be neither concluded nor opened over, and nobody would ever recover"
    assert outcome.epoch.number > epoch.number

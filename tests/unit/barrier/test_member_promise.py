"""Promises: one epoch at a time, never a lower one, never one twice, and only as the roster says."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from barrier import EpochId, NotPromised, Promised, StoreUnavailable
from barrier.testing import FakeStore, FaultPlan, ScriptedRank
from tests.unit.barrier.group import NONCE, Group, started_group

pytestmark = pytest.mark.anyio


async def refusal(group: Group, epoch: EpochId, rank: int = 0) -> str:
    """Why a promise is refused; nothing about the rank may change by it."""
    member = group.ranks[rank].member
    before = (member.promised, member.report_now)
    outcome = await member.promise(epoch)
    assert isinstance(outcome, NotPromised), outcome
    assert (member.promised, member.report_now) == before
    return outcome.reason


async def test_the_current_epoch_may_be_promised(group: Group) -> None:
    epoch = await group.open()
    assert await group.ranks[0].member.promise(epoch) == Promised(epoch, 3)
    assert group.ranks[0].member.promised == epoch


async def test_a_promise_is_said_with_the_next_report_and_raises_the_floor(group: Group) -> None:
    epoch = await group.open()
    member = group.ranks[0].member
    await member.promise(epoch)
    assert (await group.inspect()).ranks[0].report != member.report_now
    await member.report()
    found = (await group.inspect()).ranks[0].report
    assert found is not None
    assert (found.epoch, found.floor, found.applied) == (epoch, epoch.number, 1)


async def test_one_promise_at_a_time(group: Group) -> None:
    epoch = await group.open()
    await group.ranks[0].promise(epoch)
    assert await refusal(group, epoch) == f"still in epoch {epoch}: retire from it first"
    await group.conclude(epoch)
    newer = await group.open()
    assert await refusal(group, newer) == f"still in epoch {epoch}: retire from it first"


async def test_a_spent_promise_is_never_given_again(group: Group) -> None:
    """The epoch is still current and names this very process: but it has been torn down once."""
    epoch = await group.open()
    await group.ranks[0].promise(epoch)
    await group.ranks[0].retire()
    assert await refusal(group, epoch) == (
        f"epoch {epoch.number} is not above {epoch.number}, which was promised before"
    )


async def test_a_promise_that_was_never_said_is_spent_all_the_same(group: Group) -> None:
    epoch = await group.open()
    await group.ranks[0].member.promise(epoch)
    group.ranks[0].member.retire()
    assert "was promised before" in await refusal(group, epoch)


async def test_a_lower_epoch_is_refused_though_the_store_went_back_to_it(group: Group) -> None:
    first = await group.open()
    earlier = group.store.snapshot()
    await group.conclude(first)
    second = await group.open()
    await group.ranks[0].promise(second)
    await group.ranks[0].retire()
    group.store.roll_back(earlier)
    assert await refusal(group, first) == (
        f"epoch {first.number} is not above {second.number}, which was promised before"
    )


async def test_the_same_number_with_another_nonce_is_refused_after_a_promise(group: Group) -> None:
    epoch = await group.open()
    await group.ranks[0].promise(epoch)
    await group.ranks[0].retire()
    await group.barrier.store.commands.hset(group.keys.epoch, "nonce", NONCE)
    assert "was promised before" in await refusal(group, EpochId(epoch.number, NONCE))


OTHER: dict[str, Callable[[EpochId], EpochId]] = {
    "nonce": lambda epoch: EpochId(epoch.number, NONCE),
    "higher": lambda epoch: EpochId(epoch.number + 1, epoch.nonce),
    "lower": lambda epoch: EpochId(epoch.number - 1, epoch.nonce),
}


@pytest.mark.parametrize("other", OTHER)
async def test_only_the_stored_epoch_may_be_promised_number_and_nonce(group: Group, other: str) -> None:
    epoch = OTHER[other](await group.open())
    assert await refusal(group, epoch) == f"epoch {epoch.number} is not current any more"


async def test_a_concluded_epoch_is_refused(group: Group) -> None:
    epoch = await group.open()
    await group.conclude(epoch)
    assert await refusal(group, epoch) == f"epoch {epoch.number} is concluded"


async def test_without_a_record_there_is_nothing_to_promise(group: Group) -> None:
    epoch = await group.open()
    group.store.delete(group.keys.epoch)
    assert await refusal(group, epoch) == f"epoch {epoch.number} is not current any more"


async def test_a_process_that_is_not_on_the_roster_is_refused(group: Group) -> None:
    epoch = await group.open()
    was = group.ranks[1].incarnation
    await group.ranks[1].restart()
    assert await refusal(group, epoch, 1) == (
        f"the roster of epoch {epoch.number} names {was} for rank 1, not this process"
    )


@pytest.mark.parametrize("field", ["roster:0", "world_size"])
async def test_a_record_that_is_not_whole_is_refused(group: Group, field: str) -> None:
    epoch = await group.open()
    await group.barrier.store.commands.hdel(group.keys.epoch, field)
    assert "the roster of epoch" in await refusal(group, epoch)


async def test_a_rank_beyond_the_roster_is_refused(group: Group) -> None:
    epoch = await group.open()
    async with ScriptedRank(group.store, "demo", 64) as beyond:
        outcome = await beyond.member.promise(epoch)
        assert isinstance(outcome, NotPromised)
        assert "names nobody for rank 64" in outcome.reason


async def test_ranks_of_later_chunks_find_themselves_on_the_roster(store: FakeStore) -> None:
    async with started_group(store, 66) as group:
        epoch = await group.open()
        for rank in (0, 63, 64, 65):
            assert await group.ranks[rank].member.promise(epoch) == Promised(epoch, 66)


async def test_a_store_that_does_not_answer_means_that_nothing_is_promised(store: FakeStore) -> None:
    async with started_group(store, 1) as group:
        epoch = await group.open()
        store.partition("rank 0")
        with pytest.raises(StoreUnavailable):
            await group.ranks[0].member.promise(epoch)
        assert group.ranks[0].member.promised is None
        store.heal()
        assert isinstance(await group.ranks[0].member.promise(epoch), Promised)


async def test_the_record_is_read_anew_whatever_was_announced(store: FakeStore) -> None:
    """Between the announcement and the promise the epoch ends: a stale picture must not be enough."""
    plan = FaultPlan()
    async with started_group(store, 1, faults=plan) as group:
        epoch = await group.open()
        await group.conclude(epoch)
        assert "concluded" in await refusal(group, epoch)


async def test_retiring_twice_does_no_harm_and_keeps_the_floor(group: Group) -> None:
    epoch = await group.open()
    await group.ranks[0].promise(epoch)
    group.ranks[0].member.retire()
    group.ranks[0].member.retire()
    now = group.ranks[0].member.report_now
    assert (group.ranks[0].member.promised, now.epoch, now.applied, now.floor) == (None, None, 0, epoch.number)


async def test_the_next_epoch_may_be_promised_after_retiring(group: Group) -> None:
    first = await group.all_connected()
    await group.conclude(first)
    second = await group.open()
    for rank in group.ranks:
        await rank.retire()
        await rank.arrive("Connected")
    snapshot = await group.inspect()
    assert {view.report.epoch for view in snapshot.ranks if view.report} == {second}

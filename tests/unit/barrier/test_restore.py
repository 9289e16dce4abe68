"""Writing a lost record back: only if every rank says exactly the same, and nothing proves that the epoch is over."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from barrier import (
    Aborted,
    Already,
    Dispatched,
    EpochId,
    Fenced,
    InvalidName,
    LogId,
    NotReady,
    Report,
    Restored,
    StoreUnavailable,
    Superseded,
)
from barrier.protocol.outcomes import RestoreOutcome
from barrier.testing import FakeStore, FaultPlan
from tests.unit.barrier.group import NONCE, Group, epoch_of, started_group

pytestmark = pytest.mark.anyio


async def loaded_and_flushed(group: Group) -> EpochId:
    """All ranks have taken the step load and are Loaded; then the store loses everything, and heartbeats come again."""
    epoch = await group.all_connected()
    await group.load(epoch)
    for rank in group.ranks:
        await rank.next_task()
        await rank.report("Loaded")
    group.store.flush()
    for rank in group.ranks:
        await rank.beat()
    await group.barrier.lead()
    return epoch


async def restore(group: Group, epoch: EpochId, status: str = "Loaded", **options: str) -> RestoreOutcome:
    return await group.barrier.restore(epoch, status, ["load"], ordinal=4, **options)


async def refused(group: Group, epoch: EpochId) -> RestoreOutcome:
    before = group.store.contents()
    outcome = await restore(group, epoch)
    assert group.store.contents() == before, "a refusal writes nothing"
    return outcome


async def test_a_flush_does_not_cost_a_loaded_model(group: Group) -> None:
    epoch = await loaded_and_flushed(group)
    assert await restore(group, epoch, notes="mine") == Restored(epoch, 4)
    record = (await group.inspect()).epoch
    assert record is not None
    assert record.id == epoch
    assert record.roster == tuple(rank.incarnation for rank in group.ranks)
    assert (record.last_n, record.steps["load"].n, record.ordinal, record.notes) == (2, 2, 4, "mine")


async def test_steps_that_were_dispatched_are_not_dispatched_again(group: Group) -> None:
    epoch = await loaded_and_flushed(group)
    await restore(group, epoch)
    outcome = await group.barrier.dispatch(epoch, "load", "{}", "Loaded")
    assert outcome == Already(LogId(epoch.number, 2))
    assert await group.tasks() == []


async def test_new_steps_come_after_what_the_ranks_have_read(group: Group) -> None:
    epoch = await loaded_and_flushed(group)
    await restore(group, epoch)
    outcome = await group.barrier.dispatch(epoch, "warm-up", "{}", "Loaded", after="load")
    assert outcome == Dispatched(LogId(epoch.number, 3))
    for rank in group.ranks:
        task = await group.clock.run(rank.next_task())
        assert (task.step, task.missed) == ("warm-up", False)


async def test_a_rank_without_a_live_report_prevents_it_and_is_named(group: Group) -> None:
    epoch = await loaded_and_flushed(group)
    group.store.delete(group.keys.rank(1))
    assert await refused(group, epoch) == NotReady((1,))


OTHERWISE: dict[str, Callable[[Report], Report]] = {
    "no epoch": lambda report: report._replace(epoch=None),
    "other nonce": lambda report: report._replace(epoch=EpochId(epoch_of(report).number, NONCE)),
    "other number": lambda report: report._replace(epoch=EpochId(epoch_of(report).number - 1, epoch_of(report).nonce)),
    "other status": lambda report: report._replace(status="Connected"),
    "read less": lambda report: report._replace(applied=report.applied - 1),
    "read more": lambda report: report._replace(applied=report.applied + 1),
    "floor above": lambda report: report._replace(floor=report.floor + 1),
    "floor below": lambda report: report._replace(floor=report.floor - 1),
    "other digest": lambda report: report._replace(digest="cafe"),
}


@pytest.mark.parametrize("said", OTHERWISE)
async def test_one_rank_that_says_otherwise_prevents_it_and_is_named(group: Group, said: str) -> None:
    epoch = await loaded_and_flushed(group)
    report = OTHERWISE[said](group.ranks[2].member.report_now)
    await group.barrier.store.commands.set(group.keys.rank(2), report.encode(), px=60_000)
    assert await refused(group, epoch) == NotReady((2,))


async def test_garbage_in_a_ranks_key_prevents_it(group: Group) -> None:
    epoch = await loaded_and_flushed(group)
    await group.barrier.store.commands.set(group.keys.rank(0), b"garbage", px=60_000)
    outcome = await refused(group, epoch)
    assert isinstance(outcome, NotReady)
    assert 0 in outcome.ranks


async def test_a_record_that_is_there_is_left_as_it_is(group: Group) -> None:
    epoch = await group.all_connected()
    before = group.store.contents()
    assert await restore(group, epoch) == Restored(epoch, 1)
    assert group.store.contents() == before


async def test_a_record_of_another_epoch_supersedes(group: Group) -> None:
    epoch = await loaded_and_flushed(group)
    await group.barrier.open(3)
    newer = (await group.inspect()).epoch
    assert newer is not None
    assert await refused(group, epoch) == Superseded(newer.id)


async def test_a_log_that_went_on_to_a_verdict_proves_that_it_is_over(group: Group) -> None:
    epoch = await group.all_connected()
    await group.conclude(epoch)
    group.store.delete(group.keys.epoch)
    before = group.store.contents()
    assert await restore(group, epoch, "Connected") == Superseded(None)
    assert group.store.contents() == before


async def test_a_log_that_went_on_to_another_epoch_proves_it_too(group: Group) -> None:
    epoch = await loaded_and_flushed(group)
    fields = {"kind": "opened", "nonce": NONCE, "prev": "0", "term": "1"}
    await group.barrier.store.commands.xadd(group.keys.tasks, fields, id=f"{epoch.number + 1}-1")
    await group.barrier.store.commands.pexpire(group.keys.tasks, 60_000)
    assert await refused(group, epoch) == Superseded(None)


async def test_a_later_leader_fences(group: Group) -> None:
    epoch = await loaded_and_flushed(group)
    await group.barrier.store.commands.hset(group.keys.leader, mapping={"term": "9999999999999", "holder": "other"})
    assert await refused(group, epoch) == Fenced(9_999_999_999_999, "other")


async def test_after_a_lost_reply_the_same_call_gives_the_same_answer(store: FakeStore) -> None:
    plan = FaultPlan().lose_reply("restore")
    async with started_group(store, 2, faults=plan) as group:
        epoch = await loaded_and_flushed(group)
        with pytest.raises(StoreUnavailable):
            await restore(group, epoch)
        before = store.contents()
        assert await restore(group, epoch) == Restored(epoch, 4)
        assert store.contents() == before
        plan.assert_fired()


async def test_a_verdict_after_the_restoration_ends_it_for_all(group: Group) -> None:
    epoch = await loaded_and_flushed(group)
    await restore(group, epoch)
    verdict = await group.conclude(epoch)
    assert await group.barrier.dispatch(epoch, "warm-up", "{}", "Loaded") == Aborted(verdict)


async def test_names_of_steps_are_checked_before_anything_is_sent(group: Group) -> None:
    epoch = await group.all_connected()
    with pytest.raises(InvalidName, match="is not a step name"):
        await group.barrier.restore(epoch, "Loaded", ["load,connect"], ordinal=1)


async def test_a_task_that_nobody_has_read_yet_is_not_forgotten(group: Group) -> None:
    epoch = await group.all_connected()
    await group.load(epoch)
    group.store.delete(group.barrier.keys.epoch)  # the record alone is lost, just after LoadModel went out
    restored = await group.barrier.restore(epoch, "Connected", ["connect"], ordinal=1)
    assert restored == NotReady(tuple(range(len(group.ranks)))), "written back without the step, it would go out twice"

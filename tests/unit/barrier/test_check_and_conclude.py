"""Looking without acting, and the verdict: the first one wins, for everybody."""

from __future__ import annotations

import json

import pytest

from barrier import (
    Aborted,
    Concluded,
    EpochId,
    NotReady,
    Released,
    StoreUnavailable,
    Superseded,
    Unknown,
    Verdict,
    VerdictAnnounced,
    all_ranks,
)
from barrier.protocol.outcomes import CheckOutcome
from barrier.store import verbs
from barrier.testing import FakeStore, FaultPlan
from tests.unit.barrier.group import NONCE, Group, started_group

pytestmark = pytest.mark.anyio


async def check(group: Group, epoch: EpochId, status: str = "Connected", world_size: int = 3) -> CheckOutcome:
    before = group.store.contents()
    outcome = await verbs.check(
        group.barrier.store,
        group.keys,
        epoch=epoch,
        requirement=all_ranks(world_size, status),
        world_size=world_size,
    )
    assert group.store.contents() == before, "it only looks"
    return outcome


async def test_check_says_ready_only_when_all_are(group: Group) -> None:
    epoch = await group.open()
    assert await check(group, epoch) == NotReady((0, 1, 2))
    await group.arrive("Connected", [0, 2])
    assert await check(group, epoch) == NotReady((1,))
    await group.arrive("Connected", [1])
    assert await check(group, epoch) == Released(epoch)
    assert await check(group, epoch, "Loaded") == NotReady((0, 1, 2))


async def test_check_knows_verdicts_and_later_epochs(group: Group) -> None:
    epoch = await group.all_connected()
    verdict = await group.conclude(epoch)
    assert await check(group, epoch) == Aborted(verdict)
    newer = await group.open()
    assert await check(group, epoch) == Superseded(newer)
    assert await check(group, EpochId(newer.number, NONCE)) == Superseded(newer)
    later = EpochId(newer.number + 1, NONCE)
    assert await check(group, later) == Unknown(f"the store went back to epoch {newer.number}")


async def test_check_never_says_ready_without_a_whole_record(group: Group) -> None:
    epoch = await group.all_connected()
    assert await check(group, epoch, world_size=2) == Unknown("the record says world_size 3, the caller 2")
    await group.barrier.store.commands.hdel(group.keys.epoch, "roster:0")
    assert await check(group, epoch) == Unknown("the record has no whole roster")
    group.store.delete(group.keys.epoch)
    assert await check(group, epoch) == Unknown("the store has no epoch record")


async def test_a_record_of_another_version_is_named_and_stays_as_it_is(group: Group) -> None:
    epoch = await group.all_connected()
    await group.barrier.store.commands.hset(group.keys.epoch, "wire", "7")
    before = await group.barrier.store.commands.hgetall(group.keys.epoch)
    said = "record has wire version 7, and this version of rankgate reads 1"
    for answer in (
        await check(group, epoch),
        await group.barrier.conclude(epoch, Verdict.stopped()),
        await group.barrier.dispatch(epoch, "load", "{}", "Connected"),
    ):
        assert isinstance(answer, Unknown)
        assert answer.reason == f"the {said}"
    assert "it has wire version 7, and this version of rankgate reads 1" in (await group.inspect()).unreadable
    assert await group.barrier.store.commands.hgetall(group.keys.epoch) == before
    await group.barrier.store.commands.hdel(group.keys.epoch, "wire")
    assert (await group.inspect()).epoch is not None, "a record without a version is of the first one"
    assert await check(group, epoch) == Released(epoch)


# --- conclude -----------------------------------------------------------------------------------------------------------


async def test_the_verdict_is_latched_and_announced_on_the_log(group: Group) -> None:
    epoch = await group.all_connected()
    verdict = Verdict.aborted("rank 1 failed: boom", 1, "permanent")
    assert await group.barrier.conclude(epoch, verdict) == Concluded(verdict, first=True)
    record = (await group.inspect()).epoch
    assert record is not None
    assert record.verdict == verdict
    entry_id, fields = (await group.log())[-1]
    assert (entry_id, fields["kind"], fields["nonce"], fields["prev"]) == (
        f"{epoch.number}-2",
        "verdict",
        epoch.nonce,
        "1",
    )
    assert json.loads(fields["verdict"]) == {
        "kind": "Aborted", "reason": "rank 1 failed: boom", "culprit": 1, "failure": "permanent"
    }  # fmt: skip


async def test_the_first_verdict_wins_whoever_comes_later(group: Group) -> None:
    epoch = await group.all_connected()
    first = await group.conclude(epoch, "the first")
    before = group.store.contents()
    assert await group.barrier.conclude(epoch, Verdict.aborted("the second", 2)) == Concluded(first, first=False)
    assert await group.barrier.conclude(epoch, first) == Concluded(first, first=False)
    assert group.store.contents() == before
    assert [fields["kind"] for _, fields in await group.log()] == ["opened", "verdict"]


async def test_every_rank_reads_the_one_verdict(group: Group) -> None:
    epoch = await group.all_connected()
    verdict = await group.conclude(epoch)
    for rank in group.ranks:
        while not isinstance(entry := await rank.next_entry(), VerdictAnnounced):
            pass
        assert (entry.epoch, entry.verdict) == (epoch, verdict)


async def test_after_a_lost_reply_the_same_call_gives_the_same_verdict_and_one_entry(store: FakeStore) -> None:
    plan = FaultPlan().lose_reply("conclude")
    async with started_group(store, 2, faults=plan) as group:
        epoch = await group.all_connected()
        verdict = Verdict.stopped("only once")
        with pytest.raises(StoreUnavailable):
            await group.barrier.conclude(epoch, verdict)
        assert await group.barrier.conclude(epoch, verdict) == Concluded(verdict, first=False)
        assert [fields["kind"] for _, fields in await group.log()] == ["opened", "verdict"]
        plan.assert_fired()


async def test_another_epoch_cannot_be_concluded(group: Group) -> None:
    first = await group.all_connected()
    await group.conclude(first)
    second = await group.open()
    before = group.store.contents()
    assert await group.barrier.conclude(first, Verdict.stopped()) == Superseded(second)
    assert await group.barrier.conclude(EpochId(second.number, NONCE), Verdict.stopped()) == Superseded(second)
    later = EpochId(second.number + 5, NONCE)
    assert await group.barrier.conclude(later, Verdict.stopped()) == Unknown(
        f"the store went back to epoch {second.number}"
    )
    assert group.store.contents() == before


async def test_without_a_record_there_is_nothing_to_conclude(group: Group) -> None:
    epoch = await group.all_connected()
    group.store.delete(group.keys.epoch)
    assert await group.barrier.conclude(epoch, Verdict.stopped()) == Unknown("the store has no epoch record")


async def test_the_verdict_comes_after_everything_that_a_rank_has_read(group: Group) -> None:
    """A rollback lost the task that ranks have read; the verdict must not take its place in the log."""
    epoch = await group.all_connected()
    earlier = group.store.snapshot()
    await group.load(epoch)
    for rank in group.ranks:
        await rank.next_task()
    group.store.roll_back(earlier)
    await group.conclude(epoch)
    assert (await group.log())[-1][0] == f"{epoch.number}-3"
    for rank in group.ranks:
        while not isinstance(await group.clock.run(rank.next_entry()), VerdictAnnounced):
            pass


async def test_a_record_that_went_back_behind_the_log_is_concluded_without_disturbing_the_log(group: Group) -> None:
    epoch = await group.all_connected()
    fields = {"kind": "opened", "nonce": NONCE, "prev": "0", "term": "1"}
    await group.barrier.store.commands.xadd(group.keys.tasks, fields, id=f"{epoch.number + 1}-1")
    log = await group.log()
    await group.conclude(epoch)
    assert await group.log() == log
    record = (await group.inspect()).epoch
    assert record is not None
    assert record.verdict is not None


async def test_a_stored_verdict_that_cannot_be_read_still_ends_the_epoch(group: Group) -> None:
    epoch = await group.all_connected()
    await group.barrier.store.commands.hset(group.keys.epoch, "verdict", "garbage")
    unread = Verdict.aborted("the stored verdict could not be read")
    assert await check(group, epoch) == Aborted(unread)
    assert await group.barrier.dispatch(epoch, "load", "{}", "Connected") == Aborted(unread)
    assert await group.barrier.conclude(epoch, Verdict.stopped()) == Concluded(unread, first=False)

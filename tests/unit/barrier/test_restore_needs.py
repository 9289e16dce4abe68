"""What `restore` wants of every rank before it writes a lost record back: one requirement each, and one rank that does not meet it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from barrier import EpochId, NotReady, Report, Restored, Superseded
from tests.unit.barrier.group import NONCE, Group

pytestmark = pytest.mark.anyio

DIGEST = "ab" * 16

OTHER: dict[str, Callable[[Report, EpochId], Report]] = {
    "another epoch": lambda report, epoch: report._replace(epoch=EpochId(epoch.number - 1, epoch.nonce)),
    "another nonce": lambda report, epoch: report._replace(epoch=EpochId(epoch.number, NONCE)),
    "no epoch": lambda report, _: report._replace(epoch=None),
    "another status": lambda report, _: report._replace(status="Connecting"),
    "another place in the log": lambda report, _: report._replace(applied=report.applied + 1),
    "a higher promise": lambda report, epoch: report._replace(floor=epoch.number + 1),
    "another spec": lambda report, _: report._replace(digest="cd" * 16),
}


async def put(group: Group, rank: int, report: Report) -> None:
    await group.barrier.store.commands.set(group.keys.rank(rank), report.encode(), px=60_000)


async def lost(group: Group) -> EpochId:
    """An attempt in which all ranks are Connected, and whose record the store has forgotten with all the rest."""
    epoch = await group.all_connected()
    group.store.flush()
    for rank in group.ranks:
        await rank.beat()
    await group.barrier.lead()
    return epoch


async def restored(group: Group, epoch: EpochId) -> object:
    return await group.barrier.restore(epoch, "Connected", [], ordinal=1, digest=DIGEST)


async def test_where_all_ranks_agree_the_record_is_written_back(group: Group) -> None:
    epoch = await lost(group)
    assert await restored(group, epoch) == Restored(epoch, 1)


@pytest.mark.parametrize("what", OTHER)
async def test_one_rank_that_says_something_else_keeps_it_from_being_written(group: Group, what: str) -> None:
    epoch = await lost(group)
    report = group.ranks[1].member.report_now
    await put(group, 1, OTHER[what](report, epoch))
    assert await restored(group, epoch) == NotReady((1,))
    await put(group, 1, report)
    assert await restored(group, epoch) == Restored(epoch, 1), "it was that, and nothing else"


async def test_a_task_that_nobody_has_read_yet_keeps_it_from_being_written(group: Group) -> None:
    """It is in the log: a record without it would have it sent again."""
    epoch = await group.all_connected()
    await group.barrier.dispatch(epoch, "load", "{}", "Connected")
    await group.barrier.store.commands.delete(group.keys.epoch)
    assert await restored(group, epoch) == NotReady((0, 1, 2))


async def test_an_attempt_that_has_ended_is_not_written_back(group: Group) -> None:
    epoch = await group.all_connected()
    await group.conclude(epoch)
    await group.barrier.store.commands.delete(group.keys.epoch)
    assert isinstance(await restored(group, epoch), Superseded)


async def test_a_record_that_is_there_stays(group: Group) -> None:
    epoch = await group.all_connected()
    assert await restored(group, epoch) == Restored(epoch, 1)
    other = EpochId(epoch.number, NONCE)
    assert await group.barrier.restore(other, "Connected", [], ordinal=1, digest=DIGEST) == Superseded(epoch)

"""An epoch's number that no planner can have given: whose report says it is named, nobody adopts it, and it is forgotten."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from barrier import EpochId, NotReady, Opened, Restored, explain
from barrier.store.picture import DAY_MS
from tests.unit.barrier.group import NONCE, Group

pytestmark = pytest.mark.anyio

ABSURD: dict[str, Callable[[int], int]] = {
    "2^53 - 2": lambda _: 2**53 - 2,
    "all digits": lambda _: 10**16 - 1,
    "a day": lambda now: now + DAY_MS + 1,
}


async def boast(group: Group, rank: int, floor: int, epoch: EpochId | None = None) -> None:
    """What a rank's user in the store may write, whatever its runner says."""
    report = group.ranks[rank].member.report_now._replace(floor=floor, epoch=epoch)
    await group.barrier.store.commands.set(group.keys.rank(rank), report.encode(), px=60_000)


@pytest.mark.parametrize("what", ABSURD)
@pytest.mark.parametrize("where", ["floor", "epoch"])
async def test_it_is_refused_by_name_adopted_by_nobody_and_forgotten(group: Group, what: str, where: str) -> None:
    now_ms = (await group.inspect()).now_ms
    number = ABSURD[what](now_ms)
    if where == "floor":
        await boast(group, 1, number)
    else:
        await boast(group, 1, 0, EpochId(number, NONCE))
    assert await group.barrier.open(3) == NotReady((1,))
    snapshot = await group.inspect()
    assert snapshot.floor < now_ms
    sentence = explain(snapshot, ())
    assert f"rank 1: its report names epoch {number}" in sentence
    assert "restart that runner" in sentence
    await group.ranks[1].beat()  # the next heartbeat writes the report anew
    epoch = await group.open()
    assert epoch.number < now_ms + DAY_MS
    await group.arrive("Connected")
    assert {rank.member.report_now.floor for rank in group.ranks} == {epoch.number}


async def test_what_a_clock_that_was_set_back_had_given_counts(group: Group) -> None:
    """F16: by hours without a witness; by days where the record, the log or the planner knows that it was given."""
    await boast(group, 1, (await group.inspect()).now_ms + DAY_MS)
    epoch = await group.open()
    await group.conclude(epoch)
    group.store.shift_time(-2 * 86_400)
    for rank in group.ranks:
        await rank.beat()
    again = await group.open()
    assert again.number > epoch.number
    assert await group.barrier.open(3) != NotReady((0, 1, 2))


async def test_a_clock_that_was_set_back_and_a_store_that_forgot_lose_no_model(group: Group) -> None:
    """The planner knows that it gave the number."""
    epoch = await group.all_connected()
    group.store.flush()
    group.store.shift_time(-2 * 86_400)
    for rank in group.ranks:
        await rank.beat()
    assert all(view.report for view in (await group.inspect()).ranks)
    await group.barrier.lead()
    assert await group.barrier.restore(epoch, "Connected", [], ordinal=1) == Restored(epoch, 1)


async def test_all_ranks_together_restore_no_such_number(group: Group) -> None:
    number = 2**53 - 2
    for rank in range(3):
        await boast(group, rank, number, EpochId(number, NONCE))
    outcome = await group.barrier.restore(EpochId(number, NONCE), "Idle", [], ordinal=1)
    assert outcome == NotReady((0, 1, 2))
    for rank in group.ranks:
        await rank.beat()
    assert isinstance(await group.barrier.open(3), Opened)

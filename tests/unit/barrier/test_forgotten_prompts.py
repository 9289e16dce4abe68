"""Prompts do not lie about in the task log: what every rank has read goes, and all of an attempt that is over. Other steps stay."""

from __future__ import annotations

import pytest

from barrier import Dispatched, LogId
from barrier.protocol.requirement import needed_from
from barrier.testing import FaultPlan
from tests.unit.barrier.group import Group

pytestmark = pytest.mark.anyio


async def dispatched(group: Group) -> LogId:
    """A task that all are asked to do, and nobody has read yet; its place."""
    epoch = await group.all_connected()
    place = await group.load(epoch)
    for rank in group.ranks:
        await rank.beat()
    return place


async def read_by(group: Group, *ranks: int) -> None:
    for rank in ranks:
        await group.clock.run(group.ranks[rank].next_task())
        await group.ranks[rank].beat()


async def test_what_one_rank_has_not_read_stays(group: Group) -> None:
    place = await dispatched(group)
    await read_by(group, 0, 2)
    await group.barrier.forget(await group.inspect(), "load")
    assert await group.tasks() == [str(place)]
    task = await group.clock.run(group.ranks[1].next_task())
    assert (task.id, task.missed) == (place, False)


async def test_what_all_have_read_goes_and_the_next_task_comes_after_it(group: Group) -> None:
    place = await dispatched(group)
    await read_by(group, 0, 1, 2)
    await group.barrier.forget(await group.inspect(), "load")
    assert [fields["kind"] for _, fields in await group.log()] == ["opened"]
    snapshot = await group.inspect()
    assert snapshot.epoch is not None
    assert snapshot.epoch.last_n == place.n
    outcome = await group.barrier.dispatch(snapshot.epoch.id, "warm-up", "{}", "Connected", after="load")
    assert outcome == Dispatched(LogId(place.number, place.n + 1))
    for rank in group.ranks:
        await rank.beat()  # with an empty log, or a new entry, no rank takes it for one that went back
        task = await group.clock.run(rank.next_task())
        assert (task.step, task.missed) == ("warm-up", False)


@pytest.mark.parametrize("why", ["another incarnation", "no report", "another epoch"])
async def test_a_rank_that_is_not_there_keeps_everything(group: Group, why: str) -> None:
    place = await dispatched(group)
    await read_by(group, 0, 1, 2)
    report = group.ranks[1].member.report_now
    match why:
        case "another incarnation":
            report = report._replace(incarnation="f" * 28)
        case "another epoch":
            report = report._replace(epoch=None)
        case _:
            pass
    group.store.delete(group.keys.rank(1))
    if why != "no report":
        await group.barrier.store.commands.set(group.keys.rank(1), report.encode(), px=60_000)
    await group.barrier.forget(await group.inspect(), "load")
    assert await group.tasks() == [str(place)]


async def test_other_steps_stay(group: Group) -> None:
    place = await dispatched(group)
    await read_by(group, 0, 1, 2)
    await group.barrier.forget(await group.inspect(), "generate ")
    assert await group.tasks() == [str(place)]


async def test_of_an_attempt_that_is_over_all_goes_and_the_verdict_stays(group: Group) -> None:
    place = await dispatched(group)
    snapshot = await group.inspect()
    assert snapshot.epoch is not None
    await group.conclude(snapshot.epoch.id)
    await group.barrier.forget(await group.inspect(), "load")
    assert [(entry, fields["kind"]) for entry, fields in await group.log()] == [
        (f"{place.number}-1", "opened"),
        (f"{place.number}-{place.n + 1}", "verdict"),
    ]


async def test_without_a_record_nothing_goes(group: Group) -> None:
    await dispatched(group)
    await read_by(group, 0, 1, 2)
    group.store.delete(group.keys.epoch)
    assert needed_from(await group.inspect()) is None


async def test_a_store_that_refuses_stops_nobody_and_is_asked_again(group: Group) -> None:
    """An ACL file of an earlier version gives no such right."""
    await dispatched(group)
    await read_by(group, 0, 1, 2)
    plan = FaultPlan().refuse("xdel")
    planner = group.planner("planner", faults=plan)
    snapshot = await group.inspect()
    await planner.forget(snapshot, "load")
    plan.assert_fired()
    assert await group.tasks() != []
    await planner.forget(snapshot, "load")
    assert await group.tasks() == []
    await planner.close()

"""Those who wait for a rank, or hold one that the group does not have: said at once, seen by who looks, relied upon by nobody."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Generator

import pytest
from loguru import logger

from barrier import Member, NotPromised, RankTaken, Settings
from barrier.spares import read_spares, read_surplus
from barrier.store.keys import SPARE_SEATS, Keys
from barrier.testing import FakeStore, ManualClock
from tests.unit.barrier.group import Group, started_group

pytestmark = pytest.mark.anyio

KEYS = Keys("rankgate", "demo")


@pytest.fixture
def said() -> Generator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lambda line: lines.append(str(line).rstrip()), level="INFO", format="{level} {message}")
    yield lines
    logger.remove(sink)


def member(store: FakeStore, rank: int | None = None, *, node: str = "box-9", name: str = "") -> Member:
    return Member(
        store.client(name),
        "demo",
        rank=rank,
        world_size=3 if rank is None else None,
        clock=store.clock,
        node=node,
        settings=Settings(),
    )


async def keep_beating(group: Group, seconds: float) -> None:
    """Let time pass, in which the holders renew what they hold."""
    for _ in range(round(seconds)):
        for rank in group.ranks:
            await rank.beat()
        await group.clock.advance(1.0)


async def ended(task: asyncio.Task[int], *members: Member) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    for one in members:
        await one.close()


# --- waiting --------------------------------------------------------------------------------------------------------------


async def test_who_holds_the_rank_is_said_at_once(group: Group, said: list[str]) -> None:
    late = member(group.store, 1)
    waiting = asyncio.create_task(late.claim(spare=True))
    await group.clock.advance(0.0)
    (line,) = [one for one in said if "held by others" in one]
    assert line.startswith("WARNING group demo: held by others: rank 1 by node 'node-1', pid ")
    assert re.search(r", Idle, since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC; ", line)
    assert line.endswith(" UTC; this process waits as a spare until one is free")
    await keep_beating(group, 20)
    assert len([one for one in said if "held by others" in one]) == 1, "and once"
    await ended(waiting, late)


async def test_without_being_a_spare_it_is_said_at_once_too(group: Group, said: list[str]) -> None:
    late = member(group.store, 1)
    waiting = asyncio.create_task(late.claim())
    await group.clock.advance(0.0)
    assert said[-1].endswith(" UTC; waiting 12.0 s for it")
    await keep_beating(group, 14)
    with pytest.raises(RankTaken):
        await waiting
    assert await read_spares(group.barrier.store, KEYS) == ()
    await late.close()


async def test_a_holder_that_does_not_report_is_named_by_its_claim(store: FakeStore, said: list[str]) -> None:
    gone = "0" * 28
    await store.client().set(KEYS.claim(0), gone, px=5_000)
    late = member(store, 0)
    waiting = asyncio.create_task(late.claim(spare=True))
    assert store.clock is not None
    await store.clock.advance(0.0)
    assert f"rank 0 by a process that does not report ('{gone}'): its claim lapses with its lease" in said[-1]
    await store.clock.advance(5.1)
    assert await waiting == 0
    await late.leave()
    await late.close()


@pytest.mark.parametrize("hexadecimal", ["f" * 28, "0" * 28])
async def test_a_holder_whose_clock_is_far_off_is_named_all_the_same(
    store: FakeStore, clock: ManualClock, hexadecimal: str, said: list[str]
) -> None:
    odd = Member(store.client(), "demo", rank=0, clock=store.clock, incarnation=hexadecimal)
    await odd.claim()
    late = member(store, 0)
    with pytest.raises(RankTaken):
        await clock.run(late.claim(timeout=0.01))
    assert "Idle, since " in said[-1]
    await odd.leave()
    await odd.close()
    await late.close()


async def test_a_spare_waits_and_is_seen_until_a_rank_is_free(group: Group) -> None:
    late = member(group.store, node="box-3")
    waiting = asyncio.create_task(late.claim(spare=True))
    await keep_beating(group, 30)
    assert late.waits
    (seen,) = await read_spares(group.barrier.store, KEYS)
    assert (seen.incarnation, seen.node, seen.rank) == (late.incarnation, "box-3", None)
    assert seen.waited_ms == pytest.approx(30_000, abs=100)
    await group.ranks[2].member.leave()
    await group.clock.advance(2.1)  # a heartbeat
    assert await waiting == 2
    assert not late.waits
    assert await read_spares(group.barrier.store, KEYS) == ()
    await late.leave()
    await late.close()


async def test_a_spare_that_dies_is_forgotten_after_its_lease(group: Group) -> None:
    late = member(group.store, name="late")
    waiting = asyncio.create_task(late.claim(spare=True))
    await group.clock.advance(0.1)
    group.store.partition("late")
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert len(await read_spares(group.barrier.store, KEYS)) == 1
    await keep_beating(group, 7)
    assert await read_spares(group.barrier.store, KEYS) == ()
    group.store.heal("late")
    await late.close()


async def test_a_spare_waits_through_an_outage(group: Group) -> None:
    late = member(group.store, 1, name="late")
    waiting = asyncio.create_task(late.claim(spare=True))
    await keep_beating(group, 4)
    beats = late.beats
    group.store.partition("late")
    await keep_beating(group, 20)
    assert not waiting.done()
    assert late.beats > beats, "whoever watches over the process sees that it tries"
    assert await read_spares(group.barrier.store, KEYS) == ()
    group.store.heal("late")
    await keep_beating(group, 4)
    assert [spare.rank for spare in await read_spares(group.barrier.store, KEYS, 1)] == [1]
    await ended(waiting, late)


async def test_a_claim_that_a_clock_that_was_set_back_would_keep_is_mended_by_a_spare_too(
    store: FakeStore, clock: ManualClock
) -> None:
    await store.client().set(KEYS.claim(0), "0" * 28, px=3_600_000)
    late = member(store, 0)
    waiting = asyncio.create_task(late.claim(spare=True))
    await clock.advance(20.0)
    assert await waiting == 0
    await late.leave()
    await late.close()


async def test_who_waits_for_any_rank_takes_no_seat_of_one_who_waits_for_a_low_one(group: Group) -> None:
    pair = [member(group.store), member(group.store, 0)]
    tasks: list[asyncio.Task[int]] = []
    for one in pair:
        tasks.append(asyncio.create_task(one.claim(spare=True)))
        await group.clock.advance(0.1)
    assert {spare.rank for spare in await read_spares(group.barrier.store, KEYS)} == {None, 0}
    for task, one in zip(tasks, pair, strict=True):
        await ended(task, one)


async def test_more_than_the_seats_wait_all_the_same(group: Group) -> None:
    crowd = [member(group.store, node=f"box-{n}") for n in range(SPARE_SEATS + 2)]
    tasks = [asyncio.create_task(one.claim(spare=True)) for one in crowd]
    await keep_beating(group, 3)
    assert len(await read_spares(group.barrier.store, KEYS)) == SPARE_SEATS
    assert all(one.waits for one in crowd)
    for task, one in zip(tasks, crowd, strict=True):
        await ended(task, one)
    assert await read_spares(group.barrier.store, KEYS) == (), "seats are given back"


async def test_what_somebody_else_writes_into_a_seat_is_no_spare_and_stops_nobody(group: Group) -> None:
    client = group.store.client()
    for seat, nonsense in enumerate(
        [b"", b"\xff", b"[]", b"{}", b"[" * 900, b'{"incarnation": 1}', b"x" * 100_000, b'"a"', b"NaN"]
    ):
        await client.set(KEYS.spare(seat), nonsense, px=60_000)
    await client.lpush(KEYS.spare(9), "a list")
    await client.pexpire(KEYS.spare(9), 60_000)
    late = member(group.store)
    waiting = asyncio.create_task(late.claim(spare=True))
    await group.clock.advance(0.1)
    assert [spare.incarnation for spare in await read_spares(group.barrier.store, KEYS)] == [late.incarnation]
    await ended(waiting, late)


@pytest.mark.parametrize("wrong", ['"-1"', "-1", "1e999", "9007199254740993", "true", "null"])
async def test_numbers_that_nobody_can_have_are_not_shown(group: Group, wrong: str) -> None:
    said = f'{{"incarnation": "a", "node": "b", "pid": {wrong}, "rank": null, "waited_ms": 5}}'
    await group.store.client().set(KEYS.spare(0), said, px=6_000)
    assert await read_spares(group.barrier.store, KEYS) == ()


async def test_a_seat_that_was_taken_away_is_not_taken_back(group: Group) -> None:
    """Whoever sits there now is shown, and this one looks for another."""
    late = member(group.store)
    waiting = asyncio.create_task(late.claim(spare=True))
    await group.clock.advance(0.1)
    other = '{"incarnation": "other", "node": "b", "pid": 1, "rank": null, "waited_ms": 5}'
    await group.store.client().set(KEYS.spare(SPARE_SEATS - 1), other, px=60_000)
    await keep_beating(group, 3)
    seen = await read_spares(group.barrier.store, KEYS)
    assert {spare.incarnation for spare in seen} == {"other", late.incarnation}
    await ended(waiting, late)


def test_a_rank_has_one_seat_to_which_its_user_has_the_right() -> None:
    from barrier.spares import seats_for
    from barrier.store.acl import rank_user

    for rank in (0, 5, SPARE_SEATS, SPARE_SEATS + 5):
        (seat,) = seats_for(KEYS, rank)
        assert seat in rank_user(KEYS, rank).grants[0].keys
    assert f"{KEYS.tag}:spare:*" in rank_user(KEYS, None).grants[0].keys


# --- a rank that the group does not have ----------------------------------------------------------------------------------


async def test_a_surplus_rank_is_seen(store: FakeStore) -> None:
    async with started_group(store, 2) as group:
        epoch = await group.open()
        extra = Member(store.client(), "demo", rank=4, clock=store.clock, node="box-5")
        await extra.claim()
        (report,) = await read_surplus(group.barrier.store, KEYS, 2)
        assert (report.rank, report.node) == (4, "box-5")
        assert await extra.group_size() == 2
        outcome = await extra.promise(epoch)
        assert isinstance(outcome, NotPromised)
        assert "names nobody for rank 4: it has 2 ranks" in outcome.reason
        await extra.leave()
        assert await read_surplus(group.barrier.store, KEYS, 2) == ()
        await extra.close()


async def test_nonsense_beyond_the_ranks_is_not_shown(store: FakeStore) -> None:
    async with started_group(store, 2) as group:
        await store.client().set(KEYS.rank(2), "nonsense", px=6_000)
        await store.client().lpush(KEYS.rank(3), "a list")
        await store.client().pexpire(KEYS.rank(3), 6_000)
        assert await read_surplus(group.barrier.store, KEYS, 2) == ()
        assert await group.ranks[0].member.group_size() is None

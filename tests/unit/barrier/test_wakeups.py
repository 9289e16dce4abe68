"""Wake-up hints: lost, early and doubled ones are harmless, and one connection waits for every group."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from barrier import Barrier, Settings, Store, Wake, adopt, all_ranks
from barrier.protocol.wakeup import Hint, decode_hint, parse_id
from barrier.store.wakeups import Wakeups
from barrier.testing import FakeStore, FaultPlan, ManualClock, ScriptedRank
from tests.unit.barrier.group import Group

pytestmark = pytest.mark.anyio

STREAM, OTHER = "{rankgate:demo}:signals", "{rankgate:other}:signals"


@pytest.fixture
async def adopted(store: FakeStore) -> AsyncGenerator[Store]:
    made = adopt(store.client("planner"))
    yield made
    await made.close()


@pytest.fixture
async def wakeups(adopted: Store, clock: ManualClock) -> AsyncGenerator[Wakeups]:
    made = Wakeups(adopted, clock)
    yield made
    await made.close()


@pytest.fixture
async def sender(store: FakeStore) -> AsyncGenerator[Redis]:
    made = store.client("sender")
    yield made
    await made.aclose()


async def send(sender: Redis, status: str, *, stream: str = STREAM, place: str = "*") -> str:
    """Add a hint; its id."""
    fields = {"kind": "report", "rank": "0", "epoch": "-", "inc": "1" * 28, "status": status}
    untyped: Any = sender
    entry: bytes = await untyped.xadd(stream, fields, id=place)
    await sender.pexpire(stream, 60_000)
    return entry.decode()


def statuses(hints: list[Hint]) -> list[str]:
    return [hint.status or hint.kind for hint in hints]


async def test_a_hint_is_pushed(wakeups: Wakeups, sender: Redis, clock: ManualClock) -> None:
    subscription = wakeups.subscribe(STREAM, "0-0")
    waiting = asyncio.create_task(subscription.next(60))
    await clock.advance(0.0)
    assert not waiting.done()
    await send(sender, "Connected")
    await clock.advance(0.0)
    assert statuses(await waiting) == ["Connected"]
    assert clock.now() == 1_000.0, "nobody had to wait for a tick"


async def test_a_hint_between_the_picture_and_the_wait_is_not_missed(
    wakeups: Wakeups, sender: Redis, clock: ManualClock
) -> None:
    await send(sender, "Idle")
    picture = await send(sender, "Connecting")
    await send(sender, "Connected")
    subscription = wakeups.subscribe(STREAM, picture)
    assert statuses(await clock.run(subscription.next(60))) == ["Connected"]


async def test_without_a_hint_the_wait_ends_in_time_with_nothing(wakeups: Wakeups, clock: ManualClock) -> None:
    subscription = wakeups.subscribe(STREAM, "0-0")
    assert await clock.run(subscription.next(7.5)) == []
    assert clock.now() == 1_007.5


async def test_hints_that_came_meanwhile_come_together_and_once(
    wakeups: Wakeups, sender: Redis, clock: ManualClock
) -> None:
    subscription = wakeups.subscribe(STREAM, "0-0")
    for status in ("Connecting", "Connected", "Loading"):
        await send(sender, status)
    await clock.advance(0.0)
    assert statuses(await subscription.next(1)) == ["Connecting", "Connected", "Loading"]
    assert await clock.run(subscription.next(1)) == []


async def test_hints_up_to_a_place_are_passed_over(wakeups: Wakeups, sender: Redis, clock: ManualClock) -> None:
    subscription = wakeups.subscribe(STREAM, "0-0")
    seen = await send(sender, "Connecting")
    await send(sender, "Connected")
    await clock.advance(0.0)
    assert statuses(await subscription.next(1, after=parse_id(seen))) == ["Connected"]


async def test_one_connection_waits_for_every_group(
    store: FakeStore, wakeups: Wakeups, sender: Redis, clock: ManualClock
) -> None:
    first, second = wakeups.subscribe(STREAM, "0-0"), wakeups.subscribe(OTHER, "0-0")
    await clock.advance(0.0)
    sent = store.sent["planner"]
    await send(sender, "Connected", stream=OTHER)
    await clock.advance(0.0)
    assert statuses(await second.next(1)) == ["Connected"]
    assert await clock.run(first.next(1)) == []
    assert store.sent["planner"] == sent + 1, "one read for both, then the next"


async def test_two_waiters_of_one_stream_both_get_every_hint(
    wakeups: Wakeups, sender: Redis, clock: ManualClock
) -> None:
    pair = [wakeups.subscribe(STREAM, "0-0") for _ in range(2)]
    await send(sender, "Connected")
    await clock.advance(0.0)
    assert [statuses(await one.next(1)) for one in pair] == [["Connected"], ["Connected"]]


async def test_a_late_waiter_gets_what_others_were_given_since_its_picture(
    wakeups: Wakeups, sender: Redis, clock: ManualClock
) -> None:
    wakeups.subscribe(STREAM, "0-0")
    picture = await send(sender, "Connecting")
    await send(sender, "Connected")
    await clock.advance(0.0)
    late = wakeups.subscribe(STREAM, picture)
    assert statuses(await late.next(1)) == ["Connected"]


async def test_a_waiter_with_an_older_picture_than_the_readers_start_misses_nothing(
    wakeups: Wakeups, sender: Redis, clock: ManualClock
) -> None:
    older = await send(sender, "Connecting")
    newer = await send(sender, "Connected")
    wakeups.subscribe(STREAM, newer)
    await clock.advance(0.0)
    late = wakeups.subscribe(STREAM, older)
    assert statuses(await clock.run(late.next(1))) == ["Connected"]


async def test_a_broken_connection_is_a_reason_to_look_and_reading_goes_on(
    store: FakeStore, wakeups: Wakeups, sender: Redis, clock: ManualClock
) -> None:
    subscription = wakeups.subscribe(STREAM, "0-0")
    waiting = asyncio.create_task(subscription.next(60))
    await clock.advance(0.0)
    store.partition("planner")
    await clock.advance(0.0)
    assert statuses(await waiting) == ["lost"]
    await send(sender, "Connected")
    store.heal()
    await clock.advance(3.0)
    assert "Connected" in statuses(await subscription.next(1)), "what came meanwhile was not skipped"


async def test_while_the_store_is_away_it_asks_at_a_bounded_rate(
    store: FakeStore, wakeups: Wakeups, clock: ManualClock
) -> None:
    wakeups.subscribe(STREAM, "0-0")
    store.partition("planner")
    await clock.advance(60.0)
    assert store.refused["planner"] <= 60 / 1.2 + 10
    store.heal()


async def test_an_idle_waiter_asks_less_than_once_a_second(
    store: FakeStore, wakeups: Wakeups, clock: ManualClock
) -> None:
    wakeups.subscribe(STREAM, "0-0")
    await clock.advance(0.0)
    sent = store.sent["planner"]
    await clock.advance(60.0)
    assert store.sent["planner"] - sent <= 60 / 4 + 1


async def test_a_stream_that_went_back_is_read_again_from_there(
    store: FakeStore, wakeups: Wakeups, sender: Redis, clock: ManualClock
) -> None:
    await send(sender, "Idle", place="500-0")
    subscription = wakeups.subscribe(STREAM, "500-0")
    await clock.advance(0.0)
    store.delete(STREAM)
    await send(sender, "Connecting", place="300-0")
    await clock.advance(0.0)
    assert await clock.run(subscription.next(1)) == [], "it waits beyond the end of the stream"
    subscription.rewind("300-0")
    await send(sender, "Connected", place="301-0")
    assert statuses(await clock.run(subscription.next(1))) == ["Connected"]


async def test_after_a_stream_went_back_old_hints_do_not_hide_new_ones(
    store: FakeStore, wakeups: Wakeups, sender: Redis, clock: ManualClock
) -> None:
    kept = wakeups.subscribe(STREAM, "0-0")
    await send(sender, "Idle", place="500-0")
    await clock.advance(0.0)
    store.delete(STREAM)
    await send(sender, "Connecting", place="300-0")
    kept.rewind("300-0")
    fresh = wakeups.subscribe(STREAM, "300-0")
    await send(sender, "Connected", place="301-0")
    assert statuses(await clock.run(fresh.next(1))) == ["Connected"]


async def test_of_many_attempts_no_more_hints_are_held_than_come_in_one_lease(
    wakeups: Wakeups, sender: Redis, clock: ManualClock
) -> None:
    lease_ms = round(Settings().lease * 1000)
    subscription = wakeups.keep(STREAM, "0-0")
    for number in range(40):  # an attempt a second, and some hints each
        for rank in range(4):
            await send(sender, "Idle", place=f"{1_000_000 + 1_000 * number}-{rank}")
        await clock.advance(0.0)
    assert wakeups.cursor(STREAM) == (1_039_000, 3)
    assert wakeups.kept(STREAM) == 4 * (lease_ms // 1_000 + 1)
    assert await subscription.next(0) == [], "what only keeps the stream being read holds none"


async def test_who_looked_longer_ago_than_a_lease_misses_no_hint_that_the_stream_still_has(
    wakeups: Wakeups, sender: Redis, clock: ManualClock
) -> None:
    wakeups.keep(STREAM, "0-0")
    for second in (10, 11, 1_000):
        await send(sender, f"At{second}", place=f"{second * 1_000}-0")
        await clock.advance(0.0)
    assert wakeups.kept(STREAM) == 1
    for start, missed in {"10000-0": ["At11", "At1000"], "11000-0": ["At1000"], "1000000-0": []}.items():
        late = wakeups.subscribe(STREAM, start)
        await clock.advance(0.0)
        assert statuses(await clock.run(late.next(1))) == missed, start
        await late.close()


async def test_the_last_waiter_ends_the_reading(store: FakeStore, wakeups: Wakeups, clock: ManualClock) -> None:
    first, second = wakeups.subscribe(STREAM, "0-0"), wakeups.subscribe(STREAM, "0-0")
    await clock.advance(0.0)
    await first.close()
    await clock.advance(20.0)
    sent = store.sent["planner"]
    await clock.advance(20.0)
    assert store.sent["planner"] > sent, "somebody still waits"
    await second.close()
    sent = store.sent["planner"]
    await clock.advance(60.0)
    assert store.sent["planner"] == sent


async def test_a_stream_without_waiters_is_read_no_more(wakeups: Wakeups, sender: Redis, clock: ManualClock) -> None:
    first, second = wakeups.subscribe(STREAM, "0-0"), wakeups.subscribe(OTHER, "0-0")
    await clock.advance(0.0)
    async with second:
        pass
    await send(sender, "Connected", stream=OTHER)
    await send(sender, "Connected")
    await clock.advance(0.0)
    assert wakeups.cursor(OTHER) == (0, 0)
    assert statuses(await first.next(1)) == ["Connected"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {b"rank": b"1"},
        {b"kind": b"\xff"},
        {b"kind": b"report", b"rank": b"x"},
        {b"kind": b"report", b"epoch": b"\xff"},
    ],
)
def test_a_hint_that_cannot_be_read_is_a_reason_to_look(fields: dict[bytes, bytes]) -> None:
    assert decode_hint(b"7-1", fields) == Hint((7, 1), "lost")


@given(
    st.dictionaries(st.sampled_from([b"kind", b"rank", b"epoch", b"inc", b"status", b"alarm"]), st.binary(max_size=20))
)
def test_any_fields_are_a_hint(fields: dict[bytes, bytes]) -> None:
    assert decode_hint(b"7-1", fields).id == (7, 1)


def hint_that_says(status: bytes) -> Hint:
    return decode_hint(b"7-1", {b"kind": b"report", b"rank": b"0", b"status": status})


def test_hints_share_their_words() -> None:
    first, second = (hint_that_says(b"Run" + b"ning") for _ in range(2))
    assert first.status is second.status


def test_nothing_is_held_of_the_words_that_a_hostile_rank_makes_up() -> None:
    first = hint_that_says(b"first word")
    for number in range(2_000):
        hint_that_says(b"word %d" % number)
    assert hint_that_says(b"first word").status is not first.status, "it is held after 2,000 others"
    long = b"x" * 100_000
    assert hint_that_says(long).status is not hint_that_says(long).status, "a long word is held"


# --- the barrier's watch ------------------------------------------------------------------------------------------------


async def watching(group: Group, status: str = "Connected") -> asyncio.Task[Wake]:
    task = asyncio.create_task(group.barrier.watch(await group.inspect(), all_ranks(3, status), 30.0))
    await group.clock.advance(0.0)
    return task


async def test_it_comes_back_when_by_the_hints_all_have_arrived(group: Group) -> None:
    await group.open()
    await group.arrive("Connected", [0])
    watch = await watching(group)
    for rank in (1, 2):
        assert not watch.done()
        await group.arrive("Connecting", [rank])
        await group.arrive("Connected", [rank])
        await group.clock.advance(0.0)
    assert await watch is Wake.COMPLETE


async def test_an_arrival_that_is_withdrawn_is_counted_back(group: Group) -> None:
    await group.open()
    await group.arrive("Connected", [0, 1])
    watch = await watching(group)
    await group.arrive("Connecting", [0])
    await group.arrive("Connected", [2])
    await group.clock.advance(0.0)
    assert not watch.done()
    await group.arrive("Connected", [0])
    await group.clock.advance(0.0)
    assert await watch is Wake.COMPLETE


@pytest.mark.parametrize("what", ["failure", "restart", "verdict", "other epoch", "left"])
async def test_anything_else_deserves_a_look_at_once(group: Group, what: str) -> None:
    epoch = await group.open()
    await group.arrive("Connected", [0, 1])
    watch = await watching(group)
    match what:
        case "failure":
            await group.ranks[0].fail("boom")
        case "restart":
            await group.ranks[0].restart()
        case "verdict":
            await group.conclude(epoch)
        case "other epoch":
            await group.ranks[0].retire()
        case _:
            await group.ranks[0].member.leave()
    await group.clock.advance(0.0)
    assert await watch is Wake.DISTURBED


async def test_without_any_hint_it_ends_in_time(group: Group) -> None:
    await group.open()
    assert (
        await group.clock.run(group.barrier.watch(await group.inspect(), all_ranks(3, "Connected"), 4.0)) is Wake.QUIET
    )


async def test_a_lost_connection_deserves_a_look(group: Group) -> None:
    await group.open()
    watch = await watching(group)
    group.store.partition("planner")
    await group.clock.advance(0.0)
    assert await watch is Wake.DISTURBED
    group.store.heal()


async def test_a_hint_before_the_watch_began_counts(group: Group) -> None:
    """The last rank arrives after the picture was taken and before anybody waits."""
    await group.open()
    await group.arrive("Connected", [0, 1])
    snapshot = await group.inspect()
    await group.arrive("Connected", [2])
    watch = asyncio.create_task(group.barrier.watch(snapshot, all_ranks(3, "Connected"), 30.0))
    await group.clock.advance(0.0)
    assert await watch is Wake.COMPLETE


async def test_a_shared_reader_serves_several_barriers(store: FakeStore, clock: ManualClock) -> None:
    plan = FaultPlan()
    shared_store = adopt(store.client("planner", faults=plan))
    shared = Wakeups(shared_store, clock)
    async with ScriptedRank(store, "a", 0) as a, ScriptedRank(store, "b", 0) as b:
        barriers = {
            name: Barrier(shared_store, name, world_size=2, clock=clock, wakeups=shared, holder=name) for name in "ab"
        }
        watches = {
            name: asyncio.create_task(one.watch(await one.inspect(), (), 30.0)) for name, one in barriers.items()
        }
        await clock.advance(0.0)
        await b.report("Connecting")
        await clock.advance(0.0)
        assert watches["b"].done()
        assert not watches["a"].done()
        await a.report("Connecting")
        await clock.advance(0.0)
        assert watches["a"].done()
        for one in barriers.values():
            await one.close()
    await shared.close()
    await shared_store.close()

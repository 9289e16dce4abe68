"""Hints and history stop nobody, whatever a rank has done to their streams: every verb and every report goes on, and heals them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from barrier import Concluded, Dispatched, EpochId, Member, Opened, Restored, Snapshot, StoreUnavailable, Verdict
from barrier.store.keys import Keys
from tests.unit.barrier.group import Group

pytestmark = pytest.mark.anyio

KEYS = Keys("rankgate", "demo")
STREAMS = (KEYS.signals, KEYS.events)
LAST_ID = "18446744073709551615-18446744073709551615"
"""After it, no stream takes another entry; any rank may append it, within its rights."""
SPOILS = ("the last id", "string", "list", "hash")


async def spoil(group: Group, key: str, how: str) -> None:
    commands: Any = group.barrier.store.commands
    match how:
        case "the last id":
            await commands.xadd(key, {"a": "b"}, id=LAST_ID)
        case "string":
            await commands.set(key, "x")
        case "list":
            await commands.delete(key)
            await commands.rpush(key, "x")
        case _:
            await commands.delete(key)
            await commands.hset(key, "a", "b")
    await commands.pexpire(key, 60_000)


async def is_healed(group: Group, key: str) -> bool:
    """Whether the stream takes entries again, and has a lifetime."""
    commands: Any = group.barrier.store.commands
    if await commands.type(key) != b"stream":
        return False
    newest = await commands.xrevrange(key, count=1)
    return newest[0][0] != LAST_ID.encode() and await commands.pttl(key) > 0


Verb = Callable[[Group, EpochId], Awaitable[object]]


async def restore(group: Group, epoch: EpochId) -> object:
    group.store.delete(group.keys.epoch)
    return await group.barrier.restore(epoch, "Connected", [], ordinal=1)


async def open_anew(group: Group, epoch: EpochId) -> object:
    group.store.delete(group.keys.epoch)
    return await group.barrier.open(3)


VERBS: dict[str, tuple[Verb, type, tuple[str, ...]]] = {
    "open": (open_anew, Opened, STREAMS),
    "restore": (restore, Restored, STREAMS),
    "dispatch": (
        lambda group, epoch: group.barrier.dispatch(epoch, "load", "{}", "Connected"),
        Dispatched,
        (KEYS.events,),
    ),
    "conclude": (lambda group, epoch: group.barrier.conclude(epoch, Verdict.stopped()), Concluded, STREAMS),
    "inspect": (lambda group, _: group.barrier.inspect(), Snapshot, ()),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("how", SPOILS)
@pytest.mark.parametrize("key", STREAMS)
async def test_no_verb_is_stopped_and_whoever_appends_heals(group: Group, key: str, how: str, verb: str) -> None:
    epoch = await group.all_connected()
    await spoil(group, key, how)
    call, outcome, appends_to = VERBS[verb]
    assert isinstance(await call(group, epoch), outcome)
    assert await is_healed(group, key) == (key in appends_to)
    for left in STREAMS:
        group.store.delete(left)


@pytest.mark.parametrize("how", SPOILS)
@pytest.mark.parametrize("key", STREAMS)
async def test_no_report_is_stopped_and_says_what_was_not_taken_to_a_new_stream(
    group: Group, key: str, how: str
) -> None:
    await group.all_connected()
    await spoil(group, key, how)
    await group.ranks[1].member.report("Loading", events=[{"kind": "told"}])
    view = (await group.inspect()).ranks[1]
    assert view.report is not None
    assert view.report.status == "Loading"
    assert group.ranks[1].member.trusted
    assert await is_healed(group, key)
    commands: Any = group.barrier.store.commands
    told = [fields for _, fields in await commands.xrange(key)]
    wanted = (b"status", b"Loading") if key == KEYS.signals else (b"kind", b"told")
    assert [fields[wanted[0]] for fields in told] == [wanted[1]]
    await group.ranks[1].member.report("Loaded", events=[{"kind": "and again"}])
    said = [fields.get(b"kind") for _, fields in await commands.xrange(KEYS.events)]
    assert said.count(b"told") == 1, "history that was taken is not said twice"


@pytest.mark.parametrize("how", SPOILS)
@pytest.mark.parametrize("key", STREAMS)
async def test_a_rank_beats_leaves_and_comes_back(group: Group, key: str, how: str) -> None:
    await spoil(group, key, how)
    await group.ranks[0].beat()
    await group.ranks[0].member.leave()
    member = Member(group.store.client(), "demo", rank=0, world_size=3, clock=group.clock)
    assert await member.claim(timeout=0) == 0
    assert await is_healed(group, KEYS.signals)
    await member.leave()
    await member.close()
    for left in STREAMS:
        group.store.delete(left)


async def test_a_dispatch_that_is_left_with_the_store_goes_out_all_the_same(group: Group) -> None:
    """With another type in its place it is tried on real servers: fakeredis cannot block on such a key."""
    epoch = await group.open()
    await group.arrive("Connected", [0, 1])
    snapshot = await group.inspect()
    await spoil(group, KEYS.signals, "the last id")
    await group.arrive("Connected", [2])
    outcome = await group.barrier.dispatch_on_arrival(snapshot, epoch, "load", "{}", "Connected", 1.0)
    assert isinstance(outcome, Dispatched)


async def test_a_store_that_does_not_answer_is_still_an_error(group: Group) -> None:
    """What must not fail is the report because of the hint; not the other way round."""
    await group.all_connected()
    group.store.partition()
    with pytest.raises(StoreUnavailable):
        await group.ranks[1].member.report("Loading")
    group.store.heal()


async def test_an_answer_is_written_to_a_stream_whose_last_id_somebody_took(group: Group) -> None:
    """Or rank 0 would wait for ever to write it, and a planner to end it."""
    key = group.keys.out("gen.1")
    await spoil(group, key, "the last id")
    await group.ranks[0].member.write_output("gen.1", [b"a", b"b"])
    commands: Any = group.barrier.store.commands
    assert [fields[b"chunk"] for _, fields in await commands.xrange(key)] == [b"a", b"b"]
    assert await is_healed(group, key)

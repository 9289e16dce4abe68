"""A key of the wrong type where one of ours should be: one clear error from whoever meets it, and nothing written."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import Any

import pytest

from barrier import EpochId, Member, NotReady, StoreCorrupt, Verdict, all_ranks
from barrier.store import verbs
from barrier.store.keys import Keys
from tests.unit.barrier.group import Group

pytestmark = pytest.mark.anyio

KEYS = Keys("rankgate", "demo")
RIGHT = {
    KEYS.epoch: "hash",
    KEYS.leader: "hash",
    KEYS.tasks: "stream",
}
"""Without hints and history, whose keys stop nobody: see test_spoiled_streams."""
Verb = Callable[[Group, EpochId], Awaitable[object]]
VERBS: dict[str, tuple[Verb, set[str]]] = {
    "lead": (lambda group, _: group.barrier.lead(), {KEYS.leader}),
    "open": (lambda group, _: group.barrier.open(3), set(RIGHT)),
    "restore": (lambda group, epoch: group.barrier.restore(epoch, "Connected", [], ordinal=1), set(RIGHT)),
    "dispatch": (
        lambda group, epoch: group.barrier.dispatch(epoch, "load", "{}", "Connected"),
        {KEYS.epoch, KEYS.leader, KEYS.tasks},
    ),
    "check": (
        lambda group, epoch: verbs.check(
            group.barrier.store, group.keys, epoch=epoch, requirement=all_ranks(3, "Connected"), world_size=3
        ),
        {KEYS.epoch},
    ),
    "conclude": (lambda group, epoch: group.barrier.conclude(epoch, Verdict.stopped()), set(RIGHT)),
    "inspect": (lambda group, _: group.barrier.inspect(), {KEYS.epoch, KEYS.leader, KEYS.tasks}),
}


async def put_wrong(group: Group, key: str, kind: str) -> None:
    """Put something of another kind at a key, with a lifetime so that the store fixture has nothing to say."""
    commands: Any = group.barrier.store.commands
    group.store.delete(key)
    match kind:
        case "string":
            await commands.set(key, "somebody else's")
        case "hash":
            await commands.hset(key, "somebody", "else")
        case "list":
            await commands.rpush(key, "somebody else's")
        case _:
            await commands.xadd(key, {"somebody": "else"})
    await commands.pexpire(key, 60_000)


@pytest.fixture(autouse=True)
def tidied(group: Group) -> Generator[None]:
    """The ranks of the group leave at the end, for which the keys must be right again."""
    yield
    group.store.flush()


WRONG = {
    "hash": ["string", "list", "stream"],
    "stream": ["string", "list", "hash"],
    "string": ["list", "hash", "stream"],
}


@pytest.mark.parametrize(
    ("verb", "key", "kind"),
    [(verb, key, kind) for verb, (_, keys) in VERBS.items() for key in sorted(keys) for kind in WRONG[RIGHT[key]]],
)
async def test_every_verb_refuses_every_key_of_the_wrong_type_and_writes_nothing(
    group: Group, verb: str, key: str, kind: str
) -> None:
    epoch = await group.all_connected()
    await put_wrong(group, key, kind)
    before = group.store.contents()
    with pytest.raises(StoreCorrupt) as refusal:
        await VERBS[verb][0](group, epoch)
    assert group.store.contents() == before
    assert str(refusal.value) == (
        f"{key} holds a {kind} where a {RIGHT[key]} belongs; move or delete that key, then try again"
    )


@pytest.mark.parametrize("kind", ["hash", "list", "stream"])
async def test_a_rank_key_of_the_wrong_type_counts_as_a_missing_rank(group: Group, kind: str) -> None:
    """MGET answers nil for it; the rank itself is told what is wrong when it writes."""
    epoch = await group.all_connected()
    await put_wrong(group, group.keys.rank(1), kind)
    before = group.store.contents()
    assert await group.barrier.dispatch(epoch, "load", "{}", "Connected") == NotReady((1,))
    assert (await group.inspect()).ranks[1].report is None
    assert group.store.contents() == before


@pytest.mark.parametrize("kind", ["hash", "list", "stream"])
async def test_the_mark_of_a_repeatable_step_is_checked_too(group: Group, kind: str) -> None:
    epoch = await group.all_connected()
    await put_wrong(group, group.keys.once("generate:1"), kind)
    before = group.store.contents()
    with pytest.raises(StoreCorrupt, match=f"holds a {kind} where a string belongs"):
        await group.barrier.dispatch(epoch, "generate:1", "{}", "Connected", repeatable=True)
    assert group.store.contents() == before


READ_BY_A_RANK = {key: kind for key, kind in RIGHT.items() if key != KEYS.leader} | {
    KEYS.rank(0): "string",
    KEYS.claim(0): "string",
}


@pytest.mark.parametrize(
    ("key", "kind"), [(key, kind) for key, right in READ_BY_A_RANK.items() for kind in WRONG[right]]
)
async def test_a_rank_refuses_them_when_it_claims_and_leaves_everything_as_it_was(
    group: Group, key: str, kind: str
) -> None:
    await group.ranks[0].close()
    await put_wrong(group, key, kind)
    before = group.store.contents()
    member = Member(group.store.client(), "demo", rank=0, world_size=3, clock=group.clock)
    with pytest.raises(StoreCorrupt) as refusal:
        await member.claim(timeout=0)
    assert key in str(refusal.value)
    assert group.store.contents() == before
    await member.close()


async def test_a_report_key_of_the_wrong_type_is_replaced_by_the_next_heartbeat(group: Group) -> None:
    await put_wrong(group, group.keys.rank(0), "list")
    await group.ranks[0].beat()
    assert (await group.inspect()).ranks[0].report is not None


@pytest.mark.parametrize(
    ("key", "next_time"),
    [
        (KEYS.claim(1), "report"),
        (KEYS.claim(1), "beat"),
        (KEYS.epoch, "beat"),
        (KEYS.tasks, "beat"),
    ],
)
async def test_a_wrong_type_that_comes_up_later_is_told_when_it_is_next_touched_and_heals_when_it_goes(
    group: Group, key: str, next_time: str
) -> None:
    await put_wrong(group, key, "list")
    rank = group.ranks[1]
    with pytest.raises(StoreCorrupt) as refusal:
        await (rank.report("Connecting") if next_time == "report" else rank.beat())
    assert key in str(refusal.value)
    group.store.delete(key)
    await rank.report("Connecting")
    await rank.beat()
    found = (await group.inspect()).ranks[1].report
    assert found is not None
    assert found.status == "Connecting"


async def test_the_error_of_a_failed_answer_does_not_quote_it(group: Group) -> None:
    key = group.keys.out("generate:1")
    await put_wrong(group, key, "list")
    with pytest.raises(StoreCorrupt) as refusal:
        await group.ranks[0].member.write_output(
            "generate:1", [b"a secret) of pipeline caused error: LOADING", b"BUSY"]
        )
    assert key in str(refusal.value)
    for word in ("secret", "LOADING", "BUSY"):
        assert word not in str(refusal.value)

"""Keys that somebody has spoiled, in the middle of random histories: every verb fails closed, says why, and changes nothing.

What is spoiled is put right again afterwards, so that the history goes on: the reference model knows nothing of it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from barrier import Settings, StoreCorrupt, Verdict, adopt
from barrier.protocol.outcomes import Dispatched, Released, Unknown
from barrier.protocol.report import SCHEMA
from barrier.store import verbs
from barrier.testing import FakeStore, ManualClock
from tests.depth import examples
from tests.property.side_by_side import PRELUDES, WORLD, SideBySide, begun, carry_out, steps

USED = {
    "open": ("epoch", "leader", "tasks"),
    "restore": ("epoch", "leader", "tasks"),
    "dispatch": ("epoch", "leader", "tasks"),
    "conclude": ("epoch", "leader", "tasks"),
}
"""The keys that each verb writes or looks at, besides those of the ranks, and hints and history, which stop nobody."""

RIGHT = {"epoch": "hash", "leader": "hash", "tasks": "stream"}
ROSTERS = ("missing", "short", "long")

Spoil = tuple[str, Any, Any]
spoils = st.one_of(
    st.tuples(
        st.just("type"),
        st.sampled_from([(verb, key) for verb, keys in USED.items() for key in keys]),
        st.sampled_from(("string", "list", "hash", "stream")),
    ),
    st.tuples(st.just("roster"), st.sampled_from(ROSTERS), st.none()),
    st.tuples(st.just("size"), st.sampled_from((1, 3, 64)), st.none()),
    st.tuples(st.just("caller's size"), st.sampled_from((1, 3, 64)), st.none()),
    st.tuples(st.just("record goes back"), st.none(), st.none()),
)


class Trial:
    """One history, and what its spoilt moments came to."""

    def __init__(self, both: SideBySide, seen: Counter[str]) -> None:
        self.both = both
        self.seen = seen
        self.commands: Any = both.store.commands
        self.kept: dict[bytes, bytes] = {}
        self.call: dict[str, Any] = {}

    async def keep_record(self) -> None:
        """Keep the first record that there is: the one to which a store may go back."""
        if not self.kept and self.both.state.record is not None and self.both.state.record.verdict is None:
            self.kept = await self.commands.hgetall(self.both.keys.epoch)

    async def spoil(self, what: str, one: Any, other: Any, like: dict[str, Any]) -> None:
        """Spoil something, ask the verbs, and put it right."""
        self.call = like
        before = self.both.fake.snapshot()
        match what:
            case "type":
                await self.wrong_type(one[0], one[1], other)
            case "roster":
                await self.torn_roster(one)
            case "size":
                await self.other_size(one)
            case "caller's size":
                await self.callers_size(one)
            case _:
                await self.record_goes_back()
        self.both.fake.roll_back(before)

    async def wrong_type(self, verb: str, name: str, kind: str) -> None:
        if kind == RIGHT[name]:
            return
        key = getattr(self.both.keys, name)
        self.both.fake.delete(key)
        match kind:
            case "string":
                await self.commands.set(key, "somebody else's")
            case "hash":
                await self.commands.hset(key, "somebody", "else")
            case "list":
                await self.commands.rpush(key, "somebody else's")
            case _:
                await self.commands.xadd(key, {"somebody": "else"})
        before = self.both.fake.contents()
        try:
            answer = await self.ask(verb)
        except StoreCorrupt as error:
            said = str(error)
        else:
            raise AssertionError(f"{verb}: {name} is a {kind}, and the answer is {answer}")
        assert self.both.fake.contents() == before, f"{verb}: {name} is a {kind}, and something was written"
        assert f"{key} holds a {kind} where a {RIGHT[name]} belongs" in said, f"{verb}: {said}"
        self.seen.update((verb, name))

    async def torn_roster(self, how: str) -> None:
        record = self.both.state.record
        if record is None:
            return
        whole = "".join(record.roster)
        if how == "missing":
            await self.commands.hdel(self.both.keys.epoch, "roster:0")
        else:
            await self.commands.hset(self.both.keys.epoch, "roster:0", whole[1:] if how == "short" else whole + whole)
        await self.unusable(f"the roster is {how}")

    async def other_size(self, size: int) -> None:
        if self.both.state.record is None:
            return
        await self.commands.hset(self.both.keys.epoch, "world_size", size)
        await self.unusable(f"the record is for {size} ranks", str(size))

    async def unusable(self, what: str, word: str = "") -> None:
        """A record that nobody may act on: it counts as missing for those who look, and nothing is released."""
        seen = await verbs.inspect(self.both.store, self.both.keys, world_size=WORLD)
        assert seen.epoch is None, f"{what}, and the planner sees {seen.epoch}"
        assert word in seen.unreadable, f"{what}: {seen.unreadable}"
        assert seen.unreadable
        await self.nothing_is_released(what, WORLD, word)

    async def callers_size(self, size: int) -> None:
        if self.both.state.record is not None:
            await self.nothing_is_released(f"the caller says {size} ranks", size, str(size))

    async def nothing_is_released(self, what: str, size: int, word: str = "") -> None:
        state, before = self.both.state, self.both.fake.contents()
        answers = [
            await self.ask("check", size),
            await self.ask("dispatch", size),
        ]
        assert self.both.fake.contents() == before, f"{what}, and something was written"
        for answer in answers:
            assert not isinstance(answer, Dispatched | Released), f"{what}: {answer}"
        record, leader = state.record, state.leader
        if record is None or record.id != self.both.epochs[-1] or record.verdict is not None:
            return
        assert isinstance(answers[0], Unknown), f"{what}: {answers[0]}"
        assert word in answers[0].reason, f"{what}: {answers[0].reason}"
        if leader is not None and leader.leadership == self.both.leaderships[-1]:
            assert isinstance(answers[1], Unknown), f"{what}: {answers[1]}"
            assert word in answers[1].reason, f"{what}: {answers[1].reason}"
            self.seen[" ".join(what.split()[:2])] += 1

    async def record_goes_back(self) -> None:
        """The record alone is what it was: the log tells that more has happened since."""
        if not self.kept:
            return
        self.both.fake.delete(self.both.keys.epoch)
        await self.commands.hset(self.both.keys.epoch, mapping=self.kept)
        number = int(self.kept[b"number"])
        if self.both.state.log_end.number <= number:
            return
        old = next(epoch for epoch in self.both.epochs if str(epoch) == f"{number}-{self.kept[b'nonce'].decode()}")
        for rank in range(WORLD):
            await self.say_arrived(rank, str(old))
        before = self.both.fake.contents()
        self.both.epochs.append(old)
        try:
            answer = await self.ask("dispatch")
        finally:
            self.both.epochs.pop()
        assert not isinstance(answer, Dispatched), f"the log has gone on, and the answer is {answer}"
        assert self.both.fake.contents() == before, "the log has gone on, and something was written"
        self.seen["record goes back"] += 1

    async def say_arrived(self, rank: int, epoch: str) -> None:
        roster = self.kept[b"roster:0"].decode()
        life = roster[rank * 28 : rank * 28 + 28]
        number = epoch.partition("-")[0]
        text = f"{SCHEMA}|{epoch}|Idle|0000000001|{life}|{int(number):016d}|-|{{}}"
        await self.commands.set(self.both.keys.rank(rank), text, px=3_000)

    async def ask(self, verb: str, size: int = WORLD) -> object:
        """Call a verb as somebody would who means well."""
        both, a = self.both, self.call
        named: dict[str, Any] = {"leadership": both.leaderships[-1], "epoch": both.epochs[-1]}
        rules = tuple(rule for rule in a["rules"] if rule.last < size)
        match verb:
            case "open":
                del named["epoch"]
                return await verbs.open_epoch(
                    both.store,
                    both.keys,
                    nonce=a["nonce"],
                    floor=0,
                    ordinal=1,
                    digest="",
                    notes="",
                    world_size=size,
                    **named,
                )
            case "restore":
                return await verbs.restore(
                    both.store,
                    both.keys,
                    status="Idle",
                    steps=["connect"],
                    floor=0,
                    ordinal=1,
                    digest="",
                    notes="",
                    world_size=size,
                    **named,
                )
            case "conclude":
                return await verbs.conclude(both.store, both.keys, verdict=Verdict.stopped(), seen_n=0, **named)
            case "check":
                del named["leadership"]
                return await verbs.check(both.store, both.keys, requirement=rules, world_size=size, **named)
            case _:
                # A step of its own: whether it was dispatched before does not come into it.
                return await verbs.dispatch(
                    both.store,
                    both.keys,
                    step="another",
                    payload="{}",
                    requirement=rules,
                    attempt=1,
                    after="",
                    repeatable=False,
                    seen_n=0,
                    known_n=0,
                    to=(0, size - 1),
                    world_size=size,
                    **named,
                )


async def play(
    prelude: tuple[str, ...], history: list[tuple[tuple[str, dict[str, Any]], Spoil]], seen: Counter[str]
) -> None:
    clock = ManualClock()
    fake = FakeStore(clock)
    store = adopt(fake.client(), settings=Settings(lease=3, heartbeat=1))
    trial = Trial(SideBySide(fake, clock, store), seen)
    try:
        for kind, arguments in begun(prelude, history[0][0][1]):
            await carry_out(trial.both, kind, arguments)
            await trial.keep_record()
        for (kind, arguments), spoil in history:
            await trial.spoil(*spoil, like=arguments)
            await carry_out(trial.both, kind, arguments)
            await trial.keep_record()
    finally:
        await store.close()


HISTORIES: dict[str, st.SearchStrategy[Any]] = {
    "prelude": st.sampled_from(PRELUDES),
    "history": st.lists(st.tuples(steps(), spoils), min_size=4, max_size=20),
}


@settings(max_examples=examples(100), deadline=None)
@given(**HISTORIES)
def test_a_spoiled_store_releases_nobody(
    prelude: tuple[str, ...], history: list[tuple[tuple[str, dict[str, Any]], Spoil]]
) -> None:
    asyncio.run(play(prelude, history, Counter()))


@pytest.mark.slow
def test_the_histories_spoil_everything() -> None:
    """Or the rules would hold of nothing. Always the same histories, so that luck does not come into it."""
    seen: Counter[str] = Counter()

    @settings(max_examples=100, deadline=None, database=None, derandomize=True)
    @given(**HISTORIES)
    def play_some(prelude: tuple[str, ...], history: list[tuple[tuple[str, dict[str, Any]], Spoil]]) -> None:
        asyncio.run(play(prelude, history, seen))

    play_some()
    wanted = {*USED, *RIGHT, "the roster", "the record", "the caller", "record goes back"}
    assert wanted <= seen.keys(), f"never drawn: {wanted - seen.keys()}; drawn: {dict(seen)}"

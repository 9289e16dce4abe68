"""Garbage in live keys while real runners and a real planner work on them: no process dies, and the instance serves afterwards (F20).

Keys that ranks and planners rewrite heal by themselves. A key of a wrong type does not: the process that needs it names the key,
and goes on when the key is deleted.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loguru import logger

from barrier.store.keys import NamespaceKeys
from barrier.testing import FakeStore, ManualClock
from planner import GenerationFailed, InstanceFailed, Planner
from planner.history import StepDispatched, find_breaches, read_history
from runner import Runner
from tests.unit.planner.cluster import WORDS, Cluster, RefusingRunner, cluster, text_of

pytestmark = pytest.mark.anyio

TEXT = "".join(WORDS)
BIG = b"x" * 1_000_000
JUNK: dict[Any, Any] = {b"\xff": b"\xfe", b"kind": b"\x00"}
INCARNATION = b"0" * 11 + b"9" + b"f" * 16


@dataclass
class Vandal:
    """A client that writes whatever it likes; everything that it adds has a lifetime, so that the store stays clean."""

    made: Cluster
    redis: Any

    def key(self, name: str) -> str:
        if name in ("instances", "changes"):
            return getattr(NamespaceKeys("rankgate"), name)
        return f"{self.made.keys.tag}:{name}"

    async def add(self, stream: str, fields: dict[Any, Any], entry_id: str = "*") -> None:
        await self.redis.xadd(self.key(stream), fields, id=entry_id)
        await self.redis.pexpire(self.key(stream), 10**9)

    async def put(self, name: str, value: bytes) -> None:
        await self.redis.set(self.key(name), value, px=3_000)

    async def field(self, name: str, **fields: Any) -> None:
        await self.redis.hset(self.key(name), mapping=fields)
        await self.redis.pexpire(self.key(name), 10**9)

    async def in_this_epoch(self, fields: dict[Any, Any]) -> None:
        """An entry of the log at the next place of the epoch that goes on."""
        newest = await self.redis.xrevrange(self.key("tasks"), count=1)
        number, n = newest[0][0].split(b"-") if newest else (b"1", b"0")
        await self.add("tasks", fields, f"{number.decode()}-{int(n) + 1}")


Garbage = Callable[[Vandal], Awaitable[None]]


def _task(**changes: Any) -> dict[Any, Any]:
    fields = {"kind": "task", "nonce": "0" * 32, "prev": 1, "term": 1, "step": "load", "to": "0-1", "task": b"{"}
    return {name: value for name, value in (fields | changes).items() if value is not ...}


HEALS: dict[str, Garbage] = {
    "a log entry of nobody's": lambda v: v.in_this_epoch(JUNK),
    "a log entry without fields that belong to it": lambda v: v.in_this_epoch({"kind": "task"}),
    "a log entry for ranks that are none": lambda v: v.in_this_epoch(_task(to="-1--5")),
    "a log entry for a word": lambda v: v.in_this_epoch(_task(to="everyone")),
    "a log entry of a foreign nonce": lambda v: v.in_this_epoch(_task()),
    "a log entry of a megabyte": lambda v: v.in_this_epoch(_task(task=BIG)),
    "a log entry with a verdict that is none": lambda v: v.in_this_epoch({"kind": "verdict", "nonce": "0" * 32, "verdict": "{"}),
    "a log entry that announces an epoch that is none": lambda v: v.in_this_epoch({"kind": "opened", "nonce": "0" * 32}),
    "a log entry at the store's own time": lambda v: v.add("tasks", JUNK),
    "hints of nobody's": lambda v: v.add("signals", JUNK),
    "a hint about a rank that is none": lambda v: v.add("signals", {"kind": "report", "rank": "-7", "status": "Ready"}),
    "a hint about a rank beyond all": lambda v: v.add("signals", {"kind": "report", "rank": "9" * 40}),
    "history of nobody's": lambda v: v.add("events", JUNK),
    "a request of nobody's": lambda v: v.add("requests", JUNK),
    "a request of a megabyte": lambda v: v.add("requests", {"id": "x", "cancels": "", "prompt": BIG, "max_tokens": "1", "until_ms": "9" * 13}),
    "a request with a hostile id": lambda v: v.add("requests", {"id": "x}:epoch", "cancels": "", "prompt": "y", "max_tokens": "1", "until_ms": "9" * 13}),
    "a request for too many tokens": lambda v: v.add("requests", {"id": "x", "cancels": "", "prompt": "y", "max_tokens": "9" * 30, "until_ms": "9" * 13}),
    "a cancellation of nothing": lambda v: v.add("requests", {"id": "x", "cancels": "\x00" * 200, "prompt": "", "max_tokens": "1", "until_ms": "9" * 13}),
    "a report that is none": lambda v: v.put("rank:0", b"\xff\xfe"),
    "a report of a megabyte": lambda v: v.put("rank:0", BIG),
    "a report with a good header and a broken body": lambda v: v.put("rank:1", b"2|-|Idle|0000000000|" + INCARNATION + b"|0000000000000005|-|{"),
    "a report with a floor beyond all": lambda v: v.put("rank:1", b"2|-|Idle|0|" + INCARNATION + b"|" + b"9" * 300 + b"|-|{}"),
    "a record with a number that is none": lambda v: v.field("epoch", number="many"),
    "a record without a nonce worth the name": lambda v: v.field("epoch", nonce="\xff"),
    "a record with a torn roster": lambda v: v.field("epoch", **{"roster:0": "abc"}),
    "a record with a roster field that is none": lambda v: v.field("epoch", **{"roster:x": "abc"}),
    "a record for no ranks": lambda v: v.field("epoch", world_size="zero"),
    "a record with a step that is none": lambda v: v.field("epoch", **{"step:load": "sometime"}),
    "a record with a position that is none": lambda v: v.field("epoch", last_n="far"),
    "a record with a verdict that is none": lambda v: v.field("epoch", verdict="\xff"),
    "a record with notes without end": lambda v: v.field("epoch", notes="[" * 100_000),
    "a leader whose term is a word": lambda v: v.field("leader", term="first"),
    "a leader whose lease is a word": lambda v: v.field("leader", until_ms="soon"),
    "a leader without a name": lambda v: v.redis.hdel(v.key("leader"), "holder"),
    "an instance under a name that is none": lambda v: v.redis.hset(v.key("instances"), b"\xff{}", b"\xff"),
    "an instance that is none": lambda v: v.field("instances", other="{"),
}  # fmt: skip

# Not `tasks`: ranks wait for it already, and fakeredis breaks where a real server tells a waiting reader that the type is wrong.
WRONG_TYPES = ("epoch", "leader", "requests")


async def quiet_run(
    store: FakeStore, clock: ManualClock, play: Callable[[Cluster, Planner, Vandal], Awaitable[None]]
) -> None:
    """Play with 2 ranks and a planner; afterwards nobody has died, and only keys of ours are there."""
    for package in ("barrier", "runner", "planner"):
        logger.disable(package)  # what is dropped is logged, and there is much of it
    try:
        # The kit's runner looks into tasks before the real one does.
        untouched: Any = Runner
        with patch.object(RefusingRunner, "_receive", untouched._receive):
            await _run(store, clock, play)
    finally:
        for package in ("barrier", "runner", "planner"):
            logger.enable(package)


async def _run(
    store: FakeStore, clock: ManualClock, play: Callable[[Cluster, Planner, Vandal], Awaitable[None]]
) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        redis: Any = store.client("vandal")
        try:
            await play(made, planner, Vandal(made, redis))
        finally:
            await redis.aclose()
        for rank in made.ranks.values():
            assert not rank.task.done(), f"a runner ended: {rank.task}"
        ours = ("epoch", "leader", "tasks", "signals", "events", "requests", "rank:", "claims:", "out:", "once:")
        for key in store.contents():
            tail = key.removeprefix(f"{made.keys.tag}:")
            assert key.startswith("{rankgate:-}:") or tail.startswith(ours), f"{key!r} is none of ours"


async def serves(made: Cluster, planner: Planner) -> None:
    """A healthy bring-up works, and nothing that was promised has been broken on the way.

    A foreign entry in the log of the attempt that goes on may cost that attempt: a rank cannot know that it missed nothing there.
    """
    instance = await made.run(planner.launch(made.spec))
    try:
        text = await made.run(text_of(instance.generate("Why?")))
    except GenerationFailed:
        await made.clock.advance(30)
        await made.run(instance.ready())
        text = await made.run(text_of(instance.generate("Why?")))
    assert text == TEXT
    history = await made.run(read_history(made.ranks[0].member.store, made.keys))
    assert find_breaches(history) == []
    loads = Counter(one.epoch for one in history.events if isinstance(one, StepDispatched) and one.step == "load")
    assert loads
    assert set(loads.values()) == {1}, f"LoadModel was dispatched more than once in an attempt: {loads}"


@pytest.mark.parametrize("moment", [pytest.param("before", marks=pytest.mark.slow), "serving"])
@pytest.mark.parametrize("what", HEALS)
async def test_garbage_in_a_live_key_heals_by_itself(
    store: FakeStore, clock: ManualClock, what: str, moment: str
) -> None:
    async def play(made: Cluster, planner: Planner, vandal: Vandal) -> None:
        if moment == "before":
            await clock.advance(1)
            await HEALS[what](vandal)
            await serves(made, planner)
            return
        instance = await made.run(planner.launch(made.spec))
        await HEALS[what](vandal)
        await clock.advance(30)
        assert not instance.state.over, f"the planner gave up: {instance.state}"
        await serves(made, planner)

    await quiet_run(store, clock, play)


@pytest.mark.parametrize("name", WRONG_TYPES)
async def test_a_key_of_the_wrong_type_is_named_and_nothing_is_written(
    store: FakeStore, clock: ManualClock, name: str
) -> None:
    async def play(made: Cluster, planner: Planner, vandal: Vandal) -> None:
        await clock.advance(1)
        await vandal.redis.set(vandal.key(name), "not yours", px=10**9)
        before = store.contents()
        with pytest.raises((InstanceFailed, Exception), match=r"holds a string where a (hash|stream) belongs"):
            await made.run(planner.launch(made.spec))
        assert {key for key in store.contents() if "rank:" not in key and "claims:" not in key} == {
            key for key in before if "rank:" not in key and "claims:" not in key
        }
        assert store.contents()[vandal.key(name)] == b"not yours"
        await vandal.redis.delete(vandal.key(name))
        await clock.advance(10)
        await serves(made, planner)

    await quiet_run(store, clock, play)


BEYOND: dict[str, tuple[str, Garbage]] = {
    "a log that ends beyond all": ("tasks", lambda v: v.add("tasks", JUNK, "9999999999999999-1")),
    "a log that ends at the end of all": ("tasks", lambda v: v.add("tasks", JUNK, "18446744073709551614-1")),
    "a record beyond all": ("epoch", lambda v: v.field("epoch", number="9" * 30)),
}


@pytest.mark.parametrize(("name", "spoil"), BEYOND.values(), ids=BEYOND)
async def test_a_number_beyond_all_is_told_before_anything_is_written(
    store: FakeStore, clock: ManualClock, name: str, spoil: Garbage
) -> None:
    """Regression: the record was overwritten first, with a number that no verb could use; then the log refused its entry."""

    async def play(made: Cluster, planner: Planner, vandal: Vandal) -> None:
        instance = await made.run(planner.launch(made.spec))
        opened = await vandal.redis.hget(vandal.key("epoch"), "number")
        await spoil(vandal)
        await clock.advance(30)
        assert instance.state.error is not None
        assert re.search(
            rf"{name}.* holds epoch \d+, which no planner can have given; move or delete", str(instance.state.error)
        )
        assert await vandal.redis.hget(vandal.key("epoch"), "number") in (opened, b"9" * 30)
        await vandal.redis.delete(vandal.key("tasks"), vandal.key("epoch"))
        await clock.advance(10)
        await serves(made, planner)

    await quiet_run(store, clock, play)


@settings(
    max_examples=int(os.environ.get("RANKGATE_FUZZ_EXAMPLES") or 120) // 40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    plan=st.lists(
        st.tuples(st.sampled_from(sorted(HEALS)), st.sampled_from((0.0, 0.3, 2.0, 7.0))), min_size=1, max_size=6
    )
)
def test_any_mixture_of_garbage_at_any_time_heals_by_itself(plan: list[tuple[str, float]]) -> None:
    async def run() -> None:
        clock = ManualClock()
        store = FakeStore(clock)

        async def play(made: Cluster, planner: Planner, vandal: Vandal) -> None:
            await made.run(planner.launch(made.spec, wait=False))
            for what, seconds in plan:
                await clock.advance(seconds)
                await HEALS[what](vandal)
            await clock.advance(60)
            await serves(made, planner)

        await quiet_run(store, clock, play)

    asyncio.run(run())

"""A planner that plans for months keeps no more than one that has just begun: nothing of it grows with the number of attempts."""

from __future__ import annotations

import gc
from collections import Counter

import pytest

from barrier import Settings
from barrier.protocol.wakeup import Hint, decode_hint
from barrier.testing import FakeStore, ManualClock
from planner import Planner, Policy
from tests.unit.planner.cluster import Cluster, cluster

pytestmark = pytest.mark.anyio

FEW = Settings(event_entries=40, signal_entries=40, log_entries=40)
"""So short that the store, which lives in this process too, has stopped growing before anything is counted."""

ENDLESS = Policy(max_failures=1_000_000, backoff_base=4.0, backoff_cap=4.0)


async def attempts(made: Cluster, planner: Planner, wanted: int) -> None:
    """Until so many attempts have failed, each by an error of its own."""

    def reached() -> bool:
        snapshot = planner.instances["demo"].snapshot
        return snapshot is not None and snapshot.epoch is not None and snapshot.epoch.ordinal > wanted

    await made.until(reached, f"{wanted} attempts", limit=1e6)


def kept() -> Counter[str]:
    gc.collect()
    objects: list[object] = gc.get_objects()
    return Counter(str(type(one)) for one in objects)


async def grown(first: int, last: int) -> tuple[Counter[str], Planner]:
    """How many objects more there are, by type, after the last attempt than after the first."""
    clock = ManualClock()
    store = FakeStore(clock)
    async with cluster(store, clock, 2, settings=FEW) as made, made.planner(policy=ENDLESS) as planner:
        for _ in range(last + 5):
            made.scripts[1].fail("load", "x")
        await made.run(planner.launch(made.spec, wait=False))
        await attempts(made, planner, first)
        before = kept()
        await attempts(made, planner, last)
        return kept() - before, planner


async def test_nothing_is_kept_of_an_attempt() -> None:
    more, _ = await grown(12, 42)
    # Hints of one lease are kept, and there are seldom as many of them at two moments.
    more = more - Counter({str(Hint): FEW.signal_entries * 3, str(tuple): FEW.signal_entries * 3})
    assert not {kind: count for kind, count in more.items() if count >= 30}, "one an attempt"


@pytest.mark.bench
@pytest.mark.parametrize("last", [200, 600, 1_000])
async def test_what_is_kept_after_many_attempts(last: int) -> None:
    more, _ = await grown(50, last)
    print(f"{last} attempts: {more.total():,} objects more than after 50, most of them {more.most_common(3)}")


def test_twenty_thousand_hints_share_their_words() -> None:
    """The most that is held of one instance."""
    fields = {
        b"kind": b"report",
        b"rank": b"3",
        b"epoch": b"1795776931179-c3d619c4f5f8b52dc6b66a427d0a01f4",
        b"inc": b"01a21ca561d397fc637ada2c9cab",
        b"status": b"Connected",
    }
    first, second = (decode_hint(b"1-%d" % n, fields) for n in range(2))
    assert first.epoch is second.epoch
    assert first.incarnation is second.incarnation
    assert first.status is second.status
    assert first.kind is second.kind

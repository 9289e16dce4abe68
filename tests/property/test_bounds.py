"""What is bounded whoever writes: the streams when only a planner writes, and what an outage of the store may cost."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from barrier import Settings
from barrier.testing import FakeStore, ManualClock
from tests.unit.barrier.group import started_group
from tests.unit.planner.cluster import cluster

pytestmark = pytest.mark.anyio

CAPPED = Settings(log_entries=20, signal_entries=20, event_entries=20)
LEASE = Settings().lease


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> Generator[FakeStore]:
    made = FakeStore(clock)
    yield made
    assert made.keys_without_lifetime() == []


async def test_a_planner_whose_ranks_say_nothing_new_keeps_every_stream_within_its_cap(store: FakeStore) -> None:
    """Ranks trim the streams that they write to as well; ranks that hang do not."""
    async with started_group(store, 2, settings=CAPPED) as group:
        for _ in range(150):
            await group.conclude(await group.open())
        contents = store.contents()
        assert len(contents[group.keys.tasks]) <= 20
        for stream in (group.keys.signals, group.keys.events):
            assert len(contents[stream]) <= 200, f"{stream}: capped approximately, as real servers do"


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("seconds", [LEASE * 1.2, LEASE * 3])
async def test_an_outage_costs_no_attempt_although_ranks_find_back_one_after_another(
    store: FakeStore, clock: ManualClock, late: int, seconds: float
) -> None:
    """By the leases one rank alone would be to blame, right after the outage; it has one more lease to say that it lives."""
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        names = [f"demo rank {1 - late}", "planner", f"demo rank {late}"]
        for name in names:
            store.partition(name)
        await clock.advance(seconds)
        for name in names:  # the first is back before the planner looks, the last most of a lease later
            store.heal(name)
            await clock.advance(LEASE * 0.4)
        await clock.advance(LEASE * 2)
        assert made.verdicts() == []
        assert instance.state.serving
        assert made.loads_per_epoch() == [1]

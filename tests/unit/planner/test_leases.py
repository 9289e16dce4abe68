"""Leases that differ between the sides: both work, the difference is told once, and a verdict names the rank's own."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from loguru import logger

from barrier import Settings
from barrier.testing import FakeStore, ManualClock
from tests.unit.planner.cluster import cluster

pytestmark = pytest.mark.anyio

RANKS = Settings(lease=3.0, heartbeat=1.0)
PLANNERS = Settings(lease=9.0, heartbeat=3.0)


@pytest.fixture
def warned() -> Generator[list[str]]:
    said: list[str] = []
    sink = logger.add(said.append, level="WARNING", format="{message}")
    yield said
    logger.remove(sink)


async def test_a_verdict_names_the_ranks_own_lease_and_the_difference_is_told_once(
    store: FakeStore, clock: ManualClock, warned: list[str]
) -> None:
    async with cluster(store, clock, 2, settings=RANKS) as made, made.planner(settings=PLANNERS) as planner:
        instance = await made.run(planner.launch(made.spec))
        await made.run(instance.ready(), limit=600)
        told = [line for line in warned if "has a lease of 3 s" in line]
        assert len(told) <= 2, "once for each rank at most, and not at every look"
        everything = "".join(told)
        assert "rank 0 has a lease of 3 s" in everything
        assert "rank 1 has a lease of 3 s" in everything
        assert "and this planner one of 9 s; start all with the same --lease" in everything
        await made.kill(1)
        await made.until(made.verdicts, "the attempt to end")
        assert "rank 1 fell silent: no report for longer than its lease of 3 s" in made.verdicts()[0]


async def test_the_same_lease_is_not_spoken_of(store: FakeStore, clock: ManualClock, warned: list[str]) -> None:
    async with cluster(store, clock, 2, settings=RANKS) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        await made.run(instance.ready(), limit=600)
    assert not [line for line in warned if "lease of" in line]

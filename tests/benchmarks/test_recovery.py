"""Recovery times: `make bench ARGS="-k recovery"`, or `-k "recovery and quick"` for a first impression.

Asserted is that everybody recovers, as often as it is tried; what the times come to, and whether they keep the bounds, is said at the
end.
"""

from __future__ import annotations

import pytest

from tests.benchmarks.recovery import (
    RecoveryFigures,
    measure_killed_planners,
    measure_lost_data,
    measure_reported_failures,
    measure_silent_deaths,
)
from tests.benchmarks.results import Results

pytestmark = [pytest.mark.bench, pytest.mark.anyio]

TRIALS = {"full": 50, "quick": 5}
SEED = 20_260_723


def add(results: Results, figures: RecoveryFigures, scale: str) -> None:
    results.scale = scale
    assert len(figures.times.seconds) == TRIALS[scale]
    results.recoveries.append(figures)


async def test_recovery_from_a_reported_failure(results: Results, scale: str) -> None:
    add(results, await measure_reported_failures(trials=TRIALS[scale]), scale)


async def test_recovery_from_a_silent_death(results: Results, scale: str) -> None:
    add(results, await measure_silent_deaths(trials=TRIALS[scale], seed=SEED), scale)


async def test_recovery_from_a_server_that_forgot_everything(results: Results, scale: str) -> None:
    add(results, await measure_lost_data(trials=TRIALS[scale], seed=SEED), scale)


async def test_recovery_from_a_killed_planner(results: Results, scale: str) -> None:
    add(results, await measure_killed_planners(trials=TRIALS[scale], seed=SEED), scale)

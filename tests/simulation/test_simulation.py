"""Histories of the real code under faults, each decided by a seed: ``make simulate SEED=7`` replays one and prints it."""

from __future__ import annotations

import pytest

from tests.simulation.world import simulate


@pytest.mark.parametrize("seed", range(6))
def test_a_history_without_faults_serves(seed: int) -> None:
    simulate(seed, faults=0)


@pytest.mark.parametrize("seed", range(100, 108))
def test_no_guarantee_breaks_in_a_history_with_faults(seed: int) -> None:
    simulate(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1_000, 1_060))
def test_no_guarantee_breaks_in_many_histories_with_faults(seed: int) -> None:
    simulate(seed)


def test_one_seed_gives_one_history() -> None:
    assert simulate(7).engines.log == simulate(7).engines.log

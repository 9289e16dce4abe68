"""Histories of the real code under faults, drawn by a seed: ``make simulate SEED=7`` plays one and prints it.

A seed mostly gives the same history again, but not always: sets of tasks are ordered by address.
"""

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

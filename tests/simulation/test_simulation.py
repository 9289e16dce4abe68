"""Histories of the real code under faults that a seed chooses: ``make simulate SEED=7`` plays one and prints it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.batch import Tally, play, play_all
from tests.simulation.world import LONG, simulate

ROOT = Path(__file__).parents[2]


def passed(tally: Tally) -> None:
    assert not tally.breaches, "\n".join(tally.breaches.values())


@pytest.mark.parametrize("seed", range(4))
def test_a_history_without_faults_serves_in_one_bring_up_or_in_those_that_engine_failures_cost(seed: int) -> None:
    world = simulate(seed, faults=0)
    failures = sum(" fails" in line for line in world.oracle.log)
    assert world.bring_ups <= 1 + failures
    assert not world.injected


def test_no_guarantee_breaks_in_a_few_histories_with_faults() -> None:
    tally = play(1_000, 1_020)
    passed(tally)
    assert tally.faults.total() > 20
    assert tally.checked > 5, "the independent checker must have had something to judge"


@pytest.mark.slow
def test_a_seed_gives_the_same_history_to_the_last_byte_in_any_process() -> None:
    """Whatever else a process has done, and however it hashes texts."""
    printed = [
        subprocess.run(
            [sys.executable, "-m", "tests.simulation", "0", "20", "--print"],
            cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, check=True,
        ).stdout
        for hash_seed in ("1", "77")
    ]  # fmt: skip
    assert printed[0] == printed[1]
    assert printed[0].count(b" steps in ") == 20


def test_a_seed_alone_gives_the_same_history_as_among_others() -> None:
    among_others = [simulate(seed) for seed in range(40, 44)][-1]
    alone = simulate(43)
    assert (alone.oracle.log, alone.history, alone.steps) == (
        among_others.oracle.log, among_others.history, among_others.steps,
    )  # fmt: skip


@pytest.mark.slow
def test_no_guarantee_breaks_in_five_thousand_histories_with_faults() -> None:
    total = Tally()
    for tally in play_all(10_000, 15_000):
        total.add(tally)
    print(total)
    passed(total)
    assert total.histories == 5_000
    assert len(total.faults) == 13, "every kind of fault must have come"


@pytest.mark.slow
def test_no_guarantee_breaks_in_long_histories() -> None:
    passed(play(500, 530, long=True))


def test_a_world_of_eight_ranks_and_ten_faults_is_among_the_long_ones() -> None:
    assert max(LONG.sizes) == 8
    assert LONG.most_faults == 10

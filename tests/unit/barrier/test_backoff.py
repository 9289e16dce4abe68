from __future__ import annotations

import random

import pytest

from barrier.backoff import Backoff


def test_each_pause_is_twice_as_long_up_to_the_limit() -> None:
    backoff = Backoff(0.5, 3.0)
    assert [backoff.next_pause() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_after_a_success_it_begins_with_the_first_pause() -> None:
    backoff = Backoff(0.5, 3.0)
    assert not backoff.failing
    backoff.next_pause()
    backoff.next_pause()
    assert backoff.failing
    backoff.reset()
    assert not backoff.failing
    assert backoff.next_pause() == 0.5


def test_a_first_pause_above_the_limit_is_the_limit() -> None:
    assert Backoff(5.0, 1.0).next_pause() == 1.0


@pytest.mark.parametrize("seed", range(20))
def test_chance_shortens_a_pause_to_half_at_most_and_not_the_ones_after_it(seed: int) -> None:
    backoff, exact = Backoff(0.1, 2.0, rng=random.Random(seed)), Backoff(0.1, 2.0)
    pauses = [(backoff.next_pause(), exact.next_pause()) for _ in range(8)]
    assert all(whole / 2 <= pause <= whole for pause, whole in pauses)
    assert len({pause / whole for pause, whole in pauses}) > 4

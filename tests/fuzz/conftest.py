"""Fixtures: a clock that stands still, and a check that no test leaves a key in the store."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from barrier.testing import FakeStore, ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> Generator[FakeStore]:
    fake = FakeStore(clock)
    yield fake
    assert fake.keys_without_lifetime() == [], "every key of ours has a lifetime, whatever happened"

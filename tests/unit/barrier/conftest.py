"""A clock that stands still, a store that nobody leaves a key behind in, and a group of three scripted ranks."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncGenerator, Generator

import pytest
from hypothesis import settings

from barrier.testing import FakeStore, ManualClock
from tests.unit.barrier.group import Group, started_group

settings.register_profile("rankgate", deadline=None)  # a busy machine must not fail a test
settings.load_profile("rankgate")

_PATIENCE = 60  # seconds; the slowest test takes two, and the machine may be busy


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give every coroutine test an end: with time standing still, whoever waits for what never comes waits for ever."""
    if not isinstance(item, pytest.Function) or not inspect.iscoroutinefunction(item.obj):
        return
    test = item.obj

    @functools.wraps(test)
    async def bounded(**arguments: object) -> None:
        async with asyncio.timeout(_PATIENCE):
            await test(**arguments)

    item.obj = bounded


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> Generator[FakeStore]:
    fake = FakeStore(clock)
    yield fake
    assert fake.keys_without_lifetime() == [], "every key of ours has a lifetime, whatever happened"


@pytest.fixture
async def group(store: FakeStore) -> AsyncGenerator[Group]:
    """Three ranks that have said hello, and a planner that leads."""
    async with started_group(store, 3) as made:
        yield made

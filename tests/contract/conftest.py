"""The places on which the contract holds: the store in memory, Valkey from the wheel, and Debian's Redis."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import pytest
from redis.asyncio import Redis

from barrier.testing import FakeStore, FaultPlan
from tests.integration.servers import RealServer

PLACES = ["fake", "valkey", pytest.param("redis", marks=pytest.mark.redis)]
REAL_PLACES = PLACES[1:]


@dataclass
class Place:
    """Somewhere to run the same calls."""

    name: str
    fake: FakeStore | None = None
    server: RealServer | None = None

    def client(self, faults: FaultPlan | None = None) -> Redis:
        """A client, which whoever asked for it closes."""
        if self.fake is not None:
            return self.fake.client(faults=faults)
        assert self.server is not None
        untyped: Any = Redis
        plain: Redis = untyped.from_url(self.server.url)
        return plain if faults is None else faults.wrap(plain)


@pytest.fixture(params=PLACES)
async def place(request: pytest.FixtureRequest) -> AsyncGenerator[Place]:
    """An empty store of each kind, all of them in the machine's time."""
    if request.param == "fake":
        yield Place("fake", fake=FakeStore())
        return
    async with RealServer(kind=request.param) as server:
        yield Place(request.param, server=server)


@pytest.fixture(params=REAL_PLACES)
def kind(request: pytest.FixtureRequest) -> Any:
    """A kind of real server, for what may be claimed of those only."""
    return request.param

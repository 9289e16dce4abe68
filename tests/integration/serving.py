"""A serving instance of four runner processes and two planner processes, and how long it takes until it serves again."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from barrier import Barrier, Settings, Store, StoreError, SystemClock
from barrier.store.keys import Keys
from barrier.testing import wait_until
from planner import InstanceSpec, ModelSpec
from planner.explain import is_serving
from planner.registry import Registry
from planner.requests import GenerationFailed, RequestQueue
from tests.integration.cluster import Cluster, Process, connected

NAME, RANKS = "demo", 4
START_SECONDS = 90.0
TEXT_SECONDS = 4.0
QUICK = {"connect_seconds": 0.02, "layer_seconds": 0.002, "warmup_seconds": 0.005, "token_seconds": 0.001}


@dataclass
class World:
    """A serving instance, and a client that goes by the same URL."""

    store: Store
    barrier: Barrier
    processes: list[Process]
    cluster: Cluster

    @property
    def within(self) -> float:
        """How soon it must serve again, in seconds."""
        return 3 * self.cluster.settings.lease

    async def text(self) -> str:
        client = RequestQueue(self.store, Keys("rankgate", NAME), SystemClock())
        seconds = min(TEXT_SECONDS, self.cluster.settings.lease)
        return "".join([piece async for piece in client.generate("hello", max_tokens=4, seconds=seconds)])

    async def serves(self) -> bool:
        try:
            return is_serving(await self.barrier.inspect()) and bool(await self.text())
        except (StoreError, GenerationFailed):
            return False

    async def attempts(self) -> int:
        """How many there have been."""
        epoch = (await self.barrier.inspect()).epoch
        assert epoch is not None
        return epoch.ordinal

    async def seconds_until_it_serves(self, kind: str) -> float:
        """From now on; everybody is still there, and every rank lives in the process that it had."""
        began = time.monotonic()
        await wait_until(self.serves, f"the instance to serve after {kind}", self.within + START_SECONDS)
        took = time.monotonic() - began
        print(f"FIGURE {kind}: serves again after {took:.1f} s", flush=True)
        assert [one.name for one in self.processes if not one.running] == [], self.cluster.logs()
        ranks = (await self.barrier.inspect()).ranks
        assert [view.report.pid for view in ranks if view.report] == [one.pid for one in self.processes[:RANKS]]
        assert took <= self.within, self.cluster.logs()
        return took


@asynccontextmanager
async def serving(url: str, folder: Path, settings: Settings) -> AsyncGenerator[World]:
    """Four runner processes, two planner processes, and the instance serves."""
    async with Cluster(url, folder, settings) as cluster, connected(url, settings) as store:
        barrier = Barrier(store, NAME, world_size=RANKS)
        processes = await cluster.runners(NAME, RANKS, QUICK, wait_for_store=START_SECONDS)
        await Registry(store, "rankgate").launch(
            InstanceSpec(name=NAME, world_size=RANKS, model=ModelSpec(model_id="simulated", total_layers=4))
        )
        processes += [await cluster.planner(wait_for_store=START_SECONDS) for _ in range(2)]
        world = World(store, barrier, processes, cluster)
        try:
            await wait_until(world.serves, "the instance to serve", START_SECONDS)
            yield world
        finally:
            await barrier.close()
            print(cluster.logs())  # shown where the test failed

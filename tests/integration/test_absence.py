"""A rank that is away for eight times as long as is usual, on a real server: nothing is given up, and it is taken up by itself."""

from __future__ import annotations

import asyncio

import pytest

from barrier import Member, Settings, connect
from barrier.testing import wait_until
from planner import InstanceSpec, Planner, Policy
from runner import InlineHost, Runner
from runner.engines.simulated import SimulatedConfig, SimulatedEngine
from tests.integration.servers import RealServer

pytestmark = pytest.mark.anyio

SETTINGS = Settings(lease=1.5, heartbeat=0.5)


@pytest.mark.slow
async def test_a_node_that_is_away_for_eight_limits_is_waited_for() -> None:
    async with RealServer() as server:
        store = await connect(server.url, settings=SETTINGS)
        tasks: list[asyncio.Task[None]] = []

        def start(rank: int) -> Runner:
            runner = Runner(Member(store, "demo", rank=rank), InlineHost(lambda: SimulatedEngine(SimulatedConfig())))
            tasks.append(asyncio.create_task(runner.run(), name=f"rank {rank}"))
            return runner

        kept, away = start(0), start(1)
        # No failure is allowed: an absence is none.
        async with Planner(store, policy=Policy(assemble_timeout=0.25, max_failures=0)) as planner:
            instance = await planner.launch(InstanceSpec(name="demo", world_size=2), timeout=60)
            away.stop()
            await wait_until(lambda: "rank 1 did not come within 2 s" in instance.state.reason, "eight limits", 60)
            assert instance.state.reason.startswith("the last attempt ended: rank 1 left: ")
            back = start(1)
            await wait_until(lambda: instance.state.serving, "the instance to be taken up", 60)
            assert "".join([piece async for piece in instance.generate("Why?", max_tokens=4)])
        assert kept.status.kind == "Ready", "who was here all the time is the same process"
        for runner in (kept, back):
            runner.stop()
        await asyncio.gather(*tasks)
        await store.close()

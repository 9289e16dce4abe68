"""Which engines meet, with real runner processes and simulated engines that really connect; and engines that stop moving.

``ROUNDS`` is how often the first story is told.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from barrier import Member, Settings, Store
from barrier.testing import wait_until
from planner import Instance, InstanceSpec, Planner, Policy
from runner import ProcessHost, Runner
from runner.engines.simulated import SimulatedConfig, simulated_spec
from runner.messages import ModelSpec
from tests.integration.cluster import Cluster, Process, connected
from tests.integration.rings import engine_in_ring, is_alive, neighbours, serves_with
from tests.integration.servers import RealServer

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

ROUNDS = int(os.environ.get("ROUNDS") or 2)
SETTINGS = Settings(lease=3.0, heartbeat=0.5)
SECONDS = 120.0
"""How long anything may take; a bound for hangs, not a measure."""
STALL = 5.0
PATIENT = Policy(backoff_base=0.05, backoff_cap=0.2, max_failures=50)
SHORT = Policy(
    backoff_base=0.05,
    backoff_cap=0.2,
    max_failures=50,
    connect_stall=STALL,
    load_stall=STALL,
    warmup_stall=STALL,
    generate_stall=STALL,
)


@pytest.fixture
async def server() -> AsyncGenerator[RealServer]:
    async with RealServer() as running:
        yield running


@pytest.fixture
async def store(server: RealServer) -> AsyncGenerator[Store]:
    async with connected(server.url, SETTINGS) as made:
        yield made


@pytest.fixture
async def cluster(server: RealServer, tmp_path: Path) -> AsyncGenerator[Cluster]:
    async with Cluster(server.url, tmp_path, SETTINGS) as made:
        yield made
        print(made.logs())  # shown where the test failed


def spec(layers: int = 4) -> InstanceSpec:
    return InstanceSpec(name="demo", world_size=2, model=ModelSpec(model_id="toy", total_layers=layers))


async def test_the_engine_of_a_runner_that_was_stopped_is_never_met_again(cluster: Cluster, store: Store) -> None:
    """Runner 1 is stopped, and its engine lives on. Rank 0's engine is killed. A new runner takes rank 1, and the instance comes up."""

    async def runner(rank: int) -> Process:
        return await cluster.runner("demo", rank, 2)

    first, second = [await runner(rank) for rank in range(2)]
    async with Planner(store, policy=PATIENT, rng=random.Random(1)) as planner:
        instance = await planner.launch(spec(), wait=False)
        await instance.ready(SECONDS)
        for _ in range(ROUNDS):
            leader, left_over = engine_in_ring(first), engine_in_ring(second)
            os.kill(second.pid, signal.SIGSTOP)
            leader.kill()
            replacement = await runner(1)
            now = [first, replacement]
            await wait_until(lambda now=now: serves_with(instance, now), "the replacement to serve", SECONDS)
            assert is_alive(left_over), "the engine of the earlier attempt was there all the time"
            assert neighbours(engine_in_ring(first)) == {engine_in_ring(replacement).pid}
            os.kill(second.pid, signal.SIGCONT)
            await wait_until(lambda gone=second: not gone.running, "the runner that lost its rank to leave", SECONDS)
            await wait_until(lambda gone=left_over: not is_alive(gone), "its engine to be gone", SECONDS)
            second = replacement
        await instance.stop()
    print(f"{ROUNDS} of {ROUNDS} rounds with an engine that was left over: it was never met")


# --- engines that stop moving ---------------------------------------------------------------------------------------------


@asynccontextmanager
async def ranks(store: Store, **config: Any) -> AsyncGenerator[list[tuple[Runner, ProcessHost]]]:
    """Two runners in this process, each with its engine in a process of its own."""
    async with AsyncExitStack() as stack:
        made: list[tuple[Runner, ProcessHost]] = []
        for rank in range(2):
            member = Member(store, "demo", rank=rank, world_size=2)
            host = ProcessHost(simulated_spec(SimulatedConfig(**config)), rank=rank, output_is_safe=True)
            stack.push_async_callback(host.shut_down)
            runner = Runner(member, host)
            running = asyncio.create_task(runner.run())
            stack.push_async_callback(_leave, runner, running)
            made.append((runner, host))
        yield made


async def _leave(runner: Runner, running: asyncio.Task[None]) -> None:
    runner.stop()
    await running


def attempt_of(instance: Instance) -> int:
    snapshot = instance.state.snapshot
    return snapshot.epoch.ordinal if snapshot is not None and snapshot.epoch is not None else 0


PHASES = {
    "Connecting": {"connect_seconds": 2.0},
    "Loading": {"layer_seconds": 1.0},
    "WarmingUp": {"warmup_seconds": 2.0},
    "Running": {"token_seconds": 0.5},
}


@pytest.mark.parametrize("status", PHASES)
@pytest.mark.parametrize("rank", [0, 1])
async def test_an_engine_that_is_stopped_is_noticed_within_its_stall_whatever_the_others_do(
    store: Store, status: str, rank: int
) -> None:
    async with ranks(store, **PHASES[status]) as made, Planner(store, policy=SHORT) as planner:
        runner, host = made[rank]
        instance = await planner.launch(spec(), wait=False)
        texts: asyncio.Task[list[str]] | None = None
        if status == "Running":
            await instance.ready(SECONDS)
            texts = asyncio.create_task(_text(instance))
        await wait_until(lambda: runner.status.kind == status, status, SECONDS)
        pid, attempt = host.pid, attempt_of(instance)
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        stopped = time.monotonic()
        await wait_until(lambda: runner.status.kind != status or attempt_of(instance) > attempt, "its end", SECONDS)
        noticed = time.monotonic() - stopped
        print(f"{status}, rank {rank}: noticed {noticed:.1f} s after the stop; the stall is {STALL:g} s")
        await wait_until(
            lambda: instance.state.serving and attempt_of(instance) > attempt, "it to serve again", SECONDS
        )
        assert not psutil.pid_exists(pid)
        if texts is not None:
            await asyncio.wait({texts}, timeout=SECONDS)
            assert texts.exception() is not None, "the text that was under way ends with an error"
        await instance.stop()


async def _text(instance: Instance) -> list[str]:
    return [piece async for piece in instance.generate("Hello", max_tokens=60, timeout=SECONDS)]


async def test_a_slow_load_that_moves_outlives_the_stall(store: Store) -> None:
    """Four layers of 3 s each, where nothing may stand still for 5 s."""
    async with ranks(store, layer_seconds=3.0, jitter=0.0), Planner(store, policy=SHORT) as planner:
        instance = await planner.launch(spec(), wait=False)
        await instance.ready(SECONDS)
        assert attempt_of(instance) == 1
        await instance.stop()

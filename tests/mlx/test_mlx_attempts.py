"""Whom MLX engines meet: two instances on one machine, engines that are killed, an engine that is left over from an earlier attempt.

MLX's ring takes whoever comes to its port. So what is compared is the text: with that of one process, at temperature 0; the models differ,
so that a rank of the other one would show.

``ROUNDS`` is how often each story is told; `make test-mlx` tells it once or twice, `make test-mlx-rounds` as often as it says.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path

import psutil
import pytest

from barrier import Settings, Store
from barrier.testing import FakeStore, wait_until
from planner import Instance, InstanceSpec, Planner, Policy
from runner.messages import ModelSpec
from tests.integration.cluster import Cluster, Process, connected
from tests.integration.rings import engine_in_ring, is_alive, neighbours, serves_with
from tests.integration.servers import RealServer
from tests.mlx.ranks import Ranks, ranks_of
from tests.mlx.tiny import LAYERS, make_model, reference_text

pytestmark = [pytest.mark.anyio, pytest.mark.mlx]

ROUNDS = int(os.environ.get("ROUNDS") or 2)
SEED = int(os.environ.get("SEED") or 1)
PROMPT = "word17 word4 word8"
TOKENS = 16
MLX = "runner.engines.mlx:mlx_engine"
POLICY = Policy(backoff_base=0.05, backoff_cap=0.2, max_failures=50)
SETTINGS = Settings(lease=6.0, heartbeat=1.0)
SECONDS = 180.0
"""How long anything may take; a bound for hangs, not a measure."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model for each instance, with other weights."""
    place = tmp_path_factory.mktemp("models")
    return {name: make_model(place / name, seed=seed) for name, seed in (("one", 7), ("other", 8))}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, str]:
    texts = {name: reference_text(folder, PROMPT, TOKENS) for name, folder in folders.items()}
    assert len(set(texts.values())) == len(texts)
    return texts


def spec(name: str, folder: Path) -> InstanceSpec:
    return InstanceSpec(name=name, world_size=2, model=ModelSpec(model_id=str(folder), total_layers=LAYERS))


async def text_of(instance: Instance) -> str:
    return "".join([piece async for piece in instance.generate(PROMPT, max_tokens=TOKENS, timeout=SECONDS)])


async def texts_of(instances: dict[str, Instance]) -> dict[str, str]:
    return dict(zip(instances, await asyncio.gather(*map(text_of, instances.values())), strict=True))


async def test_two_instances_on_one_machine_serve_each_its_own_text(
    folders: dict[str, Path], expected: dict[str, str]
) -> None:
    store = FakeStore()
    async with AsyncExitStack() as stack:
        for name in folders:
            await stack.enter_async_context(ranks_of(2, name=name, store=store))
        planner = await stack.enter_async_context(Planner(store.client("planner"), policy=POLICY))
        right = 0
        for _ in range(ROUNDS):
            launched = await asyncio.gather(*(planner.launch(spec(name, folder)) for name, folder in folders.items()))
            instances = dict(zip(folders, launched, strict=True))
            right += await texts_of(instances) == expected
            await asyncio.gather(*(instance.stop() for instance in launched))
        assert right == ROUNDS
    print(f"{right} of {ROUNDS} bring-ups of two instances served the right texts")


async def test_two_instances_serve_their_own_text_after_any_of_their_engines_is_killed(
    folders: dict[str, Path], expected: dict[str, str]
) -> None:
    """One engine is killed, and sometimes another one while the instances come up again; spares stand by, as they do in production."""
    rng = random.Random(SEED)
    store = FakeStore()
    async with AsyncExitStack() as stack:
        ranks: dict[str, Ranks] = {}
        for name in folders:
            ranks[name] = await stack.enter_async_context(ranks_of(2, name=name, store=store, spares=True))
        planner = await stack.enter_async_context(
            Planner(store.client("planner"), policy=POLICY, rng=random.Random(SEED))
        )
        launched = await asyncio.gather(*(planner.launch(spec(name, folder)) for name, folder in folders.items()))
        instances = dict(zip(folders, launched, strict=True))
        right = 0
        for _ in range(ROUNDS):
            victims = [name for name in folders if rng.random() < 0.7] or [rng.choice(list(folders))]
            attempts = {name: ranks[name].dispatched().count("ConnectToGroup") for name in victims}
            for name in victims:
                _kill_engine(ranks[name], rng.randrange(2))
            await asyncio.gather(*(_tried_again(ranks[name], attempts[name]) for name in victims))
            if rng.random() < 0.5:
                await asyncio.sleep(
                    rng.random() * 0.5
                )  # anywhere in the bring-up, or just after it: it may serve already
                again = ranks[rng.choice(victims)]
                before = again.dispatched().count("ConnectToGroup")
                if _kill_engine(again, rng.randrange(2)):
                    await _tried_again(again, before)
            await asyncio.gather(*(_served(ranks[name], instances[name]) for name in folders))
            right += await texts_of(instances) == expected
        assert right == ROUNDS
    print(f"{right} of {ROUNDS} rounds of killed engines (SEED={SEED}) served the right texts")


def _kill_engine(ranks: Ranks, rank: int) -> bool:
    """Kill the engine of a rank; whether there was one."""
    pid = ranks.hosts[rank].pid
    if pid is not None:
        psutil.Process(pid).kill()
    return pid is not None


async def _tried_again(ranks: Ranks, attempts: int) -> None:
    await wait_until(
        lambda: ranks.dispatched().count("ConnectToGroup") > attempts, f"the next attempt of {ranks.name}", SECONDS
    )


async def _served(ranks: Ranks, instance: Instance) -> None:
    """Wait until the instance serves, and its ranks have heard of every death."""
    await wait_until(
        lambda: ranks.statuses == ["Ready"] * 2 and instance.state.serving, f"{ranks.name} to serve again", SECONDS
    )


@pytest.fixture
async def server() -> AsyncGenerator[RealServer]:
    async with RealServer() as running:
        yield running


@pytest.fixture
async def cluster(server: RealServer, tmp_path: Path) -> AsyncGenerator[Cluster]:
    async with Cluster(server.url, tmp_path, SETTINGS) as made:
        yield made
        print(made.logs())  # shown where the test failed


@pytest.fixture
async def store(server: RealServer) -> AsyncGenerator[Store]:
    async with connected(server.url, SETTINGS) as made:
        yield made


async def test_the_engine_of_a_runner_that_was_stopped_is_never_met_again(
    cluster: Cluster, store: Store, folders: dict[str, Path], expected: dict[str, str]
) -> None:
    """Runner 1 is stopped, and its engine lives on. Rank 0's engine is killed. A new runner takes rank 1, and the instance comes up."""

    async def runner(rank: int) -> Process:
        return await cluster.runner("one", rank, 2, factory=MLX)

    first, second = [await runner(rank) for rank in range(2)]
    async with Planner(store, policy=POLICY, rng=random.Random(SEED)) as planner:
        instance = await planner.launch(spec("one", folders["one"]), wait=False)
        await instance.ready(SECONDS)
        assert await text_of(instance) == expected["one"]
        right = 0
        for _ in range(ROUNDS):
            leader, left_over = engine_in_ring(first), engine_in_ring(second)
            os.kill(second.pid, signal.SIGSTOP)
            leader.kill()
            replacement = await runner(1)
            now = [first, replacement]
            await wait_until(lambda now=now: serves_with(instance, now), "the replacement to serve", SECONDS)
            assert is_alive(left_over), "the engine of the earlier attempt was there all the time"
            met = neighbours(engine_in_ring(first))
            assert met == {engine_in_ring(replacement).pid}
            assert await text_of(instance) == expected["one"]
            # It comes back, finds that it has lost its rank, and changes nothing.
            os.kill(second.pid, signal.SIGCONT)
            await wait_until(lambda gone=second: not gone.running, "the runner that lost its rank to leave", SECONDS)
            await wait_until(lambda gone=left_over: not is_alive(gone), "its engine to be gone", SECONDS)
            right += await text_of(instance) == expected["one"]
            second = replacement
        assert right == ROUNDS
        await instance.stop()
    print(f"{right} of {ROUNDS} rounds with an engine that was left over served the right text, and it was never met")

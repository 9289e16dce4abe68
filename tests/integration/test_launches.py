"""Instances come up, with every rank a real process, on a real Valkey; and nothing is left behind."""

from __future__ import annotations

import faulthandler
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path

import psutil
import pytest

from barrier import Settings, Store
from barrier.store.keys import Keys
from barrier.testing import wait_until
from planner import InstanceSpec, ModelSpec, Planner, Policy
from planner.history import EpochOpened, History, find_breaches, read_history, timeline
from planner.registry import Registry
from runner.engines.simulated import MARK
from tests.integration.cluster import (
    Cluster,
    all_keys,
    connected,
    descendants,
    keys_without_lifetime,
    load_models_in_log,
    still_there,
    stopped,
)
from tests.integration.servers import RealServer

pytestmark = pytest.mark.anyio

SETTINGS = Settings(lease=6.0, heartbeat=1.0)
POLICY = Policy(assemble_timeout=60.0)
MODEL = ModelSpec(model_id="simulated", total_layers=4)
QUICK = {"connect_seconds": 0.02, "layer_seconds": 0.002, "warmup_seconds": 0.005, "token_seconds": 0.001}


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


async def check_launch(store: Store, name: str, cluster: Cluster) -> History:
    """One attempt, one LoadModel, no rejection, no breach, and a history without a hole."""
    keys = Keys("rankgate", name)
    history = await read_history(store, keys)
    assert find_breaches(history) == [], cluster.logs()
    # A report that was cancelled under way may have been written: then its events come again, and say so.
    assert {oddity.kind for oddity in history.oddities} <= {"repeated"}
    attempts = [event for event in history.events if isinstance(event, EpochOpened)]
    assert len(attempts) == 1, cluster.logs()
    line = timeline(history)
    assert line.rejections == {}
    assert line.dispatches["LoadModel"] == 1
    assert len(await load_models_in_log(store, keys.tasks)) == 1
    assert line.release is not None
    assert line.release >= 0
    return history


# --- world sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "each"),
    [
        (1, 1),
        (2, 1),
        pytest.param(8, 1, marks=pytest.mark.slow),
        pytest.param(64, 16, marks=pytest.mark.slow),  # ranks as tasks, 16 in each of 4 processes
    ],
)
async def test_a_world_reaches_ready_and_generates(
    cluster: Cluster, store: Store, server: RealServer, world_size: int, each: int
) -> None:
    for first in range(0, world_size, each):
        await cluster.runner("world", first if each == 1 else range(first, first + each), world_size, QUICK)
    async with Planner(store, policy=POLICY) as planner:
        instance = await planner.launch(InstanceSpec(name="world", world_size=world_size, model=MODEL), timeout=90)
        seen = descendants(without={server.pid})
        text = "".join([piece async for piece in instance.generate("hello", max_tokens=5)])
        snapshot = await instance.inspect()
        await instance.stop()

    assert text.startswith(MARK)
    processes = {process.pid for process in cluster.processes}
    assert {view.report.pid for view in snapshot.ranks if view.report} == processes
    assert await stopped(cluster.processes) == [0] * len(processes)
    history = await check_launch(store, "world", cluster)
    assert timeline(history).dispatches["TextGeneration"] == 1
    assert len(seen) >= len(processes)
    assert still_there(seen) == []
    assert await keys_without_lifetime(store) == []


async def test_a_history_that_was_cut_says_so_and_accuses_nobody(server: RealServer, tmp_path: Path) -> None:
    """The server trims whole nodes, about 100 entries; a stream that is capped at 10 loses its oldest ones soon."""
    settings = Settings(lease=SETTINGS.lease, heartbeat=SETTINGS.heartbeat, event_entries=10)
    async with Cluster(server.url, tmp_path, SETTINGS) as cluster, connected(server.url, settings) as store:
        await cluster.runner("cut", range(2), 2, QUICK)
        async with Planner(store, policy=POLICY) as planner:
            instance = await planner.launch(InstanceSpec(name="cut", world_size=2, model=MODEL), timeout=90)
            history = History("cut", ())
            for _ in range(40):
                async for _ in instance.generate("hello", max_tokens=1):
                    pass
                history = await read_history(store, Keys("rankgate", "cut"))
                if history.oddities:
                    break
            await instance.stop()

    assert "trimmed" in {oddity.kind for oddity in history.oddities}
    assert find_breaches(history) == []


# --- one after another ----------------------------------------------------------------------------------------------------


async def launch_many(cluster: Cluster, store: Store, server: RealServer, launches: int, seed: int) -> Counter[int]:
    """Launch, check, stop, again and again. The ranks of every launch are new processes.

    In every other launch they are started from nothing, with an engine in a process of its own for each; in the others they are forked
    from a warm process, with the engine inside, which costs a tenth of the time.
    """
    print(f"seed {seed}")
    rng = random.Random(seed)
    sizes: Counter[int] = Counter()
    skews: list[int] = []
    releases: list[int] = []
    seen: set[psutil.Process] = set()
    began = time.monotonic()
    async with Planner(store, policy=POLICY) as planner:
        for number in range(launches):
            name, world_size = f"launch-{number}", rng.randint(2, 4)
            sizes[world_size] += 1
            engine = {
                "seed": rng.randrange(1_000_000),
                "connect_seconds": rng.choice([0.0, 0.02, 0.1]),
                "layer_seconds": rng.choice([0.0, 0.005]),
                "warmup_seconds": rng.choice([0.0, 0.02]),
                "token_seconds": 0.0,
                "jitter": 1.0,  # every rank has delays of its own, from nothing to twice the mean
            }
            own = number % 2 == 1
            processes = await cluster.runners(name, world_size, engine, inline=not own, warm=not own)
            instance = await planner.launch(InstanceSpec(name=name, world_size=world_size, model=MODEL), timeout=90)
            seen |= descendants(without={server.pid, cluster.nursery_pid})
            if number % 4 == 0:
                assert "".join([piece async for piece in instance.generate("hello", max_tokens=3)]).startswith(MARK)
            assert await keys_without_lifetime(store) == []
            await instance.stop()
            assert await stopped(processes) == [0] * world_size, cluster.logs()
            line = timeline(await check_launch(store, name, cluster))
            skews.append(line.skew or 0)
            releases.append(line.release or 0)
            cluster.processes.clear()
    seconds = time.monotonic() - began
    print(
        f"{launches} launches in {seconds:.0f} s; world sizes {dict(sizes)}; arrival skew up to {max(skews)} ms; ",
        end="",
    )
    print(f"last arrival to LoadModel: median {sorted(releases)[len(releases) // 2]} ms, longest {max(releases)} ms")
    assert descendants(without={server.pid, cluster.nursery_pid}) == set()
    assert still_there(seen) == []
    # Of a launch that is over, nothing that anybody would count on stays, and what stays has a lifetime.
    left = await all_keys(store)
    assert [key for key in left if ":rank:" in key or ":claims:" in key] == []
    assert {record.desired for record in (await Registry(store, "rankgate").all()).values()} == {"gone"}
    assert await keys_without_lifetime(store) == []
    return sizes


@pytest.mark.slow
async def test_a_few_launches_in_a_row(cluster: Cluster, store: Store, server: RealServer) -> None:
    sizes = await launch_many(cluster, store, server, 8, random.SystemRandom().randrange(1_000_000))

    assert sizes.total() == 8


@pytest.mark.slow
async def test_two_hundred_launches_in_a_row(cluster: Cluster, store: Store, server: RealServer) -> None:
    faulthandler.cancel_dump_traceback_later()  # it takes longer than one test usually may; every launch has its own bound
    sizes = await launch_many(cluster, store, server, 200, random.SystemRandom().randrange(1_000_000))

    assert sizes.total() == 200
    assert set(sizes) == {2, 3, 4}


async def test_nothing_is_dispatched_while_a_rank_is_held_back(cluster: Cluster, store: Store) -> None:
    """The rank that is late is named; LoadModel goes out after its arrival and not before."""
    for rank in range(2):
        await cluster.runner("late", rank, 2, QUICK, inline=True, hold_back={1: 1.5} if rank == 1 else None)
    async with Planner(store, policy=POLICY) as planner:
        instance = await planner.launch(InstanceSpec(name="late", world_size=2, model=MODEL), wait=False)

        async def named() -> bool:
            return "waiting for 1 of 2 ranks: rank 1" in await instance.explain()

        await wait_until(named, "rank 1 to be named", 60)
        assert await load_models_in_log(store, Keys("rankgate", "late").tasks) == []
        await instance.ready(60)
        line = timeline(await check_launch(store, "late", cluster))
        await instance.stop()

    assert line.last_arrival is not None
    assert line.last_arrival[0] == 1
    assert line.skew is not None
    assert line.skew >= 1_400

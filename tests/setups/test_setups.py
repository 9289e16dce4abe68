"""The same suite on every way to set a store up: one server, password, Sentinel, Cluster, TLS, ACL users; Valkey and Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from loguru import logger
from redis.crc import key_slot

from barrier import (
    Already,
    Barrier,
    Dispatched,
    EpochAnnounced,
    Leading,
    LogId,
    Member,
    NotReady,
    Opened,
    Promised,
    Released,
    Restored,
    Settings,
    Store,
    StoreError,
    SystemClock,
    Verdict,
    VerdictAnnounced,
    connect,
)
from barrier.store.keys import Keys
from barrier.store.wakeups import Wakeups
from barrier.testing import ScriptedRank, wait_until
from planner import InstanceSpec, Planner
from planner.history import find_breaches, read_history
from runner import InlineHost, Runner
from runner.engines.simulated import SimulatedConfig, SimulatedEngine
from tests.setups.places import SETUPS, Setup

pytestmark = pytest.mark.anyio

LONG = Settings(lease=60.0, heartbeat=2.0, reader_block=0.5, backstop=1.0)
BRISK = Settings(lease=3.0, heartbeat=0.5, reader_block=1.0, backstop=1.0)
KEYS = Keys("rankgate", "demo")
WORLD_SIZE = 3

PLACES = [
    pytest.param(("one server", "valkey"), id="one-valkey"),
    pytest.param(("one server", "redis"), id="one-redis", marks=pytest.mark.redis),
    pytest.param(("password", "valkey"), id="password-valkey"),
    pytest.param(("sentinel", "valkey"), id="sentinel-valkey", marks=pytest.mark.slow),
    pytest.param(("sentinel", "redis"), id="sentinel-redis", marks=[pytest.mark.slow, pytest.mark.redis]),
    pytest.param(("cluster", "valkey"), id="cluster-valkey", marks=pytest.mark.slow),
    pytest.param(("cluster", "redis"), id="cluster-redis", marks=[pytest.mark.slow, pytest.mark.redis]),
    pytest.param(("tls", "redis"), id="tls-redis", marks=pytest.mark.redis),  # the wheel's Valkey is built without TLS
    pytest.param(("acl", "valkey"), id="acl-valkey"),
    pytest.param(("acl", "redis"), id="acl-redis", marks=pytest.mark.redis),
]


@pytest.fixture(scope="module", params=PLACES)
async def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Setup]:
    """One store a module and setup: forming a cluster takes seconds. `clean` empties it for each test."""
    name, kind = request.param
    async with SETUPS[name](kind, tmp_path_factory.mktemp("setup")) as made:
        yield made


@pytest.fixture(autouse=True)
async def clean(setup: Setup) -> AsyncGenerator[None]:
    await setup.flush()
    yield
    assert await setup.refusals() == [], "somebody tried what its user may not do"


@asynccontextmanager
async def connected(setup: Setup, *roles: str, settings: Settings = LONG) -> AsyncGenerator[list[Store]]:
    async with AsyncExitStack() as stack:
        stores: list[Store] = []
        for role in roles:
            store = await connect(setup.url(role), settings=settings)
            stack.push_async_callback(store.close)
            stores.append(store)
        yield stores


@dataclass
class Group:
    barrier: Barrier
    ranks: list[ScriptedRank]


@asynccontextmanager
async def scripted_group(setup: Setup) -> AsyncGenerator[Group]:
    """A planner that leads and ranks that follow a script, each with its own role's URL."""
    async with AsyncExitStack() as stack:
        planner, *others = await stack.enter_async_context(
            connected(setup, "planner", *(f"rank-{rank}" for rank in range(WORLD_SIZE)))
        )
        barrier = await stack.enter_async_context(
            Barrier(planner, "demo", world_size=WORLD_SIZE, settings=LONG, holder="planner")
        )
        ranks = [
            await stack.enter_async_context(ScriptedRank(store, "demo", rank, settings=LONG))
            for rank, store in enumerate(others)
        ]
        assert isinstance(await barrier.lead(), Leading)
        yield Group(barrier, ranks)


async def test_a_whole_attempt(setup: Setup) -> None:
    """Claim, open, wait, release, dispatch, conclude."""
    async with scripted_group(setup) as group:
        barrier = group.barrier
        opened = await barrier.open()
        assert isinstance(opened, Opened)
        epoch = opened.epoch
        assert await barrier.dispatch(epoch, "load", "{}", "Connected") == NotReady((0, 1, 2))
        release = asyncio.create_task(barrier.release(epoch, "load", "{}", "Connected", timeout=30))
        for rank in group.ranks:
            await rank.arrive("Connected")
        assert await release == Released(epoch, LogId(epoch.number, 2))
        assert await barrier.dispatch(epoch, "load", "{}", "Connected") == Already(LogId(epoch.number, 2))
        for rank in group.ranks:
            assert (await rank.next_task()).step == "load"
            await rank.report("Loaded")
        assert await barrier.wait(epoch, "Loaded", timeout=30) == Released(epoch)
        await barrier.conclude(epoch, Verdict.stopped())
        for rank in group.ranks:
            entry = await rank.next_entry()
            while isinstance(entry, EpochAnnounced):
                entry = await rank.next_entry()
            assert entry == VerdictAnnounced(epoch, Verdict.stopped())


async def test_a_flush_is_restored(setup: Setup) -> None:
    async with scripted_group(setup) as group:
        barrier = group.barrier
        opened = await barrier.open()
        assert isinstance(opened, Opened)
        for rank in group.ranks:
            await rank.arrive("Connected")
        await setup.flush()
        await barrier.lead()
        for rank in group.ranks:
            await rank.beat()
        assert await barrier.restore(opened.epoch, "Connected", [], ordinal=1) == Restored(opened.epoch, 1)


async def test_forgotten_scripts_are_sent_again(setup: Setup) -> None:
    async with scripted_group(setup) as group:
        opened = await group.barrier.open()
        assert isinstance(opened, Opened)
        for rank in group.ranks:
            await rank.arrive("Connected")
        await setup.forget_scripts()
        assert isinstance(await group.barrier.dispatch(opened.epoch, "load", "{}", "Connected"), Dispatched)
        await setup.forget_scripts()
        assert (await group.barrier.inspect()).epoch is not None


async def test_broken_connections_are_made_anew(setup: Setup) -> None:
    """Idle connections are replaced unnoticed or after one refusal; a blocked reader reads on from where it was."""
    async with scripted_group(setup) as group:
        opened = await group.barrier.open()
        assert isinstance(opened, Opened)
        waiting = asyncio.create_task(group.ranks[0].next_task())
        for rank in group.ranks:
            await rank.arrive("Connected")
        await setup.break_connections()

        async def dispatched() -> bool:
            try:
                outcome = await group.barrier.dispatch(opened.epoch, "load", "{}", "Connected")
            except StoreError:
                return False
            return isinstance(outcome, Dispatched | Already)

        await wait_until(dispatched, "the planner to be connected again")
        assert (await waiting).step == "load"


async def test_any_free_rank_is_claimed_and_given_back(setup: Setup) -> None:
    async with connected(setup, "rank-0") as [store]:
        member = Member(store, "demo", rank=0, world_size=WORLD_SIZE)
        assert await member.claim() == 0
        await member.leave()
        again = Member(store, "demo", rank=0, world_size=WORLD_SIZE)
        assert await again.claim(timeout=0) == 0
        await again.leave()


async def test_several_groups_of_one_process_are_all_heard(setup: Setup) -> None:
    """On a cluster they lie on different nodes, and no read may ask for two of them."""
    warnings: list[str] = []
    sink = logger.add(warnings.append, level="WARNING", format="{message}")
    names = (
        ["demo"] if setup.name == "ACL users" else ["demo", "other", "third", "fourth"]
    )  # a rank's user has one group
    async with connected(setup, "planner", "rank-0") as [mine, theirs], AsyncExitStack() as stack:
        wakeups = Wakeups(mine, SystemClock())
        stack.push_async_callback(wakeups.close)
        stack.callback(logger.remove, sink)
        waits: list[tuple[asyncio.Task[Any], ScriptedRank]] = []
        for name in names:
            barrier = await stack.enter_async_context(Barrier(mine, name, world_size=1, settings=LONG, wakeups=wakeups))
            rank = await stack.enter_async_context(ScriptedRank(theirs, name, 0, settings=LONG))
            await barrier.lead()
            opened = await barrier.open()
            assert isinstance(opened, Opened)
            release = asyncio.create_task(barrier.wait(opened.epoch, "Connected", timeout=30))
            waits.append((release, rank))
        if setup.name == "cluster":
            slots = {
                key_slot(Keys("rankgate", name).epoch.encode()) * len(setup.administrators) // 16384 for name in names
            }
            assert slots == {0, 1, 2}, "the names are chosen so that every node has some group"
        for release, rank in reversed(waits):
            await rank.arrive("Connected")
            assert isinstance(await release, Released)
    assert warnings == [], "a read that was refused would have been made good by looking again"


async def test_a_launch_and_a_text_with_the_real_planner_and_runners(setup: Setup) -> None:
    async with AsyncExitStack() as stack:
        planner_store, observer, *others = await stack.enter_async_context(
            connected(setup, "planner", "observer", *(f"rank-{rank}" for rank in range(WORLD_SIZE)), settings=BRISK)
        )
        config = SimulatedConfig(jitter=0.0, connect_seconds=0.02, layer_seconds=0.005, warmup_seconds=0.02)
        runners = [
            Runner(
                Member(store, "demo", rank=rank, world_size=WORLD_SIZE),
                InlineHost(lambda rank=rank: SimulatedEngine(config, rank=rank, world_size=WORLD_SIZE)),
            )
            for rank, store in enumerate(others)
        ]
        serving = [asyncio.create_task(runner.run()) for runner in runners]
        async with asyncio.timeout(60):
            async with Planner(planner_store) as planner:
                instance = await planner.launch(InstanceSpec(name="demo", world_size=WORLD_SIZE))
                text = "".join([piece async for piece in instance.generate("Once upon a time", max_tokens=8)])
                assert text.startswith("[simulated text]")
                picture = await Barrier(observer, "demo", world_size=WORLD_SIZE).inspect()
                assert [view.report is not None for view in picture.ranks] == [True] * WORLD_SIZE
                await instance.stop()
            for runner in runners:
                runner.stop()
            await asyncio.gather(*serving)
        assert find_breaches(await read_history(observer, KEYS)) == []


async def test_the_rank_that_was_promised_is_the_one_that_acts(setup: Setup) -> None:
    async with scripted_group(setup) as group:
        opened = await group.barrier.open()
        assert isinstance(opened, Opened)
        assert await group.ranks[0].member.promise(opened.epoch) == Promised(opened.epoch, WORLD_SIZE)

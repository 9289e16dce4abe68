"""F35: a hundred random abuses by a rank's and an observer's user, within their rights, while ten bring-ups run: ten serve.

``ABUSE_SEED=<number>`` plays one seed again; the seed and every abuse are printed.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from typing import Any, TypeAlias

import pytest
from redis import exceptions as driver
from redis.asyncio import Redis

from barrier import ClaimLost, EpochId, Member, RankTaken, Report, Settings, Store, StoreError, connect
from barrier.store.keys import Keys, NamespaceKeys
from planner import InstanceSpec, Planner, Policy
from planner.history import read_history
from runner import InlineHost, Runner
from runner.engines.simulated import SimulatedConfig, SimulatedEngine
from tests.integration.servers import Kind
from tests.setups.places import Setup, acl

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

BRISK = Settings(lease=3.0, heartbeat=0.5, reader_block=1.0, backstop=1.0)
KEYS, NAMES = Keys("rankgate", "demo"), NamespaceKeys("rankgate")
WORLD_SIZE, HOSTILE = 3, 1
ABUSES, BRING_UPS = 100, 10
LAST_ID = "18446744073709551615-18446744073709551615"
NONCE = "0" * 32

Command: TypeAlias = tuple[Any, ...]


def forged(rng: random.Random) -> bytes:
    """A report that is one, and says what is not so."""
    number = rng.choice([0, 1, 2**53 - 2, 10**15, 2 * 10**12])
    return Report(
        rank=HOSTILE,
        incarnation=f"{rng.getrandbits(112):028x}",
        status=rng.choice(["Idle", "Connected", "Ready", "Nonsense"]),
        epoch=rng.choice([None, EpochId(max(number, 1), NONCE)]),
        applied=rng.choice([0, 10**10 - 1]),
        floor=number,
        seq=rng.choice([0, 2**60]),
        lease_ms=rng.choice([0, 10**15]),
        status_ms=10**18,
        progress=rng.choice([None, (-1, 0), (10**30, 1)]),
    ).encode()


def as_a_rank(rng: random.Random) -> Command:
    """Anything that a rank's user may send."""
    stream = rng.choice([KEYS.signals, KEYS.events])
    own = rng.choice([KEYS.rank(HOSTILE), KEYS.claim(HOSTILE)])
    junk = rng.choice([b"", b"x" * 900_000, b"\x1b[2J\x00\n", b"kind", b"9" * 5_000])
    lies = ("kind", "report", "rank", "0", "epoch", "-", "inc", "f" * 28, "status", "Failed", "alarm", "1")
    choices: list[Callable[[], Command]] = [
        lambda: ("XADD", stream, LAST_ID, "a", "b"),
        lambda: ("XADD", stream, "18446744073709551615-0", "a", "b"),
        lambda: ("XADD", stream, "MAXLEN", "0", "*", "a", "b"),
        lambda: ("XADD", stream, "*", "kind", junk),
        lambda: ("XADD", stream, "*", *lies),
        lambda: ("XADD", stream, "*", "source", "planner", "epoch", f"1-{NONCE}", "kind", "Concluded", "verdict", "{}"),
        lambda: ("PEXPIRE", stream, rng.choice([-1, 1, 10**15])),
        lambda: ("XADD", KEYS.out(f"gen.{rng.randrange(3)}"), rng.choice(["*", LAST_ID]), "chunk", junk),
        lambda: ("SET", KEYS.rank(HOSTILE), junk),
        lambda: ("SET", KEYS.rank(HOSTILE), forged(rng)),
        lambda: ("SET", KEYS.rank(HOSTILE), forged(rng), "PX", 10**12),
        lambda: ("SET", KEYS.claim(HOSTILE), rng.choice([b"somebody", junk])),
        lambda: ("PEXPIRE", own, rng.choice([-1, 1, 10**12])),
        lambda: ("DEL", own),
        lambda: ("XREVRANGE", KEYS.tasks, "+", "-"),
        lambda: ("HMGET", KEYS.epoch, *(["notes"] * 1_000)),
    ]
    return rng.choice(choices)()


def as_an_observer(rng: random.Random) -> Command:
    """Anything that an observer's user may send, and what it must not be able to."""
    key = rng.choice([KEYS.epoch, KEYS.leader, KEYS.signals, KEYS.events, KEYS.rank(0), NAMES.instances])
    choices: list[Command] = [
        ("XRANGE", KEYS.events, "-", "+"),
        ("XRANGE", KEYS.signals, "-", "+"),
        ("MGET", *([KEYS.rank(0)] * 5_000)),
        ("HGETALL", NAMES.instances),
        ("TYPE", key),
        ("EVAL_RO", "while true do end", "0"),
        ("EVALSHA_RO", "0" * 40, "0"),
        ("FCALL_RO", "x", "0"),
        ("XRANGE", KEYS.tasks, "-", "+"),
    ]
    return rng.choice(choices)


class Abuser:
    """Sends abuses now and then, and remembers which the server took."""

    def __init__(self, setup: Setup, rng: random.Random) -> None:
        self._setup = setup
        self._rng = rng
        self.sent = 0
        self.refused = 0

    async def run(self) -> None:
        untyped: Any = Redis
        users = [(f"rank-{HOSTILE}", as_a_rank), (f"rank-{HOSTILE}", as_a_rank), ("observer", as_an_observer)]
        clients = {name: untyped.from_url(self._setup.url(name), protocol=2) for name, _ in users}
        try:
            while self.sent < ABUSES:
                name, choose = self._rng.choice(users)
                command = choose(self._rng)
                print(f"{self.sent + 1} as {name}: {str(command)[:150]}")
                try:
                    await clients[name].execute_command(*command)
                except driver.ResponseError:
                    self.refused += 1
                self.sent += 1
                await asyncio.sleep(self._rng.uniform(0.0, 0.5))
        finally:
            for client in clients.values():
                await client.aclose()


async def kept_running(store: Store, rank: int) -> None:
    """A rank's process with a supervisor: whoever loses its rank is started anew."""
    config = SimulatedConfig(jitter=0.0, connect_seconds=0.02, layer_seconds=0.005, warmup_seconds=0.02)
    while True:
        member = Member(store, "demo", rank=rank, world_size=WORLD_SIZE)
        runner = Runner(member, InlineHost(lambda: SimulatedEngine(config, rank=rank, world_size=WORLD_SIZE)))
        try:
            await runner.run()
        except (ClaimLost, RankTaken, StoreError) as error:
            print(f"rank {rank} is started anew: {str(error)[:150]}")
        await asyncio.sleep(0.1)


@pytest.fixture(params=["valkey", pytest.param("redis", marks=pytest.mark.redis)])
async def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Setup]:
    kind: Kind = request.param
    async with acl(kind, tmp_path_factory.mktemp("abuses"), world_size=WORLD_SIZE) as made:
        yield made


async def test_a_hundred_abuses_stop_none_of_ten_bring_ups(setup: Setup) -> None:
    seed = int(os.environ.get("ABUSE_SEED", "0")) or random.randrange(1, 2**32)
    print(f"ABUSE_SEED={seed}")
    async with AsyncExitStack() as stack:
        stores: list[Store] = []
        for role in ("planner", "observer", *(f"rank-{rank}" for rank in range(WORLD_SIZE))):
            stores.append(await connect(setup.url(role), settings=BRISK))
            stack.push_async_callback(stores[-1].close)
        planner_store, observer, *others = stores
        ranks = [asyncio.create_task(kept_running(store, rank)) for rank, store in enumerate(others)]
        abuser = Abuser(setup, random.Random(seed))
        abusing = asyncio.create_task(abuser.run())
        served = 0
        try:
            # What the hostile rank says of itself costs attempts: that budget is not what is tried here.
            policy = Policy(max_failures=1_000, backoff_base=0.05, backoff_cap=0.5)
            async with Planner(planner_store, policy=policy) as planner:
                for _ in range(BRING_UPS):
                    async with asyncio.timeout(120):
                        instance = await planner.launch(InstanceSpec(name="demo", world_size=WORLD_SIZE))
                        await instance.ready()
                        served += 1
                        await instance.stop()
                async with asyncio.timeout(120):
                    await abusing
                    instance = await planner.launch(InstanceSpec(name="demo", world_size=WORLD_SIZE))
                    await instance.ready()
                    text = "".join([piece async for piece in instance.generate("Once upon a time", max_tokens=8)])
                    assert text.startswith("[simulated text]"), "nothing of it is left"
                    await instance.stop()
            await read_history(observer, KEYS)
        finally:
            for task in (*ranks, abusing):
                task.cancel()
            await asyncio.gather(*ranks, abusing, return_exceptions=True)
    print(f"{served} of {BRING_UPS} served; {abuser.sent} abuses, {abuser.refused} refused")
    assert (served, abuser.sent) == (BRING_UPS, ABUSES)

"""What `test_store_failures` shows for one server, on Sentinel and on a Redis Cluster: a fault under a serving instance of four runner
processes and two planners; when the fault ends, it serves again, with the very same processes.

One deployment and one instance go through all of their faults. Clients reach every server at an address of its own, as behind a balancer.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.crc import key_slot
from redis.exceptions import RedisError

from barrier import Settings
from barrier.store.keys import Keys
from barrier.testing import wait_until
from planner.embedded import LOOPBACK
from tests.integration.address import Address
from tests.integration.servers import RealCluster, RealSentinels, RealServer
from tests.integration.serving import NAME, World, serving

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.redis]

SETTINGS = Settings(lease=2.0, heartbeat=0.5)
FAULT_SECONDS = 1.5 * SETTINGS.lease
FORGOTTEN_AFTER = 5.0
ASK_AGAIN = 10.0
"""Sentinels on a machine that stands still give an orderly failover up after failover-timeout; it is ordered anew after so long."""
SLOT = key_slot(Keys("rankgate", NAME).epoch.encode())
OLD, NEW = "old/secret", "new/secret"
SLOW_TO_LOAD = ["key-load-delay 10000", "loading-process-events-interval-bytes 1024"]  # 10 ms for each key
FILLER = 300


@dataclass
class Deployment:
    """A store of several servers, and the instance that uses it."""

    place: RealSentinels | RealCluster
    password_file: Path
    admins: dict[int, Any] = field(default_factory=dict[int, Any])
    world: World | None = None

    @property
    def servers(self) -> list[RealServer]:
        """The data servers."""
        return self.place.servers

    @property
    def fronts(self) -> list[Address]:
        """Where clients find servers, and sentinels."""
        return list(self.place.fronts.values())

    def admin(self, server: RealServer) -> Any:
        return self.admins[server.port]

    async def role(self, server: RealServer) -> str:
        """`master`, `slave`, or nothing where it does not answer."""
        try:
            return (await asyncio.wait_for(self.admin(server).role(), 1))[0].decode()
        except (RedisError, OSError, TimeoutError):
            return ""

    async def master(self) -> RealServer:
        """Who has the instance's keys now."""
        if isinstance(self.place, RealSentinels):
            sentinel = self.admins[self.place.sentinels[0].port]
            _, port = await sentinel.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.place.master_name)
            return self.place.server_at(int(port))
        for first, last, (_, port, *_), *_ in await self._slots():
            if first <= SLOT <= last:
                return next(server for server in self.servers if self.place.public_port(server) == port)
        raise AssertionError("nobody serves the instance's slot")

    async def _slots(self) -> Any:
        for server in self.servers:
            if await self.role(server):
                return await self.admin(server).execute_command("CLUSTER SLOTS")
        raise AssertionError("no node answers")

    async def replica(self) -> RealServer:
        """Who follows that master."""
        master = await self.master()
        for server in self.servers:
            if server is not master and await self.role(server) == "slave":
                return server
        raise AssertionError("nobody follows")

    async def whole(self) -> None:
        """Wait until there is a master with a replica in step, as at the beginning."""

        async def check() -> bool:
            try:
                replica = await self.replica()
                said = await self.admin(replica).info("replication")
                well = [await self.admin(one).info("replication") for one in (await self.master(),)]
            except (RedisError, OSError, AssertionError):
                return False
            return said["master_link_status"] == "up" and well[0]["connected_slaves"] == 1

        await wait_until(check, "a master and a replica in step", 30)

    async def of_sentinels(self, *words: object) -> None:
        """Send this to every sentinel, where there are some."""
        if isinstance(self.place, RealSentinels):
            for sentinel in self.place.sentinels:
                await self.admins[sentinel.port].execute_command(*words)


async def failover_asked_for(at: Deployment) -> None:
    """The master is demoted while connections to it stay: READONLY, or MOVED in a cluster."""
    old, new = await at.master(), await at.replica()
    place = at.place
    if not isinstance(place, RealSentinels):
        await at.admin(new).execute_command("CLUSTER FAILOVER")
        await demoted(at, old)
        return
    asked = float("-inf")

    async def promoted_to() -> bool:
        nonlocal asked
        if await at.master() is new:
            return await promoted(at, new)
        if time.monotonic() - asked > ASK_AGAIN:
            asked = time.monotonic()
            with suppress(RedisError):  # it is still about it
                await at.admins[place.sentinels[0].port].execute_command("SENTINEL FAILOVER", place.master_name)
        return False

    await wait_until(promoted_to, "the sentinels to promote the replica", 90)
    await at.admin(old).replicaof(LOOPBACK, new.port)  # as a sentinel would, some ten seconds later
    await demoted(at, old)


async def master_stops_answering(at: Deployment) -> None:
    """It is replaced, and comes back as one that does not know that yet."""
    old, new = await at.master(), await at.replica()
    old.pause()
    try:
        await wait_until(lambda: promoted(at, new), "the replica to be promoted", 30)
        await asyncio.sleep(FAULT_SECONDS)
    finally:
        old.resume()


async def promoted(at: Deployment, server: RealServer) -> bool:
    return await at.role(server) == "master"


async def demoted(at: Deployment, server: RealServer) -> None:
    async def check() -> bool:
        return await at.role(server) == "slave"

    await wait_until(check, "the old master to be demoted", 30)


async def masterdown(at: Deployment) -> None:
    """The master follows somebody who is not there, and serves nothing stale."""
    master = await at.master()
    await at.admin(master).config_set("replica-serve-stale-data", "no")
    await at.admin(master).replicaof(LOOPBACK, 1)
    await asyncio.sleep(FAULT_SECONDS)
    await at.admin(master).replicaof("no", "one")
    await at.admin(master).config_set("replica-serve-stale-data", "yes")


async def clusterdown(at: Deployment) -> None:
    """Nobody serves the instance's slot, and the nodes that are left refuse every command."""
    both = [await at.master(), await at.replica()]
    others = [server for server in at.servers if server not in both]

    async def refused() -> bool:
        return [await state(at, server) for server in others] == ["fail"] * len(others)

    for server in both:
        server.pause()
    try:
        await wait_until(refused, "CLUSTERDOWN", 30)
        await asyncio.sleep(FAULT_SECONDS)
    finally:
        for server in both:
            server.resume()
    await wait_until(lambda: well(at), "the cluster to be well", 30)


async def well(at: Deployment) -> bool:
    return [await state(at, server) for server in at.servers] == ["ok"] * len(at.servers)


async def state(at: Deployment, server: RealServer) -> str:
    """What a node says of the cluster: ok or fail."""
    return (await at.admin(server).execute_command("CLUSTER INFO"))["cluster_state"]


async def noreplicas(at: Deployment) -> None:
    master, replica = at.admin(await at.master()), await at.replica()
    await master.config_set("min-replicas-max-lag", 1)
    await master.config_set("min-replicas-to-write", 1)
    replica.pause()
    try:
        await refuses(master, "NOREPLICAS")
        await asyncio.sleep(FAULT_SECONDS)
    finally:
        replica.resume()

    async def counted() -> bool:
        return (await master.info("replication"))["min_slaves_good_slaves"] == 1

    await wait_until(counted, "the replica to be back", 30)
    await master.config_set("min-replicas-to-write", 0)


async def refuses(master: Any, word: str) -> None:
    async def check() -> bool:
        try:
            await master.set(f"probe{{{Keys('rankgate', NAME).epoch[1:].partition('}')[0]}}}", "1", px=1)
        except RedisError as error:
            return word in f"{type(error).__name__} {error}".upper()
        return False

    await wait_until(check, word, 30)


async def misconf(at: Deployment) -> None:
    """A folder lies where the dump should go."""
    server = await at.master()
    master, dump = at.admin(server), server.directory / "dump.rdb"
    dump.unlink(missing_ok=True)
    dump.mkdir()
    await master.config_set("save", "3600 100000")
    await master.bgsave()
    await refuses(master, "MISCONF")
    await asyncio.sleep(FAULT_SECONDS)
    dump.rmdir()
    await master.bgsave()

    async def saved() -> bool:
        return (await master.info("persistence"))["rdb_last_bgsave_status"] == "ok"

    await wait_until(saved, "the dump to be written", 30)
    await master.config_set("save", "")


async def loading(at: Deployment) -> None:
    """The master is started again with a dump that takes some seconds to load; nobody takes its place meanwhile."""
    server = await at.master()
    tag = Keys("rankgate", NAME).epoch.partition("}")[0] + "}"
    admin = at.admin(server)
    await admin.config_set("repl-diskless-sync", "yes")
    filler = {f"{tag}:filler:{number}": "x" * 2_000 for number in range(FILLER)}
    await admin.mset(filler)
    await at.of_sentinels("SENTINEL SET", "rankgate", "down-after-milliseconds", 60_000)
    if isinstance(at.place, RealCluster):
        await at.admin(await at.replica()).config_set("cluster-replica-no-failover", "yes")
    await admin.save()
    server.kill()
    await server.start()
    await at.of_sentinels("SENTINEL SET", "rankgate", "down-after-milliseconds", 500)
    if isinstance(at.place, RealCluster):
        await wait_until(lambda: well(at), "the cluster to be well", 30)
        await at.admin(await at.replica()).config_set("cluster-replica-no-failover", "no")
    await admin.delete(*filler)


async def renewed_password(at: Deployment) -> None:
    """The servers first: WRONGPASS, until the file is renewed too."""
    for server in at.servers:
        await at.admin(server).config_set("masterauth", NEW)
    for server in at.servers:
        await at.admin(server).config_set("requirepass", NEW)
    await at.of_sentinels("SENTINEL SET", "rankgate", "auth-pass", NEW)
    for server in at.servers:
        await at.admin(server).client_kill_filter(_type="normal", skipme=True)
        at.admin(server).connection_pool.connection_kwargs["password"] = NEW
    await asyncio.sleep(FAULT_SECONDS)
    at.password_file.write_text(f"{NEW}\n")


async def moved(at: Deployment) -> None:
    """The instance's slot goes to another master, key by key."""
    source = await at.master()
    others = [one for one in at.servers if one is not source and await at.role(one) == "master"]
    target = others[0]
    names = [await at.admin(one).execute_command("CLUSTER MYID") for one in (source, target)]
    await at.admin(target).execute_command("CLUSTER SETSLOT", SLOT, "IMPORTING", names[0])
    await at.admin(source).execute_command("CLUSTER SETSLOT", SLOT, "MIGRATING", names[1])
    while keys := await at.admin(source).execute_command("CLUSTER GETKEYSINSLOT", SLOT, 100):
        for key in keys:
            await at.admin(source).execute_command("MIGRATE", LOOPBACK, target.port, key, 0, 5_000, "AUTH", NEW)
            await asyncio.sleep(0.2)
    for one in (target, source, *others[1:]):
        await at.admin(one).execute_command("CLUSTER SETSLOT", SLOT, "NODE", names[1])


async def idle_connections_forgotten(at: Deployment) -> None:
    """Whoever has said nothing for 5 s is forgotten without a word: no call fails, no text is lost."""
    assert at.world
    for front in at.fronts:
        front.forgets_after = FORGOTTEN_AFTER
    before = [front.forgotten for front in at.fronts]
    await asyncio.gather(*(at.world.barrier.inspect() for _ in range(4)))
    await asyncio.sleep(FORGOTTEN_AFTER + 1.5)
    await asyncio.gather(*(at.world.barrier.inspect() for _ in range(4)))
    assert all(await asyncio.gather(*(at.world.text() for _ in range(4))))
    assert [front.forgotten for front in at.fronts] == before, "nobody used a connection that was forgotten"
    for front in at.fronts:
        front.forgets_after = None


async def rank_is_away(at: Deployment) -> None:
    """For four leases; its attempt ends."""
    assert at.world
    pid = at.world.processes[2].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(4 * SETTINGS.lease)
    finally:
        os.kill(pid, signal.SIGCONT)


Fault = Callable[[Deployment], Awaitable[None]]
EVERYWHERE: list[Fault] = [noreplicas, misconf, loading, idle_connections_forgotten, rank_is_away]


@asynccontextmanager
async def deployed(name: str, folder: Path) -> AsyncGenerator[Deployment]:
    """Servers, and an instance that serves."""
    file = folder / "password"
    file.write_text(f"{OLD}\n")
    async with AsyncExitStack() as stack:
        if name == "sentinel":
            place = await stack.enter_async_context(RealSentinels(password=OLD, config=SLOW_TO_LOAD, fronted=True))
            hosts = ",".join(f"{host}:{port}" for host, port in place.sentinel_addresses)
            url = f"redis+sentinel://{hosts}/{place.master_name}/0"
            sentinels = place.sentinels
        else:
            place = await stack.enter_async_context(RealCluster(password=OLD, config=SLOW_TO_LOAD, fronted=True))
            await place.add_replica(place.servers[SLOT * 3 // 16384])
            url, sentinels = f"redis+cluster://{place.addresses}", []
        at = Deployment(place, file)
        for server in [*place.servers, *sentinels]:
            admin = Redis(port=server.port, password=server.endpoint.password)
            stack.push_async_callback(admin.aclose)
            at.admins[server.port] = admin
        at.world = await stack.enter_async_context(serving(f"{url}?password_file={file}", folder, SETTINGS))
        yield at


@pytest.fixture(scope="module")
async def deployment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncGenerator[Deployment]:
    async with deployed(request.param, tmp_path_factory.mktemp("deployment")) as at:
        yield at


def each(faults: list[Fault]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.__name__) for fault in faults])


@pytest.mark.parametrize("deployment", ["sentinel"], indirect=True, scope="module")
@each([failover_asked_for, master_stops_answering, masterdown, *EVERYWHERE, renewed_password])
async def test_with_sentinel_it_serves_again_by_itself_after(deployment: Deployment, fault: Fault) -> None:
    await serves_again_after(fault, deployment, "sentinel")


@pytest.mark.parametrize("deployment", ["cluster"], indirect=True, scope="module")
@each([failover_asked_for, master_stops_answering, clusterdown, *EVERYWHERE, renewed_password, moved])
async def test_in_a_cluster_it_serves_again_by_itself_after(deployment: Deployment, fault: Fault) -> None:
    await serves_again_after(fault, deployment, "cluster")


async def serves_again_after(fault: Fault, at: Deployment, name: str) -> None:
    world = at.world
    assert world
    await at.whole()
    await wait_until(world.serves, "the instance to serve before the fault", 30)
    before = await world.attempts()
    await fault(at)
    await world.seconds_until_it_serves(f"{name}: {fault.__name__}")
    more = await world.attempts() - before
    print(f"FIGURE {name}: {fault.__name__}: {more} more attempts", flush=True)
    assert more in ((1,) if fault is rank_is_away else (0, 1))

"""What stores do to those who use them, under a serving instance of four runner processes and two planners: it serves again, with the very
same processes. Each kind prints how long that took, from the moment at which the store was well again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from redis.asyncio import Redis

from barrier import Settings
from barrier.store.keys import Keys
from barrier.testing import wait_until
from planner.embedded import LOOPBACK
from tests.integration.address import Address
from tests.integration.cluster import Cluster, connected
from tests.integration.servers import RealServer, free_port
from tests.integration.serving import NAME, QUICK, serving

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.redis]

SETTINGS = Settings(lease=6.0, heartbeat=1.0)
WITHIN = 3 * SETTINGS.lease

TEXTS = [
    "LOADING Redis is loading the dataset in memory",
    "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
    "CLUSTERDOWN The cluster is down",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "NOAUTH Authentication required.",
    "WRONGPASS invalid username-password pair or user is disabled.",
    "DENIED Redis is running in protected mode because protected mode is enabled",
    "upstream failure",
    "ERR unknown command 'EVALSHA'",
]


@asynccontextmanager
async def server_and_admin(**options: Any) -> AsyncGenerator[tuple[RealServer, Any]]:
    async with RealServer(kind="redis", transport="tcp", **options) as server:
        admin = Redis(port=server.port, password=options.get("password"))
        try:
            yield server, admin
        finally:
            await admin.aclose()


async def follow(replica: Any, port: int) -> None:
    """Make it a replica, and wait until it is in step."""
    await replica.replicaof(LOOPBACK, port)

    async def in_step() -> bool:
        said: dict[str, Any] = await replica.info("replication")
        return said["master_link_status"] == "up"

    await wait_until(in_step, "the replica to be in step", 30)


async def test_an_address_that_leads_to_another_master_while_old_connections_stay(tmp_path: Path) -> None:
    async with (
        server_and_admin() as (first, one),
        server_and_admin() as (second, two),
        Address(first.port) as address,
    ):
        await follow(two, first.port)
        async with serving(f"redis://{LOOPBACK}:{address.port}/0", tmp_path, SETTINGS) as world:
            await two.replicaof("no", "one")
            await one.replicaof(LOOPBACK, second.port)
            address.target = second.port
            await world.seconds_until_it_serves("a demoted master behind one address")
            assert await two.exists(world.barrier.keys.rank(0)), "on the new master"

            await follow(one, second.port)  # and back, with the old master dead to all who still talk to it
            await one.replicaof("no", "one")
            address.target = first.port
            second.pause()
            took = await world.seconds_until_it_serves(
                "a master that answers nothing any more, replaced behind one address"
            )
            second.resume()
            assert took


async def test_a_replica_that_is_away_where_writes_need_one(tmp_path: Path) -> None:
    async with server_and_admin() as (server, admin), server_and_admin() as (_, replica):
        await follow(replica, server.port)
        await admin.config_set("min-replicas-to-write", 1)
        async with serving(server.url, tmp_path, SETTINGS) as world:
            await replica.replicaof("no", "one")
            await asyncio.sleep(2 * SETTINGS.lease)
            await follow(replica, server.port)
            await world.seconds_until_it_serves("NOREPLICAS for two leases")


async def test_whatever_a_server_or_a_proxy_says_is_waited_out(tmp_path: Path) -> None:
    async with server_and_admin() as (server, _), Address(server.port) as address:
        async with serving(f"redis://{LOOPBACK}:{address.port}/0", tmp_path, SETTINGS) as world:
            for said in TEXTS:
                address.says = said
                await asyncio.sleep(SETTINGS.lease + 1)
                address.says = ""
                await world.seconds_until_it_serves(f"{said[:24]!r} for 7 s")


@pytest.mark.parametrize("first", ["file", "server"])
async def test_a_password_that_is_renewed_on_both_sides_one_after_the_other(tmp_path: Path, first: str) -> None:
    file = tmp_path / "password"
    file.write_text("old\n")
    async with server_and_admin(password="old") as (server, admin):
        async with serving(f"redis://{LOOPBACK}:{server.port}/0?password_file={file}", tmp_path, SETTINGS) as world:

            async def of_the_file() -> None:
                file.write_text("new\n")

            async def of_the_server() -> None:
                await admin.config_set("requirepass", "new")
                await admin.client_kill_filter(_type="normal", skipme=True)

            steps: list[Callable[[], Awaitable[None]]] = [of_the_file, of_the_server]
            for step in steps if first == "file" else reversed(steps):
                await step()
                await asyncio.sleep(2)
            await world.seconds_until_it_serves(f"a renewed password, {first} first")


async def test_certificates_and_their_authority_are_renewed(tmp_path: Path) -> None:
    ours, theirs, port = tmp_path / "client", tmp_path / "server", free_port()
    for folder in (ours, theirs):
        folder.mkdir()

    def write(authority: trustme.CA, folder: Path) -> None:
        issued = authority.issue_cert("localhost", LOOPBACK)
        authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        issued.private_key_pem.write_to_path(str(folder / "key.pem"))
        issued.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))

    files = {"tls-ca-cert-file": "ca.pem", "tls-cert-file": "cert.pem", "tls-key-file": "key.pem"}
    authority = trustme.CA()
    write(authority, theirs)
    write(authority, ours)
    config = [f"tls-port {port}", "tls-auth-clients yes", *(f"{name} {theirs / file}" for name, file in files.items())]
    query = f"ssl_ca_certs={ours}/ca.pem&ssl_certfile={ours}/cert.pem&ssl_keyfile={ours}/key.pem"
    async with server_and_admin(config=config) as (_, admin):
        async with serving(f"rediss://localhost:{port}/0?{query}", tmp_path, SETTINGS) as world:
            renewed = trustme.CA()
            write(renewed, ours)
            await asyncio.sleep(2)
            write(renewed, theirs)
            words = [word for name, file in files.items() for word in (name, str(theirs / file))]
            await admin.execute_command("CONFIG", "SET", *words)
            await admin.client_kill_filter(_type="normal", skipme=True)
            await world.seconds_until_it_serves("renewed certificate, key and authority")


@pytest.mark.parametrize("resets", [True, False], ids=["with a reset", "without a word"])
async def test_idle_connections_that_a_balancer_forgets_fail_no_call(tmp_path: Path, resets: bool) -> None:
    async with server_and_admin() as (server, _), Address(server.port) as address:
        address.forgets_after, address.resets = 5.0, resets
        async with serving(f"redis://{LOOPBACK}:{address.port}/0", tmp_path, SETTINGS) as world:
            for _ in range(3):
                await asyncio.gather(*(world.barrier.inspect() for _ in range(4)))
                before = address.forgotten
                await asyncio.sleep(6.5)
                await asyncio.gather(*(world.barrier.inspect() for _ in range(4)))
                assert all(await asyncio.gather(*(world.text() for _ in range(4))))
                assert address.forgotten == before, "nobody used a connection that was forgotten"
            await world.seconds_until_it_serves(f"idle connections forgotten {'with' if resets else 'without'} a reset")


async def test_a_fresh_runner_waits_out_what_it_meets(tmp_path: Path) -> None:
    """Regression: what came up between connecting and claiming ended it."""
    async with server_and_admin() as (server, _), Address(server.port) as address:
        url = f"redis://{LOOPBACK}:{address.port}/0"
        async with Cluster(url, tmp_path, SETTINGS) as cluster, connected(server.url, SETTINGS) as store:
            address.says = "LOADING Redis is loading the dataset in memory"
            waiting = await cluster.runner(NAME, 0, 1, QUICK, wait_for_store=60)
            await asyncio.sleep(5)
            assert waiting.running, waiting.log()
            address.says = "NOREPLICAS Not enough good replicas to write."
            await asyncio.sleep(5)
            assert waiting.running, waiting.log()
            address.says = ""
            key = Keys("rankgate", NAME).rank(0)
            began = time.monotonic()

            async def reports() -> bool:
                return bool(await store.commands.exists(key))

            await wait_until(reports, "the runner to report", WITHIN)
            print(f"FIGURE a fresh runner that waited: reports after {time.monotonic() - began:.1f} s")

"""What is behind an address changes: old connections are left, the address is asked anew, and nothing that lay idle too long is used."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import barrier.store.connection
from barrier import Member, Settings, StoreError, StoreUnavailable, StoreUnsuitable, connect
from barrier.testing import wait_until
from planner.embedded import LOOPBACK
from tests.integration.address import Address
from tests.integration.servers import RealCluster, RealSentinels, RealServer, free_port
from tests.setups.places import Certificates, administered

pytestmark = pytest.mark.anyio

PATIENT = Settings(lease=60.0, heartbeat=2.0)
LONG = Settings(lease=60.0, heartbeat=2.0, command_timeout=1.0, reader_block=30.0, backstop=1.0)


async def test_a_demoted_master_is_left_by_the_writer_and_by_whoever_waits_there() -> None:
    """Regression: the pool kept the connection to the demoted server for ever, and a blocked reader never learnt of it."""
    async with (
        RealServer(transport="tcp") as old,
        RealServer(transport="tcp") as new,
        administered(old.url, new.url) as (one, two),
        Address(old.port) as address,
    ):
        store = await connect(f"redis://{LOOPBACK}:{address.port}/0", settings=LONG)
        reader = store.reader()
        waiting = asyncio.create_task(reader.xread({"stream": "0-0"}, block=30_000))
        await wait_until(lambda: blocked(one), "the reader to wait", 5)
        await one.config_set("replica-read-only", "yes")
        await one.replicaof(LOOPBACK, new.port)
        address.target = new.port
        with pytest.raises(StoreError), store.errors():
            await store.commands.set("key", "1")
        with pytest.raises(StoreUnavailable), store.errors():
            await asyncio.wait_for(waiting, 5)
        await store.commands.set("key", "2")
        assert await two.get("key") == b"2"
        await two.xadd("stream", {"a": "b"})
        assert await reader.xread({"stream": "0-0"}, block=5_000)
        await reader.aclose()
        await store.close()


async def blocked(admin: Any) -> bool:
    return (await admin.info("clients"))["blocked_clients"] == 1


@pytest.mark.parametrize("said", ["upstream failure", "NOAUTH Authentication required.", "LOADING Redis is loading"])
async def test_a_reply_about_the_server_ends_the_connections_that_wait_too(said: str) -> None:
    async with RealServer(transport="tcp") as server, Address(server.port) as address:
        store = await connect(f"redis://{LOOPBACK}:{address.port}/0", settings=LONG)
        reader = store.reader()
        waiting = asyncio.create_task(reader.xread({"stream": "0-0"}, block=30_000))
        async with administered(server.url) as (admin,):
            await wait_until(lambda: blocked(admin), "the reader to wait", 5)
        address.says = said
        with pytest.raises(StoreError), store.errors():
            await store.commands.ping()
        address.says = ""
        with pytest.raises(StoreUnavailable), store.errors():
            await asyncio.wait_for(waiting, 5)
        assert await store.commands.ping()
        await reader.aclose()
        await store.close()


async def test_a_server_that_would_lose_keys_is_not_used_though_a_good_one_was_there_before() -> None:
    async with (
        RealServer(transport="tcp") as good,
        RealServer(transport="tcp", config=["maxmemory-policy allkeys-lru"]) as bad,
        administered(bad.url) as (admin,),
        Address(good.port) as address,
    ):
        store = await connect(f"redis://{LOOPBACK}:{address.port}/0", settings=LONG)
        address.target = bad.port
        good.kill()
        with pytest.raises(StoreError), store.errors():
            await store.commands.set("key", "1")
        with pytest.raises(StoreUnsuitable, match="maxmemory-policy allkeys-lru"), store.errors():
            await store.commands.set("key", "1")
        assert await admin.dbsize() == 0
        await admin.config_set("maxmemory-policy", "noeviction")
        await store.commands.set("key", "1")
        await store.close()


@pytest.mark.slow
@pytest.mark.parametrize("resets", [True, False], ids=["with a reset", "without a word"])
async def test_a_burst_after_idleness_fails_no_call(monkeypatch: pytest.MonkeyPatch, resets: bool) -> None:
    """Regression: 3 of 4 calls failed, on connections that a balancer had forgotten."""
    monkeypatch.setattr(barrier.store.connection, "IDLE_SECONDS", 0.5)
    async with RealServer(transport="tcp") as server, Address(server.port) as address:
        address.forgets_after, address.resets = 2.0, resets
        store = await connect(f"redis://{LOOPBACK}:{address.port}/0", settings=LONG)
        for _ in range(2):
            assert await asyncio.gather(*(store.commands.set(f"key{number}", "1") for number in range(4))) == [True] * 4
            assert await store.exchange([("PING",)]) == [b"PONG"]
            await asyncio.sleep(2.5)
        assert address.forgotten == 0
        await store.close()


@pytest.mark.parametrize("form", ["one", "cluster", pytest.param("sentinel", marks=pytest.mark.redis)])
async def test_a_renewed_password_is_used_by_each_new_connection(tmp_path: Path, form: str) -> None:
    """Regression: it was read once; from then on every connection was refused, for ever."""
    file = tmp_path / "password"
    file.write_text("old\n")
    made: Any = {
        "one": lambda: RealServer(transport="tcp", password="old"),
        "cluster": lambda: RealCluster(kind="valkey", password="old"),
        "sentinel": lambda: RealSentinels(replicas=0, sentinels=1, password="old"),
    }[form]()
    async with made as place:
        servers = [place] if form == "one" else place.servers
        url = {
            "one": lambda: f"redis://{LOOPBACK}:{place.port}/0",
            "cluster": lambda: f"redis+cluster://{place.addresses}",
            "sentinel": lambda: f"redis+sentinel://{LOOPBACK}:{place.sentinels[0].port}/{place.master_name}/0",
        }[form]()
        store = await connect(f"{url}?password_file={file}", settings=LONG)
        member = Member(store, "demo", rank=0)
        await member.claim()
        file.write_text("new\n")
        async with administered(*(server.url for server in servers)) as admins:
            for admin in admins:
                await admin.config_set("requirepass", "new")
                await admin.client_kill_filter(_type="normal", skipme=True)
            for _ in range(2):  # the first one may find that its connection was cut
                try:
                    await member.report("Idle")
                except StoreUnavailable:
                    continue
            await member.report("Idle")
            await member.leave()
        await store.close()


@pytest.mark.redis
async def test_renewed_certificates_and_their_authority_are_used_by_each_new_connection(tmp_path: Path) -> None:
    port, ours, theirs = free_port(), tmp_path / "client", tmp_path / "server"
    for folder in (ours, theirs):
        folder.mkdir()
    first = Certificates(theirs)
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (ours / name).write_bytes((theirs / name).read_bytes())
    query = f"ssl_ca_certs={ours}/ca.pem&ssl_certfile={ours}/cert.pem&ssl_keyfile={ours}/key.pem"
    async with RealServer(kind="redis", config=[f"tls-port {port}", *first.server_config]) as server:
        store = await connect(f"rediss://localhost:{port}/0?{query}", settings=PATIENT)
        renewed = Certificates(theirs)
        for name in ("ca.pem", "cert.pem", "key.pem"):
            (ours / name).write_bytes((theirs / name).read_bytes())
        async with administered(server.url) as (admin,):
            words = [word for line in renewed.server_config[:3] for word in line.split()]
            await admin.execute_command("CONFIG", "SET", *words)
            await admin.client_kill_filter(_type="normal", skipme=True)
        for _ in range(2):
            try:
                with store.errors():
                    await store.commands.set("key", "1")
            except StoreUnavailable:
                continue
        assert await store.commands.set("key", "1")
        await store.close()

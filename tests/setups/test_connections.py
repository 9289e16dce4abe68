"""What only some setups can show: a failover under a blocked reader, a slot that moves, a certificate that is not known; and secrets."""

from __future__ import annotations

import io
import socket
from collections.abc import Generator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from loguru import logger
from redis.asyncio import RedisCluster
from redis.crc import key_slot

from barrier import (
    Barrier,
    InvalidSettings,
    Leading,
    Settings,
    StoreError,
    StoreUnavailable,
    StoreUnsuitable,
    adopt,
    connect,
)
from barrier.store.cluster import first_key
from barrier.store.connection import pack
from barrier.store.keys import Keys
from barrier.testing import wait_until
from planner.cli.process import redacted
from planner.embedded import LOOPBACK
from tests.integration.servers import RealCluster, RealSentinels, RealServer
from tests.setups.places import PASSWORD, SETUPS, Certificates, administered

pytestmark = pytest.mark.anyio

LONG = Settings(lease=60.0, heartbeat=2.0, reader_block=0.5, backstop=1.0)
QUICK = Settings(lease=2.0, heartbeat=0.4, reader_block=0.3, reader_margin=0.5, backstop=0.5)
KEYS = Keys("rankgate", "demo")


async def port_of(client: Any) -> int:
    """Which server its connection is to."""
    connection = await client.connection_pool.get_connection()
    try:
        return connection.port
    finally:
        await client.connection_pool.release(connection)


# --- Sentinel -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["valkey", pytest.param("redis", marks=pytest.mark.redis)])
async def test_a_failover_takes_blocked_readers_and_writers_along(kind: Any) -> None:
    """F26: SENTINEL FAILOVER while a rank waits for its next task; it reads on at the new master."""
    async with RealSentinels(kind=kind) as group, AsyncExitStack() as stack:
        hosts = ",".join(f"{host}:{port}" for host, port in group.sentinel_addresses)
        store = await connect(f"redis+sentinel://{hosts}/{group.master_name}/0", settings=QUICK)
        stack.push_async_callback(store.close)
        reader = store.reader()
        stack.push_async_callback(reader.aclose)
        [asking] = await stack.enter_async_context(administered(group.sentinels[0].url))
        old = group.servers[0]
        assert await reader.xread({KEYS.tasks: "0-0"}, block=10) == []
        await asking.execute_command("SENTINEL FAILOVER", group.master_name)

        async def moved() -> bool:
            address = await asking.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", group.master_name)
            return int(address[1]) != old.port

        await wait_until(moved, "the failover", timeout=30)
        [master] = await stack.enter_async_context(
            administered(next(server for server in group.servers if server is not old).url)
        )

        async def written_and_read() -> bool:
            try:
                with store.errors():
                    await store.commands.xadd(KEYS.tasks, {"a": "b"})
                    found = await reader.xread({KEYS.tasks: "0-0"}, block=300)
            except StoreError:
                return False
            return bool(found) and await master.xlen(KEYS.tasks) > 0 and await port_of(reader) != old.port

        await wait_until(written_and_read, "writer and reader to be at the new master", timeout=30)
        assert await port_of(store.commands) != old.port


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["valkey", pytest.param("redis", marks=pytest.mark.redis)])
async def test_a_master_that_does_not_know_of_its_successor_is_left(kind: Any) -> None:
    """F26: the old master was out of the sentinels' reach (here: stopped) and goes on as if nothing had been; a reader never writes, so
    nothing would tell it. It asks the sentinels once a lease."""
    async with RealSentinels(kind=kind) as group, AsyncExitStack() as stack:
        hosts = ",".join(f"{host}:{port}" for host, port in group.sentinel_addresses)
        store = await connect(f"redis+sentinel://{hosts}/{group.master_name}/0", settings=QUICK)
        stack.push_async_callback(store.close)
        reader = store.reader()
        stack.push_async_callback(reader.aclose)
        assert await reader.xread({KEYS.tasks: "0-0"}, block=10) == []
        [asking, old_master] = await stack.enter_async_context(
            administered(group.sentinels[0].url, group.servers[0].url)
        )
        old = group.servers[0]
        # The sentinels can do nothing to it any more: neither demote it nor cut its clients off.
        await old_master.execute_command("ACL SETUSER default -replicaof -slaveof -client +client|setname +client|id")
        await asking.execute_command("SENTINEL FAILOVER", group.master_name)

        async def moved() -> bool:
            address = await asking.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", group.master_name)
            return int(address[1]) != old.port

        await wait_until(moved, "the failover", timeout=30)
        role = await old_master.execute_command("ROLE")
        assert role[0] == b"master", "it does not know"

        async def left() -> bool:
            try:
                with store.errors():
                    await reader.xread({KEYS.tasks: "0-0"}, block=50)
            except StoreError:
                return False
            return await port_of(reader) != old.port

        await wait_until(left, "the reader to be at the new master", timeout=30)


# --- Cluster --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["valkey", pytest.param("redis", marks=pytest.mark.redis)])
async def test_a_slot_that_moves_is_found_again(kind: Any) -> None:
    """A call fails as unknown, and the next one goes to the node that has the slot now; nothing is sent twice."""
    async with RealCluster(kind=kind) as cluster, AsyncExitStack() as stack:
        store = await connect(cluster.url, settings=QUICK)
        stack.push_async_callback(store.close)
        nodes = await stack.enter_async_context(administered(*(server.url for server in cluster.servers)))
        barrier = await stack.enter_async_context(Barrier(store, "demo", world_size=1, settings=QUICK))
        assert isinstance(await barrier.lead(), Leading)
        slot = key_slot(KEYS.epoch.encode())
        ids = [(await node.execute_command("CLUSTER MYID")).decode() for node in nodes]
        owner = slot * 3 // 16384
        target = (owner + 1) % 3
        for key in await nodes[owner].keys("*"):  # what a migration would have carried over
            await nodes[owner].delete(key)
        for number in (target, owner, 3 - owner - target):
            await nodes[number].execute_command("CLUSTER SETSLOT", slot, "NODE", ids[target])

        async def led() -> bool:
            try:
                return isinstance(await barrier.lead(), Leading)
            except StoreUnavailable:
                return False

        with pytest.raises(StoreUnavailable, match=f"has moved slot {slot} to "):
            await barrier.lead()
        await wait_until(led, "the slot's new node to be found")
        assert await nodes[target].exists(KEYS.leader) == 1


@pytest.mark.slow
async def test_every_node_of_a_cluster_must_be_suitable() -> None:
    async with RealCluster(kind="valkey") as cluster:
        async with administered(cluster.servers[2].url) as [node]:
            await node.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(StoreUnsuitable, match=f"{cluster.servers[2].port} has maxmemory-policy allkeys-lru"):
            await connect(cluster.url)


async def test_a_cluster_of_which_nobody_answers_is_one_clear_error() -> None:
    with socket.socket() as unused:
        unused.bind((LOOPBACK, 0))
        port = unused.getsockname()[1]
        with pytest.raises(StoreUnavailable, match=f"no answer from the store at cluster {LOOPBACK}:{port}"):
            await connect(f"redis+cluster://{LOOPBACK}:{port}")


async def test_a_server_that_is_no_cluster_is_one_clear_error() -> None:
    async with RealServer(transport="tcp") as server:
        with pytest.raises(StoreUnsuitable, match=f"no cluster; use the URL redis://{LOOPBACK}:{server.port}/0"):
            await connect(f"redis+cluster://{LOOPBACK}:{server.port}")


async def test_redis_pys_own_cluster_client_is_refused_with_the_way_out() -> None:
    client: Any = RedisCluster(host="nowhere.invalid", port=1)
    with pytest.raises(InvalidSettings, match=r"barrier.connect\('redis\+cluster://…'\)"):
        adopt(client)
    await client.aclose()


@pytest.mark.parametrize(
    ("commands", "key"),
    [
        ([("GET", "k")], b"k"),
        ([("TIME",)], None),
        ([("PING",)], None),
        ([("INFO", "all")], None),
        ([("MULTI",), ("SET", "k", "v"), ("EXEC",)], b"k"),
        ([("UNWATCH",)], None),
        ([("WATCH", "k")], b"k"),
        ([("EVALSHA", "sha", 2, "k", "l", "x")], b"k"),
        ([("EVAL_RO", "return 1", 1, "k")], b"k"),
        ([("XREAD", "COUNT", 5, "BLOCK", 100, "STREAMS", "k", "0-0")], b"k"),
        ([("XREAD", "BLOCK", 100, "STREAMS", "k", "l", "0", "0")], b"k"),
        ([("xread", "streams", "k", "0")], b"k"),
        ([("XINFO", "STREAM", "k")], b"k"),
        ([("XREAD", "BLOCK", 1, "STREAMS", "k", "0-0"), ("EVALSHA", "sha", 1, "l")], b"k"),
        ([("SET", "k", "\r\n$3\r\nGET\r\n" * 5)], b"k"),
        ([("SET", "", "v")], b""),
    ],
)
def test_the_first_key_is_found_in_what_goes_over_the_wire(commands: list[tuple[Any, ...]], key: bytes | None) -> None:
    assert first_key(b"".join(pack(command) for command in commands)) == key


# --- TLS ------------------------------------------------------------------------------------------------------------------


@pytest.mark.redis
async def test_a_server_of_an_unknown_authority_or_a_wrong_name_is_refused(tmp_path: Path) -> None:
    for name in ("server", "stranger"):
        (tmp_path / name).mkdir()
    ours, strange = Certificates(tmp_path / "server"), Certificates(tmp_path / "stranger")
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    async with RealServer(kind="redis", config=[f"tls-port {port}", *ours.server_config]):
        good = f"rediss://localhost:{port}/0?{ours.client_query}"
        store = await connect(good)
        await store.close()
        for wrong in (
            f"rediss://localhost:{port}/0?{strange.client_query}",  # neither side knows the other's authority
            f"rediss://localhost:{port}/0?ssl_ca_certs={tmp_path}/server/ca.pem",  # the client shows no certificate
            f"rediss://localhost:{port}/0",  # nobody said which authority to trust
            good.replace("localhost", "127.0.0.2"),  # not the name on the certificate
            f"redis://localhost:{port}/0",  # plain text
        ):
            with pytest.raises((StoreUnavailable, StoreUnsuitable)):
                await connect(wrong, settings=QUICK)


# --- URLs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("redis+cluster://", "a cluster URL is redis+cluster://host:port,host:port"),
        ("redis+cluster://h:1/3", "a cluster has only the database 0"),
        ("redis+cluster://h:x", "a cluster URL is"),
        ("redis+sentinel://h:1", "a Sentinel URL is redis+sentinel://host:port,host:port/service/db"),
        ("redis+sentinel://h:1/name/0/more", "a Sentinel URL is"),
        ("redis://h/0?colour=red", "says colour after its ?, which is not understood"),
        ("redis+sentinel://h/name?colour=red", "says colour after its ?, which is not understood"),
        ("redis+cluster://h?colour=red", "says colour after its ?, which is not understood"),
        ("redis://h/0?password_file=/no/such", "password_file /no/such cannot be read: No such file"),
        ("redis://h/0?password_file=/dev/null", "password_file /dev/null has 0 characters on its first line"),
        ("redis://:s3cret@h/0?password_file=/dev/null", "leave one of them out"),
    ],
)
async def test_a_url_that_makes_no_sense_is_refused_in_one_sentence(url: str, sentence: str) -> None:
    with pytest.raises(InvalidSettings) as refusal:
        await connect(url)
    assert sentence in str(refusal.value)
    assert "s3cret" not in str(refusal.value)


async def test_sentinels_have_a_password_of_their_own(tmp_path: Path) -> None:
    secret = tmp_path / "p"
    secret.write_text("sentinel secret\n")
    url = f"redis+sentinel://:{PASSWORD.replace('/', '%2F').replace('@', '%40')}@h:1/name/2?sentinel_password_file={secret}"
    with pytest.raises(StoreUnavailable) as refusal:
        await connect(url, settings=QUICK)
    assert "secret" not in str(refusal.value)


# --- secrets --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def logged() -> Generator[io.StringIO]:
    """Everything that is logged, at the finest level; values of variables are left out of tracebacks, as the CLIs do."""
    text = io.StringIO()
    sink = logger.add(text, level="TRACE", diagnose=False, backtrace=True)
    yield text
    logger.remove(sink)


@pytest.mark.parametrize(
    "name",
    [
        "password",
        pytest.param("tls", marks=pytest.mark.redis),
        "acl",
        pytest.param("sentinel", marks=pytest.mark.slow),
    ],
)
async def test_passwords_are_in_no_log_no_representation_and_no_error(
    name: str, tmp_path: Path, logged: io.StringIO
) -> None:
    said: list[str] = []
    async with SETUPS[name]("redis" if name == "tls" else "valkey", tmp_path) as setup:
        url = setup.url("planner")
        said.append(redacted(url))
        store = await connect(url, settings=QUICK)
        reader = store.reader()
        barrier = Barrier(store, "demo", world_size=1)
        await barrier.lead()
        for one in (store, store.commands, reader, barrier, store.commands.connection_pool, reader.connection_pool):
            said += [repr(one), str(one)]
        connection = await store.commands.connection_pool.get_connection()
        said += [repr(connection), store.where]
        await store.commands.connection_pool.release(connection)
        wrong = url.replace("%40", "%41").replace("password_file", "password=wr0ng&x")
        for broken in (wrong, url.replace("/0", "/x", 1), url + "&colour=red", url + "?colour=red", "x" + url):
            try:
                refused = await connect(broken, settings=QUICK)
            except (StoreError, InvalidSettings) as error:
                chain: BaseException | None = error
                while chain is not None:
                    said += [str(chain), repr(chain)]
                    chain = chain.__cause__
                logger.opt(exception=error).debug("refused")
            else:
                await refused.close()
    # The server is gone: errors of every kind of call.
    for call in (barrier.lead, barrier.inspect, store.commands.ping):
        try:
            with store.errors():
                await call()
        except StoreError as error:
            said += [str(error), repr(error)]
            logger.warning("failed: {}", error)
        else:
            raise AssertionError("the server is gone, and answered")
    await barrier.close()
    await reader.aclose()
    await store.close()
    everything = "\n".join(said)
    for secret in (PASSWORD, quote(PASSWORD, safe=""), "p@ss:word", quote("p@ss:word", safe=""), "wr0ng"):
        assert secret not in everything
        assert secret not in logged.getvalue()

"""The one factory: URL forms, what a derived client may and may not do, and which servers are refused."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from redis.asyncio import Redis

from barrier import (
    Barrier,
    InvalidSettings,
    Settings,
    Store,
    StoreRefused,
    StoreUnavailable,
    StoreUnsuitable,
    adopt,
    connect,
)
from barrier.store.store import check_info
from barrier.testing import FakeStore, FaultPlan

pytestmark = pytest.mark.anyio


def pool_of(client: object) -> Any:
    untyped: Any = client
    return untyped.connection_pool


def arguments(client: object) -> dict[str, Any]:
    """What a client's connections are made with."""
    return dict(pool_of(client).connection_kwargs)


# --- addresses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["http://localhost", "localhost:6379", "", "redis", "valkey://localhost", "file:///etc/passwd", "REDIS+X://"]
)
async def test_an_unknown_scheme_is_refused_with_the_ones_there_are(url: str) -> None:
    with pytest.raises(
        InvalidSettings, match="use redis://, rediss://, unix://, redis\\+sentinel:// or redis\\+cluster://"
    ):
        await connect(url)


@pytest.mark.parametrize(
    "url", ["redis://h:port/0", "redis://h:99999999/0", "redis://h/x?socket_timeout=soon", "redis://[::1"]
)
async def test_an_unreadable_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises((InvalidSettings, StoreUnavailable)) as refusal:
        await connect(url.replace("//", "//user:secret@", 1))
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("url", ["redis+sentinel://h:1", "redis+sentinel://h:x/name", "redis+sentinel://h/name/x"])
async def test_an_unreadable_sentinel_url_is_refused_with_the_form(url: str) -> None:
    with pytest.raises(InvalidSettings, match="redis\\+sentinel://host:port,host:port/service/db"):
        await connect(url)


async def test_a_refused_connection_is_told_with_the_address_and_without_the_password() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(StoreUnavailable) as refusal:
            await connect(f"redis://user:secret@127.0.0.1:{port}/0")
    assert f"no answer from the store at 127.0.0.1:{port}" in str(refusal.value)
    assert "secret" not in str(refusal.value)


async def test_a_socket_that_is_not_there_is_told_with_its_path(tmp_path: Any) -> None:
    with pytest.raises(StoreUnavailable, match=str(tmp_path / "no.sock")):
        await connect(f"unix://{tmp_path / 'no.sock'}")


# --- what adopt makes of a client ---------------------------------------------------------------------------------------


async def test_a_derived_client_keeps_address_and_credentials_and_has_our_timeouts() -> None:
    mine = Redis(
        host="10.0.0.1", port=7777, db=3, username="me", password="mine", socket_timeout=99, decode_responses=True
    )
    settings = Settings(lease=10.0, heartbeat=1.0, reader_block=4.0, reader_margin=3.0)
    store = adopt(mine, settings=settings)
    ours = arguments(store.commands)
    assert (ours["host"], ours["port"], ours["db"], ours["username"], ours["password"]) == (
        "10.0.0.1",
        7777,
        3,
        "me",
        "mine",
    )
    assert ours["socket_timeout"] == 2.0, "a fifth of the lease"
    assert ours["socket_connect_timeout"] == 2.0
    assert ours["decode_responses"] is False
    reader = store.reader()
    assert arguments(reader)["socket_timeout"] == 7.0, "block and margin"
    assert arguments(mine)["socket_timeout"] == 99, "the given client is left alone"
    assert store.where == "10.0.0.1:7777"
    for client in (store, reader):
        await (client.close() if isinstance(client, Store) else client.aclose())
    await mine.aclose()


async def test_a_derived_client_never_sends_anything_twice() -> None:
    """redis-py's own retry would run INCR, XADD, scripts and MULTI again when only the reply was lost."""
    store = adopt(Redis())
    ours = arguments(store.commands)
    assert ours["retry"].get_retries() == 0
    assert ours["retry_on_error"] == []
    assert ours["health_check_interval"] == 0
    await store.close()


async def test_tls_and_sockets_stay_what_they_are(tmp_path: Any) -> None:
    untyped: Any = Redis
    over_tls = adopt(untyped.from_url("rediss://h:1/0?ssl_ca_certs=/ca.pem"))
    assert arguments(over_tls.commands)["ssl_ca_certs"] == "/ca.pem"
    assert any(kind.__name__ == "SSLConnection" for kind in pool_of(over_tls.commands).connection_class.__mro__)
    local = adopt(untyped.from_url(f"unix://{tmp_path}/s"))
    assert local.where == f"{tmp_path}/s"
    for store in (over_tls, local):
        await store.close()


@pytest.mark.skipif(
    not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux drops unacknowledged connections on request"
)
async def test_a_partition_is_noticed_by_the_kernel_within_a_lease() -> None:
    store = adopt(Redis(), settings=Settings(lease=9.0))
    ours = arguments(store.commands)
    assert ours["socket_keepalive"] is True
    assert ours["socket_keepalive_options"][socket.TCP_USER_TIMEOUT] == 9_000
    await store.close()


async def test_a_store_is_adopted_as_it_is(store: FakeStore) -> None:
    made = adopt(store.client())
    assert adopt(made) is made
    async with Barrier(made, "demo", world_size=1) as barrier:
        assert barrier.store is made
    assert await made.commands.ping(), "who was given a store does not close it"
    await made.close()


async def test_nothing_is_sent_before_the_first_use(store: FakeStore) -> None:
    made = adopt(store.client("quiet"))
    assert store.sent["quiet"] == 0
    await made.verify()
    assert store.sent["quiet"] == 1
    await made.verify()
    assert store.sent["quiet"] == 1, "asked once"
    await made.verify(again=True)
    assert store.sent["quiet"] == 2
    await made.close()


# --- which servers are refused ------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {"redis_version": "7.0.15", "role": "master", "maxmemory_policy": "noeviction"}


@pytest.mark.parametrize(
    "info",
    [
        GOOD,
        GOOD | {"redis_version": "6.2.0"},
        GOOD | {"redis_version": "10.0.1"},
        GOOD | {"redis_version": "7.2.4", "valkey_version": "7.2.5"},
        GOOD | {"redis_version": "7.2.4", "valkey_version": "9.1.0"},
        {},
    ],
)
def test_suitable_servers_are_taken(info: dict[str, Any]) -> None:
    check_info(info, "here:1")


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-lru", "allkeys-lfu", "volatile-ttl", "allkeys-random"])
def test_a_server_that_evicts_is_refused_with_the_policy_and_the_way_out(policy: str) -> None:
    with pytest.raises(StoreUnsuitable) as refusal:
        check_info(GOOD | {"maxmemory_policy": policy}, "here:1")
    assert str(refusal.value) == (
        f"the store at here:1 has maxmemory-policy {policy}, which may drop a barrier's key without an error; "
        "set maxmemory-policy noeviction"
    )


def test_a_replica_is_refused_with_its_master() -> None:
    with pytest.raises(
        StoreUnsuitable, match=r"the store at here:1 is a replica of 10\.0\.0\.9; connect to its master"
    ):
        check_info(GOOD | {"role": "slave", "master_host": "10.0.0.9"}, "here:1")


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ({"redis_version": "6.0.16"}, r"redis 6\.0\.16; redis 6\.2 or newer is needed"),
        ({"redis_version": "5.0.7"}, r"redis 5\.0\.7; redis 6\.2 or newer"),
        ({"redis_version": "7.2.4", "valkey_version": "7.1.0"}, r"valkey 7\.1\.0; valkey 7\.2 or newer"),
    ],
)
def test_an_old_server_is_refused_with_both_versions(version: dict[str, str], said: str) -> None:
    with pytest.raises(StoreUnsuitable, match=said):
        check_info(GOOD | version, "here:1")


async def test_a_server_that_has_no_info_is_taken_unchecked_and_any_other_error_is_not(store: FakeStore) -> None:
    plan = (
        FaultPlan().answer("info", "ERR DB index is out of range").answer("info", "ERR unknown command 'INFO'", nth=2)
    )
    made = adopt(store.client(faults=plan))
    with pytest.raises(StoreUnsuitable, match="has no database of that number"):
        await made.verify()
    await made.verify()
    plan.assert_fired()
    await made.close()


@pytest.mark.parametrize(
    ("answer", "error"),
    [("NOAUTH Authentication required.", StoreRefused), ("LOADING Redis is loading the dataset", StoreUnavailable)],
)
async def test_a_server_that_cannot_be_asked_is_not_taken(
    store: FakeStore, answer: str, error: type[Exception]
) -> None:
    plan = FaultPlan().answer("info", answer)
    made = adopt(store.client(faults=plan))
    with pytest.raises(error):
        async with Barrier(made, "demo", world_size=1):
            pytest.fail("nothing may begin on it")
    assert store.keys() == []
    await made.close()

"""What can be handed to a barrier, and what is said about a client that cannot be used."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import AsyncMock

import fakeredis
import pytest
import redis
import redis.asyncio

from barrier import Barrier, InvalidSettings, Member, adopt, connect
from barrier.testing import FakeStore, FaultPlan

pytestmark = pytest.mark.anyio

FAKE = r"of fakeredis is not a client that can be used here: for a test without a server pass barrier\.testing\.FakeStore\(\)\.client\(\)"
SYNCHRONOUS = "it is synchronous; pass a redis.asyncio.Redis"
UNUSABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "fakeredis": (fakeredis.FakeAsyncRedis, FAKE),
    "fakeredis of a server": (lambda: fakeredis.FakeAsyncRedis(server=fakeredis.FakeServer()), FAKE),
    "fakeredis that decodes": (lambda: fakeredis.FakeAsyncRedis(decode_responses=True), FAKE),
    "synchronous fakeredis": (fakeredis.FakeRedis, FAKE),
    "synchronous": (lambda: redis.Redis(port=1), SYNCHRONOUS),
    "cluster": (lambda: redis.asyncio.RedisCluster(host="h", port=1), r"barrier.connect\('redis\+cluster://…'\)"),
    "Sentinel": (lambda: redis.asyncio.Sentinel([("h", 1)]), r"pass what its master_for\(name\) returns"),
    "pool": (lambda: redis.asyncio.ConnectionPool(port=1), r"pass redis\.asyncio\.Redis\(connection_pool=…\)"),
    "pipeline": (lambda: redis.asyncio.Redis(port=1).pipeline(), "pass the client that it was made of"),
    "URL": (lambda: "redis://:secret@h/0", r"a str is not a client .* pass what barrier\.connect\(url\) returns"),
    "nothing": (lambda: None, "pass a redis.asyncio.Redis, or what barrier.connect"),
    "FakeStore": (FakeStore, r"pass its client\(\)"),
    "class": (lambda: redis.asyncio.Redis, "the class Redis of redis is not a client"),
    "mock": (lambda: AsyncMock(spec=redis.asyncio.Redis), "pass a redis.asyncio.Redis"),
}


def in_a_barrier(client: Any) -> Barrier:
    return Barrier(client, "demo")


def in_a_member(client: Any) -> Member:
    return Member(client, "demo", rank=0)


@pytest.mark.parametrize("name", UNUSABLE)
@pytest.mark.parametrize("user", [adopt, in_a_barrier, in_a_member])
async def test_a_client_that_cannot_be_used_is_refused_with_what_to_pass(name: str, user: Callable[[Any], Any]) -> None:
    make, sentence = UNUSABLE[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries say of clients that are dropped
        with pytest.raises(InvalidSettings, match=sentence) as refusal:
            user(make())
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("name", ["FakeAsyncValkey", "FakeValkey"])
def test_fakeredis_valkey_clients_are_refused_with_the_fake_store(name: str) -> None:
    pytest.importorskip("valkey", reason="fakeredis has these classes where valkey-py is installed")
    with pytest.raises(InvalidSettings, match=FAKE):
        adopt(getattr(fakeredis, name)())


async def test_a_connection_that_nobody_awaited_is_told() -> None:
    pending: Any = connect("redis://127.0.0.1:1")
    with pytest.raises(InvalidSettings, match="write await before the call that makes it"):
        adopt(pending)
    pending.close()


def test_a_fault_plan_wraps_no_client_that_cannot_be_used() -> None:
    with pytest.raises(InvalidSettings, match=FAKE):
        FaultPlan().wrap(fakeredis.FakeAsyncRedis())


async def test_what_the_test_kit_makes_is_taken(store: FakeStore) -> None:
    for client in (store.client(), store.client(faults=FaultPlan()), FaultPlan().wrap(store.client())):
        adopted = adopt(client)
        await adopted.verify()
        await adopted.close()
    await asyncio.sleep(0)

"""Checks whether a caller's client can be used, and says what to pass instead if it cannot."""

from __future__ import annotations

import inspect
from typing import Any

from redis import ConnectionPool as SynchronousPool
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.client import Pipeline

from barrier.errors import InvalidSettings
from barrier.store.connection import StoreConnection
from barrier.store.fitness import is_fake

__all__ = ["refuse_unusable"]


_BY_NAME = (
    ("FakeStore", "pass its client()"),
    ("Cluster", "for a cluster pass what barrier.connect('redis+cluster://…') returns"),
    ("Sentinel", "pass what its master_for(name) returns, from redis.asyncio"),
    ("Pipeline", "pass the client that it was made of"),
    ("PubSub", "pass the client that it was made of"),
    ("Pool", "pass redis.asyncio.Redis(connection_pool=…) with an asynchronous pool"),
)
"""Part of a class's name, and what to do instead."""

_USUAL = "pass a redis.asyncio.Redis, or what barrier.connect(url) returns"


def refuse_unusable(client: object) -> None:
    """Refuse an object that is no asynchronous client of redis-py.

    Raises:
        InvalidSettings: what it is, and what to pass instead.
    """
    pool: Any = getattr(client, "connection_pool", None)
    usable = isinstance(client, Redis) and not isinstance(client, Pipeline) and isinstance(pool, ConnectionPool)
    # The test kit's connections extend those of fakeredis, but pass commands on in their own way.
    if usable and (not is_fake(pool) or issubclass(pool.connection_class, StoreConnection)):
        return
    kind: Any = client if isinstance(client, type) else type(client)
    library = kind.__module__.partition(".")[0]
    what = kind.__name__ if library in ("builtins", "barrier") else f"{kind.__name__} of {library}"
    which = "the class" if isinstance(client, type) else "an" if what[0] in "AEIOU" else "a"
    raise InvalidSettings(f"{which} {what} is not a client that can be used here: {_instead(client, kind, pool)}")


def _instead(client: object, kind: type[Any], pool: object) -> str:
    libraries = {base.__module__.partition(".")[0] for base in kind.__mro__}
    if "fakeredis" in libraries or (isinstance(pool, ConnectionPool) and is_fake(pool)):
        return "for a test without a server pass barrier.testing.FakeStore().client()"
    if isinstance(client, type):
        return "pass an object of the class redis.asyncio.Redis, or what barrier.connect(url) returns"
    if isinstance(client, str | bytes):
        return "pass what barrier.connect(url) returns"
    if inspect.iscoroutine(client):
        return "write await before the call that makes it"
    for part, instead in _BY_NAME:
        if part in kind.__name__:
            return instead
    if "valkey" in libraries:
        return f"{_USUAL}; both talk to Valkey too"
    if isinstance(pool, SynchronousPool):
        return f"it is synchronous; {_USUAL}"
    return _USUAL

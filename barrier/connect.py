"""The one place that builds a client. Every timeout carries its why.

URL forms:

=============================================  ==========================================================
``redis://[user:password@]host:port/0``         one server (Redis or Valkey)
``rediss://…``                                  the same over TLS; ``?ssl_ca_certs=…`` and friends as redis-py
``unix:///path/to/socket``                      one server on this machine
``redis+sentinel://h1:26379,h2:26379/name/0``   through Sentinel; ``rediss+sentinel://`` for TLS to the servers
=============================================  ==========================================================
"""

from __future__ import annotations

import socket
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from redis.asyncio import Connection, ConnectionPool, Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff

from barrier.errors import InvalidSettings
from barrier.keys import shown
from barrier.prompt import prompt
from barrier.settings import Settings
from barrier.store import Store

_INTERNAL = ("himport_registry", "maint_", "orig_", "maintenance_")
"""Connection arguments that redis-py adds for itself and that must not be handed to a second pool."""

_SENTINEL_PORT = 26379


async def connect(url: str, *, settings: Settings | None = None) -> Store:
    """Connect to the store at a URL and make sure that the guarantees hold on it.

    Args:
        url: see the module's table.
        settings: the times; defaults where ``None``.

    Raises:
        InvalidSettings: the URL is not of a form above.
        StoreUnavailable: nobody answers there.
        StoreRefused: wrong password, or a right is missing.
        StoreUnsuitable: it evicts keys, is a replica, or is older than Redis 6.2 / Valkey 7.2.
    """
    client = _client(url)
    store = adopt(client, settings=settings)
    pool: Any = client.connection_pool
    store.belongings = (client, *(pool.sentinel_manager.sentinels if _is_sentinel(pool) else ()))
    try:
        await store.verify()
    except BaseException:
        await store.close()
        raise
    return store


def adopt(redis: Redis | Store, *, settings: Settings | None = None) -> Store:
    """Make a store of somebody's own client: same server, user and TLS, but our timeouts, and no retry.

    The client itself is left alone. Nothing is sent; `Store.verify` asks before the first use. A `Store` is returned as it is.
    """
    if isinstance(redis, Store):
        return redis
    chosen = settings or Settings()

    def reader() -> Redis:
        # A blocking read answers after `reader_block` at the latest; its socket must wait longer than that, and no more.
        return _derive(redis, chosen, read_seconds=chosen.reader_block + chosen.reader_margin)

    return Store(_derive(redis, chosen, read_seconds=chosen.command_seconds), reader, chosen, where=_where(redis))


def _derive(redis: Redis, settings: Settings, *, read_seconds: float) -> Redis:
    """A client with a pool of its own: the given client's connection arguments, with ours on top."""
    pool: Any = redis.connection_pool
    kwargs = {key: value for key, value in pool.connection_kwargs.items() if not key.startswith(_INTERNAL)}
    kwargs |= {
        # How long one answer may take. A fifth of the lease for commands: a stalled store is noticed before leases lapse.
        "socket_timeout": read_seconds,
        # Connecting is a command like any other: a host that does not answer must not hold a heartbeat up.
        "socket_connect_timeout": settings.command_seconds,
        # Off: redis-py would send INCR, XADD, scripts and MULTI twice when only the reply was lost. Callers repeat
        # idempotent verbs themselves.
        "retry": Retry(NoBackoff(), 0),
        "retry_on_error": [],
        # A PING before a command would double its round trips; heartbeats are health check enough.
        "health_check_interval": 0,
        "decode_responses": False,
        # One shape of reply everywhere: lists.
        "protocol": 2,
    }
    if _is_sentinel(pool):
        kwargs |= {"connection_class": prompt(pool.connection_class)}  # told, or TLS to the servers would be forgotten
        kwargs.pop("connection_pool", None)
        return Redis.from_pool(SentinelConnectionPool(pool.service_name, pool.sentinel_manager, **kwargs))
    if pool.connection_class in (Connection, SSLConnection):
        # The kernel drops a connection whose data nobody acknowledges: keepalive alone does not while data is in flight.
        options: dict[int, int] = {}
        user_timeout = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux only
        if user_timeout is not None:
            options[user_timeout] = round(settings.lease * 1000)
        kwargs |= {"socket_keepalive": True, "socket_keepalive_options": options}
    return Redis.from_pool(ConnectionPool(connection_class=prompt(pool.connection_class), **kwargs))


def _is_sentinel(pool: object) -> bool:
    return isinstance(pool, SentinelConnectionPool)


def _where(redis: Redis) -> str:
    """The server's address without user and password."""
    pool: Any = redis.connection_pool
    if _is_sentinel(pool):
        return f"sentinel service {pool.service_name}"
    kwargs = pool.connection_kwargs
    return str(kwargs["path"]) if kwargs.get("path") else f"{kwargs.get('host', '?')}:{kwargs.get('port', '?')}"


def _client(url: str) -> Redis:
    try:
        parts = urlsplit(url)
    except ValueError:
        raise InvalidSettings("the store URL is not readable: check host and port") from None
    if parts.scheme in ("redis+sentinel", "rediss+sentinel"):
        return _sentinel_client(url)
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise InvalidSettings(
            f"store URL with scheme {shown(parts.scheme)}: use redis://, rediss://, unix:// or redis+sentinel://"
        )
    untyped: Any = Redis  # redis-py leaves from_url and master_for partly untyped
    try:
        client: Redis = untyped.from_url(url)
    except (ValueError, TypeError):  # its text may quote the URL, and with it the password
        raise InvalidSettings(
            f"the {parts.scheme}:// URL is not readable: check port, database number and query"
        ) from None
    return client


def _sentinel_client(url: str) -> Redis:
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    path = [piece for piece in parts.path.split("/") if piece]
    try:
        addresses = [
            (host or "localhost", int(port or _SENTINEL_PORT))
            for host, _, port in (address.partition(":") for address in hosts.split(","))
        ]
        database = int(path[1]) if len(path) > 1 else 0
    except ValueError:
        addresses, database = [], 0
    if not addresses or not path:
        raise InvalidSettings("a Sentinel URL is redis+sentinel://host:port,host:port/service/db")
    kwargs: dict[str, Any] = {"db": database, **dict(parse_qsl(parts.query))}
    if credentials:
        user, _, password = credentials.partition(":")
        kwargs |= {"username": unquote(user) or None, "password": unquote(password) or None}
    if parts.scheme.startswith("rediss"):
        kwargs["ssl"] = True
    sentinel_kwargs = {"socket_timeout": 1.0, "socket_connect_timeout": 1.0}
    sentinel = Sentinel(addresses, sentinel_kwargs=sentinel_kwargs)
    untyped: Any = sentinel
    client: Redis = untyped.master_for(path[0], **kwargs)
    return client

"""The one place that builds a client. A comment says why each timeout is as it is.

URL forms:

=====================================================  ==================================================================
``redis://[user:password@]host:port/0``                 one server (Redis or Valkey)
``unix:///path/to/socket``                              one server on this machine
``redis+sentinel://[user:password@]h1:26379,h2/name/0``  the master that Sentinel names
``redis+cluster://[user:password@]h1:6379,h2:6379``      a cluster: some of its nodes
=====================================================  ==================================================================

``rediss://``, ``rediss+sentinel://`` and ``rediss+cluster://`` are the same over TLS.

What follows a ``?`` is for redis-py (``ssl_ca_certs=/path``, ``ssl_certfile``, ``ssl_keyfile``,
``ssl_check_hostname=false`` …), except:

- ``password_file=/path``: the password is the file's first line, so it is in no URL and in no environment. The file is
  read again for each new connection, as certificates, keys and CAs are. So a renewed file is used from the next
  connection on.
- ``sentinel_username``, ``sentinel_password``, ``sentinel_password_file`` and ``sentinel_tls=true``: for the sentinels
  themselves.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlencode, urlsplit

from redis.asyncio import Connection, ConnectionPool, Redis, SSLConnection
from redis.asyncio.connection import AbstractConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from barrier.errors import InvalidSettings, StoreError
from barrier.protocol.names import shown
from barrier.settings import Settings
from barrier.store.clients import refuse_unusable
from barrier.store.cluster import Address, ClusterMap, ClusterPool
from barrier.store.connection import store_connection
from barrier.store.diagnosis import diagnosed
from barrier.store.fitness import Role, check_kind, check_rights
from barrier.store.sentinel import MasterConnection
from barrier.store.standing import IDLE_SECONDS, PasswordFile, Standing, user_of
from barrier.store.store import Store, check_info, translated
from barrier.store.urls import OURS, YES, check_tls_files, options

__all__ = ["adopt", "connect"]


_INTERNAL = ("himport_registry", "maint_", "orig_", "maintenance_")
"""Connection arguments that redis-py adds for itself and that must not be handed to a second pool."""

_SENTINEL_PORT = 26379
_PORT = 6379
_SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
_LONGEST_SECRET = 4_096
_ASK_SENTINEL_SECONDS = 1.0
"""How long a sentinel may take to answer before the next one is asked."""

# Off: CLIENT SETINFO is a right that a rank's user does not have, and every connection would leave a line in the ACL log.
_NO_SETINFO: dict[str, Any] = {"driver_info": None}


async def connect(url: str, *, settings: Settings | None = None, role: Role | None = None) -> Store:
    """Connect to the store at a URL and make sure that the guarantees hold on it.

    Args:
        url: see the module's table.
        settings: the times; ``None`` for the defaults.
        role: the role of the URL's user; it decides which commands must be allowed. By default the role that fits the
            user's rights.

    Raises:
        InvalidSettings: the URL is not of a form above, or the password's file cannot be read.
        StoreUnavailable: nobody answers there.
        StoreRefused: wrong password, or a right is missing.
        StoreUnsuitable: it evicts keys, is a replica, is older than Redis 6.2 / Valkey 7.2, does not know a command, or is a sentinel
            or a cluster's node where the URL says one server.
    """
    client = _client(url, settings or Settings())
    store = adopt(client, settings=settings)
    pool: Any = client.connection_pool
    store.belongings = (client, *(pool.sentinel_manager.sentinels if _is_sentinel(pool) else ()))
    try:
        if isinstance(pool, ClusterPool):
            await _verify_nodes(pool, store)
        await store.verify()
        await check_rights(store, user_of(pool.connection_kwargs), role)
    except StoreError as error:
        try:
            better = await diagnosed(error, pool, store.settings.command_seconds)
        finally:
            await store.close()
        raise better from error.__cause__
    except BaseException:
        await store.close()
        raise
    return store


async def _verify_nodes(pool: ClusterPool, store: Store) -> None:
    """Verify every master of a cluster: each may hold a group, so none of them may evict keys."""
    with translated(store.where):
        nodes = await pool.cluster.masters()
    kwargs = {key: value for key, value in pool.connection_kwargs.items() if key != "cluster"}
    for host, port in nodes:
        made = ConnectionPool(connection_class=pool.cluster.node_class, host=host, port=port, **kwargs)
        node = adopt(Redis.from_pool(made), settings=store.settings)
        node.spread = True  # a node of a cluster is what is expected here
        try:
            await node.verify()
        finally:
            await node.close()
            await made.aclose()


def adopt(redis: Redis | Store, *, settings: Settings | None = None) -> Store:
    """Make a store of a caller's own client: same server, user and TLS, but our timeouts, and no retry.

    The client itself is not changed. Nothing is sent; `Store.verify` asks before the first use. A `Store` is returned
    as it is.
    """
    if isinstance(redis, Store):
        return redis
    refuse_unusable(redis)
    chosen = settings or Settings()

    def judge(info: dict[str, Any], where: str) -> None:
        if "sentinel" in (info.get("redis_mode"), info.get("server_mode")):
            return  # no store at all: `Store.verify` says so, with what it knows
        check_kind(info, where, in_cluster=store.spread)
        check_info(info, where)

    standing = Standing(judge)

    def reader() -> Redis:
        # A blocking read answers after `reader_block` at the latest; its socket must wait longer than that, and no more.
        return _derive(redis, chosen, standing, read_seconds=chosen.reader_block + chosen.reader_margin)

    commands = _derive(redis, chosen, standing, read_seconds=chosen.command_seconds)
    spread = isinstance(redis.connection_pool, ClusterPool)
    store = Store(commands, reader, chosen, where=_where(redis), spread=spread)
    return store


def _derive(redis: Redis, settings: Settings, standing: Standing, *, read_seconds: float) -> Redis:
    """A client with a pool of its own: the given client's connection arguments, some of them replaced by ours."""
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
        **_NO_SETINFO,
    }
    if isinstance(pool, ClusterPool):
        cluster: ClusterMap = kwargs.pop("cluster")
        kwargs |= {"node_class": store_connection(cluster.node_class, standing), **_careful(settings)}
        return Redis.from_pool(ClusterPool(cluster, **kwargs))
    if _is_sentinel(pool):
        # Passed on, or TLS to the servers would be lost.
        made: type[AbstractConnection] = pool.connection_class
        checked = type(f"Checked{made.__name__}", (MasterConnection, made), {})
        kwargs |= {"connection_class": store_connection(checked, standing)}
        kwargs |= {"ask_every": settings.lease, **_careful(settings)}
        kwargs.pop("connection_pool", None)
        return Redis.from_pool(SentinelConnectionPool(pool.service_name, pool.sentinel_manager, **kwargs))
    if pool.connection_class in (Connection, SSLConnection):
        kwargs |= _careful(settings)
    return Redis.from_pool(ConnectionPool(connection_class=store_connection(pool.connection_class, standing), **kwargs))


def _careful(settings: Settings) -> dict[str, Any]:
    """Socket options: the kernel drops a connection whose data nobody acknowledges, and it keeps an idle one alive, so that balancers do not drop it.

    Keepalive alone does not notice a partition while sent data is not acknowledged.
    """
    wanted = {
        "TCP_USER_TIMEOUT": round(settings.lease * 1000),
        "TCP_KEEPIDLE": round(IDLE_SECONDS),
        "TCP_KEEPINTVL": round(IDLE_SECONDS),
        "TCP_KEEPCNT": 3,
    }
    options = {getattr(socket, name): value for name, value in wanted.items() if hasattr(socket, name)}
    return {"socket_keepalive": True, "socket_keepalive_options": options}


def _is_sentinel(pool: object) -> bool:
    return isinstance(pool, SentinelConnectionPool)


def _where(redis: Redis) -> str:
    """The server's address without user and password."""
    pool: Any = redis.connection_pool
    if _is_sentinel(pool):
        return f"sentinel service {pool.service_name}"
    if isinstance(pool, ClusterPool):
        return "cluster " + ",".join(f"{host}:{port}" for host, port in pool.cluster.seeds)
    kwargs = pool.connection_kwargs
    if kwargs.get("path"):
        return str(kwargs["path"])
    return f"{kwargs.get('host', 'localhost')}:{kwargs.get('port', _PORT)}"


def _client(url: str, settings: Settings) -> Redis:
    if not isinstance(url, str):  # pyright: ignore[reportUnnecessaryIsInstance]  from untyped code
        raise InvalidSettings(f"a store URL is text, and this is {type(url).__name__}: redis://host:port/0")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise InvalidSettings("the store URL is not readable: check host and port") from None
    if parts.scheme not in _SCHEMES:
        raise InvalidSettings(
            f"store URL with scheme {shown(parts.scheme)}: use redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://"
        )
    scheme, _, kind = parts.scheme.partition("+")
    own = options(parts)
    query = {name: value for name, value in own.items() if name not in OURS}
    if not kind:
        kwargs = _arguments(parts, parts.netloc, parts.path, query)
        _use_secret(kwargs, own, "password", given="password" in kwargs)
        return _checked(ConnectionPool(**kwargs), parts.scheme)
    credentials, _, hosts = parts.netloc.rpartition("@")
    plain = parts._replace(scheme=scheme)
    path = [piece for piece in parts.path.split("/") if piece]
    if kind == "sentinel":
        addresses = _addresses(hosts, _SENTINEL_PORT)
        database = path[1] if len(path) == 2 else "0"
        if not addresses or len(path) not in (1, 2) or not database.isdecimal():
            raise InvalidSettings("a Sentinel URL is redis+sentinel://host:port,host:port/service/db")
    else:
        addresses, database = _addresses(hosts, _PORT), "0"
        if not addresses or path not in ([], ["0"]):
            raise InvalidSettings(
                "a cluster URL is redis+cluster://host:port,host:port; a cluster has only the database 0"
            )
    kwargs = _arguments(plain, f"{credentials}@h" if credentials else "h", f"/{database}", query)
    _use_secret(kwargs, own, "password", given="password" in kwargs)
    node_class: type[Connection] = kwargs.pop("connection_class", Connection)
    del kwargs["host"]
    if kind == "sentinel":
        return _sentinel_client(addresses, unquote(path[0]), kwargs, own, over_tls=node_class is SSLConnection)
    kwargs.pop("db", None)
    patient = {"socket_timeout": settings.command_seconds, "socket_connect_timeout": settings.command_seconds}
    asking: dict[str, Any] = {**kwargs, **patient, **_NO_SETINFO, "retry": Retry(NoBackoff(), 0), "protocol": 2}
    made: Any = store_connection(node_class)
    _checked(ConnectionPool(connection_class=made, **asking), parts.scheme)
    return Redis.from_pool(ClusterPool(ClusterMap(addresses, made, asking), **kwargs, protocol=2))


def _checked(pool: ConnectionPool, scheme: str) -> Redis:
    """A client of this pool; raises `InvalidSettings` if a connection cannot be made from the URL."""
    check_tls_files(pool.connection_kwargs)
    try:
        pool.make_connection()
    except (TypeError, ValueError, RedisError):
        raise InvalidSettings(
            f"the {scheme}:// URL says something after its ? that is not understood: see barrier.connect"
        ) from None
    return Redis.from_pool(pool)


def _arguments(parts: SplitResult, netloc: str, path: str, query: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of a connection, as redis-py reads them from a URL."""
    try:
        untyped: Any = parse_url(parts._replace(netloc=netloc, path=path, query=urlencode(query)).geturl())
    except (ValueError, TypeError):  # its text may quote the URL, and with it the password
        raise InvalidSettings(
            f"the {parts.scheme}:// URL is not readable: check port, database number and query"
        ) from None
    return dict(untyped)


def _addresses(hosts: str, port: int) -> list[Address]:
    """``host:port,host``; empty if one of them is not readable."""
    found: list[Address] = []
    for text in hosts.split(",") if hosts else ():
        try:
            one = urlsplit(f"//{text}")
            found.append((one.hostname or "localhost", one.port or port))
        except ValueError:
            return []
    return found


def _use_secret(kwargs: dict[str, Any], own: Mapping[str, str], name: str, *, given: bool) -> None:
    """Let the connections read their password from the file that the URL names, if it names one."""
    path = own.get(f"{name}_file")
    if path is None:
        return
    if given:
        raise InvalidSettings(f"the URL has a password and {name}_file: leave one of them out")
    _secret(name, path)  # a mistake in the file is reported now
    kwargs["credential_provider"] = PasswordFile(lambda: _secret(name, path), kwargs.pop("username", None))


def _secret(name: str, path: str) -> str:
    """The password that is in a file now."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            secret = file.readline(_LONGEST_SECRET + 2).rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InvalidSettings(f"{name}_file {path} cannot be read: {reason}") from None
    if not 1 <= len(secret) <= _LONGEST_SECRET:
        raise InvalidSettings(
            f"{name}_file {path} has {len(secret):,} characters on its first line; a password has 1 to {_LONGEST_SECRET:,}"
        )
    return secret


def _sentinel_client(
    addresses: Sequence[Address], service: str, kwargs: dict[str, Any], own: Mapping[str, str], *, over_tls: bool
) -> Redis:
    asking: dict[str, Any] = {
        "socket_timeout": _ASK_SENTINEL_SECONDS,
        "socket_connect_timeout": _ASK_SENTINEL_SECONDS,
        # Off: by default each sentinel would be asked eleven times, for some ten seconds, before the next one.
        "retry": Retry(NoBackoff(), 0),
        **_NO_SETINFO,
        **{name: own[f"sentinel_{name}"] for name in ("username", "password") if f"sentinel_{name}" in own},
    }
    _use_secret(asking, own, "sentinel_password", given="sentinel_password" in own)
    if own.get("sentinel_tls", "false").lower() in YES:
        asking |= {"ssl": True, **{name: value for name, value in kwargs.items() if name.startswith("ssl_")}}
    sentinel = Sentinel(addresses, sentinel_kwargs=asking)
    # Otherwise a reader that is cancelled while it looks for the master reads on for ever.
    for asked in sentinel.sentinels:
        asked.connection_pool.connection_class = store_connection(asked.connection_pool.connection_class, Standing())
    untyped: Any = sentinel
    client: Redis = untyped.master_for(service, **kwargs, **({"ssl": True} if over_tls else {}))
    pool: Any = client.connection_pool
    _checked(pool, "redis+sentinel")
    return client

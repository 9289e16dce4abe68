"""Finds out why connecting failed, if the error does not say it: this asks the other side, once, what it is.

A plain connection to a port that speaks TLS is reset. A TLS connection to a plain port waits for ever. A sentinel does
not know the commands of a cluster. In these cases the error should give the right form of the URL, and not the symptom.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

from redis import exceptions as driver
from redis.asyncio import SSLConnection
from redis.asyncio.sentinel import SentinelConnectionPool

from barrier.errors import StoreError, StoreUnavailable, StoreUnsuitable
from barrier.protocol.names import shown
from barrier.store.cluster import ClusterPool
from barrier.store.fitness import sentinel_form
from barrier.store.wording import host_is_unknown, said

__all__ = ["diagnosed"]


_LONGEST_LINE = 80


async def diagnosed(error: StoreError, pool: Any, seconds: float) -> StoreError:  # noqa: ANN401  one of several pools
    """The same error, or one that says more.

    Args:
        error: the error of the attempt to connect.
        pool: the pool whose connection it was.
        seconds: how long one question may take.
    """
    cause = error.__cause__
    if cause is None:
        return error
    text = str(cause)
    if isinstance(pool, ClusterPool):
        places = ",".join(f"{host}:{port}" for host, port in pool.cluster.seeds)
        if "cluster support disabled" in text:
            return StoreUnsuitable(
                f"the store at {places} is no cluster; use the URL redis://{places.partition(',')[0]}/0"
            )
        if "unknown command" in text and "CLUSTER" in text.upper():
            return StoreUnsuitable(
                f"what answers at {places} is no node of a cluster: it does not know CLUSTER. If it is a sentinel, use the "
                f"URL {sentinel_form(places, ())}; if it is one server, redis://{places.partition(',')[0]}/0"
            )
        return error
    if isinstance(pool, SentinelConnectionPool):
        return await _of_sentinels(error, pool)
    kwargs = pool.connection_kwargs
    if not isinstance(error, StoreUnavailable) or kwargs.get("path") or host_is_unknown(cause) or _refused(cause):
        return error
    return await _of_server(error, kwargs, over_tls=issubclass(pool.connection_class, SSLConnection), seconds=seconds)


def _refused(cause: BaseException) -> bool:
    return said(cause) == "nothing listens there"


async def _of_server(error: StoreError, kwargs: dict[str, Any], *, over_tls: bool, seconds: float) -> StoreError:
    host, port = kwargs.get("host", "localhost"), kwargs.get("port", 6379)
    where = f"{host}:{port}"
    if over_tls:
        line = await _first_line(host, port, seconds)
        if line[:1] in (b"+", b"-"):
            return StoreUnsuitable(
                f"the store at {where} does not speak TLS on this port; use the URL redis://{where}/0"
            )
        if said(error.__cause__ or error) == "it closed the connection" and not kwargs.get("ssl_certfile"):
            return StoreUnavailable(
                f"the store at {where} closed the connection after the TLS handshake; it may want a client's certificate: name its "
                "files with ssl_certfile=PATH and ssl_keyfile=PATH in the URL"
            )
        return error
    if await _speaks_tls(host, port, seconds):
        return StoreUnsuitable(f"the store at {where} speaks TLS on this port; use the URL rediss://{where}/0")
    line = await _first_line(host, port, seconds)
    if line and line[:1] not in (b"+", b"-", b":", b"$", b"*"):
        words = shown(line.decode("utf-8", "replace"))
        return StoreUnsuitable(f"what answers at {where} is neither Redis nor Valkey: it says {words}")
    return error


async def _first_line(host: str, port: int, seconds: float) -> bytes:
    """What it answers to a PING in plain text; empty if it answers nothing."""
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(b"PING\r\n")
                return (await reader.read(_LONGEST_LINE)).partition(b"\r\n")[0]
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return b""


async def _speaks_tls(host: str, port: int, seconds: float) -> bool:
    """Whether it answers a TLS handshake. Its certificate is not checked, since nothing is sent to it."""
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname = False
    anybody.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(seconds):
            _, writer = await asyncio.open_connection(host, port, ssl=anybody)
            writer.close()
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")
    except (OSError, TimeoutError):
        return False
    return True


async def _of_sentinels(error: StoreError, pool: Any) -> StoreError:  # noqa: ANN401  redis-py's, untyped
    """Ask every sentinel which services it knows."""
    service = pool.service_name
    known: set[str] = set()
    silent: list[str] = []
    servers: list[str] = []
    answered: list[str] = []
    for asked in pool.sentinel_manager.sentinels:
        kwargs = asked.connection_pool.connection_kwargs
        where = f"{kwargs['host']}:{kwargs['port']}"
        try:
            masters: dict[Any, Any] = await asked.sentinel_masters()
        except driver.ResponseError as reply:
            if "unknown command" in str(reply):
                servers.append(where)
            else:
                silent.append(f"{where}: {said(reply)}")
        except (driver.RedisError, OSError) as failure:
            silent.append(f"{where}: {said(failure)}")
        else:
            answered.append(where)
            known |= {name.decode() if isinstance(name, bytes) else str(name) for name in masters}
    if service in known:
        return error
    if answered:
        return StoreUnsuitable(
            f"the sentinels at {','.join(answered)} know no service {shown(service)}; "
            f"use the URL {sentinel_form(','.join(answered), sorted(known))}"
        )
    if servers:
        return StoreUnsuitable(
            f"what answers at {servers[0]} is a server and no sentinel; use the URL redis://{servers[0]}/0"
        )
    return StoreUnavailable(f"no sentinel answers for the service {shown(service)} ({'; '.join(silent[:4])})")

"""The connected store, and the one place that turns a driver's error into one of ours."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Literal, TypeAlias

from redis import exceptions as driver
from redis.asyncio import Redis

from barrier.errors import (
    StoreCorrupt,
    StoreError,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    StoreUnsuitable,
)
from barrier.log import logger
from barrier.settings import Settings
from barrier.store.connection import at_rest, pack
from barrier.store.fitness import check_commands, check_kind, is_fake
from barrier.store.wording import host_is_unknown, said, scrubbed

__all__ = ["Store", "StreamEntry", "check_info", "is_spoiled", "raw_entries", "stream_entries", "translated"]


_MINIMUM_VERSIONS = {"redis": (6, 2), "valkey": (7, 2)}
_SAFE_POLICY = "noeviction"

_MULTI, _EXEC = pack(("MULTI",)), pack(("EXEC",))

StreamEntry: TypeAlias = tuple[bytes, dict[bytes, bytes]]
"""One entry of a stream: its id and its fields."""


def stream_entries(reply: Any) -> list[tuple[str, list[StreamEntry]]]:  # noqa: ANN401  the driver's untyped answer
    """What XREAD answered, by stream; empty if nothing came in time. A deleted entry has no fields."""
    streams: list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes] | None]]]] = reply or []
    return [(key.decode(), [(entry_id, fields or {}) for entry_id, fields in entries]) for key, entries in streams]


def raw_entries(reply: Any) -> list[StreamEntry]:  # noqa: ANN401  a server's untyped answer
    """What XREAD of one stream answered, as the server says it: fields and values in turn."""
    streams: list[tuple[bytes, list[tuple[bytes, list[bytes] | None]]]] = reply or []
    return [
        (entry_id, dict(zip(flat[::2], flat[1::2], strict=True)) if flat else {})
        for _, entries in streams
        for entry_id, flat in entries
    ]


class translated:  # noqa: N801  used as a function, like contextlib's
    """Turn a driver's error into one of ours; `where` names the store without its password.

    A class, because every report goes through it, and a generator takes three times as long.
    """

    __slots__ = ("_where",)

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> Literal[False]:
        """Raise the translation of what was raised inside, if that is a driver's."""
        ours = _translation(error, self._where)
        if ours is not None:
            if isinstance(error, driver.ResponseError):
                error.args = (scrubbed(str(error)),)  # a log of the error with its cause must not show what was sent
            raise ours from error
        return False


def _translation(error: BaseException | None, where: str) -> StoreError | None:
    """Our error for a driver's error; ``None`` if it is not a driver's."""
    match error:
        case None | StoreError():
            return None
        case driver.AuthenticationError() | driver.AuthorizationError() | driver.NoPermissionError():
            return StoreRefused(f"the store at {where} refused: {said(error)}. Check user, password and rights.")
        case driver.ConnectionError() if "max number of clients" in str(error):
            return StoreUnavailable(
                f"the store at {where} takes no more clients now: raise its maxclients, or end clients that are not needed"
            )
        case driver.BusyLoadingError() | driver.MaxConnectionsError():
            return StoreUnavailable(f"the store at {where} cannot answer now: {said(error)}")
        case TimeoutError() if error.errno is None:
            return None  # a caller's own deadline, and no late store: the kernel's error has a number
        case driver.ConnectionError() | driver.TimeoutError() | OSError() | asyncio.IncompleteReadError():
            return _no_answer(error, where)
        case driver.OutOfMemoryError():
            return StoreFull(f"the store at {where} is out of memory; nothing was written. Raise maxmemory.")
        case driver.ReadOnlyError():
            return _demoted(where)
        case driver.AskError():
            return _slot_elsewhere(error, where)
        case driver.ResponseError():
            return _from_reply(error, where)
        case driver.RedisError():
            return StoreUnavailable(f"the store at {where} failed: {said(error)}")
        case _:
            return None


def _no_answer(error: BaseException, where: str) -> StoreUnavailable:
    if host_is_unknown(error):
        return StoreUnavailable(f"the store's host in {where} is not known: {said(error)}. Check the host in the URL.")
    return StoreUnavailable(f"no answer from the store at {where}: {said(error)}")


def _slot_elsewhere(error: driver.AskError, where: str) -> StoreUnavailable:
    """A cluster's slot that has moved (`MovedError`, which is an `AskError`) or is moving. redis-py keeps a number and an address only."""
    untyped: Any = error
    node = scrubbed(f"{untyped.host}:{untyped.port}")
    if isinstance(error, driver.MovedError):
        return StoreUnavailable(
            f"the store at {where} has moved slot {error.slot_id} to {node}; the next call goes there"
        )
    return StoreUnavailable(
        f"the store at {where} is moving slot {error.slot_id} to {node}; calls fail until all of its keys are there"
    )


def _from_reply(error: driver.ResponseError, where: str) -> StoreError:
    """The error for an error reply. Only what our scripts find and a key of the wrong type are permanent; an unknown reply may pass."""
    text = scrubbed(str(error))
    if "RANKGATE_CORRUPT" in text:
        return StoreCorrupt(text.split("RANKGATE_CORRUPT", 1)[1].strip() + "; move or delete that key, then try again")
    if "WRONGTYPE" in text:
        return StoreCorrupt(f"a key in the store at {where} has the wrong type: {text}")
    if "OOM" in text:
        return StoreFull(f"the store at {where} is out of memory; nothing was written. Raise maxmemory.")
    if any(word in text for word in ("NOAUTH", "WRONGPASS", "NOPERM", "ACL failure", "invalid username-password")):
        return StoreRefused(f"the store at {where} refused: {said(error)}. Check user, password and rights.")
    if "READONLY" in text:
        return _demoted(where)
    if "DB index is out of range" in text:
        return StoreUnsuitable(
            f"the store at {where} has no database of that number: choose another at the URL's end, such as /0"
        )
    return StoreUnavailable(f"the store at {where} cannot answer now: {text}")


def _demoted(where: str) -> StoreUnsuitable:
    return StoreUnsuitable(f"the store at {where} is a replica; connect to its master", passes=True)


class Store:
    """A connected store: one client for commands, and a new one for every blocking reader.

    Made by `barrier.connect`; every timeout has been chosen there.

    Attributes:
        commands: for commands that answer at once; retries are off, so nothing is sent twice.
        settings: the times that the clients were built for.
        where: the address without user and password, for messages.
        read_only_scripts: whether the server is known to have EVAL_RO and EVALSHA_RO (Redis 7.0, any Valkey).
        spread: whether groups lie on several servers, as in a cluster.
        belongings: clients that were made for this store and are closed with it, such as those that ask the sentinels.
    """

    def __init__(
        self,
        commands: Redis,
        make_reader: Callable[[], Redis],
        settings: Settings,
        where: str,
        *,
        spread: bool = False,
    ) -> None:
        self.belongings: Sequence[Redis] = ()
        self.commands: Any = commands  # redis-py's annotations give every command both sync and async results
        self._make_reader = make_reader
        self.settings = settings
        self.where = where
        self.read_only_scripts: bool = False
        self.spread = spread
        self._verified = False
        self._verifying = asyncio.Lock()

    def reader(self) -> Any:  # noqa: ANN401  as `commands`
        """A new client for one blocking reader; the caller closes it."""
        return self._make_reader()

    def place_of(self, key: str) -> str:
        """A text that is the same for keys that one command may touch together."""
        return key[: key.find("}") + 1] if self.spread else ""

    async def local_address(self) -> str:
        """The IP address from which this process reaches the store; the loopback address over a Unix socket and in a fake store.

        Raises:
            StoreError: no connection.
        """
        with self.errors():
            pool = self.commands.connection_pool
            connection = await pool.get_connection()
            try:
                # The driver hands out no socket. If a later version renames the writer, a test fails.
                ask: Any = getattr(getattr(connection, "_writer", None), "get_extra_info", None)
                found: Any = ask("sockname") if ask is not None else None
            finally:
                await pool.release(connection)
        match found:
            case (str(host), int(), *_):
                return (
                    "127.0.0.1" if host == "::1" else host
                )  # an engine that listens on all IPv4 addresses listens there, too
            case _:
                return "127.0.0.1"

    def errors(self) -> AbstractContextManager[None]:
        """Translate what the driver raises inside."""
        return translated(self.where)

    async def exchange(self, commands: Sequence[Sequence[Any] | bytes]) -> list[Any]:
        """Send commands, or what `pack` made of them, in one go, and read one raw reply for each; an error reply is a value.

        A report sent through the driver's pipeline costs two to three times the CPU, mostly for its many replies, and
        the dispatch after the last arrival waits for it. One deadline covers all replies; nothing is sent twice.
        """
        packed = b"".join([command if isinstance(command, bytes) else pack(command) for command in commands])
        pool = self.commands.connection_pool
        connection = pool.get_available_connection()
        try:
            if not at_rest(connection):
                await pool.ensure_connection(connection)
            await connection.send_packed_command(packed)
            async with asyncio.timeout(connection.socket_timeout):
                return [await _reply(connection) for _ in commands]
        except BaseException as error:  # replies may be left unread: the next call must not take them for its own
            await connection.disconnect(nowait=True)
            if isinstance(error, TimeoutError):
                raise driver.TimeoutError(f"Timeout reading from {self.where}") from None
            raise
        finally:
            await pool.release(connection)

    async def when_pushed(
        self,
        reader: Any,  # noqa: ANN401  as `reader` makes it
        read: Sequence[Any],
        then: Sequence[Any],
        *,
        settled: Callable[[Any], bool] | None = None,
    ) -> tuple[Any, Any]:
        """Send a blocking read and, right behind it, a command that the server runs at the instant at which the read ends.

        With `settled`, the command also runs once before the read. If `settled` is true for that reply, this does not
        wait: the first reply is then ``None``, and the second is that reply.

        A server runs the commands of one client in their order, and runs the command behind a blocked one as soon as
        that is over (``processUnblockedClients`` in Redis and Valkey). So no round trip lies between a push and the
        command.

        Returns both replies, raw; an error reply is a value. The second is ``None`` if a test's clock ended the read. A
        cancellation closes the connection, and the command may still have run.
        """
        pool = reader.connection_pool
        connection = await pool.get_connection()
        try:
            packed = pack(then)
            await connection.send_packed_command((packed if settled else b"") + pack(read) + packed)
            async with asyncio.timeout(connection.socket_timeout):
                if settled and settled(tried := await _reply(connection)):
                    await connection.disconnect(nowait=True)
                    return None, tried
                first = await _reply(connection)
                second = await _reply(connection) if connection.is_connected else None
            return first, second
        except TimeoutError:
            await connection.disconnect(nowait=True)
            raise driver.TimeoutError(f"Timeout reading from {self.where}") from None
        finally:
            await pool.release(connection)

    async def transact(self, commands: Sequence[Sequence[Any] | bytes], *, may_fail: Container[int] = ()) -> list[Any]:
        """Run commands in one MULTI, in one round trip; return their raw replies. Raises the driver's error for the first that failed.

        Args:
            commands: the commands, or what `pack` made of them.
            may_fail: the places of commands that may fail. If the server takes the transaction, their error replies are
                values.
        """
        queued = await self.exchange([_MULTI, *commands, _EXEC])
        results: Any = queued.pop()
        for command, reply in [*zip([_MULTI, *commands], queued, strict=True), (_EXEC, results)]:
            _raise_error(command, reply)
        for place, (command, reply) in enumerate(zip(commands, results, strict=True)):
            if place not in may_fail:
                _raise_error(command, reply)
        return results

    async def append_answer(self, key: str, entries: Sequence[Sequence[Any]]) -> None:
        """Append an answer's pieces, in one MULTI.

        If a rank has taken the stream's last possible id, the stream is begun anew: its text is lost, but the writer
        does not wait for ever.

        Raises:
            StoreError: it was not written.
        """
        with self.errors():
            said = await self.transact(entries, may_fail=range(len(entries)))
            if not any(isinstance(reply, driver.ResponseError) and "exhausted" in str(reply) for reply in said):
                for command, reply in zip(entries, said, strict=True):
                    _raise_error(command, reply)
                return
        await self.append_if_possible(key, entries)

    async def append_if_possible(self, key: str, entries: Sequence[Sequence[Any] | bytes]) -> None:
        """Append hints or history to a stream that refused them, after it was deleted. Raises no error of the store.

        Every rank may append to these streams, and a rank that takes the last possible id leaves none for the others.
        Such a stream, or a key of another type in its place, is deleted first. PEXPIRE deletes it: everybody who may
        append has the right to that command.
        """
        try:
            with self.errors():
                said = await self.transact([("PEXPIRE", key, -1), *entries], may_fail=range(len(entries) + 1))
                for command, reply in zip(entries, said[1:], strict=True):
                    _raise_error(command, reply)
        except StoreError as error:
            logger.debug("{} takes no more entries: {}", key, error)
        else:
            logger.warning("{} took no more entries, so it was begun anew: its old entries are lost", key)

    async def verify(self, *, again: bool = False) -> None:
        """Refuse a store on which the guarantees would not hold. Asks once, unless told to ask again.

        Raises:
            StoreUnsuitable: evicts keys, is a replica, or is too old.
            StoreRefused: wrong password, or no right to ask (INFO).
            StoreUnavailable: no answer.
        """
        async with self._verifying:
            if self._verified and not again:
                return
            with self.errors():
                try:
                    info: dict[str, Any] = await self.commands.info()
                except driver.ResponseError as error:
                    if not re.search(r"unknown command\W+info", str(error), re.IGNORECASE):
                        raise  # for example, the database does not exist
                    _say_unchecked()  # fakeredis has no INFO; a server that hides it cannot be judged
                    info = {}
            check_kind(info, self.where, in_cluster=self.spread)
            kind, version = check_info(info, self.where)
            self.read_only_scripts = bool(version) and (kind == "valkey" or version >= (7, 0))
            if not is_fake(self.commands.connection_pool):
                await check_commands(self)
            self._verified = True

    async def close(self) -> None:
        """Close the command client and what else was made for this store."""
        await self.commands.aclose()
        for client in self.belongings:
            await client.aclose()


async def _reply(connection: Any) -> Any:  # noqa: ANN401  redis-py's connection, and whatever the command answers
    try:
        return await connection.read_response(timeout=math.inf)  # the caller has a deadline for all of them
    except driver.ResponseError as error:
        return error


def is_spoiled(reply: object) -> bool:
    """Whether a reply says that the stream takes no more entries: its last possible id is taken, or it is no stream."""
    return isinstance(reply, driver.ResponseError) and any(word in str(reply) for word in ("exhausted", "WRONGTYPE"))


def _raise_error(command: Sequence[Any] | bytes, reply: object) -> None:
    if isinstance(reply, driver.RedisError):
        words = command.decode().split("\r\n")[2::2] if isinstance(command, bytes) else command
        reply.args = (f"{reply} (at {' '.join(str(word) for word in words[:2])})",)
        raise reply


@cache
def _say_unchecked() -> None:
    """Logged once for each process, not for each client."""
    logger.warning("the store does not answer INFO: its version, role and eviction policy are unchecked")


def check_info(info: dict[str, Any], where: str) -> tuple[str, tuple[int, ...]]:
    """Judge what INFO said; raise `StoreUnsuitable` with the value, the limit and what to do.

    Returns:
        ``redis`` or ``valkey``, and major and minor version; empty if INFO did not say it.
    """
    policy = info.get("maxmemory_policy", _SAFE_POLICY)
    if policy != _SAFE_POLICY:
        raise StoreUnsuitable(
            f"the store at {where} has maxmemory-policy {policy}, which may drop a barrier's key without an error; "
            f"set maxmemory-policy {_SAFE_POLICY}"
        )
    if info.get("role", "master") != "master":
        master = ":".join(str(info[key]) for key in ("master_host", "master_port") if key in info)
        raise StoreUnsuitable(f"the store at {where} is a replica of {master}; connect to its master", passes=True)
    kind = "valkey" if "valkey_version" in info else "redis"
    version = str(info.get(f"{kind}_version", ""))
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers and numbers < _MINIMUM_VERSIONS[kind]:
        wanted = ".".join(str(part) for part in _MINIMUM_VERSIONS[kind])
        raise StoreUnsuitable(f"the store at {where} is {kind} {version}; {kind} {wanted} or newer is needed")
    return kind, numbers

"""Connections that send without delay and can be cancelled. Commands are packed in C, partly beforehand.

redis-py's asyncio client packs in Python, about 0.7 µs for each of a script's keys. And before Python 3.12 its sends lose cancellations: it
wraps each into ``asyncio.wait_for``, which starts a task and, if the cancellation arrives when that task has just finished, swallows
it (github.com/python/cpython/issues/86296). A reader that was cancelled then reads on for ever, and the task that waits
for its end hangs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import hiredis
from redis import exceptions as driver
from redis.asyncio.connection import AbstractConnection

from barrier.errors import StoreError
from barrier.store.standing import IDLE_SECONDS, Standing, facts_of, is_about_the_server, signature_of

__all__ = ["GAP", "Arguments", "StoreConnection", "Template", "at_rest", "pack", "store_connection"]


@dataclass(frozen=True, slots=True)
class Arguments:
    """Several arguments of a command, packed beforehand."""

    count: int
    packed: bytes

    @classmethod
    def of(cls, words: Sequence[str]) -> Arguments:
        """Pack these."""
        return cls(len(words), _pack_words(words))


def pack(command: Sequence[Any]) -> bytes:
    """One command as it goes over the wire; an `Arguments` among its words stands for as many as it holds.

    Raises:
        redis.exceptions.DataError: a word is neither text, bytes nor a number.
    """
    if Arguments not in map(type, command):
        return _packed(command)
    count = 0
    pieces: list[bytes] = [b""]
    words: list[Any] = []
    for word in command:
        if isinstance(word, Arguments):
            pieces += (_pack_words(words), word.packed)
            count += len(words) + word.count
            words.clear()
        else:
            words.append(word)
    pieces.append(_pack_words(words))
    pieces[0] = b"*%d\r\n" % (count + len(words))
    return b"".join(pieces)


GAP = "\0"
"""Stands for a word that a `Template` leaves open."""


class Template:
    """A command that is packed beforehand, except for some of its words.

    To pack a report's commands anew takes a sixth of the time from an arrival to the sending of its report.

    Args:
        command: the command; `GAP` stands for each word that is given later.
    """

    def __init__(self, command: Sequence[Any]) -> None:
        packed = pack(command).replace(b"%", b"%%")
        self._format = packed.replace(pack((GAP,)).partition(b"\r\n")[2], b"$%d\r\n%b\r\n")

    def fill(self, *words: bytes) -> bytes:
        """The packed command, with these words in its gaps."""
        values: list[int | bytes] = []
        for word in words:
            values += (len(word), word)
        return self._format % tuple(values)


def _pack_words(words: Sequence[Any]) -> bytes:
    """The words without the line that counts them."""
    packed = _packed(words)
    return packed[packed.index(b"\r\n") + 2 :]


def _packed(words: Sequence[Any]) -> bytes:
    untyped: Any = hiredis  # its annotations lack the result's type, and allow only one word
    try:
        packed: bytes = untyped.pack_command(tuple(words))
    except TypeError as error:
        raise driver.DataError(f"a command has a word that cannot be sent: {error}") from error
    return packed


class StoreConnection(AbstractConnection):
    """Mixed in before a connection class of redis-py; see `store_connection`."""

    standing: Standing | None = None
    """What the connections of one store share."""
    takes_standing = True
    """Whether it may lead to the wrong server."""

    _reader: Any  # a StreamReader, or a fake one
    _writer: Any  # a StreamWriter, or a fake one
    _turn: int | None = None
    _used_at = 0.0
    _signature: object = None

    @property
    def at_rest(self) -> bool:
        """Whether it is connected and not overdue, and the event loop has not seen the server hang up."""
        return self.is_connected and not self._reader.at_eof() and not self.overdue

    @property
    def overdue(self) -> bool:
        """Whether it must be made anew before its next use: it led to the wrong server, or a balancer may have dropped it because it was idle."""
        if self.standing is None or self._turn is None:
            return False
        idle = asyncio.get_running_loop().time() - self._used_at
        return self._turn != self.standing.turn or idle > IDLE_SECONDS

    async def connect(self) -> None:
        """Connect, with the certificate files as they are now. An overdue connection is closed first."""
        if self.is_connected and self.overdue:
            await self.disconnect(nowait=True)
        tls: Any = getattr(self, "ssl_context", None)
        if tls is not None and not self.is_connected:
            signature = signature_of(tls.certfile, tls.keyfile, tls.ca_certs, tls.ca_path)
            if signature != self._signature:
                tls.context, self._signature = None, signature
        try:
            await super().connect()
        except driver.ConnectionError as error:
            if isinstance(
                error.__cause__, StoreError
            ):  # redis-py wraps what comes up while it connects to a Unix socket
                raise error.__cause__ from None
            raise

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        """Greet the server and, if there is a `standing`, judge the server: one address may lead to another server each time.

        Raises:
            StoreUnsuitable: the guarantees would not hold on it.
        """
        self._turn, standing = None, self.standing
        turn = standing.turn if standing else 0
        try:
            await super().on_connect_check_health(check_health)
            if standing is None:
                return
            if standing.judge is not None and (info := await self._info()) is not None:
                standing.judge(facts_of(info), self._host_error())
        except BaseException:  # otherwise redis-py would hand out a connection that was not greeted
            await self.disconnect(nowait=True)
            raise
        self._turn, self._used_at = turn, asyncio.get_running_loop().time()
        standing.connected(self)

    async def _info(self) -> bytes | None:
        """What INFO answers; ``None`` if the server hides it, which `Store.verify` has logged."""
        await self.send_command("INFO", check_health=False)
        untyped: Any = self
        try:
            return await untyped.read_response()
        except driver.NoPermissionError:
            return None
        except driver.ResponseError as error:
            if "unknown command" in str(error):
                return None
            raise

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  whatever the server answers
        """Read one reply. If it says that the server is the wrong one now, all connections of this standing end."""
        untyped: Any = super()
        try:
            reply = await untyped.read_response(*args, **kwargs)
        except (driver.ResponseError, driver.ConnectionError) as error:
            standing = self.standing
            if standing is not None and self._turn == standing.turn and is_about_the_server(error):
                standing.doubt(self)
            raise
        if self.standing is not None:
            self._used_at = asyncio.get_running_loop().time()
        return reply

    def hang_up(self) -> None:
        """Close at once. A task that waits for a reply gets the error that the connection broke."""
        transport = getattr(self._writer, "transport", None)  # a fake one has none
        if transport is not None:
            transport.abort()

    def pack_command(self, *args: Any) -> list[bytes]:  # noqa: ANN401  as redis-py
        """Pack one command, as redis-py's own synchronous client does: a name of two words is two arguments."""
        name = args[0].encode() if isinstance(args[0], str) else args[0]
        return [pack((*name.split(), *args[1:]))]

    async def send_packed_command(self, command: bytes | str | Iterable[bytes], check_health: bool = True) -> None:
        """Send packed commands. This starts no task, so a cancellation is never lost.

        Raises:
            redis.exceptions.TimeoutError: the kernel did not take it within the socket's timeout.
            redis.exceptions.ConnectionError: the connection broke.
        """
        if not self.is_connected:
            await self.connect()
        if check_health and self.health_check_interval:
            await self.check_health()
        packed = command.encode() if isinstance(command, str) else command
        try:
            if isinstance(packed, bytes):
                self._writer.write(packed)
            else:
                self._writer.writelines(packed)
            async with asyncio.timeout(self.socket_timeout):
                await self._writer.drain()
        except TimeoutError:
            await self.disconnect(nowait=True)
            raise driver.TimeoutError("Timeout writing to socket") from None
        except OSError as error:
            await self.disconnect(nowait=True)
            raise driver.ConnectionError(f"Error while writing to socket: {error}") from error
        except BaseException:  # half a command may have gone out: the connection is of no more use
            await self.disconnect(nowait=True)
            raise


def at_rest(connection: AbstractConnection) -> bool:
    """Whether a pooled connection can be used as it is. If not, or if it is of another kind, its pool must check it.

    redis-py checks each time, by an asynchronous read: that takes a tenth of the time from an arrival to the sending of
    its report.
    """
    return isinstance(connection, StoreConnection) and connection.at_rest


def store_connection(made: type[AbstractConnection], standing: Standing | None = None) -> type[AbstractConnection]:
    """The same class of connection, but with the sending of `StoreConnection`. A class with its own way of sending is left as it is.

    The class gets the `standing`, unless it takes none.
    """
    if made.send_packed_command is AbstractConnection.send_packed_command:
        made = type(f"Store{made.__name__}", (StoreConnection, made), {})
    if standing is None or not issubclass(made, StoreConnection) or not made.takes_standing:
        return made
    bound: Any = type(made.__name__, (made,), {"standing": standing})
    return bound

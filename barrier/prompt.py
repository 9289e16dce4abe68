"""Commands that go out at once: packed in C, partly beforehand, and sent in a way that can be cancelled.

redis-py's asyncio client packs in Python, about 0.7 µs for each of a script's keys. And before Python 3.12 its sends lose cancellations: it
wraps each into ``asyncio.wait_for``, which starts a task and, if the cancellation arrives when that task has just finished, swallows
it (github.com/python/cpython/issues/86296). A reader that was told to end then reads on for ever, and whoever waits for its end hangs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import hiredis
from redis import exceptions as driver
from redis.asyncio.connection import AbstractConnection


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
    """A command that is packed beforehand but for some of its words.

    Packing a report's commands anew takes a sixth of the time between an arrival and the wire.

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
    untyped: Any = hiredis  # it leaves the result's type out, and annotates a tuple of one
    try:
        packed: bytes = untyped.pack_command(tuple(words))
    except TypeError as error:
        raise driver.DataError(f"a command has a word that cannot be sent: {error}") from error
    return packed


class PromptConnection(AbstractConnection):
    """Mixed in before a connection class of redis-py; see `prompt`."""

    _reader: Any  # a StreamReader, or a fake one
    _writer: Any  # a StreamWriter, or a fake one

    @property
    def at_rest(self) -> bool:
        """Whether it is connected and, for all that the event loop has seen, the server has not hung up."""
        return self.is_connected and not self._reader.at_eof()

    def pack_command(self, *args: Any) -> list[bytes]:  # noqa: ANN401  as redis-py
        """Pack one command, as redis-py's own synchronous client does: a name of two words is two arguments."""
        name = args[0].encode() if isinstance(args[0], str) else args[0]
        return [pack((*name.split(), *args[1:]))]

    async def send_packed_command(self, command: bytes | str | Iterable[bytes], check_health: bool = True) -> None:
        """Send what was packed. No task is started, and a cancellation always comes through.

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
    """Whether a pooled connection can be used as it is. If not, or if it is of another kind, its pool has to make sure of it.

    redis-py makes sure each time, by an asynchronous read of nothing: a tenth of the time between an arrival and the wire.
    """
    return isinstance(connection, PromptConnection) and connection.at_rest


def prompt(made: type[AbstractConnection]) -> type[AbstractConnection]:
    """The same kind of connection, sending promptly; one that has its own way of sending is left as it is."""
    if made.send_packed_command is not AbstractConnection.send_packed_command:
        return made
    return type(f"Prompt{made.__name__}", (PromptConnection, made), {})

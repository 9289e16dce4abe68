"""What the connections of one store share: whether they still lead to the right server.

The server behind an address may change: a Service or a managed store fails over, a proxy finds another server, a secret
is renewed. Old connections stay open, to a server that refuses calls. So a reply that says that the server is wrong,
and not the call, ends all connections of that store. The next call resolves the address anew, reads the files with
secrets anew, and judges the server anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from weakref import WeakSet

from redis import exceptions as driver
from redis.credentials import CredentialProvider

from barrier.errors import StoreRefused

__all__ = ["IDLE_SECONDS", "PasswordFile", "Standing", "facts_of", "is_about_the_server", "signature_of", "user_of"]


IDLE_SECONDS = 4.5
"""A connection that was idle for longer is made anew before its next use. Balancers and firewalls drop idle
connections, some after 5 s and silently; a call that uses such a connection fails. To make one anew costs two round
trips.
"""

_ORDINARY: tuple[type[driver.ResponseError], ...] = (
    driver.NoScriptError,
    driver.OutOfMemoryError,
    driver.ExecAbortError,  # an earlier reply says why a queued command was refused
    driver.NoPermissionError,
    driver.AskError,  # MOVED is one too: `barrier.store.cluster` handles both
    driver.TryAgainError,
    driver.ClusterCrossSlotError,
)
_ORDINARY_TEXTS = (
    "BUSY",
    "DB index is out of range",
    "DISCARD without",
    "EXEC without",
    "Invalid stream ID",
    "NOGROUP",
    "NOPERM",
    "OOM",
    "The ID specified",
    "The stream has exhausted",
    "WRONGTYPE",
    "syntax error",
    "unknown command",
    "unknown subcommand",
    "value is not",
    "wrong number of arguments",
)


def is_about_the_server(error: BaseException) -> bool:
    """Whether an error reply says that this server is wrong or not ready. True for every reply that is not known to be about the call."""
    if isinstance(
        error, driver.AuthenticationError | driver.BusyLoadingError
    ):  # replies, though redis-py counts them among broken connections
        return True
    if isinstance(error, driver.ConnectionError):  # how redis-py's Sentinel connection tells a READONLY
        return isinstance(error.__context__, driver.ReadOnlyError)
    if not isinstance(error, driver.ResponseError) or isinstance(error, _ORDINARY):
        return False
    text = str(error).removeprefix("ERR ")
    return not text.startswith(_ORDINARY_TEXTS) and "RANKGATE_CORRUPT" not in text


class _Hanging(Protocol):
    """The part of a connection that is used here."""

    def hang_up(self) -> None:
        """Close at once, also while a task waits for a reply."""


class Standing:
    """Shared by the connections of one store.

    Args:
        judge: raises for a server on which the guarantees would not hold, given what INFO says and the server's address.

    Attributes:
        turn: goes up with each doubt; a connection of an earlier turn is made anew before it is used.
    """

    def __init__(self, judge: Callable[[dict[str, Any], str], object] | None = None) -> None:
        self.judge = judge
        self.turn: int = 0
        self._connected: WeakSet[_Hanging] = WeakSet()

    def connected(self, connection: _Hanging) -> None:
        """Add a connection."""
        self._connected.add(connection)

    def doubt(self, finder: _Hanging) -> None:
        """End the connections: the finder's reply says that the server is the wrong one now.

        The others, blocked readers too, end at once. The finder may have replies to read; it ends before it is used again.
        """
        self.turn += 1
        others = [one for one in self._connected if one is not finder]
        self._connected.clear()
        for one in others:
            one.hang_up()


def facts_of(info: bytes | str) -> dict[str, str]:
    """What INFO says, by name."""
    text = info.decode("utf-8", "replace") if isinstance(info, bytes) else info
    pairs = (line.partition(":") for line in text.splitlines() if not line.startswith("#"))
    return {name: value for name, separator, value in pairs if separator}


def signature_of(*paths: str | None) -> tuple[tuple[int, int, int] | None, ...]:
    """A value that changes when one of the files changes, also when a link gets another target: so Kubernetes renews a secret."""
    found: list[tuple[int, int, int] | None] = []
    for path in paths:
        try:
            stat = os.stat(path) if path else None
        except OSError:
            stat = None
        found.append((stat.st_mtime_ns, stat.st_size, stat.st_ino) if stat else None)
    return tuple(found)


def user_of(kwargs: Mapping[str, Any]) -> str | None:
    """The user's name among a connection's arguments; with a password's file, the `PasswordFile` has it."""
    provider = kwargs.get("credential_provider")
    return provider.username if isinstance(provider, PasswordFile) else kwargs.get("username")


class PasswordFile(CredentialProvider):
    """Reads the password's file for every new connection: a secret is renewed in place while processes run.

    Args:
        read: reads the file, or raises with a sentence.
        username: the user, if there is one.
    """

    def __init__(self, read: Callable[[], str], username: str | None) -> None:
        self._read = read
        self.username = username

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """The user, if any, and the password as it is now. Raises `StoreRefused` while the file is not readable."""
        try:
            password = self._read()
        except ValueError as error:  # InvalidSettings is one; perhaps the file is being written now
            raise StoreRefused(str(error)) from None
        return (self.username, password) if self.username else (password,)

    async def get_credentials_async(self) -> Any:  # noqa: ANN401  as redis-py
        """As `get_credentials`."""
        return self.get_credentials()

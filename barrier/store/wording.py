"""Puts a driver's or a server's error into plain words: the cause, and never an argument of a command.

redis-py and servers quote commands with their arguments, which are reports, prompts and answers; Python puts tuples and names of classes into
its texts. None of that may get into a message or a log.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
from collections.abc import Iterator

from redis import exceptions as driver

__all__ = ["host_is_unknown", "said", "scrubbed"]


_LONGEST = 300
_DRIVERS_OWN = re.compile(
    r"Error .*connecting to |Error while (reading|writing)|Timeout |Connection closed|Multiple exceptions|Connection (lost|reset)"
)
"""The words of redis-py's own errors about the network; the exception below says more."""

_REPLIES = (
    ("Authentication required", "it wants a password"),
    ("without any password configured", "it has no password: remove the one in the URL"),
    ("invalid username-password pair", "wrong user or password, or the user is disabled"),
    ("DB index is out of range", "it has no database of that number"),
    ("max number of clients reached", "it has no connection left for another client"),
    ("running in protected mode", "it takes local connections only: protected mode is on, and no password is set"),
)
"""Part of what a server says, and our words for it."""


def said(error: BaseException) -> str:
    """What an error says, on one line, without arguments of commands and without a full stop."""
    text = scrubbed(str(error))
    for part, words in _REPLIES:
        if part in text:
            return words
    if isinstance(error, driver.InvalidResponse):
        return "it does not speak the protocol of Redis"
    if isinstance(error, asyncio.IncompleteReadError):
        return "it closed the connection"
    if text.startswith("No master found for "):
        return "no sentinel names a master now"
    if isinstance(error, OSError) or not text or _DRIVERS_OWN.match(text):
        below = next((words for one in _chain(error) if (words := _network(one))), None)
        if below is None and text.startswith("Timeout"):
            below = "it did not answer in time"
        if below is None and text.startswith("Connection closed"):
            below = "it closed the connection"
        if below is not None:
            return below
    return text or type(error).__name__


def scrubbed(text: str) -> str:
    """A server's or a driver's text on one line, without a command's arguments and a script's position, cut, without a full stop."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"^Command # \d+ \((\S* ?\S*).*\) of pipeline caused error: (.*)$", r"\2 (at \1)", text)
    text = re.sub(
        r"((?:command|subcommand) [`'\"]?[\w|.-]{1,40}[`'\"]?)[,;]? with args.*$", r"\1", text, flags=re.IGNORECASE
    )
    text = re.sub(r",? with args beginning with:.*$", "", text)
    text = re.sub(r" script: ([0-9a-f]{40}|on @).*$", "", text)
    return text[:_LONGEST].rstrip(" .")


def host_is_unknown(error: BaseException) -> bool:
    """Whether the host's name could not be resolved."""
    return any(isinstance(one, socket.gaierror) for one in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, outermost first."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__


def _network(error: BaseException) -> str | None:
    """The words for an error of the operating system; ``None`` for another error."""
    match error:
        case driver.RedisError():
            return None
        case ssl.SSLCertVerificationError():
            return _certificate(error)
        case ssl.SSLError():
            return _tls(error)
        case socket.gaierror():
            return f"its name cannot be resolved ({error.strerror or 'no reason given'})"
        case ConnectionRefusedError():
            return "nothing listens there"
        case ConnectionResetError() | ConnectionAbortedError() | BrokenPipeError() | asyncio.IncompleteReadError():
            return "it closed the connection"
        case TimeoutError():
            return "it did not answer in time"
        case OSError() if error.errno:
            path = f" ({error.filename})" if isinstance(error.filename, str) else ""
            return f"{os.strerror(error.errno).lower()}{path}"
        case OSError():
            found = re.search(r"\[Errno (\d+)\]", str(error))  # several addresses, none of which could be reached
            if found is None:
                return None
            return _network(OSError(int(found[1]), os.strerror(int(found[1]))))
        case _:
            return None


def _certificate(error: ssl.SSLCertVerificationError) -> str:
    why = error.verify_message or "it is not valid"
    if "mismatch" in why or "not valid for" in why:
        return f"its certificate is for another host ({why}): use the name that it was issued for"
    if "self-signed" in why or "self signed" in why or "local issuer" in why:
        return f"its certificate is of an authority that is not trusted here ({why}): name the authority's file with ssl_ca_certs"
    return f"its certificate is not accepted ({why})"


def _tls(error: ssl.SSLError) -> str:
    why = (error.reason or "").replace("_", " ").lower()
    if "certificate required" in why or "handshake failure" in why:
        return (
            "it ended the TLS handshake; it may want a client's certificate: name its files with ssl_certfile=PATH and "
            "ssl_keyfile=PATH in the URL"
        )
    if "wrong version number" in why or "record layer" in why:
        return "it does not speak TLS"
    if "unknown ca" in why:
        return "it does not trust the authority of the client's certificate in ssl_certfile"
    return f"TLS failed: {why or 'no reason given'}"

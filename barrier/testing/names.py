"""Checks the names that a test types: a mistyped name is an error at once, and not a test that always passes."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable

from redis.asyncio import Redis

from barrier.store.script import VERBS

__all__ = ["CountsByName", "command_name", "one_of"]


_SENT_WITHOUT_A_METHOD = frozenset(
    {"asking", "auth", "client", "cluster", "config", "del", "discard", "exec", "function", "hello", "memory", "multi"}
    | {"object", "quit", "reset", "script", "sentinel", "unwatch", "watch", "xgroup", "xinfo"}
)
"""Commands that redis-py sends under another name than its method's."""


def one_of(what: str, value: str, choices: Iterable[str]) -> str:
    """Return the value if it is one of these.

    Raises:
        ValueError: with the choices.
    """
    known = list(choices)
    if value in known:
        return value
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"there is no {what} {value!r}; {hint}There are {', '.join(known) or 'none yet'}")


def command_name(value: str) -> str:
    """Return the name, in lower case, of a command of the server or a verb of the barrier.

    Raises:
        ValueError: there is none of that name.
    """
    name = value.lower()
    if name in VERBS or name in _SENT_WITHOUT_A_METHOD or callable(getattr(Redis, name, None)):
        return name
    usual = (
        *VERBS,
        *sorted(_SENT_WITHOUT_A_METHOD),
        "get",
        "set",
        "hset",
        "xadd",
        "xread",
        "evalsha",
        "pexpire",
        "info",
    )
    near = difflib.get_close_matches(name, usual, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"there is no command {value!r}; {hint}Give a command of Redis, or a verb: {', '.join(VERBS)}")


class CountsByName(Counter[str]):
    """Counts by the name of a client; to ask for a name that no client has is an error."""

    def __init__(self, known: Collection[str]) -> None:
        super().__init__()
        self._known = known

    def __missing__(self, key: str) -> int:
        """Nothing was counted yet.

        Raises:
            ValueError: no client has that name.
        """
        one_of("client called", key, self._known)
        return 0

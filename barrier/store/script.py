"""A verb's script: its text, its header, and how it is called. The only module that knows KEYS and ARGV.

Arguments are passed by name and put in the order of the script's own header, so a wrong header fails at once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from redis.exceptions import NoScriptError, RedisError

from barrier.errors import StoreUnavailable
from barrier.store.connection import Arguments
from barrier.store.store import Store

__all__ = ["VERBS", "Script", "call", "not_understood", "run", "script"]


_READ_ONLY = ("check", "inspect")
"""Verbs that write nothing. They are sent as read-only scripts if the server knows these: then they need no right to write."""

VERBS = ("lead", "open", "restore", "dispatch", "check", "conclude", "inspect")


@dataclass(frozen=True, slots=True)
class Script:
    """One `.lua` file with the shared prelude before it, and the argument names that its header declares."""

    name: str
    text: str
    sha: str
    keys: tuple[str, ...]
    args: tuple[str, ...]
    replies: tuple[str, ...]


@cache
def script(name: str) -> Script:
    """Load one verb from the package."""
    folder = files("barrier") / "lua"
    body = (folder / f"{name}.lua").read_text("utf-8")
    text = (folder / "prelude.lua").read_text("utf-8") + "\n" + body
    return Script(
        name=name,
        text=text,
        sha=hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest(),
        keys=tuple(_header(body, "KEYS").split()),
        args=tuple(_header(body, "ARGV").split()),
        replies=tuple(re.findall(r"[A-Z_]{4,}", _header(body, "Replies"))),
    )


def _header(body: str, field: str) -> str:
    """The text of one header field, with its continuation lines."""
    lines = iter(body.splitlines())
    for line in lines:
        if line.startswith(f"-- {field}:"):
            text = line.partition(":")[2]
            for more in lines:
                if not more.startswith("--   "):
                    break
                text += " " + more[2:].strip()
            return text
    raise LookupError(f"the script has no {field} header")


async def run(
    store: Store,
    name: str,
    keys: Mapping[str, str | Arguments],
    args: Mapping[str, str | int | Sequence[str]],
) -> list[Any]:
    """Run one verb: EVALSHA; then EVAL with the whole text, if the server does not know the script (it may have been flushed)."""
    loaded = script(name)
    words = call(loaded, keys, args)
    suffix = "_RO" if name in _READ_ONLY and store.read_only_scripts else ""
    with store.errors():
        [reply] = await store.exchange([(f"EVALSHA{suffix}", loaded.sha, *words)])
        if isinstance(reply, NoScriptError):
            [reply] = await store.exchange([(f"EVAL{suffix}", loaded.text, *words)])
        if isinstance(reply, RedisError):
            raise reply
        answered: Any = reply
        if not isinstance(reply, list):
            raise not_understood(name, reply)
        return answered


def call(
    loaded: Script, keys: Mapping[str, str | Arguments], args: Mapping[str, str | int | Sequence[str]]
) -> list[str | int | Arguments]:
    """The words after a script's name: the number of keys, the keys, the arguments."""
    named = _ordered(loaded.keys, keys)
    count = sum(word.count if isinstance(word, Arguments) else 1 for word in named)
    return [count, *named, *_ordered(loaded.args, args)]


def _ordered(names: tuple[str, ...], values: Mapping[str, Any]) -> list[str | Arguments]:
    """Put named values into the header's order; a name that ends in ``...`` takes several and stands last."""
    if len(names) != len(values):
        raise LookupError(f"the header declares {names}, the call gives {tuple(values)}")
    ordered: list[str | Arguments] = []
    for name in names:
        if not name.endswith("..."):
            ordered.append(str(values[name]))
        elif isinstance(several := values[name.removesuffix("...")], Arguments):
            ordered.append(several)
        else:
            ordered.extend(several)
    return ordered


def not_understood(name: str, words: object) -> StoreUnavailable:
    """The error for an answer that is not known. It may pass: perhaps a proxy answered."""
    return StoreUnavailable(f"verb {name} was answered with {str(words)[:80]}, which this version does not understand")

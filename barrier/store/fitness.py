"""Checks a store: which kind of server answers, which commands it knows, and which commands this user may send.

This is done when a program connects. So a missing command is reported then, and not hours later by the first call that
needs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from redis import exceptions as driver

from barrier.errors import StoreRefused, StoreUnsuitable
from barrier.protocol.names import shown
from barrier.store.acl import SESSION, observer_user, planner_user, rank_user
from barrier.store.keys import Keys, NamespaceKeys

if TYPE_CHECKING:
    from barrier.store.store import Store

__all__ = [
    "NEEDS",
    "OBSERVER",
    "PLANNER",
    "RANK",
    "Role",
    "check_commands",
    "check_kind",
    "check_rights",
    "is_fake",
    "sentinel_form",
]


Role: TypeAlias = Literal["planner", "rank", "observer"]

_WAY_ROUND = frozenset({"eval_ro", "evalsha_ro"})
"""If these are missing, EVAL and EVALSHA do the same."""

_ELSEWHERE = frozenset({"info", "ping", "select", "role", "cluster|slots", "asking"})
"""Commands of every client that are not checked: only some kinds of store need them, or they are sent anyway."""

_ANY_KEYS = Keys("rankgate", "any")
_SESSION = frozenset(SESSION) - _ELSEWHERE
PLANNER = (planner_user("rankgate").allowed - _ELSEWHERE - _WAY_ROUND) | _SESSION
RANK = (rank_user(_ANY_KEYS, None).allowed - _ELSEWHERE - _WAY_ROUND) | _SESSION
OBSERVER = (observer_user("rankgate").allowed - _ELSEWHERE - _WAY_ROUND) | _SESSION
NEEDS: dict[Role, frozenset[str]] = {"planner": PLANNER, "rank": RANK, "observer": OBSERVER}
"""The commands that each role sends, with or without a key."""

_EVERYTHING = PLANNER | RANK | OBSERVER
_PLANNERS_OWN = frozenset({"hset", "hsetnx", "hdel", "xdel"})
"""A user who may send one of these is no rank and no observer."""
_RANKS_OWN = frozenset({"set", "xadd"})
"""A user who may send one of these is no observer."""

_OURS = re.compile(r"[a-z0-9-]+\.(planner|admin|observer|[a-z0-9-]+\.(observer|ranks|rank-\d+))")
"""Users that `barrier.store.acl` makes: their rights are known, and asking for more would fill the server's ACL log."""

_NO_ARGUMENTS = frozenset({"multi", "exec", "discard", "unwatch", "time"})
_UNKNOWN = re.compile(
    r"unknown (sub)?command|(un|not )support|not available|is disabled|not implemented", re.IGNORECASE
)
_PROBE = NamespaceKeys("rankgate").instances.replace("instances", "probe")
_MOST_NAMED = 6


def is_fake(pool: Any) -> bool:  # noqa: ANN401  any library's pool
    """Whether fakeredis answers its connections, and no server."""
    return any(base.__module__.partition(".")[0] == "fakeredis" for base in pool.connection_class.__mro__)


def check_kind(info: dict[str, Any], where: str, *, in_cluster: bool = False) -> None:
    """Refuse a server that needs another form of URL: a cluster's node, or a sentinel.

    Args:
        info: what INFO said.
        where: the server's address.
        in_cluster: whether a cluster's node is what was expected.

    Raises:
        StoreUnsuitable: with the URL's right form.
    """
    mode = str(info.get("redis_mode", info.get("server_mode", "")))
    if mode == "sentinel":
        names = [info[key]["name"] for key in info if re.fullmatch(r"master\d+", key) and "name" in info[key]]
        raise StoreUnsuitable(f"a sentinel answers at {where}; use the URL {sentinel_form(where, names)}")
    if not in_cluster and (mode == "cluster" or info.get("cluster_enabled") in (1, "1")):
        raise StoreUnsuitable(
            f"the store at {where} is one node of a cluster; use the URL redis+cluster://{where}, "
            "with more of its nodes after commas"
        )


def sentinel_form(addresses: str, names: Sequence[str]) -> str:
    """The URL for these sentinels, and which services they know."""
    service = names[0] if len(names) == 1 else "SERVICE"
    known = f"; it knows {', '.join(names[:_MOST_NAMED])}" if len(names) > 1 else ""
    return f"redis+sentinel://{addresses}/{service}/0{known}"


async def check_commands(store: Store) -> None:
    """Refuse a server that does not know a command, because it was renamed or a proxy hides it.

    Every command is sent without its arguments. So the server refuses each, whatever the user's rights: as unknown, or
    as wrong.

    Raises:
        StoreUnsuitable: with the commands.
    """
    names = sorted(_EVERYTHING | _WAY_ROUND)
    with store.errors():
        replies = await store.exchange([_bare(name) for name in names])
    unknown = {
        name
        for name, reply in zip(names, replies, strict=True)
        if isinstance(reply, driver.ResponseError) and _UNKNOWN.search(str(reply))
    }
    if unknown & _WAY_ROUND:
        store.read_only_scripts = False
    if missing := unknown - _WAY_ROUND:
        raise StoreUnsuitable(
            f"the store at {store.where} does not know {_listed(missing)}, and rankgate needs "
            f"{'it' if len(missing) == 1 else 'them'}: remove its rename-command, or use a server that has all commands"
        )


async def check_rights(store: Store, user: str | None, role: Role | None = None) -> None:
    """Refuse a user who lacks a command that this role needs. Without a role, the user's rights decide which role is checked.

    A user who may write as only a planner does is checked as a planner.

    Every command is queued in a transaction that is then discarded, so nothing is carried out. The server's ACL log gets
    a line for each refusal, so the users that `barrier.store.acl` makes are not checked: their rights are known.

    Raises:
        StoreRefused: with the commands that are missing, and for what.
    """
    if user is not None and _OURS.fullmatch(user):
        return
    opening = [("WATCH", _PROBE), ("UNWATCH",), ("MULTI",), ("DISCARD",), ("MULTI",), ("EXEC",)]
    names = sorted((_EVERYTHING | _WAY_ROUND) - {"watch", "unwatch", "multi", "discard", "exec"})
    with store.errors():
        replies = await store.exchange(opening)
        denied = {command[0].lower() for command, reply in zip(opening, replies, strict=True) if _command_denied(reply)}
        if not denied & {"multi", "discard"}:  # else these would be carried out
            queued = await store.exchange([("MULTI",), *(_harmless(name) for name in names), ("DISCARD",)])
            denied |= {name for name, reply in zip(names, queued[1:-1], strict=True) if _command_denied(reply)}
    if denied & _WAY_ROUND:
        store.read_only_scripts = False
    whose = role or _likely_role(denied)
    if missing := NEEDS[whose] & denied:
        name = user or "default"
        raise StoreRefused(
            f"the user {shown(name)} of the store at {store.where} may not send {_listed(missing)}, which "
            f"{'an' if whose == 'observer' else 'a'} {whose} needs. "
            f"Allow it (ACL SETUSER {name} {' '.join(f'+{command}' for command in sorted(missing))}), or use a user that "
            "rankgate acl makes"
        )


def _likely_role(denied: set[str]) -> Role:
    if not PLANNER & denied or _PLANNERS_OWN - denied:
        return "planner"
    return "rank" if _RANKS_OWN - denied else "observer"


def _command_denied(reply: object) -> bool:
    """Whether the server refuses the command itself. A refused key proves nothing: other keys may be allowed."""
    return isinstance(reply, driver.NoPermissionError) and "run the" in str(reply)


def _bare(name: str) -> tuple[str, ...]:
    words = name.upper().split("|")
    return (*words, "x") if name in _NO_ARGUMENTS else tuple(words)


def _harmless(name: str) -> tuple[str, ...]:
    """The command with arguments that it takes, for the transaction that is discarded."""
    words = tuple(name.upper().split("|"))
    return (*words, *_ARGUMENTS.get(name, (_PROBE,)))


_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "eval": ("return 1", "1", _PROBE),
    "eval_ro": ("return 1", "1", _PROBE),
    "evalsha": ("0" * 40, "1", _PROBE),
    "evalsha_ro": ("0" * 40, "1", _PROBE),
    "getrange": (_PROBE, "0", "1"),
    "hdel": (_PROBE, "f"),
    "hexists": (_PROBE, "f"),
    "hget": (_PROBE, "f"),
    "hmget": (_PROBE, "f"),
    "hset": (_PROBE, "f", "v"),
    "hsetnx": (_PROBE, "f", "v"),
    "pexpire": (_PROBE, "1"),
    "set": (_PROBE, "v", "XX"),
    "time": (),
    "xadd": (_PROBE, "NOMKSTREAM", "*", "f", "v"),
    "xdel": (_PROBE, "0-1"),
    "xrange": (_PROBE, "-", "+"),
    "xread": ("STREAMS", _PROBE, "0-0"),
    "xrevrange": (_PROBE, "+", "-"),
}


def _listed(commands: Iterable[str]) -> str:
    names = sorted(name.upper().replace("|", " ") for name in commands)
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")

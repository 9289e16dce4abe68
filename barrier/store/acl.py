"""Users of the store: for each role the fewest rights that it needs, as Redis ACL rules.

Pure: nothing is sent. ``rankgate acl`` prints the rules. A rule is one line of an ACL file or of ``redis.conf``.
Without its first word it is the arguments of ``ACL SETUSER``. Needs Redis 7.0 or Valkey 7.2 (rights by key for
reading and for writing, and selectors; redis.io/docs/latest/operate/oss_and_stack/management/security/acl).

Rights are given in selectors. Each selector is a pair of keys and commands: so a right to append is no right to delete,
and a right to read is no right to write. All commands are known to Redis 7.0, because a server refuses a file with an
unknown command.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from barrier.errors import InvalidName
from barrier.protocol.names import MAX_WORLD_SIZE, valid_name, valid_world_size
from barrier.store.keys import SPARE_SEATS, Keys, NamespaceKeys

__all__ = [
    "NOBODY",
    "SESSION",
    "AclUser",
    "Grant",
    "acl_file",
    "admin_user",
    "all_users",
    "hashed",
    "observer_user",
    "planner_user",
    "rank_user",
]


_HASH = re.compile(r"[0-9a-f]{64}")

SESSION = ("info", "multi", "exec", "discard", "unwatch", "ping", "select", "role", "cluster|slots", "asking")
"""The commands without a key that every client sends. An ACL never refuses AUTH, HELLO, QUIT and RESET."""

_READS = (
    "exists",
    "get",
    "getrange",
    "hexists",
    "hget",
    "hgetall",
    "hmget",
    "mget",
    "pttl",
    "type",
    "xinfo|stream",
    "xlen",
    "xrange",
    "xread",
    "xrevrange",
)


@dataclass(frozen=True, slots=True)
class Grant:
    """Some commands on some keys: one selector.

    Attributes:
        commands: in lower case; a subcommand as ``xinfo|stream``.
        keys: patterns of keys that may be read and written.
        read: patterns of keys that may only be read.
        write: patterns of keys that may only be written.
    """

    commands: tuple[str, ...]
    keys: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The selector as it is written in an ACL file."""
        patterns = (
            [f"~{key}" for key in self.keys] + [f"%R~{key}" for key in self.read] + [f"%W~{key}" for key in self.write]
        )
        return f"({' '.join([*patterns, *(f'+{command}' for command in self.commands)])})"


@dataclass(frozen=True, slots=True)
class AclUser:
    """One user of the store.

    Attributes:
        name: the user's name; letters, digits, ``.`` and ``-``, so it needs no quoting in a URL.
        commands: the commands without a key that it may send.
        grants: the commands with keys that it may send.
        everything: whether it is the administrator, for whom nothing is refused.
    """

    name: str
    commands: tuple[str, ...] = SESSION
    grants: tuple[Grant, ...] = ()
    everything: bool = False

    @property
    def allowed(self) -> frozenset[str]:
        """Every command that it may send to some key, or without one."""
        return frozenset(self.commands) | {command for grant in self.grants for command in grant.commands}

    def line(self, password_hash: str | None) -> str:
        """The line of an ACL file.

        Args:
            password_hash: see `hashed`; ``None`` for no password: then nobody can log in as this user.

        Raises:
            InvalidName: that is not a hash.
        """
        if password_hash is not None and _HASH.fullmatch(password_hash) is None:
            raise InvalidName(
                "the password's hash is not 64 hexadecimal digits: pass what barrier.store.acl.hashed() returned"
            )
        words = ["user", self.name, "on", "resetpass"]
        if password_hash is not None:
            words.append(f"#{password_hash}")
        words.append("sanitize-payload")
        if self.everything:
            return " ".join([*words, "~*", "&*", "+@all"])
        words += ["resetkeys", "resetchannels", "-@all", *(f"+{command}" for command in self.commands)]
        return " ".join([*words, *map(str, self.grants)])


NOBODY = "user default off resetpass sanitize-payload ~* &* +@all"
"""Turns the default user off, which every client is that does not log in. Without this line such a client may do anything.

The user keeps its rights, although nobody can use them: Redis 7.0 replays its append-only file as this user.
Without the rights, a restart drops every transaction and every script's writes, and the server starts all the same
(``NOPERM ACLs rules changed`` in its log).
"""


def hashed(password: str) -> str:
    """A password as an ACL file holds it: the hexadecimal SHA-256, which the server uses as it is.

    It has no salt, so a password that can be guessed can be found from it: choose a long random one.

    Raises:
        InvalidName: it is empty.
    """
    if not password:
        raise InvalidName("the password is empty: the server would take any")
    return hashlib.sha256(password.encode()).hexdigest()


def rank_user(keys: Keys, rank: int | None) -> AclUser:
    """One rank of a group, or, with ``None``, all of its ranks under one name.

    It reads the group's epoch and task log. It writes its own report, its claim and its seat as a spare. It appends
    wake-ups, history and answers. It cannot run scripts or dispatch, and sees neither another rank's key nor another
    group. With one name for all ranks, each can write any rank's report: use that if ranks are started without a number
    and claim a free one.

    Raises:
        InvalidName: the rank is out of range.
    """
    if rank is not None and not 0 <= rank < MAX_WORLD_SIZE:
        raise InvalidName(f"rank is {rank}; it must be from 0 to {MAX_WORLD_SIZE - 1}")
    which = "*" if rank is None else str(rank)
    seat = "*" if rank is None else str(rank % SPARE_SEATS)  # where it waits for its rank
    prefix = f"{keys.tag}:"
    return AclUser(
        name=f"{keys.namespace}.{keys.group}.{'ranks' if rank is None else f'rank-{rank}'}",
        grants=(
            Grant(
                ("set", "get", "del", "pexpire", "pttl", "type", "watch"),
                keys=(f"{prefix}rank:{which}", f"{prefix}claims:{which}", f"{prefix}spare:{seat}"),
            ),
            Grant(("hmget", "type"), read=(keys.epoch,)),
            Grant(("xread", "xrevrange", "type"), read=(keys.tasks,)),
            Grant(("xadd", "pexpire", "type"), write=(keys.signals, keys.events, f"{prefix}out:*")),
        ),
    )


def planner_user(namespace: str) -> AclUser:
    """A planner, or a client that launches, stops and generates: everything of one namespace but the ranks' own keys.

    A script needs the right to read and write every key that it is given; the server also checks each command inside
    it. So a planner cannot write a rank's report, whatever script it sends.

    Raises:
        InvalidName: that is not a namespace.
    """
    names = NamespaceKeys(namespace)
    group = f"{{{namespace}:*}}:"
    return AclUser(
        name=f"{namespace}.planner",
        commands=(*SESSION, "time"),
        grants=(
            Grant(("eval", "evalsha", "watch", *_READS), keys=(f"{group}*",)),
            Grant(("eval_ro", "evalsha_ro"), read=(f"{group}*",)),
            Grant(("hset", "del", "pexpire"), write=(f"{group}epoch", f"{group}leader")),
            Grant(("set",), write=(f"{group}once:*",)),
            Grant(
                ("xadd", "pexpire"),
                write=(
                    f"{group}tasks",
                    f"{group}signals",
                    f"{group}events",
                    f"{group}requests",
                    f"{group}out:*",
                    names.changes,
                ),
            ),
            Grant(("xdel",), write=(f"{group}requests", f"{group}tasks")),
            Grant(("hset", "hsetnx", "hdel", "pexpire"), write=(names.instances,)),
        ),
    )


def observer_user(namespace: str, group: str | None = None) -> AclUser:
    """An observer of one group, or of the whole namespace: reads status, explanation, metrics and history.

    It sends plain reads only. It may not run scripts, because a script that reads for ever stops everybody else. It may
    not read the task log, requests and answers, which hold prompts and texts.

    Raises:
        InvalidName: a name may not be used.
    """
    names = NamespaceKeys(namespace)
    if group is not None:
        valid_name("group", group)
    prefix = f"{{{namespace}:{'*' if group is None else group}}}:"
    parts = ("epoch", "leader", "signals", "events", "rank:*", "claims:*", "spare:*")
    return AclUser(
        name=f"{namespace}.observer" if group is None else f"{namespace}.{group}.observer",
        commands=(*SESSION, "time"),
        grants=(
            Grant(
                _READS,
                read=(*(f"{prefix}{part}" for part in parts), names.instances, names.changes),
            ),
        ),
    )


def admin_user(namespace: str) -> AclUser:
    """An administrator, who may do everything. A file that turns the default user off needs one."""
    return AclUser(name=f"{valid_name('namespace', namespace)}.admin", everything=True)


def all_users(keys: Keys, *, world_size: int | None = None) -> tuple[AclUser, ...]:
    """Everybody that one group needs: planner, observer, and one user for each rank, or one for all without a world size.

    Raises:
        InvalidName: the world size is out of range.
    """
    ranks: Sequence[int | None] = (None,) if world_size is None else range(valid_world_size(world_size))
    return (
        planner_user(keys.namespace),
        observer_user(keys.namespace),
        *(rank_user(keys, rank) for rank in ranks),
    )


def acl_file(users: Iterable[tuple[AclUser, str | None]]) -> str:
    """A whole ACL file: the default user off, then each user with the hash of its password."""
    return "".join(f"{line}\n" for line in (NOBODY, *(user.line(password) for user, password in users)))

"""``rankgate acl``: the store's users, as lines of an ACL file. The rules are in `barrier.store.acl`; here are the passwords."""

from __future__ import annotations

import os
import secrets
import shlex
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from barrier.errors import InvalidSettings
from barrier.protocol.names import valid_world_size
from barrier.store.acl import (
    NOBODY,
    AclUser,
    admin_user,
    all_users,
    hashed,
    observer_user,
    planner_user,
    rank_user,
)
from barrier.store.keys import Keys
from planner.cli.process import complain

__all__ = ["AclOptions", "Role", "print_acl"]


_LONGEST = 512
"""The most characters that a password may have."""


class Role(StrEnum):
    """Who a user is for."""

    PLANNER = "planner"
    RANK = "rank"
    OBSERVER = "observer"
    ADMIN = "admin"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class AclOptions:
    """What ``rankgate acl`` was told.

    Attributes:
        instance: the instance of the ranks.
        namespace: the cluster.
        role: one role, or all of them (a whole ACL file).
        rank: print the user of this rank only.
        world_size: print a user for each of so many ranks. Without this and `rank`, all ranks share one user.
        admin: whether a whole file has an administrator too.
        password_file: the file with the password of the single user; ``-`` is stdin.
        passwords: a folder with one password file for each user; missing files are made.
    """

    instance: str
    namespace: str
    role: Role
    rank: int | None = None
    world_size: int | None = None
    admin: bool = False
    password_file: str | None = None
    passwords: Path | None = None


def print_acl(options: AclOptions) -> int:
    """Print the lines.

    Raises:
        InvalidSettings: the options contradict one another, or a password cannot be read.
        OSError: the folder cannot be written.
    """
    users = _users(options)
    secrets_of = _passwords(options, users)
    lines = [user.line(secret) for user, secret in zip(users, secrets_of, strict=True)]
    if options.role is Role.ALL and options.rank is None:
        lines.insert(0, NOBODY)
    print("\n".join(lines), flush=True)
    if None in secrets_of:
        complain(
            "these users have no password yet, so nobody can log in as them: pass --passwords FOLDER, or --password-file FILE "
            "for one user, or set passwords with ACL SETUSER"
        )
    return 0


def _users(options: AclOptions) -> tuple[AclUser, ...]:
    keys = Keys(options.namespace, options.instance)
    if options.rank is not None and options.world_size is not None and options.rank >= options.world_size:
        raise InvalidSettings(
            f"rank {options.rank} is given; with --world-size {options.world_size} ranks are 0 to {options.world_size - 1}"
        )
    if options.rank is not None and options.role not in (Role.ALL, Role.RANK):
        raise InvalidSettings(f"--rank is for --role rank, and --role is {options.role.value}: leave one of them out")
    if options.rank is not None:
        return (rank_user(keys, options.rank),)
    match options.role:
        case Role.PLANNER:
            return (planner_user(options.namespace),)
        case Role.OBSERVER:
            return (observer_user(options.namespace),)
        case Role.ADMIN:
            return (admin_user(options.namespace),)
        case Role.RANK if options.world_size is None:
            return (rank_user(keys, None),)
        case Role.RANK:
            return tuple(rank_user(keys, rank) for rank in range(valid_world_size(options.world_size)))
        case Role.ALL:
            users = all_users(keys, world_size=options.world_size)
            return (admin_user(options.namespace), *users) if options.admin else users


def _passwords(options: AclOptions, users: Sequence[AclUser]) -> list[str | None]:
    if options.password_file is not None and options.passwords is not None:
        raise InvalidSettings("--password-file and --passwords are both given: choose one of them")
    if options.password_file is not None:
        if len(users) != 1:
            raise InvalidSettings(
                f"--password-file holds one password, and there are {len(users)} users: pass --passwords FOLDER, "
                "or --role and --rank to print one user"
            )
        return [hashed(_read(options.password_file))]
    if options.passwords is not None:
        options.passwords.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_if_open(options.passwords, options.passwords.stat(), stat.S_IWGRP | stat.S_IRWXO, "700")
        return [hashed(_kept(options.passwords / user.name)) for user in users]
    return [None] * len(users)


def _refuse_if_open(path: Path, found: os.stat_result, others: int, mend: str) -> None:
    """Refuse a file or folder that other users of this machine may read or write."""
    if found.st_mode & others:
        what = "folder" if stat.S_ISDIR(found.st_mode) else "file"
        raise InvalidSettings(
            f"{path} is a {what} that others may read or write (mode {stat.S_IMODE(found.st_mode):04o}), so its passwords are no "
            f"secret: run chmod {mend} {shlex.quote(str(path))}, and replace the passwords that others may have seen"
        )


def _read(path: str) -> str:
    """The first line of a file, or of stdin; its line end is not part of the password."""
    if path == "-":
        return _checked(sys.stdin.readline(), "stdin")
    try:
        with Path(path).open(encoding="utf-8") as file:
            return _checked(file.readline(), path)
    except OSError as error:
        raise InvalidSettings(f"{path} cannot be read: {error.strerror or type(error).__name__}") from None
    except UnicodeDecodeError:
        raise InvalidSettings(f"{path} cannot be read: it is not UTF-8 text") from None


def _checked(line: str, where: str) -> str:
    password = line.rstrip("\r\n")
    if not 1 <= len(password) <= _LONGEST:
        raise InvalidSettings(
            f"the password in {where} has {len(password)} characters; it must have 1 to {_LONGEST}, on the first line"
        )
    return password


def _kept(path: Path) -> str:
    """The password in a file. If there is no file, it is made with 43 random characters, and only its owner may read it."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if path.is_file():
            # Others may read the file, but not write it: containers run as other users and read it. The folder is closed.
            _refuse_if_open(path, path.stat(), stat.S_IWGRP | stat.S_IWOTH, "go-w")
        return _read(str(path))
    password = secrets.token_urlsafe(32)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(f"{password}\n")
    return password

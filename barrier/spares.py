"""Runners that wait for a rank, or hold a rank that the group does not have. They are shown to people; no decision depends on them.

A spare takes a seat, one of `SPARE_SEATS` keys with a lease, and renews it while it waits. The seats are few, so one
round trip reads them all, whatever anybody writes. A spare that finds no free seat waits too, but is not shown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from barrier.errors import StoreError
from barrier.protocol.report import Report, UndecodableReport
from barrier.store.keys import SPARE_SEATS, Keys
from barrier.store.store import Store

__all__ = ["Seat", "Spare", "read_spares", "read_surplus", "seats_for"]


_NODE_CHARS = 64


@dataclass(frozen=True, slots=True)
class Spare:
    """A process that waits for a rank.

    Attributes:
        incarnation: this life's name.
        node: its machine, for people.
        pid: its process.
        rank: the rank that it waits for; ``None`` for any.
        waited_ms: for how long it has waited, in milliseconds.
    """

    incarnation: str
    node: str
    pid: int
    rank: int | None
    waited_ms: int


class Seat:
    """One spare's seat. Its methods raise no error of the store: the seat is only for people, and the spare waits on without one.

    Args:
        store: where.
        keys: the group's keys.
        spare: the process that waits; every renewal updates `Spare.waited_ms`.
    """

    def __init__(self, store: Store, keys: Keys, spare: Spare) -> None:
        self._store = store
        self._spare = spare
        self._seats = seats_for(keys, spare.rank)
        self._taken: str | None = None

    async def renew(self, waited_ms: int) -> bool:
        """Take a seat, or keep it for another lease; return whether this spare has one."""
        said = _encode(self._spare, waited_ms)
        lease_ms = round(self._store.settings.lease * 1000)
        try:
            with self._store.errors():
                commands = self._store.commands
                if self._taken is not None and _names(await commands.get(self._taken), self._spare.incarnation):
                    await commands.set(self._taken, said, px=lease_ms)
                    return True
                self._taken = None
                for seat in self._seats:
                    if await commands.set(seat, said, px=lease_ms, nx=True):
                        self._taken = seat
                        return True
        except StoreError:  # the user may be of an older ACL file, which gives no right to seats
            pass
        return False

    async def leave(self) -> None:
        """Give the seat back; one that is not given back lapses with its lease."""
        try:
            with self._store.errors():
                if self._taken is not None and _names(
                    await self._store.commands.get(self._taken), self._spare.incarnation
                ):
                    await self._store.commands.delete(self._taken)
        except StoreError:
            pass
        self._taken = None


def seats_for(keys: Keys, rank: int | None) -> Sequence[str]:
    """The seats that a spare for this rank may take. For one rank it is one seat, to which its user in the store has the right.

    A spare for any rank begins at the last seat, so the seats of the low ranks stay free.
    """
    return keys.spares()[::-1] if rank is None else [keys.spare(rank % SPARE_SEATS)]


async def read_spares(store: Store, keys: Keys, rank: int | None = None) -> tuple[Spare, ...]:
    """The spares, the longest wait first. With a rank, only its seat is read (a rank's user may read no other).

    Raises:
        StoreError: could not find out.
    """
    seats = seats_for(keys, rank)
    with store.errors():
        async with store.commands.pipeline(transaction=True) as pipe:
            for seat in seats:
                pipe.get(seat)
                pipe.pttl(seat)
            found = cast("list[Any]", await pipe.execute(raise_on_error=False))
    lease_ms = round(store.settings.lease * 1000)
    spares = [_decode(raw, left, lease_ms) for raw, left in zip(found[::2], found[1::2], strict=True)]
    return tuple(sorted((one for one in spares if one is not None), key=lambda one: (-one.waited_ms, one.incarnation)))


async def read_surplus(store: Store, keys: Keys, world_size: int) -> tuple[Report, ...]:
    """The live reports of the first `SPARE_SEATS` ranks that a group of that size does not have.

    Raises:
        StoreError: could not find out.
    """
    with store.errors():
        async with store.commands.pipeline(transaction=True) as pipe:
            for rank in range(world_size, world_size + SPARE_SEATS):
                pipe.get(keys.rank(rank))
            found = cast("list[Any]", await pipe.execute(raise_on_error=False))
    reports: list[Report] = []
    for rank, raw in enumerate(found, world_size):
        if isinstance(raw, bytes):
            try:
                reports.append(Report.decode(raw, rank))
            except UndecodableReport:  # not a runner's
                continue
    return tuple(reports)


def _names(raw: object, incarnation: str) -> bool:
    spare = _decode(raw, 0, 0)
    return spare is not None and spare.incarnation == incarnation


def _encode(spare: Spare, waited_ms: int) -> str:
    return json.dumps(
        {
            "incarnation": spare.incarnation,
            "node": spare.node[:_NODE_CHARS],
            "pid": spare.pid,
            "rank": spare.rank,
            "waited_ms": waited_ms,
        }
    )


def _decode(raw: object, left_ms: object, lease_ms: int) -> Spare | None:
    """Read a seat; ``None`` if it is empty or not ours: anybody with a rank's rights may have written it."""
    if not isinstance(raw, bytes) or len(raw) > 1_000 or not isinstance(left_ms, int):
        return None
    try:
        said: Any = json.loads(raw)
        incarnation, node, pid, rank, waited_ms = (
            said[name] for name in ("incarnation", "node", "pid", "rank", "waited_ms")
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    numbers = (pid, waited_ms) if rank is None else (pid, waited_ms, rank)
    if not all(type(number) is int and 0 <= number < 2**53 for number in numbers):
        return None
    if not isinstance(incarnation, str) or not isinstance(node, str):
        return None
    age_ms = max(0, lease_ms - left_ms) if left_ms > 0 else 0
    return Spare(incarnation[:64], node[:_NODE_CHARS], pid, rank, waited_ms + age_ms)

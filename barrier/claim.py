"""Makes one life of one process the holder of a rank, by a key with a lease. If another holds the rank, this one waits;
a spare takes a seat meanwhile.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import inf
from typing import Any, NamedTuple

from redis.exceptions import WatchError

from barrier.clock import Clock
from barrier.errors import RankTaken, StoreCorrupt, StoreError
from barrier.log import logger
from barrier.plain import number
from barrier.protocol.names import shown
from barrier.protocol.report import Report, UndecodableReport
from barrier.spares import Seat, Spare
from barrier.store.keys import Keys
from barrier.store.report_frames import Command
from barrier.store.store import Store, is_spoiled

__all__ = ["Claims", "Wanted", "name_of"]


_BATCH = 100
_SHOWN = 4
_FOR_EVER = -1  # what PTTL says of a key without a lifetime
_LONGEST_LEASE_MS = 600_000


class _Held(NamedTuple):
    """Another process's claim: the seconds that it has left, and its holder, for people."""

    seconds: float
    holder: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a process wants to hold, and how long it waits.

    Attributes:
        ranks: the ranks; it wants any one of them.
        seconds: how long it waits for another's claim to end; infinite for a spare.
        store_seconds: how long it asks the store again after a failure that may pass (`StoreError.passes`).
        spare: how it is shown while it waits as a spare; ``None`` if it is none.
    """

    ranks: Sequence[int]
    seconds: float
    store_seconds: float = 0.0
    spare: Spare | None = None


class Claims:
    """One life's claim to a rank.

    Args:
        store: where.
        keys: the group's keys.
        clock: time.
        incarnation: this life's name.

    Attributes:
        tries: how many times this life has tried, answered or not.
        waits: whether this life waits as a spare for a rank that others hold.
    """

    def __init__(self, store: Store, keys: Keys, clock: Clock, incarnation: str) -> None:
        self.tries: int = 0
        self.waits: bool = False
        self._store = store
        self._keys = keys
        self._clock = clock
        self._incarnation = incarnation
        self._lease_ms = round(store.settings.lease * 1000)

    async def obtain(self, wanted: Wanted, begin: Callable[[int], Awaitable[None]]) -> None:
        """Hold one of the ranks, and let this life `begin` as it.

        Raises:
            RankTaken: others keep holding them.
            StoreError: could not find out.
        """
        deadline, told = self._clock.now() + wanted.store_seconds, False
        while True:
            try:
                await self._store.verify()
                return await self._wait(wanted, begin)
            except StoreError as error:
                left = deadline - self._clock.now()
                if not error.passes or left <= 0:
                    raise
                if not told:
                    logger.warning(
                        "group {}: waiting up to {} s for the store: {}",
                        self._keys.group,
                        number(round(left, 1)),
                        error,
                    )
                told = True
                pause = min(left, self._store.settings.command_seconds)
            await self._clock.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311  no secret

    async def _wait(self, wanted: Wanted, begin: Callable[[int], Awaitable[None]]) -> None:
        seat = None if wanted.spare is None else Seat(self._store, self._keys, wanted.spare)
        began = look_at_all = self._clock.now()
        told = False
        try:
            while True:
                self.tries += 1
                now, held = self._clock.now(), dict[int, _Held]()
                try:
                    ranks = wanted.ranks
                    if seat is not None and now < look_at_all:
                        ranks = await self._unclaimed(ranks)
                    else:  # only a try shortens a claim that is too long, after the clock was set back
                        look_at_all = now + self._store.settings.lease
                    if await self._try_each(ranks, held, begin):
                        return
                    if not told:
                        await self._tell_who_holds(held, began + wanted.seconds - now)
                        told = True
                except StoreError as error:
                    if not self.waits or isinstance(error, StoreCorrupt):
                        raise
                    logger.debug("group {}: waiting as a spare; {}", self._keys.group, error)
                look_at_all = min(look_at_all, *(now + one.seconds for one in held.values()), inf)
                await self._pause(now - began, look_at_all - now, wanted, held, seat)
        finally:
            self.waits = False
            if seat is not None:
                await seat.leave()

    async def _pause(
        self, waited: float, until_look: float, wanted: Wanted, held: Mapping[int, _Held], seat: Seat | None
    ) -> None:
        """Wait until another try may succeed; raises `RankTaken` when the time is over."""
        left = wanted.seconds - waited
        if left <= 0:
            said = "; ".join(f"rank {rank}: {one.holder}" for rank, one in list(held.items())[:_SHOWN])
            raise RankTaken(
                f"group {self._keys.group}: held by other processes ({said}{'; …' if len(held) > _SHOWN else ''}). "
                "Stop one, or start no more runners than there are ranks"
            )
        pause = max(min(until_look, left), 0)
        if seat is not None:
            self.waits = True
            await seat.renew(round(waited * 1000))
            pause = min(pause, self._store.settings.heartbeat)
        await self._clock.sleep(pause + 0.001)

    async def _unclaimed(self, ranks: Sequence[int]) -> list[int]:
        """The ranks that nobody holds now; one round trip asks for many."""
        free: list[int] = []
        with self._store.errors():
            for first in range(0, len(ranks), _BATCH):
                some = ranks[first : first + _BATCH]
                async with self._store.commands.pipeline(transaction=True) as pipe:
                    for rank in some:
                        pipe.get(self._keys.claim(rank))
                    found = await pipe.execute()
                free += [rank for rank, holder in zip(some, found, strict=True) if holder is None]
        return free

    async def _try_each(
        self, ranks: Sequence[int], held: dict[int, _Held], begin: Callable[[int], Awaitable[None]]
    ) -> bool:
        """Try the ranks in order; return whether one is ours now. `held` gets the claims of others."""
        for rank in ranks:
            other = await self._try(rank)
            if other is None:
                await self._refuse_wrong_types(rank)
                await begin(rank)
                return True
            held[rank] = other
        return False

    async def _try(self, rank: int) -> _Held | None:
        """Another's claim, or ``None`` if the claim is ours now."""
        key = self._keys.claim(rank)
        with self._store.errors():
            async with self._store.commands.pipeline(transaction=True) as pipe:
                pipe.set(key, self._incarnation, px=self._lease_ms, nx=True)
                pipe.get(key)
                pipe.pttl(key)
                _, holder, left = await pipe.execute()
            if holder == self._incarnation.encode():
                return None
            if left > 2 * self._lease_ms or left == _FOR_EVER:
                # The clock was set back, or the claim is not ours: every claim of ours has an end. Shorten it, or a
                # dead process would keep the rank; a live one renews it in time. The report may name too long a lease,
                # so there is a limit.
                said = _lease_of(await self._store.commands.get(self._keys.rank(rank)), rank)
                longest = max(self._lease_ms, min(said, _LONGEST_LEASE_MS))
                left = longest if left == _FOR_EVER else min(left, longest)
                await self._store.commands.pexpire(key, left)
        return _Held(max(left, 1) / 1000, name_of(holder))

    async def _tell_who_holds(self, held: Mapping[int, _Held], seconds: float) -> None:
        """Log who holds the ranks that were wanted, and what this process does about it."""
        said: list[str] = []
        for rank, one in list(held.items())[:_SHOWN]:
            with self._store.errors():
                raw = await self._store.commands.get(self._keys.rank(rank))
            said.append(f"rank {rank} {_holder(raw, rank, one.holder)}")
        more = f"; and {len(held) - _SHOWN} more ranks" if len(held) > _SHOWN else ""
        what = (
            "this process waits as a spare until one is free" if seconds == inf else f"waiting {seconds:.1f} s for it"
        )
        if held and seconds > 0:
            logger.warning("group {}: held by others: {}{}; {}", self._keys.group, "; ".join(said), more, what)

    async def _refuse_wrong_types(self, rank: int) -> None:
        """Refuse keys of the wrong type before anything of ours is written, and give the claim back."""
        expected = {
            self._keys.rank(rank): "string",
            self._keys.epoch: "hash",
            self._keys.tasks: "stream",
        }
        with self._store.errors():
            async with self._store.commands.pipeline(transaction=True) as pipe:
                for key in expected:
                    pipe.type(key)
                found = [kind.decode() for kind in await pipe.execute()]
        for (key, kind), actual in zip(expected.items(), found, strict=True):
            if actual not in ("none", kind):
                await self.drop(rank, None)  # leave the report: it is a predecessor's, or not ours at all
                raise StoreCorrupt(
                    f"{key} holds a {actual} where a {kind} belongs; move or delete that key, then try again"
                )

    async def drop(self, rank: int, farewell: Sequence[Command] | None) -> None:
        """Delete the claim if it is still ours. A WATCH makes this one step, so no script is needed.

        Args:
            rank: the rank.
            farewell: hints to send; the report is then deleted as well. ``None`` if this life has not reported.

        Raises:
            StoreError: it may still be there.
        """
        claim = self._keys.claim(rank)
        with self._store.errors():
            async with self._store.commands.pipeline(transaction=True) as pipe:
                await pipe.watch(claim)
                if await pipe.get(claim) != self._incarnation.encode():
                    return
                pipe.multi()
                pipe.delete(claim)
                if farewell is not None:
                    pipe.delete(self._keys.rank(rank))
                    for command in farewell:
                        pipe.execute_command(*command)
                try:
                    said: list[Any] = await pipe.execute(raise_on_error=False)
                except WatchError:
                    said = []
                for reply in said[:2]:
                    if isinstance(reply, Exception):
                        raise reply
        if said:
            if any(map(is_spoiled, said[2:])):
                await self._store.append_if_possible(self._keys.signals, farewell or ())
            return
        # The claim lapsed just now and another life may have taken it; or the connection broke: redis-py raises the
        # same error.
        await self.drop(rank, farewell)


def _holder(raw: bytes | None, rank: int, incarnation: str) -> str:
    """Who holds a rank, for people: machine, process, status, and since when by its own clock."""
    try:
        report = Report.decode(raw or b"", rank)
    except UndecodableReport:
        report = None
    if report is None or report.incarnation != incarnation:
        return f"by a process that does not report ({shown(incarnation)}): its claim lapses with its lease"
    try:
        since = f"{datetime.fromtimestamp(int(incarnation[:12], 16) / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError):  # a clock that is thousands of years ahead
        since = "an unknown time"
    return f"by node {shown(report.node)}, pid {report.pid}, {report.status}, since {since}"


def name_of(holder: bytes | None) -> str:
    """Who holds a claim, for people; the text is foreign."""
    name = (holder or b"nobody")[:100].decode("utf-8", "replace")
    return name if name.isalnum() else shown(name)


def _lease_of(raw: bytes | None, rank: int) -> int:
    """The lease that a report was written with, in milliseconds; 0 if it cannot be read."""
    try:
        return Report.decode(raw or b"", rank).lease_ms
    except UndecodableReport:
        return 0

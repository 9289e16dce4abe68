"""The barrier as one rank uses it: claim the rank, report, read the task log, promise.

A rank sends plain commands only, so that its user in the store needs no scripting right: one MULTI a report.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from math import inf
from typing import Any, TypeAlias

from redis.asyncio import Redis
from redis.exceptions import WatchError

from barrier import supervise
from barrier.clock import Clock, SystemClock
from barrier.errors import (
    ClaimLost,
    HeartbeatFailed,
    InvalidName,
    PartFailed,
    RankTaken,
    StoreCorrupt,
    StoreError,
)
from barrier.log import LogContext, logger
from barrier.plain import number
from barrier.protocol.ids import INCARNATION_WIDTH, EpochId, LogId, new_incarnation
from barrier.protocol.log import EpochAnnounced, LogEntry, TaskEntry, VerdictAnnounced, decode_entry, describe
from barrier.protocol.model import read_verdict
from barrier.protocol.names import shown, valid_digest, valid_endpoint, valid_status, valid_world_size
from barrier.protocol.report import MAX_APPLIED, MAX_OUTCOMES, Report, TaskOutcome, UndecodableReport
from barrier.settings import Settings
from barrier.spares import Seat, Spare
from barrier.store.connect import adopt
from barrier.store.connection import GAP, Template, pack
from barrier.store.keys import Keys
from barrier.store.store import Store, is_spoiled, stream_entries

_ROSTER_CHUNK = 64  # as in lua/prelude.lua
ENDPOINTS_CHUNK = 64
"""How many ranks' endpoints one field of the record holds; as in lua/prelude.lua."""
_BATCH = 100
_FOR_EVER = -1  # what PTTL says of a key without a lifetime
_LONGEST_LEASE_MS = 600_000
_UNSAID_EVENTS = 1_000

_trace = logger.opt(lazy=True).trace


@dataclass(frozen=True, slots=True)
class Promised:
    """This rank may act in this epoch, and in no other."""

    epoch: EpochId
    world_size: int


@dataclass(frozen=True, slots=True)
class NotPromised:
    """The epoch is over, superseded, lower than a promise before, or its roster has another incarnation of this rank."""

    reason: str


PromiseOutcome: TypeAlias = Promised | NotPromised

Event: TypeAlias = Mapping[str, str]
"""One line of history: a flat mapping of short texts."""


@dataclass(frozen=True, slots=True)
class _Frames:
    """The commands of a report, packed as far as they are the same each time."""

    holder: bytes
    look: tuple[bytes, ...]
    report: Template
    hint: Template
    alarm: Template
    keep_signals: bytes


class Member:
    """One rank of a group, in one life of its process.

    Args:
        redis: a store from `barrier.connect`, or your own ``redis.asyncio.Redis``; see `barrier.Barrier`.
        group: the group's name.
        rank: the rank, or ``None`` to claim any free one below `world_size`.
        world_size: number of ranks, where this rank was configured with one.
        digest: digest of the spec that this rank was configured for; empty where it was given none.
        namespace: keeps several clusters on one store apart.
        settings: the times; those of the store where a store is given.
        node: name of the machine, for people; the host name where not given.
        address: host name or IP address under which the other ranks reach this machine; by default the one from which this
            process reaches the store.
        clock: time, for tests.
        incarnation: this life's name, for tests.

    Raises:
        InvalidName: a name, the rank or the world size may not be used.
    """

    def __init__(
        self,
        redis: Redis | Store,
        group: str,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        digest: str = "",
        namespace: str = "rankgate",
        settings: Settings | None = None,
        node: str | None = None,
        address: str = "",
        clock: Clock | None = None,
        incarnation: str | None = None,
    ) -> None:
        self.keys = Keys(namespace, group)
        self.world_size = None if world_size is None else valid_world_size(world_size)
        if rank is None and world_size is None:
            raise InvalidName(
                "neither rank nor world_size is given: say which rank this is, or how many there are to choose from"
            )
        if rank is not None and not 0 <= rank < (world_size or 16_384):
            raise InvalidName(f"rank is {rank}; it must be from 0 to {(world_size or 16_384) - 1}")
        self.store = adopt(redis, settings=settings)
        self.settings = self.store.settings
        self.clock: Clock = clock or SystemClock()
        self.incarnation = incarnation or new_incarnation(time.time_ns() // 1_000_000)
        self.promised: EpochId | None = None
        self.beats = 0
        """How many heartbeats were tried, answered or not: whoever watches over this process sees by it that they go on."""
        self.waits = False
        """Whether it waits as a spare for a rank that others hold."""
        self._owns_store = redis is not self.store
        self._address = address
        self._wanted_rank = rank
        self.about = LogContext(self.keys.group, rank)
        """What the lines of this rank's log are about."""
        self._rank: int | None = None
        self._report = Report(
            rank=0,
            incarnation=self.incarnation,
            status="Idle",
            digest=valid_digest(digest),
            node=socket.gethostname() if node is None else node,
            pid=os.getpid(),
            world_size=world_size,
            lease_ms=round(self.settings.lease * 1000),
        )
        self._status_since = self.clock.now()
        self._writing = asyncio.Lock()
        self._renewed_at = -inf
        self._looked_at = -inf
        self._lease_ms = round(self.settings.lease * 1000)
        self._frames: _Frames | None = None
        self._said: tuple[str, EpochId | None] | None = None
        self._alarm = False
        self._unsaid: deque[Event] = deque(maxlen=_UNSAID_EVENTS)
        self._event_seq = 0
        self._dropped_claim: ClaimLost | None = None
        self._failed: HeartbeatFailed | None = None
        self._cursor = LogId(0, 0)
        self._announced: EpochId | None = None
        self._entries: asyncio.Queue[LogEntry | BaseException] = asyncio.Queue(maxsize=1_000)

    @property
    def rank(self) -> int:
        """The claimed rank; raises `RankTaken` before `claim`."""
        if self._rank is None:
            raise RankTaken("no rank is claimed yet: await claim() first")
        return self._rank

    @property
    def report_now(self) -> Report:
        """What this rank last said, or is about to say."""
        return self._report

    @property
    def trusted(self) -> bool:
        """Whether the lease was surely renewed recently enough for this rank to accept tasks."""
        return self._failed is None and self.clock.now() - self._renewed_at < self.settings.distrust_after

    # --- claiming -----------------------------------------------------------------------------------------------------

    async def claim(
        self,
        *,
        timeout: float | None = None,  # noqa: ASYNC109  by the injected clock
        spare: bool = False,
        wait_for_store: float = 0.0,
    ) -> int:
        """Become the one incarnation that holds the rank, or any free one; then say hello with a first report.

        Who holds it is logged at once.

        Args:
            timeout: seconds to wait for a rank that another incarnation holds (a predecessor's claim lapses within one
                lease); ``None`` waits for two leases.
            spare: wait for as long as it takes, through outages of the store too, and be seen meanwhile (`barrier.spares`);
                `timeout` does not count then.
            wait_for_store: seconds for which a store that fails in a way that may pass (`StoreError.passes`) is asked again.

        Raises:
            RankTaken: another incarnation keeps holding it.
            StoreError: could not find out.
        """
        deadline, told = self.clock.now() + wait_for_store, False
        while True:
            try:
                return await self._claim(timeout, spare=spare)
            except StoreError as error:
                left = deadline - self.clock.now()
                if not error.passes or left <= 0:
                    raise
                if not told:
                    logger.warning(
                        "group {}: waiting up to {} s for the store: {}", self.keys.group, number(round(left, 1)), error
                    )
                told = True
                pause = min(left, self.settings.command_seconds)
            await self.clock.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311  no secret

    async def _claim(self, timeout: float | None, *, spare: bool) -> int:  # noqa: ASYNC109  as `claim`
        await self.store.verify()
        began = self.clock.now()
        deadline = inf if spare else began + (2 * self.settings.lease if timeout is None else timeout)
        wanted: Sequence[int] = (
            range(self.world_size or 0)
            if self._wanted_rank is None
            else range(self._wanted_rank, self._wanted_rank + 1)
        )
        seat: Seat | None = None
        look_at_all = began
        told = False
        try:
            while True:
                self.beats += 1
                now = self.clock.now()
                holders: dict[int, str] = {}
                try:
                    if spare and now < look_at_all:
                        tried = await self._unclaimed(wanted)
                    else:  # a claim that a clock that was set back would keep is mended by trying, and only so
                        look_at_all = now + self.settings.lease
                        tried = wanted
                    for rank in tried:
                        left, holder = await self._try_claim(rank)
                        if left is None:
                            await self._begin(rank)
                            return rank
                        look_at_all = min(look_at_all, now + left)
                        holders[rank] = holder
                    if not told:
                        await self._tell_who_holds(holders, deadline - now)
                        told = True
                except StoreError as error:
                    if not self.waits or isinstance(error, StoreCorrupt):
                        raise
                    logger.debug("group {}: waiting as a spare; {}", self.keys.group, error)
                if now >= deadline:
                    said = "; ".join(f"rank {rank}: {holder}" for rank, holder in list(holders.items())[:4])
                    raise RankTaken(
                        f"group {self.keys.group}: held by other processes ({said}{'; …' if len(holders) > 4 else ''}). "
                        "Stop one, or start fewer runners than ranks"
                    )
                pause = max(min(look_at_all, deadline) - now, 0)
                if spare:
                    self.waits = True
                    report = self._report
                    seat = seat or Seat(
                        self.store, self.keys, Spare(self.incarnation, report.node, report.pid, self._wanted_rank, 0)
                    )
                    await seat.renew(round((now - began) * 1000))
                    pause = min(pause, self.settings.heartbeat)
                await self.clock.sleep(pause + 0.001)
        finally:
            self.waits = False
            if seat is not None:
                await seat.leave()

    async def _unclaimed(self, ranks: Sequence[int]) -> list[int]:
        """Which of the ranks nobody holds now, in one round trip for many."""
        free: list[int] = []
        with self.store.errors():
            for first in range(0, len(ranks), _BATCH):
                some = ranks[first : first + _BATCH]
                async with self.store.commands.pipeline(transaction=True) as pipe:
                    for rank in some:
                        pipe.get(self.keys.claim(rank))
                    found = await pipe.execute()
                free += [rank for rank, holder in zip(some, found, strict=True) if holder is None]
        return free

    async def _tell_who_holds(self, holders: Mapping[int, str], seconds: float) -> None:
        """Log who holds the ranks that were wanted, and what this process does about it."""
        said: list[str] = []
        for rank, holder in list(holders.items())[:4]:
            with self.store.errors():
                raw = await self.store.commands.get(self.keys.rank(rank))
            said.append(f"rank {rank} {_holder(raw, rank, holder)}")
        more = f"; and {len(holders) - 4} more ranks" if len(holders) > 4 else ""
        what = (
            "this process waits as a spare until one is free" if seconds == inf else f"waiting {seconds:.1f} s for it"
        )
        if holders and seconds > 0:
            logger.warning("group {}: held by others: {}{}; {}", self.keys.group, "; ".join(said), more, what)

    async def group_size(self) -> int | None:
        """How many ranks the last attempt of the group had; ``None`` where none was ever opened.

        Raises:
            StoreError: could not find out.
        """
        with self.store.errors():
            (found,) = await self.store.commands.hmget(self.keys.epoch, "world_size")
        return int(found) if found is not None and found.isdigit() else None

    async def _try_claim(self, rank: int) -> tuple[float | None, str]:
        """Seconds that another's claim has left and its name, or ``None`` if the claim is ours now."""
        key = self.keys.claim(rank)
        lease_ms = round(self.settings.lease * 1000)
        with self.store.errors():
            async with self.store.commands.pipeline(transaction=True) as pipe:
                pipe.set(key, self.incarnation, px=lease_ms, nx=True)
                pipe.get(key)
                pipe.pttl(key)
                _, holder, left = await pipe.execute()
            if holder == self.incarnation.encode():
                return None, ""
            if left > 2 * lease_ms or left == _FOR_EVER:
                # A clock that was set back would keep a dead process's claim for so long; one that lives renews it in time. None of
                # ours is without an end, and no lease of ours is as long as a report may say.
                said = _lease_of(await self.store.commands.get(self.keys.rank(rank)), rank)
                longest = max(lease_ms, min(said, _LONGEST_LEASE_MS))
                left = longest if left == _FOR_EVER else min(left, longest)
                await self.store.commands.pexpire(key, left)
        return max(left, 1) / 1000, _name_of(holder)

    async def _begin(self, rank: int) -> None:
        """Refuse keys of the wrong type before anything of ours is written, and take the log's end as the place to read from."""
        expected = {
            self.keys.rank(rank): "string",
            self.keys.epoch: "hash",
            self.keys.tasks: "stream",
        }
        with self.store.errors():
            async with self.store.commands.pipeline(transaction=True) as pipe:
                for key in expected:
                    pipe.type(key)
                found = [kind.decode() for kind in await pipe.execute()]
        for (key, kind), actual in zip(expected.items(), found, strict=True):
            if actual not in ("none", kind):
                await self._drop_claim(rank, said_hello=False)
                raise StoreCorrupt(
                    f"{key} holds a {actual} where a {kind} belongs; move or delete that key, then try again"
                )
        self._rank, self._frames = rank, None
        self.about.rank = rank
        self._report = self._report._replace(rank=rank)
        with self.store.errors():
            newest = await self.store.commands.xrevrange(self.keys.tasks, count=1)
        if newest:
            self._cursor = LogId.parse(newest[0][0].decode())
        await self._write()

    async def leave(self) -> None:
        """Give the rank back: the report and the claim go, so that nobody has to wait for the lease. Safe to call twice."""
        async with self._writing:
            if self._rank is None or self._dropped_claim is not None:
                return
            await self._drop_claim(self._rank)
            self._rank = None  # only now: what failed can be done again

    async def _drop_claim(self, rank: int, *, said_hello: bool = True) -> None:
        """Delete the claim if it is still ours, and our report. A watch makes that one step; no script is needed."""
        claim = self.keys.claim(rank)
        with self.store.errors():
            async with self.store.commands.pipeline(transaction=True) as pipe:
                await pipe.watch(claim)
                if await pipe.get(claim) != self.incarnation.encode():
                    return
                pipe.multi()
                pipe.delete(claim)
                hints: list[tuple[str | int, ...]] = []
                if said_hello:  # before that, the report's key is a predecessor's, or somebody else's altogether
                    pipe.delete(self.keys.rank(rank))
                    hints = [
                        self._hint(str(self._report.epoch or "-"), self._report.status, alarm=True),
                        self._keep(self.keys.signals),
                    ]
                    for command in hints:
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
                await self.store.append_if_possible(self.keys.signals, hints)
            return
        # It lapsed just now, and another life may have taken it; or the connection broke, which redis-py says in the same way.
        await self._drop_claim(rank, said_hello=said_hello)

    # --- reporting ----------------------------------------------------------------------------------------------------

    async def report(
        self,
        status: str | None = None,
        *,
        progress: tuple[int, int] | None = None,
        error: str = "",
        permanent: bool = False,
        outcome: TaskOutcome | None = None,
        events: Sequence[Event] = (),
        endpoint: str | None = None,
    ) -> None:
        """Say the whole state, in one round trip; a changed status wakes the planner.

        Args:
            status: the new status; ``None`` leaves it.
            progress: (done, total) of the work in progress.
            error: what failed.
            permanent: whether that failure is of the kind that trying again cannot mend.
            outcome: what became of a task; replaces an earlier one of the same task.
            events: history, appended in the same step, in this order.
            endpoint: ``host:port`` at which this rank's engine waits for the others in this epoch; ``None`` leaves it.

        Raises:
            InvalidName: that is no endpoint; nothing was written.
            ClaimLost: another incarnation holds the rank; nothing was written if that was known before.
            StoreError: unknown. The next heartbeat says it again, whole.
        """
        before = self._report
        if endpoint:
            valid_endpoint(endpoint)
        if status is not None and status != before.status:
            self._status_since = self.clock.now()
        outcomes = before.outcomes
        if outcome is not None:
            outcomes = (*(one for one in outcomes if one.task_id != outcome.task_id), outcome)[-MAX_OUTCOMES:]
        self._report = before._replace(
            status=before.status if status is None else valid_status(status),
            endpoint=before.endpoint if endpoint is None else endpoint,
            progress=progress,
            signs=before.signs if progress is not None else 0,
            error=error,
            permanent=permanent,
            outcomes=outcomes,
        )
        self._alarm = self._alarm or bool(error) or (outcome is not None and outcome.result in ("rejected", "failed"))
        for event in events:
            self._event_seq += 1
            self._unsaid.append({"seq": str(self._event_seq), "epoch": str(self._report.epoch or "-"), **event})
        await self._write(look=status is None)

    def note_progress(self, done: int, total: int) -> None:
        """Remember how far the work in progress is; the next heartbeat says it. Costs no round trip.

        Saying the same again is a sign of life, too: it means that the work moves, though it has not come further yet.
        """
        self._report = self._report._replace(progress=(done, total), signs=self._report.signs + 1)

    def _hint(self, epoch: str, status: str, *, alarm: bool) -> tuple[str | int, ...]:
        """The command that wakes the planners."""
        fields = ("kind", "report", "rank", self.rank, "epoch", epoch, "inc", self.incarnation, "status", status)
        return self._append(
            self.keys.signals, (*fields, *(("alarm", "1") if alarm else ())), self.settings.signal_entries
        )

    def _history(self, events: Sequence[Event]) -> list[tuple[str | int, ...]]:
        """The commands that tell the history."""
        mine = ("source", "rank", "rank", self.rank, "inc", self.incarnation)
        entries = [(*mine, *chain.from_iterable(event.items())) for event in events]
        appended = [self._append(self.keys.events, entry, self.settings.event_entries) for entry in entries]
        return [*appended, self._keep(self.keys.events)]

    def _append(self, key: str, entry: tuple[str | int | bytes, ...], cap: int) -> tuple[Any, ...]:
        """Append names and values, in turn, to a capped stream. To be followed by `_keep`."""
        return ("XADD", key, "MAXLEN", "~", cap, "*", *entry)

    def _keep(self, key: str) -> tuple[str | int, ...]:
        """Keep a stream's lifetime."""
        return ("PEXPIRE", key, round(self.settings.record_lifetime * 1000))

    def _prepare(self) -> _Frames:
        """Pack what can be packed before it is known what will be said."""
        claim = self.keys.claim(self.rank)
        return _Frames(
            holder=pack(("GET", claim)),
            look=(
                pack(("SET", claim, self.incarnation, "PX", self._lease_ms, "NX")),  # heals a flushed claim
                pack(("PEXPIRE", claim, self._lease_ms)),
                pack(("HMGET", self.keys.epoch, "number", "nonce", "verdict")),
                pack(("XREVRANGE", self.keys.tasks, "+", "-", "COUNT", 1)),
            ),
            report=Template(("SET", self.keys.rank(self.rank), GAP, "PX", self._lease_ms)),
            hint=Template(self._hint(GAP, GAP, alarm=False)),
            alarm=Template(self._hint(GAP, GAP, alarm=True)),
            keep_signals=pack(self._keep(self.keys.signals)),
        )

    async def _write(self, *, look: bool = True) -> None:
        """Send the report in one MULTI; with a `look`, renew the claim and bring back the epoch's record and the log's end as well.

        A look is due every heartbeat, whoever asks for what. In between, a report says what is new, makes sure that the rank is still held
        by this incarnation, and leaves out the rest: it lies between an arrival and the dispatch.

        Hint and history that could not be sent go with the next report. A reply that was lost after the commit makes them
        come twice; events carry their number, so that a reader can tell.
        """
        async with self._writing:
            rank = self.rank
            self._refuse_if_replaced()
            now = self.clock.now()
            if self._renewed_at > -inf and now - self._renewed_at > self.settings.reread_after:
                await self._read_before_writing(rank)
            look = look or now - self._looked_at >= self.settings.heartbeat
            if not await self._say(look=look):
                await self._say(look=True)  # the claim is gone, and a look heals it

    async def _say(self, *, look: bool) -> bool:
        """Send one report; whether the claim was there."""
        sent_at, read_to = self.clock.now(), self._cursor
        status_ms = max(0, round((sent_at - self._status_since) * 1000))
        self._report = report = self._report._replace(seq=self._report.seq + 1, status_ms=status_ms)
        events = list(self._unsaid)
        alarm, self._alarm = self._alarm, False  # one that comes up meanwhile goes with the next report
        saying = (report.status, report.epoch)
        frames = self._frames
        if frames is None:
            frames = self._frames = self._prepare()
        commands: list[Sequence[Any] | bytes] = [frames.holder, frames.report.fill(report.encode())]
        hints: list[bytes] = []
        if alarm or saying != self._said:
            hint = frames.alarm if alarm else frames.hint
            hints = [hint.fill(str(report.epoch or "-").encode(), report.status.encode()), frames.keep_signals]
        history = self._history(events) if events else []
        commands += hints
        commands += history
        told = range(2, len(commands))  # nothing of this keeps the report back: neither hints nor history are the truth
        if look:
            commands += frames.look
        try:
            with self.store.errors():
                replies = await self.store.transact(commands, may_fail=told)
        except BaseException:
            self._alarm = self._alarm or alarm
            raise
        logger.trace("report {} is written: {}", report.seq, report.status)
        self._said = saying
        for _ in range(min(len(events), len(self._unsaid))):
            self._unsaid.popleft()
        holder = replies[0]
        if holder is not None:
            self._check_claim(holder)
        elif not look:
            return False
        self._renewed_at = sent_at
        if look:
            self._looked_at = sent_at
            record, newest = replies[-2:]
            self._notice(record, newest, read_to)
        if any(isinstance(reply, Exception) for reply in replies[2 : told.stop]):
            await self._begin_anew({self.keys.signals: hints, self.keys.events: history}, replies[2 : told.stop])
        return True

    async def _begin_anew(self, told: Mapping[str, Sequence[Any]], replies: list[Any]) -> None:
        """Say what a spoiled stream did not take to one that is begun anew."""
        for key, commands in told.items():
            said, replies = replies[: len(commands)], replies[len(commands) :]
            if any(map(is_spoiled, said)):
                await self.store.append_if_possible(key, commands)

    async def _read_before_writing(self, rank: int) -> None:
        """After a gap (a stopped process, a lost network) this rank may have been replaced: then it must not write."""
        with self.store.errors():
            holder = await self.store.commands.get(self.keys.claim(rank))
        if holder is not None:
            self._check_claim(holder)

    def _refuse_if_replaced(self) -> None:
        """Raise `ClaimLost` where it is known that another incarnation holds the rank."""
        if self._dropped_claim is not None:
            raise self._dropped_claim

    def _check_claim(self, holder: bytes | None) -> None:
        if holder == self.incarnation.encode():
            return
        other = _name_of(holder)
        self._dropped_claim = ClaimLost(
            f"group {self.keys.group}, rank {self.rank}: process {other} holds this rank now; this one ({self.incarnation}) "
            "was silent for longer than its lease. Stop one of the two"
        )
        self._offer(self._dropped_claim)  # whoever waits for tasks waits no longer
        raise self._dropped_claim

    def _notice(self, record: list[bytes | None], newest: list[tuple[bytes, Any]], read_to: LogId) -> None:
        """Learn of epochs and verdicts from the record as well: the log may have been lost, or have gone back."""
        end = LogId.parse(newest[0][0].decode()) if newest else LogId(0, 0)
        if end < read_to and read_to == self._cursor:
            # Never wait beyond the end of a log that went back, nor pass over what has come since; what comes twice is recognised.
            report = self._report
            self._cursor = min(end, LogId(report.floor, report.applied if report.epoch else MAX_APPLIED))
        number, nonce, verdict = record
        if number is None or nonce is None:
            return
        try:
            epoch = EpochId.parse(f"{number.decode()}-{nonce.decode()}")
        except (InvalidName, UnicodeDecodeError):
            return
        if verdict is not None and epoch == self.promised:
            self._offer(VerdictAnnounced(epoch, read_verdict(verdict)))
        elif verdict is None and epoch.number > self._report.floor and epoch != self._announced:
            self._announced = epoch
            self._offer(EpochAnnounced(epoch))

    def _offer(self, entry: LogEntry | ClaimLost | HeartbeatFailed) -> None:
        """Hand an entry to the reader, unless it is too far behind: the next heartbeat says it again."""
        try:
            self._entries.put_nowait(entry)
        except asyncio.QueueFull:
            self._announced = None

    @asynccontextmanager
    async def heartbeat(self) -> AsyncGenerator[None]:
        """Rewrite the whole report every `Settings.heartbeat` seconds while inside.

        A store that does not answer is tried again with backoff and never raises here; `ClaimLost` ends `tasks`.

        Raises:
            HeartbeatFailed: a mistake of ours ended the heartbeat. It cancels what is inside, as a timeout does, ends `tasks`, and from
                then on this rank is not `trusted` and promises nothing. It may still say with `report` that it has failed.
        """
        inside = asyncio.current_task()
        asked = inside.cancelling() if inside is not None else 0
        left = cancelled = False

        def failed(mistake: BaseException) -> None:
            nonlocal cancelled
            self._failed = HeartbeatFailed(
                f"group {self.keys.group}, rank {self._rank}: a mistake of ours ended the heartbeat ({supervise.described(mistake)}); "
                "this rank accepts nothing any more. Start its process again, and report what its log says"
            )
            self._offer(self._failed)
            if inside is not None and not left:
                cancelled = inside.cancel()

        with self.about.applied():
            beating = supervise.background(self._beat(), f"heartbeat of rank {self._rank}", on_mistake=failed)
        try:
            try:
                yield
            finally:
                left = True
                await supervise.end(beating)
        except BaseException as error:
            by_others = cancelled and inside is not None and inside.uncancel() > asked
            ours = isinstance(error, asyncio.CancelledError) and cancelled and not by_others
            if self._failed is not None and (ours or isinstance(error, HeartbeatFailed)):
                raise self._failed from None
            raise
        else:
            if cancelled and inside is not None:  # what is inside has caught it
                inside.uncancel()

    async def _beat(self) -> None:
        failures = 0
        while True:
            pause = self.settings.heartbeat
            if failures:
                # Come back sooner than a heartbeat, but not all ranks at the same instant.
                pause = min(pause, self.settings.command_seconds) * random.uniform(0.5, 1.0)  # noqa: S311  no secret
            await self.clock.sleep(pause)
            self.beats += 1
            try:
                await self._write()
            except StoreError as error:
                if not failures:
                    logger.warning("rank {}: heartbeat failed: {}", self._rank, error)
                failures += 1
            except ClaimLost:
                return
            else:
                if failures:
                    logger.info("rank {}: heartbeat is back after {} failures", self._rank, failures)
                failures = 0

    # --- the task log -------------------------------------------------------------------------------------------------

    async def tasks(self) -> AsyncGenerator[LogEntry, None]:
        """Everything that is announced to this group, in the log's order, from the moment of `claim` on.

        Tasks of any epoch come out: the reader judges them. Before a task comes out, a lease that may have lapsed is renewed
        and the epoch is read again.

        Raises:
            ClaimLost: another incarnation holds the rank now.
            HeartbeatFailed: see `heartbeat`.
            PartFailed: a mistake of ours ended the reading of the log.
        """
        name = f"task log of rank {self._rank}"
        reading = supervise.background(self._follow(), name, on_mistake=self._end_log)
        try:
            while True:
                self._refuse_if_replaced()
                self._refuse_if_failed()
                entry = await self._entries.get()
                if isinstance(entry, BaseException):
                    raise entry
                if isinstance(entry, TaskEntry):
                    await self._make_sure()
                    if entry.epoch == self.promised:
                        if entry.id.n <= self._report.applied:
                            continue  # a log that went back says it again
                        entry = replace(entry, missed=entry.previous > self._report.applied)
                        self._report = self._report._replace(applied=entry.id.n)
                _trace("log entry: {}", partial(describe, entry))
                yield entry
        finally:
            await supervise.end(reading)

    def _end_log(self, mistake: BaseException) -> None:
        """Whoever waits for entries must not wait for ever."""
        failure = PartFailed(
            f"group {self.keys.group}, rank {self._rank}: a mistake of ours ended the reading of the task log "
            f"({supervise.described(mistake)}). Start its process again, and report what its log says"
        )
        if self._entries.full():  # the reader finds this behind what it has not taken yet
            self._entries.get_nowait()
        self._entries.put_nowait(failure)

    def _refuse_if_failed(self) -> None:
        """Raise where a part of this rank has failed, so that it accepts nothing."""
        if self._failed is not None:
            raise self._failed

    async def _make_sure(self) -> None:
        """Renew and re-read until the lease is trusted again; only then may a task be judged."""
        while not self.trusted:
            self._refuse_if_failed()
            try:
                await self._write()
            except StoreError:
                await self.clock.sleep(self.settings.command_seconds)

    async def _follow(self) -> None:
        reader = self.store.reader()
        pause = 0.0
        try:
            while True:
                try:
                    with self.store.errors():
                        reply = await reader.xread(
                            {self.keys.tasks: str(self._cursor)},
                            count=_BATCH,
                            block=round(self.settings.reader_block * 1000),
                        )
                    pause = 0.0
                except StoreError as error:
                    if not pause:
                        logger.warning("rank {}: the task log is not readable: {}", self._rank, error)
                    pause = min(max(pause * 2, 0.05), self.settings.command_seconds)
                    await self.clock.sleep(pause)
                    continue
                for _, entries in stream_entries(reply):
                    for entry_id, fields in entries:
                        self._cursor = LogId.parse(entry_id.decode())
                        await self._entries.put(decode_entry(self._cursor, fields))
        finally:
            await reader.aclose()

    # --- promises -----------------------------------------------------------------------------------------------------

    async def promise(self, epoch: EpochId, *, status: str | None = None) -> PromiseOutcome:
        """Give this rank's word to act in exactly this epoch. Tear down first; `retire` from the one before first.

        The epoch's record is read anew: it must be this one, without a verdict, above every promise before, and its roster
        must name this incarnation.

        Args:
            epoch: the epoch, as it was announced.
            status: what this rank is from the promise on, until it reports something else; ``None`` leaves the status as it is.

        Raises:
            StoreError: unknown; nothing is promised.
            HeartbeatFailed: see `heartbeat`.
        """
        self._refuse_if_failed()
        if self.promised is not None:
            return NotPromised(f"still in epoch {self.promised}: retire from it first")
        chunk, offset = divmod(self.rank, _ROSTER_CHUNK)
        with self.store.errors():
            found = await self.store.commands.hmget(
                self.keys.epoch, "number", "nonce", "verdict", "world_size", f"roster:{chunk}", "ordinal"
            )
        number, nonce, verdict, world_size, roster, ordinal = (
            None if one is None else one.decode("utf-8", "replace") for one in found
        )
        if number is None or f"{number}-{nonce}" != str(epoch):
            return NotPromised(f"epoch {epoch.number} is not current any more")
        if verdict is not None:
            return NotPromised(f"epoch {epoch.number} is concluded")
        if epoch.number <= self._report.floor:
            return NotPromised(f"epoch {epoch.number} is not above {self._report.floor}, which was promised before")
        mine = (roster or "")[offset * INCARNATION_WIDTH : (offset + 1) * INCARNATION_WIDTH]
        if world_size is not None and world_size.isdigit() and self.rank >= int(world_size):
            return NotPromised(
                f"the roster of epoch {epoch.number} names nobody for rank {self.rank}: it has {world_size} ranks"
            )
        if mine != self.incarnation or world_size is None:
            return NotPromised(
                f"the roster of epoch {epoch.number} names {mine or 'nobody'} for rank {self.rank}, not this process"
            )
        self.promised = epoch
        self.about.attempt = int(ordinal) if ordinal and ordinal.isdecimal() else None
        self._report = self._report._replace(
            epoch=epoch,
            floor=epoch.number,
            applied=1,
            outcomes=(),
            status=self._report.status if status is None else valid_status(status),
        )
        return Promised(epoch, int(world_size))

    def retire(self) -> None:
        """Spend the promise for good; its number stays as a floor. Tear down first. Safe to call twice."""
        self.promised = None
        self.about.attempt = None
        self._report = self._report._replace(epoch=None, applied=0, endpoint="")

    # --- meeting the other ranks --------------------------------------------------------------------------------------

    async def address(self) -> str:
        """The host name or IP address under which the other ranks reach this machine.

        Raises:
            StoreError: none was given, and the store, which would tell it, cannot be reached.
        """
        if not self._address:
            self._address = await self.store.local_address()
        return self._address

    async def endpoints(self, world_size: int) -> tuple[str, ...] | None:
        """Where each rank's engine waits for the others in the promised epoch, in rank order; empty for a rank that has no endpoint.

        The record has them once a step was dispatched that wanted them; see `barrier.Barrier.dispatch`. ``None`` where the record is
        not that of the promised epoch, or does not have them for so many ranks: the store went back, or forgot.

        Raises:
            StoreError: could not find out.
        """
        chunks = range((world_size + ENDPOINTS_CHUNK - 1) // ENDPOINTS_CHUNK)
        with self.store.errors():
            number, nonce, *found = await self.store.commands.hmget(
                self.keys.epoch, "number", "nonce", *(f"endpoints:{chunk}" for chunk in chunks)
            )
        current = None if number is None or nonce is None else f"{number.decode()}-{nonce.decode('utf-8', 'replace')}"
        if self.promised is None or current != str(self.promised):
            return None
        lines = [line for chunk in found if chunk is not None for line in chunk.decode("utf-8", "replace").split("\n")]
        return tuple(lines) if len(lines) == world_size else None

    # --- answers ------------------------------------------------------------------------------------------------------

    async def write_output(self, task_id: str, chunks: Iterable[bytes]) -> None:
        """Append pieces of one task's answer to its stream, in one round trip."""
        key = self.keys.out(task_id)
        appended = [self._append(key, ("chunk", chunk), self.settings.event_entries) for chunk in chunks]
        await self.store.append_answer(key, [*appended, ("PEXPIRE", key, round(self.settings.output_lifetime * 1000))])

    async def close(self) -> None:
        """Close what this member opened. Does not give the rank back; see `leave`."""
        if self._owns_store:
            await self.store.close()


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
        since = "nobody knows when"
    return f"by node {shown(report.node)}, pid {report.pid}, {report.status}, since {since}"


def _name_of(holder: bytes | None) -> str:
    """Who holds a claim, for people; whoever may write the claim may write anything there."""
    name = (holder or b"nobody")[:100].decode("utf-8", "replace")
    return name if name.isalnum() else shown(name)


def _lease_of(raw: bytes | None, rank: int) -> int:
    """The lease that a report was written with, in milliseconds; 0 where none can be read."""
    try:
        return Report.decode(raw or b"", rank).lease_ms
    except UndecodableReport:
        return 0

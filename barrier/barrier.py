"""The barrier as a planner uses it: open an epoch, wait for its ranks, dispatch at the instant all have arrived, conclude."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterable
from enum import Enum
from typing import Any, TypeAlias, TypeVar

from loguru import logger
from redis.asyncio import Redis

from barrier.clock import Clock, SystemClock
from barrier.errors import InvalidName, InvalidSettings, StoreError
from barrier.protocol.explain import explain
from barrier.protocol.ids import EpochId, LogId, new_nonce
from barrier.protocol.model import EpochRecord, Leadership, Snapshot, Verdict
from barrier.protocol.names import valid_digest, valid_step, valid_world_size
from barrier.protocol.outcomes import (
    Aborted,
    Already,
    CheckOutcome,
    Concluded,
    ConcludeOutcome,
    Dispatched,
    DispatchOutcome,
    Fenced,
    Following,
    Leading,
    LeadOutcome,
    NotReady,
    Opened,
    OpenOutcome,
    Released,
    ReleaseOutcome,
    Restored,
    RestoreOutcome,
    Superseded,
    TimedOut,
    Unknown,
    WaitOutcome,
)
from barrier.protocol.requirement import Requirement, all_ranks, find_break, missing_ranks, needed_from
from barrier.protocol.wakeup import Hint, decode_hint
from barrier.settings import Settings
from barrier.store import verbs
from barrier.store.connect import adopt
from barrier.store.keys import Keys
from barrier.store.store import Store
from barrier.store.wakeups import Subscription, Wakeups

__all__ = ["MAX_NOTES_BYTES", "MAX_PAYLOAD_BYTES", "Barrier", "Statuses", "Wake"]


MAX_PAYLOAD_BYTES = 256 * 1024
MAX_NOTES_BYTES = 64 * 1024
_PAGE = 64
"""Entries of the log read at once; each may have `MAX_PAYLOAD_BYTES`."""

Statuses: TypeAlias = str | Iterable[str] | Requirement
_T = TypeVar("_T")


class Wake(Enum):
    """Why a watch came back."""

    COMPLETE = "by the hints, every required rank has arrived"
    DISTURBED = "something else happened that deserves a look"
    QUIET = "the time passed"


class Barrier:
    """One group's barrier, from a planner's side.

    Every call may be repeated: an error means that the result is unknown, and the same call again does no harm.
    Several calls may run at once. Use it as an async context manager, or call `close`.

    Args:
        redis: a store from `barrier.connect`, or your own ``redis.asyncio.Redis``, whose address, user and TLS are then
            used, with our timeouts and without retries.
        group: the group's name.
        world_size: number of ranks; by default that of the epoch's record.
        namespace: keeps several clusters on one store apart.
        settings: the times. A store has its own: then these are ignored.
        clock: time, for tests.
        holder: this planner's name, unique for each planner; by default the host name and random digits.
        wakeups: a reader to share with other groups of this process.

    Raises:
        InvalidName: namespace, group or world size may not be used.
    """

    def __init__(
        self,
        redis: Redis | Store,
        group: str,
        *,
        world_size: int | None = None,
        namespace: str = "rankgate",
        settings: Settings | None = None,
        clock: Clock | None = None,
        holder: str | None = None,
        wakeups: Wakeups | None = None,
    ) -> None:
        self.keys: Keys = Keys(namespace, group)
        self.store: Store = adopt(redis, settings=settings)
        self.settings: Settings = self.store.settings
        self.clock: Clock = clock or SystemClock()
        self.holder: str = holder or f"{socket.gethostname()[:60]}-{new_nonce()[:12]}"
        self.leadership: Leadership | None = None
        self._owns_store = redis is not self.store
        self._owns_wakeups = wakeups is None
        self._wakeups = wakeups or Wakeups(self.store, self.clock)
        self._kept: Subscription | None = None
        self._gate_reader: Any = None  # made before the first dispatch that waits in the store
        self._world_size = None if world_size is None else valid_world_size(world_size)
        self._floor = 0
        self._term_floor = 0
        self._renew_at = float("inf")
        self._acts = False  # a planner that only looks needs no right to run a script
        self._current: EpochId | None = None
        self._seen_n = 0
        self._steps: dict[str, tuple[int, int]] = {}
        self._forgotten_to = LogId(0, 0)
        self._forget_refused = False

    async def __aenter__(self) -> Barrier:
        """Make sure that the guarantees hold on this store."""
        try:
            await self.store.verify()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        await self.close()

    async def close(self) -> None:
        """Stop waiting for hints, and close what this barrier opened. The leadership is not given back, but lapses; see `resign`."""
        if self._kept is not None:
            await self._kept.close()
            self._kept = None
        if self._gate_reader is not None:
            await self._gate_reader.aclose()
            self._gate_reader = None
        if self._owns_wakeups:
            await self._wakeups.close()
        if self._owns_store:
            await self.store.close()

    # --- leadership ---------------------------------------------------------------------------------------------------

    async def lead(self) -> LeadOutcome:
        """Take or renew leadership for one lease. Call it again every heartbeat.

        Raises:
            StoreError: could not find out; the caller may or may not lead.
        """
        await self.store.verify()
        self._acts = True
        asked_at = self.clock.now()
        outcome = await verbs.lead(
            self.store, self.keys, holder=self.holder, floor=self._term_floor, lease=self.settings.lease
        )
        match outcome:
            case Leading(leadership):
                self.leadership = leadership
                self._renew_at = asked_at + self.settings.lease * 2 / 3  # the last third is for trying again
                self._term_floor = max(self._term_floor, leadership.term)
            case Following(leader, _):
                self.leadership = None
                self._term_floor = max(self._term_floor, leader.term)
            case None:
                raise AssertionError("a lease above 0 is never answered with RESIGNED")
        return outcome

    async def resign(self) -> None:
        """Give the leadership back: then a standby need not wait for the lease."""
        self.leadership = None
        await verbs.lead(self.store, self.keys, holder=self.holder, floor=0, lease=None)

    # --- the verbs ----------------------------------------------------------------------------------------------------

    async def open(
        self,
        world_size: int | None = None,
        *,
        digest: str = "",
        notes: str = "",
        ordinal: int = 0,
        timeout: float | None = None,  # noqa: ASYNC109  the deadline of the outcome, by the injected clock
    ) -> OpenOutcome:
        """Start a new epoch with the ranks that are live now as its roster. Takes leadership first if nobody has it.

        Args:
            world_size: number of ranks.
            digest: digest of the spec, in hexadecimal; a rank that is configured for another spec is refused.
            notes: a text for the planner that comes after this one.
            ordinal: the highest ordinal that the caller knows of.
            timeout: seconds to wait for ranks that are not here yet; ``None`` answers `NotReady` at once.

        Raises:
            StoreError: could not find out. Call again: the epoch may have been opened, and then `Unconcluded` names it.
        """
        if world_size is not None:
            self._world_size = valid_world_size(world_size)
        if self._world_size is None:
            raise InvalidName("open needs a world_size the first time: pass world_size=<number of ranks>")
        if len(notes.encode()) > MAX_NOTES_BYTES:
            raise InvalidName(f"notes have {len(notes.encode()):,} bytes; at most {MAX_NOTES_BYTES:,} are kept")
        nonce = new_nonce()
        deadline = None if timeout is None else self.clock.now() + _positive("timeout", timeout)
        while True:
            leadership = await self._authority()
            if isinstance(leadership, Fenced):
                return leadership
            outcome = await verbs.open_epoch(
                self.store,
                self.keys,
                leadership=leadership,
                nonce=nonce,
                world_size=self._world_size,
                floor=self._floor,
                ordinal=ordinal,
                digest=valid_digest(digest),
                notes=notes,
            )
            match outcome:
                case Opened(epoch, _):
                    self._adopt(epoch, seen_n=1)
                    return outcome
                case NotReady() if deadline is not None and self.clock.now() < deadline:
                    snapshot = await self.inspect()
                    if all(view.report for view in snapshot.ranks):
                        continue
                    seconds = min(self.settings.backstop, deadline - self.clock.now())
                    await self.watch(snapshot, (), seconds)
                case _:
                    return outcome

    async def restore(
        self, epoch: EpochId, status: str, steps: Iterable[str], *, ordinal: int, digest: str = "", notes: str = ""
    ) -> RestoreOutcome:
        """Write a lost record back, if every rank reports exactly this epoch and status, and the same log position."""
        leadership = await self._authority()
        if isinstance(leadership, Fenced):
            return leadership
        outcome = await verbs.restore(
            self.store,
            self.keys,
            leadership=leadership,
            epoch=epoch,
            status=status,
            steps=[valid_step(step) for step in steps],
            world_size=await self._size(),
            floor=self._floor,
            ordinal=ordinal,
            digest=valid_digest(digest),
            notes=notes,
        )
        if isinstance(outcome, Restored):
            self._adopt(epoch)
        return outcome

    async def dispatch(
        self,
        epoch: EpochId,
        step: str,
        payload: str,
        statuses: Statuses,
        *,
        to: tuple[int, int] | None = None,
        attempt: int = 1,
        after: str = "",
        repeatable: bool = False,
        endpoints: bool = False,
    ) -> DispatchOutcome:
        """Append a task to the log if, at this instant, every required rank has arrived. Once per step; never waits.

        Args:
            epoch: the epoch to act in.
            step: the step's name.
            payload: the task, as text; at most `MAX_PAYLOAD_BYTES`.
            statuses: what must hold: one status, several, or a `Requirement`.
            to: first and last rank that the task is for; ``None`` for all ranks.
            attempt: 2, 3, … for a step that a rank refused and that is dispatched again.
            after: a step that must have been dispatched before in this epoch.
            repeatable: whether this is a step that may come any number of times, each time with a name of its own.
            endpoints: copy the endpoints in the reports of that instant into the record; ranks read them with
                `Member.endpoints`.

        Raises:
            InvalidName: step, status or payload may not be used; nothing was sent.
            StoreError: unknown. The task may be in the log; call again with the same arguments.
        """
        args = await self._dispatch_args(
            epoch, step, payload, statuses, to, attempt, after, repeatable=repeatable, endpoints=endpoints
        )
        if isinstance(args, Fenced):
            return args
        return self._note(args, await verbs.dispatch(self.store, self.keys, **args))

    async def conclude(self, epoch: EpochId, verdict: Verdict) -> ConcludeOutcome:
        """End the epoch for all ranks. The first verdict wins; `Concluded.verdict` is that one."""
        leadership = await self._authority(take=False)
        if isinstance(leadership, Fenced):
            return leadership
        seen_n = self._seen_n if self._current == epoch else 0
        return await verbs.conclude(
            self.store, self.keys, leadership=leadership, epoch=epoch, verdict=verdict, seen_n=seen_n
        )

    async def forget(self, snapshot: Snapshot, steps: str) -> None:
        """Delete tasks from the task log that nobody needs any more, so that prompts do not stay there.

        These are the tasks that every rank of the roster has read by this picture, and all tasks of an epoch that is
        over. No position is used twice: the record knows how far the log went. If the store refuses, a later call tries
        again; nothing depends on it.

        Args:
            snapshot: a picture of the group.
            steps: the beginning of the names of the steps to delete.
        """
        first = needed_from(snapshot)
        if first is None or (last := LogId(first.number, first.n - 1)) <= self._forgotten_to:
            return
        try:
            with self.store.errors():
                start = f"({self._forgotten_to}" if self._forgotten_to.number else "-"
                while page := await self.store.commands.xrange(self.keys.tasks, start, f"({first}", count=_PAGE):
                    found = [entry for entry, fields in page if fields.get(b"step", b"").startswith(steps.encode())]
                    if found:
                        await self.store.commands.xdel(self.keys.tasks, *found)
                    start = f"({page[-1][0].decode()}"
        except StoreError as error:
            if not self._forget_refused:
                logger.warning(
                    "group {}: tasks that all ranks have read cannot be deleted from the task log: {}",
                    self.keys.group,
                    error,
                )
            self._forget_refused = True
        else:
            self._forgotten_to, self._forget_refused = last, False

    async def inspect(self) -> Snapshot:
        """One consistent picture of the group; writes nothing.

        Raises:
            InvalidName: no world size was given, and the store has no record that tells it.
            StoreError: could not find out.
        """
        await self.store.verify()
        cursor = self._kept.cursor if self._kept is not None else (0, 0)
        read = verbs.inspect if self._acts else verbs.look
        snapshot = await read(self.store, self.keys, world_size=await self._size(), floor=self._floor)
        self._floor = max(self._floor, snapshot.floor)
        if snapshot.epoch is not None:
            self._adopt(snapshot.epoch.id, seen_n=snapshot.applied)
        if self._kept is not None and cursor > _place(snapshot.signals_end):
            self._kept.rewind(snapshot.signals_end)
        return snapshot

    # --- waiting ------------------------------------------------------------------------------------------------------

    async def wait(
        self,
        epoch: EpochId,
        statuses: Statuses,
        *,
        timeout: float,  # noqa: ASYNC109  the deadline of the outcome, by the injected clock
        failed_statuses: Iterable[str] = ("Failed",),
    ) -> WaitOutcome:
        """Wait until every required rank has arrived, at one instant.

        If a rank failed, was restarted or left, this concludes the epoch with that rank as the culprit, and returns
        `Aborted`. To dispatch at that instant, use `release`.

        Args:
            epoch: the epoch to wait in.
            statuses: what must hold: one status, several, or a `Requirement`.
            timeout: seconds without any progress (a new status or progress count) after which to give up; progress
                begins them anew.
            failed_statuses: statuses that mean that the rank has failed.
        """
        requirement = self._requirement(statuses, await self._size())

        async def look() -> CheckOutcome:
            size = await self._size()
            return await verbs.check(self.store, self.keys, epoch=epoch, requirement=requirement, world_size=size)

        async def watch(snapshot: Snapshot, seconds: float) -> Wake:
            return await self.watch(snapshot, requirement, seconds)

        return await self._gate(epoch, requirement, timeout, failed_statuses, look, watch)

    async def release(
        self,
        epoch: EpochId,
        step: str,
        payload: str,
        statuses: Statuses,
        *,
        timeout: float,  # noqa: ASYNC109  the deadline of the outcome, by the injected clock
        to: tuple[int, int] | None = None,
        after: str = "",
        endpoints: bool = False,
        failed_statuses: Iterable[str] = ("Failed",),
    ) -> ReleaseOutcome:
        """Wait as `wait` does, and dispatch the task at the instant at which all have arrived."""
        requirement = self._requirement(statuses, await self._size())

        async def try_to_dispatch() -> CheckOutcome | Fenced:
            return _released(
                epoch, await self.dispatch(epoch, step, payload, requirement, to=to, after=after, endpoints=endpoints)
            )

        async def dispatch_on_arrival(snapshot: Snapshot, seconds: float) -> CheckOutcome | Fenced | Wake:
            outcome = await self.dispatch_on_arrival(
                snapshot, epoch, step, payload, requirement, seconds, to=to, after=after, endpoints=endpoints
            )
            return outcome if isinstance(outcome, Wake) else _released(epoch, outcome)

        return await self._gate(epoch, requirement, timeout, failed_statuses, try_to_dispatch, dispatch_on_arrival)

    async def watch(
        self, snapshot: Snapshot, requirement: Requirement, seconds: float, *, any_change: bool = False
    ) -> Wake:
        """Wait for hints after a snapshot, until they say that every required rank has arrived, or that something else has happened.

        If all have arrived already, this waits for something else; a rank that takes its arrival back counts as that.
        With `any_change`, every change of any rank's status counts. Hints are not the truth: after `Wake.COMPLETE` call
        `dispatch`, after anything else `inspect`.
        """
        tally = _Tally(snapshot, requirement)
        complete = not tally.missing
        deadline = self.clock.now() + seconds
        async with self._subscribe(snapshot) as subscription:
            while (left := deadline - self.clock.now()) > 0:
                hints = await subscription.next(left, after=tally.place)
                if not tally.take(hints) or (any_change and hints) or (complete and tally.missing):
                    return Wake.DISTURBED
                if not complete and not tally.missing:
                    return Wake.COMPLETE
        return Wake.QUIET

    async def dispatch_on_arrival(
        self,
        snapshot: Snapshot,
        epoch: EpochId,
        step: str,
        payload: str,
        statuses: Statuses,
        seconds: float,
        *,
        to: tuple[int, int] | None = None,
        attempt: int = 1,
        after: str = "",
        endpoints: bool = False,
    ) -> DispatchOutcome | Wake:
        """Wait, from a snapshot, for the last arrival, and dispatch at that instant; see `dispatch` and `watch`.

        When a single rank is missing, this sends a blocking read of the hints and, right behind it, the dispatch. The
        store runs the dispatch when that rank arrives, so no round trip lies between. It is the same dispatch, with the
        same checks, so it does no harm if it comes too early, too late or twice. It is also tried once before the read:
        then the store has at hand what it needs, and a store that has forgotten the script says so before the arrival.

        Returns:
            What the dispatch answered; or why the wait ended, if the dispatch was not tried or answered `NotReady`.
            Then call `inspect`.
        """
        args = await self._dispatch_args(epoch, step, payload, statuses, to, attempt, after, endpoints=endpoints)
        if isinstance(args, Fenced):
            return args
        tally = _Tally(snapshot, args["requirement"])
        deadline = self.clock.now() + seconds
        outcome: DispatchOutcome | None = None
        tried = False
        while tally.missing and (left := deadline - self.clock.now()) > 0:
            if len(tally.missing) == 1:
                hints, outcome = await self._leave_dispatch(args, tally.place, left, try_first=not tried)
                tried = True
                if outcome is None:  # the script or the connection is lost: an ordinary dispatch renews both
                    outcome = self._note(args, await verbs.dispatch(self.store, self.keys, **args))
                    return Wake.DISTURBED if isinstance(outcome, NotReady) else outcome
            else:
                async with self._subscribe(snapshot) as subscription:
                    hints = await subscription.next(left, after=tally.place)
                tried = False
            undisturbed = tally.take(hints)
            if outcome is not None and not isinstance(outcome, NotReady):
                return self._note(args, outcome)
            if not undisturbed:
                return Wake.DISTURBED
        if tally.missing:
            return Wake.QUIET
        return self._note(args, await verbs.dispatch(self.store, self.keys, **args))

    async def _leave_dispatch(
        self, args: verbs.DispatchArgs, place: tuple[int, int], seconds: float, *, try_first: bool
    ) -> tuple[list[Hint], DispatchOutcome | None]:
        if self._gate_reader is None:
            self._gate_reader = self.store.reader()
        entries, outcome = await verbs.dispatch_when_pushed(
            self.store,
            self._gate_reader,
            self.keys,
            hints_after=f"{place[0]}-{place[1]}",
            seconds=seconds,
            try_first=try_first,
            **args,
        )
        return [decode_hint(entry_id, fields) for entry_id, fields in entries], outcome

    def _subscribe(self, snapshot: Snapshot) -> Subscription:
        if self._kept is None:  # keeps the reader going between waits
            self._kept = self._wakeups.keep(self.keys.signals, snapshot.signals_end)
        return self._wakeups.subscribe(self.keys.signals, snapshot.signals_end)

    async def _gate(
        self,
        epoch: EpochId,
        requirement: Requirement,
        timeout: float,  # noqa: ASYNC109  the deadline of the outcome, by the injected clock
        failed_statuses: Iterable[str],
        attempt: Callable[[], Awaitable[CheckOutcome | _T]],
        waiting: Callable[[Snapshot, float], Awaitable[CheckOutcome | Wake | _T]],
    ) -> WaitOutcome | _T:
        seconds = _positive("timeout", timeout)
        failed = frozenset(failed_statuses)
        deadline, seen = self.clock.now() + seconds, dict[int, object]()
        while True:
            await self._keep_lead()
            outcome = await attempt()
            if not isinstance(outcome, NotReady):
                return outcome
            snapshot = await self.inspect()
            current = snapshot.epoch
            if current is None:  # a script may read a record that a picture cannot: asking again would never end
                damage = snapshot.unreadable
                return Unknown(f"the record cannot be read: {damage}" if damage else "the store has no epoch record")
            if current.id != epoch or current.verdict is not None:
                continue  # the next try says which of the two it is
            ended = await self._conclude_if_broken(epoch, snapshot, failed)
            if ended is not None:
                return ended
            if _note_progress(snapshot, seen):
                deadline = self.clock.now() + seconds
            if not missing_ranks(snapshot, requirement):
                continue  # all arrived between the try and the picture
            if self.clock.now() >= deadline:
                return TimedOut(epoch, missing_ranks(snapshot, requirement), explain(snapshot, requirement))
            look_at = min(self.clock.now() + self.settings.backstop, deadline)
            found = await self._wait_until(look_at, snapshot, waiting)
            if not isinstance(found, NotReady | Wake):
                return found

    async def _conclude_if_broken(
        self, epoch: EpochId, snapshot: Snapshot, failed: frozenset[str]
    ) -> Aborted | Superseded | Unknown | None:
        """Conclude an epoch that cannot succeed any more; ``None`` if it can, or if this planner may not conclude it."""
        broken = find_break(snapshot, failed)
        if broken is None:
            return None
        match await self.conclude(epoch, Verdict.aborted(broken.reason, broken.culprit, broken.failure)):
            case Concluded(winner, _):
                return Aborted(winner)
            case (Superseded() | Unknown()) as ended:
                return ended
            case Fenced():
                return None  # the leader's verdict or the deadline will end this wait

    async def _wait_until(
        self,
        look_at: float,
        snapshot: Snapshot,
        waiting: Callable[[Snapshot, float], Awaitable[CheckOutcome | Wake | _T]],
    ) -> CheckOutcome | Wake | _T:
        """Wait for something to happen, and renew the leadership meanwhile; `Wake.QUIET` if nothing has."""
        found: CheckOutcome | Wake | _T = Wake.QUIET
        while found is Wake.QUIET and (now := self.clock.now()) < look_at:
            await self._keep_lead()
            until = look_at if self.leadership is None else min(look_at, self._renew_at)
            found = await waiting(snapshot, max(until - now, 0.001))
        return found

    async def _keep_lead(self) -> None:
        """Renew the leadership when it is due: a wait may be longer than the lease."""
        if self.leadership is not None and self.clock.now() >= self._renew_at:
            await self.lead()

    # --- what this planner knows --------------------------------------------------------------------------------------

    def _adopt(self, epoch: EpochId, *, seen_n: int = 0) -> None:
        """Remember which epoch is current, and how far its log went, in case the store goes back."""
        if self._current != epoch:
            self._current, self._seen_n = epoch, 0
            self._steps.clear()
        self._seen_n = max(self._seen_n, seen_n)
        self._floor = max(self._floor, epoch.number)

    async def _dispatch_args(
        self,
        epoch: EpochId,
        step: str,
        payload: str,
        statuses: Statuses,
        to: tuple[int, int] | None,
        attempt: int,
        after: str,
        *,
        repeatable: bool = False,
        endpoints: bool = False,
    ) -> verbs.DispatchArgs | Fenced:
        leadership = await self._authority(take=False)
        if isinstance(leadership, Fenced):
            return leadership
        size = await self._size()
        if len(payload.encode()) > MAX_PAYLOAD_BYTES:
            raise InvalidName(
                f"the payload has {len(payload.encode()):,} bytes; at most {MAX_PAYLOAD_BYTES:,} are dispatched"
            )
        known_n, known_attempt = self._steps.get(valid_step(step), (0, 0)) if self._current == epoch else (0, 0)
        return {
            "leadership": leadership,
            "epoch": epoch,
            "step": step,
            "payload": payload,
            "requirement": self._requirement(statuses, size),
            "to": to or (0, size - 1),
            "world_size": size,
            "attempt": attempt,
            "after": after,
            "repeatable": repeatable,
            "endpoints": endpoints,
            "seen_n": self._seen_n if self._current == epoch else 0,
            "known_n": known_n if known_attempt == attempt else 0,
        }

    def _note(self, args: verbs.DispatchArgs, outcome: DispatchOutcome) -> DispatchOutcome:
        """Remember what was dispatched, and at which log position."""
        match outcome:
            case Dispatched(entry) | Already(entry):
                self._adopt(args["epoch"], seen_n=entry.n)
                if not args.get("repeatable"):
                    self._steps[args["step"]] = (entry.n, args.get("attempt", 1))
            case _:
                pass
        return outcome

    async def _authority(self, *, take: bool = True) -> Leadership | Fenced:
        if self.leadership is None and take:
            await self.lead()
        if self.leadership is not None:
            return self.leadership
        return Fenced(self._term_floor, "another planner, or nobody: call lead()")

    async def _size(self) -> int:
        if self._world_size is None:
            with self.store.errors():
                found = await self.store.commands.hget(self.keys.epoch, "world_size")
            if found is None:
                raise InvalidName(
                    f"group {self.keys.group} has no epoch that tells its world_size: pass world_size=<number of ranks>"
                )
            self._world_size = valid_world_size(int(found))
        return self._world_size

    def _requirement(self, statuses: Statuses, size: int) -> Requirement:
        if isinstance(statuses, str):
            return all_ranks(size, statuses)
        items = tuple(statuses)
        if all(isinstance(item, str) for item in items):
            return all_ranks(size, [item for item in items if isinstance(item, str)])
        return tuple(item for item in items if not isinstance(item, str))


class _Tally:
    """The ranks that are missing, by a picture and the hints that came after it."""

    def __init__(self, snapshot: Snapshot, requirement: Requirement) -> None:
        self.place = _place(snapshot.signals_end)
        self.missing = set(missing_ranks(snapshot, requirement))
        self._epoch = snapshot.epoch
        self._requirement = requirement

    def take(self, hints: Iterable[Hint]) -> bool:
        """Count arrivals, and those that were taken back; return whether the hints said nothing else."""
        for hint in hints:
            self.place = max(self.place, hint.id)
            if self._epoch is None or not self._count(hint, self._epoch):
                return False
        return True

    def _count(self, hint: Hint, epoch: EpochRecord) -> bool:
        if hint.kind != "report" or hint.alarm or not 0 <= hint.rank < epoch.world_size:
            return False
        if hint.epoch != str(epoch.id) or hint.incarnation != epoch.roster[hint.rank]:
            return False
        if any(rule.first <= hint.rank <= rule.last and hint.status in rule.statuses for rule in self._requirement):
            self.missing.discard(hint.rank)
        else:
            self.missing.add(hint.rank)
        return True


def _released(epoch: EpochId, outcome: DispatchOutcome) -> CheckOutcome | Fenced:
    match outcome:
        case Dispatched(entry) | Already(entry):
            return Released(epoch, entry)
        case _:
            return outcome


def _note_progress(snapshot: Snapshot, seen: dict[int, object]) -> bool:
    """Whether any rank made progress since it was last seen. A rank that was silent and comes back unchanged did not."""
    moved = False
    for view in snapshot.ranks:
        if view.report is not None:
            mark = (
                view.report.incarnation,
                view.report.epoch,
                view.report.status,
                view.report.progress,
                view.report.signs,
            )
            moved = moved or seen.get(view.rank) != mark
            seen[view.rank] = mark
    return moved


def _place(text: str) -> tuple[int, int]:
    entry = LogId.parse(text)
    return entry.number, entry.n


def _positive(what: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise InvalidSettings(f"{what} is {value!r}; it must be a finite number of seconds above 0")
    return value

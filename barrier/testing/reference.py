"""The barrier's verbs in plain Python: what `barrier/lua` must do. Tests compare the scripts with it.

A state is a value. Every verb takes a state and returns the next state and the answer, which is the outcome that
`barrier.store.verbs` returns for the same call. States are hashable, so a search can visit each state once. Time is an argument, in milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from barrier.protocol.ids import EpochId, LogId
from barrier.protocol.model import Leadership, Verdict
from barrier.protocol.outcomes import (
    Aborted,
    Already,
    CheckOutcome,
    Concluded,
    ConcludeOutcome,
    Disagree,
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
    Restored,
    RestoreOutcome,
    Superseded,
    Unconcluded,
    Unknown,
)
from barrier.protocol.requirement import Requirement

__all__ = [
    "DAY_MS",
    "ReferenceEntry",
    "ReferenceLeader",
    "ReferenceRecord",
    "ReferenceReport",
    "ReferenceState",
    "Refusal",
    "check",
    "conclude",
    "dispatch",
    "highest_epoch",
    "lead",
    "open_epoch",
    "restore",
    "said",
]


@dataclass(frozen=True, slots=True)
class ReferenceReport:
    """The part of a rank's report that the verbs look at, and when its lease ends."""

    incarnation: str
    status: str
    epoch: EpochId | None = None
    applied: int = 0
    floor: int = 0
    digest: str = ""
    until_ms: int = 0


@dataclass(frozen=True, slots=True)
class ReferenceRecord:
    """The epoch's record. `steps` holds (name, log id, attempt), in the order of their dispatch."""

    id: EpochId
    ordinal: int
    roster: tuple[str, ...]
    digest: str = ""
    notes: str = ""
    last_n: int = 1
    steps: tuple[tuple[str, LogId, int], ...] = ()
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class ReferenceEntry:
    """An entry of the task log."""

    id: LogId
    kind: Literal["opened", "task", "verdict"]
    nonce: str
    previous: int
    step: str = ""
    payload: str = ""


@dataclass(frozen=True, slots=True)
class ReferenceLeader:
    """Who leads, and until when."""

    leadership: Leadership
    until_ms: int


@dataclass(frozen=True, slots=True)
class ReferenceState:
    """All that a group has in the store. `once` holds (step, log id, attempt) of repeatable steps."""

    reports: tuple[ReferenceReport | None, ...]
    record: ReferenceRecord | None = None
    leader: ReferenceLeader | None = None
    log: tuple[ReferenceEntry, ...] = ()
    once: tuple[tuple[str, LogId, int], ...] = ()

    @classmethod
    def empty(cls, world_size: int) -> ReferenceState:
        """A store that knows nothing."""
        return cls(reports=(None,) * world_size)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.reports)

    @property
    def log_end(self) -> LogId:
        """The newest entry's id."""
        return self.log[-1].id if self.log else LogId(0, 0)

    def live(self, rank: int, now_ms: int) -> ReferenceReport | None:
        """A rank's report, if its lease has not ended."""
        report = self.reports[rank]
        return report if report is not None and report.until_ms > now_ms else None

    def say(self, rank: int, report: ReferenceReport) -> ReferenceState:
        """Write a rank's whole report, as every heartbeat does."""
        return replace(self, reports=(*self.reports[:rank], report, *self.reports[rank + 1 :]))


DAY_MS = 86_400_000


def highest_epoch(now_ms: int, *known: int) -> int:
    """The highest epoch number that a rank can have promised: the highest known number, or the clock and a day, whichever is more."""
    return max(now_ms + DAY_MS, *known)


def said(report: ReferenceReport) -> int:
    """The highest number of an epoch that a report names."""
    return max(report.floor, report.epoch.number if report.epoch else 0)


Refusal: TypeAlias = Aborted | Superseded | Unknown


def lead(
    state: ReferenceState, now_ms: int, *, holder: str, floor: int, lease_ms: int
) -> tuple[ReferenceState, LeadOutcome | None]:
    """Take, renew or (with a lease of 0) give back leadership. A term is issued once."""
    leader = state.leader
    mine = leader is not None and leader.leadership.holder == holder
    if lease_ms == 0:
        return (replace(state, leader=replace(leader, until_ms=0)) if leader and mine else state), None
    if leader is not None and not mine and leader.until_ms > now_ms:
        if leader.until_ms > now_ms + 2 * lease_ms:  # the clock was set back
            leader = replace(leader, until_ms=now_ms + lease_ms)
        return replace(state, leader=leader), Following(leader.leadership, leader.until_ms - now_ms)
    if leader is not None and mine:
        leadership = leader.leadership
    else:
        stored = leader.leadership.term if leader else 0
        leadership = Leadership(max(stored + 1, floor + 1, now_ms), holder)
    return replace(state, leader=ReferenceLeader(leadership, now_ms + lease_ms)), Leading(leadership)


def open_epoch(
    state: ReferenceState,
    now_ms: int,
    *,
    leadership: Leadership,
    nonce: str,
    floor: int = 0,
    ordinal: int = 0,
    digest: str = "",
    notes: str = "",
) -> tuple[ReferenceState, OpenOutcome]:
    """Start a new epoch, if every rank is live; their incarnations become its roster."""
    fenced = _fenced(state, leadership)
    if fenced is not None:
        return state, fenced
    record = state.record
    if record is not None and record.id.nonce == nonce:
        return state, Opened(record.id, record.ordinal)
    if record is not None and record.verdict is None:
        return state, Unconcluded(record.id)
    reports = [state.live(rank, now_ms) for rank in range(state.world_size)]
    highest = highest_epoch(now_ms, floor, state.log_end.number, record.id.number if record is not None else 0)
    missing = tuple(rank for rank, report in enumerate(reports) if report is None or said(report) > highest)
    if missing:
        return state, NotReady(missing)
    present = [report for report in reports if report is not None]
    others = {rank: report.digest for rank, report in enumerate(present) if report.digest not in ("", digest)}
    if others:
        return state, Disagree(digest, others)
    seen = [floor, state.log_end.number, record.id.number if record else 0, *(report.floor for report in present)]
    epoch = EpochId(max(max(seen) + 1, now_ms), nonce)
    opened = ReferenceRecord(
        id=epoch,
        ordinal=max(record.ordinal if record else 0, ordinal) + 1,
        roster=tuple(report.incarnation for report in present),
        digest=digest,
        notes=notes,
    )
    entry = ReferenceEntry(LogId(epoch.number, 1), "opened", nonce, previous=0)
    return replace(state, record=opened, log=(*state.log, entry)), Opened(epoch, opened.ordinal)


def restore(
    state: ReferenceState,
    now_ms: int,
    *,
    leadership: Leadership,
    epoch: EpochId,
    status: str,
    steps: Sequence[str],
    floor: int = 0,
    ordinal: int = 1,
    digest: str = "",
    notes: str = "",
) -> tuple[ReferenceState, RestoreOutcome]:
    """Write a lost record back, if every rank reports exactly this epoch, status and log position."""
    fenced = _fenced(state, leadership)
    if fenced is not None:
        return state, fenced
    record = state.record
    if record is not None:
        return state, Restored(epoch, record.ordinal) if record.id == epoch else Superseded(record.id)
    newest = state.log[-1] if state.log else None
    if newest is not None and (
        newest.id.number > epoch.number or (newest.id.number == epoch.number and newest.kind == "verdict")
    ):
        return state, Superseded(None)
    reports = [state.live(rank, now_ms) for rank in range(state.world_size)]
    place = next((report.applied for report in reports if report is not None), 0)
    in_log = newest.id.n if newest is not None and newest.id.number == epoch.number else 0
    highest = highest_epoch(now_ms, state.log_end.number, floor)
    missing = tuple(
        rank
        for rank, report in enumerate(reports)
        if report is None
        or epoch.number > highest
        or report.applied < in_log  # something was dispatched that nobody has read yet
        or (report.epoch, report.status, report.applied, report.floor) != (epoch, status, place, epoch.number)
        or report.digest not in ("", digest)
    )
    if missing:
        return state, NotReady(missing)
    restored = ReferenceRecord(
        id=epoch,
        ordinal=max(ordinal, 1),
        roster=tuple(report.incarnation for report in reports if report is not None),
        digest=digest,
        notes=notes,
        last_n=place,
        steps=tuple((step, LogId(epoch.number, place), 1) for step in steps),
    )
    return replace(state, record=restored), Restored(epoch, restored.ordinal)


def check(
    state: ReferenceState, now_ms: int, *, epoch: EpochId, requirement: Requirement
) -> tuple[ReferenceState, CheckOutcome]:
    """Whether every required rank has arrived, at this instant."""
    refusal = _not_current(state, epoch)
    if refusal is not None:
        return state, refusal
    missing = _missing(state, now_ms, requirement)
    return state, NotReady(missing) if missing else Released(epoch)


def dispatch(
    state: ReferenceState,
    now_ms: int,
    *,
    leadership: Leadership,
    epoch: EpochId,
    step: str,
    payload: str,
    requirement: Requirement,
    attempt: int = 1,
    after: str = "",
    repeatable: bool = False,
    seen_n: int = 0,
    known_n: int = 0,
) -> tuple[ReferenceState, DispatchOutcome]:
    """Check every rank and append the task, at one instant, once per step."""
    refusal = _fenced(state, leadership) or _not_current(state, epoch)
    if refusal is not None:
        return state, refusal
    record = state.record
    if record is None:
        raise AssertionError("_not_current answers for a missing record")
    before = {name: (place, attempts) for name, place, attempts in (state.once if repeatable else record.steps)}
    if step in before and before[step][1] >= attempt:
        return state, Already(before[step][0])
    if after and after not in {name for name, _, _ in record.steps}:
        return state, Unknown(f"step {after} was not dispatched in this epoch")
    missing = _missing(state, now_ms, requirement)
    if missing:
        return state, NotReady(missing)
    if state.log_end.number > epoch.number:
        return state, Unknown(f"the log has entries of epoch {state.log_end.number}")
    counted = [report.applied for rank in _ranks(requirement) if (report := state.live(rank, now_ms)) is not None]
    in_log = state.log_end.n if state.log_end.number == epoch.number else 0
    written = max(in_log, record.last_n)
    newest = max([written, seen_n, *counted])
    place = newest + 1
    if step not in before and known_n > written:
        place, newest = known_n, written
    entry_id = LogId(epoch.number, place)
    entry = ReferenceEntry(entry_id, "task", epoch.nonce, newest, step, payload)
    marks = (
        *(mark for mark in (state.once if repeatable else record.steps) if mark[0] != step),
        (step, entry_id, attempt),
    )
    record = replace(record, last_n=place, steps=record.steps if repeatable else marks)
    state = replace(state, record=record, log=(*state.log, entry), once=marks if repeatable else state.once)
    return state, Dispatched(entry_id)


def conclude(
    state: ReferenceState, *, leadership: Leadership, epoch: EpochId, verdict: Verdict, seen_n: int = 0
) -> tuple[ReferenceState, ConcludeOutcome]:
    """Set the verdict; the first one wins, and is announced in the log."""
    fenced = _fenced(state, leadership)
    if fenced is not None:
        return state, fenced
    refusal = _not_current(state, epoch)
    if isinstance(refusal, Aborted):
        return state, Concluded(refusal.verdict, first=False)
    if refusal is not None:
        return state, refusal
    record = state.record
    if record is None:
        raise AssertionError("_not_current answers for a missing record")
    record, log = replace(record, verdict=verdict), state.log
    if state.log_end.number <= epoch.number:
        newest = max(state.log_end.n if state.log_end.number == epoch.number else 0, record.last_n, seen_n)
        log = (*log, ReferenceEntry(LogId(epoch.number, newest + 1), "verdict", epoch.nonce, newest))
        record = replace(record, last_n=newest + 1)
    return replace(state, record=record, log=log), Concluded(verdict, first=True)


def _fenced(state: ReferenceState, leadership: Leadership) -> Fenced | None:
    """Only the stored term and holder may act."""
    stored = state.leader.leadership if state.leader else None
    if stored == leadership:
        return None
    return Fenced(stored.term, stored.holder) if stored else Fenced(0, "")


def _not_current(state: ReferenceState, epoch: EpochId) -> Refusal | None:
    """Only in the stored epoch (number and nonce) may anybody act, and only while it has no verdict. A missing record means unknown."""
    record = state.record
    if record is None:
        return Unknown("the store has no epoch record")
    if record.id != epoch:
        if record.id.number < epoch.number:
            return Unknown(f"the store went back to epoch {record.id.number}")
        return Superseded(record.id)
    return None if record.verdict is None else Aborted(record.verdict)


def _ranks(requirement: Requirement) -> list[int]:
    return [rank for rule in requirement for rank in range(rule.first, rule.last + 1)]


def _missing(state: ReferenceState, now_ms: int, requirement: Requirement) -> tuple[int, ...]:
    """A rank has arrived if its live report says a wanted status in exactly this epoch, as the incarnation on the roster."""
    record = state.record
    if record is None:
        return tuple(_ranks(requirement))
    missing: list[int] = []
    for rule in requirement:
        for rank in range(rule.first, rule.last + 1):
            report = state.live(rank, now_ms)
            arrived = (
                report is not None
                and report.epoch == record.id
                and report.incarnation == record.roster[rank]
                and report.status in rule.statuses
            )
            if not arrived:
                missing.append(rank)
    return tuple(missing)

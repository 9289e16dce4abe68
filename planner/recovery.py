"""What a planner remembers between two pictures: progress, lapsed leases, which rank failed and how often. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from barrier import EpochId, EpochRecord, RankView, Settings, Snapshot, Verdict
from planner.policy import Policy

__all__ = [
    "ABSENT",
    "LOST",
    "UNATTRIBUTED",
    "Memory",
    "Sighting",
    "backoff_seconds",
    "decode_notes",
    "encode_notes",
    "exhausted",
    "forgive",
    "hold",
    "is_history",
    "leases",
    "observe",
]


UNATTRIBUTED = -1
"""The key in `Memory.charges` for failures that no rank is to blame for."""

ABSENT = "absent"
"""A verdict's code: ranks gave their leases back. Nobody has failed: a pause follows, and no charge."""

LOST = "lost"
"""A verdict's code: ranks fell silent. If another process comes for the rank, it has failed; otherwise it was only cut off."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """The last report of a rank before it went away.

    Attributes:
        incarnation: its process.
        node: its machine.
        status: its status.
        lease_ms: its lease, in milliseconds, as its report says.
        left: whether it took its report back before its lease was over.
    """

    incarnation: str
    node: str
    status: str
    lease_ms: int
    left: bool


def leases(snapshot: Snapshot) -> dict[int, float]:
    """Each rank's own lease in seconds, by rank, for the reports that say one."""
    return {
        view.rank: view.report.lease_ms / 1000
        for view in snapshot.ranks
        if view.report is not None and view.report.lease_ms
    }


@dataclass(frozen=True, slots=True)
class Memory:
    """What one planner knows of one instance besides the current picture. All times are in seconds by the planner's own clock.

    Attributes:
        since: when this planner began to look after the instance.
        progress_at: when any rank last gave a sign, or was last asked for something.
        moved: when each rank itself last gave a sign, by rank.
        asked_at: when ranks were last asked for something: an epoch was opened or ended, or a step dispatched.
        signature: what is compared with the next picture to see signs.
        live: the ranks that had a live report in the last picture.
        hold_until: decide nothing before this time: the store, not the ranks, may be at fault.
        hold_reason: why.
        epoch_lost_at: when the planner found the epoch's record gone; ``None`` while it is there or never was.
        missing_since: since when at least one rank has been away; ``None`` while all are here.
        accounted: the epoch whose verdict has been charged.
        charges: failed attempts in a row, by the rank that caused them.
        absences: attempts in a row that ended because ranks went away.
        owed: the rank to charge if the lost ranks come back as other processes, and the roster they were on.
        picture: the last picture; ``None`` before the first.
        gone: the last sighting of each rank that went away, even if it has come back.
        last_failure: the verdict that was charged last.
        backoff_until: open no epoch before this time.
        ready_since: since when all ranks have been serving; ``None`` while they are not.
        displaced: since when a rank's report has been from an older process, by rank. That process came back late. The
            newer process, if it lives, overwrites the report with its next heartbeat.
        stopping: somebody asked to stop the instance.
        launched_ms: when the instance was launched, by the store's clock, in milliseconds. It names this launch: verdicts of epochs
            that were opened for another launch do not count.
    """

    since: float
    progress_at: float
    moved: Mapping[int, float] = field(default_factory=dict[int, float])
    asked_at: float = float("-inf")
    signature: tuple[object, tuple[object, ...]] | None = None
    live: frozenset[int] = frozenset()
    hold_until: float = float("-inf")
    hold_reason: str = ""
    epoch_lost_at: float | None = None
    missing_since: float | None = None
    accounted: EpochId | None = None
    charges: Mapping[int, int] = field(default_factory=dict[int, int])
    absences: int = 0
    owed: tuple[int, tuple[str, ...]] | None = None
    picture: Snapshot | None = None
    gone: Mapping[int, Sighting] = field(default_factory=dict[int, Sighting])
    last_failure: Verdict | None = None
    backoff_until: float = float("-inf")
    ready_since: float | None = None
    displaced: Mapping[int, float] = field(default_factory=dict[int, float])
    stopping: bool = False
    launched_ms: int = 0

    @classmethod
    def fresh(cls, now: float, launched_ms: int = 0) -> Memory:
        """The memory of a planner that begins now."""
        return cls(since=now, progress_at=now, launched_ms=launched_ms)


def observe(
    memory: Memory, snapshot: Snapshot, policy: Policy, settings: Settings, now: float, *, serving: bool, jitter: float
) -> Memory:
    """The memory after a new picture.

    Args:
        memory: the memory before.
        snapshot: the new picture.
        policy: how long to wait.
        settings: has the length of a lease.
        now: the planner's clock, in seconds.
        serving: whether all ranks serve in this picture.
        jitter: a random number from 0 to 1, for the pause before the next attempt.
    """
    memory = _notice_moves(_notice_store_faults(memory, snapshot, settings, now), snapshot, now)
    here = frozenset(view.rank for view in snapshot.ranks if view.report is not None)
    everyone = len(here) == snapshot.world_size
    memory = replace(
        memory,
        live=here,
        picture=snapshot,
        missing_since=None if everyone else memory.missing_since if memory.missing_since is not None else now,
        displaced={rank: memory.displaced.get(rank, now) for rank in _displaced(snapshot)},
        ready_since=None if not serving else memory.ready_since if memory.ready_since is not None else now,
    )
    stable = memory.ready_since is not None and now - memory.ready_since >= policy.stable_after
    if stable or _has_generated(snapshot):
        memory = forgive(memory)
    return _settle(_account(memory, snapshot, policy, now, jitter), snapshot)


def _has_generated(snapshot: Snapshot) -> bool:
    """Whether a text was completed in this epoch. A standby looks too; otherwise it would count failures that are forgiven."""
    epoch = snapshot.epoch
    return (
        epoch is not None
        and epoch.verdict is None
        and any(
            outcome.step.startswith("generate ") and outcome.result == "done"
            for view in snapshot.ranks
            if view.report and view.report.epoch == epoch.id
            for outcome in view.report.outcomes
        )
    )


def forgive(memory: Memory) -> Memory:
    """Forget failures after a success."""
    if not memory.charges and not memory.absences:
        return memory
    return replace(memory, charges={}, absences=0, owed=None, last_failure=None)


def hold(memory: Memory, reason: str, now: float, settings: Settings) -> Memory:
    """Decide nothing for one lease: healthy ranks have reported again by then."""
    return replace(memory, hold_until=now + settings.lease, hold_reason=reason)


def is_history(memory: Memory, epoch: EpochRecord) -> bool:
    """Whether the epoch has ended and was opened for another launch: then it says nothing about this launch."""
    return epoch.verdict is not None and _is_of_another_launch(memory, epoch)


def _is_of_another_launch(memory: Memory, epoch: EpochRecord) -> bool:
    """Decide by the epoch's notes, and by the time only if they name no launch.

    By the time alone, after a clock that went back, every epoch of this launch would seem old: it would fail again without a pause.
    """
    launch = _launch_of(epoch.notes)
    return epoch.opened_ms < memory.launched_ms if launch is None else launch != memory.launched_ms


def exhausted(memory: Memory, policy: Policy) -> bool:
    """Whether the budget of any rank, or of the failures without a culprit, is spent."""
    return any(count > policy.max_failures for count in memory.charges.values())


def backoff_seconds(failures: int, policy: Policy, jitter: float) -> float:
    """Exponential backoff with full jitter, in seconds: anything from 0 to the base, doubled for each further failure, up to the cap.

    Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    return jitter * min(policy.backoff_cap, policy.backoff_base * 2.0 ** min(max(failures - 1, 0), 60))


def encode_notes(memory: Memory) -> str:
    """What the next planner must know, kept in the epoch's record: the launch, and how often each rank has failed."""
    return json.dumps(
        {"launched_ms": memory.launched_ms, "charges": {str(rank): count for rank, count in memory.charges.items()}}
    )


def decode_notes(notes: str) -> dict[int, int]:
    """How often each rank has failed, as `encode_notes` wrote it. A text that is not readable means that no rank has."""
    try:
        charges = _fields_of(notes)["charges"]
        return {int(rank): int(count) for rank, count in charges.items() if int(count) > 0}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return {}


def _launch_of(notes: str) -> int | None:
    """The launch that the notes name; ``None`` if the notes are not ours."""
    launched = _fields_of(notes).get("launched_ms")
    return launched if type(launched) is int else None


def _fields_of(notes: str) -> dict[str, Any]:
    """The notes as a dict; empty if the text is not a JSON object."""
    try:
        return dict(json.loads(notes).items())
    except (ValueError, AttributeError, RecursionError):
        return {}


def _notice_moves(memory: Memory, snapshot: Snapshot, now: float) -> Memory:
    """Note when each rank gave a sign, and when ranks were asked for something. Each rank's stall counts from its own times."""
    asked, moves = signature = _asked(snapshot), _moves(snapshot)
    if signature == memory.signature:
        return memory
    before_asked, before = memory.signature or (None, ())
    moved = {
        rank: memory.moved.get(rank, now) if rank < len(before) and before[rank] == move else now
        for rank, move in enumerate(moves)
    }
    asked_at = memory.asked_at if asked == before_asked else now
    gone = _gone(memory, snapshot)
    return replace(memory, signature=signature, progress_at=now, moved=moved, asked_at=asked_at, gone=gone)


def _asked(snapshot: Snapshot) -> object:
    """What ranks are asked for: the epoch, its dispatched steps, and its verdict."""
    epoch = snapshot.epoch
    return epoch and (epoch.id, tuple((name, step.attempt) for name, step in epoch.steps.items()), epoch.verdict)


def _moves(snapshot: Snapshot) -> tuple[object, ...]:
    """The parts of each rank's report that change when the rank does something."""
    return tuple(
        (view.report.incarnation, view.report.epoch, view.report.status, view.report.progress, view.report.signs)
        if view.report
        else None
        for view in snapshot.ranks
    )


def _displaced(snapshot: Snapshot) -> list[int]:
    if snapshot.epoch is None:
        return []
    roster = snapshot.epoch.roster
    return [view.rank for view in snapshot.ranks if view.report and view.report.incarnation < roster[view.rank]]


def _notice_store_faults(memory: Memory, snapshot: Snapshot, settings: Settings, now: float) -> Memory:
    """If most leases lapse between two looks, or the record is gone, the store is at fault and not the ranks."""
    lapsed = [rank for rank in memory.live if snapshot.ranks[rank].report is None] if memory.live else []
    if len(lapsed) >= 2 and len(lapsed) * 2 > snapshot.world_size and memory.hold_until <= now:
        memory = hold(
            memory,
            f"{len(lapsed)} of {snapshot.world_size} leases lapsed at once: the store may be at fault",
            now,
            settings,
        )
    if snapshot.epoch is not None:
        return replace(memory, epoch_lost_at=None) if memory.epoch_lost_at is not None else memory
    bound = any(view.report and view.report.epoch for view in snapshot.ranks)
    if bound and memory.epoch_lost_at is None:
        return replace(memory, epoch_lost_at=now)
    return memory


def _account(memory: Memory, snapshot: Snapshot, policy: Policy, now: float, jitter: float) -> Memory:
    """Charge a verdict once, to its culprit. A planner that takes over begins with the notes of the planner before it."""
    epoch = snapshot.epoch
    if epoch is None or _is_of_another_launch(memory, epoch):
        return memory
    if memory.accounted is None and not memory.charges:
        memory = replace(memory, charges=decode_notes(epoch.notes))
    if epoch.verdict is None or memory.accounted == epoch.id:
        return memory if memory.accounted is not None else replace(memory, accounted=EpochId(0, ""))
    memory = replace(memory, accounted=epoch.id, last_failure=epoch.verdict)
    if epoch.verdict.kind == "Stopped":
        return replace(memory, charges={}, absences=0, owed=None, last_failure=None)
    culprit = UNATTRIBUTED if epoch.verdict.culprit is None else epoch.verdict.culprit
    if epoch.verdict.code in (ABSENT, LOST):
        absences = memory.absences + 1
        return replace(
            memory,
            absences=absences,
            owed=(culprit, epoch.roster) if epoch.verdict.code == LOST else None,
            backoff_until=now + backoff_seconds(absences, policy, jitter),
        )
    count = memory.charges.get(culprit, 0) + 1
    return replace(
        memory,
        charges={**memory.charges, culprit: count},
        backoff_until=now + backoff_seconds(count, policy, jitter),
    )


def _settle(memory: Memory, snapshot: Snapshot) -> Memory:
    """Decide whether the lost ranks have failed. A rank whose process died has; one that was cut off from the store has not."""
    if memory.owed is None:
        return memory
    culprit, roster = memory.owed
    views = snapshot.ranks if culprit == UNATTRIBUTED else snapshot.ranks[culprit : culprit + 1]
    lives = [(view.report.incarnation, roster[view.rank]) for view in views if view.report and view.rank < len(roster)]
    back = [
        life > before for life, before in lives if life >= before
    ]  # a late report of an older process does not count
    if len(back) < len(views):
        return memory  # still away, which alone is no failure
    memory = replace(memory, owed=None)
    if sum(back) * 2 <= len(back):
        return memory
    return replace(memory, charges={**memory.charges, culprit: memory.charges.get(culprit, 0) + 1})


def _gone(memory: Memory, snapshot: Snapshot) -> Mapping[int, Sighting]:
    """The ranks that went away, since the last picture or before, with their last sightings."""
    before = memory.picture
    if before is None or before.world_size != snapshot.world_size:
        return {}
    fresh = {view.rank: _sighting(before, view.rank, snapshot) for view in snapshot.ranks if _went(before, view)}
    return {**memory.gone, **fresh} if fresh else memory.gone


def _went(before: Snapshot, view: RankView) -> bool:
    """Whether the process that the last picture showed for this rank is gone."""
    was = before.ranks[view.rank].report
    return was is not None and (view.report is None or view.report.incarnation > was.incarnation)


def _sighting(before: Snapshot, rank: int, snapshot: Snapshot) -> Sighting:
    view = before.ranks[rank]
    if view.report is None:
        raise AssertionError(f"rank {rank} was not seen")
    now = snapshot.ranks[rank]
    in_time = snapshot.now_ms < before.now_ms + view.lease_left_ms
    # If the record is gone too, the store forgot both, and the rank did not leave.
    left = now.report is None and not now.undecodable and in_time and snapshot.epoch is not None
    return Sighting(view.report.incarnation, view.report.node, view.report.status, view.report.lease_ms, left)

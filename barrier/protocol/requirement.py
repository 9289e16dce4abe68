"""Who has arrived, who is missing, and what has broken an epoch: pure judgements on a snapshot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from barrier.errors import InvalidName
from barrier.printable import printable
from barrier.protocol.ids import LogId
from barrier.protocol.model import EpochRecord, FailureClass, RankView, Snapshot
from barrier.protocol.names import valid_status

__all__ = ["Break", "RankRule", "Requirement", "all_ranks", "find_break", "missing_ranks", "needed_from"]


@dataclass(frozen=True, slots=True)
class RankRule:
    """Ranks `first` to `last` (both included) must be in one of `statuses`."""

    first: int
    last: int
    statuses: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse a rule that no rank can meet."""
        if not self.statuses:
            raise InvalidName(f"the rule for ranks {self.first} to {self.last} names no status; name at least one")
        for status in self.statuses:
            valid_status(status)


Requirement: TypeAlias = tuple[RankRule, ...]
"""What must hold of every rank before a task is dispatched. The rules cover each rank once."""


def all_ranks(world_size: int, statuses: str | Iterable[str]) -> Requirement:
    """Require the same of every rank."""
    return (RankRule(0, world_size - 1, (statuses,) if isinstance(statuses, str) else tuple(statuses)),)


def _rank_arrived(view: RankView, epoch: EpochRecord, requirement: Requirement) -> bool:
    """Whether one rank's live report counts: exactly this epoch, the roster's incarnation, and a required status."""
    report = view.report
    if report is None or report.epoch != epoch.id or report.incarnation != epoch.roster[view.rank]:
        return False
    return any(rule.first <= view.rank <= rule.last and report.status in rule.statuses for rule in requirement)


def missing_ranks(snapshot: Snapshot, requirement: Requirement) -> tuple[int, ...]:
    """The ranks that have not arrived; all ranks if there is no epoch."""
    epoch = snapshot.epoch
    if epoch is None or len(snapshot.ranks) != epoch.world_size:
        return tuple(range(snapshot.world_size))
    return tuple(view.rank for view in snapshot.ranks if not _rank_arrived(view, epoch, requirement))


@dataclass(frozen=True, slots=True)
class Break:
    """Why an epoch cannot go on.

    Attributes:
        reason: one sentence.
        culprit: the rank at fault; ``None`` if the store is.
        failure: whether trying again may help.
        replaced: whether another process holds the culprit's rank now, and reports no error.
    """

    reason: str
    culprit: int | None
    failure: FailureClass = "transient"
    replaced: bool = field(default=False, compare=False)


def find_break(snapshot: Snapshot, failed_statuses: Iterable[str] = ("Failed",)) -> Break | None:
    """Look for what breaks the epoch for good; ``None`` if nothing does, or if there is no epoch.

    A silent rank is no break: one picture does not show whether the rank or the store is at fault. If there are several
    breaks, the clearest is returned: a reported failure, then a restart, then a store that went back.
    """
    epoch = snapshot.epoch
    if epoch is None:
        return None
    failed = frozenset(failed_statuses)
    if snapshot.log_end.number > epoch.id.number:
        return Break(f"the store went back: the log has entries of epoch {snapshot.log_end.number} already", None)
    breaks = [found for view in snapshot.ranks if (found := _break_of(view, epoch, snapshot, failed)) is not None]
    return min(breaks, key=lambda one: one[0])[1] if breaks else None


def _break_of(
    view: RankView, epoch: EpochRecord, snapshot: Snapshot, failed: frozenset[str]
) -> tuple[int, Break] | None:
    report = view.report
    if report is None:
        return None
    who = f"rank {view.rank}" + (f" on {printable(report.node)}" if report.node else "")
    mine = epoch.roster[view.rank]
    if report.epoch == epoch.id and report.incarnation == mine and report.status in failed:
        failure: FailureClass = "permanent" if report.permanent else "transient"
        return 0, Break(f"{who} failed: {printable(report.error) or 'it gave no reason'}", view.rank, failure)
    if report.incarnation > mine:
        said = f" ({printable(report.error)})" if report.error else ""
        return 1, Break(f"{who} was restarted{said}", view.rank, replaced=not report.error)
    if report.incarnation < mine:
        return None  # an earlier life that came back late: it counts as missing, and harms nobody
    if report.floor > epoch.id.number or (report.epoch is not None and report.epoch.number > epoch.id.number):
        return 2, Break(f"the store went back: {who} has promised epoch {report.floor} already", None)
    if report.floor == epoch.id.number and report.epoch != epoch.id:
        return 2, Break(f"{who} has left this attempt already", view.rank if report.error else None)
    if report.epoch == epoch.id and report.applied > max(epoch.last_n, _log_n(snapshot)):
        return 2, Break(
            f"the store went back: {who} has read log entry {report.applied}, the record knows {epoch.last_n}", None
        )
    return None


def needed_from(snapshot: Snapshot) -> LogId | None:
    """The first position of the task log that a rank may still have to read; ``None`` if this picture does not tell.

    During an epoch it is the position after the last one that every rank of the roster has read. After the epoch it is
    the verdict's.
    """
    epoch = snapshot.epoch
    if epoch is None:
        return None
    if epoch.verdict is not None:
        return LogId(epoch.id.number, epoch.last_n)
    read = [
        view.report.applied
        if view.report is not None
        and (view.report.epoch, view.report.incarnation) == (epoch.id, epoch.roster[view.rank])
        else 0
        for view in snapshot.ranks
    ]
    return LogId(epoch.id.number, min(read) + 1) if min(read) else None


def _log_n(snapshot: Snapshot) -> int:
    epoch = snapshot.epoch
    return snapshot.log_end.n if epoch and snapshot.log_end.number == epoch.id.number else 0

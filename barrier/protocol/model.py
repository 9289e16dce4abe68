"""The picture of a group: leadership, epoch record, ranks, verdict. Values only, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from barrier.protocol.ids import EpochId, LogId
from barrier.protocol.report import Report

__all__ = ["EpochRecord", "FailureClass", "Leadership", "RankView", "Snapshot", "StepRecord", "Verdict", "read_verdict"]


FailureClass: TypeAlias = Literal["transient", "permanent"]


class Verdict(BaseModel):
    """How an epoch ended. One per epoch; the first one wins.

    Attributes:
        kind: ``Stopped`` (asked for) or ``Aborted``.
        reason: one sentence.
        culprit: the rank at fault; ``None`` if no rank is.
        failure: whether trying again may help; meaningful for ``Aborted``.
        code: the planner's word for what happened, if its policy needs one; the reason is for people only.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="ignore")

    kind: Literal["Stopped", "Aborted"]
    reason: str = Field(max_length=4_000)
    culprit: int | None = None
    failure: FailureClass = "transient"
    code: str = Field(default="", max_length=64)

    @classmethod
    def stopped(cls, reason: str = "stop was asked for") -> Verdict:
        """The verdict of an epoch that ended because somebody asked for it."""
        return cls(kind="Stopped", reason=reason[:4_000])

    @classmethod
    def aborted(
        cls, reason: str, culprit: int | None = None, failure: FailureClass = "transient", *, code: str = ""
    ) -> Verdict:
        """The verdict of an epoch that went wrong."""
        return cls(kind="Aborted", reason=reason[:4_000], culprit=culprit, failure=failure, code=code)

    def __str__(self) -> str:
        """Kind, class, culprit and reason, for people."""
        if self.kind == "Stopped":
            return f"Stopped: {self.reason}"
        charged = "" if self.culprit is None else f", rank {self.culprit}"
        return f"Aborted ({self.failure}{charged}): {self.reason}"


def read_verdict(text: str | bytes) -> Verdict:
    """Read a stored verdict. One that cannot be read has ended the epoch too: it becomes ``Aborted``."""
    try:
        return Verdict.model_validate_json(text)
    except ValidationError:
        return Verdict.aborted("the stored verdict could not be read")


@dataclass(frozen=True, slots=True)
class Leadership:
    """The authority under which a planner acts; the fencing token of planners. Term and holder are compared together."""

    term: int
    holder: str


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A step that was dispatched: `n` is its log position, `attempt` is 1, or more after a rank refused it."""

    n: int
    attempt: int


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """The record of an epoch, as stored.

    Attributes:
        id: number and nonce.
        ordinal: which attempt this is, for people: 1, 2, 3.
        term: the term under which it was opened or restored.
        world_size: number of ranks.
        roster: the incarnation of every rank that takes part, fixed when it was opened.
        steps: the steps dispatched so far.
        last_n: the highest log position used.
        digest: digest of the spec; empty if there is none.
        notes: a text that one planner leaves for the next; opaque here.
        opened_ms: when it was opened, by the store's clock, in milliseconds.
        verdict: how it ended; ``None`` while it goes on.
    """

    id: EpochId
    ordinal: int
    term: int
    world_size: int
    roster: tuple[str, ...]
    steps: Mapping[str, StepRecord]
    last_n: int
    digest: str
    notes: str
    opened_ms: int
    verdict: Verdict | None


@dataclass(frozen=True, slots=True)
class RankView:
    """One rank in a snapshot.

    Attributes:
        rank: which.
        report: its live report; ``None`` if there is none, or if it cannot be read (`undecodable` says why).
        lease_left_ms: what is left of the report's lifetime, in milliseconds; 0 if there is no report.
        undecodable: why the bytes in the rank's key are not a report; empty otherwise.
    """

    rank: int
    report: Report | None = None
    lease_left_ms: int = 0
    undecodable: str = ""

    @property
    def age_ms(self) -> int:
        """Milliseconds since the report was written; 0 if there is none. It needs no other machine's clock."""
        return max(0, self.report.lease_ms - self.lease_left_ms) if self.report else 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One consistent picture of a group, read by one script.

    Attributes:
        group: whose.
        world_size: how many ranks were looked at.
        now_ms: the store's clock, in milliseconds.
        epoch: the epoch's record; ``None`` if the store has none that can be read.
        unreadable: why a record that is there could not be read; empty otherwise.
        leader: who leads; ``None`` if nobody ever led, or if the store forgot.
        leader_left_ms: what is left of the leader's lease, in milliseconds.
        ranks: one view per rank, in order.
        log_end: the newest id that the log has ever had.
        signals_end: the id of the newest wake-up in this picture. A waiter waits for later ones, and so misses none.
    """

    group: str
    world_size: int
    now_ms: int
    epoch: EpochRecord | None
    ranks: tuple[RankView, ...]
    leader: Leadership | None = None
    leader_left_ms: int = 0
    log_end: LogId = field(default_factory=lambda: LogId(0, 0))
    signals_end: str = "0-0"
    unreadable: str = ""

    @property
    def floor(self) -> int:
        """The highest epoch number that anything in this picture has seen."""
        reports = [view.report.floor for view in self.ranks if view.report]
        return max([self.log_end.number, self.epoch.id.number if self.epoch else 0, *reports])

    @property
    def applied(self) -> int:
        """The highest log position of the current epoch that anything in this picture has seen."""
        if self.epoch is None:
            return 0
        current = self.epoch.id
        reports = [view.report.applied for view in self.ranks if view.report and view.report.epoch == current]
        log = self.log_end.n if self.log_end.number == current.number else 0
        return max([log, self.epoch.last_n, *reports])

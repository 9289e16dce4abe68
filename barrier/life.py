"""One life of one rank, as it is now: what the protocol knows of it, and what its user has said. Its report follows from both."""

from __future__ import annotations

from typing import NamedTuple

from barrier.errors import RankTaken
from barrier.protocol.names import valid_endpoint, valid_status
from barrier.protocol.rank_state import RankState
from barrier.protocol.report import MAX_OUTCOMES, Report, TaskOutcome

__all__ = ["Life", "Said"]


class Said(NamedTuple):
    """What a rank says of itself besides its state in the protocol; `barrier.Report` describes each field."""

    status: str = "Idle"
    endpoint: str = ""
    progress: tuple[int, int] | None = None
    signs: int = 0
    error: str = ""
    permanent: bool = False
    outcomes: tuple[TaskOutcome, ...] = ()

    def then(
        self,
        status: str | None,
        *,
        progress: tuple[int, int] | None,
        error: str,
        permanent: bool,
        outcome: TaskOutcome | None,
        endpoint: str | None,
    ) -> Said:
        """What the rank says next; `barrier.Member.report` describes each argument.

        Raises:
            InvalidName: that is no status or no endpoint.
        """
        outcomes = self.outcomes
        if outcome is not None:
            outcomes = (*(one for one in outcomes if one.task_id != outcome.task_id), outcome)[-MAX_OUTCOMES:]
        return Said(
            status=self.status if status is None else valid_status(status),
            endpoint=valid_endpoint(endpoint) if endpoint else self.endpoint if endpoint is None else "",
            progress=progress,
            signs=self.signs if progress is not None else 0,
            error=error,
            permanent=permanent,
            outcomes=outcomes,
        )


class Life:
    """The present state of one life of a rank. The reader of the task log and the reporter share it.

    Args:
        who: the fields that are the same in all reports of this life; `begin` sets the rank.
        now: the clock, in seconds.

    Attributes:
        state: its state in the protocol; code that has read something sets the next one.
        said: what its user has said.
    """

    def __init__(self, who: Report, now: float) -> None:
        self.state: RankState = RankState(who.incarnation)
        self.said: Said = Said()
        self._who = who
        self._claimed = False
        self._seq = 0
        self._status_since = now
        self._status_ms = 0

    @property
    def incarnation(self) -> str:
        """This life's name."""
        return self.state.incarnation

    @property
    def rank(self) -> int:
        """The claimed rank; raises `RankTaken` if there is none."""
        if not self._claimed:
            raise RankTaken("no rank is claimed yet: await claim() first")
        return self._who.rank

    @property
    def claimed(self) -> bool:
        """Whether this life holds a rank, as far as it knows."""
        return self._claimed

    def begin(self, rank: int) -> None:
        """This life holds the rank now."""
        self._who, self._claimed = self._who._replace(rank=rank), True

    def end(self) -> None:
        """This life holds no rank any more."""
        self._claimed = False

    def say(self, said: Said, now: float) -> None:
        """Note what its user has said, at this time of the clock."""
        if said.status != self.said.status:
            self._status_since = now
        self.said = said

    @property
    def report(self) -> Report:
        """What this rank last wrote, or is about to write."""
        who, state, said = self._who, self.state, self.said
        return Report(  # `_replace` takes longer, and the dispatch after an arrival waits for this
            rank=who.rank,
            incarnation=who.incarnation,
            status=said.status,
            epoch=state.promised,
            applied=state.applied,
            floor=state.floor,
            digest=who.digest,
            seq=self._seq,
            node=who.node,
            endpoint=said.endpoint,
            pid=who.pid,
            world_size=who.world_size,
            lease_ms=who.lease_ms,
            status_ms=self._status_ms,
            progress=said.progress,
            signs=said.signs,
            error=said.error,
            permanent=said.permanent,
            outcomes=said.outcomes,
        )

    def next_report(self, now: float) -> Report:
        """The report to be written at this time of the clock."""
        self._seq += 1
        self._status_ms = max(0, round((now - self._status_since) * 1000))
        return self.report

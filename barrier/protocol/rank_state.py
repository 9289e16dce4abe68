"""What one life of one rank has promised and read, and every decision that follows from it.

The functions are pure: they take a state and what was read, and return the next state and what it means.
`barrier.Member` reads, sends and waits. The exhaustive search calls the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

from barrier.protocol.ids import EpochId, LogId
from barrier.protocol.log import EpochAnnounced, TaskEntry, VerdictAnnounced
from barrier.protocol.record import SeenRecord
from barrier.protocol.report import MAX_APPLIED

__all__ = ["News", "NotPromised", "PromiseOutcome", "Promised", "RankState"]


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
News: TypeAlias = EpochAnnounced | VerdictAnnounced


class RankState(NamedTuple):
    """The protocol's state of one life of one rank.

    A named tuple, without times, report numbers and names for people: the exhaustive search makes millions of these
    states.

    Attributes:
        incarnation: this life's name.
        promised: the epoch that it has promised and not retired from.
        floor: the highest epoch number that it ever promised.
        applied: the highest log position of the promised epoch that it has taken; 0 without a promise.
        read_to: how far it has read the log.
    """

    incarnation: str
    promised: EpochId | None = None
    floor: int = 0
    applied: int = 0
    read_to: LogId = LogId(0, 0)

    # --- the log ------------------------------------------------------------------------------------------------------

    def read(self, place: LogId) -> RankState:
        """An entry was read at this place of the log."""
        return self._replace(read_to=place)

    def take(self, entry: TaskEntry) -> tuple[RankState, TaskEntry | None]:
        """Take a task that was read; return the next state, and the task with `TaskEntry.missed`.

        A task of another epoch is returned as it is: the reader judges it. A task that was taken before becomes
        ``None``: a log that went back repeats it.
        """
        if entry.epoch != self.promised:
            return self, entry
        if entry.id.n <= self.applied:
            return self, None
        return self._replace(applied=entry.id.n), replace(entry, missed=entry.previous > self.applied)

    def find_end(self, end: LogId, read_to: LogId) -> RankState:
        """Compare with the log's end, which a look found. When the look was sent, this rank had read as far as `read_to`.

        If the log went back, this rank reads on from the end: it does not wait beyond the end, and it skips no new
        entry. It recognises entries that come twice.
        """
        if end >= read_to or read_to != self.read_to:
            return self
        return self._replace(read_to=min(end, LogId(self.floor, self.applied if self.promised else MAX_APPLIED)))

    # --- the record ---------------------------------------------------------------------------------------------------

    def is_above(self, epoch: EpochId) -> bool:
        """Whether the epoch's number is above every number that this life has promised: then it may still promise this epoch."""
        return epoch.number > self.floor

    def hear(self, seen: SeenRecord | None) -> News | None:
        """The news in the record that this rank must act on. This works even if the log was lost or went back."""
        if seen is None:
            return None
        if seen.verdict is not None:
            return VerdictAnnounced(seen.epoch, seen.verdict) if seen.epoch == self.promised else None
        return EpochAnnounced(seen.epoch) if self.is_above(seen.epoch) else None

    # --- promises -----------------------------------------------------------------------------------------------------

    def refuses_any(self) -> NotPromised | None:
        """Why this rank promises nothing now, whatever the record says; ``None`` if it may."""
        if self.promised is not None:
            return NotPromised(f"still in epoch {self.promised}: retire from it first")
        return None

    def promise(self, epoch: EpochId, seen: SeenRecord | None, rank: int) -> tuple[RankState, PromiseOutcome]:
        """Promise an epoch, if the record that was just read allows it.

        The record must be this epoch's, without a verdict, and its roster must name this life for this rank. The
        epoch's number must be above every promise before.
        """
        size = self.refuses_any() or self._size_if_on_roster(epoch, seen, rank)
        if isinstance(size, NotPromised):
            return self, size
        return self._replace(promised=epoch, floor=epoch.number, applied=1), Promised(epoch, size)

    def _size_if_on_roster(self, epoch: EpochId, seen: SeenRecord | None, rank: int) -> int | NotPromised:
        """The number of ranks of the epoch, or why it is not promised."""
        number, roster = epoch.number, f"the roster of epoch {epoch.number}"
        if seen is None or seen.epoch != epoch:
            return NotPromised(f"epoch {number} is not current any more")
        if seen.refusal:
            return NotPromised(f"the record of epoch {number} {seen.refusal}")
        if seen.verdict is not None:
            return NotPromised(f"epoch {number} is concluded")
        if not self.is_above(epoch):
            return NotPromised(f"epoch {number} is not above {self.floor}, which was promised before")
        if seen.world_size is None:
            return NotPromised(f"{roster} cannot be used: the record does not say how many ranks it is for")
        if rank >= seen.world_size:
            return NotPromised(f"{roster} names nobody for rank {rank}: it has {seen.world_size} ranks")
        if seen.named != self.incarnation:
            return NotPromised(f"{roster} names {seen.named or 'nobody'} for rank {rank}, not this process")
        return seen.world_size

    def retire(self) -> RankState:
        """Spend the promise for good; its number stays as a floor."""
        return self._replace(promised=None, applied=0)

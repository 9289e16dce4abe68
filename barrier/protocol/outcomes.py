"""The outcomes of calls to the barrier. They are values, which a caller must match, and not exceptions, which it could forget to catch.

End a match with ``assert_never``: then pyright names a case that is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from barrier.protocol.ids import EpochId, LogId
from barrier.protocol.model import Leadership, Verdict

__all__ = [
    "Aborted",
    "Already",
    "CheckOutcome",
    "ConcludeOutcome",
    "Concluded",
    "Disagree",
    "DispatchOutcome",
    "Dispatched",
    "Fenced",
    "Following",
    "LeadOutcome",
    "Leading",
    "NotReady",
    "OpenOutcome",
    "Opened",
    "ReleaseOutcome",
    "Released",
    "RestoreOutcome",
    "Restored",
    "Superseded",
    "TimedOut",
    "Unconcluded",
    "Unknown",
    "WaitOutcome",
]


@dataclass(frozen=True, slots=True)
class Leading:
    """This planner leads, under this authority."""

    leadership: Leadership


@dataclass(frozen=True, slots=True)
class Following:
    """Somebody else leads, for at least so many milliseconds."""

    leader: Leadership
    left_ms: int


@dataclass(frozen=True, slots=True)
class Opened:
    """A new epoch is open. A repeated call gets the same epoch again."""

    epoch: EpochId
    ordinal: int


@dataclass(frozen=True, slots=True)
class Restored:
    """The lost record is in the store again."""

    epoch: EpochId
    ordinal: int


@dataclass(frozen=True, slots=True)
class Disagree:
    """Some ranks were configured for another spec: `found` has their digests, `wanted` is the digest that was asked for."""

    wanted: str
    found: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Unconcluded:
    """The current epoch has no verdict yet: conclude it first."""

    epoch: EpochId


@dataclass(frozen=True, slots=True)
class Dispatched:
    """The task is in the log, at this id."""

    id: LogId


@dataclass(frozen=True, slots=True)
class Already:
    """The step was dispatched before, at this id; nothing was appended."""

    id: LogId


@dataclass(frozen=True, slots=True)
class NotReady:
    """These ranks have not arrived; nothing was written."""

    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Concluded:
    """The epoch has this verdict. `first` is false if an earlier call set it."""

    verdict: Verdict
    first: bool


@dataclass(frozen=True, slots=True)
class Released:
    """All ranks had arrived at one instant; `id` is the task that was dispatched at that instant, if one was asked for."""

    epoch: EpochId
    id: LogId | None = None


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The deadline passed; the explanation names every missing rank."""

    epoch: EpochId
    missing: tuple[int, ...]
    explanation: str


@dataclass(frozen=True, slots=True)
class Aborted:
    """The epoch has a verdict (also where that is ``Stopped``)."""

    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Superseded:
    """Another epoch is current; `by` is ``None`` if only the log proves it."""

    by: EpochId | None


@dataclass(frozen=True, slots=True)
class Fenced:
    """A later planner leads (or the store forgot the leadership: term 0). Call `lead` before you act again."""

    term: int
    holder: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """The store's state is missing or went back. This is never a release: open a higher epoch, or restore."""

    reason: str


LeadOutcome: TypeAlias = Leading | Following
OpenOutcome: TypeAlias = Opened | NotReady | Disagree | Unconcluded | Fenced
RestoreOutcome: TypeAlias = Restored | NotReady | Superseded | Fenced
DispatchOutcome: TypeAlias = Dispatched | Already | NotReady | Aborted | Superseded | Fenced | Unknown
CheckOutcome: TypeAlias = Released | NotReady | Aborted | Superseded | Unknown
ConcludeOutcome: TypeAlias = Concluded | Superseded | Fenced | Unknown
WaitOutcome: TypeAlias = Released | TimedOut | Aborted | Superseded | Unknown
ReleaseOutcome: TypeAlias = Released | TimedOut | Aborted | Superseded | Fenced | Unknown

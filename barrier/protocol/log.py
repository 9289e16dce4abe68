"""The entries of the task log, as a rank reads them: what they say, how they are decoded, and how a trace describes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from barrier.errors import InvalidName
from barrier.protocol.ids import EpochId, LogId
from barrier.protocol.model import Verdict, read_verdict
from barrier.protocol.names import shown
from barrier.protocol.report import MAX_APPLIED

__all__ = ["EpochAnnounced", "Garbage", "LogEntry", "TaskEntry", "VerdictAnnounced", "decode_entry", "describe"]


@dataclass(frozen=True, slots=True)
class EpochAnnounced:
    """A new epoch is current. Tear down, then `barrier.Member.promise` it."""

    epoch: EpochId


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """A task from the log.

    Attributes:
        epoch: the epoch it was dispatched in. The reader judges it: act on exactly the promised one.
        id: its place in the log.
        previous: the position of the entry before it.
        missed: whether this rank never read the entry before it: the log was cut or lost, and other ranks may have done
            that task.
        step: the step.
        first: the first rank that it is for.
        last: the last rank that it is for.
        term: the dispatching planner's term.
        payload: the task, as it was dispatched.
    """

    epoch: EpochId
    id: LogId
    previous: int
    step: str
    first: int
    last: int
    term: int
    payload: bytes
    missed: bool = False


@dataclass(frozen=True, slots=True)
class VerdictAnnounced:
    """An epoch has ended. If it is the promised one: tear down and `barrier.Member.retire`."""

    epoch: EpochId
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Garbage:
    """An entry that is not ours. The reader gets it to count it."""

    id: str
    reason: str


LogEntry: TypeAlias = EpochAnnounced | TaskEntry | VerdictAnnounced | Garbage


def decode_entry(entry_id: LogId, fields: Mapping[bytes, bytes]) -> LogEntry:
    """Read one entry of the log; an entry that is not ours becomes `Garbage`."""
    if entry_id.n > MAX_APPLIED:
        return Garbage(str(entry_id), f"position {entry_id.n}; a report has room for {MAX_APPLIED}")
    try:
        kind = fields[b"kind"]
        epoch = EpochId.parse(f"{entry_id.number}-{fields[b'nonce'].decode()}")
        match kind:
            case b"opened":
                return EpochAnnounced(epoch)
            case b"verdict":
                return VerdictAnnounced(epoch, read_verdict(fields[b"verdict"]))
            case b"task":
                first, last = fields[b"to"].split(b"-")
                return TaskEntry(
                    epoch=epoch,
                    id=entry_id,
                    previous=int(fields[b"prev"]),
                    step=fields[b"step"].decode(),
                    first=int(first),
                    last=int(last),
                    term=int(fields[b"term"]),
                    payload=fields[b"task"],
                )
            case _:
                return Garbage(str(entry_id), "unknown kind")
    except (KeyError, ValueError, InvalidName) as error:
        return Garbage(str(entry_id), f"not an entry of ours ({type(error).__name__})")


def describe(entry: LogEntry) -> str:
    """Describe an entry by its kind, never by its content."""
    match entry:
        case EpochAnnounced(epoch):
            return f"epoch {epoch} is open"
        case VerdictAnnounced(epoch, verdict):
            return f"epoch {epoch} ended: {verdict.kind}"
        case TaskEntry():
            return f"{entry.id}, {shown(entry.step)} for ranks {entry.first} to {entry.last}"
        case Garbage():
            return f"{entry.id}, which is not readable"

"""The events of a history, and how they are read from the store."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pydantic import ValidationError

from barrier.errors import InvalidName
from barrier.protocol.ids import INCARNATION_WIDTH, EpochId, LogId
from barrier.protocol.model import Verdict
from barrier.protocol.names import valid_status, valid_step
from barrier.store.keys import Keys
from barrier.store.store import Store
from runner.messages import (
    MalformedMessage,
    Rejection,
    RunnerEvent,
    TaskStatusUpdated,
    decode_event,
)

__all__ = [
    "EpochConcluded",
    "EpochOpened",
    "EpochRestored",
    "History",
    "HistoryEvent",
    "Oddity",
    "OddityKind",
    "RankSaid",
    "StepDispatched",
    "read_history",
]


_PAGE = 1_000


@dataclass(frozen=True, slots=True)
class _Line:
    """The part that every line has: its id in the stream. The store makes the id from its clock."""

    id: LogId

    @property
    def at_ms(self) -> int:
        """The time of the line by the store's clock, in milliseconds since 1970."""
        return self.id.number


@dataclass(frozen=True, slots=True)
class EpochOpened(_Line):
    """A planner opened an epoch.

    Attributes:
        epoch: the epoch.
        ordinal: the number of the attempt, for people.
        roster: the incarnation of every rank, in rank order.
    """

    epoch: EpochId
    ordinal: int
    roster: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EpochRestored(_Line):
    """A planner wrote a lost record back: at that instant every rank of the roster reported this epoch and this status."""

    epoch: EpochId
    status: str
    roster: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepDispatched(_Line):
    """The gate appended a task to the task log, at `place`, for the ranks `first` to `last`. `attempt` counts its dispatches from 1."""

    epoch: EpochId
    step: str
    place: LogId
    first: int
    last: int
    attempt: int


@dataclass(frozen=True, slots=True)
class EpochConcluded(_Line):
    """A planner set an epoch's verdict."""

    epoch: EpochId
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class RankSaid(_Line):
    """A rank said something.

    Attributes:
        rank: the rank.
        incarnation: its incarnation.
        seq: the number of this event among those of the incarnation, from 1.
        epoch: the epoch that it had promised; ``None`` if it had promised none.
        event: the event.
    """

    rank: int
    incarnation: str
    seq: int
    epoch: EpochId | None
    event: RunnerEvent


HistoryEvent: TypeAlias = EpochOpened | EpochRestored | StepDispatched | EpochConcluded | RankSaid

OddityKind: TypeAlias = Literal["undecodable", "repeated", "trimmed", "gap", "no opening", "dispatched anew"]


@dataclass(frozen=True, slots=True)
class Oddity:
    """Something that is no breach, but limits what the checks can say, or that a reader should know.

    Attributes:
        kind: ``undecodable`` lines; events ``repeated`` after a reply was lost; a stream that was ``trimmed``; a ``gap`` in the events of
            an incarnation; an epoch with ``no opening`` in the stream; a step ``dispatched anew`` after a lost record was restored.
        count: how many lines, events or incarnations.
        sentence: the sentence for people.
    """

    kind: OddityKind
    count: int
    sentence: str


@dataclass(frozen=True, slots=True)
class History:
    """A group's history, in the store's order. Make it with `read_history`, or with `History.of` from events.

    Attributes:
        group: the group.
        events: every event once.
        oddities: missing or strange events.
    """

    group: str
    events: tuple[HistoryEvent, ...]
    oddities: tuple[Oddity, ...] = ()

    @property
    def rejections(self) -> tuple[tuple[int, Rejection], ...]:
        """Every rejection, with the rank that refused."""
        return tuple(
            (event.rank, event.event.rejection)
            for event in self.events
            if isinstance(event, RankSaid)
            and isinstance(event.event, TaskStatusUpdated)
            and event.event.rejection is not None
        )

    @classmethod
    def of(cls, group: str, events: Iterable[HistoryEvent], oddities: Iterable[Oddity] = ()) -> History:
        """Drop events that a rank sent twice (a reply was lost after the commit), and look for missing events."""
        seen: set[tuple[str, int]] = set()
        once: list[HistoryEvent] = []
        repeated = 0
        for event in events:
            if isinstance(event, RankSaid):
                if (event.incarnation, event.seq) in seen:
                    repeated += 1
                    continue
                seen.add((event.incarnation, event.seq))
            once.append(event)
        found = list(oddities)
        if repeated:
            found.append(Oddity("repeated", repeated, f"{repeated} events came again after a reply was lost"))
        found += _missing(once)
        return cls(group, tuple(once), tuple(found))


def _missing(events: Sequence[HistoryEvent]) -> Iterator[Oddity]:
    said: defaultdict[str, list[int]] = defaultdict(list)
    begun: set[EpochId] = set()
    unopened: dict[EpochId, None] = {}
    anew = 0
    steps: set[tuple[EpochId, str, int]] = set()
    for event in events:
        match event:
            case RankSaid():
                said[event.incarnation].append(event.seq)
            case EpochOpened():
                begun.add(event.epoch)
            case EpochRestored():
                begun.add(event.epoch)
                unopened.pop(event.epoch, None)
            case StepDispatched():
                key = (event.epoch, event.step, event.attempt)
                anew += key in steps
                steps.add(key)
            case EpochConcluded():
                pass
        if event.epoch is not None and event.epoch not in begun:
            unopened[event.epoch] = None
    lost = {incarnation: max(seqs) - len(seqs) for incarnation, seqs in said.items() if max(seqs) != len(seqs)}
    if lost:
        yield Oddity(
            "gap", len(lost), f"{sum(lost.values())} events of {len(lost)} incarnations are missing from the history"
        )
    if unopened:
        numbers = ", ".join(str(epoch.number) for epoch in unopened)
        yield Oddity("no opening", len(unopened), f"the history does not hold the opening of epoch {numbers}")
    if anew and any(isinstance(event, EpochRestored) for event in events):
        yield Oddity("dispatched anew", anew, f"{anew} steps were dispatched anew after a lost record was restored")


# --- reading --------------------------------------------------------------------------------------------------------------


async def read_history(store: Store, keys: Keys) -> History:
    """Read a group's whole history, up to its newest event.

    Args:
        store: the store.
        keys: the group's keys.

    Raises:
        StoreError: the history could not be read.
    """
    events: list[HistoryEvent] = []
    oddities: list[Oddity] = []
    undecodable: list[str] = []
    with store.errors():
        if not await store.commands.exists(keys.events):
            return History(keys.group, ())
        info: Mapping[str, Any] = await store.commands.xinfo_stream(keys.events)
        start, end = "-", info["last-generated-id"].decode()
        while page := await store.commands.xrange(keys.events, start, end, count=_PAGE):
            for entry_id, fields in page:
                try:
                    events.append(_decode(LogId.parse(entry_id.decode()), fields))
                except (KeyError, ValueError):  # a foreign line may contain anything
                    undecodable.append(entry_id.decode())
            start = f"({page[-1][0].decode()}"
    if undecodable:
        places = f"{', '.join(undecodable[:3])}{', …' if len(undecodable) > 3 else ''}"
        oddities.append(
            Oddity("undecodable", len(undecodable), f"{len(undecodable)} lines are not readable ({places})")
        )
    added = info.get("entries-added")  # Redis 6.2 has no count; there a gap or a missing opening shows the loss
    if isinstance(added, int) and added > len(events) + len(undecodable):
        gone = added - len(events) - len(undecodable)
        oddities.append(
            Oddity("trimmed", gone, f"the stream was cut: {gone} of {added} events are gone, the oldest ones")
        )
    return History.of(keys.group, events, oddities)


def _decode(place: LogId, raw: Mapping[bytes, bytes]) -> HistoryEvent:
    """Read one line; raises KeyError or ValueError for a line that is not exactly in our form."""
    line = {name.decode(): value for name, value in raw.items()}
    match line.pop("source"):
        case b"planner":
            decoded = _decode_planner(place, line)
        case b"rank":
            decoded = _decode_rank(place, line)
        case _:
            raise ValueError("neither a planner's line nor a rank's")
    if line:
        raise ValueError(f"unknown fields: {', '.join(line)}")
    return decoded


def _decode_planner(place: LogId, line: dict[str, bytes]) -> HistoryEvent:
    epoch = EpochId.parse(line.pop("epoch").decode())
    match line.pop("kind"):
        case b"Opened":
            return EpochOpened(place, epoch, _number(line.pop("ordinal")), _roster(line.pop("roster")))
        case b"Restored":
            status = valid_status(line.pop("status").decode())
            return EpochRestored(place, epoch, status, _roster(line.pop("roster")))
        case b"Dispatched":
            first, last = (_number(part) for part in line.pop("to").split(b"-"))
            step, log_id = valid_step(line.pop("step").decode()), LogId.parse(line.pop("id").decode())
            return StepDispatched(place, epoch, step, log_id, first, last, _number(line.pop("attempt")))
        case b"Concluded":
            try:
                return EpochConcluded(place, epoch, Verdict.model_validate_json(line.pop("verdict")))
            except ValidationError:
                raise ValueError("not a verdict") from None
        case _:
            raise ValueError("unknown kind")


def _decode_rank(place: LogId, line: dict[str, bytes]) -> RankSaid:
    epoch = line.pop("epoch").decode()
    try:
        event = decode_event(line.pop("event"))
    except MalformedMessage:
        raise ValueError("not an event") from None
    if line.pop("kind").decode() != event.kind:
        raise ValueError("the line says another kind than the event")
    return RankSaid(
        id=place,
        rank=_number(line.pop("rank")),
        incarnation=_incarnation(line.pop("inc").decode()),
        seq=_number(line.pop("seq")),
        epoch=None if epoch == "-" else EpochId.parse(epoch),
        event=event,
    )


def _number(raw: bytes) -> int:
    if re.fullmatch(rb"[0-9]{1,20}", raw) is None:
        raise ValueError("not a number")
    return int(raw)


def _incarnation(text: str) -> str:
    if re.fullmatch(rf"[0-9a-f]{{{INCARNATION_WIDTH}}}", text) is None:
        raise InvalidName("not an incarnation")
    return text


def _roster(raw: bytes) -> tuple[str, ...]:
    return tuple(_incarnation(one) for one in raw.decode().split(","))

"""What really happened to an instance: its history, read from the store and judged without trusting anybody's word for it.

The group's `events` stream is one total order, made by the store: the planner's scripts append to it in the very step that
changes something, and so do the ranks' reports. `find_breaches` holds that order against the rules of the design, written down
once more in here: it shares no code with the planner or the runner, only the words of `runner.messages`, so that a mistake in
theirs cannot hide itself. The idea of checking a recorded history instead of the program is Jepsen's (https://jepsen.io).

What is missing is never guessed: where the stream was cut, or events were lost, `History.oddities` says so, and the rules that
would need what is missing stay silent.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from typing import Any, Literal, TypeAlias

from pydantic import ValidationError

from barrier.errors import InvalidName, RankgateError
from barrier.ids import INCARNATION_WIDTH, EpochId, LogId
from barrier.keys import Keys, valid_status, valid_step
from barrier.model import Verdict
from barrier.store import Store
from runner.messages import (
    MalformedMessage,
    Rejection,
    RunnerEvent,
    RunnerStatusUpdated,
    TaskAcknowledged,
    TaskStatusUpdated,
    decode_event,
)

_PAGE = 1_000


class NoSuchAttempt(RankgateError):
    """The history knows no attempt, or not the one that was asked for."""


# --- what a history is made of --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Line:
    """What every line has: its place in the stream, which the store makes of its own clock."""

    id: LogId

    @property
    def at_ms(self) -> int:
        """When, by the store's clock, in milliseconds since 1970."""
        return self.id.number


@dataclass(frozen=True, slots=True)
class EpochOpened(_Line):
    """A planner opened an epoch.

    Attributes:
        epoch: which.
        ordinal: which attempt it is, for people.
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
    """A task entered the task log through the gate, at `place`, for the ranks `first` to `last`, for the `attempt`-th time."""

    epoch: EpochId
    step: str
    place: LogId
    first: int
    last: int
    attempt: int


@dataclass(frozen=True, slots=True)
class EpochConcluded(_Line):
    """A planner latched an epoch's verdict."""

    epoch: EpochId
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class RankSaid(_Line):
    """A rank said something.

    Attributes:
        rank: who.
        incarnation: in which life of its process.
        seq: its own count of what it has said in that life, from 1.
        epoch: the epoch that it had promised then; ``None`` where it was in none.
        event: what it said.
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
    """Something that is no breach, but that limits what can be said, or that a reader should know.

    Attributes:
        kind: ``undecodable`` lines; events ``repeated`` after a reply was lost; a stream that was ``trimmed``; a ``gap`` in what an
            incarnation said; an epoch with ``no opening`` in the stream; a step ``dispatched anew`` after a lost record was restored.
        count: how many lines, events or incarnations.
        sentence: for people.
    """

    kind: OddityKind
    count: int
    sentence: str


@dataclass(frozen=True, slots=True)
class History:
    """A group's history, in the store's order. Make it with `read_history`, or with `History.of` from events.

    Attributes:
        group: whose.
        events: every event once.
        oddities: what is missing or strange.
    """

    group: str
    events: tuple[HistoryEvent, ...]
    oddities: tuple[Oddity, ...] = ()

    @property
    def rejections(self) -> tuple[tuple[int, Rejection], ...]:
        """Every refusal, with the rank that refused."""
        return tuple(
            (event.rank, event.event.rejection)
            for event in self.events
            if isinstance(event, RankSaid)
            and isinstance(event.event, TaskStatusUpdated)
            and event.event.rejection is not None
        )

    @classmethod
    def of(cls, group: str, events: Iterable[HistoryEvent], oddities: Iterable[Oddity] = ()) -> History:
        """Drop what a rank said twice (its reply was lost after the commit), and look for what is missing."""
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
    """Read a group's whole history, up to the newest event that there is now.

    Args:
        store: where.
        keys: whose.

    Raises:
        StoreError: could not be read.
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
                except (KeyError, ValueError):  # whatever a line of somebody else's may look like
                    undecodable.append(entry_id.decode())
            start = f"({page[-1][0].decode()}"
    if undecodable:
        places = f"{', '.join(undecodable[:3])}{', …' if len(undecodable) > 3 else ''}"
        oddities.append(
            Oddity("undecodable", len(undecodable), f"{len(undecodable)} lines are not readable ({places})")
        )
    added = info.get("entries-added")  # Redis 6.2 does not count them; there a gap or a missing opening tells
    if isinstance(added, int) and added > len(events) + len(undecodable):
        gone = added - len(events) - len(undecodable)
        oddities.append(
            Oddity("trimmed", gone, f"the stream was cut: {gone} of {added} events are gone, the oldest ones")
        )
    return History.of(keys.group, events, oddities)


def _decode(place: LogId, raw: Mapping[bytes, bytes]) -> HistoryEvent:
    """Read one line; raises KeyError or ValueError for anything that is not exactly ours."""
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


# --- the rules ------------------------------------------------------------------------------------------------------------

Rule: TypeAlias = Literal[
    "gate",
    "once in the log",
    "once at a rank",
    "one epoch at a time",
    "rejection",
    "order of events",
    "one verdict",
    "roster",
    "fencing",
    "through the gate",
]
"""Which promise was broken:

- ``gate``: a step was dispatched though not every rank had said what it must have said, in that epoch and as that incarnation;
- ``once in the log``: a step was dispatched twice in one epoch, and not because a rank had refused it as not yet possible;
- ``once at a rank``: a rank began one task of one epoch twice;
- ``one epoch at a time``: two ranks were at work in different epochs at one instant;
- ``rejection``: a refusal that was not exactly one TaskAcknowledged and then exactly one Failed;
- ``order of events``: an accepted task that was not told in the order of DESIGN section 5, or was begun in the wrong status;
- ``one verdict``: an epoch with two, or with a dispatch after its verdict;
- ``roster``: an incarnation in an epoch whose roster does not name it;
- ``fencing``: an epoch whose number is not above every one before it, or a dispatch in one that was superseded;
- ``through the gate``: a rank began a step that had not been dispatched to it through the gate.
"""


@dataclass(frozen=True, slots=True)
class Breach:
    """One broken promise.

    Attributes:
        rule: which.
        sentence: what happened, for people.
        id: the event that breaks it.
        epoch: in which epoch; ``None`` where the rank was in none.
        rank: whose it is; ``None`` where it is the planner's.
    """

    rule: Rule
    sentence: str
    id: LogId
    epoch: EpochId | None
    rank: int | None = None


_CONNECT, _LOAD, _FOLLOWERS, _LEADER = "connect", "load", "warm up followers", "warm up leader"

_BRINGS = {
    "ConnectToGroup": "Connecting",
    "LoadModel": "Loading",
    "StartWarmup": "WarmingUp",
    "TextGeneration": "Running",
    "Shutdown": "ShuttingDown",
}
"""The status that a rank says when it begins."""
_KIND_OF_STATUS = {status: kind for kind, status in _BRINGS.items()}

_BEGINS_IN: dict[str, tuple[str, ...]] = {
    "ConnectToGroup": ("Idle",),
    "LoadModel": ("Connected",),
    "StartWarmup": ("Loaded",),
    "TextGeneration": ("Ready", "Running"),
}
_ENDS_IN: dict[str, tuple[str, ...]] = {
    "ConnectToGroup": ("Connected",),
    "LoadModel": ("Loaded",),
    "StartWarmup": ("Ready",),
    "TextGeneration": ("Ready", "Running"),
    "Shutdown": ("Shutdown",),
}
_STEPS_OF = {"ConnectToGroup": (_CONNECT,), "LoadModel": (_LOAD,), "StartWarmup": (_FOLLOWERS, _LEADER)}
_KIND_OF_STEP = {step: kind for kind, steps in _STEPS_OF.items() for step in steps}
_BEFORE = {_LOAD: (_CONNECT,), _FOLLOWERS: (_LOAD,), _LEADER: (_LOAD, _FOLLOWERS)}
_AT_WORK = frozenset({"Connecting", "Connected", "Loading", "Loaded", "WarmingUp", "Ready", "Running"})


def _required(step: str, rank: int, world_size: int) -> tuple[str, ...]:
    """The statuses of which a rank must be in one when a step is dispatched (DESIGN section 6)."""
    if step == _CONNECT or (step == _LOAD and world_size == 1):
        return ("Idle",)
    if step == _LOAD:
        return ("Connected",)
    if step == _FOLLOWERS or (step == _LEADER and rank == 0):
        return ("Loaded",)
    if step == _LEADER:
        return ("WarmingUp", "Ready")
    return ("Ready", "Running")


def _known_step(step: str) -> bool:
    return step in _KIND_OF_STEP or step.startswith(("generate ", "cancel "))


def find_breaches(history: History) -> list[Breach]:
    """Hold a history against every rule; an empty list where all of them held.

    Steps are known by the names of the lifecycle table (``connect``, ``load``, ``warm up followers``, ``warm up leader``,
    ``generate …``, ``cancel …``); of other steps only the fencing is checked.
    """
    by_incarnation: defaultdict[tuple[int, str], list[RankSaid]] = defaultdict(list)
    for event in history.events:
        if isinstance(event, RankSaid):
            by_incarnation[event.rank, event.incarnation].append(event)
    told: list[_Told] = []
    breaches: list[Breach] = []
    for said in by_incarnation.values():
        grouped, wrong = _group(said)
        told += grouped
        breaches += wrong
    breaches += _check_tasks(told)
    breaches += _Walk(history, told, by_incarnation).check()
    return sorted(breaches, key=lambda breach: breach.id)


# --- what one incarnation said, in groups that it says in one step --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Told:
    """One group of events: a task begun, ended, refused or answered again, a failure, or a bare status.

    `first` and `last` are its events; `status` is the one it says, if it says one; `before` the status said before it (empty
    where that is not known); `work` the kind of task that a begin begins; `sure` whether the history holds all that this
    incarnation said before. `code` is a rejection's code, or the state that is said again.
    """

    what: Literal["begin", "end", "reject", "again", "fail", "status"]
    first: RankSaid
    task_id: str = ""
    status: str = ""
    before: str = ""
    code: str = ""
    work: str = ""
    sure: bool = True


def _group(said: Sequence[RankSaid]) -> tuple[list[_Told], list[Breach]]:
    """Cut what an incarnation said into groups; what fits into none is a breach, unless its other part is missing."""
    told: list[_Told] = []
    breaches: list[Breach] = []
    place, status, sure, torn = 0, "", said[0].seq == 1, said[0].seq != 1
    if sure:
        status = "Idle"  # what a runner is before it says anything
    while place < len(said):
        if place and said[place].seq != said[place - 1].seq + 1:
            status, sure, torn = "", False, True
        group = _next_group(said, place, status, sure, torn)
        if group is None:
            if not torn and not _runs_into_gap(said, place):
                breaches.append(_misfit(said, place))
            event = said[place].event
            if isinstance(event, RunnerStatusUpdated):
                status = event.status.kind
            place += 1
            continue
        length, one = group
        told.append(one)
        status = one.status or status
        place += length
        torn = torn and length == 1  # a bare status may be the rest of something longer
    return told, breaches


def _runs_into_gap(said: Sequence[RankSaid], place: int) -> bool:
    """Whether something is missing so soon after this event that it may belong to it."""
    return any(following.seq != event.seq + 1 for event, following in pairwise(said[place : place + 3]))


def _next_group(said: Sequence[RankSaid], place: int, status: str, sure: bool, torn: bool) -> tuple[int, _Told] | None:
    """The group that begins here and how many events it has; ``None`` where none does."""
    first = said[place]
    run = [first]
    while len(run) < 3 and place + len(run) < len(said) and said[place + len(run)].seq == run[-1].seq + 1:
        run.append(said[place + len(run)])
    match [one.event for one in run]:
        case [
            TaskStatusUpdated(state="Running") as begun,
            RunnerStatusUpdated() as now,
            TaskAcknowledged() as read,
        ] if begun.task_id == read.task_id and begun.rejection is None:
            work = _work_of(begun.task_id, now.status.kind, status)
            return 3, _Told("begin", first, begun.task_id, now.status.kind, status, work=work, sure=sure)
        case [TaskStatusUpdated(state="Complete" | "Cancelled") as ended, RunnerStatusUpdated() as now, *_]:
            return 2, _Told("end", first, ended.task_id, now.status.kind, status, sure=sure)
        case [TaskStatusUpdated(state="Failed", rejection=None) as failed, RunnerStatusUpdated() as now, *_] if (
            now.status.kind == "Failed"
        ):
            return 2, _Told("fail", first, failed.task_id, "Failed", status, sure=sure)
        case [TaskAcknowledged() as read, TaskStatusUpdated() as answer, *_] if read.task_id == answer.task_id:
            if answer.rejection is None and not torn:  # else the acknowledgement may be the rest of a task's begin
                return 2, _Told("again", first, read.task_id, before=status, code=answer.state, sure=sure)
            if answer.rejection is not None and answer.state == "Failed":
                return 2, _Told("reject", first, read.task_id, before=status, code=answer.rejection.code, sure=sure)
        case [RunnerStatusUpdated() as now, *_] if now.status.kind in ("Idle", "Failed", status) or not status:
            return 1, _Told("status", first, status=now.status.kind, before=status, sure=sure)
        case _:
            pass
    return None


def _work_of(task_id: str, status: str, before: str) -> str:
    """What kind of task this is, by its id; where that tells nothing, by the status that it brought. Empty where neither tells."""
    if task_id.startswith("cancel."):
        return "CancelTask"
    for step, kind in _KIND_OF_STEP.items():
        if task_id.startswith(f"{step.replace(' ', '-')}."):
            return kind
    if status == before and status != "Running":
        return "CancelTask"  # which leaves the status as it is
    return _KIND_OF_STATUS.get(status, "")


def _misfit(said: Sequence[RankSaid], place: int) -> Breach:
    one = said[place]
    match one.event:
        case TaskAcknowledged(task_id=task_id):
            rule: Rule = "rejection"
            what = f"acknowledged {task_id} and did not answer it right after"
        case TaskStatusUpdated(rejection=None) as event:
            rule = "order of events"
            what = f"said {event.state} of {event.task_id} without what belongs to it"
        case TaskStatusUpdated() as event:
            rule = "rejection"
            what = f"said {event.state} with a rejection of {event.task_id} that it had not acknowledged just before"
        case RunnerStatusUpdated() as event:
            rule = "order of events"
            what = f"became {event.status.kind} without a task that led there"
    return Breach(rule, f"rank {one.rank} {what}", one.id, one.epoch, one.rank)


def _check_tasks(told: Iterable[_Told]) -> Iterator[Breach]:
    """The life of each task at each rank: begun once and in the right status, ended once, in its own epoch."""
    begun: dict[tuple[str, str], _Told] = {}
    begun_in: set[tuple[EpochId | None, int, str]] = set()
    ended: set[tuple[str, str]] = set()
    for one in told:
        said = one.first
        who, task = f"rank {said.rank}", (said.incarnation, one.task_id)
        match one.what:
            case "begin":
                yield from _check_begin(one)
                name = one.work if one.work in _STEPS_OF else one.task_id
                if (said.epoch, said.rank, name) in begun_in:
                    yield Breach(
                        "once at a rank",
                        f"{who} began {one.work} ({one.task_id}) twice in one epoch",
                        said.id,
                        said.epoch,
                        said.rank,
                    )
                begun_in.add((said.epoch, said.rank, name))
                begun[task] = one
                ended.discard(task)
            case "end" | "fail":
                began = begun.get(task)
                problem = ""
                if began is None:
                    problem = "had not begun" if one.sure else ""
                elif task in ended:
                    problem = "had ended before"
                elif began.first.epoch != said.epoch:
                    problem = "had begun in another epoch"
                elif one.what == "end" and one.status not in _ENDS_IN.get(began.work, (one.status,)):
                    problem = f"cannot end in {one.status}"
                if problem:
                    sentence = f"{who} ended {one.task_id}, which {problem}"
                    yield Breach("order of events", sentence, said.id, said.epoch, said.rank)
                ended.add(task)
            case "again" if one.code in ("Complete", "Cancelled") and one.sure and task not in ended:
                sentence = f"{who} said {one.code} of {one.task_id}, which it has not done"
                yield Breach("order of events", sentence, said.id, said.epoch, said.rank)
            case "reject" | "again" | "status":
                pass


def _check_begin(one: _Told) -> Iterator[Breach]:
    said, who = one.first, f"rank {one.first.rank}"
    if one.status != _BRINGS.get(one.work, one.status) or not one.work:
        sentence = f"{who} began {one.task_id} and said {one.status}, which it does not lead to"
        yield Breach("order of events", sentence, said.id, said.epoch, said.rank)
    if said.epoch is None and one.work in _BEGINS_IN:
        sentence = f"{who} began {one.work} without having promised an epoch"
        yield Breach("roster", sentence, said.id, said.epoch, said.rank)


# --- the whole stream, in its order ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Epoch:
    roster: tuple[str, ...] = ()
    opened: bool = False
    restored: bool = False
    over: bool = False
    steps: dict[str, list[StepDispatched]] = field(default_factory=dict[str, list[StepDispatched]])
    not_yet: set[str] = field(default_factory=set[str])
    """Steps that a rank refused as not yet possible, after their last dispatch."""


class _Walk:
    """Goes through the history once and remembers what everybody said last."""

    def __init__(
        self, history: History, told: Iterable[_Told], by_incarnation: Mapping[tuple[int, str], Sequence[RankSaid]]
    ) -> None:
        self._history = history
        self._told = {one.first.id: one for one in told}
        self._before_gaps = frozenset(
            event.id
            for said in by_incarnation.values()
            for event, following in pairwise(said)
            if following.seq != event.seq + 1
        )
        self._epochs: defaultdict[EpochId, _Epoch] = defaultdict(_Epoch)
        self._newest: EpochId | None = None
        # What each incarnation said last: its epoch and status. None where that is not known: after a gap, or where its
        # first words are missing.
        self._last: dict[tuple[int, str], tuple[EpochId | None, str] | None] = {
            who: None for who, said in by_incarnation.items() if said[0].seq != 1
        }
        self._rejections: Counter[tuple[str, str]] = Counter()

    def check(self) -> Iterator[Breach]:
        """Find what breaks a rule."""
        for event in self._history.events:
            match event:
                case EpochOpened():
                    yield from self._open(event)
                case EpochRestored():
                    yield from self._restore(event)
                case StepDispatched():
                    yield from self._dispatch(event)
                case EpochConcluded():
                    yield from self._conclude(event)
                case RankSaid():
                    yield from self._hear(event)

    # --- planners -----------------------------------------------------------------------------------------------------

    def _open(self, event: EpochOpened) -> Iterator[Breach]:
        if self._newest is not None and event.epoch.number <= self._newest.number:
            sentence = f"epoch {event.epoch.number} was opened after epoch {self._newest.number}"
            yield Breach("fencing", sentence, event.id, event.epoch)
        self._newest = event.epoch
        epoch = self._epochs[event.epoch]
        epoch.roster, epoch.opened = event.roster, True
        # A process that is not on the new roster is gone for good: what it said last says nothing any more.
        self._last = {
            (rank, incarnation): last
            for (rank, incarnation), last in self._last.items()
            if rank < len(event.roster) and event.roster[rank] == incarnation
        }

    def _restore(self, event: EpochRestored) -> Iterator[Breach]:
        self._newest = event.epoch
        epoch = self._epochs[event.epoch]
        if epoch.over:
            yield Breach("one verdict", "the epoch was restored after its verdict", event.id, event.epoch)
        epoch.roster, epoch.restored, epoch.over = event.roster, True, False
        epoch.steps.clear()
        for rank, incarnation in enumerate(event.roster):
            self._last[rank, incarnation] = (event.epoch, event.status)

    def _conclude(self, event: EpochConcluded) -> Iterator[Breach]:
        epoch = self._epochs[event.epoch]
        if epoch.over:
            yield Breach("one verdict", f"a second verdict: {event.verdict}", event.id, event.epoch)
        epoch.over = True

    def _dispatch(self, event: StepDispatched) -> Iterator[Breach]:
        epoch = self._epochs[event.epoch]
        if epoch.over:
            yield Breach("one verdict", f"{event.step} was dispatched after the verdict", event.id, event.epoch)
        if self._newest is not None and self._newest != event.epoch:
            sentence = f"{event.step} was dispatched in an epoch that epoch {self._newest.number} had superseded"
            yield Breach("fencing", sentence, event.id, event.epoch)
        if _known_step(event.step):
            yield from self._check_once(event, epoch)
            yield from self._check_gate(event, epoch)
        epoch.steps.setdefault(event.step, []).append(event)
        epoch.not_yet.discard(event.step)

    def _check_once(self, event: StepDispatched, epoch: _Epoch) -> Iterator[Breach]:
        before = epoch.steps.get(event.step, [])
        if not before:
            if event.attempt > 1 and epoch.opened and not epoch.restored:
                sentence = f"{event.step} was dispatched for the {event.attempt}. time without a first one"
                yield Breach("once in the log", sentence, event.id, event.epoch)
            missing = [step for step in _BEFORE.get(event.step, ()) if step not in epoch.steps]
            # Of a single rank the table has two rows only: load and warm up leader.
            wanted = [step for step in missing if len(epoch.roster) > 1 or step == _LOAD]
            if wanted and epoch.opened and not epoch.restored:
                sentence = f"{event.step} was dispatched before {wanted[0]}"
                yield Breach("gate", sentence, event.id, event.epoch)
            return
        if event.attempt != before[-1].attempt + 1:
            sentence = f"{event.step} was dispatched twice in one epoch, at {before[-1].place} and {event.place}"
            yield Breach("once in the log", sentence, event.id, event.epoch)
        elif event.step not in epoch.not_yet:
            sentence = (
                f"{event.step} was dispatched again at {event.place} though no rank had refused it as not yet possible"
            )
            yield Breach("once in the log", sentence, event.id, event.epoch)

    def _check_gate(self, event: StepDispatched, epoch: _Epoch) -> Iterator[Breach]:
        if event.step.startswith("cancel "):
            return
        for rank, incarnation in enumerate(epoch.roster):
            wanted = _required(event.step, rank, len(epoch.roster))
            last = self._last.get((rank, incarnation), (None, ""))
            if last is None:
                continue  # it has said something that the history does not hold
            said_in, status = last
            if said_in == event.epoch and status in wanted:
                continue
            what = "nothing" if not status else status if said_in == event.epoch else f"{status} outside of this epoch"
            yield Breach(
                "gate",
                f"{_KIND_OF_STEP.get(event.step, event.step)} was dispatched while rank {rank} had last said {what}, and not "
                f"{' or '.join(wanted)}",
                event.id,
                event.epoch,
                rank,
            )

    # --- ranks --------------------------------------------------------------------------------------------------------

    def _hear(self, said: RankSaid) -> Iterator[Breach]:
        one = self._told.get(said.id)
        key = (said.rank, said.incarnation)
        if said.epoch is not None:
            epoch = self._epochs[said.epoch]
            if epoch.roster and (said.rank >= len(epoch.roster) or epoch.roster[said.rank] != said.incarnation):
                sentence = (
                    f"rank {said.rank} spoke in an epoch whose roster does not name its incarnation {said.incarnation}"
                )
                yield Breach("roster", sentence, said.id, said.epoch, said.rank)
            if one is not None:
                yield from self._hear_group(one, said.epoch, epoch)
        if isinstance(said.event, RunnerStatusUpdated):
            self._last[key] = (said.epoch, said.event.status.kind)
            yield from self._check_one_epoch(said, said.event.status.kind)
        if said.id in self._before_gaps:
            self._last[key] = None

    def _hear_group(self, one: _Told, epoch_id: EpochId, epoch: _Epoch) -> Iterator[Breach]:
        said = one.first
        if one.what == "begin" and one.work in _BEGINS_IN:
            alone = one.work == "LoadModel" and len(epoch.roster) == 1
            wanted = ("Idle",) if alone else _BEGINS_IN[one.work]
            if one.before and one.before not in wanted:
                sentence = f"rank {said.rank} began {one.work} while it was {one.before}, and not {' or '.join(wanted)}"
                yield Breach("order of events", sentence, said.id, epoch_id, said.rank)
            steps = _STEPS_OF.get(one.work)
            if steps and epoch.opened and not epoch.restored:
                sent = [sent for step in steps for sent in epoch.steps.get(step, ())]
                if not any(dispatched.first <= said.rank <= dispatched.last for dispatched in sent):
                    sentence = (
                        f"rank {said.rank} began {one.work}, which had not been dispatched to it through the gate"
                    )
                    yield Breach("through the gate", sentence, said.id, epoch_id, said.rank)
        if one.what == "reject":
            yield from self._hear_rejection(one, epoch_id, epoch)

    def _hear_rejection(self, one: _Told, epoch_id: EpochId, epoch: _Epoch) -> Iterator[Breach]:
        said = one.first
        step = next((step for step in epoch.steps if self._task_id(epoch_id, step) == one.task_id), None)
        if step is None:
            return  # of another epoch, or not one of the lifecycle's
        if one.code == "NotYet":
            epoch.not_yet.add(step)
        self._rejections[said.incarnation, one.task_id] += 1
        answered, sent = self._rejections[said.incarnation, one.task_id], len(epoch.steps[step])
        if answered > sent and epoch.opened and not epoch.restored:
            sentence = f"rank {said.rank} rejected {one.task_id} {answered} times, and was sent it {sent} times"
            yield Breach("rejection", sentence, said.id, epoch_id, said.rank)

    def _task_id(self, epoch: EpochId, step: str) -> str:
        """The id of a step's task, derived as DESIGN section 5 says: from instance, epoch and step."""
        digest = blake2b(f"{self._history.group}\0{epoch}\0{step}".encode(), digest_size=12).hexdigest()
        return f"{step.replace(' ', '-')[:80]}.{digest}"

    def _check_one_epoch(self, said: RankSaid, status: str) -> Iterator[Breach]:
        if status not in _AT_WORK or said.epoch is None or len(self._epochs) < 2:
            return
        for (rank, incarnation), last in self._last.items():
            if last is None or (rank, incarnation) == (said.rank, said.incarnation):
                continue
            other, other_status = last
            if other is not None and other != said.epoch and other_status in _AT_WORK:
                yield Breach(
                    "one epoch at a time",
                    f"rank {said.rank} is {status} in epoch {said.epoch.number} while rank {rank} is {other_status} in epoch "
                    f"{other.number}",
                    said.id,
                    said.epoch,
                    said.rank,
                )


# --- where the time went --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timeline:
    """Where the time of one attempt went. Everything in milliseconds by the store's clock; ``None`` for what has not happened.

    Offsets count from the opening of the epoch (or from its restoration, where the history does not hold the opening).

    Attributes:
        epoch: which attempt.
        ordinal: its number for people; 0 where the opening is not in the history.
        world_size: number of ranks.
        began_ms: when it was opened, since 1970.
        arrivals: when each rank said Connected for the first time (Idle, for a single rank); ranks that never did are not in it.
        skew: between the first arrival and the last one, once all have arrived.
        load_dispatched: when LoadModel entered the task log first.
        release: from the last arrival to that dispatch.
        loads: how long each rank loaded.
        loaded: when the last rank was Loaded.
        warm_up: from the first StartWarmup to the last rank's Ready.
        ready: when the last rank was Ready for the first time.
        ended: when the verdict fell.
        verdict: how it ended.
        dispatches: tasks dispatched, by kind.
        rejections: tasks refused in this epoch, by code.
    """

    epoch: EpochId
    ordinal: int
    world_size: int
    began_ms: int
    arrivals: Mapping[int, int]
    skew: int | None
    load_dispatched: int | None
    release: int | None
    loads: Mapping[int, int]
    loaded: int | None
    warm_up: int | None
    ready: int | None
    ended: int | None
    verdict: Verdict | None
    dispatches: Mapping[str, int]
    rejections: Mapping[str, int]

    @property
    def last_arrival(self) -> tuple[int, int] | None:
        """The rank that arrived last and when, once all have arrived."""
        if len(self.arrivals) < self.world_size:
            return None
        return max(self.arrivals.items(), key=lambda item: (item[1], item[0]))


def timeline(history: History, epoch: EpochId | None = None) -> Timeline:
    """Where the time went in one attempt; in the newest one where `epoch` is ``None``.

    Raises:
        NoSuchAttempt: the history holds no attempt, or not that one.
    """
    starts = [e for e in history.events if isinstance(e, EpochOpened | EpochRestored)]
    starts = [start for start in starts if epoch is None or start.epoch == epoch]
    if not starts:
        which = "no attempt" if epoch is None else f"no attempt {epoch}"
        raise NoSuchAttempt(
            f"the history of {history.group} holds {which}: it may have been cut, or nothing was launched"
        )
    chosen = starts[-1].epoch
    start = next(one for one in starts if one.epoch == chosen)
    began, size = start.at_ms, len(start.roster)
    firsts = _first_times(history, chosen, start.roster)
    sent: dict[str, int] = {}
    dispatches: Counter[str] = Counter()
    rejections: Counter[str] = Counter()
    ended: EpochConcluded | None = None
    for event in history.events:
        if event.epoch != chosen:
            continue
        match event:
            case StepDispatched():
                kind = kind_of(event.step)
                dispatches[kind] += 1
                sent.setdefault(kind, event.at_ms)
            case RankSaid(event=TaskStatusUpdated(rejection=rejection)) if rejection is not None:
                rejections[rejection.code] += 1
            case EpochConcluded():
                ended = ended or event
            case _:
                pass
    arrivals = firsts["Idle" if size == 1 else "Connected"]
    load_dispatched, last_arrival = sent.get("LoadModel"), _last_of(arrivals, size)
    ready, warm_up_sent = _last_of(firsts["Ready"], size), sent.get("StartWarmup")
    return Timeline(
        epoch=chosen,
        ordinal=start.ordinal if isinstance(start, EpochOpened) else 0,
        world_size=size,
        began_ms=began,
        arrivals={rank: at - began for rank, at in sorted(arrivals.items())},
        skew=None if last_arrival is None else last_arrival - min(arrivals.values()),
        load_dispatched=_since(began, load_dispatched),
        release=_since(last_arrival, load_dispatched),
        loads={
            rank: at - firsts["Loading"][rank]
            for rank, at in sorted(firsts["Loaded"].items())
            if rank in firsts["Loading"]
        },
        loaded=_since(began, _last_of(firsts["Loaded"], size)),
        warm_up=_since(warm_up_sent, ready),
        ready=_since(began, ready),
        ended=_since(began, ended.at_ms if ended else None),
        verdict=ended.verdict if ended else None,
        dispatches=dict(dispatches),
        rejections=dict(rejections),
    )


def kind_of(step: str) -> str:
    """The kind of task that a step of the lifecycle table dispatches; any other step's own name."""
    if step.startswith("generate "):
        return "TextGeneration"
    if step.startswith("cancel "):
        return "CancelTask"
    return _KIND_OF_STEP.get(step, step)


def _first_times(history: History, epoch: EpochId, roster: tuple[str, ...]) -> defaultdict[str, dict[int, int]]:
    """When each rank of the roster first said each status in this epoch: by status, then by rank."""
    firsts: defaultdict[str, dict[int, int]] = defaultdict(dict)
    for event in history.events:
        if not isinstance(event, RankSaid) or event.epoch != epoch or event.rank >= len(roster):
            continue
        if event.incarnation == roster[event.rank] and isinstance(event.event, RunnerStatusUpdated):
            firsts[event.event.status.kind].setdefault(event.rank, event.at_ms)
    return firsts


def _last_of(times: Mapping[int, int], world_size: int) -> int | None:
    return max(times.values()) if len(times) == world_size else None


def _since(begin: int | None, end: int | None) -> int | None:
    return None if begin is None or end is None else end - begin

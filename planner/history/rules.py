"""The rules of the design, written a second time, and a search for events in a history that break them.

This module shares no code with planner and runner, only the messages of `runner.messages`. So a mistake in their code cannot hide itself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from typing import Literal, TypeAlias

from barrier.protocol.ids import EpochId, LogId
from planner.history.events import (
    EpochConcluded,
    EpochOpened,
    EpochRestored,
    History,
    RankSaid,
    StepDispatched,
)
from runner.messages import (
    RunnerStatusUpdated,
    TaskAcknowledged,
    TaskStatusUpdated,
)

__all__ = ["Breach", "Rule", "find_breaches", "kind_of"]


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
"""The rule that was broken:

- ``gate``: a step was dispatched although some rank had not said the required status, in that epoch and as that incarnation;
- ``once in the log``: a step was dispatched twice in one epoch, and no rank had refused it with NotYet;
- ``once at a rank``: a rank began one task of one epoch twice;
- ``one epoch at a time``: two ranks were at work in different epochs at one instant;
- ``rejection``: a refusal was not exactly one TaskAcknowledged and then exactly one Failed;
- ``order of events``: the events of an accepted task had not the order of docs/protocol.md, or it was begun in the wrong status;
- ``one verdict``: an epoch had two verdicts, or a dispatch after its verdict;
- ``roster``: an incarnation took part in an epoch whose roster does not name it;
- ``fencing``: an epoch's number was not above all numbers before it, or a task was dispatched in a superseded epoch;
- ``through the gate``: a rank began a step that the gate had not dispatched to it.
"""


@dataclass(frozen=True, slots=True)
class Breach:
    """One broken rule.

    Attributes:
        rule: the rule.
        sentence: what happened, for people.
        id: the event that breaks the rule.
        epoch: the epoch of the event; ``None`` if the rank was in none.
        rank: the rank that broke it; ``None`` for the planner.
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
"""The status that a rank says when it begins a task, by the kind of task."""
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
    """The statuses that a rank may have when a step is dispatched (docs/architecture.md)."""
    if step == _CONNECT or (step == _LOAD and world_size == 1):
        return ("Idle",)
    if step == _LOAD:
        return ("Connected",)
    if step == _FOLLOWERS or (step == _LEADER and rank == 0):
        return ("Loaded",)
    if step == _LEADER:
        return ("WarmingUp", "Ready")
    return ("Ready", "Running")


def kind_of(step: str) -> str:
    """The kind of task that a step of the lifecycle table dispatches; for any other step, its own name."""
    if step.startswith("generate "):
        return "TextGeneration"
    if step.startswith("cancel "):
        return "CancelTask"
    return _KIND_OF_STEP.get(step, step)


def _known_step(step: str) -> bool:
    return step in _KIND_OF_STEP or step.startswith(("generate ", "cancel "))


def find_breaches(history: History) -> list[Breach]:
    """Check a history against every rule. The list is empty if no rule was broken.

    The rules know steps by their names in the lifecycle table (``connect``, ``load``, ``warm up followers``, ``warm up leader``,
    ``generate …``, ``cancel …``). For other steps only the fencing is checked.
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


# --- the events of one incarnation, in groups that it sends in one step ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Told:
    """One group of events: a task begun, ended, refused or answered again, a failure, or a bare status.

    `first` is its first event. `status` is the status that it says, if any. `before` is the status before it, empty if that is not known.
    `work` is the kind of task that begins. `sure` says whether the history holds everything that this incarnation said before. `code` is
    the code of a rejection, or the state that is repeated.
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
    """Cut the events of an incarnation into groups. An event that fits no group is a breach, unless its other part is missing."""
    told: list[_Told] = []
    breaches: list[Breach] = []
    place, status, sure, torn = 0, "", said[0].seq == 1, said[0].seq != 1
    if sure:
        status = "Idle"  # the status of a runner before its first event
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
        torn = torn and length == 1  # a bare status may be the end of a longer group
    return told, breaches


def _runs_into_gap(said: Sequence[RankSaid], place: int) -> bool:
    """Whether events are missing right after this one, so that they may belong to its group."""
    return any(following.seq != event.seq + 1 for event, following in pairwise(said[place : place + 3]))


def _next_group(said: Sequence[RankSaid], place: int, status: str, sure: bool, torn: bool) -> tuple[int, _Told] | None:
    """The group that begins here and how many events it has; ``None`` if no group begins here."""
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
            if (
                answer.rejection is None and not torn
            ):  # after a gap, the acknowledgement may be the end of a task's begin
                return 2, _Told("again", first, read.task_id, before=status, code=answer.state, sure=sure)
            if answer.rejection is not None and answer.state == "Failed":
                return 2, _Told("reject", first, read.task_id, before=status, code=answer.rejection.code, sure=sure)
        case [RunnerStatusUpdated() as now, *_] if (
            now.status.kind in ("Preparing", "Idle", "Failed", status) or not status
        ):
            return 1, _Told("status", first, status=now.status.kind, before=status, sure=sure)
        case _:
            pass
    return None


def _work_of(task_id: str, status: str, before: str) -> str:
    """The kind of task, by its id, otherwise by the status that it brought; empty if neither says it."""
    if task_id.startswith("cancel."):
        return "CancelTask"
    for step, kind in _KIND_OF_STEP.items():
        if task_id.startswith(f"{step.replace(' ', '-')}."):
            return kind
    if status == before and status != "Running":
        return "CancelTask"  # a CancelTask does not change the status
    return _KIND_OF_STATUS.get(status, "")


def _misfit(said: Sequence[RankSaid], place: int) -> Breach:
    one = said[place]
    match one.event:
        case TaskAcknowledged(task_id=task_id):
            rule: Rule = "rejection"
            what = f"acknowledged {task_id} and did not answer it right after that"
        case TaskStatusUpdated(rejection=None) as event:
            rule = "order of events"
            what = f"said {event.state} of {event.task_id} without the other events that belong to it"
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
    """Steps that a rank refused with NotYet after their last dispatch."""


class _Walk:
    """Goes through the history once, and remembers the last status of every incarnation."""

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
        # The last epoch and status of each incarnation. None if they are not known: after a gap, or if its first events are
        # missing.
        self._last: dict[tuple[int, str], tuple[EpochId | None, str] | None] = {
            who: None for who, said in by_incarnation.items() if said[0].seq != 1
        }
        self._rejections: Counter[tuple[str, str]] = Counter()

    def check(self) -> Iterator[Breach]:
        """Find the events that break a rule."""
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
        # A process that is not on the new roster is gone for good, so its last status does not count any more.
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
                sentence = f"{event.step} was dispatched as number {event.attempt}, and there was no number 1"
                yield Breach("once in the log", sentence, event.id, event.epoch)
            missing = [step for step in _BEFORE.get(event.step, ()) if step not in epoch.steps]
            # For a single rank the table has only two rows: load and warm up leader.
            wanted = [step for step in missing if len(epoch.roster) > 1 or step == _LOAD]
            if wanted and epoch.opened and not epoch.restored:
                sentence = f"{event.step} was dispatched before {wanted[0]}"
                yield Breach("gate", sentence, event.id, event.epoch)
            return
        if event.attempt != before[-1].attempt + 1:
            sentence = f"{event.step} was dispatched twice in one epoch, at {before[-1].place} and {event.place}"
            yield Breach("once in the log", sentence, event.id, event.epoch)
        elif event.step not in epoch.not_yet:
            sentence = f"{event.step} was dispatched again at {event.place}, and no rank had refused it with NotYet"
            yield Breach("once in the log", sentence, event.id, event.epoch)

    def _check_gate(self, event: StepDispatched, epoch: _Epoch) -> Iterator[Breach]:
        if event.step.startswith("cancel "):
            return
        for rank, incarnation in enumerate(epoch.roster):
            wanted = _required(event.step, rank, len(epoch.roster))
            last = self._last.get((rank, incarnation), (None, ""))
            if last is None:
                continue  # some of its events are missing
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
                sentence = f"rank {said.rank} sent an event in an epoch whose roster does not name its incarnation {said.incarnation}"
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
                    sentence = f"rank {said.rank} began {one.work}, which the gate had not dispatched to it"
                    yield Breach("through the gate", sentence, said.id, epoch_id, said.rank)
        if one.what == "reject":
            yield from self._hear_rejection(one, epoch_id, epoch)

    def _hear_rejection(self, one: _Told, epoch_id: EpochId, epoch: _Epoch) -> Iterator[Breach]:
        said = one.first
        step = next((step for step in epoch.steps if self._task_id(epoch_id, step) == one.task_id), None)
        if step is None:
            return  # a task of another epoch, or not of the lifecycle
        if one.code == "NotYet":
            epoch.not_yet.add(step)
        self._rejections[said.incarnation, one.task_id] += 1
        answered, sent = self._rejections[said.incarnation, one.task_id], len(epoch.steps[step])
        if answered > sent and epoch.opened and not epoch.restored:
            sentence = f"rank {said.rank} rejected {one.task_id} {answered} times, and was sent it {sent} times"
            yield Breach("rejection", sentence, said.id, epoch_id, said.rank)

    def _task_id(self, epoch: EpochId, step: str) -> str:
        """The id of a step's task, made from instance, epoch and step as docs/protocol.md says."""
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

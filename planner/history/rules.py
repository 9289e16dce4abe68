"""The rules of the design, written down once more, and what in a history breaks them.

Shares no code with the planner or the runner, only the words of `runner.messages`, so that a mistake in theirs cannot hide itself.
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
"""Which promise was broken:

- ``gate``: a step was dispatched though not every rank had said what it must have said, in that epoch and as that incarnation;
- ``once in the log``: a step was dispatched twice in one epoch, and not because a rank had refused it as not yet possible;
- ``once at a rank``: a rank began one task of one epoch twice;
- ``one epoch at a time``: two ranks were at work in different epochs at one instant;
- ``rejection``: a refusal that was not exactly one TaskAcknowledged and then exactly one Failed;
- ``order of events``: an accepted task that was not told in the order of docs/protocol.md, or was begun in the wrong status;
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
    """The statuses of which a rank must be in one when a step is dispatched (docs/architecture.md)."""
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
    """The kind of task that a step of the lifecycle table dispatches; any other step's own name."""
    if step.startswith("generate "):
        return "TextGeneration"
    if step.startswith("cancel "):
        return "CancelTask"
    return _KIND_OF_STEP.get(step, step)


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
        case [RunnerStatusUpdated() as now, *_] if (
            now.status.kind in ("Preparing", "Idle", "Failed", status) or not status
        ):
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
        """The id of a step's task, derived as docs/protocol.md says: from instance, epoch and step."""
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

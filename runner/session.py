"""The state of a runner in one attempt, as a value: its status, its promise, the outcomes of its tasks, and its unfinished texts.

No I/O, no clock, no background task. A transition returns the next session and what to report (`Say`): the whole state, and the events in
the order of docs/protocol.md ("Order of events"). `runner.Runner` carries it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from pydantic import BaseModel

from barrier.protocol.ids import EpochId
from barrier.protocol.log import TaskEntry
from barrier.protocol.report import TaskOutcome
from runner.admission import (
    Accept,
    Invalid,
    Judgement,
    NotYet,
    Promise,
    Refusal,
    Stale,
    Standing,
    TaskResult,
    judge,
    rejection_of,
)
from runner.lifecycle import LEAVING, LIFECYCLE, PREPARING, Lifecycle, Row, may_follow
from runner.messages import (
    LoadModel,
    Rejection,
    RunnerFailed,
    RunnerIdle,
    RunnerLoading,
    RunnerStatus,
    RunnerStatusUpdated,
    Task,
    TaskAcknowledged,
    TaskStatusUpdated,
    status_named,
)
from runner.words import Failure

__all__ = ["QUEUED_TEXTS", "REMEMBERED", "Say", "Session", "Work"]


REMEMBERED = 256
"""How many tasks of an epoch a runner remembers, to recognise a repeated task. The log's order protects against older ones."""

QUEUED_TEXTS = 64
"""How many accepted texts may wait at a rank; further ones are refused with NotYet."""

_STATES: Mapping[str, Literal["Running", "Complete", "Cancelled"]] = MappingProxyType(
    {"running": "Running", "done": "Complete", "cancelled": "Cancelled"}
)


@dataclass(frozen=True, slots=True)
class Work:
    """A task that was accepted, and its place in the log.

    Attributes:
        task: the task.
        step: the name of its step in the log.
        n: its position in the log.
    """

    task: Task
    step: str
    n: int


@dataclass(frozen=True, slots=True)
class Say:
    """What to report in one call: the whole state, and events.

    Attributes:
        status: the status.
        failure: why the rank has failed, if it has.
        outcome: what became of a task; the report keeps it.
        events: for the history and for clients, in order.
    """

    status: RunnerStatus
    failure: Failure | None
    outcome: TaskOutcome | None = None
    events: tuple[BaseModel, ...] = ()

    @property
    def progress(self) -> tuple[int, int] | None:
        """The number of layers loaded and the total, while loading."""
        status = self.status
        return (status.layers_loaded, status.total_layers) if isinstance(status, RunnerLoading) else None


@dataclass(frozen=True, slots=True)
class Session:
    """One attempt of one runner; between attempts it is idle and has promised nothing.

    Attributes:
        instance: the runner's instance.
        incarnation: its own incarnation.
        status: its status.
        promise: what it has promised; ``None`` if it is in no epoch.
        outcomes: the outcomes of the tasks that it has seen in this epoch, by task id, the newest last.
        failure: the first failure of this attempt, which is the cause of all later ones.
        unfinished: ids of the texts that are accepted and whose clients still wait, in the log's order.
        cancelled: ids of those texts that shall be stopped.
        departing: the tasks that asked the runner to leave.
        lifecycle: the table.
    """

    instance: str
    incarnation: str
    status: RunnerStatus = field(default_factory=RunnerIdle)
    promise: Promise | None = None
    outcomes: Mapping[str, TaskOutcome] = field(default_factory=dict[str, TaskOutcome])
    failure: Failure | None = None
    unfinished: tuple[str, ...] = ()
    cancelled: frozenset[str] = frozenset()
    departing: tuple[Work, ...] = ()
    lifecycle: Lifecycle = LIFECYCLE

    # --- the attempt --------------------------------------------------------------------------------------------------

    def promised(self, epoch: EpochId, world_size: int) -> Session:
        """The session after a promise: in an epoch, with an engine that is being prepared."""
        promise = Promise(epoch, self.incarnation, world_size)
        return replace(self.left(), promise=promise, status=status_named(PREPARING))

    def prepared(self) -> tuple[Session, Say]:
        """The engine is ready for the attempt."""
        then = _become(self, status_named(self.lifecycle.idle))
        return then, then.now()

    def left(self) -> Session:
        """The session after an attempt. It keeps nothing of the attempt."""
        return Session(self.instance, self.incarnation, lifecycle=self.lifecycle)

    def stopped(self) -> Session:
        """All work was stopped; the clients of the texts that were not finished have been told."""
        return replace(self, unfinished=(), cancelled=frozenset())

    def now(self) -> Say:
        """Report the present status."""
        return _say(self, RunnerStatusUpdated(status=self.status))

    # --- one task -----------------------------------------------------------------------------------------------------

    def is_in(self, epoch: EpochId) -> bool:
        """Whether an epoch is the promised one."""
        return self.promise is not None and epoch == self.promise.epoch

    def misses(self, entry: TaskEntry, task: Task) -> bool:
        """Whether an entry of the promised epoch shows that an earlier entry never reached this rank."""
        return entry.missed and self.is_in(entry.epoch) and task.epoch == str(entry.epoch)

    def receive(self, task: Task, epoch: EpochId, floor: int) -> Judgement:
        """Decide what to do with a task.

        Args:
            task: as it was read.
            epoch: the epoch that the log's entry names.
            floor: the highest epoch number that this rank ever promised.
        """
        if task.epoch != str(epoch):
            return Invalid("the task names another epoch than the log does")
        judgement = judge(self.standing(floor), task, self.lifecycle)
        if isinstance(judgement, Accept) and self._repeats(task.kind) and len(self.unfinished) > QUEUED_TEXTS:
            return NotYet(f"{QUEUED_TEXTS} generations wait at this rank already; ask again later")
        return judgement

    def standing(self, floor: int) -> Standing:
        """All that the judge may look at."""
        return Standing(
            instance=self.instance,
            status=self.status.kind,
            incarnation=self.incarnation,
            promise=self.promise,
            floor=floor,
            outcomes=self.outcomes,
        )

    def rejected(
        self, refusal: Refusal, *, epoch: EpochId, task_id: str, kind: str, step: str, n: int
    ) -> tuple[Session, Say, Rejection]:
        """Refuse a task: report that it was read, then that it failed, with the reason. Nothing else changes.

        The session remembers the refusal only if the task is of the promised epoch: others would push out the outcomes of this epoch.
        """
        rejection = rejection_of(refusal, self.standing(0), kind)
        then, outcome = self, None
        if self.is_in(epoch):
            then, outcome = _remember(self, task_id, step, n, "rejected", rejection=rejection)
        refused = TaskStatusUpdated(task_id=task_id, state="Failed", rejection=rejection)
        return then, _say(then, TaskAcknowledged(task_id=task_id), refused, outcome=outcome), rejection

    def repeated(self, task: Task, outcome: TaskOutcome) -> Say:
        """Report again what became of a task that was seen before in this epoch."""
        rejection = None
        if outcome.result == "rejected":
            refusal = Invalid(outcome.detail) if outcome.code == "Invalid" else Stale(outcome.detail)
            rejection = rejection_of(refusal, self.standing(0), task.kind)
        again = TaskStatusUpdated(
            task_id=task.task_id,
            state=_STATES.get(outcome.result, "Failed"),
            error=(outcome.detail or None) if outcome.result == "failed" else None,
            rejection=rejection,
        )
        return _say(self, TaskAcknowledged(task_id=task.task_id), again)

    def begun(self, work: Work) -> tuple[Session, Say]:
        """Begin an accepted task. Report in this order: it runs, the status during the work, it was read."""
        task, row = work.task, self._row(work.task.kind)
        then = self
        if row is not None:
            then = _become(then, _during(row, task))
            if row.repeats and task.task_id not in then.unfinished:
                then = replace(then, unfinished=(*then.unfinished, task.task_id))
        then, outcome = _remember(then, task.task_id, work.step, work.n, "running")
        return then, _say(
            then,
            TaskStatusUpdated(task_id=task.task_id, state="Running"),
            RunnerStatusUpdated(status=then.status),
            TaskAcknowledged(task_id=task.task_id),
            outcome=outcome,
        )

    def loading(self, layers: int, total: int) -> Session:
        """Note how many layers are loaded; the next report says it."""
        return _become(self, RunnerLoading(layers_loaded=layers, total_layers=total))

    def finished(self, work: Work, *, cancelled: bool = False) -> tuple[Session, Say]:
        """End a task that is done, or was stopped because somebody cancelled it. Report its outcome, then the status after the work."""
        task_id, row = work.task.task_id, self._row(work.task.kind)
        then = self._without(work)
        if row is not None:
            then = _become(then, status_named(row.during if then.unfinished and row.repeats else row.after))
        then, outcome = _remember(then, task_id, work.step, work.n, "cancelled" if cancelled else "done")
        ended = TaskStatusUpdated(task_id=task_id, state="Cancelled" if cancelled else "Complete")
        return then, _say(then, ended, RunnerStatusUpdated(status=then.status), outcome=outcome)

    def departs(self, work: Work) -> Session:
        """Note a task that asks the runner to leave. The task is done when everything is torn down."""
        return replace(self, departing=(*self.departing, work))

    def cancel(self, task_id: str) -> Session:
        """Have a text stopped that runs or waits. Any other task is over already, or ends with its attempt."""
        return replace(self, cancelled=self.cancelled | {task_id}) if task_id in self.unfinished else self

    def failed(self, failure: Failure, work: Work | None = None) -> tuple[Session, Say]:
        """Accepted work failed, or the engine died.

        The first failure of an attempt is the cause. Later ones are not: they come because the engine was given up.
        """
        then = self if work is None else self._without(work)
        if then.failure is None:
            then = _become(replace(then, failure=failure), RunnerFailed(error=failure.error))
        if work is None:
            return then, then.now()
        task_id = work.task.task_id
        then, outcome = _remember(then, task_id, work.step, work.n, "failed", detail=failure.error)
        ended = TaskStatusUpdated(task_id=task_id, state="Failed", error=failure.error)
        return then, _say(then, ended, RunnerStatusUpdated(status=then.status), outcome=outcome)

    # --- parts of these -----------------------------------------------------------------------------------------------

    def _row(self, kind: str) -> Row | None:
        """The row of a kind of task; ``None`` for a kind that does not change the status, such as a cancellation."""
        return (
            LEAVING
            if kind == LEAVING.task
            else self.lifecycle.row(kind, self.promise.world_size if self.promise else 1)
        )

    def _repeats(self, kind: str) -> bool:
        row = self._row(kind)
        return row is not None and row.repeats

    def _without(self, work: Work) -> Session:
        """The session without a task that is over."""
        task_id = work.task.task_id
        return replace(
            self,
            unfinished=tuple(one for one in self.unfinished if one != task_id),
            cancelled=self.cancelled - {task_id},
            departing=tuple(one for one in self.departing if one is not work),
        )


def _become(session: Session, status: RunnerStatus) -> Session:
    """Take on a status, unless the present one is more final: work under way cannot undo a failure or a departure."""
    return replace(session, status=status) if may_follow(status.kind, session.status.kind) else session


def _remember(
    session: Session,
    task_id: str,
    step: str,
    n: int,
    result: TaskResult,
    *,
    rejection: Rejection | None = None,
    detail: str = "",
) -> tuple[Session, TaskOutcome]:
    outcome = TaskOutcome(
        task_id=task_id,
        step=step[:96],  # a report takes no more; other programs may write a longer name into the log
        n=n,
        result=result,
        code=rejection.code if rejection else "",
        detail=(rejection.hint if rejection else detail)[:500],
        retryable=rejection.retryable if rejection else False,
    )
    known = {**{other: one for other, one in session.outcomes.items() if other != task_id}, task_id: outcome}
    if len(known) > REMEMBERED:
        # A flood of refused tasks must not make this rank forget what it has done, or is doing.
        refused = (other for other, one in known.items() if one.result == "rejected" and other != task_id)
        del known[next(refused, next(iter(known)))]
    return replace(session, outcomes=known), outcome


def _say(session: Session, *events: BaseModel, outcome: TaskOutcome | None = None) -> Say:
    return Say(session.status, session.failure, outcome, events)


def _during(row: Row, task: Task) -> RunnerStatus:
    fields = {"layers_loaded": 0, "total_layers": task.model.total_layers} if isinstance(task, LoadModel) else {}
    return status_named(row.during, **fields)

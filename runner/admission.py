"""The judge: decides what a runner does with a task, before the runner does anything. No I/O. The table is in `runner.lifecycle`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias

from barrier.errors import InvalidName
from barrier.protocol.ids import EpochId
from barrier.protocol.report import TaskOutcome
from runner.lifecycle import CANCEL, FAILED, LEAVING, LIFECYCLE, Lifecycle
from runner.messages import Rejection, RejectionCode, StatusName, Task

__all__ = [
    "ACCEPTS",
    "Accept",
    "AlreadyDone",
    "Invalid",
    "Judgement",
    "NotYet",
    "Promise",
    "Refusal",
    "Stale",
    "Standing",
    "TaskResult",
    "judge",
    "rejection_of",
]


ACCEPTS: Mapping[str, frozenset[str]] = MappingProxyType(
    {status: LIFECYCLE.accepts(status, 1) | LIFECYCLE.accepts(status, 2) for status in LIFECYCLE.order}
)
"""Which tasks each status accepts, with one rank or with several (docs/protocol.md)."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What this rank has promised: one epoch, whose roster names one incarnation of this rank, and has so many ranks."""

    epoch: EpochId
    incarnation: str
    world_size: int


@dataclass(frozen=True, slots=True)
class Standing:
    """All that the judge may look at, except the task.

    Attributes:
        instance: this runner's instance.
        status: its status now.
        incarnation: its own incarnation.
        promise: what it has promised; ``None`` if it is in no epoch.
        floor: the highest epoch number that it ever promised.
        outcomes: the outcomes of the tasks that it has seen in this epoch, by task id.
    """

    instance: str
    status: StatusName
    incarnation: str
    promise: Promise | None = None
    floor: int = 0
    outcomes: Mapping[str, TaskOutcome] = field(default_factory=dict[str, TaskOutcome])


@dataclass(frozen=True, slots=True)
class Accept:
    """Do the task."""


@dataclass(frozen=True, slots=True)
class AlreadyDone:
    """The task was seen before in this epoch: report its outcome again, and do nothing."""

    outcome: TaskOutcome


@dataclass(frozen=True, slots=True)
class NotYet:
    """Too early; the same task may be accepted later in this epoch."""

    hint: str


@dataclass(frozen=True, slots=True)
class Stale:
    """Too late: its epoch is over, or the runner is past its step."""

    hint: str


@dataclass(frozen=True, slots=True)
class Invalid:
    """Never possible. To send it again does not help."""

    hint: str


Refusal: TypeAlias = NotYet | Stale | Invalid
Judgement: TypeAlias = Accept | AlreadyDone | Refusal


def judge(standing: Standing, task: Task, lifecycle: Lifecycle = LIFECYCLE) -> Judgement:
    """Decide what to do with a task. The function uses only its arguments, and changes nothing."""
    if task.instance != standing.instance:
        return Invalid(f"this runner serves instance {standing.instance}, the task is for {task.instance[:63]}")
    fenced = _fence(standing, task)
    if fenced is not None:
        return fenced
    known = standing.outcomes.get(task.task_id)
    if known is not None and not (known.result == "rejected" and known.retryable):
        return AlreadyDone(known)
    if task.kind in (CANCEL, LEAVING.task):
        return Accept()
    status, world_size = standing.status, standing.promise.world_size if standing.promise else 1
    row = lifecycle.row(task.kind, world_size)
    if row is None:
        first = lifecycle.rows_for(world_size)[0]
        return Invalid(f"an instance of one rank has no group to connect to; send {first.task}")
    accepted = task.kind in lifecycle.accepts(status, world_size)
    if accepted:
        return Accept()
    return _out_of_state(status, task.kind, row.entry, lifecycle.order)


def _fence(standing: Standing, task: Task) -> Refusal | None:
    """Refuse a task of any epoch but the promised one (number and nonce), and any incarnation but the one on the roster."""
    try:
        epoch = EpochId.parse(task.epoch)
    except InvalidName:
        return Invalid("the task's epoch is not <number>-<nonce>")
    promise = standing.promise
    if promise is not None and promise.epoch == epoch:
        if promise.incarnation != standing.incarnation:
            return Stale("the roster of this epoch names another incarnation of this rank")
        return None
    if epoch.number > standing.floor:
        return NotYet(f"this runner has not promised epoch {epoch.number} yet")
    if promise is not None and epoch.number == promise.epoch.number:
        return Stale("the epoch has the number of the promised one but another nonce: it was opened before a failover")
    return Stale(f"epoch {epoch.number} is over for this runner")


def _out_of_state(status: str, kind: str, needed: str, order: tuple[str, ...]) -> Refusal:
    if status == FAILED:
        return Stale(f"{kind} after a failure: this attempt is over for this rank; open the next epoch")
    if status in (LEAVING.during, LEAVING.after):
        return Stale(f"{kind} while shutting down: this runner is leaving")
    if order.index(status) < order.index(needed):
        return NotYet(f"{kind} needs {needed}, this runner is {status}; wait for {needed} at the barrier")
    return Stale(f"{kind} needs {needed}, this runner is {status} already")


def rejection_of(refusal: Refusal, standing: Standing, task_kind: str) -> Rejection:
    """The refusal, as the planner reads it."""
    codes: dict[type[Refusal], RejectionCode] = {NotYet: "NotYet", Stale: "Stale", Invalid: "Invalid"}
    return Rejection(
        code=codes[type(refusal)],
        task_kind=task_kind,
        status=standing.status,
        epoch=str(standing.promise.epoch) if standing.promise else "",
        retryable=isinstance(refusal, NotYet),
        hint=refusal.hint[:2_000],
    )


TaskResult: TypeAlias = Literal["running", "done", "cancelled", "rejected", "failed"]

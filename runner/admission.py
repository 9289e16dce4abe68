"""The acceptance table and the judge: what a runner does with a task, decided before anything is said or done. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

from barrier.errors import InvalidName
from barrier.protocol.ids import EpochId
from barrier.protocol.report import TaskOutcome
from runner.messages import Rejection, RejectionCode, StatusName, Task, TaskKind

_ALWAYS: frozenset[TaskKind] = frozenset({"CancelTask", "Shutdown"})

ACCEPTS: Mapping[StatusName, frozenset[TaskKind]] = MappingProxyType(
    {
        status: _ALWAYS | extra
        for status, extra in dict[StatusName, frozenset[TaskKind]](
            {
                "Preparing": frozenset(),
                "Idle": frozenset({"ConnectToGroup", "LoadModel"}),  # which of the two, world_size decides: see `judge`
                "Connecting": frozenset(),
                "Connected": frozenset({"LoadModel"}),
                "Loading": frozenset(),
                "Loaded": frozenset({"StartWarmup"}),
                "WarmingUp": frozenset(),
                "Ready": frozenset({"TextGeneration"}),
                "Running": frozenset({"TextGeneration"}),
                "ShuttingDown": frozenset(),
                "Shutdown": frozenset(),
                "Failed": frozenset(),
            }
        ).items()
    }
)
"""Which tasks a status accepts (docs/protocol.md)."""

ORDER: tuple[StatusName, ...] = get_args(StatusName)
"""Statuses in the order in which a healthy runner passes them."""

ENTRY: Mapping[TaskKind, StatusName] = MappingProxyType(
    {"ConnectToGroup": "Idle", "LoadModel": "Connected", "StartWarmup": "Loaded", "TextGeneration": "Ready"}
)
"""The status in which each task of the life cycle begins (for world_size > 1)."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What this rank has promised: exactly one epoch, whose roster names exactly one incarnation, for so many ranks."""

    epoch: EpochId
    incarnation: str
    world_size: int


@dataclass(frozen=True, slots=True)
class Standing:
    """All that the judge may look at, besides the task.

    Attributes:
        instance: this runner's instance.
        status: its status now.
        incarnation: its own incarnation.
        promise: what it has promised; ``None`` where it is in no epoch.
        floor: the highest epoch number that it ever promised.
        outcomes: what became of the tasks it has seen in this epoch, by task id.
    """

    instance: str
    status: StatusName
    incarnation: str
    promise: Promise | None = None
    floor: int = 0
    outcomes: Mapping[str, TaskOutcome] = field(default_factory=dict[str, TaskOutcome])


@dataclass(frozen=True, slots=True)
class Accept:
    """Do it."""


@dataclass(frozen=True, slots=True)
class AlreadyDone:
    """Seen before in this epoch: say again what became of it, and do nothing."""

    outcome: TaskOutcome


@dataclass(frozen=True, slots=True)
class NotYet:
    """Too early; the same task may be accepted later in this epoch."""

    hint: str


@dataclass(frozen=True, slots=True)
class Stale:
    """Too late: its epoch, or the moment for it, is over."""

    hint: str


@dataclass(frozen=True, slots=True)
class Invalid:
    """Never possible, however often it is sent."""

    hint: str


Refusal: TypeAlias = NotYet | Stale | Invalid
Judgement: TypeAlias = Accept | AlreadyDone | Refusal


def judge(standing: Standing, task: Task) -> Judgement:
    """Decide what to do with a task. Looks at nothing but its arguments, and changes nothing."""
    if task.instance != standing.instance:
        return Invalid(f"this runner serves instance {standing.instance}, the task is for {task.instance[:63]}")
    fenced = _fence(standing, task)
    if fenced is not None:
        return fenced
    known = standing.outcomes.get(task.task_id)
    if known is not None and not (known.result == "rejected" and known.retryable):
        return AlreadyDone(known)
    if task.kind in _ALWAYS:
        return Accept()
    world_size = standing.promise.world_size if standing.promise else 1
    if world_size == 1 and task.kind == "ConnectToGroup":
        return Invalid("an instance of one rank has no group to connect to; send LoadModel")
    status = standing.status
    accepted = task.kind in ACCEPTS[status]
    if status == "Idle" and task.kind == "LoadModel":
        accepted = world_size == 1
    if accepted:
        return Accept()
    return _out_of_state(status, task.kind)


def _fence(standing: Standing, task: Task) -> Refusal | None:
    """Act on exactly the promised epoch, number and nonce, and only as the incarnation on its roster."""
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


def _out_of_state(status: StatusName, kind: TaskKind) -> Refusal:
    if status == "Failed":
        return Stale(f"{kind} after a failure: this attempt is over for this rank; open the next epoch")
    if status in ("ShuttingDown", "Shutdown"):
        return Stale(f"{kind} while shutting down: this runner is leaving")
    needed = ENTRY[kind]
    if ORDER.index(status) < ORDER.index(needed):
        return NotYet(f"{kind} needs {needed}, this runner is {status}; wait for {needed} at the barrier")
    return Stale(f"{kind} needs {needed}, this runner is {status} already")


def rejection_of(refusal: Refusal, standing: Standing, task_kind: str) -> Rejection:
    """The refusal as it is told to the planner."""
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

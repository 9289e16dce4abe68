"""The whole life of an attempt as one table: what must hold, what is dispatched then, and to which ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from barrier import RankRule, Requirement, all_ranks

if TYPE_CHECKING:
    from runner.messages import StatusName

StepName: TypeAlias = Literal["connect", "load", "warm up followers", "warm up leader"]

SERVING: tuple[StatusName, ...] = ("Ready", "Running")


@dataclass(frozen=True, slots=True)
class Step:
    """One row of the table.

    Attributes:
        name: the step.
        waits_for: what must hold of every rank, given the world size.
        dispatches: the kind of task that goes out.
        to: first and last rank that it goes to, given the world size.
        stall: which of `Policy`'s times says how long nothing may move before the ranks that are missing are at fault.
    """

    name: StepName
    waits_for: Callable[[int], Requirement]
    dispatches: Literal["ConnectToGroup", "LoadModel", "StartWarmup"]
    to: Callable[[int], tuple[int, int]]
    stall: Literal["connect_stall", "load_stall", "warmup_stall"]

    @property
    def wants_endpoints(self) -> bool:
        """Whether the ranks need one another's endpoints for its task."""
        return self.dispatches == "ConnectToGroup"


def _everyone(world_size: int) -> tuple[int, int]:
    return 0, world_size - 1


def _followers(world_size: int) -> tuple[int, int]:
    return 1, world_size - 1


def _leader(_: int) -> tuple[int, int]:
    return 0, 0


def _followers_warm(world_size: int) -> Requirement:
    leader = RankRule(0, 0, ("Loaded",))
    return (leader,) if world_size == 1 else (leader, RankRule(1, world_size - 1, ("WarmingUp", "Ready")))


TABLE: tuple[Step, ...] = (
    Step("connect", lambda n: all_ranks(n, "Idle"), "ConnectToGroup", _everyone, "connect_stall"),
    Step("load", lambda n: all_ranks(n, "Connected"), "LoadModel", _everyone, "connect_stall"),
    Step("warm up followers", lambda n: all_ranks(n, "Loaded"), "StartWarmup", _followers, "load_stall"),
    Step("warm up leader", _followers_warm, "StartWarmup", _leader, "warmup_stall"),
)
"""The table of docs/architecture.md. What follows, serving, waits for all ranks Ready or Running and has no end."""

ALONE: tuple[Step, ...] = (
    Step("load", lambda n: all_ranks(n, "Idle"), "LoadModel", _everyone, "connect_stall"),
    Step("warm up leader", _followers_warm, "StartWarmup", _leader, "load_stall"),
)
"""The same for a single rank, which has nobody to connect to and no followers."""

_PROVES: dict[str, StepName] = {
    "Connecting": "connect",
    "Connected": "connect",
    "Loading": "load",
    "Loaded": "load",
    "WarmingUp": "warm up leader",
    "Ready": "warm up leader",
    "Running": "warm up leader",
}
"""The last step that a status proves to have been dispatched to rank 0; to the others the one before, where that is warm-up."""


def steps_for(world_size: int) -> tuple[Step, ...]:
    """The table's rows for so many ranks."""
    return ALONE if world_size == 1 else TABLE


def next_step(dispatched: object, world_size: int) -> Step | None:
    """The first row that was not dispatched yet; ``None`` when all were. `dispatched` is a container of step names."""
    return next((step for step in steps_for(world_size) if step.name not in dispatched), None)  # type: ignore[operator]


def predecessor(step: Step, world_size: int) -> str:
    """The row before; empty for the first one."""
    rows = steps_for(world_size)
    place = rows.index(step)
    return rows[place - 1].name if place else ""


def proven_steps(status: str, rank: int, world_size: int) -> tuple[str, ...]:
    """The rows that must have been dispatched for a rank to be in this status."""
    last = _PROVES.get(status)
    names = [step.name for step in steps_for(world_size)]
    if last == "warm up leader" and rank > 0:
        last = "warm up followers"
    if last is None or last not in names:
        return ()
    return tuple(names[: names.index(last) + 1])


def serving_requirement(world_size: int) -> Requirement:
    """What must hold for text to be generated."""
    return all_ranks(world_size, SERVING)

"""The whole life of an attempt as one table: what a step waits for, what it dispatches, and to which ranks.

Tasks and statuses come from the runners' own table (`runner.lifecycle`). The planner adds `TURNS`: the order in which ranks are told, and
how long it waits for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, TypeAlias

from barrier import RankRule, Requirement
from runner.lifecycle import CONNECT, LIFECYCLE, LOAD, WARM_UP, Lifecycle, Row

__all__ = [
    "ALONE",
    "SERVING",
    "TABLE",
    "TURNS",
    "Ranks",
    "Step",
    "StepName",
    "Turn",
    "everyone",
    "followers",
    "leader",
    "next_step",
    "predecessor",
    "proofs_of",
    "proven_steps",
    "serving_requirement",
    "steps_for",
    "steps_of",
]


StepName: TypeAlias = Literal["connect", "load", "warm up followers", "warm up leader"]
Ranks: TypeAlias = Callable[[int], tuple[int, int]]
"""The first and the last of some ranks, given the world size."""


def everyone(world_size: int) -> tuple[int, int]:
    """All ranks."""
    return 0, world_size - 1


def followers(world_size: int) -> tuple[int, int]:
    """All but rank 0; a single rank has none."""
    return 1, world_size - 1


def leader(_: int) -> tuple[int, int]:
    """Rank 0."""
    return 0, 0


@dataclass(frozen=True, slots=True)
class Turn:
    """What the planner adds to a row of the runners' table.

    Attributes:
        task: the row.
        steps: the step's name and its ranks. There are several if some ranks are told first; a later step waits until the ranks of
            the earlier ones have begun.
        stall: the time in `Policy` that says how long a rank may show no sign of its own in this work.
    """

    task: str
    steps: tuple[tuple[str, Ranks], ...]
    stall: str


@dataclass(frozen=True, slots=True)
class Step:
    """One row of the planner's table.

    Attributes:
        name: the step.
        waits_for: the status that each rank must have, given the world size.
        dispatches: the kind of task.
        to: first and last rank that get the task, given the world size.
        stall: the time in `Policy` that says how long a missing rank may show no sign of its own.
        wants_endpoints: whether the ranks need one another's endpoints for the task.
    """

    name: str
    waits_for: Callable[[int], Requirement]
    dispatches: str
    to: Ranks
    stall: str
    wants_endpoints: bool


TURNS: tuple[Turn, ...] = (
    Turn(CONNECT.task, (("connect", everyone),), "connect_stall"),
    Turn(LOAD.task, (("load", everyone),), "load_stall"),
    Turn(WARM_UP.task, (("warm up followers", followers), ("warm up leader", leader)), "warmup_stall"),
)
"""Which ranks are told first. Texts have no turn: they are dispatched when clients ask for them."""


def steps_of(lifecycle: Lifecycle, turns: tuple[Turn, ...], world_size: int) -> tuple[Step, ...]:
    """Make the planner's table from the runners' table and the planner's turns; it is the same for every size above 1.

    A step waits until its ranks have the status in which its task begins. Its stall is that of the work before.
    """
    steps: list[Step] = []
    stall = turns[0].stall
    of_task = {turn.task: turn for turn in turns}
    for row in lifecycle.rows_for(world_size):
        turn = of_task.get(row.task)
        if turn is None:
            continue
        told: tuple[Ranks, ...] = ()
        for name, ranks in turn.steps:
            first, last = ranks(world_size)
            if first > last:
                continue
            steps.append(Step(name, partial(_requirement, row, told), row.task, ranks, stall, row.meets))
            stall, told = turn.stall, (*told, ranks)
    return tuple(steps)


def _requirement(row: Row, told: tuple[Ranks, ...], world_size: int) -> Requirement:
    """The ranks that were told have begun; the others have the status in which the task begins."""
    rules: list[RankRule] = []
    place = 0
    for first, last in sorted(ranks(world_size) for ranks in told):
        if place < first:
            rules.append(RankRule(place, first - 1, (row.entry,)))
        rules.append(RankRule(first, last, (row.during, row.after)))
        place = last + 1
    if place < world_size:
        rules.append(RankRule(place, world_size - 1, (row.entry,)))
    return tuple(rules)


def proofs_of(
    lifecycle: Lifecycle, steps: tuple[Step, ...], status: str, world_size: int
) -> tuple[tuple[int, int, tuple[str, ...]], ...]:
    """The steps that a status proves: first rank, last rank, steps. Entries that prove more come first.

    If a rank has this status, the last step that the status proves was dispatched to it, and so was every step before.
    """
    begun = lifecycle.proves(status, world_size)
    names = [step.name for step in steps]
    return tuple(
        (*step.to(world_size), tuple(names[: place + 1]))
        for place, step in reversed(tuple(enumerate(steps)))
        if step.dispatches in begun
    )


TABLE = steps_of(LIFECYCLE, TURNS, 2)
"""The table of docs/architecture.md. After it the instance serves: all ranks are Ready or Running, without an end."""

ALONE = steps_of(LIFECYCLE, TURNS, 1)
"""The table for a single rank: it connects to nobody and has no followers."""

SERVING: tuple[str, ...] = LIFECYCLE.serving


def steps_for(world_size: int) -> tuple[Step, ...]:
    """The table's rows for so many ranks."""
    return ALONE if world_size == 1 else TABLE


def next_step(dispatched: object, world_size: int) -> Step | None:
    """The first row that was not dispatched yet; ``None`` if all were. `dispatched` is a container of step names."""
    return next((step for step in steps_for(world_size) if step.name not in dispatched), None)  # type: ignore[operator]


def predecessor(step: Step, world_size: int) -> str:
    """The row before; empty for the first one."""
    rows = steps_for(world_size)
    place = rows.index(step)
    return rows[place - 1].name if place else ""


def proven_steps(status: str, rank: int, world_size: int) -> tuple[str, ...]:
    """The rows that must have been dispatched for a rank to be in this status."""
    return next((steps for first, last, steps in _proofs(status, world_size) if first <= rank <= last), ())


@lru_cache(maxsize=256)  # bounded: a rank may report any word as its status
def _proofs(status: str, world_size: int) -> tuple[tuple[int, int, tuple[str, ...]], ...]:
    return proofs_of(LIFECYCLE, steps_for(world_size), status, world_size)


def serving_requirement(world_size: int) -> Requirement:
    """The statuses in which text can be generated."""
    return (RankRule(0, world_size - 1, SERVING),)

"""The life of a rank as one table: which task begins in which status, and which status it has during the work and after it.

All other modules take the order from here: what a runner accepts (`runner.admission`), how its status changes (`runner.session`),
what a planner dispatches and what a status proves (`planner.lifecycle`), the test kit, and the screen.

To add a step, write:

1. in `runner.messages` its task, its two statuses, and their names in the unions and literals;
2. here its row;
3. in `planner.lifecycle` who is told first, and how long a planner waits (a stall of its own also needs a time in `planner.policy`);
4. in `planner.tasks` the fields of its task;
5. in `runner.runner` the call of the engine.

If the engine does it by a new call: also `runner.engine`, the engines, `runner.host` (contract, lives, work, frames) and the scripted engine and host
of `runner.testing`. `planner.history` does not import this table: add the step to its rules, too, and to the tables in docs/.
tests/fundamentals/test_add_a_lifecycle_step.py shows what follows from a table with one more row.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

__all__ = [
    "CANCEL",
    "CONNECT",
    "FAILED",
    "GENERATE",
    "LEAVING",
    "LIFECYCLE",
    "LOAD",
    "PREPARING",
    "TABLE",
    "WARM_UP",
    "Lifecycle",
    "Row",
    "may_follow",
]


PREPARING = "Preparing"
"""The status of a rank that has promised an attempt and makes its engine ready. No task begins in it."""

FAILED = "Failed"
"""The status of a rank whose work failed; it stays so until the attempt ends."""

CANCEL = "CancelTask"
"""The task that is accepted in every status and changes none."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table: a task, and the statuses around it.

    Attributes:
        task: the kind of task that begins the work.
        entry: the status in which it may begin.
        during: the status during the work.
        after: the status after it.
        call: the name of the call of `runner.Engine` that does it, for the test kit. `runner.runner` makes the call.
        meets: whether the ranks first meet in it, at one another's endpoints. A single rank has no such row; its next row begins in
            this row's entry.
        repeats: whether a further task is accepted during the work, and waits for its end. Texts are.
    """

    task: str
    entry: str
    during: str
    after: str
    call: str
    meets: bool = False
    repeats: bool = False


LEAVING = Row("Shutdown", entry="", during="ShuttingDown", after="Shutdown", call="close")
"""The row of a task that is accepted in every status. It ends the life."""

CONNECT = Row("ConnectToGroup", entry="Idle", during="Connecting", after="Connected", call="connect", meets=True)
LOAD = Row("LoadModel", entry="Connected", during="Loading", after="Loaded", call="load")
WARM_UP = Row("StartWarmup", entry="Loaded", during="WarmingUp", after="Ready", call="warm_up")
GENERATE = Row("TextGeneration", entry="Ready", during="Running", after="Ready", call="generate", repeats=True)

TABLE: tuple[Row, ...] = (CONNECT, LOAD, WARM_UP, GENERATE)
"""The table. A row begins in the status in which the row before it ends."""

_FINALITY: Mapping[str, int] = MappingProxyType({FAILED: 1, LEAVING.during: 2, LEAVING.after: 3})
"""How final a status is; 0 for one that is not listed. Work never takes a runner to a status with a lower number."""


class Lifecycle:
    """A table, and what follows from it.

    Attributes:
        rows: the table, for several ranks.
        alone: the same for a single rank.
        idle: the status in which an attempt begins.
        order: all statuses, in the order in which a healthy runner passes them; departure and failure come last.
        serving: the statuses in which texts are generated.

    Raises:
        ValueError: a row does not begin where the one before it ends.
    """

    def __init__(self, rows: tuple[Row, ...] = TABLE) -> None:
        for before, row in itertools.pairwise(rows):
            if row.entry != before.after:
                raise ValueError(
                    f"{row.task} begins in {row.entry}, and {before.task} before it ends in {before.after}"
                )
        self.rows = rows
        self.alone: tuple[Row, ...] = _alone(rows)
        self.idle: str = rows[0].entry
        way = (PREPARING, self.idle, *(status for row in rows for status in (row.during, row.after)))
        self.order: tuple[str, ...] = (*dict.fromkeys(way), LEAVING.during, LEAVING.after, FAILED)
        self.serving: tuple[str, ...] = tuple(
            status for row in rows if row.repeats for status in (row.entry, row.during)
        )
        self._rows = tuple({row.task: row for row in some} for some in (self.alone, rows))
        self._accepts = tuple({status: _accepted(some, status) for status in self.order} for some in (self.alone, rows))

    def rows_for(self, world_size: int) -> tuple[Row, ...]:
        """The rows for so many ranks."""
        return self.alone if world_size == 1 else self.rows

    def row(self, task: str, world_size: int) -> Row | None:
        """The row that a kind of task begins; ``None`` if so many ranks have no such row."""
        return self._rows[world_size > 1].get(task)

    def accepts(self, status: str, world_size: int) -> frozenset[str]:
        """The kinds of tasks that are accepted in a status."""
        return self._accepts[world_size > 1][status]

    def proves(self, status: str, world_size: int) -> tuple[str, ...]:
        """The kinds of tasks that a rank in this status must have begun; none for a status outside of the table."""
        rows = self.rows_for(world_size)
        last = next((place for place, row in enumerate(rows) if status in (row.during, row.after)), -1)
        return tuple(row.task for row in rows[: last + 1])

    def since(self, task: str) -> tuple[str, ...]:
        """The statuses of a healthy rank that has done a task."""
        place = next(place for place, row in enumerate(self.rows) if row.task == task)
        later = (status for row in self.rows[place + 1 :] for status in (row.during, row.after))
        return tuple(dict.fromkeys((self.rows[place].after, *later)))


def may_follow(status: str, before: str) -> bool:
    """Whether a runner may go from one status to another: work under way undoes neither a failure nor a departure."""
    return _FINALITY.get(status, 0) >= _FINALITY.get(before, 0)


def _alone(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows without those in which ranks meet."""
    left: list[Row] = []
    entry = rows[0].entry
    for row in rows:
        if not row.meets:
            left.append(replace(row, entry=entry))
            entry = row.after
    return tuple(left)


def _accepted(rows: tuple[Row, ...], status: str) -> frozenset[str]:
    begin = {row.task for row in rows if status == row.entry or (row.repeats and status == row.during)}
    return frozenset({CANCEL, LEAVING.task, *begin})


LIFECYCLE = Lifecycle()
"""The lifecycle that runners and planners follow."""

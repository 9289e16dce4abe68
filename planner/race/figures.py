"""The results of the runs, and the table and sentences about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["RaceFigures", "RunFigures", "conclusions", "table"]


@dataclass(frozen=True, slots=True)
class RunFigures:
    """The results of one run.

    Attributes:
        title: the name of the run.
        load_dispatches: how often LoadModel was sent; a send to several ranks at once counts once.
        rejections: how many tasks runners refused; ``None`` if the runner cannot refuse.
        deaths: how many processes ended by themselves with an error, without the one that the scenario kills.
        ready_after: seconds from the planner's first look until all ranks were Ready; ``None`` if they never were.
        last_words: the last line of the first process that died; empty if none died.
        breaches: how many broken rules the independent checker found in the history; ``None`` if the run has no history.
    """

    title: str
    load_dispatches: int
    rejections: int | None
    deaths: int
    ready_after: float | None
    last_words: str = ""
    breaches: int | None = None


@dataclass(frozen=True, slots=True)
class RaceFigures:
    """The three runs, side by side."""

    stale_and_fragile: RunFigures
    stale_and_graceful: RunFigures
    with_barrier: RunFigures

    @property
    def runs(self) -> tuple[RunFigures, RunFigures, RunFigures]:
        """The runs in their order."""
        return self.stale_and_fragile, self.stale_and_graceful, self.with_barrier


def table(figures: RaceFigures) -> list[str]:
    """The runs side by side, in at most 80 columns."""
    rows: list[tuple[str, Callable[[RunFigures], str]]] = [
        ("LoadModel dispatched", lambda run: str(run.load_dispatches)),
        ("tasks refused", lambda run: "cannot refuse" if run.rejections is None else str(run.rejections)),
        ("processes that died", lambda run: str(run.deaths)),
        ("all ranks Ready", lambda run: "never" if run.ready_after is None else f"after {run.ready_after:.1f} s"),
    ]
    heads = [
        ("", "stale statuses,", "stale statuses,", "the barrier,"),
        ("", "fragile runner", "refusing runner", "refusing runner"),
    ]
    lines = [_row(head) for head in heads]
    lines.append("-" * len(lines[0]))
    lines += [_row((name, *(show(run) for run in figures.runs))) for name, show in rows]
    return lines


def _row(cells: Sequence[str]) -> str:
    first, *others = cells
    return f"{first:<22}" + "".join(f"{cell:>18}" for cell in others)


def conclusions(figures: RaceFigures) -> list[str]:
    """What the figures mean, in one sentence for each run. It says so if a run did not go as usual."""
    fragile, graceful, barrier = figures.runs
    if fragile.deaths:
        first = f"1. A task out of state ended a process: {fragile.last_words}"
    else:
        first = "1. This time the race did not happen: no process died. Run it again."
    if graceful.deaths:
        second = f"2. A process died, which must not happen: {graceful.last_words}"
    elif graceful.rejections:
        second = f"2. No process died. Runners refused {graceful.rejections} tasks. The planner sent LoadModel {graceful.load_dispatches} times."
    else:
        second = "2. This time the race did not happen: nothing was refused. Run it again."
    if barrier.deaths or barrier.rejections or barrier.ready_after is None:
        third = f"3. This is not what the barrier promises: {barrier.last_words or 'see the table'}"
    else:
        times = "once" if barrier.load_dispatches == 1 else f"{barrier.load_dispatches} times"
        third = f"3. LoadModel was dispatched {times}, when every rank was connected, and no task was refused."
    return [first, second, third]

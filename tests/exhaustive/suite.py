"""The list of searches. For each guard, at least one search finds a breach if the guard is taken out."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace

from tests.exhaustive.model import KINDS, Bounds
from tests.exhaustive.search import Result, Search


@dataclass(frozen=True, slots=True)
class Job:
    """One search, and what it is for."""

    name: str
    bounds: Bounds


def _job(name: str, kinds: str = "", **bounds: int | str) -> Job:
    return Job(name, Bounds(kinds=tuple(kinds.split()), **bounds))  # type: ignore[arg-type]  each is one of its fields


QUICK: tuple[Job, ...] = (
    _job("2 ranks, two planners, two epochs, nothing goes wrong", faults=0),
    _job("2 ranks: a lease, a key or everything is lost", "lapse evict flush", planners=1, faults=1, epochs=1),
    _job("2 ranks, two planners: late requests, impostors", "impostor lost", faults=1, epochs=1),
    _job("2 ranks: one restarts, and its old process goes on", planners=1, faults=0, restarts=1, zombies=1, epochs=1),
    _job("2 ranks Connected: the store forgets a key", "evict", planners=1, faults=1, epochs=1, start="Connected"),
    _job(
        "2 ranks serve a text: the store forgets",
        "flush evict",
        planners=1,
        faults=1,
        epochs=1,
        generations=1,
        start="Ready",
    ),
)
"""A few seconds; `make test` plays these."""

SUITE: tuple[Job, ...] = (
    *QUICK,
    _job(
        "2 ranks serve two texts: the store forgets",
        "flush evict",
        planners=1,
        faults=1,
        epochs=1,
        generations=2,
        start="Ready",
    ),
    _job("2 ranks, two planners, two epochs: leases lapse, replies are lost", "lapse lost", faults=1),
    _job("2 ranks, two planners, two epochs: the store forgets everything", "flush", faults=1),
    _job("2 ranks, two planners, two epochs: a planner is killed", "crash", faults=1),
    _job("2 ranks, two planners: the store goes back, a planner has forgotten", "rollback", faults=1, epochs=1),
    _job("2 ranks, two epochs: the store forgets a key", "evict", planners=1, faults=1),
    _job("2 ranks, two epochs: late reports and requests", "delay", planners=1, faults=1),
    _job("2 ranks, two epochs: work fails", "fail", planners=1, faults=1),
    _job("2 ranks, two epochs: one restarts, and its old process goes on", planners=1, faults=0, restarts=1, zombies=1),
    _job("2 ranks Connected, two epochs: the store goes back", "rollback", planners=1, faults=1, start="Connected"),
    _job("3 ranks and one text, two epochs, nothing goes wrong", ranks=3, planners=1, faults=0, generations=1),
    _job("3 ranks: the store forgets everything", "flush", ranks=3, planners=1, faults=1, epochs=1),
    _job(
        "2 ranks serve two texts: the store goes back",
        "rollback",
        planners=1,
        faults=1,
        epochs=1,
        generations=2,
        start="Ready",
    ),
)
"""Some minutes; `make exhaustive` plays these."""


def search(job: Job, mutations: frozenset[str], limit: int, seconds: float) -> Result:
    """Do one search."""
    return Search(replace(job.bounds, mutations=mutations), limit=limit, seconds=seconds).run()


def told(name: str, result: Result) -> str:
    """One line about one search, and the history where something was found."""
    line = (
        f"{name}: {result.states:,} states, {result.transitions:,} transitions, depth {result.depth}, "
        f"{result.goals:,} goals, {result.terminal:,} at rest, {result.seconds:.1f} s: "
    )
    if result.found is None:
        return line + ("exhausted, 0 breaches" if result.exhausted else "0 breaches, NOT exhausted")
    history = "\n".join(f"{place:5}. {move}" for place, move in enumerate(result.found.history, 1))
    return f"{line}BREACH\n  {result.found.what}, after\n{history}"


def play(jobs: tuple[Job, ...], *, mutations: frozenset[str], limit: int, seconds: float, workers: int) -> int:
    """Play several searches, up to `workers` at once, and print each when it is done.

    Returns:
        0 if all was searched and nothing found, 1 for a breach, 3 if a limit came before the end.
    """
    code, states, transitions = 0, 0, 0
    with ProcessPoolExecutor(max_workers=workers) as pool:
        running = {pool.submit(search, job, mutations, limit, seconds): job for job in jobs}
        for done in as_completed(running):
            result = done.result()
            print(told(running[done].name, result), flush=True)
            states, transitions = states + result.states, transitions + result.transitions
            code = max(code, 0 if result.exhausted else 3)
            if result.found is not None:  # the others would only say it again
                code = 1
                for other in running:
                    other.cancel()
                break
    how = {0: "exhausted, 0 breaches", 1: "BREACH", 3: "0 breaches, NOT exhausted"}[code]
    print(f"{len(jobs)} searches: {states:,} states, {transitions:,} transitions: {how}")
    return code


__all__ = ["KINDS", "QUICK", "SUITE", "Job", "play", "search", "told"]

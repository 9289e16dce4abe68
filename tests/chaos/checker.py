"""Decides whether a run kept the guarantees, from the notes of the processes, the streams of the store, and the injected faults.

It shares no code with the barrier, the runner or the planner, only their words. It has three sources:

- the journals show what was done: exactly once, not early, one epoch at a time. No fault of a store can erase them;
- the recorded histories, which it checks by the rules of `planner.history`;
- the list of faults shows whether a verdict was true: a fault must have touched the rank that the verdict blames.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from planner.history import EpochConcluded, History, RankSaid, find_breaches
from runner.messages import TaskStatusUpdated
from tests.chaos.faults import Injected
from tests.chaos.journal import Line

_STEPS = {
    "ConnectToGroup": ("connect", "connected"),
    "LoadModel": ("load", "loaded"),
    "StartWarmup": ("warm", "warmed"),
}
_TASK_OF = {what: task for task, whats in _STEPS.items() for what in whats}


@dataclass(frozen=True, slots=True)
class Judged:
    """What the journals of one world say.

    Attributes:
        breaches: sentences; none where every promise was kept.
        bring_ups: attempts in which every rank came to the end of its warm-up, by instance.
        attempts: attempts in which a rank began anything, by instance.
        loads: how many loads were begun.
    """

    breaches: tuple[str, ...]
    bring_ups: Mapping[str, int]
    attempts: Mapping[str, int]
    loads: int


@dataclass(slots=True)
class _Attempt:
    """One epoch of one instance: when each rank began and ended each step."""

    begun: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    """By what was begun or ended: (rank, time)."""
    accepted: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    """By the kind of task: (rank, time)."""

    def ranks(self, what: str) -> set[int]:
        return {rank for rank, _ in self.begun[what]}


def judge_journal(lines: Sequence[Line], sizes: Mapping[str, int], replaced: Iterable[int] = ()) -> Judged:
    """Hold what runners and engines have noted against the promises.

    Args:
        lines: in the order of their times.
        sizes: every instance's number of ranks.
        replaced: pids of runners that were stopped while another took their rank: their engines may run on until they continue.
    """
    attempts, breaches = _sort(lines)
    for (instance, epoch), attempt in attempts.items():
        where = f"{instance}, epoch {epoch.partition('-')[0]}"
        breaches += [f"{where}: {sentence}" for sentence in _judge_attempt(attempt, sizes[instance])]
    breaches += _judge_order(lines, attempts, frozenset(replaced))
    bring_ups = Counter(
        instance
        for (instance, _), attempt in attempts.items()
        if attempt.ranks("warmed") == set(range(sizes[instance]))
    )
    return Judged(
        tuple(breaches),
        bring_ups,
        Counter(instance for instance, _ in attempts),
        sum(line.what == "load" for line in lines),
    )


def _sort(lines: Sequence[Line]) -> tuple[dict[tuple[str, str], _Attempt], list[str]]:
    """Give every act of an engine to the epoch of the task that its runner has accepted last."""
    attempts: defaultdict[tuple[str, str], _Attempt] = defaultdict(_Attempt)
    accepted: dict[tuple[int, str], Line] = {}
    breaches: list[str] = []
    for line in lines:
        if line.what == "accept":
            if line.task in _STEPS:
                accepted[line.runner, line.task] = line
                attempts[line.instance, line.epoch].accepted[line.task].append((line.rank, line.t))
        elif line.what != "fault":
            cause = accepted.get((line.runner, _TASK_OF[line.what]))
            if cause is None or (cause.instance, cause.rank) != (line.instance, line.rank):
                breaches.append(
                    f"{line.instance}: the engine of rank {line.rank} did {line.what}, which nobody had accepted"
                )
                continue
            attempts[line.instance, cause.epoch].begun[line.what].append((line.rank, line.t))
    return dict(attempts), breaches


def _judge_attempt(attempt: _Attempt, size: int) -> Iterator[str]:
    for task, times in attempt.accepted.items():
        for rank, count in Counter(rank for rank, _ in times).items():
            if count > 1:
                yield f"rank {rank} accepted {task} {count} times"
    for what in ("connect", "load", "warm"):
        for rank, count in Counter(rank for rank, _ in attempt.begun[what]).items():
            if count > 1:
                yield f"the engine of rank {rank} began to {what} {count} times"
    everyone = set(range(size))
    for before, task in (("connected", "LoadModel"), ("loaded", "StartWarmup")):
        if not attempt.accepted[task]:
            continue
        first = min(at for _, at in attempt.accepted[task])
        late = everyone - {rank for rank, at in attempt.begun[before] if at < first}
        if late:
            ranks = ", ".join(str(rank) for rank in sorted(late))
            yield f"{task} was accepted before the engine of rank {ranks} was {before}"


def _judge_order(
    lines: Sequence[Line], attempts: Mapping[tuple[str, str], _Attempt], replaced: frozenset[int]
) -> Iterator[str]:
    """Once a rank connects in a higher epoch, nobody works in a lower one: the connect gate is the teardown gate."""
    connects: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for (instance, epoch), attempt in attempts.items():
        if times := attempt.accepted["ConnectToGroup"]:
            connects[instance].append((min(at for _, at in times), _number(epoch)))
    for times in connects.values():
        times.sort()
    accepted: dict[tuple[int, str], Line] = {}
    for line in lines:
        if line.what == "accept":
            accepted[line.runner, line.task] = line
            cause = line if line.task in _STEPS else None
        else:
            cause = accepted.get((line.runner, _TASK_OF[line.what])) if line.what in _TASK_OF else None
        if cause is None or line.runner in replaced or line.instance not in connects:
            continue
        times = connects[line.instance]
        place = bisect_right(times, (line.t, 1 << 63))
        newest = max((number for _, number in times[:place]), default=0)
        if newest > _number(cause.epoch):
            yield (
                f"{line.instance}: rank {line.rank} did {line.what} {line.task} in epoch {_number(cause.epoch)}, after a rank had begun "
                f"to connect in epoch {newest}"
            )


def _number(epoch: str) -> int:
    return int(epoch.partition("-")[0])


def judge_histories(histories: Sequence[History], strays: int = 0) -> list[str]:
    """Breaches of the rules of `planner.history`, and refusals that no healthy planner gets.

    `strays` is how many entries the driver has put into the log itself: those may be refused as Invalid.
    """
    found: list[str] = []
    for history in histories:
        found += [
            f"{history.group}: {breach.rule}: {breach.sentence} ({breach.id})" for breach in find_breaches(history)
        ]
        found += [
            f"{history.group}: rank {said.rank} refused {said.event.task_id} as Invalid: {said.event.rejection.hint}"
            for said in history.events
            if isinstance(said, RankSaid)
            and isinstance(said.event, TaskStatusUpdated)
            and said.event.rejection is not None
            and said.event.rejection.code == "Invalid"
            and not (strays and said.event.task_id.startswith(("stray.", "log-")))
        ]
    return found


def count_rejections(histories: Sequence[History]) -> Counter[str]:
    """Refusals by code."""
    return Counter(
        event.event.rejection.code
        for history in histories
        for event in history.events
        if isinstance(event, RankSaid) and isinstance(event.event, TaskStatusUpdated) and event.event.rejection
    )


@dataclass(frozen=True, slots=True)
class Verdicts:
    """The verdicts of one instance.

    Attributes:
        counts: how many there were, by what they say, without names and numbers.
        unexplained: those that blame a rank that nothing had touched, and no fault of the store, the planners or the machine explains.
    """

    counts: Counter[str]
    unexplained: tuple[str, ...]


def judge_verdicts(
    instance: str,
    histories: Sequence[History],
    faults: Sequence[Injected],
    world: str,
    noisy: Sequence[float],
    slack: float,
) -> Verdicts:
    """Whether every verdict was true.

    Args:
        instance: whose.
        histories: its segments.
        faults: all that were injected, in every world.
        world: the instance's.
        noisy: the times (wall clock, in seconds) at which the machine itself stood still for a heartbeat or longer.
        slack: for how many seconds a fault may have consequences after it was lifted.
    """
    counts: Counter[str] = Counter()
    unexplained: list[str] = []
    for history in histories:
        for event in history.events:
            if not isinstance(event, EpochConcluded):
                continue
            verdict, at = event.verdict, event.at_ms / 1000
            counts[_kind_of(verdict.kind, verdict.reason)] += 1
            if verdict.kind == "Stopped" or verdict.culprit is None:
                continue
            near = [fault for fault in faults if fault.began - 0.1 <= at <= fault.ended + slack]
            explained = any(at - slack <= moment <= at + 1.0 for moment in noisy) or any(
                fault.machine
                or (fault.world == world and not fault.instance)
                or (fault.instance == instance and (not fault.ranks or verdict.culprit in fault.ranks))
                for fault in near
            )
            if not explained:
                unexplained.append(f"{instance}: {verdict} (at {at:.3f})")
    return Verdicts(counts, tuple(unexplained))


_KINDS = (
    ("fell silent", "a rank fell silent"),
    (" left: ", "a rank left"),
    ("restarted", "a rank was restarted"),
    ("died", "an engine died"),
    ("ordered to", "an engine failed"),
    ("store went back", "the store went back"),
    ("rejected", "a rank rejected a step"),
    ("nothing moved", "a rank stalled"),
    ("did not move for", "a rank stalled"),
    ("never reached", "an entry of the log was lost"),
)


def _kind_of(kind: str, reason: str) -> str:
    return (
        kind
        if kind == "Stopped"
        else next((name for words, name in _KINDS if words in reason), f"other: {reason[:80]}")
    )

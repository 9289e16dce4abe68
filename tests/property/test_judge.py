"""Random tasks before random runners: what the judge accepts, and what may never be accepted, said once more by independent rules."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from barrier import EpochId, TaskOutcome
from runner.admission import Accept, AlreadyDone, Invalid, NotYet, Promise, Stale, Standing, judge
from runner.messages import StatusName, Task, TaskKind
from tests.depth import examples
from tests.unit.runner.rig import TASKS, make_task

ME, OTHER = "0000000000010000000000000001", "0000000000020000000000000002"
NONCES = ("a" * 32, "b" * 32)
NUMBERS = (1, 2, 3)
WAY = ("Preparing", "Idle", "Connecting", "Connected", "Loading", "Loaded", "WarmingUp", "Ready", "Running")
NEEDS: dict[TaskKind, tuple[str, ...]] = {
    "ConnectToGroup": ("Idle",),
    "LoadModel": ("Connected",),
    "StartWarmup": ("Loaded",),
    "TextGeneration": ("Ready", "Running"),
}
"""The statuses in which each step of the way is begun, in an instance of several ranks."""

epochs = st.builds(EpochId, st.sampled_from(NUMBERS), st.sampled_from(NONCES))
RESULTS: tuple[Literal["running", "done", "failed", "rejected"], ...] = ("running", "done", "failed", "rejected")
outcomes = st.builds(
    TaskOutcome,
    task_id=st.just("known"),
    step=st.just("s"),
    n=st.just(3),
    result=st.sampled_from(RESULTS),
    retryable=st.booleans(),
)


@dataclass(frozen=True)
class Case:
    """A runner, a task, and whether the runner was asked for this one before."""

    standing: Standing
    task: Task


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Most of them right in all respects but one, or in all."""
    epoch, world_size = draw(epochs), draw(st.sampled_from((1, 2, 2, 2)))
    kind: TaskKind = draw(st.sampled_from(tuple(TASKS)))
    needed = NEEDS.get(kind, WAY) if world_size > 1 or kind != "LoadModel" else ("Idle",)
    usual: st.SearchStrategy[Any] = st.sampled_from(needed)
    status: StatusName = draw(st.one_of(usual, usual, st.sampled_from(get_args(StatusName))))
    if world_size == 1 and status in ("Connecting", "Connected"):
        status = "Idle"  # one rank alone has nobody to connect to
    mostly = st.sampled_from((True, True, True, True, False))
    promised = epoch if draw(mostly) else draw(epochs)
    promise = Promise(promised, ME if draw(mostly) else OTHER, world_size) if draw(mostly) else None
    known = draw(st.one_of(st.none(), st.none(), outcomes))
    instance = "demo" if draw(mostly) else "other"
    return Case(
        Standing(
            instance="demo",
            status=status,
            incarnation=ME,
            promise=promise,
            floor=promise.epoch.number if promise else draw(st.sampled_from((0, *NUMBERS))),
            outcomes={} if known is None else {"known": known},
        ),
        make_task(kind, epoch, instance=instance, **({"task_id": "known"} if draw(mostly) else {})),
    )


def expected(case: Case) -> type[Any]:
    """The answer that the design gives."""
    one, task = case.standing, case.task
    epoch = EpochId.parse(task.epoch)
    if task.instance != one.instance:
        return Invalid
    if one.promise is None or one.promise.epoch != epoch:
        return NotYet if epoch.number > one.floor else Stale
    if one.promise.incarnation != one.incarnation:
        return Stale
    known = one.outcomes.get(task.task_id)
    if known is not None and (known.result != "rejected" or not known.retryable):
        return AlreadyDone
    if task.kind in ("CancelTask", "Shutdown"):
        return Accept
    needed = NEEDS[task.kind]
    if one.promise.world_size == 1:
        if task.kind == "ConnectToGroup":
            return Invalid
        needed = ("Idle",) if task.kind == "LoadModel" else needed
    if one.status in needed:
        return Accept
    early = one.status in WAY and WAY.index(one.status) < WAY.index(needed[0])
    return NotYet if early else Stale


@settings(max_examples=examples(400), deadline=None)
@given(cases())
def test_the_judge_accepts_nothing_else(case: Case) -> None:
    answer = judge(case.standing, case.task)
    wanted = expected(case)
    assert type(answer) is wanted, f"{answer} instead of {wanted.__name__}: {case}"


def test_the_cases_ask_for_every_answer() -> None:
    """Always the same cases, so that luck does not come into it."""
    seen: Counter[type[Any]] = Counter()

    @settings(max_examples=200, deadline=None, database=None, derandomize=True)
    @given(cases())
    def look_at_some(case: Case) -> None:
        seen[expected(case)] += 1

    look_at_some()
    assert seen.keys() == {Accept, AlreadyDone, NotYet, Stale, Invalid}, dict(seen)

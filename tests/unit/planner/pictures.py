"""Pictures made by hand for the planner's pure functions: what the ranks say, what the record says, what is remembered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from barrier import EpochId, EpochRecord, LogId, RankView, Report, Settings, Snapshot, TaskOutcome, Verdict
from barrier.protocol.model import StepRecord
from planner.decide import View
from planner.lifecycle import steps_for
from planner.policy import Policy
from planner.recovery import Memory
from planner.spec import InstanceSpec
from runner.messages import derive_task_id

EPOCH = EpochId(100, "a" * 32)
LATER = EpochId(101, "b" * 32)
SETTINGS = Settings()
POLICY = Policy()
NOW = 1_000.0
"""The planner's clock in every picture."""


def life(rank: int, number: int = 5) -> str:
    """An incarnation; a higher number is a later life."""
    return f"{number:012x}{rank:016x}"


def spec(world_size: int) -> InstanceSpec:
    return InstanceSpec(name="demo", world_size=world_size)


def rank(number: int, status: str, **changes: Any) -> RankView:
    """A live rank of the attempt `EPOCH`; ``-`` for one without a report. `undecodable` stands in for a report too."""
    if status == "-" or "undecodable" in changes:
        return RankView(number, undecodable=changes.get("undecodable", ""))
    report = Report(
        rank=number,
        incarnation=life(number),
        status=status,
        epoch=EPOCH,
        applied=1,
        floor=EPOCH.number,
        node=f"node-{number}",
        lease_ms=6_000,
    )
    return RankView(number, report._replace(**changes), lease_left_ms=5_000)


def record(world_size: int, dispatched: int = 0, **changes: Any) -> EpochRecord:
    """The record of an attempt in which the first so many steps of the table went out, at log positions 2, 3, …"""
    steps = {step.name: StepRecord(n + 2, 1) for n, step in enumerate(steps_for(world_size)[:dispatched])}
    made = EpochRecord(
        id=EPOCH,
        ordinal=1,
        term=7,
        world_size=world_size,
        roster=tuple(life(number) for number in range(world_size)),
        steps=steps,
        last_n=dispatched + 1,
        digest=spec(world_size).digest,
        notes="",
        opened_ms=5_000,
        verdict=None,
    )
    return replace(made, **changes)


def picture(
    *statuses: str,
    dispatched: int = 0,
    ranks: dict[int, dict[str, Any]] | None = None,
    everyone: dict[str, Any] | None = None,
    opened: bool = True,
    verdict: Verdict | None = None,
    epoch: dict[str, Any] | None = None,
    **changes: Any,
) -> Snapshot:
    """A snapshot of ranks with these statuses.

    Args:
        statuses: one for each rank; ``-`` for one that is silent.
        dispatched: how many steps went out.
        ranks: changes to single reports, by rank.
        everyone: changes to all reports.
        opened: whether there is a record at all.
        verdict: how the attempt ended.
        epoch: changes to the record.
        changes: changes to the snapshot.
    """
    size = len(statuses)
    views = tuple(
        rank(number, status, **((everyone or {}) | (ranks or {}).get(number, {})))
        for number, status in enumerate(statuses)
    )
    found = record(size, dispatched, verdict=verdict, **(epoch or {})) if opened else None
    made = Snapshot(
        group="demo",
        world_size=size,
        now_ms=10_000,
        epoch=found,
        ranks=views,
        log_end=LogId(EPOCH.number, dispatched + 1),
    )
    return replace(made, **changes)


def memory(**changes: Any) -> Memory:
    """What a planner remembers that has just seen something move."""
    return replace(Memory.fresh(NOW), accounted=EpochId(0, ""), **changes)


def look(snapshot: Snapshot, *, policy: Policy = POLICY, remembered: Memory | None = None) -> View:
    """All that a decision depends on."""
    return View(spec(snapshot.world_size), policy, SETTINGS, snapshot, remembered or memory())


def outcome(step: str, n: int, result: str = "rejected", *, code: str = "NotYet", **changes: Any) -> TaskOutcome:
    """What became of a step's task at one rank."""
    refused = result == "rejected"
    fields: dict[str, Any] = {
        "task_id": derive_task_id("demo", str(EPOCH), step),
        "step": step,
        "n": n,
        "result": result,
        "code": code if refused else "",
        "detail": "the reason of this rank" if refused else "",
        "retryable": refused and code == "NotYet",
    }
    return TaskOutcome(**(fields | changes))

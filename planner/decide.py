"""Decides what to do next about an instance, and says why: a pure function of the picture, the memory and the time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from barrier import (
    Break,
    EpochId,
    EpochRecord,
    RankView,
    Requirement,
    Settings,
    Snapshot,
    TaskOutcome,
    Verdict,
    explain,
    explain_key,
    find_break,
    missing_ranks,
)
from barrier.plain import number
from barrier.printable import printable
from planner.explain import is_serving
from planner.lifecycle import (
    Step,
    next_step,
    predecessor,
    proven_steps,
    serving_requirement,
    steps_for,
)
from planner.policy import Policy
from planner.recovery import ABSENT, LOST, UNATTRIBUTED, Memory, Sighting, exhausted, is_history
from planner.spec import InstanceSpec
from runner.lifecycle import GENERATE, LIFECYCLE, LOAD, PREPARING
from runner.messages import RejectionCode, derive_task_id


@dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing until `until`, or until something changes. `overdue`: ranks are away for longer than `Policy.assemble_timeout`."""

    until: float
    reason: str
    requirement: Requirement = ()
    overdue: bool = False


@dataclass(frozen=True, slots=True)
class OpenEpoch:
    """Begin a new attempt."""

    reason: str


@dataclass(frozen=True, slots=True)
class RestoreEpoch:
    """Write a lost record back: all ranks agree on it."""

    epoch: EpochId
    status: str
    steps: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class PassGate:
    """Dispatch the step's task as soon as its ranks have arrived. Wait until `until`, then decide again."""

    step: Step
    attempt: int
    after: str
    requirement: Requirement
    until: float
    reason: str


@dataclass(frozen=True, slots=True)
class Serve:
    """All ranks serve: hand out what clients ask for, and look again at `until`."""

    until: float
    reason: str


@dataclass(frozen=True, slots=True)
class Conclude:
    """End the attempt for all ranks."""

    epoch: EpochId
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The instance cannot be brought up: stop trying, and give the whole explanation."""

    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class Finished:
    """Somebody asked to stop the instance, and nothing is left to do."""

    reason: str


Action: TypeAlias = Wait | OpenEpoch | RestoreEpoch | PassGate | Serve | Conclude | GiveUp | Finished


@dataclass(frozen=True, slots=True)
class View:
    """Everything that a decision depends on, except the time."""

    spec: InstanceSpec
    policy: Policy
    settings: Settings
    snapshot: Snapshot
    memory: Memory


FOREVER = float("inf")

_NAMED = 8
"""The largest number of ranks that a sentence names."""

_INVALID: RejectionCode = "Invalid"
"""The code of a refusal that another attempt would only repeat."""


def decide(view: View, now: float) -> Action:
    """Decide; `now` is the planner's clock in seconds. Does no I/O and remembers nothing."""
    epoch, memory = view.snapshot.epoch, view.memory
    if memory.stopping and epoch is not None and epoch.verdict is None:
        return Conclude(epoch.id, Verdict.stopped(), "stop was asked for")
    if memory.stopping and not _untold(view, now):
        return Finished("stopped")
    if now < memory.hold_until:
        return Wait(memory.hold_until, f"holding every decision for one lease: {memory.hold_reason}")
    if epoch is None:
        return _without_epoch(view, now)
    if epoch.verdict is not None:
        if is_history(memory, epoch):
            return _assemble(view, now, "no attempt is under way")
        return _after_verdict(view, epoch.verdict, now)
    return _end_of(view, epoch, now) or _retry_of(view, epoch, now) or _onward(view, epoch, now)


def topic(action: Action, snapshot: Snapshot) -> object:
    """A key of the reason, equal while the reason says nothing new: ages and leases in the sentence change all the time."""
    match action:
        case PassGate(step=step, attempt=attempt, requirement=requirement):
            return step.name, attempt, explain_key(snapshot, requirement)
        case Wait(requirement=requirement) if requirement:
            return explain_key(snapshot, requirement)
        case _:
            return action.reason


# --- no attempt under way -------------------------------------------------------------------------------------------------


def _without_epoch(view: View, now: float) -> Action:
    """The record is gone, or there never was one."""
    snapshot, memory = view.snapshot, view.memory
    agreed = _agreement(snapshot, view.spec.digest)
    if agreed is not None and not snapshot.unreadable:  # an unreadable record is not written back; its epoch must end
        epoch, status = agreed
        steps = _restorable_steps(snapshot, status)
        last_over = 0 if memory.accounted is None else memory.accounted.number
        known_to_be_over = epoch.number <= last_over or snapshot.log_end.number > epoch.number
        if steps and not known_to_be_over:
            return RestoreEpoch(
                epoch,
                status,
                steps,
                f"the record is gone, and all ranks say that they are {status} in the same attempt",
            )
    if memory.epoch_lost_at is not None and now < memory.epoch_lost_at + view.settings.lease:
        return Wait(
            memory.epoch_lost_at + view.settings.lease,
            "the record is gone; waiting one lease until all ranks report the same attempt",
        )
    if memory.stopping and any(rank.report is None for rank in snapshot.ranks):
        return Finished("stopped; some ranks were away and could not be told")
    # The lost record held the last verdict. The memory still has it.
    if memory.last_failure is not None and not memory.stopping:
        return _after_verdict(view, memory.last_failure, now)
    return _assemble(view, now, "no attempt is under way")


def _untold(view: View, now: float) -> bool:
    """Whether ranks may still hold a model in an epoch whose record was lost. Without a record, nothing can be concluded."""
    bound = any(rank.report and rank.report.epoch for rank in view.snapshot.ranks)
    return view.snapshot.epoch is None and (bound or now < view.memory.hold_until)


def _agreement(snapshot: Snapshot, digest: str) -> tuple[EpochId, str] | None:
    """The epoch and status that every rank reports, if all report the same at the same position in the task log."""
    said = {
        (view.report.epoch, view.report.status, view.report.applied) if view.report else None for view in snapshot.ranks
    }
    if len(said) != 1 or None in said:
        return None
    agreed = said.pop()
    if agreed is None or agreed[0] is None:
        return None
    if any(view.report and view.report.digest not in ("", digest) for view in snapshot.ranks):
        return None
    return agreed[0], agreed[1]


def _restorable_steps(snapshot: Snapshot, status: str) -> tuple[str, ...]:
    """The steps that rank 0's status proves. Rank 0 is told each step last."""
    return proven_steps(status, 0, snapshot.world_size)


def _after_verdict(view: View, verdict: Verdict, now: float) -> Action:
    memory = view.memory
    if verdict.kind == "Aborted":
        if verdict.failure == "permanent":
            return GiveUp(verdict, f"{view.spec.name} cannot be brought up: {verdict.reason}")
        if exhausted(memory, view.policy):
            return GiveUp(verdict, _spent(view, verdict))
        if now < memory.backoff_until:
            return Wait(memory.backoff_until, f"pausing before the next attempt, after: {verdict.reason}")
    why = f"the last attempt ended: {verdict.reason}" if verdict.kind == "Aborted" else "the last attempt was stopped"
    return _assemble(view, now, why)


def _spent(view: View, verdict: Verdict) -> str:
    worst, count = max(view.memory.charges.items(), key=lambda item: item[1])
    who = "no rank could be blamed" if worst == UNATTRIBUTED else f"each time by rank {worst}"
    return (
        f"{view.spec.name} is given up after {count} failed attempts in a row ({who}; the limit is {view.policy.max_failures} "
        f"retries). The last one: {verdict.reason}"
    )


def _assemble(view: View, now: float, why: str) -> Action:
    snapshot = view.snapshot
    wrong = [v for v in snapshot.ranks if v.report and v.report.digest not in ("", view.spec.digest)]
    sizes = [v for v in snapshot.ranks if v.report and v.report.world_size not in (None, view.spec.world_size)]
    if sizes:
        first = sizes[0]
        reason = (
            f"{_who(first)} was started for world_size {first.report.world_size if first.report else '?'}, "
            f"{view.spec.name} has world_size {view.spec.world_size}; start it with the same number"
        )
        return GiveUp(Verdict.aborted(reason, first.rank, "permanent"), reason)
    if wrong:
        first = wrong[0]
        reason = (
            f"{_who(first)} was started for another spec (digest {first.report.digest if first.report else '?'}), "
            f"{view.spec.name} has digest {view.spec.digest}; start it with the same spec"
        )
        return GiveUp(Verdict.aborted(reason, first.rank, "permanent"), reason)
    absent = [v.rank for v in snapshot.ranks if v.report is None]
    if not absent:
        return OpenEpoch(f"{why}, and all ranks are here")
    return _wait_for_absent(view, absent, now, why)


def _wait_for_absent(view: View, absent: list[int], now: float, why: str) -> Action:
    """Ranks that are away may come at any time, so the planner waits for them without an end, unless a limit was set."""
    memory, patience, name = view.memory, view.policy.assemble_timeout, view.spec.name
    began = max(memory.since if memory.missing_since is None else memory.missing_since, memory.backoff_until)
    limit = view.policy.absence_limit if view.spec.absence_limit is None else view.spec.absence_limit
    ends = FOREVER if limit is None else began + limit
    ranks = ", ".join(f"rank {rank}" for rank in absent)
    if limit is not None and now >= ends:
        reason = (
            f"{name} is given up: {ranks} did not come within {number(limit)} s, which is the absence limit. "
            f"Start the missing runners, then launch {name} again"
        )
        return GiveUp(Verdict.aborted(reason, absent[0], code=ABSENT), reason)
    if now < began + patience:
        return Wait(min(began + patience, ends), f"{why}; waiting for {ranks} to come")
    told = patience * 2 ** int(math.log2((now - began) / patience))  # the next warning comes after twice the time
    gives_up = "" if limit is None else f" It gives up when they have been away for {number(limit)} s."
    reason = (
        f"{why}; {name}: {ranks} did not come within {number(told)} s. Start the missing runners, or launch with a smaller world_size. "
        f"The planner waits on, and begins the next attempt when they come.{gives_up}"
    )
    return Wait(min(began + 2 * told, ends), reason, overdue=True)


# --- an attempt is under way ----------------------------------------------------------------------------------------------


def _end_of(view: View, epoch: EpochRecord, now: float) -> Conclude | None:
    """What ends the epoch for all ranks, if anything does. It ends for all, because a collective with a missing rank hangs."""
    snapshot = view.snapshot
    if epoch.digest != view.spec.digest:
        return _abort(epoch, Verdict.aborted("the attempt was opened for another spec"))
    broken = find_break(snapshot)
    if broken is not None:
        return _abort(epoch, _verdict_of(view, epoch, broken))
    for rank in snapshot.ranks:
        ahead = _ahead(rank, epoch)
        if ahead is not None:
            return _abort(epoch, Verdict.aborted(ahead))
    silent = [
        rank
        for rank in snapshot.ranks
        if rank.report is None or now >= view.memory.displaced.get(rank.rank, FOREVER) + view.settings.lease
    ]
    if silent:
        return _abort(epoch, _absence(view, epoch, silent))
    return _rejected_for_good(view, epoch) or _stalled_serving(view, epoch, now)


def _absence(view: View, epoch: EpochRecord, silent: list[RankView]) -> Verdict:
    """The verdict when ranks are away. A rank that leaves takes its report back. Of the others only the lapsed lease is known."""
    many = len(silent) * 2 > epoch.world_size and len(silent) > 1
    culprit = None if many else silent[0].rank
    unreadable = next((rank.undecodable for rank in silent if rank.undecodable), "")
    gone = {rank.rank: _last_seen(view, epoch, rank.rank) for rank in silent}
    left = [rank for rank, seen in gone.items() if seen is not None and seen.left]
    quiet = [rank for rank in gone if rank not in left]
    said: list[str] = []
    if left:
        said.append(f"{_names(left)} left: its runner was asked to end, or ended by itself{_where(gone, left)}")
    if quiet:
        seen = gone[quiet[0]]
        # The rank's own lease, which may differ from this planner's. It is not known if this planner never saw the rank.
        lease = f"its lease of {number(seen.lease_ms / 1000)} s" if seen is not None and seen.lease_ms else "its lease"
        why = unreadable or f"no report for longer than {lease}"
        said.append(f"{_names(quiet)} fell silent: {why}{_where(gone, quiet)}")
    code = "" if unreadable else LOST if quiet else ABSENT
    return Verdict.aborted("; ".join(said), culprit, code=code)


def _verdict_of(view: View, epoch: EpochRecord, broken: Break) -> Verdict:
    seen = _last_seen(view, epoch, broken.culprit) if broken.replaced and broken.culprit is not None else None
    return Verdict.aborted(
        broken.reason, broken.culprit, broken.failure, code=ABSENT if seen is not None and seen.left else ""
    )


def _last_seen(view: View, epoch: EpochRecord, rank: int) -> Sighting | None:
    seen = view.memory.gone.get(rank)
    return seen if seen is not None and seen.incarnation == epoch.roster[rank] else None


def _names(ranks: list[int]) -> str:
    return ", ".join(f"rank {rank}" for rank in ranks)


def _where(gone: Mapping[int, Sighting | None], ranks: list[int]) -> str:
    """Where the rank was last seen. Empty for several ranks: that would be a list in a list."""
    seen = gone[ranks[0]]
    if len(ranks) > 1 or seen is None:
        return ""
    return f" (last seen {seen.status}{f' on {printable(seen.node)}' if seen.node else ''})"


def _abort(epoch: EpochRecord, verdict: Verdict) -> Conclude:
    return Conclude(epoch.id, verdict, verdict.reason)


def _ahead(rank: RankView, epoch: EpochRecord) -> str | None:
    """A report that is ahead of the steps dispatched means that the store went back."""
    report = rank.report
    if report is None or report.epoch != epoch.id:
        return None
    ahead = [step for step in proven_steps(report.status, rank.rank, epoch.world_size) if step not in epoch.steps]
    if not ahead:
        return None
    return f"the store went back: rank {rank.rank} is {report.status}, but the record does not know step {ahead[0]}"


def _rejections(view: View, epoch: EpochRecord, step: Step) -> list[tuple[RankView, TaskOutcome]]:
    """Ranks that refused the newest dispatch of a step, and their outcomes."""
    dispatched = epoch.steps.get(step.name)
    if dispatched is None:
        return []
    task_id = derive_task_id(view.spec.name, str(epoch.id), step.name)
    refused: list[tuple[RankView, TaskOutcome]] = []
    for rank in view.snapshot.ranks:
        if rank.report is None or rank.report.epoch != epoch.id:
            continue
        if step.name in proven_steps(rank.report.status, rank.rank, epoch.world_size):
            continue  # it did the step, so it refused some other task (a restored record does not know the positions)
        for outcome in rank.report.outcomes:
            # Compare the step too: garbage may stand at this position, and no status proves a step that is for other ranks.
            by_place = outcome.task_id == f"log-{epoch.id.number}-{dispatched.n}" and outcome.step == step.name
            ours = outcome.task_id == task_id or by_place
            if ours and outcome.result == "rejected" and outcome.n == dispatched.n:
                refused.append((rank, outcome))
    return refused


def _said(outcome: TaskOutcome) -> str:
    return printable(f"{outcome.code}: {outcome.detail}")


def _rejected_for_good(view: View, epoch: EpochRecord) -> Conclude | None:
    for step in steps_for(epoch.world_size):
        refused = _rejections(view, epoch, step)
        attempts = epoch.steps[step.name].attempt if step.name in epoch.steps else 0
        begun = _begun(view, epoch, step) if refused else ""
        for rank, outcome in refused:
            if outcome.retryable and not begun and attempts <= view.policy.max_rejections:
                continue
            status = rank.report.status if rank.report else "gone"
            times = f" {attempts} times" if attempts > 1 else ""
            others = f" that {begun} began" if begun else ""
            failure = "permanent" if outcome.code == _INVALID else "transient"
            reason = f"{_who(rank)}, which is {status}, rejected {step.dispatches}{times}{others} ({_said(outcome)})"
            return _abort(epoch, Verdict.aborted(reason, rank.rank, failure))
    return _split_generation(view, epoch)


def _begun(view: View, epoch: EpochRecord, step: Step) -> str:
    """The ranks that began a step. Then nobody can be asked again: the gate needs all ranks in the status before the step."""
    task_id = derive_task_id(view.spec.name, str(epoch.id), step.name)
    ranks = [
        f"rank {rank.rank}"
        for rank in view.snapshot.ranks
        if rank.report
        and rank.report.epoch == epoch.id
        and any(outcome.task_id == task_id and outcome.result != "rejected" for outcome in rank.report.outcomes)
    ]
    return ", ".join(ranks)


def _split_generation(view: View, epoch: EpochRecord) -> Conclude | None:
    """End the epoch if some ranks refused a generation that others began: a collective with a missing rank hangs."""
    refused: dict[str, tuple[RankView, str]] = {}
    begun: set[str] = set()
    for rank in view.snapshot.ranks:
        for outcome in rank.report.outcomes if rank.report and rank.report.epoch == epoch.id else ():
            if not outcome.step.startswith("generate"):
                continue
            if outcome.result == "rejected":
                refused[outcome.task_id] = (rank, _said(outcome))
            else:
                begun.add(outcome.task_id)
    for task_id in sorted(begun & refused.keys()):
        rank, why = refused[task_id]
        return _abort(
            epoch, Verdict.aborted(f"{_who(rank)} rejected a generation that others began ({why})", rank.rank)
        )
    return None


def _stalled_serving(view: View, epoch: EpochRecord, now: float) -> Conclude | None:
    if not is_serving(view.snapshot):
        return None
    stall = view.policy.generate_stall
    limits = {rank.rank: _last_sign(view.memory, rank) + stall for rank in _running(view.snapshot)}
    still = _still(view, limits, stall, now)
    if not still:
        return None
    reason = f"{_names(still)} generated nothing for {number(stall)} s"
    return _abort(epoch, Verdict.aborted(reason, still[0] if len(still) == 1 else None))


def _still(view: View, limits: Mapping[int, float], stall: float, now: float) -> list[int]:
    """The ranks that stand still, if one has reached its limit: this rank, and all that cannot be told apart from it.

    In a collective all ranks stand still when one does. The planner learns of a sign up to a heartbeat and a look later. So
    limits that are closer together than that do not say which rank stood still first.
    """
    if all(now < limit for limit in limits.values()):
        return []
    near = now + min(2 * view.settings.heartbeat, stall / 4)
    return [rank for rank, limit in limits.items() if limit <= near]


def _running(snapshot: Snapshot) -> list[RankView]:
    return [rank for rank in snapshot.ranks if rank.report and rank.report.status == GENERATE.during]


def _last_sign(memory: Memory, rank: RankView) -> float:
    """The time from which a rank's stall counts: its own last sign, or the last dispatch. Signs of other ranks do not count.

    There are two exceptions, for ranks that may have to wait for others. For them the last sign of any rank counts: a rank that has
    loaded all of its layers (engines may end a load together), and a rank that generates and does not answer (it has no sign of its own).
    """
    report = rank.report
    if report is not None and (
        (report.status == LOAD.during and report.progress is not None and report.progress[0] >= report.progress[1])
        or (report.status == GENERATE.during and report.progress is None and rank.rank > 0)
    ):
        return memory.progress_at
    return max(memory.asked_at, memory.moved.get(rank.rank, memory.progress_at))


def _retry_of(view: View, epoch: EpochRecord, now: float) -> Action | None:
    """Ask again, in the same epoch and behind the same gate, for a step that a rank refused with NotYet."""
    for step in steps_for(epoch.world_size):
        refused = _rejections(view, epoch, step)
        if refused:
            rank, outcome = refused[0]
            return _gate(
                view,
                epoch,
                step,
                now,
                f"{_who(rank)} refused {step.dispatches} ({_said(outcome)}); asking again",
            )
    return None


def _onward(view: View, epoch: EpochRecord, now: float) -> Action:
    step = next_step(epoch.steps, epoch.world_size)
    if step is not None:
        return _gate(view, epoch, step, now)
    requirement = serving_requirement(epoch.world_size)
    if is_serving(view.snapshot):
        since = now if view.memory.ready_since is None else view.memory.ready_since
        on_trial = view.memory.charges or view.memory.absences
        ends = [since + view.policy.stable_after] if on_trial else []
        ends += [_last_sign(view.memory, rank) + view.policy.generate_stall for rank in _running(view.snapshot)]
        return Serve(min(ends, default=FOREVER), f"{view.spec.name} serves")
    until, stalled = _patience(view, epoch, requirement, "warmup_stall", now)
    return stalled or Wait(until, explain(view.snapshot, requirement), requirement)


def _gate(view: View, epoch: EpochRecord, step: Step, now: float, why: str = "") -> Action:
    requirement = step.waits_for(epoch.world_size)
    until, stalled = _patience(view, epoch, requirement, step.stall, now)
    if stalled is not None:
        return stalled
    sentence = explain(view.snapshot, requirement)
    reason = f"{why}: {sentence}" if why else sentence
    attempt = epoch.steps[step.name].attempt + 1 if step.name in epoch.steps else 1
    return PassGate(step, attempt, predecessor(step, epoch.world_size), requirement, until, reason)


def _patience(
    view: View, epoch: EpochRecord, requirement: Requirement, stall: str, now: float
) -> tuple[float, Conclude | None]:
    """Until when the planner waits for the missing ranks; and the end of the epoch, if one of them has stalled."""
    usual: float = getattr(view.policy, stall)
    missing = [view.snapshot.ranks[rank] for rank in missing_ranks(view.snapshot, requirement)]
    if not missing:
        return view.memory.progress_at + usual, None  # no rank is late; the dispatch itself may be
    stalls = {rank.rank: view.policy.prepare_stall if _prepares(rank) else usual for rank in missing}
    limits = {rank.rank: _last_sign(view.memory, rank) + stalls[rank.rank] for rank in missing}
    first = min(limits, key=limits.__getitem__)
    still = _still(view, limits, stalls[first], now)
    if not still:
        return limits[first], None
    behind = min(_how_far(view.snapshot.ranks[rank]) for rank in still)
    last = [rank for rank in still if _how_far(view.snapshot.ranks[rank]) == behind]
    who = "nothing moved" if len(still) == len(missing) else f"{_names(last[:_NAMED])} did not move"
    reason = f"{who} for {number(stalls[first])} s: {explain(view.snapshot, requirement)}"
    return limits[first], _abort(epoch, Verdict.aborted(reason, last[0] if len(last) == 1 else None))


def _prepares(rank: RankView) -> bool:
    return rank.report is not None and rank.report.status == PREPARING


def _how_far(rank: RankView) -> tuple[int, float]:
    """How far a rank is: its status, then the share of its work that is done. The smallest value is furthest behind."""
    report = rank.report
    if report is None:
        return -1, 0.0
    place = next((i for i, status in enumerate(LIFECYCLE.order) if status == report.status), -1)
    done, total = report.progress or (0, 1)
    return place, done / max(total, 1)


def _who(rank: RankView) -> str:
    return f"rank {rank.rank}" + (f" on {printable(rank.report.node)}" if rank.report and rank.report.node else "")


__all__ = [
    "FOREVER",
    "Action",
    "Conclude",
    "Finished",
    "GiveUp",
    "OpenEpoch",
    "PassGate",
    "RestoreEpoch",
    "Serve",
    "View",
    "Wait",
    "decide",
    "topic",
]

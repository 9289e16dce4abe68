"""The rules that must hold, written independently of the code under search.

This module uses no judgement of the reference model. It reads from the reports which ranks have arrived, and it takes the roster from
the history: the one with which the epoch was opened.
"""

from __future__ import annotations

from barrier import EpochId, Leadership
from barrier.testing.reference import ReferenceEntry, ReferenceReport, ReferenceState

NOW_MS = 1
"""The store's clock stands still, at the lowest it can be: what it adds to safety in practice is not counted on."""

Openings = tuple[tuple[EpochId, tuple[str, ...]], ...]
"""Every epoch that was ever opened, in order, and its roster."""

STEPS = ("connect", "load", "warm up followers", "warm up leader")


def is_live(report: ReferenceReport | None) -> bool:
    """Whether a report's lease runs."""
    return report is not None and report.until_ms > NOW_MS


def epoch_of(entry: ReferenceEntry) -> EpochId:
    """The epoch that an entry of the log belongs to."""
    return EpochId(entry.id.number, entry.nonce)


def wanted(step: str, rank: int) -> tuple[str, ...]:
    """The statuses in which a rank must be for a step to be dispatched (docs/architecture.md)."""
    if step == "warm up leader":
        return ("Loaded",) if rank == 0 else ("WarmingUp", "Ready")
    return {"connect": ("Idle",), "load": ("Connected",), "warm up followers": ("Loaded",)}.get(
        step, ("Ready", "Running")
    )


def addressed(step: str, rank: int) -> bool:
    """Whether a step's task is for this rank."""
    return rank == 0 if step == "warm up leader" else rank > 0 if step == "warm up followers" else True


def store_breach(
    before: ReferenceState, after: ReferenceState, openings: Openings, leadership: Leadership, floor: int
) -> str | None:
    """What a verb did that it must not do; `openings` are those of after, `floor` what its caller knew."""
    if after.record is before.record and after.log == before.log:
        return None
    if before.leader is None or before.leader.leadership != leadership:
        return "TERM: a planner whose term is over acted"
    if after.reports != before.reports:
        return "S8: a planner's verb changed a report"
    if after.log[: len(before.log)] != before.log:
        return "S2: the log was changed, not only appended to"
    new = after.log[len(before.log) :]
    end = before.log_end
    for entry in new:
        if entry.id <= end:
            return f"S2: entry {entry.id} was appended to a log that ends at {end}"
        end = entry.id
    return (
        _opening_breach(before, after, new, openings, floor)
        or _restore_breach(before, after, new, openings)
        or next(
            (found for entry in new if entry.kind == "task" and (found := _task_breach(before, entry, openings))), None
        )
        or _verdict_breach(before, after, new)
    )


def _opening_breach(
    before: ReferenceState, after: ReferenceState, new: tuple[ReferenceEntry, ...], openings: Openings, floor: int
) -> str | None:
    opened = [entry for entry in new if entry.kind == "opened"]
    if not opened:
        return None
    epoch = epoch_of(opened[0])
    if after.record is None or after.record.id != epoch:
        return "S4: the log announces another epoch than the record holds"
    if before.record is not None and before.record.verdict is None:
        return f"S5: epoch {before.record.id.number} was replaced without ever having had a verdict"
    if [one for one, _ in openings].count(epoch) > 1:
        return f"S4: epoch {epoch.number} was issued twice"
    present = [report for report in before.reports if report is not None and is_live(report)]
    if len(present) != before.world_size:
        return "S6: an epoch was opened while a rank was not there"
    if tuple(report.incarnation for report in present) != after.record.roster:
        return "S6: the roster does not name the processes that are there"
    highest = max([floor, before.log_end.number, *(report.floor for report in present)])
    if epoch.number <= max(highest, before.record.id.number if before.record else 0):
        return f"S4: epoch {epoch.number} is not above {highest}, which was seen before"
    return None


def _restore_breach(
    before: ReferenceState, after: ReferenceState, new: tuple[ReferenceEntry, ...], openings: Openings
) -> str | None:
    record = after.record
    if before.record is not None or record is None or any(entry.kind == "opened" for entry in new):
        return None
    roster = dict(openings).get(record.id)
    if roster is None or record.roster != roster:
        return f"S6: epoch {record.id.number} was restored with another roster than it had"
    said = {
        (report.epoch, report.status, report.applied) if report is not None and is_live(report) else None
        for report in before.reports
    }
    if len(said) != 1 or None in said or {one[0] for one in said if one} != {record.id}:
        return f"S4: epoch {record.id.number} was restored though the ranks do not agree on it"
    if any(report.floor > record.id.number for report in before.reports if report):
        return f"S4: epoch {record.id.number} was restored after a rank had promised a higher one"
    later = [entry for entry in before.log if entry.id.number > record.id.number]
    if later or any(entry.kind == "verdict" and epoch_of(entry) == record.id for entry in before.log):
        return f"S5: epoch {record.id.number} was restored after its end"
    known = {name for name, _, _ in record.steps}
    lost = [entry.step for entry in before.log if epoch_of(entry) == record.id and entry.step in STEPS]
    if not known.issuperset(lost):
        return f"S2: the restored record of epoch {record.id.number} does not know {lost[-1]}, which the log has"
    return None


def _task_breach(before: ReferenceState, entry: ReferenceEntry, openings: Openings) -> str | None:
    epoch, step = epoch_of(entry), entry.step
    what = f"{'LoadModel' if step == 'load' else step} of epoch {epoch.number}"
    roster = dict(openings).get(epoch)
    if before.record is None:
        return f"S4: {what} was dispatched without a record"
    if roster is None:
        return f"S4: {what} was dispatched, and that epoch was never opened"
    if before.record.id != epoch:
        return f"S1: {what} was dispatched while epoch {before.record.id.number} was current"
    if before.record.verdict is not None:
        return f"S5: {what} was dispatched after the verdict"
    if any(one.kind == "task" and one.step == step and epoch_of(one) == epoch for one in before.log):
        return f"S2: {what} is in the log twice"
    for rank, report in enumerate(before.reports):
        if report is None or not is_live(report):
            return f"S1: {what} was dispatched while rank {rank} had no live report"
        if report.epoch != epoch:
            return f"S1: {what} was dispatched while rank {rank} reported another epoch"
        if report.incarnation != roster[rank]:
            return f"S6: {what} was dispatched while rank {rank} was a process that is not on the roster"
        if report.status not in wanted(step, rank):
            return f"S1: {what} was dispatched while rank {rank} was {report.status}"
        if entry.id.n <= report.applied and step not in STEPS:
            return f"S2: {what} has place {entry.id.n} in the log, and rank {rank} has read that place already"
    return None


def _verdict_breach(before: ReferenceState, after: ReferenceState, new: tuple[ReferenceEntry, ...]) -> str | None:
    was, now = before.record, after.record
    if was is not None and now is None:
        return "S4: a verb lost the record"
    if (
        was is not None
        and now is not None
        and was.verdict is not None
        and now.id == was.id
        and now.verdict != was.verdict
    ):
        return f"S5: the verdict of epoch {was.id.number} was {was.verdict}, and then {now.verdict}"
    for entry in new:
        if entry.kind == "verdict":
            if now is None or now.verdict is None or now.id != epoch_of(entry):
                return "S5: the log announces a verdict that the record does not have"
            if any(one.kind == "verdict" and epoch_of(one) == epoch_of(entry) for one in before.log):
                return f"S5: epoch {entry.id.number} has two verdicts in the log"
    return None

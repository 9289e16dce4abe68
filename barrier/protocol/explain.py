"""One sentence that says what a barrier waits for. The log, the timeout, the CLI and the tests all use this one."""

from __future__ import annotations

from barrier.printable import printable
from barrier.protocol.model import RankView, Snapshot
from barrier.protocol.requirement import Requirement, missing_ranks

__all__ = ["explain", "explain_key"]


def explain(snapshot: Snapshot, requirement: Requirement) -> str:
    """Say what the barrier waits for, naming **all** missing ranks with node, last status, its age, lease left and last error.

    Pure: the same snapshot gives the same sentence.
    """
    group = f"{snapshot.group}"
    if snapshot.epoch is None:
        found = "no attempt has been opened"
        if snapshot.unreadable:
            found = f"the record of the attempt cannot be read ({printable(snapshot.unreadable)})"
        silent = [view for view in snapshot.ranks if view.report is None]
        if not silent:
            return f"{group}: all {snapshot.world_size} ranks are here; {found}"
        return f"{group}: {found}; {_count(len(silent), snapshot.world_size)} not here: " + "; ".join(
            _describe(view, snapshot, requirement) for view in silent
        )
    attempt = f"{group}, attempt {snapshot.epoch.ordinal}"
    if snapshot.epoch.verdict is not None:
        return f"{attempt}: {printable(str(snapshot.epoch.verdict))}"
    missing = missing_ranks(snapshot, requirement)
    if not missing:
        return f"{attempt}: all {snapshot.world_size} ranks are {_wanted(requirement)}"
    return f"{attempt}: waiting for {_count(len(missing), snapshot.world_size)}: " + "; ".join(
        _describe(snapshot.ranks[rank], snapshot, requirement) for rank in missing
    )


def explain_key(snapshot: Snapshot, requirement: Requirement) -> object:
    """A value that changes when the sentence of `explain` changes in more than ages, leases and progress, which change at every look.

    Callers compare it, to log a standing condition only when it changes.
    """
    epoch = snapshot.epoch
    if epoch is None:
        return snapshot.unreadable, tuple((view.rank, view.undecodable) for view in snapshot.ranks if not view.report)
    if epoch.verdict is not None:
        return epoch.id, epoch.verdict
    waited_for = (snapshot.ranks[rank] for rank in missing_ranks(snapshot, requirement))
    return epoch.id, requirement, tuple(_standing(view) for view in waited_for)


def _standing(view: RankView) -> object:
    report = view.report
    if report is None:
        return view.rank, view.undecodable
    return view.rank, report.incarnation, report.epoch, report.status, report.error


def _count(few: int, all_of_them: int) -> str:
    return f"{few} of {all_of_them} ranks"


def _wanted(requirement: Requirement) -> str:
    return " / ".join(dict.fromkeys(" or ".join(rule.statuses) for rule in requirement))


def _wanted_of(rank: int, requirement: Requirement) -> str:
    return " or ".join(status for rule in requirement if rule.first <= rank <= rule.last for status in rule.statuses)


def _describe(view: RankView, snapshot: Snapshot, requirement: Requirement) -> str:
    report = view.report
    wanted = _wanted_of(view.rank, requirement)
    want = f", wanted {wanted}" if wanted else ""
    if report is None:
        return f"rank {view.rank} ({printable(view.undecodable) or 'no live report'}{want})"
    node = f" on {printable(report.node)}" if report.node else ""
    said = report.status
    if report.progress is not None:
        said += f" {report.progress[0]}/{report.progress[1]}"
    facts = [f"{said} for {_seconds(report.status_ms + view.age_ms)}{want}"]
    epoch = snapshot.epoch
    if epoch is not None and report.incarnation != epoch.roster[view.rank]:
        facts.append("not the process that began this attempt")
    elif epoch is not None and report.epoch != epoch.id:
        facts.append("not in this attempt yet" if report.floor < epoch.id.number else "no longer in this attempt")
    facts.append(f"report {_seconds(view.age_ms)} old, lease {_seconds(view.lease_left_ms)} left")
    if report.error:
        facts.append(f"last error: {printable(report.error)}")
    return f"rank {view.rank}{node} ({'; '.join(facts)})"


def _seconds(milliseconds: int) -> str:
    return f"{milliseconds / 1000:.1f} s"

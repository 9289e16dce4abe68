"""What an instance waits for, and whether it serves: pure functions of a picture. Commands that only look need no more of the planner."""

from __future__ import annotations

from barrier import Snapshot, Verdict, explain, missing_ranks
from planner.lifecycle import next_step, serving_requirement


def is_serving(snapshot: Snapshot) -> bool:
    """Whether every rank serves, in one epoch that goes on."""
    epoch = snapshot.epoch
    return (
        epoch is not None
        and epoch.verdict is None
        and not missing_ranks(snapshot, serving_requirement(snapshot.world_size))
    )


def explain_instance(snapshot: Snapshot, *, wanted: bool = False) -> str:
    """Say what an instance waits for, by the lifecycle's next step.

    Args:
        snapshot: the picture.
        wanted: whether another attempt is to follow when one has ended: then what that one waits for is told as well.
    """
    size, epoch = snapshot.world_size, snapshot.epoch
    if wanted and epoch is not None and epoch.verdict is not None:
        return _between_attempts(snapshot, epoch.ordinal, epoch.verdict)
    step = next_step(snapshot.epoch.steps if snapshot.epoch else (), size)
    return explain(snapshot, step.waits_for(size) if step else serving_requirement(size))


def _between_attempts(snapshot: Snapshot, ordinal: int, verdict: Verdict) -> str:
    """What happened, and what is waited for now."""
    ended = "was stopped" if verdict.kind == "Stopped" else f"ended: {verdict.reason}"
    away = [view for view in snapshot.ranks if view.report is None]
    waits = f"all {snapshot.world_size} ranks are here, and the next attempt begins after a pause"
    if away:
        ranks = ", ".join(f"rank {view.rank}{view.undecodable and f' ({view.undecodable})'}" for view in away)
        waits = (
            f"waiting for {len(away)} of {snapshot.world_size} ranks to come: {ranks}. Start the missing runners; "
            f"{snapshot.group} is taken up by itself then"
        )
    return f"{snapshot.group}, attempt {ordinal} {ended}; {waits}"

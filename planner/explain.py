"""What an instance waits for, and whether it serves: pure functions of a picture. Commands that only look need no other part."""

from __future__ import annotations

from barrier import Snapshot, Verdict, explain, missing_ranks
from planner.lifecycle import next_step, serving_requirement

__all__ = ["explain_instance", "is_serving"]


def is_serving(snapshot: Snapshot) -> bool:
    """Whether every rank serves, in one epoch without a verdict."""
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
        wanted: whether another attempt follows when the last one has ended. Then the sentence also says what the next one waits for.
    """
    size, epoch = snapshot.world_size, snapshot.epoch
    if wanted and epoch is not None and epoch.verdict is not None:
        return _between_attempts(snapshot, epoch.ordinal, epoch.verdict)
    step = next_step(snapshot.epoch.steps if snapshot.epoch else (), size)
    return explain(snapshot, step.waits_for(size) if step else serving_requirement(size))


def _between_attempts(snapshot: Snapshot, ordinal: int, verdict: Verdict) -> str:
    """How the last attempt ended, and what the next one waits for."""
    ended = "was stopped" if verdict.kind == "Stopped" else f"ended: {verdict.reason}"
    away = [view for view in snapshot.ranks if view.report is None]
    waits = f"all {snapshot.world_size} ranks are here, and the next attempt begins after a pause"
    if away:
        ranks = ", ".join(f"rank {view.rank}{view.undecodable and f' ({view.undecodable})'}" for view in away)
        waits = (
            f"waiting for {len(away)} of {snapshot.world_size} ranks to come: {ranks}. Start the missing runners; "
            f"the next attempt of {snapshot.group} begins by itself when they come"
        )
    return f"{snapshot.group}, attempt {ordinal} {ended}; {waits}"

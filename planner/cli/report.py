"""What ``up`` prints at its end: how long each part took, and an independent check of the event history."""

from __future__ import annotations

from collections.abc import Mapping

from planner.history import Breach, History, Timeline, find_breaches, timeline

__all__ = ["check_report", "time_report"]


_RANKS_SHOWN = 16


def time_report(line: Timeline) -> list[str]:
    """How long each part of an attempt took, in milliseconds by the store's clock."""
    alone = line.world_size == 1
    arrived = "idle" if alone else "connected"
    lines = [f"Where the time went in attempt {line.ordinal} (ms by the store's clock, from its opening):"]
    if line.world_size <= _RANKS_SHOWN:
        lines.append(f"  {'rank':>4}  {arrived + ' at':>12}  {'loaded for':>10}")
        lines += [
            f"  {rank:>4}  {_ms(line.arrivals.get(rank)):>12}  {_ms(line.loads.get(rank)):>10}"
            for rank in range(line.world_size)
        ]
    else:
        lines.append(f"  {arrived}: {_spread(line.arrivals)}")
        lines.append(f"  loading: {_spread(line.loads)}")
    last = line.last_arrival
    if last is not None and not alone:
        lines.append(f"  arrival skew {_ms(line.skew)}: rank {last[0]} came last, at {last[1]}")
    lines.append(f"  last arrival → LoadModel dispatched: {_ms(line.release)}")
    lines.append(f"  LoadModel dispatched at {_ms(line.load_dispatched)}, all loaded at {_ms(line.loaded)}")
    lines.append(f"  warm-up {_ms(line.warm_up)}, all ready at {_ms(line.ready)}")
    return lines


def check_report(history: History) -> tuple[list[str], list[Breach]]:
    """Check the history: sentences about the result, and the rules that were broken."""
    breaches = find_breaches(history)
    line = timeline(history)
    loads = line.dispatches.get("LoadModel", 0)
    after = "after" if line.release is not None and line.release >= 0 else "NOT after"
    whom = "the only rank was Idle" if line.world_size == 1 else f"the last of {line.world_size} RunnerConnected"
    refused = sum(line.rejections.values())
    lines = [
        "What the event history says, checked independently of the planner:",
        f"  LoadModel dispatched {loads}×, {after} {whom}",
        f"  rejections {refused}, breaches {len(breaches)}",
    ]
    lines += [f"  breach of “{breach.rule}”: {breach.sentence}" for breach in breaches]
    lines += [f"  note: {oddity.sentence}" for oddity in history.oddities]
    return lines, breaches


def _ms(value: int | None) -> str:
    return "-" if value is None else f"{value}"


def _spread(values: Mapping[int, int]) -> str:
    if not values:
        return "-"
    ordered = sorted(values.items(), key=lambda item: item[1])
    first, middle, last = ordered[0], ordered[len(ordered) // 2], ordered[-1]
    return f"first {first[1]} (rank {first[0]}), median {middle[1]}, last {last[1]} (rank {last[0]})"

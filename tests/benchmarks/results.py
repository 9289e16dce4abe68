"""Collects what one run measured, says whether the aims are met, and writes the table and the JSON."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from tests.benchmarks.gate import RESTS, GateFigures
from tests.benchmarks.group import ROOT
from tests.benchmarks.recovery import RecoveryFigures
from tests.benchmarks.server_time import HoldFigures
from tests.benchmarks.stats import slope, table
from tests.benchmarks.traffic import READS, BringUpFigures, BurstFigures, IdleFigures

FLOORS_AIMED_AT = 2.0
"""Push floors from the start of the last arrival to the commit, for groups of up to `SMALL` ranks."""
SMALL = 128
MICROSECONDS_AIMED_AT = 2.0
"""What each further rank may add to that, in microseconds."""
IDLE_AIMED_AT = 1.0
"""Round trips a second of somebody who waits."""


def json_path() -> Path:
    """Where the figures go: RANKGATE_BENCH_JSON, or build/bench.json."""
    return Path(os.environ.get("RANKGATE_BENCH_JSON", ROOT / "build" / "bench.json"))


@dataclass
class Results:
    """One run."""

    scale: str = ""
    server: str = ""
    gates: dict[str, list[GateFigures]] = field(default_factory=dict[str, list[GateFigures]])
    holds: list[HoldFigures] = field(default_factory=list[HoldFigures])
    bring_up: BringUpFigures | None = None
    idle: IdleFigures | None = None
    bursts: list[BurstFigures] = field(default_factory=list[BurstFigures])
    recoveries: list[RecoveryFigures] = field(default_factory=list[RecoveryFigures])
    load_before: float = field(default_factory=lambda: os.getloadavg()[0])

    def write(self) -> Path:
        path = json_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")
        return path

    def as_json(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "machine": {
                "cores": os.cpu_count(),
                "architecture": platform.machine(),
                "system": platform.system(),
                "load_before": round(self.load_before, 2),
                "load_after": round(os.getloadavg()[0], 2),
            },
            "versions": {
                "python": platform.python_version(),
                "server": self.server,
                **{name: version(name) for name in ("redis", "hiredis")},
            },
            "gate": {transport: [one.as_json() for one in found] for transport, found in self.gates.items()},
            "slopes_us_per_rank": {
                transport: {f"rest_ms={rest * 1000:g}": slope_of(_alone(found, rest)) for rest in RESTS}
                for transport, found in self.gates.items()
            },
            "server_held": [one.as_json() for one in self.holds],
            "bring_up": self.bring_up.as_json() if self.bring_up else None,
            "idle": self.idle.as_json() if self.idle else None,
            "burst": [one.as_json() for one in self.bursts],
            "recovery": [one.as_json() for one in self.recoveries],
            "verdicts": self.verdicts(),
        }

    # --- what it comes to ---------------------------------------------------------------------------------------------

    def verdicts(self) -> list[str]:
        """Every aim, and whether this run met it."""
        said: list[str] = []
        for (transport, found), rest in product(self.gates.items(), RESTS):
            alone = _alone(found, rest)
            where = f"{transport}, {_after(rest)}"
            small = {one.world_size: one.committed.p50 / one.push.p50 for one in alone if one.world_size <= SMALL}
            worst = max(small, key=lambda size: small[size])
            said.append(
                f"{where}: committed within {FLOORS_AIMED_AT:g} push floors up to {SMALL} ranks: "
                f"{_met(small[worst] <= FLOORS_AIMED_AT)} (p50 {min(small.values()):.1f} to {small[worst]:.1f} floors, "
                f"most at {worst} ranks)"
            )
            steepness = slope_of(alone)
            if steepness is not None:
                said.append(
                    f"{where}: beyond that under {MICROSECONDS_AIMED_AT:g} µs a rank: "
                    f"{_met(steepness < MICROSECONDS_AIMED_AT)} ({steepness:.2f} µs, least squares over the p50 of "
                    f"{', '.join(str(one.world_size) for one in alone if one.world_size >= SMALL)} ranks)"
                )
        if self.bring_up is not None:
            reports = [tally["MULTI"] for tally in self.bring_up.ranks]
            said.append(
                f"one round trip a status change: {_met(reports == self.bring_up.statuses)} "
                f"({reports} reports for {self.bring_up.statuses} statuses; and one HMGET a rank and epoch, its promise)"
            )
        if self.idle is not None:
            for who, tally in (("waiter", self.idle.waiter), ("leading planner", self.idle.planner)):
                rate = tally.total() / self.idle.seconds
                said.append(
                    f"an idle {who} under {IDLE_AIMED_AT:g} command a second: {_met(rate < IDLE_AIMED_AT)} ({rate:.2f})"
                )
        said += [
            f"{one.fault}: within {one.bound:g} {one.unit}: {_met(bool(one.kept))} (most {one.multiple(100):.2f})"
            for one in self.recoveries
            if one.bound is not None
        ]
        return said

    def text(self) -> str:
        """The tables, for a terminal."""
        parts = [
            f"rankgate benchmarks ({self.scale}), {self.server}, {os.cpu_count()} cores, load {self.load_before:.1f}"
        ]
        for transport, found in self.gates.items():
            parts.append(f"\n{transport}: from the start of the last arrival, p50/p99 in µs (and in push floors)")
            parts.append(_gate_table(found))
            plain = [one.plain_push.p50 for one in found]
            parts.append(f"the push floor of redis-py's default client: p50 {min(plain):.0f} to {max(plain):.0f} µs")
        if self.gates:
            parts.append(
                "readers 0: nobody reads the log, so the planner's own path is measured. Otherwise so many real Member.tasks() share "
                "one other process and these cores, where real runners have machines of their own; groups of more than "
                f"{SMALL} have a sample. rest ms: how long nothing happened before each ping, push and arrival."
            )
        if self.holds:
            parts.append(
                "\nhow long one call holds the server (SLOWLOG), and the CPU time that it costs there (parsing included)"
            )
            parts.append(_hold_table(self.holds))
        if self.bring_up is not None:
            parts.append(f"\na bring-up of {self.bring_up.world_size} ranks to Ready, round trips without heartbeats")
            parts += [
                f"  rank {rank}: before the epoch {_counts(before)}; in it {_counts(inside)}; {statuses} statuses told"
                for rank, (before, inside, statuses) in enumerate(
                    zip(self.bring_up.before, self.bring_up.ranks, self.bring_up.statuses, strict=True)
                )
            ]
            parts.append(f"  planner: {_counts(self.bring_up.planner)}")
        if self.idle is not None:
            parts.append(f"\nidle for {self.idle.seconds:g} s, default settings")
            for who, tally in (
                ("Barrier.wait, nobody arrives", self.idle.waiter),
                ("leading planner, instance Ready", self.idle.planner),
                ("runner, Ready, its heartbeats included", self.idle.runner),
            ):
                parts.append(
                    f"  {who}: {tally.total() / self.idle.seconds:.2f} round trips a second ({_counts(tally)})"
                )
        if self.bursts:
            parts.append("\nall ranks arrive at once: what the planner sends from open to release")
            parts += [f"  {one.world_size} ranks: {_counts(one.planner)}" for one in self.bursts]
        if self.recoveries:
            parts.append("\nrecovery, as multiples")
            parts += [f"  {one.text}" for one in self.recoveries]
        return "\n".join([*parts, "", *(f"* {line}" for line in self.verdicts())])


def slope_of(alone: list[GateFigures]) -> float | None:
    """Microseconds that each rank adds to the commit; ``None`` where too few large groups were measured."""
    points = [(one.world_size, one.committed.p50) for one in alone if one.world_size >= SMALL]
    return round(slope(points), 3) if len(points) > 1 else None


def _alone(found: list[GateFigures], rest: float) -> list[GateFigures]:
    """The groups whose log nobody reads, measured after one rest."""
    return [one for one in found if not one.readers and one.rest == rest]


def _after(rest: float) -> str:
    return f"after {rest * 1000:g} ms of rest" if rest else "without a pause"


def _met(yes: bool) -> str:
    return "met" if yes else "NOT MET"


def _gate_table(found: list[GateFigures]) -> str:
    header = [
        "ranks",
        "readers",
        "rest ms",
        "n",
        "ping",
        "push floor",
        "committed",
        "(floors)",
        "known",
        "(floors)",
        "first hands",
        "all hands",
        "(floors)",
    ]
    rows: list[list[str]] = []
    for one in found:
        row = [str(one.world_size), str(one.readers), f"{one.rest * 1000:g}", str(len(one.committed.seconds))]
        row += [f"{samples.p50:,.0f}/{samples.p99:,.0f}" for samples in (one.ping, one.push)]
        for samples in (one.committed, one.known):
            row.append(f"{samples.p50:,.0f}/{samples.p99:,.0f}")
            row.append(f"{samples.p50 / one.push.p50:.1f}/{samples.p99 / one.push.p99:.1f}")
        if one.readers:
            row += [f"{samples.p50:,.0f}/{samples.p99:,.0f}" for samples in (one.first_hands, one.all_hands)]
            row.append(f"{one.all_hands.p50 / one.push.p50:.1f}/{one.all_hands.p99 / one.push.p99:.1f}")
        else:
            row += ["-", "-", "-"]
        rows.append(row)
    return table(header, rows)


def _hold_table(found: list[HoldFigures]) -> str:
    header = ["verb", "ranks", "held p50 ms", "p99 ms", "µs a rank", "CPU ms", "µs a rank"]
    rows = [
        [
            one.name,
            str(one.world_size),
            f"{one.held.p50 / 1000:.2f}",
            f"{one.held.p99 / 1000:.2f}",
            f"{one.held.p50 / one.world_size:.2f}",
            f"{one.cpu_us / 1000:.2f}",
            f"{one.cpu_us / one.world_size:.2f}",
        ]
        for one in found
    ]
    return table(header, rows)


def _counts(tally: Counter[str]) -> str:
    """Round trips by name; those that wait for news last."""
    asked = [f"{count} {name}" for name, count in sorted(tally.items()) if name not in READS]
    waited = [f"{tally[name]} {name}" for name in READS if tally[name]]
    return ", ".join([*asked, *waited]) or "none"

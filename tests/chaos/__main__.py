"""``python -m tests.chaos --seconds 900 --seed 1``: break real processes and real servers, and check that the guarantees hold."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos.driver import WORLDS, Drive, Report, quantile
from tests.chaos.needs import missing
from tests.chaos.world import SETTINGS


def main() -> int:
    """Run, print the table, write the summary; the exit code is 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="seconds for which to inject faults (default 120)")
    parser.add_argument("--seed", type=int, default=1, help="the seed of the schedule (default 1)")
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, help="which kinds of stores (default: all)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PART", help="inject only faults whose names contain PART"
    )
    parser.add_argument("--rounds", type=int, default=None, help="the most rounds in each world")
    parser.add_argument("--json", type=Path, default=Path("bench-results/chaos.json"), help="the file for the summary")
    options = parser.parse_args()
    worlds = options.worlds or list(WORLDS)
    if why := missing(worlds):
        print(f"chaos: {why}", file=sys.stderr)
        return 2
    directory = Path(tempfile.mkdtemp(prefix="rankgate-chaos-"))
    drive = Drive(
        seed=options.seed,
        seconds=options.seconds,
        worlds=worlds,
        directory=directory / "run",
        rounds=options.rounds,
        only=options.only,
    )
    report = asyncio.run(drive.run())
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
    show(report)
    if report.breaches:
        print(f"\nThe logs and journals of this run are in {directory / 'run'}.")
        print(
            f"make chaos SECONDS={options.seconds:g} SEED={options.seed} gives the same schedule of faults again. The processes are"
        )
        print("real, so what they make of it may differ.")
        return 1
    shutil.rmtree(directory)
    return 0


def show(report: Report) -> None:
    """Print what a run has shown."""
    print(f"{'fault':<48}{'count':>6}{'recovery in leases: n':>24}{'p50':>8}{'p99':>8}")
    recoveries = report.recoveries()
    for kind, count in report.by_kind().most_common():
        _row(kind, str(count), recoveries.get(kind, []))
    for name in ("several faults at once", "all"):
        _row(name, "", recoveries.get(name, []))
    print(f"\nverdicts: {_listed(report.verdicts)}")
    print(f"refused tasks: {_listed(report.rejections)}; limits of the record: {_listed(report.oddities)}")
    summary = report.as_json()
    print(
        f"\nseed {report.seed}, {report.seconds:.0f} s, lease {SETTINGS.lease:g} s: {summary['faults']} faults in {summary['rounds']} rounds, "
        f"{report.bring_ups} bring-ups of {report.attempts} attempts, {report.loads} loads, {report.processes} processes, "
        f"{summary['given_up']} instances given up as ordered, {report.events} events recorded, "
        f"{report.noise} moments in which the machine stood still"
    )
    print(f"breaches: {len(report.breaches)}")
    for breach in report.breaches:
        print(f"  {breach}")


def _row(name: str, count: str, times: list[float]) -> None:
    figures = f"{len(times):>24}{quantile(times, 0.5):>8.2f}{quantile(times, 0.99):>8.2f}" if times else f"{0:>24}"
    print(f"{name:<48}{count:>6}{figures}")


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda one: -one[1])) or "none"


if __name__ == "__main__":
    sys.exit(main())

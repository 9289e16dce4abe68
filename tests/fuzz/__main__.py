"""Fuzz for a given time: ``python -m tests.fuzz [--seconds 120] [--guided PYTHON]``, or ``make fuzz SECONDS=120``.

For a third of the time, hypothesis plays as many examples as fit: decoders, the second line, and garbage in a live store. If `--guided`
names a Python that has atheris, the rest goes to coverage-guided fuzzing of each decoder in turn. Exit code 1 if anything broke.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from tests.fuzz.decoders import DECODERS

_SMALLEST = 200


def by_hypothesis(seconds: float) -> bool:
    """Play twice as many examples each time, with another seed, until the time is over; whether nothing broke."""
    began, examples, rounds = time.monotonic(), _SMALLEST, 0
    while time.monotonic() - began < seconds:
        rounds += 1
        environment = os.environ | {"RANKGATE_FUZZ_EXAMPLES": str(examples)}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"--hypothesis-seed={rounds}"]
        done = subprocess.run([*command, "tests/fuzz"], check=False, env=environment)
        if done.returncode != 0:
            print(f"hypothesis: broken in round {rounds} (seed {rounds}, RANKGATE_FUZZ_EXAMPLES={examples})")
            return False
        print(f"hypothesis: round {rounds} with {examples} examples a decoder: nothing broke", flush=True)
        examples = min(examples * 2, 20_000)
    return True


def by_coverage(python: str, seconds: float) -> bool:
    """Fuzz each decoder for its share of the time; whether nothing broke."""
    share = max(1, round(seconds / len(DECODERS)))
    sound = True
    for name in DECODERS:
        options = [
            f"-max_total_time={share}",
            "-max_len=4096",
            "-timeout=10",
            "-rss_limit_mb=1024",
            "-print_final_stats=1",
        ]
        with tempfile.TemporaryDirectory(prefix="rankgate-fuzz-") as corpus:
            done = subprocess.run(
                [python, "-m", "tests.fuzz.guided", name, corpus, *options],
                check=False,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        runs = re.search(r"number_of_executed_units: (\d+)", done.stdout)
        covered = re.findall(r"cov: (\d+)", done.stdout)
        figures = f"{int(runs[1]) if runs else 0:,} inputs, {covered[-1] if covered else '?'} edges in {share} s"
        print(f"atheris: {name}: {figures}: {'nothing broke' if done.returncode == 0 else 'BROKEN'}", flush=True)
        if done.returncode != 0:
            print(done.stdout[-4_000:])
            sound = False
    return sound


def main(arguments: Sequence[str]) -> int:
    """Fuzz; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="seconds for the whole run (default: 120)")
    parser.add_argument("--guided", default="", metavar="PYTHON", help="the path of a Python that has atheris")
    chosen = parser.parse_args(arguments)
    if not chosen.guided:
        print("atheris is left out: --guided names no Python that has it")
        return 0 if by_hypothesis(chosen.seconds) else 1
    sound = by_hypothesis(chosen.seconds / 3)
    return 0 if by_coverage(chosen.guided, chosen.seconds * 2 / 3) and sound else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

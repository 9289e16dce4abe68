"""Random histories of the real code under faults.

``python -m tests.simulation 7`` plays one seed and prints its whole history. ``python -m tests.simulation 0 5000`` plays many seeds, on all
cores, and prints a summary.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from loguru import logger

from tests.simulation.batch import Tally, play_all
from tests.simulation.world import LONG, SHORT, Breach, World


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 1 where anything broke."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("first", type=int, help="the first seed")
    parser.add_argument("end", type=int, nargs="?", help="the seed after the last one; without it, one seed is printed")
    parser.add_argument("--jobs", type=int, default=None, help="number of processes (default: one per core)")
    parser.add_argument(
        "--long", action="store_true", help="play long histories: more ranks, more faults, many bring-ups"
    )
    parser.add_argument("--print", action="store_true", dest="whole", help="print the whole history of every seed")
    parser.add_argument("--stop-at-first", action="store_true", help="end at the first breach")
    chosen = parser.parse_args(arguments)
    logger.remove()
    end = chosen.first + 1 if chosen.end is None else chosen.end
    if chosen.end is None or chosen.whole:
        return max([_print(seed, long=chosen.long) for seed in range(chosen.first, end)], default=0)
    return _play(chosen.first, end, chosen.jobs, long=chosen.long, stop_at_first=chosen.stop_at_first)


def _print(seed: int, *, long: bool) -> int:
    world = World(seed, scale=LONG if long else SHORT, traced=True)
    try:
        world.run()
        verdict = "no breach"
    except Breach as breach:
        verdict = f"BREACH: {breach}"
    print("\n".join([*world.lines(), verdict]))
    return int(verdict != "no breach")


def _play(first: int, end: int, jobs: int | None, *, long: bool, stop_at_first: bool) -> int:
    began, total = time.monotonic(), Tally()
    for tally in play_all(first, end, jobs=jobs, long=long, stop_at_first=stop_at_first):
        total.add(tally)
        for seed, sentence in tally.breaches.items():
            print(
                f"BREACH {sentence}\n  again: {os.path.basename(sys.executable)} -m tests.simulation {seed}{' --long' * long}"
            )
            sys.stdout.flush()
    seconds = time.monotonic() - began
    print(
        f"{total.histories:,} histories (seeds {first} to {end - 1}) in {seconds:,.0f} s, {total.histories / max(seconds, 1e-9):.1f} a "
        f"second: {len(total.breaches)} breaches"
    )
    print(total)
    return 1 if total.breaches else 0


if __name__ == "__main__":
    sys.exit(main())

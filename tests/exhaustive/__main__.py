"""``python -m tests.exhaustive`` runs the suite of searches. With bounds it runs one search of your own; see ``--help``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tests.exhaustive.model import KINDS, MUTATIONS, Bounds
from tests.exhaustive.suite import QUICK, SUITE, Job, play, search, told

_EPILOG = f"""
Without any of the options --ranks to --start the command runs the suite. With any of them it runs one search with these bounds.
Exit code 0: it searched everything and found nothing. 1: it found a breach, and prints the shortest history that leads to it.
3: it reached the limit first.

Kinds of faults: {", ".join(KINDS)}. See KINDS in tests/exhaustive/model.py for what each does.
Guards that --mutate takes out: {", ".join(MUTATIONS)}. See MUTATIONS there. Guards of the verbs are taken out
in a copy of barrier/testing/reference.py.

Deeper searches (a million states take about 25 s of processor time and 0.6 GB):
  python -m tests.exhaustive --planners 2 --faults 2 --kinds rollback,delay --restarts 1
  python -m tests.exhaustive --planners 2 --faults 1 --restarts 1 --zombies 1 --generations 1
  python -m tests.exhaustive --ranks 3 --planners 1 --faults 1 --kinds flush,evict,delay
  python -m tests.exhaustive --planners 1 --faults 1 --epochs 3 --limit 50000000
"""


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def main(arguments: list[str]) -> int:
    """Search as asked; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.exhaustive",
        description="Search all interleavings of ranks, planners and faults over the barrier's reference model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="run only the suite's first few searches")
    parser.add_argument("--ranks", type=int, help="world size, 2 or 3")
    parser.add_argument("--planners", type=int, help="number of planners, 1 or 2")
    parser.add_argument("--faults", type=int, help="number of faults in one history")
    parser.add_argument("--kinds", help="kinds of faults, separated by commas (default: all)")
    parser.add_argument("--restarts", type=int, help="how many times a rank crashes and comes back, in one history")
    parser.add_argument("--zombies", type=int, help="how many of the restarted ranks were only stopped, and go on")
    parser.add_argument("--epochs", type=int, help="the most epochs to open")
    parser.add_argument("--generations", type=int, help="how many texts clients ask for")
    parser.add_argument("--start", help="the status of all ranks to begin with: Idle, Connected, Loaded or Ready")
    parser.add_argument("--mutate", default="", help="guards to take out, separated by commas")
    parser.add_argument("--limit", type=int, default=20_000_000, help="the most states of one search")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="the most seconds of one search")
    parser.add_argument("--jobs", type=int, default=2, help="how many searches of the suite to run at once")
    given = parser.parse_args(arguments)
    names = ("ranks", "planners", "faults", "restarts", "zombies", "epochs", "generations", "start")
    own: dict[str, Any] = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    if given.kinds is not None:
        own["kinds"] = _names(given.kinds)
    mutations = frozenset(_names(given.mutate))
    if not own:
        jobs = QUICK if given.quick else SUITE
        return play(jobs, mutations=mutations, limit=given.limit, seconds=given.seconds, workers=given.jobs)
    result = search(Job("as asked", Bounds(**own)), mutations, given.limit, given.seconds)
    print(told("as asked", result))
    return 1 if result.found is not None else 0 if result.exhausted else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

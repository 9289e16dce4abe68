"""Replay seeds: ``python -m tests.simulation 7`` prints one history, ``python -m tests.simulation 0 500`` plays many."""

from __future__ import annotations

import sys
import time
from collections import Counter

from loguru import logger

from tests.simulation.world import Breach, World


def main(arguments: list[str]) -> int:
    """Play the seeds from the first argument up to, but not, the second; one seed alone is printed."""
    logger.remove()
    first = int(arguments[0])
    end = int(arguments[1]) if len(arguments) > 1 else first + 1
    began, broken, faults = time.monotonic(), list[int](), Counter[str]()
    for seed in range(first, end):
        world = World(seed)
        try:
            world.run()
        except Breach as breach:
            broken.append(seed)
            print(breach)
        faults.update(world.injected)
        if end - first == 1:
            print("\n".join(world.engines.log))
    seconds = time.monotonic() - began
    print(
        f"{end - first} histories in {seconds:.0f} s, {faults.total()} faults {dict(faults)}, {len(broken)} breaches {broken}"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

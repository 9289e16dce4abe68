"""Search by simulation: ``python -m tests.mutants.simulate FIRST END`` plays seeds until one breaks a guarantee, and exits with 1."""

from __future__ import annotations

import sys

from loguru import logger

from tests.simulation.world import Breach, simulate


def main(arguments: list[str]) -> int:
    """Play the seeds from the first argument up to, but not, the second."""
    logger.remove()
    first, end = map(int, arguments)
    for seed in range(first, end):
        try:
            simulate(seed)
        except Breach as breach:
            print(f"BREACH: {str(breach).splitlines()[0]}")
            return 1
    print(f"no breach in the seeds {first} to {end - 1}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

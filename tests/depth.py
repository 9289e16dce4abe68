"""How many random examples a test plays: a share of them in `make test`, all of them in ``make test-depth``, which .ci/run calls."""

from __future__ import annotations

import os

QUICK = os.environ.get("RANKGATE_DEPTH") == "quick"
_SHARE = 8
_LEAST = 3


def examples(all_of_them: int) -> int:
    """How many examples of a test are played now.

    Args:
        all_of_them: how many are played in depth.
    """
    return max(all_of_them // _SHARE, _LEAST) if QUICK else all_of_them

"""The wire version of messages and records: which versions this one reads, and how it refuses the others.

A change that only adds an optional part keeps the version: readers ignore parts that they do not know, or writers leave
the part out. A change that an older reader would misunderstand gets the next version. Each version reads its own and
the one before. So a cluster can be updated one process after another.
"""

from __future__ import annotations

__all__ = ["READS", "WIRE_VERSION", "refusal_of"]

WIRE_VERSION = 1
"""What this version writes."""

_LARGEST_SAID = 1_000_000_000

READS = tuple(range(max(1, WIRE_VERSION - 1), WIRE_VERSION + 1))
"""What this version reads."""


def refusal_of(version: object) -> str:
    """Why a message or record of this version is refused, as the end of a sentence; empty if it can be read.

    Args:
        version: the foreign value that was read.
    """
    if isinstance(version, int) and not isinstance(version, bool):
        if version in READS:
            return ""
        said = f"wire version {version}" if abs(version) <= _LARGEST_SAID else "a wire version that is too large"
    else:
        said = "a wire version that is not a number"
    known = " and ".join(map(str, READS))
    return f"has {said}, and this version of rankgate reads {known}: run the same version everywhere"

"""The version of what processes say to one another: which versions this one reads, and what it says of the others.

A change that only adds an optional part keeps the version, since readers pass over what they do not know, or writers leave it out. A change that an
older reader would misunderstand gets the next version. Each version reads its own and the one before, so that a cluster can be updated one
process after another.
"""

from __future__ import annotations

__all__ = ["READS", "WIRE_VERSION", "refusal_of"]

WIRE_VERSION = 1
"""What this version writes."""

_LARGEST_SAID = 1_000_000_000

READS = tuple(range(max(1, WIRE_VERSION - 1), WIRE_VERSION + 1))
"""What this version reads."""


def refusal_of(version: object) -> str:
    """What to say of a message or record of that version, as the end of a sentence; empty where it can be read.

    Args:
        version: as it was read; foreign.
    """
    if isinstance(version, int) and not isinstance(version, bool):
        if version in READS:
            return ""
        said = str(version) if abs(version) <= _LARGEST_SAID else "that is no sensible number"
    else:
        said = "that is no number"
    known = " and ".join(map(str, READS))
    return f"has wire version {said}, and this version of rankgate reads {known}: run the same version everywhere"

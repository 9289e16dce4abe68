"""The wire version of messages and records: what this version of rankgate writes, which ones it reads, and how it refuses the others.

Readers refuse what they do not know, a new field included. So every change gets the next wire version, in two releases: the first one reads
the new version and still writes the old one; the next one writes it. Then each release and the one before understand one another, and a
cluster can be updated one process after another.
"""

from __future__ import annotations

__all__ = ["READS", "WIRE_VERSION", "refusal_in_record", "refusal_of"]

WIRE_VERSION = 1
"""What this version writes."""

_LARGEST_SAID = 1_000_000_000
_LONGEST_READ = 10

READS = (1,)
"""What this version reads. lua/prelude.lua has the same for the epoch's record."""


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


def refusal_in_record(raw: bytes | str | None) -> str:
    """As `refusal_of`, for the field ``wire`` of an epoch's record; a record without it has version 1.

    Args:
        raw: the field; foreign.
    """
    if raw is None:
        return refusal_of(1)
    return refusal_of(int(raw) if raw.isascii() and raw.isdigit() and len(raw) < _LONGEST_READ else None)

"""What one rank reads of the epoch's record. What cannot be read counts as missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from barrier.errors import InvalidName
from barrier.protocol.ids import INCARNATION_WIDTH, EpochId
from barrier.protocol.model import Verdict, read_verdict
from barrier.protocol.wire import refusal_in_record

__all__ = [
    "ENDPOINTS_CHUNK",
    "LOOK_FIELDS",
    "ROSTER_CHUNK",
    "SeenRecord",
    "endpoint_fields",
    "promise_fields",
    "read_endpoints",
    "read_for_promise",
    "read_look",
    "read_number",
]


ROSTER_CHUNK = 64
"""How many ranks' incarnations one field of the record holds; as in lua/prelude.lua."""
ENDPOINTS_CHUNK = 64
"""How many ranks' endpoints one field of the record holds; as in lua/prelude.lua."""

LOOK_FIELDS = ("number", "nonce", "verdict")
"""What every look reads; see `read_look`."""


class SeenRecord(NamedTuple):
    """The record of an epoch, as one rank sees it.

    Attributes:
        epoch: which epoch.
        verdict: how it ended; ``None`` while it goes on.
        world_size: how many ranks it has; ``None`` if this was not read or is not readable.
        named: the incarnation that the roster names for this rank; empty if it names nobody, or was not read.
        ordinal: which attempt of the group it is, for people.
        refusal: why its wire version is refused (`barrier.protocol.wire`); empty if it can be read, or was not looked at.
    """

    epoch: EpochId
    verdict: Verdict | None = None
    world_size: int | None = None
    named: str = ""
    ordinal: int | None = None
    refusal: str = ""


def promise_fields(rank: int) -> tuple[str, ...]:
    """What a promise reads; see `read_for_promise`."""
    return (*LOOK_FIELDS, "world_size", f"roster:{rank // ROSTER_CHUNK}", "ordinal", "wire")


def endpoint_fields(world_size: int) -> tuple[str, ...]:
    """The fields that hold the endpoints of so many ranks; see `read_endpoints`."""
    chunks = range((world_size + ENDPOINTS_CHUNK - 1) // ENDPOINTS_CHUNK)
    return ("number", "nonce", *(f"endpoints:{chunk}" for chunk in chunks))


def read_look(found: Sequence[bytes | None]) -> SeenRecord | None:
    """Read the values of `LOOK_FIELDS`; ``None`` if there is no record of ours."""
    number, nonce, verdict = found
    epoch = _read_epoch(number, nonce)
    return None if epoch is None else SeenRecord(epoch, None if verdict is None else read_verdict(verdict))


def read_for_promise(found: Sequence[bytes | None], rank: int) -> SeenRecord | None:
    """Read the values of `promise_fields`; ``None`` if there is no record of ours."""
    *look, world_size, roster, ordinal, wire = found
    seen = read_look(look)
    if seen is None:
        return None
    first = rank % ROSTER_CHUNK * INCARNATION_WIDTH
    named = (roster or b"").decode("utf-8", "replace")[first : first + INCARNATION_WIDTH]
    return seen._replace(
        world_size=read_number(world_size), named=named, ordinal=read_number(ordinal), refusal=refusal_in_record(wire)
    )


def read_endpoints(found: Sequence[bytes | None], promised: EpochId | None, world_size: int) -> tuple[str, ...] | None:
    """Read the values of `endpoint_fields`; ``None`` if they are of another epoch, or of another number of ranks."""
    number, nonce, *chunks = found
    if promised is None or _read_epoch(number, nonce) != promised:
        return None
    lines = [line for chunk in chunks if chunk is not None for line in chunk.decode("utf-8", "replace").split("\n")]
    return tuple(lines) if len(lines) == world_size else None


def _read_epoch(number: bytes | None, nonce: bytes | None) -> EpochId | None:
    """The epoch, if its name is written exactly as planners write it."""
    if number is None or nonce is None:
        return None
    text = f"{number.decode('utf-8', 'replace')}-{nonce.decode('utf-8', 'replace')}"
    try:
        epoch = EpochId.parse(text)
    except InvalidName:
        return None
    return epoch if str(epoch) == text else None


def read_number(raw: bytes | None) -> int | None:
    """Read a number of the record; ``None`` if the value is no number."""
    return int(raw) if raw is not None and raw.isdigit() and len(raw) < 20 else None

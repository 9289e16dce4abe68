"""Wake-up hints: what they say, and how entries of their stream are decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from barrier.printable import printable

__all__ = ["Hint", "decode_hint", "parse_id", "told"]


_LONGEST_WORD = 32
_SHARED_WORDS = 1_024
_LONGEST_SHARED = 80  # bytes: the epoch's number, its nonce, an incarnation, any status name of ours


@dataclass(frozen=True, slots=True)
class Hint:
    """Something may have changed.

    Attributes:
        id: its place in the stream, comparable with other hints of the group.
        kind: ``report`` (a rank's status changed), ``opened``, ``restored``, ``verdict``, ``request``, or ``lost``: the
        connection broke, and hints may be missing.
        rank: for a report, the rank.
        epoch: for a report, ``<number>-<nonce>``, or ``-``.
        incarnation: for a report, the rank's incarnation.
        status: for a report, the status name.
        alarm: for a report, whether it carries a failure or a rejection.
    """

    id: tuple[int, int]
    kind: str
    rank: int = -1
    epoch: str = "-"
    incarnation: str = ""
    status: str = ""
    alarm: bool = False


def parse_id(text: str) -> tuple[int, int]:
    """A stream id as a comparable pair."""
    milliseconds, _, sequence = text.partition("-")
    return int(milliseconds), int(sequence or 0)


def _word(raw: bytes) -> str:
    return _shared(raw) if len(raw) <= _LONGEST_SHARED else raw.decode()


@lru_cache(maxsize=_SHARED_WORDS)
def _shared(raw: bytes) -> str:
    return raw.decode()


def decode_hint(entry_id: bytes, fields: Mapping[bytes, bytes]) -> Hint:
    """Read a hint; one that cannot be read becomes a ``lost`` hint, which makes the waiter look again.

    Thousands of hints are held, with the same few words, so equal words share one string. The number of shared words is
    limited, because a rank may write any word.
    """
    place = parse_id(entry_id.decode())
    try:
        return Hint(
            id=place,
            kind=_word(fields[b"kind"]),
            rank=int(fields.get(b"rank", b"-1")),
            epoch=_word(fields.get(b"epoch", b"-")),
            incarnation=_word(fields.get(b"inc", b"")),
            status=_word(fields.get(b"status", b"")),
            alarm=b"alarm" in fields,
        )
    except (KeyError, ValueError):
        return Hint(id=place, kind="lost")


def told(key: str, hint: Hint) -> str:
    """A hint in words, for the log. Foreign words are cut, because a rank may write anything into a hint."""
    if hint.kind != "report":
        return f"{key}: {printable(hint.kind, _LONGEST_WORD)}"
    alarm = ", with a failure or a rejection" if hint.alarm else ""
    return f"{key}: rank {hint.rank} reports {printable(hint.status, _LONGEST_WORD)}{alarm}"

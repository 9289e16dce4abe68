"""The words for a failure, for people and for reports. No I/O."""

from __future__ import annotations

from dataclasses import dataclass

from barrier import supervise
from runner.engine import EngineFailure

__all__ = ["Failure", "speakable", "words_of"]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a rank has failed.

    Attributes:
        error: one sentence for people; it never quotes a prompt.
        permanent: whether another attempt would fail too.
    """

    error: str
    permanent: bool = False

    @classmethod
    def of(cls, failure: BaseException) -> Failure:
        """Describe an exception."""
        return cls(words_of(failure), isinstance(failure, EngineFailure) and failure.permanent)


def words_of(failure: BaseException) -> str:
    """One sentence about a failure. It does not quote the text of a mistake of ours, which may hold a prompt."""
    if isinstance(failure, EngineFailure):
        return speakable(str(failure))[:2_000]
    return f"a mistake of ours, {supervise.described(failure)}; the log of this rank has its frames"


def speakable(text: str) -> str:
    """Replace what UTF-8 cannot encode: half a surrogate pair from an engine would make every later report fail."""
    return text.encode("utf-8", "replace").decode()

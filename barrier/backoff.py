"""Pauses between tries: each is twice as long as the one before, up to a limit.

docs/decisions/backoff.md says why this is no library.
"""

from __future__ import annotations

import random

__all__ = ["Backoff"]


class Backoff:
    """The pauses between the tries of one thing.

    Args:
        first: the first pause, in seconds.
        longest: the longest pause, in seconds.
        rng: if given, it shortens each pause at random, to no less than half, so that processes do not all come back at
            once.
    """

    def __init__(self, first: float, longest: float, *, rng: random.Random | None = None) -> None:
        self._first = first
        self._longest = longest
        self._rng = rng
        self._pause = 0.0

    @property
    def failing(self) -> bool:
        """Whether there was a pause since the last `reset`: then the failure was logged already."""
        return self._pause > 0

    def reset(self) -> None:
        """A try succeeded: the next pause is the first one again."""
        self._pause = 0.0

    def next_pause(self) -> float:
        """How many seconds to wait before the next try."""
        self._pause = min(max(2 * self._pause, self._first), self._longest)
        return self._pause if self._rng is None else self._pause * self._rng.uniform(0.5, 1.0)

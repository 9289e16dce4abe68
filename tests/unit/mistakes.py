"""Mistakes that a test puts into the code, and what the log says of them."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager

from loguru import logger

SECRET = "Tell me who the \n murderer is"
"""The text of every mistake: it may be a prompt, so nobody may tell it."""


class Injected(Exception):
    """A mistake of ours."""


def mistaken(*_: object, **__: object) -> None:
    """Make a mistake."""
    raise Injected(SECRET)


async def mistaken_later(*_: object, **__: object) -> None:
    """Make a mistake where a coroutine is expected."""
    raise Injected(SECRET)


class Heard:
    """What the log says while a block lasts."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @property
    def mistakes(self) -> list[str]:
        """The lines that tell of a mistake."""
        return [line for line in self.lines if "a mistake of ours" in line and "Injected at" in line]

    def check(self, subject: str) -> None:
        """One line tells of it with its subject, its type and its frames; no line has its text."""
        told = [line for line in self.mistakes if re.match(subject, line)]
        assert told, f"nothing that begins with {subject!r} tells of the mistake; the log says: {self.lines}"
        frames = r"frames: Injected \[\S+/mistakes\.py:\d+ in mistaken\w*( < \S+\.py:\d+ in \S+)*\]"
        assert re.search(frames, told[0]), told[0]
        assert not [line for line in self.lines if "murderer" in line or "\n" in line.rstrip("\n")], self.lines


@contextmanager
def hearing() -> Generator[Heard]:
    """Hear the log at its lowest level, with the traceback where a sink would print one."""
    heard = Heard()
    sink = logger.add(
        lambda line: heard.lines.append(str(line)), level=0, format="{message}", diagnose=True, backtrace=True
    )
    try:
        yield heard
    finally:
        logger.remove(sink)

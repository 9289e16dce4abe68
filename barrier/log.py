"""The log of these libraries. It is silent until it is enabled, every line has a context, and foreign text cannot forge a line.

Enable it as in loguru::

    from loguru import logger

    logger.enable("barrier")  # and "runner", "planner"

Each record's ``extra`` names, as far as they are known, ``instance``, ``rank``, ``attempt`` and ``task``.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loguru import logger as _loguru

from barrier.printable import printable

if TYPE_CHECKING:
    from loguru import Logger, Record

__all__ = ["LogContext", "logger", "prepare"]


_LIVE = "rankgate"


@dataclass(slots=True)
class LogContext:
    """The context of some tasks' log lines. It changes while they run, so it is read when a line is written.

    Attributes:
        instance: the group or instance.
        rank: which rank; None for a planner.
        attempt: the ordinal of the attempt; None outside of any.
        task: the id of the task in hand.
    """

    instance: str
    rank: int | None = None
    attempt: int | None = None
    task: str | None = None

    @contextmanager
    def applied(self) -> Generator[None]:
        """Give this context to every line inside, also in tasks that are started inside."""
        with _loguru.contextualize(**{_LIVE: self}):
            yield

    def fields(self) -> dict[str, object]:
        """The fields that are known."""
        found = {"instance": self.instance, "rank": self.rank, "attempt": self.attempt, "task": self.task}
        return {name: value for name, value in found.items() if value is not None}


def prepare(record: Record) -> None:
    """Make a record of ours fit for any sink; a patcher for loguru."""
    record["message"] = printable(record["message"])
    context = record["extra"].pop(_LIVE, None)
    if isinstance(context, LogContext):
        for name, value in context.fields().items():
            record["extra"].setdefault(name, value)
    if record["extra"].get("task", "") is None:  # the line is about no task any more
        del record["extra"]["task"]


for _package in ("barrier", "runner", "planner"):
    _loguru.disable(_package)

logger: Logger = _loguru.patch(prepare)
"""What our modules log with."""

"""The journal of a world: one file to which every runner and engine appends what it does.

No fault of a store can erase it. The process that acts writes the line at the moment when it acts, so nothing is reported afterwards.
Times are CLOCK_MONOTONIC, which all processes of one machine share. This module imports little, because every engine's process
imports it.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias

What: TypeAlias = Literal["accept", "connect", "connected", "load", "loaded", "warm", "warmed", "fault"]


@dataclass(frozen=True, slots=True)
class Line:
    """One act.

    Attributes:
        t: when, in nanoseconds of CLOCK_MONOTONIC.
        what: ``accept`` is a runner's, before it begins a task; ``fault`` an engine's that obeys an order of the driver; the
            others are an engine's, before and after its work.
        instance: whose.
        rank: which.
        runner: the runner's pid.
        epoch: of an ``accept``: the task's.
        task: of an ``accept``: the kind of task; of a ``fault``: the action.
        task_id: of an ``accept``.
        engine: the engine's pid; 0 in an ``accept``.
    """

    t: int
    what: What
    instance: str
    rank: int
    runner: int
    epoch: str = ""
    task: str = ""
    task_id: str = ""
    engine: int = 0


def write(
    path: Path,
    what: What,
    instance: str,
    rank: int,
    runner: int,
    *,
    epoch: str = "",
    task: str = "",
    task_id: str = "",
    engine: int = 0,
) -> None:
    """Append one line, in one write: lines of several processes do not mix."""
    line = Line(time.monotonic_ns(), what, instance, rank, runner, epoch, task, task_id, engine)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, json.dumps(asdict(line)).encode() + b"\n")
    finally:
        os.close(descriptor)


def read(path: Path) -> list[Line]:
    """All lines, in the order of their times; none where nobody has written."""
    if not path.exists():
        return []
    lines = [Line(**json.loads(text)) for text in path.read_text(encoding="ascii").splitlines()]
    return sorted(lines, key=lambda line: line.t)

"""What a runner must answer in every cell of status and task, written by hand and not derived from the code's own table."""

from __future__ import annotations

from typing import get_args

from runner.admission import Accept, Invalid, Judgement, NotYet, Stale
from runner.messages import StatusName, TaskKind

STATUSES: tuple[StatusName, ...] = get_args(StatusName)
KINDS: tuple[TaskKind, ...] = (
    "ConnectToGroup",
    "LoadModel",
    "StartWarmup",
    "TextGeneration",
    "CancelTask",
    "Shutdown",
)
LETTERS: dict[str, type[Judgement]] = {"A": Accept, "N": NotYet, "S": Stale, "I": Invalid}

# A: done. N: not yet, the same task may be accepted later in this epoch. S: too late. I: never possible.
# Columns as in KINDS.
SEVERAL_RANKS = """
Preparing     N N N N  A A
Idle          A N N N  A A
Connecting    S N N N  A A
Connected     S A N N  A A
Loading       S S N N  A A
Loaded        S S A N  A A
WarmingUp     S S S N  A A
Ready         S S S A  A A
Running       S S S A  A A
ShuttingDown  S S S S  A A
Shutdown      S S S S  A A
Failed        S S S S  A A
"""

# A single rank has nobody to connect to, in whatever status; it is never Connecting or Connected.
ONE_RANK = """
Preparing     I N N N  A A
Idle          I A N N  A A
Loading       I S N N  A A
Loaded        I S A N  A A
WarmingUp     I S S N  A A
Ready         I S S A  A A
Running       I S S A  A A
ShuttingDown  I S S S  A A
Shutdown      I S S S  A A
Failed        I S S S  A A
"""


def cells(table: str) -> dict[tuple[StatusName, TaskKind], type[Judgement]]:
    """A table as a mapping from (status, kind of task) to the answer."""
    read: dict[tuple[StatusName, TaskKind], type[Judgement]] = {}
    for line in table.strip().splitlines():
        name, *letters = line.split()
        status: StatusName = next(one for one in STATUSES if one == name)
        for kind, letter in zip(KINDS, letters, strict=True):
            read[status, kind] = LETTERS[letter]
    return read


EXPECTED = {2: cells(SEVERAL_RANKS), 1: cells(ONE_RANK)}
CELLS = [(size, status, kind) for size, table in EXPECTED.items() for status, kind in table]

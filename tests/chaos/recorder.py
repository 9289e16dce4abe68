"""Reads an instance's `events` stream from outside and keeps the events, because a flushed store loses them.

It begins a new segment wherever the store may have forgotten something: a rule that compares two events does not hold if the store
went back between them. A store that keeps its data over a restart gives a single segment, which is the strictest check. The driver
puts each segment on a server of its own as a stream, and `planner.history.find_breaches` checks it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import RedisError

from barrier import Store, StoreError
from barrier.store.keys import Keys
from planner.history import History, read_history

MARK = b"chaos"
"""A line with this field is the driver's: the store has just forgotten something."""

_PAGE = 500
_BLOCK = 500  # milliseconds


@dataclass(frozen=True, slots=True)
class _Heard:
    milliseconds: int
    sequence: int
    fields: dict[bytes, bytes]


@dataclass(slots=True)
class Recorder:
    """Records one instance.

    Attributes:
        store: where it listens.
        keys: whose events.
        forgets: whether a connection that was lost may mean that the store has forgotten something.
    """

    store: Store
    keys: Keys
    forgets: bool
    _segments: list[list[_Heard]] = field(default_factory=lambda: [[]])
    _place: str = "0-0"

    @property
    def heard(self) -> int:
        """How many events so far."""
        return sum(len(segment) for segment in self._segments)

    async def run(self) -> None:
        """Listen until cancelled; an outage is waited out."""
        while True:
            reader = self.store.reader()
            try:
                while True:
                    self._take(await reader.xread({self.keys.events: self._place}, count=_PAGE, block=_BLOCK))
            except (RedisError, StoreError, OSError):
                self._cut(sure=False)
                await asyncio.sleep(0.02)
            finally:
                await reader.aclose()

    def _take(self, reply: Any) -> None:
        for _, entries in reply or ():
            for entry_id, fields in entries:
                self._place = entry_id.decode()
                if MARK in fields:
                    self._cut(sure=True)
                    continue
                milliseconds, _, sequence = self._place.partition("-")
                self._segments[-1].append(_Heard(int(milliseconds), int(sequence), fields))

    def _cut(self, *, sure: bool) -> None:
        if (sure or self.forgets) and self._segments[-1]:
            self._segments.append([])

    async def histories(self, scratch: Store) -> list[History]:
        """Every segment, read as `read_history` reads a stream."""
        found: list[History] = []
        for number, segment in enumerate(self._segments):
            if not segment:
                continue
            keys = Keys(f"segment-{number}", self.keys.group)
            for start in range(0, len(segment), _PAGE):
                async with scratch.commands.pipeline(transaction=False) as pipe:
                    for one in segment[start : start + _PAGE]:
                        pipe.xadd(keys.events, one.fields, id=f"{one.milliseconds}-{one.sequence}")
                    await pipe.execute()
            found.append(await read_history(scratch, keys))
            await scratch.commands.delete(keys.events)
        return found

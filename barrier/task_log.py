"""Reads the task log of one rank into a queue. News from the record and failures of the rank's parts go into the same queue."""

from __future__ import annotations

import asyncio

from barrier.backoff import Backoff
from barrier.clock import Clock
from barrier.errors import RankgateError, StoreError
from barrier.life import Life
from barrier.log import logger
from barrier.protocol.ids import EpochId, LogId
from barrier.protocol.log import EpochAnnounced, LogEntry, decode_entry
from barrier.protocol.rank_state import News
from barrier.store.keys import Keys
from barrier.store.store import Store, stream_entries

__all__ = ["TaskLog"]


_BATCH = 100


class TaskLog:
    """The entries, news and failures that a rank has not taken yet, in order.

    Args:
        store: where the log is.
        keys: the group's keys.
        clock: time.
        life: the life that reads; it remembers how far it has read.

    Attributes:
        entries: what was read and not yet taken.
    """

    def __init__(self, store: Store, keys: Keys, clock: Clock, life: Life) -> None:
        self.entries: asyncio.Queue[LogEntry | RankgateError] = asyncio.Queue(maxsize=1_000)
        self._store = store
        self._keys = keys
        self._clock = clock
        self._life = life
        self._offered: EpochId | None = None

    async def next(self) -> LogEntry:
        """Wait for the next entry; raises an error that was offered instead of one."""
        entry = await self.entries.get()
        if isinstance(entry, RankgateError):
            raise entry
        return entry

    def offer(self, news: News | RankgateError) -> None:
        """Put into the queue what was not read from the log; an epoch once. If the queue is full, the next heartbeat offers it again."""
        if isinstance(news, EpochAnnounced):
            if news.epoch == self._offered:
                return
            self._offered = news.epoch
        try:
            self.entries.put_nowait(news)
        except asyncio.QueueFull:
            self._offered = None

    def end(self, failure: RankgateError) -> None:
        """End the wait of the reader with this failure."""
        if self.entries.full():  # make room for the failure, which comes after all entries
            self.entries.get_nowait()
        self.entries.put_nowait(failure)

    async def begin_at_end(self) -> None:
        """Skip the entries that are in the log already.

        Raises:
            StoreError: could not find out where it ends.
        """
        with self._store.errors():
            newest = await self._store.commands.xrevrange(self._keys.tasks, count=1)
        if newest:
            self._read(newest[0][0])

    async def follow(self) -> None:
        """Read the log for ever; try again if the store does not answer."""
        reader = self._store.reader()
        settings = self._store.settings
        pauses = Backoff(0.05, settings.command_seconds)
        try:
            while True:
                try:
                    with self._store.errors():
                        reply = await reader.xread(
                            {self._keys.tasks: str(self._life.state.read_to)},
                            count=_BATCH,
                            block=round(settings.reader_block * 1000),
                        )
                    pauses.reset()
                except StoreError as error:
                    if not pauses.failing:
                        logger.warning("rank {}: the task log is not readable: {}", self._life.report.rank, error)
                    await self._clock.sleep(pauses.next_pause())
                    continue
                for _, entries in stream_entries(reply):
                    for entry_id, fields in entries:
                        await self.entries.put(decode_entry(self._read(entry_id), fields))
        finally:
            await reader.aclose()

    def _read(self, entry_id: bytes) -> LogId:
        place = LogId.parse(entry_id.decode())
        self._life.state = self._life.state.read(place)
        return place

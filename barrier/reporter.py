"""Sends one rank's reports. With a look, it also reads who holds the rank, the epoch's record and the end of the log."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any

from barrier.claim import name_of
from barrier.clock import Clock
from barrier.errors import ClaimLost
from barrier.life import Life
from barrier.log import logger
from barrier.protocol.ids import EpochId, LogId
from barrier.protocol.rank_state import News
from barrier.protocol.record import read_look
from barrier.store.keys import Keys
from barrier.store.report_frames import Event, ReportFrames
from barrier.store.store import Store, is_spoiled

__all__ = ["Reporter"]


_UNSAID_EVENTS = 1_000


class Reporter:
    """Sends the whole state of one rank, in one MULTI for each report, one report at a time.

    Args:
        store: where.
        keys: the group's keys.
        clock: time.
        life: the life that reports; a look updates its state.
        offer: takes news and errors for the reader of the task log.

    Attributes:
        turn: held while something is written for this rank.
        renewed_at: when the last report was sent that the store acknowledged, by the clock; minus infinity before the
            first.
        replaced: set once it is known that another life holds the rank.
    """

    def __init__(
        self, store: Store, keys: Keys, clock: Clock, life: Life, offer: Callable[[News | ClaimLost], None]
    ) -> None:
        self.turn: asyncio.Lock = asyncio.Lock()
        self.renewed_at: float = -inf
        self.replaced: ClaimLost | None = None
        self._store = store
        self._keys = keys
        self._clock = clock
        self._life = life
        self._offer = offer
        self._frames: ReportFrames | None = None
        self._looked_at = -inf
        self._hinted: tuple[str, EpochId | None] | None = None
        self._alarm = False
        self._unsaid: deque[Event] = deque(maxlen=_UNSAID_EVENTS)
        self._event_seq = 0

    def add(self, events: Sequence[Event], *, alarm: bool) -> None:
        """Add to the next report: history, and whether the planners must look at once."""
        self._alarm = self._alarm or alarm
        for event in events:
            self._event_seq += 1
            epoch = str(self._life.state.promised or "-")
            self._unsaid.append({"seq": str(self._event_seq), "epoch": epoch, **event})

    def frames(self) -> ReportFrames:
        """The commands of the rank that is held now."""
        life = self._life
        if self._frames is None or self._frames.rank != life.rank:
            self._frames = ReportFrames(self._keys, self._store.settings, life.rank, life.incarnation)
        return self._frames

    async def write(self, *, look: bool = True) -> None:
        """Send the report in one MULTI. With a `look`, also renew the claim, and read the epoch's record and the log's end.

        A look happens at every heartbeat, whatever the caller asks for. In between, a report leaves the look out,
        because the dispatch after an arrival waits for the report. It still checks that this incarnation holds the
        rank.

        Hints and history that could not be sent go with the next report. After a lost reply they may come twice; events
        have a number, so a reader can tell.

        Raises:
            RankTaken: no rank is claimed.
            ClaimLost: another incarnation holds the rank; nothing was written if that was known before.
            StoreError: unknown.
        """
        async with self.turn:
            frames = self.frames()
            self.refuse_if_replaced()
            now, settings = self._clock.now(), self._store.settings
            if self.renewed_at > -inf and now - self.renewed_at > settings.reread_after:
                await self._read_before_writing()
            look = look or now - self._looked_at >= settings.heartbeat
            if not await self._say(frames, look=look):
                await self._say(frames, look=True)  # the claim is gone; a look sets it again

    async def _say(self, frames: ReportFrames, *, look: bool) -> bool:
        """Send one report; return whether the claim was there."""
        sent_at, read_to = self._clock.now(), self._life.state.read_to
        report = self._life.next_report(sent_at)
        alarm, self._alarm = self._alarm, False  # a new alarm goes with the next report
        hinted = (report.status, report.epoch)
        events = list(self._unsaid)
        hints = frames.hints(report, alarm=alarm) if alarm or hinted != self._hinted else []
        history = frames.history(events)
        commands: list[Sequence[Any] | bytes] = [frames.holder, frames.report(report), *hints, *history]
        told = range(2, len(commands))  # hints and history may fail: they do not stop the report
        if look:
            commands += frames.look
        try:
            with self._store.errors():
                replies = await self._store.transact(commands, may_fail=told)
        except BaseException:
            self._alarm = self._alarm or alarm
            raise
        logger.trace("report {} is written: {}", report.seq, report.status)
        self._hinted = hinted
        for _ in range(min(len(events), len(self._unsaid))):
            self._unsaid.popleft()
        if replies[0] is not None:
            self._check_holder(replies[0])
        elif not look:
            return False
        self.renewed_at = sent_at
        if look:
            self._looked_at = sent_at
            record, newest = replies[-2:]
            self._notice(record, newest, read_to)
        if any(isinstance(reply, Exception) for reply in replies[2 : told.stop]):
            await self._begin_anew({self._keys.signals: hints, self._keys.events: history}, replies[2 : told.stop])
        return True

    def _notice(self, record: Sequence[bytes | None], newest: Sequence[tuple[bytes, Any]], read_to: LogId) -> None:
        """Take in what a look has shown. When it was sent, this rank had read the log as far as `read_to`."""
        life = self._life
        end = LogId.parse(newest[0][0].decode()) if newest else LogId(0, 0)
        life.state = life.state.find_end(end, read_to)
        news = life.state.hear(read_look(record))
        if news is not None:
            self._offer(news)

    async def _begin_anew(self, told: Mapping[str, Sequence[Any]], replies: list[Any]) -> None:
        """Begin a spoiled stream anew, and append what it refused."""
        for key, commands in told.items():
            said, replies = replies[: len(commands)], replies[len(commands) :]
            if any(map(is_spoiled, said)):
                await self._store.append_if_possible(key, commands)

    async def _read_before_writing(self) -> None:
        """After a gap (a stopped process, a lost network) this rank may have been replaced: then it must not write."""
        with self._store.errors():
            holder = await self._store.commands.get(self._keys.claim(self._life.rank))
        if holder is not None:
            self._check_holder(holder)

    def refuse_if_replaced(self) -> None:
        """Raise `ClaimLost` if it is known that another incarnation holds the rank."""
        if self.replaced is not None:
            raise self.replaced

    def _check_holder(self, holder: bytes) -> None:
        incarnation = self._life.incarnation
        if holder == incarnation.encode():
            return
        self.replaced = ClaimLost(
            f"group {self._keys.group}, rank {self._life.rank}: process {name_of(holder)} holds this rank now; this one "
            f"({incarnation}) was silent for longer than its lease. Stop one of the two"
        )
        self._offer(self.replaced)  # ends the wait of the reader of tasks
        raise self.replaced

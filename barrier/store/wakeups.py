"""Wake-up hints: one connection waits for every group of a process; on a cluster, one for each group.

A hint is never the truth: it may be lost, doubled or early. A waiter takes `Snapshot.signals_end` from its picture,
waits for hints after it, and looks again after `Settings.backstop` even without a hint.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from functools import partial
from itertools import takewhile
from typing import Any

from barrier import supervise
from barrier.backoff import Backoff
from barrier.clock import Clock
from barrier.errors import StoreCorrupt, StoreError
from barrier.log import logger
from barrier.protocol.wakeup import Hint, decode_hint, parse_id, told
from barrier.store.store import Store, stream_entries

__all__ = ["Subscription", "Wakeups"]


_BATCH = 2_000
_BUFFERED = 20_000
_FIRST_PAUSE = 0.05  # seconds
_TURNS = 4
"""How many turns of the event loop a planner needs to act on a hint. The next hints are asked for after that."""


_trace = logger.opt(lazy=True).trace


class Subscription:
    """The hints of one stream, in order, since it was subscribed to."""

    def __init__(self, wakeups: Wakeups, key: str, clock: Clock, buffered: int = _BUFFERED) -> None:
        self._wakeups = wakeups
        self._key = key
        self._clock = clock
        self._hints: deque[Hint] = deque(maxlen=buffered)
        self._arrived = asyncio.Event()

    async def __aenter__(self) -> Subscription:
        """Subscribed already; leaving closes."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        await self.close()

    @property
    def cursor(self) -> tuple[int, int]:
        """How far the stream was read."""
        return self._wakeups.cursor(self._key)

    def push(self, hint: Hint) -> None:
        """Add a hint and wake the waiter."""
        self._hints.append(hint)
        self._arrived.set()

    def rewind(self, to: str) -> None:
        """Read again from an earlier id: the stream went back, so the entries from there on are new."""
        self._wakeups.rewind(self._key, parse_id(to))

    async def next(self, seconds: float, *, after: tuple[int, int] = (0, 0)) -> list[Hint]:
        """Return all hints past `after` that have come, waiting up to so many seconds for the first; empty when none came.

        ``lost`` hints are always returned.
        """
        deadline = self._clock.now() + seconds
        while True:
            found = [hint for hint in self._hints if hint.id > after or hint.kind == "lost"]
            self._hints.clear()
            self._arrived.clear()
            left = deadline - self._clock.now()
            if found or left <= 0:
                return found
            try:
                await self._clock.wait_for(self._arrived.wait(), left)
            except TimeoutError:
                return []

    async def close(self) -> None:
        """Stop reading this stream."""
        await self._wakeups.unsubscribe(self._key, self)


class Wakeups:
    """The reader of all hint streams of one store."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._cursors: dict[str, tuple[int, int]] = {}
        self._origins: dict[str, tuple[int, int]] = {}
        self._recent: dict[str, deque[Hint]] = {}
        self._subscriptions: dict[str, set[Subscription]] = {}
        self._reading: dict[str, asyncio.Task[None]] = {}

    def cursor(self, key: str) -> tuple[int, int]:
        """How far a stream was read."""
        return self._cursors.get(key, (0, 0))

    def keep(self, key: str, start: str) -> Subscription:
        """Keep on reading a stream, from `start` on, while nobody waits; this subscription holds no hints."""
        return self._subscribe(key, start, Subscription(self, key, self._clock, buffered=0))

    def subscribe(self, key: str, start: str) -> Subscription:
        """Subscribe to the hints of a stream after the id `start` (never ``$``: take it from the picture).

        If the stream is being read already, hints after `start` that others got before are given again.
        """
        return self._subscribe(key, start, Subscription(self, key, self._clock))

    def kept(self, key: str) -> int:
        """How many hints of a stream are held for waiters with an older picture: at most those of one lease."""
        return len(self._recent.get(key, ()))

    def _subscribe(self, key: str, start: str, subscription: Subscription) -> Subscription:
        known = self._subscriptions.setdefault(key, set())
        known.add(subscription)
        if len(known) == 1 or parse_id(start) < self._origins[key]:
            self.rewind(key, parse_id(start))
        place = parse_id(start)
        missed = list(takewhile(lambda hint: hint.id > place, reversed(self._recent[key])))
        for hint in reversed(missed):
            subscription.push(hint)
        return subscription

    def rewind(self, key: str, to: tuple[int, int]) -> None:
        """Set a stream's cursor and read on from there."""
        self._cursors[key] = self._origins[key] = to
        self._recent[key] = deque()
        self._restart(self._store.place_of(key))

    async def unsubscribe(self, key: str, subscription: Subscription) -> None:
        """Forget a subscription; the last one ends the reading."""
        known = self._subscriptions.get(key, set())
        known.discard(subscription)
        if known:
            return
        self._subscriptions.pop(key, None)
        self._cursors.pop(key, None)
        self._origins.pop(key, None)
        self._recent.pop(key, None)
        place = self._store.place_of(key)
        if any(self._store.place_of(other) == place for other in self._subscriptions):
            return  # the next read leaves this stream out
        await self._end([self._reading.pop(place)] if place in self._reading else [])

    async def close(self) -> None:
        """End the reading."""
        reading, self._reading = list(self._reading.values()), {}
        await self._end(reading)

    async def _end(self, reading: list[asyncio.Task[None]]) -> None:
        await supervise.end(*reading)

    def _restart(self, place: str) -> None:
        """A blocked read does not learn of a new stream: end it (this costs the connection) and begin another."""
        if place in self._reading:
            self._reading[place].cancel()
        self._reading[place] = supervise.restarted(
            lambda: self._read(place),
            "reading of wake-ups",
            clock=self._clock,
            longest_pause=self._store.settings.lease / 5,
            on_mistake=lambda _: self._look_for_yourselves(self._streams_of(place)),
        )

    def _streams_of(self, place: str) -> list[str]:
        return [key for key in self._cursors if self._store.place_of(key) == place]

    def _look_for_yourselves(self, streams: Iterable[str]) -> None:
        """Hints may be missing: make every waiter look again."""
        for key in streams:
            self._push(key, Hint(self.cursor(key), "lost"))

    async def _read(self, place: str) -> None:
        reader = self._store.reader()
        backoff = Backoff(_FIRST_PAUSE, self._store.settings.lease / 5)
        try:
            while True:
                streams = {key: "{}-{}".format(*self._cursors[key]) for key in self._streams_of(place)}
                try:
                    with self._store.errors():
                        reply = await reader.xread(
                            streams, count=_BATCH, block=round(self._store.settings.reader_block * 1000)
                        )
                    backoff.reset()
                    self._hand_out(reply)
                    for _ in range(_TURNS):
                        await asyncio.sleep(0)
                except StoreError as error:
                    if not backoff.failing:
                        logger.warning("wake-ups interrupted: {}", error)
                    self._look_for_yourselves(streams)
                    if isinstance(error, StoreCorrupt):
                        await self._take_away_what_is_no_stream(streams)
                    await self._clock.sleep(backoff.next_pause())
        finally:
            await reader.aclose()

    async def _take_away_what_is_no_stream(self, keys: Iterable[str]) -> None:
        """Delete keys that are no streams: one would stop the hints of all groups of this process. Hints may be lost."""
        try:
            for key in keys:
                with self._store.errors():
                    kind: bytes = await self._store.commands.type(key)
                if kind not in (b"none", b"stream"):
                    await self._store.append_if_possible(key, ())
        except StoreError:
            pass  # the next read reports it

    def _hand_out(self, reply: Any) -> None:  # noqa: ANN401  the driver's shape: [[key, [(id, fields)]]]
        for key, entries in stream_entries(reply):
            for entry_id, fields in entries:
                hint = decode_hint(entry_id, fields)
                _trace("wake-up on {}", partial(told, key, hint))
                if key in self._cursors:
                    self._cursors[key] = hint.id
                    self._remember(key, hint)
                self._push(key, hint)

    def _remember(self, key: str, hint: Hint) -> None:
        """Hold a hint for waiters with an older picture. For a picture that is older than a lease, the stream is read again instead."""
        recent, oldest = self._recent[key], hint.id[0] - round(self._store.settings.lease * 1000)
        recent.append(hint)
        while len(recent) > _BUFFERED or recent[0].id[0] < oldest:
            self._origins[key] = recent.popleft().id

    def _push(self, key: str, hint: Hint) -> None:
        for subscription in self._subscriptions.get(key, ()):
            subscription.push(hint)

"""Time that stands still until the test moves it."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Awaitable
from typing import TypeVar

from barrier.plain import number
from barrier.testing.waiting import settle, wait_until

__all__ = ["ManualClock", "T"]


T = TypeVar("T")

_NEWS_FROM_OUTSIDE = 2.0
"""Real seconds to wait for a real server or process when nobody sleeps on the clock."""


class ManualClock:
    """A `barrier.Clock` that the test moves: a test of an hour-long timeout takes a millisecond.

    Give the same clock to the code under test and to `FakeStore`: leases, BLOCK and the scripts' TIME then follow it too.

    Args:
        start: what `now` says first, in seconds.
    """

    def __init__(self, start: float = 1_000.0) -> None:
        self._now = start
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def now(self) -> float:
        """Seconds; moves only when the test says so."""
        return self._now

    async def sleep(self, seconds: float) -> None:
        """Return when the clock has been moved that far; 0 or less yields once."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        woken = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now + seconds, next(self._order), woken))
        await woken

    async def wait_for(self, awaitable: Awaitable[T], seconds: float) -> T:
        """Await with a deadline on this clock; raises `TimeoutError` and cancels the awaitable when it passes."""
        work = asyncio.ensure_future(awaitable)
        alarm = asyncio.ensure_future(self.sleep(seconds))
        try:
            await asyncio.wait((work, alarm), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise TimeoutError
        finally:
            for task in (work, alarm):
                if not task.done():
                    task.cancel()
            await asyncio.gather(work, alarm, return_exceptions=True)

    @property
    def next_deadline(self) -> float | None:
        """When the next sleeper is due; ``None`` if nobody sleeps."""
        while self._sleepers and self._sleepers[0][2].done():
            heapq.heappop(self._sleepers)  # cancelled meanwhile
        return self._sleepers[0][0] if self._sleepers else None

    async def advance(self, seconds: float) -> None:
        """Move time forward. At every sleeper's deadline on the way, in order, let all tasks come to rest.

        Raises:
            ValueError: seconds is below 0.
        """
        if seconds < 0:
            raise ValueError(f"time does not go back: advance was asked for {number(seconds)} s")
        target = self._now + seconds
        await settle()
        while (deadline := self.next_deadline) is not None and deadline <= target:
            await self._wake(deadline)
        self._now = target
        await settle()

    def jump(self, seconds: float) -> None:
        """Let time pass while nothing runs, as for a stopped process: sleepers find out late, at the next `advance`."""
        self._now += seconds

    async def run(self, awaitable: Awaitable[T], *, limit: float = 86_400.0) -> T:
        """Await something while time jumps from one sleeper's deadline to the next whenever nothing else can run.

        Args:
            awaitable: what to wait for.
            limit: seconds of this clock after which to give up.

        Raises:
            AssertionError: `limit` passed, or nobody sleeps and nothing happens any more, so that it would never end.
        """
        end = self._now + limit
        task = asyncio.ensure_future(awaitable)
        try:
            while True:
                await settle()
                if task.done():
                    return task.result()
                deadline = self.next_deadline
                if deadline is None:
                    await wait_until(
                        lambda: task.done() or self.next_deadline is not None,
                        "something to happen: nobody sleeps on the manual clock",
                        _NEWS_FROM_OUTSIDE,
                    )
                elif deadline > end:
                    raise AssertionError(f"not finished after {number(limit)} s of the manual clock")
                else:
                    await self._wake(deadline)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _wake(self, deadline: float) -> None:
        _, _, woken = heapq.heappop(self._sleepers)
        self._now = max(self._now, deadline)
        woken.set_result(None)
        await settle()

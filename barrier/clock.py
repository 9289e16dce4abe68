"""Time as an object that is passed in: a test of an hour-long timeout takes a millisecond."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Protocol, TypeVar

__all__ = ["Clock", "SystemClock", "T"]


T = TypeVar("T")


class Clock(Protocol):
    """A monotonic clock and the two ways of waiting on it. All values in seconds."""

    def now(self) -> float:
        """Seconds since some fixed moment; never goes back. Counts while the machine sleeps, if the system can do that."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after so many seconds; 0 or less yields once."""
        ...

    async def wait_for(self, awaitable: Awaitable[T], seconds: float) -> T:
        """Await with a deadline; raises `TimeoutError` and cancels the awaitable when it passes."""
        ...


class SystemClock:
    """The machine's own clock.

    On Linux this is CLOCK_BOOTTIME: unlike CLOCK_MONOTONIC it counts the time for which a laptop was suspended, since
    its leases lapse meanwhile.
    """

    def __init__(self) -> None:
        self._clock_id = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

    def now(self) -> float:
        """Seconds since boot."""
        return time.clock_gettime(self._clock_id)

    async def sleep(self, seconds: float) -> None:
        """Sleep on the running event loop."""
        await asyncio.sleep(seconds)

    async def wait_for(self, awaitable: Awaitable[T], seconds: float) -> T:
        """Await with a deadline on the running event loop."""
        async with asyncio.timeout(seconds):
            return await awaitable

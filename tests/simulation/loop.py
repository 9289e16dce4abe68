"""An event loop with virtual time, in which a seed chooses the next callback, with processes that can be stopped or killed.

Any callback that is ready may run next. asyncio runs them in order of arrival; this loop permutes them, which includes all orders
of real machines. A *process* is all code that runs in one context. Its callbacks can be held back (SIGSTOP) or dropped (SIGKILL).
"""

# pyright: reportPrivateUsage=false, reportAttributeAccessIssue=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
# The workings of asyncio's loops, which this one replaces, are private and untyped.
from __future__ import annotations

import asyncio
import contextvars
import heapq
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar
from zlib import crc32

T = TypeVar("T")

PROCESS: contextvars.ContextVar[str] = contextvars.ContextVar("PROCESS", default="")

START = 1_000.0
"""What the loop's time begins with, in virtual seconds."""

MOST_STEPS_AT_ONE_INSTANT = 20_000


class Stuck(AssertionError):
    """Nothing is ready and nothing is scheduled: everybody waits for ever."""


class SeededLoop(asyncio.SelectorEventLoop):
    """See the module.

    Args:
        rng: draws which of the ready callbacks runs next.
        traced: whether to sum up in `trace` which callbacks ran, in which order and when: two histories are the same step for step
            exactly when their sums are.
    """

    def __init__(self, rng: random.Random, *, traced: bool = False) -> None:
        super().__init__()
        self._draw = rng.random
        self._now = START
        self._ready: list[asyncio.Handle] = []
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._timers_set = 0
        self._stopped: dict[str, list[asyncio.Handle]] = {}
        self._killed: set[str] = set()
        self._dropped: list[asyncio.Handle] = []
        self._kept: list[asyncio.Task[Any]] = []  # a task that nobody else refers to must not vanish in the middle
        self._alarm_at = -1
        self._alarmed = asyncio.Event()
        self.steps = 0
        self._still, self._moved_at = 0, 0.0
        self._traced = traced
        self.trace = 0
        self.set_exception_handler(lambda _loop, _context: None)

    def time(self) -> float:
        """Virtual seconds."""
        return self._now

    # --- what asyncio does, without its checks: half of a simulation's time was spent here ----------------------------------

    def call_soon(
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """As asyncio's."""
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # there is one thread

    def call_at(
        self, when: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """As asyncio's."""
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._timers_set += 1
        heapq.heappush(self._timers, (when, self._timers_set, timer))
        return timer

    def create_task(self, *args: Any, **kwargs: Any) -> asyncio.Task[Any]:
        """Create a task, and keep it until the end of the history."""
        task = super().create_task(*args, **kwargs)
        self._kept.append(task)
        return task

    # --- processes ----------------------------------------------------------------------------------------------------

    def spawn(self, process: str, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a process."""
        context = contextvars.copy_context()
        context.run(PROCESS.set, process)
        return self.create_task(work, context=context)

    def stop_process(self, process: str) -> None:
        """SIGSTOP: nothing of it runs, while its timers pass."""
        self._stopped.setdefault(process, [])

    def continue_process(self, process: str) -> None:
        """SIGCONT."""
        self._ready.extend(self._stopped.pop(process, []))

    def kill_process(self, process: str) -> None:
        """SIGKILL: nothing of it ever runs again, no ``finally`` either."""
        self._killed.add(process)
        self._dropped.extend(self._stopped.pop(process, []))

    def is_stopped(self, process: str) -> bool:
        """Whether a process is stopped now."""
        return process in self._stopped

    def is_killed(self, process: str) -> bool:
        """Whether a process was killed."""
        return process in self._killed

    async def after_steps(self, steps: int) -> None:
        """Wait for so many steps of anybody. One waiter at a time."""
        self._alarmed.clear()
        self._alarm_at = self.steps + steps
        try:
            await self._alarmed.wait()
        finally:
            self._alarm_at = -1

    def unfinished(self) -> list[asyncio.Task[Any]]:
        """The tasks that have not ended, oldest first."""
        return [task for task in self._kept if not task.done()]

    def bury(self) -> None:
        """At the end of a history: let everything run again, so that it can be cancelled in good order."""
        self._killed.clear()
        self._ready.extend(self._dropped)
        self._dropped.clear()
        for process in list(self._stopped):
            self.continue_process(process)

    def close(self) -> None:
        """Close, and let go of everything."""
        super().close()
        self._kept.clear()
        self._timers.clear()
        self._dropped.clear()

    # --- the schedule -------------------------------------------------------------------------------------------------

    def _run_once(self) -> None:
        """One callback: a ready one that the seed draws; when none is, time jumps to the next timer."""
        ready, timers = self._ready, self._timers
        while True:
            while timers and (timers[0][0] <= self._now or timers[0][2]._cancelled):
                timer = heapq.heappop(timers)[2]
                if not timer._cancelled:
                    ready.append(timer)
            if not ready:
                if not timers:
                    raise Stuck("everybody waits for ever")
                self._now = timers[0][0]
                continue
            index = int(self._draw() * len(ready))
            handle = ready[index]
            ready[index] = ready[-1]
            ready.pop()
            if handle._cancelled or ((self._killed or self._stopped) and self._holds_back(handle)):
                continue
            break
        self.steps += 1
        if self.steps == self._alarm_at:
            self._alarmed.set()
        if self._now > self._moved_at:
            self._still, self._moved_at = 0, self._now
        else:
            self._still += 1
            if self._still > MOST_STEPS_AT_ONE_INSTANT:
                raise Stuck(f"{self._still} steps without time passing: somebody runs in circles, at last {handle}")
        if self._traced:
            name = getattr(handle._callback, "__qualname__", type(handle._callback).__name__)
            self.trace = crc32(f"{self._now} {handle._context.get(PROCESS, '')} {name}".encode(), self.trace)
        handle._run()

    def _holds_back(self, handle: asyncio.Handle) -> bool:
        """Put aside what belongs to a stopped process, and drop what belongs to a killed one."""
        process = handle._context.get(PROCESS, "")
        if process in self._killed:
            self._dropped.append(handle)
            return True
        if process in self._stopped:
            self._stopped[process].append(handle)
            return True
        return False


class LoopClock:
    """A loop's virtual time as a `barrier.Clock`."""

    def __init__(self, loop: SeededLoop) -> None:
        self._loop = loop

    def now(self) -> float:
        """Virtual seconds."""
        return self._loop.time()

    async def sleep(self, seconds: float) -> None:
        """Sleep in virtual time."""
        await asyncio.sleep(max(seconds, 0))

    async def wait_for(self, awaitable: Awaitable[T], seconds: float) -> T:
        """Await with a deadline in virtual time."""
        async with asyncio.timeout(seconds):
            return await awaitable

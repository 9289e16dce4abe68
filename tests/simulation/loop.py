"""An event loop whose time is virtual and whose next step is drawn by a seed, with processes that can be stopped or killed.

Every callback that is ready may run next: what asyncio runs in order of arrival is permuted here, which is a superset of what
real machines do. A *process* is whatever runs in one context: its callbacks can be held back (SIGSTOP) or dropped (SIGKILL).
"""

# pyright: reportPrivateUsage=false, reportAttributeAccessIssue=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
# The workings of asyncio's loops, which this one replaces, are private and untyped.
from __future__ import annotations

import asyncio
import contextvars
import heapq
import random
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

PROCESS: contextvars.ContextVar[str] = contextvars.ContextVar("PROCESS", default="")


MOST_STEPS_AT_ONE_INSTANT = 20_000


class Stuck(AssertionError):
    """Nothing is ready and nothing is scheduled: everybody waits for ever."""


class SeededLoop(asyncio.SelectorEventLoop):
    """See the module."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng
        self._now = 1_000.0
        self._stopped: dict[str, list[asyncio.Handle]] = {}
        self._killed: set[str] = set()
        self._dropped: list[asyncio.Handle] = []
        self._kept: list[object] = []  # what nobody else refers to must not be collected in the middle of a history
        self.steps = 0
        self._still, self._moved_at = 0, 0.0
        self.set_exception_handler(lambda _loop, _context: None)

    def time(self) -> float:
        """Virtual seconds."""
        return self._now

    def spawn(self, process: str, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a process."""
        context = contextvars.copy_context()
        context.run(PROCESS.set, process)
        return self.create_task(work, context=context)

    def create_task(self, *args: Any, **kwargs: Any) -> asyncio.Task[Any]:
        """Create a task, and keep it until the end of the history."""
        task = super().create_task(*args, **kwargs)
        self._kept.append(task)
        return task

    def stop_process(self, process: str) -> None:
        """SIGSTOP: nothing of it runs, while its timers pass."""
        self._stopped.setdefault(process, [])

    def continue_process(self, process: str) -> None:
        """SIGCONT."""
        self._ready.extend(self._stopped.pop(process, []))

    def kill_process(self, process: str) -> None:
        """SIGKILL: nothing of it ever runs again, no ``finally`` either."""
        self._killed.add(process)
        self._stopped.pop(process, None)

    def is_stopped(self, process: str) -> bool:
        """Whether a process is stopped now."""
        return process in self._stopped

    def is_killed(self, process: str) -> bool:
        """Whether a process was killed."""
        return process in self._killed

    def bury(self) -> None:
        """At the end of a history: let everything run again, so that it can be cancelled in good order."""
        self._killed.clear()
        self._ready.extend(self._dropped)
        self._dropped.clear()
        for process in list(self._stopped):
            self.continue_process(process)

    def _run_once(self) -> None:
        """One callback: a ready one that the seed draws; when none is, time jumps to the next timer."""
        while True:
            self._collect_due()
            index = self._draw()
            if index is not None:
                break
            if not self._scheduled:
                raise Stuck("everybody waits for ever")
            self._now = max(self._now, self._scheduled[0].when())
        handle = self._ready[index]
        del self._ready[index]
        self.steps += 1
        self._still = 0 if self._now > self._moved_at else self._still + 1
        self._moved_at = self._now
        if self._still > MOST_STEPS_AT_ONE_INSTANT:
            raise Stuck(f"{self._still} steps without time passing: somebody runs in circles, at last {handle}")
        if not handle._cancelled:
            handle._run()

    def _collect_due(self) -> None:
        while self._scheduled:
            timer = self._scheduled[0]
            if timer._cancelled:
                heapq.heappop(self._scheduled)
                timer._scheduled = False
                self._timer_cancelled_count = max(0, self._timer_cancelled_count - 1)
            elif timer.when() <= self._now:
                heapq.heappop(self._scheduled)
                timer._scheduled = False
                self._ready.append(timer)
            else:
                return

    def _draw(self) -> int | None:
        """The place of a callback that may run; those of stopped processes are put aside, those of killed ones dropped."""
        while self._ready:
            index = self._rng.randrange(len(self._ready))
            process = self._ready[index]._context.get(PROCESS, "")
            if process in self._killed:
                self._dropped.append(self._ready[index])
                del self._ready[index]
            elif process in self._stopped:
                self._stopped[process].append(self._ready[index])
                del self._ready[index]
            else:
                return index
        return None


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

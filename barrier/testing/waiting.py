"""Waiting for a condition in a test, and for the event loop to come to rest."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import TypeVar

from barrier.plain import number

__all__ = ["T", "settle", "wait_until"]


T = TypeVar("T")

_EAGER_LOOKS = 500
_PAUSE = 0.001  # seconds; only once the condition clearly depends on another process
_MAX_TURNS = 10_000


async def wait_until(
    predicate: Callable[[], T | Awaitable[T]],
    what: str,
    timeout: float = 5.0,  # noqa: ASYNC109  its passing is a failure that names `what`, not a cancellation
) -> T:
    """Look again and again until the predicate, which may be a coroutine function, gives something true; return that.

    Other tasks run between two looks. This sleeps only after many looks, when the condition seems to depend on another
    process.

    Args:
        predicate: the condition.
        what: what is waited for, as the end of the sentence "waited … for".
        timeout: real seconds after which to give up, whatever a `ManualClock` says.

    Raises:
        AssertionError: it did not come true in time; the message names `what` and the last value.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    looks = 0
    while True:
        found = predicate()
        value: T = await found if inspect.isawaitable(found) else found  # pyright: ignore[reportAssignmentType]  a T that is awaitable is not told apart
        if value:
            return value
        if loop.time() >= deadline:
            raise AssertionError(f"waited {number(timeout)} s for {what}; the last look gave {value!r}")
        looks += 1
        await asyncio.sleep(0 if looks < _EAGER_LOOKS else _PAUSE)


async def settle() -> None:
    """Let every other task run until each of them waits for time to pass, or for something from outside.

    After Trio's ``wait_all_tasks_blocked``. Gives up silently after 10,000 turns: a task that spins never comes to rest.
    """
    # There is no public way to ask whether a loop has anything left to run; other loops than asyncio's own get plain turns.
    ready = getattr(asyncio.get_running_loop(), "_ready", None)
    for turn in range(_MAX_TURNS if ready is not None else 200):
        await asyncio.sleep(0)
        if ready is not None and not ready and turn >= 2:
            return

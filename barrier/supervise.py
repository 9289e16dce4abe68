"""Every task that runs by itself has an owner that hears its end, and a mistake of ours never ends one without a word.

A mistake of ours is an exception that nobody expects. It goes to the log with its type and its frames (file, line, function) and
without its text, which may quote a prompt; no value of a variable is told either. It is told once, however many owners it passes.

- `background`: nobody awaits it. Its owner says what ends with it (`on_mistake`).
- `restarted`: as `background`, for a watch that must not end: a mistake is told, and it begins anew after a pause that grows.
- `keep_going`: the same, awaited.
- `alongside`: awaited by the block that began it, and over when the block is. What the block does not raise itself is told.
- `guarded`: a callback that the event loop, a thread or a foreign library calls.
- `passed_over`: one of many that must not hold up the others.
- `end`: cancel tasks and wait for their ends, in place of ``gather(return_exceptions=True)``, which would swallow them.

`asyncio.TaskGroup` is the better owner where all parts are to end together and their errors may come out as a group.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import PurePath
from typing import Any, ParamSpec, TypeAlias, TypeVar, cast

from barrier.backoff import Backoff
from barrier.clock import Clock
from barrier.errors import RankgateError
from barrier.log import logger

__all__ = [
    "Expected",
    "P",
    "T",
    "alongside",
    "background",
    "described",
    "end",
    "ends_of",
    "guarded",
    "hear_loop",
    "keep_going",
    "passed_over",
    "restarted",
    "tell_mistake",
]


T = TypeVar("T")
P = ParamSpec("P")
Expected: TypeAlias = tuple[type[BaseException], ...]

_FRAMES = 16  # of each exception, innermost first
_CHAIN = 4  # exceptions: what was raised, its cause, the cause of that
_MEMBERS = 4  # of an exception group
_FIRST_PAUSE = 0.05  # seconds

_OURS: set[asyncio.Task[Any]] = set()
"""An event loop keeps no task alive by itself."""


def described(error: BaseException) -> str:
    """Name an exception by its type and the place where it was raised, without its text."""
    if members := _members(error):
        told = ", ".join(described(one) for one in members[:_MEMBERS])
        return f"{type(error).__name__} of {told}{', …' if len(members) > _MEMBERS else ''}"
    places = _places(error)
    return type(error).__name__ + (f" at {places[0]}" if places else "")


def tell_mistake(what: str, error: BaseException) -> None:
    """Log a mistake of ours with its frames, unless this exception was told before.

    Args:
        what: what has ended or gone wrong, as the subject of a sentence.
        error: the mistake.
    """
    if vars(error).get("_rankgate_told"):
        return
    vars(error)["_rankgate_told"] = True
    chain: list[str] = []
    one: BaseException | None = error
    while one is not None and len(chain) < _CHAIN:
        chain.append(f"{type(one).__name__} [{' < '.join(_places(one))}]")
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    logger.error("{}: a mistake of ours: {}; frames: {}", what, described(error), ", from ".join(chain))
    for member in _members(error)[:_MEMBERS]:
        tell_mistake(what, member)


def _members(error: BaseException) -> tuple[BaseException, ...]:
    """The exceptions of a group."""
    return cast("BaseExceptionGroup[BaseException]", error).exceptions if isinstance(error, BaseExceptionGroup) else ()


def _places(error: BaseException) -> list[str]:
    """The frames, innermost first."""
    found = [
        f"{'/'.join(PurePath(frame.f_code.co_filename).parts[-3:])}:{line} in {frame.f_code.co_name}"
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    found.reverse()
    return found[:_FRAMES]


def background(
    doing: Coroutine[Any, Any, T],
    name: str,
    *,
    on_mistake: Callable[[BaseException], object],
    expected: Expected = (),
) -> asyncio.Task[T]:
    """Begin a task that nobody awaits; its end is heard.

    Args:
        doing: what it does.
        name: what it is, for the log.
        on_mistake: ends in a named way what depends on it. Called after the mistake was told.
        expected: exceptions that may end it, and of which its owner learns otherwise.
    """
    task = asyncio.create_task(doing, name=f"rankgate {name}")
    _OURS.add(task)

    def over(task: asyncio.Task[T]) -> None:
        _OURS.discard(task)
        mistake = _mistake_of(task, expected)
        if mistake is not None:
            tell_mistake(name, mistake)
            guarded(f"{name}, ending what depends on it", on_mistake)(mistake)

    task.add_done_callback(over)
    return task


def restarted(
    doing: Callable[[], Coroutine[Any, Any, object]],
    name: str,
    *,
    clock: Clock,
    longest_pause: float,
    on_mistake: Callable[[BaseException], object] = lambda _: None,
) -> asyncio.Task[None]:
    """Begin a task that nobody awaits and that must go on: after a mistake, which is told, it begins anew.

    Args:
        doing: makes what it does; where that returns, the task is over.
        name: what it is, for the log.
        clock: time.
        longest_pause: seconds between two tries, at most; the first pauses are shorter.
        on_mistake: told every mistake, also one that is like the last one and therefore not in the log again.
    """
    going = keep_going(doing, name, clock=clock, longest_pause=longest_pause, on_mistake=on_mistake)
    return background(going, name, on_mistake=on_mistake)


async def keep_going(
    doing: Callable[[], Coroutine[Any, Any, object]],
    name: str,
    *,
    clock: Clock,
    longest_pause: float,
    on_mistake: Callable[[BaseException], object] = lambda _: None,
) -> None:
    """Do what `restarted` does, without a task of its own."""
    backoff, last = Backoff(_FIRST_PAUSE, longest_pause), ""
    while True:
        began = clock.now()
        try:
            await doing()
            return
        except (Exception, asyncio.CancelledError) as error:
            own = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and own is not None and own.cancelling():
                raise
            if clock.now() - began > 2 * longest_pause:
                backoff.reset()
                last = ""
            if described(error) != last:
                tell_mistake(f"{name}, which begins anew", error)
            last = described(error)
            guarded(f"{name}, telling of its mistake", on_mistake)(error)
        await clock.sleep(backoff.next_pause())


@asynccontextmanager
async def alongside(
    doing: Awaitable[T], name: str = "", *, expected: Expected = (RankgateError,)
) -> AsyncGenerator[asyncio.Task[T]]:
    """A task for as long as a block lasts. The block takes its result; a mistake that the block does not raise is told.

    Args:
        doing: what it does.
        name: what it is, for the log; the coroutine's own name where not given.
        expected: exceptions that are no mistakes.
    """
    name = name or getattr(doing, "__qualname__", "a task")
    coroutine = cast("Coroutine[Any, Any, T]", doing) if asyncio.iscoroutine(doing) else _awaited(doing)
    task = asyncio.create_task(coroutine, name=f"rankgate {name}")
    raised: BaseException | None = None
    try:
        yield task
    except BaseException as error:
        raised = error
        raise
    finally:
        try:
            await _ended([task])
        finally:
            mistake = _mistake_of(task, expected) if task.done() else None
            if mistake is not None and mistake is not raised:
                tell_mistake(name, mistake)


async def _awaited(doing: Awaitable[T]) -> T:
    return await doing


@contextmanager
def passed_over(what: str) -> Generator[None]:
    """A mistake inside is told and goes no further; what is expected does."""
    try:
        yield
    except RankgateError:
        raise
    except Exception as error:  # noqa: BLE001  whatever the mistake is
        tell_mistake(what, error)


async def ends_of(*tasks: asyncio.Task[T]) -> list[T | BaseException]:
    """Wait until tasks are over; what they returned or raised, for the caller to look at. Cancelled with it."""
    return await asyncio.gather(*tasks, return_exceptions=True)


async def end(*tasks: asyncio.Task[Any] | None, expected: Expected = (RankgateError,)) -> None:
    """Cancel tasks and wait until they are over. A mistake that comes up is told, unless it was; nothing is raised but a cancellation.

    Args:
        tasks: which; ``None`` for one that there is not.
        expected: exceptions that are no mistakes.
    """
    own = asyncio.current_task()
    there = [task for task in tasks if task is not None and task is not own]
    if not there:
        return
    try:
        await _ended(there)
    finally:
        for task in there:
            mistake = _mistake_of(task, expected) if task.done() else None
            if mistake is not None:
                tell_mistake(task.get_name().removeprefix("rankgate "), mistake)


async def _ended(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    if all(task.done() for task in tasks):
        return  # not a turn of the event loop later than need be
    # Unlike asyncio.wait it waits for them also where it is cancelled itself. Their ends are looked at by whoever calls this.
    await asyncio.gather(*tasks, return_exceptions=True)


def _mistake_of(task: asyncio.Task[Any], expected: Expected) -> BaseException | None:
    """What ended a task that is done, if nobody expects it: an exception, or a cancellation that nobody asked for."""
    try:
        error = task.exception()
    except asyncio.CancelledError as cancelled:
        return None if task.cancelling() else cancelled
    return None if error is None or isinstance(error, (*expected, KeyboardInterrupt, SystemExit)) else error


def guarded(
    what: str, callback: Callable[P, object], on_mistake: Callable[[BaseException], object] | None = None
) -> Callable[P, None]:
    """A callback that raises nothing: a mistake in it is told, and then handed to `on_mistake`.

    Args:
        what: what it does, as the subject of a sentence.
        callback: what is called.
        on_mistake: ends in a named way what depends on it.
    """

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            callback(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  whatever the mistake is
            tell_mistake(what, error)
            if on_mistake is not None:
                guarded(f"{what}, ending what depends on it", on_mistake)(error)

    return call


def hear_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Tell what the event loop itself catches, such as a failed callback, in our way: its own way prints the text of the exception."""

    def heard(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, BaseException):
            tell_mistake("a callback or a forgotten task of the event loop", error)
        else:
            logger.error("the event loop says: {}", str(context.get("message", "nothing"))[:200])

    loop.set_exception_handler(heard)

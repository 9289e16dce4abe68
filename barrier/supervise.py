"""Every background task has an owner that learns of its end. A mistake of ours never ends a task without a log line.

A mistake of ours is an exception that nobody expects. The log gets its type and its frames (file, line, function). It
gets neither the text, which may quote a prompt, nor the values of variables. A mistake is logged once, however many
owners it passes.

- `background`: a task that nobody awaits. Its owner ends what depends on it (`on_mistake`).
- `restarted`: a `background` task that must not end. A mistake is logged, and the task begins anew after a pause that
  grows.
- `keep_going`: the same, awaited.
- `alongside`: a task that lasts as long as a block. A mistake that the block does not raise is logged.
- `guarded`: a callback that the event loop, a thread or a foreign library calls.
- `passed_over`: one of several actions; its mistake does not stop the others.
- `end`: cancel tasks and wait for their ends. Used in place of ``gather(return_exceptions=True)``, which would hide
  mistakes.

`asyncio.TaskGroup` is the better owner if all parts end together and their errors may be raised as a group.
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
"""The running tasks. An event loop keeps no reference to a task, so Python could collect it."""


def described(error: BaseException) -> str:
    """Name an exception by its type and the place where it was raised, without its text."""
    if members := _members(error):
        told = ", ".join(described(one) for one in members[:_MEMBERS])
        return f"{type(error).__name__} of {told}{', …' if len(members) > _MEMBERS else ''}"
    places = _places(error)
    return type(error).__name__ + (f" at {places[0]}" if places else "")


def tell_mistake(what: str, error: BaseException) -> None:
    """Log a mistake of ours with its frames, unless this exception was logged before.

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
    """Begin a task that nobody awaits; its owner learns of its end.

    Args:
        doing: what it does.
        name: what it is, for the log.
        on_mistake: ends what depends on the task, with a named error. Called after the mistake was logged.
        expected: exceptions that may end it; its owner learns of them in another way.
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
    """Begin a task that nobody awaits and that must go on. After a mistake, which is logged, it begins anew.

    Args:
        doing: makes the coroutine; if that returns, the task is over.
        name: what it is, for the log.
        clock: time.
        longest_pause: seconds between two tries, at most; the first pauses are shorter.
        on_mistake: called with every mistake, also with one that is like the last one and not logged again.
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
    """Run a task for as long as a block lasts. The block takes its result. A mistake that the block does not raise is logged.

    Args:
        doing: what it does.
        name: what it is, for the log; by default the coroutine's own name.
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
    """Log a mistake inside and raise it no further; raise an expected error."""
    try:
        yield
    except RankgateError:
        raise
    except Exception as error:  # noqa: BLE001  whatever the mistake is
        tell_mistake(what, error)


async def ends_of(*tasks: asyncio.Task[T]) -> list[T | BaseException]:
    """Wait until tasks are over; return what each returned or raised. A cancellation of the caller cancels them."""
    return await asyncio.gather(*tasks, return_exceptions=True)


async def end(*tasks: asyncio.Task[Any] | None, expected: Expected = (RankgateError,)) -> None:
    """Cancel tasks and wait until they are over. A mistake is logged, unless it was before. Raises nothing but a cancellation.

    Args:
        tasks: the tasks; ``None`` is ignored.
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
        return  # without another turn of the event loop
    # Unlike asyncio.wait, gather waits for the tasks even when it is cancelled itself. The caller looks at their ends.
    await asyncio.gather(*tasks, return_exceptions=True)


def _mistake_of(task: asyncio.Task[Any], expected: Expected) -> BaseException | None:
    """The mistake that ended a task: an exception that nobody expects, or a cancellation that nobody asked for."""
    try:
        error = task.exception()
    except asyncio.CancelledError as cancelled:
        return None if task.cancelling() else cancelled
    return None if error is None or isinstance(error, (*expected, KeyboardInterrupt, SystemExit)) else error


def guarded(
    what: str, callback: Callable[P, object], on_mistake: Callable[[BaseException], object] | None = None
) -> Callable[P, None]:
    """A callback that raises nothing: a mistake in it is logged, and then passed to `on_mistake`.

    Args:
        what: what it does, as the subject of a sentence.
        callback: what is called.
        on_mistake: ends what depends on it, with a named error.
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
    """Log what the event loop itself catches, such as a failed callback, without the exception's text, which asyncio would print."""

    def heard(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, BaseException):
            tell_mistake("a callback or a forgotten task of the event loop", error)
        else:
            logger.error("the event loop says: {}", str(context.get("message", "nothing"))[:200])

    loop.set_exception_handler(heard)

"""No task of ours ends without a word, and no word of it is the exception's own."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from itertools import pairwise
from typing import NoReturn

import pytest

from barrier import StoreUnavailable
from barrier.supervise import alongside, background, described, end, guarded, hear_loop, restarted, tell_mistake
from barrier.testing import ManualClock, wait_until
from barrier.testing.waiting import settle
from tests.unit.mistakes import SECRET, Heard, Injected, hearing, mistaken, mistaken_later

pytestmark = pytest.mark.anyio


def raised_by(make: Callable[[], object]) -> Exception:
    with pytest.raises(Injected) as raised:
        make()
    return raised.value


def test_a_mistake_is_told_with_type_and_frames_and_without_its_text() -> None:
    def inner() -> None:
        mistaken()

    with hearing() as heard:
        tell_mistake("the heartbeat", raised_by(inner))
    heard.check("the heartbeat: ")
    assert "in mistaken < " in heard.lines[0]
    assert "in inner < " in heard.lines[0]


def test_a_mistake_is_told_once_however_many_hear_of_it() -> None:
    error = raised_by(mistaken)
    with hearing() as heard:
        tell_mistake("one owner", error)
        tell_mistake("another owner", error)
    assert len(heard.lines) == 1


def test_what_caused_a_mistake_is_told_too() -> None:
    def wrapped() -> NoReturn:
        try:
            mistaken()
        except Injected as error:
            raise LookupError(SECRET) from error
        raise AssertionError

    with pytest.raises(LookupError) as raised:
        wrapped()
    with hearing() as heard:
        tell_mistake("it", raised.value)
    assert "LookupError [" in heard.lines[0]
    assert ", from Injected [" in heard.lines[0]
    assert "murderer" not in heard.lines[0]


def test_the_members_of_a_group_are_told() -> None:
    group = ExceptionGroup(SECRET, [raised_by(mistaken), ValueError(SECRET)])
    with hearing() as heard:
        tell_mistake("it", group)
    assert described(group).startswith("ExceptionGroup of Injected at ")
    assert [line for line in heard.lines if line.startswith("it: a mistake of ours: Injected at ")]
    assert not [line for line in heard.lines if "murderer" in line]


def test_a_deep_mistake_is_told_in_bounded_length() -> None:
    def deep(depth: int) -> None:
        mistaken() if depth == 0 else deep(depth - 1)

    with hearing() as heard:
        tell_mistake("it", raised_by(lambda: deep(500)))
    assert len(heard.lines[0]) < 4_000


async def test_the_end_of_a_background_task_is_heard_and_ends_what_depends_on_it() -> None:
    ended: list[BaseException] = []
    with hearing() as heard:
        task = background(mistaken_later(), "the part", on_mistake=ended.append)
        await asyncio.wait({task})
        await settle()
    heard.check("the part: ")
    assert [type(error) for error in ended] == [Injected]


async def test_what_ends_the_dependent_may_make_a_mistake_too() -> None:
    with hearing() as heard:
        await asyncio.wait({background(mistaken_later(), "the part", on_mistake=mistaken)})
        await settle()
    heard.check("the part: ")
    heard.check("the part, ending what depends on it: ")


async def test_a_background_task_that_ends_as_expected_says_nothing() -> None:
    async def unavailable() -> None:
        raise StoreUnavailable("no answer")

    ended: list[BaseException] = []
    with hearing() as heard:
        task = background(unavailable(), "the part", on_mistake=ended.append, expected=(StoreUnavailable,))
        await end(task)
        await end(background(asyncio.sleep(60), "the part", on_mistake=ended.append))
    assert (heard.lines, ended) == ([], [])


async def test_a_cancellation_that_nobody_asked_for_is_a_mistake() -> None:
    async def cancelled_inside() -> None:
        raise asyncio.CancelledError

    ended: list[BaseException] = []
    with hearing() as heard:
        task = background(cancelled_inside(), "the part", on_mistake=ended.append)
        await asyncio.wait({task})
        await settle()
    assert "the part: a mistake of ours: CancelledError at" in heard.lines[0]
    assert len(ended) == 1


async def test_a_background_task_is_kept_alive_though_nobody_holds_it() -> None:
    seen: list[str] = []

    async def forgotten() -> None:
        await asyncio.sleep(0)
        seen.append("it went on")

    background(forgotten(), "the part", on_mistake=mistaken)
    gc.collect()
    await wait_until(lambda: seen, "the task that nobody holds")


async def test_a_mistake_in_the_clean_up_of_a_task_that_is_ended_is_heard() -> None:
    async def stubborn() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            mistaken()

    with hearing() as heard:
        task = asyncio.create_task(stubborn(), name="rankgate stubborn")
        await asyncio.sleep(0)
        await end(task, None, asyncio.current_task())
    heard.check("stubborn: ")


async def test_a_mistake_is_heard_though_whoever_ends_the_task_is_cancelled() -> None:
    entered = asyncio.Event()

    async def stubborn() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            entered.set()
            try:
                await asyncio.sleep(60)
            finally:
                mistaken()

    with hearing() as heard:
        task = asyncio.create_task(stubborn(), name="rankgate stubborn")
        await asyncio.sleep(0)
        ending = asyncio.create_task(end(task))
        await entered.wait()
        ending.cancel()
        await asyncio.wait({ending})
    assert ending.cancelled()
    heard.check("stubborn: ")


async def test_a_block_that_takes_the_result_raises_it_and_nothing_is_told_twice() -> None:
    async def block() -> None:
        async with alongside(mistaken_later(), "the part") as part:
            await asyncio.wait({part})
            part.result()

    with hearing() as heard, pytest.raises(Injected):
        await block()
    assert heard.lines == []


async def test_a_mistake_that_the_block_does_not_take_is_told() -> None:
    with hearing() as heard:
        async with alongside(mistaken_later(), "the part") as part:
            await asyncio.wait({part})
    heard.check("the part: ")


async def test_a_block_ends_its_task() -> None:
    async with alongside(asyncio.sleep(60)) as part:
        pass
    assert part.cancelled()


async def test_a_watch_begins_anew_after_a_mistake_with_a_pause_that_grows(clock: ManualClock) -> None:
    began: list[float] = []

    async def watch() -> None:
        began.append(clock.now())
        await mistaken_later()

    told: list[BaseException] = []
    with hearing() as heard:
        task = restarted(watch, "the watch", clock=clock, longest_pause=1.0, on_mistake=told.append)
        await clock.advance(10.0)
        await end(task)
    pauses = [later - earlier for earlier, later in pairwise(began)]
    assert pauses[:5] == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8])
    assert pauses[6:] == pytest.approx([1.0] * len(pauses[6:]))
    assert len(told) == len(began)
    heard.check("the watch, which begins anew: ")
    assert len(heard.mistakes) == 1, "a mistake that stays the same is told once"


async def test_a_watch_that_went_on_for_long_tells_the_same_mistake_again(clock: ManualClock) -> None:
    async def watch() -> None:
        await clock.sleep(5.0)
        await mistaken_later()

    with hearing() as heard:
        task = restarted(watch, "the watch", clock=clock, longest_pause=1.0)
        await clock.advance(11.0)
        await end(task)
    assert len(heard.mistakes) == 2


async def test_a_watch_that_is_over_is_not_begun_anew_and_one_that_is_ended_ends(clock: ManualClock) -> None:
    began: list[str] = []

    async def once() -> None:
        began.append("once")

    task = restarted(once, "the watch", clock=clock, longest_pause=1.0)
    await clock.advance(5.0)
    assert task.done()
    assert began == ["once"]
    sleeping = restarted(lambda: clock.sleep(3.0), "the watch", clock=clock, longest_pause=1.0)
    await clock.advance(1.0)
    await end(sleeping)
    assert sleeping.cancelled()


def test_a_callback_raises_nothing_and_is_heard() -> None:
    ended: list[BaseException] = []
    with hearing() as heard:
        guarded("the callback", mistaken, ended.append)(1, two=2)
    heard.check("the callback: ")
    assert len(ended) == 1


async def test_the_event_loops_own_complaints_have_no_text_either() -> None:
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    hear_loop(loop)
    try:
        with hearing() as heard:
            loop.call_soon(mistaken)
            await settle()
    finally:
        loop.set_exception_handler(before)
    heard.check("a callback or a forgotten task of the event loop: ")


def test_hearing_finds_what_is_not_heard() -> None:
    heard = Heard()
    with pytest.raises(AssertionError, match="nothing that begins with"):
        heard.check("the heartbeat")

"""Guards that nothing missed when they were taken out: each test here fails without one."""

from __future__ import annotations

import asyncio

import pytest

from barrier import EpochAnnounced, adopt
from barrier.store.keys import Keys
from barrier.testing import FakeStore, ManualClock
from barrier.testing.waiting import settle
from planner.requests import RequestQueue
from tests.unit.barrier.group import started_group
from tests.unit.runner.rig import make_task, runner_rig

pytestmark = pytest.mark.anyio


async def test_a_failure_is_told_before_the_engine_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill takes as long as its grace where an engine hangs in the kernel; the others must not wait for that."""
    async with runner_rig() as rig:
        await rig.reach("Connected")
        await rig.ask(make_task("LoadModel", rig.epoch))
        told: list[str] = []
        kill = rig.host.kill

        async def look_and_kill() -> None:
            told.append((await rig.report()).status)
            await kill()

        monkeypatch.setattr(rig.host, "kill", look_and_kill)
        rig.engine.fail("load", "out of memory")
        await rig.tell()
        assert told == ["Failed"]


async def test_the_cause_is_kept_though_more_fails_behind_it() -> None:
    """The second failure comes from elsewhere, before the attempt is over: the first one is its cause."""
    async with runner_rig() as rig:
        await rig.reach("Ready")
        await rig.ask(make_task("TextGeneration", rig.epoch))
        rig.engine.fail("generate", "out of memory", permanent=True)
        await rig.tell()
        await rig.put(make_task("StartWarmup", rig.epoch), gap=1)  # an entry of the log never came: that fails, too
        await rig.tell()
        report = await rig.report()
        assert (report.error, report.permanent) == ("out of memory", True)


async def test_what_was_cancelled_in_one_attempt_is_generated_in_the_next() -> None:
    async with runner_rig() as rig:
        await rig.reach("Ready")
        running, waiting = (make_task("TextGeneration", rig.epoch, task_id=name) for name in ("gen.a", "gen.b"))
        await rig.ask(running)
        await rig.ask(waiting)
        await rig.ask(make_task("CancelTask", rig.epoch, cancels="gen.b"))
        await rig.conclude()
        await rig.reach("Ready")
        began = rig.engine.calls.count("generate")
        await rig.ask(make_task("TextGeneration", rig.epoch, task_id="gen.b"))
        assert rig.engine.calls.count("generate") == began + 1


async def test_a_text_that_takes_long_says_how_far_it_is() -> None:
    async with runner_rig() as rig:
        await rig.reach("Ready")
        await rig.ask(make_task("TextGeneration", rig.epoch, max_tokens=9))
        rig.engine.say("one ", "two ")
        await rig.tell()
        await rig.clock.advance(rig.member.settings.heartbeat)
        assert (await rig.report()).progress == (2, 9)


async def test_an_announcement_that_found_no_room_comes_with_a_later_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log that announces it may be lost meanwhile: then the record is the only one that says it."""
    clock = ManualClock()
    store = FakeStore(clock)
    async with started_group(store, 2) as group:
        member = group.ranks[0].member
        full: asyncio.Queue[object] = asyncio.Queue(maxsize=1)
        full.put_nowait("what the reader has not taken yet")
        monkeypatch.setattr(vars(member)["_log"], "entries", full)
        epoch = await group.open()
        await member.report()  # a heartbeat, which has no room for it
        assert full.get_nowait() == "what the reader has not taken yet"
        await member.report()
        assert full.get_nowait() == EpochAnnounced(epoch)


async def test_requests_are_capped_and_the_oldest_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody plans, and clients ask on: the store must not fill up with their prompts."""
    monkeypatch.setattr("planner.requests.MAX_WAITING", 3)
    clock = ManualClock()
    store = FakeStore(clock)
    keys = Keys("rankgate", "demo")
    queue = RequestQueue(adopt(store.client("client")), keys, clock)
    asking = [asyncio.create_task(_ask(queue, f"prompt {number}")) for number in range(5)]
    await settle()
    waiting = [fields[b"prompt"] for _, fields in store.contents()[keys.requests]]
    assert waiting == [b"prompt 2", b"prompt 3", b"prompt 4"]
    for one in asking:
        one.cancel()
    await asyncio.wait(asking)


async def _ask(queue: RequestQueue, prompt: str) -> None:
    async for _ in queue.generate(prompt, max_tokens=1, seconds=60):
        pass

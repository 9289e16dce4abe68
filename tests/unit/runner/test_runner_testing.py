"""The test kit itself: scripted engines, hosts and runners do what they are told, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from barrier import (
    Aborted,
    Barrier,
    Concluded,
    Dispatched,
    EpochId,
    Leading,
    Opened,
    RankTaken,
    Report,
    StoreUnavailable,
    Verdict,
)
from barrier.testing import FakeStore, ManualClock, wait_until
from barrier.testing.waiting import settle
from runner import EngineDied, EngineFailure, InlineHost
from runner.engine import EngineGroup, GenerationRequest
from runner.messages import ModelSpec, TaskKind, decode_chunk, encode
from runner.testing import ScriptedEngine, ScriptedHost, ScriptedRunner, scripted_runners
from runner.testing.scripted_engine import TEXT
from tests.unit.runner.rig import make_task

pytestmark = pytest.mark.anyio

GROUP = EngineGroup("demo", f"7-{'a' * 32}", 0, ("node-0:5000", "node-1:5000"), 60.0)
MODEL = ModelSpec(model_id="toy", total_layers=4)
REQUEST = GenerationRequest("t1", "Tell me about owls.", 64)


# --- the engine -----------------------------------------------------------------------------------------------------------


async def test_a_call_blocks_until_the_test_lets_it_go() -> None:
    engine = ScriptedEngine()
    connecting = asyncio.create_task(engine.connect(GROUP))
    await engine.called("connect")
    await settle()
    assert not connecting.done()
    assert engine.active("connect")
    engine.finish("connect")
    await connecting
    assert not engine.active("connect")
    assert engine.group == GROUP


async def test_orders_may_come_before_the_call() -> None:
    engine = ScriptedEngine().finish("warm_up").fail("warm_up", "cold").finish("warm_up")
    await engine.warm_up()
    with pytest.raises(EngineFailure, match="cold"):
        await engine.warm_up()
    await engine.warm_up()


async def test_auto_lets_everything_go_except_what_is_held() -> None:
    engine = ScriptedEngine(auto=True).hold("warm_up")
    await engine.connect(GROUP)
    assert [layers async for layers in engine.load(MODEL)] == [4]
    assert [text async for text in engine.generate(REQUEST)] == list(TEXT)
    warming = asyncio.create_task(engine.warm_up())
    await settle()
    assert not warming.done()
    engine.release("warm_up")
    await warming
    await engine.close()
    assert engine.calls == ["connect", "load", "generate", "warm_up", "close"]


async def test_failures_are_transient_permanent_or_any_exception_and_may_last() -> None:
    engine = ScriptedEngine(auto=True)
    engine.fail("connect", "no route", times=2).fail("connect", "no such host", permanent=True)
    for permanent in (False, False, True):
        with pytest.raises(EngineFailure) as failure:
            await engine.connect(GROUP)
        assert failure.value.permanent == permanent
    await engine.connect(GROUP)
    engine.fail("warm_up", ZeroDivisionError(), times=None)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await engine.warm_up()
    engine.forget()
    await engine.warm_up()
    engine.die("warm_up", "signal 9")
    with pytest.raises(EngineDied, match="signal 9"):
        await engine.warm_up()
    with pytest.raises(ValueError, match="times is 0"):
        engine.fail("connect", "never", times=0)


async def test_progress_and_pieces_come_when_the_test_says_so() -> None:
    engine = ScriptedEngine()
    async with aclosing(engine.load(MODEL)) as progress:
        engine.progress(1).progress(3).finish("load")
        assert [layers async for layers in progress] == [1, 3, 4]
    async with aclosing(engine.generate(REQUEST)) as pieces:
        engine.say("Owls ", "hunt.").finish("generate")
        assert [piece async for piece in pieces] == ["Owls ", "hunt."]
    assert engine.model == MODEL
    assert engine.requests == [REQUEST]


async def test_an_inline_host_can_hold_it_too_and_cancellations_are_noted() -> None:
    engine = ScriptedEngine()
    host = InlineHost(engine.fresh)
    connecting = asyncio.create_task(host.connect(GROUP))
    await engine.called("connect")
    await host.kill()
    with pytest.raises(EngineDied):
        await connecting
    engine.finish("connect")
    await host.connect(GROUP)
    await host.close()
    assert engine.calls == ["start", "connect", "connect cancelled", "start", "connect", "close"]
    assert engine.lives == 2


# --- the host -------------------------------------------------------------------------------------------------------------


async def test_a_scripted_host_loses_its_engine_in_the_middle_of_nothing() -> None:
    engine = ScriptedEngine(auto=True)
    host = ScriptedHost(engine, rank=3)
    await host.connect(GROUP)
    waiting = asyncio.create_task(host.died())
    await settle()
    assert not waiting.done()
    host.die("was killed")
    assert str(await waiting) == "engine of rank 3 was killed"
    assert str(await host.died()) == "engine of rank 3 was killed", "asked again, it says it again"
    with pytest.raises(EngineDied, match="was killed"):
        await host.warm_up()
    with pytest.raises(EngineDied, match="was killed"):
        [_ async for _ in host.generate(REQUEST)]
    await host.connect(GROUP)
    assert engine.lives == 2
    waiting = asyncio.create_task(host.died())
    await host.kill()
    await host.close()
    await settle()
    assert not waiting.done(), "a kill and a close that were asked for are no death"
    waiting.cancel()


async def test_a_scripted_host_loses_its_engine_in_the_middle_of_a_call() -> None:
    engine = ScriptedEngine()
    host = ScriptedHost(engine)
    loading = asyncio.create_task(anext(host.load(MODEL)))  # type: ignore[arg-type]  any awaitable will do
    await engine.called("load")
    host.die("was killed")
    with pytest.raises(EngineDied, match="engine of rank 0 was killed"):
        await loading


async def test_a_death_that_the_engine_brings_upon_itself_is_one_too() -> None:
    engine = ScriptedEngine(auto=True).die("connect", "engine died (signal 11)")
    host = ScriptedHost(engine)
    with pytest.raises(EngineDied, match="signal 11"):
        await host.connect(GROUP)
    assert "signal 11" in str(await host.died())


# --- the runner -----------------------------------------------------------------------------------------------------------

STEPS: tuple[tuple[TaskKind, str, str], ...] = (
    ("ConnectToGroup", "Idle", "Connected"),
    ("LoadModel", "Connected", "Loaded"),
    ("StartWarmup", "Loaded", "Ready"),
)


class SmallPlanner:
    """Two scripted runners, and a planner that fits on a screen."""

    def __init__(self, store: FakeStore, clock: ManualClock, barrier: Barrier, ranks: list[ScriptedRunner]) -> None:
        self.store, self.clock, self.barrier, self.ranks = store, clock, barrier, ranks

    async def open(self) -> EpochId:
        outcome = await self.barrier.open()
        assert isinstance(outcome, Opened), outcome
        await settle()
        return outcome.epoch

    async def dispatch(self, epoch: EpochId, kind: TaskKind, status: str, *, attempt: int = 1, **fields: Any) -> str:
        task = make_task(kind, epoch, **fields)
        outcome = await self.barrier.dispatch(epoch, kind, encode(task).decode(), status, attempt=attempt)
        assert isinstance(outcome, Dispatched), outcome
        await settle()
        return task.task_id

    async def up_to(self, kind: TaskKind | None = None) -> EpochId:
        """Open an epoch and dispatch every step, or those before one."""
        epoch = await self.open()
        for step, needs, _ in STEPS:
            if step == kind:
                break
            await self.dispatch(epoch, step, needs)
        return epoch

    async def report(self, rank: int) -> Report | None:
        raw = await self.barrier.store.commands.get(self.barrier.keys.rank(rank))
        return None if raw is None else Report.decode(raw, rank)


@asynccontextmanager
async def small_planner() -> AsyncGenerator[SmallPlanner]:
    clock = ManualClock()
    store = FakeStore(clock)
    barrier = Barrier(store.client("planner"), "demo", world_size=2, clock=clock)
    async with barrier, scripted_runners(store, "demo", 2) as ranks:
        assert isinstance(await barrier.lead(), Leading)
        yield SmallPlanner(store, clock, barrier, ranks)
    assert store.keys_without_lifetime() == []


async def test_by_default_it_follows_the_protocol_to_the_end() -> None:
    async with small_planner() as planner:
        epoch = await planner.up_to()
        assert [rank.status.kind for rank in planner.ranks] == ["Ready", "Ready"]
        assert [rank.epoch for rank in planner.ranks] == [epoch, epoch]
        task_id = await planner.dispatch(epoch, "TextGeneration", "Ready")
        entries = await planner.barrier.store.commands.xrange(planner.barrier.keys.out(task_id))
        assert "".join(decode_chunk(fields[b"chunk"]).text for _, fields in entries) == "".join(TEXT)
        for rank in planner.ranks:
            assert rank.kinds == ["ConnectToGroup", "LoadModel", "StartWarmup", "TextGeneration"]
            assert rank.engine.calls[-4:] == ["connect", "load", "warm_up", "generate"]


async def test_reject_refuses_so_many_times_and_then_follows() -> None:
    async with small_planner() as planner:
        first, second = planner.ranks
        first.reject("load", times=2)
        epoch = await planner.up_to("LoadModel")
        for attempt in (1, 2):
            task = make_task("LoadModel", epoch, task_id="load.1")
            outcome = await planner.barrier.dispatch(
                epoch, "load", encode(task).decode(), ("Connected", "Loaded"), attempt=attempt
            )
            assert isinstance(outcome, Dispatched)
            await settle()
            [refused] = [one for one in first.outcomes if one.task_id == "load.1"]
            assert (refused.result, refused.code, refused.retryable) == ("rejected", "NotYet", True)
            assert refused.detail == "the test says that rank 0 refuses LoadModel"
            assert first.status.kind == "Connected"
            assert second.status.kind == "Loaded"
        outcome = await planner.barrier.dispatch(
            epoch, "load", encode(task).decode(), ("Connected", "Loaded"), attempt=3
        )
        await settle()
        assert first.status.kind == "Loaded"
        assert first.kinds == ["ConnectToGroup", "LoadModel", "LoadModel", "LoadModel"]
        assert second.engine.calls.count("load") == 1, "a repeated dispatch is done once"


@pytest.mark.parametrize("code", ["Stale", "Invalid"])
async def test_reject_for_good(code: Any) -> None:
    async with small_planner() as planner:
        first, _ = planner.ranks
        first.reject("connect", code=code, hint="I would rather not", times=None)
        epoch = await planner.up_to("ConnectToGroup")
        task_id = await planner.dispatch(epoch, "ConnectToGroup", "Idle")
        [refused] = [one for one in first.outcomes if one.task_id == task_id]
        assert (refused.code, refused.retryable, refused.detail) == (code, False, "I would rather not")
        assert first.status.kind == "Idle"


async def test_fail_is_reported_with_its_class_and_another_attempt_works() -> None:
    async with small_planner() as planner:
        _, second = planner.ranks
        second.fail("load", "out of memory", permanent=True)
        epoch = await planner.up_to("LoadModel")
        await planner.dispatch(epoch, "LoadModel", "Connected")
        report = await planner.report(1)
        assert report is not None
        assert (report.status, report.error, report.permanent) == ("Failed", "out of memory", True)
        outcome = await planner.barrier.conclude(epoch, Verdict.aborted("rank 1 failed", 1))
        assert isinstance(outcome, Concluded)
        await settle()
        await planner.up_to()
        assert [rank.status.kind for rank in planner.ranks] == ["Ready", "Ready"]


async def test_hold_and_let() -> None:
    async with small_planner() as planner:
        first, second = planner.ranks
        second.hold("connect")
        epoch = await planner.up_to("ConnectToGroup")
        await planner.dispatch(epoch, "ConnectToGroup", "Idle")
        assert (first.status.kind, second.status.kind) == ("Connected", "Connecting")
        waiting = asyncio.create_task(second.until("Connected"))
        second.let("connect")
        await waiting


async def test_ignore_says_nothing_at_all() -> None:
    async with small_planner() as planner:
        _, second = planner.ranks
        second.ignore("connect")
        epoch = await planner.up_to("ConnectToGroup")
        task_id = await planner.dispatch(epoch, "ConnectToGroup", "Idle")
        assert second.status.kind == "Idle"
        assert second.kinds == ["ConnectToGroup"]
        assert task_id not in [one.task_id for one in second.outcomes]


async def test_lose_engine_is_a_failure_of_a_rank_that_lives() -> None:
    async with small_planner() as planner:
        first, _ = planner.ranks
        await planner.up_to()
        first.lose_engine("was killed by the system (signal 9)")
        await settle()
        report = await planner.report(0)
        assert report is not None
        assert (report.status, report.error) == ("Failed", "engine of rank 0 was killed by the system (signal 9)")
        assert first.alive


async def test_die_stops_everything_and_the_last_report_stays_for_a_lease() -> None:
    async with small_planner() as planner:
        first, _ = planner.ranks
        await planner.up_to("StartWarmup")
        before = await planner.report(0)
        await first.die()
        assert not first.alive
        assert await planner.report(0) == before, "a killed process says no more, not even that it goes"
        claim = planner.barrier.keys.claim(0)
        assert await planner.barrier.store.commands.get(claim) == first.incarnation.encode()
        await planner.clock.advance(5.9)
        assert await planner.report(0) == before
        await planner.clock.advance(0.2)
        assert await planner.report(0) is None
        assert await planner.report(1) is not None
        await first.die()


async def test_what_died_leaves_the_stream_of_its_client_open() -> None:
    """As a killed process does: that the client learns of it is somebody else's duty."""
    async with small_planner() as planner:
        first, second = planner.ranks
        first.hold("generate")
        second.hold("generate")
        epoch = await planner.up_to()
        task_id = await planner.dispatch(epoch, "TextGeneration", "Ready")
        await first.die()
        assert await planner.barrier.store.commands.exists(planner.barrier.keys.out(task_id)) == 0


async def test_restart_is_a_new_life_that_is_on_no_roster() -> None:
    async with small_planner() as planner:
        first, _ = planner.ranks
        first.reject("connect")
        epoch = await planner.up_to("ConnectToGroup")
        before = first.incarnation
        await first.restart()
        assert first.incarnation > before
        assert (first.status.kind, first.epoch) == ("Idle", None)
        outcome = await planner.barrier.wait(epoch, "Idle", timeout=5)
        assert isinstance(outcome, Aborted), "the attempt is broken for good"
        await settle()
        epoch = await planner.up_to("ConnectToGroup")
        await planner.dispatch(epoch, "ConnectToGroup", "Idle")
        assert first.outcomes[-1].code == "NotYet", "the script goes on through all lives"


async def test_a_restart_after_a_death_waits_for_the_old_claim() -> None:
    async with small_planner() as planner:
        first, _ = planner.ranks
        await first.die()
        died_at = planner.clock.now()
        await planner.clock.run(first.restart())
        assert 5 < planner.clock.now() - died_at <= 6.1
        assert first.alive


async def test_a_rank_that_cannot_start_says_why() -> None:
    async with small_planner() as planner:
        twin = ScriptedRunner(planner.store, "demo", 0)
        with pytest.raises(RankTaken):
            await planner.clock.run(twin.start())
        assert not twin.alive
        planner.store.partition("rank 7")
        with pytest.raises(StoreUnavailable):
            await ScriptedRunner(planner.store, "demo", 7).start()


async def test_stop_is_polite_and_may_be_repeated() -> None:
    async with small_planner() as planner:
        first, _ = planner.ranks
        await planner.up_to()
        await first.stop()
        assert await planner.report(0) is None
        assert "close" in first.engine.calls
        await first.stop()
        before = first.incarnation
        await first.start()
        assert first.incarnation > before
        await first.start()
        assert first.alive


async def test_script_with_senseless_numbers_is_refused() -> None:
    async with small_planner() as planner:
        with pytest.raises(ValueError, match="times is 0"):
            planner.ranks[0].reject("load", times=0)
        with pytest.raises(ValueError, match="times is -1"):
            planner.ranks[0].fail("load", "no", times=-1)


async def test_a_status_that_does_not_come_is_named() -> None:
    async with small_planner() as planner:
        with pytest.raises(AssertionError, match="rank 0, which is Idle, to be Ready or Running"):
            await wait_until(lambda: False, "rank 0, which is Idle, to be Ready or Running", timeout=0.01)
        await planner.ranks[0].until("Idle")

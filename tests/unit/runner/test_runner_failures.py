"""Engines that fail, hang and die: said at once, torn down by the verdict, and the next attempt gets a fresh engine."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator
from pathlib import Path

import psutil
import pytest

from barrier import EpochId, VerdictAnnounced
from barrier.barrier import Verdict
from barrier.testing import FaultPlan
from barrier.testing.waiting import settle
from runner import EngineDied, EngineFailure
from runner.engine import EngineGroup, GenerationRequest
from runner.engines.simulated import SimulatedConfig, simulated_spec
from runner.host import ProcessHost
from runner.messages import RunnerFailed, RunnerStatusUpdated, StatusName, TaskKind, TaskStatusUpdated
from runner.testing import Phase, ScriptedHost
from tests.unit.runner.rig import WAY, Rig, kinds, make_task, other_nonce, runner_rig

pytestmark = pytest.mark.anyio

BEFORE: dict[Phase, StatusName] = {
    "connect": "Idle",
    "load": "Connected",
    "warm_up": "Loaded",
    "generate": "Ready",
}

FAILURES: dict[str, tuple[str | BaseException, bool, str]] = {
    "for now": ("the switch is rebooting", False, "the switch is rebooting"),
    "for good": (EngineFailure("not enough memory", permanent=True), True, "not enough memory"),
    "by any exception": (ZeroDivisionError("division by zero"), False, "ZeroDivisionError: division by zero"),
    "by an empty exception": (RuntimeError(), False, "RuntimeError"),
    "by its death": (EngineDied("engine died (signal 9)"), False, "engine died (signal 9)"),
    "by a cancellation of its own": (asyncio.CancelledError(), False, "CancelledError"),
    "in words that UTF-8 cannot carry": ("no file \ud800.bin", False, "no file ?.bin"),
    "at great length": ("x" * 10_000, False, "x" * 1_900),
}


async def serves_again(rig: Rig, lives: int = 2) -> None:
    """The verdict tears down; the next attempt goes all the way, with an engine that is new."""
    await rig.conclude()
    assert rig.status == "Idle"
    report = await rig.report()
    assert (report.status, report.error, report.permanent, report.epoch) == ("Idle", "", False, None)
    await rig.open()
    rig.engine.release()
    for kind, _, _, after in WAY:
        await rig.ask(make_task(kind, rig.epoch))
        assert rig.status == after
    assert rig.engine.lives == lives


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize(("kind", "phase", "during", "after"), WAY)
async def test_a_phase_that_fails(
    kind: TaskKind, phase: Phase, during: StatusName, after: StatusName, failure: tuple[str | BaseException, bool, str]
) -> None:
    error, permanent, said = failure
    async with runner_rig() as rig:
        await rig.reach(BEFORE[phase])
        task = make_task(kind, rig.epoch)
        assert kinds(await rig.ask(task)) == ["Running", f"=> {during}", "ack"]
        rig.engine.fail(phase, error, permanent=permanent)

        told = await rig.tell()
        assert kinds(told) == ["Failed", "=> Failed"]
        failed, now = told
        assert isinstance(failed, TaskStatusUpdated)
        assert isinstance(now, RunnerStatusUpdated)
        assert isinstance(now.status, RunnerFailed)
        assert failed.task_id == task.task_id
        assert failed.rejection is None, "it was begun, so it was not refused"
        assert failed.error is not None
        assert said in failed.error
        assert failed.error == now.status.error
        assert rig.journal[-1] == "host kill"

        report = await rig.report()
        assert (report.status, report.error, report.permanent) == ("Failed", failed.error, permanent)
        assert (await rig.outcome(task)).result == "failed"
        assert (await rig.outcome(task)).detail == failed.error[:500]
        if phase == "generate":
            assert [chunk.finish for chunk in await rig.chunks(task)] == ["error"]

        for other in ("LoadModel", "TextGeneration", "CancelTask"):
            await rig.ask(make_task(other, rig.epoch))
        await rig.clock.advance(3 * rig.member.settings.heartbeat)
        report = await rig.report()
        assert (report.status, report.error, report.permanent) == ("Failed", failed.error, permanent), (
            "neither refusals nor heartbeats make it forget"
        )

        await serves_again(rig)


@pytest.mark.parametrize(("kind", "phase", "during", "after"), WAY)
async def test_a_phase_that_hangs(kind: TaskKind, phase: Phase, during: StatusName, after: StatusName) -> None:
    """The rank goes on reporting and answering for as long as it takes, and a verdict ends it."""
    async with runner_rig() as rig:
        await rig.reach(BEFORE[phase])
        task = make_task(kind, rig.epoch)
        await rig.ask(task)
        assert rig.engine.active(phase)
        seq = (await rig.report()).seq
        for _ in range(20):
            await rig.clock.advance(rig.member.settings.lease / 2)
        report = await rig.report()
        assert report.status == during, "a lease that nobody renewed would have lapsed ten times"
        assert report.seq >= seq + 20
        assert report.status_ms >= 60_000
        assert kinds(await rig.ask(make_task("StartWarmup", rig.epoch))) == ["ack", "Failed"]

        await serves_again(rig)
        assert f"{phase} cancelled" in rig.journal


class RudeHost(ScriptedHost):
    """Breaks its contract: raises what is no `EngineFailure`."""

    async def connect(self, group: EngineGroup) -> None:
        await super().connect(group)
        if self.engine.lives == 1:
            raise KeyError("group")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[str, None]:
        async for piece in super().generate(request):
            yield piece
        raise RuntimeError("no more")


async def test_a_host_that_breaks_its_contract_is_survived_too() -> None:
    async with runner_rig(host_type=RudeHost, auto=True) as rig:
        await rig.open()
        told = await rig.ask(make_task("ConnectToGroup", rig.epoch))
        assert kinds(told) == ["Running", "=> Connecting", "ack", "Failed", "=> Failed"]
        error = (await rig.report()).error
        assert error.startswith("a mistake of ours, KeyError at "), "its text may quote a prompt"
        assert "in connect; the log of this rank has its frames" in error
        await rig.conclude()
        await rig.reach_by_itself()
        task = make_task("TextGeneration", rig.epoch)
        assert kinds(await rig.ask(task))[-2:] == ["Failed", "=> Failed"]
        told_client = (await rig.chunks(task))[-1].error
        assert told_client is not None
        assert told_client.startswith("rank 0 failed: a mistake of ours, RuntimeError at ")


async def test_an_engine_that_will_not_even_close_is_killed_after_its_grace() -> None:
    async with runner_rig(grace_seconds=0.05) as rig:
        await rig.reach("Ready")
        rig.engine.hold("close")
        await rig.barrier.conclude(rig.epoch, Verdict.aborted("enough"))
        await rig.until(lambda: rig.status == "Idle", "the tear-down to end")
        rig.engine.release("close")
        await rig.open()
        await rig.ask(make_task("ConnectToGroup", rig.epoch))
        assert rig.engine.lives == 2
        assert "close cancelled" in rig.journal


# --- engines that die while they have nothing to do ---------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["Connected", "Loaded", "Ready"])
async def test_an_engine_that_dies_idle_is_noticed_at_once(status: StatusName) -> None:
    """Nobody has to ask for anything first: no time passes here, and nothing is dispatched."""
    async with runner_rig() as rig:
        await rig.reach(status)
        rig.host.die("was killed by the system (signal 9)")
        assert kinds(await rig.tell()) == ["=> Failed"]
        report = await rig.report()
        assert report.status == "Failed"
        assert report.error == "engine of rank 0 was killed by the system (signal 9)"
        assert kinds(await rig.ask(make_task("TextGeneration", rig.epoch))) == ["ack", "Failed"]
        await serves_again(rig)


async def test_a_real_process_that_is_killed_while_ready_is_noticed(tmp_path: Path) -> None:
    """As above, with a child process and a SIGKILL from outside; the runner's own process does not even blink."""
    quick = SimulatedConfig(meet=False, connect_seconds=0, layer_seconds=0, warmup_seconds=0, token_seconds=0)
    processes: list[ProcessHost] = []

    class RealHost(ScriptedHost):
        """Keeps the rig's shape, and has its engine in a process."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[arg-type]  as the rig calls it
            self.real = ProcessHost(simulated_spec(quick, rank=0, world_size=2), rank=0)
            processes.append(self.real)
            for name in ("connect", "load", "warm_up", "generate", "died", "kill", "close"):
                setattr(self, name, getattr(self.real, name))

    async with runner_rig(host_type=RealHost) as rig:
        [host] = processes
        await rig.open()
        for kind, _, _, after in WAY[:3]:
            await rig.put(make_task(kind, rig.epoch))
            await rig.until(lambda wanted=after: rig.status == wanted, f"the engine's process to be {after}")
        assert host.pid is not None
        victim = psutil.Process(host.pid)
        victim.send_signal(signal.SIGKILL)
        await rig.until(lambda: rig.status == "Failed", "the death to be noticed")
        await rig.until(lambda: host.pid is None, "the dead to be buried")
        assert "signal 9" in (await rig.report()).error

        await rig.conclude()
        await rig.open()
        await rig.put(make_task("ConnectToGroup", rig.epoch))
        await rig.until(lambda: rig.status == "Connected", "a fresh process to connect")
        assert host.pid not in (None, victim.pid)
    assert host.pid is None


class SlowToTell(ScriptedHost):
    """Tells of a death late to those who wait for it, and at once to those who ask after it."""

    async def died(self) -> EngineDied:
        waits = self._death is None
        death = await super().died()
        for _ in range(50 if waits else 0):
            await asyncio.sleep(0)
        return death


@pytest.mark.parametrize("host_type", [ScriptedHost, SlowToTell])
@pytest.mark.parametrize(
    ("before", "kind", "phase", "during"),
    [("Connected", "LoadModel", "load", "Loading"), ("Loaded", "StartWarmup", "warm_up", "WarmingUp")],
)
async def test_an_engine_that_dies_between_judgement_and_work(
    host_type: type[ScriptedHost], before: StatusName, kind: TaskKind, phase: Phase, during: StatusName
) -> None:
    """Regression: the load then started a fresh engine, in no group, and the failure was overwritten by its progress."""
    plan = FaultPlan()
    async with runner_rig(faults=plan, host_type=host_type) as rig:
        await rig.reach(before)
        plan.after("exec", lambda: rig.host.die("was killed"), touching=f"|{during}|")
        told = await rig.ask(make_task(kind, rig.epoch))
        plan.assert_fired()
        assert kinds(told)[:3] == ["Running", f"=> {during}", "ack"]
        assert "Failed" in kinds(told)[3:], "the task that was accepted comes to an end"
        assert kinds(told)[-1] == "=> Failed"
        assert rig.runner.status == RunnerFailed(error="engine of rank 0 was killed")
        assert rig.engine.lives == 1
        assert phase not in rig.engine.calls
        await serves_again(rig)


@pytest.mark.parametrize(("kind", "phase", "during", "after"), WAY[1:])
async def test_an_engine_that_was_given_up_between_judgement_and_work(
    kind: TaskKind, phase: Phase, during: StatusName, after: StatusName
) -> None:
    """As above, with so much time in between that the death has been reported and the engine buried: nothing asks it again."""
    plan = FaultPlan()
    async with runner_rig(faults=plan) as rig:
        await rig.reach(BEFORE[phase])

        async def take_time() -> None:
            await rig.until(lambda: "host kill" in rig.journal, "the engine to be given up")

        plan.refuse("exec", touching=":out:")  # an end that goes with the next report, and keeps it busy
        plan.before("exec", take_time, nth=2, touching=":out:")
        plan.after("exec", lambda: rig.host.die("was killed"), touching=f"|{during}|")
        await rig.ask_late(make_task("TextGeneration", other_nonce(rig.epoch)))
        task = make_task(kind, rig.epoch)
        told = await rig.ask(task)
        plan.assert_fired()
        assert kinds(told) == ["Running", f"=> {during}", "ack", "=> Failed", "Failed", "=> Failed"]
        assert rig.engine.lives == 1
        assert phase not in rig.engine.calls
        assert (await rig.outcome(task)).detail == "engine of rank 0 was killed"
        if kind == "TextGeneration":
            assert [chunk.error for chunk in await rig.chunks(task)] == ["rank 0 failed: engine of rank 0 was killed"]


async def test_an_engine_that_dies_right_after_its_last_word_is_noticed() -> None:
    """Regression: while the end of the text was being written the death counted as the generation's, which was over."""
    plan = FaultPlan()
    async with runner_rig(faults=plan) as rig:
        await rig.reach("Ready")

        async def die() -> None:
            rig.host.die("was killed")
            for _ in range(100):
                await asyncio.sleep(0)

        plan.before("exec", die, touching='"finish":"stop"')
        rig.engine.release()
        task = make_task("TextGeneration", rig.epoch)
        told = await rig.ask(task)
        plan.assert_fired()
        assert [chunk.finish for chunk in await rig.chunks(task)] == [None, None, None, "stop"], "the text is whole"
        assert kinds(told) == ["Running", "=> Running", "ack", "Complete", "=> Ready", "=> Failed"]
        await serves_again(rig)


async def test_an_engine_that_dies_while_generating_fails_the_generation_once() -> None:
    async with runner_rig() as rig:
        await rig.reach("Ready")
        task = make_task("TextGeneration", rig.epoch)
        await rig.ask(task)
        rig.host.die("was killed")
        assert kinds(await rig.tell()) == ["Failed", "=> Failed"]
        [end] = await rig.chunks(task)
        assert end.finish == "error"
        assert end.error == "rank 0 failed: engine of rank 0 was killed"
        await serves_again(rig)


async def test_the_first_failure_is_the_one_that_is_reported() -> None:
    """What fails because the engine was given up is an effect, and would hide the cause, and whether it is permanent."""
    async with runner_rig() as rig:
        await rig.reach("Ready")
        first, second = make_task("TextGeneration", rig.epoch), make_task("TextGeneration", rig.epoch)
        await rig.ask(first)
        await rig.ask(second)
        rig.engine.fail("generate", "out of memory", permanent=True)
        told = await rig.tell()
        assert kinds(told) == ["Failed", "=> Failed"]
        report = await rig.report()
        assert (report.error, report.permanent) == ("out of memory", True)
        await rig.conclude()
        for task in (first, second):
            assert [chunk.finish for chunk in await rig.chunks(task)] == ["error"]


# --- verdicts that come at bad moments ----------------------------------------------------------------------------------------


async def test_a_verdict_right_behind_a_task_ends_it_before_it_began() -> None:
    """Regression: the engine's coroutine was made, and never awaited, which Python warns about (and here that is an error)."""
    async with runner_rig() as rig:
        for before, kind in (("Idle", "ConnectToGroup"), ("Connected", "LoadModel"), ("Loaded", "StartWarmup")):
            await rig.reach(before)  # type: ignore[arg-type]  a literal that the loop widens
            rig.deliver(make_task(kind, rig.epoch))  # type: ignore[arg-type]  as above
            rig.member.deliver(VerdictAnnounced(rig.epoch, Verdict.aborted("enough")))
            told = await rig.tell()
            assert kinds(told)[-1] == "=> Idle"
            assert rig.status == "Idle"
            outcome = await rig.barrier.conclude(await current(rig), Verdict.aborted("enough"))
            assert outcome


async def current(rig: Rig) -> EpochId:
    snapshot = await rig.barrier.inspect()
    assert snapshot.epoch is not None
    return snapshot.epoch.id


async def test_a_phase_that_is_still_being_told_does_not_hide_the_next_one() -> None:
    """Told late, the end of connecting must not take the load that has begun meanwhile from the sight of the tear-down."""
    plan = FaultPlan()
    async with runner_rig(faults=plan) as rig:
        await rig.reach("Connecting")
        loading, told_all = asyncio.Event(), asyncio.Event()

        async def until_the_load_goes_on() -> None:
            await loading.wait()
            told_all.set()

        plan.refuse("exec", touching=":out:")  # an end that goes with the next report, and makes it late
        plan.before("exec", until_the_load_goes_on, nth=2, touching=":out:")
        await rig.ask_late(make_task("TextGeneration", other_nonce(rig.epoch)))
        rig.engine.finish("connect")
        await settle()
        await rig.ask(make_task("LoadModel", rig.epoch))
        assert rig.engine.active("load")
        loading.set()
        await settle()
        plan.assert_fired()
        assert told_all.is_set()
        await rig.tell()

        await rig.conclude()
        assert kinds(await rig.tell()) == ["=> Idle"], "ended by the tear-down, which is no failure of the engine"
        assert "load cancelled" in rig.journal


async def test_a_verdict_of_another_epoch_ends_nothing() -> None:
    async with runner_rig() as rig:
        await rig.reach("Loaded")
        stale = EpochId(rig.epoch.number - 1, rig.epoch.nonce)
        for epoch in (stale, EpochId(rig.epoch.number, "0" * 32)):
            rig.member.deliver(VerdictAnnounced(epoch, Verdict.aborted("enough")))
        assert await rig.tell() == []
        assert rig.status == "Loaded"
        assert rig.journal[-1] == "load"


@pytest.mark.parametrize("status", ["Connecting", "Connected", "Loading", "Loaded", "WarmingUp", "Ready", "Running"])
async def test_a_verdict_ends_whatever_goes_on(status: StatusName) -> None:
    async with runner_rig() as rig:
        await rig.reach(status)
        epoch = rig.epoch
        await rig.conclude()
        assert kinds(await rig.tell()) == ["=> Idle"]
        report = await rig.report()
        assert (report.status, report.epoch) == ("Idle", None)
        assert report.floor == epoch.number, "a promise is spent, and its number stays as a floor"
        if status in ("Connecting", "Loading", "WarmingUp"):
            assert rig.journal[-2].endswith("cancelled"), "half a collective is of no use, and is not asked to close"
        else:
            assert rig.journal[-1] == "close", "politely: the others may want to know"


async def test_work_that_ends_during_a_shutdown_does_not_turn_it_back() -> None:
    """Regression: a phase that succeeded between the answer and the tear-down made the leaving rank Connected again."""
    plan = FaultPlan()
    async with runner_rig(faults=plan) as rig:
        await rig.reach("Connecting")

        async def connect_now() -> None:
            rig.engine.release("connect")
            for _ in range(100):
                await asyncio.sleep(0)

        plan.after("exec", connect_now, touching="|ShuttingDown|")
        rig.engine.hold("close")
        told = await rig.ask(make_task("Shutdown", rig.epoch))
        plan.assert_fired()
        assert rig.status == "ShuttingDown"
        rig.engine.release("close")
        told += await rig.tell()
        await rig.ended()
        passed = [one for one in kinds(told) if one.startswith("=>")]
        assert passed[0] == "=> ShuttingDown"
        assert passed[-1] == "=> Shutdown"
        assert "=> Connected" not in passed


async def test_the_engine_is_told_who_it_is() -> None:
    async with runner_rig(world_size=3, rank=2) as rig:
        await rig.open()
        rig.engine.release()
        await rig.name_endpoints("node-0:5000", "node-1:5000", "")
        await rig.ask(make_task("ConnectToGroup", rig.epoch, deadline=20.0))
        assert rig.engine.group == EngineGroup(
            "demo", str(rig.epoch), 2, ("node-0:5000", "node-1:5000", ""), deadline=20.0
        )
        await settle()


async def test_progress_goes_with_the_heartbeat_and_costs_no_report_of_its_own() -> None:
    async with runner_rig() as rig:
        await rig.reach("Loading")
        sent = rig.store.sent["runner"]
        for layers in (1, 2, 3):
            rig.engine.progress(layers)
            await settle()
        assert rig.store.sent["runner"] == sent
        await rig.clock.advance(rig.member.settings.heartbeat)
        assert (await rig.report()).progress == (3, 4)
        rig.engine.finish("load")
        await rig.tell()
        assert (await rig.report()).progress is None

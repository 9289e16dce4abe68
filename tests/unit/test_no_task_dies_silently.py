"""A mistake of ours in any task that runs by itself is heard, and ends in a named way what depends on it."""

from __future__ import annotations

import ast
import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from barrier import Barrier, HeartbeatFailed, Opened, PartFailed, RankTaken, Settings, adopt
from barrier.protocol.wakeup import Hint
from barrier.store.wakeups import Wakeups
from barrier.testing import FakeStore, ManualClock, wait_until
from barrier.testing.waiting import settle
from planner import InstanceFailed, LoadGate
from planner.cli import commands, health, up
from planner.cli.health import ProcessState
from planner.cli.process import Interrupts
from planner.cli.runner_process import run_all
from planner.cli.screen import Picture
from planner.cli.watchdog import ServiceManager, Work, supervised
from planner.launcher import Launcher, Program
from planner.loop import InstanceLoop
from planner.race.scenario import Run
from planner.registry import InstanceRecord
from planner.requests import RequestQueue
from runner import EngineDied, EngineFailure, EngineHost, InlineHost, ProcessHost
from runner.engine import GenerationRequest
from runner.engines.simulated import SimulatedConfig, simulated_spec
from runner.messages import ModelSpec, StatusName, TaskKind
from runner.testing import ScriptedEngine, scripted_runners
from tests.unit.barrier.group import Group, started_group
from tests.unit.mistakes import SECRET, Heard, Injected, hearing, mistaken, mistaken_later
from tests.unit.planner.cluster import cluster, text_of
from tests.unit.runner.rig import Rig, make_task, runner_rig

pytestmark = pytest.mark.anyio


@pytest.fixture
def heard() -> Generator[Heard]:
    with hearing() as log:
        yield log


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> FakeStore:
    return FakeStore(clock)


@pytest.fixture
async def group(clock: ManualClock) -> AsyncGenerator[Group]:
    async with started_group(FakeStore(clock), 3) as made:
        yield made


# --- a rank's heartbeat ---------------------------------------------------------------------------------------------------


async def test_a_rank_whose_heartbeat_died_says_so_and_accepts_nothing(
    group: Group, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = await group.all_connected()
    member = group.ranks[1].member
    monkeypatch.setattr(member, "_write", mistaken_later)

    async def beat() -> None:
        async with member.heartbeat():
            await asyncio.Event().wait()

    with pytest.raises(
        HeartbeatFailed, match=r"rank 1: a mistake of ours ended the heartbeat \(Injected at .*mistaken"
    ):
        await group.clock.run(beat())
    heard.check("heartbeat of rank 1: ")
    assert not member.trusted
    with pytest.raises(HeartbeatFailed):
        await anext(member.tasks())
    member.retire()
    with pytest.raises(HeartbeatFailed):
        await member.promise(epoch)


async def test_whoever_reads_the_log_elsewhere_hears_of_the_heartbeat(
    group: Group, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = group.ranks[1].member
    inside, reading = asyncio.Event(), asyncio.Event()

    async def beat() -> None:
        async with member.heartbeat():
            inside.set()
            await asyncio.Event().wait()

    async def read() -> None:
        async with aclosing(member.tasks()) as entries:
            reading.set()
            async for _ in entries:
                pass

    async with asyncio.TaskGroup() as both:
        reader = both.create_task(_ends_with(HeartbeatFailed, read()))
        beating = both.create_task(_ends_with(HeartbeatFailed, beat()))
        await inside.wait()
        await reading.wait()
        monkeypatch.setattr(member, "_write", mistaken_later)
        await group.clock.advance(member.settings.heartbeat)
        await asyncio.wait_for(asyncio.gather(reader, beating), 5)
    heard.check("heartbeat of rank 1: ")


async def _ends_with(kind: type[BaseException], doing: Awaitable[object]) -> None:
    with pytest.raises(kind):
        await doing


async def test_a_cancellation_from_outside_stays_one_though_the_heartbeat_died(
    group: Group, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = group.ranks[1].member
    monkeypatch.setattr(member, "_write", mistaken_later)

    async def beat() -> None:
        async with member.heartbeat():
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                own = asyncio.current_task()
                assert own is not None
                own.cancel()  # somebody else, meanwhile
                raise

    beating = asyncio.create_task(beat())
    await group.clock.advance(member.settings.heartbeat)
    await asyncio.wait({beating})
    assert beating.cancelled()
    heard.check("heartbeat of rank 1: ")


async def test_a_body_that_ends_with_its_own_error_at_that_moment_leaves_no_cancellation_behind(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = group.ranks[1].member
    monkeypatch.setattr(member, "_write", mistaken_later)
    over = asyncio.Event()

    def offer(_: object) -> None:
        over.set()

    monkeypatch.setattr(vars(member)["_log"], "offer", offer)

    async def beat() -> None:
        with pytest.raises(HeartbeatFailed):
            async with member.heartbeat():
                await over.wait()
        own = asyncio.current_task()
        assert own is not None
        assert own.cancelling() == 0
        await asyncio.sleep(0)  # where a cancellation that was left behind would come up

    await group.clock.run(beat())


@pytest.mark.parametrize("end", [None, LookupError("its own")], ids=["by itself", "by its own error"])
async def test_a_body_that_catches_the_cancellation_is_left_alone(
    end: Exception | None, group: Group, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = group.ranks[1].member
    monkeypatch.setattr(member, "_write", mistaken_later)

    async def body() -> None:
        async with member.heartbeat():
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if end is not None:
                    raise end from None

    async def beat() -> int:
        try:
            await body()
        except LookupError as error:
            if error is not end:
                raise
        own = asyncio.current_task()
        assert own is not None
        return own.cancelling()

    assert await group.clock.run(beat()) == 0
    heard.check("heartbeat of rank 1: ")


# --- readers of the store -------------------------------------------------------------------------------------------------


async def test_a_task_log_that_cannot_be_read_by_our_own_fault_ends_the_reading_by_name(
    group: Group, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = group.ranks[0].member
    monkeypatch.setattr(member.store, "reader", mistaken)
    with pytest.raises(PartFailed, match="a mistake of ours ended the reading of the task log"):
        await asyncio.wait_for(anext(member.tasks()), 5)
    heard.check("task log of rank 0: ")


async def test_a_reading_of_the_log_that_fails_behind_a_full_queue_is_still_told(
    group: Group, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = group.ranks[0].member
    small: asyncio.Queue[object] = asyncio.Queue(maxsize=1)
    monkeypatch.setattr(vars(member)["_log"], "entries", small)
    epoch = await group.all_connected()
    await group.load(epoch)
    entries = member.tasks()
    await anext(entries)
    monkeypatch.setattr("barrier.task_log.LogId.parse", mistaken)
    await group.conclude(epoch)
    await group.clock.advance(member.settings.heartbeat)

    async def read() -> None:
        while True:
            await asyncio.wait_for(anext(entries), 5)

    await _ends_with(PartFailed, read())
    heard.check("task log of rank 0: ")


@pytest.mark.parametrize("where", ["_hand_out", "_streams_of"])
async def test_wakeups_begin_anew_and_whoever_waits_looks_for_itself(
    where: str, group: Group, heard: Heard, monkeypatch: pytest.MonkeyPatch, clock: ManualClock
) -> None:
    wakeups = Wakeups(group.barrier.store, clock)
    snapshot = await group.barrier.inspect()
    async with wakeups.subscribe(group.barrier.keys.signals, snapshot.signals_end) as hints:
        await clock.advance(0.0)
        with monkeypatch.context() as broken:
            sound: Callable[..., object] = getattr(wakeups, where)
            tried: list[object] = []

            def once(*arguments: object) -> object:
                tried.append(arguments)
                return mistaken() if len(tried) == 1 else sound(*arguments)

            broken.setattr(wakeups, where, once)
            await group.ranks[0].member.report("Failed")
            await clock.advance(1.0)
            assert tried
        found = await hints.next(1.0)
        assert any(hint.kind == "lost" for hint in found), found
        await group.ranks[1].member.report("Failed")
        later: list[Hint] = []

        async def heard_again() -> bool:
            later.extend(await hints.next(0.1))
            return any(hint.kind == "report" and hint.rank == 1 for hint in later)

        await clock.run(wait_until(heard_again, "the hint after the mistake"))
    await wakeups.close()
    heard.check("reading of wake-ups, which begins anew: ")


# --- a runner's parts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of a runner, how a test puts a mistake into it, and what the log calls it.

    Attributes:
        status: where the runner is before.
        break_it: puts the mistake in.
        task: what the runner is asked for then; nothing where empty.
        subject: the beginning of the log's line.
        said: what the error says has ended.
    """

    status: StatusName
    break_it: Callable[[Rig, pytest.MonkeyPatch], object]
    task: TaskKind | None
    subject: str
    said: str


def mistake_in(name: str, whose: str = "runner") -> Callable[[Rig, pytest.MonkeyPatch], object]:
    return lambda rig, patch: patch.setattr(getattr(rig, whose), name, mistaken_later)


PARTS: dict[str, Part] = {
    "heartbeat": Part("Ready", mistake_in("_write", "member"), None, "heartbeat of rank 0: ", "the heartbeat"),
    "log": Part(
        "Ready",
        lambda rig, patch: patch.setattr("barrier.task_log.stream_entries", mistaken),
        "StartWarmup",
        "task log of rank 0: ",
        "the reading of the task log",
    ),
    "serving": Part("Ready", mistake_in("_receive"), "StartWarmup", "rank 0: ", "serving"),
    "phase": Part("Idle", mistake_in("_finish"), "ConnectToGroup", "step step of rank 0: ", "step step"),
    "generations": Part(
        "Ready", mistake_in("_generate_all"), "TextGeneration", "the generations of rank 0: ", "the generations"
    ),
    "departure": Part("Ready", mistake_in("_tear_down"), "Shutdown", "the departure of rank 0: ", "the departure"),
    "engine watch": Part(
        "Preparing",
        mistake_in("died", "host"),
        None,
        "the watch over the engine of rank 0: ",
        "the watch over the engine",
    ),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
async def test_a_mistake_in_a_part_of_a_runner_ends_it_by_name(
    part: Part, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with runner_rig() as rig:
        await rig.reach(part.status)
        part.break_it(rig, monkeypatch)
        if part.task is not None:
            await rig.put(make_task(part.task, rig.epoch))
        for phase in ("prepare", "connect", "generate"):
            await settle()
            if rig.engine.active(phase):
                rig.engine.finish(phase)
        await rig.clock.advance(rig.member.settings.heartbeat)
        with pytest.raises(PartFailed, match=f"rank 0: a mistake of ours ended {part.said} .Injected at .*mistaken"):
            await rig.ended()
        heard.check(part.subject)
        assert not rig.engine.active("generate")
        assert {"host kill", "host close"} & set(rig.journal), "the engine is gone"
        if part.said != "the heartbeat":  # the mistake of which is in saying anything
            report = await rig.report()
            assert report.status == ("ShuttingDown" if part.task == "Shutdown" else "Failed")
            assert "a mistake of ours ended" in report.error


async def test_a_mistake_while_generating_fails_the_attempt_and_the_runner_lives(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with runner_rig() as rig:
        await rig.reach("Ready")
        with monkeypatch.context() as broken:
            broken.setattr("runner.generations.pieces_of", mistaken)
            await rig.put(make_task("TextGeneration", rig.epoch))
            await settle()
            rig.engine.say("a piece")
            await settle()
        heard.check("rank 0: ")
        assert rig.status == "Failed"
        assert (await rig.report()).error.startswith("a mistake of ours, Injected at ")
        await rig.conclude()
        await rig.reach("Ready")


async def test_a_mistake_in_preparing_an_engine_fails_the_attempt(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with runner_rig() as rig:
        monkeypatch.setattr(rig.host, "prepare", mistaken_later)
        await rig.open()
        await settle()
        assert rig.status == "Failed"
        assert (await rig.report()).error.startswith("a mistake of ours, Injected at ")
    heard.check("rank 0: ")


async def test_tidying_up_goes_on_after_a_mistake_in_it(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    async with runner_rig() as rig:
        await rig.reach("Ready")
        stop_work = rig.runner._stop_work  # pyright: ignore[reportPrivateUsage]

        async def stop_and_fail() -> None:
            await stop_work()
            mistaken()

        monkeypatch.setattr(rig.runner, "_stop_work", stop_and_fail)
        rig.runner.stop()
        with pytest.raises(PartFailed):
            await rig.ended()
        heard.check("rank 0: ")
        heard.check("rank 0, tidying up: ")
        assert "host kill" in rig.journal


# --- a planner's parts ----------------------------------------------------------------------------------------------------


def once(sound: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """As it is, but for a mistake at the first call."""
    called: list[object] = []

    async def call(*arguments: Any, **named: Any) -> Any:
        called.append(arguments)
        if len(called) == 1:
            mistaken()
        return await sound(*arguments, **named)

    return call


@pytest.mark.parametrize("broken", ["_follow_desired", "_follow_record"])
async def test_the_watch_over_the_desired_state_goes_on_after_a_mistake(
    broken: str, store: FakeStore, clock: ManualClock, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(store, clock, 2) as made, made.planner("one") as one, made.planner("two") as two:
        followed = await made.run(one.launch(made.spec))
        monkeypatch.setattr(one, broken, once(getattr(one, broken)))
        stopped = await made.run(two.launch(made.spec))
        await made.run(stopped.stop())
        await made.until(lambda: followed.state.over, "the first planner to hear of the stop")
        assert followed.state.stopped
    heard.check("the watch over the desired state, which begins anew: |instance demo: following its desired state: ")


@pytest.mark.parametrize("broken", ["_follow_desired", "_take_up"])
async def test_a_planner_that_takes_up_all_instances_goes_on_after_a_mistake(
    broken: str, store: FakeStore, clock: ManualClock, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        await made.run(planner.launch(made.spec, wait=False))
        async with made.planner("daemon") as daemon:
            monkeypatch.setattr(daemon, broken, once(getattr(daemon, broken)))
            running = asyncio.create_task(daemon.run())
            await made.until(lambda: "demo" in daemon.instances, "the daemon to take it up")
            running.cancel()
            await asyncio.wait({running})
            assert running.cancelled()
    heard.check("the (look at|watch over) the desired state, which begins anew: |instance demo: taking it up: ")


async def test_an_instance_whose_taking_up_fails_does_not_keep_the_others_waiting(
    store: FakeStore, clock: ManualClock, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(store, clock, 2, name="a") as first, cluster(store, clock, 2, name="b") as second:
        async with first.planner() as planner:
            await first.run(planner.launch(first.spec, wait=False))
            await first.run(planner.launch(second.spec, wait=False))
        async with first.planner("daemon") as daemon:
            take_up = daemon._take_up  # pyright: ignore[reportPrivateUsage]

            async def take_up_b_only(record: InstanceRecord) -> None:
                if record.spec.name == "a":
                    mistaken()
                await take_up(record)

            monkeypatch.setattr(daemon, "_take_up", take_up_b_only)
            running = asyncio.create_task(daemon.run())
            await first.until(lambda: "b" in daemon.instances, "the second instance to be taken up")
            running.cancel()
            await asyncio.wait({running})
    heard.check("instance a: taking it up: ")


@pytest.mark.parametrize("where", ["_tick", "_carry_out", "_lead_if_due"])
async def test_a_mistake_in_planning_ends_every_wait_and_the_log_has_its_frames(
    where: str, store: FakeStore, clock: ManualClock, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        monkeypatch.setattr(InstanceLoop, where, mistaken_later)
        with pytest.raises(InstanceFailed, match=r"^demo: the planner failed \(Injected\); see its log$"):
            await made.run(planner.launch(made.spec))
    heard.check("instance demo: planning: ")
    assert len(heard.mistakes) == 1, "told once"


@pytest.mark.parametrize("where", ["dispatch_on_arrival", "watch"])
async def test_a_mistake_in_what_a_planner_waits_with_is_heard(
    where: str, store: FakeStore, clock: ManualClock, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        monkeypatch.setattr(Barrier, where, mistaken_later)
        with pytest.raises(InstanceFailed, match="the planner failed"):
            await made.run(planner.launch(made.spec))
    heard.check("instance demo: planning: ")


async def test_a_mistake_in_the_end_of_a_wait_that_was_interrupted_is_heard(
    store: FakeStore, clock: ManualClock, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stubborn(*_: object, **__: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            mistaken()

    async with cluster(store, clock, 2) as made, made.planner() as planner:
        await made.run(planner.launch(made.spec))
        monkeypatch.setattr(Barrier, "watch", stubborn)
        for planned in planner._planned.values():  # pyright: ignore[reportPrivateUsage]
            planned.loop.poke()
            await clock.advance(0)
            planned.loop.poke()
            await clock.advance(0)
        monkeypatch.undo()
    heard.check("instance demo: planning: ")


async def test_a_mistake_in_taking_back_a_request_is_heard(
    store: FakeStore, clock: ManualClock, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        monkeypatch.setattr(RequestQueue, "_withdraw", mistaken_later)
        with pytest.raises(Injected):
            await made.run(text_of(instance.generate("Why?", max_tokens=3)))
    heard.check("taking back a request: ")


async def test_a_gate_goes_on_renewing_its_leadership_after_a_mistake(
    store: FakeStore, clock: ManualClock, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        scripted_runners(store, "demo", 2),
        LoadGate(store.client("gate"), "demo", world_size=2, clock=clock) as gate,
    ):
        outcome = await clock.run(gate.open(timeout=10))
        assert isinstance(outcome, Opened)
        monkeypatch.setattr(Barrier, "lead", once(Barrier.lead))
        barrier = Barrier(store.client("looker"), "demo", world_size=2, clock=clock)
        await clock.advance(3 * barrier.settings.lease)
        snapshot = await barrier.inspect()
        await barrier.close()
        assert snapshot.leader is not None
        assert snapshot.leader_left_ms > 0
    heard.check("gate of demo: renewing its leadership, which begins anew: ")


# --- processes ------------------------------------------------------------------------------------------------------------


async def test_a_process_whose_keeper_failed_is_given_up_by_name(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launcher, "_live", mistaken_later)
    async with Launcher([Program("rank 0", (sys.executable, "-c", "pass"))]) as launcher:
        given_up = await asyncio.wait_for(launcher.given_up(), 30)
    assert given_up.phase == "given up"
    assert given_up.last_words.startswith("the part of rankgate that keeps it running failed: Injected at ")
    heard.check("the keeper of rank 0: ")


@pytest.mark.parametrize("ear", ["on_change", "on_line"])
async def test_whoever_is_told_of_processes_may_make_a_mistake(ear: str, heard: Heard) -> None:
    program = Program("rank 0", (sys.executable, "-c", "print('a line', flush=True); import time; time.sleep(600)"))
    listener: dict[str, Any] = {ear: mistaken}
    async with Launcher([program], **listener) as launcher:
        await wait_until(lambda: heard.mistakes, "the mistake to be told", 30)
        assert [state.phase for state in launcher.states] == ["running"]
    heard.check("telling (of a process's state|a process's line): ")


# --- commands -------------------------------------------------------------------------------------------------------------


async def test_a_state_file_goes_on_beating_after_a_mistake(
    tmp_path: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    state = ProcessState(kind="planner", namespace="rankgate", pid=8, heartbeat=0.001)
    monkeypatch.setattr("planner.cli.health._beat", once(health._beat))  # pyright: ignore[reportPrivateUsage]
    async with health.keeping_state(path, state):
        first = health.read_state(path, "planner").beat
        await wait_until(lambda: health.read_state(path, "planner").beat > first, "a beat after the mistake")
    heard.check("the beat of the state file, which begins anew: ")


async def test_the_service_manager_is_told_again_after_a_mistake(
    clock: ManualClock, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, str]] = []

    def tell(**lines: str) -> None:
        told.append(lines)

    manager = ServiceManager("@rankgate-test", watchdog_seconds=30.0)
    monkeypatch.setattr(manager, "tell", tell)
    statuses = iter([mistaken])
    work = Work(lambda: True, lambda: next(statuses, lambda: "well")() or "", dict[str, int], patience=60.0)
    async with supervised(work, manager, clock=clock):
        await clock.advance(1.0)
    assert {"READY": "1", "STATUS": "well"} in told
    heard.check("telling the service manager, which begins anew: ")


class Ranks:
    """A runner that fails, or serves until it is asked to stop."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.stopped = asyncio.Event()

    def stop(self) -> None:
        self.stopped.set()

    async def run(self, *, wait_for_store: float = 0.0) -> None:
        if isinstance(self.failure, Injected):
            mistaken()
        if self.failure is not None:
            raise self.failure
        await self.stopped.wait()


async def test_a_mistake_in_one_of_a_processs_ranks_ends_the_others_and_is_raised(heard: Heard) -> None:
    sound = Ranks()
    runners: Any = [sound, Ranks(Injected())]
    with pytest.raises(Injected):
        await run_all(runners, Interrupts(lambda: None))
    assert sound.stopped.is_set()
    heard.check("runner 1: ")


async def test_the_errors_of_all_ranks_are_told(heard: Heard) -> None:
    runners: Any = [Ranks(RankTaken("rank 0 is taken")), Ranks(RankTaken("rank 1 is taken"))]
    with pytest.raises(RankTaken, match="rank 0"):
        await run_all(runners, Interrupts(lambda: None))
    assert [line.strip() for line in heard.lines] == ["rank 1 is taken"]


async def test_a_mistake_of_a_rank_counts_after_a_signal_too(heard: Heard) -> None:
    interrupts = Interrupts(lambda: None)
    interrupts.receive(signal.SIGTERM)
    runners: Any = [Ranks(Injected())]
    with pytest.raises(Injected):
        await run_all(runners, interrupts)
    heard.check("runner 0: ")


@pytest.mark.parametrize(
    ("work", "trouble"), [(mistaken_later, asyncio.Event().wait), (asyncio.Event().wait, mistaken_later)]
)
async def test_a_mistake_in_what_up_does_ends_it(work: Any, trouble: Any) -> None:
    with pytest.raises(Injected):
        await up._first_of(work(), trouble())  # pyright: ignore[reportPrivateUsage]


async def test_a_mistake_in_what_the_race_waits_for_ends_it() -> None:
    run: Any = object.__new__(Run)
    run.launcher = SimpleNamespace(given_up=asyncio.Event().wait)
    with pytest.raises(Injected):
        await run._until(mistaken_later())


async def test_the_picture_of_up_goes_on_after_a_mistake(
    store: FakeStore, clock: ManualClock, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []

    def nothing(*_: object) -> Picture:
        return Picture("demo", 2, 4)

    async def look(*_: object) -> None:
        looked.append("looked")
        if len(looked) == 1:
            mistaken()

    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        picture: Any = object.__new__(up.Cluster)
        monkeypatch.setattr(up.Cluster, "_look", look)
        monkeypatch.setattr(up.Cluster, "_compose", nothing)
        picture._store = adopt(store.client("looker"))
        picture._options = SimpleNamespace(spec=made.spec, namespace="rankgate")
        picture._clock, picture._instance = clock, instance
        picture._show = SimpleNamespace(update=nothing)
        async with picture._looking():
            await clock.advance(1.0)
    assert len(looked) == 2
    heard.check("the picture of the cluster, which begins anew: ")


async def test_a_mistake_in_the_watch_for_a_planner_ends_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_nobody_plans_for", mistaken_later)
    observer: Any = None
    with pytest.raises(Injected):
        await commands._unless_nobody_plans(  # pyright: ignore[reportPrivateUsage]
            asyncio.Event().wait(), observer, "demo", Settings()
        )


# --- hosts of engines -----------------------------------------------------------------------------------------------------

MODEL = ModelSpec(model_id="toy", total_layers=2)


async def load_on(host: EngineHost) -> list[int]:
    return [layers async for layers in host.load(MODEL)]


async def test_a_mistake_in_a_call_of_an_engine_fails_the_call(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    host = InlineHost(ScriptedEngine(auto=True).fresh)
    monkeypatch.setattr("runner.host.inline._InlineLife._drive", mistaken_later)
    with pytest.raises(EngineFailure, match="a mistake of ours ended its loading"):
        await asyncio.wait_for(load_on(host), 10)
    heard.check("the call of the engine of rank 0: ")
    await host.kill()


async def test_a_mistake_in_closing_an_engine_does_not_keep_it(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    host = InlineHost(ScriptedEngine(auto=True).fresh, grace_seconds=600)
    await load_on(host)
    monkeypatch.setattr("runner.host.inline._InlineLife._close", mistaken_later)
    await asyncio.wait_for(host.close(), 30)
    heard.check("the closing of the engine of rank 0: ")


async def test_a_mistake_in_tidying_after_a_call_kills_the_engine(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine()
    host = InlineHost(engine.fresh, grace_seconds=600)
    engine.release("load")
    await load_on(host)
    with monkeypatch.context() as broken:
        broken.setattr("runner.host.lives.BaseHost._tidy", mistaken_later)
        pieces = host.generate(GenerationRequest("a", SECRET, 3))
        engine.say("a piece")
        await anext(pieces)
        with pytest.raises(Injected):
            await pieces.aclose()
    heard.check("the tidying after the engine of rank 0: ")
    with pytest.raises(EngineFailure, match="no engine of rank 0 is running"):
        await host.warm_up()
    await load_on(host)
    assert engine.lives == 2
    await host.close()


async def test_a_mistake_in_handing_a_call_to_an_engine_fails_the_call(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = InlineHost(ScriptedEngine(auto=True).fresh)
    monkeypatch.setattr(host, "_hand_over", mistaken_later)
    with pytest.raises((Injected, EngineFailure)):
        await asyncio.wait_for(host.prepare(0, 2), 10)
    heard.check("the start of the engine of rank 0: ")
    monkeypatch.undo()
    assert await asyncio.wait_for(host.prepare(0, 2), 10) is None, "the next one is taken"
    await host.shut_down()


async def test_a_mistake_in_starting_a_spare_engine_gives_it_up(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    host = InlineHost(ScriptedEngine(auto=True).fresh)
    await load_on(host)
    monkeypatch.setattr(host, "_costly", object())
    monkeypatch.setattr(host, "_start_spare", mistaken_later)
    await host.warm_up()
    await settle()
    heard.check("the start of a spare engine of rank 0: ")
    await asyncio.wait_for(host.shut_down(), 10)


async def test_a_mistake_in_starting_an_engines_process_is_heard_and_raised(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = ProcessHost(simulated_spec(SimulatedConfig(), rank=0, world_size=1))
    monkeypatch.setattr(asyncio.get_running_loop(), "subprocess_exec", mistaken_later)
    with pytest.raises(EngineFailure, match="cannot be started: Injected"):
        await load_on(host)
    heard.check("the start of the engine of rank 0: ")


async def test_a_mistake_in_reading_an_engines_replies_ends_it(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    host = ProcessHost(simulated_spec(SimulatedConfig(), rank=0, world_size=1))
    monkeypatch.setattr("runner.host.process._ProcessLife._receive", mistaken)
    with pytest.raises(EngineDied, match="a mistake of ours kept its replies from being read"):
        await asyncio.wait_for(load_on(host), 60)
    heard.check("reading what the engine of rank 0 says: ")
    await host.close()


@pytest.mark.parametrize(
    "where",
    [
        "server._receive_or_end({'kind': 'the murderer'})",
        "server._send = mistaken; server._receive_or_end({'kind': 'call', 'call': 1, 'name': 'warm_up', 'request': None})",
        "server._commands = mistaken; server._read_commands(asyncio.get_running_loop())",
    ],
    ids=["a command", "the work", "the reading thread"],
)
def test_an_engines_process_that_makes_a_mistake_ends_and_says_which(where: str) -> None:
    code = (
        "import asyncio\n"
        "from runner.host.child import _EngineServer\n"
        "def mistaken(*_): raise LookupError('the murderer')\n"
        "async def main():\n"
        "    server = _EngineServer(0, 1)\n"
        f"    {where}\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert re.search(
        r"^a mistake of ours: \w+Error \[\S+runner/host/child\.py:\d+ in \w+|^a mistake of ours: LookupError",
        ended.stderr,
    )
    assert "murderer" not in ended.stderr


# --- all of them ----------------------------------------------------------------------------------------------------------

STARTERS = (
    *(
        "create_task",
        "ensure_future",
        "gather",
        "shield",
        "run_in_executor",
        "to_thread",
        "start_soon",
        "run_coroutine_threadsafe",
    ),
    *(
        "call_soon",
        "call_soon_threadsafe",
        "call_later",
        "call_at",
        "add_done_callback",
        "add_signal_handler",
        "add_reader",
    ),
    *("Thread", "Timer", "Process"),
)
"""What begins something that runs by itself, or swallows how it ended."""

OWNED: dict[str, str] = {
    "barrier/supervise.py": "the supervisor itself",
    "planner/cli/runner_process.py _started.shield": "awaited there; the store's and the engine's own ends are heard by the caller",
    "planner/cli/process.py shell.add_signal_handler": "`Interrupts`; what fails in there is told by `hear_loop`",
    "planner/cli/process.py receive.call_later": "as above",
    "planner/cli/process.py lost.call_soon_threadsafe": "as above",
    "planner/cli/process.py agrees.add_reader": "as above; the answer is awaited, and a signal ends that",
    "planner/cli/process.py within.Timer": "the last resort, which does nothing but end this process",
    "planner/cli/process.py _end.Thread": "the last resort; the process ends whatever becomes of it",
    "planner/cli/streams.py watch.Thread": "imports nothing of ours; whoever writes notices a loss without it",
    "planner/launcher.py given_up.shield": "of a future, which `_give_up` settles",
    "planner/launcher.py leave_with_parent.Thread": "ends this process however it ends",
    "planner/requests.py _to_the_end.shield": "of a task that is under the supervisor",
    "planner/race/process.py _run_process.create_task": "the first of them to end ends the process, with its error",
    "planner/race/gated.py with_barrier.create_task": "`cancelled` raises what ended it",
    "planner/race/scenario.py bring_up.create_task": "`cancelled` raises what ended it",
    "runner/engines/mlx.py run.Thread": "a job catches all and hands it to its caller",
    "runner/engines/mlx.py work.call_soon_threadsafe": "settles what the caller awaits",
    "runner/engines/mlx.py load.create_task": "awaited there: its failure is the load's",
    "runner/engines/mlx.py load.to_thread": "awaited there: its failure is the load's",
    "runner/engines/ring.py join.gather": "awaited there, and raises",
    "runner/host/inline.py kill.add_done_callback": "says that the engine is gone; what fails in there is told by `hear_loop`",
    "runner/host/lives.py _abandon.shield": "of a task that is under the supervisor",
    "runner/host/lives.py _values.shield": "of a task that is under the supervisor",
    "runner/host/process.py start.add_done_callback": "says that the engine is gone; what fails in there is told by `hear_loop`",
    "runner/host/process.py start.shield": "of a task that is under the supervisor",
    "runner/host/process.py _spawned.run_in_executor": "the engine never was; what fails in there is told by `hear_loop`",
    "runner/host/process.py process_exited.run_in_executor": "the engine is gone; what fails in there is told by `hear_loop`",
    "runner/host/process.py process_exited.add_done_callback": "as `process_exited.call_later`, which comes where this does not",
    "runner/host/process.py process_exited.call_later": "the engine is gone already; what fails in there is told by `hear_loop`",
    "runner/host/child.py serve.Thread": "ends the engine's process however it ends, and says why",
    "runner/host/child.py _read_commands.call_soon_threadsafe": "what is called ends the engine's process where it fails, and says why",
    "runner/host/child.py _receive.create_task": "its end is looked at by `_end_if_mistaken`",
    "runner/host/child.py _receive.add_done_callback": "the same",
    "runner/runner.py _prepare.shield": "of a task that is under the supervisor",
    "runner/process.py _run.shield": "`_clean_up` tells of every step that fails; `shut_down` raises to the caller",
}
"""Those outside the supervisor, by file and function, with who hears their ends. Test kits are left out: a test hears them."""

TESTED = {
    "barrier/member.py heartbeat": "test_a_rank_whose_heartbeat_died_says_so_and_accepts_nothing",
    "barrier/member.py tasks": "test_a_task_log_that_cannot_be_read_by_our_own_fault_ends_the_reading_by_name",
    "barrier/store/wakeups.py _restart": "test_wakeups_begin_anew_and_whoever_waits_looks_for_itself",
    "planner/planner.py __aenter__": "test_the_watch_over_the_desired_state_goes_on_after_a_mistake",
    "planner/planner.py run": "test_a_planner_that_takes_up_all_instances_goes_on_after_a_mistake",
    "planner/planner.py _plan": "test_a_mistake_in_planning_ends_every_wait_and_the_log_has_its_frames",
    "planner/planner.py _follow_desired": "test_an_instance_whose_taking_up_fails_does_not_keep_the_others_waiting",
    "planner/loop.py _until_poked": "test_a_mistake_in_what_a_planner_waits_with_is_heard",
    "planner/requests.py _to_the_end": "test_a_mistake_in_taking_back_a_request_is_heard",
    "planner/gate.py open": "test_a_gate_goes_on_renewing_its_leadership_after_a_mistake",
    "planner/launcher.py __init__": "test_whoever_is_told_of_processes_may_make_a_mistake",
    "planner/launcher.py __aenter__": "test_a_process_whose_keeper_failed_is_given_up_by_name",
    "planner/cli/commands.py _unless_nobody_plans": "test_a_mistake_in_the_watch_for_a_planner_ends_the_request",
    "planner/cli/health.py keeping_state": "test_a_state_file_goes_on_beating_after_a_mistake",
    "planner/cli/runner_process.py run_all": "test_a_mistake_in_one_of_a_processs_ranks_ends_the_others_and_is_raised",
    "planner/cli/up.py trouble": "test_a_mistake_in_what_up_does_ends_it",
    "planner/cli/up.py _looking": "test_the_picture_of_up_goes_on_after_a_mistake",
    "planner/cli/up.py _first_of": "test_a_mistake_in_what_up_does_ends_it",
    "planner/race/scenario.py _until": "test_a_mistake_in_what_the_race_waits_for_ends_it",
    "planner/cli/watchdog.py supervised": "test_the_service_manager_is_told_again_after_a_mistake",
    "runner/process.py _until_leaving": "test_a_mistake_in_a_part_of_a_runner_ends_it_by_name",
    "runner/process.py _part": "test_a_mistake_in_a_part_of_a_runner_ends_it_by_name",
    "runner/runner.py _prepare": "test_a_mistake_in_preparing_an_engine_fails_the_attempt",
    "runner/runner.py _check_engine": "test_a_mistake_in_a_part_of_a_runner_ends_it_by_name",
    "runner/generations.py generate": "test_a_mistake_while_generating_fails_the_attempt_and_the_runner_lives",
    "runner/host/inline.py begin": "test_a_mistake_in_a_call_of_an_engine_fails_the_call",
    "runner/host/inline.py close": "test_a_mistake_in_closing_an_engine_does_not_keep_it",
    "runner/host/lives.py _abandon": "test_a_mistake_in_tidying_after_a_call_kills_the_engine",
    "runner/host/lives.py _values": "test_a_mistake_in_handing_a_call_to_an_engine_fails_the_call",
    "runner/host/lives.py warm_up": "test_a_mistake_in_starting_a_spare_engine_gives_it_up",
    "runner/host/process.py start": "test_a_mistake_in_starting_an_engines_process_is_heard_and_raised",
}
"""Those under the supervisor, with the test that puts a mistake into them."""

SUPERVISED = ("background", "restarted", "keep_going", "alongside", "guarded", "passed_over")


def calls_of(names: Iterable[str]) -> dict[str, str]:
    """Every call of these names in the product, as ``file function.name`` and as ``file function``; the test kits left out."""
    root = Path(__file__).parents[2]
    found: dict[str, str] = {}
    for package in ("barrier", "runner", "planner"):
        for file in sorted((root / package).rglob("*.py")):
            place = file.relative_to(root).as_posix()
            if "/testing/" not in place:
                visit(ast.parse(file.read_text(encoding="utf-8")), place, "module", frozenset(names), found)
    return found


def visit(node: ast.AST, place: str, function: str, names: frozenset[str], found: dict[str, str]) -> None:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        function = node.name
    if isinstance(node, ast.Call):
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
        if name in names:
            found[f"{place} {function}.{name}"] = f"{place} {function}"
    for child in ast.iter_child_nodes(node):
        visit(child, place, function, names, found)


def test_whatever_runs_by_itself_has_an_owner_that_hears_its_end() -> None:
    found = {one: file for one in calls_of(STARTERS) if (file := one.split(" ")[0]) != "barrier/supervise.py"}
    unowned = sorted(set(found) - set(OWNED))
    assert not unowned, f"begin these with barrier.supervise, or say in OWNED who hears how they end: {unowned}"
    stale = sorted(set(OWNED) - set(found) - {"barrier/supervise.py"})
    assert not stale, f"there are no such calls any more: {stale}"


def test_a_test_puts_a_mistake_into_everything_that_the_supervisor_owns() -> None:
    found = {place for place in calls_of(SUPERVISED).values() if not place.startswith("barrier/supervise.py")}
    untested = sorted(found - set(TESTED))
    assert not untested, f"write a test that puts a mistake into these, and name it in TESTED: {untested}"
    assert sorted(set(TESTED) - found) == []
    assert sorted(set(TESTED.values()) - set(globals())) == [], "there are no such tests"

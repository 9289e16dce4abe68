"""The runner, one idea at a time. Read it from top to bottom.

A runner is one rank's process: it reads the group's task log, accepts or refuses each task by a table, drives an engine and reports. The
engine may be anything, and may fail in any way; the runner outlives it. A task out of state gets an answer, where other runners raise.

Everything here runs in this process: the store is in memory, the clock stands still until it is moved, and the engine is scripted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from barrier import (
    Barrier,
    Concluded,
    Dispatched,
    EpochId,
    Leading,
    Member,
    Opened,
    RankRule,
    Report,
    TaskOutcome,
    Verdict,
)
from barrier.testing import FakeStore, ManualClock
from barrier.testing.waiting import settle
from runner import EngineFailure, EngineGroup, GenerationRequest, InlineHost, Runner
from runner.admission import Accept, AlreadyDone, Invalid, NotYet, Promise, Stale, Standing, judge
from runner.messages import (
    ConnectToGroup,
    LoadModel,
    MalformedMessage,
    ModelSpec,
    RunnerFailed,
    RunnerLoading,
    Shutdown,
    StartWarmup,
    StatusName,
    Task,
    TextGeneration,
    decode_chunk,
    decode_event,
    decode_task,
    derive_task_id,
    encode,
)
from runner.testing import ScriptedEngine, ScriptedRunner, scripted_runners

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """anyio's plugin for pytest runs the tests; on asyncio, whatever else is installed."""
    return "asyncio"


MODEL = ModelSpec(model_id="toy", total_layers=4)


# --- tasks ------------------------------------------------------------------------------------------------------------------


def load_model(epoch: EpochId) -> LoadModel:
    """The task of the step "load"."""
    return LoadModel(
        task_id=derive_task_id("demo", str(epoch), "load"), instance="demo", epoch=str(epoch), term=1, model=MODEL
    )


def test_01_a_task_is_a_message_that_cannot_be_misread() -> None:
    """What a planner writes, a runner reads back as it was, or not at all. And no complaint quotes what was in it."""
    task = load_model(EpochId(7, "a" * 32))
    assert decode_task(encode(task)) == task

    for payload in (b"LoadModel please", b'{"kind": "EraseDisk"}', encode(task).replace(b"term", b"turm")):
        with pytest.raises(MalformedMessage):
            decode_task(payload)


def test_02_a_step_of_an_epoch_has_one_task_id() -> None:
    """The same instance, epoch and step give the same id, on any planner: so a repeated dispatch is recognised."""
    epoch = EpochId(7, "a" * 32)
    assert load_model(epoch).task_id == load_model(epoch).task_id
    assert load_model(epoch).task_id != load_model(EpochId(7, "b" * 32)).task_id


# --- the judge ------------------------------------------------------------------------------------------------------------

EPOCH = EpochId(7, "a" * 32)


def standing(status: StatusName, *, world_size: int = 2, done: TaskOutcome | None = None) -> Standing:
    """A runner that has promised EPOCH."""
    return Standing(
        instance="demo",
        status=status,
        incarnation="me",
        promise=Promise(EPOCH, "me", world_size),
        floor=EPOCH.number,
        outcomes={done.task_id: done} if done else {},
    )


def test_03_a_pure_function_judges_every_task_before_anything_happens() -> None:
    """It looks at the status, the promise and the task, and gives one of five answers. This is the whole policy."""
    task = load_model(EPOCH)

    assert judge(standing("Connected"), task) == Accept()
    assert isinstance(judge(standing("Idle"), task), NotYet), "come back when all ranks are connected"
    assert isinstance(judge(standing("Loaded"), task), Stale), "the moment for it is over"
    assert isinstance(judge(standing("Connected"), task.model_copy(update={"instance": "other"})), Invalid)

    done = TaskOutcome(task_id=task.task_id, step="load", n=3, result="done")
    assert judge(standing("Loaded", done=done), task) == AlreadyDone(done), "a duplicate: say it again, and do nothing"


def test_04_load_model_in_idle_is_for_a_single_rank_only() -> None:
    """With several ranks it is the race that kills other runners: one is told to load before it has connected."""
    assert isinstance(judge(standing("Idle", world_size=2), load_model(EPOCH)), NotYet)
    assert judge(standing("Idle", world_size=1), load_model(EPOCH)) == Accept()


def test_05_a_runner_acts_in_exactly_the_epoch_that_it_promised() -> None:
    """Lower is too late, higher is too early. And the same number is not enough: a failover may issue a number twice."""
    assert isinstance(judge(standing("Connected"), load_model(EpochId(6, "a" * 32))), Stale)
    assert isinstance(judge(standing("Connected"), load_model(EpochId(8, "a" * 32))), NotYet)
    assert isinstance(judge(standing("Connected"), load_model(EpochId(7, "b" * 32))), Stale)


# --- an engine --------------------------------------------------------------------------------------------------------------


class CountingEngine:
    """All that an engine is: six calls. This one counts to the number of layers and to ten."""

    async def prepare(self, rank: int, world_size: int) -> str | None:
        return None

    async def connect(self, group: EngineGroup) -> None:
        self.rank = group.rank

    async def load(self, model: ModelSpec) -> AsyncIterator[int]:
        for layers in range(1, model.total_layers + 1):
            yield layers

    async def warm_up(self) -> None:
        pass

    async def generate(self, request: GenerationRequest) -> AsyncIterator[str]:
        for number in range(1, 11):
            yield f"{number} "

    async def close(self) -> None:
        pass


async def test_06_an_engine_lives_behind_a_host_that_can_kill_it() -> None:
    """The runner never calls an engine itself. `InlineHost` keeps it in this process; `ProcessHost`, for real ones, in a child."""
    host = InlineHost(CountingEngine)
    await host.connect(
        EngineGroup("demo", f"7-{'a' * 32}", rank=0, endpoints=("node-0:5000", "node-1:5000"), deadline=60.0)
    )
    assert [layers async for layers in host.load(MODEL)] == [1, 2, 3, 4]
    await host.kill()
    with pytest.raises(EngineFailure, match="no engine of rank 0 is running"):
        await host.warm_up()


# --- a runner ---------------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """A runner as rank 0, and a planner's barrier to speak to it; another rank is there to make the group whole."""

    clock: ManualClock
    barrier: Barrier
    runner: Runner
    member: Member
    engine: ScriptedEngine

    async def open(self) -> EpochId:
        """Begin an attempt, and let the ranks promise it."""
        outcome = await self.barrier.open()
        assert isinstance(outcome, Opened), outcome
        await settle()
        return outcome.epoch

    async def say(self, task: Task, status: str, *, attempt: int = 1) -> None:
        """Dispatch a task to rank 0 while it has that status, and let it come to rest."""
        outcome = await self.barrier.dispatch(
            EpochId.parse(task.epoch),
            task.kind,
            encode(task).decode(),
            (RankRule(0, 0, (status,)),),
            to=(0, 0),
            attempt=attempt,
        )
        assert isinstance(outcome, Dispatched), outcome
        await settle()

    async def report(self) -> Report:
        """What rank 0 says of itself, as the planner reads it."""
        view = (await self.barrier.inspect()).ranks[0]
        assert view.report is not None
        return view.report

    async def history(self) -> list[str]:
        """What rank 0 has told, in order and in short."""
        entries = await self.barrier.store.commands.xrange(self.barrier.keys.events)
        told: list[str] = []
        for _, fields in entries:
            if fields.get(b"inc", b"").decode() == self.member.incarnation:
                event = decode_event(fields[b"event"])
                match event.kind:
                    case "TaskAcknowledged":
                        told.append("acknowledged")
                    case "RunnerStatusUpdated":
                        told.append(f"is {event.status.kind}")
                    case "TaskStatusUpdated":
                        told.append(event.state)
        return told


@asynccontextmanager
async def stage() -> AsyncGenerator[Stage]:
    clock = ManualClock()
    store = FakeStore(clock)
    engine = ScriptedEngine()
    member = Member(store.client(), "demo", rank=0, clock=clock)
    runner = Runner(member, InlineHost(engine.fresh), clock=clock)
    async with Barrier(store.client(), "demo", world_size=2, clock=clock) as barrier, ScriptedRunner(store, "demo", 1):
        assert isinstance(await barrier.lead(), Leading)
        running = asyncio.create_task(runner.run())
        await settle()
        yield Stage(clock, barrier, runner, member, engine)
        engine.release()
        runner.stop()
        await running
        await member.close()


def connect(epoch: EpochId) -> ConnectToGroup:
    return ConnectToGroup(
        task_id=derive_task_id("demo", str(epoch), "connect"),
        instance="demo",
        epoch=str(epoch),
        term=1,
        deadline=60.0,
    )


async def test_07_an_accepted_task_is_told_in_a_fixed_order() -> None:
    """Running, the new status, the acknowledgement; then the work; then Complete, and the status after it.

    The status is out before the acknowledgement, so that a planner that saw the one never plans on an old other.
    """
    async with stage() as on:
        epoch = await on.open()
        await on.say(connect(epoch), "Idle")
        assert await on.history() == ["is Idle", "Running", "is Connecting", "acknowledged"]

        on.engine.finish("connect")
        await settle()
        assert (await on.history())[4:] == ["Complete", "is Connected"]
        assert (await on.report()).status == "Connected"


async def test_08_a_refused_task_changes_nothing() -> None:
    """One acknowledgement, one refusal with a reason, and everything else stays as it was: status, engine, process."""
    async with stage() as on:
        epoch = await on.open()
        await on.say(load_model(epoch), "Idle")

        assert await on.history() == ["is Idle", "acknowledged", "Failed"]
        [refused] = (await on.report()).outcomes
        assert (refused.result, refused.code, refused.retryable) == ("rejected", "NotYet", True)
        assert refused.detail == "LoadModel needs Connected, this runner is Idle; wait for Connected at the barrier"
        assert on.engine.calls == ["start", "prepare"]

        await on.say(connect(epoch), "Idle")
        on.engine.finish("connect")
        await settle()
        await on.say(load_model(epoch), "Connected", attempt=2)
        assert on.runner.status == RunnerLoading(layers_loaded=0, total_layers=4), "the same task, in its own time"


async def test_09_a_blocked_engine_blocks_nothing_else() -> None:
    """Reports go on, with the progress in them; a lease never lapses because a disk is slow."""
    async with stage() as on:
        epoch = await on.open()
        on.engine.finish("connect").progress(1)
        await on.say(connect(epoch), "Idle")
        await on.say(load_model(epoch), "Connected")
        await on.clock.advance(60)
        report = await on.report()
        assert (report.status, report.progress) == ("Loading", (1, 4))


async def test_10_an_engine_that_fails_ends_the_attempt_and_not_the_runner() -> None:
    """The rank is Failed, and says why and whether it can help to try again. After the verdict it is Idle, with a fresh engine."""
    async with stage() as on:
        epoch = await on.open()
        on.engine.fail("connect", "not enough memory", permanent=True)
        await on.say(connect(epoch), "Idle")
        report = await on.report()
        assert (report.status, report.error, report.permanent) == ("Failed", "not enough memory", True)
        assert on.runner.status == RunnerFailed(error="not enough memory")

        verdict = await on.barrier.conclude(epoch, Verdict.aborted("rank 0 failed", culprit=0, failure="permanent"))
        assert isinstance(verdict, Concluded)
        await settle()
        epoch = await on.open()
        on.engine.finish("connect")
        await on.say(connect(epoch), "Idle")
        assert (await on.report()).status == "Connected"
        assert on.engine.lives == 2


async def test_11_it_tears_down_before_it_promises() -> None:
    """A promise is a word that nothing of an earlier attempt is alive. So a slow tear-down keeps the next attempt waiting."""
    async with stage() as on:
        first = await on.open()
        on.engine.finish("connect").hold("close")
        await on.say(connect(first), "Idle")
        await on.barrier.conclude(first, Verdict.stopped())
        second = await on.open()
        assert on.member.promised == first
        assert on.engine.active("close")

        on.engine.finish("close")
        await settle()
        assert on.member.promised == second
        assert (await on.report()).status == "Idle"


async def test_12_a_client_is_never_left_waiting() -> None:
    """Text comes piece by piece on a stream of its own; if it cannot be completed, its last piece says so."""
    async with stage() as on:
        epoch = await on.open()
        on.engine.release("connect", "load", "warm_up")
        await on.say(connect(epoch), "Idle")
        await on.say(load_model(epoch), "Connected")
        await on.say(StartWarmup(task_id="warm-up", instance="demo", epoch=str(epoch), term=1), "Loaded")
        ask = TextGeneration(task_id="gen", instance="demo", epoch=str(epoch), term=1, prompt="Count to ten!")
        await on.say(ask, "Ready")
        on.engine.say("one ", "two ")
        await settle()
        await on.barrier.conclude(epoch, Verdict.stopped())
        await settle()

        entries = await on.barrier.store.commands.xrange(on.barrier.keys.out("gen"))
        *text, end = [decode_chunk(fields[b"chunk"]) for _, fields in entries]
        assert [chunk.text for chunk in text] == ["one ", "two "]
        assert (end.finish, end.error) == ("error", "the attempt ended before the text was complete; ask again")


async def test_13_shutdown_is_a_task_like_any_other() -> None:
    """It is accepted in every status, tears down, gives the rank back and ends `run`."""
    async with stage() as on:
        epoch = await on.open()
        await on.say(connect(epoch), "Idle")
        await on.say(Shutdown(task_id="enough", instance="demo", epoch=str(epoch), term=1), "Connecting")
        assert (await on.history())[-2:] == ["Complete", "is Shutdown"]
        assert (await on.barrier.inspect()).ranks[0].report is None


# --- in the test of a planner -------------------------------------------------------------------------------------------------


async def test_14_scripted_runners_stand_in_for_a_cluster() -> None:
    """Real runners, each with a scripted engine: they follow the protocol, and deviate where the test says."""
    clock = ManualClock()
    store = FakeStore(clock)
    async with Barrier(store.client(), "demo", world_size=3, clock=clock) as barrier:
        async with scripted_runners(store, "demo", 3) as ranks:
            assert isinstance(await barrier.lead(), Leading)
            ranks[0].hold("connect")
            ranks[1].fail("connect", "no route to node-0")
            ranks[2].reject("connect", code="Invalid", hint="wrong number of ranks")
            outcome = await barrier.open()
            assert isinstance(outcome, Opened)
            await settle()
            await barrier.dispatch(outcome.epoch, "connect", encode(connect(outcome.epoch)).decode(), "Idle")
            await settle()

            assert [rank.status.kind for rank in ranks] == ["Connecting", "Failed", "Idle"]
            assert [rank.kinds for rank in ranks] == [["ConnectToGroup"]] * 3
            assert ranks[2].outcomes[-1].detail == "wrong number of ranks"

            await ranks[1].die()
            await clock.advance(7)
            views = (await barrier.inspect()).ranks
            assert [view.report is not None for view in views] == [True, False, True]

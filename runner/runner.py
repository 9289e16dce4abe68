"""The runner of one rank: a thin shell that reads the task log, asks the judge, drives the engine and reports.

The order of events, as docs/protocol.md has it:

- accepted: TaskStatusUpdated(Running), RunnerStatusUpdated(transitional), TaskAcknowledged in one step, then the work, then
  TaskStatusUpdated(Complete), RunnerStatusUpdated(stable) in one step;
- rejected: TaskAcknowledged, TaskStatusUpdated(Failed) with the rejection, in one step. Nothing else changes.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, assert_never

from pydantic import BaseModel

from barrier import (
    ClaimLost,
    Clock,
    EpochAnnounced,
    Garbage,
    InvalidName,
    LogEntry,
    Member,
    NotPromised,
    PartFailed,
    Promised,
    RankgateError,
    StoreCorrupt,
    StoreError,
    SystemClock,
    TaskEntry,
    TaskOutcome,
    VerdictAnnounced,
    supervise,
)
from barrier.log import logger
from barrier.plain import number
from barrier.protocol.names import valid_endpoint
from runner.admission import (
    Accept,
    AlreadyDone,
    Invalid,
    NotYet,
    Promise,
    Refusal,
    Stale,
    Standing,
    TaskResult,
    judge,
    rejection_of,
)
from runner.engine import EngineFailure, EngineGroup, GenerationRequest
from runner.host import EngineHost
from runner.messages import (
    MAX_MESSAGE_BYTES,
    CancelTask,
    Chunk,
    ConnectToGroup,
    LoadModel,
    MalformedMessage,
    Rejection,
    RunnerConnected,
    RunnerConnecting,
    RunnerFailed,
    RunnerIdle,
    RunnerLoaded,
    RunnerLoading,
    RunnerPreparing,
    RunnerReady,
    RunnerRunning,
    RunnerShutdown,
    RunnerShuttingDown,
    RunnerStatus,
    RunnerStatusUpdated,
    RunnerWarmingUp,
    Shutdown,
    StartWarmup,
    StatusName,
    Task,
    TaskAcknowledged,
    TaskStatusUpdated,
    TextGeneration,
    decode_task,
    encode,
)

_REMEMBERED = 256
"""How many tasks of an epoch a runner remembers, to recognise a repeated one. The log's order protects against older ones."""

_QUEUED_GENERATIONS = 64
"""How many accepted generations may wait at a rank; more are refused as not yet possible."""

_SAID_TO_PREPARE_AFTER = 0.25
"""Seconds after which a rank says that it prepares its engine; an engine that is ready sooner costs no report of its own."""

_FINALITY: dict[StatusName, int] = {"Failed": 1, "ShuttingDown": 2, "Shutdown": 3}
"""Statuses that a runner does not leave by its own work, the later ones not even for the earlier. Others count 0."""


_EXPECTED = (RankgateError, EngineFailure)
"""What may end a part of a runner without being a mistake of ours."""


@dataclass(frozen=True, slots=True)
class _Work:
    """A task that was accepted, and where it stood in the log."""

    task: Task
    step: str
    n: int


class Runner:
    """One rank, for as long as its process lives. Outlives its tasks, its engine and its epochs.

    Args:
        member: this rank's side of the barrier.
        host: the engine, behind a host that can kill it.
        clock: time, for tests.
        spare: whether to wait for as long as another process holds the rank; see `barrier.Member.claim`.
    """

    def __init__(self, member: Member, host: EngineHost, *, clock: Clock | None = None, spare: bool = False) -> None:
        self._member = member
        self._spare = spare
        self._host = host
        self._clock: Clock = clock or SystemClock()
        self._instance = member.keys.group
        self._status: RunnerStatus = RunnerIdle()
        self._promise: Promise | None = None
        self._outcomes: OrderedDict[str, TaskOutcome] = OrderedDict()
        self._failure: EngineFailure | None = None
        self._phase: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._generations: asyncio.Queue[_Work] = asyncio.Queue()
        self._generating: asyncio.Task[None] | None = None
        self._unfinished: dict[str, None] = {}  # accepted generations whose clients still wait, in order
        self._current: str = ""
        self._current_chunks: asyncio.Task[None] | None = None
        self._cancelled: set[str] = set()
        self._endings: dict[str, Chunk] = {}  # of streams, not written yet
        self._departing: deque[_Work] = deque()
        self._departure: asyncio.Task[None] | None = None
        self._leaving = asyncio.Event()
        self._lost: ClaimLost | PartFailed | None = None

    @property
    def status(self) -> RunnerStatus:
        """The status now."""
        return self._status

    def stop(self) -> None:
        """Ask `run` to tear down and return; safe from a signal handler of the event loop."""
        if not self._leaving.is_set():
            logger.info("instance {}: asked to end; the engine is closed and the rank given back", self._instance)
        self._leaving.set()

    async def run(self, *, wait_for_store: float = 0.0) -> None:
        """Claim the rank and serve until a Shutdown task or `stop`; then tear down and give the rank back.

        The engine is made first, and its factory and configuration with it are checked: what could never serve claims no rank.

        Args:
            wait_for_store: seconds to wait for a store that fails to begin with, in a way that may pass.

        Raises:
            EngineFailure: permanent: there is no such engine, or it refuses its configuration.
            RankTaken: another process holds the rank.
            ClaimLost: another process took the rank over while this one was silent; the engine is torn down.
            PartFailed: a mistake of ours ended a part of this runner, or its heartbeat (`HeartbeatFailed`). It has said that it failed, as
                far as it could, and its engine is torn down.
            StoreError: the store could not be reached to begin with. Later outages are waited out.
        """
        with self._member.about.applied():
            try:
                await self._run(wait_for_store)
            finally:
                self._leaving.set()  # whoever asks for the end of what has ended is told nothing

    async def _run(self, wait_for_store: float) -> None:
        try:
            await self._until_leaving(self._start_engine())
            await self._until_leaving(self._member.claim(spare=self._spare, wait_for_store=wait_for_store))
        except BaseException:
            await asyncio.shield(self._host.shut_down())
            raise
        if self._leaving.is_set():
            await self._clean_up()
            return
        logger.info("instance {}: this is rank {} ({})", self._instance, self._member.rank, self._member.incarnation)
        try:
            async with self._member.heartbeat():
                await self._tell_whether_wanted()
                await self._until_leaving(self._serve())
                if isinstance(self._lost, PartFailed):
                    raise self._lost
                await self._tear_down()
        except (ClaimLost, StoreError):
            raise
        except PartFailed as failure:
            self._lost = failure
            await self._say_last_words()
        except Exception as mistake:  # noqa: BLE001  `run` raises it by a name of ours
            supervise.tell_mistake(f"rank {self._member.rank}", mistake)
            self._end_for("serving")(mistake)
            await self._say_last_words()
        finally:
            await asyncio.shield(self._clean_up())
        if self._lost is not None:
            raise self._lost

    async def _tell_whether_wanted(self) -> None:
        """Say at once where there is nothing to do for this rank: otherwise it would wait, and nobody would know why."""
        rank = self._member.rank
        try:
            size = await self._member.group_size()
        except StoreError:  # the heartbeats say so
            return
        if size is None:
            logger.info("rank {}: no attempt of {} was ever opened; it waits for rankgate launch", rank, self._instance)
        elif rank >= size:
            logger.warning(
                "rank {}: the last attempt of {} had {} ranks, 0 to {}: this one is surplus until an attempt has more",
                *(rank, self._instance, size, size - 1),
            )

    async def _until_leaving(self, doing: Coroutine[Any, Any, object]) -> None:
        """Do it until it ends or `stop` is called; raises what it raised."""
        async with (
            supervise.alongside(doing, expected=_EXPECTED) as working,
            supervise.alongside(self._leaving.wait()) as leaving,
        ):
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()

    async def _start_engine(self) -> None:
        try:
            await self._host.start()
        except EngineFailure as failure:
            if failure.permanent:
                raise
            logger.warning("the engine could not be started yet: {}", failure)

    async def _clean_up(self) -> None:
        """Bounded: an engine that does not close is killed, a store that does not answer is left alone. Each step is done, whatever fails."""
        steps = [self._stop_work, self._host.shut_down, self._member.leave]
        if isinstance(self._lost, PartFailed):
            steps.pop()  # the report that says so must not go before the planner has read it; its lease ends it
        for step in steps:
            try:
                await step()
            except StoreError as error:
                logger.warning("rank was not given back, its lease will lapse: {}", error)
            except Exception as mistake:  # noqa: BLE001  whatever the mistake is, the engine must go
                supervise.tell_mistake(f"rank {self._member.report_now.rank}, tidying up", mistake)

    def _end_for(self, part: str) -> Callable[[BaseException], None]:
        """What a mistake of ours in a part of this runner ends: the runner, whose `run` raises the first of them by name."""

        def end(mistake: BaseException) -> None:
            self._lost = self._lost or PartFailed(
                f"instance {self._instance}, rank {self._member.report_now.rank}: a mistake of ours ended {part} "
                f"({supervise.described(mistake)}), and so this runner. Start it again, and report what its log says"
            )
            self._leaving.set()

        return end

    async def _say_last_words(self) -> None:
        """Say that this rank has failed, if it can still be said: the others need not wait for its lease."""
        try:
            await self._fail(None, EngineFailure(str(self._lost)))
        except Exception as mistake:  # noqa: BLE001  most likely the one that it is about
            supervise.tell_mistake(f"rank {self._member.report_now.rank}, saying that it failed", mistake)

    async def _serve(self) -> None:
        async with aclosing(self._member.tasks()) as entries:
            async for entry in entries:
                await self._handle(entry)
                if self._lost is not None:
                    raise self._lost

    # --- the log ------------------------------------------------------------------------------------------------------

    async def _handle(self, entry: LogEntry) -> None:
        if self._departure is not None and not isinstance(entry, TaskEntry):
            return  # a runner that leaves needs no other attempt; whoever asks it for something is still answered
        match entry:
            case EpochAnnounced():
                await self._enter(entry)
            case VerdictAnnounced(epoch, verdict):
                if self._promise is not None and epoch == self._promise.epoch:
                    logger.info("rank {}: attempt over: {}", self._member.rank, verdict)
                    if verdict.culprit == self._member.rank and self._status.kind == "Preparing":
                        await self._host.kill()  # it would be waited for once more; where others failed, it goes on
                    await self._leave_epoch()
                    await self._say(events=[RunnerStatusUpdated(status=self._status)])
            case Garbage(place, reason):
                logger.warning("rank {}: entry {} of the task log is {}", self._member.rank, place, reason)
            case TaskEntry():
                if entry.first <= self._member.rank <= entry.last:
                    await self._receive(entry)
            case _:
                assert_never(entry)

    async def _enter(self, entry: EpochAnnounced) -> None:
        """Tear down, then promise, then prepare the engine, then report Idle: the planner's connect gate waits for just this."""
        if entry.epoch.number <= self._member.report_now.floor:
            return  # promised already, or older than a promise
        await self._leave_epoch()
        while True:
            try:
                outcome = await self._member.promise(entry.epoch, status="Preparing")
                break
            except StoreError as error:
                logger.warning("rank {}: cannot promise yet: {}", self._member.rank, error)
                await self._clock.sleep(self._member.settings.command_seconds)
        match outcome:
            case Promised(epoch, world_size):
                self._promise = Promise(epoch, self._member.incarnation, world_size)
                logger.info("takes part in the attempt, of {} ranks (epoch {})", world_size, epoch)
                self._status = RunnerPreparing()
                self._phase = self._part(self._prepare(world_size), "the preparation")
            case NotPromised(reason):
                logger.info("rank {}: not in the new attempt: {}", self._member.rank, reason)
                await self._say(events=[RunnerStatusUpdated(status=self._status)])

    async def _leave_epoch(self) -> None:
        await self._tear_down()
        self._member.retire()
        self._promise = None
        self._outcomes.clear()
        self._failure = None
        self._status = RunnerIdle()

    async def _tear_down(self) -> None:
        """Stop all work, end the streams of clients that wait, close the engine (or kill it, if it does not close)."""
        await self._stop_work()
        await self._host.close()

    async def _stop_work(self) -> None:
        own = asyncio.current_task()
        for task in (self._phase, self._generating, self._watching, self._departure):
            if task is not None and task is not own:
                await supervise.end(task, expected=_EXPECTED)
        self._phase = self._generating = self._watching = None
        self._current = ""
        self._generations = asyncio.Queue()
        self._cancelled.clear()
        for task_id in list(self._unfinished):
            await self._end_stream(task_id, error="the attempt ended before the text was complete; ask again")
        self._unfinished.clear()

    # --- one task -----------------------------------------------------------------------------------------------------

    async def _receive(self, entry: TaskEntry) -> None:
        try:
            task = decode_task(entry.payload)
        except MalformedMessage as error:
            await self._reject(Invalid(f"malformed task: {error}"), entry, None)
            return
        if task.epoch != str(entry.epoch):
            await self._reject(Invalid("the task names another epoch than the log does"), entry, task)
            return
        if entry.missed and self._promise is not None and entry.epoch == self._promise.epoch:
            await self._fail(None, EngineFailure("an entry of the task log never reached this rank"))
        judgement = judge(self._standing(), task)
        if (
            isinstance(judgement, Accept)
            and isinstance(task, TextGeneration)
            and len(self._unfinished) > _QUEUED_GENERATIONS
        ):
            judgement = NotYet(f"{_QUEUED_GENERATIONS} generations wait at this rank already; ask again later")
        with logger.contextualize(task=task.task_id):
            logger.debug("{} as {}: {}", task.kind, self._status.kind, type(judgement).__name__)
            match judgement:
                case Accept():
                    await self._accept(_Work(task, entry.step, entry.id.n))
                case AlreadyDone(outcome):
                    await self._repeat(task, outcome)
                case _:
                    await self._reject(judgement, entry, task)

    def _standing(self) -> Standing:
        return Standing(
            instance=self._instance,
            status=self._status.kind,
            incarnation=self._member.incarnation,
            promise=self._promise,
            floor=self._member.report_now.floor,
            outcomes=self._outcomes,
        )

    async def _reject(self, refusal: Refusal, entry: TaskEntry, task: Task | None) -> None:
        kind = "unknown" if task is None else task.kind
        task_id = f"log-{entry.id}" if task is None else task.task_id
        rejection = rejection_of(refusal, self._standing(), kind)
        logger.warning(
            "rank {}: rejected {} ({}) as {}: {}", self._member.rank, kind, task_id, rejection.code, rejection.hint
        )
        outcome = None
        if (
            self._promise is not None and entry.epoch == self._promise.epoch
        ):  # another epoch's would hide those of this one
            outcome = self._remember(task_id, entry.step, entry.id.n, "rejected", rejection=rejection)
        await self._say(
            outcome=outcome,
            events=[
                TaskAcknowledged(task_id=task_id),
                TaskStatusUpdated(task_id=task_id, state="Failed", rejection=rejection),
            ],
        )
        if isinstance(task, TextGeneration):
            await self._end_stream(task_id, error=f"rank {self._member.rank} rejected the request: {rejection.hint}")

    async def _repeat(self, task: Task, outcome: TaskOutcome) -> None:
        states = {"running": "Running", "done": "Complete", "cancelled": "Cancelled"}
        again: dict[str, object] = {"task_id": task.task_id, "state": states.get(outcome.result, "Failed")}
        if outcome.result == "failed":
            again["error"] = outcome.detail or None
        if outcome.result == "rejected":
            refusal = Invalid(outcome.detail) if outcome.code == "Invalid" else Stale(outcome.detail)
            again["rejection"] = rejection_of(refusal, self._standing(), task.kind)
        await self._say(events=[TaskAcknowledged(task_id=task.task_id), TaskStatusUpdated.model_validate(again)])

    async def _accept(self, work: _Work) -> None:
        task = work.task
        match task:
            case ConnectToGroup():
                await self._begin(work, RunnerConnecting())
                self._start(work, lambda: self._connect(task.deadline), RunnerConnected())
            case LoadModel():
                total = task.model.total_layers
                await self._begin(work, RunnerLoading(layers_loaded=0, total_layers=total))
                self._start(work, lambda: self._load(task), RunnerLoaded())
            case StartWarmup():
                await self._begin(work, RunnerWarmingUp())
                self._start(work, self._host.warm_up, RunnerReady())
            case TextGeneration():
                self._unfinished[task.task_id] = None
                waiting = len(self._unfinished) - 1
                logger.info("a text of at most {} tokens is asked for; {} others before it", task.max_tokens, waiting)
                await self._begin(work, RunnerRunning())
                await self._generations.put(work)
                if self._generating is None:
                    self._generating = self._part(self._generate_all(), "the generations")
            case CancelTask():
                await self._begin(work, self._status)
                self._cancel(task.cancels)
                await self._finish(work, self._status)
            case Shutdown():
                await self._begin(work, RunnerShuttingDown())
                self._departing.append(work)
                if self._departure is None:
                    self._departure = self._part(self._depart(), "the departure")
            case _:
                assert_never(task)

    def _part(self, doing: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Begin a part of this runner that nobody awaits."""
        with logger.contextualize(task=None):  # it may outlive the task at which it was begun
            return supervise.background(
                doing, f"{name} of rank {self._member.report_now.rank}", on_mistake=self._end_for(name)
            )

    def _world_size(self) -> int:
        return self._promise.world_size if self._promise else 1

    async def _begin(self, work: _Work, status: RunnerStatus) -> None:
        """Say that the task runs, then the transitional status, then that it was read: in one step, in this order."""
        self._become(status)
        task_id = work.task.task_id
        await self._say(
            outcome=self._remember(task_id, work.step, work.n, "running"),
            events=[
                TaskStatusUpdated(task_id=task_id, state="Running"),
                RunnerStatusUpdated(status=self._status),
                TaskAcknowledged(task_id=task_id),
            ],
        )

    async def _finish(self, work: _Work, status: RunnerStatus, result: TaskResult = "done") -> None:
        self._become(status)
        task_id = work.task.task_id
        state = "Complete" if result == "done" else "Cancelled"
        await self._say(
            outcome=self._remember(task_id, work.step, work.n, result),
            events=[TaskStatusUpdated(task_id=task_id, state=state), RunnerStatusUpdated(status=self._status)],
        )

    def _become(self, status: RunnerStatus) -> None:
        """Take on a status, unless what came meanwhile outranks it: work under way cannot undo a failure or a departure."""
        if _FINALITY.get(status.kind, 0) >= _FINALITY.get(self._status.kind, 0):
            if status.kind != self._status.kind:
                between_texts = "Running" in (status.kind, self._status.kind)
                logger.log("DEBUG" if between_texts else "INFO", "{}", status.kind)
            self._status = status

    async def _depart(self) -> None:
        """Tear down beside the log, so that what is asked meanwhile is answered, however long the engine takes to close."""
        await self._tear_down()
        while self._departing:
            await self._finish(self._departing.popleft(), RunnerShutdown())
        self._leaving.set()

    async def _fail(self, work: _Work | None, failure: BaseException) -> None:
        """Accepted work failed, or the engine died: say so, give the engine up, and wait for the attempt's end.

        The first failure of an attempt is its cause; what fails after it, because the engine was given up, is not.
        """
        permanent = isinstance(failure, EngineFailure) and failure.permanent
        if not isinstance(failure, EngineFailure):
            supervise.tell_mistake(f"rank {self._member.report_now.rank}", failure)
        error = _words_of(failure)
        logger.error("rank {}: failed: {}", self._member.rank, error)
        if self._failure is None:
            self._failure = EngineFailure(error, permanent=permanent)
            self._become(RunnerFailed(error=error))
        events: list[BaseModel] = []
        outcome = None
        if work is not None:
            outcome = self._remember(work.task.task_id, work.step, work.n, "failed", detail=error)
            events.append(TaskStatusUpdated(task_id=work.task.task_id, state="Failed", error=error))
        await self._say(outcome=outcome, events=[*events, RunnerStatusUpdated(status=self._status)])
        await self._host.kill()

    # --- work ---------------------------------------------------------------------------------------------------------

    def _start(self, work: _Work, doing: Callable[[], Awaitable[None]], then: RunnerStatus) -> None:
        self._phase = self._part(self._do(work, doing, then), f"step {work.step[:96]}")

    async def _do(self, work: _Work, doing: Callable[[], Awaitable[None]], then: RunnerStatus) -> None:
        with logger.contextualize(task=work.task.task_id):
            await self._do_it(work, doing, then)

    async def _do_it(self, work: _Work, doing: Callable[[], Awaitable[None]], then: RunnerStatus) -> None:
        try:
            await self._check_engine()
            await doing()
        except Exception as failure:  # noqa: BLE001  whatever an engine raises fails its task and never the runner
            await self._fail(work, failure)
        else:
            self._watching = self._part(self._watch_engine(), "the watch over the engine")
            await self._finish(work, then)
        finally:
            if self._phase is asyncio.current_task():  # the next one may have begun while this one was still telling
                self._phase = None

    async def _prepare(self, world_size: int) -> None:
        """Have the engine made ready for the attempt, and report Idle with the endpoint at which it waits for the others."""
        try:
            preparing = self._host.prepare(self._member.rank, world_size)
            async with supervise.alongside(preparing, expected=_EXPECTED) as prepared:
                try:
                    await self._clock.wait_for(asyncio.shield(prepared), _SAID_TO_PREPARE_AFTER)
                except TimeoutError:
                    await self._say(events=[RunnerStatusUpdated(status=self._status)])
                endpoint = await prepared or ""
            if endpoint.startswith(":"):
                endpoint = _joined(await self._reachable_at(), endpoint)
            _check_endpoint(endpoint)
        except Exception as failure:  # noqa: BLE001  as in `_do`
            await self._fail(None, failure)
        else:
            self._watching = self._part(self._watch_engine(), "the watch over the engine")
            self._become(RunnerIdle())
            await self._say(events=[RunnerStatusUpdated(status=self._status)], endpoint=endpoint)
        finally:
            if self._phase is asyncio.current_task():
                self._phase = None

    async def _reachable_at(self) -> str:
        while True:
            try:
                return await self._member.address()
            except StoreError as error:
                logger.warning("rank {}: its own address is not known yet: {}", self._member.rank, error)
                await self._clock.sleep(self._member.settings.command_seconds)

    async def _connect(self, seconds: float) -> None:
        """Connect the engine to those of the roster, at the endpoints that their reports named when the step was dispatched."""
        promise = self._promise
        if promise is None:
            raise EngineFailure("this rank is in no attempt")
        ends = self._clock.now() + seconds
        while True:
            try:
                endpoints = await self._member.endpoints(promise.world_size)
                break
            except StoreError as error:
                if self._clock.now() >= ends:
                    raise EngineFailure(
                        f"the endpoints of the other ranks could not be read within {number(seconds)} s: {error}"
                    ) from error
                await self._clock.sleep(self._member.settings.command_seconds)
        own = self._member.report_now.endpoint
        if endpoints is None and not own:
            endpoints = (
                "",
            ) * promise.world_size  # an engine without an endpoint works with a planner that asks for none
        check_endpoints(endpoints, self._member.rank, own)
        deadline = max(ends - self._clock.now(), 0.001)
        await self._host.connect(
            EngineGroup(self._instance, str(promise.epoch), self._member.rank, endpoints or (), deadline)
        )

    async def _check_engine(self) -> None:
        """Raise if the engine has died since the task was judged: a load would start a fresh one that is in no group."""
        if self._failure is not None:
            raise self._failure
        if self._watching is None:
            return  # no engine yet
        await supervise.end(self._watching, expected=_EXPECTED)
        self._watching = None
        async with supervise.alongside(self._host.died()) as dead:
            await asyncio.sleep(0)  # enough for a death that has happened already
            if dead.done():
                raise dead.result()

    async def _watch_engine(self) -> None:
        """An engine may die while it has nothing to do: then this rank has failed, and says so at once."""
        death = await self._host.died()
        if self._current_chunks is not None:
            await asyncio.wait({self._current_chunks})  # it fails, and says it, unless the engine was done with it
        if self._failure is None:
            await self._fail(None, death)

    async def _load(self, task: LoadModel) -> None:
        async with aclosing(self._host.load(task.model)) as progress:
            async for layers in progress:
                self._become(RunnerLoading(layers_loaded=layers, total_layers=task.model.total_layers))
                self._member.note_progress(layers, task.model.total_layers)

    async def _generate_all(self) -> None:
        """Work through the accepted generations, one at a time and in the log's order: all ranks see the same order."""
        while True:
            work = await self._generations.get()
            task_id = work.task.task_id
            try:
                if self._failure is not None:
                    raise self._failure
                with logger.contextualize(task=task_id):
                    cancelled = await self._generate(work)
                    logger.info("the text is {}", "cancelled" if cancelled else "complete")
            except Exception as failure:  # noqa: BLE001  as in `_do`
                self._current = ""
                self._unfinished.pop(task_id, None)
                await self._fail(work, failure)
                await self._end_stream(task_id, error=f"rank {self._member.rank} failed: {_words_of(failure)}")
                return
            self._current = ""
            self._unfinished.pop(task_id, None)
            self._cancelled.discard(task_id)
            status = RunnerRunning() if self._unfinished else RunnerReady()
            await self._finish(work, status, "cancelled" if cancelled else "done")

    async def _generate(self, work: _Work) -> bool:
        """Generate one text; whether it was cancelled. Rank 0 answers."""
        task = work.task
        if not isinstance(task, TextGeneration):
            raise TypeError(f"{task.kind} is not a generation")
        if task.task_id in self._cancelled:
            await self._end_stream(task.task_id, cancelled=True)
            return True
        self._current = task.task_id
        try:
            async with supervise.alongside(self._pump(task), expected=_EXPECTED) as chunks:
                self._current_chunks = chunks
                await chunks
        except asyncio.CancelledError:
            own = asyncio.current_task()
            if own is not None and own.cancelling():
                raise
            await self._end_stream(task.task_id, cancelled=True)
            return True
        finally:
            self._current_chunks = None
        return False

    async def _pump(self, task: TextGeneration) -> None:
        answers = self._member.rank == 0
        index = tokens = 0
        request = GenerationRequest(task.task_id, task.prompt, task.max_tokens)
        async with aclosing(self._host.generate(request)) as pieces:
            async for text in pieces:
                if answers:
                    for piece in _pieces(_speakable(text)):
                        await self._write(Chunk(task_id=task.task_id, index=index, text=piece))
                        index += 1
                    tokens += 1
                    self._member.note_progress(tokens, task.max_tokens)  # a long text is no stall
        if answers:
            finish = "length" if tokens >= task.max_tokens else "stop"
            await self._write(Chunk(task_id=task.task_id, index=index, finish=finish))

    def _cancel(self, task_id: str) -> None:
        """Stop a generation that runs or waits; anything else is over already, or ends with its attempt."""
        if task_id in self._unfinished:
            self._cancelled.add(task_id)
        if task_id == self._current and self._current_chunks is not None:
            self._current_chunks.cancel()

    # --- saying it ----------------------------------------------------------------------------------------------------

    def _remember(
        self,
        task_id: str,
        step: str,
        n: int,
        result: TaskResult,
        *,
        rejection: Rejection | None = None,
        detail: str = "",
    ) -> TaskOutcome:
        outcome = TaskOutcome(
            task_id=task_id,
            step=step[:96],  # all that a report holds; the log's own entries are not ours to trust
            n=n,
            result=result,
            code=rejection.code if rejection else "",
            detail=(rejection.hint if rejection else detail)[:500],
            retryable=rejection.retryable if rejection else False,
        )
        self._outcomes[task_id] = outcome
        self._outcomes.move_to_end(task_id)
        if len(self._outcomes) > _REMEMBERED:
            # A flood of refused tasks must not make this rank forget what it has done, or is doing.
            refused = (known for known, one in self._outcomes.items() if one.result == "rejected" and known != task_id)
            del self._outcomes[next(refused, next(iter(self._outcomes)))]
        return outcome

    async def _say(
        self, *, outcome: TaskOutcome | None = None, events: list[BaseModel], endpoint: str | None = None
    ) -> None:
        """Report the whole state and append the events, in one step. What cannot be said now goes with the next heartbeat."""
        lines = [{"kind": type(event).__name__, "event": encode(event).decode()} for event in events]
        status, failure = self._status, self._failure
        said = await self._survive(
            lambda: self._member.report(
                status.kind,
                progress=(status.layers_loaded, status.total_layers) if isinstance(status, RunnerLoading) else None,
                error=str(failure) if failure else "",
                permanent=failure.permanent if failure else False,
                outcome=outcome,
                events=lines,
                endpoint=endpoint,
            )
        )
        if said and self._endings:
            await self._write_endings()

    async def _write(self, chunk: Chunk) -> None:
        """Write a piece of text; wait for a store that does not answer, since a text with a hole in it is of no use."""
        waited = False
        while True:
            try:
                await self._member.write_output(chunk.task_id, [encode(chunk)])
                return
            except StoreCorrupt as error:
                logger.warning("rank {}: text cannot be written: {}", self._member.rank, error)
                return
            except StoreError as error:
                if not waited:
                    logger.warning("rank {}: text is not written yet: {}", self._member.rank, error)
                waited = True
                await self._clock.sleep(self._member.settings.command_seconds)

    async def _end_stream(self, task_id: str, *, error: str = "", cancelled: bool = False) -> None:
        """End a client's stream. Every rank that knows why does: the client takes the first end that it reads."""
        finish = "cancelled" if cancelled else "error"
        if len(self._endings) < _REMEMBERED:  # a store that takes nothing for so long has lost these clients anyway
            self._endings[task_id] = Chunk(
                task_id=task_id, index=0, finish=finish, error=_speakable(error)[:2_000] or None
            )
        await self._write_endings()

    async def _write_endings(self) -> None:
        """What the store does not take now goes after the next report: no tear-down waits for it."""
        for task_id, chunk in list(self._endings.items()):
            if not await self._survive(lambda: self._member.write_output(task_id, [encode(chunk)])):  # noqa: B023  called at once
                return
            self._endings.pop(task_id, None)

    async def _survive(self, send: Callable[[], Awaitable[None]]) -> bool:
        """Whether the store took it."""
        try:
            await send()
        except StoreError as error:
            logger.warning("rank {}: not said yet: {}", self._member.report_now.rank, error)
            return False
        except ClaimLost as error:
            self._lost = error
            self._leaving.set()
            return False
        return True


def check_endpoints(endpoints: Sequence[str] | None, rank: int, own: str) -> None:
    """Refuse endpoints at which an engine could meet another attempt's, or nobody.

    Args:
        endpoints: as `barrier.Member.endpoints` read them.
        rank: whose engine is to connect.
        own: the endpoint that it has bound for this attempt.

    Raises:
        EngineFailure: they are not known, this rank's is another one, or two ranks have one. Never permanent: the next attempt binds
            others.
    """
    if endpoints is None:
        raise EngineFailure(
            "the store's record of this attempt does not say where the ranks are: the store forgot, or went back"
        )
    if endpoints[rank] != own:
        raise EngineFailure(
            f"the store's record says that rank {rank} waits at {endpoints[rank] or 'no endpoint'}, but it waits at {own or 'none'}: "
            "the store went back"
        )
    alone = [other for other, endpoint in enumerate(endpoints) if _is_loopback(endpoint)]
    reachable = [other for other, endpoint in enumerate(endpoints) if endpoint and not _is_loopback(endpoint)]
    if alone and reachable:
        raise EngineFailure(
            f"rank {alone[0]} says that it waits at {endpoints[alone[0]]}, where no other machine reaches it, and rank {reachable[0]} at "
            f"{endpoints[reachable[0]]}; start the runner of rank {alone[0]} with the --address under which the others reach its machine"
        )
    first: dict[str, int] = {}
    for other, endpoint in enumerate(endpoints):
        if endpoint and first.setdefault(endpoint, other) != other:
            raise EngineFailure(
                f"ranks {first[endpoint]} and {other} both say that they wait at {endpoint}; start each runner with the --address "
                "under which the others reach its machine"
            )


def _check_endpoint(endpoint: str) -> None:
    """Refuse what an engine, or the address of this machine, makes of an endpoint; empty is an engine without one."""
    try:
        if endpoint:
            valid_endpoint(endpoint)
    except InvalidName as error:
        raise EngineFailure(
            f"the engine cannot be reached: {error}; see the engine's prepare, and the runner's --address"
        ) from None


def _is_loopback(endpoint: str) -> bool:
    return endpoint.startswith(("127.", "localhost:", "[::1]:"))


def _joined(host: str, port: str) -> str:
    return f"[{host}]{port}" if ":" in host and not host.startswith("[") else f"{host}{port}"


def _pieces(text: str) -> list[str]:
    """Pieces that a client reads: as JSON, no character takes more than six bytes."""
    size = MAX_MESSAGE_BYTES // 8
    return [text[place : place + size] for place in range(0, len(text), size)] or [""]


def _words_of(failure: BaseException) -> str:
    """What is said of a failure. The text of a mistake of ours is nobody's to read: it may quote a prompt."""
    if isinstance(failure, EngineFailure):
        return _speakable(str(failure))[:2_000]
    return f"a mistake of ours, {supervise.described(failure)}; the log of this rank has its frames"


def _speakable(text: str) -> str:
    """Replace what UTF-8 cannot carry: half a surrogate pair from an engine would fail every later report."""
    return text.encode("utf-8", "replace").decode()

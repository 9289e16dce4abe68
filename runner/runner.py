"""The runner of one rank: reads the task log, drives the engine and reports.

`runner.session` decides what a task does to the runner, and what to report. This module carries it out. `runner.process` begins and ends
the process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import assert_never

from barrier import (
    Clock,
    EpochAnnounced,
    Garbage,
    LogEntry,
    Member,
    NotPromised,
    Promised,
    StoreError,
    SystemClock,
    TaskEntry,
    VerdictAnnounced,
    supervise,
)
from barrier.log import logger
from runner.admission import Accept, AlreadyDone, Invalid, Refusal
from runner.endpoints import meeting_points, reachable_at
from runner.engine import EngineFailure, EngineGroup
from runner.generations import Generations
from runner.host import EngineHost
from runner.lifecycle import GENERATE, PREPARING
from runner.messages import (
    CancelTask,
    ConnectToGroup,
    LoadModel,
    MalformedMessage,
    RunnerStatus,
    Shutdown,
    StartWarmup,
    Task,
    TextGeneration,
    decode_task,
    encode,
)
from runner.process import EXPECTED, RunnerProcess
from runner.session import Say, Session, Work
from runner.words import Failure, words_of

__all__ = ["Runner"]


_SAID_TO_PREPARE_AFTER = 0.25
"""Seconds after which a rank reports that it prepares its engine. If the engine is ready sooner, there is no such report."""


class Runner(RunnerProcess):
    """One rank, for as long as its process lives. It outlives its tasks, its engines and its epochs.

    Args:
        member: this rank's side of the barrier.
        host: the engine, behind a host that can kill it.
        clock: time, for tests.
        spare: whether to wait for as long as another process holds the rank; see `barrier.Member.claim`.
    """

    def __init__(self, member: Member, host: EngineHost, *, clock: Clock | None = None, spare: bool = False) -> None:
        super().__init__(member, host, spare=spare)
        self._clock: Clock = clock or SystemClock()
        self._session = Session(member.keys.group, member.incarnation)
        self._generations = Generations(member, host, self._clock, self._survive)
        self._phase: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._generating: asyncio.Task[None] | None = None
        self._departure: asyncio.Task[None] | None = None

    @property
    def status(self) -> RunnerStatus:
        """The status now."""
        return self._session.status

    async def _serve(self) -> None:
        async with aclosing(self._member.tasks()) as entries:
            async for entry in entries:
                await self._handle(entry)
                if self._lost is not None:
                    raise self._lost

    # --- the log ------------------------------------------------------------------------------------------------------

    async def _handle(self, entry: LogEntry) -> None:
        if self._departure is not None and not isinstance(entry, TaskEntry):
            return  # a runner that leaves joins no other attempt, but it still answers tasks
        match entry:
            case EpochAnnounced():
                await self._enter(entry)
            case VerdictAnnounced(epoch, verdict):
                if self._session.is_in(epoch):
                    logger.info("rank {}: attempt over: {}", self._member.rank, verdict)
                    if verdict.culprit == self._member.rank and self._session.status.kind == PREPARING:
                        # Otherwise the next attempt waits for it again. Where another rank failed, the preparation goes on.
                        await self._host.kill()
                    await self._leave_epoch()
                    await self._say(self._session.now())
            case Garbage(place, reason):
                logger.warning("rank {}: entry {} of the task log is {}", self._member.rank, place, reason)
            case TaskEntry():
                if entry.first <= self._member.rank <= entry.last:
                    await self._receive(entry)
            case _:
                assert_never(entry)

    async def _enter(self, entry: EpochAnnounced) -> None:
        """Tear down, then promise, then prepare the engine, then report Idle. The planner dispatches connect when all ranks are Idle."""
        if entry.epoch.number <= self._member.report_now.floor:
            return  # the rank has promised this epoch already, or a later one
        await self._leave_epoch()
        while True:
            try:
                outcome = await self._member.promise(entry.epoch, status=PREPARING)
                break
            except StoreError as error:
                logger.warning("rank {}: cannot promise yet: {}", self._member.rank, error)
                await self._clock.sleep(self._member.settings.command_seconds)
        match outcome:
            case Promised(epoch, world_size):
                self._session = self._session.promised(epoch, world_size)
                logger.info("takes part in the attempt, of {} ranks (epoch {})", world_size, epoch)
                self._phase = self._part(self._prepare(world_size), "the preparation")
            case NotPromised(reason):
                logger.info("rank {}: not in the new attempt: {}", self._member.rank, reason)
                await self._say(self._session.now())

    async def _leave_epoch(self) -> None:
        await self._tear_down()
        self._member.retire()
        self._session = self._session.left()

    async def _tear_down(self) -> None:
        """Stop all work, end the streams of waiting clients, close the engine (or kill it, if it does not close)."""
        await self._stop_work()
        await self._host.close()

    async def _stop_work(self) -> None:
        own = asyncio.current_task()
        for task in (self._phase, self._generating, self._watching, self._departure):
            if task is not None and task is not own:
                await supervise.end(task, expected=EXPECTED)
        self._phase = self._generating = self._watching = None
        self._generations.forget()
        await self._generations.end_streams(
            self._session.unfinished, error="the attempt ended before the text was complete; ask again"
        )
        self._session = self._session.stopped()

    # --- one task -----------------------------------------------------------------------------------------------------

    async def _receive(self, entry: TaskEntry) -> None:
        try:
            task = decode_task(entry.payload)
        except MalformedMessage as error:
            await self._reject(Invalid(f"malformed task: {error}"), entry, None)
            return
        if self._session.misses(entry, task):
            await self._fail(None, EngineFailure("an entry of the task log never reached this rank"))
        judgement = self._session.receive(task, entry.epoch, self._member.report_now.floor)
        with logger.contextualize(task=task.task_id):
            logger.debug("{} as {}: {}", task.kind, self._session.status.kind, type(judgement).__name__)
            match judgement:
                case Accept():
                    await self._accept(Work(task, entry.step, entry.id.n))
                case AlreadyDone(outcome):
                    await self._say(self._session.repeated(task, outcome))
                case _:
                    await self._reject(judgement, entry, task)

    async def _reject(self, refusal: Refusal, entry: TaskEntry, task: Task | None) -> None:
        kind = "unknown" if task is None else task.kind
        task_id = f"log-{entry.id}" if task is None else task.task_id
        then, say, rejection = self._session.rejected(
            refusal, epoch=entry.epoch, task_id=task_id, kind=kind, step=entry.step, n=entry.id.n
        )
        logger.warning(
            "rank {}: rejected {} ({}) as {}: {}", self._member.rank, kind, task_id, rejection.code, rejection.hint
        )
        await self._move(then, say)
        if isinstance(task, TextGeneration):
            await self._generations.end_stream(
                task_id, error=f"rank {self._member.rank} rejected the request: {rejection.hint}"
            )

    async def _accept(self, work: Work) -> None:
        task = work.task
        if isinstance(task, TextGeneration):
            waiting = len(self._session.unfinished)
            logger.info("accepted a text of at most {} tokens; {} texts are before it", task.max_tokens, waiting)
        await self._move(*self._session.begun(work))
        match task:
            case ConnectToGroup():
                self._start(work, lambda: self._connect(task.deadline))
            case LoadModel():
                self._start(work, lambda: self._load(task))
            case StartWarmup():
                self._start(work, self._host.warm_up)
            case TextGeneration():
                self._generations.add(work)
                if self._generating is None:
                    self._generating = self._part(self._generate_all(), "the generations")
            case CancelTask():
                self._session = self._session.cancel(task.cancels)
                self._generations.cancel(task.cancels)
                await self._finish(work)
            case Shutdown():
                self._session = self._session.departs(work)
                if self._departure is None:
                    self._departure = self._part(self._depart(), "the departure")
            case _:
                assert_never(task)

    async def _finish(self, work: Work, *, cancelled: bool = False) -> None:
        await self._move(*self._session.finished(work, cancelled=cancelled))

    async def _depart(self) -> None:
        """Tear down while the log is still read: the runner answers tasks, however long the engine takes to close."""
        await self._tear_down()
        while self._session.departing:
            await self._finish(self._session.departing[0])
        self._leaving.set()

    async def _fail(self, work: Work | None, failure: BaseException) -> None:
        """Accepted work failed, or the engine died: report it, kill the engine, and wait for the attempt's end."""
        if not isinstance(failure, EngineFailure):
            supervise.tell_mistake(f"rank {self._member.report_now.rank}", failure)
        told = Failure.of(failure)
        logger.error("rank {}: failed: {}", self._member.rank, told.error)
        await self._move(*self._session.failed(told, work))
        await self._host.kill()

    async def _say_failed(self, failure: EngineFailure) -> None:
        await self._fail(None, failure)

    # --- work ---------------------------------------------------------------------------------------------------------

    def _start(self, work: Work, doing: Callable[[], Awaitable[None]]) -> None:
        self._phase = self._part(self._do(work, doing), f"step {work.step[:96]}")

    async def _do(self, work: Work, doing: Callable[[], Awaitable[None]]) -> None:
        with logger.contextualize(task=work.task.task_id):
            try:
                await self._check_engine()
                await doing()
            except Exception as failure:  # noqa: BLE001  whatever an engine raises fails its task and never the runner
                await self._fail(work, failure)
            else:
                self._watching = self._part(self._watch_engine(), "the watch over the engine")
                await self._finish(work)
            finally:
                # The next step may have begun while this one still reported.
                if self._phase is asyncio.current_task():
                    self._phase = None

    async def _prepare(self, world_size: int) -> None:
        """Prepare the engine for the attempt, and report Idle with the endpoint at which it waits for the others."""
        try:
            preparing = self._host.prepare(self._member.rank, world_size)
            async with supervise.alongside(preparing, expected=EXPECTED) as prepared:
                try:
                    await self._clock.wait_for(asyncio.shield(prepared), _SAID_TO_PREPARE_AFTER)
                except TimeoutError:
                    await self._say(self._session.now())
                endpoint = await prepared or ""
            endpoint = await reachable_at(self._member, endpoint, clock=self._clock)
        except Exception as failure:  # noqa: BLE001  as in `_do`
            await self._fail(None, failure)
        else:
            self._watching = self._part(self._watch_engine(), "the watch over the engine")
            await self._move(*self._session.prepared(), endpoint=endpoint)
        finally:
            if self._phase is asyncio.current_task():
                self._phase = None

    async def _connect(self, seconds: float) -> None:
        """Connect the engine to the engines of the roster, at the endpoints that their reports named when the step was dispatched."""
        promise = self._session.promise
        if promise is None:
            raise EngineFailure("this rank is in no attempt")
        ends = self._clock.now() + seconds
        endpoints = await meeting_points(self._member, promise.world_size, clock=self._clock, seconds=seconds)
        deadline = max(ends - self._clock.now(), 0.001)
        await self._host.connect(
            EngineGroup(self._session.instance, str(promise.epoch), self._member.rank, endpoints, deadline)
        )

    async def _check_engine(self) -> None:
        """Raise if the engine has died since the task was judged: otherwise a load would start a fresh engine, which is in no group."""
        self._raise_failure()
        if self._watching is None:
            return  # no engine yet
        await supervise.end(self._watching, expected=EXPECTED)
        self._watching = None
        async with supervise.alongside(self._host.died()) as dead:
            await asyncio.sleep(0)  # enough to see a death that has happened already
            if dead.done():
                raise dead.result()

    def _raise_failure(self) -> None:
        """Raise if this rank has failed in this attempt: it does no more work in it."""
        failure = self._session.failure
        if failure is not None:
            raise EngineFailure(failure.error, permanent=failure.permanent)

    async def _watch_engine(self) -> None:
        """Wait until the engine dies, also while it has nothing to do. Then this rank has failed, and reports it at once."""
        death = await self._host.died()
        await self._generations.pause()  # the text under way fails and reports it, unless the engine had finished it
        if self._session.failure is None:
            await self._fail(None, death)

    async def _load(self, task: LoadModel) -> None:
        async with aclosing(self._host.load(task.model)) as progress:
            async for layers in progress:
                self._become(self._session.loading(layers, task.model.total_layers))
                self._member.note_progress(layers, task.model.total_layers)

    async def _generate_all(self) -> None:
        """Generate the accepted texts, one at a time and in the log's order, which is the same for all ranks."""
        while True:
            work = await self._generations.next()
            task_id = work.task.task_id
            try:
                self._raise_failure()
                with logger.contextualize(task=task_id):
                    cancelled = await self._generations.generate(work, cancelled=task_id in self._session.cancelled)
                    logger.info("the text is {}", "cancelled" if cancelled else "complete")
            except Exception as failure:  # noqa: BLE001  as in `_do`
                await self._fail(work, failure)
                await self._generations.end_stream(
                    task_id, error=f"rank {self._member.rank} failed: {words_of(failure)}"
                )
                return
            await self._finish(work, cancelled=cancelled)

    # --- reports ------------------------------------------------------------------------------------------------------

    async def _move(self, then: Session, say: Say, *, endpoint: str | None = None) -> None:
        """Take on the next session, and report what it says."""
        self._become(then)
        await self._say(say, endpoint=endpoint)

    def _become(self, then: Session) -> None:
        before, self._session = self._session, then
        if then.status.kind != before.status.kind:
            between_texts = GENERATE.during in (then.status.kind, before.status.kind)
            logger.log("DEBUG" if between_texts else "INFO", "{}", then.status.kind)

    async def _say(self, say: Say, *, endpoint: str | None = None) -> None:
        """Report the whole state and append the events, in one call. What the store does not take now goes with the next heartbeat."""
        lines = [{"kind": type(event).__name__, "event": encode(event).decode()} for event in say.events]
        said = await self._survive(
            lambda: self._member.report(
                say.status.kind,
                progress=say.progress,
                error=say.failure.error if say.failure else "",
                permanent=say.failure.permanent if say.failure else False,
                outcome=say.outcome,
                events=lines,
                endpoint=endpoint,
            )
        )
        if said:
            await self._generations.write_endings()

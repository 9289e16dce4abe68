"""The runner of one rank: a thin shell that reads the task log, asks the judge, drives the engine and reports.

The order of events is DESIGN section 5's:

- accepted: TaskStatusUpdated(Running), RunnerStatusUpdated(transitional), TaskAcknowledged in one step, then the work, then
  TaskStatusUpdated(Complete), RunnerStatusUpdated(stable) in one step;
- rejected: TaskAcknowledged, TaskStatusUpdated(Failed) with the rejection, in one step. Nothing else changes.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, assert_never

from loguru import logger
from pydantic import BaseModel

from barrier import (
    ClaimLost,
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
    TaskOutcome,
    VerdictAnnounced,
)
from runner.engine import EngineFailure, EngineGroup, GenerationRequest
from runner.host import EngineHost
from runner.machine import (
    Accept,
    AlreadyDone,
    Invalid,
    NotYet,
    Promise,
    Refusal,
    Standing,
    TaskResult,
    judge,
    rejection_of,
)
from runner.messages import (
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
    RunnerReady,
    RunnerRunning,
    RunnerShutdown,
    RunnerShuttingDown,
    RunnerStatus,
    RunnerStatusUpdated,
    RunnerWarmingUp,
    Shutdown,
    StartWarmup,
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
    """

    def __init__(self, member: Member, host: EngineHost, *, clock: Clock | None = None) -> None:
        self._member = member
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
        self._unfinished = 0
        self._current: str = ""
        self._current_chunks: asyncio.Task[None] | None = None
        self._cancelled: set[str] = set()
        self._leaving = asyncio.Event()
        self._lost: ClaimLost | None = None

    @property
    def status(self) -> RunnerStatus:
        """The status now."""
        return self._status

    def stop(self) -> None:
        """Ask `run` to tear down and return; safe from a signal handler of the event loop."""
        self._leaving.set()

    async def run(self) -> None:
        """Claim the rank and serve until a Shutdown task or `stop`; then tear down and give the rank back.

        Raises:
            RankTaken: another process holds the rank.
            ClaimLost: another process took the rank over while this one was silent; the engine is torn down.
            StoreError: the store could not be reached to begin with. Later outages are waited out.
        """
        await self._until_leaving(self._member.claim())
        if self._leaving.is_set():
            await self._clean_up()
            return
        logger.info("instance {}: this is rank {} ({})", self._instance, self._member.rank, self._member.incarnation)
        try:
            async with self._member.heartbeat():
                await self._until_leaving(self._serve())
                await self._tear_down()
        finally:
            await asyncio.shield(self._clean_up())
        if self._lost is not None:
            raise self._lost

    async def _until_leaving(self, doing: Coroutine[Any, Any, object]) -> None:
        """Do it until it ends or `stop` is called; raises what it raised."""
        working = asyncio.create_task(doing)
        leaving = asyncio.create_task(self._leaving.wait())
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            for task in (working, leaving):
                task.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def _clean_up(self) -> None:
        """Bounded: an engine that does not close is killed, a store that does not answer is left alone."""
        await self._host.kill()
        try:
            await self._member.leave()
        except StoreError as error:
            logger.warning("rank was not given back, its lease will lapse: {}", error)

    async def _serve(self) -> None:
        async with aclosing(self._member.tasks()) as entries:
            async for entry in entries:
                await self._handle(entry)
                if self._lost is not None:
                    raise self._lost
                if isinstance(self._status, RunnerShutdown):
                    return

    # --- the log ------------------------------------------------------------------------------------------------------

    async def _handle(self, entry: LogEntry) -> None:
        match entry:
            case EpochAnnounced():
                await self._enter(entry)
            case VerdictAnnounced(epoch, verdict):
                if self._promise is not None and epoch == self._promise.epoch:
                    logger.info("rank {}: attempt over: {}", self._member.rank, verdict)
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
        """Tear down, then promise, then report Idle: the planner's connect gate waits for just this."""
        if entry.epoch.number <= self._member.report_now.floor:
            return  # promised already, or older than a promise
        await self._leave_epoch()
        while True:
            try:
                outcome = await self._member.promise(entry.epoch)
                break
            except StoreError as error:
                logger.warning("rank {}: cannot promise yet: {}", self._member.rank, error)
                await self._clock.sleep(self._member.settings.command_seconds)
        match outcome:
            case Promised(epoch, world_size):
                self._promise = Promise(epoch, self._member.incarnation, world_size)
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
        for task in (self._phase, self._generating, self._watching):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._phase = self._generating = self._watching = None
        self._unfinished = 0
        unfinished = [self._current] if self._current else []
        self._current = ""
        while not self._generations.empty():
            unfinished.append(self._generations.get_nowait().task.task_id)
        for task_id in unfinished:
            await self._end_stream(task_id, error="the attempt ended before the text was complete; ask again")
        self._cancelled.clear()
        await self._host.close()

    # --- one task -----------------------------------------------------------------------------------------------------

    async def _receive(self, entry: TaskEntry) -> None:
        try:
            task = decode_task(entry.payload)
        except MalformedMessage as error:
            await self._reject(Invalid(f"malformed task: {error}"), entry, None)
            return
        standing = self._standing()
        if task.epoch != str(entry.epoch):
            await self._reject(Invalid("the task names another epoch than the log does"), entry, task)
            return
        if entry.missed and self._promise is not None and entry.epoch == self._promise.epoch:
            await self._fail(None, EngineFailure("an entry of the task log never reached this rank"))
            return
        judgement = judge(standing, task)
        if (
            isinstance(judgement, Accept)
            and isinstance(task, TextGeneration)
            and self._unfinished > _QUEUED_GENERATIONS
        ):
            judgement = NotYet(f"{_QUEUED_GENERATIONS} generations wait at this rank already; ask again later")
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
        state = states.get(outcome.result, "Failed")
        again = TaskStatusUpdated.model_validate(
            {"task_id": task.task_id, "state": state, "error": outcome.detail or None if state == "Failed" else None}
        )
        await self._say(events=[TaskAcknowledged(task_id=task.task_id), again])

    async def _accept(self, work: _Work) -> None:
        task = work.task
        match task:
            case ConnectToGroup():
                group = EngineGroup(self._member.rank, self._world_size(), task.coordinator, task.rank_order)
                await self._begin(work, RunnerConnecting())
                self._start(work, self._host.connect(group), RunnerConnected())
            case LoadModel():
                total = task.model.total_layers
                await self._begin(work, RunnerLoading(layers_loaded=0, total_layers=total))
                self._start(work, self._load(task), RunnerLoaded())
            case StartWarmup():
                await self._begin(work, RunnerWarmingUp())
                self._start(work, self._host.warm_up(), RunnerReady())
            case TextGeneration():
                self._unfinished += 1
                await self._begin(work, RunnerRunning())
                await self._generations.put(work)
                if self._generating is None:
                    self._generating = asyncio.create_task(self._generate_all(), name="rankgate generations")
            case CancelTask():
                await self._begin(work, self._status)
                self._cancel(task.cancels)
                await self._finish(work, self._status)
            case Shutdown():
                await self._begin(work, RunnerShuttingDown())
                await self._tear_down()
                await self._finish(work, RunnerShutdown())
            case _:
                assert_never(task)

    def _world_size(self) -> int:
        return self._promise.world_size if self._promise else 1

    async def _begin(self, work: _Work, status: RunnerStatus) -> None:
        """Say that the task runs, then the transitional status, then that it was read: in one step, in this order."""
        self._status = status
        task_id = work.task.task_id
        await self._say(
            outcome=self._remember(task_id, work.step, work.n, "running"),
            events=[
                TaskStatusUpdated(task_id=task_id, state="Running"),
                RunnerStatusUpdated(status=status),
                TaskAcknowledged(task_id=task_id),
            ],
        )

    async def _finish(self, work: _Work, status: RunnerStatus, result: TaskResult = "done") -> None:
        self._status = status
        task_id = work.task.task_id
        state = "Complete" if result == "done" else "Cancelled"
        await self._say(
            outcome=self._remember(task_id, work.step, work.n, result),
            events=[TaskStatusUpdated(task_id=task_id, state=state), RunnerStatusUpdated(status=status)],
        )

    async def _fail(self, work: _Work | None, failure: BaseException) -> None:
        """Accepted work failed, or the engine died: say so, give the engine up, and wait for the attempt's end."""
        if not isinstance(failure, EngineFailure):
            failure = EngineFailure(f"{type(failure).__name__}: {failure}")
        error = str(failure)[:2_000]
        logger.error("rank {}: failed: {}", self._member.rank, error)
        self._failure = failure
        self._status = RunnerFailed(error=error)
        events: list[BaseModel] = []
        outcome = None
        if work is not None:
            outcome = self._remember(work.task.task_id, work.step, work.n, "failed", detail=error)
            events.append(TaskStatusUpdated(task_id=work.task.task_id, state="Failed", error=error))
        await self._say(outcome=outcome, events=[*events, RunnerStatusUpdated(status=self._status)])
        await self._host.kill()

    # --- work ---------------------------------------------------------------------------------------------------------

    def _start(self, work: _Work, doing: Coroutine[Any, Any, None], then: RunnerStatus) -> None:
        if self._watching is not None:
            self._watching.cancel()
        self._phase = asyncio.create_task(self._do(work, doing, then), name=f"rankgate {work.step}")

    async def _do(self, work: _Work, doing: Awaitable[None], then: RunnerStatus) -> None:
        try:
            await doing
        except Exception as failure:  # noqa: BLE001  whatever an engine raises fails its task and never the runner
            await self._fail(work, failure)
        else:
            self._watching = asyncio.create_task(self._watch_engine(), name="rankgate engine watch")
            await self._finish(work, then)
        finally:
            self._phase = None

    async def _watch_engine(self) -> None:
        """An engine may die while it has nothing to do: then this rank has failed, and says so at once."""
        death = await self._host.died()
        if not self._current:  # otherwise the generation itself fails, and says it
            await self._fail(None, death)

    async def _load(self, task: LoadModel) -> None:
        async with aclosing(self._host.load(task.model)) as progress:
            async for layers in progress:
                self._status = RunnerLoading(layers_loaded=layers, total_layers=task.model.total_layers)
                self._member.note_progress(layers, task.model.total_layers)

    async def _generate_all(self) -> None:
        """Work through the accepted generations, one at a time and in the log's order: all ranks see the same order."""
        while True:
            work = await self._generations.get()
            try:
                cancelled = await self._generate(work)
            except Exception as failure:  # noqa: BLE001  as in `_do`
                self._current = ""
                self._unfinished -= 1
                await self._fail(work, failure)
                await self._end_stream(work.task.task_id, error=f"rank {self._member.rank} failed: {failure}")
                return
            self._current = ""
            self._unfinished -= 1
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
        self._current_chunks = asyncio.create_task(self._pump(task))
        try:
            await self._current_chunks
        except asyncio.CancelledError:
            own = asyncio.current_task()
            if own is not None and own.cancelling():
                self._current_chunks.cancel()
                await asyncio.gather(self._current_chunks, return_exceptions=True)
                raise
            await self._end_stream(task.task_id, cancelled=True)
            return True
        finally:
            self._current_chunks = None
        return False

    async def _pump(self, task: TextGeneration) -> None:
        answers = self._member.rank == 0
        index = 0
        request = GenerationRequest(task.task_id, task.prompt, task.max_tokens)
        async with aclosing(self._host.generate(request)) as pieces:
            async for text in pieces:
                if answers:
                    await self._write(Chunk(task_id=task.task_id, index=index, text=text))
                    index += 1
        if answers:
            finish = "length" if index >= task.max_tokens else "stop"
            await self._write(Chunk(task_id=task.task_id, index=index, finish=finish))

    def _cancel(self, task_id: str) -> None:
        """Stop a generation that runs or waits; anything else is over already, or ends with its attempt."""
        if len(self._cancelled) < _REMEMBERED:
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
            step=step,
            n=n,
            result=result,
            code=rejection.code if rejection else "",
            detail=(rejection.hint if rejection else detail)[:500],
            retryable=rejection.retryable if rejection else False,
        )
        self._outcomes[task_id] = outcome
        self._outcomes.move_to_end(task_id)
        while len(self._outcomes) > _REMEMBERED:
            self._outcomes.popitem(last=False)
        return outcome

    async def _say(self, *, outcome: TaskOutcome | None = None, events: list[BaseModel]) -> None:
        """Report the whole state and append the events, in one step. What cannot be said now goes with the next heartbeat."""
        lines = [{"kind": type(event).__name__, "event": encode(event).decode()} for event in events]
        status, failure = self._status, self._failure
        await self._survive(
            lambda: self._member.report(
                status.kind,
                progress=(status.layers_loaded, status.total_layers) if isinstance(status, RunnerLoading) else None,
                error=str(failure) if failure else "",
                permanent=failure.permanent if failure else False,
                outcome=outcome,
                events=lines,
            )
        )

    async def _write(self, chunk: Chunk) -> None:
        await self._survive(lambda: self._member.write_output(chunk.task_id, [encode(chunk)]))

    async def _end_stream(self, task_id: str, *, error: str = "", cancelled: bool = False) -> None:
        """End a client's stream. Every rank that knows why does: the client takes the first end that it reads."""
        finish = "cancelled" if cancelled else "error"
        await self._write(Chunk(task_id=task_id, index=0, finish=finish, error=error[:2_000] or None))

    async def _survive(self, send: Callable[[], Awaitable[None]]) -> None:
        try:
            await send()
        except StoreError as error:
            logger.warning("rank {}: not said yet: {}", self._member.report_now.rank, error)
        except ClaimLost as error:
            self._lost = error
            self._leaving.set()

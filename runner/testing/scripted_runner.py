"""Ranks for the test of a planner: real runners with a scripted engine, which deviate where the test says so."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from redis.asyncio import Redis

from barrier import Clock, EpochId, Member, Settings, StoreUnavailable, TaskEntry, TaskOutcome
from barrier.protocol.rank_state import PromiseOutcome
from barrier.store.report_frames import Event
from barrier.store.store import Store
from barrier.testing import FakeStore, wait_until
from barrier.testing.names import one_of
from runner.admission import Invalid, NotYet, Refusal, Stale
from runner.lifecycle import LIFECYCLE
from runner.messages import MalformedMessage, RejectionCode, RunnerStatus, StatusName, Task, TaskKind, decode_task
from runner.runner import Runner
from runner.testing.scripted_engine import TEXT, ScriptedEngine
from runner.testing.scripted_host import ScriptedHost

__all__ = ["RankPhase", "ScriptedRunner", "scripted_runners"]


RankPhase: TypeAlias = Literal["connect", "load", "warm_up", "generate"]
"""The calls of a rank's engine that a planner can cause."""

_KINDS: dict[str, str] = {row.call: row.task for row in LIFECYCLE.rows}
_REFUSALS: dict[RejectionCode, type[Refusal]] = {"NotYet": NotYet, "Stale": Stale, "Invalid": Invalid}

_lives = itertools.count(1)


@dataclass
class _Deviation:
    kind: str
    refusal: Refusal | None
    left: int | None

    def applies(self, kind: str) -> bool:
        if kind != self.kind or self.left == 0:
            return False
        if self.left is not None:
            self.left -= 1
        return True


class ScriptedRunner:
    """One rank in the test of a planner::

        async with ScriptedRunner(store, "demo", 1, world_size=2) as runner:
            runner.reject("load", times=2).fail("warm_up", "out of memory", permanent=True)
            ...                                  # the planner under test does its work
        assert runner.kinds == ["ConnectToGroup", "LoadModel", "LoadModel", "LoadModel", "StartWarmup"]

    It is a real `runner.Runner` with a `ScriptedEngine` that succeeds at once. It claims its rank, promises, tears down, reports,
    and judges every task as in production. So a planner that works with it works with the protocol. The test adds deviations. Each
    applies once unless ``times`` says otherwise, and holds for all lives of the rank.

    Args:
        redis: a client, a store, or a `FakeStore`. A `FakeStore` also gives its clock, and a client with the name ``rank <r>``.
        group: the instance.
        rank: which rank.
        world_size: number of ranks, if this rank is configured with one.
        digest: digest of the spec with which the rank is configured.
        namespace: as the planner's.
        settings: as the planner's.
        clock: as the planner's.
        node: name of its machine; ``node-<r>`` by default.
        text: the pieces that a generation yields.
    """

    def __init__(
        self,
        redis: FakeStore | Redis | Store,
        group: str,
        rank: int,
        *,
        world_size: int | None = None,
        digest: str = "",
        namespace: str = "rankgate",
        settings: Settings | None = None,
        clock: Clock | None = None,
        node: str | None = None,
        text: Sequence[str] = TEXT,
    ) -> None:
        if isinstance(redis, FakeStore):
            clock = clock or redis.clock
            redis = redis.client(f"rank {rank}")
        self.engine: ScriptedEngine = ScriptedEngine(auto=True, text=tuple(text))
        """The engine of all its lives. Script it directly for more detail."""
        self.rank = rank
        self.received: list[Task] = []
        """Every task that it has read from the log in all its lives, also those that it refused or ignored."""
        self._redis, self._group, self._clock = redis, group, clock
        self._options: dict[str, Any] = {
            "rank": rank,
            "world_size": world_size,
            "digest": digest,
            "namespace": namespace,
            "settings": settings,
            "clock": clock,
            "node": f"node-{rank}" if node is None else node,
        }
        self._deviations: list[_Deviation] = []
        self._running: asyncio.Task[None] | None = None
        self._spent = False
        self._begin_life()

    def _begin_life(self) -> None:
        self._spent = False
        # Lives must sort after one another, and two of them may begin within one millisecond of a test.
        life = next(_lives)
        self._member = _MortalMember(self._redis, self._group, incarnation=f"{life:012x}{life:016x}", **self._options)
        self.host: ScriptedHost = ScriptedHost(self.engine, rank=self.rank)
        self._runner = _DeviatingRunner(self._member, self.host, clock=self._clock, script=self)

    # --- the script ---------------------------------------------------------------------------------------------------

    def reject(
        self, phase: RankPhase, *, code: RejectionCode = "NotYet", hint: str = "", times: int | None = 1
    ) -> ScriptedRunner:
        """Refuse tasks of this phase; ``times=None`` refuses all of them."""
        one_of("phase", phase, _KINDS)
        sentence = hint or f"the test says that rank {self.rank} refuses {_KINDS[phase]}"
        one_of("code of a rejection", code, _REFUSALS)
        return self._deviate(phase, _REFUSALS[code](sentence), times)

    def ignore(self, phase: RankPhase, *, times: int | None = 1) -> ScriptedRunner:
        """Read tasks of this phase and neither do nor answer them, like a rank that hangs; ``times=None`` ignores all."""
        return self._deviate(phase, None, times)

    def fail(self, phase: RankPhase, error: str, *, permanent: bool = False, times: int | None = 1) -> ScriptedRunner:
        """Accept a task of this phase and fail: the task under way, or else the next; ``times=None`` fails all from now on."""
        self.engine.fail(phase, error, permanent=permanent, times=times)
        return self

    def hold(self, *phases: RankPhase) -> ScriptedRunner:
        """Accept tasks of these phases, and be busy with them until `let`."""
        self.engine.hold(*phases)
        return self

    def let(self, *phases: RankPhase) -> ScriptedRunner:
        """Go on with the tasks that `hold` holds, and hold these phases no more. Without an argument: all phases."""
        self.engine.release(*phases)
        return self

    def lose_engine(self, how: str = "was killed by the system (signal 9)") -> ScriptedRunner:
        """End the engine as if its process died, whatever it does; the runner lives."""
        self.host.die(how)
        return self

    def _deviate(self, phase: RankPhase, refusal: Refusal | None, times: int | None) -> ScriptedRunner:
        one_of("phase", phase, _KINDS)
        if times is not None and times < 1:
            raise ValueError(f"times is {times}; give a number above 0, or None for always")
        self._deviations.append(_Deviation(_KINDS[phase], refusal, times))
        return self

    def next_deviation(self, task: Task) -> _Deviation | None:
        """The deviation for a task that was read, if the test planned one; counts it."""
        return next((one for one in self._deviations if one.applies(task.kind)), None)

    # --- its life -----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> ScriptedRunner:
        """Claim the rank and begin to serve."""
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Tear down, give the rank back, close."""
        await self.stop()

    async def start(self) -> None:
        """Claim the rank and begin to serve; returns when the claim is made. After `stop` or `die` this is a new incarnation.

        Raises:
            RankTaken: another process keeps holding the rank.
            StoreError: the store could not be reached.
        """
        if self._running is not None:
            return
        if self._spent:
            self._begin_life()
        self._spent = True
        running = self._running = asyncio.create_task(self._runner.run(), name=f"scripted rank {self.rank}")
        saying_hello = asyncio.ensure_future(self._member.said_hello.wait())
        try:
            await asyncio.wait((running, saying_hello), return_when=asyncio.FIRST_COMPLETED)
        finally:
            saying_hello.cancel()
        if running.done() and not self._member.said_hello.is_set():
            self._running = None
            await self._member.close()
            running.result()

    async def stop(self) -> None:
        """Leave as on SIGTERM: tear down and give the rank back. Does nothing if the rank is gone."""
        running, self._running = self._running, None
        if running is None:
            return
        self._runner.stop()
        try:
            await running
        finally:
            await self._member.close()

    async def die(self) -> None:
        """End as on SIGKILL: the rank writes nothing more, and its claim and report stay until the lease is over."""
        running, self._running = self._running, None
        self._member.die()
        if running is not None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        await self._member.close()

    async def restart(self) -> None:
        """Become a new incarnation. A rank that serves leaves first. A rank that died waits until its old claim lapses."""
        await self.stop()
        await self.start()

    # --- what the test sees -------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether it serves."""
        return self._running is not None and not self._running.done()

    @property
    def incarnation(self) -> str:
        """Its present incarnation."""
        return self._member.incarnation

    @property
    def status(self) -> RunnerStatus:
        """Its status now, with its progress or error."""
        return self._runner.status

    @property
    def epoch(self) -> EpochId | None:
        """The epoch that it has promised."""
        return self._member.promised

    @property
    def outcomes(self) -> tuple[TaskOutcome, ...]:
        """The outcomes of its last few tasks, as in its report."""
        return self._member.report_now.outcomes

    @property
    def kinds(self) -> list[TaskKind]:
        """The kinds of the tasks that it has read, in order."""
        return [task.kind for task in self.received]

    async def until(self, *statuses: StatusName) -> None:
        """Wait until it is in one of these statuses.

        Raises:
            AssertionError: it was not within 5 real seconds.
            ValueError: there is no such status.
        """
        for status in statuses:
            one_of("status", status, get_args(StatusName))
        await wait_until(
            lambda: self.status.kind in statuses,
            f"rank {self.rank}, which is {self.status.kind}, to be {' or '.join(statuses)}",
        )


class _DeviatingRunner(Runner):
    """The real runner, except for the tasks that the script names."""

    def __init__(self, member: Member, host: ScriptedHost, *, clock: Clock | None, script: ScriptedRunner) -> None:
        super().__init__(member, host, clock=clock)
        self._script = script

    async def _receive(self, entry: TaskEntry) -> None:
        try:
            task = decode_task(entry.payload)
        except MalformedMessage:
            await super()._receive(entry)
            return
        self._script.received.append(task)
        deviation = self._script.next_deviation(task)
        if deviation is None:
            await super()._receive(entry)
        elif deviation.refusal is not None:
            await self._reject(deviation.refusal, entry, task)


class _MortalMember(Member):
    """A rank's side of the barrier that can end like a killed process."""

    def __init__(self, redis: Redis | Store, group: str, **options: Any) -> None:  # noqa: ANN401  as Member
        super().__init__(redis, group, **options)
        self.said_hello = asyncio.Event()
        self._dead = False

    def die(self) -> None:
        """From now on, send nothing."""
        self._dead = True

    async def claim(
        self,
        *,
        timeout: float | None = None,  # noqa: ASYNC109  as Member
        spare: bool = False,
        wait_for_store: float = 0.0,
    ) -> int:
        rank = await super().claim(timeout=timeout, spare=spare, wait_for_store=wait_for_store)
        self.said_hello.set()
        return rank

    async def report(
        self,
        status: str | None = None,
        *,
        progress: tuple[int, int] | None = None,
        error: str = "",
        permanent: bool = False,
        outcome: TaskOutcome | None = None,
        events: Sequence[Event] = (),
        endpoint: str | None = None,
    ) -> None:
        self._check_alive()
        await super().report(
            status,
            progress=progress,
            error=error,
            permanent=permanent,
            outcome=outcome,
            events=events,
            endpoint=endpoint,
        )

    async def write_output(self, task_id: str, chunks: Iterable[bytes]) -> None:
        self._check_alive()
        await super().write_output(task_id, chunks)

    async def promise(self, epoch: EpochId, *, status: str | None = None) -> PromiseOutcome:
        self._check_alive()
        return await super().promise(epoch, status=status)

    async def leave(self) -> None:
        if not self._dead:
            await super().leave()

    def _check_alive(self) -> None:
        if self._dead:
            raise StoreUnavailable("this process was killed")


@asynccontextmanager
async def scripted_runners(
    redis: FakeStore | Redis | Store,
    group: str,
    world_size: int,
    *,
    digest: str = "",
    namespace: str = "rankgate",
    settings: Settings | None = None,
    clock: Clock | None = None,
) -> AsyncGenerator[list[ScriptedRunner]]:
    """Start all ranks of an instance; they leave at the end of the ``async with`` block. See `ScriptedRunner`."""
    async with AsyncExitStack() as stack:
        ranks = [
            ScriptedRunner(
                redis,
                group,
                rank,
                world_size=world_size,
                digest=digest,
                namespace=namespace,
                settings=settings,
                clock=clock,
            )
            for rank in range(world_size)
        ]
        for rank in ranks:
            await stack.enter_async_context(rank)
        yield ranks

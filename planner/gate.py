"""The gate alone, for a planner that you already have.

Such a planner polls statuses that may be old, believes that all runners are connected, and sends ``LoadModel``. Keep it, and let
every step pass the gate first. The gate asks the store, and not the planner's memory::

    async with LoadGate(redis, "demo", world_size=4) as gate:
        match await gate.open(timeout=60):
            case Opened():
                await gate.pass_step("connect", timeout=60)
                outcome = await gate.pass_step("load", timeout=120)

Ranks report through `barrier.Member` (or are runners of ours) and read their tasks from the group's task log. The gate appends a task to
this log at the instant at which all ranks have arrived. To send tasks in another way, use `LoadGate.arrived`.

Ranks that connect by themselves need no step "connect": pass only "load". A rank may report ``Connected``, or ``RunnerConnected`` as
the runners of other systems do. The same holds for every status.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from redis.asyncio import Redis

from barrier import (
    Barrier,
    Clock,
    Concluded,
    EpochId,
    Fenced,
    Leading,
    Opened,
    Released,
    Requirement,
    Settings,
    Store,
    StoreError,
    Superseded,
    Unconcluded,
    Unknown,
    Verdict,
    supervise,
)
from barrier.errors import InvalidName
from barrier.log import logger
from barrier.protocol.names import shown
from barrier.protocol.outcomes import ConcludeOutcome, OpenOutcome, ReleaseOutcome, WaitOutcome
from planner.lifecycle import Step, StepName, predecessor, steps_for
from planner.policy import Policy
from planner.spec import InstanceSpec
from planner.tasks import task_for
from runner.lifecycle import FAILED
from runner.messages import ModelSpec, Task, encode

__all__ = ["LoadGate"]


_OTHER_PREFIX = "Runner"
"""Other systems have our statuses with this prefix."""

_FAILED = (FAILED, f"{_OTHER_PREFIX}{FAILED}")

_CLOSED = Unknown("no attempt was opened here: call open() first, and go on only if it answers Opened")


class LoadGate:
    """The gate of one instance: it dispatches a step of `planner.lifecycle` when all ranks are ready for it. An async context manager.

    Any caller may call a method again with the same arguments: a step is dispatched once in an attempt. After any outcome but
    ``Released``, the caller decides what to do: conclude the attempt, pause, open the next one.

    Args:
        redis: a store from `barrier.connect`, or your own ``redis.asyncio.Redis``.
        instance: the instance's name, which is the barrier's group.
        world_size: number of ranks.
        model: the model in the gate's own LoadModel; not needed if you pass your own tasks.
        namespace: the cluster's name; clusters with different names can share one store.
        settings: the times; by default those of the store.
        clock: time, for tests.
        holder: the name of this planner; unique.

    Attributes:
        epoch: the attempt that `open` began; ``None`` before.

    Raises:
        ValueError: the name or the world size is not allowed.
    """

    def __init__(
        self,
        redis: Redis | Store,
        instance: str,
        *,
        world_size: int,
        model: ModelSpec | None = None,
        namespace: str = "rankgate",
        settings: Settings | None = None,
        clock: Clock | None = None,
        holder: str | None = None,
    ) -> None:
        model = model or ModelSpec(model_id="simulated")
        self._spec = InstanceSpec(name=instance, world_size=world_size, model=model)
        self._barrier = Barrier(
            redis, instance, world_size=world_size, namespace=namespace, settings=settings, clock=clock, holder=holder
        )
        self._renewing: asyncio.Task[None] | None = None
        self.epoch: EpochId | None = None
        self._passed: set[str] = set()

    async def __aenter__(self) -> LoadGate:
        """Make sure that the guarantees hold on this store."""
        try:
            await self._barrier.store.verify()
        except BaseException:
            await self._barrier.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Give leadership back, so that another planner need not wait, and close. The attempt goes on."""
        await self._stop_renewing()
        try:
            await self._barrier.resign()
        except StoreError as error:
            logger.warning("leadership of {} was not given back, it will lapse: {}", self._spec.name, error)
        await self._barrier.close()

    async def open(self, *, timeout: float) -> OpenOutcome:  # noqa: ASYNC109  by the injected clock
        """Take the lead and begin an attempt with the live ranks as its roster. If an attempt is under way, end it first.

        Args:
            timeout: seconds to wait for ranks that are not here yet.

        Returns:
            ``Opened``; ``NotReady`` with the ranks that did not come; ``Disagree`` if ranks were started for another spec;
            ``Fenced`` if another planner leads; ``Unconcluded`` if the attempt under way could not be ended.

        Raises:
            StoreError: could not find out; call again.
        """
        deadline = self._barrier.clock.now() + timeout
        while True:
            left = max(deadline - self._barrier.clock.now(), 0.001)
            outcome = await self._barrier.open(self._spec.world_size, digest=self._spec.digest, timeout=left)
            if isinstance(outcome, Unconcluded):
                match await self._barrier.conclude(outcome.epoch, Verdict.aborted("a new attempt was asked for")):
                    case Concluded():
                        continue
                    case Fenced() as fenced:
                        return fenced
                    case Superseded() | Unknown():
                        return outcome
            if isinstance(outcome, Opened):
                self.epoch = outcome.epoch
                self._passed.clear()
                await self._stop_renewing()
                self._renewing = supervise.restarted(
                    self._renew,
                    f"gate of {self._spec.name}: renewing its leadership",
                    clock=self._barrier.clock,
                    longest_pause=self._barrier.settings.lease / 2,
                )
            return outcome

    async def pass_step(
        self,
        step: StepName,
        task: Task | str | None = None,
        *,
        timeout: float,  # noqa: ASYNC109  by the injected clock
    ) -> ReleaseOutcome:
        """Wait until all ranks have arrived for a step, and dispatch its task at that instant, once in the attempt.

        Args:
            step: a row of `planner.lifecycle`.
            task: what to dispatch: a task, any text that your ranks understand, or ``None`` for the row's own task.
            timeout: give up after so many seconds without any progress; slow is not stalled.

        Returns:
            ``Released`` with the task's position in the log; ``TimedOut`` with a sentence that names every missing rank; ``Aborted``
            with the verdict if a rank failed or the attempt was ended; ``Superseded``; ``Fenced``; ``Unknown``.

        Raises:
            InvalidName: there is no such step for this number of ranks; nothing was sent.
            StoreError: unknown; call again with the same arguments.
        """
        row, size, leadership = self._row(step), self._spec.world_size, self._barrier.leadership
        if self.epoch is None:
            return _CLOSED
        if task is None and leadership is not None:
            task = task_for(row, self._spec, self.epoch, leadership.term, Policy())
        payload = task if isinstance(task, str) else encode(task).decode() if task is not None else ""
        before = predecessor(row, size)
        outcome = await self._barrier.release(
            self.epoch,
            row.name,
            payload,
            self._requirement(row),
            timeout=timeout,
            to=row.to(size),
            after=before if before in self._passed else "",  # ranks may do the step before by themselves
            endpoints=row.wants_endpoints,
            failed_statuses=_FAILED,
        )
        if isinstance(outcome, Released):
            self._passed.add(row.name)
        return outcome

    async def arrived(self, step: StepName, *, timeout: float) -> WaitOutcome:  # noqa: ASYNC109  by the injected clock
        """Wait as `pass_step` does, and dispatch nothing.

        Use it if you send tasks in another way. A rank may fail or restart between this answer and your task, so the runner must
        still refuse a task that comes out of state. Raises as `pass_step` does.
        """
        row = self._row(step)
        if self.epoch is None:
            return _CLOSED
        return await self._barrier.wait(self.epoch, self._requirement(row), timeout=timeout, failed_statuses=_FAILED)

    async def conclude(self, verdict: Verdict) -> ConcludeOutcome:
        """End the attempt for all ranks; they tear down. The first verdict wins, and every later call returns it."""
        return _CLOSED if self.epoch is None else await self._barrier.conclude(self.epoch, verdict)

    def _requirement(self, row: Step) -> Requirement:
        """What the step waits for, with each status under both of its names."""
        return tuple(
            replace(rule, statuses=(*rule.statuses, *(f"{_OTHER_PREFIX}{status}" for status in rule.statuses)))
            for rule in row.waits_for(self._spec.world_size)
        )

    def _row(self, step: str) -> Step:
        rows = steps_for(self._spec.world_size)
        found = next((row for row in rows if row.name == step), None)
        if found is None:
            names = ", ".join(row.name for row in rows)
            raise InvalidName(f"step {shown(step)} is none of those for {self._spec.world_size} ranks: {names}")
        return found

    async def _renew(self) -> None:
        """Keep the lead while the gate waits. When another planner has it, stop: only `open` takes it again."""
        while True:
            await self._barrier.clock.sleep(self._barrier.settings.lease / 2)
            try:
                if not isinstance(await self._barrier.lead(), Leading):
                    return
            except StoreError as error:
                logger.warning("leadership of {} was not renewed: {}", self._spec.name, error)

    async def _stop_renewing(self) -> None:
        renewing, self._renewing = self._renewing, None
        await supervise.end(renewing)

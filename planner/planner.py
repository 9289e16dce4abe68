"""The planner as a library: launch instances, generate text, stop them; or plan all instances of the store's desired state."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass

from redis.asyncio import Redis

from barrier import Barrier, Clock, Settings, Snapshot, StoreError, SystemClock, adopt, supervise
from barrier.errors import RankgateError
from barrier.log import logger
from barrier.plain import number
from barrier.protocol.ids import new_nonce
from barrier.store.keys import Keys
from barrier.store.store import Store
from barrier.store.wakeups import Wakeups
from planner.explain import explain_instance
from planner.loop import InstanceLoop, State
from planner.policy import Policy
from planner.registry import InstanceRecord, Registry
from planner.requests import GenerationFailed, RequestQueue
from planner.spec import InstanceSpec

__all__ = ["Instance", "InstanceFailed", "Planner"]


class InstanceFailed(RankgateError):
    """The instance was given up, or did not come up in time. The sentence names the rank at fault, its status and the reason."""


_RENEW_DESIRED = 20.0
"""Seconds after which the desired state is read again, and its lifetime renewed, without a wake-up."""


@dataclass(slots=True)
class _Planned:
    loop: InstanceLoop
    barrier: Barrier
    requests: RequestQueue
    record: InstanceRecord
    task: asyncio.Task[State]


class Instance:
    """A launched instance. Get it from `Planner.launch`."""

    def __init__(self, planned: _Planned, planner: Planner) -> None:
        self._planned = planned
        self._planner = planner

    @property
    def name(self) -> str:
        """The instance's name."""
        return self.spec.name

    @property
    def spec(self) -> InstanceSpec:
        """What was launched."""
        return self._planned.record.spec

    @property
    def state(self) -> State:
        """What the planner last saw, and the reason for its last decision."""
        return self._planned.loop.state

    async def ready(self, timeout: float | None = None) -> None:  # noqa: ASYNC109  by the injected clock
        """Wait until all ranks serve.

        Args:
            timeout: seconds to wait; ``None``: wait until the instance serves or is given up, or ranks have been away for
                `Policy.assemble_timeout`.

        Raises:
            InstanceFailed: the instance was given up, was stopped, or is not up in time; with the whole explanation. If it is not up
                in time it stays launched, and the next attempt begins when the ranks come.
            StoreError: the store is not suitable, or refuses this user.
        """
        try:
            if timeout is None:
                state = await self._serving_or_overdue()
            else:
                waiting = self._planned.loop.until(lambda state: state.serving or state.over)
                state = await self._planner.clock.wait_for(waiting, timeout)
        except TimeoutError:
            within = "in time" if timeout is None else f"within {number(timeout)} s"
            raise InstanceFailed(f"{self.name} was not ready {within}: {self.state.reason}") from None
        if state.error is not None:
            raise state.error
        if state.failure:
            raise InstanceFailed(state.failure)
        if state.stopped:
            raise InstanceFailed(f"{self.name} was stopped before it was ready")
        if state.left:
            raise InstanceFailed(f"{self.name}: {state.left}")
        if not state.serving:
            raise InstanceFailed(state.reason)

    async def _serving_or_overdue(self) -> State:
        """The state when the instance serves, is over, or has been overdue, but then not before `Policy.assemble_timeout` from now."""
        loop, clock = self._planned.loop, self._planner.clock
        deadline = clock.now() + self._planner.policy.assemble_timeout
        while True:
            state = await loop.until(lambda state: state.serving or state.over or state.overdue)
            left = deadline - clock.now()
            if state.serving or state.over or left <= 0:
                return state
            with suppress(TimeoutError):
                await clock.wait_for(loop.until(lambda state: state.over or not state.overdue), left)

    async def generate(
        self,
        prompt: str,
        *,
        max_tokens: int = 64,
        timeout: float = 120.0,  # noqa: ASYNC109  by the injected clock
    ) -> AsyncGenerator[str, None]:
        """Generate text and yield it piece by piece. To cancel it, leave the loop early and close the iterator.

        Raises:
            GenerationFailed: the generation was refused, failed, or was not complete in time.
            InvalidName: the prompt or `max_tokens` is out of range.
        """
        if self.state.failure or self.state.error is not None or self.state.stopped:
            why = self.state.failure or (f"{self.name}: {self.state.error}" if self.state.error else "it was stopped")
            raise GenerationFailed(f"{self.name} does not generate any more: {why}")
        async with aclosing(self._planned.requests.generate(prompt, max_tokens=max_tokens, seconds=timeout)) as pieces:
            async for piece in pieces:
                yield piece

    async def stop(self, timeout: float = 60.0) -> None:  # noqa: ASYNC109  by the injected clock
        """Stop the instance: every rank tears down, and the runners stay. Returns when no rank is in the attempt any more.

        Raises:
            InstanceFailed: ranks did not tear down in time; the sentence says which.
            StoreError: the store could not be reached.
        """
        await self._planner.stop_instance(self._planned, timeout)

    async def inspect(self) -> Snapshot:
        """A fresh picture."""
        return await self._planned.barrier.inspect()

    async def explain(self) -> str:
        """One sentence on what the instance waits for now."""
        snapshot, state = await self.inspect(), self.state
        return state.failure or explain_instance(snapshot, wanted=not state.over)


def _renew(planned: _Planned, record: InstanceRecord) -> None:
    """Take over what may change in a launch; see `Registry.launch`."""
    if record.desired == "up" and record.spec != planned.record.spec:
        planned.record = record
        planned.loop.renew(record)


class Planner:
    """Brings instances up and keeps them up. Use it as an async context manager.

    Args:
        redis: a store from `barrier.connect`, or your own ``redis.asyncio.Redis``.
        namespace: the cluster's name; clusters with different names can share one store.
        policy: how long to wait, and how often to try again.
        settings: the times; by default those of the store.
        clock: time, for tests.
        rng: for jitter; seed it in tests.
        holder: the name of this planner; unique. By default host name, process id and random digits.
    """

    def __init__(
        self,
        redis: Redis | Store,
        *,
        namespace: str = "rankgate",
        policy: Policy | None = None,
        settings: Settings | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        holder: str | None = None,
    ) -> None:
        self.namespace = namespace
        self.policy: Policy = policy or Policy()
        self.clock: Clock = clock or SystemClock()
        self._store = adopt(redis, settings=settings)
        self._owns_store = redis is not self._store
        self._registry = Registry(self._store, namespace)
        self._wakeups = Wakeups(self._store, self.clock)
        self._rng = rng or random.Random()  # noqa: S311  jitter is no secret
        self.holder: str = holder or f"{socket.gethostname()[:60]}-{os.getpid()}-{new_nonce()[:6]}"
        """The name of this planner, for all of its instances."""
        self._planned: dict[str, _Planned] = {}
        self._watching: asyncio.Task[None] | None = None
        self._adopting = False
        self._knows_desired = True

    async def __aenter__(self) -> Planner:
        """Make sure that the guarantees hold on this store, and begin to follow the desired state."""
        try:
            await self._store.verify()
            start = await self._registry.changes_end()
        except BaseException:
            await self._close_store()
            raise
        self._watching = supervise.restarted(
            lambda: self._watch_desired(start),
            "the watch over the desired state",
            clock=self.clock,
            longest_pause=self._store.settings.lease,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop planning and give leadership back. Instances that are up stay up for the next planner."""
        await supervise.end(self._watching)
        for planned in list(self._planned.values()):
            await self._part_with(planned)
        await self._wakeups.close()
        await self._close_store()

    async def _close_store(self) -> None:
        if self._owns_store:
            await self._store.close()

    async def launch(
        self,
        spec: InstanceSpec,
        *,
        wait: bool = True,
        timeout: float | None = None,  # noqa: ASYNC109  by the injected clock
    ) -> Instance:
        """Bring an instance up, or join it if it is up already with the same spec.

        Args:
            spec: what to bring up.
            wait: whether to return only when all ranks serve.
            timeout: see `Instance.ready`.

        Raises:
            InstanceFailed: see `Instance.ready`.
            StoreError: the store could not be reached, or is not suitable.
        """
        record = await self._registry.launch(spec)
        instance = Instance(await self._plan(record), self)
        if wait:
            await instance.ready(timeout)
        return instance

    async def run(self) -> None:
        """Plan every instance of the desired state until cancelled. Several planners may do so: one leads each instance."""
        self._adopting = True

        async def follow() -> None:
            while True:
                await self.clock.sleep(await self._follow_desired())

        await supervise.keep_going(
            follow, "the look at the desired state", clock=self.clock, longest_pause=self._store.settings.lease
        )

    @property
    def instances(self) -> dict[str, State]:
        """What this planner last saw of each instance that it plans."""
        return {name: planned.loop.state for name, planned in self._planned.items()}

    @property
    def looks(self) -> dict[str, int]:
        """How often this planner has begun a look at each of its instances, whether or not the store answered."""
        return {name: planned.loop.looks for name, planned in self._planned.items() if not planned.loop.state.over}

    async def stop_instance(self, planned: _Planned, seconds: float) -> None:
        """See `Instance.stop`."""
        if not await self._registry.stop(planned.record):
            return
        planned.loop.stop()
        name = planned.record.spec.name
        deadline = self.clock.now() + seconds
        try:
            await self.clock.wait_for(planned.loop.until(lambda state: state.over), seconds)
        except TimeoutError:
            raise InstanceFailed(
                f"{name} did not stop within {number(seconds)} s: {planned.loop.state.reason}"
            ) from None
        while True:
            snapshot = await planned.barrier.inspect()
            epoch = snapshot.epoch
            busy = [v.rank for v in snapshot.ranks if v.report and epoch and v.report.epoch == epoch.id]
            if not busy:
                break
            if self.clock.now() >= deadline:
                ranks = ", ".join(f"rank {rank}" for rank in busy)
                raise InstanceFailed(f"{name}: {ranks} did not tear down within {number(seconds)} s")
            left = min(deadline - self.clock.now(), self._store.settings.heartbeat)
            await planned.barrier.watch(snapshot, (), left, any_change=True)
        await self._registry.carried_out(planned.record)  # if the loop was over before, it has not noted this
        await self._part_with(planned)

    # --- the desired state --------------------------------------------------------------------------------------------

    async def _watch_desired(self, start: str) -> None:
        async with self._wakeups.subscribe(self._registry.keys.changes, start) as changes:
            look_again = _RENEW_DESIRED
            while True:
                await changes.next(look_again)
                look_again = await self._follow_desired()

    async def _follow_desired(self) -> float:
        """Plan what is wanted now. Returns the seconds until the next look; they are few if the store did not answer."""
        try:
            wanted = await self._registry.all()
        except StoreError as error:
            if self._knows_desired:
                logger.warning("the desired state is not readable now: {}", error)
            self._knows_desired = False
            return self._store.settings.command_seconds
        self._knows_desired = True
        for name, planned in list(self._planned.items()):
            with supervise.passed_over(f"instance {name}: following its desired state"):
                await self._follow_record(planned, wanted.get(name))
        for name, record in wanted.items():
            if self._adopting and name not in self._planned and not record.failure and record.desired != "gone":
                with supervise.passed_over(f"instance {name}: taking it up"):
                    await self._take_up(record)
        return _RENEW_DESIRED

    async def _follow_record(self, planned: _Planned, record: InstanceRecord | None) -> None:
        if record is None:
            await self._heal(planned)
        elif record.launched_ms > planned.record.launched_ms:  # launched anew, here or by another planner
            await self._part_with(planned)
        elif record.launched_ms == planned.record.launched_ms:
            if record.desired != "up":
                planned.loop.stop()
            else:
                _renew(planned, record)
        if self._adopting and planned.loop.state.over:
            await self._part_with(planned)

    async def _take_up(self, record: InstanceRecord) -> None:
        try:
            planned = await self._plan(record)
        except InstanceFailed:  # launched anew meanwhile: the next look takes that up
            return
        if record.desired == "down":
            planned.loop.stop()

    async def _heal(self, planned: _Planned) -> None:
        """Write an instance back that the store forgot and nobody stopped."""
        if planned.loop.state.over:
            return
        try:
            await self._registry.heal(planned.record)
        except StoreError as error:
            logger.warning("the desired state is not writable now: {}", error)

    async def _plan(self, record: InstanceRecord) -> _Planned:
        name = record.spec.name
        while (known := self._planned.get(name)) is not None:  # another call may begin to plan it while this one waits
            if known.record.launched_ms == record.launched_ms and not known.loop.state.over:
                _renew(known, record)
                return known
            if known.record.launched_ms > record.launched_ms:
                raise InstanceFailed(f"{name} was launched again while this launch began")
            await self._part_with(known)
        barrier = Barrier(
            self._store,
            name,
            world_size=record.spec.world_size,
            namespace=self.namespace,
            clock=self.clock,
            holder=self.holder,
            wakeups=self._wakeups,
        )
        requests = RequestQueue(self._store, Keys(self.namespace, name), self.clock)
        loop = InstanceLoop(
            barrier, record, registry=self._registry, policy=self.policy, requests=requests, rng=self._rng
        )
        # After a mistake of ours in there, the loop's own state says so to everybody who waits.
        task = supervise.background(loop.run(), f"plan {name}", on_mistake=lambda _: None)
        planned = self._planned[name] = _Planned(loop, barrier, requests, record, task)
        return planned

    async def _part_with(self, planned: _Planned) -> None:
        """Stop planning one instance, and let a standby lead it at once."""
        if self._planned.get(planned.record.spec.name) is planned:
            del self._planned[planned.record.spec.name]
        await supervise.end(planned.task)
        planned.loop.leave("this planner does not look after it any more")
        try:
            await planned.barrier.resign()
        except StoreError as error:
            logger.warning("leadership of {} was not given back, it will lapse: {}", planned.record.spec.name, error)
        await planned.barrier.close()

"""The shell around `decide` for one instance: looks, decides, acts. All I/O of a planner is here and in `planner.requests`."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar, assert_never

from barrier import (
    Barrier,
    Clock,
    Concluded,
    Fenced,
    Following,
    Leading,
    NotReady,
    Requirement,
    Snapshot,
    StoreCorrupt,
    StoreError,
    StoreRefused,
    StoreUnsuitable,
    Superseded,
    Unconcluded,
    Unknown,
    Verdict,
    Wake,
    missing_ranks,
    supervise,
)
from barrier.backoff import Backoff
from barrier.log import LogContext, logger
from barrier.plain import number
from planner.decide import (
    FOREVER,
    Action,
    Conclude,
    Finished,
    GiveUp,
    OpenEpoch,
    PassGate,
    RestoreEpoch,
    Serve,
    View,
    Wait,
    decide,
    topic,
)
from planner.explain import is_serving
from planner.lifecycle import serving_requirement
from planner.policy import Policy
from planner.recovery import Memory, encode_notes, forgive, hold, leases, observe
from planner.registry import InstanceRecord, Registry
from planner.requests import GENERATE, RequestQueue
from planner.tasks import task_for
from runner.messages import encode

__all__ = ["InstanceLoop", "State"]


_T = TypeVar("_T")

_FIRST_PAUSE = 0.02  # seconds before the next look after an outage of the store
_LOOKS_PER_STALL = 8
"""A planner that waits for ranks looks so often within the shortest stall: it learns of a sign only when it looks."""


@dataclass(frozen=True, slots=True)
class State:
    """What a loop last saw and what it does; for tables, clients and tests.

    Attributes:
        snapshot: the last picture; ``None`` before the first.
        reason: the reason for its last decision, in one sentence.
        leading: whether this planner leads the instance.
        serving: whether all ranks serve.
        overdue: whether ranks have been away for longer than `Policy.assemble_timeout`. The loop still waits for them.
        failure: why the instance was given up; empty if it was not.
        error: the error that ended the loop, if one did.
        stopped: whether the instance was stopped as asked.
        left: why this planner does not look after the instance any more; empty while it does. Another planner may do so.
    """

    snapshot: Snapshot | None = None
    reason: str = "not looked yet"
    leading: bool = False
    serving: bool = False
    overdue: bool = False
    failure: str = ""
    error: StoreError | None = None
    stopped: bool = False
    left: str = ""

    @property
    def over(self) -> bool:
        """Whether the loop has come to an end."""
        return bool(self.failure or self.left) or self.stopped or self.error is not None


class InstanceLoop:
    """Plans one instance until it is stopped or given up, or follows while another planner leads.

    Args:
        barrier: the instance's barrier.
        record: the desired state.
        registry: takes the note that the instance was given up or stopped.
        policy: how long to wait.
        requests: the requests of clients.
        rng: for jitter; seed it in tests.
    """

    def __init__(
        self,
        barrier: Barrier,
        record: InstanceRecord,
        *,
        registry: Registry,
        policy: Policy,
        requests: RequestQueue,
        rng: random.Random,
    ) -> None:
        self._barrier = barrier
        self._record = record
        self._registry = registry
        self._planner_policy = policy
        self._requests = requests
        self._rng = rng
        self._clock: Clock = barrier.clock
        self._settings = barrier.settings
        self._memory = Memory.fresh(self._clock.now(), record.launched_ms)
        self._lead_at = float("-inf")
        self._ordinal = 0
        self._other_leases: dict[int, float] = {}
        self._told: object = None
        self._poked = asyncio.Event()
        self._changed = asyncio.Event()
        self.state: State = State()
        self._about = LogContext(record.spec.name)
        self._decided: object = None
        self._led: object = None
        self.looks: int = 0
        """How often the loop has begun a look at its instance, whether or not the store answered."""

    @property
    def _policy(self) -> Policy:
        """The policy for this instance, whose spec may have times of its own."""
        return self._planner_policy.for_instance(self._record.spec.patience, self._settings)

    def stop(self) -> None:
        """Ask to stop the instance; `run` ends when its epoch is concluded."""
        self._memory = replace(self._memory, stopping=True)
        self._poked.set()

    def renew(self, record: InstanceRecord) -> None:
        """Take over the times that changed in the same launch."""
        self._record = record
        self._poked.set()

    def poke(self) -> None:
        """Look again now."""
        self._poked.set()

    async def until(self, predicate: Callable[[State], bool]) -> State:
        """Wait until the state satisfies a predicate; returns that state."""
        while not predicate(self.state):
            await self._changed.wait()
        return self.state

    async def run(self) -> State:
        """Plan until the end; returns the last state. Never raises an error of the store: the loop waits until the store is back."""
        try:
            with self._about.applied():
                return await self._run()
        except Exception as error:
            # A mistake of ours. Its text may quote a client's prompt. Callers that wait for this loop must not wait for ever.
            supervise.tell_mistake(f"instance {self._record.spec.name}: planning", error)
            self.leave(f"the planner failed ({type(error).__name__}); see its log")
            raise

    def leave(self, why: str) -> None:
        """Tell everybody who waits that this planner does not look after the instance any more, unless it was over before."""
        if not self.state.over:
            self._publish(replace(self.state, left=why))

    async def _run(self) -> State:
        backoff = Backoff(_FIRST_PAUSE, self._settings.command_seconds, rng=self._rng)
        while not self.state.over:
            try:
                await self._tick()
                backoff.reset()
            except StoreCorrupt as error:  # the only error that waiting does not repair
                self._publish(replace(self.state, reason=str(error), error=error))
            except StoreError as error:
                if not backoff.failing:
                    logger.warning("instance {}: {}", self._record.spec.name, error)
                self._memory = hold(self._memory, str(error), self._clock.now(), self._settings)
                known = isinstance(error, StoreRefused | StoreUnsuitable)
                why = "the store cannot be used now" if known else "the store does not answer"
                self._publish(replace(self.state, reason=f"{why}: {error}"))
                await self._clock.sleep(backoff.next_pause())
        return self.state

    async def _tick(self) -> None:
        self.looks += 1
        self._poked.clear()
        following = await self._lead_if_due()
        snapshot = await self._barrier.inspect()
        logger.opt(lazy=True).trace("looks: {}", lambda: _glance(snapshot))
        self._tell_leases(snapshot)
        now = self._clock.now()
        if snapshot.epoch is not None:
            self._ordinal = max(self._ordinal, snapshot.epoch.ordinal)
            self._about.attempt = snapshot.epoch.ordinal
        # An epoch of another spec may serve too, but this planner is about to end it.
        serving = (
            is_serving(snapshot) and snapshot.epoch is not None and snapshot.epoch.digest == self._record.spec.digest
        )
        self._memory = observe(
            self._memory, snapshot, self._policy, self._settings, now, serving=serving, jitter=self._rng.random()
        )
        action = decide(View(self._record.spec, self._policy, self._settings, snapshot, self._memory), now)
        leading = following is None
        self._tell_decision(action, following)
        reason = (
            action.reason if leading else f"following {following.leader.holder}: {action.reason}" if following else ""
        )
        overdue = isinstance(action, Wait) and action.overdue
        self._publish(
            replace(self.state, snapshot=snapshot, reason=reason, leading=leading, serving=serving, overdue=overdue),
            (following and following.leader.holder, topic(action, snapshot)),
        )
        if following is not None:
            await self._follow(following, snapshot)
            return
        if snapshot.epoch is None and self._ordinal > 0:
            # Before any decision: the next planner knows the instance only from the desired state.
            await self._heal_desired()
        if serving or (snapshot.epoch is not None and snapshot.epoch.verdict is not None):
            # Not while ranks come up: there are no prompts then, and every look should be short.
            await self._barrier.forget(snapshot, GENERATE)
        await self._carry_out(action, snapshot)

    def _tell_decision(self, action: Action, following: Following | None) -> None:
        """Log the leader and the kind of decision, when they change."""
        leader = self._barrier.holder if following is None else following.leader.holder
        if leader != self._led:
            self._led = leader
            logger.info("this planner leads ({})" if following is None else "stands by: {} leads", leader)
        decided = type(action).__name__, action.step.name if isinstance(action, PassGate) else ""
        if decided != self._decided:
            self._decided = decided
            logger.debug("decides {}", " ".join(decided).strip())  # the reason has a line of its own

    # --- leadership ---------------------------------------------------------------------------------------------------

    async def _lead_if_due(self) -> Following | None:
        if self._barrier.leadership is not None and self._clock.now() < self._lead_at:
            return None
        self._lead_at = self._clock.now() + self._settings.lease * 2 / 3  # the last third is for trying again
        match await self._barrier.lead():
            case Leading():
                return None
            case Following() as following:
                return following

    def _tell_leases(self, snapshot: Snapshot) -> None:
        """Log, once until it changes, which ranks have another lease than this planner. Both work; each side waits by its own lease."""
        other = {
            rank: lease
            for rank, lease in leases(snapshot).items()
            if lease != self._settings.lease and self._other_leases.get(rank) != lease
        }
        if other:
            told = ", ".join(f"rank {rank} has a lease of {number(lease)} s" for rank, lease in list(other.items())[:8])
            logger.warning(
                "{}: {}, and this planner one of {} s; start all with the same --lease",
                self._record.spec.name,
                told + (f" and {len(other) - 8} more have another" if len(other) > 8 else ""),
                number(self._settings.lease),
            )
        self._other_leases |= other

    async def _follow(self, following: Following, snapshot: Snapshot) -> None:
        """Stand by: the leader's lease may lapse at any time, or it may finish the work."""
        record = await self._registry.get(self._record.spec.name)
        current = record if record is not None and record.launched_ms == self._record.launched_ms else None
        if current is not None and current.failure:
            self._publish(replace(self.state, failure=current.failure, reason=current.failure))
            return
        ended = snapshot.epoch is None or snapshot.epoch.verdict is not None
        if self._memory.stopping and ended:
            self._publish(replace(self.state, stopped=True))
            return
        seconds = min(following.left_ms / 1000 + 0.001, self._settings.heartbeat)
        await self._until_poked(self._clock.sleep(seconds))

    # --- acting -------------------------------------------------------------------------------------------------------

    async def _carry_out(self, action: Action, snapshot: Snapshot) -> None:
        match action:
            case Wait(until, _, requirement):
                await self._watch(snapshot, requirement, until)
            case OpenEpoch():
                await self._open(snapshot)
            case RestoreEpoch():
                await self._restore(action, snapshot)
            case PassGate():
                await self._pass_gate(action, snapshot)
            case Serve(until, _):
                await self._serve(snapshot, until)
            case Conclude(epoch, verdict, _):
                outcome = await self._barrier.conclude(epoch, verdict)
                self._heed(outcome)
                if isinstance(outcome, Concluded):
                    await self._requests.fail_in_hand(f"the attempt ended: {outcome.verdict.reason}; ask again")
            case GiveUp(_, reason):
                await self._registry.give_up(self._record, reason)
                await self._requests.fail_all(reason)
                self._publish(replace(self.state, failure=reason))
            case Finished():
                await self._registry.carried_out(self._record)
                await self._requests.fail_all(f"instance {self._record.spec.name} was stopped")
                self._publish(replace(self.state, stopped=True))
            case _:
                assert_never(action)

    def _heed(self, outcome: object) -> None:
        """After ``Fenced``, ask for the lead before the next step: another planner may have it, or the store forgot who has."""
        if isinstance(outcome, Fenced):
            self._lead_at = float("-inf")

    async def _heal_desired(self) -> None:
        """Write the desired state back: the store may have forgotten it together with the record."""
        if not self._memory.stopping:  # an instance that is being stopped must not come back
            await self._registry.heal(self._record)

    async def _open(self, snapshot: Snapshot) -> None:
        spec = self._record.spec
        await self._heal_desired()
        outcome = await self._barrier.open(
            spec.world_size, digest=spec.digest, notes=encode_notes(self._memory), ordinal=self._ordinal
        )
        match outcome:
            case Unconcluded(epoch):
                left_over = Verdict.aborted("left over from another spec or world size")
                concluded = await self._barrier.conclude(epoch, left_over)
                self._heed(concluded)
                if isinstance(concluded, Unknown):  # the record is too damaged to be concluded
                    await self._watch(snapshot, (), self._clock.now() + self._settings.heartbeat)
            case _:
                self._heed(outcome)  # the next picture shows the rest

    async def _restore(self, action: RestoreEpoch, snapshot: Snapshot) -> None:
        spec = self._record.spec
        await self._heal_desired()
        outcome = await self._barrier.restore(
            action.epoch,
            action.status,
            action.steps,
            ordinal=max(self._ordinal, 1),
            digest=spec.digest,
            notes=encode_notes(self._memory),
        )
        match outcome:
            case NotReady() | Superseded():
                logger.info("instance {}: not restored: {}", spec.name, outcome)
                await self._watch(snapshot, (), self._clock.now() + self._settings.heartbeat)
            case _:
                self._heed(outcome)

    async def _pass_gate(self, action: PassGate, snapshot: Snapshot) -> None:
        """Wait for the last arrival and dispatch at once. Only the check in the script counts, not this picture."""
        epoch, leadership = snapshot.epoch, self._barrier.leadership
        if epoch is None or leadership is None:
            return
        task = encode(task_for(action.step, self._record.spec, epoch.id, leadership.term, self._policy)).decode()
        to = action.step.to(epoch.world_size)
        step = action.step.name, task, action.requirement
        if missing_ranks(snapshot, action.requirement):
            seconds = self._seconds_to_wait(snapshot, action.until)
            outcome = await self._until_poked(
                self._barrier.dispatch_on_arrival(
                    snapshot,
                    epoch.id,
                    *step,
                    seconds,
                    to=to,
                    attempt=action.attempt,
                    after=action.after,
                    endpoints=action.step.wants_endpoints,
                )
            )
        else:
            outcome = await self._barrier.dispatch(
                epoch.id,
                *step,
                to=to,
                attempt=action.attempt,
                after=action.after,
                endpoints=action.step.wants_endpoints,
            )
        self._heed(outcome)
        if isinstance(outcome, Unknown):
            logger.warning(
                "instance {}: {} was not dispatched: {}", self._record.spec.name, action.step.name, outcome.reason
            )
            await self._watch(snapshot, (), self._clock.now() + self._settings.heartbeat)

    async def _serve(self, snapshot: Snapshot, until: float) -> None:
        completed, waiting = await self._requests.hand_out(
            self._barrier, self._record.spec, snapshot, self._policy.generations
        )
        if completed:
            self._memory = forgive(self._memory)
        await self._watch(snapshot, serving_requirement(snapshot.world_size), until, any_change=waiting > 0)

    # --- waiting ------------------------------------------------------------------------------------------------------

    async def _watch(
        self, snapshot: Snapshot, requirement: Requirement, until: float, *, any_change: bool = False
    ) -> Wake:
        """Wait for wake-ups, but no longer than `_seconds_to_wait`."""
        seconds = self._seconds_to_wait(snapshot, until)
        watching = self._barrier.watch(snapshot, requirement, seconds, any_change=any_change)
        return await self._until_poked(watching) or Wake.DISTURBED

    def _seconds_to_wait(self, snapshot: Snapshot, until: float) -> float:
        """Seconds until the next look: when a lease may lapse, leadership must be renewed, or the backstop is over."""
        now = self._clock.now()
        due = [until, self._lead_at, now + self._settings.backstop]
        if until < FOREVER:
            due.append(now + self._policy.shortest_stall / _LOOKS_PER_STALL)
        left = [view.lease_left_ms / 1000 for view in snapshot.ranks if view.report is not None]
        if snapshot.epoch is None and self._ordinal > 0:
            due.append(now + self._settings.heartbeat)  # the store forgot; ranks report again within one heartbeat
        if left:
            due.append(now + min(left) + 0.001)
        return max(min(due) - now, 0.001)

    async def _until_poked(self, doing: Coroutine[Any, Any, _T]) -> _T | None:
        """Do it, unless somebody calls for a new look first; then return ``None``."""
        name = f"instance {self._record.spec.name}: planning"
        async with supervise.alongside(doing, name) as working, supervise.alongside(self._poked.wait(), name) as poked:
            await asyncio.wait({working, poked}, return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else None

    def _publish(self, state: State, about: object = None) -> None:
        """Set the state, and log its reason if it is about something new. `about` is the key of that; by default the reason's text."""
        if about is None:
            about = self._told if state.reason == self.state.reason else state.reason
        if state.reason and about != self._told:
            logger.log("WARNING" if state.overdue and state.leading else "INFO", "{}", state.reason)
            self._told = about
        self.state = state
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _glance(snapshot: Snapshot) -> str:
    """A picture in a few words, for the log: how many ranks have which status."""
    found = Counter(view.report.status if view.report else "absent" for view in snapshot.ranks)
    return ", ".join(f"{count} × {status}" for status, count in found.items())

"""A whole cluster in one process: real runners, engines that do as they are told, one fake store, and time that stands still.

The runners are the product's own, so what a planner meets here is what it meets in production. Only the engine is made up.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

from barrier import Member, Settings, TaskEntry
from barrier.store.keys import Keys
from barrier.testing import FakeStore, FaultPlan, ManualClock
from planner import InstanceSpec, Planner, Policy
from runner import EngineFailure, EngineGroup, GenerationRequest, InlineHost, Runner
from runner.admission import NotYet, Refusal
from runner.messages import ModelSpec, TaskKind, decode_event, decode_task

Phase: TypeAlias = Literal["connect", "load", "warm_up", "generate"]
T = TypeVar("T")

WORDS = ("every ", "rank ", "has ", "arrived")


@dataclass
class Script:
    """What one rank's engine does, over all its lives.

    Attributes:
        failures: what the next calls of a phase raise, one each; ``None`` for a call that goes well.
        always: what every call of a phase raises.
        held: phases that wait until they are let go.
        pace: seconds per layer and per word, by the cluster's clock.
        words: the text that it generates.
        calls: what was called, in order.
    """

    clock: ManualClock
    failures: dict[Phase, deque[EngineFailure | None]] = field(
        default_factory=dict[Phase, "deque[EngineFailure | None]"]
    )
    always: dict[Phase, EngineFailure] = field(default_factory=dict[Phase, EngineFailure])
    held: dict[Phase, asyncio.Event] = field(default_factory=dict[Phase, asyncio.Event])
    pace: float = 0.0
    words: tuple[str, ...] = WORDS
    calls: list[Phase] = field(default_factory=list[Phase])

    def fail(self, phase: Phase, error: str, *, permanent: bool = False, after: int = 0) -> None:
        """A call of a phase fails: the next one, or the one after so many that go well."""
        self.failures.setdefault(phase, deque()).extend([None] * after)
        self.failures[phase].append(EngineFailure(error, permanent=permanent))

    def fail_always(self, phase: Phase, error: str) -> None:
        """Every call of a phase fails."""
        self.always[phase] = EngineFailure(error)

    def hold(self, phase: Phase) -> None:
        self.held[phase] = asyncio.Event()

    def let(self, phase: Phase) -> None:
        self.held.pop(phase).set()

    async def enter(self, phase: Phase) -> None:
        self.calls.append(phase)
        failure = self.failures[phase].popleft() if self.failures.get(phase) else None
        if failure is not None:
            raise failure
        if phase in self.always:
            raise self.always[phase]
        if phase in self.held:
            await self.held[phase].wait()


class TinyEngine:
    """An engine without a model."""

    def __init__(self, script: Script) -> None:
        self._script = script

    async def prepare(self, rank: int, world_size: int) -> str | None:
        return None

    async def connect(self, group: EngineGroup) -> None:
        await self._script.enter("connect")

    async def load(self, model: ModelSpec) -> AsyncIterator[int]:
        await self._script.enter("load")
        for layer in range(model.total_layers):
            if self._script.pace:
                await self._script.clock.sleep(self._script.pace)
            yield layer + 1

    async def warm_up(self) -> None:
        await self._script.enter("warm_up")

    async def generate(self, request: GenerationRequest) -> AsyncIterator[str]:
        await self._script.enter("generate")
        for word in self._script.words[: request.max_tokens]:
            if self._script.pace:
                await self._script.clock.sleep(self._script.pace)
            yield word

    async def close(self) -> None:
        pass


class RefusingRunner(Runner):
    """A runner that refuses some tasks that it should accept, in the way in which a runner refuses."""

    def __init__(self, member: Member, host: InlineHost, clock: ManualClock, refusals: Refusals) -> None:
        super().__init__(member, host, clock=clock)
        self._refusals = refusals

    async def _receive(self, entry: TaskEntry) -> None:
        task = decode_task(entry.payload)
        refusal = self._refusals.next_of(task.kind)
        if refusal is None:
            await super()._receive(entry)
        else:
            await self._reject(refusal, entry, task)


@dataclass
class Refusals:
    """Which kinds of tasks a rank refuses, how often and how."""

    left: Counter[TaskKind] = field(default_factory=Counter[TaskKind])
    how: Refusal = field(default_factory=lambda: NotYet("this rank does not feel like it"))

    def refuse(self, kind: TaskKind, times: int, how: Refusal | None = None) -> None:
        self.left[kind] = times
        self.how = how or self.how

    def next_of(self, kind: TaskKind) -> Refusal | None:
        if not self.left[kind]:
            return None
        self.left[kind] -= 1
        return self.how


@dataclass
class Rank:
    """One rank of a cluster in one life of its process."""

    member: Member
    runner: Runner
    task: asyncio.Task[None]


@dataclass(frozen=True)
class Dispatch:
    """One task in the log."""

    epoch: int
    step: str
    kind: TaskKind
    task_id: str
    first: int
    last: int


class Cluster:
    """The ranks of one instance. Get it from `cluster`."""

    def __init__(
        self, store: FakeStore, clock: ManualClock, world_size: int, name: str, settings: Settings | None, told: bool
    ) -> None:
        self.store = store
        self.clock = clock
        self.spec = InstanceSpec(name=name, world_size=world_size, model=ModelSpec(model_id="tiny", total_layers=4))
        self.keys = Keys("rankgate", name)
        self.settings = settings
        self._told = told
        self.scripts = [Script(clock) for _ in range(world_size)]
        self.refusals = [Refusals() for _ in range(world_size)]
        self.ranks: dict[int, Rank] = {}
        self._lives = 0

    # --- processes ----------------------------------------------------------------------------------------------------

    def start(self, rank: int) -> Rank:
        """Start a rank's process: a new life, later than any before."""
        self._lives += 1
        member = Member(
            self.store.client(f"{self.spec.name} rank {rank}"),
            self.spec.name,
            rank=rank,
            world_size=self.spec.world_size if self._told else None,
            digest=self.spec.digest if self._told else "",
            settings=self.settings,
            node=f"node-{rank}",
            clock=self.clock,
            incarnation=f"{self._lives:012x}{rank:016x}",
        )
        script = self.scripts[rank]
        host = InlineHost(lambda: TinyEngine(script), rank=rank)
        runner = RefusingRunner(member, host, self.clock, self.refusals[rank])
        made = self.ranks[rank] = Rank(member, runner, asyncio.create_task(runner.run(), name=f"rank {rank}"))
        return made

    def start_all(self) -> Cluster:
        for rank in range(self.spec.world_size):
            self.start(rank)
        return self

    async def kill(self, rank: int) -> None:
        """As SIGKILL does: the process says nothing any more, and its claim and report stay until the lease is over."""
        name, gone = f"{self.spec.name} rank {rank}", self.ranks.pop(rank)
        self.store.partition(name)
        gone.task.cancel()
        await asyncio.gather(gone.task, return_exceptions=True)
        await gone.member.close()
        self.store.heal(name)

    async def stop(self, rank: int) -> None:
        """As SIGTERM does: the rank is given back."""
        leaving = self.ranks.pop(rank)
        leaving.runner.stop()
        await self.clock.run(leaving.task)
        await leaving.member.close()

    async def close(self) -> None:
        for rank in sorted(self.ranks):
            await self.stop(rank)

    @property
    def statuses(self) -> list[str]:
        """What every rank's runner says, by rank; ``-`` where there is none."""
        found = [self.ranks.get(rank) for rank in range(self.spec.world_size)]
        return [one.runner.status.kind if one else "-" for one in found]

    # --- planners -----------------------------------------------------------------------------------------------------

    def planner(
        self,
        name: str = "planner",
        *,
        policy: Policy | None = None,
        faults: FaultPlan | None = None,
        settings: Settings | None = None,
        seed: int = 7,
    ) -> Planner:
        """A planner on the same store, with a jitter that repeats."""
        return Planner(
            self.store.client(name, faults=faults),
            policy=policy or Policy(),
            settings=settings or self.settings,
            clock=self.clock,
            rng=random.Random(seed),
            holder=name,
        )

    # --- what happened ------------------------------------------------------------------------------------------------

    def _stream(self, key: str) -> list[dict[str, str]]:
        entries: list[tuple[bytes, dict[bytes, bytes]]] = self.store.contents().get(key, [])
        return [
            {"entry": entry_id.decode()} | {name.decode(): value.decode() for name, value in fields.items()}
            for entry_id, fields in entries
        ]

    def dispatched(self, kind: TaskKind | None = None) -> list[Dispatch]:
        """The tasks that were dispatched, in their order: those of the log, and by the history those that have left it with their prompt."""
        in_log = {one["entry"]: one for one in self._stream(self.keys.tasks) if one["kind"] == "task"}
        gone = {
            one["id"]: one
            for one in self._stream(self.keys.events)
            if one["kind"] == "Dispatched" and one["step"].startswith("generate ") and one["id"] not in in_log
        }
        found: list[Dispatch] = []
        for place in sorted(in_log | gone, key=lambda one: tuple(map(int, one.split("-")))):
            fields = in_log.get(place) or gone[place]
            first, last = map(int, fields["to"].split("-"))
            epoch, step = int(place.split("-")[0]), fields["step"]
            if place in in_log:
                task = decode_task(fields["task"].encode())
                found.append(Dispatch(epoch, step, task.kind, task.task_id, first, last))
            else:
                found.append(Dispatch(epoch, step, "TextGeneration", step.removeprefix("generate "), first, last))
        return [one for one in found if kind in (None, one.kind)]

    def loads_per_epoch(self) -> list[int]:
        """How many LoadModel the log has for each attempt that has any."""
        return list(Counter(one.epoch for one in self.dispatched("LoadModel")).values())

    def epochs(self) -> list[int]:
        """The numbers of all attempts, by the log."""
        return [int(one["entry"].split("-")[0]) for one in self._stream(self.keys.tasks) if one["kind"] == "opened"]

    def verdicts(self) -> list[str]:
        """The verdicts, by the log."""
        return [one["verdict"] for one in self._stream(self.keys.tasks) if one["kind"] == "verdict"]

    def rejections(self) -> int:
        """How many tasks the ranks refused, by the history that they wrote."""
        lines = [one["event"] for one in self._stream(self.keys.events) if one["kind"] == "TaskStatusUpdated"]
        return sum(getattr(decode_event(line.encode()), "rejection", None) is not None for line in lines)

    async def until(self, predicate: Callable[[], object], what: str, limit: float = 600.0) -> None:
        """Let time pass, from one deadline to the next, until something holds."""
        end = self.clock.now() + limit
        await self.clock.advance(0)
        while not predicate():
            deadline = self.clock.next_deadline
            if deadline is None or deadline > end:
                raise AssertionError(f"waited {limit:g} s for {what}; ranks are {self.statuses}")
            await self.clock.advance(max(deadline - self.clock.now(), 0))

    async def run(self, doing: Awaitable[T], limit: float = 3_600.0) -> T:
        """Await while time passes."""
        return await self.clock.run(doing, limit=limit)


async def write_request(
    store: FakeStore, keys: Keys, request_id: str, *, seconds: float = 60, fields: Mapping[str, str] | None = None
) -> None:
    """What a client sends that is then killed, or that is not one of ours.

    Args:
        store: where.
        keys: the instance's.
        request_id: its name.
        seconds: how long it may take.
        fields: what it says otherwise; ``-`` leaves a field out.
    """
    assert store.clock is not None
    until_ms = round((1_700_000_000 + store.clock.now() - 1_000 + seconds) * 1000)
    request = {"id": request_id, "cancels": "", "prompt": "Why?", "max_tokens": "3", "until_ms": str(until_ms)}
    request |= fields or {}
    client: Any = store.client("somebody else")
    await client.xadd(keys.requests, {name: value for name, value in request.items() if value != "-"})
    await client.pexpire(keys.requests, 10**9)
    await client.aclose()


async def text_of(pieces: AsyncGenerator[str, None]) -> str:
    """The whole text of a generation."""
    return "".join([piece async for piece in pieces])


@asynccontextmanager
async def cluster(
    store: FakeStore,
    clock: ManualClock,
    world_size: int,
    name: str = "demo",
    *,
    settings: Settings | None = None,
    started: bool = True,
    told: bool = True,
) -> AsyncGenerator[Cluster]:
    """A cluster whose ranks leave at the end.

    Args:
        store: where.
        clock: the store's.
        world_size: number of ranks.
        name: the instance's.
        settings: the times.
        started: whether all ranks are started at once.
        told: whether the ranks were told the world size and the spec that they are for.
    """
    made = Cluster(store, clock, world_size, name, settings, told)
    if started:
        made.start_all()
    try:
        yield made
    finally:
        store.heal()
        await made.close()


class Tripwire(Counter[str]):
    """Counts a store's round trips by client name, and does something once when one client has made so many."""

    def __init__(self, name: str, nth: int, action: Callable[[], Any]) -> None:
        super().__init__()
        self._name, self._nth, self._action = name, nth, action
        self.fired = False

    def __setitem__(self, name: str, count: int) -> None:
        super().__setitem__(name, count)
        if name == self._name and count >= self._nth and not self.fired:
            self.fired = True
            self._action()

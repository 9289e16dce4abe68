"""One real runner on a fake store, with a scripted engine, a hand that writes into its task log, and an eye on its events."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from hypothesis import HealthCheck, settings
from loguru import logger

from barrier import (
    Barrier,
    Concluded,
    EpochId,
    Leading,
    LogEntry,
    LogId,
    Member,
    Opened,
    Report,
    Settings,
    TaskEntry,
    TaskOutcome,
    Verdict,
)
from barrier.protocol.ids import new_nonce
from barrier.protocol.rank_state import PromiseOutcome
from barrier.testing import FakeStore, FaultPlan, ManualClock, ScriptedRank, wait_until
from barrier.testing.waiting import settle
from runner import Runner
from runner.messages import (
    CancelTask,
    Chunk,
    ConnectToGroup,
    LoadModel,
    ModelSpec,
    RunnerEvent,
    RunnerStatusUpdated,
    Shutdown,
    StartWarmup,
    StatusName,
    Task,
    TaskAcknowledged,
    TaskKind,
    TextGeneration,
    decode_chunk,
    decode_event,
    encode,
)
from runner.testing import Phase, ScriptedEngine, ScriptedHost

PROMPT = "a sentence that must never appear in any log line"
LAYERS = 4

WAY: tuple[tuple[TaskKind, Phase, StatusName, StatusName], ...] = (
    ("ConnectToGroup", "connect", "Connecting", "Connected"),
    ("LoadModel", "load", "Loading", "Loaded"),
    ("StartWarmup", "warm_up", "WarmingUp", "Ready"),
    ("TextGeneration", "generate", "Running", "Ready"),
)
"""Each task of the life cycle, the engine's phase, the status during it and the status after it."""

TASKS: dict[TaskKind, type[Task]] = {
    "ConnectToGroup": ConnectToGroup,
    "LoadModel": LoadModel,
    "StartWarmup": StartWarmup,
    "TextGeneration": TextGeneration,
    "CancelTask": CancelTask,
    "Shutdown": Shutdown,
}

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For a test by hypothesis: a busy machine is no reason to fail."""

Told: TypeAlias = list[RunnerEvent]

_task_ids = itertools.count(1)


def make_task(kind: TaskKind, epoch: EpochId | str, *, instance: str = "demo", **fields: Any) -> Task:
    """A task that is well formed, under an id of its own."""
    own: dict[TaskKind, dict[str, Any]] = {
        "ConnectToGroup": {"deadline": 60.0},
        "LoadModel": {"model": ModelSpec(model_id="toy", total_layers=LAYERS)},
        "StartWarmup": {},
        "TextGeneration": {"prompt": PROMPT},
        "CancelTask": {"cancels": "nobody"},
        "Shutdown": {},
    }
    given: dict[str, Any] = {
        "task_id": f"{kind}.{next(_task_ids)}",
        "instance": instance,
        "epoch": str(epoch),
        "term": 1,
        **own[kind],
        **fields,
    }
    return TASKS[kind](**given)


def other_nonce(epoch: EpochId) -> EpochId:
    """An epoch of the same number that a failover issued a second time."""
    return EpochId(epoch.number, new_nonce())


class WatchedMember(Member):
    """The real thing, which also notes promises in a journal and takes entries that no log could hold any more."""

    def __init__(self, *args: Any, journal: list[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._journal = journal

    async def promise(self, epoch: EpochId, *, status: str | None = None) -> PromiseOutcome:
        self._journal.append("promise")
        return await super().promise(epoch, status=status)

    def deliver(self, entry: LogEntry) -> None:
        """Hand an entry to the runner as if the log had held it."""
        self._log.entries.put_nowait(entry)


@dataclass
class Rig:
    """One rank of a small world is a real runner; the other ranks are there so that epochs can be opened."""

    store: FakeStore
    clock: ManualClock
    barrier: Barrier
    engine: ScriptedEngine
    host: ScriptedHost
    member: WatchedMember
    runner: Runner
    peers: list[ScriptedRank]
    world_size: int
    log: list[str]
    running: asyncio.Task[None] | None = None
    _last_event: str = "-"
    _tell_from: int = 0
    history: Told = field(default_factory=list[RunnerEvent])

    @property
    def journal(self) -> list[str]:
        """What was asked of host and engine, and when a promise was given, in order."""
        return self.engine.calls

    @property
    def rank(self) -> int:
        return next(rank for rank in range(self.world_size) if rank not in [peer.rank for peer in self.peers])

    @property
    def status(self) -> StatusName:
        return self.runner.status.kind

    @property
    def epoch(self) -> EpochId:
        assert self.member.promised is not None, "this runner has promised nothing"
        return self.member.promised

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        self.running = asyncio.create_task(self.runner.run(), name="the runner under test")
        await settle()
        assert not self.running.done(), self.running
        await self.tell()

    async def ended(self) -> None:
        """The runner has come to its end, by itself; raises what it raised."""
        running, self.running = self.running, None
        assert running is not None
        try:
            async with asyncio.timeout(10):
                await running
        finally:
            await self.member.close()

    async def open(self) -> EpochId:
        """Open an epoch; the runner promises it."""
        for peer in self.peers:
            await peer.beat()
        outcome = await self.barrier.open(self.world_size)
        assert isinstance(outcome, Opened), outcome
        await settle()
        return outcome.epoch

    async def conclude(self, reason: str = "enough") -> None:
        """End the attempt; the runner tears down."""
        outcome = await self.barrier.conclude(self.epoch, Verdict.aborted(reason))
        assert isinstance(outcome, Concluded), outcome
        await settle()

    async def reach(self, status: StatusName) -> None:
        """Bring the runner into a status, by the straight way: in an epoch of its own, and with the engine's help.

        The engine then holds in the phase that the status stands for.
        """
        if status == "Preparing":
            self.engine.hold("prepare")
        if self.member.promised is None:
            await self.open()
        if status == "Preparing":
            await self.clock.advance(1.0)  # long enough for it to be said
            assert self.status == "Preparing"
            await self.tell()
            return
        if self.world_size == 1 and status in ("Connecting", "Connected"):
            raise ValueError(f"a world of one is never {status}")
        for kind, phase, during, after in WAY[self.world_size == 1 :]:
            if status == "Failed":
                self.engine.fail(phase, "out of memory")
                await self.ask(make_task(kind, self.epoch))
                break
            if self.status == status:
                break
            await self.ask(make_task(kind, self.epoch))
            assert self.status == during
            if during == status:
                break
            self.engine.finish(phase)
            await settle()
            assert self.status == after
            if status == "ShuttingDown":
                self.engine.hold("close")
                await self.ask(make_task("Shutdown", self.epoch))
                break
        assert self.status == status, f"meant to be {status}, is {self.status}"
        await self.tell()

    async def reach_by_itself(self) -> None:
        """Bring a runner whose engine is ``auto`` to Ready."""
        await self.open()
        for kind, _, _, after in WAY[self.world_size == 1 : 3]:
            await self.ask(make_task(kind, self.epoch))
            assert self.status == after

    # --- the log ------------------------------------------------------------------------------------------------------

    async def put(
        self,
        payload: Task | bytes,
        *,
        epoch: EpochId | None = None,
        to: str | None = None,
        step: str = "step",
        gap: int = 0,
    ) -> LogId:
        """Write into the task log, as any planner could, fenced or not; its place.

        Args:
            payload: a task, or any bytes.
            epoch: the epoch that the log's entry says; the task's own where not given, and that of the runner for bytes.
            to: the ranks that it is for; all where not given.
            step: the step's name.
            gap: how many entries are made to seem lost just before it.
        """
        if epoch is None:
            epoch = self.epoch if isinstance(payload, bytes) else EpochId.parse(payload.epoch)
        log: Any = self.barrier.store.commands
        end = await self._log_end()
        place = LogId(epoch.number, (end.n if end.number == epoch.number else 1) + 1 + gap)
        await log.xadd(self.barrier.keys.tasks, self._entry(payload, epoch, place.n, to, step), id=str(place))
        await log.pexpire(self.barrier.keys.tasks, 86_400_000)
        return place

    async def name_endpoints(self, *endpoints: str) -> None:
        """Write into the record where the ranks wait, as the dispatch of ConnectToGroup does."""
        store: Any = self.barrier.store.commands
        await store.hset(self.barrier.keys.epoch, "endpoints:0", "\n".join(endpoints))

    async def put_all(self, payloads: Sequence[Task | bytes]) -> None:
        """Write many tasks of the present epoch into the log at once; it keeps the last 1,000."""
        log: Any = self.barrier.store.commands
        first = (await self._log_end()).n + 1
        async with log.pipeline(transaction=False) as pipe:
            for n, payload in enumerate(payloads, first):
                entry = self._entry(payload, self.epoch, n, None, "step")
                pipe.xadd(self.barrier.keys.tasks, entry, id=f"{self.epoch.number}-{n}", maxlen=1_000)
            await pipe.execute()

    async def _log_end(self) -> LogId:
        newest = await self.barrier.store.commands.xrevrange(self.barrier.keys.tasks, count=1)
        return LogId.parse(newest[0][0].decode()) if newest else LogId(0, 0)

    def _entry(self, payload: Task | bytes, epoch: EpochId, n: int, to: str | None, step: str) -> dict[str, Any]:
        return {
            "kind": "task",
            "nonce": epoch.nonce,
            "prev": n - 1,
            "term": 1,
            "step": step,
            "to": to or f"0-{self.world_size - 1}",
            "task": payload if isinstance(payload, bytes) else encode(payload),
        }

    async def ask(self, payload: Task | bytes, **options: Any) -> Told:
        """Write a task into the log, let the runner come to rest, and return what it said."""
        await self.tell()
        await self.put(payload, **options)
        return await self.tell()

    async def ask_late(self, task: Task) -> Told:
        """Hand the runner a task that its log holds no more, as after a failover or from behind; what it said."""
        await self.tell()
        self.deliver(task)
        return await self.tell()

    def deliver(self, task: Task) -> None:
        """As `ask_late`, without giving the runner time to look at it."""
        epoch = EpochId.parse(task.epoch)
        applied = self.member.report_now.applied
        n = applied + 1 if epoch == self.member.promised else 7
        entry = TaskEntry(
            epoch=epoch,
            id=LogId(epoch.number, n),
            previous=n - 1,
            step="late",
            first=0,
            last=self.world_size - 1,
            term=1,
            payload=encode(task),
        )
        self.member.deliver(entry)

    # --- what it says -------------------------------------------------------------------------------------------------

    async def tell(self) -> Told:
        """What the runner has said since this was last called, once nothing moves any more."""
        await settle()
        await self._read()
        new, self._tell_from = self.history[self._tell_from :], len(self.history)
        return new

    def forget(self) -> None:
        """Drop the history that was told so far, and the log, after a look into it."""
        assert not any(PROMPT in line for line in self.log), "a prompt is in the log"
        self.log.clear()
        self.history.clear()
        self._tell_from = 0

    async def _read(self) -> None:
        entries = await self.barrier.store.commands.xrange(
            self.barrier.keys.events, min=self._last_event if self._last_event == "-" else f"({self._last_event}"
        )
        for entry_id, fields in entries:
            self._last_event = entry_id.decode()
            if fields.get(b"source") == b"rank" and fields[b"inc"].decode() == self.member.incarnation:
                self.history.append(decode_event(fields[b"event"]))

    async def raw_events(self) -> list[dict[bytes, bytes]]:
        """The whole history as it stands in the store."""
        return [fields for _, fields in await self.barrier.store.commands.xrange(self.barrier.keys.events)]

    async def report(self) -> Report:
        """The report as it stands in the store."""
        raw = await self.barrier.store.commands.get(self.barrier.keys.rank(self.rank))
        assert raw is not None, f"rank {self.rank} has no live report"
        return Report.decode(raw, self.rank)

    async def outcome(self, task: Task | str) -> TaskOutcome:
        """What the report says of a task."""
        task_id = task if isinstance(task, str) else task.task_id
        return next(one for one in (await self.report()).outcomes if one.task_id == task_id)

    async def chunks(self, task: Task | str) -> list[Chunk]:
        """What its client can read."""
        task_id = task if isinstance(task, str) else task.task_id
        entries = await self.barrier.store.commands.xrange(self.barrier.keys.out(task_id))
        return [decode_chunk(fields[b"chunk"]) for _, fields in entries]

    async def until(self, predicate: Callable[[], Any], what: str) -> None:
        await wait_until(predicate, what)


def kinds(told: Iterable[RunnerEvent]) -> list[str]:
    """Events in short: ``Running``, ``Complete``, ``Failed`` or ``Cancelled`` of a task, ``ack``, ``=> Status``."""
    short: list[str] = []
    for event in told:
        match event:
            case TaskAcknowledged():
                short.append("ack")
            case RunnerStatusUpdated(status=status):
                short.append(f"=> {status.kind}")
            case _:
                short.append(event.state)
    return short


@asynccontextmanager
async def runner_rig(
    *,
    world_size: int = 2,
    auto: bool = False,
    settings: Settings | None = None,
    faults: FaultPlan | None = None,
    rank: int = 0,
    address: str = "",
    grace_seconds: float = 5.0,
    host_type: type[ScriptedHost] = ScriptedHost,
) -> AsyncGenerator[Rig]:
    """A runner that has said hello; it must leave politely at the end unless the test has ended it.

    Whatever the test does, no prompt may be in the log, no key without a lifetime, and no task of the runner's left over.
    """
    clock = ManualClock()
    store = FakeStore(clock)
    engine = ScriptedEngine(auto=auto)
    host = host_type(engine, rank=rank, grace_seconds=grace_seconds)
    member = WatchedMember(
        store.client("runner", faults=faults),
        "demo",
        rank=rank,
        world_size=world_size,
        settings=settings,
        clock=clock,
        node=f"node-{rank}",
        address=address,
        journal=engine.calls,
    )
    barrier = Barrier(
        store.client("planner"), "demo", world_size=world_size, clock=clock, holder="planner", settings=settings
    )
    log: list[str] = []
    async with AsyncExitStack() as stack:
        stack.callback(logger.remove, logger.add(log.append, level=0, format="{level} {message} {exception}"))
        await stack.enter_async_context(barrier)
        peers = [ScriptedRank(store, "demo", peer, settings=settings) for peer in range(world_size) if peer != rank]
        for peer in peers:
            await stack.enter_async_context(peer)
        assert isinstance(await barrier.lead(), Leading)
        runner = Runner(member, host, clock=clock)
        rig = Rig(store, clock, barrier, engine, host, member, runner, peers, world_size, log)
        await rig.start()
        try:
            yield rig
        finally:
            engine.release()
            runner.stop()
            if rig.running is not None:
                try:
                    async with asyncio.timeout(10):
                        await rig.running
                finally:
                    await member.close()
        assert store.keys_without_lifetime() == []
        left = [one for one in asyncio.all_tasks() if one.get_name().startswith("rankgate") and not one.done()]
        assert not left, f"the runner left tasks behind: {left}"
        assert not any(PROMPT in line for line in log), "a prompt is in the log"

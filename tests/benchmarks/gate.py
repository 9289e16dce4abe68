"""From the last arrival to every runner's hands, and the two floors that it is measured against."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis

from barrier import (
    Barrier,
    Dispatched,
    EpochId,
    Member,
    Promised,
    Released,
    Store,
    TaskEntry,
    Verdict,
    Wake,
    connect,
)
from barrier.protocol.outcomes import DispatchOutcome, ReleaseOutcome
from tests.benchmarks.commits import Commits, telling_script
from tests.benchmarks.group import PATIENCE, Absent, Readers, load_task, now, open_epoch, readers
from tests.benchmarks.readers import SETTINGS
from tests.benchmarks.stats import Samples

STEPS_PER_EPOCH = 20
SHORT_REST = 0.003
RESTS = (0.0, SHORT_REST, 0.1)
"""Seconds without work before each of the things that are compared, so that an arrival and a push meet the machine in one state.

What both cost depends on it, and not alike: without a pause everything is at hand; after a few milliseconds a wake-up is at its
cheapest while code and reports have to be fetched anew; after longer ones, as between the ranks of a real bring-up, the wake-up itself
is most of either. So the one is measured as the others are, and all are told.
"""


@dataclass
class GateFigures:
    """What was measured at one world size. Times of the path count from the start of the last rank's `Member.report`.

    Attributes:
        world_size: number of ranks.
        readers: how many of them read the log; with none, nobody but the server and the planner has work to do.
        rest: seconds without work before each thing that was measured; see `RESTS`.
        ping: floor: an idle round trip.
        push: floor: one client's XADD until another client's blocked XREAD returns, both in this process.
        plain_push: the same with the client as redis-py makes it by default.
        committed: until the server had put the task into the log, by the server's own word.
        known: until the planner was woken by the answer that it is there.
        first_hands: until the first runner has the task.
        all_hands: until the last one has.
    """

    world_size: int
    readers: int
    rest: float
    ping: Samples = field(default_factory=Samples)
    push: Samples = field(default_factory=Samples)
    plain_push: Samples = field(default_factory=Samples)
    committed: Samples = field(default_factory=Samples)
    known: Samples = field(default_factory=Samples)
    first_hands: Samples = field(default_factory=Samples)
    all_hands: Samples = field(default_factory=Samples)

    def as_json(self) -> dict[str, Any]:
        samples = {name: value for name, value in vars(self).items() if isinstance(value, Samples) and value.seconds}
        return {
            "world_size": self.world_size,
            "readers": self.readers,
            "rest_ms": round(self.rest * 1000, 3),
            **{name: value.as_json() for name, value in samples.items()},
            "in_push_floors": {
                name: {"p50": round(value.p50 / self.push.p50, 2), "p99": round(value.p99 / self.push.p99, 2)}
                for name, value in samples.items()
            },
            "in_ping_floors": {
                name: {"p50": round(value.p50 / self.ping.p50, 2), "p99": round(value.p99 / self.ping.p99, 2)}
                for name, value in samples.items()
            },
        }


class TimedBarrier(Barrier):
    """Notes when `release` begins to wait, and what came of that."""

    def __init__(self, store: Store, group: str, world_size: int) -> None:
        super().__init__(store, group, world_size=world_size)
        self.waiting = asyncio.Event()
        self.ends: list[DispatchOutcome | Wake] = []

    async def dispatch_on_arrival(self, *args: Any, **kwargs: Any) -> DispatchOutcome | Wake:
        self.waiting.set()
        end = await super().dispatch_on_arrival(*args, **kwargs)
        self.ends.append(end)
        return end


class Push:
    """The push floor: one client's XADD until another client's blocked XREAD returns."""

    def __init__(self, writer: Any, reader: Any, key: str, store: Store) -> None:
        self._writer = writer
        self._reader = reader
        self._key = key
        self._store = store
        self._cursor = "0-0"

    async def measure(self, blocked: int, rest: float) -> float:
        """In seconds. `blocked`: how many clients the server holds already; `rest`: how long nothing happens before it."""
        reading = asyncio.create_task(self._read())
        await until_blocked(self._store, blocked + 1)
        await asyncio.sleep(rest)
        started = now()
        await self._writer.xadd(self._key, {"kind": "report"}, maxlen=100)
        return await reading - started

    async def _read(self) -> float:
        reply: Any = await self._reader.xread({self._key: self._cursor}, count=100, block=5_000)
        at = now()
        [(_, entries)] = reply
        self._cursor = entries[-1][0].decode()
        return at


async def until_blocked(store: Store, clients: int) -> None:
    """Until the server itself says that so many clients are blocked, so that a wake-up is measured and not a read."""
    deadline = now() + PATIENCE
    while True:
        found = (await store.commands.info("clients"))["blocked_clients"]
        if found == clients:
            return
        if now() > deadline:
            raise AssertionError(f"waited {PATIENCE:g} s for {clients} blocked clients; the server says {found}")


class GateBench:
    """One group on one server, whose last rank arrives again and again."""

    def __init__(
        self, figures: GateFigures, barrier: TimedBarrier, last: Member, children: Readers | None, commits: Commits
    ) -> None:
        self.figures = figures
        self._commits = commits
        self._barrier = barrier
        self._last = last
        self._children = children
        self._hands: asyncio.Queue[tuple[str, float]] = asyncio.Queue()
        self._floors: list[tuple[Samples, Push]] = []

    def add_floor(self, samples: Samples, push: Push) -> None:
        self._floors.append((samples, push))

    async def follow(self) -> None:
        """The last rank's own end of the log."""
        async with aclosing(self._last.tasks()) as entries:  # pyright: ignore[reportArgumentType]  it is a generator
            async for entry in entries:
                if isinstance(entry, TaskEntry):
                    self._hands.put_nowait((str(entry.id), now()))

    async def arrive(self, epoch: EpochId, step: str) -> None:
        """The floors first, then one last arrival, so that whatever else the machine does meets both alike.

        Before its rest, each has what comes before it in life: a push the reader that blocks for it, an arrival the rank's last status
        and the planner that looks and then waits.
        """
        barrier, figures = self._barrier, self.figures
        for samples, push in self._floors:
            samples.add(await push.measure(figures.readers, figures.rest))
        await asyncio.sleep(figures.rest)
        started = now()
        await barrier.store.commands.ping()
        figures.ping.add(now() - started)

        await self._last.report("Connecting")
        barrier.waiting.clear()
        barrier.ends.clear()
        releasing = asyncio.create_task(self._release(epoch, step))
        await barrier.waiting.wait()
        # Everybody's log, and the planner's dispatch that waits for the last arrival.
        await until_blocked(barrier.store, figures.readers + 1)
        await self._commits.begin()
        await asyncio.sleep(figures.rest)
        started, started_by_day = now(), time.time()
        await self._last.report("Connected")
        outcome, known_at = await releasing
        assert isinstance(outcome, Released), outcome
        assert outcome.id is not None
        assert barrier.ends == [Dispatched(outcome.id)], f"one arrival was one push, and nothing else: {barrier.ends}"
        figures.known.add(known_at - started)
        figures.committed.add(await self._commits.commit() - started_by_day)
        if figures.readers:
            received = await self._received(str(outcome.id))
            figures.first_hands.add(min(received) - started)
            figures.all_hands.add(max(received) - started)

    async def _release(self, epoch: EpochId, step: str) -> tuple[ReleaseOutcome, float]:
        payload = load_task(self._barrier.keys.group, epoch, step)
        outcome = await self._barrier.release(epoch, step, payload, "Connected", timeout=PATIENCE)
        return outcome, now()

    async def _received(self, task: str) -> list[float]:
        async with asyncio.timeout(PATIENCE):
            own, own_at = await self._hands.get()
        assert own == task, f"dispatched was {task}, the last rank read {own}"
        received = [own_at]
        if self._children is not None:
            received += await self._children.told("task", task)
        assert len(received) == self.figures.readers, "every reader has it, once"
        return received


async def measure_gate(url: str, world_size: int, *, with_readers: int, samples: int, rest: float) -> GateFigures:
    """Let the last of `world_size` ranks arrive `samples` times, a few times in each epoch, each time after a `rest` in seconds.

    With readers, the last rank reads the log in this process and ``with_readers - 1`` others in one other process.
    """
    group = f"gate-{world_size}-{with_readers}-{rest * 1000:.0f}"
    figures = GateFigures(world_size, with_readers, rest)
    async with AsyncExitStack() as stack:

        async def closing(thing: Any, close: Callable[[Any], Any]) -> Any:
            stack.push_async_callback(close, thing)
            return thing

        store: Store = await closing(await connect(url, settings=SETTINGS), Store.close)
        last_store: Store = await closing(await connect(url, settings=SETTINGS), Store.close)
        barrier = TimedBarrier(store, group, world_size)
        stack.push_async_callback(barrier.close)
        others = max(with_readers - 1, 0)
        children = None
        if others:
            children = await stack.enter_async_context(readers(url, group, range(others), world_size))
        last = Member(last_store, group, rank=world_size - 1, world_size=world_size, node="node-last")
        await last.claim()
        absent = Absent(store, barrier, range(others, world_size - 1), world_size)
        await absent.report("Idle", None)

        commits = Commits(last_store, stack.enter_context(telling_script()))
        bench = GateBench(figures, barrier, last, children, commits)
        untyped: Any = Redis
        key = f"{{bench:{group}}}"
        reader = await closing(store.reader(), Redis.aclose)
        bench.add_floor(figures.push, Push(store.commands, reader, f"{key}:push", store))
        plain_writer = await closing(untyped.from_url(url), Redis.aclose)
        plain_reader = await closing(untyped.from_url(url), Redis.aclose)
        bench.add_floor(figures.plain_push, Push(plain_writer, plain_reader, f"{key}:plain", store))
        if with_readers:
            following = asyncio.create_task(bench.follow())
            stack.push_async_callback(asyncio.gather, following, return_exceptions=True)
            stack.callback(following.cancel)

        for first in range(0, samples, STEPS_PER_EPOCH):
            epoch = await open_epoch(barrier)
            await absent.report("Connected", epoch)
            last.retire()
            assert isinstance(await last.promise(epoch), Promised)
            if children is not None:
                await children.told("arrived", str(epoch))
            gc.collect()
            for step in range(min(STEPS_PER_EPOCH, samples - first)):
                await bench.arrive(epoch, f"load {step}")
            await barrier.conclude(epoch, Verdict.stopped("the benchmark goes on"))
    return figures

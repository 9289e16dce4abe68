"""How long it takes until everybody knows, or works again, after something has gone wrong.

Every time is told as a multiple of what it depends on: push floors (see `tests.benchmarks.gate`) where a message is passed on, leases
and heartbeats where a silence must be noticed. The leases are short, so that many trials fit; the multiples are what counts.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import tempfile
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from barrier import (
    EpochId,
    LogEntry,
    Member,
    Settings,
    Store,
    StoreError,
    SystemClock,
    VerdictAnnounced,
    connect,
)
from barrier.store.keys import Keys
from barrier.testing import wait_until
from planner import GenerationFailed, Instance, InstanceSpec, Planner, Policy
from planner.registry import Registry
from planner.requests import RequestQueue
from runner import Runner
from runner.messages import ModelSpec
from runner.testing import ScriptedEngine, ScriptedHost
from tests.benchmarks.gate import SHORT_REST, Push
from tests.benchmarks.group import PATIENCE, now
from tests.benchmarks.stats import Samples
from tests.integration.cluster import Cluster, Process
from tests.integration.servers import RealServer

WORLD_SIZE = 4
SETTINGS = Settings(lease=0.9, heartbeat=0.3)
LEASE, HEARTBEAT = SETTINGS.lease, SETTINGS.heartbeat
TIRELESS = Policy(backoff_base=0.001, backoff_cap=0.001, max_failures=10**6)
"""Trials are failures in a row, and the pause between attempts is not what is measured."""


@dataclass
class RecoveryFigures:
    """What was measured of one fault.

    Attributes:
        fault: from what to what.
        unit: what the times are multiples of.
        unit_seconds: how long one of them is; 0 where `floors` says it, which were measured between the trials.
        bound: the most that it should be, in units; ``None`` where nothing is promised.
        times: one for each trial.
        floors: the push floor just before each trial.
        note: what else was seen.
    """

    fault: str
    unit: str
    unit_seconds: float = 0.0
    bound: float | None = None
    times: Samples = field(default_factory=Samples)
    floors: Samples = field(default_factory=Samples)
    note: str = ""

    def multiple(self, percent: float) -> float:
        """A percentile in units; where that is the floor, in those at its median: the few that met a busy machine flatter."""
        return self.times.percentile(percent) / (self.unit_seconds * 1e6 or self.floors.p50)

    @property
    def kept(self) -> bool | None:
        """Whether the bound was kept in every single trial."""
        return None if self.bound is None else self.multiple(100) <= self.bound

    @property
    def text(self) -> str:
        """One line for a terminal."""
        bound = "" if self.kept is None else f", {'kept' if self.kept else 'NOT KEPT'}: at most {self.bound:g}"
        note = f" ({self.note})" if self.note else ""
        return (
            f"{self.fault}: least {self.multiple(0):.2f}, p50 {self.multiple(50):.2f}, p99 {self.multiple(99):.2f}, "
            f"most {self.multiple(100):.2f} {self.unit} in {len(self.times.seconds)} trials{bound}{note}"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "fault": self.fault,
            "unit": self.unit,
            "unit_seconds": self.unit_seconds or round(self.floors.p50 / 1e6, 6),
            "bound": self.bound,
            "kept": self.kept,
            "p50": round(self.multiple(50), 3),
            "p99": round(self.multiple(99), 3),
            "least": round(self.multiple(0), 3),
            "most": round(self.multiple(100), 3),
            "times": self.times.as_json(),
            "note": self.note,
        }


# --- an instance to be harmed ---------------------------------------------------------------------------------------------


class ListeningMember(Member):
    """Notes when it begins to report a failure, and when it is told of each attempt's end."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.failed_at = 0.0
        self.told: dict[EpochId, float] = {}

    async def report(self, status: str | None = None, **said: Any) -> None:
        if status == "Failed":
            self.failed_at = now()
        await super().report(status, **said)

    async def tasks(self) -> AsyncGenerator[LogEntry, None]:
        async with aclosing(super().tasks()) as entries:
            async for entry in entries:
                if isinstance(entry, VerdictAnnounced):
                    self.told.setdefault(entry.epoch, now())  # the log says it, and a heartbeat may say it again
                yield entry


@dataclass
class Rank:
    """A real runner in this process, whose engine does at once whatever it is asked."""

    member: ListeningMember
    host: ScriptedHost


@asynccontextmanager
async def ranks_of(url: str, name: str, ranks: range) -> AsyncGenerator[list[Rank]]:
    """Some ranks of an instance of `WORLD_SIZE`, each with connections of its own."""
    async with AsyncExitStack() as stack:
        made: list[Rank] = []
        runners: list[Runner] = []
        for number in ranks:
            store = await connected(stack, url)
            member = ListeningMember(store, name, rank=number, world_size=WORLD_SIZE, node=f"node-{number}")
            host = ScriptedHost(ScriptedEngine(auto=True), rank=number)
            made.append(Rank(member, host))
            runners.append(Runner(member, host))
        running = [asyncio.create_task(runner.run()) for runner in runners]
        try:
            yield made
        finally:
            for runner in runners:
                runner.stop()
            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(*running)


async def connected(stack: AsyncExitStack, url: str) -> Store:
    store = await connect(url, settings=SETTINGS)
    stack.push_async_callback(store.close)
    return store


def spec_of(name: str) -> InstanceSpec:
    return InstanceSpec(name=name, world_size=WORLD_SIZE, model=ModelSpec(model_id="simulated", total_layers=4))


def epoch_of(instance: Instance) -> EpochId:
    snapshot = instance.state.snapshot
    assert snapshot is not None
    assert snapshot.epoch is not None
    return snapshot.epoch.id


async def serves_after(instance: Instance, epoch: EpochId) -> None:
    """Until the instance serves in a later attempt than that one."""
    await wait_until(
        lambda: instance.state.serving and epoch_of(instance) != epoch, "the next attempt to serve", timeout=PATIENCE
    )


async def told(ranks: Sequence[Rank], epoch: EpochId) -> float:
    """When the last of these ranks was told that an attempt is over."""
    await wait_until(
        lambda: all(epoch in rank.member.told for rank in ranks), "every rank to be told", timeout=PATIENCE
    )
    return max(rank.member.told[epoch] for rank in ranks)


async def first_text(pieces_of: Callable[[], AsyncGenerator[str, None]]) -> float:
    """When the first piece of a text is here, which is asked for again whenever that is refused."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                async with aclosing(pieces_of()) as pieces:
                    async for _ in pieces:
                        return now()
            except (StoreError, GenerationFailed):
                await asyncio.sleep(0.002)


# --- the faults -----------------------------------------------------------------------------------------------------------


async def measure_reported_failures(*, trials: int) -> RecoveryFigures:
    """From the start of the report that an engine has died, to the rank that is told last that the attempt is over.

    All ranks and the planner are tasks of this process. The ranks take turns at failing.
    """
    figures = RecoveryFigures("a reported failure, until every rank is told", "push floors")
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(RealServer())
        store, reading = await connected(stack, server.url), await connected(stack, server.url)
        reader = reading.reader()
        stack.push_async_callback(reader.aclose)
        push = Push(reading.commands, reader, "{bench:recovery}:push", store)
        ranks = await stack.enter_async_context(ranks_of(server.url, "reported", range(WORLD_SIZE)))
        planner = await stack.enter_async_context(Planner(store, policy=TIRELESS))
        instance = await planner.launch(spec_of("reported"), timeout=PATIENCE)
        for trial in range(trials):
            blocked = WORLD_SIZE + 1  # everybody's log, and the planner's wake-ups
            await push.measure(blocked, SHORT_REST)  # the first one after a bring-up finds everything cold
            figures.floors.add(await push.measure(blocked, SHORT_REST))
            epoch, failing = epoch_of(instance), ranks[trial % WORLD_SIZE]
            failing.host.die()
            figures.times.add(await told(ranks, epoch) - failing.member.failed_at)
            await serves_after(instance, epoch)
    return figures


async def measure_silent_deaths(*, trials: int, seed: int) -> RecoveryFigures:
    """From the SIGKILL of a rank's process, at any time of its heartbeat, to the last of the others that is told.

    The rank that dies is a process of its own; the others and the planner are tasks of this one.
    """
    figures = RecoveryFigures(
        "a silent death, until every other rank is told", "(lease + heartbeat)", LEASE + HEARTBEAT, bound=1.0
    )
    rng = random.Random(seed)
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rankgate-bench-")))
        server = await stack.enter_async_context(RealServer())
        store = await connected(stack, server.url)
        cluster = await stack.enter_async_context(Cluster(server.url, directory, SETTINGS))
        last = WORLD_SIZE - 1
        others = await stack.enter_async_context(ranks_of(server.url, "silent", range(last)))
        planner = await stack.enter_async_context(Planner(store, policy=TIRELESS))

        async def start() -> Process:
            at_once = {"connect_seconds": 0, "layer_seconds": 0, "warmup_seconds": 0}
            return await cluster.runner("silent", last, WORLD_SIZE, at_once, inline=True, warm=True)

        process = await start()
        instance = await planner.launch(spec_of("silent"), timeout=PATIENCE)
        for _ in range(trials):
            await asyncio.sleep(rng.uniform(0, HEARTBEAT))
            epoch, killed_at = epoch_of(instance), now()
            os.kill(process.pid, signal.SIGKILL)
            figures.times.add(await told(others, epoch) - killed_at)
            await process.kill()  # reaps it
            process = await start()
            await serves_after(instance, epoch)
    return figures


async def measure_lost_data(*, trials: int, seed: int) -> RecoveryFigures:
    """From the moment that a server answers again, which was killed and has forgotten everything, to the first piece of a text.

    It was away for anything up to a lease, while the instance served. All ranks and the planner are tasks of this process.
    """
    figures = RecoveryFigures("a server restart without the data, until text comes again", "leases", LEASE, bound=2.0)
    rng = random.Random(seed)
    kept = 0
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(RealServer())
        store = await connected(stack, server.url)
        ranks = await stack.enter_async_context(ranks_of(server.url, "forgotten", range(WORLD_SIZE)))
        planner = await stack.enter_async_context(Planner(store, policy=TIRELESS))
        instance = await planner.launch(spec_of("forgotten"), timeout=PATIENCE)
        for _ in range(trials):
            epoch = epoch_of(instance)
            loads = [rank.host.engine.calls.count("load") for rank in ranks]
            server.kill()
            await asyncio.sleep(rng.uniform(0, LEASE))
            await server.restart(keep_data=False)
            back_at = now()
            figures.times.add(await first_text(lambda: instance.generate("Why?", timeout=PATIENCE)) - back_at)
            await wait_until(lambda: instance.state.serving, "it to serve", timeout=PATIENCE)
            if epoch_of(instance) == epoch:
                assert loads == [rank.host.engine.calls.count("load") for rank in ranks]
                kept += 1
            await asyncio.sleep(LEASE)  # the hold after an outage is over, and the next trial begins from rest
    figures.note = f"{kept} times in the same attempt, without a second load"
    return figures


async def measure_killed_planners(*, trials: int, seed: int) -> RecoveryFigures:
    """From the SIGKILL of the leading planner's process to the first piece of a text that is asked for at that moment.

    Only a leader hands requests out, so the successor has taken the lead and acted by then. Leader and standby are processes of their own.
    """
    figures = RecoveryFigures(
        "a planner killed, until its successor acts", "(leader's lease + heartbeat)", LEASE + HEARTBEAT, bound=1.0
    )
    rng = random.Random(seed)
    name = "succeeded"
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rankgate-bench-")))
        server = await stack.enter_async_context(RealServer())
        store = await connected(stack, server.url)
        cluster = await stack.enter_async_context(Cluster(server.url, directory, SETTINGS))
        ranks = await stack.enter_async_context(ranks_of(server.url, name, range(WORLD_SIZE)))
        requests = RequestQueue(store, Keys("rankgate", name), SystemClock())

        async def text_comes() -> float:
            return await first_text(lambda: requests.generate("Why?", max_tokens=4, seconds=PATIENCE))

        async def standing_by() -> Process:
            process = await cluster.planner()
            await wait_until(lambda: "planning the instances" in process.log(), "a planner to start", timeout=PATIENCE)
            return process

        await Registry(store, "rankgate").launch(spec_of(name))
        leader = await standing_by()
        await text_comes()
        for _ in range(trials):
            standby = await standing_by()  # the first one leads already
            await asyncio.sleep(rng.uniform(0, LEASE))  # at any time between two renewals
            killed_at = now()
            os.kill(leader.pid, signal.SIGKILL)
            figures.times.add(await text_comes() - killed_at)
            await leader.kill()  # reaps it
            leader = standby
        loads = [rank.host.engine.calls.count("load") for rank in ranks]
        assert loads == [1] * WORLD_SIZE, f"no succession costs a load: {loads}"
    return figures

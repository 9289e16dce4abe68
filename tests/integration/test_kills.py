"""Processes are killed with SIGKILL at a moment that their own report has confirmed; the instance heals, and nobody else is disturbed."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from barrier import Barrier, EpochId, Report, Settings, Snapshot, Store, SystemClock
from barrier.store.keys import Keys
from barrier.testing import wait_until
from planner import GenerationFailed, Instance, InstanceSpec, ModelSpec, Planner, Policy
from planner.history import (
    EpochConcluded,
    EpochOpened,
    History,
    RankSaid,
    StepDispatched,
    find_breaches,
    read_history,
    timeline,
)
from planner.registry import Registry
from planner.requests import RequestQueue
from runner.engines.simulated import MARK, FaultLedger
from runner.messages import RunnerStatusUpdated, StatusName
from tests.integration.cluster import (
    Cluster,
    Process,
    connected,
    descendants,
    keys_without_lifetime,
    still_there,
    stopped,
)
from tests.integration.servers import RealServer

pytestmark = pytest.mark.anyio

SETTINGS = Settings(lease=3.0, heartbeat=0.5)
POLICY = Policy(assemble_timeout=60.0, backoff_base=0.05, backoff_cap=0.2)
MODEL = ModelSpec(model_id="simulated", total_layers=4)
QUICK = {"connect_seconds": 0.05, "layer_seconds": 0.01, "warmup_seconds": 0.02, "token_seconds": 0.005}
WORLD_SIZE = 3
NAME = "killed"
SECONDS = 60.0
"""How long anything may take; a bound for hangs, not a measure."""


@pytest.fixture
async def server() -> AsyncGenerator[RealServer]:
    async with RealServer() as running:
        yield running


@pytest.fixture
async def cluster(server: RealServer, tmp_path: Path) -> AsyncGenerator[Cluster]:
    async with Cluster(server.url, tmp_path, SETTINGS) as made:
        yield made
        print(made.logs())  # shown where the test failed


@pytest.fixture
async def store(server: RealServer) -> AsyncGenerator[Store]:
    async with connected(server.url, SETTINGS) as made:
        yield made


@pytest.fixture
async def barrier(store: Store) -> AsyncGenerator[Barrier]:
    """To look, never to act."""
    async with Barrier(store, NAME, world_size=WORLD_SIZE) as made:
        yield made


@dataclass(frozen=True)
class Hold:
    """How a rank is held in a status: by a fault of the simulated engine that hangs there once; its next life passes.

    Attributes:
        config: the engine's configuration; the same for all ranks.
        ledger: where the fault counts its strikes.
        strikes: how many there will be, before the status is certain to last.
    """

    config: dict[str, Any]
    ledger: FaultLedger
    strikes: int

    async def certain(self) -> None:
        """Wait until every fault has struck: a report says the status a little before the engine is in it."""
        await wait_until(lambda: self.ledger.strikes().total() == self.strikes, "the engine to be held", SECONDS)


def holding(status: StatusName, victim: int, directory: Path) -> Hold:
    other = (victim + 1) % WORLD_SIZE
    faults: dict[str, dict[str, Any]] = {
        "Connecting": {"phase": "connect", "rank": victim},
        "Connected": {"phase": "connect", "rank": other},  # the victim waits for one that does not come
        "Loading": {"phase": "load", "rank": victim, "after_layers": 2},
        "WarmingUp": {"phase": "warmup", "rank": victim},
        "Running": {"phase": "generate"},  # on all ranks, as a collective would
    }
    path = directory / "ledger"
    if status not in faults:
        return Hold(dict(QUICK), FaultLedger(path), 0)
    fault = {"action": "hang", "times": 1, **faults[status]}
    strikes = 1 if "rank" in fault else WORLD_SIZE
    return Hold({**QUICK, "faults": [fault], "fault_ledger": str(path)}, FaultLedger(path), strikes)


def report_of(snapshot: Snapshot, rank: int) -> Report | None:
    return snapshot.ranks[rank].report


async def until_reported(barrier: Barrier, rank: int, status: StatusName) -> EpochId:
    """Wait until a rank's own report says the status; the epoch that it says it in."""

    async def reported() -> EpochId | None:
        report = report_of(await barrier.inspect(), rank)
        return report.epoch if report is not None and report.status == status else None

    epoch = await wait_until(reported, f"rank {rank} to report {status}", SECONDS)
    assert epoch is not None
    return epoch


async def until_served_again(instance: Instance, first: EpochId) -> Snapshot:
    """Wait until all ranks serve in another epoch than the first one."""

    def again() -> Snapshot | None:
        state = instance.state
        assert not state.over, state.reason
        snapshot = state.snapshot
        return snapshot if state.serving and snapshot and snapshot.epoch and snapshot.epoch.id != first else None

    snapshot = await wait_until(again, "the instance to serve again", SECONDS)
    assert snapshot is not None
    return snapshot


def loads_begun(history: History) -> Counter[tuple[EpochId | None, int]]:
    """How often each rank said Loading, by epoch and rank."""
    return Counter(
        (event.epoch, event.rank)
        for event in history.events
        if isinstance(event, RankSaid)
        and isinstance(event.event, RunnerStatusUpdated)
        and event.event.status.kind == "Loading"
    )


@pytest.mark.parametrize(
    ("status", "victim"),
    [
        pytest.param("Connecting", 1, marks=pytest.mark.slow),
        pytest.param("Connected", 0),
        pytest.param("Loading", 2, marks=pytest.mark.slow),
        pytest.param("WarmingUp", 1, marks=pytest.mark.slow),
        pytest.param("Ready", 0, marks=pytest.mark.slow),
        pytest.param("Running", 2, marks=pytest.mark.slow),
    ],
)
async def test_a_runner_killed_in_any_status_and_restarted(
    cluster: Cluster,
    store: Store,
    barrier: Barrier,
    server: RealServer,
    tmp_path: Path,
    status: StatusName,
    victim: int,
) -> None:
    hold = holding(status, victim, tmp_path)
    processes = await cluster.runners(NAME, WORLD_SIZE, hold.config)
    async with Planner(store, policy=POLICY, rng=random.Random(1)) as planner:
        instance = await planner.launch(InstanceSpec(name=NAME, world_size=WORLD_SIZE, model=MODEL), wait=False)
        generation: asyncio.Task[str] | None = None
        if status == "Running":
            await instance.ready(SECONDS)
            generation = asyncio.create_task(collect(instance))
        first = await until_reported(barrier, victim, status)
        if status == "Ready":
            await instance.ready(SECONDS)
        await hold.certain()
        assert await until_reported(barrier, victim, status) == first
        before = descendants(without={server.pid})

        await processes[victim].kill()
        restarted = await cluster.runner(NAME, victim, WORLD_SIZE, hold.config)
        snapshot = await until_served_again(instance, first)
        text = await collect(instance)
        if generation is not None:
            with pytest.raises(GenerationFailed):
                await generation
        others = [process for rank, process in enumerate(processes) if rank != victim]
        assert [process.code for process in others] == [None, None], cluster.logs()
        await instance.stop()

    assert text.startswith(MARK)
    living: list[Process] = [restarted if rank == victim else process for rank, process in enumerate(processes)]
    assert [view.report and view.report.pid for view in snapshot.ranks] == [process.pid for process in living]
    seen = before | descendants(without={server.pid})
    assert await stopped(living) == [0, 0, 0]
    assert still_there(seen) == []
    assert await keys_without_lifetime(store) == []

    history = await read_history(store, Keys("rankgate", NAME))
    assert find_breaches(history) == []
    # A report that was cancelled under way may have been written: then its events come again, and say so.
    assert {oddity.kind for oddity in history.oddities} <= {"repeated"}
    loads = loads_begun(history)
    assert set(loads.values()) == {1}, "one LoadModel per rank and epoch"
    assert snapshot.epoch is not None
    assert {rank for epoch, rank in loads if epoch == snapshot.epoch.id} == {0, 1, 2}
    held_back_before_load = status in ("Connecting", "Connected")
    assert (first not in {epoch for epoch, _ in loads}) == held_back_before_load
    assert timeline(history, snapshot.epoch.id).rejections == {}
    verdicts = [event.verdict for event in history.events if isinstance(event, EpochConcluded)]
    assert verdicts[0].culprit == victim


async def collect(instance: Instance) -> str:
    return "".join([piece async for piece in instance.generate("hello", max_tokens=4, timeout=SECONDS)])


@pytest.mark.slow
@pytest.mark.parametrize("status", ["Connecting", "Connected", "Loading", "WarmingUp"])
async def test_a_planner_killed_between_two_steps_is_succeeded_by_its_standby(
    cluster: Cluster, store: Store, barrier: Barrier, status: StatusName
) -> None:
    """No second LoadModel, no second attempt, no runner restarted: the successor goes on where the first one was killed."""
    slow = {"Connecting": "connect_seconds", "Loading": "layer_seconds", "WarmingUp": "warmup_seconds"}
    engine = {**QUICK, "jitter": 0.0, **({slow[status]: 2.0 if status != "Loading" else 0.8} if status in slow else {})}
    hold_back = {1: 4.0} if status == "Connected" else {}
    processes = [
        await cluster.runner(NAME, rank, WORLD_SIZE, engine, hold_back={1: 4.0} if rank in hold_back else None)
        for rank in range(WORLD_SIZE)
    ]
    await Registry(store, "rankgate").launch(InstanceSpec(name=NAME, world_size=WORLD_SIZE, model=MODEL))
    leader = await cluster.planner()

    async def led() -> str:
        found = (await barrier.inspect()).leader
        return found.holder if found else ""

    first_holder = await wait_until(led, "the first planner to lead", SECONDS)
    standby = await cluster.planner()
    epoch = await until_reported(barrier, 0, status)
    steps_before = set(snapshot.epoch.steps) if (snapshot := await barrier.inspect()).epoch else set[str]()
    assert await led() == first_holder

    await leader.kill()

    async def serves() -> bool:
        ranks = (await barrier.inspect()).ranks
        return all(view.report and view.report.status == "Ready" for view in ranks)

    async def succeeded() -> bool:
        return await led() != first_holder

    await wait_until(serves, "all ranks to be Ready", SECONDS)
    await wait_until(succeeded, "the standby to lead", SECONDS)
    client = RequestQueue(store, Keys("rankgate", NAME), SystemClock())
    text = "".join([piece async for piece in client.generate("hello", max_tokens=4, seconds=SECONDS)])
    assert text.startswith(MARK)
    assert standby.running
    assert [process.code for process in processes] == [None] * WORLD_SIZE, cluster.logs()
    history = await read_history(store, Keys("rankgate", NAME))
    assert find_breaches(history) == []
    assert [event.epoch for event in history.events if isinstance(event, EpochOpened)] == [epoch]
    dispatched = [event.step for event in history.events if isinstance(event, StepDispatched)]
    assert dispatched.pop().startswith("generate ")
    assert dispatched == ["connect", "load", "warm up followers", "warm up leader"]
    assert steps_before < set(dispatched) or status == "WarmingUp", "there was something left to do"
    assert set(loads_begun(history).values()) == {1}

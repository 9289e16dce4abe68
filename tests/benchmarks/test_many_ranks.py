"""One group of many ranks with long names: the size of every message, and one bring-up on a real server.

``make bench ARGS="-k many_ranks -s"``; ``RANKS`` says how many (2,048).
"""

from __future__ import annotations

import asyncio
import os
import resource
import time
from contextlib import AsyncExitStack

import pytest

from barrier import EpochId, LogId, Member, Report, Settings, TaskOutcome, Verdict, connect
from barrier.testing import wait_until
from planner import InstanceSpec, Planner, Policy
from planner.embedded import EmbeddedServer
from planner.lifecycle import steps_for
from planner.tasks import generation_task, task_for
from runner import InlineHost, Runner
from runner.engine import EngineGroup
from runner.engines.simulated import SimulatedConfig, SimulatedEngine
from runner.messages import (
    MAX_MESSAGE_BYTES,
    RunnerStatusUpdated,
    RunnerWarmingUp,
    TaskAcknowledged,
    encode,
)

pytestmark = [pytest.mark.anyio, pytest.mark.bench]

RANKS = int(os.environ.get("RANKS") or 2_048)
MOST = 16_384
EPOCH = EpochId(1_790_000_000_000, "a" * 32)
QUICK = SimulatedConfig(connect_seconds=0, layer_seconds=0, warmup_seconds=0, token_seconds=0)
ONE_STORE = 16  # ranks


def long_name(rank: int) -> str:
    return f"node-{rank:05}.rack-{rank % 97:02}.a-very-long-domain-name.cluster.example.org"


def test_no_message_grows_with_the_number_of_ranks() -> None:
    """Every kind of message of a bring-up of 16,384 ranks with long names, by the real encoders, in bytes."""
    spec = InstanceSpec(name="n" * 63, world_size=MOST)
    outcome = TaskOutcome(task_id="t" * 96, step="warm up followers", n=7, result="done")
    report = Report(
        rank=MOST - 1,
        incarnation="f" * 28,
        status="Connected",
        epoch=EPOCH,
        node=long_name(MOST - 1),
        endpoint=f"{long_name(MOST - 1)}:65535",
        pid=4_000_000,
        world_size=MOST,
        lease_ms=6_000,
        outcomes=(outcome,) * 8,
    )
    sizes = {
        **{f"task of {step.name}": len(encode(task_for(step, spec, EPOCH, 9, Policy()))) for step in steps_for(MOST)},
        "task of a text without its prompt": len(
            encode(generation_task("r" * 64, "", 64, instance=spec.name, epoch=EPOCH, term=9))
        ),
        "report": len(report.encode()),
        "event: status": len(encode(RunnerStatusUpdated(status=RunnerWarmingUp()))),
        "event: acknowledgement": len(encode(TaskAcknowledged(task_id="t" * 96))),
        "verdict": len(Verdict.aborted("r" * 10_000, MOST - 1).model_dump_json()),
        "one field of endpoints in the record (64 ranks)": sum(len(f"{long_name(r)}:65535\n") for r in range(64)),
        "place in the log": len(str(LogId(EPOCH.number, 9))),
    }
    for what, size in sizes.items():
        print(f"{size:>8,} bytes  {what}")
    whole = sum(len(f"{long_name(rank)}:65535\n") for rank in range(MOST))
    print(f"{whole:>8,} bytes  all endpoints of {MOST:,} ranks, in the record, read once by each rank")
    assert max(sizes.values()) < MAX_MESSAGE_BYTES / 8


class Placed(SimulatedEngine):
    """A simulated engine that says where it waits, though nobody connects there: ranks that share a process never meet."""

    met: int = 0

    async def prepare(self, rank: int, world_size: int) -> str | None:
        await super().prepare(rank, world_size)
        return f"{long_name(rank)}:{20_000 + rank}"

    async def connect(self, group: EngineGroup) -> None:
        await super().connect(group)
        Placed.met += len(group.endpoints) == RANKS and group.endpoints[-1].startswith(long_name(RANKS - 1))


async def test_one_bring_up_of_many_ranks_with_long_names() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4 * RANKS + 1_000)), hard))
    settings = Settings(lease=120.0, heartbeat=30.0, command_timeout=60.0)
    Placed.met = 0
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(EmbeddedServer())
        stores = [await connect(server.url, settings=settings) for _ in range(-(-RANKS // ONE_STORE))]
        for store in stores:
            stack.push_async_callback(store.close)
        runners = [
            Runner(
                Member(stores[rank // ONE_STORE], "demo", rank=rank, world_size=RANKS, node=long_name(rank)),
                InlineHost(lambda: Placed(QUICK), rank=rank),
            )
            for rank in range(RANKS)
        ]
        began = time.monotonic()
        serving = [asyncio.create_task(runner.run()) for runner in runners]
        planner_store = await connect(server.url, settings=settings)
        stack.push_async_callback(planner_store.close)
        async with Planner(planner_store, policy=Policy(connect_stall=300.0)) as planner:
            instance = await planner.launch(InstanceSpec(name="demo", world_size=RANKS), wait=False)
            await wait_until(lambda: instance.state.serving or instance.state.over, "all ranks to serve", 600)
            seconds = time.monotonic() - began
            assert instance.state.serving, instance.state.reason
            snapshot = instance.state.snapshot
            assert snapshot is not None
            assert snapshot.epoch is not None
            print(
                f"{RANKS:,} ranks in one process, lease 120 s: all Ready {seconds:.1f} s after the first one began, attempt "
                f"{snapshot.epoch.ordinal}; {Placed.met:,} engines were told all {RANKS:,} endpoints"
            )
            assert Placed.met >= RANKS
            await instance.stop()
        for runner in runners:
            runner.stop()
        await asyncio.gather(*serving)

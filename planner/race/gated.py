"""Run 3: rankgate's planner and runners, with the gate."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress

from barrier import Barrier, Store, StoreError
from barrier.store.keys import Keys
from planner.history import EpochConcluded, EpochOpened, StepDispatched, find_breaches, kind_of, read_history
from planner.launcher import Program, own_command, own_environment
from planner.planner import InstanceFailed, Planner
from planner.race.figures import RunFigures
from planner.race.scenario import (
    KILLED,
    LIMIT,
    MODEL,
    POLL,
    SETTINGS,
    WORLD_SIZE,
    Run,
    Say,
    cancelled,
    engine_config,
    ranks_named,
)
from planner.spec import InstanceSpec

__all__ = ["with_barrier"]


async def with_barrier(store: Store, url: str, say: Say) -> RunFigures:
    """Run 3: bring the instance up in the usual way, and count what happens."""
    title = "the barrier, refusing runner"
    say(f"3. {title}")
    spec = InstanceSpec(name="race-barrier", world_size=WORLD_SIZE, model=MODEL)
    keys = Keys("rankgate", spec.name)
    run = Run(title, [_barrier_program(rank, spec.name, url) for rank in range(WORLD_SIZE)], say)
    async with Barrier(store, spec.name, world_size=WORLD_SIZE) as looker, run.launcher:

        async def status_of_killed() -> str:
            report = (await looker.inspect()).ranks[KILLED].report
            return report.status if report else ""

        async with asyncio.timeout(LIMIT):
            while not all(view.report for view in (await looker.inspect()).ranks):
                await asyncio.sleep(0.02)
        async with Planner(store) as planner:
            instance = await planner.launch(spec, wait=False)
            telling = asyncio.create_task(_tell_history(store, keys, run))
            try:
                ready_after = await run.bring_up(instance.ready(), status_of_killed)
            finally:
                await cancelled(telling)
            history = await read_history(store, keys)
            with suppress(
                InstanceFailed, StoreError
            ):  # the figures are complete, and the processes end with this block
                await instance.stop()
    loads = [e for e in history.events if isinstance(e, StepDispatched) and kind_of(e.step) == "LoadModel"]
    return RunFigures(
        title,
        len(loads),
        len(history.rejections),
        run.deaths,
        ready_after,
        run.last_words,
        len(find_breaches(history)),
    )


def _barrier_program(rank: int, instance: str, url: str) -> Program:
    """A usual `rankgate runner`."""
    arguments = [
        *("--instance", instance),
        *("--rank", str(rank)),
        *("--world-size", str(WORLD_SIZE)),
        *("--lease", repr(SETTINGS.lease)),
        *("--heartbeat", repr(SETTINGS.heartbeat)),
        *("--engine-config", engine_config(rank).model_dump_json(exclude_defaults=True)),
        "--inline-engine",
        *("--log", "ERROR"),
        *("--parent", str(os.getpid())),
    ]
    return Program(
        name=f"rank {rank}",
        command=own_command("runner", *arguments),
        environment={**own_environment(), "RANKGATE_REDIS": url},
        ranks=range(rank, rank + 1),
    )


async def _tell_history(store: Store, keys: Keys, run: Run) -> None:
    """Print what the planner does, by the event history in the store."""
    told = 0
    while True:
        events = (await read_history(store, keys)).events
        for event in events[told:]:
            match event:
                case EpochOpened():
                    run.tell(f"attempt {event.ordinal} begins")
                case EpochConcluded():
                    run.tell(f"{event.verdict}")
                case StepDispatched():
                    run.tell(f"{kind_of(event.step)} to {ranks_named(range(event.first, event.last + 1))}")
                case _:
                    pass
        told = len(events)
        await asyncio.sleep(POLL)

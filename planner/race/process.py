"""The processes of runs 1 and 2, one for each rank: a runner that raises as exo's does, or rankgate's own."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Coroutine
from contextlib import aclosing, suppress
from typing import Any

from loguru import logger
from redis.exceptions import ResponseError

from barrier import EpochId, Member, Store, connect
from barrier.store.keys import Keys
from planner.launcher import leave_with_parent
from planner.race.mail import publish, tasks_for
from planner.race.scenario import SETTINGS, WORLD_SIZE, Role, engine_config
from runner import Engine, EngineGroup, InlineHost, Runner
from runner.engines.simulated import SimulatedEngine
from runner.messages import (
    ConnectToGroup,
    LoadModel,
    RunnerConnected,
    RunnerConnecting,
    RunnerIdle,
    RunnerLoaded,
    RunnerLoading,
    RunnerReady,
    RunnerStatus,
    RunnerWarmingUp,
    StartWarmup,
    Task,
    encode,
)

__all__ = ["FragileRunner"]


class FragileRunner:
    """A runner like exo's: it takes one task after another, and raises an error if a task comes out of state.

    Args:
        rank: its rank.
        engine: its engine.
    """

    def __init__(self, rank: int, engine: Engine) -> None:
        self.status: RunnerStatus = RunnerIdle()
        self._rank = rank
        self._engine = engine

    async def handle(self, task: Task) -> None:
        """Do a task.

        Raises:
            ValueError: the task does not fit the status. Nobody catches this, and the process dies.
        """
        match task, self.status:
            case ConnectToGroup(), RunnerIdle():
                self.status = RunnerConnecting()
                await self._engine.connect(
                    EngineGroup(task.instance, task.epoch, self._rank, ("",) * WORLD_SIZE, task.deadline)
                )
                self.status = RunnerConnected()
            case LoadModel(), RunnerConnected():
                async for layers in self._engine.load(task.model):
                    self.status = RunnerLoading(layers_loaded=layers, total_layers=task.model.total_layers)
                self.status = RunnerLoaded()
            case StartWarmup(), RunnerLoaded():
                self.status = RunnerWarmingUp()
                await self._engine.warm_up()
                self.status = RunnerReady()
            case _:
                current = f"{type(self.status).__name__}()"
                raise ValueError(f"Received {task.kind} outside of state machine in current_status={current}")


async def _serve_fragile(runner: FragileRunner, store: Store, keys: Keys, rank: int) -> None:
    async with aclosing(tasks_for(store, keys, rank)) as tasks:
        async for task in tasks:
            await runner.handle(task)


async def _forward(store: Store, member: Member, rank: int) -> None:
    """Copy the tasks from a rank's inbox into the task log, where rankgate's runner reads: a plain XADD without the gate."""
    while not member.trusted:  # the runner reads the log from the moment at which it holds its rank
        await asyncio.sleep(0.02)
    keys = member.keys
    async with aclosing(tasks_for(store, keys, rank)) as tasks:
        async for task in tasks:
            epoch = EpochId.parse(task.epoch)
            fields: dict[str, str | bytes | int] = {
                "kind": "task",
                "nonce": epoch.nonce,
                "prev": 0,
                "term": task.term,
                "step": task.kind,
                "to": f"{rank}-{rank}",
                "task": encode(task),
            }
            # The log may be in a later epoch already: then this task is too late.
            with store.errors(), suppress(ResponseError):
                await store.commands.xadd(keys.tasks, fields, id=f"{epoch.number}-*")


def _engine(rank: int) -> SimulatedEngine:
    return SimulatedEngine(engine_config(rank), rank=rank, world_size=WORLD_SIZE)


async def _run_process(role: Role, keys: Keys, rank: int, url: str) -> None:
    store = await connect(url, settings=SETTINGS)
    try:
        serving: tuple[Coroutine[Any, Any, None], ...]
        if role == "fragile":
            fragile = FragileRunner(rank, _engine(rank))
            serving, status = (_serve_fragile(fragile, store, keys, rank),), lambda: fragile.status.kind
        else:
            member = Member(store, keys.group, rank=rank, world_size=WORLD_SIZE)
            runner = Runner(member, InlineHost(lambda: _engine(rank), rank=rank))
            serving, status = (runner.run(), _forward(store, member, rank)), lambda: runner.status.kind
        tasks = [asyncio.create_task(one) for one in (*serving, publish(store, keys, rank, status))]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # raises what ended this process
    finally:
        await store.close()


def _main(role: str, instance: str, rank: str, parent: str) -> None:
    """One runner's process."""
    leave_with_parent(int(parent))
    logger.remove()  # the race prints everything that people should see
    if role not in ("fragile", "graceful"):
        raise ValueError(f"{role!r} is no runner of the race")
    keys = Keys("rankgate", instance)
    asyncio.run(_run_process(role, keys, int(rank), os.environ.pop("RANKGATE_REDIS")))


if __name__ == "__main__":
    _main(*sys.argv[1:])

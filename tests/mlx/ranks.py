"""Runners with real MLX engines, on loopback; only the store is a fake one, in this process."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from barrier import Member
from barrier.store.keys import Keys
from barrier.testing import FakeStore
from runner import EngineSpec, ProcessHost, Runner
from runner.messages import decode_task

NAME = "tiny"


@dataclass
class Ranks:
    """The runners of one instance, and the store that they share with a planner."""

    name: str
    store: FakeStore
    runners: list[Runner]
    hosts: list[ProcessHost]

    @property
    def statuses(self) -> list[str]:
        return [runner.status.kind for runner in self.runners]

    def dispatched(self) -> list[str]:
        """The kinds of all tasks in the log, in its order."""
        entries: list[tuple[bytes, dict[bytes, bytes]]] = self.store.contents().get(
            Keys("rankgate", self.name).tasks, []
        )
        return [decode_task(fields[b"task"]).kind for _, fields in entries if b"task" in fields]


@asynccontextmanager
async def ranks_of(
    world_size: int, *, name: str = NAME, store: FakeStore | None = None, spares: bool = False
) -> AsyncGenerator[Ranks]:
    """So many runners, each with its engine in a process of its own.

    Args:
        world_size: how many.
        name: the instance.
        store: what they share with other instances.
        spares: whether a second, prepared engine stands by; it takes processor time from what is tested.
    """
    store = store or FakeStore()
    async with AsyncExitStack() as stack:
        made = Ranks(name, store, [], [])
        for rank in range(world_size):
            member = Member(store.client(f"rank {rank} of {name}"), name, rank=rank, world_size=world_size)
            stack.push_async_callback(member.close)
            host = ProcessHost(
                EngineSpec(factory="runner.engines.mlx:mlx_engine"), rank=rank, spare_after=1.0 if spares else math.inf
            )
            stack.push_async_callback(host.shut_down)
            runner = Runner(member, host)
            running = asyncio.create_task(runner.run(), name=f"rank {rank} of {name}")
            stack.push_async_callback(_leave, runner, running)
            made.runners.append(runner)
            made.hosts.append(host)
        yield made


async def _leave(runner: Runner, running: asyncio.Task[None]) -> None:
    runner.stop()
    await running

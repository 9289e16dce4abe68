"""How ranks and planner of the first two runs communicate: a table of statuses, and an inbox for every rank."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Literal, TypeAlias

from barrier import EpochId, Store
from barrier.store.keys import Keys
from planner.race.scenario import LIMIT, MODEL, PUBLISH, WORLD_SIZE
from runner.messages import ConnectToGroup, LoadModel, StartWarmup, Task, decode_task, encode

__all__ = ["Kind", "make_task", "post", "publish", "read_table", "status_in_table", "tasks_for", "until_all_are_here"]


_LIFETIME = 600  # seconds; these keys are not the barrier's, and expire by themselves

Kind: TypeAlias = Literal["ConnectToGroup", "LoadModel", "StartWarmup"]


def _table_key(keys: Keys) -> str:
    """Hash: the table of statuses, one field for each rank. A status stays until the rank writes the next one."""
    return f"{keys.tag}:race-statuses"


def _inbox_key(keys: Keys, rank: int) -> str:
    """List: the tasks for a rank. They stay there while its process is down."""
    return f"{keys.tag}:race-inbox:{rank}"


async def publish(store: Store, keys: Keys, rank: int, status: Callable[[], str]) -> None:
    """Write the rank's status into the table, again and again."""
    while True:
        with store.errors():
            async with store.commands.pipeline(transaction=True) as pipe:
                pipe.hset(_table_key(keys), str(rank), status())
                pipe.expire(_table_key(keys), _LIFETIME)
                await pipe.execute()
        await asyncio.sleep(PUBLISH)


async def read_table(store: Store, keys: Keys) -> dict[int, str]:
    """The last status of every rank that has written one."""
    with store.errors():
        found: dict[bytes, bytes] = await store.commands.hgetall(_table_key(keys))
    return {int(rank): status.decode() for rank, status in found.items()}


async def status_in_table(store: Store, keys: Keys, rank: int) -> str:
    """The last status of one rank; empty if it has written none."""
    return (await read_table(store, keys)).get(rank, "")


async def until_all_are_here(store: Store, keys: Keys) -> None:
    """Wait until every process has started. That time is not part of the race."""
    async with asyncio.timeout(LIMIT):
        while len(await read_table(store, keys)) < WORLD_SIZE:
            await asyncio.sleep(0.02)


def make_task(kind: Kind, instance: str, epoch: EpochId, term: int) -> Task:
    """A task with a random id, as from a planner that does not derive ids from steps."""
    common = {"task_id": f"{kind}-{uuid.uuid4().hex}", "instance": instance, "epoch": str(epoch), "term": term}
    match kind:
        case "ConnectToGroup":
            return ConnectToGroup.model_validate({**common, "deadline": 60.0})
        case "LoadModel":
            return LoadModel.model_validate({**common, "model": MODEL})
        case "StartWarmup":
            return StartWarmup.model_validate(common)


async def post(store: Store, keys: Keys, kind: Kind, ranks: Sequence[int], epoch: EpochId, term: int) -> None:
    """Put a task into the inboxes of some ranks."""
    with store.errors():
        async with store.commands.pipeline(transaction=True) as pipe:
            for rank in ranks:
                pipe.rpush(_inbox_key(keys, rank), encode(make_task(kind, keys.group, epoch, term)))
                pipe.expire(_inbox_key(keys, rank), _LIFETIME)
            await pipe.execute()


async def tasks_for(store: Store, keys: Keys, rank: int) -> AsyncGenerator[Task]:
    """The tasks from a rank's inbox, one after another."""
    reader = store.reader()
    try:
        while True:
            with store.errors():
                popped: tuple[bytes, bytes] | None = await reader.blpop([_inbox_key(keys, rank)], timeout=1)
            if popped is not None:
                yield decode_task(popped[1])
    finally:
        await reader.aclose()

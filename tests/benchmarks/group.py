"""What the benchmarks share: a group whose ranks are mostly absent, the readers' process, and a client that counts."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from redis.asyncio import ConnectionPool, Redis

from barrier import Barrier, EpochId, Opened, Report, Store
from barrier.protocol.ids import new_incarnation
from barrier.store.connection import StoreConnection
from barrier.store.script import VERBS, script
from barrier.testing.faults import unpack_commands
from runner.messages import LoadModel, ModelSpec, derive_task_id, encode
from tests.benchmarks.readers import LEASE

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0
"""Seconds after which something that should have happened counts as a failure; never a figure that is judged."""

now = time.perf_counter


async def open_epoch(barrier: Barrier) -> EpochId:
    outcome = await barrier.open()
    assert isinstance(outcome, Opened), outcome
    return outcome.epoch


def load_task(group: str, epoch: EpochId, step: str) -> str:
    """What a planner dispatches at the load gate."""
    task_id = derive_task_id(group, str(epoch), step)
    model = ModelSpec(model_id="simulated")
    return encode(LoadModel(task_id=task_id, instance=group, epoch=str(epoch), term=1, model=model)).decode()


class Absent:
    """Ranks without a process: the valid reports of an epoch's roster are written for them, with a long lease."""

    def __init__(self, store: Store, barrier: Barrier, ranks: range, world_size: int) -> None:
        self._store = store
        self._world_size = world_size
        self._barrier = barrier
        self._lives = {rank: new_incarnation(time.time_ns() // 1_000_000) for rank in ranks}

    async def report(self, status: str, epoch: EpochId | None) -> None:
        lease_ms = round(LEASE * 1000)
        async with self._store.commands.pipeline(transaction=False) as pipe:
            for rank, incarnation in self._lives.items():
                report = Report(
                    rank=rank,
                    incarnation=incarnation,
                    status=status,
                    epoch=epoch,
                    applied=1 if epoch else 0,
                    floor=epoch.number if epoch else 0,
                    seq=7,
                    node=f"node-{rank}",
                    pid=rank + 1,
                    world_size=self._world_size,
                    lease_ms=lease_ms,
                    status_ms=120,
                )
                pipe.set(self._barrier.keys.rank(rank), report.encode(), px=lease_ms)
            await pipe.execute()


class Readers:
    """The process of `tests.benchmarks.readers`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def told(self, what: str, which: str) -> list[float]:
        """The next thing that all of them have done must be this one; when each of them did."""
        assert self._process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            line = await self._process.stdout.readline()
            if not line:
                code = await self._process.wait()
                raise AssertionError(f"the readers ended with code {code} before all had {what} {which}")
        message: dict[str, Any] = json.loads(line)
        assert message.get(what) == which, f"waited for {what} {which}, and was told {message}"
        return message.get("at", [])


@asynccontextmanager
async def readers(url: str, group: str, ranks: range, world_size: int) -> AsyncGenerator[Readers]:
    """Readers of these ranks; they have claimed them on entry."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.benchmarks.readers", group),
        *(str(ranks[0]), str(ranks[-1]), str(world_size)),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 20,
    )
    assert process.stdin is not None
    try:
        process.stdin.write(url.encode() + b"\n")
        found = Readers(process)
        await found.told("claimed", str(len(ranks)))
        yield found
    finally:
        process.stdin.close()
        try:
            async with asyncio.timeout(PATIENCE):
                await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


_HANDSHAKE = ("AUTH", "CLIENT", "HELLO", "SELECT")


class CountingConnection(StoreConnection):
    """Counts round trips by what they begin with: a command, or the name of a verb's script."""

    def __init__(self, *, tally: Counter[str], **kwargs: Any) -> None:
        self._tally = tally
        super().__init__(**kwargs)  # pyright: ignore[reportUnknownMemberType]  redis-py leaves some of it untyped

    async def send_packed_command(self, command: bytes | str | Iterable[bytes], check_health: bool = True) -> None:
        assert not isinstance(command, str)
        packed = command if isinstance(command, bytes) else b"".join(command)
        if not self.is_connected:
            await self.connect()  # its handshake comes through here too, and must not come in the middle
        words = unpack_commands(packed)[0]
        name = words[0].decode().upper()
        if name in ("EVALSHA", "EVAL", "EVALSHA_RO", "EVAL_RO"):
            which = words[1].decode()
            name = next(verb for verb in VERBS if which in (script(verb).sha, script(verb).text))
        if name not in _HANDSHAKE:
            self._tally[name] += 1
        await super().send_packed_command(packed, check_health)


def counting_client(url: str, tally: Counter[str]) -> Redis:
    """A client whose round trips are counted, and those of all clients that are derived from it. The caller closes it."""
    untyped: Any = Redis  # redis-py leaves from_url partly untyped
    pool: Any = untyped.from_url(url).connection_pool
    made = type(f"Counting{pool.connection_class.__name__}", (CountingConnection, pool.connection_class), {})
    internal = ("himport_registry", "maint_", "orig_", "maintenance_")  # redis-py's own, made anew by the new pool
    kwargs: dict[str, Any] = {k: v for k, v in pool.connection_kwargs.items() if not k.startswith(internal)}
    return Redis(connection_pool=ConnectionPool(connection_class=made, tally=tally, **kwargs))

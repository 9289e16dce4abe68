"""Many runners' ends of the task log, in a process of their own, so that their work is not the planner's.

    python -m tests.benchmarks.readers GROUP FIRST LAST WORLD_SIZE

The store's URL comes as the first line on standard input, because it may hold a password; the end of that input ends the process. It
claims the ranks FIRST to LAST, promises every epoch that is announced, reports ``Connected`` in it, and notes when each task comes
out of `Member.tasks`. One line of JSON for each thing that all of its ranks have done: ``{"claimed": "3"}``, ``{"arrived": "<epoch>",
"at": […]}`` and ``{"task": "<log id>", "at": [seconds, …]}``, by the machine's monotonic clock, which its processes share.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import defaultdict
from contextlib import AsyncExitStack

from loguru import logger

from barrier import EpochAnnounced, Member, Promised, Settings, TaskEntry, VerdictAnnounced, connect

LEASE = 600.0
"""Seconds; so long that no heartbeat is needed while something is measured."""

SETTINGS = Settings(lease=LEASE, heartbeat=LEASE / 3, command_timeout=5.0)

_RANKS_PER_CLIENT = 32  # a client of redis-py has at most 100 connections


class _Tally:
    """Says what has been done once all ranks have done it."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._done: dict[tuple[str, str], list[float]] = defaultdict(list)

    def note(self, what: str, which: str) -> None:
        times = self._done[what, which]
        times.append(time.perf_counter())
        if len(times) == self._ranks:
            print(json.dumps({what: which, "at": self._done.pop((what, which))}), flush=True)


async def _follow(member: Member, tally: _Tally) -> None:
    async for entry in member.tasks():
        match entry:
            case TaskEntry(id=place):
                tally.note("task", str(place))
            case EpochAnnounced(epoch):
                if epoch.number <= member.report_now.floor:
                    continue  # the log announces it, and the record does
                member.retire()
                outcome = await member.promise(epoch)
                if not isinstance(outcome, Promised):
                    raise TypeError(f"rank {member.rank} could not promise: {outcome}")
                await member.report("Connected")
                tally.note("arrived", str(epoch))
            case VerdictAnnounced():
                pass
            case other:
                raise TypeError(f"rank {member.rank} read {other}")


async def _read(group: str, first: int, last: int, world_size: int) -> None:
    stdin = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    url = (await stdin.readline()).decode().strip()
    tally = _Tally(last - first + 1)
    async with AsyncExitStack() as stack:
        members: list[Member] = []
        for start in range(first, last + 1, _RANKS_PER_CLIENT):
            store = await connect(url, settings=SETTINGS)
            stack.push_async_callback(store.close)
            ranks = range(start, min(start + _RANKS_PER_CLIENT, last + 1))
            members += [Member(store, group, rank=rank, world_size=world_size, node=f"node-{rank}") for rank in ranks]
        for member in members:
            await member.claim()
        print(json.dumps({"claimed": str(len(members))}), flush=True)
        tasks = [asyncio.create_task(_follow(member, tally)) for member in members]
        tasks.append(asyncio.create_task(_until_closed(stdin)))
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()


async def _until_closed(stdin: asyncio.StreamReader) -> None:
    await stdin.read()


if __name__ == "__main__":
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    asyncio.run(_read(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))

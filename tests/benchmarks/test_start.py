"""How much processor time the commands take that only tell, beside what their libraries alone take to import.

``make bench ARGS="-k start -s"``. The ratio says more than the seconds: a busy machine makes both longer.
"""

from __future__ import annotations

import asyncio
import os
import resource
import statistics
import subprocess
import sys

import pytest

from barrier import Member, connect
from planner import InstanceSpec
from planner.embedded import EmbeddedServer
from planner.launcher import own_environment
from planner.registry import Registry

pytestmark = [pytest.mark.anyio, pytest.mark.bench]

TIMES = int(os.environ.get("TIMES") or 9)
CLIENT = "import asyncio, json, redis.asyncio, pydantic"
LIBRARIES = (
    f"{CLIENT}, typer, loguru, rich.console, rich.table, rich.live\nclass One(pydantic.BaseModel):\n    number: int"
)
COMMAND = "import sys; sys.argv[0] = '/usr/bin/rankgate'; from planner.cli import main; sys.exit(main())"


def seconds(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, **own_environment()}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed program is compiled
    subprocess.run([sys.executable, "-P", "-c", *arguments], env=environment, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


async def test_start() -> None:
    async with EmbeddedServer() as server:
        store = await connect(server.url)
        await Registry(store, "rankgate").launch(InstanceSpec(name="demo", world_size=2))
        member = Member(store, "demo", rank=0)
        await member.claim()
        async with member.heartbeat():
            wanted = {
                "the client and pydantic": [CLIENT],
                "all libraries, and one model": [LIBRARIES],
                "rankgate --help": [COMMAND, "--help"],
                "rankgate status": [COMMAND, "status", "--redis", server.url],
                "rankgate status demo": [COMMAND, "status", "demo", "--redis", server.url],
            }
            taken: dict[str, list[float]] = {what: [] for what in wanted}
            for _ in range(TIMES):
                for what, arguments in wanted.items():
                    taken[what].append(await asyncio.to_thread(seconds, *arguments))
        await store.close()
    unit = statistics.median(taken["the client and pydantic"])
    for what, each in taken.items():
        print(
            f"{what:30} {statistics.median(each):.3f} s, least {min(each):.3f} s, {statistics.median(each) / unit:.2f} ×"
        )

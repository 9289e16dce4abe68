"""From launch to text through a planner, runners and a real model; only the store is a fake one, in this process."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from pydantic import JsonValue

from barrier import Member
from barrier.keys import Keys
from barrier.testing import FakeStore, wait_until
from planner import InstanceFailed, InstanceSpec, Planner
from runner import EngineSpec, ProcessHost, Runner
from runner.messages import ModelSpec, decode_task
from tests.mlx.tiny import LAYERS, free_addresses, make_model, reference_text

pytestmark = [pytest.mark.anyio, pytest.mark.mlx]

PROMPT = "word17 word4 word8"
TOKENS = 16
NAME = "tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def expected(folder: Path) -> str:
    return reference_text(folder, PROMPT, TOKENS)


@dataclass
class Ranks:
    """Runners with real engines, and the store that they share with a planner."""

    store: FakeStore
    runners: list[Runner]
    hosts: list[ProcessHost]

    @property
    def statuses(self) -> list[str]:
        return [runner.status.kind for runner in self.runners]

    def dispatched(self) -> list[str]:
        """The kinds of all tasks in the log, in its order."""
        entries: list[tuple[bytes, dict[bytes, bytes]]] = self.store.contents().get(Keys("rankgate", NAME).tasks, [])
        return [decode_task(fields[b"task"]).kind for _, fields in entries if b"task" in fields]


@asynccontextmanager
async def ranks_of(world_size: int) -> AsyncGenerator[Ranks]:
    """So many runners on loopback, each with its engine in a process of its own."""
    store = FakeStore()
    config: dict[str, JsonValue] = {"hosts": [*free_addresses(world_size)]}
    async with AsyncExitStack() as stack:
        made = Ranks(store, [], [])
        for rank in range(world_size):
            member = Member(store.client(f"rank {rank}"), NAME, rank=rank, world_size=world_size)
            stack.push_async_callback(member.close)
            host = ProcessHost(EngineSpec(factory="runner.engines.mlx:mlx_engine", config=config), rank=rank)
            stack.push_async_callback(host.kill)
            runner = Runner(member, host)
            running = asyncio.create_task(runner.run(), name=f"rank {rank}")
            stack.push_async_callback(_leave, runner, running)
            made.runners.append(runner)
            made.hosts.append(host)
        yield made


async def _leave(runner: Runner, running: asyncio.Task[None]) -> None:
    runner.stop()
    await running


def spec(folder: Path, world_size: int) -> InstanceSpec:
    return InstanceSpec(name=NAME, world_size=world_size, model=ModelSpec(model_id=str(folder), total_layers=LAYERS))


@pytest.mark.parametrize("world_size", [1, 2])
async def test_an_instance_reaches_ready_and_generates_what_mlx_lm_does(
    folder: Path, expected: str, world_size: int
) -> None:
    async with ranks_of(world_size) as ranks, Planner(ranks.store.client("planner")) as planner:
        instance = await planner.launch(spec(folder, world_size))
        assert ranks.statuses == ["Ready"] * world_size
        assert "".join([piece async for piece in instance.generate(PROMPT, max_tokens=TOKENS)]) == expected
        kinds = Counter(ranks.dispatched())
        assert kinds["LoadModel"] == 1
        assert kinds["ConnectToGroup"] == (world_size > 1)
        await instance.stop()
        assert ranks.statuses == ["Idle"] * world_size
        assert [host.pid for host in ranks.hosts] == [None] * world_size


async def test_a_client_that_leaves_early_costs_nobody_the_model(folder: Path, expected: str) -> None:
    async with ranks_of(2) as ranks, Planner(ranks.store.client("planner")) as planner:
        instance = await planner.launch(spec(folder, 2))
        pids = [host.pid for host in ranks.hosts]
        async with aclosing(instance.generate(PROMPT, max_tokens=4_000)) as pieces:
            assert await anext(pieces)
            assert await anext(pieces)
        assert "".join([piece async for piece in instance.generate(PROMPT, max_tokens=TOKENS)]) == expected
        assert [host.pid for host in ranks.hosts] == pids
        assert ranks.dispatched().count("LoadModel") == 1


async def test_an_engine_that_dies_is_replaced_and_the_ring_is_formed_anew(folder: Path, expected: str) -> None:
    async with ranks_of(2) as ranks, Planner(ranks.store.client("planner")) as planner:
        instance = await planner.launch(spec(folder, 2))
        dead = ranks.hosts[1].pid
        assert dead is not None
        psutil.Process(dead).kill()
        await wait_until(lambda: ranks.statuses != ["Ready"] * 2, "the death to be noticed", 60)
        await wait_until(lambda: ranks.statuses == ["Ready"] * 2, "the next attempt to be ready", 120)
        await instance.ready()
        assert "".join([piece async for piece in instance.generate(PROMPT, max_tokens=TOKENS)]) == expected
        assert ranks.dispatched().count("LoadModel") == 2, "one for each attempt"


async def test_a_model_that_does_not_exist_is_not_tried_again(tmp_path: Path) -> None:
    async with ranks_of(1) as ranks, Planner(ranks.store.client("planner")) as planner:
        with pytest.raises(InstanceFailed, match="there is no model directory .*nowhere"):
            await planner.launch(spec(tmp_path / "nowhere", 1))
        assert ranks.dispatched() == ["LoadModel"]

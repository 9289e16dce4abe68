"""From launch to text through a planner, runners and a real model; only the store is a fake one, in this process."""

from __future__ import annotations

from collections import Counter
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from barrier.testing import wait_until
from planner import InstanceFailed, InstanceSpec, Planner
from runner.messages import ModelSpec
from tests.mlx.ranks import NAME, ranks_of
from tests.mlx.tiny import LAYERS, make_model, reference_text

pytestmark = [pytest.mark.anyio, pytest.mark.mlx]

PROMPT = "word17 word4 word8"
TOKENS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def expected(folder: Path) -> str:
    return reference_text(folder, PROMPT, TOKENS)


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

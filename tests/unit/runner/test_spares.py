"""A spare engine: started and prepared while the first one serves, and there when that one is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from barrier.testing import wait_until
from runner.engine import EngineDied, EngineGroup, GenerationRequest
from runner.host import EngineSpec, ProcessHost
from runner.messages import ModelSpec

pytestmark = pytest.mark.anyio

MODEL = ModelSpec(model_id="toy", total_layers=1)
SECONDS = 60.0


class Slow:
    """An engine that is prepared once a file is there, and leaves a line in another one when it begins."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._gate, self._begun = Path(config["gate"]), Path(config["begun"])

    async def prepare(self, rank: int, world_size: int) -> str | None:
        with self._begun.open("a") as file:
            file.write("x")
        while not self._gate.exists():
            await asyncio.sleep(0.005)
        return ":5000"

    async def connect(self, group: EngineGroup) -> None: ...

    async def load(self, model: ModelSpec) -> AsyncGenerator[int, None]:
        yield 1

    async def warm_up(self) -> None: ...

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[str, None]:
        yield "text"

    async def close(self) -> None: ...


class Bench:
    """A host whose engines are prepared when the test says so."""

    def __init__(self, folder: Path) -> None:
        self.gate, self._begun = folder / "gate", folder / "begun"
        spec = EngineSpec(
            factory="tests.unit.runner.test_spares:Slow", config={"gate": str(self.gate), "begun": str(self._begun)}
        )
        # Any time is longer than this: every engine is worth a spare.
        self.host = ProcessHost(spec, grace_seconds=10.0, spare_after=1e-6)

    @property
    def begun(self) -> int:
        """How many preparations have begun."""
        return len(self._begun.read_text()) if self._begun.exists() else 0

    async def serve(self) -> int:
        """Bring one engine up, so that a spare is started; the pid of the engine."""
        self.gate.touch()
        await self.host.prepare(0, 2)
        await self.host.connect(EngineGroup("demo", "1-a", 0, ("a:1", "b:2"), SECONDS))
        assert [layer async for layer in self.host.load(MODEL)] == [1]
        await self.host.warm_up()
        assert self.host.pid is not None
        return self.host.pid

    async def spare(self, serving: int) -> int:
        """The spare's pid, once its preparation has begun."""
        await wait_until(lambda: self.begun > 1, "the spare to be prepared", SECONDS)
        (spare,) = (one.pid for one in engines() if one.pid != serving)
        return spare


def engines() -> list[psutil.Process]:
    return [
        one
        for one in psutil.Process().children()
        if one.status() != psutil.STATUS_ZOMBIE and "engine-of-rank-0" in one.cmdline()
    ]


@asynccontextmanager
async def bench(folder: Path) -> AsyncGenerator[Bench]:
    made = Bench(folder)
    try:
        yield made
    finally:
        await made.host.shut_down()
    assert engines() == []


async def test_the_spare_takes_the_place_of_an_engine_that_died(tmp_path: Path) -> None:
    """Its runner kills what died as well, to be sure; that is no reason to give the spare up."""
    async with bench(tmp_path) as made:
        serving = await made.serve()
        spare = await made.spare(serving)
        psutil.Process(serving).kill()
        assert isinstance(await made.host.died(), EngineDied)
        await made.host.kill()
        assert await made.host.prepare(0, 2) == ":5000"
        assert made.host.pid == spare


@pytest.mark.parametrize("end", ["kill", "close"])
async def test_the_spare_takes_the_place_of_an_engine_that_was_ended(tmp_path: Path, end: str) -> None:
    async with bench(tmp_path) as made:
        serving = await made.serve()
        spare = await made.spare(serving)
        await (made.host.kill() if end == "kill" else made.host.close())
        assert await made.host.prepare(0, 2) == ":5000"
        assert made.host.pid == spare


async def test_a_preparation_that_is_left_while_it_waits_for_the_spare_goes_on(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        serving = await made.serve()
        made.gate.unlink()
        spare = await made.spare(serving)
        await made.host.kill()
        preparing = asyncio.create_task(made.host.prepare(0, 2))
        await asyncio.sleep(0)
        preparing.cancel()
        await asyncio.gather(preparing, return_exceptions=True)
        made.gate.touch()
        async with asyncio.timeout(SECONDS):
            assert await made.host.prepare(0, 2) == ":5000"
        assert made.host.pid == spare


async def test_a_preparation_that_is_left_while_its_engine_starts_goes_on(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        preparing = asyncio.create_task(made.host.prepare(0, 2))
        await asyncio.sleep(0)
        preparing.cancel()
        await asyncio.gather(preparing, return_exceptions=True)
        made.gate.touch()
        async with asyncio.timeout(SECONDS):
            assert await made.host.prepare(0, 2) == ":5000"
        assert len(engines()) == 1


async def test_whoever_waits_for_the_spare_can_be_killed_and_the_next_one_gets_a_fresh_engine(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        serving = await made.serve()
        made.gate.unlink()
        spare = await made.spare(serving)
        await made.host.kill()
        preparing = asyncio.create_task(made.host.prepare(0, 2))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await made.host.kill()
        with pytest.raises(EngineDied):
            await preparing
        made.gate.touch()
        assert await made.host.prepare(0, 2) == ":5000"
        assert made.host.pid not in (serving, spare)

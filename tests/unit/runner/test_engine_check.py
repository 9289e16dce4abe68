"""The check of an engine: the simulated one passes it, and one that leaves something out does not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from runner import EngineHost, InlineHost, ProcessHost
from runner.engine import EngineFailure, EngineGroup, GenerationRequest
from runner.engines.ring import Ring
from runner.engines.simulated import MARK, SimulatedConfig, simulated_spec
from runner.messages import ModelSpec
from runner.testing import EngineMisbehaves, check_engine

pytestmark = pytest.mark.anyio

MODEL = ModelSpec(model_id="toy", total_layers=3)
QUICK = SimulatedConfig(connect_seconds=0, layer_seconds=0, warmup_seconds=0, token_seconds=0)


async def test_the_simulated_engine_does_what_every_engine_must() -> None:
    text = await check_engine(lambda rank: ProcessHost(simulated_spec(QUICK), rank=rank), MODEL, deadline=4.0)
    assert text[0] == MARK


RINGS: list[Ring] = []


@pytest.fixture(autouse=True)
async def rings_are_left() -> AsyncIterator[None]:
    """An engine that is killed in this process is not asked to close."""
    yield
    while RINGS:
        await RINGS.pop().close()


class Honest:
    """Does all that is asked for; the others below leave one thing out."""

    def __init__(self) -> None:
        self._ring = Ring()
        RINGS.append(self._ring)
        self._alone = True
        self._connected = False
        self._rank = 0

    async def prepare(self, rank: int, world_size: int) -> str | None:
        self._rank, self._alone = rank, world_size == 1
        return self._ring.bind()

    async def connect(self, group: EngineGroup) -> None:
        await self._ring.join(group)
        self._connected = True

    async def load(self, model: ModelSpec) -> AsyncIterator[int]:
        if not self._alone and not self._connected:
            raise EngineFailure("connect first")
        for layers in range(1, model.total_layers + 1):
            yield layers

    async def warm_up(self) -> None: ...

    async def generate(self, request: GenerationRequest) -> AsyncIterator[str]:
        if self._rank == 0:
            yield "word"

    async def close(self) -> None:
        await self._ring.close()


class WithoutToken(Honest):
    async def connect(self, group: EngineGroup) -> None:
        self._connected = True


class OneEndpoint(Honest):
    async def prepare(self, rank: int, world_size: int) -> str | None:
        await super().prepare(rank, world_size)
        return ":5000"


class LoadsAlone(Honest):
    async def load(self, model: ModelSpec) -> AsyncIterator[int]:
        self._connected = True
        async for layers in super().load(model):
            yield layers


class StopsShort(Honest):
    async def load(self, model: ModelSpec) -> AsyncIterator[int]:
        async for layers in super().load(model):
            if layers < model.total_layers:
                yield layers


class AllSpeak(Honest):
    async def generate(self, request: GenerationRequest) -> AsyncIterator[str]:
        yield "word"


class Gives(Honest):
    async def connect(self, group: EngineGroup) -> None:
        try:
            await super().connect(group)
        except EngineFailure as failure:
            raise EngineFailure(str(failure), permanent=True) from failure


def inline(engine: type[Honest]) -> Callable[[int], EngineHost]:
    return lambda rank: InlineHost(engine, rank=rank)


async def test_an_engine_that_leaves_nothing_out_passes() -> None:
    assert await check_engine(inline(Honest), MODEL, world_size=3, deadline=1.0) == ["word"]


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [
        (WithoutToken, r"connect succeeded on ranks \[0, 1\], though rank 1 was in another attempt"),
        (OneEndpoint, "prepare returned the endpoint :5000 twice"),
        (LoadsAlone, "load without connect was taken by one of 2 ranks"),
        (StopsShort, r"load of rank 0 said \[1, 2\]; the counts must rise to total_layers, which is 3"),
        (AllSpeak, r"ranks \[1\] yielded text; only rank 0 does"),
        (Gives, "calls it permanent that it met another attempt"),
    ],
)
async def test_an_engine_that_leaves_one_thing_out_is_named_for_it(engine: type[Honest], sentence: str) -> None:
    with pytest.raises(EngineMisbehaves, match=sentence):
        await check_engine(inline(engine), MODEL, deadline=1.0)


async def test_one_rank_is_nothing_to_check() -> None:
    with pytest.raises(ValueError, match="world_size is 1; the check needs 2 ranks or more"):
        await check_engine(inline(Honest), MODEL, world_size=1)

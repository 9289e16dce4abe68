"""What the MLX engine decides without MLX: its configuration, its ports, whom it lets into its ring, and what it says where MLX is missing.

These are quick tests and need no MLX, so `make test` runs them too. Where MLX is asked for something, a stand-in answers.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing, asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import pytest

from runner.engine import EngineFailure, EngineGroup
from runner.engines import mlx as engines
from runner.engines.mlx import MlxConfig, MlxEngine, listening_address, mlx_engine, ring_addresses, scaled_progress
from runner.messages import ModelSpec

pytestmark = pytest.mark.anyio

Gather: TypeAlias = Callable[[list[int]], list[int]]


def group(*endpoints: str, rank: int = 0, epoch: str = "7-abc", instance: str = "tiny") -> EngineGroup:
    return EngineGroup(instance, epoch, rank, endpoints, 5.0)


def _array(values: list[int], dtype: str) -> list[int]:
    return values


def _ignore(_: object) -> None:
    pass


class StandIn:
    """MLX as far as these tests go: the ring is there at once, and `gather` says what comes round it."""

    def __init__(self) -> None:
        self.gather: Gather = lambda mine: mine * 2
        self.own = 0
        self.memory = 0
        self.loading: Callable[[], None] = lambda: None
        self.core: Any = ModuleType("mlx.core")
        self.core.uint8 = "uint8"
        self.core.cpu = "cpu"
        self.core.distributed = self
        self.core.array = _array
        self.core.get_active_memory = lambda: self.memory
        self.core.clear_cache = lambda: None
        self.core.eval = _ignore
        self.lm: Any = ModuleType("mlx_lm")
        self.lm.load = self._load

    def init(self, **_: object) -> StandIn:
        return self

    def rank(self) -> int:
        return self.own

    def size(self) -> int:
        return 2

    def all_gather(self, values: list[int], *, group: StandIn, stream: str) -> Any:
        answer: Any = ModuleType("array")
        answer.tolist = lambda: self.gather(values)
        return answer

    def _load(self, name: str, *, lazy: bool) -> tuple[Any, None]:
        self.loading()
        model: Any = ModuleType("model")
        layer: Any = ModuleType("layer")
        layer.parameters = model.parameters = lambda: None
        model.layers = [layer, layer]
        model.shard = _ignore
        layer.named_modules = list
        return model, None


@pytest.fixture
def mlx(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "mlx.core", stand_in.core)
    monkeypatch.setitem(sys.modules, "mlx_lm", stand_in.lm)
    monkeypatch.setattr(engines, "_HEAD_START_SECONDS", 0.0)
    return stand_in


@asynccontextmanager
async def engine(config: MlxConfig | None = None) -> AsyncGenerator[MlxEngine]:
    made = MlxEngine(config)
    try:
        yield made
    finally:
        await made.close()


async def connected_as(made: MlxEngine, mlx: StandIn, rank: int = 0, **named: str) -> None:
    """Prepare and connect one rank of two, as a runner does."""
    endpoint = await made.prepare(rank, 2)
    endpoints = ["127.0.0.1:1", "127.0.0.1:1"]
    endpoints[rank] = f"127.0.0.1{endpoint}"
    mlx.own = rank
    await made.connect(group(*endpoints, rank=rank, **named))


# --- configuration and addresses --------------------------------------------------------------------------------------


def test_the_ring_is_at_the_endpoints_of_the_attempt() -> None:
    assert ring_addresses(group("a:6000", "10.0.0.2:7001")) == ["a:6000", "10.0.0.2:7001"]


@pytest.mark.parametrize(
    ("endpoints", "sentence"),
    [(("a:1", ""), "rank 1 has no endpoint"), (("[fe80::1]:6000", "b:1"), r"rank 0 has the endpoint \[fe80::1\]:6000")],
)
def test_endpoints_that_cannot_work_are_refused_for_good(endpoints: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(EngineFailure, match=sentence) as refused:
        ring_addresses(group(*endpoints))
    assert refused.value.permanent
    assert "--address" in str(refused.value)


def test_a_rank_listens_at_its_own_address_or_where_it_has_none_at_all_of_them() -> None:
    assert listening_address("127.0.0.1:6000") == "127.0.0.1:6000"
    for elsewhere in ("192.0.2.1:6000", "a-name-that-may-lead-to-loopback:6000", "localhost:6000"):
        assert listening_address(elsewhere) == "0.0.0.0:6000"


@pytest.mark.parametrize(
    "config", [{"modell": "x"}, {"ports": [80]}, {"ports": [7000, 6000]}, {"ports": [0, 70_000]}, {"model": ""}]
)
def test_a_wrong_configuration_is_refused_for_good(config: dict[str, Any]) -> None:
    with pytest.raises(
        EngineFailure, match=f"wrong configuration of an MLX engine(.|\n)*{next(iter(config))}"
    ) as refused:
        mlx_engine(config)
    assert refused.value.permanent


@pytest.mark.parametrize(("layers", "total"), [(4, 4), (1, 16), (32, 16), (7, 5), (61, 10_000)])
def test_progress_rises_and_ends_at_the_total(layers: int, total: int) -> None:
    reported = [scaled_progress(done, layers, total) for done in range(layers + 1)]
    assert reported == sorted(reported)
    assert (reported[0], reported[-1]) == (0, total)


# --- the port of an attempt -------------------------------------------------------------------------------------------


def may_bind(port: int, *options: int) -> bool:
    """Whether a program with these socket options may take the port now."""
    with socket.socket() as other:
        for option in options:
            other.setsockopt(socket.SOL_SOCKET, option, 1)
        try:
            other.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


REUSE = (socket.SO_REUSEADDR, socket.SO_REUSEPORT)


async def test_a_prepared_port_is_nobody_elses_and_another_one_in_every_attempt(mlx: StandIn) -> None:
    async with engine() as made:
        first = int((await made.prepare(0, 2) or "")[1:])
        assert not may_bind(first)
        assert not may_bind(first, *REUSE), "also not by a program that shares its ports, as another MLX does"
        second = int((await made.prepare(0, 2) or "")[1:])
        assert second != first
        assert may_bind(first), "what is left of an ended attempt finds nobody there"
    assert may_bind(second)


async def test_the_port_is_kept_until_mlx_has_bound_it(mlx: StandIn) -> None:
    async with engine() as made:
        port = 0

        def listen(**_: object) -> StandIn:
            seen.append(may_bind(port))
            with socket.socket() as ring:
                for option in REUSE:
                    ring.setsockopt(socket.SOL_SOCKET, option, 1)
                ring.bind(("127.0.0.1", port))
                ring.listen(0)
                return mlx

        seen: list[bool] = []
        mlx.init = listen
        mlx.gather = lambda mine: [*mine[:-1], 0, *mine[:-1], 1]
        port = int((await made.prepare(0, 2) or "")[1:])
        await made.connect(group(f"127.0.0.1:{port}", "127.0.0.1:1"))
        assert seen == [False], "no other program could take it, while MLX could"
        assert may_bind(port, *REUSE), "and the engine has given it up to MLX, which has closed it"


async def test_ports_come_from_the_range_and_one_that_is_taken_is_passed_over(mlx: StandIn) -> None:
    with ExitStack() as stack:
        taken = stack.enter_context(socket.socket())
        taken.bind(("", 0))
        port = int(taken.getsockname()[1])
        async with engine(MlxConfig(ports=(port, port))) as made:
            with pytest.raises(EngineFailure, match=f"no port from {port} to {port} is free") as full:
                await made.prepare(0, 2)
            assert not full.value.permanent
            taken.close()
            assert await made.prepare(0, 2) == f":{port}", "the next attempt finds it free"


async def test_a_rank_alone_needs_no_port_and_no_ring(mlx: StandIn) -> None:
    async with engine() as made:
        assert await made.prepare(0, 1) is None
        await made.connect(group(""))
        assert [layers async for layers in made.load(ModelSpec(model_id="x", total_layers=2))] == [1, 2]


async def test_an_engine_that_nobody_told_whether_it_is_alone_loads_nothing(mlx: StandIn) -> None:
    async with engine() as made:
        with pytest.raises(
            EngineFailure, match="load is out of order: prepare has not been done, and only prepare says whether"
        ):
            _ = [layers async for layers in made.load(ModelSpec(model_id="x", total_layers=2))]
        for endpoints in (("",), ("127.0.0.1:1", "127.0.0.1:2")):
            with pytest.raises(EngineFailure, match="connect is out of order: prepare has bound no port"):
                await made.connect(group(*endpoints))


async def test_an_engine_is_not_connected_as_another_one_than_it_was_prepared(mlx: StandIn) -> None:
    """As one that is alone it would load half a model by itself."""
    async with engine() as made:
        endpoint = f"127.0.0.1{await made.prepare(0, 2)}"
        for rank, endpoints in ((0, (endpoint,)), (1, ("127.0.0.1:1", endpoint)), (0, (endpoint, "b:1", "c:1"))):
            with pytest.raises(
                EngineFailure, match=f"names rank {rank} of {len(endpoints)}, and prepare named rank 0 of 2"
            ):
                await made.connect(group(*endpoints, rank=rank))
        with pytest.raises(EngineFailure, match="connect has not been done, and this is one of 2 ranks"):
            _ = [layers async for layers in made.load(ModelSpec(model_id="x", total_layers=2))]


# --- who is in the ring -----------------------------------------------------------------------------------------------


async def test_a_ring_of_the_same_attempt_is_entered(mlx: StandIn) -> None:
    mlx.gather = lambda mine: [*mine[:-1], 0, *mine[:-1], 1]
    for rank in (0, 1):
        async with engine() as made:
            await connected_as(made, mlx, rank)
            assert [layers async for layers in made.load(ModelSpec(model_id="x", total_layers=2))] == [1, 2]


def placed(*tokens: tuple[list[int], int]) -> list[int]:
    """What comes round a ring: each rank's token and place."""
    return [byte for token, place in tokens for byte in (*token, 0, 0, 0, place)]


OWN = list(group("").token)
BEFORE = list(group("", epoch="6-abc").token)
OTHER = list(group("", instance="other").token)


@pytest.mark.parametrize(
    ("comes", "sentence"),
    [
        (placed((OWN, 0), (BEFORE, 1)), "where ranks 1 should be"),
        (placed((OWN, 0), (OTHER, 1)), "where ranks 1 should be"),
        (placed((OWN, 0), (OWN, 0)), "in each other's places, where ranks 1 should be"),
        (placed((OWN, 0)), "where ranks 1 should be"),
        (placed((OWN, 0), (OWN, 1), (OWN, 2)), "engines of another attempt"),
    ],
    ids=["an attempt before", "another instance", "the wrong place", "a smaller ring", "a larger ring"],
)
async def test_a_ring_with_a_stranger_in_it_fails_the_attempt_and_loads_nothing(
    mlx: StandIn, comes: list[int], sentence: str
) -> None:
    mlx.gather = lambda mine: comes
    async with engine() as made:
        with pytest.raises(EngineFailure, match=sentence) as met:
            await connected_as(made, mlx)
        assert not met.value.permanent
        assert "7-abc of tiny" in str(met.value)
        with pytest.raises(EngineFailure, match="connect has not been done"):
            await anext(made.load(ModelSpec(model_id="x")))


async def test_a_neighbour_that_is_lost_in_the_first_collective_is_no_permanent_failure(mlx: StandIn) -> None:
    def lost(mine: list[int]) -> list[int]:
        raise RuntimeError("[ring] connection to a peer was lost")

    mlx.gather = lost
    async with engine() as made:
        with pytest.raises(EngineFailure, match="rank 0 lost a neighbour") as met:
            await connected_as(made, mlx)
        assert not met.value.permanent


async def test_connect_takes_only_the_port_that_this_engine_has_bound(mlx: StandIn) -> None:
    async with engine() as made:
        with pytest.raises(EngineFailure, match="prepare has bound no port"):
            await made.connect(group("127.0.0.1:1", "127.0.0.1:2"))
        await made.prepare(0, 2)
        with pytest.raises(EngineFailure, match="connect names the port 1 for rank 0"):
            await made.connect(group("127.0.0.1:1", "127.0.0.1:2"))


async def test_one_of_several_ranks_never_loads_alone(mlx: StandIn) -> None:
    async with engine() as made:
        with pytest.raises(EngineFailure, match="load is out of order: prepare has not been done"):
            await anext(made.load(ModelSpec(model_id="x")))
        await made.prepare(1, 2)
        with pytest.raises(
            EngineFailure, match="load is out of order: connect has not been done, and this is one of 2"
        ) as alone:
            await anext(made.load(ModelSpec(model_id="x")))
        assert not alone.value.permanent


# --- a load that moves ------------------------------------------------------------------------------------------------


def waits_for(event: threading.Event) -> Callable[[], None]:
    def wait() -> None:
        assert event.wait(60)

    return wait


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    constants: Any = ModuleType("huggingface_hub.constants")
    constants.HF_HUB_CACHE = str(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub.constants", constants)
    monkeypatch.setattr(engines, "_LOOK_SECONDS", 0.005)
    folder = tmp_path / "models--someone--large" / "blobs"
    folder.mkdir(parents=True)
    return folder


async def test_a_download_that_grows_says_so_and_one_that_stands_still_does_not(mlx: StandIn, hub: Path) -> None:
    looks, go_on = [0], threading.Event()
    footprint = engines._Share.footprint  # pyright: ignore[reportPrivateUsage]

    def counted(share: Any, name: str) -> tuple[int, ...]:
        looks[0] += 1
        return footprint(share, name)

    mlx.loading = waits_for(go_on)
    async with engine() as made:
        await made.prepare(0, 1)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(engines._Share, "footprint", counted)  # pyright: ignore[reportPrivateUsage]
            async with aclosing(made.load(ModelSpec(model_id="someone/large", total_layers=2))) as layers:
                for _ in range(3):
                    following = asyncio.ensure_future(anext(layers))
                    at = looks[0]
                    while looks[0] < at + 5:
                        await asyncio.sleep(0)
                    assert not following.done(), "nothing has moved"
                    with (hub / "x.incomplete").open("ab") as file:
                        file.write(b"x" * 10)
                    assert await following == 0
                following = asyncio.ensure_future(anext(layers))
                at = looks[0]
                while looks[0] < at + 5:
                    await asyncio.sleep(0)
                mlx.memory += 1_000_000  # a large layer comes into memory
                assert await following == 0
                go_on.set()
                assert [one async for one in layers] == [1, 2]


async def test_a_load_that_is_left_while_it_stands_still_leaves_nothing_behind(mlx: StandIn, hub: Path) -> None:
    go_on = threading.Event()
    mlx.loading = waits_for(go_on)
    async with engine() as made:
        await made.prepare(0, 1)
        loading = asyncio.ensure_future(anext(made.load(ModelSpec(model_id="someone/large"))))
        await asyncio.sleep(0)
        loading.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await loading


# --- without MLX ------------------------------------------------------------------------------------------------------


async def test_without_mlx_it_says_what_to_install_before_it_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx.core", None)  # as if it were not installed, wherever this runs
    async with engine() as made:
        with pytest.raises(EngineFailure, match=r"pip install 'rankgate\[mlx\]'") as missing:
            await made.prepare(0, 2)
        assert missing.value.permanent


async def test_a_closed_engine_refuses_and_closes_again() -> None:
    made = MlxEngine()
    await made.close()
    await made.close()
    for call in (made.warm_up(), made.prepare(0, 2), made.connect(group("a:1", "b:1"))):
        with pytest.raises(EngineFailure, match="the engine is closed"):
            await call

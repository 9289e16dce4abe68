"""What the MLX engine decides without MLX: its configuration, where the ring's ranks listen, and what it says where MLX is missing.

These are quick tests and need no MLX, so `make test` runs them too.
"""

from __future__ import annotations

import sys

import pytest

from runner.engine import EngineFailure, EngineGroup
from runner.engines.mlx import DEFAULT_PORT_BASE, MlxConfig, MlxEngine, mlx_engine, ring_addresses, scaled_progress
from runner.messages import ModelSpec

pytestmark = pytest.mark.anyio


def group(*nodes: str, coordinator: str = "") -> EngineGroup:
    return EngineGroup(0, len(nodes), coordinator, nodes)


def test_ranks_listen_at_their_nodes_from_the_port_base_on() -> None:
    assert ring_addresses(MlxConfig(port_base=6000), group("a", "b", "c", coordinator="a")) == [
        "a:6000",
        "b:6001",
        "c:6002",
    ]
    assert ring_addresses(MlxConfig(), group("a", "a")) == [f"a:{DEFAULT_PORT_BASE}", f"a:{DEFAULT_PORT_BASE + 1}"]


def test_rank_0_listens_at_the_coordinator() -> None:
    assert ring_addresses(MlxConfig(port_base=6000), group("a", "b", coordinator="10.0.0.1:7000")) == [
        "10.0.0.1:7000",
        "b:6001",
    ]


def test_the_configured_hosts_come_before_what_the_ranks_report() -> None:
    config = MlxConfig(hosts=("10.0.0.1", "10.0.0.2:7000"), port_base=6000)
    assert ring_addresses(config, group("a", "b", coordinator="a:5")) == ["10.0.0.1:6000", "10.0.0.2:7000"]


@pytest.mark.parametrize(
    ("config", "nodes", "sentence"),
    [
        (MlxConfig(hosts=("a",)), ("a", "b"), "hosts names 1 addresses for 2 ranks"),
        (MlxConfig(hosts=("a:7000", "a:7000")), ("a", "b"), "ranks 0 and 1 would both listen at a:7000"),
        (MlxConfig(port_base=65_535), ("a", "b"), "rank 1 would listen on port 65536 of b"),
        (MlxConfig(hosts=("a:0", "b")), ("a", "b"), "rank 0 would listen on port 0 of a"),
        (MlxConfig(hosts=("a:http", "b")), ("a", "b"), "rank 0 would listen on port http of a"),
        (MlxConfig(), ("a", "fe80::1"), "rank 1 has the address 'fe80::1'"),
        (MlxConfig(), ("a", ""), "rank 1 has the address ''"),
    ],
)
def test_addresses_that_cannot_work_are_refused_for_good(
    config: MlxConfig, nodes: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(EngineFailure, match=sentence) as refused:
        ring_addresses(config, group(*nodes))
    assert refused.value.permanent


@pytest.mark.parametrize(
    "config", [{"modell": "x"}, {"port_base": 80}, {"port_base": "41500"}, {"model": ""}, {"hosts": "a"}]
)
def test_a_wrong_configuration_is_refused_for_good(config: dict[str, str | int]) -> None:
    with pytest.raises(
        EngineFailure, match=f"wrong configuration of an MLX engine(.|\n)*{next(iter(config))}"
    ) as refused:
        mlx_engine({**config})
    assert refused.value.permanent


@pytest.mark.parametrize(("layers", "total"), [(4, 4), (1, 16), (32, 16), (7, 5), (61, 10_000)])
def test_progress_rises_and_ends_at_the_total(layers: int, total: int) -> None:
    reported = [scaled_progress(done, layers, total) for done in range(layers + 1)]
    assert reported == sorted(reported)
    assert (reported[0], reported[-1]) == (0, total)


async def test_without_mlx_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx.core", None)  # as if it were not installed, wherever this runs
    engine = MlxEngine()
    try:
        with pytest.raises(EngineFailure, match=r"pip install 'rankgate\[mlx\]'") as missing:
            async for _ in engine.load(ModelSpec(model_id="anything")):
                pass
        assert missing.value.permanent
    finally:
        await engine.close()


async def test_a_closed_engine_refuses_and_closes_again() -> None:
    engine = MlxEngine()
    await engine.close()
    await engine.close()
    with pytest.raises(EngineFailure, match="the engine is closed"):
        await engine.warm_up()

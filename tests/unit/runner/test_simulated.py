"""The simulated engine: deterministic, honest, strict about order, and wrong exactly when told to be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger
from pydantic import ValidationError

from runner.engine import EngineDied, EngineFailure, EngineGroup, GenerationRequest
from runner.engines.simulated import (
    MARK,
    FaultLedger,
    SimulatedConfig,
    SimulatedEngine,
    SimulatedFault,
    simulated_engine_in_own_process,
    simulated_spec,
    simulated_text,
)
from runner.messages import ModelSpec

pytestmark = pytest.mark.anyio

MODEL = ModelSpec(model_id="toy", total_layers=5)
REQUEST = GenerationRequest(task_id="t1", prompt="Tell me about owls.", max_tokens=20)


class Sleeps:
    """Takes note of every wait instead of waiting."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)

    def since(self, start: int) -> list[float]:
        return self.seconds[start:]


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(str(message)), level=0, format="{level}|{message}")
    yield lines
    logger.remove(sink)


def group(rank: int, world_size: int) -> EngineGroup:
    return EngineGroup("demo", f"7-{'a' * 32}", rank, tuple(f"node-{r}:5000" for r in range(world_size)), 60.0)


def engine(
    *faults: SimulatedFault,
    rank: int = 0,
    world_size: int = 2,
    sleeps: Sleeps | None = None,
    ledger: FaultLedger | None = None,
    reports: list[str] | None = None,
    **config: Any,
) -> SimulatedEngine:
    told = [] if reports is None else reports
    return SimulatedEngine(
        SimulatedConfig(faults=faults, **config),
        rank=rank,
        world_size=world_size,
        sleep=sleeps or Sleeps(),
        ledger=ledger,
        report=told.append,
    )


async def collect(stream: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in stream]


async def ready(one: SimulatedEngine, rank: int = 0, world_size: int = 2) -> SimulatedEngine:
    await one.connect(group(rank, world_size))
    await collect(one.load(MODEL))
    await one.warm_up()
    return one


# --- whether it is alone --------------------------------------------------------------------------------------------------


async def test_an_engine_that_nobody_told_whether_it_is_alone_loads_nothing() -> None:
    """It was made without a rank and a size, and never prepared."""
    one = SimulatedEngine(SimulatedConfig(), sleep=Sleeps())
    with pytest.raises(
        EngineFailure, match="load is out of order: prepare has not been done, and only prepare says whether"
    ) as caught:
        await collect(one.load(MODEL))
    assert not caught.value.permanent
    await one.prepare(0, 1)
    assert await collect(one.load(MODEL)) == list(range(1, MODEL.total_layers + 1)), "now it knows that it is"


@pytest.mark.parametrize("told", ["made", "connected"])
async def test_an_engine_that_was_told_otherwise_that_it_is_alone_loads(told: str) -> None:
    one = engine(rank=0, world_size=1) if told == "made" else SimulatedEngine(SimulatedConfig(), sleep=Sleeps())
    if told == "connected":
        await one.connect(group(0, 1))
    assert await collect(one.load(MODEL)) == list(range(1, MODEL.total_layers + 1))


@pytest.mark.parametrize("other", [(0, 1), (1, 2), (0, 3)])
async def test_an_engine_is_not_connected_as_another_one_than_it_was_prepared(other: tuple[int, int]) -> None:
    """As one that is alone it would load half a model by itself."""
    one = SimulatedEngine(SimulatedConfig(), sleep=Sleeps())
    await one.prepare(0, 2)
    with pytest.raises(EngineFailure, match=f"on rank 0 of 2: it names rank {other[0]} of {other[1]}") as caught:
        await one.connect(group(*other))
    assert not caught.value.permanent
    with pytest.raises(EngineFailure, match="connect has not been done"):
        await collect(one.load(MODEL))
    await one.prepare(*other)  # in the next attempt it may be another one
    await one.connect(group(*other))


# --- text -----------------------------------------------------------------------------------------------------------------


def test_the_text_says_that_it_is_simulated_and_is_the_same_on_every_machine() -> None:
    pieces = simulated_text(0, "toy", "Tell me about owls.", 6)
    assert "".join(pieces) == "[simulated text] ember candle linen linen maple"


@pytest.mark.parametrize(
    "other",
    [(1, "toy", "hello", 40), (0, "other", "hello", 40), (0, "toy", "hello!", 40), (0, "toy", "hello", 41)],
    ids=["seed", "model", "prompt", "max_tokens"],
)
def test_seed_model_prompt_and_max_tokens_each_change_the_text(other: tuple[int, str, str, int]) -> None:
    assert simulated_text(0, "toy", "hello", 40) == simulated_text(0, "toy", "hello", 40)
    assert simulated_text(*other) != simulated_text(0, "toy", "hello", 40)


@given(seed=st.integers(), prompt=st.text(), max_tokens=st.integers(1, 200))
def test_any_text_is_marked_never_empty_and_no_longer_than_asked_for(seed: int, prompt: str, max_tokens: int) -> None:
    pieces = simulated_text(seed, "toy", prompt, max_tokens)
    assert pieces[0] == MARK
    assert min(12, max_tokens) <= len(pieces) <= min(48, max_tokens)
    assert all(piece.startswith(" ") and len(piece) > 1 for piece in pieces[1:])


def test_a_prompt_that_is_no_valid_unicode_still_gets_its_text() -> None:
    assert simulated_text(0, "toy", "half a pair: \ud83d", 3)[0] == MARK


async def test_only_rank_0_yields_and_the_others_take_exactly_the_same_time() -> None:
    spent: list[list[float]] = []
    texts: list[list[str]] = []
    for rank in range(3):
        sleeps = Sleeps()
        one = await ready(engine(rank=rank, world_size=3, sleeps=sleeps, seed=7), rank, 3)
        start = len(sleeps.seconds)
        texts.append(await collect(one.generate(REQUEST)))
        spent.append(sleeps.since(start))
    assert texts == [simulated_text(7, "toy", REQUEST.prompt, REQUEST.max_tokens), [], []]
    assert spent[0] == spent[1] == spent[2]
    assert len(spent[0]) == len(texts[0])


# --- time -----------------------------------------------------------------------------------------------------------------


async def test_loading_yields_every_layer_once_in_order() -> None:
    one = engine()
    await one.connect(group(0, 2))
    assert await collect(one.load(MODEL)) == [1, 2, 3, 4, 5]


async def test_without_jitter_every_delay_is_its_mean() -> None:
    sleeps = Sleeps()
    one = engine(
        sleeps=sleeps,
        jitter=0.0,
        connect_seconds=1.0,
        layer_seconds=2.0,
        warmup_seconds=3.0,
        token_seconds=4.0,
    )
    await ready(one)
    assert sleeps.seconds == [1.0, *[2.0] * 5, 3.0]
    text = await collect(one.generate(REQUEST))
    assert sleeps.since(7) == [4.0] * len(text)


async def test_delays_stay_within_the_jitter_and_are_fixed_by_seed_and_rank() -> None:
    async def delays(seed: int, rank: int) -> list[float]:
        sleeps = Sleeps()
        await ready(engine(rank=rank, sleeps=sleeps, seed=seed, jitter=0.5), rank)
        return sleeps.seconds

    first = await delays(3, 0)
    assert await delays(3, 0) == first
    assert await delays(3, 1) != first
    assert await delays(4, 0) != first
    layers = first[1:6]
    assert len(set(layers)) == 5
    assert all(0.025 <= seconds <= 0.075 for seconds in layers)


# --- order ----------------------------------------------------------------------------------------------------------------


async def test_load_before_connect_is_refused_as_a_collective_would_crash() -> None:
    with pytest.raises(EngineFailure, match=r"load is out of order on rank 1 of 2: connect has not been done"):
        await collect(engine(rank=1).load(MODEL))


async def test_one_rank_alone_needs_no_connect() -> None:
    one = engine(world_size=1)
    assert await collect(one.load(MODEL)) == [1, 2, 3, 4, 5]
    await one.warm_up()
    assert (await collect(one.generate(REQUEST)))[0] == MARK


async def test_every_other_call_out_of_order_is_refused_too() -> None:
    one = engine()
    with pytest.raises(EngineFailure, match="no model is loaded"):
        await one.warm_up()
    with pytest.raises(EngineFailure, match="warm_up has not been done"):
        await collect(one.generate(REQUEST))
    await one.connect(group(0, 2))
    with pytest.raises(EngineFailure, match="in a group already"):
        await one.connect(group(0, 2))
    await collect(one.load(MODEL))
    with pytest.raises(EngineFailure, match="toy is loaded already"):
        await collect(one.load(MODEL))
    with pytest.raises(EngineFailure, match="warm_up has not been done"):
        await collect(one.generate(REQUEST))


async def test_a_load_that_was_left_halfway_loaded_nothing() -> None:
    one = engine()
    await one.connect(group(0, 2))
    stream = one.load(MODEL)
    assert await anext(stream) == 1
    await stream.aclose()
    with pytest.raises(EngineFailure, match="no model is loaded"):
        await one.warm_up()


async def test_closing_twice_is_fine_and_every_later_call_fails() -> None:
    one = await ready(engine())
    await one.close()
    await one.close()
    for call in (
        lambda: one.connect(group(0, 2)),
        lambda: collect(one.load(MODEL)),
        one.warm_up,
        lambda: collect(one.generate(REQUEST)),
    ):
        with pytest.raises(EngineFailure, match="the engine is closed"):
            await call()


@pytest.mark.parametrize("wrong", [group(0, 2), group(1, 3)], ids=["another rank", "another size"])
async def test_a_group_in_which_the_engine_is_someone_else_is_refused_for_good(wrong: EngineGroup) -> None:
    with pytest.raises(EngineFailure, match=r"but this simulated engine was made as rank 1 of 2") as caught:
        await engine(rank=1).connect(wrong)
    assert caught.value.permanent


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_its_world_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} does not exist in a world of {world_size}"):
        engine(rank=rank, world_size=world_size)


# --- faults ---------------------------------------------------------------------------------------------------------------


async def reach(phase: str, one: SimulatedEngine) -> None:
    """Run the engine up to and including a phase."""
    await one.connect(group(0, 2))
    if phase == "connect":
        return
    await collect(one.load(MODEL))
    if phase == "load":
        return
    await one.warm_up()
    if phase == "generate":
        await collect(one.generate(REQUEST))


PHASES = ("connect", "load", "warmup", "generate")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    ("action", "permanent", "kind"),
    [("refuse", True, EngineFailure), ("raise", False, EngineFailure), ("die", False, EngineDied)],
)
async def test_a_fault_strikes_in_its_phase_and_says_so(
    phase: Any, action: Any, permanent: bool, kind: type[EngineFailure]
) -> None:
    reports: list[str] = []
    fault = SimulatedFault(phase=phase, action=action)
    one = engine(fault, reports=reports)
    for earlier in PHASES[: PHASES.index(phase)]:
        await reach(earlier, engine(fault))  # nothing strikes before its phase
    with pytest.raises(EngineFailure, match=rf"simulated fault 0 \({action} in {phase}") as caught:
        await reach(phase, one)
    assert type(caught.value) is kind
    assert caught.value.permanent is permanent
    assert len(reports) == 1
    assert reports[0].endswith("strike 1) on rank 0")


@pytest.mark.parametrize("phase", PHASES)
async def test_a_hanging_engine_can_be_cancelled(phase: Any) -> None:
    struck = asyncio.Event()
    one = SimulatedEngine(
        SimulatedConfig(faults=(SimulatedFault(phase=phase, action="hang"),)),
        rank=0,
        world_size=2,
        sleep=Sleeps(),
        report=lambda _: struck.set(),
    )
    hanging = asyncio.create_task(reach(phase, one))
    await struck.wait()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not hanging.done()
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging


async def test_a_load_fault_strikes_after_the_layers_that_it_names() -> None:
    one = engine(SimulatedFault(phase="load", action="raise", after_layers=3))
    await one.connect(group(0, 2))
    layers = one.load(MODEL)
    assert [await anext(layers) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(EngineFailure, match="after 3 layers"):
        await anext(layers)


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_fault_strikes_the_rank_that_it_names_only(rank: int) -> None:
    reports: list[str] = []
    one = engine(SimulatedFault(phase="connect", action="refuse", rank=1), rank=rank, reports=reports)
    if rank == 1:
        with pytest.raises(EngineFailure, match="on rank 1"):
            await one.connect(group(1, 2))
    else:
        await one.connect(group(0, 2))
    assert len(reports) == rank


def in_memory(_: Path) -> Callable[[], FaultLedger]:
    shared = FaultLedger()
    return lambda: shared


def in_a_file(folder: Path) -> Callable[[], FaultLedger]:
    return lambda: FaultLedger(folder / "strikes")


@pytest.mark.parametrize("kind", [in_memory, in_a_file])
async def test_times_are_counted_across_engines_for_each_rank(
    kind: Callable[[Path], Callable[[], FaultLedger]], tmp_path: Path
) -> None:
    ledger = kind(tmp_path)
    fault = SimulatedFault(phase="connect", action="raise", times=2)
    outcomes: dict[int, list[bool]] = {0: [], 1: []}
    for _ in range(4):
        for rank in (0, 1):
            one = engine(fault, rank=rank, ledger=ledger())
            try:
                await one.connect(group(rank, 2))
            except EngineFailure:
                outcomes[rank].append(False)
            else:
                outcomes[rank].append(True)
    assert outcomes == {0: [False, False, True, True], 1: [False, False, True, True]}
    assert ledger().strikes() == {(0, 0): 2, (1, 0): 2}


async def test_a_spent_fault_makes_way_for_the_next_one() -> None:
    ledger = FaultLedger()
    faults = (
        SimulatedFault(phase="connect", action="raise", times=1),
        SimulatedFault(phase="connect", action="refuse"),
    )
    with pytest.raises(EngineFailure, match="fault 0"):
        await engine(*faults, ledger=ledger).connect(group(0, 2))
    with pytest.raises(EngineFailure, match=r"fault 1 \(refuse in connect, strike 1\)"):
        await engine(*faults, ledger=ledger).connect(group(0, 2))
    assert ledger.strikes() == {(0, 0): 1, (0, 1): 1}


async def test_the_configuration_can_name_the_ledger(tmp_path: Path) -> None:
    path = tmp_path / "strikes"
    fault = SimulatedFault(phase="connect", action="raise", times=1)
    with pytest.raises(EngineFailure, match="strike 1 of 1"):
        await engine(fault, fault_ledger=path).connect(group(0, 2))
    await engine(fault, fault_ledger=path).connect(group(0, 2))
    assert path.read_text(encoding="ascii") == "0 0\n"


async def test_a_strike_is_a_warning_in_the_log_by_default(log_lines: list[str]) -> None:
    config = SimulatedConfig(faults=(SimulatedFault(phase="connect", action="raise"),))
    with pytest.raises(EngineFailure):
        await SimulatedEngine(config, rank=0, world_size=2, sleep=Sleeps()).connect(group(0, 2))
    assert log_lines == ["WARNING|simulated fault 0 (raise in connect, strike 1) on rank 0\n"]


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (
            SimulatedFault(phase="load", action="raise", times=1),
            "times=1 needs a ledger that outlives the engine",
        ),
        (
            SimulatedFault(phase="load", action="raise", rank=2),
            "names rank 2, which does not exist in a world of 2",
        ),
        (SimulatedFault(phase="load", action="block"), "would block this process"),
    ],
)
def test_a_fault_that_cannot_do_what_it_says_is_refused_at_once(fault: SimulatedFault, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        engine(fault)


async def test_a_fault_beyond_the_last_layer_is_refused_instead_of_never_striking() -> None:
    one = engine(SimulatedFault(phase="load", action="raise", after_layers=6))
    await one.connect(group(0, 2))
    with pytest.raises(EngineFailure, match="after 6 layers, but the model has 5") as caught:
        await collect(one.load(MODEL))
    assert caught.value.permanent


# --- configuration ----------------------------------------------------------------------------------------------------------


def test_the_configuration_reads_json() -> None:
    config = SimulatedConfig.model_validate_json(
        '{"seed": 3, "layer_seconds": 1, "faults": [{"phase": "load", "action": "die", "rank": 1, "after_layers": 2}]}'
    )
    assert config.layer_seconds == 1.0
    assert config.faults == (SimulatedFault(phase="load", action="die", rank=1, after_layers=2),)


@pytest.mark.parametrize(
    "text",
    [
        '{"connect_seconds": -1}',
        '{"token_seconds": NaN}',
        '{"layer_seconds": Infinity}',
        '{"jitter": 1.5}',
        '{"sede": 1}',
        '{"faults": [{"phase": "load", "action": "explode"}]}',
        '{"faults": [{"phase": "loading", "action": "die"}]}',
        '{"faults": [{"phase": "load", "action": "die", "times": 0}]}',
        '{"faults": [{"phase": "load", "action": "die", "rank": -1}]}',
        '{"faults": [{"phase": "connect", "action": "die", "after_layers": 1}]}',
    ],
)
def test_a_wrong_configuration_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        SimulatedConfig.model_validate_json(text)


async def test_the_spec_makes_the_same_engine_again_in_another_process(tmp_path: Path) -> None:
    config = SimulatedConfig(
        seed=9,
        meet=False,
        connect_seconds=0.0,
        layer_seconds=0.0,
        warmup_seconds=0.0,
        token_seconds=0.0,
        faults=(SimulatedFault(phase="load", action="block", rank=1),),
        fault_ledger=tmp_path / "strikes",
    )
    spec = simulated_spec(config, rank=0, world_size=2)
    assert spec.factory == "runner.engines.simulated:simulated_engine_in_own_process"
    one = await ready(simulated_engine_in_own_process(spec.config))
    assert await collect(one.generate(REQUEST)) == simulated_text(9, "toy", REQUEST.prompt, 20)


def test_a_spec_for_an_impossible_engine_is_refused_before_any_process_starts() -> None:
    config = SimulatedConfig(faults=(SimulatedFault(phase="load", action="die", times=1),))
    with pytest.raises(ValueError, match="set fault_ledger to a file"):
        simulated_spec(config, rank=0, world_size=2)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"config": {}, "rank": "0", "world_size": 2},
        {"config": {"seed": "x"}, "rank": 0, "world_size": 2},
        {"config": {}, "rank": 2, "world_size": 2},
    ],
)
def test_a_wrong_spec_fails_for_good_in_the_child(config: dict[str, Any]) -> None:
    with pytest.raises(EngineFailure, match="wrong configuration of a simulated engine") as caught:
        simulated_engine_in_own_process(config)
    assert caught.value.permanent

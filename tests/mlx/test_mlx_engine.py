"""The MLX engine with a real model, each rank in a process of its own, as it runs in production."""

from __future__ import annotations

import asyncio
import math
import shutil
import socket
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path

import psutil
import pytest
from pydantic import JsonValue

from barrier.testing import wait_until
from runner.engine import EngineDied, EngineFailure, EngineGroup, GenerationRequest
from runner.engines.mlx import mlx_engine
from runner.host import EngineSpec, InlineHost, ProcessHost
from runner.messages import ModelSpec
from tests.mlx.tiny import LAYERS, make_model, reference_text

pytestmark = [pytest.mark.anyio, pytest.mark.mlx]

PROMPT = "word5 word9"
TOKENS = 24
PATIENCE = 60.0  # seconds: what a test does not try to outlast
FOR_LONG = 4_000  # tokens: more than any test waits for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def expected(folder: Path) -> str:
    """What mlx-lm itself says, in this process and without a second rank."""
    return reference_text(folder, PROMPT, TOKENS)


def spec(**config: JsonValue) -> EngineSpec:
    return EngineSpec(factory="runner.engines.mlx:mlx_engine", config=config)


def request(prompt: str = PROMPT, max_tokens: int = TOKENS) -> GenerationRequest:
    return GenerationRequest(task_id="t1", prompt=prompt, max_tokens=max_tokens)


def model(folder: Path, total_layers: int = LAYERS) -> ModelSpec:
    return ModelSpec(model_id=str(folder), total_layers=total_layers)


@asynccontextmanager
async def hosts(count: int = 1, **config: JsonValue) -> AsyncGenerator[list[ProcessHost]]:
    """So many engines, each in a process of its own; none is left behind."""
    async with AsyncExitStack() as stack:
        made = [ProcessHost(spec(**config), rank=rank, spare_after=math.inf) for rank in range(count)]
        for host in made:
            stack.push_async_callback(host.shut_down)
        yield made


@asynccontextmanager
async def inline(**config: JsonValue) -> AsyncGenerator[InlineHost]:
    """An engine in this process, which has imported MLX already."""
    host = InlineHost(lambda: mlx_engine(config))
    try:
        yield host
    finally:
        await host.close()


async def prepare(ranks: Sequence[ProcessHost]) -> list[str]:
    """All ranks are made ready for an attempt; where each of them waits."""
    prepared = await asyncio.gather(*(host.prepare(rank, len(ranks)) for rank, host in enumerate(ranks)))
    return [f"127.0.0.1{port}" for port in prepared]


def group(endpoints: Sequence[str], rank: int, *, epoch: str = "1-a", deadline: float = PATIENCE) -> EngineGroup:
    return EngineGroup("tiny", epoch, rank, tuple(endpoints), deadline)


async def connect(ranks: Sequence[ProcessHost], epoch: str = "1-a") -> None:
    """All ranks enter the ring together, as ConnectToGroup has them do."""
    endpoints = await prepare(ranks)
    await asyncio.gather(*(host.connect(group(endpoints, rank, epoch=epoch)) for rank, host in enumerate(ranks)))


async def load(host: ProcessHost | InlineHost, wanted: ModelSpec) -> list[int]:
    return [layers async for layers in host.load(wanted)]


async def load_alone(host: ProcessHost | InlineHost, wanted: ModelSpec) -> list[int]:
    await host.prepare(0, 1)
    return await load(host, wanted)


async def bring_up(ranks: Sequence[ProcessHost], folder: Path, epoch: str = "1-a") -> None:
    await connect(ranks, epoch)
    assert await asyncio.gather(*(load(host, model(folder)) for host in ranks)) == [[1, 2, 3, 4]] * len(ranks)
    await asyncio.gather(*(host.warm_up() for host in ranks))


async def text(host: ProcessHost | InlineHost, wanted: GenerationRequest | None = None) -> str:
    return "".join([piece async for piece in host.generate(wanted or request())])


async def text_of_all(ranks: Sequence[ProcessHost]) -> list[str]:
    return await asyncio.gather(*(text(host) for host in ranks))


async def follow(host: ProcessHost, pieces: list[str]) -> None:
    """Generate until cancelled."""
    async with aclosing(host.generate(request(max_tokens=FOR_LONG))) as stream:
        async for piece in stream:
            pieces.append(piece)  # noqa: PERF401 - what came before the cancellation is looked at


# --- one rank ---------------------------------------------------------------------------------------------------------


async def test_it_loads_layer_by_layer_and_says_what_mlx_lm_says(folder: Path, expected: str) -> None:
    async with hosts() as [host]:
        assert await load_alone(host, model(folder)) == [1, 2, 3, 4]
        await host.warm_up()
        assert await text(host) == expected
        assert len(expected.split()) == TOKENS
        assert await text(host) == expected, "nothing of a generation reaches the next one"
        pid = host.pid
        assert pid is not None
        await host.close()
        assert not psutil.pid_exists(pid)


async def test_text_comes_token_by_token(folder: Path, expected: str) -> None:
    async with hosts() as [host]:
        await load_alone(host, model(folder))
        await host.warm_up()
        pieces = [piece async for piece in host.generate(request())]
    assert "".join(pieces) == expected
    assert len(pieces) == TOKENS


async def test_another_number_of_layers_than_said_still_ends_at_what_was_said(folder: Path) -> None:
    for said, expected in ((10, [2, 5, 7, 10]), (2, [1, 2])):
        async with inline() as host:
            assert await load_alone(host, model(folder, total_layers=said)) == expected


async def test_the_configuration_may_name_another_place_for_the_model(folder: Path, expected: str) -> None:
    async with hosts(model=str(folder)) as [host]:
        assert await load_alone(host, ModelSpec(model_id="what-the-instance-calls-it", total_layers=LAYERS)) == [
            1,
            2,
            3,
            4,
        ]
        await host.warm_up()
        assert await text(host) == expected


async def test_the_models_chat_template_is_used_unless_it_is_switched_off(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "chat", chat_template=True)
    bare = reference_text(folder, PROMPT, TOKENS)
    in_template = reference_text(folder, f"word1 word2 {PROMPT} word3", TOKENS)
    assert bare != in_template
    for wanted, config in ((in_template, {}), (bare, {"use_chat_template": False})):
        async with inline(**config) as host:
            await load_alone(host, model(folder))
            await host.warm_up()
            assert await text(host) == wanted


async def test_an_empty_prompt_is_no_failure(folder: Path) -> None:
    async with hosts() as [host]:
        await load_alone(host, model(folder))
        await host.warm_up()
        assert await text(host, request(prompt=""))


async def test_a_cancelled_generation_stops_and_the_next_one_is_whole(folder: Path, expected: str) -> None:
    async with hosts() as [host]:
        await load_alone(host, model(folder))
        await host.warm_up()
        before = host.pid
        pieces: list[str] = []
        generating = asyncio.create_task(follow(host, pieces))
        await wait_until(lambda: len(pieces) >= 5, "five pieces of text", 60)
        generating.cancel()
        await asyncio.gather(generating, return_exceptions=True)
        assert generating.cancelled()
        assert len(pieces) < FOR_LONG
        assert await text(host) == expected
        assert host.pid == before, "the model stayed in memory"


async def test_killed_while_loading_it_is_gone_and_a_fresh_one_loads(folder: Path) -> None:
    async with hosts() as [host]:
        loading = asyncio.create_task(load_alone(host, model(folder)))
        await wait_until(lambda: host.pid is not None, "the engine's process", 60)
        pid = host.pid
        assert pid is not None
        assert not loading.done()
        await host.kill()
        with pytest.raises(EngineDied):
            await loading
        assert not psutil.pid_exists(pid)
        assert await load_alone(host, model(folder)) == [1, 2, 3, 4]


async def test_killed_while_it_enters_the_ring_it_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the folder of the ring's hosts was left whenever an attempt ended while its engines connected."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    async with hosts(2) as ranks:
        endpoints = await prepare(ranks)
        connecting = asyncio.create_task(ranks[0].connect(group(endpoints, 0)))  # rank 1 never comes
        assert ranks[0].pid is not None
        process = psutil.Process(ranks[0].pid)
        await wait_until(
            lambda: any(one.status == psutil.CONN_LISTEN for one in process.net_connections()), "the ring to listen", 60
        )
        await ranks[0].kill()
        with pytest.raises(EngineDied):
            await connecting
    assert list(tmp_path.iterdir()) == []


async def test_a_model_that_does_not_exist_is_a_permanent_failure(tmp_path: Path) -> None:
    async with hosts() as [host]:
        with pytest.raises(EngineFailure, match="there is no such model|there is no model directory") as failed:
            await load_alone(host, ModelSpec(model_id=str(tmp_path / "nowhere"), total_layers=LAYERS))
        assert failed.value.permanent
        assert "nowhere" in str(failed.value)
        assert host.pid is not None, "the engine outlives the refusal"


async def test_damaged_or_incomplete_models_are_permanent_failures_and_a_good_one_loads_after_them(
    folder: Path, tmp_path: Path
) -> None:
    def copy(name: str) -> Path:
        return shutil.copytree(folder, tmp_path / name)

    truncated, weightless, foreign, empty = copy("truncated"), copy("weightless"), copy("foreign"), tmp_path / "empty"
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    (weightless / "model.safetensors").unlink()
    config = foreign / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"of-the-future"'))
    empty.mkdir()
    async with hosts() as [host]:
        for broken in (truncated, weightless, foreign, empty):
            with pytest.raises(EngineFailure, match=f"the model {broken} could not be loaded") as failed:
                await load_alone(host, model(broken))
            assert failed.value.permanent, broken.name
        assert await load_alone(host, model(folder)) == [1, 2, 3, 4]


async def test_calls_out_of_order_are_refused_and_harm_nothing(folder: Path, expected: str) -> None:
    async with hosts() as [host]:
        with pytest.raises(EngineFailure, match="load is out of order: prepare"):
            await load(host, model(folder))
        await host.prepare(0, 1)
        await host.connect(group([""], 0))
        with pytest.raises(EngineFailure, match="warm_up is out of order"):
            await host.warm_up()
        assert await load(host, model(folder)) == [1, 2, 3, 4]
        with pytest.raises(EngineFailure, match="generate is out of order"):
            await text(host)
        with pytest.raises(EngineFailure, match="load is out of order"):
            await load(host, model(folder))
        await host.warm_up()
        assert await text(host) == expected


async def test_it_also_runs_inline(folder: Path, expected: str) -> None:
    async with inline() as host:
        assert await load_alone(host, model(folder)) == [1, 2, 3, 4]
        await host.warm_up()
        assert await text(host) == expected
        async with aclosing(host.generate(request(max_tokens=FOR_LONG))) as stream:
            assert await anext(stream)
        assert await text(host) == expected


# --- two ranks --------------------------------------------------------------------------------------------------------


async def test_two_ranks_share_a_model_and_rank_0_says_what_one_rank_says(folder: Path, expected: str) -> None:
    async with hosts(2) as ranks:
        await bring_up(ranks, folder)
        assert await text_of_all(ranks) == [expected, ""]
        assert await text_of_all(ranks) == [expected, ""]


async def test_two_ranks_stop_at_one_token_whoever_is_asked_first(folder: Path, expected: str) -> None:
    async with hosts(2) as ranks:
        await bring_up(ranks, folder)
        pids = [host.pid for host in ranks]
        for first in (0, 1):
            pieces: list[str] = []
            generating = [
                asyncio.create_task(follow(ranks[0], pieces)),
                asyncio.create_task(follow(ranks[1], [])),
            ]
            await wait_until(lambda seen=pieces: len(seen) >= 5, "five pieces of text", 60)
            generating[first].cancel()
            # The other one was not asked, and yet comes to an end: an ordinary one, since nobody cancelled it.
            await asyncio.gather(*generating, return_exceptions=True)
            assert [task.cancelled() for task in generating] == [rank == first for rank in (0, 1)]
            assert len(pieces) < FOR_LONG
            assert await text_of_all(ranks) == [expected, ""]
        assert [host.pid for host in ranks] == pids


async def test_two_ranks_stop_in_the_middle_of_a_prompt_that_would_outlast_the_hosts_patience(
    folder: Path, expected: str
) -> None:
    def working_seconds(host: ProcessHost) -> float:
        assert host.pid is not None
        return psutil.Process(host.pid).cpu_times().user

    prompt = " ".join(["word5"] * 20_000)  # a minute or more of reading on a processor
    async with hosts(2, prefill_step_size=64) as ranks:
        await bring_up(ranks, folder)
        pids = [host.pid for host in ranks]
        before = [working_seconds(host) for host in ranks]
        reading = [asyncio.create_task(text(host, request(prompt, max_tokens=1))) for host in ranks]
        await wait_until(
            lambda: all(working_seconds(host) > before[rank] + 0.5 for rank, host in enumerate(ranks)),
            "both ranks to be reading the prompt",
            60,
        )
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        assert all(task.cancelled() for task in reading)
        assert await text_of_all(ranks) == [expected, ""]
        assert [host.pid for host in ranks] == pids, "neither was killed for not stopping"


async def test_a_rank_that_dies_ends_the_generation_and_the_ring_is_formed_anew(folder: Path, expected: str) -> None:
    """The other rank may hear nothing of it: if MLX's ring loses a peer between two exchanges, the next one waits for ever. So its
    engine is killed, as its runner does when the attempt is ended."""
    async with hosts(2) as ranks:
        await bring_up(ranks, folder)
        pieces: list[str] = []
        generating = [
            asyncio.create_task(follow(ranks[0], pieces)),
            asyncio.create_task(follow(ranks[1], [])),
        ]
        await wait_until(lambda: len(pieces) >= 5, "five pieces of text", 60)
        assert ranks[1].pid is not None
        psutil.Process(ranks[1].pid).kill()
        async with asyncio.timeout(60):
            with pytest.raises(EngineDied):
                await generating[1]
            for host in ranks:
                await host.kill()
            with pytest.raises(EngineFailure):
                await generating[0]
        await bring_up(ranks, folder)
        assert await text_of_all(ranks) == [expected, ""]


async def test_heads_that_do_not_divide_evenly_are_refused_before_anything_wrong_is_said(folder: Path) -> None:
    async with hosts(4) as ranks:
        await connect(ranks)
        loading = await asyncio.gather(*(load(host, model(folder)) for host in ranks), return_exceptions=True)
    for failure in loading:
        assert isinstance(failure, EngineFailure)
        assert failure.permanent
        assert "n_kv_heads = 2" in str(failure)
        assert "4 ranks" in str(failure)


# --- whom a ring lets in ----------------------------------------------------------------------------------------------


async def failure_of(host: ProcessHost, wanted: EngineGroup) -> EngineFailure:
    """How connecting fails; it must, and within the group's deadline and what the host needs to end a process."""
    async with asyncio.timeout(wanted.deadline + 10):
        with pytest.raises(EngineFailure) as failed:
            await host.connect(wanted)
    assert not failed.value.permanent
    return failed.value


async def test_ranks_that_met_those_of_another_instance_all_say_so_and_the_next_attempt_serves(
    folder: Path, expected: str
) -> None:
    async with hosts(4) as ranks:
        one, other = ranks[:2], ranks[2:]
        here, there = await prepare(one), await prepare(other)
        # As if both instances had been told the ports of the other one's second rank.
        mixed = {0: [here[0], there[1]], 1: [there[0], here[1]], 2: [there[0], here[1]], 3: [here[0], there[1]]}
        failures = await asyncio.gather(
            *(
                failure_of(host, EngineGroup("one" if at < 2 else "other", "1-a", at % 2, tuple(mixed[at]), 30))
                for at, host in enumerate(ranks)
            )
        )
        for at, failure in enumerate(failures):
            assert (
                f"met engines of another attempt in its ring, or in each other's places, where ranks {1 - at % 2}"
                in str(failure)
            )
        for host in ranks:
            await host.kill()
        await bring_up(one, folder, "2-b")
        assert await text_of_all(one) == [expected, ""]


async def test_a_small_range_of_ports_is_usable_again_as_soon_as_an_attempt_has_ended(folder: Path) -> None:
    """The operating system keeps the connections of a ring that has ended for about a minute, and its ports with them."""
    with socket.socket() as trial:
        trial.bind(("", 0))
        first = int(trial.getsockname()[1])
    async with hosts(2, ports=[first, min(first + 2, 65_535)]) as ranks:
        for attempt in range(4):
            await connect(ranks, epoch=f"{attempt + 1}-a")
            for host in ranks:
                await host.kill()


async def test_rings_of_different_sizes_end_within_the_deadline(folder: Path) -> None:
    async with hosts(2) as ranks:
        of_two, of_three = ranks
        first, last = [
            f"127.0.0.1{await host.prepare(rank, size)}" for host, rank, size in ((of_two, 0, 2), (of_three, 2, 3))
        ]
        small = EngineGroup("one", "1-a", 0, (first, last), 8)
        large = EngineGroup("other", "1-a", 2, (first, "127.0.0.1:9", last), 8)
        failures = await asyncio.gather(failure_of(of_two, small), failure_of(of_three, large))
        for failure in failures:
            assert any(
                word in str(failure)
                for word in ("engines of another attempt", "did not connect within 8 s", "lost a neighbour")
            ), failure


async def test_an_engine_that_still_waits_for_an_earlier_attempt_is_not_met_by_a_later_one(
    folder: Path, expected: str
) -> None:
    """MLX holds the interpreter while it waits, so that the host must end the engine at the deadline, and does."""
    async with hosts(2) as earlier, hosts(2) as later:
        gone = await prepare(earlier)
        await earlier[0].kill()
        waiting = [
            asyncio.create_task(failure_of(earlier[1], group(gone, 1, deadline=40))),
        ]
        alone = ProcessHost(spec(), rank=0, spare_after=math.inf)
        try:
            port = await alone.prepare(0, 2)
            waiting.append(asyncio.create_task(failure_of(alone, group([f"127.0.0.1{port}", gone[1]], 0, deadline=3))))
            await bring_up(later, folder, "2-b")
            assert await text_of_all(later) == [expected, ""]
            assert "did not connect within 3 s: it waits at 127.0.0.1" in str(await waiting[1])
            assert alone.pid is None, "nothing but the end of its process ends that wait"
            assert "could not enter the ring" in str(await waiting[0])
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await alone.shut_down()


async def test_a_port_that_another_program_takes_at_the_last_moment_fails_one_attempt(
    folder: Path, expected: str
) -> None:
    async with hosts(2) as ranks:
        robbed = ProcessHost(EngineSpec(factory="tests.mlx.tiny:robbed_engine"), rank=0, spare_after=math.inf)
        try:
            endpoints = await prepare([robbed, ranks[1]])
            failed, _ = await asyncio.gather(
                failure_of(robbed, group(endpoints, 0)), failure_of(ranks[1], group(endpoints, 1, deadline=10))
            )
            assert "rank 0 could not enter the ring" in str(failed)
            assert "each rank must be able to listen at its own address" in str(failed)
        finally:
            await robbed.shut_down()
        await bring_up(ranks, folder, "2-b")
        assert await text_of_all(ranks) == [expected, ""]


async def test_one_of_two_ranks_does_not_load_alone(folder: Path) -> None:
    async with hosts() as [host]:
        await host.prepare(0, 2)
        with pytest.raises(EngineFailure, match="load is out of order: connect has not been done"):
            await load(host, model(folder))

"""Both hosts keep one contract; the one with a process keeps it against engines that block, crash, babble or will not go."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import anyio
import psutil
import pytest
from loguru import logger

from barrier import InvalidSettings
from runner.engine import EngineDied, EngineFailure, EngineGroup, GenerationRequest
from runner.engines.simulated import (
    FaultLedger,
    SimulatedConfig,
    SimulatedEngine,
    SimulatedFault,
    simulated_spec,
    simulated_text,
)
from runner.host import (
    CHUNK_WINDOW,
    MAX_FAILURE_CHARS,
    PROGRESS_WINDOW,
    EngineHost,
    EngineSpec,
    InlineHost,
    ProcessHost,
    child_command,
    child_environment,
    without_prompt,
)
from runner.messages import ModelSpec

pytestmark = pytest.mark.anyio

MODEL = ModelSpec(model_id="toy", total_layers=4)
ROOT = Path(__file__).parents[3]


def request(prompt: str = "Tell me about owls.") -> GenerationRequest:
    return GenerationRequest(task_id="t1", prompt=prompt, max_tokens=20)


def group(rank: int = 0, world_size: int = 2) -> EngineGroup:
    return EngineGroup("demo", f"7-{'a' * 32}", rank, tuple(f"node-{r}:5000" for r in range(world_size)), 60.0)


async def wait_until(predicate: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not predicate():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        await asyncio.sleep(0.005)


async def keep_all(stream: AsyncIterator[Any], kept: list[Any]) -> None:
    async for item in stream:
        kept.append(item)  # noqa: PERF401 - what came before a failure must be kept


async def collect(stream: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in stream]


def is_gone(pid: int) -> bool:
    """No such process, or only its entry, which its adoptive parent has not read yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(str(message)), level=0, format="{level}|{message}")
    yield lines
    logger.remove(sink)


# --- engines that misbehave; the child process imports them from here -------------------------------------------------------


def start_helper(code: str, *, detached: bool = False) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=detached)


class Plain:
    """An engine that does everything at once and well; the others below differ from it in one point each."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    async def prepare(self, rank: int, world_size: int) -> str | None: ...

    async def connect(self, group: EngineGroup) -> None: ...

    async def load(self, model: ModelSpec) -> AsyncGenerator[int, None]:
        for layer in range(1, model.total_layers + 1):
            yield layer

    async def warm_up(self) -> None: ...

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[str, None]:
        for number in range(5):
            yield f"piece {number}"

    async def close(self) -> None: ...


class Echo(Plain):
    """Answers with the prompt, and with its hash as it arrived here."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[str, None]:
        yield hashlib.blake2b(request.prompt.encode(errors="surrogatepass")).hexdigest()
        yield request.prompt


class Counting(Plain):
    """Leaves a byte in a file for each piece and layer that it makes, and never waits."""

    async def load(self, model: ModelSpec) -> AsyncGenerator[int, None]:
        for layer in range(1, model.total_layers + 1):
            self._count()
            yield layer
        if self.config.get("die_loaded"):
            os._exit(0)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[str, None]:
        for number in range(3_000):
            self._count()
            yield str(number)

    def _count(self) -> None:
        with Path(self.config["made"]).open("ab") as file:
            file.write(b".")


class Raising(Plain):
    """Raises what the configuration says, in the phase that it says, and quotes the prompt."""

    async def warm_up(self) -> None:
        if self.config["phase"] == "warm_up":
            self._raise("")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[str, None]:
        yield "one"
        if self.config["phase"] == "generate":
            self._raise(request.prompt)

    def _raise(self, prompt: str) -> None:
        match self.config["error"]:
            case "foreign":
                raise KeyError(f"no token for {prompt!r}")
            case "own":
                raise EngineFailure(f"cannot say {prompt}", permanent=True)
            case "cancelled":
                raise asyncio.CancelledError
            case other:
                raise AssertionError(other)


class Mistyped(Plain):
    async def load(self, model: ModelSpec) -> AsyncGenerator[Any, None]:
        yield 0.5


class Unmakeable(Plain):
    def __init__(self, config: dict[str, Any]) -> None:
        raise EngineFailure("no such device: gpu7", permanent=True)


class Noisy(Plain):
    """Writes to stdout in every way there is, and reads stdin."""

    async def connect(self, group: EngineGroup) -> None:
        print("print to stdout")
        os.write(1, b"\x00\x00\x00\x05write to stdout\n")
        start_helper("print('a helper to stdout')").wait()
        assert sys.stdin.read() == ""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[str, None]:
        print("before")
        yield "piece"
        print("after")


class Babbling(Plain):
    """Writes into the pipe that the replies go through."""

    async def connect(self, group: EngineGroup) -> None:
        for number in range(3, 20):
            try:
                os.write(number, b"\xff\xff\xff\xff")
            except OSError:
                continue


class Deaf(Plain):
    """Closes the pipe that the replies go through, and lives on."""

    async def connect(self, group: EngineGroup) -> None:
        for number in range(3, 20):
            try:
                if stat.S_ISFIFO(os.fstat(number).st_mode):
                    os.close(number)
            except OSError:
                continue
        await asyncio.Event().wait()


class Chatty(Plain):
    """Says what it does on stderr, the prompt too, and dies in the middle of a generation."""

    async def load(self, model: ModelSpec) -> AsyncGenerator[int, None]:
        sys.stderr.write("x" * 3_000_000 + "\n" + "loading with \x1b[31mcare\x1b[0m\r50 %\n")
        if self.config.get("die_loading"):
            sys.stderr.write("no newline at the end")
            os._exit(3)
        yield model.total_layers

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[str, None]:
        sys.stderr.write(f"now: {request.prompt}\n")
        yield "one"
        os.kill(os.getpid(), signal.SIGKILL)


class Stubborn(Plain):
    """Swallows cancellation in a generation, or a call to close."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[str, None]:
        yield "one"
        Path(self.config["entered"]).touch()
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                continue

    async def close(self) -> None:
        await asyncio.Event().wait()


class Endless(Plain):
    """Writes 20 MB to stderr in one line."""

    async def connect(self, group: EngineGroup) -> None:
        for _ in range(20):
            sys.stderr.write("x" * 1_000_000)


class Exclusive(Plain):
    """Takes a while to end a generation, and cannot bear a second one meanwhile."""

    busy = False

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[str, None]:
        assert not self.busy, "two generations at once"
        self.busy = True
        try:
            yield "one"
            if request.prompt == "for ever":
                await asyncio.Event().wait()
        finally:
            for _ in range(50):
                await asyncio.sleep(0.001)
            self.busy = False


class Tidy(Plain):
    """Leaves a file when it is closed, and waits for ever in load."""

    async def load(self, model: ModelSpec) -> AsyncGenerator[int, None]:
        yield 1
        await asyncio.Event().wait()

    async def close(self) -> None:
        Path(self.config["closed"]).touch()


class WithHelper(Plain):
    """Starts a process of its own and names it: a ``child``, a ``fork`` that has every pipe, or one ``detached`` in its own session."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[str, None]:
        if self.config["helper"] == "fork":
            pid = os.fork()
            if pid == 0:
                time.sleep(600)  # noqa: ASYNC251 - it shares nothing with the engine but its pipes and group
                os._exit(0)
        else:
            pid = start_helper("import time; time.sleep(600)", detached=self.config["helper"] == "detached").pid
        yield str(pid)


# --- both hosts -------------------------------------------------------------------------------------------------------------

HostKind: TypeAlias = Literal["inline", "process"]


class Hosts:
    """Makes hosts of one kind, and ends what the test has left."""

    def __init__(self, kind: HostKind) -> None:
        self.kind = kind
        self._made: list[EngineHost] = []

    def of(
        self,
        engine: type[Plain],
        *,
        grace_seconds: float = 20.0,
        output_is_safe: bool = False,
        **config: Any,
    ) -> EngineHost:
        if self.kind == "inline":
            return self.keep(InlineHost(lambda: engine(config), grace_seconds=grace_seconds))
        spec = EngineSpec(factory=f"tests.unit.runner.test_host:{engine.__name__}", config=config)
        return self.keep(ProcessHost(spec, grace_seconds=grace_seconds, output_is_safe=output_is_safe))

    def simulated(
        self, *faults: SimulatedFault, ledger: Path | None = None, token_seconds: float = 0.0, rank: int = 0
    ) -> EngineHost:
        config = SimulatedConfig(
            meet=False,
            connect_seconds=0.0,
            layer_seconds=0.0,
            warmup_seconds=0.0,
            token_seconds=token_seconds,
            faults=faults,
            fault_ledger=ledger,
        )
        if self.kind == "inline":
            return self.keep(
                InlineHost(lambda: SimulatedEngine(config, rank=rank, world_size=2), rank=rank, grace_seconds=20.0)
            )
        return self.keep(ProcessHost(simulated_spec(config, rank=rank, world_size=2), rank=rank, grace_seconds=20.0))

    def keep(self, host: EngineHost) -> EngineHost:
        self._made.append(host)
        return host

    async def end(self) -> None:
        for host in self._made:
            await host.kill()


@pytest.fixture(params=["inline", "process"])
async def hosts(request: pytest.FixtureRequest) -> AsyncIterator[Hosts]:
    made = Hosts(request.param)
    yield made
    await made.end()


@pytest.fixture
async def processes() -> AsyncIterator[Hosts]:
    made = Hosts("process")
    yield made
    await made.end()
    assert psutil.Process().children() == []


async def bring_up(host: EngineHost, rank: int = 0) -> None:
    await host.connect(group(rank))
    await collect(host.load(MODEL))
    await host.warm_up()


def hang(phase: Any, **more: Any) -> SimulatedFault:
    return SimulatedFault(phase=phase, action="hang", **more)


async def test_an_engine_works_behind_a_host_as_it_would_without(hosts: Hosts) -> None:
    host = hosts.simulated()
    await host.connect(group())
    assert await collect(host.load(MODEL)) == [1, 2, 3, 4]
    await host.warm_up()
    for prompt in ("one", "two"):
        assert await collect(host.generate(request(prompt))) == simulated_text(0, "toy", prompt, 20)
    await host.close()


async def test_pieces_come_in_order_and_none_is_lost(hosts: Hosts, tmp_path: Path) -> None:
    host = hosts.of(Counting, made=str(tmp_path / "made"))
    await host.connect(group())
    assert await collect(host.generate(request())) == [str(number) for number in range(3_000)]


async def test_a_megabyte_of_prompt_arrives_whole_and_comes_back_whole(hosts: Hosts) -> None:
    prompt = "Grüße 😀 \ud83d\x00\n" * 100_000
    host = hosts.of(Echo)
    await host.connect(group())
    digest, back = await collect(host.generate(request(prompt)))
    assert digest == hashlib.blake2b(prompt.encode(errors="surrogatepass")).hexdigest()
    assert back == prompt


async def test_without_an_engine_only_connect_and_load_start_one(hosts: Hosts) -> None:
    host = hosts.of(Plain)
    with pytest.raises(EngineFailure, match="cannot start warming up: connect or load first"):
        await host.warm_up()
    with pytest.raises(EngineFailure, match="cannot start generating: connect or load first"):
        await collect(host.generate(request()))
    assert host.pid is None
    assert await collect(host.load(MODEL)) == [1, 2, 3, 4]
    await host.warm_up()


async def test_calls_come_one_at_a_time(hosts: Hosts) -> None:
    host = hosts.simulated()
    await bring_up(host)
    async with aclosing(host.generate(request())) as pieces:
        await anext(pieces)
        with pytest.raises(EngineFailure, match="cannot start warming up: it is still generating"):
            await host.warm_up()
        assert len(await collect(pieces)) > 1
    await host.warm_up()


@pytest.mark.parametrize("action", ["refuse", "raise"])
async def test_a_failure_keeps_its_sentence_and_its_class_and_the_engine_lives(
    hosts: Hosts, action: Any, tmp_path: Path
) -> None:
    host = hosts.simulated(SimulatedFault(phase="load", action=action, times=1), ledger=tmp_path / "strikes")
    await host.connect(group())
    pid = host.pid
    with pytest.raises(EngineFailure, match=rf"^simulated fault 0 \({action} in load after 0 layers") as caught:
        await collect(host.load(MODEL))
    assert caught.value.permanent is (action == "refuse")
    assert await collect(host.load(MODEL)) == [1, 2, 3, 4]
    assert host.pid == pid


async def test_any_exception_of_an_engine_becomes_one_failure_with_its_type(hosts: Hosts, log_lines: list[str]) -> None:
    host = hosts.of(Raising, phase="warm_up", error="foreign")
    await host.connect(group())
    with pytest.raises(EngineFailure, match=r"^engine of rank 0 failed while warming up: KeyError: ") as caught:
        await host.warm_up()
    assert not caught.value.permanent
    [line] = [line for line in log_lines if "traceback ends" in line]
    assert line.startswith("DEBUG|")
    assert "in _raise" in line


async def test_a_cancellation_of_the_engines_own_making_is_a_failure_and_not_a_success(hosts: Hosts) -> None:
    host = hosts.of(Raising, phase="warm_up", error="cancelled")
    await host.connect(group())
    with pytest.raises(EngineFailure, match="failed while warming up: CancelledError"):
        await host.warm_up()


@pytest.mark.parametrize("error", ["foreign", "own"])
async def test_a_prompt_in_an_exception_reaches_neither_the_failure_nor_the_log(
    hosts: Hosts, error: str, log_lines: list[str]
) -> None:
    prompt = 'the owl\'s "secret" is\nunder the third birch'
    host = hosts.of(Raising, phase="generate", error=error)
    await host.connect(group())
    pieces = host.generate(request(prompt))
    assert await anext(pieces) == "one"
    with pytest.raises(EngineFailure, match="<prompt>") as caught:
        await anext(pieces)
    assert caught.value.permanent is (error == "own")
    assert caught.value.__context__ is None
    told = str(caught.value) + "".join(log_lines)
    assert "traceback ends" in told
    for part in ("secret", "third birch", "owl's"):
        assert part not in told


async def test_a_value_of_the_wrong_type_is_a_failure_of_the_call_that_yielded_it(hosts: Hosts) -> None:
    host = hosts.of(Mistyped)
    with pytest.raises(EngineFailure, match="yielded float while loading, where only int is expected"):
        await collect(host.load(MODEL))


async def test_an_engine_that_cannot_be_made_is_a_failed_connect(hosts: Hosts) -> None:
    host = hosts.of(Unmakeable)
    for _ in range(2):
        with pytest.raises(EngineFailure, match="no such device: gpu7") as caught:
            await host.connect(group())
        assert caught.value.permanent


async def test_kill_ends_the_call_under_way_and_the_next_connect_starts_a_fresh_engine(
    hosts: Hosts, tmp_path: Path
) -> None:
    host = hosts.simulated(hang("load", times=1, after_layers=2), ledger=tmp_path / "strikes")
    await host.connect(group())
    pid = host.pid
    layers = host.load(MODEL)
    assert [await anext(layers), await anext(layers)] == [1, 2]
    stuck = asyncio.ensure_future(anext(layers))
    await wait_until(lambda: FaultLedger(tmp_path / "strikes").strikes().total() == 1, "the engine to hang")
    await host.kill()
    with pytest.raises(EngineDied, match="engine of rank 0 was killed on request while loading"):
        await stuck
    assert host.pid is None
    with pytest.raises(EngineFailure, match="connect or load first"):
        await host.warm_up()
    await bring_up(host)  # a fresh engine: a connected one would refuse a second connect
    assert hosts.kind == "inline" or (host.pid is not None and host.pid != pid)


async def test_kill_and_close_are_idempotent_and_need_no_engine(hosts: Hosts) -> None:
    host = hosts.simulated()
    await host.kill()
    await host.close()
    await host.connect(group())
    await host.kill()
    await host.kill()
    await host.close()
    await host.close()
    await bring_up(host)


async def test_close_cancels_the_call_under_way_and_lets_the_engine_tidy_up(hosts: Hosts, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    host = hosts.of(Tidy, closed=str(closed))
    layers = host.load(MODEL)
    assert await anext(layers) == 1
    stuck = asyncio.ensure_future(anext(layers))
    await asyncio.sleep(0)
    await host.close()
    with pytest.raises(EngineDied, match="was closed on request while loading"):
        await stuck
    assert closed.exists()
    assert host.pid is None


async def test_kill_does_not_wait_for_the_engines_own_close(hosts: Hosts, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    host = hosts.of(Tidy, closed=str(closed))
    await host.connect(group())
    await host.kill()
    assert not closed.exists()


async def test_an_engine_that_hangs_in_close_is_killed_after_the_grace(hosts: Hosts, log_lines: list[str]) -> None:
    host = hosts.of(Stubborn, grace_seconds=0.2)
    await host.connect(group())
    pid = host.pid
    await host.close()
    assert "WARNING|engine of rank 0 has not closed in 0.2 s and is killed\n" in log_lines
    assert pid is None or not psutil.pid_exists(pid)
    await host.connect(group())


async def test_a_cancelled_close_is_a_kill(hosts: Hosts) -> None:
    host = hosts.of(Stubborn)
    await host.connect(group())
    pid = host.pid
    closing = asyncio.create_task(host.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await host.connect(group())
    assert pid is None or not psutil.pid_exists(pid)


@pytest.mark.parametrize("phase", ["connect", "load", "warmup"])
async def test_a_cancelled_connect_load_or_warm_up_kills_the_engine(hosts: Hosts, phase: str, tmp_path: Path) -> None:
    ledger = tmp_path / "strikes"
    host = hosts.simulated(hang(phase, times=1), ledger=ledger)
    bringing_up = asyncio.create_task(bring_up(host))
    await wait_until(lambda: FaultLedger(ledger).strikes().total() == 1, "the engine to hang")
    pid = host.pid
    bringing_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await bringing_up
    assert host.pid is None
    assert pid is None or not psutil.pid_exists(pid)
    await bring_up(host)


async def test_a_load_that_is_left_early_kills_the_engine(hosts: Hosts) -> None:
    host = hosts.simulated()
    await host.connect(group())
    # So many layers that it is still at work when it is left.
    async with aclosing(host.load(ModelSpec(model_id="toy", total_layers=10_000))) as layers:
        assert await anext(layers) > 0
    with pytest.raises(EngineFailure, match="no engine of rank 0 is running"):
        await host.warm_up()
    await bring_up(host)


async def test_a_cancelled_generation_keeps_the_model(hosts: Hosts, log_lines: list[str]) -> None:
    host = hosts.simulated(token_seconds=0.001)
    await bring_up(host)
    pid = host.pid

    async def read_for_ever(started: asyncio.Event) -> None:
        while True:
            async with aclosing(host.generate(request())) as pieces:
                async for _ in pieces:
                    started.set()

    for _ in range(3):
        started = asyncio.Event()
        reading = asyncio.create_task(read_for_ever(started))
        await started.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    assert await collect(host.generate(request("again"))) == simulated_text(0, "toy", "again", 20)
    assert host.pid == pid
    assert log_lines == []


async def test_a_generation_left_early_keeps_the_model(hosts: Hosts, tmp_path: Path) -> None:
    host = hosts.of(Counting, made=str(tmp_path / "made"))
    await host.connect(group())
    pid = host.pid
    async with aclosing(host.generate(request())) as pieces:
        assert await anext(pieces) == "0"
    assert (tmp_path / "made").stat().st_size < 100
    assert await anext(host.generate(request())) == "0"
    assert host.pid == pid


async def test_a_cancel_scope_of_anyio_ends_a_generation_and_not_its_tidying(hosts: Hosts, tmp_path: Path) -> None:
    # A scope cancels again at every await, so tidying that stood in the cancelled task itself would be cut off.
    host = hosts.of(Counting, made=str(tmp_path / "made"))
    await host.connect(group())
    pid = host.pid
    with anyio.CancelScope() as scope:
        async with aclosing(host.generate(request())) as pieces:
            async for _ in pieces:
                scope.cancel()
    assert scope.cancelled_caught
    assert len(await collect(host.generate(request()))) == 3_000
    assert host.pid == pid


async def test_the_next_call_waits_for_tidying_that_its_caller_could_not_wait_for(hosts: Hosts) -> None:
    host = hosts.of(Exclusive)
    await host.connect(group())
    for _ in range(3):
        with anyio.CancelScope() as scope:
            async with aclosing(host.generate(request("for ever"))) as pieces:
                async for _ in pieces:
                    scope.cancel()
        assert await collect(host.generate(request())) == ["one"]


@pytest.mark.parametrize("end", ["kill", "death"])
async def test_tidying_ends_with_the_engine_and_not_with_its_grace(processes: Hosts, tmp_path: Path, end: str) -> None:
    entered = tmp_path / "entered"
    host = processes.of(Stubborn, grace_seconds=3_600.0, entered=str(entered))
    await host.connect(group())
    with anyio.CancelScope() as scope:
        async with aclosing(host.generate(request())) as pieces:
            async for _ in pieces:
                await wait_until(entered.exists, "the engine to be where it swallows a cancellation")
                scope.cancel()
    with anyio.fail_after(60):
        if end == "kill":
            await host.kill()
        else:
            assert host.pid is not None
            os.kill(host.pid, signal.SIGKILL)
            assert "while generating" in str(await host.died())
        await host.connect(group())


async def test_no_engine_starts_before_the_last_one_is_gone() -> None:
    made: list[LongGoodbye] = []
    entered = asyncio.Event()
    release = asyncio.Event()

    class LongGoodbye(Plain):
        def __init__(self) -> None:
            super().__init__({})
            made.append(self)

        async def connect(self, group: EngineGroup) -> None:
            entered.set()
            if len(made) == 1:
                try:
                    await asyncio.Event().wait()
                finally:
                    await release.wait()

    host = InlineHost(LongGoodbye, grace_seconds=20.0)
    first = asyncio.create_task(host.connect(group()))
    await entered.wait()
    killing = asyncio.create_task(host.kill())
    await asyncio.sleep(0)
    killing.cancel()
    with pytest.raises(EngineDied):
        await first
    second = asyncio.create_task(host.connect(group()))
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(made) == 1
    release.set()
    await second
    assert len(made) == 2
    await host.close()


async def test_an_engine_that_never_goes_is_given_up_after_the_grace_and_said_so(log_lines: list[str]) -> None:
    entered = asyncio.Event()
    release = asyncio.Event()

    class Immortal(Plain):
        async def connect(self, group: EngineGroup) -> None:
            entered.set()
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    continue

    host = InlineHost(lambda: Immortal({}), grace_seconds=0.05)
    connecting = asyncio.create_task(host.connect(group()))
    await entered.wait()
    await host.kill()
    with pytest.raises(EngineDied):
        await connecting
    assert "ERROR|engine of rank 0 (pid None) is not gone after 0.05 s; given up\n" in log_lines
    release.set()
    await host.connect(group())
    await host.close()


async def test_the_consumer_sets_the_pace_of_a_generation(hosts: Hosts, tmp_path: Path) -> None:
    made = tmp_path / "made"
    host = hosts.of(Counting, made=str(made))
    await host.connect(group())
    ahead = 1 if hosts.kind == "inline" else CHUNK_WINDOW + 1
    async with aclosing(host.generate(request())) as pieces:
        for taken in range(1, 40):
            assert await anext(pieces) == str(taken - 1)
            await wait_until(lambda: made.stat().st_size >= taken + ahead, "the engine to work ahead")  # noqa: B023 - awaited here
            assert made.stat().st_size == taken + ahead
    assert made.stat().st_size <= 40 + ahead


async def test_an_engine_that_dies_says_so_to_the_call_and_to_the_watcher(hosts: Hosts, tmp_path: Path) -> None:
    host = hosts.simulated(
        SimulatedFault(phase="load", action="die", after_layers=1, times=1),
        ledger=tmp_path / "strikes",
        rank=1,
    )
    watching = asyncio.create_task(host.died())
    await host.connect(group(1))
    with pytest.raises(EngineDied, match=r"die in load after 1 layers, strike 1 of 1\) on rank 1") as caught:
        await collect(host.load(MODEL))
    assert str(await watching) == str(caught.value)
    assert str(await host.died()) == str(caught.value)
    assert host.pid is None
    for _ in range(2):
        with pytest.raises(EngineDied, match="die in load"):
            await host.warm_up()
    assert str(await host.died()) == str(caught.value)
    await bring_up(host, rank=1)
    watching = asyncio.create_task(host.died())
    await host.kill()
    await asyncio.sleep(0)
    assert not watching.done()
    watching.cancel()


@pytest.mark.parametrize("grace", [0.0, -1.0, float("nan"), float("inf")])
def test_a_grace_that_is_no_time_is_refused(grace: float) -> None:
    with pytest.raises(ValueError, match="finite number of seconds above 0"):
        InlineHost(lambda: Plain({}), grace_seconds=grace)


def test_a_negative_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="rank -1 is negative"):
        InlineHost(lambda: Plain({}), rank=-1)


# --- the host with a process ------------------------------------------------------------------------------------------------


async def test_a_death_is_told_with_signal_phase_and_last_words_and_leaves_no_zombie(
    processes: Hosts,
) -> None:
    host = processes.simulated(SimulatedFault(phase="load", action="die", after_layers=2), rank=1)
    await host.connect(group(1))
    pid = host.pid
    assert pid is not None
    with pytest.raises(EngineDied) as caught:
        await collect(host.load(MODEL))
    assert str(caught.value) == (
        "engine of rank 1 died (signal 9) while loading; last stderr lines: "
        "simulated fault 0 (die in load after 2 layers, strike 1) on rank 1"
    )
    assert not psutil.pid_exists(pid)


async def test_an_engine_that_dies_between_calls_is_noticed(processes: Hosts) -> None:
    host = processes.simulated()
    await bring_up(host)
    pid = host.pid
    assert pid is not None
    os.kill(pid, signal.SIGTERM)
    death = await host.died()
    assert str(death) == "engine of rank 0 died (signal 15) while idle; it wrote nothing to stderr"
    with pytest.raises(EngineDied, match="signal 15"):
        await collect(host.generate(request()))
    await bring_up(host)
    assert host.pid != pid


async def test_an_engine_that_blocks_its_thread_is_killed_all_the_same(processes: Hosts, tmp_path: Path) -> None:
    ledger = tmp_path / "strikes"
    host = processes.simulated(SimulatedFault(phase="load", action="block", times=1), ledger=ledger)
    await host.connect(group())
    pid = host.pid
    loading = asyncio.create_task(collect(host.load(MODEL)))
    await wait_until(lambda: FaultLedger(ledger).strikes().total() == 1, "the engine to block")
    await host.kill()
    assert pid is not None
    assert not psutil.pid_exists(pid)
    with pytest.raises(EngineDied, match="was killed on request while loading"):
        await loading
    await bring_up(host)
    assert host.pid not in (None, pid)


async def test_a_generation_that_does_not_stop_costs_the_engine(
    processes: Hosts, log_lines: list[str], tmp_path: Path
) -> None:
    entered = tmp_path / "entered"
    host = processes.of(Stubborn, grace_seconds=0.2, entered=str(entered))
    await host.connect(group())
    pid = host.pid
    async with aclosing(host.generate(request())) as pieces:
        assert await anext(pieces) == "one"
        await wait_until(entered.exists, "the engine to be where it swallows a cancellation")
    assert any("had not stopped a cancelled generation" in line for line in log_lines)
    assert host.pid is None
    assert pid is not None
    assert not psutil.pid_exists(pid)


async def test_a_connect_cancelled_while_the_process_starts_leaves_none_behind(processes: Hosts) -> None:
    for steps in range(12):
        host = processes.simulated()
        connecting = asyncio.create_task(host.connect(group()))
        for _ in range(steps):
            await asyncio.sleep(0)
        connecting.cancel()
        await asyncio.sleep(0)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        await host.kill()
        assert host.pid is None
        assert psutil.Process().children() == []


@pytest.mark.parametrize("end", ["kill", "close"])
async def test_a_process_that_is_ended_while_it_starts_is_not_left_behind(
    processes: Hosts, end: str, log_lines: list[str]
) -> None:
    for steps in range(1, 12):
        host = processes.simulated()
        connecting = asyncio.create_task(host.connect(group()))
        for _ in range(steps):
            await asyncio.sleep(0)
        await (host.kill() if end == "kill" else host.close())
        with pytest.raises(EngineDied, match="on request while connecting"):
            await connecting
        assert psutil.Process().children() == []
        assert host.pid is None
    assert log_lines == []


async def test_progress_is_a_state_so_a_slow_consumer_slows_no_load_and_misses_no_end(
    processes: Hosts, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    model = ModelSpec(model_id="toy", total_layers=5_000)
    host = processes.of(Counting, made=str(made))
    layers = host.load(model)
    first = await anext(layers)
    await wait_until(lambda: made.stat().st_size == 5_000, "the load to end while nobody looks")
    rest = await collect(layers)
    assert [first, *rest] == sorted({first, *rest})
    assert rest[-1] == 5_000


async def test_progress_that_nobody_reads_takes_no_memory(processes: Hosts, tmp_path: Path) -> None:
    host = processes.of(Counting, made=str(tmp_path / "made"), die_loaded=True)
    layers = host.load(ModelSpec(model_id="toy", total_layers=5_000))
    await anext(layers)
    await host.died()  # by then everything that it had to say has been read
    kept: list[int] = []
    with pytest.raises(EngineDied, match="exit code 0"):
        await keep_all(layers, kept)
    assert 0 < len(kept) <= PROGRESS_WINDOW
    assert kept[-1] == 5_000


async def test_what_the_engine_prints_cannot_pass_for_a_reply(processes: Hosts, log_lines: list[str]) -> None:
    host = processes.of(Noisy, output_is_safe=True)
    await host.connect(group())
    assert await collect(host.generate(request())) == ["piece"]
    await host.close()
    told = "".join(log_lines)
    for line in ("print to stdout", "write to stdout", "a helper to stdout", "before", "after"):
        assert f"DEBUG|engine of rank 0 says: {line}" in told or (line == "write to stdout" and line in told)


async def test_an_engine_that_spoils_the_replies_is_ended_with_a_clear_reason(processes: Hosts) -> None:
    host = processes.of(Babbling)
    with pytest.raises(
        EngineDied,
        match=r"\(signal 9\) while connecting; it sent an invalid reply: a frame of 4,294,967,295 bytes",
    ):
        await asyncio.wait_for(host.connect(group()), 30)


async def test_an_engine_that_closes_the_replies_is_ended(processes: Hosts) -> None:
    host = processes.of(Deaf)
    with pytest.raises(EngineDied, match=r"died \(signal 9\) while connecting"):
        await asyncio.wait_for(host.connect(group()), 30)


async def test_endless_lines_and_escape_sequences_do_not_reach_the_status(processes: Hosts) -> None:
    host = processes.of(Chatty, die_loading=True)
    with pytest.raises(EngineDied, match=r"died \(exit code 3\) while loading; last stderr lines: ") as caught:
        await collect(host.load(MODEL))
    told = str(caught.value)
    assert told.endswith("| 50 % | no newline at the end")
    assert "x" * 300 + " | loading with" in told
    assert told.isprintable()
    assert len(told) <= MAX_FAILURE_CHARS


async def test_a_line_without_an_end_takes_no_memory(processes: Hosts) -> None:
    host = processes.of(Endless)
    tracemalloc.start()
    try:
        await host.connect(group())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000


async def test_output_that_may_quote_a_prompt_is_withheld(processes: Hosts, log_lines: list[str]) -> None:
    host = processes.of(Chatty)
    await collect(host.load(MODEL))
    with pytest.raises(EngineDied, match="its last 1 lines of output are withheld") as caught:
        await collect(host.generate(request("the secret of the third birch")))
    assert "birch" not in str(caught.value) + "".join(log_lines)


async def test_output_that_is_known_to_be_safe_is_kept(processes: Hosts) -> None:
    host = processes.of(Chatty, output_is_safe=True)
    await collect(host.load(MODEL))
    with pytest.raises(EngineDied, match=r"while generating; last stderr lines: .*now: a harmless prompt"):
        await collect(host.generate(request("a harmless prompt")))


async def test_a_prompt_that_does_not_pass_is_refused_and_the_engine_lives(processes: Hosts) -> None:
    host = processes.of(Echo)
    await host.connect(group())
    pid = host.pid
    with pytest.raises(
        EngineFailure, match=r"a frame of 16,777,\d+ bytes does not pass .* at most 16,777,216 do"
    ) as caught:
        await collect(host.generate(request("x" * 16 * 1024 * 1024)))
    assert caught.value.permanent
    assert (await collect(host.generate(request("short"))))[1] == "short"
    assert host.pid == pid


async def test_the_process_lists_show_neither_configuration_nor_prompt(processes: Hosts) -> None:
    host = processes.of(Echo, token="hunter2")
    await host.connect(group())
    await collect(host.generate(request("the third birch")))
    assert host.pid is not None
    process = psutil.Process(host.pid)
    shown = " ".join([*process.cmdline(), *process.environ().values()])
    assert "engine-of-rank-0" in shown
    assert "hunter2" not in shown
    assert "birch" not in shown
    assert "hunter2" not in repr(EngineSpec(factory="a:b", config={"token": "hunter2"}))


@pytest.mark.parametrize("before", [None, "/was/set/before"])
async def test_the_engine_finds_what_its_runner_finds(
    processes: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    if before is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", before)
    (tmp_path / "own_engine.py").write_text(
        "import json, os, sys\n"
        "class Own:\n"
        "    def __init__(self, config): pass\n"
        "    async def connect(self, group): pass\n"
        "    async def generate(self, request):\n"
        "        yield json.dumps([os.environ.get('PYTHONPATH'), sys.path, os.getsid(0)])\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    host = processes.keep(ProcessHost(EngineSpec(factory="own_engine:Own")))
    await host.connect(group())
    [told] = await collect(host.generate(request()))
    pythonpath, path, session = json.loads(told)
    assert pythonpath == before
    assert [entry for entry in path if entry in sys.path] == list(dict.fromkeys(sys.path))
    assert session == host.pid  # so that Ctrl-C in a terminal reaches the runner alone


@pytest.mark.parametrize("helper_kind", ["child", "fork"])
@pytest.mark.parametrize("end", ["kill", "death"])
async def test_helpers_of_an_engine_end_with_it(processes: Hosts, end: str, helper_kind: str) -> None:
    host = processes.of(WithHelper, helper=helper_kind)
    await host.connect(group())
    [helper] = await collect(host.generate(request()))
    assert psutil.pid_exists(int(helper))
    if end == "kill":
        await host.kill()
    else:
        assert host.pid is not None
        os.kill(host.pid, signal.SIGKILL)
        await host.died()
    await wait_until(lambda: is_gone(int(helper)), "the helper's end")


async def test_a_helper_that_holds_the_pipes_open_does_not_hide_the_engines_end(processes: Hosts) -> None:
    host = processes.of(WithHelper, helper="detached")
    await host.connect(group())
    [helper] = await collect(host.generate(request()))
    try:
        assert host.pid is not None
        os.kill(host.pid, signal.SIGKILL)
        assert "signal 9" in str(await asyncio.wait_for(host.died(), 30))
        assert psutil.pid_exists(int(helper))
    finally:
        os.kill(int(helper), signal.SIGKILL)


def test_the_childs_own_modules_import_little() -> None:
    # A bare package in the place of `runner`, so that this measures these modules and not what the package imports besides.
    code = (
        "import sys, types\n"
        f"sys.modules['runner'] = runner = types.ModuleType('runner'); runner.__path__ = [{str(ROOT / 'runner')!r}]\n"
        "import runner.host, runner.engines.simulated\n"
        "print(sorted({'redis', 'loguru', 'barrier'} & set(sys.modules)), 'pydantic' in sys.modules)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, text=True)
    assert told.stdout == "[] True\n"


@pytest.mark.parametrize("factory", ["no.such.module:Engine", "runner.engines.simulated:NoSuchEngine"])
async def test_a_factory_that_cannot_be_found_fails_for_good_and_is_named(processes: Hosts, factory: str) -> None:
    host = processes.keep(ProcessHost(EngineSpec(factory=factory)))
    with pytest.raises(EngineFailure, match=f"engine factory '{factory}' cannot be imported: ") as caught:
        await host.connect(group())
    assert caught.value.permanent


@pytest.mark.parametrize("factory", ["", "module", "module:", ":name", "a b:c", "os;rm:x", "a:b:c"])
def test_a_factory_of_the_wrong_form_is_refused(factory: str) -> None:
    with pytest.raises(InvalidSettings, match=r"is not of the form package\.module:name"):
        EngineSpec(factory=factory)


async def test_a_process_that_cannot_be_started_is_a_failed_connect(
    processes: Hosts, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    host = processes.simulated()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/no/such/python")
        with pytest.raises(EngineFailure, match=r"engine of rank 0 cannot be started: FileNotFoundError: "):
            await host.connect(group())
        for steps in range(12):
            for end in (host.kill, host.close):
                connecting = asyncio.create_task(host.connect(group()))
                for _ in range(steps):
                    await asyncio.sleep(0)
                await end()
                with pytest.raises(EngineFailure, match="on request while connecting|cannot be started"):
                    await connecting
    assert log_lines == []  # in particular, none was waited for in vain
    await bring_up(host)


async def test_a_configuration_that_does_not_pass_is_a_failed_connect(processes: Hosts) -> None:
    host = processes.of(Plain, blob="x" * 17_000_000)
    with pytest.raises(EngineFailure, match=r"cannot be started: a frame of 17,000,\d+ bytes does not pass") as caught:
        await host.connect(group())
    assert caught.value.permanent


# --- no engine outlives its runner --------------------------------------------------------------------------------------------


def frame(**fields: Any) -> bytes:
    body = json.dumps(fields).encode()
    return len(body).to_bytes(4, "big") + body


@contextmanager
def running(command: list[str], **options: Any) -> Generator[subprocess.Popen[bytes], None, None]:
    """A child of the test, killed and reaped at the end."""
    with cast("subprocess.Popen[bytes]", subprocess.Popen(command, stdout=subprocess.PIPE, **options)) as process:
        try:
            yield process
        finally:
            process.kill()


def read_line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode()


def read_frame(process: subprocess.Popen[bytes]) -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.read(int.from_bytes(process.stdout.read(4), "big")))


@pytest.mark.parametrize("blocked", [False, True], ids=["idle", "blocked"])
async def test_the_child_ends_when_its_stdin_does_even_while_the_engine_blocks(tmp_path: Path, blocked: bool) -> None:
    ledger = tmp_path / "strikes"
    faults = (SimulatedFault(phase="connect", action="block"),) if blocked else ()
    spec = simulated_spec(SimulatedConfig(meet=False, faults=faults, fault_ledger=ledger), rank=0, world_size=2)
    with running(child_command(0), env=child_environment(), stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        connect = {"instance": "demo", "epoch": "7-a", "rank": 0, "endpoints": ["a:1", "b:1"], "deadline": 60.0}
        child.stdin.write(
            frame(kind="start", rank=0, factory=spec.factory, config=spec.config, pythonpath=None)
            + frame(kind="call", call=1, name="connect", request=connect)
        )
        child.stdin.flush()
        if blocked:
            await wait_until(ledger.exists, "the engine to block")
        else:
            assert read_frame(child) == {"kind": "done", "call": 1}
        assert child.poll() is None
        child.stdin.close()
        await wait_until(lambda: child.poll() is not None, "the child's end")
        assert child.returncode == 1


PARENT = """
import asyncio, sys
from runner.engine import EngineGroup
from runner.engines.simulated import SimulatedConfig, SimulatedFault, simulated_spec
from runner.host import ProcessHost
from runner.messages import ModelSpec

async def main():
    config = SimulatedConfig(meet=False, faults=(SimulatedFault(phase="load", action=sys.argv[1]),))
    host = ProcessHost(simulated_spec(config, rank=0, world_size=2))
    await host.connect(EngineGroup("demo", "7-a", 0, ("a:1", "b:1"), 60.0))
    print(host.pid, flush=True)
    async for _ in host.load(ModelSpec(model_id="toy")):
        pass

asyncio.run(main())
"""


@pytest.mark.parametrize("action", ["hang", "block"])
async def test_an_engine_ends_with_its_runner_even_if_that_is_killed(action: str) -> None:
    with running([sys.executable, "-c", PARENT, action], cwd=ROOT, stderr=subprocess.DEVNULL) as runner:
        engine = int(read_line(runner))
        assert not is_gone(engine)
    await wait_until(lambda: is_gone(engine), "the engine's end")


LAUNCHER = """
import subprocess, sys, time
from runner.host import child_command, child_environment
child = subprocess.Popen(child_command(0), env=child_environment(), stdin=int(sys.argv[1]), stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's; elsewhere the end of stdin does it alone"
)
async def test_the_kernel_ends_the_child_with_its_parent_though_its_stdin_stays_open() -> None:
    read_end, write_end = os.pipe()
    try:
        with running([sys.executable, "-c", LAUNCHER, str(read_end)], cwd=ROOT, pass_fds=[read_end]) as launcher:
            child = int(read_line(launcher))
            # Its second thread, which reads commands, starts after the child has spoken to the kernel.
            await wait_until(lambda: psutil.Process(child).num_threads() > 1, "the child to be up")
        await wait_until(lambda: is_gone(child), "the child's end")
    finally:
        os.close(read_end)
        os.close(write_end)


async def test_a_child_whose_parent_is_gone_before_it_looks_ends_at_once() -> None:
    command = child_command(0)
    no_process = str(2**22 + 1)  # beyond the highest process id there is
    command[command.index(str(os.getpid()))] = no_process
    with running(command, env=child_environment(), stdin=subprocess.PIPE) as child:
        await wait_until(lambda: child.poll() is not None, "the child's end")
        assert child.returncode == 1


# --- keeping prompts out of texts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        ("cannot say the owl flies at night", "the owl flies at night", "cannot say <prompt>"),
        ("at 'the owl flies' in 'flies at night'", "the owl flies at night", "at '<prompt>' in '<prompt>'"),
        ("KeyError: 'line one\\nline two'", "line one\nline two", "KeyError: '<prompt>'"),
        ('{"text": "caf\\u00e9 au lait, please"}', "café au lait, please", '{"text": "<prompt>"}'),
        ("no token for 'hi' in this", "hi", "no token for '<prompt>' in this"),
        ("the owl", "the owl flies at night", "the owl"),  # under 12 characters: any text may share that much
        ("out of memory", "", "out of memory"),
        ("out of memory", " \n", "out of memory"),
        ("", "the owl flies at night", ""),
    ],
)
def test_shared_runs_are_cut_from_a_text(text: str, prompt: str, expected: str) -> None:
    assert without_prompt(text, prompt) == expected


def test_cutting_a_long_prompt_from_a_long_text_is_linear() -> None:
    prompt = "".join(hashlib.blake2b(str(n).encode()).hexdigest() for n in range(1_500))
    assert without_prompt(f"[{prompt}] {prompt[5:]}", prompt) == "[<prompt>] <prompt>"

"""Engines that are ready before they are needed, spares, helpers in sessions of their own, and engines that raise what nobody expects."""

from __future__ import annotations

import ast
import asyncio
import atexit
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from loguru import logger

from runner.engine import EngineDied, EngineFailure, EngineGroup, GenerationRequest
from runner.host import EngineSpec, InlineHost, ProcessHost
from runner.host.leftovers import MARK
from runner.messages import ModelSpec

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[3]
MODEL = ModelSpec(model_id="toy", total_layers=1)


def start_helper() -> None:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)


def start_runner() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", RUNNER], cwd=ROOT, stdout=subprocess.PIPE)


class Panic(BaseException):
    """What PyO3's panics are: no Exception."""


class Plain:
    """Does everything at once."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    async def prepare(self, rank: int, world_size: int) -> str | None:
        return f":{os.getpid() % 60_000 + 1}"

    async def connect(self, group: EngineGroup) -> None:
        if self.config.get("helper"):
            start_helper()

    async def load(self, model: ModelSpec) -> AsyncIterator[int]:
        if self.config.get("panic"):
            raise Panic("the attempt to unwrap a None")
        yield 1

    async def warm_up(self) -> None: ...

    async def generate(self, request: GenerationRequest) -> AsyncIterator[str]:
        yield "word"

    async def close(self) -> None: ...


class Slow(Plain):
    """Never connects."""

    async def connect(self, group: EngineGroup) -> None:
        await asyncio.get_running_loop().create_future()


class Picky(Plain):
    """Refuses its configuration."""

    def __init__(self, config: dict[str, Any]) -> None:
        raise ValueError("layers is -1")


def need(name: str) -> None:
    """What a factory may do with a configuration, or a machine, that lacks something."""
    match name:
        case "key":
            config: dict[str, Any] = {}
            config["model"]
        case "place":
            [].pop()
        case "syntax":
            ast.parse("def :")
        case "module":
            importlib.import_module("surely_not_installed")
        case "name":
            exec("surely_not_defined")  # noqa: S102 - a name that the linters do not see
        case _:
            raise OSError("the device is busy")


class Needy(Plain):
    """Does without something."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        need(config["lacks"])


class Untidy(Plain):
    """Leaves a thread that never ends, and something to be done at the exit of its process."""

    async def close(self) -> None:
        threading.Thread(target=threading.Event().wait).start()
        atexit.register(Path(self.config["left"]).touch)


class Old:
    """An engine that was written for the protocol before."""

    def __init__(self, config: dict[str, Any]) -> None: ...

    async def connect(self, group: EngineGroup) -> None: ...

    async def load(self, model: ModelSpec) -> AsyncIterator[int]:
        yield 1

    async def warm_up(self) -> None: ...

    async def generate(self, request: GenerationRequest) -> AsyncIterator[str]:
        yield "word"

    async def close(self) -> None: ...


def spec(engine: str, **config: Any) -> EngineSpec:
    return EngineSpec(factory=f"tests.unit.runner.test_host_prepared:{engine}", config=config)


def group(deadline: float = 60.0) -> EngineGroup:
    return EngineGroup("demo", f"7-{'a' * 32}", 0, ("10.0.0.1:5000", "10.0.0.2:5001"), deadline)


async def wait_until(predicate: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    ends = time.monotonic() + seconds
    while not predicate():
        assert time.monotonic() < ends, f"waited {seconds} s in vain for {what}"
        await asyncio.sleep(0.01)


def carriers(within: str) -> list[int]:
    """Processes whose mark names this process or one of its children."""
    found: list[int] = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK, "").startswith(within) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


async def serve(host: ProcessHost) -> None:
    await host.prepare(0, 2)
    await host.connect(group())
    async for _ in host.load(MODEL):
        pass
    await host.warm_up()


async def test_an_engine_that_is_prepared_stays_while_attempts_come_and_go() -> None:
    host = ProcessHost(spec("Plain"))
    first = await host.prepare(0, 2)
    pid = host.pid
    await host.close()
    assert await host.prepare(0, 2) == first
    assert host.pid == pid is not None
    await host.connect(group())
    await host.close()
    assert host.pid is None
    await host.shut_down()


async def test_a_spare_takes_over_from_an_engine_that_died() -> None:
    host = ProcessHost(spec("Plain"), spare_after=0.0)
    await serve(host)
    first = host.pid
    assert first is not None
    await wait_until(
        lambda: len(psutil.Process().children()) == 3, "the spare: engine, spare, and what watches over both"
    )
    spare = {child.pid for child in psutil.Process().children() if "engine-of-rank-0" in child.cmdline()} - {first}
    os.kill(first, signal.SIGKILL)
    await host.died()
    await host.kill()
    await host.prepare(0, 2)
    assert {host.pid} == spare
    await serve(host)
    await host.shut_down()
    assert psutil.Process().children() == []


async def test_an_engine_that_is_quick_to_prepare_has_no_spare() -> None:
    host = ProcessHost(spec("Plain"), spare_after=3_600.0)
    await serve(host)
    engines = [child for child in psutil.Process().children() if "engine-of-rank-0" in child.cmdline()]
    assert [child.pid for child in engines] == [host.pid]
    await host.shut_down()


async def test_what_is_wrong_with_an_engine_is_said_when_it_is_started() -> None:
    for engine, sentence in (
        ("Nobody", "cannot be imported"),
        ("Picky", "refuses its configuration: ValueError: layers is -1"),
        ("Old", "Old is no engine of this version: it has no prepare; see runner.Engine"),
    ):
        host = ProcessHost(spec(engine))
        with pytest.raises(EngineFailure, match=sentence) as caught:
            await host.start()
        assert caught.value.permanent
        await host.shut_down()


LACKS = {
    "key": "KeyError: 'model'",
    "place": "IndexError: pop from empty list",
    "syntax": "SyntaxError: invalid syntax",
    "module": "ModuleNotFoundError: No module named 'surely_not_installed'",
    "name": "NameError: name 'surely_not_defined' is not defined",
}


@pytest.mark.parametrize("kind", ["inline", "process"])
@pytest.mark.parametrize("lacks", LACKS)
async def test_a_factory_that_raises_what_no_time_mends_is_unfit_for_good(lacks: str, kind: str) -> None:
    host = InlineHost(lambda: Needy({"lacks": lacks})) if kind == "inline" else ProcessHost(spec("Needy", lacks=lacks))
    with pytest.raises(EngineFailure, match=re.escape(LACKS[lacks])) as caught:
        await host.start()
    assert caught.value.permanent
    await host.shut_down()


@pytest.mark.parametrize("kind", ["inline", "process"])
async def test_a_factory_that_fails_for_now_is_asked_again(kind: str) -> None:
    host = (
        InlineHost(lambda: Needy({"lacks": "time"})) if kind == "inline" else ProcessHost(spec("Needy", lacks="time"))
    )
    with pytest.raises(EngineFailure, match="OSError: the device is busy") as caught:
        await host.start()
    assert not caught.value.permanent
    await host.shut_down()


MODULES = {
    "def make(config:\n": "SyntaxError: '(' was never closed",
    "import os\nmake = os.environ['SURELY_NOT_SET']\n": "KeyError: 'SURELY_NOT_SET'",
    "import surely_not_installed\n": "No module named 'surely_not_installed'",
    "other = 1\n": "has no attribute 'make'",
    "make = 1\n": "'int' object is not callable",
}


@pytest.mark.parametrize("text", MODULES)
async def test_a_module_that_cannot_be_imported_is_unfit_for_good(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "an_engine_of_somebody.py").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    host = ProcessHost(EngineSpec(factory="an_engine_of_somebody:make"))
    with pytest.raises(EngineFailure, match="'an_engine_of_somebody:make'.*" + re.escape(MODULES[text])) as caught:
        await host.start()
    assert caught.value.permanent
    await host.shut_down()


async def test_a_process_whose_engine_has_closed_ends_at_once_whatever_the_engine_left_in_it(tmp_path: Path) -> None:
    """What many imports leave behind takes the interpreter half a second to take apart, and a thread may never end."""
    left = tmp_path / "left"
    host = ProcessHost(spec("Untidy", left=str(left)), grace_seconds=2.0)
    await host.prepare(0, 2)
    await host.connect(group())
    said: list[str] = []
    sink = logger.add(said.append, level="WARNING")
    await host.close()
    logger.remove(sink)
    assert said == [], "it was not killed"
    assert left.exists(), "what it had registered for its exit was done"
    await host.shut_down()


async def test_an_engine_that_does_not_connect_in_time_is_killed_and_says_where_it_waited() -> None:
    host = ProcessHost(spec("Slow"))
    await host.prepare(0, 2)
    pid = host.pid
    with pytest.raises(
        EngineFailure, match=r"did not connect within 0.3 s: it waits at 10.0.0.1:5000.*next rank, 1, at 10.0.0.2:5001"
    ):
        await host.connect(group(deadline=0.3))
    assert host.pid is None
    assert pid is not None
    assert not psutil.pid_exists(pid)
    await host.shut_down()


@pytest.mark.parametrize("kind", ["inline", "process"])
async def test_an_exception_that_is_no_exception_fails_the_call_and_nothing_else(kind: str) -> None:
    host = InlineHost(lambda: Plain({"panic": True})) if kind == "inline" else ProcessHost(spec("Plain", panic=True))
    await host.prepare(0, 2)
    await host.connect(group())
    with pytest.raises(EngineFailure, match="failed while loading: Panic: the attempt to unwrap"):
        async for _ in host.load(MODEL):
            pass
    await host.shut_down()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows the environment of a process")
@pytest.mark.parametrize("end", ["kill", "close", "death"])
async def test_a_helper_in_a_session_of_its_own_ends_with_its_engine(end: str) -> None:
    """Also while another engine of this process lives on, a spare or another rank's: the watcher has nothing to end yet."""
    other = ProcessHost(spec("Plain"))
    await other.prepare(1, 2)
    host = ProcessHost(spec("Plain", helper=True))
    await host.prepare(0, 2)
    await host.connect(group())
    assert host.pid is not None
    mark = psutil.Process(host.pid).environ()[MARK]
    await wait_until(lambda: len(carriers(mark)) == 2, "the helper")
    if end == "death":
        os.kill(host.pid, signal.SIGKILL)
        assert isinstance(await host.died(), EngineDied)
    else:
        await (host.kill() if end == "kill" else host.close())
    assert carriers(mark) == []
    assert other.pid is not None
    await other.shut_down()
    await host.shut_down()


RUNNER = """
import asyncio, psutil
from runner.host import EngineSpec, ProcessHost
from runner.host.leftovers import MARK
from tests.unit.runner.test_host_prepared import group, spec

async def main():
    host = ProcessHost(spec("Plain", helper=True))
    await host.prepare(0, 2)
    await host.connect(group())
    print(psutil.Process(host.pid).environ()[MARK], flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows the environment of a process")
async def test_a_helper_in_a_session_of_its_own_ends_with_a_runner_that_is_killed() -> None:
    with start_runner() as runner:
        assert runner.stdout is not None
        mark = (await asyncio.to_thread(runner.stdout.readline)).decode().strip()
        await wait_until(lambda: len(carriers(mark)) == 2, "engine and helper")
        runner.kill()
    await wait_until(lambda: not carriers(mark), "the ends of engine and helper")

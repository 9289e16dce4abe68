"""Terminals that are closed, readers that leave, full disks, impatient signals: every command ends, with all that it started.

Terminals are real (a pty that leads a session), and processes are found by a mark in their environment, wherever they belong to.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import psutil
import pytest

from barrier import connect
from barrier.testing import wait_until
from planner import InstanceSpec
from planner.embedded import EmbeddedServer
from planner.launcher import own_command, own_environment
from planner.registry import Registry

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

FULL = Path("/dev/full")
BEGINS = 60.0
"""Seconds that a command may take until it says that it has begun, on a machine with more to do."""

ENDS = 10.0
"""Seconds within which all must be over. 5 are promised, and this machine may be busy."""

Stream = Literal["stdout", "stderr"]


class Session:
    """A command in a session of its own, with a terminal as its stdin, stdout and stderr unless one is given."""

    def __init__(self, *command: str, url: str = "", stdout: int | None = None, stderr: int | None = None) -> None:
        self.said = b""
        self._folder = tempfile.TemporaryDirectory(prefix="rg-")
        self._mark = f"terminal-test-{os.getpid()}-{Path(self._folder.name).name}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RANKGATE_")}
        environment |= own_environment() | {"TERM": "xterm", "TMPDIR": self._folder.name, "TEST_MARK": self._mark}
        if url:
            environment["RANKGATE_REDIS"] = url
        self.terminal, inner = pty.openpty()
        script = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", script, *command],
            env=environment,
            stdin=inner,
            stdout=inner if stdout is None else stdout,
            stderr=inner if stderr is None else stderr,
            start_new_session=True,
        )
        os.close(inner)

    @property
    def text(self) -> str:
        return self.said.decode(errors="replace")

    def read(self, source: int | None = None) -> bool:
        """Read what it wrote, from its terminal or from elsewhere; whether something came."""
        source = self.terminal if source is None else source
        if not select.select([source], [], [], 0)[0]:
            return False
        try:
            piece = os.read(source, 65536)
        except OSError as error:
            if error.errno == errno.EIO:  # nobody has the other side any more
                return False
            raise
        self.said += piece
        return bool(piece)

    async def says(self, text: str, source: int | None = None) -> None:
        def found() -> bool:
            while self.read(source):
                pass
            return text in self.text or self.process.poll() is not None

        await wait_until(found, f"{text!r}", BEGINS)
        assert text in self.text, f"it ended with {self.process.returncode} before it said {text!r}: {self.text}"

    def alive(self) -> list[psutil.Process]:
        """Every process that carries the mark: the command and all below it, whoever has inherited them."""
        found: list[psutil.Process] = []
        for one in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if one.environ().get("TEST_MARK") == self._mark and one.status() != psutil.STATUS_ZOMBIE:
                    found.append(one)
        return found

    async def is_over(self) -> int:
        """Wait until nothing of it is left; returns its exit code."""
        await wait_until(lambda: self.process.poll() is not None, "the command to end", ENDS)
        await wait_until(lambda: not self.alive(), f"the end of {[one.cmdline() for one in self.alive()]}", 2)
        assert os.listdir(self._folder.name) == [], "nothing is left in the temporary directory"
        return self.process.wait()

    def hang_up(self) -> None:
        os.close(self.terminal)
        self.terminal = -1

    def close(self) -> None:
        for one in self.alive():
            with suppress(psutil.Error):
                one.kill()
        self.process.wait()
        if self.terminal >= 0:
            self.hang_up()
        self._folder.cleanup()


@pytest.fixture
def session() -> AsyncGenerator[Callable[..., Session]] | object:
    sessions: list[Session] = []

    def start(*arguments: str, **more: object) -> Session:
        sessions.append(Session(*own_command(*arguments), **more))  # pyright: ignore[reportArgumentType] - handed on
        return sessions[-1]

    yield start
    for one in sessions:
        one.close()


@pytest.fixture
async def url() -> AsyncGenerator[str]:
    """A server on which an instance is wanted that nobody plans or runs: whoever waits for it waits long."""
    async with EmbeddedServer() as server:
        store = await connect(server.url)
        await Registry(store, "rankgate").launch(InstanceSpec(name="demo", world_size=2))
        await store.close()
        yield server.url


UP = ("up", "--world-size", "2", "--layers", "2", "--keep")
LOADING = ("up", "--world-size", "2", "--layers", "10000")
BLOCKED = ("up", "--world-size", "2", "--engine-config", json.dumps({"faults": [{"phase": "load", "action": "block"}]}))

# What each command is called with, and what it says once it has begun.
OWN_SERVER = [
    pytest.param(UP, "until Ctrl-C", id="up-keep"),
    pytest.param(LOADING, "Loading", id="up-loading"),
    pytest.param(BLOCKED, "Loading", id="up-blocked-engines"),
    pytest.param(("race",), "is connected", id="race"),
]
ON_A_SERVER = [
    pytest.param(("planner",), "planning the instances", id="planner"),
    pytest.param(("runner", "--instance", "demo", "--rank", "0", "--world-size", "2"), "rank 0", id="runner"),
    pytest.param(("status", "demo", "--watch"), "no live report", id="watch"),
    pytest.param(("status", "--watch"), "demo", id="watch-all"),
    pytest.param(("launch", "demo", "--world-size", "2"), "not here", id="launch"),
    pytest.param(("generate", "demo", "hello"), "no planner looks after it", id="generate"),
]


@pytest.mark.parametrize(("arguments", "begun"), OWN_SERVER)
async def test_the_terminal_of_a_whole_cluster_is_closed(
    session: Callable[..., Session], arguments: Sequence[str], begun: str
) -> None:
    one = session(*arguments)
    await one.says(begun)
    assert len(one.alive()) > 1
    one.hang_up()
    await one.is_over()


@pytest.mark.parametrize(("arguments", "begun"), ON_A_SERVER)
async def test_the_terminal_is_closed(
    session: Callable[..., Session], url: str, arguments: Sequence[str], begun: str
) -> None:
    one = session(*arguments, url=url)
    await one.says(begun)
    one.hang_up()
    await one.is_over()


async def test_a_terminal_is_closed_that_sends_no_signal(session: Callable[..., Session], url: str) -> None:
    """It is not the session's own: only what is written to it, or a look at it, tells that it is gone."""
    terminal, inner = pty.openpty()
    one = session("planner", url=url, stdout=inner, stderr=inner)
    os.close(inner)
    await one.says("planning the instances", terminal)
    os.close(terminal)
    assert await one.is_over() == 1


async def test_make_demo_in_a_terminal_that_is_closed() -> None:
    one = Session("make", "demo")
    try:
        await one.says("waiting for")
        one.hang_up()
        await one.is_over()
    finally:
        one.close()


async def test_nohup_stays(session: Callable[..., Session], url: str, tmp_path: Path) -> None:
    log = (tmp_path / "log").open("wb")
    one = Session("nohup", *own_command("planner"), url=url, stdout=log.fileno(), stderr=log.fileno())
    try:
        await wait_until(lambda: b"planning the instances" in (tmp_path / "log").read_bytes(), "it plans", BEGINS)
        one.process.send_signal(signal.SIGHUP)
        await asyncio.sleep(1)  # it is what does not happen that counts
        assert one.process.poll() is None
        one.process.terminate()
        assert await one.is_over() == 0
    finally:
        one.close()
        log.close()


@pytest.mark.parametrize("which", ["stdout", "stderr"])
@pytest.mark.parametrize(
    ("arguments", "begun"),
    [
        pytest.param(UP, "until Ctrl-C", id="up-keep"),
        pytest.param(("planner",), "planning the instances", id="planner"),
        pytest.param(("runner", "--instance", "demo", "--rank", "0", "--world-size", "2"), "rank 0", id="runner"),
        pytest.param(("status", "demo", "--watch"), "no live report", id="watch"),
        pytest.param(("launch", "demo", "--world-size", "2"), "not here", id="launch"),
    ],
)
async def test_the_reader_of_a_pipe_leaves(
    session: Callable[..., Session], url: str, arguments: Sequence[str], begun: str, which: Stream
) -> None:
    """Also of one that is never written to again."""
    reader, writer = os.pipe()
    one = session(*arguments, url="" if arguments is UP else url, **{which: writer})
    os.close(writer)
    begins_on_stderr = arguments[0] in ("planner", "runner", "launch")
    await one.says(begun, reader if begins_on_stderr == (which == "stderr") else None)
    os.close(reader)
    assert await one.is_over() == 1


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("status demo --watch | head -1", "demo"),
        ("up --world-size 2 --layers 2 --keep | head -1", "starting"),
    ],
)
async def test_piped_into_head(url: str, command: str, expected: str) -> None:
    program = " ".join(own_command())
    one = Session("sh", "-c", f"{program} {command}", url="" if command.startswith("up") else url)
    try:
        await one.says(expected)
        await one.is_over()
        assert "Traceback" not in one.text
    finally:
        one.close()


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full on this system")
@pytest.mark.parametrize(
    ("arguments", "which"),
    [
        pytest.param(UP, "stdout", id="up"),
        pytest.param(("status", "demo"), "stdout", id="status"),
        pytest.param(("status", "demo", "--watch"), "stdout", id="watch"),
        pytest.param(("planner",), "stderr", id="planner"),
        pytest.param(("runner", "--instance", "demo", "--rank", "0", "--world-size", "2"), "stderr", id="runner"),
        pytest.param(("launch", "demo", "--world-size", "2"), "stderr", id="launch"),
    ],
)
async def test_the_disk_is_full(
    session: Callable[..., Session], url: str, arguments: Sequence[str], which: Stream
) -> None:
    full = os.open(FULL, os.O_WRONLY)
    one = session(*arguments, url="" if arguments is UP else url, **{which: full})
    os.close(full)
    if which == "stdout":
        await one.says("rankgate: stdout cannot be written to: No space left on device")
    await wait_until(lambda: one.process.poll() is not None, "the command to end", BEGINS)
    assert await one.is_over() == 1
    assert "Traceback" not in one.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda one: one.name)
@pytest.mark.parametrize(
    ("arguments", "begun"),
    [
        pytest.param(UP, "until Ctrl-C", id="up-keep"),
        pytest.param(BLOCKED, "Loading", id="up-blocked-engines"),
        pytest.param(("planner",), "planning the instances", id="planner"),
        pytest.param(("runner", "--instance", "demo", "--rank", "0", "--world-size", "2"), "rank 0", id="runner"),
        pytest.param(("status", "demo", "--watch"), "no live report", id="watch"),
        pytest.param(("generate", "demo", "hello"), "no planner looks after it", id="generate"),
        pytest.param(("race",), "is connected", id="race"),
    ],
)
async def test_a_signal_comes_twice(
    session: Callable[..., Session], url: str, arguments: Sequence[str], begun: str, number: signal.Signals
) -> None:
    one = session(*arguments, url="" if arguments[0] in ("up", "race") else url)
    await one.says(begun)
    one.process.send_signal(number)
    await asyncio.sleep(0.05)  # as somebody's finger would
    one.process.send_signal(number)
    await one.is_over()
    while one.read():
        pass
    assert "Traceback" not in one.text
    assert "Exception ignored" not in one.text


@pytest.mark.parametrize("signals", [1, 2])
async def test_nobody_reads_any_more(session: Callable[..., Session], url: str, signals: int) -> None:
    """A pipe that is full, whose reader is stopped: what waits for it is abandoned at the first signal."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    one = session("planner", "-vv", url=url, stderr=writer)
    os.close(writer)
    try:
        await wait_until(lambda: "pipe_write" in Path(f"/proc/{one.process.pid}/wchan").read_text(), "it waits", BEGINS)
        for _ in range(signals):
            one.process.terminate()
        await one.is_over()
    finally:
        os.close(reader)

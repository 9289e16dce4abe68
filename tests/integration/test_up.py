"""The command line for real: processes, a real Valkey, signals, kills; and at the end of each test, nobody is left."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType

import psutil
import pytest
from redis.asyncio import Redis

from barrier.store.keys import Keys
from barrier.testing import wait_until
from planner.launcher import own_command, own_environment
from tests.integration.servers import RealServer

pytestmark = pytest.mark.anyio

DEADLINE = 60.0
"""Seconds after which something counts as hanging; nothing is measured with it."""

PROMPT = "the secret of the mountain"
PASSWORD = "hunter2 / and more"
ESCAPE = "\x1b"

# Runs a command in a terminal of its own, which this program's stdin types into; its exit code is the command's.
IN_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


class Command:
    """One command line under test. Every process that was ever below it is remembered.

    Args:
        directory: for what it writes.
        arguments: after ``rankgate``.
        url: the server's URL for RANKGATE_REDIS; none where it starts its own.
        terminal: whether it runs in a terminal of its own.
    """

    def __init__(self, directory: Path, *arguments: str, url: str = "", terminal: bool = False) -> None:
        self._stdout, self._stderr = directory / "stdout", directory / "stderr"
        self._arguments = arguments
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("RANKGATE_")}
        self._environment |= {**own_environment(), "COLUMNS": "80", "LINES": "30", "TERM": "xterm"}
        if url:
            self._environment["RANKGATE_REDIS"] = url
        # Not below pytest's own directory, whose path is too long for a server's socket.
        self._temporary = tempfile.TemporaryDirectory(prefix="rg-")
        self._environment["TMPDIR"] = self._temporary.name
        self._terminal = terminal
        self._seen: set[psutil.Process] = set()

    async def __aenter__(self) -> Command:
        command = own_command(*self._arguments)
        if self._terminal:
            command = (sys.executable, "-c", IN_TERMINAL, *command)
        with self._stdout.open("wb") as out, self._stderr.open("wb") as err:
            self.process = await asyncio.create_subprocess_exec(
                *command,
                env=self._environment,
                stdin=asyncio.subprocess.PIPE,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self._looking = asyncio.create_task(self._look())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._looking.cancel()
        for process in {*self._seen, *self.below()}:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        self._temporary.cleanup()
        if error is not None:
            error.add_note(f"stdout:\n{self.out}\nstderr:\n{self.err}")

    @property
    def out(self) -> str:
        """What it wrote to stdout so far; see `raw` for the escape codes."""
        return re.sub(rf"{ESCAPE}\[[0-9;?]*[A-Za-z]", "", self.raw)

    @property
    def raw(self) -> str:
        """What it wrote to stdout so far, to the letter."""
        return self._stdout.read_text(errors="replace")

    @property
    def err(self) -> str:
        """What it wrote to stderr so far."""
        return self._stderr.read_text(errors="replace")

    def below(self) -> list[psutil.Process]:
        """The processes below it now."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def find(self, part: str) -> psutil.Process:
        """The one process below it whose command line holds a text."""
        (found,) = [one for one in self.below() if part in command_line(one)]
        return found

    async def says(self, text: str) -> None:
        """Wait until it has written a text to stdout."""
        await wait_until(lambda: text in self.out or self.process.returncode is not None, f"{text!r}", DEADLINE)
        assert text in self.out, f"it ended with exit code {self.process.returncode} before it said {text!r}"

    async def code(self) -> int:
        """Wait for its end; returns its exit code. Then nobody may be left."""
        async with asyncio.timeout(DEADLINE):
            code = await self.process.wait()
        await self.nobody_is_left()
        if code != -signal.SIGKILL:
            assert os.listdir(self._temporary.name) == [], "nothing is left in the temporary directory"
        return code

    async def nobody_is_left(self) -> None:
        """Every process that was ever below it has ended: by itself already, or by the kernel just now."""
        assert self._seen, "there were processes to look at"
        await wait_until(lambda: not [one for one in self._seen if not has_ended(one)], "the last process to end", 10)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    async def _look(self) -> None:
        while True:
            self._seen.update(self.below())
            await asyncio.sleep(0.05)  # a look at every process of the machine is not free


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def has_ended(process: psutil.Process) -> bool:
    """Also where who inherited it has not reaped it yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
async def store(tmp_path: Path) -> AsyncGenerator[RealServer]:
    """A server with a password, as an operator would have."""
    async with RealServer(transport="tcp", password=PASSWORD, directory=tmp_path) as server:
        yield server


# --- up -------------------------------------------------------------------------------------------------------------------


async def test_the_demo(tmp_path: Path) -> None:
    """One rank is held back and waited for, LoadModel goes out once and after it, a text comes out, nobody is left."""
    arguments = ("--world-size", "4", "--hold-back", "3:1", "--layers", "4", "--prompt", PROMPT)
    async with Command(tmp_path, "up", *arguments) as up:
        assert await up.code() == 0

        assert "waiting for 1 of 4 ranks: rank 3 on " in up.out
        assert "[simulated text] " in up.out
        assert re.search(r"arrival skew \d+: rank 3 came last", up.out)
        assert "LoadModel dispatched 1×, after the last of 4 RunnerConnected" in up.out
        assert "rejections 0, breaches 0" in up.out
        assert ESCAPE not in up.raw
        assert up.err == ""
        assert PROMPT not in up.out


async def test_the_whole_log_has_no_prompt(tmp_path: Path) -> None:
    """At -vv every look, wake-up, report and log entry is told, of the planner and of the runners."""
    arguments = ("--world-size", "2", "--layers", "2", "--prompt", PROMPT, "-vv")
    async with Command(tmp_path, "up", *arguments) as up:
        assert await up.code() == 0
        assert "[simulated" in up.out, "and lines of the log may come between two pieces of the text"
        told = up.out + up.err
        for what in ("looks: 2 × Ready", "rank 1 reports Ready", "TRACE   [demo rank 0 attempt 1", "log entry: "):
            assert what in told, what
        assert PROMPT not in told


@pytest.mark.slow
async def test_a_single_rank(tmp_path: Path) -> None:
    async with Command(tmp_path, "up", "--world-size", "1", "--layers", "2") as up:
        assert await up.code() == 0
        assert "[simulated text] " in up.out
        assert "LoadModel dispatched 1×, after the only rank was Idle" in up.out


async def test_in_a_terminal_a_table_stays_in_its_place(tmp_path: Path) -> None:
    async with Command(tmp_path, "up", "--world-size", "2", "--layers", "4", terminal=True) as up:
        assert await up.code() == 0
        assert "rank  node" in up.out
        assert "██████████ 4/4" in up.out
        assert up.out.count("demo serves") >= 1
        hidden, shown = up.raw.rindex(f"{ESCAPE}[?25l"), up.raw.rindex(f"{ESCAPE}[?25h")
        assert hidden < shown, "the cursor is shown again"
        assert "breaches 0" in up.out


@pytest.mark.slow
async def test_several_ranks_share_a_process(tmp_path: Path) -> None:
    arguments = ("--world-size", "5", "--ranks-per-process", "2", "--layers", "2", "--hold-back", "4:0.2")
    async with Command(tmp_path, "up", *arguments, "--keep") as up:
        await up.says("serves until Ctrl-C")
        assert len([one for one in up.below() if " runner " in command_line(one)]) == 3
        up.send(signal.SIGINT)
        assert await up.code() == 0
        assert "LoadModel dispatched 1×, after the last of 5 RunnerConnected" in up.out


@pytest.mark.slow
async def test_64_ranks_in_4_processes(tmp_path: Path) -> None:
    async with Command(tmp_path, "up", "--world-size", "64", "--ranks-per-process", "16", "--layers", "4") as up:
        assert await up.code() == 0
        assert "LoadModel dispatched 1×, after the last of 64 RunnerConnected" in up.out
        assert "breaches 0" in up.out


LONG_CONNECT = ("--hold-back", "0:600")
LONG_LOAD = ("--layers", "10000")


@pytest.mark.parametrize(
    ("moment", "options"),
    [
        pytest.param("ranks 0-1: starting", (), marks=pytest.mark.slow),
        pytest.param(": Connecting", LONG_CONNECT, marks=pytest.mark.slow),
        (": Loading", LONG_LOAD),
        pytest.param("[simulated text]", (), marks=pytest.mark.slow),
    ],
)
async def test_ctrl_c_leaves_nobody_behind(tmp_path: Path, moment: str, options: tuple[str, ...]) -> None:
    async with Command(tmp_path, "up", "--world-size", "2", *options) as up:
        await up.says(moment)
        up.send(signal.SIGINT)
        assert await up.code() == 130
        assert "ending everything" in up.out
        assert "Traceback" not in up.err


@pytest.mark.slow
async def test_ctrl_c_in_a_terminal_reaches_up_alone(tmp_path: Path) -> None:
    """The runners lead sessions of their own: none of them dies of the key, and none is started again."""
    async with Command(tmp_path, "up", "--world-size", "2", *LONG_LOAD, terminal=True) as up:
        await up.says("Loading")
        assert up.process.stdin is not None
        up.process.stdin.write(b"\x03")
        assert await up.code() == 130
        assert "is started again" not in up.out
        assert "Traceback" not in up.out


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
async def test_other_signals_leave_nobody_behind(tmp_path: Path, number: signal.Signals) -> None:
    async with Command(tmp_path, "up", "--world-size", "2", *LONG_LOAD) as up:
        await up.says(": Loading")
        up.send(number)
        assert await up.code() == 143
        assert up.err == ""


@pytest.mark.slow
async def test_a_second_ctrl_c_does_not_wait_for_a_runner_that_does_not_answer(tmp_path: Path) -> None:
    async with Command(tmp_path, "up", "--world-size", "2", "--lease", "600", *LONG_LOAD) as up:
        await up.says(": Loading")
        up.find("--ranks 1-1").suspend()  # its lease holds, so the stop waits for it
        up.send(signal.SIGINT)
        await up.says("ending everything")
        up.send(signal.SIGINT)
        assert await up.code() == 130
        assert up.err == "", "nothing was waited for until its time was up"


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere the server outlives a parent that is killed with SIGKILL"
)
@pytest.mark.parametrize("moment", [pytest.param("ranks 0-1: starting", marks=pytest.mark.slow), ": Loading"])
async def test_sigkill_of_up_leaves_nobody_behind(tmp_path: Path, moment: str) -> None:
    async with Command(tmp_path, "up", "--world-size", "2", *LONG_LOAD) as up:
        await up.says(moment)
        up.send(signal.SIGKILL)
        assert await up.code() == -signal.SIGKILL


@pytest.mark.slow
async def test_a_runner_that_is_killed_heals(tmp_path: Path) -> None:
    """Everything goes on with a second attempt, in which the others are the same processes."""
    arguments = ("--world-size", "3", "--layers", "40", "--lease", "1", "--heartbeat", "0.2")
    async with Command(tmp_path, "up", *arguments) as up:
        await up.says(": Loading")
        others = [up.find("--ranks 0-0"), up.find("--ranks 2-2")]
        up.find("--ranks 1-1").kill()
        await up.says("the process of rank 1 ended (SIGKILL, signal 9) and is started again")
        await up.says("[simulated text]")
        assert [one.pid for one in others] == [up.find("--ranks 0-0").pid, up.find("--ranks 2-2").pid]
        assert await up.code() == 0
        assert "Where the time went in attempt 2" in up.out
        assert "LoadModel dispatched 1×, after the last of 3 RunnerConnected" in up.out
        assert "breaches 0" in up.out


@pytest.mark.slow
async def test_an_engine_that_is_killed_heals(tmp_path: Path) -> None:
    async with Command(tmp_path, "up", "--world-size", "2", "--layers", "20") as up:
        await up.says(": Loading")
        runners = [up.find("--ranks 0-0"), up.find("--ranks 1-1")]
        up.find("engine-of-rank-1").kill()
        await up.says("[simulated text]")
        assert [one.pid for one in runners] == [up.find("--ranks 0-0").pid, up.find("--ranks 1-1").pid]
        assert await up.code() == 0
        assert "engine of rank 1 died (signal 9) while loading" in up.out
        assert "Where the time went in attempt 2" in up.out
        assert "breaches 0" in up.out


@pytest.mark.slow
async def test_the_end_of_the_server_is_the_end_of_up(tmp_path: Path) -> None:
    async with Command(tmp_path, "up", "--world-size", "2", *LONG_LOAD) as up:
        await up.says(": Loading")
        up.find("valkey-server").kill()
        assert await up.code() == 1
        assert "rankgate: the embedded server ended; its last output:" in up.err


async def test_a_rank_that_refuses_for_good_is_named(tmp_path: Path) -> None:
    refuses = {"faults": [{"phase": "load", "action": "refuse", "rank": 1}]}
    async with Command(tmp_path, "up", "--world-size", "2", "--engine-config", json.dumps(refuses)) as up:
        assert await up.code() == 1
        said = up.err.removeprefix("rankgate: ")
        assert said.startswith("demo cannot be brought up: rank 1 on ")
        assert "refused for good" in said
        assert said.count("\n") == 1


@pytest.mark.slow
async def test_kept_up_it_answers_other_commands_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    async with Command(tmp_path, "up", "--world-size", "2", "--layers", "2", "--keep") as up:
        await up.says("rankgate generate demo")
        url = re.findall(r"export RANKGATE_REDIS=(\S+)", up.out)[0]
        assert "[simulated text] " in (await ask(url, "generate", "demo", PROMPT))[0]
        up.send(signal.SIGINT)
        assert await up.code() == 0


@pytest.mark.slow
async def test_a_password_is_not_among_the_hints(tmp_path: Path, store: RealServer) -> None:
    arguments = ("--world-size", "1", "--layers", "2", "--keep", "--namespace", "blue")
    async with Command(tmp_path, "up", *arguments, url=store.url) as up:
        await up.says("rankgate generate demo")
        assert "export RANKGATE_NAMESPACE=blue" in up.out
        assert "RANKGATE_REDIS" not in up.out
        assert "hunter2" not in up.out
        up.send(signal.SIGINT)
        assert await up.code() == 0


@pytest.mark.slow
async def test_an_instance_that_somebody_else_stops_ends_up(tmp_path: Path, store: RealServer) -> None:
    async with Command(tmp_path, "up", "--world-size", "2", "--layers", "2", "--keep", url=store.url) as up:
        await up.says("demo serves until Ctrl-C")
        await ask(store.url, "stop", "demo")
        assert await up.code() == 0


@pytest.mark.slow
async def test_up_on_a_server_of_ones_own(tmp_path: Path, store: RealServer) -> None:
    """Nothing of it says the password, and its ranks are free at once."""
    async with Command(tmp_path, "up", "--world-size", "2", "--layers", "20", url=store.url) as up:
        await up.says("Loading")
        lines = [command_line(one) for one in up.below()]
        assert len([one for one in lines if "engine-of-rank" in one]) == 2
        environments = [environment(one) for one in up.below() if "engine-of-rank" in command_line(one)]
        assert await up.code() == 0
        assert "hunter2" not in up.out + up.err + "".join(lines)
        assert not any("RANKGATE_REDIS" in one for one in environments)
    assert await held_ranks(store, "demo", 2) == []


def environment(process: psutil.Process) -> Mapping[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


@pytest.mark.slow
async def test_what_a_killed_up_leaves_on_the_server_is_in_nobodys_way(tmp_path: Path, store: RealServer) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    times = ("--lease", "1", "--heartbeat", "0.2")
    async with Command(first, "up", "--world-size", "2", *times, *LONG_LOAD, url=store.url) as up:
        await up.says(": Loading")
        up.send(signal.SIGKILL)
        assert await up.code() == -signal.SIGKILL
    async with Command(second, "up", "--world-size", "2", *times, "--layers", "2", url=store.url) as again:
        assert await again.code() == 0
        assert "breaches 0" in again.out


@pytest.mark.slow
async def test_up_refuses_an_instance_that_is_up_already(tmp_path: Path, store: RealServer) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    async with Command(first, "up", "--world-size", "1", "--layers", "2", "--keep", url=store.url) as up:
        await up.says("demo serves until Ctrl-C")
        async with Command(second, "up", "--world-size", "1", url=store.url) as other:
            assert await other.process.wait() == 1
            assert "rankgate: instance demo is up on this server already: stop it with rankgate stop demo" in other.err
        up.send(signal.SIGTERM)
        assert await up.code() == 0


@pytest.mark.parametrize(
    "command", [["up", "--world-size", "2"], ["status"], ["runner", "--instance", "a", "--rank", "0"]]
)
async def test_a_wrong_password_is_one_sentence_without_it(store: RealServer, command: list[str]) -> None:
    out, err, code = await run(f"redis://:letmein@127.0.0.1:{store.port}", *command)
    assert (out, code) == ("", 1)
    assert err.startswith("rankgate: the store at 127.0.0.1:")
    assert "refused" in err
    assert "letmein" not in err
    assert err.count("\n") == 1


@pytest.mark.slow
async def test_ctrl_c_in_the_race_leaves_nobody_behind(tmp_path: Path) -> None:
    async with Command(tmp_path, "race") as race:
        await race.says("its process is killed")
        race.send(signal.SIGINT)
        assert await race.code() == 130
        assert race.err == ""


# --- the parts, one by one ------------------------------------------------------------------------------------------------


async def run(url: str, *arguments: str) -> tuple[str, str, int]:
    """Run one command to its end; returns stdout, stderr and exit code."""
    names = {name: value for name, value in os.environ.items() if not name.startswith("RANKGATE_")}
    process = await asyncio.create_subprocess_exec(
        *own_command(*arguments),
        env={**names, **own_environment(), "RANKGATE_REDIS": url, "COLUMNS": "200"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(DEADLINE):
            out, err = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    return out.decode(), err.decode(), process.returncode or 0


async def ask(url: str, *arguments: str) -> tuple[str, str]:
    """Run one command that must succeed; returns stdout and stderr."""
    out, err, code = await run(url, *arguments)
    assert code == 0, f"exit code {code}: {err}"
    return out, err


async def held_ranks(store: RealServer, instance: str, world_size: int) -> list[int]:
    """The ranks that somebody claims or reports for."""
    keys = Keys("rankgate", instance)
    async with Redis(port=store.port, password=PASSWORD) as client:
        return [rank for rank in range(world_size) if await client.exists(keys.claim(rank), keys.rank(rank))]


@asynccontextmanager
async def operator(directory: Path, url: str) -> AsyncGenerator[dict[str, Command]]:
    """A planner and two runners, each started by its own command."""
    times = ("--lease", "1.5", "--heartbeat", "0.3")
    lines = {
        "planner": ("planner", *times),
        "rank 0": ("runner", "--instance", "blue", "--rank", "0", "--world-size", "2", *times),
        "rank 1": ("runner", "--instance", "blue", "--rank", "1", "--world-size", "2", "--node", "box-1", *times),
    }
    commands: dict[str, Command] = {}
    for name, line in lines.items():
        place = directory / name
        place.mkdir()
        commands[name] = Command(place, *line, url=url)
    async with commands["planner"], commands["rank 0"], commands["rank 1"]:
        yield commands


@pytest.mark.slow
async def test_an_operators_day(tmp_path: Path, store: RealServer) -> None:
    url = store.url
    async with operator(tmp_path, url) as commands:
        assert (await ask(url, "status"))[0].startswith("no instance in namespace rankgate")
        assert (await ask(url, "launch", "blue", "--world-size", "2", "--layers", "4"))[0] == "blue serves\n"
        assert (await ask(url, "explain", "blue"))[0] == "blue, attempt 1: all 2 ranks are Ready or Running\n"

        listed = (await ask(url, "status"))[0].splitlines()
        assert re.fullmatch(r"blue +serving +2 of 2 +1 +simulated +\S+ *", listed[1])
        ranks = (await ask(url, "status", "blue"))[0].splitlines()
        assert re.fullmatch(r" +1 +box-1 +\d+ +Ready +█{10} 4/4 +\d\.\d s *", ranks[3])
        told = json.loads((await ask(url, "status", "blue", "--json"))[0])
        assert [rank["status"] for rank in told["ranks"]] == ["Ready", "Ready"]
        assert told["ranks"][0]["pid"] == commands["rank 0"].process.pid
        assert [one["instance"] for one in json.loads((await ask(url, "status", "--json"))[0])] == ["blue"]

        out, err = await ask(url, "generate", "blue", PROMPT)
        assert re.fullmatch(r"\[simulated text\]( \w+)+\n", out)
        assert err == ""

        assert await ask(url, "stop", "blue") == ("blue is stopped\n", "")
        assert (await ask(url, "stop", "blue"))[0] == "blue is stopped\n", "twice does no harm"
        out, err, code = await run(url, "generate", "blue", PROMPT)
        assert (out, code) == ("", 1)
        assert err.startswith("rankgate: blue does not serve (stopped)")
        assert (await ask(url, "launch", "blue", "--world-size", "2", "--layers", "2"))[0] == "blue serves\n"

        # A runner that is asked to leave gives its rank back, and says 0.
        rank = commands["rank 1"]
        rank.send(signal.SIGTERM)
        assert await rank.code() == 0
        assert await held_ranks(store, "blue", 2) == [0]
        said = (await ask(url, "explain", "blue"))[0]
        assert said.startswith("blue, attempt 2")

        commands["planner"].send(signal.SIGINT)
        assert await commands["planner"].process.wait() == 130
        said = (await ask(url, "explain", "blue"))[0]
        assert "no planner looks after it: start one with rankgate planner" in said

        everything = "".join(one.out + one.err for one in commands.values())
        assert PROMPT not in everything
        assert "hunter2" not in everything
        assert "Traceback" not in everything


@pytest.mark.slow
async def test_a_changed_launch_asks_and_serves_means_this_spec(tmp_path: Path, store: RealServer) -> None:
    async with operator(tmp_path, store.url):
        launch = ("launch", "blue", "--world-size", "2", "--layers")
        assert (await ask(store.url, *launch, "2"))[0] == "blue serves\n"
        out, err, code = await run(store.url, "launch", "blue", "--world-size", "20", "--layers", "2")
        assert (out, code) == ("", 1)
        assert "blue is up with another spec (world_size 2 -> 20), and nothing was changed" in err
        assert "attempt 1: all 2 ranks are Ready" in (await ask(store.url, "explain", "blue"))[0]
        for attempt, layers in enumerate(
            (3, 4, 5), 2
        ):  # the old attempt serves on for a moment; that is not what is asked for
            out, err = await ask(store.url, *launch, str(layers), "--yes")
            assert out == "blue serves\n"
            assert f"model.total_layers  {layers - 1} -> {layers}\n" in err
            told = json.loads((await ask(store.url, "status", "blue", "--json"))[0])
            assert (told["epoch"]["attempt"], told["state"]) == (attempt, "serving")


@pytest.mark.slow
async def test_on_a_terminal_a_changed_launch_is_asked_about(tmp_path: Path, store: RealServer) -> None:
    async with operator(tmp_path, store.url):
        await ask(store.url, "launch", "blue", "--world-size", "2", "--layers", "2")
        for number, (typed, said) in enumerate([(b"n\n", "blue stays as it is"), (b"y\n", "blue serves")]):
            place = tmp_path / f"terminal {number}"
            place.mkdir()
            line = ("launch", "blue", "--world-size", "2", "--layers", "3")
            async with Command(place, *line, url=store.url, terminal=True) as asking:
                await asking.says("End attempt 1 for all ranks, and load again? [y/N]")
                assert asking.process.stdin is not None
                asking.process.stdin.write(typed)
                await asking.says(said)


@pytest.mark.slow
async def test_each_command_says_at_once_that_nobody_plans(tmp_path: Path, store: RealServer) -> None:
    """The planner is killed under an instance that serves; its leadership lapses."""
    async with operator(tmp_path, store.url) as commands:
        await ask(store.url, "launch", "blue", "--world-size", "2", "--layers", "2")
        commands["planner"].process.kill()
        await commands["planner"].process.wait()
        alone = "no planner looks after it: start one with rankgate planner"

        async def noticed() -> bool:
            return alone in (await ask(store.url, "explain", "blue"))[0]

        await wait_until(noticed, "the leadership to lapse", DEADLINE)
        assert (await ask(store.url, "explain", "blue"))[0] == (
            f"blue, attempt 1: all 2 ranks are Ready or Running; {alone}\n"
        )
        heading, *_, last = (await ask(store.url, "status", "blue"))[0].splitlines()
        assert "serving · no planner" in heading
        assert last.endswith(alone)
        assert (await ask(store.url, "status"))[0].endswith(f"{alone.replace('it:', 'blue:')}\n")
        out, err, code = await run(store.url, "generate", "blue", PROMPT, "--timeout", "600")
        assert (out, code) == ("", 1)
        assert err == f"blue: {alone}\nrankgate: blue does not answer: {alone}\n"


@pytest.mark.slow
async def test_a_launch_that_nobody_carries_out_says_what_is_missing_and_can_be_stopped(store: RealServer) -> None:
    out, err, code = await run(store.url, "launch", "blue", "--world-size", "2", "--timeout", "1")
    assert (out, code) == ("", 1)
    *told, last = err.splitlines()
    assert last.startswith(
        "rankgate: blue was not ready within 1 s: blue: no attempt has been opened; 2 of 2 ranks not here"
    )
    assert "the --timeout of this command is over, but blue stays launched: a planner goes on to bring it up" in last
    assert last.endswith("no planner looks after it: start one with rankgate planner")
    assert len(told) == 1, "and it said so when it began to wait, once"

    assert await ask(store.url, "stop", "blue") == ("blue is stopped\n", "")
    assert (await ask(store.url, "status"))[0].startswith("no instance in namespace rankgate")


@pytest.mark.parametrize(
    "command",
    [["explain"], ["generate"], *(pytest.param([name], marks=pytest.mark.slow) for name in ("status", "stop"))],
)
async def test_an_instance_that_nobody_launched(store: RealServer, command: list[str]) -> None:
    arguments = [*command, "nobody", *(["hello"] if command == ["generate"] else [])]
    out, err, code = await run(store.url, *arguments)
    assert (out, code) == ("", 1)
    advice = "Launch it with rankgate launch nobody --world-size N"
    if command == ["stop"]:
        advice = "Nothing is stopped: check the name and --namespace"
    assert err == (f"rankgate: there is no instance nobody in namespace rankgate; it has no others. {advice}\n")


@pytest.mark.slow
async def test_a_rank_that_is_taken(tmp_path: Path, store: RealServer) -> None:
    times = ("--lease", "0.6", "--heartbeat", "0.2")
    line = ("runner", "--instance", "blue", "--rank", "0", *times)
    async with Command(tmp_path, *line, url=store.url) as first:
        await wait_until(lambda: "this is rank 0" in first.err, "the first to hold the rank", DEADLINE)
        out, err, code = await run(store.url, *line, "--no-spare")
        assert (out, code) == ("", 1)
        assert "held by others: rank 0 by node " in err, "who, from when, at once"
        assert "rankgate: group blue: held by other processes (rank 0: " in err


@pytest.mark.slow
async def test_runners_take_any_rank_that_is_free(tmp_path: Path, store: RealServer) -> None:
    """Two of them for two ranks, told how many there are and nothing else; a third one finds none."""
    times = ("--lease", "0.9", "--heartbeat", "0.3")
    line = ("runner", "--instance", "blue", "--world-size", "2", *times)
    places = [tmp_path / name for name in ("planner", "a", "b")]
    for place in places:
        place.mkdir()
    async with (
        Command(places[0], "planner", *times, url=store.url),
        Command(places[1], *line, url=store.url) as one,
        Command(places[2], *line, url=store.url) as other,
    ):
        await ask(store.url, "launch", "blue", "--world-size", "2", "--layers", "2")
        taken = [re.findall(r"this is rank (\d)", command.err) for command in (one, other)]
        assert sorted(taken) == [["0"], ["1"]]
        assert command_line(one.find("engine-of-rank-")).endswith(f"engine-of-rank-{taken[0][0]}")
        out, err, code = await run(store.url, *line, "--no-spare")
        assert (out, code) == ("", 1)
        assert "held by other processes (rank 0: " in err
        one.send(signal.SIGTERM)
        other.send(signal.SIGTERM)
        assert (await one.code(), await other.code()) == (0, 0)


@pytest.mark.slow
async def test_spares_wait_and_are_shown_and_step_in(tmp_path: Path, store: RealServer) -> None:
    """One for any rank, one for a rank that is held, and one whose rank the instance does not have."""
    places = {name: tmp_path / name for name in ("day", "any", "second", "beyond")}
    for place in places.values():
        place.mkdir()
    line = ("runner", "--instance", "blue", "--lease", "1.5", "--heartbeat", "0.3")
    state = str(tmp_path / "state")
    async with AsyncExitStack() as stack:
        day = await stack.enter_async_context(operator(places["day"], store.url))
        await wait_until(
            lambda: all(f"this is {one}" in day[one].err for one in ("rank 0", "rank 1")),
            "both ranks to be held",
            DEADLINE,
        )
        waits_for_any = (*line, "--world-size", "2", "--node", "box-7", "--state-file", state)
        some = await stack.enter_async_context(Command(places["any"], *waits_for_any, url=store.url))
        await ask(store.url, "launch", "blue", "--world-size", "2", "--layers", "2")
        async with (
            Command(places["second"], *line, "--rank", "0", "--node", "box-8", url=store.url) as second,
            Command(places["beyond"], *line, "--rank", "4", "--node", "box-9", url=store.url) as beyond,
        ):

            async def shown() -> bool:
                told = json.loads((await ask(store.url, "status", "blue", "--json"))[0])
                return (len(told["spares"]), len(told["surplus"])) == (2, 1)

            await wait_until(shown, "all of them to be shown", DEADLINE)
            said = (await ask(store.url, "status", "blue"))[0]
            assert f"spare: node 'box-7', pid {some.process.pid}, waits for any rank for " in said
            assert f"spare: node 'box-8', pid {second.process.pid}, waits for rank 0 for " in said
            assert f"surplus: node 'box-9', pid {beyond.process.pid}, holds rank 4, and blue has ranks 0 to 1" in said
            assert "2 of 2, 2 spare, 1 surplus" in (await ask(store.url, "status"))[0]
            assert "this process waits as a spare until one is free" in second.err
            assert f"rank 0 by node {os.uname().nodename!r}, pid {day['rank 0'].process.pid}, " in second.err
            assert "the last attempt of blue had 2 ranks, 0 to 1: this one is surplus" in beyond.err
            assert (await ask(store.url, "health", "runner", "--state-file", state))[0] == (
                "blue: waits as a spare for any free rank\n"
            )
            for one in (second, beyond):
                one.send(signal.SIGTERM)
                assert await one.process.wait() == 0
        day["rank 1"].process.kill()
        await day["rank 1"].process.wait()
        await wait_until(lambda: "this is rank 1" in some.err, "the spare to step in", DEADLINE)
        assert (await ask(store.url, "launch", "blue", "--world-size", "2", "--layers", "2"))[0] == "blue serves\n"
        assert (await ask(store.url, "health", "runner", "--state-file", state))[0].startswith("blue rank 1: Ready")
        some.send(signal.SIGTERM)
        assert await some.process.wait() == 0
        assert await ask(store.url, "stop", "blue") == ("blue is stopped\n", "")
        assert "blue" not in (await ask(store.url, "status"))[0]
        assert re.search(r"blue +stopped", (await ask(store.url, "status", "--all"))[0])


@pytest.mark.slow
async def test_watching_without_a_terminal_is_a_line_a_change(tmp_path: Path, store: RealServer) -> None:
    day, watch, spare = tmp_path / "day", tmp_path / "watch", tmp_path / "spare"
    for place in (day, watch, spare):
        place.mkdir()
    async with operator(day, store.url):
        await ask(store.url, "launch", "blue", "--world-size", "2", "--layers", "2")
        async with Command(watch, "status", "blue", "--watch", url=store.url) as watching:
            await watching.says("blue serves")
            assert "  blue · attempt 1 · 2 ranks · serving · simulated, 2 layers\n" in watching.out
            waiting = ("runner", "--instance", "blue", "--world-size", "2", "--node", "box-7", "--lease", "1.5")
            async with Command(spare, *waiting, "--heartbeat", "0.3", url=store.url) as extra:
                who = f"spare: node 'box-7', pid {extra.process.pid}, "
                await watching.says(f"{who}waits for any rank")
                extra.send(signal.SIGTERM)
            await watching.says(f"{who}is gone")
            await ask(store.url, "stop", "blue")
            await watching.says("blue, attempt 1: Stopped: stop was asked for")
            store.kill()
            await watching.says("no answer from the store")
            await store.start()
            assert re.search(r"ranks? 0.*: Idle", watching.out)
            watching.send(signal.SIGINT)
            assert await watching.process.wait() == 130
            assert ESCAPE not in watching.raw
            assert all(" WARNING " in line for line in watching.err.splitlines()), watching.err


@pytest.mark.slow
async def test_several_ranks_of_one_runner_end_together(tmp_path: Path, store: RealServer) -> None:
    """One of them is taken: the process gives the others back, and says which."""
    times = ("--lease", "0.6", "--heartbeat", "0.2")
    line = ("runner", "--instance", "blue", "--inline-engine", *times)
    async with Command(tmp_path, *line, "--rank", "1", url=store.url) as first:
        await wait_until(lambda: "this is rank 1" in first.err, "the first to hold the rank", DEADLINE)
        _, err, code = await run(store.url, *line, "--ranks", "0-2", "--no-spare")
        assert code == 1
        assert "held by other processes (rank 1: " in err
        assert await held_ranks(store, "blue", 3) == [1]

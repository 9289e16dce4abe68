"""Processes that are kept running: started, restarted with patience, ended by pid, reaped, and never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from barrier import InvalidSettings
from barrier.testing import ManualClock, wait_until
from planner.launcher import Launcher, ProcessState, Program, Restarts, exit_sentence, own_command, own_environment

pytestmark = pytest.mark.anyio

SLEEPER = "import time; print('here', flush=True); time.sleep(600)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
FAST = Restarts(first_pause=0.001, longest_pause=0.001, stable_after=600.0, most=2)


def program(code: str, name: str = "rank 0") -> Program:
    return Program(name, (sys.executable, "-c", code))


def ended(orphan: psutil.Process) -> bool:
    """Whether a process that is not ours any more has ended; who inherits it may leave it a zombie."""
    try:
        return orphan.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Heard:
    """Collects what a launcher tells."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.states: list[ProcessState] = []

    def line(self, name: str, text: str) -> None:
        self.lines.append((name, text))

    def state(self, state: ProcessState) -> None:
        self.states.append(state)


def gone(pid: int) -> bool:
    """Whether there is no such process any more, not even a zombie."""
    return not psutil.pid_exists(pid)


async def test_every_program_runs_until_the_block_ends() -> None:
    heard = Heard()
    launcher = Launcher([program(SLEEPER, "rank 0"), program(SLEEPER, "rank 1")], on_line=heard.line)

    async with launcher:
        await wait_until(lambda: len(heard.lines) == 2, "both to speak", 30)
        pids = launcher.pids
        assert [state.phase for state in launcher.states] == ["running", "running"]
        assert {os.getsid(pid) for pid in pids} == set(pids), "each leads a session, so that Ctrl-C passes it by"

    assert sorted(heard.lines) == [("rank 0", "here"), ("rank 1", "here")]
    assert all(gone(pid) for pid in pids)
    assert [state.phase for state in launcher.states] == ["ended", "ended"]
    assert launcher.pids == ()


async def test_a_killed_process_is_started_again() -> None:
    heard = Heard()
    async with Launcher([program(SLEEPER)], restarts=FAST, on_change=heard.state, on_line=heard.line) as launcher:
        await wait_until(lambda: len(heard.lines) == 1, "the first life", 30)
        (first,) = launcher.pids

        os.kill(first, signal.SIGKILL)
        await wait_until(lambda: len(heard.lines) == 2, "the second life", 30)

        (state,) = launcher.states
        assert state.phase == "running"
        assert state.restarts == 1
        assert state.last_exit == "SIGKILL, signal 9"
        assert state.pid not in (None, first)
    assert [state.phase for state in heard.states] == ["running", "pausing", "running", "ended"]


async def test_a_process_that_dies_again_and_again_is_given_up() -> None:
    clock = ManualClock()
    hopeless = program("import sys; print('no such model', file=sys.stderr); sys.exit(3)")
    heard = Heard()
    async with Launcher([hopeless], restarts=Restarts(most=2), clock=clock, on_change=heard.state) as launcher:
        for pause in (0.2, 0.4):
            await wait_until(
                lambda: launcher.states[0].phase == "pausing" and clock.next_deadline is not None, "the pause", 30
            )
            await clock.advance(pause)
            await wait_until(lambda: launcher.states[0].phase != "pausing", "the next life", 30)

        state = await launcher.given_up()

    assert state.phase == "given up"
    assert state.restarts == 2
    assert state.last_exit == "exit code 3"
    assert state.last_words == "no such model"
    assert launcher.states[0].phase == "given up", "leaving does not hide it"


async def test_a_life_that_was_long_enough_begins_a_new_row() -> None:
    clock = ManualClock()
    heard = Heard()
    restarts = Restarts(first_pause=1.0, longest_pause=1.0, stable_after=10.0, most=1)
    async with Launcher([program(SLEEPER)], restarts=restarts, clock=clock, on_line=heard.line) as launcher:
        for life in range(1, 5):
            await wait_until(lambda life=life: len(heard.lines) == life, "a life", 30)
            await clock.advance(10.0)
            os.kill(launcher.pids[0], signal.SIGKILL)
            await wait_until(
                lambda: launcher.states[0].phase == "pausing" and clock.next_deadline is not None, "the pause", 30
            )
            await clock.advance(1.0)
        await wait_until(lambda: len(heard.lines) == 5, "the fifth life", 30)
        assert launcher.states[0].restarts == 4


async def test_a_program_that_cannot_be_started_is_given_up_with_the_reason() -> None:
    missing = Program("rank 0", ("/no/such/program",))
    async with Launcher([missing], restarts=FAST) as launcher:
        state = await launcher.given_up()
    assert state.last_exit == "could not be started"
    assert state.last_words == "/no/such/program: No such file or directory"


async def test_one_that_ignores_sigterm_is_killed_after_the_grace() -> None:
    heard = Heard()
    async with Launcher([program(DEAF)], grace=0.05, on_line=heard.line) as launcher:
        await wait_until(lambda: heard.lines, "it to be deaf", 30)
        (pid,) = launcher.pids
    assert gone(pid)
    assert launcher.states[0].phase == "ended"


async def test_one_that_is_paused_is_killed_after_the_grace() -> None:
    heard = Heard()
    async with Launcher([program(SLEEPER)], grace=0.05, on_line=heard.line) as launcher:
        await wait_until(lambda: heard.lines, "it to run", 30)
        (pid,) = launcher.pids
        os.kill(pid, signal.SIGSTOP)
    assert gone(pid)


async def test_kill_does_not_wait_for_the_grace() -> None:
    heard = Heard()
    async with Launcher([program(DEAF)], grace=600.0, on_line=heard.line) as launcher:
        await wait_until(lambda: heard.lines, "it to be deaf", 30)
        (pid,) = launcher.pids
        launcher.kill()
    assert gone(pid)


async def test_leaving_in_the_middle_of_a_pause_starts_nothing() -> None:
    clock = ManualClock()
    heard = Heard()
    async with Launcher([program("pass")], clock=clock, on_change=heard.state) as launcher:
        await wait_until(
            lambda: launcher.states[0].phase == "pausing" and clock.next_deadline is not None, "the pause", 30
        )
    assert [state.phase for state in heard.states] == ["running", "pausing", "ended"]


async def test_leaving_at_once_leaves_nothing() -> None:
    async with Launcher([program(SLEEPER), program(SLEEPER)]):
        pass
    assert psutil.Process().children() == []


async def test_output_is_cut_into_lines_and_bounded() -> None:
    heard = Heard()
    noisy = "import sys; sys.stdout.write('x' * 100_000 + '\\nlast\\rwords'); sys.stdout.flush()"
    async with Launcher([program(noisy)], restarts=Restarts(most=0), on_line=heard.line) as launcher:
        state = await launcher.given_up()
    assert [len(line) for _, line in heard.lines] == [500, 4, 5]
    assert state.last_words == "words"


async def test_a_helper_that_holds_the_pipe_open_does_not_hold_up_the_restart(tmp_path: Path) -> None:
    note = tmp_path / "helper"
    code = f"""
        import subprocess, sys
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        open({str(note)!r}, "a").write(f"{{helper.pid}}\\n")
    """
    try:
        async with Launcher([program(textwrap.dedent(code))], restarts=Restarts(most=0)) as launcher:
            state = await launcher.given_up()
        assert state.last_exit == "exit code 0"
    finally:
        for line in note.read_text().splitlines():
            with suppress(ProcessLookupError):
                os.kill(int(line), signal.SIGKILL)


async def test_the_environment_is_added_and_not_on_the_command_line() -> None:
    heard = Heard()
    secret = Program(
        "rank 0",
        (sys.executable, "-c", "import os, time; print(os.environ['SECRET'], flush=True); time.sleep(600)"),
        environment={"SECRET": "hunter2"},
    )
    async with Launcher([secret], on_line=heard.line) as launcher:
        await wait_until(lambda: heard.lines, "the secret", 30)
        assert "hunter2" not in " ".join(psutil.Process(launcher.pids[0]).cmdline())
    assert heard.lines == [("rank 0", "hunter2")]
    assert "hunter2" not in repr(secret)


@pytest.fixture
def orphan_maker(tmp_path: Path) -> Path:
    """A program that starts a child which follows its parent, and names both pids."""
    script = tmp_path / "parent.py"
    child = "import os, sys, time; from planner.launcher import leave_with_parent; leave_with_parent(int(sys.argv[1]))"
    child += "; print(os.getpid(), flush=True); time.sleep(600)"
    script.write_text(
        textwrap.dedent(f"""
        import os, subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", {child!r}, str(os.getpid())], stdin=subprocess.PIPE)
        child.wait()
        """)
    )
    return script


async def test_a_child_leaves_when_its_parent_is_killed(orphan_maker: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, orphan_maker, env={**os.environ, **own_environment()}, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    child = psutil.Process(int(await parent.stdout.readline()))
    parent.kill()
    await wait_until(lambda: ended(child), "the child's end", 30)
    await parent.wait()


def test_a_child_whose_parent_is_another_one_leaves_at_once() -> None:
    code = "from planner.launcher import leave_with_parent; leave_with_parent(1); print('stayed')"
    ended = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **own_environment()}, capture_output=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (1, b"")


def test_a_child_leaves_at_the_end_of_its_stdin() -> None:
    """The way out where the kernel has no death signal."""
    code = "import os; from planner.launcher import leave_with_parent; leave_with_parent(os.getppid()); import time; time.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, **own_environment()}, stdin=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(timeout=30) == 1


def test_our_own_command_line_finds_the_code_that_runs_here(tmp_path: Path) -> None:
    ended = subprocess.run(
        own_command("--version"), env={**os.environ, **own_environment()}, cwd=tmp_path, capture_output=True, check=True
    )
    assert ended.stdout.startswith(b"rankgate ")


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (0, "exit code 0"),
        (3, "exit code 3"),
        (-9, "SIGKILL, signal 9"),
        (-15, "SIGTERM, signal 15"),
        (-99, "signal 99"),
    ],
)
def test_an_exit_is_named(code: int, sentence: str) -> None:
    assert exit_sentence(code) == sentence


def test_pauses_double_up_to_the_longest() -> None:
    restarts = Restarts(first_pause=0.5, longest_pause=3.0)
    assert [restarts.pause(deaths) for deaths in (1, 2, 3, 4, 5, 1_000)] == [0.5, 1.0, 2.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"first_pause": 0}, "first_pause is 0; it must be a finite number of seconds above 0"),
        ({"stable_after": float("inf")}, "stable_after is inf"),
        ({"most": -1}, "most is -1; a process can be restarted 0 times or more"),
        ({"first_pause": 9.0}, "longest_pause is 5 s and first_pause is 9 s"),
    ],
)
def test_wrong_patience_is_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidSettings, match=sentence):
        Restarts(**wrong)


async def test_a_wrong_grace_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="grace is -1"):
        Launcher([], grace=-1)

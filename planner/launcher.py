"""Keeps processes of this machine running: starts them, restarts those that die, and ends all of them at the end.

`rankgate up` starts its runners with this, and tests may too. A process is known by its own pid until it is reaped. Nothing is ended by
a name.

Each process has a session of its own, so Ctrl-C in a terminal reaches only the parent, which then ends its children in order. If the
parent is killed before it can do so, `leave_with_parent` ends the child: on Linux the kernel kills it (PR_SET_PDEATHSIG), and
everywhere the child's stdin ends.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, NoReturn, TypeAlias, cast

from barrier import Clock, SystemClock, supervise
from barrier.errors import InvalidSettings
from barrier.plain import number
from barrier.printable import printable

__all__ = [
    "Launcher",
    "ProcessPhase",
    "ProcessState",
    "Program",
    "Restarts",
    "exit_sentence",
    "leave_with_parent",
    "own_command",
    "own_environment",
]


ProcessPhase: TypeAlias = Literal["running", "pausing", "given up", "ended"]

_DRAIN_SECONDS = 0.5  # a helper of a dead process may hold the pipe open; the last output comes at once
_REAP_SECONDS = 5.0  # after SIGKILL only a process that is stuck inside the kernel takes longer
_TAIL_LINES = 20
_LINE_CHARS = 500


@dataclass(frozen=True, slots=True)
class Program:
    """A process to keep running.

    Attributes:
        name: the name for people, for example ``rank 3``.
        command: the program and its arguments. Everybody on the machine can read them.
        environment: variables added to this process's own; for values that others must not read, such as a URL with a password.
        ranks: the ranks that it runs; may be empty.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    ranks: range = range(0)


@dataclass(frozen=True, slots=True)
class Restarts:
    """When and how often a process that died is started again. Times are in seconds.

    Attributes:
        first_pause: the pause after the first death; it doubles with each further death in a row.
        longest_pause: the longest pause.
        stable_after: if a process lived so long, its death counts as the first again.
        most: how many deaths in a row lead to a restart; after the next one the program is given up.
    """

    first_pause: float = 0.2
    longest_pause: float = 5.0
    stable_after: float = 10.0
    most: int = 5

    def __post_init__(self) -> None:
        """Refuse values that could never work."""
        for name in ("first_pause", "longest_pause", "stable_after"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise InvalidSettings(f"{name} is {value!r}; it must be a finite number of seconds above 0")
        if self.most < 0:
            raise InvalidSettings(f"most is {self.most}; a process can be restarted 0 times or more")
        if self.longest_pause < self.first_pause:
            raise InvalidSettings(
                f"longest_pause is {number(self.longest_pause)} s and first_pause is {number(self.first_pause)} s; "
                "longest_pause must be at least first_pause"
            )

    def pause(self, deaths: int) -> float:
        """Seconds to wait after so many deaths in a row (1 or more)."""
        return min(self.longest_pause, self.first_pause * 2.0 ** min(deaths - 1, 60))


@dataclass(frozen=True, slots=True)
class ProcessState:
    """The state of one program.

    Attributes:
        program: the program.
        phase: ``running``; ``pausing`` before a restart; ``given up`` after too many deaths; ``ended`` as asked.
        pid: the process id while it runs.
        restarts: how often it was started again.
        last_exit: how its last process ended, for people; empty while the first one runs.
        last_words: the last line that its last process wrote to stdout or stderr.
    """

    program: Program
    phase: ProcessPhase = "pausing"
    pid: int | None = None
    restarts: int = 0
    last_exit: str = ""
    last_words: str = ""


def exit_sentence(code: int) -> str:
    """Name an exit code in words. Negative codes are signals, as in asyncio and subprocess."""
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"{signal.Signals(-code).name}, signal {-code}"
    return f"signal {-code}"


class Launcher:
    """Runs programs for as long as a block lasts::

        async with Launcher([Program("rank 0", ("rankgate", "runner", …))]) as launcher:
            …

    At the end of the block every process gets SIGTERM, and SIGKILL if it still runs after `grace` seconds; both by pid. All are
    reaped. If the end is cancelled, they are killed at once.

    Args:
        programs: the programs to run.
        restarts: when and how often to restart.
        grace: seconds between SIGTERM and SIGKILL.
        clock: time, for tests.
        on_change: called with every new state.
        on_line: called with every line that a process writes: its program's name, and the line.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        *,
        restarts: Restarts | None = None,
        grace: float = 5.0,
        clock: Clock | None = None,
        on_change: Callable[[ProcessState], None] | None = None,
        on_line: Callable[[str, str], None] | None = None,
    ) -> None:
        if not 0 <= grace < float("inf"):
            raise InvalidSettings(f"grace is {grace!r}; it must be a finite number of seconds, 0 or more")
        self._states = [ProcessState(program) for program in programs]
        self._restarts = restarts or Restarts()
        self.grace = grace
        self._clock: Clock = clock or SystemClock()
        self._on_change = on_change and supervise.guarded("telling of a process's state", on_change)
        self._on_line = on_line and supervise.guarded("telling a process's line", on_line)
        self._lives: dict[int, _Life] = {}
        self._keeping: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        self._last_signal = signal.SIGTERM
        self._failed: asyncio.Future[ProcessState] | None = None

    @property
    def states(self) -> tuple[ProcessState, ...]:
        """The state of every program, in their order."""
        return tuple(self._states)

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes that run now."""
        return tuple(state.pid for state in self._states if state.pid is not None)

    async def given_up(self) -> ProcessState:
        """Wait until a program has died too often in a row; returns its state. Only one caller at a time may wait."""
        if self._failed is None:
            self._failed = asyncio.get_running_loop().create_future()
        for state in self._states:
            if state.phase == "given up":
                return state
        return await asyncio.shield(self._failed)

    async def __aenter__(self) -> Launcher:
        """Start every program."""
        self._keeping = [
            supervise.background(
                self._keep(index), f"the keeper of {state.program.name}", on_mistake=partial(self._keeper_failed, index)
            )
            for index, state in enumerate(self._states)
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every process."""
        await self.stop()

    async def stop(self) -> None:
        """End every process, as described above. Safe to call twice."""
        self._stopping.set()
        try:
            self._signal_all(signal.SIGTERM)
            if self.grace and self._keeping:
                await asyncio.wait(self._keeping, timeout=self.grace)
        finally:
            self.kill()
            if self._keeping:
                await asyncio.wait(self._keeping, timeout=_REAP_SECONDS)

    def kill(self) -> None:
        """Send SIGKILL to every process now, and restart none. `stop` waits until they have ended."""
        self._stopping.set()
        self._signal_all(signal.SIGKILL)

    def _signal_all(self, number: signal.Signals) -> None:
        self._last_signal = number
        for life in self._lives.values():
            life.signal(number)

    # --- one program --------------------------------------------------------------------------------------------------

    async def _keep(self, index: int) -> None:
        deaths = 0
        while not self._stopping.is_set():
            began = self._clock.now()
            how, words = await self._live(index)
            if self._stopping.is_set():
                break
            deaths = 1 if self._clock.now() - began >= self._restarts.stable_after else deaths + 1
            if deaths > self._restarts.most:
                self._give_up(index, last_exit=how, last_words=words)
                return
            self._change(index, phase="pausing", pid=None, last_exit=how, last_words=words)
            with suppress(TimeoutError):
                await self._clock.wait_for(self._stopping.wait(), self._restarts.pause(deaths))
        self._change(index, phase="ended", pid=None)

    def _keeper_failed(self, index: int, mistake: BaseException) -> None:
        """After a mistake of ours nobody looks after the program any more: give it up, so that `given_up` returns."""
        words = f"the part of rankgate that keeps it running failed: {supervise.described(mistake)}"
        self._give_up(index, last_exit="a mistake of ours", last_words=words)

    def _give_up(self, index: int, *, last_exit: str, last_words: str) -> None:
        self._change(index, phase="given up", pid=None, last_exit=last_exit, last_words=last_words)
        if self._failed is not None and not self._failed.done():
            self._failed.set_result(self._states[index])

    async def _live(self, index: int) -> tuple[str, str]:
        """Run one process to its end; returns how it ended and its last line."""
        state = self._states[index]
        program = state.program
        life = _Life(lambda line: self._on_line(program.name, line) if self._on_line else None)
        try:  # asyncio kills and reaps the child itself if this task is cancelled in here
            await asyncio.get_running_loop().subprocess_exec(
                lambda: life,
                *program.command,
                env={**os.environ, **program.environment},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return "could not be started", f"{program.command[0]}: {error.strerror}"
        self._lives[index] = life
        try:
            restarts = state.restarts + 1 if state.last_exit else 0
            self._change(index, phase="running", pid=life.pid, restarts=restarts)
            if self._stopping.is_set():  # `stop` was called while the process started
                life.signal(self._last_signal)
            return await life.end()
        except BaseException:  # also a cancellation: no process may be left
            life.signal(signal.SIGKILL)
            raise
        finally:
            del self._lives[index]

    def _change(
        self,
        index: int,
        *,
        phase: ProcessPhase,
        pid: int | None,
        restarts: int | None = None,
        last_exit: str | None = None,
        last_words: str | None = None,
    ) -> None:
        before = self._states[index]
        self._states[index] = replace(
            before,
            phase=phase,
            pid=pid,
            restarts=before.restarts if restarts is None else restarts,
            last_exit=before.last_exit if last_exit is None else last_exit,
            last_words=before.last_words if last_words is None else last_words,
        )
        if self._on_change is not None:
            self._on_change(self._states[index])


class _Life(asyncio.SubprocessProtocol):
    """One process.

    This is a protocol and not a stream: asyncio's own ``Process.wait`` may also wait for the end of the pipes. A helper process that
    is left behind can hold them open for ever.
    """

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._transport: asyncio.SubprocessTransport | None = None
        self._exited = asyncio.Event()
        self._silent = asyncio.Event()
        self._partial = b""
        self._lines: deque[str] = deque(maxlen=_TAIL_LINES)

    @property
    def pid(self) -> int | None:
        return self._transport.get_pid() if self._transport is not None else None

    def signal(self, number: signal.Signals) -> None:
        # Not the transport's send_signal: it polls, and could take the exit code away from asyncio.
        if self.pid is not None and not self._exited.is_set():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def end(self) -> tuple[str, str]:
        """Wait for the end of the process; returns how it ended and its last line."""
        try:
            await self._exited.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(_DRAIN_SECONDS):
                    await self._silent.wait()
        finally:
            if self._transport is not None:
                self._transport.close()
        self._feed(b"\n")
        code = self._transport.get_returncode() if self._transport is not None else None
        return "an unknown end" if code is None else exit_sentence(code), self._lines[-1] if self._lines else ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.SubprocessTransport", transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._feed(data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd == 1:
            self._silent.set()

    def process_exited(self) -> None:
        self._exited.set()

    def _feed(self, data: bytes) -> None:
        *lines, rest = re.split(rb"[\r\n]+", self._partial + data)
        self._partial = rest[:_LINE_CHARS]  # a line that never ends must not fill the memory
        for raw in lines:
            line = printable(raw[:_LINE_CHARS].decode(errors="replace").rstrip().expandtabs(4))
            if line:
                self._lines.append(line)
                self._on_line(line)


# --- in the child ---------------------------------------------------------------------------------------------------------


def own_command(*arguments: str) -> tuple[str, ...]:
    """The command line that runs ``rankgate`` with these arguments on this interpreter, installed or not; see `own_environment`."""
    # -P: nothing in the working directory is imported by surprise.
    return (sys.executable, "-P", "-m", "planner.cli", *arguments)


def own_environment() -> dict[str, str]:
    """The environment variables with which `own_command` finds the code that runs here."""
    root = str(Path(__file__).absolute().parents[1])
    if root in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))}


def leave_with_parent(parent: int) -> None:
    """End this process when its parent ends for any reason. Call it first in a process that a `Launcher` started.

    Args:
        parent: the pid of the parent; if the parent is another process by now, this process ends at once.
    """
    if sys.platform == "linux":
        import ctypes  # noqa: PLC0415 - slow, and needed only here

        pr_set_pdeathsig = 1
        if ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=_leave_at_the_end_of_stdin, name="parent watch", daemon=True).start()


def _leave_at_the_end_of_stdin() -> NoReturn:
    # Runs in a thread, so that a busy event loop does not delay it.
    try:
        with suppress(OSError):
            while os.read(0, 4096):
                pass
    finally:  # also after any error: without this watch the process could outlive its parent
        os._exit(1)

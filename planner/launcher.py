"""Keeps processes of this machine running: starts them, restarts those that die, and leaves none behind.

`rankgate up` starts its runners with this, and tests may. Every process is known by its own pid, from its start to the moment
it is reaped, and nothing is ever ended by a name.

A process that is started here leads a session of its own, so that Ctrl-C in a terminal reaches the parent alone, which then
ends things in order. Should the parent be killed before it can do so, `leave_with_parent` in the child sees to it: on Linux the
kernel kills the child (PR_SET_PDEATHSIG), and everywhere the child's stdin ends.
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

_DRAIN_SECONDS = 0.5  # a helper that a dead process left behind may hold its pipe open; its last words come at once
_REAP_SECONDS = 5.0  # after SIGKILL only a process that is stuck inside the kernel takes longer
_TAIL_LINES = 20
_LINE_CHARS = 500


@dataclass(frozen=True, slots=True)
class Program:
    """A process to keep running.

    Attributes:
        name: for people, for example ``rank 3``.
        command: the program and its arguments. Everybody on the machine can read it.
        environment: added to this process's own environment; for what others must not read, such as a URL with a password.
        ranks: the ranks that it runs; empty where it runs none.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    ranks: range = range(0)


@dataclass(frozen=True, slots=True)
class Restarts:
    """How patiently a process that died is started again. Times in seconds.

    Attributes:
        first_pause: the pause after the first death; doubled for every further one in a row.
        longest_pause: the longest pause.
        stable_after: a process that lived so long begins a new row.
        most: how many deaths in a row are mended; the next one is final.
    """

    first_pause: float = 0.2
    longest_pause: float = 5.0
    stable_after: float = 10.0
    most: int = 5

    def __post_init__(self) -> None:
        """Refuse what could never work."""
        for name in ("first_pause", "longest_pause", "stable_after"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise InvalidSettings(f"{name} is {value!r}; it must be a finite number of seconds above 0")
        if self.most < 0:
            raise InvalidSettings(f"most is {self.most}; a process can be restarted 0 times or more")
        if self.longest_pause < self.first_pause:
            raise InvalidSettings(
                f"longest_pause is {number(self.longest_pause)} s and first_pause is {number(self.first_pause)} s; "
                "the longest must not be below the first"
            )

    def pause(self, deaths: int) -> float:
        """Seconds to wait after so many deaths in a row (1 or more)."""
        return min(self.longest_pause, self.first_pause * 2.0 ** min(deaths - 1, 60))


@dataclass(frozen=True, slots=True)
class ProcessState:
    """What became of one program so far.

    Attributes:
        program: which.
        phase: ``running``; ``pausing`` before a restart; ``given up`` after too many deaths; ``ended`` as asked.
        pid: the process while it runs.
        restarts: how often it was started again.
        last_exit: how the last life ended, for people; empty while the first one goes on.
        last_words: the last line that the last life wrote to stdout or stderr.
    """

    program: Program
    phase: ProcessPhase = "pausing"
    pid: int | None = None
    restarts: int = 0
    last_exit: str = ""
    last_words: str = ""


def exit_sentence(code: int) -> str:
    """Name an exit code as asyncio and subprocess give it, where signals are negative."""
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"{signal.Signals(-code).name}, signal {-code}"
    return f"signal {-code}"


class Launcher:
    """Runs programs for as long as a block lasts::

        async with Launcher([Program("rank 0", ("rankgate", "runner", …))]) as launcher:
            …

    Leaving ends every process: SIGTERM first, SIGKILL for those that are still there after the grace; both by pid. All are
    reaped. If leaving is cancelled, they are killed at once.

    Args:
        programs: what to run.
        restarts: how patiently.
        grace: seconds between SIGTERM and SIGKILL.
        clock: time, for tests.
        on_change: told every change of a state.
        on_line: told every line that a process writes: its program's name, and the line.
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
        """What became of every program, in their order."""
        return tuple(self._states)

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes that run now."""
        return tuple(state.pid for state in self._states if state.pid is not None)

    async def given_up(self) -> ProcessState:
        """Wait until a program has died too often in a row; returns it. Only one at a time may wait."""
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
        """SIGKILL for every process, now, and no restarts. `stop` waits for their ends."""
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
        """A mistake of ours: the program is not looked after any more, and whoever waits for that hears of it."""
        words = f"what keeps it running failed: {supervise.described(mistake)}"
        self._give_up(index, last_exit="a mistake of ours", last_words=words)

    def _give_up(self, index: int, *, last_exit: str, last_words: str) -> None:
        self._change(index, phase="given up", pid=None, last_exit=last_exit, last_words=last_words)
        if self._failed is not None and not self._failed.done():
            self._failed.set_result(self._states[index])

    async def _live(self, index: int) -> tuple[str, str]:
        """One life of one process; returns how it ended and its last words."""
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
            if self._stopping.is_set():  # asked while it was being started
                life.signal(self._last_signal)
            return await life.end()
        except BaseException:  # also a cancellation: whatever ends the watching must not leave a process
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

    The protocol, not streams: asyncio's own ``Process.wait`` may also wait for the pipes' end, which a helper that the process
    has left behind can put off for ever.
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
        # Not the transport's send_signal: that polls, and could take the exit code away from asyncio.
        if self.pid is not None and not self._exited.is_set():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def end(self) -> tuple[str, str]:
        """Wait for it; returns how it ended and its last words."""
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
    """What `own_command` needs in its environment so that it finds the code that runs here."""
    root = str(Path(__file__).absolute().parents[1])
    if root in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))}


def leave_with_parent(parent: int) -> None:
    """End this process when its parent ends, however that happens. Call it first of all in a process that a `Launcher` started.

    Args:
        parent: the pid of the process that must be the parent; if it is not any more, this process ends at once.
    """
    if sys.platform == "linux":
        import ctypes  # noqa: PLC0415 - only here, and it is not free

        pr_set_pdeathsig = 1
        if ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=_leave_at_the_end_of_stdin, name="parent watch", daemon=True).start()


def _leave_at_the_end_of_stdin() -> NoReturn:
    # A thread, so that the parent's end is noticed while the event loop is busy.
    try:
        with suppress(OSError):
            while os.read(0, 4096):
                pass
    finally:  # whatever else ends the watch: without it this process could outlive its parent
        os._exit(1)

"""Runners and planners as real processes of the operating system, for tests that start, kill and count them.

Every process runs the product's own command line, is known by its own pid, ended by that pid and reaped. Should the tests
themselves be killed, the processes notice (`planner.launcher.leave_with_parent`).

Starting an interpreter and importing everything takes half a second of processor time. Where a test needs hundreds of runners, it may
have them forked from a warm process instead (`warm=True`): each is a new process of its own all the same, with its own pid, claim and
incarnation.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import select
import signal
import sys
from collections.abc import AsyncGenerator, Collection, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import psutil

from barrier import Settings, Store, connect
from planner.launcher import own_command, own_environment

REAP_SECONDS = 20.0
"""How long a process that was asked to end may take; it is a bound for hangs, not a measure."""


class Process:
    """One process. Its output goes to a file, of which failures show the end."""

    def __init__(self, name: str, pid: int, ended: asyncio.Future[int], log: Path) -> None:
        self.name = name
        self.pid = pid
        self._ended = ended
        self._log = log

    @property
    def code(self) -> int | None:
        """The exit code, negative for a signal; ``None`` while it runs."""
        return self._ended.result() if self._ended.done() else None

    @property
    def running(self) -> bool:
        return self.code is None

    def log(self, lines: int = 30) -> str:
        """The end of what it has written."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> int:
        """SIGTERM; the exit code. One that does not end is killed, and that is a failure."""
        await self._end(signal.SIGTERM)
        assert self.code is not None
        return self.code

    async def _end(self, number: signal.Signals) -> None:
        if self.running:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)
        try:
            async with asyncio.timeout(REAP_SECONDS):
                await asyncio.shield(self._ended)
        except TimeoutError:
            os.kill(self.pid, signal.SIGKILL)
            await self._ended
            raise AssertionError(
                f"{self.name} did not end within {REAP_SECONDS:g} s; it wrote:\n{self.log()}"
            ) from None


async def stopped(processes: Iterable[Process]) -> list[int]:
    """Ask all of them to end, side by side; their exit codes."""
    return await asyncio.gather(*(process.stop() for process in processes))


class Cluster:
    """Starts processes against one server, and ends all of them at the end of the block.

    Args:
        url: the server's.
        directory: for the processes' output.
        settings: the times; the same for all.
    """

    def __init__(self, url: str, directory: Path, settings: Settings) -> None:
        self.url = url
        self.settings = settings
        self._directory = directory
        self._started = 0
        self._nursery: Nursery | None = None
        self.processes: list[Process] = []

    async def runner(
        self,
        instance: str,
        ranks: int | range,
        world_size: int,
        engine: Mapping[str, Any] | None = None,
        *,
        factory: str = "simulated",
        inline: bool = False,
        warm: bool = False,
        hold_back: Mapping[int, float] | None = None,
        wait_for_store: float = 0.0,
    ) -> Process:
        """Start one process that runs one rank, or several.

        Args:
            instance: whose ranks.
            ranks: which.
            world_size: how many there are.
            engine: the engine's configuration.
            factory: which engine, as ``rankgate runner --engine`` takes it.
            inline: whether the engine lives in the runner's process; several ranks of one process always share it.
            warm: whether it is forked from a process that has imported everything already.
            hold_back: extra seconds that a rank takes to connect.
            wait_for_store: seconds for which it waits for its store to begin with.
        """
        span = range(ranks, ranks + 1) if isinstance(ranks, int) else ranks
        arguments = [
            *("--ranks", f"{span[0]}-{span[-1]}"),
            *("--world-size", str(world_size)),
            *("--engine", factory),
            *("--engine-config", json.dumps(dict(engine or {}))),
        ]
        if inline or len(span) > 1:
            arguments.append("--inline-engine")
        for rank, seconds in (hold_back or {}).items():
            arguments += ["--hold-back", f"{rank}:{seconds}"]
        if wait_for_store:
            arguments += ["--wait-for-store", str(wait_for_store)]
        name = f"{instance}-ranks-{span[0]}-{span[-1]}"
        return await self._start(name, "runner", "--instance", instance, *arguments, warm=warm)

    async def runners(
        self, instance: str, world_size: int, engine: Mapping[str, Any] | None = None, **options: Any
    ) -> list[Process]:
        """Start one process for every rank; they come up side by side."""
        return [await self.runner(instance, rank, world_size, engine, **options) for rank in range(world_size)]

    async def planner(self, *, wait_for_store: float = 0.0) -> Process:
        """Start a planner that looks after every instance that is wanted; it waits that many seconds for its store to begin with."""
        return await self._start(
            "planner", "planner", *(["--wait-for-store", str(wait_for_store)] if wait_for_store else [])
        )

    async def _start(self, name: str, command: str, *arguments: str, warm: bool = False) -> Process:
        self._started += 1
        log = self._directory / f"{self._started:04d}-{name}.log"
        log.touch()
        times = [
            *("--lease", repr(self.settings.lease)),
            *("--heartbeat", repr(self.settings.heartbeat)),
            *("--command-timeout", repr(self.settings.command_seconds)),
        ]
        words = [command, *arguments, *times]
        if warm:
            if self._nursery is None:
                self._nursery = await Nursery.started(self._directory / "nursery.log")
            pid, ended = await self._nursery.fork(words, {"RANKGATE_REDIS": self.url}, log)
        else:
            parent = ["--parent", str(os.getpid())] if command == "runner" else []
            with log.open("wb") as output:
                started = await asyncio.create_subprocess_exec(
                    *own_command(*words, *parent),
                    env={**os.environ, **own_environment(), "RANKGATE_REDIS": self.url},
                    stdin=asyncio.subprocess.PIPE,  # its end tells the process that the tests are gone
                    stdout=output,
                    stderr=asyncio.subprocess.STDOUT,
                    start_new_session=True,
                )
            pid, ended = started.pid, asyncio.create_task(started.wait())
        process = Process(name, pid, ended, log)
        self.processes.append(process)
        return process

    @property
    def nursery_pid(self) -> int | None:
        """The warm process, if there is one."""
        return self._nursery.pid if self._nursery is not None else None

    def logs(self) -> str:
        """The end of what every process has written, for a failure's message."""
        return "\n".join(f"--- {one.name}, pid {one.pid}, exit code {one.code}\n{one.log(8)}" for one in self.processes)

    async def __aenter__(self) -> Cluster:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            if process.running:
                await process.kill()
        if self._nursery is not None:
            await self._nursery.stop()


class Nursery:
    """Forks processes from one that has imported everything, and tells how each of them ended. Talks in lines of JSON."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._starting: asyncio.Queue[int] = asyncio.Queue()
        self._ended: dict[int, asyncio.Future[int]] = {}
        self._listening = asyncio.create_task(self._listen())

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    async def started(cls, log: Path) -> Nursery:
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "tests.integration.cluster"),
                env={**os.environ, **own_environment()},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        return cls(process)

    async def fork(
        self, arguments: list[str], environment: dict[str, str], log: Path
    ) -> tuple[int, asyncio.Future[int]]:
        """Start a process; its pid, and its exit code once it has ended."""
        assert self._process.stdin is not None
        order = {"arguments": arguments, "environment": environment, "log": str(log)}
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        await self._process.stdin.drain()
        pid = await self._starting.get()
        return pid, self._ended[pid]

    async def _listen(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            match json.loads(line):
                case {"started": int(pid)}:
                    self._ended[pid] = asyncio.get_running_loop().create_future()
                    self._starting.put_nowait(pid)
                case {"ended": int(pid), "code": int(code)}:
                    self._ended[pid].set_result(code)
                case other:
                    raise AssertionError(f"the nursery said {other}")

    async def stop(self) -> None:
        """End it; the processes that it started have ended before."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()
        await self._listening


def nursery_main() -> None:
    """Fork whenever told to, report every end, and leave when stdin ends. No thread here, so that forking is safe."""
    for module in ("planner.cli.app", "planner.cli.runner_process", "runner.engines.simulated"):
        importlib.import_module(module)  # for those who are forked
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, _wake_up)
    lines = b""
    held: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([0, wake_read], [], [])
        if wake_read in ready:
            os.read(wake_read, 4096)
            while held:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                os.close(held.pop(pid))
                _say({"ended": pid, "code": os.waitstatus_to_exitcode(status)})
        if 0 in ready:
            data = os.read(0, 65536)
            if not data:
                return
            *orders, lines = (lines + data).split(b"\n")
            for order in orders:
                reading, writing = os.pipe()  # the child's stdin; that it ends tells it that this process is gone
                parent, pid = os.getpid(), os.fork()
                if pid == 0:
                    for other in (writing, wake_read, wake_write, *held.values()):
                        os.close(other)
                    _forked(json.loads(order), reading, parent)
                os.close(reading)
                held[pid] = writing
                _say({"started": pid})


def _wake_up(number: int, frame: FrameType | None) -> None:
    """Nothing: that there is a handler makes the signal write to the wake-up pipe."""


def _say(message: dict[str, int]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def _forked(order: dict[str, Any], stdin: int, parent: int) -> NoReturn:
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        log = os.open(order["log"], os.O_WRONLY | os.O_APPEND)
        for number, descriptor in ((0, stdin), (1, log), (2, log)):
            os.dup2(descriptor, number)
        os.environ.update(order["environment"])
        from planner.cli import main

        code = main([*order["arguments"], "--parent", str(parent)])
    finally:
        os._exit(code)  # never back into the nursery's loop


@asynccontextmanager
async def connected(url: str, settings: Settings) -> AsyncGenerator[Store]:
    """A store for the test itself."""
    store = await connect(url, settings=settings)
    try:
        yield store
    finally:
        await store.close()


# --- what must not be left behind -----------------------------------------------------------------------------------------


def descendants(*, without: Collection[int | None] = ()) -> set[psutil.Process]:
    """Every process below this one, engines' processes included, apart from those with these pids."""
    return {one for one in psutil.Process().children(recursive=True) if one.pid not in without}


def still_there(processes: set[psutil.Process]) -> list[str]:
    """Those that run. A pid that was given to another process since does not count; nor does an orphan that init has yet to reap."""
    return [str(one) for one in processes if one.is_running() and not _is_dead(one)]


def _is_dead(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def all_keys(store: Store) -> list[str]:
    """Every key in the store; for tests only."""
    return sorted([key.decode() async for key in store.commands.scan_iter(count=1_000)])


async def keys_without_lifetime(store: Store) -> list[str]:
    """The keys that would stay for ever."""
    keys = await all_keys(store)
    async with store.commands.pipeline(transaction=False) as pipe:
        for key in keys:
            pipe.pttl(key)
        lifetimes = await pipe.execute()
    return [key for key, lifetime in zip(keys, lifetimes, strict=True) if lifetime == -1]


async def load_models_in_log(store: Store, tasks_key: str) -> list[str]:
    """The ids of all LoadModel entries in a task log, by the log itself and nobody's word."""
    entries = await store.commands.xrange(tasks_key)
    return [
        entry_id.decode()
        for entry_id, fields in entries
        if json.loads(fields.get(b"task", b"{}")).get("kind") == "LoadModel"
    ]


if __name__ == "__main__":
    nursery_main()

"""The child process that a `ProcessHost` starts: serves one engine over its pipes."""

from __future__ import annotations

import asyncio
import atexit
import importlib
import os
import signal
import sys
import threading
from contextlib import aclosing
from dataclasses import asdict
from traceback import walk_tb
from typing import Any, NoReturn

from runner.engine import Engine, EngineFailure
from runner.host.contract import CHUNK_WINDOW
from runner.host.failures import UNFIT, Failure, sentence_of, was_cancelled
from runner.host.frames import FrameBuffer, decode_request, encode_frame
from runner.host.leftovers import MARK
from runner.host.work import Work, perform

__all__ = ["child_command", "child_environment", "child_main"]


def child_command(rank: int) -> list[str]:
    """The command line of an engine's process; it holds no configuration and no prompt.

    ``-c`` and not ``-m``: the latter runs this module twice if the package has imported it. ``-P``: nothing in the working
    directory is imported by mistake. ``-u``: the last output before a crash is not lost in a buffer.
    """
    start = "from runner.host.child import child_main; child_main()"
    return [sys.executable, "-P", "-u", "-c", start, str(os.getpid()), f"engine-of-rank-{rank}"]


def child_environment(mark: str = "") -> dict[str, str]:
    """The environment of an engine's process: that of this process, a mark, and ``sys.path``, so that it finds the same modules.

    The child restores PYTHONPATH before any engine code runs. `runner.host.leftovers` explains the mark; without one, helpers that leave
    the process group are not found again.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path, MARK: mark}


def child_main() -> None:
    """Serve one engine on stdin and stdout until told to close, or until stdin ends. It is the main function of the child process."""
    # The pipes move to other numbers, which nobody else writes to. What the engine prints goes to stderr, and cannot look like a frame.
    commands, replies = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    _die_with_parent(int(sys.argv[1]))
    asyncio.run(_EngineServer(commands, replies).serve())
    _leave()


def _leave() -> NoReturn:
    """End this process without the interpreter's own shutdown, which takes half a second after many imports, and waits for threads.

    The engine has closed, and the runner waits for the end of its process. Functions that were registered with `atexit` are still called.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - as the interpreter would
    finally:
        os._exit(0)


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        import ctypes  # noqa: PLC0415 - only the child needs it, and it is not free

        pr_set_pdeathsig = 1
        if ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The parent may have ended before the call of prctl.
    if os.getppid() != parent:
        os._exit(1)


def _end_by(mistake: BaseException) -> NoReturn:
    """End this process after a mistake of ours. Print its type and its frames, and not its text, which may quote a prompt."""
    frames = [
        f"{frame.f_code.co_filename}:{line} in {frame.f_code.co_name}" for frame, line in walk_tb(mistake.__traceback__)
    ]
    print(f"a mistake of ours: {type(mistake).__name__} [{' < '.join(reversed(frames))}]", file=sys.stderr, flush=True)
    os._exit(1)


def _end_if_mistaken(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (mistake := task.exception()) is not None:
        _end_by(mistake)


class _EngineServer:
    """The child's side of the pipes: one engine, one call at a time."""

    def __init__(self, commands: int, replies: int) -> None:
        self._commands = commands
        self._replies = replies
        self._rank = 0
        self._factory = ""
        self._config: dict[str, Any] = {}
        self._engine: Engine | None = None
        self._call = 0
        self._task: asyncio.Task[None] | None = None
        self._room = asyncio.Semaphore(0)
        self._closing = asyncio.Event()

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read_commands, args=(loop,), name="commands", daemon=True).start()
        await self._closing.wait()
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._engine is not None:
            await self._engine.close()

    def _read_commands(self, loop: asyncio.AbstractEventLoop) -> None:
        # In a thread, so that it notices the end of the runner even while the engine blocks the loop.
        buffer = FrameBuffer()
        try:
            while data := os.read(self._commands, 1 << 20):
                for frame in buffer.feed(data):
                    loop.call_soon_threadsafe(self._receive_or_end, frame)
        except Exception as mistake:  # noqa: BLE001 - whatever it is
            _end_by(mistake)
        finally:
            # The runner is gone, or sends bytes that are no frame. Nobody waits for a close any more.
            os._exit(1)

    def _receive_or_end(self, frame: dict[str, Any]) -> None:
        # The runner would wait long for a call that never begins. It notices at once that an engine has died.
        try:
            self._receive(frame)
        except Exception as mistake:  # noqa: BLE001 - whatever it is
            _end_by(mistake)

    def _receive(self, frame: dict[str, Any]) -> None:
        match frame["kind"]:
            case "start":
                self._rank, self._factory, self._config = frame["rank"], frame["factory"], frame["config"]
                os.environ.pop("PYTHONPATH", None)
                if frame["pythonpath"] is not None:
                    os.environ["PYTHONPATH"] = frame["pythonpath"]
            case "call":
                self._call = frame["call"]
                self._room = asyncio.Semaphore(CHUNK_WINDOW)
                work = Work(frame["name"], decode_request(frame["name"], frame["request"]))
                self._task = asyncio.create_task(self._work(self._call, work))
                self._task.add_done_callback(_end_if_mistaken)
            case "more":
                if frame["call"] == self._call:
                    self._room.release()
            case "cancel":
                if frame["call"] == self._call and self._task is not None:
                    self._task.cancel()
            case "close":
                self._closing.set()
            case kind:
                raise ValueError(f"unknown command {kind!r}")

    async def _work(self, call: int, work: Work) -> None:
        try:
            engine = self._engine = self._engine or self._make_engine()
            async with aclosing(perform(engine, work)) as values:
                async for value in values:
                    if work.name == "generate":
                        # It also lets the loop see a cancellation if the engine itself never really awaits.
                        await self._room.acquire()
                    self._send({"kind": "value", "call": call, "value": value})
        except BaseException as error:  # noqa: BLE001 - an engine may raise anything, even a panic of its Rust code
            if was_cancelled(error):
                self._send({"kind": "done", "call": call})
                return
            failure = Failure.of(error, work, self._rank)
            self._send({"kind": "failed", "call": call, "failure": asdict(failure)})
        else:
            self._send({"kind": "done", "call": call})

    def _make_engine(self) -> Engine:
        module, _, name = self._factory.partition(":")
        try:
            factory: Any = importlib.import_module(module)
            for part in name.split("."):
                factory = getattr(factory, part)
        except UNFIT as error:
            raise EngineFailure(
                f"engine factory {self._factory!r} cannot be imported: {sentence_of(error)}", permanent=True
            ) from error
        try:
            return factory(self._config)
        except UNFIT as error:
            raise EngineFailure(
                f"engine factory {self._factory!r} refuses its configuration: {sentence_of(error)}", permanent=True
            ) from error

    def _send(self, frame: dict[str, Any]) -> None:
        data = memoryview(encode_frame(frame))
        while data:
            data = data[os.write(self._replies, data) :]

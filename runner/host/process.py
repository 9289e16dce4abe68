"""A host that keeps the engine in a child process of its own, which can always be killed."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

from runner.engine import EngineDied, EngineFailure
from runner.host import leftovers
from runner.host.child import child_command, child_environment
from runner.host.contract import EngineSpec
from runner.host.failures import MAX_FAILURE_CHARS, Failure, engine_log
from runner.host.frames import FrameBuffer, encode_frame, encode_request
from runner.host.lives import BaseHost, Call, Life

__all__ = ["ProcessHost"]


_STDERR_LINES = 5

_STDERR_LINE_CHARS = 300

_DRAIN_SECONDS = 0.5


class ProcessHost(BaseHost):
    """Hosts an engine in a child process, started by the first ``start``, ``prepare``, ``connect`` or ``load``.

    No engine outlives its runner, not even a runner that was killed with SIGKILL: the child ends when its stdin does (as soon
    as the interpreter's lock is free), and on Linux the kernel kills it as well (PR_SET_PDEATHSIG; it is tied to the thread
    that runs the event loop, which therefore must live as long as the host). The child leads a session of its own, so that Ctrl-C in a terminal reaches the runner
    alone. Helpers that the engine started are killed with it, on Linux also those in sessions of their own and also when the
    runner was killed (`runner.host.leftovers`).

    What the engine writes to stdout or stderr goes to the log at debug level, and the last lines into the text of an
    `EngineDied`. Once the engine has been given a prompt, its output may quote that prompt, and is dropped and only counted.

    Args:
        spec: which engine.
        rank: for the texts of failures and the child's command line.
        grace_seconds: how long the child may take to stop a cancelled generation, to close, and to be gone after a kill.
        output_is_safe: the engine is known never to print a prompt, so its output is kept after a generation, too.
        spare_after: where the start and the preparation of an engine took longer than so many seconds, a second engine is started and
            prepared as soon as the first one is warm, and takes its place when that one is gone: recovery does not pay for
            imports. ``math.inf`` keeps no spare, for machines that have not the memory for a second process.
    """

    def __init__(
        self,
        spec: EngineSpec,
        *,
        rank: int = 0,
        grace_seconds: float = 5.0,
        output_is_safe: bool = False,
        spare_after: float = 1.0,
    ) -> None:
        super().__init__(rank=rank, grace_seconds=grace_seconds, spare_after=spare_after)
        self._spec = spec
        self._output_is_safe = output_is_safe

    def _new_life(self) -> Life:
        return _ProcessLife(self._spec, self._rank, self._output_is_safe, self._gone)


class _ProcessLife(Life, asyncio.SubprocessProtocol):
    """A child process.

    The protocol, not streams: asyncio's own ``Process.wait`` also waits for the pipes' end, which a helper that the engine
    has left behind can put off for ever.
    """

    def __init__(self, spec: EngineSpec, rank: int, output_is_safe: bool, on_gone: Callable[[Life], None]) -> None:
        super().__init__(on_gone)
        self._start_frame = encode_frame(
            {
                "kind": "start",
                "rank": rank,
                "factory": spec.factory,
                "config": spec.config,
                "pythonpath": os.environ.get("PYTHONPATH"),
            }
        )
        self._rank = rank
        self._mark = ""
        self._ending_helpers: asyncio.Future[None] | None = None
        self._transport: asyncio.SubprocessTransport | None = None
        self._spawning: asyncio.Task[Any] | None = None
        self._condemned = False
        self._exited = False
        self._open_pipes = {1, 2}
        self._replies = FrameBuffer()
        self._stderr = _StderrTail(rank, keep_all=output_is_safe)
        self._call: Call | None = None
        self._call_number = 0

    @property
    def pid(self) -> int | None:
        return self._transport.get_pid() if self._transport is not None else None

    async def start(self) -> None:
        from barrier import supervise  # noqa: PLC0415 - see `engine_log`

        loop = asyncio.get_running_loop()
        self._mark = leftovers.begin()
        self._spawning = supervise.background(
            loop.subprocess_exec(
                lambda: self, *child_command(self._rank), env=child_environment(self._mark), start_new_session=True
            ),
            f"the start of the engine of rank {self._rank}",
            on_mistake=lambda _: None,  # `start` raises it
            expected=(OSError,),
        )
        self._spawning.add_done_callback(self._spawned)
        # Shielded, so that a cancelled start still learns what it started, kills it, and knows when it is gone.
        await asyncio.shield(self._spawning)

    def _spawned(self, spawning: asyncio.Task[Any]) -> None:
        failed = spawning.cancelled() or spawning.exception() is not None
        if failed and self._ending_helpers is None:
            self._ending_helpers = asyncio.get_running_loop().run_in_executor(None, leftovers.end, self._mark)
        # Otherwise `start` raises, or the process's own end will be told.
        if failed and self._condemned:
            self._is_gone()

    def begin(self, call: Call) -> None:
        work = call.work
        self._call = call
        self._call_number += 1
        number = self._call_number
        if work.name == "generate":
            call.on_taken = lambda: self._send({"kind": "more", "call": number})
            self._stderr.withhold()
        try:
            self._send({"kind": "call", "call": number, "name": work.name, "request": encode_request(work.request)})
        except EngineFailure as error:
            self._finish_call(number, error)

    def cancel(self, call: Call) -> None:
        self._send({"kind": "cancel", "call": self._call_number})

    def close(self) -> None:
        if self._transport is None:
            self.kill()  # it does not listen yet, and has nothing to give up
        else:
            self._send({"kind": "close"})

    def kill(self) -> None:
        self._condemned = True
        if self._spawning is not None and self._spawning.done():
            self._spawned(self._spawning)
        if not self._exited:
            self._kill_group()

    def death(self, doing: str) -> EngineDied:
        code = self._transport.get_returncode() if self._transport is not None else None
        if code is None:
            how = "unknown exit"
        elif code < 0:
            how = f"signal {-code}"
        else:
            how = f"exit code {code}"
        return EngineDied(
            f"engine of rank {self._rank} died ({how}) while {doing}; {self._stderr.told()}"[:MAX_FAILURE_CHARS]
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.SubprocessTransport", transport)
        if self._condemned:
            self._kill_group()
            return
        self._write(self._start_frame)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 2:
            self._stderr.feed(data)
            return
        try:
            for frame in self._replies.feed(data):
                self._receive(frame)
        except ValueError as error:
            self._stderr.remark(f"sent a reply that is none: {error}")
            self.kill()
        except Exception as mistake:  # noqa: BLE001 - the event loop would tell its text, and close the pipe
            from barrier import supervise  # noqa: PLC0415 - see `engine_log`

            supervise.tell_mistake(f"reading what the engine of rank {self._rank} says", mistake)
            self._stderr.remark("was killed because a mistake of ours kept its replies from being read")
            self.kill()

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._open_pipes.discard(fd)
        if fd == 1 and not self._exited:
            # Without its replies the child is of no use. One that is already exiting keeps its exit code all the same.
            self._kill_group()
        self._finish_if_done()

    def process_exited(self) -> None:
        self._exited = True
        # The child is reaped; its helpers, if any, hold its group, and maybe its pipes. A free number is not given out again
        # this soon.
        self._kill_group()
        self._ending_helpers = asyncio.get_running_loop().run_in_executor(None, leftovers.end, self._mark)
        self._ending_helpers.add_done_callback(lambda _: self._finish_if_done())
        # A process that the engine detached into a session of its own may hold the pipes open.
        asyncio.get_running_loop().call_later(_DRAIN_SECONDS, self._finish)
        self._finish_if_done()

    def _finish_if_done(self) -> None:
        helpers_ended = self._ending_helpers is not None and self._ending_helpers.done()
        if self._exited and not self._open_pipes and helpers_ended:
            self._finish()

    def _finish(self) -> None:
        if self._transport is not None:
            self._transport.close()
        self._stderr.end()
        self._is_gone()

    def _kill_group(self) -> None:
        # By its own pid, which is also its group's. Not Popen.kill: that polls, and would take the exit code from asyncio.
        if self.pid is not None:
            with suppress(ProcessLookupError, PermissionError):  # nobody left; macOS says the latter for a zombie
                os.killpg(self.pid, signal.SIGKILL)

    def _send(self, frame: dict[str, Any]) -> None:
        """Send one frame; raises EngineFailure if it is too long."""
        self._write(encode_frame(frame))

    def _write(self, data: bytes) -> None:
        # To a child that is gone or condemned nothing is said: its end is on its way.
        if self._transport is not None and not self._exited and not self._condemned:
            # No flow control is needed: one call is under way at a time, and its prompt is in memory already.
            cast("asyncio.WriteTransport", self._transport.get_pipe_transport(0)).write(data)

    def _receive(self, frame: dict[str, Any]) -> None:
        match frame:
            case {"kind": "value", "call": int(number), "value": int() | str() as value}:
                if self._call is not None and number == self._call_number:
                    self._call.put(value)
            case {"kind": "done", "call": int(number)}:
                self._finish_call(number, None)
            case {
                "kind": "failed",
                "call": int(number),
                "failure": {"sentence": str(text), "permanent": bool(permanent), "traceback_tail": str(tail)},
            }:
                told = Failure(text, permanent, tail)
                if self._call is not None:
                    told.log(self._rank, self._call.work)
                self._finish_call(number, told.as_exception())
            case _:
                raise ValueError("neither a value nor an end of a call")

    def _finish_call(self, number: int, failure: EngineFailure | None) -> None:
        if self._call is not None and number == self._call_number:
            self._call.finish(failure)
            self._call = None


class _StderrTail:
    """The last lines that the child wrote, in bounded memory."""

    def __init__(self, rank: int, *, keep_all: bool) -> None:
        from barrier.printable import printable  # noqa: PLC0415 - the child imports this module, and needs nothing of the barrier

        self._printable = printable
        self._rank = rank
        self._keep_all = keep_all
        self._lines: deque[str] = deque(maxlen=_STDERR_LINES)
        self._partial = bytearray()
        self._remark = ""
        self._withholding = False
        self._withheld = 0

    def withhold(self) -> None:
        """From here on the lines may quote a prompt."""
        self._withholding = not self._keep_all

    def remark(self, text: str) -> None:
        self._remark = self._remark or text

    def feed(self, data: bytes) -> None:
        self._partial += data
        *lines, rest = re.split(rb"[\r\n]+", bytes(self._partial))
        # A line that never ends is cut, so that it cannot fill the memory.
        self._partial = bytearray(rest[:_STDERR_LINE_CHARS])
        for line in lines:
            self._add(line)

    def end(self) -> None:
        self._add(bytes(self._partial))
        self._partial.clear()

    def told(self) -> str:
        if self._withheld:
            said = (
                f"its last {self._withheld} lines of output are withheld, because they may quote a prompt "
                "(output_is_safe=True keeps them)"
            )
        elif self._lines:
            said = f"last stderr lines: {' | '.join(self._lines)}"
        else:
            said = "it wrote nothing to stderr"
        return f"it {self._remark}; {said}" if self._remark else said

    def _add(self, raw: bytes) -> None:
        line = self._printable(raw[:_STDERR_LINE_CHARS].decode(errors="replace").strip().expandtabs(4))
        if not line:
            return
        if self._withholding:
            self._withheld += 1
            return
        self._lines.append(line)
        engine_log().debug("engine of rank {} says: {}", self._rank, line)

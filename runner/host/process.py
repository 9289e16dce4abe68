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
    """Hosts an engine in a child process. The first ``start``, ``prepare``, ``connect`` or ``load`` starts it.

    No engine outlives its runner, not even a runner that was killed with SIGKILL. The child ends when its stdin ends (as soon
    as the interpreter's lock is free). On Linux the kernel kills it too (PR_SET_PDEATHSIG). That is tied to the thread that runs
    the event loop, so this thread must live as long as the host. The child has a session of its own, so Ctrl-C in a terminal
    reaches only the runner. Helpers of the engine are killed with it. On Linux that includes helpers in sessions of their own,
    and holds even if the runner was killed (`runner.host.leftovers`).

    What the engine writes to stdout or stderr goes to the log at debug level, and the last lines into the text of an
    `EngineDied`. After the engine's first prompt, its output may quote a prompt. Then it is dropped and only counted.

    Args:
        spec: which engine.
        rank: for the texts of failures and the child's command line.
        grace_seconds: how long the child may take to stop a cancelled generation, to close, and to be gone after a kill.
        output_is_safe: the engine never prints a prompt, so its output is kept after a generation too.
        spare_after: seconds. If the start and the preparation of an engine took longer, the host starts and prepares a second engine
            when the first one is warm. It takes the first one's place when that one is gone, so a recovery does not wait for imports.
            ``math.inf`` keeps no spare, for machines without memory for a second process.
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

    It uses asyncio's protocol and not its streams. ``Process.wait`` also waits for the end of the pipes, and a helper that the
    engine left behind can hold them open for ever.
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
        # Shielded: after a cancellation it still learns which process it started, kills it, and knows when it is gone.
        await asyncio.shield(self._spawning)

    def _spawned(self, spawning: asyncio.Task[Any]) -> None:
        failed = spawning.cancelled() or spawning.exception() is not None
        if failed and self._ending_helpers is None:
            self._ending_helpers = asyncio.get_running_loop().run_in_executor(None, leftovers.end, self._mark)
        # Otherwise `start` raises, or the end of the process is noticed by itself.
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
            self.kill()  # the child does not listen yet, and has nothing to give up
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
            self._stderr.remark(f"sent an invalid reply: {error}")
            self.kill()
        except Exception as mistake:  # noqa: BLE001 - the event loop would log its text, and close the pipe
            from barrier import supervise  # noqa: PLC0415 - see `engine_log`

            supervise.tell_mistake(f"reading what the engine of rank {self._rank} says", mistake)
            self._stderr.remark("was killed because a mistake of ours kept its replies from being read")
            self.kill()

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._open_pipes.discard(fd)
        if fd == 1 and not self._exited:
            # Without replies the child is of no use. If it is exiting already, it keeps its exit code.
            self._kill_group()
        self._finish_if_done()

    def process_exited(self) -> None:
        self._exited = True
        # The child is reaped. Its helpers, if any, are still in its group, and may hold its pipes. The system does not use the
        # number of the group again so soon.
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
        # The child's pid is also its group's number. Not Popen.kill, which polls and would take the exit code from asyncio.
        if self.pid is not None:
            with suppress(ProcessLookupError, PermissionError):  # nobody is left; macOS raises the latter for a zombie
                os.killpg(self.pid, signal.SIGKILL)

    def _send(self, frame: dict[str, Any]) -> None:
        """Send one frame; raises EngineFailure if it is too long."""
        self._write(encode_frame(frame))

    def _write(self, data: bytes) -> None:
        # Nothing is sent to a child that is gone or is being killed.
        if self._transport is not None and not self._exited and not self._condemned:
            # It needs no flow control: there is one call at a time, and its prompt is in memory already.
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
                raise ValueError("a frame that is neither a value nor the end of a call")

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
        """From now on the lines may quote a prompt."""
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

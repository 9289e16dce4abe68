"""Handles stdout and stderr that fail: a closed terminal, a reader that left, a full disk, a reader that stopped reading.

A failed write must not end the code that wrote: it may be about to end runners in order. So no write fails. Output that cannot be
written is dropped, and the command is told once and ends. A thread also watches quiet streams, so that the command notices a reader
that has left without a write, as in ``rankgate status --watch | head -1``.
"""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["GuardedStream", "Output", "output"]


_LEFT = (errno.EPIPE, errno.EIO, errno.ECONNRESET, errno.ENXIO)
"""Errors that mean that the other end is gone. That is usually on purpose, so the command prints no error."""

_ROOM_SECONDS = 0.1
"""How long a command that was asked to end waits for its reader, in seconds."""

_CHUNK = 512
"""Bytes that a pipe with room takes at once: POSIX's least value of PIPE_BUF."""


class _Abandoned(Exception):
    """A signal came while a write was waiting for its reader."""


class Output:
    """The output streams of this process.

    Attributes:
        failure: why the first lost stream failed, in words; empty if its reader left, ``None`` while no stream is lost.
    """

    def __init__(self) -> None:
        self.failure: str | None = None
        self.impatient: bool = False
        self._guarded: list[GuardedStream] = []
        self._writing = False
        self._on_loss: Callable[[], object] = lambda: None

    def guard(self) -> None:
        """Replace ``sys.stdout`` and ``sys.stderr`` by guarded streams. Only for a process that runs nothing but rankgate."""
        self._fill_gaps()
        sys.stdout, sys.stderr = self._replaced(sys.stdout, 1), self._replaced(sys.stderr, 2)

    def on_loss(self, callback: Callable[[], object]) -> None:
        """Set what to do, in any thread, when a stream is lost. If one is lost already, do it now."""
        self._on_loss = callback
        if self.failure is not None:
            callback()

    def watch(self) -> None:
        """From now on, notice a closed terminal or a reader that left even without a write. Starts a thread that sleeps."""
        if not self._guarded or not hasattr(select, "poll"):
            return
        watched = {one.fileno(): one for one in self._guarded if one.has_other_end()}
        with suppress(OSError):
            if os.isatty(0):
                watched[0] = GuardedStream(0, self)  # if stdout and stderr go to files, only stdin has the terminal
        threading.Thread(target=self._watch, args=(watched,), name="output watch", daemon=True).start()

    def hurry(self) -> None:
        """From now on no write waits for a reader. Raises an exception that ends a waiting write; for signal handlers."""
        self.impatient = True
        if self._writing:
            raise _Abandoned

    def lose(self, stream: GuardedStream, error: int) -> None:
        """Note that a stream cannot be used any more."""
        stream.dead = True
        if stream.to_journal or self.failure is not None:
            return
        which = "stdout" if stream.number == 1 else "stderr"
        self.failure = "" if error in _LEFT else f"{which} cannot be written to: {os.strerror(error)}"
        self._on_loss()

    def put(self, stream: GuardedStream, view: memoryview) -> None:
        """Write all of it, or drop it."""
        if threading.current_thread() is not threading.main_thread():
            self._put(stream, view)
            return
        try:
            self._writing = True
            self._put(stream, view)
            self._writing = False  # inside the try, so that a signal between the two lines is caught too
        except _Abandoned:
            pass
        finally:
            self._writing = False

    def _put(self, stream: GuardedStream, view: memoryview) -> None:
        full = False
        while view and not stream.dead:
            if (self.impatient or full) and not self._has_room(stream):
                return
            try:
                view = view[os.write(stream.fileno(), view[:_CHUNK] if self.impatient else view) :]
                full = False
            except BlockingIOError:  # another process made the stream non-blocking; wait as a blocking one does
                full = True
            except OSError as error:
                self.lose(stream, error.errno or errno.EIO)

    def _has_room(self, stream: GuardedStream) -> bool:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        if not self.impatient:
            return bool(poll.poll())
        stream.stuck = not poll.poll(0 if stream.stuck else _ROOM_SECONDS * 1000)
        return not stream.stuck

    def _watch(self, watched: dict[int, GuardedStream]) -> None:
        poll = select.poll()
        for number in watched:
            poll.register(number, 0)  # 0: report only the end of the stream
        while watched:
            for number, events in poll.poll():
                poll.unregister(number)
                stream = watched.pop(number)
                if events & (select.POLLERR | select.POLLHUP):
                    self.lose(stream, errno.EPIPE)

    def _replaced(self, stream: TextIO | None, number: int) -> io.TextIOWrapper:
        raw = GuardedStream(number, self)
        self._guarded.append(raw)
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.flush()
        at_once = bool(getattr(stream, "write_through", False))  # python -u
        return io.TextIOWrapper(
            raw if at_once else io.BufferedWriter(raw),
            encoding=stream.encoding if stream is not None else "utf-8",
            errors="replace",  # a character that the terminal cannot show must not end the program
            line_buffering=number == 2 or raw.isatty(),
            write_through=at_once,
        )

    @staticmethod
    def _fill_gaps() -> None:
        """Open /dev/null for each standard stream that is closed. Otherwise the first socket would get its number."""
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(number, True)
        os.close(number)


class GuardedStream(io.FileIO):
    """One stream. It takes everything that is written, and never fails."""

    def __init__(self, number: int, output: Output) -> None:
        super().__init__(number, "wb" if number else "rb", closefd=False)
        self.number = number
        self.dead = False
        self.stuck = False
        self._output = output
        found = os.fstat(number)
        self._kind = stat.S_IFMT(found.st_mode)
        # systemd sets JOURNAL_STREAM (systemd.exec(5)). A restart of the journal must not end this process.
        self.to_journal: bool = os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"

    def has_other_end(self) -> bool:
        """Whether the stream has a reader that may leave."""
        return self._kind in (stat.S_IFIFO, stat.S_IFSOCK) or self.isatty()

    def write(self, data: Buffer, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride] - the stub knows a mmap by name
        """Write it, or drop it; see `Output`."""
        view = memoryview(data).cast("B")
        self._output.put(self, view)
        return len(view)


output: Output = Output()
"""The output streams of this process. They are not guarded before `Output.guard`."""

"""What happens when stdout or stderr cannot be written to any more: nothing fails, and it is told once."""

from __future__ import annotations

import io
import os
import pty
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

import pytest

from planner.cli.streams import GuardedStream, Output

LIMIT = 10.0
FULL = Path("/dev/full")


class Watched(Output):
    """Guards one descriptor in the place of stdout, and counts what is told."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.losses = 0
        self.told = threading.Event()
        self.stream = GuardedStream(number, self)
        self.stream.number = 1
        self._guarded.append(self.stream)
        self.file = io.TextIOWrapper(io.BufferedWriter(self.stream), encoding="utf-8", line_buffering=True)
        self.on_loss(self._lost)

    def _lost(self) -> None:
        self.losses += 1
        self.told.set()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for number in (reader, writer):
        with suppress(OSError):
            os.close(number)


def test_what_is_written_arrives(pipe: tuple[int, int]) -> None:
    output = Watched(pipe[1])
    print("hello", file=output.file)
    assert os.read(pipe[0], 100) == b"hello\n"
    assert output.failure is None
    assert output.losses == 0


def test_a_reader_that_left_is_told_once_and_nothing_fails(pipe: tuple[int, int]) -> None:
    output = Watched(pipe[1])
    os.close(pipe[0])
    for _ in range(3):
        print("hello", file=output.file, flush=True)
    assert output.failure == ""
    assert output.losses == 1


def test_a_reader_that_leaves_is_noticed_without_a_write(pipe: tuple[int, int]) -> None:
    output = Watched(pipe[1])
    output.watch()
    os.close(pipe[0])
    assert output.told.wait(LIMIT)
    assert output.failure == ""


def test_a_terminal_that_is_closed_is_noticed_without_a_write() -> None:
    terminal, inner = pty.openpty()
    output = Watched(inner)
    output.watch()
    os.close(terminal)
    assert output.told.wait(LIMIT)
    print("hello", file=output.file, flush=True)
    os.close(inner)


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full on this system")
def test_a_full_disk_is_named() -> None:
    number = os.open(FULL, os.O_WRONLY)
    output = Watched(number)
    print("hello", file=output.file, flush=True)
    assert output.failure == "stdout cannot be written to: No space left on device"
    os.close(number)


def test_a_callback_that_comes_late_is_told(pipe: tuple[int, int]) -> None:
    output = Watched(pipe[1])
    os.close(pipe[0])
    print("hello", file=output.file, flush=True)
    output.told.clear()
    late: list[str] = []
    output.on_loss(lambda: late.append("told"))
    assert late == ["told"]


def test_the_journal_may_be_restarted(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd says that a stream is its journal's: whose loss ends nobody."""
    found = os.fstat(pipe[1])
    monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
    output = Watched(pipe[1])
    os.close(pipe[0])
    print("hello", file=output.file, flush=True)
    assert output.failure is None
    assert output.losses == 0


def test_a_stream_that_somebody_made_non_blocking_loses_nothing(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    output = Watched(pipe[1])
    text = "x" * 300_000 + "\n"
    read: list[bytes] = []

    def reads() -> None:
        while sum(map(len, read)) < len(text):
            read.append(os.read(pipe[0], 65536))

    reading = threading.Thread(target=reads)
    reading.start()
    output.file.write(text)
    output.file.flush()
    reading.join(LIMIT)
    assert b"".join(read) == text.encode()


def full(writer: int) -> None:
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 512)
    os.set_blocking(writer, True)


def test_a_signal_ends_a_write_that_nobody_reads(pipe: tuple[int, int]) -> None:
    full(pipe[1])
    output = Watched(pipe[1])

    def signalled(_number: int, _frame: FrameType | None) -> None:
        output.hurry()

    before = signal.signal(signal.SIGUSR1, signalled)
    timer = threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1))
    try:
        timer.start()
        print("hello", file=output.file, flush=True)  # without the signal for ever
        print("from now on nothing waits", file=output.file, flush=True)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert output.failure is None, "somebody may read again"


def test_in_a_hurry_what_is_read_still_arrives(pipe: tuple[int, int]) -> None:
    output = Watched(pipe[1])
    output.hurry()
    print("y" * 2000, file=output.file, flush=True)
    assert os.read(pipe[0], 4096) == b"y" * 2000 + b"\n"

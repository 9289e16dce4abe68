"""Ends what an engine left behind: helpers that it started, also those in sessions of their own.

A signal to the engine's process group misses a helper that has left the group. But every process inherits the environment, and the
engine's has a mark in it that nobody else's has. So whoever carries the mark, whatever its parent and its session, is the engine's.
Linux shows a process's environment in ``/proc/<pid>/environ``; elsewhere nothing is found, and only the process group is ended.

While the runner lives, it ends an engine's helpers when the engine has ended. A runner that is killed can do nothing any more; so a
watcher, a small process that holds the end of a pipe from the runner, does it then. This file is the watcher's program, too: it
imports nothing but the standard library, and little of that.

A helper that clears its environment is not found.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from itertools import count

__all__ = ["MARK", "begin", "end", "end_marked"]


MARK = "RANKGATE_ENGINE"
"""The variable in the environment of an engine's process."""

_PATIENCE_SECONDS = 5.0
_PAUSE_SECONDS = 0.02

_numbers = count(1)
_lock = threading.Lock()


class _Watch:
    """The watcher of one process, while that has engines; a forked process has a watch of its own."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.name = f"{self.pid}-{os.urandom(8).hex()}"
        self.marks: set[str] = set()
        self.watcher: subprocess.Popen[bytes] | None = None


_watch_of_this_process: _Watch | None = None


def begin() -> str:
    """Watch over one more engine of this process; returns its mark, to be put into its environment as `MARK`.

    From now on the engine's processes end when this process does, however that happens (on Linux). Call `end` when it has ended.
    """
    global _watch_of_this_process  # noqa: PLW0603 - one watcher a process is the point
    with _lock:
        watch = _watch_of_this_process
        if watch is None or watch.pid != os.getpid():
            watch = _watch_of_this_process = _Watch()
        if sys.platform == "linux" and (watch.watcher is None or watch.watcher.poll() is not None):
            # -I -S: nothing of this process's environment and no packages, so that it starts in some ten milliseconds.
            watch.watcher = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, f"{watch.name}."],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        mark = f"{watch.name}.{next(_numbers)}"
        watch.marks.add(mark)
        return mark


def end(mark: str) -> None:
    """End what an engine left behind; and the watcher, where that was the last engine of this process. Blocks, as `end_marked` does."""
    end_marked(mark)
    with _lock:
        watch = _watch_of_this_process
        if watch is None or watch.pid != os.getpid():
            return
        watch.marks.discard(mark)
        if watch.marks or watch.watcher is None or watch.watcher.stdin is None:
            return
        watcher, watch.watcher = watch.watcher, None
    # Outside of the lock, which the event loop takes to begin another engine.
    if watcher.stdin is not None:
        watcher.stdin.close()  # it sees the end of its pipe, finds nothing more to do, and ends
    try:
        watcher.wait(_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        watcher.kill()
        watcher.wait()


def end_marked(mark: str) -> None:
    """Kill every process whose mark is this one, or begins with it where it ends in a dot. Blocks for milliseconds, at the most seconds."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    wanted = f"{MARK}={mark}".encode()
    while (found := _carriers(wanted)) and time.monotonic() < deadline:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:  # gone meanwhile, or another user's, which has been given up by its owner
                continue
        time.sleep(
            _PAUSE_SECONDS
        )  # in a thread or in the watcher: one that was just killed needs a moment, and may have had a child


def _carriers(wanted: bytes) -> list[int]:
    """The processes that carry such a mark; those that have ended and wait for their parent have no environment any more."""
    found: list[int] = []
    for name in os.listdir("/proc") if sys.platform == "linux" else ():
        if not name.isdecimal() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                environment = file.read()
        except OSError:
            continue
        at = (b"\0" + environment).find(b"\0" + wanted)
        if at >= 0 and (wanted.endswith(b".") or environment[at : at + len(wanted) + 1] in (wanted, wanted + b"\0")):
            found.append(int(name))
    return found


def _watch() -> None:
    """The watcher: wait for the end of the pipe, which is the end of the process that started it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it ends when its work is done
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 1024):
        pass
    end_marked(sys.argv[1])


if __name__ == "__main__":
    _watch()

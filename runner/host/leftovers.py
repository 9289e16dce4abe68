"""Ends the helpers that an engine started and left behind, also those in sessions of their own.

A signal to the engine's process group misses a helper that has left the group. But every process inherits the environment, and each
engine has its own mark in it. So a process with the mark belongs to the engine, whatever its parent and its session are.
Linux shows a process's environment in ``/proc/<pid>/environ``. Elsewhere no helper is found, and only the process group is ended.

While the runner lives, it ends an engine's helpers when the engine has ended. If the runner is killed, a watcher does it: a small
process that reads from a pipe which only the runner holds open. This file is also the watcher's program, so it imports only a little
of the standard library.

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
    """The watcher of one process, while that process has engines. A forked process has its own."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.name = f"{self.pid}-{os.urandom(8).hex()}"
        self.marks: set[str] = set()
        self.watcher: subprocess.Popen[bytes] | None = None


_watch_of_this_process: _Watch | None = None


def begin() -> str:
    """Watch over one more engine of this process; returns the mark, which the caller puts into the engine's environment as `MARK`.

    From now on the engine's processes end when this process ends, in whatever way (on Linux). Call `end` when the engine has ended.
    """
    global _watch_of_this_process  # noqa: PLW0603 - one watcher a process is the point
    with _lock:
        watch = _watch_of_this_process
        if watch is None or watch.pid != os.getpid():
            watch = _watch_of_this_process = _Watch()
        if sys.platform == "linux" and (watch.watcher is None or watch.watcher.poll() is not None):
            # -I -S: without this process's environment and without packages it starts in about ten milliseconds.
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
    """End an engine's helpers, and the watcher too if this was the last engine of this process. Blocks, as `end_marked` does."""
    end_marked(mark)
    with _lock:
        watch = _watch_of_this_process
        if watch is None or watch.pid != os.getpid():
            return
        watch.marks.discard(mark)
        if watch.marks or watch.watcher is None or watch.watcher.stdin is None:
            return
        watcher, watch.watcher = watch.watcher, None
    # Without the lock, because the event loop takes it to begin another engine.
    if watcher.stdin is not None:
        watcher.stdin.close()  # the watcher sees the end of its pipe, finds nothing to do, and ends
    try:
        watcher.wait(_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        watcher.kill()
        watcher.wait()


def end_marked(mark: str) -> None:
    """Kill every process with this mark; if `mark` ends in a dot, every process whose mark begins with it. Blocks for at most 5 seconds."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    wanted = f"{MARK}={mark}".encode()
    while (found := _carriers(wanted)) and time.monotonic() < deadline:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:  # it is gone, or belongs to another user
                continue
        # A killed process needs a moment to end, and may have had a child. This runs in a thread or in the watcher.
        time.sleep(_PAUSE_SECONDS)


def _carriers(wanted: bytes) -> list[int]:
    """The processes with such a mark. A process that has ended and waits for its parent has no environment any more."""
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
    """The watcher: wait until the pipe ends, which it does when the process that started the watcher ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it ends when its work is done
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 1024):
        pass
    end_marked(sys.argv[1])


if __name__ == "__main__":
    _watch()

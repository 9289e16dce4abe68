"""A host keeps an engine, and can kill it at any time.

An engine is foreign code: it may raise, wait for ever for a rank that is gone, hold the interpreter, or crash. The runner
must outlive all of that. So it never calls an engine directly, but through a host:

- `ProcessHost` keeps the engine in a child process. It kills the engine with SIGKILL, which nothing can block.
- `InlineHost` keeps the engine in this process, for tests and for many ranks in few processes. It can only cancel, so an engine
  that blocks its thread blocks the whole process. Use `ProcessHost` for real engines.

Both follow one contract, `EngineHost`. The idea is Erlang's: a worker that may hang runs in another process, and its supervisor
does not end with it and does not trust it. The details (bootstrap over the pipe, the parent's ``sys.path`` for the child) follow
CPython's ``multiprocessing.spawn``.

The pipes carry frames: four bytes of length, big-endian, then that many bytes of ASCII JSON. Never pickle.
"""

from __future__ import annotations

from runner.host.child import child_command, child_environment, child_main
from runner.host.contract import CHUNK_WINDOW, PROGRESS_WINDOW, EngineHost, EngineSpec
from runner.host.failures import MAX_FAILURE_CHARS, without_prompt
from runner.host.frames import MAX_FRAME_BYTES
from runner.host.inline import InlineHost
from runner.host.process import ProcessHost

__all__ = [
    "CHUNK_WINDOW",
    "MAX_FAILURE_CHARS",
    "MAX_FRAME_BYTES",
    "PROGRESS_WINDOW",
    "EngineHost",
    "EngineSpec",
    "InlineHost",
    "ProcessHost",
    "child_command",
    "child_environment",
    "child_main",
    "without_prompt",
]

"""A host behind which an engine can be killed, whatever it is doing.

An engine is foreign code: it may raise, wait for ever for a rank that is gone, hold the interpreter, or crash. The runner
must outlive all of that, so it never calls an engine directly but through a host:

- `ProcessHost` keeps the engine in a child process of its own. Killing it is a SIGKILL, which nothing can block.
- `InlineHost` keeps it in this process, for tests and for many ranks in few processes. It can only cancel, so an engine
  that blocks its thread blocks the whole process: `ProcessHost` is the one for real engines.

Both obey one contract, that of `EngineHost`. The idea that a worker which may hang belongs behind a process boundary, with a
supervisor that neither shares its fate nor trusts it, is Erlang's; the details (bootstrap over the pipe, parent's
``sys.path`` handed on) follow CPython's ``multiprocessing.spawn``.

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

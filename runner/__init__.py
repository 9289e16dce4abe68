"""The runner of one rank. It reads the task log, accepts or refuses each task by a table, drives an engine, and reports.

A task that is out of state gets a structured refusal, and the process lives on. The package logs with loguru, and logs nothing until you
call ``logger.enable("runner")``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.engine import Engine, EngineDied, EngineFailure, EngineGroup, GenerationRequest
    from runner.host import EngineHost, EngineSpec, InlineHost, ProcessHost
    from runner.runner import Runner

    __version__: str

__all__ = [
    "Engine",
    "EngineDied",
    "EngineFailure",
    "EngineGroup",
    "EngineHost",
    "EngineSpec",
    "GenerationRequest",
    "InlineHost",
    "ProcessHost",
    "Runner",
]

_HOME = {
    name: module
    for module, names in {
        "barrier._version": ("__version__",),
        "runner.engine": ("Engine", "EngineDied", "EngineFailure", "EngineGroup", "GenerationRequest"),
        "runner.host": ("EngineHost", "EngineSpec", "InlineHost", "ProcessHost"),
        "runner.runner": ("Runner",),
    }.items()
    for name in names
}


if not "".join(sys.argv[-1:]).startswith("engine-of-rank-"):
    import_module(
        "barrier.log"
    )  # which silences this package. An engine's own process never logs, and starts sooner without it


def __getattr__(name: str) -> Any:  # noqa: ANN401  as the interpreter calls it
    """Import a name when it is first used. An engine's process imports this package too, and does without the store's driver."""
    if name not in _HOME:
        raise AttributeError(f"module 'runner' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value

"""The planner: brings up instances of several ranks and keeps them up. If it cannot, it says which rank is at fault.

As a library::

    async with Planner(redis) as planner:
        instance = await planner.launch(InstanceSpec(name="demo", world_size=4))
        async for piece in instance.generate("Once upon a time"):
            print(piece, end="")
        await instance.stop()

It logs with loguru, and only after ``logger.enable("planner")``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.explain import explain_instance
    from planner.gate import LoadGate
    from planner.planner import Instance, InstanceFailed, Planner
    from planner.policy import Policy
    from planner.requests import GenerationFailed
    from planner.spec import InstanceSpec
    from runner.model import ModelSpec

    __version__: str

__all__ = [
    "GenerationFailed",
    "Instance",
    "InstanceFailed",
    "InstanceSpec",
    "LoadGate",
    "ModelSpec",
    "Planner",
    "Policy",
    "explain_instance",
]

_HOME = {
    name: module
    for module, names in {
        "barrier._version": ("__version__",),
        "planner.explain": ("explain_instance",),
        "planner.gate": ("LoadGate",),
        "planner.planner": ("Instance", "InstanceFailed", "Planner"),
        "planner.requests": ("GenerationFailed",),
        "planner.policy": ("Policy",),
        "planner.spec": ("InstanceSpec",),
        "runner.model": ("ModelSpec",),
    }.items()
    for name in names
}


if "".join(sys.argv[:1]).rpartition("/")[2] != "rankgate":
    import_module(
        "barrier.log"
    )  # silences this package. The program of that name asks for its log, and must be ready for Ctrl-C first


def __getattr__(name: str) -> Any:  # noqa: ANN401  as the interpreter calls it
    """Import a name when it is first used: the command line imports this package, and must start quickly."""
    if name not in _HOME:
        raise AttributeError(f"module 'planner' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value

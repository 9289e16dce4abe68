"""The planner: brings instances of several ranks up, keeps them up, and says which rank is at fault where it cannot.

As a library::

    async with Planner(redis) as planner:
        instance = await planner.launch(InstanceSpec(name="demo", world_size=4))
        async for piece in instance.generate("Once upon a time"):
            print(piece, end="")
        await instance.stop()

It logs with loguru, and nothing until it is asked to: ``logger.enable("planner")``.
"""

from planner.gate import LoadGate
from planner.planner import Instance, InstanceFailed, Planner, explain_instance
from planner.requests import GenerationFailed
from planner.spec import InstanceSpec, Policy
from runner.messages import ModelSpec

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

"""The runner of one rank: reads the task log, accepts or refuses by a table, drives an engine, reports.

A task out of state gets a structured refusal, and the process lives on.
"""

from runner.engine import Engine, EngineDied, EngineFailure, EngineGroup, GenerationRequest
from runner.host import EngineHost, EngineSpec, InlineHost, ProcessHost
from runner.runner import Runner

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

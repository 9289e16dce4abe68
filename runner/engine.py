"""The engine: what a runner drives. A small protocol, so that MLX, a simulation or a test double all fit behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from runner.messages import ModelSpec


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """Where and as whom an engine enters the collective.

    Attributes:
        rank: 0 to world_size - 1.
        world_size: number of ranks.
        coordinator: ``host:port`` at which the ranks meet.
        rank_order: the node of every rank, in rank order.
    """

    rank: int
    world_size: int
    coordinator: str
    rank_order: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One generation; the prompt stays out of every repr."""

    task_id: str
    prompt: str
    max_tokens: int

    def __repr__(self) -> str:
        return f"GenerationRequest(task_id={self.task_id!r}, prompt=<{len(self.prompt)} chars>, max_tokens={self.max_tokens})"


class EngineFailure(RuntimeError):
    """Engine work failed.

    Attributes:
        permanent: whether trying again cannot help (no such model, not enough memory); decides how the planner classes it.
    """

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


class EngineDied(EngineFailure):
    """The engine's process ended in the middle of its work."""


class Engine(Protocol):
    """One rank's share of a model. Calls come one at a time and in this order: connect, load, warm_up, generate…, close.

    `close` may come at any time, also in the middle of another call, whose coroutine is cancelled first.
    Any exception from a call is a failed task and never the end of the runner.
    """

    async def connect(self, group: EngineGroup) -> None:
        """Enter the collective group; returns once all ranks are in it."""
        ...

    def load(self, model: ModelSpec) -> AsyncIterator[int]:
        """Load the model; yields the number of layers loaded so far, rising to ``model.total_layers``."""
        ...

    async def warm_up(self) -> None:
        """Run the warm-up collective."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[str]:
        """Generate; yields pieces of text (rank 0) or nothing (the others), and ends at the end of the text."""
        ...

    async def close(self) -> None:
        """Give up group, model and memory; idempotent."""
        ...

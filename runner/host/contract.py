"""The contract of a host, and the name and configuration of an engine that runs in a process of its own."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from typing import ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from runner.engine import EngineDied, EngineGroup, GenerationRequest
from runner.model import ModelSpec
from runner.worded import Worded

__all__ = ["CHUNK_WINDOW", "PROGRESS_WINDOW", "EngineHost", "EngineSpec"]


CHUNK_WINDOW = 16
"""How many pieces of text may wait for the consumer; the engine waits before the next piece."""

PROGRESS_WINDOW = 64
"""How many values of load progress are kept for a slow consumer. The oldest are dropped first, and the newest never is."""


class EngineHost(Protocol):
    """An engine that can be killed at any time. The same calls as `runner.engine.Engine`, one at a time and in the same order.

    Life of an engine:
        ``start``, ``prepare``, ``connect`` and ``load`` start an engine if there is none; ``warm_up`` and ``generate`` fail then.
        After `kill`, `close` or a death, the next call of the first four starts a fresh engine: a new incarnation of it. It
        starts when the old one is gone, or was given up after a grace. A host may keep a spare: a second engine that is
        started and prepared while the first one serves, and takes its place when the first one is gone.

    Failures:
        A call raises only `EngineFailure` (and asyncio.CancelledError). `EngineDied` means that the engine is
        gone: it ended by itself, or was killed or closed while the call ran. The text never quotes a prompt.

    Cancellation:
        A cancelled ``prepare`` goes on, and the next one waits for it, because it needs no other rank and may be a long download.
        A cancelled ``connect``, ``load`` or ``warm_up`` kills the engine, because half a collective is of no use. A
        cancelled ``generate`` asks the engine to stop that generation and keeps the model; the host kills the engine only if it
        has not stopped within the grace. If the caller is cancelled once more, this work goes on, and the next call waits
        for it. A consumer that leaves ``load`` or ``generate`` early must close it: ``async with aclosing(...)``.

    Back-pressure:
        ``generate`` holds at most `CHUNK_WINDOW` pieces; then the engine waits. ``load`` never makes the engine wait: a consumer
        that is behind by more than `PROGRESS_WINDOW` values gets only the newest of them.
    """

    @property
    def pid(self) -> int | None:
        """The engine's own process; ``None`` if it has none, or if no engine is running."""
        ...

    async def start(self) -> None:
        """Start an engine, if there is none, and call its factory, so that a wrong factory or configuration fails at once.

        Raises:
            EngineFailure: permanent if the factory cannot be imported, refuses its configuration, or returns an object that is no engine.
        """
        ...

    async def prepare(self, rank: int, world_size: int) -> str | None:
        """Prepare an engine for an attempt; returns the endpoint that it has bound for the attempt. See `runner.engine.Engine.prepare`."""
        ...

    async def connect(self, group: EngineGroup) -> None:
        """Enter the collective group; returns once all ranks are in it. The host kills an engine that takes longer than the deadline."""
        ...

    def load(self, model: ModelSpec) -> AsyncGenerator[int, None]:
        """Load the model; yields the number of layers loaded so far."""
        ...

    async def warm_up(self) -> None:
        """Run the warm-up collective."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[str, None]:
        """Generate; yields pieces of text one by one (rank 0) or nothing (the others)."""
        ...

    async def died(self) -> EngineDied:
        """Wait until the engine ends by itself, during or between calls; returns how it ended.

        It returns at once if that has happened already and no fresh engine was started since. It never returns for a kill or a close.
        """
        ...

    async def kill(self) -> None:
        """Kill the engine at once, whatever it does; idempotent. A call under way ends with `EngineDied`. A spare stays.

        The host kills before its first await, so a cancelled kill kills too. The call returns when the engine is gone, or after the
        grace if the operating system cannot end it sooner.
        """
        ...

    async def close(self) -> None:
        """Ask the engine to give up group, model and memory, and kill it if it has not done so within the grace; idempotent.

        A call under way ends with `EngineDied`. A cancelled close kills the engine. An engine that was only started or prepared stays:
        it has nothing to give up yet.
        """
        ...

    async def shut_down(self) -> None:
        """Kill the engine and the spare, for good; idempotent."""
        ...


class EngineSpec(BaseModel, metaclass=Worded):
    """Which engine a `ProcessHost` starts.

    Attributes:
        factory: ``package.module:name`` of a callable that takes ``config`` and returns an `Engine`, looked up in the child.
        config: passed to the factory as it is; JSON values only. It travels over a pipe, never on the command line.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    factory: str
    config: dict[str, JsonValue] = Field(default_factory=dict, repr=False)

    @field_validator("factory")
    @classmethod
    def _names_a_callable(cls, factory: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", factory):
            raise ValueError(f"engine factory {factory!r} is not of the form package.module:name")
        return factory

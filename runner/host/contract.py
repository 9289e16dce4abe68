"""What a host promises, and how an engine for a process of its own is named."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from typing import ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from runner.engine import EngineDied, EngineGroup, GenerationRequest
from runner.messages import ModelSpec
from runner.worded import Worded

__all__ = ["CHUNK_WINDOW", "PROGRESS_WINDOW", "EngineHost", "EngineSpec"]


CHUNK_WINDOW = 16
"""How many pieces of text may be under way before the consumer has taken them; the engine waits at the next one."""

PROGRESS_WINDOW = 64
"""How many steps of load progress are kept for a consumer that is behind; older ones make room, the newest is never lost."""


class EngineHost(Protocol):
    """An engine that can be taken away. The same calls as `runner.engine.Engine`, one at a time and in the same order.

    Life of an engine:
        ``start``, ``prepare``, ``connect`` and ``load`` start one if there is none; ``warm_up`` and ``generate`` do not, and say so.
        After `kill`, after `close` and after a death, the next of these starts a fresh one: a new incarnation of the engine. It
        never starts before the old one is gone, or has been given up on after a grace. A host may keep a spare: a second engine
        that is started and prepared while the first one serves, and takes its place when that one is gone.

    Failures:
        Whatever a call raises is an `EngineFailure` (asyncio.CancelledError aside). `EngineDied` means that the engine is
        gone: it ended by itself, or was killed or closed while the call ran. The text never quotes a prompt.

    Cancellation:
        A cancelled ``prepare`` goes on, and the next one waits for it: it concerns no other rank, and may be a long download. A
        cancelled ``connect``, ``load`` or ``warm_up`` kills the engine, because half a collective is of no use. A
        cancelled ``generate`` asks the engine to stop that generation and keeps the model; only an engine that has not
        stopped within the grace is killed. The tidying goes on by itself if it is cancelled too, and the next call waits
        for it. A consumer that leaves ``load`` or ``generate`` early must close it: ``async with aclosing(...)``.

    Back-pressure:
        ``generate`` holds at most `CHUNK_WINDOW` pieces; the engine waits. ``load`` never makes the engine wait: a consumer
        that is behind by more than `PROGRESS_WINDOW` steps sees only the newest of them, since progress is a state.
    """

    @property
    def pid(self) -> int | None:
        """The process that the engine has for itself; None where it has none, or where no engine is running."""
        ...

    async def start(self) -> None:
        """Start an engine, if there is none, and have its factory make it: what is wrong with the factory or its configuration is said now.

        Raises:
            EngineFailure: permanent where the factory cannot be imported, refuses its configuration, or makes what is no engine.
        """
        ...

    async def prepare(self, rank: int, world_size: int) -> str | None:
        """Make an engine ready for an attempt; returns the endpoint that it has bound for it. See `runner.engine.Engine.prepare`."""
        ...

    async def connect(self, group: EngineGroup) -> None:
        """Enter the collective group; returns once all ranks are in it. An engine that takes longer than the group's deadline is killed."""
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
        """Wait until the engine ends though nobody asked it to, also between calls; returns how.

        Returns at once if that has already happened and no fresh engine has been started since; never for a kill or a close.
        """
        ...

    async def kill(self) -> None:
        """Give the engine up at once, whatever it does; idempotent. A call under way ends with `EngineDied`. A spare stays.

        The engine is condemned before the first await, so that a cancelled kill has killed as well. Returns once the engine
        is gone, or after the grace where the operating system cannot end it sooner.
        """
        ...

    async def close(self) -> None:
        """Ask the engine to give up group, model and memory, and kill it if it has not within the grace; idempotent.

        A call under way ends with `EngineDied`. A cancelled close becomes a kill. An engine that is at most prepared has nothing to
        give up yet, and stays.
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

"""One piece of work for an engine: its name and request, and the call of the engine that does it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from runner.engine import Engine, EngineFailure, EngineGroup, GenerationRequest
from runner.model import ModelSpec

__all__ = ["CallName", "Place", "Request", "Value", "Work", "perform"]


Value: TypeAlias = int | str
CallName: TypeAlias = Literal["start", "prepare", "connect", "load", "warm_up", "generate"]

_DOING: dict[CallName, str] = {
    "start": "starting",
    "prepare": "preparing",
    "connect": "connecting",
    "load": "loading",
    "warm_up": "warming up",
    "generate": "generating",
}


@dataclass(frozen=True, slots=True)
class Place:
    """The rank and the world size for which an engine is prepared."""

    rank: int
    world_size: int


Request: TypeAlias = Place | EngineGroup | ModelSpec | GenerationRequest | None


@dataclass(frozen=True, slots=True)
class Work:
    """What an engine is asked to do."""

    name: CallName
    request: Request = None

    @property
    def doing(self) -> str:
        """The work as a participle, for a sentence."""
        return _DOING[self.name]

    @property
    def prompt(self) -> str:
        """The prompt that no text may quote; empty if there is none."""
        return self.request.prompt if isinstance(self.request, GenerationRequest) else ""

    @property
    def starts_engine(self) -> bool:
        """Whether the host starts an engine for this work if there is none."""
        return self.name in ("start", "prepare", "connect", "load")

    @property
    def prepares(self) -> bool:
        """Whether the work needs no other rank: after it, the engine is in no group and holds no model."""
        return self.name in ("start", "prepare")


async def perform(engine: Engine, work: Work) -> AsyncGenerator[Value, None]:
    """Have the engine do the work; yields the values of the engine."""
    request = work.request
    if work.name == "start":
        _check_protocol(engine)
    elif isinstance(request, Place):
        yield _checked(await engine.prepare(request.rank, request.world_size) or "", str, work)
    elif isinstance(request, EngineGroup):
        await engine.connect(request)
    elif isinstance(request, ModelSpec):
        async with _closing(engine.load(request)) as layers:
            async for layers_loaded in layers:
                yield _checked(layers_loaded, int, work)
    elif isinstance(request, GenerationRequest):
        async with _closing(engine.generate(request)) as pieces:
            async for piece in pieces:
                yield _checked(piece, str, work)
    elif work.name == "warm_up":
        await engine.warm_up()
    else:
        raise ValueError(f"no engine is called for {work.name} here: add it")


_CALLS = ("prepare", "connect", "load", "warm_up", "generate", "close")


def _check_protocol(engine: object) -> None:
    """Refuse an object that cannot be an engine, for example one that was written for an older protocol."""
    missing = [name for name in _CALLS if not callable(getattr(engine, name, None))]
    if missing:
        raise EngineFailure(
            f"{type(engine).__qualname__} is no engine of this version: it has no {' and no '.join(missing)}; "
            "see runner.Engine for the calls that an engine must have",
            permanent=True,
        )


def _checked(value: object, wanted: type[Value], work: Work) -> Value:
    """Refuse a value of a wrong type, which an engine without a type checker may yield: it would fail later, and elsewhere."""
    if not isinstance(value, wanted):
        raise TypeError(f"yielded {type(value).__name__} while {work.doing}, where only {wanted.__name__} is expected")
    return value


@asynccontextmanager
async def _closing(stream: AsyncIterator[Any]) -> AsyncGenerator[AsyncIterator[Any], None]:
    """Like contextlib.aclosing, for an iterator that need not be a generator."""
    try:
        yield stream
    finally:
        if isinstance(stream, AsyncGenerator):
            await cast("AsyncGenerator[Any, None]", stream).aclose()

"""One piece of work for an engine: what it is, and how an engine is made to do it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from runner.engine import Engine, EngineGroup, GenerationRequest
from runner.messages import ModelSpec

Value: TypeAlias = int | str
Request: TypeAlias = EngineGroup | ModelSpec | GenerationRequest | None

CallName: TypeAlias = Literal["connect", "load", "warm_up", "generate"]

DOING: dict[CallName, str] = {
    "connect": "connecting",
    "load": "loading",
    "warm_up": "warming up",
    "generate": "generating",
}


@dataclass(frozen=True, slots=True)
class Work:
    """What an engine is asked to do."""

    name: CallName
    request: Request = None

    @property
    def doing(self) -> str:
        """What it is, as it is said in a sentence."""
        return DOING[self.name]

    @property
    def prompt(self) -> str:
        """The prompt that no text may quote; empty where there is none."""
        return self.request.prompt if isinstance(self.request, GenerationRequest) else ""

    @property
    def starts_engine(self) -> bool:
        """Whether this is work for which an engine is started."""
        return self.name in ("connect", "load")


async def perform(engine: Engine, work: Work) -> AsyncGenerator[Value, None]:
    """Have the engine do the work; yields what it yields."""
    request = work.request
    if isinstance(request, EngineGroup):
        await engine.connect(request)
    elif isinstance(request, ModelSpec):
        async with _closing(engine.load(request)) as layers:
            async for layers_loaded in layers:
                yield _checked(layers_loaded, int, work)
    elif isinstance(request, GenerationRequest):
        async with _closing(engine.generate(request)) as pieces:
            async for piece in pieces:
                yield _checked(piece, str, work)
    else:
        await engine.warm_up()


def _checked(value: object, wanted: type[Value], work: Work) -> Value:
    """Refuse what an engine without a type checker may yield: it would fail later, and elsewhere."""
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

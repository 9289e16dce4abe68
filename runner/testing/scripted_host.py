"""The host of a scripted engine, which can lose it at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, contextmanager

from runner.engine import EngineDied, EngineGroup, GenerationRequest
from runner.host import InlineHost
from runner.messages import ModelSpec
from runner.testing.scripted_engine import ScriptedEngine

__all__ = ["ScriptedHost"]


class ScriptedHost:
    """A `runner.EngineHost`: an `InlineHost` around a `ScriptedEngine`, plus `die` for an engine that has nothing to do.

    It writes ``host kill`` and ``host close`` into the engine's journal (`ScriptedEngine.calls`).

    Args:
        engine: the engine.
        rank: for the texts of failures.
        grace_seconds: how long a held ``close`` may take before the engine is killed, in real seconds.
    """

    def __init__(self, engine: ScriptedEngine, *, rank: int = 0, grace_seconds: float = 5.0) -> None:
        self.engine = engine
        self._rank = rank
        self._inner = InlineHost(engine.fresh, rank=rank, grace_seconds=grace_seconds)
        self._death: EngineDied | None = None
        self._watchers: set[asyncio.Future[EngineDied]] = set()
        self._burying: asyncio.Task[None] | None = None

    def die(self, how: str = "was killed by the system (signal 9)") -> None:
        """End the engine as if it died by itself, whatever it does. `died` then returns."""
        self._death = EngineDied(f"engine of rank {self._rank} {how}")
        for watcher in self._watchers:
            if not watcher.done():
                watcher.set_result(self._death)
        self._burying = asyncio.create_task(self._inner.kill())

    @property
    def pid(self) -> int | None:
        """None: the engine has no process of its own."""
        return None

    async def start(self) -> None:
        """Make the engine."""
        with self._deadly():
            await self._inner.start()

    async def prepare(self, rank: int, world_size: int) -> str | None:
        """Make the engine ready, a fresh one if the last one died."""
        self._revive()
        with self._deadly():
            return await self._inner.prepare(rank, world_size)

    async def connect(self, group: EngineGroup) -> None:
        """Enter the collective group, with a fresh engine if the last one died."""
        self._revive()
        with self._deadly():
            await self._inner.connect(group)

    async def load(self, model: ModelSpec) -> AsyncGenerator[int, None]:
        """Load the model, with a fresh engine if the last one died."""
        self._revive()
        with self._deadly():
            async with aclosing(self._inner.load(model)) as progress:
                async for layers in progress:
                    yield layers

    async def warm_up(self) -> None:
        """Run the warm-up."""
        with self._deadly():
            await self._inner.warm_up()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[str, None]:
        """Generate."""
        with self._deadly():
            async with aclosing(self._inner.generate(request)) as pieces:
                async for piece in pieces:
                    yield piece

    async def died(self) -> EngineDied:
        """Wait until `die` ends the engine, or until the engine dies in a call."""
        if self._death is not None:
            return self._death
        watcher: asyncio.Future[EngineDied] = asyncio.get_running_loop().create_future()
        self._watchers.add(watcher)
        by_itself = asyncio.ensure_future(self._inner.died())
        try:
            done, _ = await asyncio.wait((watcher, by_itself), return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            self._watchers.discard(watcher)
            by_itself.cancel()
            await asyncio.gather(by_itself, return_exceptions=True)

    async def kill(self) -> None:
        """Give the engine up at once."""
        self.engine.calls.append("host kill")
        self._revive()
        await self._inner.kill()

    async def close(self) -> None:
        """Ask the engine to close."""
        self.engine.calls.append("host close")
        self._revive()
        await self._inner.close()

    async def shut_down(self) -> None:
        """End the engine for good."""
        self.engine.calls.append("host shut_down")
        self._revive()
        await self._inner.shut_down()

    def _revive(self) -> None:
        self._death = None

    @contextmanager
    def _deadly(self) -> Generator[None]:
        """Make a call that `die` ended raise that death, and not a kill on request."""
        if self._death is not None:
            raise EngineDied(str(self._death))
        try:
            yield
        except EngineDied:
            if self._death is not None:
                raise EngineDied(str(self._death)) from None
            raise

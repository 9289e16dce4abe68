"""A host that keeps the engine in this process: for tests, and for many ranks in few processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing

from runner.engine import Engine, EngineDied, EngineFailure
from runner.host.failures import Failure, engine_log, was_cancelled
from runner.host.lives import BaseHost, Call, Life
from runner.host.work import perform

__all__ = ["InlineHost"]


class InlineHost(BaseHost):
    """Hosts an engine in this process. A kill cancels the engine's call and forgets the engine; it does not call its ``close``.

    The host asks the engine for the next piece only when the last one was taken. An engine that ignores cancellation is given up
    after the grace, and goes on. An engine that blocks its thread blocks this process.

    Args:
        factory: makes one engine; called for every incarnation.
        rank: for the texts of failures.
        grace_seconds: how long a cancelled call, a kill and a close may take.
    """

    def __init__(self, factory: Callable[[], Engine], *, rank: int = 0, grace_seconds: float = 5.0) -> None:
        super().__init__(rank=rank, grace_seconds=grace_seconds)
        self._factory = factory

    def _new_life(self) -> Life:
        return _InlineLife(self._factory, self._rank, self._gone)


class _InlineLife(Life):
    def __init__(self, factory: Callable[[], Engine], rank: int, on_gone: Callable[[Life], None]) -> None:
        super().__init__(on_gone)
        self._engine = factory()
        self._rank = rank
        self._task: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._death = EngineDied(f"engine of rank {rank} died")

    @property
    def pid(self) -> int | None:
        return None

    async def start(self) -> None:
        """There is nothing to wait for: the factory has made the engine."""

    def begin(self, call: Call) -> None:
        from barrier import supervise  # noqa: PLC0415 - see `engine_log`

        failed = EngineFailure(
            f"engine of rank {self._rank}: a mistake of ours ended its {call.work.doing}; the log has its frames"
        )
        self._task = supervise.background(
            self._drive(call), f"the call of the engine of rank {self._rank}", on_mistake=lambda _: call.finish(failed)
        )

    def cancel(self, call: Call) -> None:
        if self._task is not None:
            self._task.cancel()

    def close(self) -> None:
        from barrier import supervise  # noqa: PLC0415 - see `engine_log`

        self._closing = supervise.background(
            self._close(), f"the closing of the engine of rank {self._rank}", on_mistake=lambda _: self._is_gone()
        )

    def kill(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
        if self._task is None or self._task.done():
            self._is_gone()
        else:
            self._task.cancel()
            self._task.add_done_callback(lambda _: self._is_gone())

    def death(self, doing: str) -> EngineDied:
        return self._death

    async def _drive(self, call: Call) -> None:
        taken = asyncio.Event()
        call.on_taken = taken.set
        try:
            async with aclosing(perform(self._engine, call.work)) as values:
                async for value in values:
                    taken.clear()
                    call.put(value)
                    if not call.work.prepares:  # a preparation must end even if nobody takes its value
                        await taken.wait()
        except EngineDied as error:
            self._death = EngineDied(Failure.of(error, call.work, self._rank).sentence)
            self._is_gone()
        except BaseException as error:
            if was_cancelled(error):
                call.finish()
                return
            failure = Failure.of(error, call.work, self._rank)
            failure.log(self._rank, call.work)
            call.finish(failure.as_exception())
            if isinstance(error, KeyboardInterrupt):  # it is meant for the whole process
                raise
        else:
            call.finish()

    async def _close(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})
        try:
            await self._engine.close()
        except Exception as error:  # noqa: BLE001 - an engine that cannot close is dropped too
            engine_log().warning("engine of rank {} failed while closing: {}", self._rank, type(error).__name__)
        self._is_gone()

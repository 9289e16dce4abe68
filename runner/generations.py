"""Generates the texts of one rank, one at a time: writes them as chunks, cancels them, and ends the streams of waiting clients."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing

from barrier import Clock, Member, RankgateError, StoreCorrupt, StoreError, supervise
from barrier.log import logger
from runner.engine import EngineFailure, GenerationRequest
from runner.host import EngineHost
from runner.messages import MAX_MESSAGE_BYTES, Chunk, TextGeneration, encode
from runner.session import REMEMBERED, Work
from runner.words import speakable

__all__ = ["Generations", "pieces_of"]


class Generations:
    """The texts that wait at a rank, and the text that is being generated.

    Args:
        member: this rank's side of the barrier.
        host: the engine.
        clock: time.
        survive: calls what it is given, which sends something, and returns whether the store took it.
    """

    def __init__(
        self,
        member: Member,
        host: EngineHost,
        clock: Clock,
        survive: Callable[[Callable[[], Awaitable[None]]], Awaitable[bool]],
    ) -> None:
        self._member = member
        self._host = host
        self._clock = clock
        self._survive = survive
        self._queue: asyncio.Queue[Work] = asyncio.Queue()
        self._current: str = ""
        self._chunks: asyncio.Task[None] | None = None
        self._endings: dict[str, Chunk] = {}  # ends of streams that are not written yet

    def add(self, work: Work) -> None:
        """Add a text to those that wait."""
        self._queue.put_nowait(work)

    async def next(self) -> Work:
        """Take the text that has waited longest; waits until there is one."""
        return await self._queue.get()

    def cancel(self, task_id: str) -> None:
        """Stop a text, if it is being generated."""
        if task_id == self._current and self._chunks is not None:
            self._chunks.cancel()

    async def pause(self) -> None:
        """Wait until the text that is being generated has ended, well or not."""
        if self._chunks is not None:
            await asyncio.wait({self._chunks})

    def forget(self) -> None:
        """Forget the texts that wait, and the text that was being generated."""
        self._current = ""
        self._queue = asyncio.Queue()

    async def generate(self, work: Work, *, cancelled: bool) -> bool:
        """Generate one text, unless it is cancelled already; returns whether it was cancelled. Rank 0 answers.

        Raises:
            EngineFailure: the engine failed.
        """
        task = work.task
        if not isinstance(task, TextGeneration):
            raise TypeError(f"{task.kind} is not a generation")
        if cancelled:
            await self.end_stream(task.task_id, cancelled=True)
            return True
        self._current = task.task_id
        try:
            async with supervise.alongside(self._pump(task), expected=(RankgateError, EngineFailure)) as chunks:
                self._chunks = chunks
                await chunks
        except asyncio.CancelledError:
            own = asyncio.current_task()
            if own is not None and own.cancelling():
                raise
            await self.end_stream(task.task_id, cancelled=True)
            return True
        finally:
            self._chunks = None
            self._current = ""
        return False

    async def _pump(self, task: TextGeneration) -> None:
        answers = self._member.rank == 0
        index = tokens = 0
        request = GenerationRequest(task.task_id, task.prompt, task.max_tokens)
        async with aclosing(self._host.generate(request)) as pieces:
            async for text in pieces:
                if answers:
                    for piece in pieces_of(speakable(text)):
                        await self._write(Chunk(task_id=task.task_id, index=index, text=piece))
                        index += 1
                    tokens += 1
                    self._member.note_progress(tokens, task.max_tokens)  # a long text is no stall
        if answers:
            finish = "length" if tokens >= task.max_tokens else "stop"
            await self._write(Chunk(task_id=task.task_id, index=index, finish=finish))

    async def _write(self, chunk: Chunk) -> None:
        """Write a piece of text. If the store does not answer, wait: a text with a gap is of no use."""
        waited = False
        while True:
            try:
                await self._member.write_output(chunk.task_id, [encode(chunk)])
                return
            except StoreCorrupt as error:
                logger.warning("rank {}: text cannot be written: {}", self._member.rank, error)
                return
            except StoreError as error:
                if not waited:
                    logger.warning("rank {}: text is not written yet: {}", self._member.rank, error)
                waited = True
                await self._clock.sleep(self._member.settings.command_seconds)

    async def end_streams(self, task_ids: Iterable[str], *, error: str) -> None:
        """End the streams of several clients, whose texts will not be completed."""
        for task_id in task_ids:
            await self.end_stream(task_id, error=error)

    async def end_stream(self, task_id: str, *, error: str = "", cancelled: bool = False) -> None:
        """End a client's stream. Every rank that knows a reason writes an end; the client takes the first end that it reads."""
        finish = "cancelled" if cancelled else "error"
        if len(self._endings) < REMEMBERED:  # after such a long outage these clients have left anyway
            self._endings[task_id] = Chunk(
                task_id=task_id, index=0, finish=finish, error=speakable(error)[:2_000] or None
            )
        await self.write_endings()

    async def write_endings(self) -> None:
        """Write the ends that wait. What the store does not take now follows the next report, so no tear-down waits for it."""
        for task_id, chunk in list(self._endings.items()):
            if not await self._survive(lambda: self._member.write_output(task_id, [encode(chunk)])):  # noqa: B023  called at once
                return
            self._endings.pop(task_id, None)


def pieces_of(text: str) -> list[str]:
    """Cut a text into pieces that a client can read (`MAX_MESSAGE_BYTES`): as JSON, a character takes at most six bytes."""
    size = MAX_MESSAGE_BYTES // 8
    return [text[place : place + size] for place in range(0, len(text), size)] or [""]

"""Generations: clients write requests to a stream, the leading planner dispatches them, and each answer is a stream."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass
from itertools import chain
from typing import Any

from barrier import Barrier, Clock, EpochId, Snapshot, StoreError, supervise
from barrier.errors import InvalidName, RankgateError
from barrier.log import logger
from barrier.plain import number
from barrier.protocol.outcomes import Already, Dispatched
from barrier.store.keys import Keys
from barrier.store.store import Store, is_spoiled, stream_entries
from planner.lifecycle import SERVING
from planner.spec import InstanceSpec
from planner.tasks import generation_task
from runner.messages import (
    MAX_MESSAGE_BYTES,
    MAX_PROMPT_CHARS,
    CancelTask,
    Chunk,
    MalformedMessage,
    decode_chunk,
    encode,
)

__all__ = ["GENERATE", "MAX_WAITING", "GenerationFailed", "Request", "RequestQueue"]


MAX_WAITING = 1_000
"""How many requests may wait for an instance. When there are more, the oldest are dropped."""

GENERATE = "generate "
"""Names of steps whose tasks hold a prompt begin with this."""

_BATCH = 64

_ENVELOPE_BYTES = 1_024
"""Room in a TextGeneration for everything except its prompt, in bytes."""

_CUT_SHORT = "the attempt that generated this text ended before it was complete; ask again"


class GenerationFailed(RankgateError):
    """The text could not be completed; the sentence says why, and whether to ask again."""


@dataclass(frozen=True, slots=True)
class Request:
    """One entry of the request stream."""

    entry: str
    id: str
    cancels: str
    prompt: str
    max_tokens: int
    until_ms: int


class RequestQueue:
    """The requests of one instance: what a client does with them, and what a planner does.

    Args:
        store: the store.
        keys: the instance's keys.
        clock: measures the client's deadline.
    """

    def __init__(self, store: Store, keys: Keys, clock: Clock) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock
        self._in_hand: dict[str, Request] = {}
        self._epoch: EpochId | None = None

    # --- the client's end ---------------------------------------------------------------------------------------------

    async def generate(self, prompt: str, *, max_tokens: int, seconds: float) -> AsyncGenerator[str, None]:
        """Ask for a text, and yield it piece by piece. A caller that leaves early cancels the generation.

        Raises:
            InvalidName: the prompt is too long, or `max_tokens` is out of range; nothing was sent.
            GenerationFailed: the generation was refused, failed, or was not complete in time.
            StoreError: the store cannot be reached.
        """
        if len(prompt) > MAX_PROMPT_CHARS:
            raise InvalidName(f"the prompt has {len(prompt):,} characters; at most {MAX_PROMPT_CHARS:,} are accepted")
        _fits_into_a_task(prompt)
        if not 1 <= max_tokens <= 100_000:
            raise InvalidName(f"max_tokens is {max_tokens}; it must be from 1 to 100,000")
        request_id = f"gen.{secrets.token_hex(12)}"
        deadline = self._clock.now() + seconds
        entry: bytes | None = None
        finished = False
        try:
            entry = await self._ask(request_id, prompt=prompt, max_tokens=max_tokens, seconds=seconds)
            async for chunk in self._follow(request_id, deadline, seconds):
                finished = chunk.finish is not None
                if chunk.finish == "error":
                    raise GenerationFailed(chunk.error or "the runner gave no reason")
                if chunk.finish == "cancelled":
                    raise GenerationFailed("the generation was cancelled")
                if chunk.text:
                    yield chunk.text
                if finished:
                    return
        finally:
            await _to_the_end(self._withdraw(request_id, entry, finished=finished, seconds=seconds))

    async def _withdraw(self, request_id: str, entry: bytes | None, *, finished: bool, seconds: float) -> None:
        """Take a request back, and cancel its generation. `entry` is ``None`` if nobody knows whether the request was sent."""
        if not finished:
            await self._ask(f"cancel.{secrets.token_hex(12)}", cancels=request_id, seconds=seconds)
        if entry is not None:
            with self._store.errors():
                await self._store.commands.xdel(self._keys.requests, entry)

    async def _ask(
        self, request_id: str, *, prompt: str = "", max_tokens: int = 1, cancels: str = "", seconds: float
    ) -> bytes:
        settings = self._store.settings
        with self._store.errors():
            # Read the time together with a key of the group: on a cluster, the planner reads the clock of that key's server.
            async with self._store.commands.pipeline(transaction=True) as pipe:
                pipe.pttl(self._keys.requests)
                pipe.time()
                left_ms, (server_seconds, microseconds) = await pipe.execute()
            until_ms = server_seconds * 1000 + microseconds // 1000 + round(seconds * 1000)
            fields = {
                "id": request_id,
                "cancels": cancels,
                "prompt": prompt,
                "max_tokens": max_tokens,
                "until_ms": until_ms,
            }
            asked = [
                ("XADD", self._keys.requests, "MAXLEN", MAX_WAITING, "*", *chain.from_iterable(fields.items())),
                # If no planner runs, the requests and their prompts are gone after the last deadline.
                ("PEXPIRE", self._keys.requests, max(left_ms, round(max(seconds, settings.output_lifetime) * 1000))),
            ]
            signals = self._keys.signals
            hint = [
                ("XADD", signals, "MAXLEN", "~", settings.signal_entries, "*", "kind", "request"),
                ("PEXPIRE", signals, round(settings.record_lifetime * 1000)),
            ]
            entry, _, *said = await self._store.transact([*asked, *hint], may_fail=(2, 3))
        if any(map(is_spoiled, said)):
            await self._store.append_if_possible(signals, hint)
        return entry

    async def _follow(self, request_id: str, deadline: float, seconds: float) -> AsyncGenerator[Chunk, None]:
        key, place, expected = self._keys.out(request_id), "0-0", 0
        reader = self._store.reader()
        try:
            while (left := deadline - self._clock.now()) > 0:
                block = min(left, self._store.settings.reader_block)
                reading = self._read(reader, key, place, block)
                try:
                    reply = await self._clock.wait_for(reading, left + 0.001)
                except TimeoutError:  # outside of `store.errors`, which would call a late text an outage of the store
                    break
                for _, entries in stream_entries(reply):
                    for entry_id, fields in entries:
                        place = entry_id.decode()
                        try:
                            chunk = decode_chunk(fields.get(b"chunk", b""))
                        except MalformedMessage as error:
                            raise GenerationFailed(f"the answer is not readable: {error}") from None
                        if chunk.finish not in (
                            "error",
                            "cancelled",
                        ):  # such a chunk may come from a planner, which has no index
                            if chunk.index < expected:
                                continue  # the store's reply was lost after the commit, and the runner wrote the piece again
                            if chunk.index > expected:
                                raise GenerationFailed(
                                    f"piece {expected} of the text is gone from the store; ask again"
                                )
                            expected += 1
                        yield chunk
        finally:
            await reader.aclose()
        raise GenerationFailed(f"the text was not complete within {number(seconds)} s; ask again, or allow more time")

    async def _read(self, reader: Any, key: str, place: str, seconds: float) -> Any:  # noqa: ANN401  as `Store.reader` makes it
        with self._store.errors():
            return await reader.xread({key: place}, count=_BATCH, block=max(1, round(seconds * 1000)))

    # --- the planner's end --------------------------------------------------------------------------------------------

    async def hand_out(self, barrier: Barrier, spec: InstanceSpec, snapshot: Snapshot, limit: int) -> tuple[int, int]:
        """Dispatch the requests that wait, up to the limit.

        Returns:
            How many generations are newly complete, and how many requests still wait.
        """
        epoch = snapshot.epoch
        if epoch is None or barrier.leadership is None:
            return 0, 0
        if self._epoch != epoch.id:
            await self.fail_in_hand(_CUT_SHORT)
            self._epoch = epoch.id
        completed = await self._drop_completed(snapshot)
        waiting = 0
        for request in await self._pending(snapshot.now_ms):
            if request.id in self._in_hand:
                continue
            if not request.cancels and len(self._in_hand) >= limit:
                waiting += 1
                continue
            try:
                step, payload = _task_of(request, spec.name, epoch.id, barrier.leadership.term)
                outcome = await barrier.dispatch(epoch.id, step, payload, SERVING, repeatable=True)
            except ValueError:  # written by a foreign client. The error is not quoted: it may hold the prompt
                await self._fail(request, "the request is not one that a runner accepts: check its id and its size")
                continue
            match outcome:
                case Dispatched() | Already() if request.cancels:
                    await self._drop(request)
                case Dispatched():
                    self._in_hand[request.id] = request
                    logger.info("request {} of at most {} tokens is handed out", request.id, request.max_tokens)
                case Already(place) if place.number == epoch.id.number:
                    self._in_hand[request.id] = request  # an earlier planner dispatched it
                case Already():
                    await self._fail(request, _CUT_SHORT)
                case _:
                    waiting += 1
                    break
        return completed, waiting

    async def fail_in_hand(self, reason: str) -> None:
        """End the answers of all dispatched generations with an error: their epoch is over."""
        for request in list(self._in_hand.values()):
            await self._fail(request, reason)

    async def fail_all(self, reason: str) -> None:
        """End the answers of all requests with an error: the instance will not come back."""
        await self.fail_in_hand(reason)
        while pending := await self._pending(0):
            for request in pending:
                await self._fail(request, reason)

    async def _drop_completed(self, snapshot: Snapshot) -> int:
        """Drop the requests that rank 0 has answered; returns how many of them were completed."""
        first = snapshot.ranks[0].report
        completed = 0
        for outcome in first.outcomes if first else ():
            request = self._in_hand.get(outcome.task_id)
            if request is not None and outcome.result != "running":
                completed += outcome.result == "done"
                logger.info("request {} is {}", request.id, outcome.result)
                await self._drop(request)
        return completed

    async def _pending(self, now_ms: int) -> list[Request]:
        """The requests that wait, oldest first. A request that is too old is answered with an error."""
        with self._store.errors():
            entries = await self._store.commands.xrange(self._keys.requests, count=_BATCH)
            if len(entries) == _BATCH:  # a cancellation must not wait behind requests that wait
                newest = await self._store.commands.xrevrange(
                    self._keys.requests, min=f"({entries[-1][0].decode()}", count=_BATCH
                )
                entries += [entry for entry in reversed(newest) if entry[1].get(b"cancels")]
        pending: list[Request] = []
        for entry_id, fields in entries:
            try:
                request = Request(
                    entry=entry_id.decode(),
                    id=fields[b"id"].decode(),
                    cancels=fields[b"cancels"].decode(),
                    prompt=fields[b"prompt"].decode(),
                    max_tokens=int(fields[b"max_tokens"]),
                    until_ms=int(fields[b"until_ms"]),
                )
                self._keys.out(request.id)
            except (KeyError, ValueError):
                logger.warning("a request that is not readable was dropped: {}", entry_id.decode("utf-8", "replace"))
                with self._store.errors():
                    await self._store.commands.xdel(self._keys.requests, entry_id)
                continue
            if request.until_ms < now_ms:  # its client has given up or is gone
                if request.id in self._in_hand:
                    await self._drop(request)
                else:
                    await self._fail(request, "nobody could take the request in time")
                continue
            pending.append(request)
        known = {request.id for request in pending}
        for request_id in [one for one in self._in_hand if one not in known]:
            del self._in_hand[request_id]  # its client has the whole answer and deleted the request
        return pending

    async def _fail(self, request: Request, reason: str) -> None:
        logger.info("request {} is answered with an error: {}", request.id, reason)
        if not request.cancels:
            chunk = encode(Chunk(task_id=request.id, index=0, finish="error", error=reason[:2_000]))
            key = self._keys.out(request.id)
            lifetime_ms = round(self._store.settings.output_lifetime * 1000)
            await self._store.append_answer(key, [("XADD", key, "*", "chunk", chunk), ("PEXPIRE", key, lifetime_ms)])
        await self._drop(request)

    async def _drop(self, request: Request) -> None:
        self._in_hand.pop(request.id, None)
        with self._store.errors():
            await self._store.commands.xdel(self._keys.requests, request.entry)


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Finish the work even while the caller is being cancelled (an anyio scope cancels each await). The store's timeouts bound it."""
    # Nothing depends on it: a request that is not taken back ends by its own deadline.
    task = supervise.background(
        _told(work), "taking back a request", on_mistake=lambda _: None, expected=(RankgateError,)
    )
    await asyncio.shield(task)


async def _told(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except StoreError as error:
        logger.debug("a request was not taken back: {}", error)
        raise


def _fits_into_a_task(prompt: str) -> None:
    """Refuse a prompt that no task can carry, before anything is sent."""
    try:
        size = len(json.dumps(prompt, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        raise InvalidName("the prompt is not valid text: it contains half of a surrogate pair") from None
    limit = MAX_MESSAGE_BYTES - _ENVELOPE_BYTES
    if size > limit:
        raise InvalidName(f"the prompt takes {size:,} bytes as JSON; at most {limit:,} are accepted: shorten it")


def _task_of(request: Request, instance: str, epoch: EpochId, term: int) -> tuple[str, str]:
    """The step's name and the task, as text; raises `ValueError` for what the runners' messages do not allow."""
    if request.cancels:
        cancel = CancelTask(
            task_id=f"{request.id}.task", instance=instance, epoch=str(epoch), term=term, cancels=request.cancels
        )
        return f"cancel {request.id}", encode(cancel).decode()
    task = generation_task(request.id, request.prompt, request.max_tokens, instance=instance, epoch=epoch, term=term)
    return f"{GENERATE}{request.id}", encode(task).decode()

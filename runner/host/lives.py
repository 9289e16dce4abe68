"""The common part of both hosts: one call at a time, one engine at a time, and the cleaning up between them."""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import cast

from runner.engine import EngineDied, EngineFailure, EngineGroup, GenerationRequest
from runner.host.contract import PROGRESS_WINDOW
from runner.host.failures import MAX_FAILURE_CHARS, UNFIT, engine_log, is_permanent, sentence_of
from runner.host.work import Place, Value, Work
from runner.model import ModelSpec

__all__ = ["BaseHost", "Call", "Life"]


class Call:
    """One call under way: it passes values from the engine to the caller."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.on_taken: Callable[[], None] = lambda: None
        self.on_done: Callable[[], None] = lambda: None
        """Called when the call succeeds, even if nobody waits for it any more."""
        self.over: bool = False
        self.left = False
        """Whether the caller no longer waits."""
        self._failure: EngineFailure | None = None
        self._values: deque[Value] = deque(maxlen=PROGRESS_WINDOW if work.name == "load" else None)
        self._news = asyncio.Event()

    @property
    def failed(self) -> bool:
        """Whether the call is over and has failed."""
        return self._failure is not None

    def put(self, value: Value) -> None:
        """Add a value for the consumer."""
        if not self.over:
            self._values.append(value)
            self._news.set()

    def finish(self, failure: EngineFailure | None = None) -> None:
        """End the call; only the first end counts. The consumer still gets the values that came before."""
        if not self.over:
            self.over = True
            self._failure = failure
            if failure is None:
                self.on_done()
            self._news.set()

    async def take(self) -> Value | None:
        """Take the next value; ``None`` at the end. Raises the failure that ended the call."""
        while not self._values:
            if self.over:
                if self._failure is not None:
                    raise self._failure
                return None
            self._news.clear()
            await self._news.wait()
        value = self._values.popleft()
        self.on_taken()
        return value

    async def wait_over(self) -> None:
        """Wait for the end, and drop the values as they come, without `on_taken`: nobody wants them any more."""
        while not self.over:
            self._values.clear()
            self._news.clear()
            await self._news.wait()


class Life(ABC):
    """One incarnation of an engine. All methods but `start` return at once."""

    def __init__(self, on_gone: Callable[[Life], None]) -> None:
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_gone = on_gone

        self.asked_at: float = asyncio.get_running_loop().time()
        self.preparing: float = 0.0
        """Seconds that its start and its preparations have taken."""
        self.used = False
        """Whether it had any call but to start or prepare: it may be in a group, or hold a model."""

    @property
    @abstractmethod
    def pid(self) -> int | None:
        """The engine's own process; ``None`` if it has none."""
        ...

    @abstractmethod
    async def start(self) -> None:
        """Start the engine; raises if that is not possible."""

    @abstractmethod
    def begin(self, call: Call) -> None:
        """Begin a call. If that fails, the call fails."""

    @abstractmethod
    def cancel(self, call: Call) -> None:
        """Ask the engine to end the call. It may never do so."""

    @abstractmethod
    def close(self) -> None:
        """Ask the engine to end. It may never do so."""

    @abstractmethod
    def kill(self) -> None:
        """End the engine; idempotent."""

    @abstractmethod
    def death(self, doing: str) -> EngineDied:
        """Say how the engine ended, once it is gone."""

    def _is_gone(self) -> None:
        if not self.gone.done():
            self.gone.set_result(None)
            self._on_gone(self)


def _not_connected(group: EngineGroup) -> str:
    """The sentence about a group that did not connect in time."""
    from barrier.plain import number  # noqa: PLC0415 - the engine's own process imports it only for a failure

    after = (group.rank + 1) % group.world_size
    return (
        f"engine of rank {group.rank} did not connect within {number(group.deadline)} s: it waits at {group.endpoints[group.rank] or 'no endpoint'}, "
        f"and the next rank, {after}, at {group.endpoints[after] or 'no endpoint'}; each rank must be able to reach the next one's endpoint"
    )


class BaseHost(ABC):
    """The contract of `EngineHost`, for any kind of `Life`."""

    def __init__(self, *, rank: int, grace_seconds: float, spare_after: float = math.inf) -> None:
        if rank < 0:
            raise ValueError(f"rank {rank} is negative; ranks are counted from 0")
        if not (math.isfinite(grace_seconds) and grace_seconds > 0):
            raise ValueError(f"grace_seconds is {grace_seconds}; it must be a finite number of seconds above 0")
        self._rank = rank
        self._grace_seconds = grace_seconds
        self._life: Life | None = None
        self._ending: set[Life] = set()
        self._call: Call | None = None
        self._tidying: asyncio.Task[None] | None = None
        self._last_death: EngineDied | None = None
        self._watchers: set[asyncio.Future[EngineDied]] = set()
        self._spare_after = spare_after
        self._costly: Place | None = None
        """The rank and world size to prepare a spare for, once an engine took longer than `spare_after` to be ready."""
        self._longest_preparing = 0.0
        self._spare: Life | None = None
        self._preparing_spare = Call(Work("prepare"))
        self._starting_spare: asyncio.Task[None] | None = None
        self._handing_over: asyncio.Task[None] | None = None

    @abstractmethod
    def _new_life(self) -> Life: ...

    @property
    def pid(self) -> int | None:
        """See `EngineHost`."""
        return self._life.pid if self._life is not None else None

    async def start(self) -> None:
        """See `EngineHost`."""
        await self._run(Work("start"))

    async def prepare(self, rank: int, world_size: int) -> str | None:
        """See `EngineHost`."""
        place = Place(rank, world_size)
        endpoint = ""
        async with aclosing(self._values(Work("prepare", place))) as values:
            async for value in values:
                endpoint = str(value)
        if self._life is not None and self._life.preparing > self._spare_after:
            self._costly = place
        return endpoint or None

    def _count_preparing(self, life: Life) -> None:
        """Add the time of the call that has just ended to the time of the engine's start and preparations."""
        life.preparing += asyncio.get_running_loop().time() - life.asked_at
        self._longest_preparing = max(self._longest_preparing, life.preparing)

    async def connect(self, group: EngineGroup) -> None:
        """See `EngineHost`."""
        try:
            async with asyncio.timeout(group.deadline):
                await self._run(Work("connect", group))
        except TimeoutError:
            raise EngineFailure(_not_connected(group)) from None

    def load(self, model: ModelSpec) -> AsyncGenerator[int, None]:
        """See `EngineHost`."""
        return cast("AsyncGenerator[int, None]", self._values(Work("load", model)))

    async def warm_up(self) -> None:
        """See `EngineHost`. If the engine was slow to prepare, the host starts a spare now, when the engine is warm."""
        await self._run(Work("warm_up"))
        if self._costly is not None and self._spare is None:
            from barrier import supervise  # noqa: PLC0415 - see `engine_log`

            self._starting_spare = supervise.background(
                self._start_spare(self._costly),
                f"the start of a spare engine of rank {self._rank}",
                on_mistake=lambda _: self._give_up_spare(),
            )

    def generate(self, request: GenerationRequest) -> AsyncGenerator[str, None]:
        """See `EngineHost`."""
        return cast("AsyncGenerator[str, None]", self._values(Work("generate", request)))

    async def died(self) -> EngineDied:
        """See `EngineHost`."""
        if self._last_death is not None:
            return self._last_death
        watcher: asyncio.Future[EngineDied] = asyncio.get_running_loop().create_future()
        self._watchers.add(watcher)
        try:
            return await watcher
        finally:
            self._watchers.discard(watcher)

    async def kill(self) -> None:
        """See `EngineHost`."""
        if self._life is None and self._active_call() is not None:  # the call under way waits for the spare
            self._give_up_spare()
        self._end("was killed on request")
        await self._until_gone()

    async def shut_down(self) -> None:
        """See `EngineHost`."""
        if self._starting_spare is not None:
            self._starting_spare.cancel()  # a start that has not begun must not begin after this
            await asyncio.wait({self._starting_spare})
        self._give_up_spare()
        self._end("was killed on request")
        await self._until_gone()

    async def close(self) -> None:
        """See `EngineHost`."""
        if self._life is not None and not self._life.used:
            await self._until_gone()
            return
        life = self._part_with("was closed on request")
        if life is not None:
            try:
                life.close()
                if not (await asyncio.wait({life.gone}, timeout=self._grace_seconds))[0]:
                    engine_log().warning(
                        "engine of rank {} has not closed in {} s and is killed",
                        self._rank,
                        self._grace_seconds,
                    )
            finally:
                life.kill()
        await self._until_gone()

    async def _run(self, work: Work) -> None:
        async with aclosing(self._values(work)) as values:
            async for _ in values:
                pass

    async def _values(self, work: Work) -> AsyncGenerator[Value, None]:
        await self._settle()
        if (busy := self._active_call()) is not None:
            raise EngineFailure(
                f"engine of rank {self._rank} cannot start {work.doing}: it is still {busy.work.doing}, and calls "
                "come one at a time (close an unfinished load or generate first)"
            )
        call = self._call = Call(work)
        try:
            if call.work.prepares:  # in a task of its own, because it goes on if the caller leaves
                from barrier import supervise  # noqa: PLC0415 - see `engine_log`

                self._handing_over = supervise.background(
                    self._hand_over(call),
                    f"the start of the engine of rank {self._rank}",
                    on_mistake=lambda _: call.finish(EngineFailure("the engine's start failed by a mistake of ours")),
                )
                await asyncio.shield(self._handing_over)
            else:
                await self._hand_over(call)
            while (value := await call.take()) is not None:
                yield value
        finally:
            try:
                if not call.over:
                    call.left = True
                    await self._abandon(call)
            finally:
                # A call that is not over yet is still being ended, and the host needs it until then.
                if self._call is call and call.over:
                    self._call = None

    def _active_call(self) -> Call | None:
        return self._call if self._call is not None and not self._call.over else None

    async def _hand_over(self, call: Call) -> None:
        life = self._life
        if life is None and call.work.starts_engine:
            await self._spare_settled()
            if call.over:  # killed while it waited for the spare
                return
            life = self._life = self._take_spare()
            self._last_death = None
        if life is None:
            if not call.work.starts_engine:
                call.finish(self._no_engine(call.work))
                return
            try:
                life = self._life = self._new_life()
                life.used = not call.work.prepares
                await life.start()
            except Exception as error:  # noqa: BLE001 - whatever a foreign engine raises at its start is one failed task
                failure = EngineFailure(
                    f"engine of rank {self._rank} cannot be started: {sentence_of(error)}"[:MAX_FAILURE_CHARS],
                    permanent=is_permanent(error) or isinstance(error, UNFIT),
                )
                failure.__cause__ = error
                call.finish(failure)
                # It never started, so nobody waits for its end.
                if (life := self._part_with("could not be started")) is not None:
                    self._ending.discard(life)
                return
        else:
            life.asked_at = asyncio.get_running_loop().time()
        life.used = life.used or not call.work.prepares
        if call.work.prepares:  # also if the caller leaves: the call goes on, and its time counts
            call.on_done = lambda: self._count_preparing(life)
        if not call.over:  # killed while it was being started
            life.begin(call)

    async def _start_spare(self, place: Place) -> None:
        """Start and prepare a second engine. If that fails, the next attempt starts an engine as usual."""
        life = self._spare = self._new_life()
        call = self._preparing_spare = Call(Work("prepare", place))
        try:
            await life.start()
            life.begin(call)
        except BaseException as error:  # as in `_hand_over`; `shut_down` may also cancel it
            call.finish(EngineFailure(f"no spare engine could be started: {type(error).__name__}"))
            self._give_up_spare()
            if not isinstance(error, Exception):
                raise

    async def _spare_settled(self) -> None:
        """Wait until the spare, if there is one, is prepared or has failed. Give it up if it takes far longer than any engine did."""
        try:
            async with asyncio.timeout(max(self._grace_seconds, 2 * self._longest_preparing)):
                if self._starting_spare is not None:
                    await asyncio.wait({self._starting_spare})
                if self._spare is not None:
                    await self._preparing_spare.wait_over()
        except TimeoutError:
            if self._starting_spare is not None:
                self._starting_spare.cancel()  # so that no later attempt waits for it again
            self._give_up_spare()

    def _take_spare(self) -> Life | None:
        """The prepared spare; ``None`` if there is none, or if it failed."""
        if self._spare is not None and self._preparing_spare.failed:
            self._give_up_spare()
        life, self._spare = self._spare, None
        return life

    def _give_up_spare(self) -> None:
        life, self._spare = self._spare, None
        self._preparing_spare.finish(EngineDied(f"the spare engine of rank {self._rank} was killed"))
        if life is not None:
            if not life.gone.done():
                self._ending.add(life)
            life.kill()

    def _no_engine(self, work: Work) -> EngineFailure:
        if self._last_death is not None:
            return EngineDied(str(self._last_death))
        return EngineFailure(
            f"no engine of rank {self._rank} is running, so it cannot start {work.doing}: connect or load first"
        )

    async def _abandon(self, call: Call) -> None:
        if call.work.prepares:
            return  # it goes on; `_settle` waits for it
        if call.work.name != "generate":
            self._end("was killed because its caller gave up")
        # In a task of its own: a second cancellation (anyio's scopes repeat theirs) ends the waiting, but not the cleaning up.
        from barrier import supervise  # noqa: PLC0415 - see `engine_log`

        self._tidying = supervise.background(
            self._tidy(call),
            f"the tidying after the engine of rank {self._rank}",
            on_mistake=lambda _: self._end("was killed because tidying after it failed by a mistake of ours"),
        )
        await asyncio.shield(self._tidying)

    async def _tidy(self, call: Call) -> None:
        life = self._life
        if life is not None and not call.over:
            life.cancel(call)
            try:
                await asyncio.wait_for(call.wait_over(), self._grace_seconds)
            except TimeoutError:
                if self._life is life:
                    engine_log().warning(
                        "engine of rank {} had not stopped a cancelled generation within {} s and is killed",
                        self._rank,
                        self._grace_seconds,
                    )
                    self._end("was killed because it did not stop a cancelled generation")
        await self._until_gone()

    async def _settle(self) -> None:
        if self._tidying is not None:
            await asyncio.wait({self._tidying})
        if (call := self._active_call()) is not None and call.work.prepares and call.left:
            await call.wait_over()
        await self._until_gone()

    async def _until_gone(self) -> None:
        ending = set(self._ending)
        if ending:
            await asyncio.wait({life.gone for life in ending}, timeout=self._grace_seconds)
        for life in ending & self._ending:
            engine_log().error(
                "engine of rank {} (pid {}) is not gone after {} s; given up",
                self._rank,
                life.pid,
                self._grace_seconds,
            )
            self._ending.discard(life)

    def _end(self, how: str) -> None:
        self._part_with(how)
        for life in tuple(self._ending):  # an engine that is gone at once takes itself off the set
            life.kill()

    def _part_with(self, how: str) -> Life | None:
        """Take the engine off the host and end the call under way. From now on the engine's end is no death."""
        life, self._life = self._life, None
        self._last_death = None
        if life is not None and not life.gone.done():
            self._ending.add(life)
        if (call := self._active_call()) is not None:
            call.finish(EngineDied(f"engine of rank {self._rank} {how} while {call.work.doing}"))
        return life

    def _gone(self, life: Life) -> None:
        self._ending.discard(life)
        if life is self._spare:
            self._spare = None
            self._preparing_spare.finish(life.death("preparing"))
        if life is not self._life:
            return
        self._life = None
        call = self._active_call()
        death = self._last_death = life.death(call.work.doing if call is not None else "idle")
        engine_log().warning("{}", death)
        if call is not None:
            call.finish(death)
        for watcher in self._watchers:
            if not watcher.done():
                watcher.set_result(death)

"""A host behind which an engine can be killed, whatever it is doing.

An engine is foreign code: it may raise, wait for ever for a rank that is gone, hold the interpreter, or crash. The runner
must outlive all of that, so it never calls an engine directly but through a host:

- `ProcessHost` keeps the engine in a child process of its own. Killing it is a SIGKILL, which nothing can block.
- `InlineHost` keeps it in this process, for tests and for many ranks in few processes. It can only cancel, so an engine
  that blocks its thread blocks the whole process: `ProcessHost` is the one for real engines.

Both obey one contract, that of `EngineHost`. The idea that a worker which may hang belongs behind a process boundary, with a
supervisor that neither shares its fate nor trusts it, is Erlang's; the details (bootstrap over the pipe, parent's
``sys.path`` handed on) follow CPython's ``multiprocessing.spawn``.

The pipes carry frames: four bytes of length, big-endian, then that many bytes of ASCII JSON. Never pickle.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import os
import re
import signal
import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, cast

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from runner.engine import Engine, EngineDied, EngineFailure, EngineGroup, GenerationRequest
from runner.messages import ModelSpec

if TYPE_CHECKING:
    from loguru import Logger

MAX_FRAME_BYTES = 16 * 1024 * 1024
"""The longest frame that passes between a host and its child, in bytes. The longest prompt that a task may carry needs 2.4 MB."""

CHUNK_WINDOW = 16
"""How many pieces of text may be under way before the consumer has taken them; the engine waits at the next one."""

PROGRESS_WINDOW = 64
"""How many steps of load progress are kept for a consumer that is behind; older ones make room, the newest is never lost."""

MAX_FAILURE_CHARS = 1_900
"""The longest failure sentence, in characters: it has to fit into a runner's Failed status, which holds 2,000."""

_TRACEBACK_CHARS = 4_000
_STDERR_LINES = 5
_STDERR_LINE_CHARS = 300
_DRAIN_SECONDS = 0.5

Value: TypeAlias = int | str
Request: TypeAlias = EngineGroup | ModelSpec | GenerationRequest | None


# --- the contract ---------------------------------------------------------------------------------------------------------


class EngineHost(Protocol):
    """An engine that can be taken away. The same calls as `runner.engine.Engine`, one at a time and in the same order.

    Life of an engine:
        ``connect`` and ``load`` start one if there is none; ``warm_up`` and ``generate`` do not, and say so. After `kill`,
        after `close` and after a death, the next ``connect`` or ``load`` starts a fresh one: a new incarnation of the
        engine. It never starts before the old one is gone, or has been given up on after a grace.

    Failures:
        Whatever a call raises is an `EngineFailure` (asyncio.CancelledError aside). `EngineDied` means that the engine is
        gone: it ended by itself, or was killed or closed while the call ran. The text never quotes a prompt.

    Cancellation:
        A cancelled ``connect``, ``load`` or ``warm_up`` kills the engine, because half a collective is of no use. A
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

    async def connect(self, group: EngineGroup) -> None:
        """Enter the collective group; returns once all ranks are in it."""
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
        """Give the engine up at once, whatever it does; idempotent. A call under way ends with `EngineDied`.

        The engine is condemned before the first await, so that a cancelled kill has killed as well. Returns once the engine
        is gone, or after the grace where the operating system cannot end it sooner.
        """
        ...

    async def close(self) -> None:
        """Ask the engine to give up group, model and memory, and kill it if it has not within the grace; idempotent.

        A call under way ends with `EngineDied`. A cancelled close becomes a kill.
        """
        ...


class EngineSpec(BaseModel):
    """Which engine a `ProcessHost` starts.

    Attributes:
        factory: ``package.module:name`` of a callable that takes ``config`` and returns an `Engine`, looked up in the child.
        config: passed to the factory as it is; JSON values only. It travels over a pipe, never on the command line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    factory: str
    config: dict[str, JsonValue] = Field(default_factory=dict, repr=False)

    @field_validator("factory")
    @classmethod
    def _names_a_callable(cls, factory: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", factory):
            raise ValueError(f"engine factory {factory!r} is not of the form package.module:name")
        return factory


# --- one call and one life: what both hosts share ---------------------------------------------------------------------------


CallName: TypeAlias = Literal["connect", "load", "warm_up", "generate"]

_DOING: dict[CallName, str] = {
    "connect": "connecting",
    "load": "loading",
    "warm_up": "warming up",
    "generate": "generating",
}


@dataclass(frozen=True, slots=True)
class _Work:
    """What an engine is asked to do."""

    name: CallName
    request: Request = None

    @property
    def doing(self) -> str:
        return _DOING[self.name]

    @property
    def prompt(self) -> str:
        return self.request.prompt if isinstance(self.request, GenerationRequest) else ""

    @property
    def starts_engine(self) -> bool:
        return self.name in ("connect", "load")


class _Call:
    """One call under way: values pass from whoever does the work to the one who awaits it."""

    def __init__(self, work: _Work) -> None:
        self.work = work
        self.on_taken: Callable[[], None] = lambda: None
        self.over = False
        self._failure: EngineFailure | None = None
        self._values: deque[Value] = deque(maxlen=PROGRESS_WINDOW if work.name == "load" else None)
        self._news = asyncio.Event()

    def put(self, value: Value) -> None:
        if not self.over:
            self._values.append(value)
            self._news.set()

    def finish(self, failure: EngineFailure | None = None) -> None:
        """End the call; the first end counts. Values that came before it are still handed out."""
        if not self.over:
            self.over = True
            self._failure = failure
            self._news.set()

    async def take(self) -> Value | None:
        """Take the next value; None at the end. Raises the failure that ended the call."""
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
        """Wait for the end and throw the values away as they come, unacknowledged: nobody wants them any more."""
        while not self.over:
            self._values.clear()
            self._news.clear()
            await self._news.wait()


class _Life(ABC):
    """One incarnation of an engine. Everything but `start` returns at once."""

    def __init__(self, on_gone: Callable[[_Life], None]) -> None:
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_gone = on_gone

    @property
    @abstractmethod
    def pid(self) -> int | None: ...

    @abstractmethod
    async def start(self) -> None:
        """Start; raises if that is not possible."""

    @abstractmethod
    def begin(self, call: _Call) -> None:
        """Take up a call; a failure to do so is the call's failure."""

    @abstractmethod
    def cancel(self, call: _Call) -> None:
        """Ask for the end of that call; it ends soon, or never."""

    @abstractmethod
    def close(self) -> None:
        """Ask for the end of the engine; it is gone soon, or never."""

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


class _Host(ABC):
    """The contract of `EngineHost`, for any kind of `_Life`."""

    def __init__(self, *, rank: int, grace_seconds: float) -> None:
        if rank < 0:
            raise ValueError(f"rank {rank} is negative; ranks are counted from 0")
        if not (math.isfinite(grace_seconds) and grace_seconds > 0):
            raise ValueError(f"grace_seconds is {grace_seconds}; it must be a finite number of seconds above 0")
        self._rank = rank
        self._grace_seconds = grace_seconds
        self._life: _Life | None = None
        self._ending: set[_Life] = set()
        self._call: _Call | None = None
        self._tidying: asyncio.Task[None] | None = None
        self._last_death: EngineDied | None = None
        self._watchers: set[asyncio.Future[EngineDied]] = set()

    @abstractmethod
    def _new_life(self) -> _Life: ...

    @property
    def pid(self) -> int | None:
        return self._life.pid if self._life is not None else None

    async def connect(self, group: EngineGroup) -> None:
        await self._run(_Work("connect", group))

    def load(self, model: ModelSpec) -> AsyncGenerator[int, None]:
        return cast("AsyncGenerator[int, None]", self._values(_Work("load", model)))

    async def warm_up(self) -> None:
        await self._run(_Work("warm_up"))

    def generate(self, request: GenerationRequest) -> AsyncGenerator[str, None]:
        return cast("AsyncGenerator[str, None]", self._values(_Work("generate", request)))

    async def died(self) -> EngineDied:
        if self._last_death is not None:
            return self._last_death
        watcher: asyncio.Future[EngineDied] = asyncio.get_running_loop().create_future()
        self._watchers.add(watcher)
        try:
            return await watcher
        finally:
            self._watchers.discard(watcher)

    async def kill(self) -> None:
        self._end("was killed on request")
        await self._until_gone()

    async def close(self) -> None:
        life = self._part_with("was closed on request")
        if life is not None:
            try:
                life.close()
                if not (await asyncio.wait({life.gone}, timeout=self._grace_seconds))[0]:
                    _log().warning(
                        "engine of rank {} has not closed in {} s and is killed",
                        self._rank,
                        self._grace_seconds,
                    )
            finally:
                life.kill()
        await self._until_gone()

    async def _run(self, work: _Work) -> None:
        async with aclosing(self._values(work)) as values:
            async for _ in values:
                pass

    async def _values(self, work: _Work) -> AsyncGenerator[Value, None]:
        await self._settle()
        if (busy := self._active_call()) is not None:
            raise EngineFailure(
                f"engine of rank {self._rank} cannot start {work.doing}: it is still {busy.work.doing}, and calls "
                "come one at a time (close an unfinished load or generate first)"
            )
        call = self._call = _Call(work)
        try:
            await self._hand_over(call)
            while (value := await call.take()) is not None:
                yield value
        finally:
            try:
                if not call.over:
                    await self._abandon(call)
            finally:
                # One that is not over yet is still being tidied up after, and its end concerns the engine.
                if self._call is call and call.over:
                    self._call = None

    def _active_call(self) -> _Call | None:
        return self._call if self._call is not None and not self._call.over else None

    async def _hand_over(self, call: _Call) -> None:
        life = self._life
        if life is None:
            if not call.work.starts_engine:
                call.finish(self._no_engine(call.work))
                return
            self._last_death = None
            try:
                life = self._life = self._new_life()
                await life.start()
            except Exception as error:  # noqa: BLE001 - whatever keeps a foreign engine from starting is one failed task
                failure = EngineFailure(
                    f"engine of rank {self._rank} cannot be started: {_sentence(error)}"[:MAX_FAILURE_CHARS],
                    permanent=_is_permanent(error),
                )
                failure.__cause__ = error
                call.finish(failure)
                # It never lived, so nothing of it is waited for.
                if (life := self._part_with("could not be started")) is not None:
                    self._ending.discard(life)
                return
        life.begin(call)

    def _no_engine(self, work: _Work) -> EngineFailure:
        if self._last_death is not None:
            return EngineDied(str(self._last_death))
        return EngineFailure(
            f"no engine of rank {self._rank} is running, so it cannot start {work.doing}: connect or load first"
        )

    async def _abandon(self, call: _Call) -> None:
        if call.work.name != "generate":
            self._end("was killed because its caller gave up")
        # A task of its own, so that a second cancellation (anyio's scopes repeat theirs) ends the waiting, not the tidying.
        self._tidying = asyncio.create_task(self._tidy(call))
        await asyncio.shield(self._tidying)

    async def _tidy(self, call: _Call) -> None:
        life = self._life
        if life is not None and not call.over:
            life.cancel(call)
            try:
                await asyncio.wait_for(call.wait_over(), self._grace_seconds)
            except TimeoutError:
                if self._life is life:
                    _log().warning(
                        "engine of rank {} had not stopped a cancelled generation within {} s and is killed",
                        self._rank,
                        self._grace_seconds,
                    )
                    self._end("was killed because it did not stop a cancelled generation")
        await self._until_gone()

    async def _settle(self) -> None:
        if self._tidying is not None:
            await asyncio.wait({self._tidying})
        await self._until_gone()

    async def _until_gone(self) -> None:
        ending = set(self._ending)
        if ending:
            await asyncio.wait({life.gone for life in ending}, timeout=self._grace_seconds)
        for life in ending & self._ending:
            _log().error(
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

    def _part_with(self, how: str) -> _Life | None:
        """Take the engine off the host and end the call under way; from here on its end is expected."""
        life, self._life = self._life, None
        self._last_death = None
        if life is not None and not life.gone.done():
            self._ending.add(life)
        if (call := self._active_call()) is not None:
            call.finish(EngineDied(f"engine of rank {self._rank} {how} while {call.work.doing}"))
        return life

    def _gone(self, life: _Life) -> None:
        self._ending.discard(life)
        if life is not self._life:
            return
        self._life = None
        call = self._active_call()
        death = self._last_death = life.death(call.work.doing if call is not None else "idle")
        _log().warning("{}", death)
        if call is not None:
            call.finish(death)
        for watcher in self._watchers:
            if not watcher.done():
                watcher.set_result(death)


# --- an engine in this process --------------------------------------------------------------------------------------------


class InlineHost(_Host):
    """Hosts an engine in this process. To kill it is to cancel its call and to forget it, without a call to its ``close``.

    One piece passes at a time: the engine is asked for the next one only when the last has been taken. An engine that
    swallows cancellation is left behind after the grace; one that blocks its thread blocks this process.

    Args:
        factory: makes one engine; called anew for every incarnation.
        rank: for the texts of failures.
        grace_seconds: how long a cancelled call, a kill and a close may take.
    """

    def __init__(self, factory: Callable[[], Engine], *, rank: int = 0, grace_seconds: float = 5.0) -> None:
        super().__init__(rank=rank, grace_seconds=grace_seconds)
        self._factory = factory

    def _new_life(self) -> _Life:
        return _InlineLife(self._factory, self._rank, self._gone)


class _InlineLife(_Life):
    def __init__(self, factory: Callable[[], Engine], rank: int, on_gone: Callable[[_Life], None]) -> None:
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

    def begin(self, call: _Call) -> None:
        self._task = asyncio.create_task(self._drive(call))

    def cancel(self, call: _Call) -> None:
        if self._task is not None:
            self._task.cancel()

    def close(self) -> None:
        self._closing = asyncio.create_task(self._close())

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

    async def _drive(self, call: _Call) -> None:
        taken = asyncio.Event()
        call.on_taken = taken.set
        try:
            async with aclosing(_perform(self._engine, call.work)) as values:
                async for value in values:
                    taken.clear()
                    call.put(value)
                    await taken.wait()
        except EngineDied as error:
            self._death = EngineDied(_Failure.of(error, call.work, self._rank).sentence)
            self._is_gone()
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - an engine may raise anything
            if _was_cancelled(error):
                call.finish()
                return
            failure = _Failure.of(error, call.work, self._rank)
            failure.log(self._rank, call.work)
            call.finish(failure.as_exception())
        else:
            call.finish()

    async def _close(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})
        try:
            await self._engine.close()
        except Exception as error:  # noqa: BLE001 - an engine that cannot close is dropped all the same
            _log().warning("engine of rank {} failed while closing: {}", self._rank, type(error).__name__)
        self._is_gone()


# --- an engine in a process of its own, seen from the runner -------------------------------------------------------------------


class ProcessHost(_Host):
    """Hosts an engine in a child process, started by the first ``connect`` or ``load``.

    No engine outlives its runner, not even a runner that was killed with SIGKILL: the child ends when its stdin does (as soon
    as the interpreter's lock is free), and on Linux the kernel kills it as well (PR_SET_PDEATHSIG; it is tied to the thread
    that runs the event loop, which therefore must live as long as the host). The child leads a session of its own, so that Ctrl-C in a terminal reaches the runner
    alone, and helpers that the engine started are killed with it.

    What the engine writes to stdout or stderr goes to the log at debug level, and the last lines into the text of an
    `EngineDied`. Once the engine has been given a prompt, its output may quote that prompt, and is dropped and only counted.

    Args:
        spec: which engine.
        rank: for the texts of failures and the child's command line.
        grace_seconds: how long the child may take to stop a cancelled generation, to close, and to be gone after a kill.
        output_is_safe: the engine is known never to print a prompt, so its output is kept after a generation, too.
    """

    def __init__(
        self, spec: EngineSpec, *, rank: int = 0, grace_seconds: float = 5.0, output_is_safe: bool = False
    ) -> None:
        super().__init__(rank=rank, grace_seconds=grace_seconds)
        self._spec = spec
        self._output_is_safe = output_is_safe

    def _new_life(self) -> _Life:
        return _ProcessLife(self._spec, self._rank, self._output_is_safe, self._gone)


class _ProcessLife(_Life, asyncio.SubprocessProtocol):
    """A child process.

    The protocol, not streams: asyncio's own ``Process.wait`` also waits for the pipes' end, which a helper that the engine
    has left behind can put off for ever.
    """

    def __init__(self, spec: EngineSpec, rank: int, output_is_safe: bool, on_gone: Callable[[_Life], None]) -> None:
        super().__init__(on_gone)
        self._start_frame = _encode(
            {
                "kind": "start",
                "rank": rank,
                "factory": spec.factory,
                "config": spec.config,
                "pythonpath": os.environ.get("PYTHONPATH"),
            }
        )
        self._rank = rank
        self._transport: asyncio.SubprocessTransport | None = None
        self._spawning: asyncio.Task[Any] | None = None
        self._condemned = False
        self._exited = False
        self._open_pipes = {1, 2}
        self._replies = _FrameBuffer()
        self._stderr = _StderrTail(rank, keep_all=output_is_safe)
        self._call: _Call | None = None
        self._call_number = 0

    @property
    def pid(self) -> int | None:
        return self._transport.get_pid() if self._transport is not None else None

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._spawning = loop.create_task(
            loop.subprocess_exec(
                lambda: self, *child_command(self._rank), env=child_environment(), start_new_session=True
            )
        )
        self._spawning.add_done_callback(self._spawned)
        # Shielded, so that a cancelled start still learns what it started, kills it, and knows when it is gone.
        await asyncio.shield(self._spawning)

    def _spawned(self, spawning: asyncio.Task[Any]) -> None:
        failed = spawning.cancelled() or spawning.exception() is not None
        # Otherwise `start` raises, or the process's own end will be told.
        if failed and self._condemned:
            self._is_gone()

    def begin(self, call: _Call) -> None:
        work = call.work
        self._call = call
        self._call_number += 1
        number = self._call_number
        if work.name == "generate":
            call.on_taken = lambda: self._send({"kind": "more", "call": number})
            self._stderr.withhold()
        try:
            self._send({"kind": "call", "call": number, "name": work.name, "request": _encode_request(work.request)})
        except EngineFailure as error:
            self._finish_call(number, error)

    def cancel(self, call: _Call) -> None:
        self._send({"kind": "cancel", "call": self._call_number})

    def close(self) -> None:
        self._send({"kind": "close"})

    def kill(self) -> None:
        self._condemned = True
        if self._spawning is not None and self._spawning.done():
            self._spawned(self._spawning)
        if not self._exited:
            self._kill_group()

    def death(self, doing: str) -> EngineDied:
        code = self._transport.get_returncode() if self._transport is not None else None
        if code is None:
            how = "unknown exit"
        elif code < 0:
            how = f"signal {-code}"
        else:
            how = f"exit code {code}"
        return EngineDied(
            f"engine of rank {self._rank} died ({how}) while {doing}; {self._stderr.told()}"[:MAX_FAILURE_CHARS]
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.SubprocessTransport", transport)
        if self._condemned:
            self._kill_group()
            return
        self._write(self._start_frame)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 2:
            self._stderr.feed(data)
            return
        try:
            for frame in self._replies.feed(data):
                self._receive(frame)
        except ValueError as error:
            self._stderr.remark(f"sent a reply that is none: {error}")
            self.kill()

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._open_pipes.discard(fd)
        if fd == 1 and not self._exited:
            # Without its replies the child is of no use. One that is already exiting keeps its exit code all the same.
            self._kill_group()
        self._finish_if_done()

    def process_exited(self) -> None:
        self._exited = True
        # The child is reaped; its helpers, if any, hold its group, and maybe its pipes. A free number is not given out again
        # this soon.
        self._kill_group()
        # A process that the engine detached into a session of its own may hold the pipes open.
        asyncio.get_running_loop().call_later(_DRAIN_SECONDS, self._finish)
        self._finish_if_done()

    def _finish_if_done(self) -> None:
        if self._exited and not self._open_pipes:
            self._finish()

    def _finish(self) -> None:
        if self._transport is not None:
            self._transport.close()
        self._stderr.end()
        self._is_gone()

    def _kill_group(self) -> None:
        # By its own pid, which is also its group's. Not Popen.kill: that polls, and would take the exit code from asyncio.
        if self.pid is not None:
            with suppress(ProcessLookupError, PermissionError):  # nobody left; macOS says the latter for a zombie
                os.killpg(self.pid, signal.SIGKILL)

    def _send(self, frame: dict[str, Any]) -> None:
        """Send one frame; raises EngineFailure if it is too long."""
        self._write(_encode(frame))

    def _write(self, data: bytes) -> None:
        # To a child that is gone or condemned nothing is said: its end is on its way.
        if self._transport is not None and not self._exited and not self._condemned:
            # No flow control is needed: one call is under way at a time, and its prompt is in memory already.
            cast("asyncio.WriteTransport", self._transport.get_pipe_transport(0)).write(data)

    def _receive(self, frame: dict[str, Any]) -> None:
        match frame:
            case {"kind": "value", "call": int(number), "value": int() | str() as value}:
                if self._call is not None and number == self._call_number:
                    self._call.put(value)
            case {"kind": "done", "call": int(number)}:
                self._finish_call(number, None)
            case {
                "kind": "failed",
                "call": int(number),
                "failure": {"sentence": str(text), "permanent": bool(permanent), "traceback_tail": str(tail)},
            }:
                told = _Failure(text, permanent, tail)
                if self._call is not None:
                    told.log(self._rank, self._call.work)
                self._finish_call(number, told.as_exception())
            case _:
                raise ValueError("neither a value nor an end of a call")

    def _finish_call(self, number: int, failure: EngineFailure | None) -> None:
        if self._call is not None and number == self._call_number:
            self._call.finish(failure)
            self._call = None


class _StderrTail:
    """The last lines that the child wrote, in bounded memory."""

    def __init__(self, rank: int, *, keep_all: bool) -> None:
        self._rank = rank
        self._keep_all = keep_all
        self._lines: deque[str] = deque(maxlen=_STDERR_LINES)
        self._partial = bytearray()
        self._remark = ""
        self._withholding = False
        self._withheld = 0

    def withhold(self) -> None:
        """From here on the lines may quote a prompt."""
        self._withholding = not self._keep_all

    def remark(self, text: str) -> None:
        self._remark = self._remark or text

    def feed(self, data: bytes) -> None:
        self._partial += data
        *lines, rest = re.split(rb"[\r\n]+", bytes(self._partial))
        # A line that never ends is cut, so that it cannot fill the memory.
        self._partial = bytearray(rest[:_STDERR_LINE_CHARS])
        for line in lines:
            self._add(line)

    def end(self) -> None:
        self._add(bytes(self._partial))
        self._partial.clear()

    def told(self) -> str:
        if self._withheld:
            said = (
                f"its last {self._withheld} lines of output are withheld, because they may quote a prompt "
                "(output_is_safe=True keeps them)"
            )
        elif self._lines:
            said = f"last stderr lines: {' | '.join(self._lines)}"
        else:
            said = "it wrote nothing to stderr"
        return f"it {self._remark}; {said}" if self._remark else said

    def _add(self, raw: bytes) -> None:
        text = raw[:_STDERR_LINE_CHARS].decode(errors="replace").strip()
        line = "".join(character if character.isprintable() else " " for character in text)
        if not line:
            return
        if self._withholding:
            self._withheld += 1
            return
        self._lines.append(line)
        _log().debug("engine of rank {} says: {}", self._rank, line)


# --- frames, failures, and the work itself: what runner and child share ---------------------------------------------------------


def _encode(frame: dict[str, Any]) -> bytes:
    body = json.dumps(frame).encode("ascii")  # escaped, so that a lone surrogate in a text passes, too
    if len(body) > MAX_FRAME_BYTES:
        raise EngineFailure(
            f"a frame of {len(body):,} bytes does not pass between runner and engine; at most {MAX_FRAME_BYTES:,} do, so send less",
            permanent=True,
        )
    return len(body).to_bytes(4, "big") + body


class _FrameBuffer:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Add bytes; returns the frames that are complete. Raises ValueError if they are not frames."""
        self._bytes += data
        frames: list[dict[str, Any]] = []
        while len(self._bytes) >= 4:
            length = int.from_bytes(self._bytes[:4], "big")
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length:,} bytes, where at most {MAX_FRAME_BYTES:,} are read")
            if len(self._bytes) < 4 + length:
                break
            frame: Any = json.loads(bytes(self._bytes[4 : 4 + length]))
            del self._bytes[: 4 + length]
            if not isinstance(frame, dict):
                raise ValueError("a frame that is not an object")  # noqa: TRY004 - it is the bytes that are wrong
            frames.append(cast("dict[str, Any]", frame))
        return frames


@dataclass(frozen=True, slots=True)
class _Failure:
    """What an engine raised, without the prompt: no object of the engine's leaves its process."""

    sentence: str
    permanent: bool
    traceback_tail: str

    @classmethod
    def of(cls, error: BaseException, work: _Work, rank: int) -> _Failure:
        sentence = _sentence(error)
        if type(error) not in (EngineFailure, EngineDied):
            sentence = f"engine of rank {rank} failed while {work.doing}: {sentence}"
        return cls(
            sentence=without_prompt(sentence, work.prompt)[:MAX_FAILURE_CHARS],
            permanent=_is_permanent(error),
            traceback_tail=without_prompt("".join(traceback.format_exception(error)), work.prompt)[-_TRACEBACK_CHARS:],
        )

    def as_exception(self) -> EngineFailure:
        return EngineFailure(self.sentence, permanent=self.permanent)

    def log(self, rank: int, work: _Work) -> None:
        _log().debug("engine of rank {} failed while {}; traceback ends:\n{}", rank, work.doing, self.traceback_tail)


def _sentence(error: BaseException) -> str:
    text = str(error)
    if type(error) in (EngineFailure, EngineDied) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_permanent(error: BaseException) -> bool:
    return isinstance(error, EngineFailure) and error.permanent


def _was_cancelled(error: BaseException) -> bool:
    """Whether the running task was asked to stop; an engine may also raise CancelledError of its own accord."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


_RUN = 12


def without_prompt(text: str, prompt: str) -> str:
    """Put ``<prompt>`` in the place of every part of the prompt in a text that goes to a log or a status.

    A part is any run of 12 characters or more that the prompt holds, as it is or escaped as Python's ``repr`` or JSON do. A
    prompt that is shorter than that is replaced as a whole, where no letter or digit adjoins it.
    """
    forms = {prompt, repr(prompt)[1:-1], json.dumps(prompt)[1:-1]}
    for form in (form.strip() for form in forms if len(form) < _RUN):
        if form:
            text = re.sub(rf"(?<!\w){re.escape(form)}(?!\w)", "<prompt>", text)
    # Linear in both lengths, since an exception's text can hold the whole of a long prompt.
    runs = {form[at : at + _RUN] for form in forms for at in range(len(form) - _RUN + 1)}
    parts: list[str] = []
    kept_to = 0
    for at in range(len(text) - _RUN + 1):
        if text[at : at + _RUN] in runs:
            if at > kept_to or not parts:
                parts += [text[kept_to:at], "<prompt>"]
            kept_to = at + _RUN
    return "".join(parts) + text[kept_to:]


async def _perform(engine: Engine, work: _Work) -> AsyncGenerator[Value, None]:
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


def _checked(value: object, wanted: type[Value], work: _Work) -> Value:
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


def _log() -> Logger:
    from loguru import logger  # noqa: PLC0415 - the child shares this module, never logs, and starts sooner without it

    return logger


# --- the child process ----------------------------------------------------------------------------------------------------


def child_command(rank: int) -> list[str]:
    """The command line of an engine's process; it holds no configuration and no prompt.

    ``-c`` and not ``-m``, since the latter runs this module twice if the package has imported it; ``-P``, so that nothing in
    the working directory is imported by surprise; ``-u``, so that the last words before a crash are not lost in a buffer.
    """
    start = "from runner.host import child_main; child_main()"
    return [sys.executable, "-P", "-u", "-c", start, str(os.getpid()), f"engine-of-rank-{rank}"]


def child_environment() -> dict[str, str]:
    """The environment of an engine's process: this one, and ``sys.path`` so that it finds what this process finds.

    The child puts PYTHONPATH back as it was before any engine code runs.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path}


def child_main() -> None:
    """Serve one engine on stdin and stdout until told to close, or until stdin ends. The whole of the child process."""
    # The pipes move to numbers that no one else writes to: what the engine prints goes to stderr, and cannot look like a frame.
    commands, replies = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    _die_with_parent(int(sys.argv[1]))
    asyncio.run(_EngineServer(commands, replies).serve())


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        import ctypes  # noqa: PLC0415 - only the child needs it, and it is not free

        pr_set_pdeathsig = 1
        if ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The parent may have ended before the kernel was told.
    if os.getppid() != parent:
        os._exit(1)


class _EngineServer:
    """The child's side of the pipes: one engine, one call at a time."""

    def __init__(self, commands: int, replies: int) -> None:
        self._commands = commands
        self._replies = replies
        self._rank = 0
        self._factory = ""
        self._config: dict[str, Any] = {}
        self._engine: Engine | None = None
        self._call = 0
        self._task: asyncio.Task[None] | None = None
        self._room = asyncio.Semaphore(0)
        self._closing = asyncio.Event()

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read_commands, args=(loop,), name="commands", daemon=True).start()
        await self._closing.wait()
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._engine is not None:
            await self._engine.close()

    def _read_commands(self, loop: asyncio.AbstractEventLoop) -> None:
        # A thread, so that the end of the runner is noticed while the engine blocks the loop.
        buffer = _FrameBuffer()
        try:
            while data := os.read(self._commands, 1 << 20):
                for frame in buffer.feed(data):
                    loop.call_soon_threadsafe(self._receive, frame)
        finally:
            # The runner is gone, or talks nonsense: nobody is left to close for.
            os._exit(1)

    def _receive(self, frame: dict[str, Any]) -> None:
        match frame["kind"]:
            case "start":
                self._rank, self._factory, self._config = frame["rank"], frame["factory"], frame["config"]
                os.environ.pop("PYTHONPATH", None)
                if frame["pythonpath"] is not None:
                    os.environ["PYTHONPATH"] = frame["pythonpath"]
            case "call":
                self._call = frame["call"]
                self._room = asyncio.Semaphore(CHUNK_WINDOW)
                work = _Work(frame["name"], _decode_request(frame["name"], frame["request"]))
                self._task = asyncio.create_task(self._work(self._call, work))
            case "more":
                if frame["call"] == self._call:
                    self._room.release()
            case "cancel":
                if frame["call"] == self._call and self._task is not None:
                    self._task.cancel()
            case "close":
                self._closing.set()
            case kind:
                raise ValueError(f"unknown command {kind!r}")

    async def _work(self, call: int, work: _Work) -> None:
        try:
            engine = self._engine = self._engine or self._make_engine()
            async with aclosing(_perform(engine, work)) as values:
                async for value in values:
                    if work.name == "generate":
                        # Also what lets the loop see a cancellation, where the engine itself never really awaits.
                        await self._room.acquire()
                    self._send({"kind": "value", "call": call, "value": value})
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - an engine may raise anything
            if _was_cancelled(error):
                self._send({"kind": "done", "call": call})
                return
            failure = _Failure.of(error, work, self._rank)
            self._send({"kind": "failed", "call": call, "failure": asdict(failure)})
        else:
            self._send({"kind": "done", "call": call})

    def _make_engine(self) -> Engine:
        module, _, name = self._factory.partition(":")
        try:
            factory: Any = importlib.import_module(module)
            for part in name.split("."):
                factory = getattr(factory, part)
        except (ImportError, AttributeError) as error:
            raise EngineFailure(
                f"engine factory {self._factory!r} cannot be imported: {error}", permanent=True
            ) from error
        return factory(self._config)

    def _send(self, frame: dict[str, Any]) -> None:
        data = memoryview(_encode(frame))
        while data:
            data = data[os.write(self._replies, data) :]


def _encode_request(request: Request) -> dict[str, Any]:
    if request is None:
        return {}
    return request.model_dump() if isinstance(request, ModelSpec) else asdict(request)


def _decode_request(name: CallName, request: dict[str, Any]) -> Request:
    match name:
        case "connect":
            rank_order = tuple(request.pop("rank_order"))
            return EngineGroup(**request, rank_order=rank_order)
        case "load":
            return ModelSpec.model_construct(**request)  # the runner has checked it
        case "generate":
            return GenerationRequest(**request)
        case "warm_up":
            return None

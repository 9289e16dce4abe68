"""An engine in which the test controls every phase."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from barrier.testing.names import one_of
from runner.engine import EngineDied, EngineFailure, EngineGroup, GenerationRequest
from runner.messages import ModelSpec

__all__ = ["PHASES", "TEXT", "Phase", "ScriptedEngine"]


Phase: TypeAlias = Literal["prepare", "connect", "load", "warm_up", "generate", "close"]
"""The calls of a `runner.Engine`."""

PHASES: tuple[Phase, ...] = get_args(Phase)

TEXT = ("All ", "ranks ", "agree.")
"""The text of a scripted engine, if the test names no other."""


def _named(*phases: Phase) -> tuple[Phase, ...]:
    """Return the same phases; raises ValueError for a mistyped one, for which the test would wait for ever."""
    for phase in phases:
        one_of("phase", phase, PHASES)
    return phases


@dataclass(frozen=True, slots=True)
class _Yield:
    """Yield this value and go on."""

    value: int | str


_Order: TypeAlias = BaseException | _Yield | None
"""What a call does next: raise, yield, or return."""


class ScriptedEngine:
    """A `runner.Engine` that does what the test says, and notes its calls::

        engine = ScriptedEngine()
        host = InlineHost(engine.fresh)
        ...                                  # the runner accepts ConnectToGroup, and its engine connects
        await engine.called("connect")       # … which the test can wait for
        engine.finish("connect")             # now the rank is Connected

    Every call blocks until the test finishes it or fails it, or its caller gives up. The engine keeps an order for a call that has not
    come yet, so a test need not wait for the call first. With ``auto`` every phase succeeds at once, except those that `hold` names.
    ``prepare`` and ``close`` always succeed at once, unless the test holds them.

    One object stands for all incarnations of the engine. If the host makes them with `fresh`, each begins with ``"start"`` in `calls`.

    Args:
        auto: whether calls succeed at once.
        text: the pieces that a generation yields if the test does not call `say`.
        journal: the list for the calls. Share it with other code to see the order of everything in it.
    """

    def __init__(self, *, auto: bool = False, text: tuple[str, ...] = TEXT, journal: list[str] | None = None) -> None:
        self.text = text
        self.endpoint: str | None = None
        """What ``prepare`` returns."""
        self.calls: list[str] = [] if journal is None else journal
        """What happened, in order: ``start``, a phase's name when it is called, and ``<phase> cancelled``."""
        self.group: EngineGroup | None = None
        """What the last ``connect`` was told."""
        self.model: ModelSpec | None = None
        """What the last ``load`` was told."""
        self.requests: list[GenerationRequest] = []
        """What the generations were told, in order."""
        self._held: set[Phase] = set() if auto else {"connect", "load", "warm_up", "generate"}
        self._orders: dict[Phase, deque[_Order]] = {phase: deque() for phase in PHASES}
        self._always: dict[Phase, BaseException] = {}
        self._active: dict[Phase, int] = dict.fromkeys(PHASES, 0)
        self._news = asyncio.Event()

    # --- what the test says -------------------------------------------------------------------------------------------

    def hold(self, *phases: Phase) -> ScriptedEngine:
        """From now on calls of these phases block until `finish` or `fail`, also with ``auto``."""
        self._held.update(_named(*phases))
        return self

    def release(self, *phases: Phase) -> ScriptedEngine:
        """From now on calls of these phases succeed at once, and blocked calls go on. Without an argument: all phases."""
        self._held.difference_update(_named(*phases) or PHASES)
        self._tell()
        return self

    def finish(self, phase: Phase) -> ScriptedEngine:
        """Let one call of this phase succeed: the blocked call, or else the next."""
        _named(phase)
        self._orders[phase].append(None)
        self._tell()
        return self

    def fail(
        self, phase: Phase, error: str | BaseException, *, permanent: bool = False, times: int | None = 1
    ) -> ScriptedEngine:
        """Let calls of this phase fail: the blocked call, or else the next.

        Args:
            phase: the phase.
            error: the sentence of an `EngineFailure`, or any exception to raise instead; `EngineDied` is the engine's death.
            permanent: see `EngineFailure`; ignored for an exception.
            times: how many calls fail; ``None`` for all from now on.

        Raises:
            ValueError: times is below 1.
        """
        _named(phase)
        if times is not None and times < 1:
            raise ValueError(f"times is {times}; say how many calls shall fail, or None for all of them")
        failure = EngineFailure(error, permanent=permanent) if isinstance(error, str) else error
        if times is None:
            self._always[phase] = failure
        else:
            self._orders[phase].extend([failure] * times)
        self._tell()
        return self

    def die(self, phase: Phase, how: str = "engine died (signal 9)") -> ScriptedEngine:
        """Let one call of this phase end with the engine's death. `ScriptedHost.die` ends an engine that has nothing to do."""
        return self.fail(phase, EngineDied(how))

    def progress(self, layers: int) -> ScriptedEngine:
        """Let the blocked ``load``, or else the next, yield this number of layers, and go on blocking."""
        self._orders["load"].append(_Yield(layers))
        self._tell()
        return self

    def say(self, *pieces: str) -> ScriptedEngine:
        """Let the blocked ``generate``, or else the next, yield these pieces, and go on blocking. `finish` then adds nothing."""
        self._orders["generate"].extend(_Yield(piece) for piece in pieces)
        self._tell()
        return self

    def forget(self) -> ScriptedEngine:
        """Take back all orders that no call has followed yet, and all lasting failures."""
        for orders in self._orders.values():
            orders.clear()
        self._always.clear()
        return self

    # --- what the test sees -------------------------------------------------------------------------------------------

    def active(self, phase: Phase) -> bool:
        """Whether a call of this phase is under way."""
        _named(phase)
        return self._active[phase] > 0

    async def called(self, phase: Phase, times: int = 1) -> None:
        """Wait until this phase was called so many times in total. Only the test's own deadline limits the wait."""
        _named(phase)
        while self.calls.count(phase) < times:
            self._news.clear()
            await self._news.wait()

    @property
    def lives(self) -> int:
        """How many incarnations there were, if the host makes them with `fresh`."""
        return self.calls.count("start")

    def fresh(self) -> ScriptedEngine:
        """Begin a new incarnation. Give this method to a host as the factory."""
        self._note("start")
        return self

    # --- the engine ---------------------------------------------------------------------------------------------------

    async def prepare(self, rank: int, world_size: int) -> str | None:
        """Succeed at once, unless the test holds it."""
        with self._call("prepare"):
            await self._end_of("prepare")
        return self.endpoint

    async def connect(self, group: EngineGroup) -> None:
        """Enter the group when the test says so."""
        self.group = group
        with self._call("connect"):
            await self._end_of("connect")

    async def load(self, model: ModelSpec) -> AsyncGenerator[int, None]:
        """Load when the test says so."""
        self.model = model
        with self._call("load"):
            while (order := await self._next("load")) is not None:
                yield int(order.value)
            yield model.total_layers

    async def warm_up(self) -> None:
        """Warm up when the test says so."""
        with self._call("warm_up"):
            await self._end_of("warm_up")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[str, None]:
        """Generate what the test says."""
        self.requests.append(request)
        said = False
        with self._call("generate"):
            while (order := await self._next("generate")) is not None:
                said = True
                yield str(order.value)
            for piece in () if said else self.text:
                yield piece

    async def close(self) -> None:
        """Close at once, unless the test holds it."""
        with self._call("close"):
            await self._end_of("close")

    @contextmanager
    def _call(self, phase: Phase) -> Generator[None]:
        self._note(phase)
        self._active[phase] += 1
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            self._note(f"{phase} cancelled")
            raise
        finally:
            self._active[phase] -= 1
            self._tell()

    async def _end_of(self, phase: Phase) -> None:
        while await self._next(phase) is not None:
            pass

    async def _next(self, phase: Phase) -> _Yield | None:
        """The next thing to yield, ``None`` at the end; raises what the test planned."""
        orders = self._orders[phase]
        while not orders and phase not in self._always and phase in self._held:
            self._news.clear()
            await self._news.wait()
        order = orders.popleft() if orders else self._always.get(phase)
        if isinstance(order, BaseException):
            raise order
        return order

    def _note(self, what: str) -> None:
        self.calls.append(what)
        self._tell()

    def _tell(self) -> None:
        self._news.set()

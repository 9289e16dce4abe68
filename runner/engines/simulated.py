"""A simulated engine: the timing, the order and the failures of a real one, without a model.

Its text says that it is simulated: it begins with ``[simulated text]``, and its words come from a short list. If the engine has a process
of its own, it really connects to the other ranks (`runner.engines.ring`), compares the attempt with them, and makes the tokens of a text
at the same pace. If one rank stands still, all do. Engines that share a process do not connect to one another. A call that is out of
order fails; in a real engine it would crash.

All delays and texts follow from the seed by BLAKE2b. So two runs are equal, on any machine and any version of Python.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NoReturn, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from runner.engine import EngineDied, EngineFailure, EngineGroup, GenerationRequest, valid_ports
from runner.engines.ring import Ring
from runner.host import EngineSpec
from runner.model import ModelSpec
from runner.worded import Worded

__all__ = [
    "MARK",
    "FaultAction",
    "FaultLedger",
    "FaultPhase",
    "SimulatedConfig",
    "SimulatedEngine",
    "SimulatedFault",
    "simulated_engine_in_own_process",
    "simulated_spec",
    "simulated_text",
]


MARK = "[simulated text]"
"""The beginning of every simulated text."""

FaultPhase: TypeAlias = Literal["prepare", "connect", "load", "warmup", "generate"]
FaultAction: TypeAlias = Literal["refuse", "raise", "hang", "die", "block"]

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_VOCABULARY = (
    "alder amber anchor barley basket beacon birch bramble bridge candle cedar clover copper coral cotton cradle "
    "dapple drift ember fennel fern ferry flint garnet ginger granite harbor hazel heron hollow indigo island ivory "
    "juniper kettle lantern larch linen lupin maple marble meadow mortar nettle oak orchard otter pebble pepper "
    "plover quarry quill raven reed saffron sorrel sparrow thistle timber velvet walnut willow"
)
_WORDS = _VOCABULARY.split()
_SHORTEST_TEXT = 12
_LONGEST_TEXT = 48


class SimulatedFault(BaseModel, metaclass=Worded):
    """One fault of a simulated engine.

    Attributes:
        phase: the call in which it strikes.
        action: ``refuse`` raises a permanent `EngineFailure`, and ``raise`` one that is not permanent; ``hang`` waits for ever and
            can be cancelled; ``block`` holds the thread for ever, and only a `ProcessHost` can end it; ``die`` kills the engine's
            process with SIGKILL, or raises `EngineDied` if the engine has no process of its own.
        rank: the rank that it strikes; ``None`` for every rank.
        times: how often it strikes each rank, counted by a `FaultLedger`; ``None`` for always.
        after_layers: for ``load``, how many layers are loaded before it strikes.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", strict=True)

    phase: FaultPhase
    action: FaultAction
    rank: int | None = Field(default=None, ge=0)
    times: int | None = Field(default=None, ge=1)
    after_layers: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _layers_only_in_load(self) -> SimulatedFault:
        if self.after_layers and self.phase != "load":
            raise ValueError(
                f"after_layers={self.after_layers} has a meaning for phase load only, and this fault is for {self.phase}"
            )
        return self


class SimulatedConfig(BaseModel, metaclass=Worded):
    """How a simulated engine behaves; the same for every rank. Reads JSON with ``model_validate_json``.

    Attributes:
        seed: every delay and every text follows from it.
        connect_seconds: mean time to connect.
        layer_seconds: mean time to load one layer.
        warmup_seconds: mean time to warm up.
        token_seconds: mean time to make one token.
        jitter: how far a delay may be from its mean, as a fraction of the mean, 0 to 1; it follows from (seed, rank, phase).
        faults: the faults. If several could strike, the first one does.
        meet: whether engines in processes of their own really connect to one another, at the endpoints that they bind. Engines that
            share a process never do.
        ports: the first and the last port that such an engine may bind; ``None`` takes any free port.
        fault_ledger: the file that counts strikes. Faults with ``times`` need it if the engine has a process of its own. To count anew,
            remove the file.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", strict=True)

    seed: int = 0
    connect_seconds: _Seconds = 0.1
    layer_seconds: _Seconds = 0.05
    warmup_seconds: _Seconds = 0.1
    token_seconds: _Seconds = 0.02
    jitter: float = Field(default=0.2, ge=0, le=1)
    faults: tuple[SimulatedFault, ...] = ()
    meet: bool = True
    ports: tuple[int, int] | None = None
    fault_ledger: Path | None = None

    @field_validator("ports")
    @classmethod
    def _ports(cls, ports: tuple[int, int] | None) -> tuple[int, int] | None:
        return None if ports is None else valid_ports(*ports)


class FaultLedger:
    """Counts how often each fault has struck each rank.

    An engine and its process last for one attempt at most, but ``times`` counts over all attempts. So the ledger keeps the count: in
    memory for engines that share one process and one ledger, or in a file, which outlives every process. Each strike is written down
    before it strikes, so a strike that kills the process counts too.

    Args:
        path: the file; ``None`` counts in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._strikes: Counter[tuple[int, int]] = Counter()

    def add(self, rank: int, fault: int) -> None:
        """Count one strike of the fault with that index. Raises OSError if the file cannot be written."""
        if self.path is None:
            self._strikes[rank, fault] += 1
            return
        with self.path.open("a", encoding="ascii") as file:  # one short write in append mode: ranks may share the file
            file.write(f"{rank} {fault}\n")

    def strikes(self) -> Counter[tuple[int, int]]:
        """All strikes so far, by (rank, index of the fault). Raises OSError or ValueError if the file cannot be read."""
        if self.path is None:
            return self._strikes.copy()
        try:
            lines = self.path.read_text(encoding="ascii").splitlines()
        except FileNotFoundError:
            return Counter()
        return Counter((int(rank), int(fault)) for rank, fault in (line.split() for line in lines))


class SimulatedEngine:
    """One rank's share of a model that does not exist. An `Engine`; see the module for what is simulated.

    Args:
        config: delays and faults.
        rank: this engine's rank, 0 to world_size - 1; `prepare` and `connect` refuse another. ``None`` takes the rank that they name.
        world_size: number of ranks; with one, `load` needs no `connect`. ``None`` as for `rank`. An engine that does not know the number
            of ranks refuses to load.
        sleep: waits so many seconds; tests pass a function that only notes the call.
        ledger: counts the strikes of faults; by default one on the configuration's file.
        owns_process: whether this process is the engine's own. Then the engine may kill or block it.
        report: gets one sentence for each strike of a fault; by default it logs a warning.

    Raises:
        ValueError: a rank outside the world; a fault that can never strike; ``times`` without a ledger that outlives this
            engine; ``block`` in a process that is not the engine's own.
    """

    def __init__(
        self,
        config: SimulatedConfig,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        ledger: FaultLedger | None = None,
        owns_process: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> None:
        if (rank is None) != (world_size is None):
            raise ValueError(f"rank is {rank} and world_size is {world_size}; give both or neither")
        if rank is not None and world_size is not None and not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not exist in a world of {world_size}; ranks are 0 to {world_size - 1}")
        if ledger is None and config.fault_ledger is not None:
            ledger = FaultLedger(config.fault_ledger)
        for fault in config.faults:
            _check_fault(fault, world_size=world_size, has_ledger=ledger is not None, owns_process=owns_process)
        self._config = config
        self._made_as = None if rank is None or world_size is None else (rank, world_size)
        self._prepared_as: tuple[int, int] | None = None
        self._place = self._made_as
        self._sleep = sleep
        self._ledger = ledger or FaultLedger()
        self._owns_process = owns_process
        self._report = report or _warn
        self._ring = Ring(config.ports) if owns_process and config.meet else None
        self._connected = False
        self._model: ModelSpec | None = None
        self._warm = False
        self._closed = False

    async def prepare(self, rank: int, world_size: int) -> str | None:
        """Bind an endpoint, if the ranks really meet.

        Raises:
            EngineFailure: permanent: this engine was made for another rank or world size. Otherwise: it is connected already or closed,
                or no port of the range is free.
        """
        self._check_open("prepare")
        self._take_place("prepare", rank, world_size)
        if self._connected:
            raise self._out_of_order("prepare", "the engine is in a group already")
        self._prepared_as = self._place
        await self._strike("prepare")
        return self._ring.bind() if self._ring is not None and world_size > 1 else None

    async def connect(self, group: EngineGroup) -> None:
        """Meet the other ranks, if they really meet, and wait for the configured time.

        Raises:
            EngineFailure: permanent: this engine was made for another rank or world size. Otherwise: it was prepared for another rank
                or world size, is connected already, or is closed.
        """
        self._check_open("connect")
        if self._prepared_as not in (None, (group.rank, group.world_size)):
            raise self._out_of_order("connect", f"it names rank {group.rank} of {group.world_size}")
        self._take_place("connect", group.rank, group.world_size)
        if self._connected:
            raise self._out_of_order("connect", "the engine is in a group already")
        if self._ring is not None and group.world_size > 1:
            await self._ring.join(group)
        # After the ranks have met, so that a delay or a fault here concerns this rank only.
        await self._strike("connect")
        await self._pause("connect", self._config.connect_seconds)
        self._connected = True

    async def load(self, model: ModelSpec) -> AsyncGenerator[int, None]:
        """Yield 1 to ``model.total_layers``, and wait the time of one layer before each.

        Raises:
            EngineFailure: the engine is one of several ranks and not connected, does not know the number of ranks, has loaded already, or
                is closed.
        """
        self._check_open("load")
        if self._place is None:
            raise self._out_of_order(
                "load", "prepare has not been done, and only prepare says whether this engine is alone"
            )
        if self._world_size > 1 and not self._connected:
            raise self._out_of_order("load", "connect has not been done, and a collective load would crash")
        if self._model is not None:
            raise self._out_of_order("load", f"{self._model.model_id} is loaded already")
        await self._strike("load", layers_loaded=0, total_layers=model.total_layers)
        for layer in range(1, model.total_layers + 1):
            await self._pause(f"load {layer}", self._config.layer_seconds)
            yield layer
            await self._strike("load", layers_loaded=layer, total_layers=model.total_layers)
        self._model = model

    async def warm_up(self) -> None:
        """Wait for the time of a warm-up.

        Raises:
            EngineFailure: no model is loaded, or the engine is closed.
        """
        self._check_open("warm_up")
        if self._model is None:
            raise self._out_of_order("warm_up", "no model is loaded")
        await self._strike("warmup")
        await self._pause("warmup", self._config.warmup_seconds)
        self._warm = True

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[str, None]:
        """Yield the text of `simulated_text`, one piece per token; ranks above 0 take the same time and yield nothing.

        Raises:
            EngineFailure: the engine is not warmed up, or is closed.
        """
        self._check_open("generate")
        if self._model is None or not self._warm:
            raise self._out_of_order("generate", "warm_up has not been done")
        await self._strike("generate")
        pieces = simulated_text(self._config.seed, self._model.model_id, request.prompt, request.max_tokens)
        for index, piece in enumerate(pieces):
            # In a collective all ranks have the same pace, so this delay is the same on every rank.
            await self._pause(f"generate {index}", self._config.token_seconds, rank=0)
            if self._ring is not None:
                await self._ring.keep_pace(request.task_id, index)
            if self._rank == 0:
                yield piece

    async def close(self) -> None:
        """Give everything up; idempotent. Every later call fails."""
        self._closed = True
        if self._ring is not None:
            await self._ring.close()

    @property
    def _rank(self) -> int:
        return 0 if self._place is None else self._place[0]

    @property
    def _world_size(self) -> int:
        return 1 if self._place is None else self._place[1]

    def _take_place(self, call: str, rank: int, world_size: int) -> None:
        if self._made_as not in (None, (rank, world_size)):
            raise EngineFailure(
                f"{call} names rank {rank} of {world_size}, but this simulated engine was made as "
                f"rank {self._rank} of {self._world_size}",
                permanent=True,
            )
        self._place = (rank, world_size)

    def _check_open(self, call: str) -> None:
        if self._closed:
            raise self._out_of_order(call, "the engine is closed")

    def _out_of_order(self, call: str, why: str) -> EngineFailure:
        where = "" if self._place is None else f" on rank {self._rank} of {self._world_size}"
        return EngineFailure(f"{call} is out of order{where}: {why}")

    async def _pause(self, occasion: str, mean_seconds: float, *, rank: int | None = None) -> None:
        key = f"{self._config.seed} {self._rank if rank is None else rank} {occasion}"
        spread = self._config.jitter * (2 * _fraction(key) - 1)
        await self._sleep(mean_seconds * (1 + spread))

    async def _strike(self, phase: FaultPhase, *, layers_loaded: int = 0, total_layers: int = 0) -> None:
        """Let the first fault strike that is due at this point, if there is one."""
        for index, fault in enumerate(self._config.faults):
            if fault.phase != phase or fault.rank not in (None, self._rank):
                continue
            if phase == "load" and fault.after_layers > total_layers:
                raise EngineFailure(
                    f"simulated fault {index} strikes after {fault.after_layers} layers, but the model has {total_layers}; "
                    "it would never strike",
                    permanent=True,
                )
            if fault.after_layers != layers_loaded:
                continue
            struck = self._ledger.strikes()[self._rank, index]
            if fault.times is not None and struck >= fault.times:
                continue
            self._ledger.add(self._rank, index)
            ordinal = f"{struck + 1} of {fault.times}" if fault.times is not None else f"{struck + 1}"
            where = f" after {layers_loaded} layers" if phase == "load" else ""
            what = f"simulated fault {index} ({fault.action} in {phase}{where}, strike {ordinal}) on rank {self._rank}"
            self._report(what)
            await self._suffer(fault.action, what)

    async def _suffer(self, action: FaultAction, what: str) -> None:
        match action:
            case "refuse":
                raise EngineFailure(f"{what}: refused for good", permanent=True)
            case "raise":
                raise EngineFailure(f"{what}: failed, and may succeed when tried again")
            case "hang":
                await asyncio.get_running_loop().create_future()
            case "die":
                if self._owns_process:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise EngineDied(f"{what}: died")
            case "block":
                _block()


def simulated_text(seed: int, model_id: str, prompt: str, max_tokens: int) -> list[str]:
    """The text of one simulated generation, as a list of its tokens: `MARK`, then words from a fixed list.

    Its length follows from the four arguments: 12 to 48 tokens, cut off at ``max_tokens``.
    """
    prompt_hash = hashlib.blake2b(prompt.encode(errors="surrogatepass"), digest_size=16).hexdigest()
    key = json.dumps([seed, model_id, prompt_hash, max_tokens])
    length = _SHORTEST_TEXT + int(_fraction(key) * (_LONGEST_TEXT - _SHORTEST_TEXT + 1))
    words = (
        f" {_WORDS[int(_fraction(f'{key} {index}') * len(_WORDS))]}" for index in range(1, min(length, max_tokens))
    )
    return [MARK, *words]


def simulated_spec(config: SimulatedConfig, *, rank: int | None = None, world_size: int | None = None) -> EngineSpec:
    """What a `ProcessHost` needs to run this engine as one rank.

    Raises:
        ValueError: as `SimulatedEngine` does. It is checked here, so that a wrong configuration starts no process.
    """
    SimulatedEngine(config, rank=rank, world_size=world_size, owns_process=True)
    return EngineSpec(
        factory=f"{__name__}:simulated_engine_in_own_process",
        config=_OwnProcess(config=config, rank=rank, world_size=world_size).model_dump(mode="json"),
    )


def simulated_engine_in_own_process(config: dict[str, JsonValue]) -> SimulatedEngine:
    """The factory that `simulated_spec` names: its engine may kill and block its process, and writes its faults to stderr.

    Raises:
        EngineFailure: permanent, if the configuration is wrong.
    """
    try:
        own = _OwnProcess.model_validate_json(json.dumps(config))
        return SimulatedEngine(
            own.config, rank=own.rank, world_size=own.world_size, owns_process=True, report=_tell_stderr
        )
    except ValueError as error:
        raise EngineFailure(f"wrong configuration of a simulated engine: {error}", permanent=True) from error


class _OwnProcess(BaseModel):
    """The ``config`` of the `EngineSpec`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    config: SimulatedConfig
    rank: int | None = None
    world_size: int | None = None


def _check_fault(fault: SimulatedFault, *, world_size: int | None, has_ledger: bool, owns_process: bool) -> None:
    if fault.rank is not None and world_size is not None and fault.rank >= world_size:
        raise ValueError(
            f"a simulated fault names rank {fault.rank}, which does not exist in a world of {world_size}; it would never strike"
        )
    if fault.times is not None and not has_ledger:
        raise ValueError(
            f"a simulated fault with times={fault.times} needs a ledger that outlives the engine: set fault_ledger to a file, or "
            "share a FaultLedger between the engines of one process"
        )
    if fault.action == "block" and not owns_process:
        raise ValueError(
            "the simulated fault 'block' would block this process, which is not the engine's own; use a ProcessHost, or 'hang'"
        )


def _fraction(key: str) -> float:
    """A number from 0 to below 1 that follows from the key; uniform over keys."""
    # 53 bits, the most that a float holds exactly: with 64 the division can round up to 1.
    return (int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 11) / 2**53


def _block() -> NoReturn:
    while True:
        time.sleep(3600)  # nothing else can run, as in C code that does not return


def _warn(sentence: str) -> None:
    from barrier.log import logger  # noqa: PLC0415 - a child process that tells stderr instead starts sooner without it

    logger.warning("{}", sentence)


def _tell_stderr(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()

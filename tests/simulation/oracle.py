"""What a simulation takes as facts: the calls that the engines record, and the verdicts that the ranks record.

Nothing here asks the code under test whether it was right.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from barrier import EpochId, LogEntry, Member, Verdict, VerdictAnnounced
from planner import ModelSpec
from runner import EngineFailure, EngineGroup, GenerationRequest, InlineHost
from tests.simulation.loop import START, SeededLoop

ENGINE_FAILS = 0.02
"""How often a piece of an engine's work fails."""


@dataclass
class Oracle:
    """What the engines and the ranks of one history saw: the judge of S1, S2, S3 and S5."""

    loop: SeededLoop
    world_size: int
    connected: set[tuple[int, EpochId]] = field(default_factory=set[tuple[int, EpochId]])
    loads: set[tuple[int, EpochId]] = field(default_factory=set[tuple[int, EpochId]])
    loaded: set[tuple[int, EpochId]] = field(default_factory=set[tuple[int, EpochId]])
    warming: set[tuple[int, EpochId]] = field(default_factory=set[tuple[int, EpochId]])
    holding: dict[str, tuple[int, EpochId]] = field(default_factory=dict[str, tuple[int, EpochId]])
    """By process: the rank and the epoch for which it has, or is loading, a model."""
    current: dict[int, str] = field(default_factory=dict[int, str])
    """By rank: the process that its supervisor started last."""
    verdicts: dict[EpochId, Verdict] = field(default_factory=dict[EpochId, Verdict])
    """By epoch: the first verdict that anybody read."""
    second_verdicts: list[str] = field(default_factory=list[str])
    breaches: list[str] = field(default_factory=list[str])
    """What was broken. Noted and not raised: a runner survives whatever its engine raises."""
    doomed: set[int] = field(default_factory=set[int])
    """Ranks whose engine's next piece of work fails."""
    failed: set[int] = field(default_factory=set[int])
    """Ranks that something was done to, or whose engine failed: whom a verdict may blame."""
    log: list[str] = field(default_factory=list[str])

    def say(self, sentence: str) -> None:
        """Add a line to the history."""
        self.log.append(f"{self.loop.time() - START:8.3f}  {sentence}")

    def accuse(self, sentence: str) -> None:
        """Note a breach; whoever plays the history ends it."""
        self.say(f"BREACH {sentence}")
        self.breaches.append(sentence)

    def begin_load(self, process: str, rank: int, epoch: EpochId) -> None:
        """S1 and S2 at the place where they count: an engine is told to load."""
        self.say(f"{process} loads for {epoch.number}")
        if self.world_size > 1:
            absent = [r for r in range(self.world_size) if (r, epoch) not in self.connected]
            if absent:
                self.accuse(f"S1: {process} loads for {epoch} while {absent} have not connected in it")
        if (rank, epoch) in self.loads:
            self.accuse(f"S2: rank {rank} loads twice for {epoch}")
        for other, (other_rank, other_epoch) in self.holding.items():
            rightful = self.current.get(other_rank) == other and not self.loop.is_stopped(other)
            if rightful and other_rank != rank and other_epoch != epoch:
                self.accuse(f"S3: {process} loads for {epoch} while {other} holds a model for {other_epoch}")
        self.loads.add((rank, epoch))
        self.holding[process] = (rank, epoch)

    def begin_warmup(self, process: str, rank: int, epoch: EpochId) -> None:
        """A warm-up is a collective too: nobody enters it before all have loaded."""
        self.say(f"{process} warms up for {epoch.number}")
        late = [r for r in range(self.world_size) if (r, epoch) not in self.loaded]
        if late:
            self.accuse(f"{process} warms up for {epoch} before {late} have loaded")
        if (rank, epoch) in self.warming:
            self.accuse(f"S2: rank {rank} warms up twice for {epoch}")
        self.warming.add((rank, epoch))

    def hear_verdict(self, who: str, epoch: EpochId, verdict: Verdict) -> None:
        """S5: whoever reads an epoch's verdict reads the same one."""
        first = self.verdicts.setdefault(epoch, verdict)
        if first != verdict:
            self.second_verdicts.append(f"{who} read the verdict {verdict} of {epoch}, and somebody before it {first}")


class SimMember(Member):
    """A rank's member that tells the oracle which verdicts it reads from the log or the record."""

    oracle: Oracle
    process: str

    async def tasks(self) -> AsyncGenerator[LogEntry, None]:
        """As a member's."""
        async with aclosing(super().tasks()) as entries:
            async for entry in entries:
                if isinstance(entry, VerdictAnnounced):
                    self.oracle.hear_verdict(self.process, entry.epoch, entry.verdict)
                yield entry


class SimEngine:
    """An engine of the simulation: takes its time, fails as drawn, and tells the oracle what it was told.

    Args:
        oracle: whom to tell.
        rng: draws how long things take and what fails.
        process: whose engine it is.
        member: which rank, in which promise.
        hopeless: whether every load fails in a way that trying again cannot mend.
        pace: how many seconds a slow piece of work takes.
    """

    def __init__(
        self, oracle: Oracle, rng: random.Random, process: str, member: Member, *, hopeless: bool, pace: float
    ) -> None:
        self._oracle = oracle
        self._rng = rng
        self._process = process
        self._member = member
        self._hopeless = hopeless
        self._pace = pace

    def _epoch(self) -> EpochId:
        epoch = self._member.promised
        if epoch is None:
            self._oracle.accuse(f"S3: {self._process} works without a promise")
            raise EngineFailure("works without a promise")
        return epoch

    async def _work(self, what: str) -> None:
        await asyncio.sleep(self._rng.choice((0, 0.01, 0.3, self._pace)))
        if self._rng.random() < ENGINE_FAILS or self._member.rank in self._oracle.doomed:
            self._oracle.doomed.discard(self._member.rank)
            self._fail(what)

    def _fail(self, what: str, *, permanent: bool = False) -> None:
        self._oracle.say(f"{self._process}: {what} fails")
        self._oracle.failed.add(self._member.rank)
        raise EngineFailure(f"{what} went wrong", permanent=permanent)

    async def prepare(self, rank: int, world_size: int) -> str | None:
        return None

    async def connect(self, group: EngineGroup) -> None:
        """Enter."""
        epoch = self._epoch()
        await self._work("connect")
        self._oracle.connected.add((group.rank, epoch))

    async def load(self, model: ModelSpec) -> AsyncIterator[int]:
        """Load."""
        epoch = self._epoch()
        self._oracle.begin_load(self._process, self._member.rank, epoch)
        if self._hopeless:
            self._fail("load", permanent=True)
        for layer in range(1, model.total_layers + 1):
            await self._work("load")
            if layer == model.total_layers:
                self._oracle.loaded.add((self._member.rank, epoch))
            yield layer

    async def warm_up(self) -> None:
        """Warm up."""
        self._oracle.begin_warmup(self._process, self._member.rank, self._epoch())
        await self._work("warm-up")

    async def generate(self, request: GenerationRequest) -> AsyncIterator[str]:
        """Generate."""
        for word in ("simulated", " ", "words"):
            await self._work("generation")
            if self._member.rank == 0:
                yield word

    async def close(self) -> None:
        """Give up."""
        self._oracle.holding.pop(self._process, None)


class SimHost(InlineHost):
    """An inline host that tells the oracle when its engine is gone, killed ones included."""

    def __init__(self, oracle: Oracle, process: str, factory: Callable[[], SimEngine]) -> None:
        super().__init__(factory)
        self._oracle = oracle
        self._process = process

    async def kill(self) -> None:
        """Kill, and forget what the engine held."""
        await super().kill()
        self._oracle.holding.pop(self._process, None)

    async def close(self) -> None:
        """Close, and forget what the engine held."""
        await super().close()
        self._oracle.holding.pop(self._process, None)

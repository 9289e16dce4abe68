"""One history: the real barrier, runner and planner on a fake store, in virtual time, with faults drawn by a seed.

What is checked does not come from the code under test: the engines of the simulation say themselves what they were told to do and
when, as the promise of their rank stood at that moment.
"""

from __future__ import annotations

import asyncio
import gc
import random
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from loguru import logger

from barrier import ClaimLost, EpochId, Member, RankTaken, Settings, StoreError
from barrier.testing import FakeStore, FaultPlan
from barrier.testing.fake_store import StoreSnapshot
from planner import GenerationFailed, Instance, InstanceFailed, InstanceSpec, ModelSpec, Planner, Policy
from runner import EngineFailure, EngineGroup, GenerationRequest, InlineHost, Runner
from tests.simulation.loop import LoopClock, SeededLoop, Stuck

LEASE = 3.0
SETTINGS = Settings(lease=LEASE, heartbeat=1.0)
POLICY = Policy(
    assemble_timeout=300,
    connect_stall=15,
    load_stall=15,
    warmup_stall=15,
    generate_stall=15,
    max_failures=1_000,
    backoff_cap=2,
)
FAULTY_SECONDS = 30.0
QUIET_SECONDS = 120.0
"""Without faults everything must be Ready within so many virtual seconds: stalls, leases and backoff included."""

COMMANDS = ("lead", "open", "restore", "dispatch", "conclude", "inspect", "exec", "hmget", "xread")


class Breach(AssertionError):
    """A guarantee did not hold."""


@dataclass
class Engines:
    """What the engines themselves saw. The oracle of S1, S2 and S3."""

    loop: SeededLoop
    world_size: int
    connected: set[tuple[int, EpochId]] = field(default_factory=set[tuple[int, EpochId]])
    loads: set[tuple[int, EpochId]] = field(default_factory=set[tuple[int, EpochId]])
    warming: set[tuple[int, EpochId]] = field(default_factory=set[tuple[int, EpochId]])
    holding: dict[str, tuple[int, EpochId]] = field(default_factory=dict[str, tuple[int, EpochId]])
    """By process: the rank and the epoch for which it has, or is loading, a model."""
    current: dict[int, str] = field(default_factory=dict[int, str])
    """By rank: the process that its supervisor started last."""
    log: list[str] = field(default_factory=list[str])

    def say(self, sentence: str) -> None:
        """Add a line to the history."""
        self.log.append(f"{self.loop.time() - 1_000:8.3f}  {sentence}")

    def begin_load(self, process: str, rank: int, epoch: EpochId) -> None:
        """S1 and S2 at the place where they count: an engine is told to load."""
        self.say(f"{process} loads for {epoch.number}")
        if self.world_size > 1:
            absent = [r for r in range(self.world_size) if (r, epoch) not in self.connected]
            if absent:
                raise Breach(f"S1: {process} loads for {epoch} while {absent} have not connected in it")
        if (rank, epoch) in self.loads:
            raise Breach(f"S2: rank {rank} loads twice for {epoch}")
        for other, (other_rank, other_epoch) in self.holding.items():
            rightful = self.current.get(other_rank) == other and not self.loop.is_stopped(other)
            if rightful and other_rank != rank and other_epoch != epoch:
                raise Breach(f"S3: {process} loads for {epoch} while {other} holds a model for {other_epoch}")
        self.loads.add((rank, epoch))
        self.holding[process] = (rank, epoch)

    def begin_warmup(self, process: str, rank: int, epoch: EpochId) -> None:
        """The leader enters the warm-up last."""
        self.say(f"{process} warms up for {epoch.number}")
        late = [r for r in range(1, self.world_size) if (r, epoch) not in self.warming]
        if rank == 0 and late:
            raise Breach(f"{process} warms up for {epoch} before {late}")
        if (rank, epoch) in self.warming:
            raise Breach(f"S2: rank {rank} warms up twice for {epoch}")
        self.warming.add((rank, epoch))


class SimEngine:
    """An engine of the simulation: takes its time, fails as drawn, and tells `Engines` what it was told."""

    def __init__(self, engines: Engines, rng: random.Random, process: str, member: Member) -> None:
        self._engines = engines
        self._rng = rng
        self._process = process
        self._member = member

    def _epoch(self) -> EpochId:
        if self._member.promised is None:
            raise Breach(f"S3: {self._process} works without a promise")
        return self._member.promised

    async def _work(self, what: str) -> None:
        await asyncio.sleep(self._rng.choice((0, 0.01, 0.3, 1)))
        if self._rng.random() < 0.02:
            self._engines.say(f"{self._process}: {what} fails")
            raise EngineFailure(f"{what} went wrong")

    async def connect(self, group: EngineGroup) -> None:
        """Enter."""
        epoch = self._epoch()
        await self._work("connect")
        self._engines.connected.add((group.rank, epoch))

    async def load(self, model: ModelSpec) -> AsyncIterator[int]:
        """Load."""
        self._engines.begin_load(self._process, self._member.rank, self._epoch())
        for layer in range(1, model.total_layers + 1):
            await self._work("load")
            yield layer

    async def warm_up(self) -> None:
        """Warm up."""
        self._engines.begin_warmup(self._process, self._member.rank, self._epoch())
        await self._work("warm-up")

    async def generate(self, request: GenerationRequest) -> AsyncIterator[str]:
        """Generate."""
        for word in ("simulated", " ", "words"):
            await self._work("generation")
            if self._member.rank == 0:
                yield word

    async def close(self) -> None:
        """Give up."""
        self._engines.holding.pop(self._process, None)


class _ForgettingHost(InlineHost):
    """An inline host that tells the oracle when its engine is gone, killed ones included."""

    def __init__(self, engines: Engines, process: str, factory: Callable[[], SimEngine]) -> None:
        super().__init__(factory)
        self._engines = engines
        self._process = process

    async def kill(self) -> None:
        """Kill, and forget what the engine held."""
        await super().kill()
        self._engines.holding.pop(self._process, None)

    async def close(self) -> None:
        """Close, and forget what the engine held."""
        await super().close()
        self._engines.holding.pop(self._process, None)


class World:
    """One seed's history.

    Args:
        seed: decides everything.
    """

    def __init__(self, seed: int, *, faults: int | None = None) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.loop = SeededLoop(random.Random(self.rng.random()))
        self.world_size = self.rng.choice((1, 2, 2, 2, 3, 3, 4, 8))
        self.planners = self.rng.choice((1, 2, 2))
        self.faults = self.rng.randrange(7) if faults is None else faults
        self.injected: list[str] = []
        self.engines = Engines(self.loop, self.world_size)
        self.clock = LoopClock(self.loop)
        self.store = FakeStore(self.clock)  # pyright: ignore[reportArgumentType]  it uses a manual clock's now and wait_for only
        self.plans: dict[str, FaultPlan] = {}
        self.lives: dict[str, int] = {}
        self.snapshot: StoreSnapshot | None = None
        self.breach: BaseException | None = None
        self.over = asyncio.Event()
        self.spec = InstanceSpec(
            name="sim", world_size=self.world_size, model=ModelSpec(model_id="simulated", total_layers=2)
        )

    def run(self) -> None:
        """Play the history; raises `Breach` or `Stuck`, with the seed in the text."""
        with self._only_this_seed():
            try:
                self.loop.run_until_complete(self._play())
            except (Breach, Stuck, AssertionError) as error:
                raise Breach(f"seed {self.seed}: {error}") from error
            finally:
                self._clean_up()

    @contextmanager
    def _only_this_seed(self) -> Generator[None]:
        """Take every other source of chance away: nonces, jitter, and when the garbage is collected."""
        token_hex, state = secrets.token_hex, random.getstate()
        numbers = random.Random(self.rng.random())
        secrets.token_hex = lambda nbytes=None: f"{numbers.getrandbits(8 * (nbytes or 32)):0{2 * (nbytes or 32)}x}"
        random.seed(self.seed)
        gc.disable()
        try:
            yield
        finally:
            secrets.token_hex = token_hex
            random.setstate(state)
            gc.enable()

    def _clean_up(self) -> None:
        self.loop.bury()
        self.store.partition()
        pending = asyncio.all_tasks(self.loop)
        for task in pending:
            task.cancel()
        if pending:
            with suppress(Stuck):
                self.loop.run_until_complete(asyncio.wait(pending, timeout=1_000))
        self.loop.close()

    async def _play(self) -> None:
        for rank in range(self.world_size):
            self.loop.spawn("", self._supervise(f"rank{rank}", lambda life, r=rank: self._be_runner(r, life)))
        for number in range(self.planners):
            self.loop.spawn("", self._supervise(f"planner{number}", self._be_planner))
        await self._launch()
        await self._inject()
        self._end_faults()
        await self._must_serve()

    # --- processes ----------------------------------------------------------------------------------------------------

    async def _supervise(self, name: str, be: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        """Keep a process running: when it ends or is killed, another life of it begins after a while."""
        while True:
            self.lives[name] = self.lives.get(name, 0) + 1
            process = f"{name}#{self.lives[name]}"
            self.plans[process] = FaultPlan()
            task = self.loop.spawn(process, be(process))
            while not task.done() and not self.loop.is_killed(process):
                await asyncio.sleep(0.05)
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                if not isinstance(error, ClaimLost | RankTaken | StoreError):
                    self.breach = self.breach or error
                self.engines.say(f"{process} ends: {error!r}")
            await asyncio.sleep(self.rng.choice((0.1, 1, 4)))

    async def _be_runner(self, rank: int, process: str) -> None:
        self.engines.current[rank] = process
        member = Member(
            self.store.client(process, faults=self.plans[process]),
            "sim",
            rank=rank,
            settings=SETTINGS,
            clock=self.clock,
            node=process,
            # later lives sort later, as milliseconds do
            incarnation=f"{self.lives[f'rank{rank}']:012x}{self.rng.getrandbits(64):016x}",
        )
        rng = random.Random(self.rng.random())
        host = _ForgettingHost(self.engines, process, lambda: SimEngine(self.engines, rng, process, member))
        try:
            await Runner(member, host, clock=self.clock).run()
        finally:
            await member.close()

    async def _be_planner(self, process: str) -> None:
        async with self._planner(process) as planner:
            await planner.run()

    def _planner(self, process: str) -> Planner:
        client = self.store.client(process, faults=self.plans.get(process))
        rng = random.Random(self.rng.random())
        return Planner(client, policy=POLICY, settings=SETTINGS, clock=self.clock, rng=rng, holder=process)

    # --- the client ---------------------------------------------------------------------------------------------------

    async def _launch(self) -> None:
        async with self._planner("client") as planner:
            await planner.launch(self.spec, wait=False)
            await asyncio.sleep(0)

    async def _must_serve(self) -> None:
        deadline = self.loop.time() + QUIET_SECONDS
        async with self._planner("client") as planner:
            try:
                instance: Instance = await planner.launch(self.spec, timeout=QUIET_SECONDS)
                while True:
                    try:
                        text = "".join([piece async for piece in instance.generate("x", timeout=30)])
                        break
                    except GenerationFailed as error:
                        self.engines.say(f"generation failed: {error}")
                        if self.loop.time() > deadline:
                            raise
                        await instance.ready(QUIET_SECONDS)
            except (InstanceFailed, GenerationFailed) as error:
                raise Breach(f"liveness: {error}") from error
        if text != "simulated words":
            raise Breach(f"the text is {text!r}")
        if self.breach is not None:
            raise Breach(f"a process died of {self.breach!r}") from self.breach
        if self.store.keys_without_lifetime():
            raise Breach(f"keys without a lifetime: {self.store.keys_without_lifetime()}")

    # --- faults -------------------------------------------------------------------------------------------------------

    async def _inject(self) -> None:
        moments = sorted(self.rng.uniform(0, FAULTY_SECONDS) for _ in range(self.faults))
        start = self.loop.time()
        for moment in moments:
            await asyncio.sleep(max(0.0, start + moment - self.loop.time()))
            fault = self.rng.choice(self.FAULTS)
            self.injected.append(fault.__name__.removeprefix("_"))
            fault(self)
            if self.rng.random() < 0.3:
                self.snapshot = self.store.snapshot()
        await asyncio.sleep(max(0.0, start + FAULTY_SECONDS - self.loop.time()))

    def _end_faults(self) -> None:
        """From here on nothing goes wrong any more; what is dead stays dead until its supervisor has replaced it."""
        self.engines.say("quiet from here on")
        for name, life in self.lives.items():
            process = f"{name}#{life}"
            self._heal(process)
            self.loop.continue_process(process)

    def _victim(self) -> str:
        names = [f"rank{rank}" for rank in range(self.world_size)] + [f"planner{n}" for n in range(self.planners)]
        name = self.rng.choice(names)
        return f"{name}#{self.lives.get(name, 1)}"

    def _kill(self) -> None:
        process = self._victim()
        self.engines.say(f"FAULT kill {process}")
        self.loop.kill_process(process)
        self.store.partition(process)
        self.engines.holding.pop(process, None)

    def _pause(self) -> None:
        process, seconds = self._victim(), self.rng.choice((0.5, 1, 2, 5)) * LEASE
        self.engines.say(f"FAULT stop {process} for {seconds:g} s")
        self.loop.stop_process(process)
        self.loop.call_later(seconds, self.loop.continue_process, process)

    def _cut(self) -> None:
        process, seconds = self._victim(), self.rng.choice((0.2, 1, 2, 4)) * LEASE
        self.engines.say(f"FAULT cut {process} off for {seconds:g} s")
        self.store.partition(process)
        self.loop.call_later(seconds, self._heal, process)

    def _heal(self, process: str) -> None:
        if not self.loop.is_killed(process):
            self.store.heal(process)

    def _cut_all(self) -> None:
        seconds = self.rng.choice((0.2, 1, 2)) * LEASE
        self.engines.say(f"FAULT store unreachable for {seconds:g} s")
        processes = [f"{name}#{life}" for name, life in self.lives.items()]
        for process in processes:
            self.store.partition(process)
            self.loop.call_later(seconds, self._heal, process)
        self.store.restart(keep_data=self.rng.random() < 0.5)

    def _flush(self) -> None:
        self.engines.say("FAULT flush")
        self.store.flush()

    def _delete_key(self) -> None:
        keys = self.store.keys()
        if keys:
            key = self.rng.choice(keys)
            self.engines.say(f"FAULT delete {key}")
            self.store.delete(key)

    def _roll_back(self) -> None:
        if self.snapshot is not None:
            self.engines.say("FAULT roll the store back")
            self.store.roll_back(self.snapshot)

    def _lose_reply(self) -> None:
        process, command = self._victim(), self.rng.choice(COMMANDS)
        self.engines.say(f"FAULT lose a reply of {command} to {process}")
        self.plans[process].lose_reply(command)

    def _refuse(self) -> None:
        process, command = self._victim(), self.rng.choice(COMMANDS)
        self.engines.say(f"FAULT lose a {command} of {process}")
        self.plans[process].refuse(command)

    def _duplicate(self) -> None:
        process, command = self._victim(), self.rng.choice(("open", "restore", "dispatch", "conclude"))
        self.engines.say(f"FAULT double a {command} of {process}")
        self.plans[process].duplicate(command)

    def _forget_scripts(self) -> None:
        self.engines.say("FAULT script flush")
        self.store.forget_scripts()

    def _step_time(self) -> None:
        seconds = self.rng.choice((-3_600, -LEASE, LEASE, 3_600))
        self.engines.say(f"FAULT the store's clock steps by {seconds:g} s")
        self.store.shift_time(seconds)

    FAULTS = (
        _kill, _kill, _kill, _pause, _pause, _cut, _cut, _cut_all, _flush, _delete_key, _delete_key, _roll_back, _roll_back,
        _lose_reply, _lose_reply, _refuse, _duplicate, _forget_scripts, _step_time,
    )  # fmt: skip


def simulate(seed: int, *, faults: int | None = None) -> World:
    """Play one seed, without its log; returns the world, for its history. Raises `Breach`."""
    world = World(seed, faults=faults)
    packages = ("barrier", "runner", "planner")
    for package in packages:
        logger.disable(package)
    try:
        world.run()
    finally:
        for package in packages:
            logger.enable(package)
    return world

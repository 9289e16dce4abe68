"""One history: the real barrier, runner and planner on a fake store, in virtual time, with faults that a seed chooses."""

from __future__ import annotations

import asyncio
import gc
import random
import re
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from loguru import logger

from barrier import ClaimLost, RankTaken, Settings, StoreError, adopt
from barrier.store.keys import Keys
from barrier.testing import FakeStore, FaultPlan
from barrier.testing.fake_store import StoreSnapshot
from planner import GenerationFailed, Instance, InstanceFailed, InstanceSpec, ModelSpec, Planner, Policy
from planner.history import EpochOpened, History, find_breaches, read_history
from runner import Runner
from tests.simulation.loop import PROCESS, START, LoopClock, SeededLoop, Stuck
from tests.simulation.oracle import Oracle, SimEngine, SimHost, SimMember

LEASE = 3.0
SETTINGS = Settings(lease=LEASE, heartbeat=1.0)
QUIET_SECONDS = 120.0
"""Without faults everything must be Ready within so many virtual seconds: stalls, leases and backoff included."""

COMMANDS = ("lead", "open", "restore", "dispatch", "conclude", "inspect", "exec", "hmget", "xread")
PACKAGES = ("barrier", "runner", "planner")


class Breach(AssertionError):
    """A guarantee did not hold."""


@dataclass(frozen=True)
class Scale:
    """How large a history is.

    Attributes:
        seconds: virtual seconds in which faults happen.
        steps: how far two faults may be apart, in steps of the schedule.
        most_faults: how many there are at most.
        sizes: world sizes, to draw one from.
        rests: how long a supervisor may wait before it starts a process again, in virtual seconds.
        pauses: how long a process may be stopped, in leases.
        cuts: how long a process may be cut off, in leases.
        outages: how long the store may be unreachable, in leases.
        pace: how long a slow piece of an engine's work takes, in virtual seconds.
    """

    seconds: float
    steps: int
    most_faults: int
    sizes: tuple[int, ...]
    rests: tuple[float, ...]
    pauses: tuple[float, ...]
    cuts: tuple[float, ...]
    outages: tuple[float, ...]
    pace: float


SHORT = Scale(
    seconds=5,
    steps=800,
    most_faults=4,
    sizes=(1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4, 5, 8),
    rests=(0.1, 0.1, 1),
    pauses=(0.2, 0.5, 0.9, 1.1, 2),
    cuts=(0.2, 0.5, 1, 1.5),
    outages=(0.1, 0.4, 1.2),
    pace=0.6,
)
"""One bring-up, or the few that the faults make of it."""

LONG = Scale(
    seconds=30,
    steps=4_000,
    most_faults=10,
    sizes=(1, 2, 2, 3, 3, 4, 6, 8),
    rests=(0.1, 1, 4),
    pauses=(0.5, 1, 2, 5),
    cuts=(0.2, 1, 2, 4),
    outages=(0.2, 1, 2),
    pace=1,
)
"""Many bring-ups, one after another, in one store."""


class World:
    """One seed's history.

    Args:
        seed: decides everything.
        faults: how many; drawn where ``None``.
        scale: how large.
        traced: whether to keep what a reader of the history wants to know: the log lines of all processes, the store's own history, and
            the sum of all steps.
    """

    def __init__(self, seed: int, *, faults: int | None = None, scale: Scale = SHORT, traced: bool = False) -> None:
        self.seed = seed
        self.scale = scale
        self.rng = random.Random(seed)
        self.loop = SeededLoop(random.Random(self.rng.random()), traced=traced)
        self.world_size = self.rng.choice(scale.sizes)
        self.planners = self.rng.choice((1, 1, 2, 2, 3))
        self.faults = self.rng.randint(0 if self.rng.random() < 0.1 else 1, scale.most_faults)
        self.hopeless = self.rng.randrange(self.world_size) if faults is None and self.rng.random() < 0.04 else None
        """The rank whose loads fail for good, if there is one: then the instance must be given up, and that rank be named."""
        self.max_failures = self.rng.choice((1_000, 1_000, 1_000, 2))
        if faults is not None:
            self.faults, self.max_failures = faults, 1_000
        self.cut_off: set[str] = set()
        self.injected: list[str] = []
        self.oracle = Oracle(self.loop, self.world_size)
        self.clock = LoopClock(self.loop)
        self.store = FakeStore(self.clock)  # pyright: ignore[reportArgumentType]  it uses a manual clock's now and sleep only
        self.plans: dict[str, FaultPlan] = {}
        self.lives: dict[str, int] = {}
        self.ended: dict[str, asyncio.Event] = {}
        self.lagging: list[tuple[asyncio.TimerHandle, StoreSnapshot]] = []
        """States to which the store is about to go back, each with the timer that does it."""
        self.shifted = self.furthest = 0.0
        """By how much the store's clock is ahead now, and was at the most, in seconds."""
        self.forgot = False
        """Whether the store lost anything that it had acknowledged."""
        self.history = History("sim", ())
        self.gave_up = ""
        self.steps, self.seconds, self.trace = 0, 0.0, 0
        self.traced = traced
        self.spec = InstanceSpec(
            name="sim", world_size=self.world_size, model=ModelSpec(model_id="simulated", total_layers=2)
        )
        self.policy = Policy(
            assemble_timeout=2,  # shorter than many a rank stays away: that alone gives nothing up
            connect_stall=15,
            load_stall=15,
            warmup_stall=15,
            generate_stall=15,
            max_failures=self.max_failures,
            backoff_cap=2,
        )

    @property
    def bring_ups(self) -> int:
        """How many epochs the store's history holds."""
        return sum(isinstance(event, EpochOpened) for event in self.history.events)

    def run(self) -> None:
        """Play the history; raises `Breach`, with the seed in the text."""
        with self._only_this_seed():
            try:
                self.loop.run_until_complete(self._play())
                self._judge()
            except (AssertionError, StoreError) as error:
                raise Breach(f"seed {self.seed}: {error}") from error
            finally:
                self.steps, self.seconds = self.loop.steps, self.loop.time() - START
                self.trace = self.loop.trace
                self._clean_up()

    def lines(self) -> list[str]:
        """The whole history, for people; the same for the same seed, to the last byte. Ask for it with `traced`."""
        return [
            f"seed {self.seed}: {self.world_size} ranks, {self.planners} planners, {len(self.injected)} faults"
            + (f", rank {self.hopeless} is hopeless" if self.hopeless is not None else ""),
            *self.oracle.log,
            "the store's own history:",
            *(f"  {event}" for event in self.history.events),
            *(f"  ({oddity.sentence})" for oddity in self.history.oddities),
            f"{self.steps} steps in {self.seconds:.3f} virtual seconds, sum {self.trace:08x}",
        ]

    @contextmanager
    def _only_this_seed(self) -> Generator[None]:
        """Take every other source of chance away: nonces, jitter, and when the garbage is collected."""
        token_hex, state, collecting = secrets.token_hex, random.getstate(), gc.isenabled()
        numbers = random.Random(self.rng.random())
        secrets.token_hex = lambda nbytes=None: f"{numbers.getrandbits(8 * (nbytes or 32)):0{2 * (nbytes or 32)}x}"
        random.seed(self.seed)
        gc.disable()
        sink = logger.add(self._note, format="{level}: {message}") if self.traced else None
        try:
            yield
        finally:
            secrets.token_hex = token_hex
            random.setstate(state)
            if sink is not None:
                logger.remove(sink)
            if collecting:
                gc.enable()

    def _note(self, message: str) -> None:
        self.oracle.say(f"  {PROCESS.get() or 'client'} {message.strip()}")

    def _clean_up(self) -> None:
        self.loop.bury()
        self.store.partition()
        for _ in range(3):  # what is cancelled may begin a last task
            pending = self.loop.unfinished()
            for task in pending:
                task.cancel()
            if pending:
                with suppress(Stuck):
                    self.loop.run_until_complete(asyncio.wait(pending, timeout=1_000))
        self.loop.close()

    # --- what happens -------------------------------------------------------------------------------------------------

    async def _play(self) -> None:
        for rank in range(self.world_size):
            self.loop.spawn("", self._supervise(f"rank{rank}", lambda life, r=rank: self._be_runner(r, life)))
        for number in range(self.planners):
            self.loop.spawn("", self._supervise(f"planner{number}", self._be_planner))
        await self._launch()
        await self._inject()
        self._end_faults()
        await self._must_serve()
        await self._read_history()

    def _judge(self) -> None:
        """What can be said once all is over."""
        if self.oracle.breaches:
            raise Breach(self.oracle.breaches[0])
        if not self.forgot and self.oracle.second_verdicts:
            raise Breach(f"S5: {self.oracle.second_verdicts[0]}")
        if self.store.keys_without_lifetime():
            raise Breach(f"keys without a lifetime: {self.store.keys_without_lifetime()}")
        found = find_breaches(self.history)
        if found and not self.forgot:
            raise Breach(f"the store's history breaks '{found[0].rule}': {found[0].sentence}")

    # --- processes ----------------------------------------------------------------------------------------------------

    async def _supervise(self, name: str, be: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        """Keep a process running: when it ends or is killed, another life of it begins after a while."""
        while True:
            self.lives[name] = self.lives.get(name, 0) + 1
            process = f"{name}#{self.lives[name]}"
            self.plans[process] = FaultPlan()
            ended = self.ended[process] = asyncio.Event()
            task = self.loop.spawn(process, be(process))
            task.add_done_callback(lambda _, ended=ended: ended.set())
            await ended.wait()
            if not self.loop.is_killed(process):
                self._look_at_end(process, task)
            await asyncio.sleep(self.rng.choice(self.scale.rests))

    def _look_at_end(self, process: str, task: asyncio.Task[Any]) -> None:
        """S7: a process ends because another life of its rank took over, or because it could not even begin."""
        error = None if task.cancelled() else task.exception()
        self.oracle.say(f"{process} ends: {error!r}")
        if not isinstance(error, ClaimLost | RankTaken | StoreError):
            self.oracle.accuse(f"S7: {process} ended by itself: {error!r}")

    async def _be_runner(self, rank: int, process: str) -> None:
        self.oracle.current[rank] = process
        member = SimMember(
            self.store.client(process, faults=self.plans[process]),
            "sim",
            rank=rank,
            settings=SETTINGS,
            clock=self.clock,
            node=process,
            # later lives sort later, as milliseconds do
            incarnation=f"{self.lives[f'rank{rank}']:012x}{self.rng.getrandbits(64):016x}",
        )
        member.oracle, member.process = self.oracle, process
        rng = random.Random(self.rng.random())
        hopeless, pace = rank == self.hopeless, self.scale.pace

        def engine() -> SimEngine:
            return SimEngine(self.oracle, rng, process, member, hopeless=hopeless, pace=pace)

        try:
            await Runner(member, SimHost(self.oracle, process, engine), clock=self.clock).run()
        finally:
            await member.close()

    async def _be_planner(self, process: str) -> None:
        async with self._planner(process) as planner:
            await planner.run()

    def _planner(self, process: str) -> Planner:
        client = self.store.client(process, faults=self.plans.get(process))
        rng = random.Random(self.rng.random())
        return Planner(client, policy=self.policy, settings=SETTINGS, clock=self.clock, rng=rng, holder=process)

    # --- the client ---------------------------------------------------------------------------------------------------

    async def _launch(self) -> None:
        async with self._planner("client") as planner:
            await planner.launch(self.spec, wait=False)
            await asyncio.sleep(0)

    async def _must_serve(self) -> None:
        """L2 and L4: without faults the instance serves, or is given up with the truth, within a bounded time."""
        deadline = self.loop.time() + QUIET_SECONDS
        async with self._planner("client") as planner:
            try:
                instance: Instance = await planner.launch(self.spec, timeout=QUIET_SECONDS)
                while True:
                    try:
                        text = "".join([piece async for piece in instance.generate("x", timeout=30)])
                        break
                    except GenerationFailed as error:
                        self.oracle.say(f"generation failed: {error}")
                        if self.loop.time() > deadline:
                            raise
                        await instance.ready(QUIET_SECONDS)
            except (InstanceFailed, GenerationFailed) as error:
                self._look_at_failure(str(error))
                return
        if self.hopeless is not None:
            raise Breach(f"L4: it serves, and rank {self.hopeless} cannot load")
        if text != "simulated words":
            raise Breach(f"the text is {text!r}")

    def _look_at_failure(self, sentence: str) -> None:
        """Whether an instance that is not up was rightly given up: within the limits of its policy, and the named rank did fail."""
        self.oracle.say(f"gave up: {sentence}")
        self.gave_up = sentence
        if "did not come within" in sentence:
            raise Breach(f"L7: ranks that were only away are waited for, however long that takes: {sentence}")
        named = [int(rank) for rank in re.findall(r"rank (\d+)", sentence)]
        if self.hopeless is not None and self.hopeless in named:
            return
        if self.max_failures == 1_000 or "was not ready within" in sentence:
            raise Breach(f"L4: {sentence}")
        if named and not self.oracle.failed.intersection(named):
            raise Breach(f"L4: not true, only ranks {sorted(self.oracle.failed)} did fail: {sentence}")

    async def _read_history(self) -> None:
        store = adopt(self.store.client("reader"), settings=SETTINGS)
        try:
            self.history = await read_history(store, Keys("rankgate", "sim"))
        finally:
            await store.close()

    # --- faults -------------------------------------------------------------------------------------------------------

    async def _inject(self) -> None:
        """Half of the faults come at a moment of time, the other half after a number of steps: most steps come close together."""
        end = self.loop.time() + self.scale.seconds
        for _ in range(self.faults):
            if self.rng.random() < 0.5:
                waiting: Awaitable[None] = asyncio.sleep(self.rng.uniform(0, self.scale.seconds / 2))
            else:
                waiting = self.loop.after_steps(self.rng.randrange(1, self.scale.steps))
            with suppress(TimeoutError):
                async with asyncio.timeout(max(end - self.loop.time(), 0.001)):
                    await waiting
            fault = self.rng.choice(self.FAULTS)
            self.injected.append(fault.__name__.removeprefix("_"))
            fault(self)

    def _end_faults(self) -> None:
        """From here on nothing goes wrong any more and the clock has caught up; what is dead stays dead until its supervisor has replaced it."""
        self.oracle.say("quiet from here on")
        # A clock that stays behind is no fault that has stopped: what died before the step holds its rank for that much longer.
        self.store.shift_time(self.furthest - self.shifted)
        for timer, state in self.lagging:
            timer.cancel()
            self._fail_over(state)
        self.oracle.doomed.clear()
        for name, life in self.lives.items():
            process = f"{name}#{life}"
            self._heal(process)
            self.loop.continue_process(process)

    def _victim(self) -> str:
        names = [f"rank{rank}" for rank in range(self.world_size)] + [f"planner{n}" for n in range(self.planners)]
        name = self.rng.choice(names)
        if name.startswith("rank"):
            self.oracle.failed.add(int(name.removeprefix("rank")))
        return f"{name}#{self.lives.get(name, 1)}"

    def _kill(self) -> None:
        process = self._victim()
        self.oracle.say(f"FAULT kill {process}")
        self.loop.kill_process(process)
        self.store.partition(process)
        self.oracle.holding.pop(process, None)
        self.ended[process].set()

    def _pause(self) -> None:
        process, seconds = self._victim(), self.rng.choice(self.scale.pauses) * LEASE
        self.oracle.say(f"FAULT stop {process} for {seconds:g} s")
        self.loop.stop_process(process)
        self.loop.call_later(seconds, self.loop.continue_process, process)

    def _cut(self) -> None:
        process, seconds = self._victim(), self.rng.choice(self.scale.cuts) * LEASE
        self.oracle.say(f"FAULT cut {process} off for {seconds:g} s")
        self._cut_off(process, seconds)

    def _cut_off(self, process: str, seconds: float) -> None:
        self.store.partition(process)
        self.cut_off.add(process)
        self.loop.call_later(seconds, self._heal, process)

    def _heal(self, process: str) -> None:
        if process in self.cut_off and not self.loop.is_killed(process):
            self.cut_off.discard(process)
            self.store.heal(process)

    def _cut_all(self) -> None:
        seconds = self.rng.choice(self.scale.outages) * LEASE
        keep_data = self.rng.random() < 0.5
        self.oracle.say(
            f"FAULT restart the store {'with' if keep_data else 'without'} its data, away for {seconds:g} s"
        )
        self._everybody_may_suffer()
        processes = [f"{name}#{life}" for name, life in self.lives.items()]
        for process in processes:
            self._cut_off(process, seconds)
        self.forgot = self.forgot or not keep_data
        self.store.restart(keep_data=keep_data)

    def _everybody_may_suffer(self) -> None:
        self.oracle.failed.update(range(self.world_size))

    def _flush(self) -> None:
        self.oracle.say("FAULT flush")
        self._everybody_may_suffer()
        self.forgot = True
        self.store.flush()

    def _delete_key(self) -> None:
        keys = self.store.keys()
        if keys:
            key = self.rng.choice(keys)
            self.oracle.say(f"FAULT delete {key}")
            self._everybody_may_suffer()
            self.forgot = True
            self.store.delete(key)

    def _roll_back(self) -> None:
        """A failover to a replica that lags: what is written from now until then will be lost."""
        lag = self.rng.choice((0, 0.01, 0.3, 1, 2.5))
        self.oracle.say(f"FAULT the store's replica lags from here on for {lag:g} s")
        state = self.store.snapshot()
        self.lagging.append((self.loop.call_later(lag, self._fail_over, state), state))

    def _fail_over(self, to: StoreSnapshot) -> None:
        self.oracle.say("FAULT roll the store back")
        self.lagging = [(timer, state) for timer, state in self.lagging if state is not to]
        self._everybody_may_suffer()
        self.forgot = True
        self.store.roll_back(to)

    def _break_engine(self) -> None:
        rank = self.rng.randrange(self.world_size)
        self.oracle.say(f"FAULT the next piece of work of rank {rank}'s engine fails")
        self.oracle.doomed.add(rank)

    def _lose_reply(self) -> None:
        process, command = self._victim(), self.rng.choice(COMMANDS)
        self.oracle.say(f"FAULT lose a reply of {command} to {process}")
        self.plans[process].lose_reply(command)

    def _refuse(self) -> None:
        process, command = self._victim(), self.rng.choice(COMMANDS)
        self.oracle.say(f"FAULT lose a {command} of {process}")
        self.plans[process].refuse(command)

    def _duplicate(self) -> None:
        process, command = self._victim(), self.rng.choice(("open", "restore", "dispatch", "conclude"))
        self.oracle.say(f"FAULT double a {command} of {process}")
        self.plans[process].duplicate(command)

    def _forget_scripts(self) -> None:
        self.oracle.say("FAULT script flush")
        self.store.forget_scripts()

    def _step_time(self) -> None:
        seconds = self.rng.choice((-3_600, -LEASE, LEASE, 3_600))
        self.oracle.say(f"FAULT the store's clock steps by {seconds:g} s")
        self._everybody_may_suffer()
        self.shifted += seconds
        self.furthest = max(self.furthest, self.shifted)
        self.store.shift_time(seconds)

    FAULTS = (
        _kill, _kill, _kill, _pause, _pause, _cut, _cut, _cut_all, _flush, _delete_key, _delete_key, _roll_back, _roll_back,
        _roll_back, _break_engine, _break_engine,
        _lose_reply, _lose_reply, _refuse, _duplicate, _forget_scripts, _step_time,
    )  # fmt: skip


def simulate(seed: int, *, faults: int | None = None, scale: Scale = SHORT) -> World:
    """Play one seed, without its log; returns the world, for its history. Raises `Breach`."""
    world = World(seed, faults=faults, scale=scale)
    for package in PACKAGES:
        logger.disable(package)
    try:
        world.run()
    finally:
        for package in PACKAGES:
            logger.enable(package)
    return world

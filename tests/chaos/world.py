"""One world of the chaos runs: a store, two planners, some instances with a process for every rank, and their recorders."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from barrier import Barrier, Settings, Store, StoreError, SystemClock, connect
from barrier.store.keys import Keys
from barrier.testing import wait_until
from planner import GenerationFailed, InstanceSpec, ModelSpec
from planner.explain import is_serving
from planner.launcher import own_environment
from planner.registry import Registry
from planner.requests import RequestQueue
from runner.engines.simulated import MARK
from tests.chaos.engine import REFUSED, order_file
from tests.chaos.journal import Line, read
from tests.chaos.network import Network
from tests.chaos.nursery import DIRECTORY, NETWORK
from tests.chaos.recorder import Recorder
from tests.chaos.sites import Site
from tests.integration.cluster import Nursery, Process, keys_without_lifetime

NAMESPACE = "rankgate"
SETTINGS = Settings(lease=1.5, heartbeat=0.4, command_timeout=0.3)
"""What every process is told. Short, so that many recoveries fit into a run; a busy machine makes healthy ranks miss it now and then."""

LAYERS = 6
SIMULATED: Mapping[str, Any] = {
    "connect_seconds": 0.1,
    "layer_seconds": 0.03,
    "warmup_seconds": 0.1,
    "token_seconds": 0.01,
}
MAX_FAILURES = 8
"""Failed attempts in a row that planners forgive. A round injects no more than 4 faults: who needs more attempts than this is wrong."""

_ENGINE = "tests.chaos.engine:make"
_LOOK = 0.05  # seconds


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long an instance may take from the last fault's end until it serves, from the design and the settings; in seconds.

    Attributes:
        settings: the times.
        noise: how much longer everything may take on a machine whose processors others use, too.
    """

    settings: Settings = SETTINGS
    noise: float = 2.0

    def attempt(self, slow: float = 0.0) -> float:
        """One attempt, from its opening until it serves: the engine's work, and two seconds for starting its processes."""
        simulated = SIMULATED["connect_seconds"] + LAYERS * SIMULATED["layer_seconds"] + SIMULATED["warmup_seconds"]
        return simulated * 1.2 + 2.0 + slow

    def notice(self) -> float:
        """Until what is broken is seen to be: the leader's lease and the succession, then a silent rank (L3), then the store's lease."""
        return 3 * (self.settings.lease + self.settings.heartbeat)

    def backoff(self, failures: int) -> float:
        """All pauses after so many failed attempts together, at their longest."""
        return sum(min(30.0, 0.5 * 2.0**count) for count in range(failures))

    def recovery(self, faults: int, slow: float = 0.0) -> float:
        """The deadline. The claim of a process that was killed lapses within a lease; every fault may have cost an attempt, the attempt
        that was under way when the last one ended another one, and the pauses after them are the policy's."""
        attempts = 2 * self.attempt(slow) + self.notice()
        return self.noise * (self.settings.lease + 2 * attempts) + self.backoff(min(faults + 1, MAX_FAILURES))


@dataclass(slots=True)
class Group:
    """One instance and its processes."""

    name: str
    size: int
    barrier: Barrier
    requests: RequestQueue
    recorder: Recorder
    processes: dict[int, Process] = field(default_factory=dict[int, Process])
    strays: int = 0
    """Entries that the driver has put into its task log, past the gate."""
    contested: set[int] = field(default_factory=set[int])
    """Ranks for which two processes run, by a fault that goes on."""
    refusing: set[int] = field(default_factory=set[int])
    """Ranks whose next engine was ordered to refuse for good."""

    @property
    def spec(self) -> InstanceSpec:
        return InstanceSpec(
            name=self.name, world_size=self.size, model=ModelSpec(model_id="simulated", total_layers=LAYERS)
        )


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that ended though nobody had killed it."""

    name: str
    code: int
    excuse: str
    """Why it may have; empty where there is none."""
    words: str


@dataclass(frozen=True, slots=True)
class Settled:
    """How an instance came out of a round.

    Attributes:
        instance: which.
        seconds: since the last fault of the round had ended.
        outcome: ``serves``, or ``given up`` with a true verdict, after which it was launched again and served.
        problem: what is wrong with it; empty where nothing is.
    """

    instance: str
    seconds: float
    outcome: str
    problem: str = ""


class World:
    """See the module. Make it with `world`."""

    def __init__(self, name: str, site: Site, directory: Path, network: Network | None, inner_url: str) -> None:
        self.name = name
        self.site = site
        self.directory = directory
        self.network = network
        self._inner_url = inner_url
        self._stack = AsyncExitStack()
        self._started = 0
        self._forking = asyncio.Lock()
        self.store_lock = asyncio.Lock()
        """Held by a fault of the store: one at a time."""
        self.planner_lock = asyncio.Lock()
        """Held by a fault of a planner: never both of them at once, for the desired state lives in them where the store forgets."""
        self.outage = 0
        """How many faults of the store or the network go on now: a process that starts meanwhile may end at once, and say so."""
        self.outage_ended = 0.0
        self._forgetting = 0
        self._forgot_at = float("-inf")
        self._started_at: dict[int, float] = {}
        self.groups: list[Group] = []
        self.planners: list[Process] = []
        self.expected: set[int] = set()
        """Pids of processes that may end: they were killed, or replaced."""
        self.doubtful: set[int] = set()
        """Pids of runners whose rank another one may have claimed, which then left before it was told so."""
        self.replaced: set[int] = set()
        """Pids of runners that were stopped while another process took their rank."""
        self.ended: list[Ended] = []
        self.pids: set[int] = set()
        """Every process that was ever started here."""
        self.store: Store
        self.nursery: Nursery

    # --- beginning and end --------------------------------------------------------------------------------------------

    async def start(self, sizes: Mapping[str, int], scope: AsyncExitStack) -> None:
        """Start everything and bring every instance up."""
        self._stack = scope
        self.store = await connect(self.site.url, settings=Settings(lease=5.0, heartbeat=1.0, reader_block=1.0))
        scope.push_async_callback(self.store.close)
        self.nursery = await _nursery(self.directory / "nursery.log")
        scope.push_async_callback(self.nursery.stop)
        scope.push_async_callback(self._end_processes)
        for name, size in sizes.items():
            keys = Keys(NAMESPACE, name)
            barrier = Barrier(self.store, name, world_size=size, namespace=NAMESPACE)
            scope.push_async_callback(barrier.close)
            requests = RequestQueue(self.store, keys, SystemClock())
            group = Group(name, size, barrier, requests, Recorder(self.store, keys, self.site.forgets))
            self.groups.append(group)
            scope.push_async_callback(_cancelled, asyncio.create_task(group.recorder.run()))
            for rank in range(size):
                await self.start_runner(group, rank)
        for _ in range(2):
            self.planners.append(await self.start_planner())
        scope.push_async_callback(_cancelled, asyncio.create_task(self._supervise()))
        for group in self.groups:
            await Registry(self.store, NAMESPACE).launch(group.spec)

    async def _end_processes(self) -> None:
        for process in [*self.planners, *(one for group in self.groups for one in group.processes.values())]:
            if process.running:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGCONT)
                await process.kill()

    async def stop_everything(self) -> list[str]:
        """Stop every instance as a user would, then every process; what was left behind, in sentences."""
        left: list[str] = []
        registry = Registry(self.store, NAMESPACE)
        for group in self.groups:
            record = await registry.get(group.name)
            if record is None:
                left.append(f"{group.name}: nobody wants it any more, though nobody has stopped it")
                continue
            await registry.stop(record)

            async def gone(name: str = group.name) -> bool:
                current = await registry.get(name)
                return current is not None and current.desired == "gone"

            try:
                await wait_until(gone, f"{group.name} to be stopped", Bounds().recovery(0))
            except AssertionError as error:
                left.append(str(error))
        left += [f"{key} has no lifetime" for key in await keys_without_lifetime(self.store)]
        self.expected |= {process.pid for process in self.everyone()}
        codes = await asyncio.gather(*(process.stop() for process in self.everyone()), return_exceptions=True)
        for process, code in zip(self.everyone(), codes, strict=True):
            if code != 0:
                left.append(
                    f"{process.name} (pid {process.pid}) ended with {code} when it was asked to: {process.log(5)}"
                )
        engines = {line.engine for line in self.journal() if line.engine}
        left += [f"{one} of {self.name} is still there" for one in _living(self.pids | engines, self.nursery.pid)]
        return left

    def everyone(self) -> list[Process]:
        """All processes that should run now."""
        return [*(group.processes[rank] for group in self.groups for rank in range(group.size)), *self.planners]

    # --- processes ----------------------------------------------------------------------------------------------------

    async def start_runner(self, group: Group, rank: int) -> Process:
        """Start a process for a rank; it is the rank's one from now on."""
        # Engines outside of the namespace are at 127.0.0.1, where one inside it cannot reach them: there, none meet.
        simulated = {**SIMULATED, "meet": self.network is None}
        config = {"simulated": simulated, "instance": group.name, "directory": str(self.directory)}
        inside = self.network is not None and group is self.groups[0] and rank == group.size - 1
        process = await self._start(
            f"{group.name}-rank-{rank}",
            "runner",
            *("--instance", group.name, "--rank", str(rank), "--world-size", str(group.size)),
            *("--engine", _ENGINE, "--engine-config", json.dumps(config)),
            inside=inside,
        )
        group.processes[rank] = process
        return process

    async def start_planner(self) -> Process:
        """Start a planner for every instance of this world."""
        return await self._start("planner", "planner", "--max-failures", str(MAX_FAILURES))

    async def _start(self, name: str, *words: str, inside: bool = False) -> Process:
        self._started += 1
        log = self.directory / f"{self._started:04d}-{name}.log"
        log.touch()
        times = [
            *("--lease", repr(SETTINGS.lease)),
            *("--heartbeat", repr(SETTINGS.heartbeat)),
            *("--command-timeout", repr(SETTINGS.command_seconds)),
        ]
        environment = {"RANKGATE_REDIS": self.site.url, DIRECTORY: str(self.directory)}
        if inside and self.network is not None:
            environment |= {"RANKGATE_REDIS": self._inner_url, NETWORK: self.network.name}
        async with self._forking:
            pid, ended = await self.nursery.fork([*words, *times], environment, log)
        self.pids.add(pid)
        self._started_at[pid] = time.monotonic()
        return Process(name, pid, ended, log)

    def forgets(self, *, began: bool) -> None:
        """A fault begins or ends in which the store forgets what it had acknowledged."""
        self._forgetting += 1 if began else -1
        self._forgot_at = time.monotonic()

    def other_planner_knows(self, place: int) -> bool:
        """Whether the desired state outlives the planner at that place: the other one has it, or the store has it again.

        docs/operate.md says that what the store and every planner forget at once is gone. A planner that has been running since before
        the store forgot has it in memory; one that was started since gets it as soon as the other one has written it back.
        """
        if self._forgetting:
            return False
        other = self.planners[1 - place]
        running_since = self._started_at.get(other.pid, float("inf"))
        lease_ago = time.monotonic() - 3 * SETTINGS.lease
        return (
            other.running
            and "planning" in other.log(1_000)
            and (running_since < self._forgot_at - SETTINGS.lease or self._forgot_at < lease_ago)
        )

    async def _supervise(self) -> None:
        """Start again what ended by itself, as an init system would, and remember that it did."""
        while True:
            for group in self.groups:
                for rank, process in list(group.processes.items()):
                    if not process.running and process.pid not in self.expected:
                        self._note_end(process)
                        await self.start_runner(group, rank)
            for place, process in enumerate(list(self.planners)):
                if not process.running and process.pid not in self.expected:
                    self._note_end(process)
                    self.planners[place] = await self.start_planner()
            await asyncio.sleep(_LOOK)

    def _note_end(self, process: Process) -> None:
        words = process.log(4)
        recently = self.outage > 0 or time.monotonic() < self.outage_ended + 3 * SETTINGS.lease
        served = ("this is rank" if "rank" in process.name else " INFO ") in process.log(10_000)
        excuse = ""
        if process.code == 1 and recently and not served:
            excuse = "it started while its store was away, and said so"
        elif process.code == 1 and process.pid in self.doubtful and "holds this rank now" in words:
            excuse = "it was replaced by one that had left before it was told that it had the rank"
        self.expected.add(process.pid)
        self.ended.append(Ended(process.name, process.code or 0, excuse, words))

    def holders(self, group: Group) -> list[Process]:
        """The processes of an instance, in rank order."""
        return [group.processes[rank] for rank in range(group.size)]

    # --- looking ------------------------------------------------------------------------------------------------------

    def journal(self) -> list[Line]:
        """All that runners and engines of this world have noted."""
        return read(self.directory / "journal")

    async def leader_of(self, group: Group) -> str:
        """Who leads an instance; empty where nobody does, or where the store does not say."""
        try:
            leader = (await group.barrier.inspect()).leader
        except StoreError:
            return ""
        return leader.holder if leader else ""

    async def settle(self, group: Group, began: float, seconds: float) -> Settled:
        """Wait until an instance serves: all ranks, in the processes that live now, with a text to show for it.

        Args:
            group: which.
            began: when the last fault ended, by the monotonic clock.
            seconds: the deadline, from then.
        """
        outcome, why = "serves", "not looked yet"
        while True:
            if time.monotonic() - began > seconds:
                return Settled(
                    group.name, time.monotonic() - began, "stuck", f"not serving after {seconds:.1f} s: {why}"
                )
            try:
                record = await Registry(self.store, NAMESPACE).get(group.name)
                if record is not None and record.failure:
                    problem = self._judge_failure(group, record.failure)
                    outcome = f"given up: {record.failure}"
                    if problem:
                        await Registry(self.store, NAMESPACE).launch(group.spec)  # it is told; the rounds go on
                        return Settled(group.name, time.monotonic() - began, outcome, problem)
                    await Registry(self.store, NAMESPACE).launch(group.spec)
                    # Only now: a launch that the store did not answer is done again, and the same verdict is read again.
                    group.refusing.clear()
                    began = time.monotonic()  # from here on it is a launch like any other
                snapshot = await group.barrier.inspect()
                pids = [view.report.pid if view.report else None for view in snapshot.ranks]
                if not is_serving(snapshot):
                    why = f"it is not serving: {[view.report and view.report.status for view in snapshot.ranks]}, {snapshot.epoch}"
                elif pids != [process.pid for process in self.holders(group)]:
                    why = "it serves with processes that are gone"
                else:
                    text = await _generated(group)
                    if not text.startswith(MARK):
                        return Settled(group.name, time.monotonic() - began, outcome, f"the text was {text[:60]!r}")
                    return Settled(group.name, time.monotonic() - began, outcome)
            except (StoreError, GenerationFailed) as error:
                why = str(error)
            await asyncio.sleep(_LOOK)

    def _judge_failure(self, group: Group, failure: str) -> str:
        """What is wrong with a verdict that gave an instance up; empty where it is true."""
        for rank in group.refusing:
            if f"rank {rank}" in failure and REFUSED in failure and not self.order_left(group, rank):
                return ""
        return f"given up without a reason of ours: {failure}"

    # --- orders to engines --------------------------------------------------------------------------------------------

    def order(self, group: Group, rank: int, phase: str, action: str, seconds: float = 0.0) -> None:
        """Order a rank's next engine to fail, or to be slow, when it comes to a phase."""
        path = order_file(self.directory, group.name, rank)
        whole = path.with_suffix(".new")
        whole.write_text(json.dumps({"phase": phase, "action": action, "seconds": seconds}), encoding="ascii")
        whole.rename(path)

    def order_left(self, group: Group, rank: int) -> bool:
        """Whether no engine has taken the order to refuse yet; one to fail may have been given since."""
        try:
            order: dict[str, Any] = json.loads(order_file(self.directory, group.name, rank).read_text(encoding="ascii"))
        except FileNotFoundError:
            return False
        return order["action"] == "refuse"

    def engine_of(self, process: Process) -> psutil.Process | None:
        """The engine's process of a runner, if it has one now."""
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children():
                if "engine-of-rank" in _command(child):
                    return child
        return None


@asynccontextmanager
async def world(
    name: str, site: Site, directory: Path, sizes: Mapping[str, int], network: Network | None = None
) -> AsyncGenerator[World]:
    """A world for the length of the block, all of it started and every instance asked for."""
    directory.mkdir(parents=True)
    inner = site.url if network is None else site.url.replace("127.0.0.1", network.address)
    made = World(name, site, directory, network, inner)
    async with AsyncExitStack() as scope:
        await made.start(sizes, scope)
        yield made


async def _generated(group: Group) -> str:
    pieces = group.requests.generate("chaos", max_tokens=4, seconds=3 * SETTINGS.lease)
    return "".join([piece async for piece in pieces])


async def _nursery(log: Path) -> Nursery:
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "tests.chaos.nursery"),
            env={**os.environ, **own_environment()},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=output,
            start_new_session=True,
        )
    return Nursery(process)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    ended = await asyncio.gather(task, return_exceptions=True)
    if isinstance(ended[0], Exception):
        raise ended[0]  # a listener that died has heard nothing since


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _living(pids: set[int], nursery: int) -> list[str]:
    """Those that still are processes of this world: a number may have been given to another process meanwhile."""
    found: list[str] = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            command, parent = _command(process), process.ppid()
            ours = parent in (nursery, 1) or parent in pids
            if (
                process.status() != psutil.STATUS_ZOMBIE
                and ours
                and ("engine-of-rank" in command or "nursery" in command)
            ):
                found.append(f"pid {pid} ({command[-60:]})")
    return found


def rng_of(seed: int, *place: object) -> random.Random:
    """The random numbers of one place of the schedule: they depend on nothing that happens elsewhere."""
    return random.Random(" ".join(str(part) for part in (seed, *place)))

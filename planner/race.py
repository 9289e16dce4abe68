"""``rankgate race``: the race that the barrier ends, three times over, with real processes on a real server.

The scenario is the same in every run. Three ranks connect; the last one takes some seconds longer. Rank 1 is killed (SIGKILL) as soon
as it has said Connected, and its supervisor starts it again a little later. So there is a moment at which the two others are connected
and rank 1 is not, though its last word, Connected, still stands.

1. **A planner that trusts stale statuses, and a runner that does not forgive.** The planner looks at a table of statuses every 100 ms,
   as exo's does, and sends a rank its next task when the table says that this rank is due and that all others have come as far.
   Runners write their status into the table every 200 ms. Nobody lies, and nobody is artificially late: the table simply
   says what every rank said last. The runner raises ``ValueError: Received LoadModel outside of state machine …``, as exo's
   does, and its process dies of it. Its supervisor, which mends one death in a row and mended the accident, gives it up.
2. **The same planner, and rankgate's runner.** The runner refuses what it cannot do, and lives. The planner sends LoadModel again
   every half a second, and after three refusals it begins anew with all ranks. Its tasks go into the task log without asking the gate.
3. **rankgate's planner and runner.** LoadModel passes the gate, which opens when every rank is connected at one instant. A word of
   rank 1 counts for one lease after its death, which is over before the late rank arrives. (Had the late rank come within that lease,
   LoadModel would have gone out, the attempt been ended for all, and the next one begun: a lease cannot know of a death sooner.)

Nothing is acted: deaths are counted by exit codes, refusals in the history that the store keeps, and if the race does not happen in some
run, the output says so. The planner of the first two runs is no straw man: it does not send a task again within half a second, it does
not go on while a rank is missing from the table, and it is told of every refusal. What it lacks is a way to know that a word is old.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from loguru import logger

from barrier import (
    Barrier,
    EpochId,
    Member,
    Opened,
    Settings,
    Store,
    StoreError,
    Verdict,
    connect,
)
from barrier.errors import RankgateError, StoreCorrupt
from barrier.keys import Keys
from planner.embedded import EmbeddedServer
from planner.history import EpochConcluded, EpochOpened, History, StepDispatched, find_breaches, kind_of, read_history
from planner.launcher import (
    Launcher,
    ProcessState,
    Program,
    Restarts,
    exit_sentence,
    leave_with_parent,
    own_command,
    own_environment,
)
from planner.planner import InstanceFailed, Planner
from planner.spec import InstanceSpec
from runner import Engine, EngineGroup, InlineHost, Runner
from runner.engines.simulated import SimulatedConfig, SimulatedEngine
from runner.messages import (
    ConnectToGroup,
    LoadModel,
    ModelSpec,
    RunnerConnected,
    RunnerConnecting,
    RunnerIdle,
    RunnerLoaded,
    RunnerLoading,
    RunnerReady,
    RunnerStatus,
    RunnerWarmingUp,
    StartWarmup,
    Task,
    decode_task,
    encode,
)

WORLD_SIZE = 3
KILLED = 1
"""The rank whose process is killed once it is connected."""
LATE = 2
"""The rank that is held back."""

POLL = 0.1
"""Seconds between two looks of the planner that polls."""
PUBLISH = 0.2
"""Seconds between two words of a runner into the table of statuses."""
RESEND = 0.5
"""Seconds after which the planner that polls sends a task again that has brought no change."""
DOWN = 4.0
"""Seconds for which a process that died stays down."""
RESTARTS = 1
"""How many deaths in a row a supervisor mends. With more, the fragile runner dies once for each LoadModel that waits for it."""
PATIENCE = 3
"""Refusals after which the planner that polls begins anew."""
CONNECT = 0.2
"""Seconds that a rank takes to connect."""
HELD_BACK = 2.5
"""Seconds that the late rank takes longer."""
LIMIT = 40.0
"""Seconds after which a run is over, ready or not."""

MODEL = ModelSpec(model_id="simulated", total_layers=8)
SETTINGS = Settings(lease=1.5, heartbeat=0.4)
_LIFETIME = 600  # seconds; what the first two runs write beside the barrier's keys goes by itself

Say: TypeAlias = Callable[[str], None]
Kind: TypeAlias = Literal["ConnectToGroup", "LoadModel", "StartWarmup"]
Role: TypeAlias = Literal["fragile", "graceful"]


@dataclass(frozen=True, slots=True)
class RunFigures:
    """What one run came to.

    Attributes:
        title: which run.
        load_dispatches: how often LoadModel was sent; to several ranks at once counts once.
        rejections: tasks that a runner refused; ``None`` where the runner cannot refuse.
        deaths: processes that ended by themselves with an error; the one that the scenario kills is not among them.
        ready_after: seconds from the first look of the planner until all ranks were Ready; ``None`` where that never came.
        last_words: what the first process that died said last; empty where none died.
        breaches: promises that the independent checker found broken in the history; ``None`` where the run leaves none.
    """

    title: str
    load_dispatches: int
    rejections: int | None
    deaths: int
    ready_after: float | None
    last_words: str = ""
    breaches: int | None = None


@dataclass(frozen=True, slots=True)
class RaceFigures:
    """The three runs, side by side."""

    stale_and_fragile: RunFigures
    stale_and_graceful: RunFigures
    with_barrier: RunFigures

    @property
    def runs(self) -> tuple[RunFigures, RunFigures, RunFigures]:
        """In their order."""
        return self.stale_and_fragile, self.stale_and_graceful, self.with_barrier


async def run_race(console_print: Say) -> RaceFigures:
    """Run all three on one embedded server, tell what happens line by line, then the table; some 20 seconds.

    Args:
        console_print: prints one line. The table fits into 80 columns; what happens is told in sentences that may be longer.

    Raises:
        EmbeddedServerError: there is no server to run on.
        StoreError: it stopped answering.
    """
    say = console_print
    async with EmbeddedServer() as server:
        store = await connect(server.url, settings=SETTINGS)
        try:
            figures = RaceFigures(
                await _stale_and_fragile(store, server.url, say),
                await _stale_and_graceful(store, server.url, say),
                await _with_barrier(store, server.url, say),
            )
        finally:
            await store.close()
    say("")
    for line in table(figures):
        say(line)
    say("")
    for line in conclusions(figures):
        say(line)
    return figures


# --- the figures, for people ----------------------------------------------------------------------------------------------


def table(figures: RaceFigures) -> list[str]:
    """The runs side by side, in at most 80 columns."""
    rows: list[tuple[str, Callable[[RunFigures], str]]] = [
        ("LoadModel dispatched", lambda run: str(run.load_dispatches)),
        ("tasks refused", lambda run: "cannot refuse" if run.rejections is None else str(run.rejections)),
        ("processes that died", lambda run: str(run.deaths)),
        ("all ranks Ready", lambda run: "never" if run.ready_after is None else f"after {run.ready_after:.1f} s"),
    ]
    heads = [
        ("", "stale statuses,", "stale statuses,", "the barrier,"),
        ("", "fragile runner", "refusing runner", "refusing runner"),
    ]
    lines = [_row(head) for head in heads]
    lines.append("-" * len(lines[0]))
    lines += [_row((name, *(show(run) for run in figures.runs))) for name, show in rows]
    return lines


def _row(cells: Sequence[str]) -> str:
    first, *others = cells
    return f"{first:<22}" + "".join(f"{cell:>18}" for cell in others)


def conclusions(figures: RaceFigures) -> list[str]:
    """What the figures mean, one sentence a run, and honest where a run did not go as it usually does."""
    fragile, graceful, barrier = figures.runs
    if fragile.deaths:
        first = f"1. A process died of it: {fragile.last_words}"
    else:
        first = "1. This time the race did not happen: no process died. Run it again."
    if graceful.deaths:
        second = f"2. A process died, which must not happen: {graceful.last_words}"
    elif graceful.rejections:
        second = f"2. No process died. The planner was refused {graceful.rejections} times and sent LoadModel {graceful.load_dispatches} times."
    else:
        second = "2. This time the race did not happen: nothing was refused. Run it again."
    if barrier.deaths or barrier.rejections or barrier.ready_after is None:
        third = f"3. This is not what the barrier promises: {barrier.last_words or 'see the table'}"
    else:
        times = "once" if barrier.load_dispatches == 1 else f"{barrier.load_dispatches} times"
        third = f"3. LoadModel went out {times}, when every rank was connected, and nothing had to be refused."
    return [first, second, third]


# --- the planner that polls -----------------------------------------------------------------------------------------------

_ORDER = ("Idle", "Connecting", "Connected", "Loading", "Loaded", "WarmingUp", "Ready")
_NEXT: Mapping[Kind, str] = {"ConnectToGroup": "Idle", "LoadModel": "Connected", "StartWarmup": "Loaded"}


def due_tasks(
    view: Mapping[int, str], sent: Mapping[tuple[Kind, int], float], now: float, world_size: int = WORLD_SIZE
) -> list[tuple[Kind, list[int]]]:
    """What a planner sends that takes the table of statuses for the truth: pure, and as careful as the table allows.

    A rank gets its next task when the table says that it is due and that all others have come at least as far (exo's rule for LoadModel,
    here for every task), and not again within `RESEND` seconds.

    Args:
        view: the table: the last status that each rank wrote.
        sent: when each task was last sent to each rank, in seconds.
        now: in seconds.
        world_size: number of ranks; a rank that is missing from the table holds everything up.
    """
    due: list[tuple[Kind, list[int]]] = []
    for kind, entry in _NEXT.items():
        if any(view.get(rank, "") not in _ORDER[_ORDER.index(entry) :] for rank in range(world_size)):
            continue
        ranks = [
            rank
            for rank in range(world_size)
            if view[rank] == entry and now - sent.get((kind, rank), float("-inf")) >= RESEND
        ]
        if ranks:
            due.append((kind, ranks))
    return due


class _PollingPlanner:
    """Polls the table, sends what is due; `send` puts a task on its way, `trouble` says that it is time to begin anew."""

    def __init__(
        self,
        read: Callable[[], Awaitable[Mapping[int, str]]],
        send: Callable[[Kind, list[int]], Awaitable[None]],
        begin_anew_if_need_be: Callable[[], Awaitable[bool]],
    ) -> None:
        self._read = read
        self._send = send
        self._begin_anew_if_need_be = begin_anew_if_need_be
        self.load_dispatches = 0

    async def until_ready(self) -> None:
        """Returns when the table says Ready of all ranks."""
        clock = asyncio.get_running_loop().time
        sent: dict[tuple[Kind, int], float] = {}
        while True:
            view = await self._read()
            if len(view) == WORLD_SIZE and set(view.values()) == {"Ready"}:
                return
            if await self._begin_anew_if_need_be():
                sent.clear()
                continue
            for kind, ranks in due_tasks(view, sent, clock()):
                self.load_dispatches += kind == "LoadModel"
                sent.update({(kind, rank): clock() for rank in ranks})
                await self._send(kind, ranks)
            await asyncio.sleep(POLL)


# --- what the runs share --------------------------------------------------------------------------------------------------


class _Run:
    """One run: its processes, what became of them, and the accident that befalls rank `KILLED`."""

    def __init__(self, title: str, programs: Sequence[Program], say: Say) -> None:
        self.title = title
        self.deaths = 0
        self.last_words = ""
        self._say = say
        self._began: float | None = None
        self._accident = False
        restarts = Restarts(first_pause=DOWN, longest_pause=DOWN, most=RESTARTS)
        self.launcher = Launcher(programs, restarts=restarts, on_change=self._changed)

    @property
    def seconds(self) -> float:
        """Since the planner began; 0 before."""
        now = asyncio.get_running_loop().time()
        return 0.0 if self._began is None else now - self._began

    async def bring_up(
        self, ready: Coroutine[Any, Any, None], status_of_killed: Callable[[], Awaitable[str]]
    ) -> float | None:
        """Wait for `ready`, while the accident happens; the seconds it took, or ``None`` where it never came."""
        self._began = asyncio.get_running_loop().time()
        accident = asyncio.create_task(self._suffer(status_of_killed))
        try:
            return await self._until(ready)
        finally:
            await _cancelled(accident)

    def tell(self, what: str) -> None:
        """One line of what happens, with the time."""
        self._say(f"  {self.seconds:5.1f} s  {what}")

    async def _suffer(self, status_of: Callable[[], Awaitable[str]]) -> None:
        """Kill rank `KILLED` as soon as it has said Connected."""
        while await status_of() != "Connected":
            await asyncio.sleep(0.01)
        pid = self.launcher.states[KILLED].pid
        if pid is None:
            raise RankgateError(f"the process of rank {KILLED} was gone before it could be killed")
        self._accident = True
        os.kill(pid, signal.SIGKILL)
        self.tell(f"rank {KILLED} is connected; its process is killed, and comes back in {DOWN:g} s")

    def _changed(self, state: ProcessState) -> None:
        if state.phase not in ("pausing", "given up") or not state.last_exit:
            return
        if self._accident and state.last_exit == exit_sentence(-signal.SIGKILL):
            self._accident = False
            return
        self.deaths += 1
        self.last_words = self.last_words or state.last_words
        self.tell(f"{state.program.name} died ({state.last_exit}): {state.last_words}")
        if state.phase == "given up":
            self.tell(f"{state.program.name} is not started again: its supervisor mends {RESTARTS} death in a row")

    async def _until(self, ready: Coroutine[Any, Any, None]) -> float | None:
        waiting = asyncio.create_task(ready)
        hopeless = asyncio.create_task(self.launcher.given_up())
        try:
            await asyncio.wait({waiting, hopeless}, timeout=LIMIT, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                self.tell("not Ready, and never will be" if hopeless.done() else f"not Ready within {LIMIT:g} s")
                return None
            try:
                waiting.result()
            except InstanceFailed as failure:
                self.tell(str(failure))
                return None
            self.tell("all ranks are Ready")
            return self.seconds
        finally:
            for task in (waiting, hopeless):
                task.cancel()
            await asyncio.gather(waiting, hopeless, return_exceptions=True)


def _programs(role: Role, instance: str, url: str) -> list[Program]:
    """One process for every rank."""
    return [
        Program(
            name=f"rank {rank}",
            # -P: nothing in the working directory is imported by surprise.
            command=(sys.executable, "-P", "-m", __name__, role, instance, str(rank), str(os.getpid())),
            environment={**own_environment(), "RANKGATE_REDIS": url},
            ranks=range(rank, rank + 1),
        )
        for rank in range(WORLD_SIZE)
    ]


def _engine_config(rank: int) -> SimulatedConfig:
    """The same delays in every run."""
    return SimulatedConfig(
        connect_seconds=CONNECT + (HELD_BACK if rank == LATE else 0.0),
        layer_seconds=0.05,
        warmup_seconds=0.1,
        jitter=0.0,
    )


def _engine(rank: int) -> SimulatedEngine:
    return SimulatedEngine(_engine_config(rank), rank=rank, world_size=WORLD_SIZE)


def _table_key(keys: Keys) -> str:
    """Hash: the table of statuses, one field a rank. A rank's last word stays until the next one, as it does in memory."""
    return f"{keys.tag}:race-statuses"


def _inbox_key(keys: Keys, rank: int) -> str:
    """List: tasks for a rank; they wait there for a process that is down."""
    return f"{keys.tag}:race-inbox:{rank}"


async def _read_table(store: Store, keys: Keys) -> dict[int, str]:
    with store.errors():
        found: dict[bytes, bytes] = await store.commands.hgetall(_table_key(keys))
    return {int(rank): status.decode() for rank, status in found.items()}


async def _status_in_table(store: Store, keys: Keys, rank: int) -> str:
    return (await _read_table(store, keys)).get(rank, "")


async def _until_all_are_here(store: Store, keys: Keys) -> None:
    """Wait until every process has come up, which takes as long as an interpreter does to start and is no part of the race."""
    async with asyncio.timeout(LIMIT):
        while len(await _read_table(store, keys)) < WORLD_SIZE:
            await asyncio.sleep(0.02)


def make_task(kind: Kind, instance: str, epoch: EpochId, term: int) -> Task:
    """A task with a name of its own, as a planner makes it that does not derive names from steps."""
    common = {"task_id": f"{kind}-{uuid.uuid4().hex}", "instance": instance, "epoch": str(epoch), "term": term}
    match kind:
        case "ConnectToGroup":
            return ConnectToGroup.model_validate({**common, "coordinator": "", "rank_order": ("",) * WORLD_SIZE})
        case "LoadModel":
            return LoadModel.model_validate({**common, "model": MODEL})
        case "StartWarmup":
            return StartWarmup.model_validate(common)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def _send(store: Store, keys: Keys, kind: Kind, ranks: Sequence[int], epoch: EpochId, term: int) -> None:
    """Put a task into the inboxes of some ranks."""
    with store.errors():
        async with store.commands.pipeline(transaction=True) as pipe:
            for rank in ranks:
                pipe.rpush(_inbox_key(keys, rank), encode(make_task(kind, keys.group, epoch, term)))
                pipe.expire(_inbox_key(keys, rank), _LIFETIME)
            await pipe.execute()


def _ranks(ranks: Sequence[int]) -> str:
    return "all ranks" if len(ranks) == WORLD_SIZE else ", ".join(f"rank {rank}" for rank in ranks)


async def _tasks_for(store: Store, keys: Keys, rank: int) -> AsyncGenerator[Task]:
    """What comes into a rank's inbox, one after another."""
    reader = store.reader()
    try:
        while True:
            with store.errors():
                popped: tuple[bytes, bytes] | None = await reader.blpop([_inbox_key(keys, rank)], timeout=1)
            if popped is not None:
                yield decode_task(popped[1])
    finally:
        await reader.aclose()


# --- run 1 ----------------------------------------------------------------------------------------------------------------


async def _stale_and_fragile(store: Store, url: str, say: Say) -> RunFigures:
    title = "stale statuses, fragile runner"
    say(f"1. {title}")
    keys = Keys("rankgate", "race-fragile")
    run = _Run(title, _programs("fragile", keys.group, url), say)
    nowhere = EpochId(0, "0" * 32)  # these runners know no epochs

    async def send(kind: Kind, ranks: list[int]) -> None:
        run.tell(f"{kind} to {_ranks(ranks)}")
        await _send(store, keys, kind, ranks, nowhere, 0)

    async def is_refused() -> bool:
        return False

    planner = _PollingPlanner(lambda: _read_table(store, keys), send, is_refused)
    async with run.launcher:
        await _until_all_are_here(store, keys)
        ready_after = await run.bring_up(planner.until_ready(), lambda: _status_in_table(store, keys, KILLED))
    return RunFigures(title, planner.load_dispatches, None, run.deaths, ready_after, run.last_words)


class FragileRunner:
    """A runner as exo's is: it takes one task after another, and raises when one comes out of state.

    Args:
        rank: which rank this is.
        engine: what it drives.
    """

    def __init__(self, rank: int, engine: Engine) -> None:
        self.status: RunnerStatus = RunnerIdle()
        self._rank = rank
        self._engine = engine

    async def handle(self, task: Task) -> None:
        """Do it.

        Raises:
            ValueError: the task does not fit the status; nobody catches it, and the process dies.
        """
        match task, self.status:
            case ConnectToGroup(), RunnerIdle():
                self.status = RunnerConnecting()
                await self._engine.connect(EngineGroup(self._rank, WORLD_SIZE, task.coordinator, task.rank_order))
                self.status = RunnerConnected()
            case LoadModel(), RunnerConnected():
                async for layers in self._engine.load(task.model):
                    self.status = RunnerLoading(layers_loaded=layers, total_layers=task.model.total_layers)
                self.status = RunnerLoaded()
            case StartWarmup(), RunnerLoaded():
                self.status = RunnerWarmingUp()
                await self._engine.warm_up()
                self.status = RunnerReady()
            case _:
                current = f"{type(self.status).__name__}()"
                raise ValueError(f"Received {task.kind} outside of state machine in current_status={current}")


async def _serve_fragile(runner: FragileRunner, store: Store, keys: Keys, rank: int) -> None:
    async with aclosing(_tasks_for(store, keys, rank)) as tasks:
        async for task in tasks:
            await runner.handle(task)


# --- run 2 ----------------------------------------------------------------------------------------------------------------


async def _stale_and_graceful(store: Store, url: str, say: Say) -> RunFigures:
    title = "stale statuses, refusing runner"
    say(f"2. {title}")
    keys = Keys("rankgate", "race-graceful")
    run = _Run(title, _programs("graceful", keys.group, url), say)
    async with Barrier(store, keys.group, world_size=WORLD_SIZE) as barrier, run.launcher:
        await _until_all_are_here(store, keys)
        current = await _open(barrier)
        seen = forgiven = 0

        async def send(kind: Kind, ranks: list[int]) -> None:
            run.tell(f"{kind} to {_ranks(ranks)}")
            term = barrier.leadership.term if barrier.leadership else 0
            await _send(store, keys, kind, ranks, current, term)

        async def begin_anew_if_need_be() -> bool:
            nonlocal current, seen, forgiven
            refused = _rejections(await read_history(store, keys))
            for sentence in refused[seen:]:
                run.tell(sentence)
            seen = len(refused)
            if seen - forgiven < PATIENCE:
                return False
            reason = f"refused {seen - forgiven} times"
            forgiven = seen
            run.tell(f"{reason}; all ranks begin anew")
            await barrier.lead()
            await barrier.conclude(current, Verdict.aborted(reason))
            current = await _open(barrier)
            return True

        planner = _PollingPlanner(lambda: _read_table(store, keys), send, begin_anew_if_need_be)
        ready_after = await run.bring_up(planner.until_ready(), lambda: _status_in_table(store, keys, KILLED))
        history = await read_history(store, keys)
    return RunFigures(
        title,
        planner.load_dispatches,
        len(history.rejections),
        run.deaths,
        ready_after,
        run.last_words,
        len(find_breaches(history)),
    )


async def _open(barrier: Barrier) -> EpochId:
    """Open an epoch, which takes a live report of every rank, and waits for it."""
    while True:
        await barrier.lead()
        outcome = await barrier.open(WORLD_SIZE, timeout=LIMIT)
        if isinstance(outcome, Opened):
            return outcome.epoch
        await asyncio.sleep(POLL)


async def _forward(store: Store, member: Member, rank: int) -> None:
    """Put what comes into a rank's inbox into the task log, where rankgate's runner reads: a plain XADD that asks no gate."""
    while not member.trusted:  # it reads the log from the moment at which it has its rank
        await asyncio.sleep(0.02)
    keys = member.keys
    async with aclosing(_tasks_for(store, keys, rank)) as tasks:
        async for task in tasks:
            epoch = EpochId.parse(task.epoch)
            fields: dict[str, str | bytes | int] = {
                "kind": "task",
                "nonce": epoch.nonce,
                "prev": 0,
                "term": task.term,
                "step": task.kind,
                "to": f"{rank}-{rank}",
                "task": encode(task),
            }
            with (
                suppress(StoreCorrupt),
                store.errors(),
            ):  # the log has gone on to a later epoch: this task is too late for it
                await store.commands.xadd(keys.tasks, fields, id=f"{epoch.number}-*")


def _rejections(history: History) -> list[str]:
    """Every refusal, as a sentence."""
    return [f"rank {rank} refused {why.task_kind} ({why.code}): {why.hint}" for rank, why in history.rejections]


# --- run 3 ----------------------------------------------------------------------------------------------------------------


async def _with_barrier(store: Store, url: str, say: Say) -> RunFigures:
    title = "the barrier, refusing runner"
    say(f"3. {title}")
    spec = InstanceSpec(name="race-barrier", world_size=WORLD_SIZE, model=MODEL)
    keys = Keys("rankgate", spec.name)
    run = _Run(title, [_barrier_program(rank, spec.name, url) for rank in range(WORLD_SIZE)], say)
    async with Barrier(store, spec.name, world_size=WORLD_SIZE) as looker, run.launcher:

        async def status_of_killed() -> str:
            report = (await looker.inspect()).ranks[KILLED].report
            return report.status if report else ""

        async with asyncio.timeout(LIMIT):
            while not all(view.report for view in (await looker.inspect()).ranks):
                await asyncio.sleep(0.02)
        async with Planner(store) as planner:
            instance = await planner.launch(spec, wait=False)
            telling = asyncio.create_task(_tell_history(store, keys, run))
            try:
                ready_after = await run.bring_up(instance.ready(), status_of_killed)
            finally:
                await _cancelled(telling)
            history = await read_history(store, keys)
            with suppress(InstanceFailed, StoreError):  # the figures stand, and the processes end with this block
                await instance.stop()
    loads = [e for e in history.events if isinstance(e, StepDispatched) and kind_of(e.step) == "LoadModel"]
    return RunFigures(
        title,
        len(loads),
        len(history.rejections),
        run.deaths,
        ready_after,
        run.last_words,
        len(find_breaches(history)),
    )


def _barrier_program(rank: int, instance: str, url: str) -> Program:
    """`rankgate runner`, as anybody starts it."""
    arguments = [
        *("--instance", instance),
        *("--rank", str(rank)),
        *("--world-size", str(WORLD_SIZE)),
        *("--lease", repr(SETTINGS.lease)),
        *("--heartbeat", repr(SETTINGS.heartbeat)),
        *("--engine-config", _engine_config(rank).model_dump_json(exclude_defaults=True)),
        "--inline-engine",
        *("--log", "ERROR"),
        *("--parent", str(os.getpid())),
    ]
    return Program(
        name=f"rank {rank}",
        command=own_command("runner", *arguments),
        environment={**own_environment(), "RANKGATE_REDIS": url},
        ranks=range(rank, rank + 1),
    )


async def _tell_history(store: Store, keys: Keys, run: _Run) -> None:
    """Tell what the planner does, from the history that the store keeps of it."""
    told = 0
    while True:
        events = (await read_history(store, keys)).events
        for event in events[told:]:
            match event:
                case EpochOpened():
                    run.tell(f"attempt {event.ordinal} begins")
                case EpochConcluded():
                    run.tell(f"{event.verdict}")
                case StepDispatched():
                    run.tell(f"{kind_of(event.step)} to {_ranks(range(event.first, event.last + 1))}")
                case _:
                    pass
        told = len(events)
        await asyncio.sleep(POLL)


# --- the processes of runs 1 and 2 ----------------------------------------------------------------------------------------


async def _publish(store: Store, keys: Keys, rank: int, status: Callable[[], str]) -> None:
    """Write the rank's status into the table, again and again."""
    while True:
        with store.errors():
            async with store.commands.pipeline(transaction=True) as pipe:
                pipe.hset(_table_key(keys), str(rank), status())
                pipe.expire(_table_key(keys), _LIFETIME)
                await pipe.execute()
        await asyncio.sleep(PUBLISH)


async def _run_process(role: Role, keys: Keys, rank: int, url: str) -> None:
    store = await connect(url, settings=SETTINGS)
    try:
        serving: tuple[Coroutine[Any, Any, None], ...]
        if role == "fragile":
            fragile = FragileRunner(rank, _engine(rank))
            serving, status = (_serve_fragile(fragile, store, keys, rank),), lambda: fragile.status.kind
        else:
            member = Member(store, keys.group, rank=rank, world_size=WORLD_SIZE)
            runner = Runner(member, InlineHost(lambda: _engine(rank), rank=rank))
            serving, status = (runner.run(), _forward(store, member, rank)), lambda: runner.status.kind
        tasks = [asyncio.create_task(one) for one in (*serving, _publish(store, keys, rank, status))]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # raises what ended this process
    finally:
        await store.close()


def _main(role: str, instance: str, rank: str, parent: str) -> None:
    """One runner's process."""
    leave_with_parent(int(parent))
    logger.remove()  # what has to be told, the race tells
    if role not in ("fragile", "graceful"):
        raise ValueError(f"{role!r} is no runner of the race")
    keys = Keys("rankgate", instance)
    asyncio.run(_run_process(role, keys, int(rank), os.environ.pop("RANKGATE_REDIS")))


if __name__ == "__main__":
    _main(*sys.argv[1:])

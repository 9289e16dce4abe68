"""The faults of the chaos runs. The driver injects a fault, lets it last for a while, and lifts it. A fault says which ranks it has touched."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import signal
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil
from redis.exceptions import RedisError, ResponseError

from barrier import StoreError
from barrier.store.keys import NamespaceKeys
from barrier.testing import wait_until
from planner.explain import is_serving
from runner.messages import MAX_MESSAGE_BYTES, ConnectToGroup, LoadModel, StartWarmup, derive_task_id, encode
from tests.chaos.network import CUTS
from tests.chaos.recorder import MARK
from tests.chaos.sites import Single, Watched, client_of
from tests.chaos.world import NAMESPACE, SETTINGS, Group, World
from tests.integration.cluster import Process

LEASE = SETTINGS.lease
_SECONDS = 30.0
"""A bound for hangs, not a measure."""


@dataclass(frozen=True, slots=True)
class Injected:
    """One fault that took effect.

    Attributes:
        kind: which.
        world: where.
        instance: whose; empty for all of the world.
        ranks: which of its ranks; empty for all.
        began: wall clock, in seconds, which is also the servers' clock.
        ended: when it was lifted: what it had stopped goes on, what it had killed was started again.
        machine: whether every world on the machine feels it.
        slow: by how many seconds an attempt takes longer for it.
        note: what else is worth knowing.
    """

    kind: str
    world: str
    instance: str
    ranks: tuple[int, ...]
    began: float
    ended: float
    machine: bool = False
    slow: float = 0.0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Effect:
    """What a fault says of itself; ``None`` instead where it found nothing to break."""

    instance: str = ""
    ranks: tuple[int, ...] = ()
    kind: str = ""
    slow: float = 0.0
    note: str = ""


Inject = Callable[[World, random.Random], Awaitable[Effect | None]]


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: for the table.
        weight: how often it is drawn, against the others'.
        inject: does it, and lifts it.
        fits: whether a world can have it.
        forgets: whether the store loses something that was acknowledged.
        machine: see `Injected`.
    """

    name: str
    weight: float
    inject: Inject
    fits: Callable[[World], bool] = lambda _: True
    forgets: bool = False
    machine: bool = False


def _victim(world: World, rng: random.Random) -> tuple[Group, int]:
    group = rng.choice(world.groups)
    return group, rng.randrange(group.size)


def _signal(process: Process, number: signal.Signals) -> bool:
    """Whether it was there to be signalled."""
    if not process.running:
        return False
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def _killed(world: World, process: Process) -> bool:
    """Kill a process, unless another fault has done so; whoever kills it starts its successor."""
    if process.pid in world.expected or not process.running:
        return False
    world.expected.add(process.pid)
    return _signal(process, signal.SIGKILL)


# --- processes ------------------------------------------------------------------------------------------------------------


async def kill_runner(world: World, rng: random.Random) -> Effect | None:
    group, rank = _victim(world, rng)
    pause = rng.uniform(0, LEASE)
    process = group.processes[rank]
    if rank in group.contested or not _killed(world, process):
        return None
    await asyncio.sleep(pause)
    await world.start_runner(group, rank)
    return Effect(group.name, (rank,))


async def kill_engine(world: World, rng: random.Random) -> Effect | None:
    group, rank = _victim(world, rng)
    return Effect(group.name, (rank,)) if _kill_engine(world, group, rank) else None


def _kill_engine(world: World, group: Group, rank: int) -> bool:
    engine = world.engine_of(group.processes[rank])
    if engine is None:
        return False
    try:
        engine.kill()
    except psutil.NoSuchProcess:
        return False
    return True


async def stop_runner(world: World, rng: random.Random) -> Effect | None:
    group, rank = _victim(world, rng)
    seconds = LEASE * rng.uniform(1.1, 2.5)
    if rank in group.contested:
        return None
    return Effect(group.name, (rank,)) if await _stopped(group.processes[rank], seconds) else None


async def stop_runner_briefly(world: World, rng: random.Random) -> Effect | None:
    group, rank = _victim(world, rng)
    seconds = LEASE * rng.uniform(0.3, 0.9)
    if rank in group.contested:
        return None
    return Effect(group.name, (rank,)) if await _stopped(group.processes[rank], seconds) else None


async def _stopped(process: Process, seconds: float) -> bool:
    if not _signal(process, signal.SIGSTOP):
        return False
    try:
        await asyncio.sleep(seconds)
    finally:
        _signal(process, signal.SIGCONT)
    return True


async def replace_runner(world: World, rng: random.Random) -> Effect | None:
    """F5: a rank is stopped, its replacement takes the rank over, and then it comes back. One of the two must leave by itself.

    That is the old one, unless the store has forgotten who holds the rank: then whoever claims it first keeps it.
    """
    group, rank = _victim(world, rng)
    old = group.processes[rank]
    if rank in group.contested or old.pid in world.expected or not _signal(old, signal.SIGSTOP):
        return None
    group.contested.add(rank)
    world.expected.add(old.pid)
    world.replaced.add(old.pid)
    try:
        await asyncio.sleep(LEASE * rng.uniform(0.9, 1.5))
        new = await world.start_runner(group, rank)
        world.expected.add(new.pid)
        world.replaced.add(new.pid)
        await wait_until(lambda: "this is rank" in new.log(100) or not new.running, "the replacement", _SECONDS)
        _signal(old, signal.SIGCONT)
        try:
            await wait_until(
                lambda: not (old.running and new.running),
                f"{old.name} (pid {old.pid}) or its replacement (pid {new.pid}) to leave",
                _SECONDS,
            )
        except AssertionError:
            for one in (old, new):  # one of the two hangs: its log is to say where
                _signal(one, signal.SIGUSR1)
            raise
        stays, leaves = (old, new) if old.running else (new, old)
        if not stays.running:
            raise AssertionError(f"both processes of {old.name} have left: {old.log(3)} | {new.log(3)}")
        group.processes[rank] = stays
        if stays is old and "no answer from the store" in new.log(100):
            world.doubtful.add(old.pid)  # the store may have the claim of the new one: then the old one leaves, too
        world.expected.discard(stays.pid)
        if leaves.code != 1:
            raise AssertionError(f"{leaves.name} (pid {leaves.pid}) ended with {leaves.code}: {leaves.log(3)}")
    finally:
        _signal(old, signal.SIGCONT)
        group.contested.discard(rank)
    return Effect(group.name, (rank,), note="" if stays is new else "the store had forgotten who holds the rank")


async def slow_rank(world: World, rng: random.Random) -> Effect | None:
    """Its next load takes two to four leases, but it moves; the engine's end is what makes it load again."""
    group, rank = _victim(world, rng)
    seconds = LEASE * rng.uniform(2, 4)
    world.order(group, rank, "load", "slow", seconds)
    other = rng.randrange(group.size)
    if not _kill_engine(world, group, other):
        return None
    return Effect(group.name, (rank, other), slow=seconds)


async def fail_engine(world: World, rng: random.Random) -> Effect | None:
    """The next engine of a rank raises, or dies, in a phase of its bring-up."""
    group, rank = _victim(world, rng)
    action = rng.choice(["raise", "die"])
    world.order(group, rank, rng.choice(["connect", "load", "warm"]), action)
    other = rng.randrange(group.size)
    if not _kill_engine(world, group, other):
        return None
    return Effect(group.name, (rank, other))


async def refuse_for_good(world: World, rng: random.Random) -> Effect | None:
    """The next engine of a rank says that trying again cannot help: the instance must be given up, and say why."""
    group, rank = _victim(world, rng)
    if group.refusing:
        return None
    other = rng.randrange(group.size)
    if world.engine_of(group.processes[other]) is None:
        return None
    group.refusing.add(rank)
    world.order(group, rank, "load", "refuse")
    _kill_engine(world, group, other)
    return Effect(group.name, (rank, other))


async def starve_rank(world: World, rng: random.Random) -> Effect | None:
    """A rank is given no processor while others are busy: SCHED_IDLE for it, a busy process for each processor."""
    group, rank = _victim(world, rng)
    return Effect(group.name, (rank,)) if await _starved(group.processes[rank], LEASE * rng.uniform(0.8, 1.6)) else None


async def starve_planner(world: World, rng: random.Random) -> Effect | None:
    process = rng.choice(world.planners)
    return Effect() if await _starved(process, LEASE * rng.uniform(0.8, 1.6)) else None


async def _starved(process: Process, seconds: float) -> bool:
    try:
        threads = [thread.id for thread in psutil.Process(process.pid).threads()]
        for thread in threads:
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False
    busy = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            "-ISc",
            f"import time\nend = time.monotonic() + {seconds}\nwhile time.monotonic() < end: pass",
        )
        for _ in range(os.cpu_count() or 1)
    ]
    try:
        await asyncio.gather(*(one.wait() for one in busy))
    finally:
        for one in busy:
            if one.returncode is None:
                one.kill()
        for thread in threads:
            with suppress(ProcessLookupError):
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
    return True


async def stray_tasks(world: World, rng: random.Random) -> Effect | None:
    """Tasks out of state, as a planner without a barrier sends them: too late, twice, of another attempt, or no task at all."""
    group = rng.choice(world.groups)
    kinds = rng.choices(_STRAYS, k=rng.randint(2, 6))
    try:
        snapshot = await group.barrier.inspect()
    except StoreError:
        return None
    epoch = snapshot.epoch
    # While all serve nothing of this can be accepted. Before that a stray task may be just what a rank waits for.
    if epoch is None or not is_serving(snapshot) or snapshot.log_end.number != epoch.id.number:
        return None
    end = snapshot.log_end.n
    async with client_of(await world.site.server()) as client, client.pipeline(transaction=True) as pipe:
        for place, kind in enumerate(kinds, end + 1):
            pipe.xadd(
                group.recorder.keys.tasks,
                {
                    "kind": "nonsense" if kind == "another entry" else "task",
                    "nonce": epoch.id.nonce,
                    "prev": place - 1,
                    "term": epoch.term,
                    "step": f"stray {kind}",
                    "to": f"0-{group.size - 1}",
                    "task": _stray(kind, group, str(epoch.id), epoch.term, secrets.token_hex(4)),
                },
                id=f"{epoch.id.number}-{place}",
            )
        try:
            await pipe.execute()
        except ResponseError:  # the log went on meanwhile, and takes none of them
            return None
    group.strays += len(kinds)
    return Effect(group.name, note=", ".join(kinds))


_STRAYS = (
    "load",
    "load once more",
    "connect",
    "warm up",
    "of another attempt",
    "garbage",
    "oversized",
    "another entry",
)


def _stray(kind: str, group: Group, epoch: str, term: int, salt: str) -> bytes:
    task_id, name, model = f"stray.{salt}", group.name, group.spec.model
    match kind:
        case "load once more":
            task_id = derive_task_id(name, epoch, "load")
            return encode(LoadModel(task_id=task_id, instance=name, epoch=epoch, term=term, model=model))
        case "connect":
            return encode(ConnectToGroup(task_id=task_id, instance=name, epoch=epoch, term=term, deadline=60.0))
        case "warm up":
            return encode(StartWarmup(task_id=task_id, instance=name, epoch=epoch, term=term))
        case "of another attempt":
            return encode(LoadModel(task_id=task_id, instance=name, epoch=f"1-{'0' * 32}", term=term, model=model))
        case "garbage":
            return b'{"kind": "LoadModel", '
        case "oversized":
            return b"x" * (MAX_MESSAGE_BYTES + 1)
        case _:
            return encode(LoadModel(task_id=task_id, instance=name, epoch=epoch, term=term, model=model))


# --- planners -------------------------------------------------------------------------------------------------------------


async def kill_planner(world: World, rng: random.Random) -> Effect | None:
    place, pause = rng.randrange(len(world.planners)), rng.uniform(0, LEASE)
    async with world.planner_lock:
        if not world.other_planner_knows(place) or not _killed(world, world.planners[place]):
            return None
        await asyncio.sleep(pause)
        world.planners[place] = await world.start_planner()
    return Effect()


async def stop_planner(world: World, rng: random.Random) -> Effect | None:
    """Longer than its lease: where it led, there are two then that believe it."""
    place, seconds = rng.randrange(len(world.planners)), LEASE * rng.uniform(1.2, 2.5)
    async with world.planner_lock:
        before = [await world.leader_of(group) for group in world.groups]
        if not _signal(world.planners[place], signal.SIGSTOP):
            return None
        try:
            await asyncio.sleep(seconds)
            after = [await world.leader_of(group) for group in world.groups]
        finally:
            _signal(world.planners[place], signal.SIGCONT)
    succeeded = any(old and new and old != new for old, new in zip(before, after, strict=True))
    return Effect(kind="two planners that both believe they lead" if succeeded else "")


# --- the store ------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _outage(world: World) -> AsyncGenerator[None]:
    """One fault of the store at a time; whoever starts while it lasts may be refused."""
    async with world.store_lock:
        world.outage += 1
        try:
            yield
        finally:
            world.outage -= 1
            world.outage_ended = time.monotonic()


async def restart_with_data(world: World, rng: random.Random) -> Effect | None:
    return await _restart(world, rng, keep_data=True)


async def restart_empty(world: World, rng: random.Random) -> Effect | None:
    return await _restart(world, rng, keep_data=False)


async def _restart(world: World, rng: random.Random, *, keep_data: bool) -> Effect:
    down = LEASE * rng.uniform(0.2, 1.5)
    async with _outage(world):
        server = await world.site.server()
        for group in world.groups:
            group.recorder.forgets = world.site.forgets or not keep_data
        server.kill()
        await asyncio.sleep(down)
        await server.restart(keep_data=keep_data)
        for group in world.groups:
            group.recorder.forgets = world.site.forgets
    return Effect()


async def flush(world: World, rng: random.Random) -> Effect | None:
    del rng
    async with (
        _outage(world),
        client_of(await world.site.server()) as client,
        client.pipeline(transaction=True) as pipe,
    ):
        pipe.flushall()
        _mark(world, pipe)
        await pipe.execute()
    return Effect()


def _mark(world: World, pipe: Any) -> None:
    """Say in every instance's history, in the same step, that something is gone."""
    for group in world.groups:
        pipe.xadd(group.recorder.keys.events, {MARK: b"the store forgot"})
        pipe.pexpire(group.recorder.keys.events, round(SETTINGS.record_lifetime * 1000))


async def delete_keys(world: World, rng: random.Random) -> Effect | None:
    """One to three keys of one instance; the deleted ones are in the note."""
    group = rng.choice(world.groups)
    keys = group.recorder.keys
    candidates = [
        *(keys.epoch, keys.leader, keys.tasks, keys.signals, keys.events, NamespaceKeys(NAMESPACE).instances),
        *(keys.rank(rank) for rank in range(group.size)),
        *(keys.claim(rank) for rank in range(group.size)),
    ]
    chosen = rng.sample(candidates, rng.randint(1, 3))
    async with (
        _outage(world),
        client_of(await world.site.server()) as client,
        client.pipeline(transaction=True) as pipe,
    ):
        pipe.delete(*chosen)
        _mark(world, pipe)
        deleted, *_ = await pipe.execute()
    return Effect(note=", ".join(chosen)) if deleted else None


async def flush_scripts(world: World, rng: random.Random) -> Effect | None:
    """Again and again for a while, so that it also falls between a check and a call."""
    until = time.monotonic() + LEASE * rng.uniform(0.2, 1)
    async with _outage(world), client_of(await world.site.server()) as client:
        while time.monotonic() < until:
            await client.script_flush()
            await asyncio.sleep(0.02)
    return Effect()


async def pause_clients(world: World, rng: random.Random) -> Effect | None:
    seconds, all_commands = LEASE * rng.uniform(0.3, 2), rng.random() < 0.5
    async with _outage(world):
        async with client_of(await world.site.server()) as client:
            await client.execute_command("CLIENT", "PAUSE", round(seconds * 1000), "ALL" if all_commands else "WRITE")
        await asyncio.sleep(seconds)
    return Effect()


async def sleep_server(world: World, rng: random.Random) -> Effect | None:
    seconds = LEASE * rng.uniform(0.3, 2)
    if isinstance(world.site, Watched):
        seconds = min(seconds, 0.3)  # longer, and the sentinels take it for dead, which is another fault
    async with _outage(world), client_of(await world.site.server()) as client:
        await client.execute_command("DEBUG", "SLEEP", f"{seconds:.3f}")
    return Effect()


async def stop_server(world: World, rng: random.Random) -> Effect | None:
    seconds = LEASE * rng.uniform(0.5, 2)
    async with _outage(world):
        server = await world.site.server()
        server.pause()
        try:
            await asyncio.sleep(seconds)
        finally:
            server.resume()
    return Effect()


async def out_of_memory(world: World, rng: random.Random) -> Effect | None:
    """Just as much memory as is used now; what does not fit any more is refused."""
    seconds = LEASE * rng.uniform(0.5, 1.5)
    async with _outage(world):
        # The same one afterwards, also if the sentinels have made another one the master.
        url = await world.site.server()
        async with client_of(url) as client:
            used = (await client.info("memory"))["used_memory"]
            await client.config_set("maxmemory", used + rng.randint(0, 4_000))
        try:
            await asyncio.sleep(seconds)
        finally:
            async with client_of(url) as client:
                refused = (await client.info("errorstats")).get("errorstat_OOM", {"count": 0})["count"]
                await client.config_set("maxmemory", 0)
                await client.execute_command("CONFIG", "RESETSTAT")
    return Effect(note=f"{refused} commands refused") if refused else None


async def fail_over_with_loss(world: World, rng: random.Random) -> Effect | None:
    async with _outage(world):
        assert isinstance(world.site, Watched)
        lost = await world.site.lose_writes_and_fail_over(LEASE * rng.uniform(0.1, 1.5))
    return Effect(
        kind="failover that lost acknowledged writes" if lost > 0 else "failover after a crash",
        note=f"{lost} bytes of acknowledged writes lost",
    )


async def fail_over(world: World, rng: random.Random) -> Effect | None:
    del rng
    async with _outage(world):
        assert isinstance(world.site, Watched)
        await world.site.fail_over()
    return Effect()


# --- the network ----------------------------------------------------------------------------------------------------------


async def cut_off(world: World, rng: random.Random) -> Effect | None:
    """The one rank that has a network of its own."""
    network, cut, seconds = world.network, rng.choice(CUTS), LEASE * rng.uniform(0.5, 2.5)
    if network is None:
        return None
    group = world.groups[0]
    world.outage += 1
    await network.cut(cut)
    try:
        await asyncio.sleep(seconds)
    finally:
        await network.mend()
        world.outage -= 1
        world.outage_ended = time.monotonic()
    return Effect(group.name, (group.size - 1,), kind=f"partition, {cut}")


# --- the table ------------------------------------------------------------------------------------------------------------


def _single(world: World) -> bool:
    return isinstance(world.site, Single)


def _durable(world: World) -> bool:
    return isinstance(world.site, Single) and world.site.aof


def _watched(world: World) -> bool:
    return isinstance(world.site, Watched)


FAULTS: tuple[Fault, ...] = (
    Fault("SIGKILL of a runner", 8, kill_runner),
    Fault("SIGKILL of an engine", 8, kill_engine),
    Fault("SIGSTOP of a runner past its lease", 5, stop_runner),
    Fault("SIGSTOP of a runner within its lease", 3, stop_runner_briefly),
    Fault("a runner comes back after its replacement", 3, replace_runner),
    Fault("slow rank", 3, slow_rank),
    Fault("engine fails while it comes up", 4, fail_engine),
    Fault("engine refuses for good", 1.5, refuse_for_good),
    Fault("processor starvation of a rank", 1, starve_rank, machine=True),
    Fault("processor starvation of a planner", 0.5, starve_planner, machine=True),
    Fault("tasks out of state", 4, stray_tasks),
    Fault("SIGKILL of a planner", 5, kill_planner),
    Fault("SIGSTOP of a planner past its lease", 4, stop_planner),
    Fault("server killed, restarted with its data", 5, restart_with_data, _durable),
    Fault("server killed, restarted empty", 3, restart_empty, _single, forgets=True),
    Fault("FLUSHALL", 4, flush, forgets=True),
    Fault("keys deleted", 5, delete_keys, forgets=True),
    Fault("SCRIPT FLUSH", 3, flush_scripts),
    Fault("CLIENT PAUSE", 3, pause_clients),
    Fault("DEBUG SLEEP", 3, sleep_server),
    Fault("SIGSTOP of the server", 2, stop_server, _single),
    Fault("out of memory", 3, out_of_memory),
    Fault("failover with loss", 10, fail_over_with_loss, _watched, forgets=True),
    Fault("failover, orderly", 4, fail_over, _watched, forgets=True),
    Fault("partition of a rank", 16, cut_off, lambda world: world.network is not None),
)


async def inject(fault: Fault, world: World, rng: random.Random) -> Injected | None:
    """Inject one fault, and return once it is lifted; ``None`` where it found nothing to break."""
    began = time.time()
    if fault.forgets:
        world.forgets(began=True)
    try:
        effect = await fault.inject(world, rng)
    except (RedisError, OSError):  # the server did not take the order, for a fault before it lingers
        effect = None
    finally:
        if fault.forgets:
            world.forgets(began=False)
    if effect is None:
        return None
    return Injected(
        kind=effect.kind or fault.name,
        world=world.name,
        instance=effect.instance,
        ranks=effect.ranks,
        began=began,
        ended=time.time(),
        machine=fault.machine,
        slow=effect.slow,
        note=effect.note,
    )

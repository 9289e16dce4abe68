"""``rankgate health``: asks the store whether one process does its work, for the program that supervises it.

Nobody can ask a process from outside which rank it claimed. So runners and planners with ``--state-file`` write a small file that says
who they are, on a file system that ends with them (a container's tmpfs, a unit's runtime directory). `runner_health` and `planner_health`
read it and ask the store. What counts is what the others see of this process, not that it exists.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from barrier import Barrier, Settings, Store, StoreRefused, SystemClock, supervise
from barrier.errors import RankgateError
from barrier.log import logger
from barrier.printable import printable
from barrier.protocol.report import Report, UndecodableReport
from barrier.spares import read_spares
from barrier.store.keys import Keys
from planner.cli.process import connect_store
from planner.registry import Registry
from runner.lifecycle import FAILED

__all__ = [
    "Health",
    "NoState",
    "ProcessState",
    "health",
    "keeping_state",
    "planner_health",
    "read_state",
    "runner_health",
]


_LATE = 3.0
"""After so many heartbeat intervals without a beat, an event loop counts as hung."""


class NoState(RankgateError):
    """The process has no state file, or one that is not readable."""


class ProcessState(BaseModel):
    """Who a process is.

    Attributes:
        kind: ``runner`` or ``planner``.
        namespace: the cluster.
        pid: the process id, as the process sees it (a container has its own).
        instance: the instance whose ranks it runs; empty for a planner.
        ranks: the incarnation of each rank that it runs.
        heartbeat: seconds between two beats.
        spare: its incarnation while it waits for any free rank; empty if it holds ranks, or waits for a certain rank.
        beat: when the process's event loop last ran, by the machine's monotonic clock, in seconds. Containers share this clock.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="ignore")

    kind: Literal["runner", "planner"]
    namespace: str
    pid: int
    instance: str = ""
    ranks: Mapping[int, str] = Field(default_factory=dict[int, str])
    spare: str = ""
    heartbeat: float = Field(gt=0)
    beat: float = 0.0


@asynccontextmanager
async def keeping_state(path: Path | None, state: ProcessState | Callable[[], ProcessState]) -> AsyncGenerator[None]:
    """Write the state file of this process again and again from its event loop; remove it at the end.

    Args:
        path: the file; ``None``: there is none.
        state: who the process is, or a function that says who it is now.

    Raises:
        OSError: the file cannot be written.
    """
    if path is None:
        yield
        return
    now = state if callable(state) else lambda: state
    _write(path, now())
    beating = supervise.restarted(
        lambda: _beat(path, now), "the beat of the state file", clock=SystemClock(), longest_pause=now().heartbeat
    )
    try:
        yield
    finally:
        await supervise.end(beating)
        _remove(path)


async def _beat(path: Path, state: Callable[[], ProcessState]) -> None:
    while True:
        await asyncio.sleep(state().heartbeat)
        try:
            _write(path, state())
        except OSError as error:  # the process goes on; its supervisor sees a late beat
            logger.warning("the state file {} is not writable: {}", path, error.strerror or error)


def _write(path: Path, state: ProcessState) -> None:
    """Replace the file as a whole, so that a reader never sees half of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(state.model_copy(update={"beat": time.monotonic()}).model_dump_json(), encoding="utf-8")
    draft.replace(path)


def _remove(path: Path) -> None:
    with suppress(OSError):  # a file that stays has an old beat, and names a process that is gone
        path.unlink(missing_ok=True)


def read_state(path: Path, kind: Literal["runner", "planner"]) -> ProcessState:
    """Read a state file. Raises `NoState` with what to do."""
    try:
        state = ProcessState.model_validate_json(path.read_bytes())
    except OSError as error:
        raise NoState(
            f"{path} cannot be read ({error.strerror or error}): the {kind} has not started yet, has ended, or was started without "
            "--state-file"
        ) from None
    except ValidationError:
        raise NoState(f"{path} is not a state file of rankgate") from None
    if state.kind != kind:
        raise NoState(f"{path} is the state file of a {state.kind}: use rankgate health {state.kind}")
    return state


@dataclass(frozen=True, slots=True)
class Health:
    """The answer.

    Attributes:
        good: whether the process does its work, as far as the others can see.
        sentence: why, in one sentence.
    """

    good: bool
    sentence: str


async def runner_health(store: Store, state: ProcessState) -> Health:
    """Ask whether the process holds each of its ranks, with a live report that does not say Failed.

    Only reads the rank's own keys, so a rank's user in the store may ask.

    Raises:
        StoreError: could not find out.
    """
    keys = Keys(state.namespace, state.instance)
    said: list[str] = []
    if state.spare:
        waits = await _waits(store, keys, state.spare)
        age = time.monotonic() - state.beat
        if not waits and age > _LATE * state.heartbeat:  # the store shows only some of many spares
            return Health(False, f"the runner's event loop has not run for {age:.1f} s, and it holds no rank")
        return Health(True, f"{state.instance}: waits as a spare for any free rank")
    for rank, incarnation in sorted(state.ranks.items()):
        with store.errors():
            raw = await store.commands.get(keys.rank(rank))
            left = await store.commands.pttl(keys.rank(rank))
        where = f"{state.instance} rank {rank}"
        if (raw is None or incarnation.encode() not in raw) and await _waits(store, keys, incarnation, rank):
            said.append(f"{where}: another process holds the rank; this one waits as a spare")
            continue
        if raw is None:
            return Health(False, f"{where}: no live report: the lease has lapsed, or the rank is not claimed yet")
        try:
            report = Report.decode(raw, rank)
        except UndecodableReport as error:
            return Health(False, f"{where}: the report is not readable: {error}")
        if report.incarnation != incarnation:
            return Health(False, f"{where}: another process holds the rank now (node {report.node}, pid {report.pid})")
        if report.status == FAILED:
            return Health(False, f"{where}: Failed: {report.error or 'no reason given'}")
        said.append(f"{where}: {report.status}, {max(left, 0) / 1000:.1f} s of the lease left")
    return Health(bool(said), "; ".join(said) or "this runner holds no rank")


async def _waits(store: Store, keys: Keys, incarnation: str, rank: int | None = None) -> bool:
    try:
        return any(spare.incarnation == incarnation for spare in await read_spares(store, keys, rank))
    except StoreRefused:  # the user comes from an older ACL file, without the right to read spares
        return False


async def planner_health(store: Store, state: ProcessState) -> Health:
    """Ask whether a planner's event loop runs, and whether some planner leads every instance that shall be up.

    A standby is healthy. It is not if nobody leads an instance, since a healthy planner would lead it.

    Raises:
        StoreError: could not find out.
    """
    age = time.monotonic() - state.beat
    if age > _LATE * state.heartbeat:
        return Health(False, f"the planner's event loop has not run for {age:.1f} s")
    led: list[str] = []
    for name, record in sorted((await Registry(store, state.namespace).all()).items()):
        if record.desired != "up" or record.failure:
            continue
        barrier = Barrier(store, name, world_size=record.spec.world_size, namespace=state.namespace)
        try:
            snapshot = await barrier.inspect()
        finally:
            await barrier.close()
        if snapshot.leader is None or snapshot.leader_left_ms <= 0:
            return Health(False, f"no planner leads {name}")
        led.append(f"{name} is led by {snapshot.leader.holder}")
    return Health(True, "; ".join(led) or "no instance is to be up")


async def health(kind: Literal["runner", "planner"], path: Path, url: str, settings: Settings) -> int:
    """``rankgate health``: print the sentence; returns 0 if the process is healthy, otherwise 1.

    Raises:
        NoState: see `read_state`.
        StoreError: could not find out.
    """
    state = read_state(path, kind)
    store = await connect_store(url, settings, role="rank" if kind == "runner" else "planner")
    try:
        answer = await (runner_health(store, state) if kind == "runner" else planner_health(store, state))
    finally:
        await store.close()
    print(printable(answer.sentence))
    return 0 if answer.good else 1

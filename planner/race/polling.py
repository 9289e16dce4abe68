"""Runs 1 and 2: a planner that believes the table of statuses."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Mapping

from barrier import Barrier, EpochId, Opened, Store, Verdict
from barrier.store.keys import Keys
from planner.history import History, find_breaches, read_history
from planner.launcher import Program, own_environment
from planner.race.figures import RunFigures
from planner.race.mail import Kind, post, read_table, status_in_table, until_all_are_here
from planner.race.scenario import KILLED, LIMIT, PATIENCE, POLL, RESEND, WORLD_SIZE, Role, Run, Say, ranks_named

__all__ = ["due_tasks", "stale_and_fragile", "stale_and_graceful"]


_ORDER = ("Idle", "Connecting", "Connected", "Loading", "Loaded", "WarmingUp", "Ready")
_NEXT: Mapping[Kind, str] = {"ConnectToGroup": "Idle", "LoadModel": "Connected", "StartWarmup": "Loaded"}


def due_tasks(
    view: Mapping[int, str], sent: Mapping[tuple[Kind, int], float], now: float, world_size: int = WORLD_SIZE
) -> list[tuple[Kind, list[int]]]:
    """The tasks that a planner sends if it believes the table of statuses: a pure function, as careful as the table allows.

    A rank gets its next task when the table says that it is due and that all others have come at least as far (exo's rule for LoadModel,
    here for every task). It does not get the task again within `RESEND` seconds.

    Args:
        view: the table: the last status that each rank wrote.
        sent: when each task was last sent to each rank, in seconds.
        now: the time in seconds.
        world_size: number of ranks. While a rank is missing from the table, nothing is due.
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
    """Polls the table and sends the due tasks by `send`. `begin_anew_if_need_be` ends an attempt after too many refusals."""

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
        """Return when the table says Ready for all ranks."""
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


async def stale_and_fragile(store: Store, url: str, say: Say) -> RunFigures:
    """Run 1: runners that raise an error."""
    title = "stale statuses, fragile runner"
    say(f"1. {title}")
    keys = Keys("rankgate", "race-fragile")
    run = Run(title, _programs("fragile", keys.group, url), say)
    nowhere = EpochId(0, "0" * 32)  # these runners know no epochs

    async def send(kind: Kind, ranks: list[int]) -> None:
        run.tell(f"{kind} to {ranks_named(ranks)}")
        await post(store, keys, kind, ranks, nowhere, 0)

    async def is_refused() -> bool:
        return False

    planner = _PollingPlanner(lambda: read_table(store, keys), send, is_refused)
    async with run.launcher:
        await until_all_are_here(store, keys)
        ready_after = await run.bring_up(planner.until_ready(), lambda: status_in_table(store, keys, KILLED))
    return RunFigures(title, planner.load_dispatches, None, run.deaths, ready_after, run.last_words)


async def stale_and_graceful(store: Store, url: str, say: Say) -> RunFigures:
    """Run 2: runners that refuse."""
    title = "stale statuses, refusing runner"
    say(f"2. {title}")
    keys = Keys("rankgate", "race-graceful")
    run = Run(title, _programs("graceful", keys.group, url), say)
    async with Barrier(store, keys.group, world_size=WORLD_SIZE) as barrier, run.launcher:
        await until_all_are_here(store, keys)
        current = await _open(barrier)
        seen = forgiven = 0

        async def send(kind: Kind, ranks: list[int]) -> None:
            run.tell(f"{kind} to {ranks_named(ranks)}")
            term = barrier.leadership.term if barrier.leadership else 0
            await post(store, keys, kind, ranks, current, term)

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
            run.tell(f"{reason}; all ranks begin again")
            await barrier.lead()
            await barrier.conclude(current, Verdict.aborted(reason))
            current = await _open(barrier)
            return True

        planner = _PollingPlanner(lambda: read_table(store, keys), send, begin_anew_if_need_be)
        ready_after = await run.bring_up(planner.until_ready(), lambda: status_in_table(store, keys, KILLED))
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
    """Open an epoch. Wait until every rank has a live report."""
    while True:
        await barrier.lead()
        outcome = await barrier.open(WORLD_SIZE, timeout=LIMIT)
        if isinstance(outcome, Opened):
            return outcome.epoch
        await asyncio.sleep(POLL)


def _rejections(history: History) -> list[str]:
    """Every rejection as a sentence."""
    return [f"rank {rank} refused {why.task_kind} ({why.code}): {why.hint}" for rank, why in history.rejections]


def _programs(role: Role, instance: str, url: str) -> list[Program]:
    """One process for every rank."""
    return [
        Program(
            name=f"rank {rank}",
            # -P: nothing in the working directory is imported by surprise.
            command=(sys.executable, "-P", "-m", "planner.race.process", role, instance, str(rank), str(os.getpid())),
            environment={**own_environment(), "RANKGATE_REDIS": url},
            ranks=range(rank, rank + 1),
        )
        for rank in range(WORLD_SIZE)
    ]

"""How many round trips there are: in a bring-up, while nothing happens, and when all ranks arrive at once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from barrier import Barrier, Member, Released, Settings, Store, adopt, connect
from barrier.testing import wait_until
from planner import InstanceSpec, Planner
from runner.engines.simulated import SimulatedConfig, SimulatedEngine
from runner.host import InlineHost
from runner.messages import ModelSpec
from runner.runner import Runner
from tests.benchmarks.group import PATIENCE, Absent, counting_client, load_task, open_epoch, readers
from tests.benchmarks.readers import SETTINGS

READS = ("XREAD",)
"""Round trips that wait for news; they are counted apart from those that say or ask something."""

_ENGINE = SimulatedConfig(connect_seconds=0.05, layer_seconds=0.02, warmup_seconds=0.05)


@asynccontextmanager
async def _runners(
    url: str, name: str, world_size: int, settings: Settings, tallies: list[Counter[str]]
) -> AsyncGenerator[None]:
    """Real runners of all ranks, each with a counted client of its own, in this process."""
    async with AsyncExitStack() as stack:
        runners: list[Runner] = []
        for rank in range(world_size):
            client = counting_client(url, tallies[rank])
            stack.push_async_callback(client.aclose)
            member = Member(client, name, rank=rank, world_size=world_size, settings=settings)
            stack.push_async_callback(member.close)
            runners.append(Runner(member, InlineHost(_engines(rank, world_size), rank=rank)))
        tasks = [asyncio.create_task(runner.run()) for runner in runners]
        try:
            yield
        finally:
            for runner in runners:
                runner.stop()
            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(*tasks)


def _engines(rank: int, world_size: int) -> Callable[[], SimulatedEngine]:
    return lambda: SimulatedEngine(_ENGINE, rank=rank, world_size=world_size)


@asynccontextmanager
async def _planner(url: str, settings: Settings, tally: Counter[str]) -> AsyncGenerator[Planner]:
    client = counting_client(url, tally)
    async with Planner(client, settings=settings) as planner:
        yield planner
    await client.aclose()


# --- one bring-up -----------------------------------------------------------------------------------------------------


@dataclass
class BringUpFigures:
    """Round trips from the first command to Ready, without any heartbeat.

    Attributes:
        statuses: how many statuses each rank reported in the epoch, by its own history.
        ranks: each rank's round trips by command, before the epoch (claim, hello) and in it.
        planner: the planner's, by verb.
    """

    world_size: int
    statuses: list[int]
    before: list[Counter[str]]
    ranks: list[Counter[str]]
    planner: Counter[str]

    def as_json(self) -> dict[str, Any]:
        return {
            "world_size": self.world_size,
            "statuses_in_the_epoch": self.statuses,
            "rank_round_trips_before_the_epoch": [dict(one) for one in self.before],
            "rank_round_trips_in_the_epoch": [dict(one) for one in self.ranks],
            "planner_round_trips": dict(self.planner),
        }


async def count_bring_up(url: str, world_size: int) -> BringUpFigures:
    tallies = [Counter[str]() for _ in range(world_size)]
    planner_tally = Counter[str]()
    name = "bring-up"
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(_runners(url, name, world_size, SETTINGS, tallies))
        store = await connect(url, settings=SETTINGS)
        stack.push_async_callback(store.close)
        looking = Barrier(store, name, world_size=world_size)
        stack.push_async_callback(looking.close)

        async def all_here() -> bool:
            return all(view.report for view in (await looking.inspect()).ranks)

        await wait_until(all_here, "all ranks to say hello", timeout=PATIENCE)
        before = [Counter(tally) for tally in tallies]
        planner = await stack.enter_async_context(_planner(url, SETTINGS, planner_tally))
        model = ModelSpec(model_id="simulated", total_layers=4)
        await planner.launch(InstanceSpec(name=name, world_size=world_size, model=model), timeout=PATIENCE)
        ranks = [Counter(tally) - earlier for tally, earlier in zip(tallies, before, strict=True)]
        statuses = await _statuses_told(store, looking, world_size)
        return BringUpFigures(world_size, statuses, before, ranks, Counter(planner_tally))


async def _statuses_told(store: Store, barrier: Barrier, world_size: int) -> list[int]:
    """How many status changes each rank told, from the history: what the ranks wrote, not what this benchmark counted."""
    told = [0] * world_size
    for _, fields in await store.commands.xrange(barrier.keys.events):
        if fields.get(b"source") == b"rank" and fields.get(b"kind") == b"RunnerStatusUpdated":
            told[int(fields[b"rank"])] += 1
    return told


# --- idleness ---------------------------------------------------------------------------------------------------------


@dataclass
class IdleFigures:
    """Round trips in a time in which nothing happens, with the default settings."""

    seconds: float
    waiter: Counter[str]
    planner: Counter[str]
    runner: Counter[str]

    def as_json(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            **{
                who: {"round_trips": dict(tally), "a_second": round(tally.total() / self.seconds, 3)}
                for who, tally in (("waiter", self.waiter), ("planner", self.planner), ("runner", self.runner))
            },
        }


async def count_idle(url: str, *, seconds: float) -> IdleFigures:
    """A `Barrier.wait` for ranks of which none arrives, and a planner that leads an instance that is Ready, side by side."""
    defaults = Settings()
    waiter, planning, runners = Counter[str](), Counter[str](), [Counter[str]() for _ in range(2)]
    async with AsyncExitStack() as stack:
        client = counting_client(url, waiter)
        stack.push_async_callback(client.aclose)
        store = adopt(client, settings=defaults)
        stack.push_async_callback(store.close)
        barrier = Barrier(store, "idle-waiter", world_size=8)
        stack.push_async_callback(barrier.close)
        other = await connect(url, settings=SETTINGS)
        stack.push_async_callback(other.close)
        await Absent(other, barrier, range(8), 8).report("Idle", None)
        epoch = await open_epoch(barrier)
        waiting = asyncio.create_task(barrier.wait(epoch, "Connected", timeout=10 * seconds + PATIENCE))
        stack.push_async_callback(asyncio.gather, waiting, return_exceptions=True)
        stack.callback(waiting.cancel)

        await stack.enter_async_context(_runners(url, "idle-planner", 2, defaults, runners))
        planner = await stack.enter_async_context(_planner(url, defaults, planning))
        await planner.launch(InstanceSpec(name="idle-planner", world_size=2), timeout=PATIENCE)
        await asyncio.sleep(1)  # what the bring-up itself still does is not idleness
        tallies = (waiter, planning, runners[0])
        before = [Counter(tally) for tally in tallies]
        await asyncio.sleep(seconds)
        assert not waiting.done(), "nobody has arrived"
        return IdleFigures(seconds, *(tally - earlier for tally, earlier in zip(tallies, before, strict=True)))


# --- all at once ------------------------------------------------------------------------------------------------------


@dataclass
class BurstFigures:
    """What a planner does when all ranks arrive at once."""

    world_size: int
    planner: Counter[str]

    def as_json(self) -> dict[str, Any]:
        return {"world_size": self.world_size, "planner_round_trips": dict(self.planner)}


async def count_burst(url: str, world_size: int) -> BurstFigures:
    """All ranks learn of an epoch, promise and arrive, at once and in another process, while a planner is in `release`."""
    tally = Counter[str]()
    group = f"burst-{world_size}"
    async with AsyncExitStack() as stack:
        client = counting_client(url, tally)
        stack.push_async_callback(client.aclose)
        store = adopt(client, settings=SETTINGS)
        stack.push_async_callback(store.close)
        barrier = Barrier(store, group, world_size=world_size)
        stack.push_async_callback(barrier.close)
        children = await stack.enter_async_context(readers(url, group, range(world_size), world_size))
        await barrier.lead()
        await barrier.inspect()
        epoch = await open_epoch(barrier)
        before = Counter(tally)
        outcome = await barrier.release(epoch, "load", load_task(group, epoch, "load"), "Connected", timeout=PATIENCE)
        assert isinstance(outcome, Released), outcome
        found = Counter(tally) - before
        await children.told("arrived", str(epoch))
        assert len(await children.told("task", str(outcome.id))) == world_size, "every rank has it, once"
        return BurstFigures(world_size, found)

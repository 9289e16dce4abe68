"""Runs the worlds side by side, one round of faults after the other, and collects the results."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loguru import logger

from barrier import Settings, connect
from planner.embedded import EmbeddedServer
from planner.history import History
from tests.chaos.checker import count_rejections, judge_histories, judge_journal, judge_verdicts
from tests.chaos.faults import FAULTS, Fault, Injected, inject
from tests.chaos.network import leftovers, network
from tests.chaos.sites import Single, Site, Watched
from tests.chaos.world import SETTINGS, Bounds, Group, Settled, World, rng_of, world

WORLDS = ("valkey", "redis-aof", "redis-empty", "sentinel", "network")
"""All kinds of worlds; the last one needs root."""

_ROUND = (1, 1, 2, 2, 3, 3, 4)
"""How many faults a round has, drawn from here."""

_ENOUGH = 20
"""Breaches after which no further round begins: whatever it is, it is not rare."""

_STAGGER = 2.0  # leases over which the faults of a round begin


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault of a round, with the random numbers that it is given."""

    fault: Fault
    after: float
    rng: random.Random


def plan_round(seed: int, made: World, number: int, only: Sequence[str] = ()) -> list[Planned]:
    """The faults of a round; they follow from the seed, the world, the round's number and the kinds, and from nothing else.

    `only` names the kinds to draw from, by a part of their names; empty for all.
    """
    rng = rng_of(seed, made.name, number)
    candidates = [
        fault for fault in FAULTS if fault.fits(made) and (not only or any(part in fault.name for part in only))
    ]
    if not candidates:
        return []
    count = rng.choice(_ROUND)
    chosen = rng.choices(candidates, [fault.weight for fault in candidates], k=count)
    if any(fault.name == "engine refuses for good" for fault in chosen):
        # An instance that is given up lives in the store alone: if that forgets it, there is nobody to be asked about it.
        chosen = [fault for fault in chosen if not fault.forgets]
    return [
        Planned(
            fault, rng.uniform(0, _STAGGER * SETTINGS.lease) if place else 0.0, rng_of(seed, made.name, number, place)
        )
        for place, fault in enumerate(chosen)
    ]


@dataclass(slots=True)
class Round:
    """What a round was and how everybody came out of it."""

    world: str
    number: int
    faults: list[Injected]
    settled: list[Settled]


@dataclass(slots=True)
class Report:
    """What a run has shown; everything that is asked of it is a breach or a figure."""

    seed: int
    seconds: float
    rounds: list[Round] = field(default_factory=list[Round])
    breaches: list[str] = field(default_factory=list[str])
    bring_ups: int = 0
    attempts: int = 0
    loads: int = 0
    events: int = 0
    processes: int = 0
    strays: int = 0
    restarted_by_supervisor: int = 0
    verdicts: Counter[str] = field(default_factory=Counter[str])
    rejections: Counter[str] = field(default_factory=Counter[str])
    oddities: Counter[str] = field(default_factory=Counter[str])
    noise: int = 0

    @property
    def faults(self) -> list[Injected]:
        """Every fault that took effect."""
        return [fault for one in self.rounds for fault in one.faults]

    def by_kind(self) -> Counter[str]:
        """How many faults of each kind."""
        return Counter(fault.kind for fault in self.faults)

    def recoveries(self) -> dict[str, list[float]]:
        """From the last fault's end to a text, in leases: by kind for rounds of one fault, and together for the others."""
        found: defaultdict[str, list[float]] = defaultdict(list)
        for one in self.rounds:
            kinds = {fault.kind for fault in one.faults}
            name = kinds.pop() if len(kinds) == 1 and len(one.faults) == 1 else "several faults at once"
            for settled in one.settled:
                if settled.outcome != "stuck":
                    found[name].append(settled.seconds / SETTINGS.lease)
                    found["all"].append(settled.seconds / SETTINGS.lease)
        return found

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "settings": asdict(SETTINGS),
            "rounds": len(self.rounds),
            "faults": len(self.faults),
            "faults_by_kind": dict(self.by_kind().most_common()),
            "bring_ups": self.bring_ups,
            "attempts": self.attempts,
            "loads": self.loads,
            "events_recorded": self.events,
            "tasks_out_of_state": self.strays,
            "processes_started": self.processes,
            "processes_restarted_while_the_store_was_away": self.restarted_by_supervisor,
            "recovery_in_leases": {
                name: {"n": len(times), "p50": round(quantile(times, 0.5), 2), "p99": round(quantile(times, 0.99), 2)}
                for name, times in sorted(self.recoveries().items())
            },
            "given_up": sum(settled.outcome.startswith("given up") for one in self.rounds for settled in one.settled),
            "verdicts": dict(self.verdicts.most_common()),
            "rejections": dict(self.rejections),
            "oddities": dict(self.oddities),
            "moments_of_machine_noise": self.noise,
            "breaches": self.breaches,
        }


def quantile(values: Sequence[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


class Drive:
    """One run.

    Args:
        seed: the schedule follows from it. What the processes make of it does not: they are real.
        seconds: no round begins after so long.
        worlds: which kinds.
        directory: for journals, logs and the servers' data.
        sizes: the numbers of ranks of each world's instances.
        rounds: at most so many rounds in each world.
        only: the kinds of faults, by parts of their names; empty for all.
    """

    def __init__(
        self,
        *,
        seed: int,
        seconds: float,
        worlds: Sequence[str],
        directory: Path,
        sizes: Sequence[int] = (3, 2),
        rounds: int | None = None,
        only: Sequence[str] = (),
    ) -> None:
        self._seconds = seconds
        self._worlds = worlds
        self._directory = directory
        self._sizes = sizes
        self._rounds = rounds
        self._only = only
        self._noise = _Noise()
        self._over: list[tuple[World, Mapping[str, int]]] = []
        self.report = Report(seed, 0.0)

    async def run(self) -> Report:
        """Run until the time is over, then judge. Whatever breaks inside, every process and namespace is gone afterwards."""
        began = time.monotonic()
        with self._noise:
            async with AsyncExitStack() as stack:
                sites = [(name, *await self._site(name, stack)) for name in self._worlds]
                running = (self._one_world(name, site, net, began) for name, site, net in sites)
                ends = await asyncio.gather(*running, return_exceptions=True)
        for name, end in zip(self._worlds, ends, strict=True):
            if isinstance(end, BaseException):  # the others went on, and are judged; this one cannot be
                logger.opt(exception=end).error("the world {} broke", name)
                self.report.breaches.append(f"the world {name} broke: {end!r}")
        await self._judge()
        if "network" in self._worlds:
            self.report.breaches += [f"{one} was left behind" for one in await leftovers()]
        self.report.seconds = time.monotonic() - began
        return self.report

    async def _site(self, name: str, stack: AsyncExitStack) -> tuple[Site, Any]:
        match name:
            case "valkey":
                return await stack.enter_async_context(Single("valkey", aof=False)), None
            case "redis-aof":
                return await stack.enter_async_context(Single("redis", aof=True)), None
            case "redis-empty":
                return await stack.enter_async_context(Single("redis", aof=False)), None
            case "sentinel":
                return await stack.enter_async_context(Watched()), None
            case "network":
                net = await stack.enter_async_context(network())
                return await stack.enter_async_context(Single("valkey", aof=True, reachable_from=net)), net
            case other:
                raise ValueError(f"there is no world {other!r}; there are {', '.join(WORLDS)}")

    async def _one_world(self, name: str, site: Site, net: Any, began: float) -> None:
        sizes = {f"{name}-{chr(ord('a') + place)}": size for place, size in enumerate(self._sizes)}
        async with world(name, site, self._directory / name, sizes, net) as made:
            first = await self._settle(made, [], time.monotonic())
            self.report.rounds.append(Round(name, 0, [], first))
            number = 0
            while time.monotonic() - began < self._seconds and (self._rounds is None or number < self._rounds):
                if len(self.report.breaches) > _ENOUGH:
                    break
                number += 1
                await self._round(made, number)
            self.report.breaches += await made.stop_everything()
        self._over.append((made, sizes))

    async def _round(self, made: World, number: int) -> None:
        faults: list[Injected] = []

        async def one(planned: Planned) -> None:
            await asyncio.sleep(planned.after)
            injected = await inject(planned.fault, made, planned.rng)
            if injected is not None:
                faults.append(injected)

        ended = await asyncio.gather(
            *(one(planned) for planned in plan_round(self.report.seed, made, number, self._only)),
            return_exceptions=True,
        )
        for error in ended:
            if isinstance(error, AssertionError):
                self.report.breaches.append(f"{made.name}, round {number}: {error}")
            elif isinstance(error, BaseException):
                raise error
        settled = await self._settle(made, faults, time.monotonic())
        self.report.rounds.append(Round(made.name, number, faults, settled))
        for problem in (one for one in settled if one.problem):
            kinds = ", ".join(fault.kind for fault in faults)
            self.report.breaches.append(f"{problem.instance}, round {number} ({kinds}): {problem.problem}")
            logger.warning("{}", self.report.breaches[-1])

    async def _settle(self, made: World, faults: Sequence[Injected], began: float) -> list[Settled]:
        slow = sum(fault.slow for fault in faults)
        bound = Bounds().recovery(len(faults), slow)
        return await asyncio.gather(*(made.settle(group, began, bound) for group in made.groups))

    async def _judge(self) -> None:
        """When all worlds are over: what one of them did to the machine explains what happened in another."""
        report = self.report
        report.noise = len(self._noise.moments)
        async with EmbeddedServer() as server:
            scratch = await connect(server.url, settings=Settings(lease=30.0))
            try:
                for made, sizes in self._over:
                    self._judge_processes(made, sizes)
                    for group in made.groups:
                        self._judge_instance(made, group, await group.recorder.histories(scratch))
            finally:
                await scratch.close()

    def _judge_processes(self, made: World, sizes: Mapping[str, int]) -> None:
        report = self.report
        for ended in made.ended:
            report.restarted_by_supervisor += bool(ended.excuse)
            if not ended.excuse:
                report.breaches.append(f"{ended.name} ended by itself with code {ended.code}: {ended.words}")
        judged = judge_journal(made.journal(), sizes, made.replaced)
        report.breaches += judged.breaches
        report.bring_ups += sum(judged.bring_ups.values())
        report.attempts += sum(judged.attempts.values())
        report.loads += judged.loads
        report.processes += len(made.pids)

    def _judge_instance(self, made: World, group: Group, histories: Sequence[History]) -> None:
        report = self.report
        report.events += group.recorder.heard
        report.strays += group.strays
        report.breaches += judge_histories(histories, group.strays)
        report.rejections += count_rejections(histories)
        for history in histories:
            report.oddities.update(oddity.kind for oddity in history.oddities)
        verdicts = judge_verdicts(
            group.name, histories, report.faults, made.name, self._noise.moments, Bounds().recovery(0)
        )
        report.verdicts += verdicts.counts
        report.breaches += [f"untrue verdict: {one}" for one in verdicts.unexplained]


class _Noise:
    """Notices when the machine itself stands still: a thread that wants to wake every 50 ms, and notes when it could not."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Noise:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        tick, last = 0.05, time.monotonic()
        while not self._over.wait(tick):
            now = time.monotonic()
            if now - last - tick > SETTINGS.heartbeat:
                self.moments.append(time.time())
            last = now

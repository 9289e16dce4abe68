"""Plays many histories, on as many processes as there are cores, and adds up a few numbers about each."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.simulation.world import LONG, SHORT, Breach, simulate

_CHUNK = 25


@dataclass
class Tally:
    """What a number of histories came to.

    Attributes:
        histories: how many.
        faults: how many of each kind.
        most_faults: the most in one history.
        bring_ups: epochs that the stores' own histories hold.
        steps: steps of all schedules.
        seconds: virtual seconds.
        gave_up: histories in which the instance was rightly given up.
        forgetful: histories in which the store lost something that it had acknowledged.
        second_verdicts: of those, in which somebody read another verdict of an epoch than somebody else.
        checked: histories that the independent checker judged; it cannot where the store's history itself was lost.
        breaches: by seed.
    """

    histories: int = 0
    faults: Counter[str] = field(default_factory=Counter[str])
    most_faults: int = 0
    bring_ups: int = 0
    steps: int = 0
    seconds: float = 0.0
    gave_up: int = 0
    forgetful: int = 0
    second_verdicts: int = 0
    checked: int = 0
    breaches: dict[int, str] = field(default_factory=dict[int, str])

    def add(self, other: Tally) -> None:
        """Add another's numbers."""
        self.histories += other.histories
        self.faults += other.faults
        self.most_faults = max(self.most_faults, other.most_faults)
        self.bring_ups += other.bring_ups
        self.steps += other.steps
        self.seconds += other.seconds
        self.gave_up += other.gave_up
        self.forgetful += other.forgetful
        self.second_verdicts += other.second_verdicts
        self.checked += other.checked
        self.breaches |= other.breaches

    def __str__(self) -> str:
        """The numbers, for people."""
        each = max(self.histories, 1)
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in self.faults.most_common())
        return (
            f"{self.bring_ups:,} bring-ups, {self.steps:,} steps ({self.steps / each:,.0f} a history), "
            f"{self.seconds / each:.1f} virtual seconds a history\n"
            f"{self.faults.total():,} faults ({self.faults.total() / each:.2f} a history, at most {self.most_faults}): {kinds}\n"
            f"{self.gave_up:,} instances rightly given up; {self.checked:,} histories judged by the independent checker; in "
            f"{self.forgetful:,} the store had lost something, in {self.second_verdicts:,} of those an epoch's verdict with it"
        )


def play(first: int, end: int, *, long: bool = False, stop_at_first: bool = False) -> Tally:
    """Play the seeds from `first` up to, but not, `end` in this process."""
    tally = Tally()
    gc.disable()  # a history leaves much garbage and keeps nothing: collecting now and then is enough
    try:
        for seed in range(first, end):
            try:
                world = simulate(seed, scale=LONG if long else SHORT)
            except Breach as breach:
                tally.breaches[seed] = str(breach)
                tally.histories += 1
                if stop_at_first:
                    break
                continue
            tally.add(
                Tally(
                    histories=1,
                    faults=Counter(world.injected),
                    most_faults=len(world.injected),
                    bring_ups=world.bring_ups,
                    steps=world.steps,
                    seconds=world.seconds,
                    gave_up=bool(world.gave_up),
                    forgetful=world.forgot,
                    second_verdicts=bool(world.oracle.second_verdicts),
                    checked=not world.forgot and bool(world.history.events),
                )
            )
    finally:
        gc.enable()
        gc.collect()
    return tally


def play_all(
    first: int, end: int, *, jobs: int | None = None, long: bool = False, stop_at_first: bool = False
) -> Iterator[Tally]:
    """Play seeds on several processes; the tallies come in the order of the seeds.

    Args:
        first: the first seed.
        end: the one after the last.
        jobs: how many processes; as many as there are cores where ``None``.
        long: whether each history is a long one.
        stop_at_first: whether to end at the first breach.
    """
    starts = range(first, end, _CHUNK)
    calls = [(start, min(start + _CHUNK, end), long, stop_at_first) for start in starts]
    workers = min(jobs or os.cpu_count() or 1, len(calls))
    if workers == 1:
        tallies = map(_play_chunk, calls)
        for tally in tallies:
            yield tally
            if stop_at_first and tally.breaches:
                return
        return
    # A fresh interpreter each: a forked one would share whatever this one has open.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for tally in pool.imap(_play_chunk, calls):
            yield tally
            if stop_at_first and tally.breaches:
                return


def _play_chunk(call: tuple[int, int, bool, bool]) -> Tally:
    first, end, long, stop_at_first = call
    return play(first, end, long=long, stop_at_first=stop_at_first)

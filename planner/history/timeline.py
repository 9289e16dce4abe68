"""How long each part of one attempt took."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from barrier.errors import RankgateError
from barrier.protocol.ids import EpochId
from barrier.protocol.model import Verdict
from planner.history.events import EpochConcluded, EpochOpened, EpochRestored, History, RankSaid, StepDispatched
from planner.history.rules import kind_of
from runner.messages import (
    RunnerStatusUpdated,
    TaskStatusUpdated,
)

__all__ = ["NoSuchAttempt", "Timeline", "timeline"]


class NoSuchAttempt(RankgateError):
    """The history has no attempt, or not the one that was asked for."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """How long each part of one attempt took. All times are milliseconds by the store's clock; ``None``: it has not happened.

    Times count from the opening of the epoch, or from its restoration if the history does not hold the opening.

    Attributes:
        epoch: the epoch.
        ordinal: the number of the attempt, for people; 0 if the history does not hold the opening.
        world_size: number of ranks.
        began_ms: when the epoch was opened, since 1970.
        arrivals: when each rank first said Connected (a single rank: Idle), by rank, for the ranks that did.
        skew: the time from the first arrival to the last one, if all have arrived.
        load_dispatched: when LoadModel was first appended to the task log.
        release: the time from the last arrival to that dispatch.
        loads: how long each rank loaded, by rank.
        loaded: when the last rank was Loaded.
        warm_up: the time from the first StartWarmup until the last rank was Ready.
        ready: when the last rank was Ready for the first time.
        ended: when the verdict was set.
        verdict: the verdict.
        dispatches: how many tasks were dispatched, by kind.
        rejections: how many tasks were refused in this epoch, by code.
    """

    epoch: EpochId
    ordinal: int
    world_size: int
    began_ms: int
    arrivals: Mapping[int, int]
    skew: int | None
    load_dispatched: int | None
    release: int | None
    loads: Mapping[int, int]
    loaded: int | None
    warm_up: int | None
    ready: int | None
    ended: int | None
    verdict: Verdict | None
    dispatches: Mapping[str, int]
    rejections: Mapping[str, int]

    @property
    def last_arrival(self) -> tuple[int, int] | None:
        """The rank that arrived last, and when; ``None`` until all have arrived."""
        if len(self.arrivals) < self.world_size:
            return None
        return max(self.arrivals.items(), key=lambda item: (item[1], item[0]))


def timeline(history: History, epoch: EpochId | None = None) -> Timeline:
    """The timeline of one attempt; of the newest one if `epoch` is ``None``.

    Raises:
        NoSuchAttempt: the history has no attempt, or not that one.
    """
    starts = [e for e in history.events if isinstance(e, EpochOpened | EpochRestored)]
    starts = [start for start in starts if epoch is None or start.epoch == epoch]
    if not starts:
        which = "no attempt" if epoch is None else f"no attempt {epoch}"
        raise NoSuchAttempt(
            f"the history of {history.group} holds {which}: it may have been cut, or nothing was launched"
        )
    chosen = starts[-1].epoch
    start = next(one for one in starts if one.epoch == chosen)
    began, size = start.at_ms, len(start.roster)
    firsts = _first_times(history, chosen, start.roster)
    sent: dict[str, int] = {}
    dispatches: Counter[str] = Counter()
    rejections: Counter[str] = Counter()
    ended: EpochConcluded | None = None
    for event in history.events:
        if event.epoch != chosen:
            continue
        match event:
            case StepDispatched():
                kind = kind_of(event.step)
                dispatches[kind] += 1
                sent.setdefault(kind, event.at_ms)
            case RankSaid(event=TaskStatusUpdated(rejection=rejection)) if rejection is not None:
                rejections[rejection.code] += 1
            case EpochConcluded():
                ended = ended or event
            case _:
                pass
    arrivals = firsts["Idle" if size == 1 else "Connected"]
    load_dispatched, last_arrival = sent.get("LoadModel"), _last_of(arrivals, size)
    ready, warm_up_sent = _last_of(firsts["Ready"], size), sent.get("StartWarmup")
    return Timeline(
        epoch=chosen,
        ordinal=start.ordinal if isinstance(start, EpochOpened) else 0,
        world_size=size,
        began_ms=began,
        arrivals={rank: at - began for rank, at in sorted(arrivals.items())},
        skew=None if last_arrival is None else last_arrival - min(arrivals.values()),
        load_dispatched=_since(began, load_dispatched),
        release=_since(last_arrival, load_dispatched),
        loads={
            rank: at - firsts["Loading"][rank]
            for rank, at in sorted(firsts["Loaded"].items())
            if rank in firsts["Loading"]
        },
        loaded=_since(began, _last_of(firsts["Loaded"], size)),
        warm_up=_since(warm_up_sent, ready),
        ready=_since(began, ready),
        ended=_since(began, ended.at_ms if ended else None),
        verdict=ended.verdict if ended else None,
        dispatches=dict(dispatches),
        rejections=dict(rejections),
    )


def _first_times(history: History, epoch: EpochId, roster: tuple[str, ...]) -> defaultdict[str, dict[int, int]]:
    """When each rank of the roster first said each status in this epoch: by status, then by rank."""
    firsts: defaultdict[str, dict[int, int]] = defaultdict(dict)
    for event in history.events:
        if not isinstance(event, RankSaid) or event.epoch != epoch or event.rank >= len(roster):
            continue
        if event.incarnation == roster[event.rank] and isinstance(event.event, RunnerStatusUpdated):
            firsts[event.event.status.kind].setdefault(event.rank, event.at_ms)
    return firsts


def _last_of(times: Mapping[int, int], world_size: int) -> int | None:
    return max(times.values()) if len(times) == world_size else None


def _since(begin: int | None, end: int | None) -> int | None:
    return None if begin is None or end is None else end - begin

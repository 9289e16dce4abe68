"""Where the time of one attempt went."""

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
    """The history knows no attempt, or not the one that was asked for."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """Where the time of one attempt went. Everything in milliseconds by the store's clock; ``None`` for what has not happened.

    Offsets count from the opening of the epoch (or from its restoration, where the history does not hold the opening).

    Attributes:
        epoch: which attempt.
        ordinal: its number for people; 0 where the opening is not in the history.
        world_size: number of ranks.
        began_ms: when it was opened, since 1970.
        arrivals: when each rank said Connected for the first time (Idle, for a single rank); ranks that never did are not in it.
        skew: between the first arrival and the last one, once all have arrived.
        load_dispatched: when LoadModel entered the task log first.
        release: from the last arrival to that dispatch.
        loads: how long each rank loaded.
        loaded: when the last rank was Loaded.
        warm_up: from the first StartWarmup to the last rank's Ready.
        ready: when the last rank was Ready for the first time.
        ended: when the verdict fell.
        verdict: how it ended.
        dispatches: tasks dispatched, by kind.
        rejections: tasks refused in this epoch, by code.
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
        """The rank that arrived last and when, once all have arrived."""
        if len(self.arrivals) < self.world_size:
            return None
        return max(self.arrivals.items(), key=lambda item: (item[1], item[0]))


def timeline(history: History, epoch: EpochId | None = None) -> Timeline:
    """Where the time went in one attempt; in the newest one where `epoch` is ``None``.

    Raises:
        NoSuchAttempt: the history holds no attempt, or not that one.
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

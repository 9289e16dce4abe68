"""Snapshots made by hand, for the pure functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from barrier import EpochId, EpochRecord, LogId, RankView, Report, Snapshot, Verdict

EPOCH = EpochId(100, "a" * 32)
OTHER_NONCE = EpochId(100, "b" * 32)
LATER = EpochId(101, "c" * 32)
EARLIER = EpochId(99, "d" * 32)


def life(rank: int, number: int = 5) -> str:
    """An incarnation; a higher number is a later life."""
    return f"{number:012x}{rank:016x}"


def record(world_size: int = 3, **changes: Any) -> EpochRecord:
    """The record of an epoch that is going on."""
    return replace(
        EpochRecord(
            id=EPOCH,
            ordinal=2,
            term=7,
            world_size=world_size,
            roster=tuple(life(rank) for rank in range(world_size)),
            steps={},
            last_n=3,
            digest="",
            notes="",
            opened_ms=1_000,
            verdict=None,
        ),
        **changes,
    )


def report(rank: int, status: str = "Connected", **changes: Any) -> Report:
    """A report of the epoch and roster above."""
    made = Report(
        rank=rank,
        incarnation=life(rank),
        status=status,
        epoch=EPOCH,
        applied=1,
        floor=EPOCH.number,
        node=f"node-{rank}",
        lease_ms=6_000,
    )
    return made._replace(**changes)


def view(rank: int, status: str = "Connected", *, left_ms: int = 5_000, **changes: Any) -> RankView:
    """A live rank."""
    return RankView(rank, report(rank, status, **changes), left_ms)


def silent(rank: int, undecodable: str = "") -> RankView:
    """A rank without a report that can be read."""
    return RankView(rank, undecodable=undecodable)


def picture(*views: RankView, epoch: EpochRecord | None = None, opened: bool = True, **changes: Any) -> Snapshot:
    """A snapshot of these ranks, in an epoch that is going on unless told otherwise."""
    return replace(
        Snapshot(
            group="demo",
            world_size=len(views),
            now_ms=10_000,
            epoch=(epoch or record(len(views))) if opened else None,
            ranks=views,
            log_end=LogId(EPOCH.number, 3),
        ),
        **changes,
    )


def aborted(reason: str = "it broke", culprit: int | None = 1) -> Verdict:
    return Verdict.aborted(reason, culprit)

"""A Redis-backed barrier for ranks that must act together. Knows ranks and status names, nothing about models.

Planner's side: `Barrier`. Rank's side: `Member`. Both take a ``redis.asyncio.Redis`` or a store from `connect`.

It logs with loguru, but only after ``logger.enable("barrier")``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from barrier.barrier import Barrier, Wake
    from barrier.clock import Clock, SystemClock
    from barrier.errors import (
        ClaimLost,
        HeartbeatFailed,
        InvalidName,
        InvalidSettings,
        PartFailed,
        RankgateError,
        RankTaken,
        StoreCorrupt,
        StoreError,
        StoreFull,
        StoreRefused,
        StoreUnavailable,
        StoreUnsuitable,
    )
    from barrier.member import Member
    from barrier.protocol.explain import explain, explain_key
    from barrier.protocol.ids import EpochId, LogId
    from barrier.protocol.log import EpochAnnounced, Garbage, LogEntry, TaskEntry, VerdictAnnounced
    from barrier.protocol.model import EpochRecord, Leadership, RankView, Snapshot, Verdict
    from barrier.protocol.outcomes import (
        Aborted,
        Already,
        CheckOutcome,
        Concluded,
        ConcludeOutcome,
        Disagree,
        Dispatched,
        DispatchOutcome,
        Fenced,
        Following,
        Leading,
        LeadOutcome,
        NotReady,
        Opened,
        OpenOutcome,
        Released,
        ReleaseOutcome,
        Restored,
        RestoreOutcome,
        Superseded,
        TimedOut,
        Unconcluded,
        Unknown,
        WaitOutcome,
    )
    from barrier.protocol.rank_state import NotPromised, Promised
    from barrier.protocol.report import Report, TaskOutcome
    from barrier.protocol.requirement import Break, RankRule, Requirement, all_ranks, find_break, missing_ranks
    from barrier.settings import Settings
    from barrier.store.connect import adopt, connect
    from barrier.store.store import Store

    __version__: str

__all__ = [
    "Aborted",
    "Already",
    "Barrier",
    "Break",
    "CheckOutcome",
    "ClaimLost",
    "Clock",
    "ConcludeOutcome",
    "Concluded",
    "Disagree",
    "DispatchOutcome",
    "Dispatched",
    "EpochAnnounced",
    "EpochId",
    "EpochRecord",
    "Fenced",
    "Following",
    "Garbage",
    "HeartbeatFailed",
    "InvalidName",
    "InvalidSettings",
    "LeadOutcome",
    "Leadership",
    "Leading",
    "LogEntry",
    "LogId",
    "Member",
    "NotPromised",
    "NotReady",
    "OpenOutcome",
    "Opened",
    "PartFailed",
    "Promised",
    "RankRule",
    "RankTaken",
    "RankView",
    "RankgateError",
    "ReleaseOutcome",
    "Released",
    "Report",
    "Requirement",
    "RestoreOutcome",
    "Restored",
    "Settings",
    "Snapshot",
    "Store",
    "StoreCorrupt",
    "StoreError",
    "StoreFull",
    "StoreRefused",
    "StoreUnavailable",
    "StoreUnsuitable",
    "Superseded",
    "SystemClock",
    "TaskEntry",
    "TaskOutcome",
    "TimedOut",
    "Unconcluded",
    "Unknown",
    "Verdict",
    "VerdictAnnounced",
    "WaitOutcome",
    "Wake",
    "adopt",
    "all_ranks",
    "connect",
    "explain",
    "explain_key",
    "find_break",
    "missing_ranks",
]

_HOME = {
    name: module
    for module, names in {
        "barrier._version": ("__version__",),
        "barrier.protocol.requirement": (
            "Break",
            "RankRule",
            "Requirement",
            "all_ranks",
            "find_break",
            "missing_ranks",
        ),
        "barrier.barrier": ("Barrier", "Wake"),
        "barrier.clock": ("Clock", "SystemClock"),
        "barrier.store.connect": ("adopt", "connect"),
        "barrier.errors": (
            "ClaimLost",
            "HeartbeatFailed",
            "InvalidName",
            "InvalidSettings",
            "PartFailed",
            "RankgateError",
            "RankTaken",
            "StoreCorrupt",
            "StoreError",
            "StoreFull",
            "StoreRefused",
            "StoreUnavailable",
            "StoreUnsuitable",
        ),
        "barrier.protocol.explain": ("explain", "explain_key"),
        "barrier.protocol.ids": ("EpochId", "LogId"),
        "barrier.member": ("Member",),
        "barrier.protocol.log": ("EpochAnnounced", "Garbage", "LogEntry", "TaskEntry", "VerdictAnnounced"),
        "barrier.protocol.model": ("EpochRecord", "Leadership", "RankView", "Snapshot", "Verdict"),
        "barrier.protocol.outcomes": (
            "Aborted",
            "Already",
            "CheckOutcome",
            "Concluded",
            "ConcludeOutcome",
            "Disagree",
            "Dispatched",
            "DispatchOutcome",
            "Fenced",
            "Following",
            "Leading",
            "LeadOutcome",
            "NotReady",
            "Opened",
            "OpenOutcome",
            "Released",
            "ReleaseOutcome",
            "Restored",
            "RestoreOutcome",
            "Superseded",
            "TimedOut",
            "Unconcluded",
            "Unknown",
            "WaitOutcome",
        ),
        "barrier.protocol.rank_state": ("NotPromised", "Promised"),
        "barrier.protocol.report": ("Report", "TaskOutcome"),
        "barrier.settings": ("Settings",),
        "barrier.store.store": ("Store",),
    }.items()
    for name in names
}

if "".join(sys.argv[:1]).rpartition("/")[2] != "rankgate":
    import_module("barrier.log")  # silences this package; the program rankgate imports it later


def __getattr__(name: str) -> Any:  # noqa: ANN401  as the interpreter calls it
    """Import a name when it is first used: a caller that needs only a setting does not wait for the import of redis-py."""
    if name not in _HOME:
        raise AttributeError(f"module 'barrier' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value

"""A Redis-backed barrier for ranks that must act together. Knows ranks and status names, nothing about models.

Planner's side: `Barrier`. Rank's side: `Member`. Both take a ``redis.asyncio.Redis`` or a store from `connect`.
"""

from barrier.arrivals import Break, RankRule, Requirement, all_ranks, find_break, missing_ranks
from barrier.barrier import Barrier, Wake
from barrier.clock import Clock, SystemClock
from barrier.connect import adopt, connect
from barrier.errors import (
    ClaimLost,
    InvalidName,
    InvalidSettings,
    RankgateError,
    RankTaken,
    StoreCorrupt,
    StoreError,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    StoreUnsuitable,
)
from barrier.explain import explain
from barrier.ids import EpochId, LogId
from barrier.member import (
    EpochAnnounced,
    Garbage,
    LogEntry,
    Member,
    NotPromised,
    Promised,
    TaskEntry,
    VerdictAnnounced,
)
from barrier.model import EpochRecord, Leadership, RankView, Snapshot, Verdict
from barrier.outcomes import (
    Aborted,
    Already,
    Concluded,
    Disagree,
    Dispatched,
    Fenced,
    Following,
    Leading,
    NotReady,
    Opened,
    Released,
    Restored,
    Superseded,
    TimedOut,
    Unconcluded,
    Unknown,
)
from barrier.report import Report, TaskOutcome
from barrier.settings import Settings
from barrier.store import Store

__all__ = [
    "Aborted",
    "Already",
    "Barrier",
    "Break",
    "ClaimLost",
    "Clock",
    "Concluded",
    "Disagree",
    "Dispatched",
    "EpochAnnounced",
    "EpochId",
    "EpochRecord",
    "Fenced",
    "Following",
    "Garbage",
    "InvalidName",
    "InvalidSettings",
    "Leadership",
    "Leading",
    "LogEntry",
    "LogId",
    "Member",
    "NotPromised",
    "NotReady",
    "Opened",
    "Promised",
    "RankRule",
    "RankTaken",
    "RankView",
    "RankgateError",
    "Released",
    "Report",
    "Requirement",
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
    "Wake",
    "adopt",
    "all_ranks",
    "connect",
    "explain",
    "find_break",
    "missing_ranks",
]

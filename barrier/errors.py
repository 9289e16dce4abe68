"""What can go wrong that is not an outcome.

    RankgateError
    ├── InvalidName           a namespace, group, status or step that may not become part of a key   (also a ValueError)
    ├── InvalidSettings       numbers that contradict one another                                    (also a ValueError)
    ├── StoreError            could not find out
    │   ├── StoreUnavailable  no connection, no answer in time, or an answer that says: not now
    │   ├── StoreRefused      wrong password, or a right that is missing
    │   ├── StoreUnsuitable   would lose keys without an error, is a replica, or is too old
    │   ├── StoreFull         out of memory; nothing was written
    │   └── StoreCorrupt      a key of the wrong type, or bytes that are not ours: the only one that waiting cannot mend
    ├── RankTaken             another incarnation holds every rank that was asked for
    ├── ClaimLost             another incarnation holds this rank now; this one must not write any more
    └── PartFailed            a mistake of ours ended a part of this process; its frames are in the log
        └── HeartbeatFailed   … the heartbeat of a rank, which accepts nothing any more

Expected outcomes (timed out, aborted, superseded…) are values in `barrier.protocol.outcomes`. A driver's error is translated once, in
`barrier.store.store`, with ``from``.

A running process waits after every `StoreError` but `StoreCorrupt`: a failover ends, a secret is renewed, an
administrator corrects a policy. So only listed errors are permanent; after an answer that is not known, the process
waits, too.
"""

from __future__ import annotations

__all__ = [
    "ClaimLost",
    "HeartbeatFailed",
    "InvalidName",
    "InvalidSettings",
    "PartFailed",
    "RankTaken",
    "RankgateError",
    "StoreCorrupt",
    "StoreError",
    "StoreFull",
    "StoreRefused",
    "StoreUnavailable",
    "StoreUnsuitable",
]


class RankgateError(Exception):
    """The root of every error of ours."""


class InvalidName(RankgateError, ValueError):
    """A name that may not become part of a key."""


class InvalidSettings(RankgateError, ValueError):
    """Numbers that contradict one another, or are out of range."""


class StoreError(RankgateError):
    """The store gave no usable answer. The result is unknown, which never means released.

    Attributes:
        passes: whether it may pass by itself. Then a process that was started with ``--wait-for-store`` waits. If only
            a person can mend it, the process says so at once.
    """

    passes: bool = True


class StoreUnavailable(StoreError):
    """No connection, no answer in time, or an answer that says: not now. The command may or may not have been carried out."""


class StoreRefused(StoreError):
    """Wrong password, or a right that the user does not have. It passes when a secret has been renewed."""


class StoreUnsuitable(StoreError):
    """A store on which the guarantees would not hold: it evicts keys, is a replica, or is too old. A replica passes: a failover ends."""

    def __init__(self, said: str, *, passes: bool = False) -> None:
        super().__init__(said)
        self.passes = passes


class StoreFull(StoreError):
    """The store is out of memory. Nothing was written."""


class StoreCorrupt(StoreError):
    """A key of the wrong type, or bytes that are not ours. Nothing was written. Waiting does not mend it."""

    passes = False


class RankTaken(RankgateError):
    """Other incarnations hold the ranks that were asked for."""


class ClaimLost(RankgateError):
    """Another incarnation holds this rank now; this one must not write any more."""


class PartFailed(RankgateError):
    """A mistake of ours ended a part of this process. The log has its frames. Its text is written nowhere, because it may quote a prompt."""


class HeartbeatFailed(PartFailed):
    """A mistake of ours ended this rank's heartbeat. It accepts nothing any more, and its lease lapses."""

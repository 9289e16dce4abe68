"""All times and sizes of the barrier, in one frozen object, which checks how they must relate."""

from __future__ import annotations

from dataclasses import dataclass, fields

from barrier.errors import InvalidSettings
from barrier.plain import plain, typed

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """Times in seconds, sizes in entries. An argument replaces the default; only the CLIs read the environment.

    Attributes:
        lease: lifetime of a report. A rank that is silent for so long counts as gone. Must exceed the longest healthy
            pause (garbage collection, a busy machine, a failover of the store). At least 0.05.
        heartbeat: how often a rank rewrites its whole report. At most a third of `lease`, so that two may be lost.
        command_timeout: the longest that one command may take; ``None`` means a fifth of `lease`. Must exceed a round
            trip. At most half of `lease`, so that ranks notice a slow store before their leases lapse.
        reader_block: how long one blocking read lasts; the next one follows. Below 5 s by default: some balancers drop
            a connection that was silent for 5 s.
        reader_margin: how much longer the socket of a blocking read waits than `reader_block`.
        backstop: how long a waiter waits at most before it looks again, since a wake-up may be lost.
        record_lifetime: lifetime of the epoch record, the leadership and the log, renewed by every write to them. It must
            exceed the longest time that an instance may be without any planner.
        output_lifetime: lifetime of one generation's chunks, counted from the last one.
        log_entries: limit of the task log.
        signal_entries: limit of the stream of wake-ups.
        event_entries: limit of the history.
    """

    lease: float = 6.0
    heartbeat: float = 2.0
    command_timeout: float | None = None
    reader_block: float = 4.0
    reader_margin: float = 2.0
    backstop: float = 5.0
    record_lifetime: float = 86_400.0
    output_lifetime: float = 600.0
    log_entries: int = 1_000
    signal_entries: int = 10_000
    event_entries: int = 10_000

    def __post_init__(self) -> None:
        """Check every number and every relation between them; raise `InvalidSettings` with both values."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name == "command_timeout":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise InvalidSettings(f"{field.name} is {plain(value)}; it must be a finite number above 0")
            if field.name.endswith("_entries") and not isinstance(value, int):
                raise InvalidSettings(f"{field.name} is {plain(value)}; it counts entries and must be a whole number")
        if self.lease < 0.05:
            raise InvalidSettings(
                f"lease is {typed(self.lease)} s; it must be at least 0.05 s, or no network can renew it in time"
            )
        if self.heartbeat * 3 > self.lease * 1.00001:  # 0.2 × 3 is above 0.6 in binary, and advice is rounded
            raise InvalidSettings(
                f"heartbeat is {typed(self.heartbeat)} s and lease is {typed(self.lease)} s; the heartbeat must be at most a third of the "
                f"lease, so that two may be lost: set heartbeat to {typed(self.lease / 3)} or less, or lease to "
                f"{typed(self.heartbeat * 3)} or more"
            )
        if self.command_timeout is not None and self.command_timeout * 2 > self.lease:
            raise InvalidSettings(
                f"command_timeout is {typed(self.command_timeout)} s and lease is {typed(self.lease)} s; it must be at most half the "
                f"lease: set it to {typed(self.lease / 2)} or less"
            )
        if self.record_lifetime < self.lease:
            raise InvalidSettings(
                f"record_lifetime is {typed(self.record_lifetime)} s and lease is {typed(self.lease)} s; record_lifetime must be at least the lease"
            )

    @property
    def command_seconds(self) -> float:
        """The socket timeout of one command, in seconds."""
        return self.lease / 5 if self.command_timeout is None else self.command_timeout

    @property
    def distrust_after(self) -> float:
        """Seconds without an acknowledged renewal after which a rank accepts no task until it has re-read the epoch.

        The lease minus one command timeout, because the new lifetime counts from the moment at which the server ran the
        renewal.
        """
        return self.lease - self.command_seconds

    @property
    def reread_after(self) -> float:
        """Seconds since the last renewal after which a rank reads before it writes: it may have been replaced meanwhile."""
        return self.lease / 2

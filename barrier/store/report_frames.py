"""The commands of one rank's reports. The parts that never change are packed once, because the dispatch after an arrival waits for a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, TypeAlias

from barrier.protocol.record import LOOK_FIELDS
from barrier.protocol.report import Report
from barrier.settings import Settings
from barrier.store.connection import GAP, Template, pack
from barrier.store.keys import Keys

__all__ = ["Command", "Event", "ReportFrames", "append"]


Command: TypeAlias = tuple[Any, ...]

Event: TypeAlias = Mapping[str, str]
"""One line of history: a flat mapping of short texts."""


class ReportFrames:
    """Makes the commands that one rank sends for a report.

    Args:
        keys: the group's keys.
        settings: lifetimes and caps.
        rank: whose reports.
        incarnation: this life's name.

    Attributes:
        rank: whose reports.
        holder: asks which incarnation holds the rank.
        look: renews the claim, and asks for the epoch's record (`barrier.protocol.record.LOOK_FIELDS`) and the log's last entry.
    """

    def __init__(self, keys: Keys, settings: Settings, rank: int, incarnation: str) -> None:
        self._keys = keys
        self._settings = settings
        self.rank = rank
        self._incarnation = incarnation
        claim, lease_ms = keys.claim(rank), round(settings.lease * 1000)
        self.holder: bytes = pack(("GET", claim))
        self.look: tuple[bytes, bytes, bytes, bytes] = (
            pack(("SET", claim, incarnation, "PX", lease_ms, "NX")),  # sets a claim that was flushed
            pack(("PEXPIRE", claim, lease_ms)),
            pack(("HMGET", keys.epoch, *LOOK_FIELDS)),
            pack(("XREVRANGE", keys.tasks, "+", "-", "COUNT", 1)),
        )
        self._report = Template(("SET", keys.rank(rank), GAP, "PX", lease_ms))
        self._hint = Template(self._hint_command(GAP, GAP, alarm=False))
        self._alarm = Template(self._hint_command(GAP, GAP, alarm=True))
        self._keep_signals = pack(self._keep(keys.signals))

    def report(self, report: Report) -> bytes:
        """The command that writes the report."""
        return self._report.fill(report.encode())

    def hints(self, report: Report, *, alarm: bool) -> list[bytes]:
        """The commands that wake the planners."""
        hint = self._alarm if alarm else self._hint
        return [hint.fill(str(report.epoch or "-").encode(), report.status.encode()), self._keep_signals]

    def farewell(self, report: Report) -> list[Command]:
        """The commands that wake the planners when a rank leaves; not packed, for a pipeline."""
        hint = self._hint_command(str(report.epoch or "-"), report.status, alarm=True)
        return [hint, self._keep(self._keys.signals)]

    def history(self, events: Sequence[Event]) -> list[Command]:
        """The commands that append to the history; none if there are no events."""
        if not events:
            return []
        mine = ("source", "rank", "rank", self.rank, "inc", self._incarnation)
        entries = [(*mine, *chain.from_iterable(event.items())) for event in events]
        appended = [append(self._keys.events, entry, self._settings.event_entries) for entry in entries]
        return [*appended, self._keep(self._keys.events)]

    def _hint_command(self, epoch: str, status: str, *, alarm: bool) -> Command:
        fields = ("kind", "report", "rank", self.rank, "epoch", epoch, "inc", self._incarnation, "status", status)
        said = (*fields, *(("alarm", "1") if alarm else ()))
        return append(self._keys.signals, said, self._settings.signal_entries)

    def _keep(self, key: str) -> Command:
        """The command that renews a stream's lifetime."""
        return ("PEXPIRE", key, round(self._settings.record_lifetime * 1000))


def append(key: str, entry: Sequence[str | int | bytes], cap: int) -> Command:
    """The command that appends names and values, in turn, to a capped stream. The caller then renews the stream's lifetime."""
    return ("XADD", key, "MAXLEN", "~", cap, "*", *entry)

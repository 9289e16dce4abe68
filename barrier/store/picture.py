"""Decodes the store's replies (the record, the reports, the leader) into one `Snapshot`. Pure; `barrier.store.verbs` asks the store.

What cannot be read counts as missing, and the picture says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from barrier.errors import InvalidName
from barrier.plain import number
from barrier.protocol.ids import INCARNATION_WIDTH, EpochId, LogId
from barrier.protocol.model import EpochRecord, Leadership, RankView, Snapshot, StepRecord, Verdict
from barrier.protocol.report import MAX_REPORT_BYTES, Report, UndecodableReport
from barrier.protocol.wire import refusal_in_record

__all__ = ["DAY_MS", "as_fields", "as_words", "read_record", "read_snapshot"]


DAY_MS = 86_400_000
"""How far an epoch's number may be above the store's clock, unless a planner is known to have given it; as in lua/prelude.lua."""


def as_words(reply: Sequence[Any]) -> list[str]:
    """A reply's parts as text."""
    return [part.decode("utf-8", "replace") if isinstance(part, bytes) else str(part) for part in reply]


def read_snapshot(group: str, world_size: int, floor: int, reply: Sequence[Any]) -> Snapshot:
    """Read the reply of `inspect`.

    Args:
        group: the group's name.
        world_size: how many ranks were looked at.
        floor: the highest epoch number that a planner has given, as far as the caller knows.
        reply: the store's clock in milliseconds, the record, the leader, the ends of the task log and of the hints, then a report and
            what is left of its lease in milliseconds for each rank.
    """
    now_ms = int(reply[0])
    leader, leader_left_ms = _leader(as_fields(reply[2]), now_ms)
    epoch, unreadable = read_record(as_fields(reply[1]), world_size)
    number, n = as_words([reply[3]])[0].split("-")
    highest = max(now_ms + DAY_MS, epoch.id.number if epoch else 0, int(number), floor)
    views = [
        _believed(_view(rank, raw, int(left)), now_ms, highest)
        for rank, (raw, left) in enumerate(zip(reply[5::2], reply[6::2], strict=True))
    ]
    return Snapshot(
        group=group,
        world_size=world_size,
        now_ms=now_ms,
        epoch=epoch,
        ranks=tuple(views),
        leader=leader,
        leader_left_ms=leader_left_ms,
        log_end=LogId(int(number), int(n)),
        signals_end=as_words([reply[4]])[0],
        unreadable=unreadable,
    )


def _leader(fields: Mapping[str, str], now_ms: int) -> tuple[Leadership | None, int]:
    """Who leads, and for how many milliseconds more. If this cannot be read, nobody leads, and `lead` writes it anew."""
    try:
        return Leadership(int(fields["term"]), fields["holder"]), max(0, int(fields["until_ms"]) - now_ms)
    except (KeyError, ValueError):
        return None, 0


def as_fields(flat: Sequence[bytes]) -> dict[str, str]:
    """A hash as a script returns it: names and values in turn."""
    words = as_words(flat)
    return dict(zip(words[::2], words[1::2], strict=True))


def _view(rank: int, raw: bytes, left_ms: int) -> RankView:
    if not raw:
        return RankView(rank)
    try:
        return RankView(rank, Report.decode(raw[: MAX_REPORT_BYTES + 1], rank), max(left_ms, 0))
    except UndecodableReport as error:
        return RankView(rank, None, 0, str(error))


def _believed(view: RankView, now_ms: int, highest: int) -> RankView:
    """The view, without a report that names a number above `highest`: nobody may take the number over, and the view says whose it is."""
    report = view.report
    said = 0 if report is None else max(report.floor, report.epoch.number if report.epoch else 0)
    if said <= highest:
        return view
    return RankView(
        view.rank,
        None,
        0,
        f"rank {view.rank}: its report names epoch {said}, {(said - now_ms) / DAY_MS:,.0f} days above the store's clock: no planner "
        "can have given that number, so the report is ignored; restart that runner",
    )


def read_record(fields: Mapping[str, str], world_size: int) -> tuple[EpochRecord | None, str]:
    """Read the record, or say why it cannot be read: it then counts as missing (fail closed)."""
    if not fields:
        return None, ""
    refusal = refusal_in_record(fields.get("wire"))
    if refusal:
        return None, f"it {refusal}"
    try:
        chunks = sorted(
            (int(name.partition(":")[2]), value) for name, value in fields.items() if name.startswith("roster:")
        )
        joined = "".join(value for _, value in chunks)
        roster = tuple(joined[i : i + INCARNATION_WIDTH] for i in range(0, len(joined), INCARNATION_WIDTH))
        recorded_size = int(fields["world_size"])
        if recorded_size != world_size or len(joined) != recorded_size * INCARNATION_WIDTH:
            held = len(joined) / INCARNATION_WIDTH
            return (
                None,
                f"it is for {recorded_size} ranks, its roster has {number(held)}, and the caller asks for {world_size}",
            )
        steps = {
            name.removeprefix("step:"): _step_record(value)
            for name, value in fields.items()
            if name.startswith("step:")
        }
        record = EpochRecord(
            id=EpochId.parse(f"{fields['number']}-{fields['nonce']}"),
            ordinal=int(fields["ordinal"]),
            term=int(fields["term"]),
            world_size=recorded_size,
            roster=roster,
            steps=steps,
            last_n=int(fields["last_n"]),
            digest="" if fields["digest"] == "-" else fields["digest"],
            notes=fields["notes"],
            opened_ms=int(fields["opened_ms"]),
            verdict=Verdict.model_validate_json(fields["verdict"]) if "verdict" in fields else None,
        )
    except (KeyError, ValueError, TypeError, ValidationError, InvalidName) as error:
        return None, f"it is damaged ({type(error).__name__})"
    return record, ""


def _step_record(text: str) -> StepRecord:
    entry, _, attempt = text.partition(":")
    return StepRecord(LogId.parse(entry).n, int(attempt))

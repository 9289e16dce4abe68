"""The planner's verbs: one typed coroutine per script of ``barrier/lua``, whose replies become outcomes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Required, TypedDict, Unpack

from redis.exceptions import NoScriptError, RedisError

from barrier.protocol.ids import EpochId, LogId
from barrier.protocol.model import Leadership, Snapshot, Verdict, read_verdict
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
    Restored,
    RestoreOutcome,
    Superseded,
    Unconcluded,
    Unknown,
)
from barrier.protocol.report import MAX_REPORT_BYTES
from barrier.protocol.requirement import Requirement
from barrier.settings import Settings
from barrier.store.connection import Arguments
from barrier.store.keys import Keys
from barrier.store.picture import as_fields, as_words, read_snapshot
from barrier.store.script import call, not_understood, run, script
from barrier.store.store import Store, StreamEntry, is_spoiled, raw_entries

__all__ = [
    "DispatchArgs",
    "check",
    "conclude",
    "dispatch",
    "dispatch_when_pushed",
    "inspect",
    "lead",
    "look",
    "open_epoch",
    "restore",
]


_HINTS = 2_000
"""Hints taken in one read."""


@lru_cache(maxsize=64)
def _rank_keys(keys: Keys, world_size: int) -> Arguments:
    """The keys of all reports. Cached: to make and pack 4,096 of them takes a millisecond."""
    return Arguments.of(keys.ranks(world_size))


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _rules(requirement: Requirement) -> list[str]:
    return [part for rule in requirement for part in (str(rule.first), str(rule.last), ",".join(rule.statuses))]


async def lead(store: Store, keys: Keys, *, holder: str, floor: int, lease: float | None) -> LeadOutcome | None:
    """Take or renew leadership for `lease` seconds; ``None`` gives it back (and answers ``None``)."""
    args = {
        "holder": holder,
        "lease_ms": 0 if lease is None else _milliseconds(lease),
        "floor": floor,
        "record_ms": _milliseconds(store.settings.record_lifetime),
    }
    words = as_words(await run(store, "lead", {"leader": keys.leader}, args))
    match words:
        case ["LEADER", term]:
            return Leading(Leadership(int(term), holder))
        case ["FOLLOWER", other, term, left]:
            return Following(Leadership(int(term), other), int(left))
        case ["RESIGNED"]:
            return None
        case _:
            raise not_understood("lead", words)


async def open_epoch(
    store: Store,
    keys: Keys,
    *,
    leadership: Leadership,
    nonce: str,
    world_size: int,
    floor: int,
    ordinal: int,
    digest: str,
    notes: str,
) -> OpenOutcome:
    """Start a new epoch if every rank has a live report; repeating it with one nonce is harmless."""
    args = _under(leadership) | _caps(store.settings, "log", "signal", "event")
    args |= {"nonce": nonce, "floor": floor, "ordinal": ordinal, "digest": digest or "-", "notes": notes}
    words = as_words(await run(store, "open", _named(keys) | {"rank": _rank_keys(keys, world_size)}, args))
    match words:
        case ["OPENED", number, same_nonce, attempt]:
            return Opened(EpochId(int(number), same_nonce), int(attempt))
        case ["NOT_READY", *ranks]:
            return NotReady(_integers(ranks))
        case ["DISAGREE", *pairs]:
            return Disagree(digest, {int(rank): found for rank, found in zip(pairs[::2], pairs[1::2], strict=True)})
        case ["UNCONCLUDED", number, other]:
            return Unconcluded(EpochId(int(number), other))
        case ["FENCED", term, holder]:
            return Fenced(int(term), holder)
        case _:
            raise not_understood("open", words)


async def restore(
    store: Store,
    keys: Keys,
    *,
    leadership: Leadership,
    epoch: EpochId,
    status: str,
    steps: Sequence[str],
    world_size: int,
    floor: int,
    ordinal: int,
    digest: str,
    notes: str,
) -> RestoreOutcome:
    """Write a lost record back, if all ranks agree on epoch, status and log position."""
    args = _under(leadership) | _caps(store.settings, "signal", "event") | _naming(epoch)
    args |= {
        "known_number": floor,
        "status": status,
        "steps": ",".join(steps),
        "ordinal": ordinal,
        "digest": digest or "-",
        "notes": notes,
    }
    words = as_words(await run(store, "restore", _named(keys) | {"rank": _rank_keys(keys, world_size)}, args))
    match words:
        case ["RESTORED", number, nonce, attempt]:
            return Restored(EpochId(int(number), nonce), int(attempt))
        case ["NOT_READY", *ranks]:
            return NotReady(_integers(ranks))
        case _:
            return _refusal("restore", words, Superseded, Fenced)


class DispatchArgs(TypedDict, total=False):
    """The arguments of `dispatch`; see `barrier.Barrier.dispatch` and the script's header."""

    leadership: Required[Leadership]
    epoch: Required[EpochId]
    step: Required[str]
    payload: Required[str]
    requirement: Required[Requirement]
    to: Required[tuple[int, int]]
    world_size: Required[int]
    attempt: int
    after: str
    repeatable: bool
    endpoints: bool
    seen_n: int
    known_n: int


async def dispatch(store: Store, keys: Keys, **args: Unpack[DispatchArgs]) -> DispatchOutcome:
    """Check every rank and append the task, at one instant, once per step."""
    return _dispatched(await run(store, "dispatch", *_dispatch_call(store, keys, args)))


async def dispatch_when_pushed(
    store: Store,
    reader: Any,  # noqa: ANN401  as `Store.reader` makes it
    keys: Keys,
    *,
    hints_after: str,
    seconds: float,
    try_first: bool,
    **args: Unpack[DispatchArgs],
) -> tuple[list[StreamEntry], DispatchOutcome | None]:
    """Send a dispatch that the server runs when the next hint comes; return the hints and the answer.

    Args:
        store: the store.
        keys: the group's.
        reader: a client of `Store.reader`, used for nothing else.
        hints_after: the id of the last hint that is known.
        seconds: how long to wait for a hint, at most `Settings.reader_block`; then the dispatch is tried without one.
        try_first: try the dispatch at once as well: then the server has the script and its data at hand when the hint
            comes.
        args: as `dispatch`'s.

    The answer is ``None`` if there is none: the script or the connection was lost.
    """
    loaded = script("dispatch")
    block = min(_milliseconds(seconds), _milliseconds(store.settings.reader_block))
    read = ("XREAD", "COUNT", _HINTS, "BLOCK", block, "STREAMS", keys.signals, hints_after)
    with store.errors():
        words = ("EVALSHA", loaded.sha, *call(loaded, *_dispatch_call(store, keys, args)))
        pushed, reply = await store.when_pushed(reader, read, words, settled=_settles if try_first else None)
        if is_spoiled(pushed):
            await store.append_if_possible(keys.signals, ())
            pushed = None
        for one in (pushed, reply):
            if isinstance(one, RedisError) and not isinstance(one, NoScriptError):
                raise one
    return raw_entries(pushed), None if reply is None or isinstance(reply, NoScriptError) else _dispatched(reply)


def _settles(reply: object) -> bool:
    """Whether this answer of a dispatch is final: the dispatch need not be tried again at the next hint."""
    return not isinstance(reply, list) or reply[:1] != [b"NOT_READY"]


def _dispatch_call(
    store: Store, keys: Keys, args: DispatchArgs
) -> tuple[dict[str, str | Arguments], dict[str, str | int | Sequence[str]]]:
    first, last = args["to"]
    named = _named(keys) | {"once": keys.once(args["step"]), "rank": _rank_keys(keys, args["world_size"])}
    del named["signals"]  # the ranks are woken by the log itself
    return named, {
        **_under(args["leadership"]),
        **_caps(store.settings, "log", "event"),
        **_naming(args["epoch"]),
        "step": args["step"],
        "attempt": args.get("attempt", 1),
        "after": args.get("after", ""),
        "repeatable": int(args.get("repeatable", False)),
        "to": f"{first}-{last}",
        "seen_n": args.get("seen_n", 0),
        "known_n": args.get("known_n", 0),
        "once_ms": _milliseconds(store.settings.output_lifetime),
        "endpoints": int(args.get("endpoints", False)),
        "payload": args["payload"],
        "rule": _rules(args["requirement"]),
    }


def _dispatched(reply: Sequence[Any]) -> DispatchOutcome:
    words = as_words(reply)
    match words:
        case ["DISPATCHED", entry]:
            return Dispatched(LogId.parse(entry))
        case ["ALREADY", entry]:
            return Already(LogId.parse(entry))
        case ["NOT_READY", *ranks]:
            return NotReady(_integers(ranks))
        case _:
            return _refusal("dispatch", words, Aborted, Superseded, Fenced, Unknown)


async def check(store: Store, keys: Keys, *, epoch: EpochId, requirement: Requirement, world_size: int) -> CheckOutcome:
    """Whether all ranks have arrived at this instant; writes nothing."""
    args = _naming(epoch) | {"rule": _rules(requirement)}
    words = as_words(await run(store, "check", {"epoch": keys.epoch, "rank": _rank_keys(keys, world_size)}, args))
    match words:
        case ["READY"]:
            return Released(epoch)
        case ["NOT_READY", *ranks]:
            return NotReady(_integers(ranks))
        case _:
            return _refusal("check", words, Aborted, Superseded, Unknown)


async def conclude(
    store: Store, keys: Keys, *, leadership: Leadership, epoch: EpochId, verdict: Verdict, seen_n: int
) -> ConcludeOutcome:
    """Set the verdict; the first one wins."""
    args = _under(leadership) | _caps(store.settings, "log", "signal", "event") | _naming(epoch)
    args |= {"verdict": verdict.model_dump_json(exclude=None if verdict.code else {"code"}), "seen_n": seen_n}
    words = as_words(await run(store, "conclude", _named(keys), args))
    match words:
        case ["CONCLUDED"]:
            return Concluded(verdict, first=True)
        case ["ALREADY", text]:
            return Concluded(read_verdict(text), first=False)
        case _:
            return _refusal("conclude", words, Superseded, Fenced, Unknown)


async def inspect(store: Store, keys: Keys, *, world_size: int, floor: int = 0) -> Snapshot:
    """Read one consistent picture. A rank that reports an epoch number that no planner can have given is shown without its report.

    Args:
        store: the store.
        keys: the group's.
        world_size: how many ranks to look at.
        floor: the highest epoch number that a planner has given, as far as the caller knows.
    """
    named = {"epoch": keys.epoch, "leader": keys.leader, "tasks": keys.tasks, "signals": keys.signals}
    reply = await run(store, "inspect", named | {"rank": _rank_keys(keys, world_size)}, {})
    return read_snapshot(keys.group, world_size, floor, reply)


async def look(store: Store, keys: Keys, *, world_size: int, floor: int = 0) -> Snapshot:
    """The picture that `inspect` gives, by plain reads in one MULTI: for users who may run no scripts, such as observers.

    It does not read the task log, which holds prompts: the record says where the log ends.
    """
    fixed = [
        ("TIME",),
        ("HGETALL", keys.epoch),
        ("HGETALL", keys.leader),
        ("XREVRANGE", keys.signals, "+", "-", "COUNT", 1),
    ]
    ranks = [
        command
        for key in keys.ranks(world_size)
        for command in (("GETRANGE", key, 0, MAX_REPORT_BYTES), ("PTTL", key))  # one byte more than a report may have
    ]
    with store.errors():
        # A rank whose key has the wrong type counts as missing. The hints may be unreadable: they are not the truth.
        time, record, leader, newest, *reports = await store.transact(
            [*fixed, *ranks], may_fail=range(3, len(fixed) + len(ranks))
        )
    known = as_fields(record)
    end = f"{known.get('number', '')}-{known.get('last_n', '')}"
    reply: list[Any] = [
        int(time[0]) * 1000 + int(time[1]) // 1000,
        record,
        leader,
        end.encode() if re.fullmatch(r"[0-9]{1,16}-[0-9]{1,16}", end) else b"0-0",
        newest[0][0] if newest and not isinstance(newest, RedisError) else b"0-0",
        *(b"" if isinstance(one, RedisError) else one for one in reports),
    ]
    return read_snapshot(keys.group, world_size, floor, reply)


def _under(leadership: Leadership) -> dict[str, Any]:
    return {"term": leadership.term, "holder": leadership.holder}


def _naming(epoch: EpochId) -> dict[str, Any]:
    return {"number": epoch.number, "nonce": epoch.nonce}


def _caps(settings: Settings, *streams: str) -> dict[str, Any]:
    caps = {f"{stream}_cap": getattr(settings, f"{stream}_entries") for stream in streams}
    return caps | {"record_ms": _milliseconds(settings.record_lifetime)}


def _named(keys: Keys) -> dict[str, Any]:
    return {
        "epoch": keys.epoch,
        "leader": keys.leader,
        "tasks": keys.tasks,
        "signals": keys.signals,
        "events": keys.events,
    }


def _integers(words: Sequence[str]) -> tuple[int, ...]:
    return tuple(int(word) for word in words)


def _refusal(name: str, words: Sequence[str], *allowed: type) -> Any:  # noqa: ANN401  the caller names the types
    refusal: Aborted | Superseded | Fenced | Unknown
    match words:
        case ["ABORTED", text]:
            refusal = Aborted(read_verdict(text))
        case ["SUPERSEDED", number, ""]:
            refusal = Superseded(None)
        case ["SUPERSEDED", number, nonce]:
            refusal = Superseded(EpochId(int(number), nonce))
        case ["FENCED", term, holder]:
            refusal = Fenced(int(term), holder)
        case ["UNKNOWN", reason]:
            refusal = Unknown(reason)
        case _:
            raise not_understood(name, words)
    if not isinstance(refusal, allowed):
        raise not_understood(name, words)
    return refusal

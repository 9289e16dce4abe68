"""The planner's verbs: one typed coroutine per script. The only module that knows KEYS and ARGV.

Arguments are passed by name and put in the order of the script's own header, so a header that lies breaks at once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, Required, TypedDict, Unpack

from pydantic import ValidationError
from redis.exceptions import NoScriptError, RedisError

from barrier.arrivals import Requirement
from barrier.errors import InvalidName, StoreUnavailable
from barrier.ids import INCARNATION_WIDTH, EpochId, LogId
from barrier.keys import Keys
from barrier.model import EpochRecord, Leadership, RankView, Snapshot, StepRecord, Verdict
from barrier.outcomes import (
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
from barrier.plain import number
from barrier.prompt import Arguments
from barrier.report import MAX_REPORT_BYTES, Report, UndecodableReport
from barrier.settings import Settings
from barrier.store import Store, StreamEntry, is_spoiled, raw_entries

READ_ONLY = ("check", "inspect")
"""Verbs that write nothing: sent as such where the server knows how, so that they need no right to write."""

VERBS = ("lead", "open", "restore", "dispatch", "check", "conclude", "inspect")
DAY_MS = 86_400_000
"""How far above the store's clock an epoch's number may be that no planner is known to have given; as in lua/prelude.lua."""

_HINTS = 2_000
"""Hints taken in one read."""


@dataclass(frozen=True, slots=True)
class Script:
    """One `.lua` file with the shared prelude before it, and the argument names that its header declares."""

    name: str
    text: str
    sha: str
    keys: tuple[str, ...]
    args: tuple[str, ...]
    replies: tuple[str, ...]


@cache
def script(name: str) -> Script:
    """Load one verb from the package."""
    folder = files("barrier") / "lua"
    body = (folder / f"{name}.lua").read_text("utf-8")
    text = (folder / "prelude.lua").read_text("utf-8") + "\n" + body
    return Script(
        name=name,
        text=text,
        sha=hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest(),
        keys=tuple(_header(body, "KEYS").split()),
        args=tuple(_header(body, "ARGV").split()),
        replies=tuple(re.findall(r"[A-Z_]{4,}", _header(body, "Replies"))),
    )


def _header(body: str, field: str) -> str:
    """The text of one header field, with its continuation lines."""
    lines = iter(body.splitlines())
    for line in lines:
        if line.startswith(f"-- {field}:"):
            text = line.partition(":")[2]
            for more in lines:
                if not more.startswith("--   "):
                    break
                text += " " + more[2:].strip()
            return text
    raise LookupError(f"the script has no {field} header")


async def _run(
    store: Store,
    name: str,
    keys: Mapping[str, str | Arguments],
    args: Mapping[str, str | int | Sequence[str]],
) -> list[Any]:
    """Run one verb: EVALSHA, and EVAL with the whole text where the server does not know it (it may have been flushed)."""
    loaded = script(name)
    words = _call(loaded, keys, args)
    suffix = "_RO" if name in READ_ONLY and store.read_only_scripts else ""
    with store.errors():
        [reply] = await store.exchange([(f"EVALSHA{suffix}", loaded.sha, *words)])
        if isinstance(reply, NoScriptError):
            [reply] = await store.exchange([(f"EVAL{suffix}", loaded.text, *words)])
        if isinstance(reply, RedisError):
            raise reply
        answered: Any = reply
        if not isinstance(reply, list):
            raise _not_understood(name, reply)
        return answered


def _call(
    loaded: Script, keys: Mapping[str, str | Arguments], args: Mapping[str, str | int | Sequence[str]]
) -> list[str | int | Arguments]:
    """What follows a script's name: the number of keys, the keys, the arguments."""
    named = _ordered(loaded.keys, keys)
    count = sum(word.count if isinstance(word, Arguments) else 1 for word in named)
    return [count, *named, *_ordered(loaded.args, args)]


def _ordered(names: tuple[str, ...], values: Mapping[str, Any]) -> list[str | Arguments]:
    """Put named values into the header's order; a name that ends in ``...`` takes several and stands last."""
    if len(names) != len(values):
        raise LookupError(f"the header declares {names}, the call gives {tuple(values)}")
    ordered: list[str | Arguments] = []
    for name in names:
        if not name.endswith("..."):
            ordered.append(str(values[name]))
        elif isinstance(several := values[name.removesuffix("...")], Arguments):
            ordered.append(several)
        else:
            ordered.extend(several)
    return ordered


@lru_cache(maxsize=64)
def _rank_keys(keys: Keys, world_size: int) -> Arguments:
    """The keys of all reports. Remembered: to make and pack 4,096 of them takes a millisecond, in each call."""
    return Arguments.of(keys.ranks(world_size))


def _words(reply: Sequence[Any]) -> list[str]:
    return [part.decode("utf-8", "replace") if isinstance(part, bytes) else str(part) for part in reply]


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _rules(requirement: Requirement) -> list[str]:
    return [part for rule in requirement for part in (str(rule.first), str(rule.last), ",".join(rule.statuses))]


def _not_understood(name: str, words: object) -> StoreUnavailable:
    """Somebody between us and the store, perhaps: what is not known may pass."""
    return StoreUnavailable(f"verb {name} was answered with {str(words)[:80]}, which this version does not understand")


async def lead(store: Store, keys: Keys, *, holder: str, floor: int, lease: float | None) -> LeadOutcome | None:
    """Take or renew leadership for `lease` seconds; ``None`` gives it back (and answers ``None``)."""
    args = {
        "holder": holder,
        "lease_ms": 0 if lease is None else _milliseconds(lease),
        "floor": floor,
        "record_ms": _milliseconds(store.settings.record_lifetime),
    }
    words = _words(await _run(store, "lead", {"leader": keys.leader}, args))
    match words:
        case ["LEADER", term]:
            return Leading(Leadership(int(term), holder))
        case ["FOLLOWER", other, term, left]:
            return Following(Leadership(int(term), other), int(left))
        case ["RESIGNED"]:
            return None
        case _:
            raise _not_understood("lead", words)


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
    words = _words(await _run(store, "open", _named(keys) | {"rank": _rank_keys(keys, world_size)}, args))
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
            raise _not_understood("open", words)


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
    words = _words(await _run(store, "restore", _named(keys) | {"rank": _rank_keys(keys, world_size)}, args))
    match words:
        case ["RESTORED", number, nonce, attempt]:
            return Restored(EpochId(int(number), nonce), int(attempt))
        case ["NOT_READY", *ranks]:
            return NotReady(_integers(ranks))
        case _:
            return _refusal("restore", words, Superseded, Fenced)


class DispatchArgs(TypedDict, total=False):
    """What `dispatch` is told; see `barrier.Barrier.dispatch` and the script's header."""

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
    return _dispatched(await _run(store, "dispatch", *_dispatch_call(store, keys, args)))


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
    """Leave a dispatch with the server, which runs it when the next hint comes; returns the hints and the answer.

    Args:
        store: the store.
        keys: the group's.
        reader: a client of `Store.reader`, used for nothing else.
        hints_after: the id of the last hint that is known.
        seconds: how long to wait for a hint; the dispatch is tried then too. At most `Settings.reader_block` is waited.
        try_first: try it at once as well, so that the server has the script, and what that reads, at hand when the hint comes.
        args: as `dispatch`'s.

    The answer is ``None`` where there is none: the server has lost the script, or the connection.
    """
    loaded = script("dispatch")
    block = min(_milliseconds(seconds), _milliseconds(store.settings.reader_block))
    read = ("XREAD", "COUNT", _HINTS, "BLOCK", block, "STREAMS", keys.signals, hints_after)
    with store.errors():
        call = ("EVALSHA", loaded.sha, *_call(loaded, *_dispatch_call(store, keys, args)))
        pushed, reply = await store.when_pushed(reader, read, call, settled=_settles if try_first else None)
        if is_spoiled(pushed):
            await store.append_if_possible(keys.signals, ())
            pushed = None
        for one in (pushed, reply):
            if isinstance(one, RedisError) and not isinstance(one, NoScriptError):
                raise one
    return raw_entries(pushed), None if reply is None or isinstance(reply, NoScriptError) else _dispatched(reply)


def _settles(reply: object) -> bool:
    """Whether a dispatch that answered so need not be tried again when the next hint comes."""
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
    words = _words(reply)
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
    words = _words(await _run(store, "check", {"epoch": keys.epoch, "rank": _rank_keys(keys, world_size)}, args))
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
    """Latch the verdict; the first one wins."""
    args = _under(leadership) | _caps(store.settings, "log", "signal", "event") | _naming(epoch)
    args |= {"verdict": verdict.model_dump_json(exclude=None if verdict.code else {"code"}), "seen_n": seen_n}
    words = _words(await _run(store, "conclude", _named(keys), args))
    match words:
        case ["CONCLUDED"]:
            return Concluded(verdict, first=True)
        case ["ALREADY", text]:
            return Concluded(_verdict(text), first=False)
        case _:
            return _refusal("conclude", words, Superseded, Fenced, Unknown)


async def inspect(store: Store, keys: Keys, *, world_size: int, floor: int = 0) -> Snapshot:
    """Read one consistent picture. A rank that says an epoch's number that nobody can have given it is shown without its report.

    Args:
        store: the store.
        keys: the group's.
        world_size: how many ranks to look at.
        floor: the highest number of an epoch that the caller knows to have been given.
    """
    named = {"epoch": keys.epoch, "leader": keys.leader, "tasks": keys.tasks, "signals": keys.signals}
    reply = await _run(store, "inspect", named | {"rank": _rank_keys(keys, world_size)}, {})
    return _snapshot(keys, world_size, floor, reply)


async def look(store: Store, keys: Keys, *, world_size: int, floor: int = 0) -> Snapshot:
    """The picture that `inspect` gives, by plain reads in one MULTI: for those who may run no script, as whoever only looks.

    It does not read the task log, which holds prompts: where that ends is told by the record.
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
        # A key of the wrong type in a rank's place is a rank that is missing; hints are nobody's truth.
        time, record, leader, newest, *reports = await store.transact(
            [*fixed, *ranks], may_fail=range(3, len(fixed) + len(ranks))
        )
    known = _fields(record)
    end = f"{known.get('number', '')}-{known.get('last_n', '')}"
    reply: list[Any] = [
        int(time[0]) * 1000 + int(time[1]) // 1000,
        record,
        leader,
        end.encode() if re.fullmatch(r"[0-9]{1,16}-[0-9]{1,16}", end) else b"0-0",
        newest[0][0] if newest and not isinstance(newest, RedisError) else b"0-0",
        *(b"" if isinstance(one, RedisError) else one for one in reports),
    ]
    return _snapshot(keys, world_size, floor, reply)


def _snapshot(keys: Keys, world_size: int, floor: int, reply: Sequence[Any]) -> Snapshot:
    now_ms = int(reply[0])
    leader, leader_left_ms = _leader(_fields(reply[2]), now_ms)
    epoch, unreadable = _record(_fields(reply[1]), world_size)
    number, n = _words([reply[3]])[0].split("-")
    highest = max(now_ms + DAY_MS, epoch.id.number if epoch else 0, int(number), floor)
    views = [
        _believed(_view(rank, raw, int(left)), now_ms, highest)
        for rank, (raw, left) in enumerate(zip(reply[5::2], reply[6::2], strict=True))
    ]
    return Snapshot(
        group=keys.group,
        world_size=world_size,
        now_ms=now_ms,
        epoch=epoch,
        ranks=tuple(views),
        leader=leader,
        leader_left_ms=leader_left_ms,
        log_end=LogId(int(number), int(n)),
        signals_end=_words([reply[4]])[0],
        unreadable=unreadable,
    )


def _leader(fields: Mapping[str, str], now_ms: int) -> tuple[Leadership | None, int]:
    """Who leads and for how many milliseconds more; what cannot be read counts as nobody, and `lead` writes it anew."""
    try:
        return Leadership(int(fields["term"]), fields["holder"]), max(0, int(fields["until_ms"]) - now_ms)
    except (KeyError, ValueError):
        return None, 0


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


def _verdict(text: str) -> Verdict:
    try:
        return Verdict.model_validate_json(text)
    except ValidationError:
        return Verdict.aborted("the stored verdict could not be read")


def _refusal(name: str, words: Sequence[str], *allowed: type) -> Any:  # noqa: ANN401  the caller names the types
    refusal: Aborted | Superseded | Fenced | Unknown
    match words:
        case ["ABORTED", text]:
            refusal = Aborted(_verdict(text))
        case ["SUPERSEDED", number, ""]:
            refusal = Superseded(None)
        case ["SUPERSEDED", number, nonce]:
            refusal = Superseded(EpochId(int(number), nonce))
        case ["FENCED", term, holder]:
            refusal = Fenced(int(term), holder)
        case ["UNKNOWN", reason]:
            refusal = Unknown(reason)
        case _:
            raise _not_understood(name, words)
    if not isinstance(refusal, allowed):
        raise _not_understood(name, words)
    return refusal


def _fields(flat: Sequence[bytes]) -> dict[str, str]:
    """A hash as a script returns it: names and values in turn."""
    words = _words(flat)
    return dict(zip(words[::2], words[1::2], strict=True))


def _view(rank: int, raw: bytes, left_ms: int) -> RankView:
    if not raw:
        return RankView(rank)
    try:
        return RankView(rank, Report.decode(raw[: MAX_REPORT_BYTES + 1], rank), max(left_ms, 0))
    except UndecodableReport as error:
        return RankView(rank, None, 0, str(error))


def _believed(view: RankView, now_ms: int, highest: int) -> RankView:
    """The view, without a report that says a higher number than this: nobody is to adopt it, and people are told whose it is."""
    report = view.report
    said = 0 if report is None else max(report.floor, report.epoch.number if report.epoch else 0)
    if said <= highest:
        return view
    return RankView(
        view.rank,
        None,
        0,
        f"rank {view.rank}: its report names epoch {said}, {(said - now_ms) / DAY_MS:,.0f} days above the store's clock: no planner "
        "can have given that, so it counts for nothing; restart that runner",
    )


def _record(fields: Mapping[str, str], world_size: int) -> tuple[EpochRecord | None, str]:
    """Read the record, or say why it cannot be read: it then counts as missing (fail closed)."""
    if not fields:
        return None, ""
    try:
        chunks = sorted(
            (int(name.partition(":")[2]), value) for name, value in fields.items() if name.startswith("roster:")
        )
        joined = "".join(value for _, value in chunks)
        roster = tuple(joined[i : i + INCARNATION_WIDTH] for i in range(0, len(joined), INCARNATION_WIDTH))
        recorded_size = int(fields["world_size"])
        if recorded_size != world_size or len(joined) != recorded_size * INCARNATION_WIDTH:
            held = len(joined) / INCARNATION_WIDTH
            return None, f"it is for {recorded_size} ranks with a roster of {number(held)}, {world_size} were asked for"
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

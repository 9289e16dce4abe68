"""Random calls against the reference model and the real scripts side by side: the history, and how each call of it is made on both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import strategies as st

from barrier import EpochId, Leadership, RankRule, Report, Verdict
from barrier.store import verbs
from barrier.store.keys import Keys
from barrier.store.store import Store
from barrier.testing import FakeStore, ManualClock
from barrier.testing import reference as ref

WORLD = 2
INCARNATIONS = tuple(f"{life:012x}{life:016x}" for life in (1, 2))
STATUSES = ("Idle", "Connected")
LEASE_MS = 3_000
LAST_ID = "18446744073709551615-18446744073709551615"
"""After it, no stream takes another entry."""
NONCES = tuple(f"{number:032x}" for number in range(1, 5))
BOASTS: tuple[int, ...] = (0, ref.DAY_MS, ref.DAY_MS + 1, 2**53 - 2 - 4_000_000_000_000)
"""How far above the store's clock a report's floor may be."""
RULES = (
    (RankRule(0, 1, ("Idle",)),),
    (RankRule(0, 1, ("Connected",)),),
    (RankRule(0, 0, ("Idle",)), RankRule(1, 1, ("Idle", "Connected"))),
)


@dataclass
class SideBySide:
    """One history: the model's state, the store, and what callers have learned so far."""

    fake: FakeStore
    clock: ManualClock
    store: Store
    state: ref.ReferenceState = field(default_factory=lambda: ref.ReferenceState.empty(WORLD))
    keys: Keys = field(default_factory=lambda: Keys("rankgate", "twins"))
    leaderships: list[Leadership] = field(default_factory=lambda: [Leadership(7, "nobody")])
    epochs: list[EpochId] = field(default_factory=lambda: [EpochId(1, "f" * 32)])
    written: set[int] = field(default_factory=set[int])

    @property
    def now_ms(self) -> int:
        with self.fake.server_time():
            return int(time.time() * 1000)

    def pick(self, index: int, of: list[Any]) -> Any:
        return of[-1 - index % len(of)]


def same(one: object, other: object, what: str) -> None:
    assert one == other, f"{what}: the model says {one}, the scripts say {other}"


KINDS = {
    "say": 1,
    "agree": 1,
    "arrive": 3,
    "lead": 2,
    "open": 2,
    "dispatch": 3,
    "check": 1,
    "conclude": 1,
    "restore": 2,
    "silence": 1,
    "wait": 1,
    "flush": 1,
    "lose record": 1,
    "lose log": 1,
    "spoil": 1,
    "resign": 1,
}
"""What may happen, and how often in proportion."""


@st.composite
def steps(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """One call, by name, with arguments that are often, but not always, the right ones."""
    kind = draw(st.sampled_from([kind for kind, weight in KINDS.items() for _ in range(weight)]))
    return kind, {
        "rank": draw(st.integers(0, WORLD - 1)),
        "life": INCARNATIONS[draw(st.sampled_from((0, 0, 0, 1)))],
        "status": draw(st.sampled_from(STATUSES)),
        "who": draw(st.sampled_from("aaab")),
        "which": draw(st.sampled_from((0, 0, 0, 0, 0, 0, 1, 2))),
        "authority": draw(st.sampled_from((0, 0, 0, 0, 0, 0, 1, 2))),
        "n": draw(st.integers(0, 4)),
        "boast": draw(st.sampled_from((0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3))),
        "bound": draw(st.booleans()),
        "nonce": draw(st.sampled_from(NONCES)),
        "step": draw(st.sampled_from(("connect", "load"))),
        "after": draw(st.sampled_from(("", "", "connect"))),
        "attempt": draw(st.sampled_from((1, 1, 2))),
        "repeatable": draw(st.booleans()),
        "rules": draw(st.sampled_from(RULES)),
        "digest": draw(st.sampled_from(("", "", "", "", "", "", "ab"))),
        "milliseconds": draw(st.sampled_from((1, 500, 500, 4_000))),
    }


async def carry_out(both: SideBySide, kind: str, a: dict[str, Any]) -> None:
    if kind in ("say", "agree", "arrive", "silence"):
        await speak(both, kind, a)
    elif kind in ("wait", "flush", "lose record", "lose log", "spoil"):
        await befall(both, kind, a)
    else:
        await call(both, kind, a)


async def speak(both: SideBySide, kind: str, a: dict[str, Any]) -> None:
    """What the ranks do: one says something, all say the same, all arrive, one falls silent."""
    epoch = both.pick(a["which"], both.epochs)
    match kind:
        case "say":
            await say(both, a["rank"], a, epoch if a["bound"] else None)
        case "agree":
            for rank in range(WORLD):
                await say(both, rank, a, epoch if a["bound"] else None)
        case "arrive":
            status = a["rules"][0].statuses[0]
            for rank in range(WORLD):
                n = a["n"] + rank * a.get("apart", 0)
                life = INCARNATIONS[bool(a.get("stranger")) and rank == a["rank"]]
                await say(both, rank, {**a, "status": status, "life": life, "n": n}, epoch)
        case "silence":
            both.fake.delete(both.keys.rank(a["rank"]))
            both.state = replace(
                both.state, reports=tuple(None if r == a["rank"] else x for r, x in enumerate(both.state.reports))
            )
        case _:
            raise AssertionError(kind)


async def befall(both: SideBySide, kind: str, a: dict[str, Any]) -> None:
    """What happens to the store: time passes, and it loses things."""
    match kind:
        case "wait":
            await both.clock.advance(a["milliseconds"] / 1000)
        case "flush":
            both.fake.flush()
            both.state = ref.ReferenceState.empty(WORLD)
        case "lose record":
            both.fake.delete(both.keys.epoch)
            both.state = replace(both.state, record=None)
        case "lose log":
            both.fake.delete(both.keys.tasks)
            both.state = replace(both.state, log=())
        case "spoil":
            # What the model knows nothing of: hints and history are not the truth, and nobody is stopped by what becomes of them.
            key = both.keys.signals if a["bound"] else both.keys.events
            both.fake.delete(key)
            if a["n"] % 2:
                await both.store.commands.set(key, "somebody else's", px=60_000)
            else:
                await both.store.commands.xadd(key, {"a": "b"}, id=LAST_ID)
                await both.store.commands.pexpire(key, 60_000)
        case _:
            raise AssertionError(kind)


async def call(both: SideBySide, kind: str, a: dict[str, Any]) -> None:
    """What planners do: one verb, asked of the model and of the scripts."""
    leadership = both.pick(a["authority"], both.leaderships)
    epoch = both.pick(a["which"], both.epochs)
    now = both.now_ms
    match kind:
        case "lead" | "resign":
            lease_ms = LEASE_MS if kind == "lead" else 0
            both.state, answer = ref.lead(both.state, now, holder=a["who"], floor=a["n"], lease_ms=lease_ms)
            real = await verbs.lead(
                both.store, both.keys, holder=a["who"], floor=a["n"], lease=lease_ms / 1000 if lease_ms else None
            )
            same(answer, real, kind)
            if isinstance(real, verbs.Leading):
                both.leaderships.append(real.leadership)
        case "open":
            arguments: dict[str, Any] = {
                "leadership": leadership,
                "nonce": a["nonce"],
                "floor": epoch.number if a["bound"] else a["n"],
                "ordinal": a["n"],
                "digest": a["digest"],
            }
            both.state, answer = ref.open_epoch(both.state, now, notes="x", **arguments)
            real = await verbs.open_epoch(both.store, both.keys, world_size=WORLD, notes="x", **arguments)
            same(answer, real, kind)
            if isinstance(real, verbs.Opened):
                both.epochs.append(real.epoch)
        case "restore":
            arguments: dict[str, Any] = {
                "leadership": leadership,
                "epoch": epoch,
                "status": a["status"],
                "steps": ["connect"],
            }
            arguments |= {
                "ordinal": a["n"],
                "digest": a["digest"],
                "notes": "x",
                "floor": epoch.number if a["bound"] else 0,
            }
            both.state, answer = ref.restore(both.state, now, **arguments)
            same(answer, await verbs.restore(both.store, both.keys, world_size=WORLD, **arguments), kind)
        case "check":
            both.state, answer = ref.check(both.state, now, epoch=epoch, requirement=a["rules"])
            real = await verbs.check(both.store, both.keys, epoch=epoch, requirement=a["rules"], world_size=WORLD)
            same(answer, real, kind)
        case "dispatch":
            arguments: dict[str, Any] = {
                "leadership": leadership,
                "epoch": epoch,
                "step": a["step"],
                "payload": "{}",
                "requirement": a["rules"],
            }
            arguments |= {"attempt": a["attempt"], "after": a["after"], "repeatable": a["repeatable"]}
            arguments |= {"seen_n": a["n"], "known_n": a["n"] if a["bound"] else 0}
            both.state, answer = ref.dispatch(both.state, now, **arguments)
            same(answer, await verbs.dispatch(both.store, both.keys, to=(0, 1), world_size=WORLD, **arguments), kind)
        case "conclude":
            verdict = Verdict.aborted(f"because of {a['who']}", a["rank"])
            arguments: dict[str, Any] = {"leadership": leadership, "epoch": epoch, "verdict": verdict, "seen_n": a["n"]}
            both.state, answer = ref.conclude(both.state, **arguments)
            same(answer, await verbs.conclude(both.store, both.keys, **arguments), kind)
        case _:
            raise AssertionError(kind)


async def say(both: SideBySide, rank: int, a: dict[str, Any], epoch: EpochId | None) -> None:
    floor = (
        epoch.number + (a["n"] == 3) if epoch else a["n"]
    )  # no rank of ours is in one epoch and has promised a later one
    boast: int = a.get("boast", 0)
    if boast:  # what the clock may have given, and what nobody can have given
        floor = max(floor, both.now_ms + BOASTS[boast])
    report = Report(
        rank=rank,
        incarnation=a["life"],
        status=a["status"],
        epoch=epoch,
        applied=a["n"] if epoch else 0,
        floor=floor,
        digest=a["digest"],
    )
    await both.store.commands.set(both.keys.rank(rank), report.encode(), px=LEASE_MS)
    both.state = both.state.say(
        rank,
        ref.ReferenceReport(
            report.incarnation, report.status, epoch, report.applied, floor, report.digest, both.now_ms + LEASE_MS
        ),
    )


async def compare(both: SideBySide) -> None:
    """The model's state is what `inspect` sees, entry by entry of the log."""
    seen = await verbs.inspect(both.store, both.keys, world_size=WORLD)
    looked = await verbs.look(both.store, both.keys, world_size=WORLD)
    same(seen, replace(looked, log_end=seen.log_end), "what plain reads show, and what the script does")
    record = both.state.record
    assert seen.unreadable == ""
    assert (seen.epoch is None) == (record is None)
    if seen.epoch is not None and record is not None:
        stored = seen.epoch
        same(
            (record.id, record.ordinal, record.roster, record.last_n),
            (stored.id, stored.ordinal, stored.roster, stored.last_n),
            "record",
        )
        same(record.verdict, seen.epoch.verdict, "verdict")
        same(
            {n: (i.n, t) for n, i, t in record.steps},
            {n: (s.n, s.attempt) for n, s in seen.epoch.steps.items()},
            "steps",
        )
    same(both.state.leader.leadership if both.state.leader else None, seen.leader, "leader")
    highest = ref.highest_epoch(both.now_ms, both.state.log_end.number, record.id.number if record else 0)
    reports = [both.state.live(rank, both.now_ms) for rank in range(WORLD)]
    live = [report is not None and ref.said(report) <= highest for report in reports]
    same(live, [view.report is not None for view in seen.ranks], "live reports")
    entries = await both.store.commands.xrange(both.keys.tasks)
    real = [(i.decode(), f[b"kind"].decode(), f[b"nonce"].decode(), int(f[b"prev"])) for i, f in entries]
    same([(str(e.id), e.kind, e.nonce, e.previous) for e in both.state.log], real, "log")
    assert both.fake.keys_without_lifetime() == []


BEGUN = ("agree", "lead", "open", "arrive", "dispatch")
PRELUDES = (
    (),
    BEGUN,
    (*BEGUN, "arrive with a stranger"),  # in one rank's place: a life that is not on the roster
    (*BEGUN, "arrive ahead"),  # ranks that have read further than the store remembers
    (*BEGUN, "lose record"),
    (*BEGUN, "arrive apart", "lose record"),  # one rank has read further than the other
    (*BEGUN, "conclude", "open"),
    (*BEGUN, "conclude", "lose log", "agree", "open"),  # only the record remembers the number
    # in the same millisecond: one number, two nonces, and ranks that have arrived under the other one
    (*BEGUN, "flush", "lead", "agree", "open", "arrive late"),
    (*BEGUN, "flush", "lead", "agree", "open", "arrive late and ahead", "lose record"),
    (*BEGUN, "flush", "lead", "agree"),  # only the caller remembers the number
    (*BEGUN, "flush", "lead", "arrive"),  # only the ranks remember it
)
"""Most random histories never open anything, let alone twice: most are given a start."""


def begun(prelude: Sequence[str], like: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A prelude's calls, with arguments that are right but for what its words say."""
    first = {
        **like,
        "boast": 0,
        "authority": 0,
        "which": 0,
        "n": 0,
        "digest": "",
        "bound": False,
        "life": INCARNATIONS[0],
    }
    first |= {"after": "", "milliseconds": 1}
    nonces = iter(NONCES)
    special: dict[str, dict[str, Any]] = {
        "late": {"which": 1},
        "ahead": {"n": 4},
        "apart": {"apart": 1},
        "with a stranger": {"stranger": True},
        "late and ahead": {"which": 1, "n": 4},
    }
    calls: list[tuple[str, dict[str, Any]]] = []
    for kind in prelude:
        what, _, how = kind.partition(" ") if kind.startswith("arrive") else (kind, "", "")
        nonce = {"nonce": next(nonces)} if what == "open" else {}
        calls.append((what, first | special.get(how, {}) | nonce))
    return calls

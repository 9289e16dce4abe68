"""Conformance: the same calls against a store and against the reference model must give the same answers and leave the same state.

For a store of another kind, or another version of a server::

    from barrier.testing import conformance

    async def test_my_store():
        store = await connect("redis://…")
        await conformance.check(store)        # every sequence below; raises `Difference` at the first that differs

`SEQUENCES` are scripted histories, each with a name that says what it shows. `Twins` carries out one call at a time, for histories of
your own (random ones, for example).

The store's clock is read before and after each call. The answers agree if the reference gives the store's
answer for one moment in between. So nothing here waits, and a slow machine makes no difference. Calls end the
leases (`lapse`, `unlead`), not time.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from barrier.protocol.ids import EpochId
from barrier.protocol.model import Leadership, Verdict
from barrier.protocol.outcomes import Following, Leading, Opened
from barrier.protocol.report import Report
from barrier.protocol.requirement import RankRule, Requirement
from barrier.store import verbs
from barrier.store.keys import Keys
from barrier.store.store import Store
from barrier.testing import reference as ref

__all__ = [
    "KINDS",
    "LIVES",
    "NONCES",
    "REQUIREMENTS",
    "SEQUENCES",
    "WORLD_SIZE",
    "Call",
    "Difference",
    "Kind",
    "Twins",
    "check",
    "run",
]


WORLD_SIZE = 2
_LEASE_SECONDS = 3_600.0
"""The lease of reports and leaderships, which is longer than any history takes."""

NONCES = tuple(f"{number:032x}" for number in range(1, 7))
LIVES = tuple(f"{life:012x}{life:016x}" for life in (1, 2))
_ALL_IDLE: Requirement = (RankRule(0, 1, ("Idle",)),)
_ALL_CONNECTED: Requirement = (RankRule(0, 1, ("Connected",)),)
_LEADER_IDLE: Requirement = (RankRule(0, 0, ("Idle",)), RankRule(1, 1, ("Idle", "Connected")))
REQUIREMENTS = (_ALL_IDLE, _ALL_CONNECTED, _LEADER_IDLE)

Kind: TypeAlias = Literal[
    "say", "lapse", "lead", "resign", "unlead", "open", "restore", "check", "dispatch", "conclude", "flush", "forget"
]
KINDS: tuple[Kind, ...] = (
    "say", "lapse", "lead", "resign", "unlead", "open", "restore", "check", "dispatch", "conclude", "flush", "forget",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Call:
    """One call, or one thing that happens to the store.

    Attributes:
        kind: a verb; or ``say`` (a rank reports), ``lapse`` (its lease ends), ``unlead`` (the leader's lease ends),
        ``flush`` (the group's keys are lost), ``forget`` (only the epoch's record is lost).
        rank: which rank says something or lapses; ``None`` for all.
        status: what it says, or what `restore` claims.
        bound: whether the report is in an epoch: the one that `epoch` chooses.
        life: which of two incarnations reports it.
        holder: who leads or resigns.
        term: which leadership is claimed: 0 the newest that was given, 1 the one before, and so on; the oldest was never given.
        epoch: which epoch is meant, counted in the same way.
        n: a log position, or a floor, or an ordinal.
        nonce: which of `NONCES` the epoch to open gets.
        step: the step to dispatch.
        after: the step that must have been dispatched before it.
        attempt: the attempt of the step.
        repeatable: whether the step comes any number of times.
        needs: what must hold for `check` and `dispatch`.
        digest: the digest of the spec.
    """

    kind: Kind
    rank: int | None = None
    status: str = "Idle"
    bound: bool = False
    life: int = 0
    holder: str = "a"
    term: int = 0
    epoch: int = 0
    n: int = 0
    nonce: int = 0
    step: str = "load"
    after: str = ""
    attempt: int = 1
    repeatable: bool = False
    needs: Requirement = _ALL_CONNECTED
    digest: str = ""


class Difference(AssertionError):
    """The store and the reference do not agree; the sentence says after which call, and on what."""


class Twins:
    """A group in a store and the reference's state of it, side by side.

    Args:
        store: where; any other group of it is left alone.
        keys: the group's keys; by default those of a group with a random name.
    """

    def __init__(self, store: Store, keys: Keys | None = None) -> None:
        self.store = store
        self.keys: Keys = keys or Keys("conformance", secrets.token_hex(8))
        self.state: ref.ReferenceState = ref.ReferenceState.empty(WORLD_SIZE)
        self.leaderships: list[Leadership] = [Leadership(7, "nobody")]
        self.epochs: list[EpochId] = [EpochId(1, "f" * 32)]
        self.calls: list[Call] = []

    async def call(self, call: Call) -> Any:  # noqa: ANN401  one of `barrier.protocol.outcomes`, or None
        """Carry out one call on both; returns the answer.

        Raises:
            Difference: answers or states differ.
            StoreError: the store could not be asked.
        """
        self.calls.append(call)
        answer = await self._carry_out(call)
        if isinstance(answer, Leading):
            self.leaderships.append(answer.leadership)
        if isinstance(answer, Opened):
            self.epochs.append(answer.epoch)
        await self.compare()
        return answer

    async def compare(self) -> None:
        """Compare what `inspect` and the log show with the reference's state.

        Raises:
            Difference: they differ.
        """
        seen = await verbs.inspect(self.store, self.keys, world_size=WORLD_SIZE)
        with self.store.errors():
            entries = await self.store.commands.xrange(self.keys.tasks)
        state, record, stored = self.state, self.state.record, seen.epoch
        highest = ref.highest_epoch(seen.now_ms, state.log_end.number, record.id.number if record else 0)
        self._same("damage", "", seen.unreadable)
        self._same(
            "record",
            record and (record.id, record.ordinal, record.roster, record.last_n, record.digest, record.verdict),
            stored and (stored.id, stored.ordinal, stored.roster, stored.last_n, stored.digest, stored.verdict),
        )
        self._same(
            "steps",
            {name: (place.n, attempt) for name, place, attempt in record.steps} if record else None,
            {name: (step.n, step.attempt) for name, step in stored.steps.items()} if stored else None,
        )
        self._same("leader", state.leader.leadership if state.leader else None, seen.leader)
        self._same(
            "live reports",
            [report is not None and ref.said(report) <= highest for report in state.reports],
            [view.report is not None for view in seen.ranks],
        )
        self._same(
            "log",
            [(str(entry.id), entry.kind, entry.nonce, entry.previous) for entry in state.log],
            [
                (place.decode(), fields[b"kind"].decode(), fields[b"nonce"].decode(), int(fields[b"prev"]))
                for place, fields in entries
            ],
        )

    def _same(self, what: str, expected: object, found: object) -> None:
        if expected != found:
            history = "\n  ".join(str(call) for call in self.calls)
            raise Difference(f"{what}: the reference says {expected}, the store says {found}, after\n  {history}")

    async def _carry_out(self, call: Call) -> Any:  # noqa: ANN401  as `call`
        epoch = self.epochs[-1 - call.epoch % len(self.epochs)]
        ranks = range(WORLD_SIZE) if call.rank is None else (call.rank,)
        match call.kind:
            case "say":
                for rank in ranks:
                    await self._say(rank, call, epoch if call.bound else None)
            case "lapse":
                await self._delete(self.keys.rank(rank) for rank in ranks)
                reports = (None if rank in ranks else report for rank, report in enumerate(self.state.reports))
                self.state = replace(self.state, reports=tuple(reports))
            case "unlead":
                if self.state.leader is not None:
                    with self.store.errors():
                        await self.store.commands.hset(self.keys.leader, "until_ms", "1")
                    self.state = replace(self.state, leader=replace(self.state.leader, until_ms=1))
            case "flush":
                await self.clean()
                self.state = ref.ReferenceState.empty(WORLD_SIZE)
            case "forget":
                await self._delete([self.keys.epoch])
                self.state = replace(self.state, record=None)
            case _:
                return await self._ask(call, epoch)
        return None

    async def _ask(self, call: Call, epoch: EpochId) -> Any:  # noqa: ANN401  as `call`
        """Ask the store, and then the reference for every moment at which the store may have carried the call out."""
        known, told = self._questions(call, epoch)
        earliest = await self._now_ms()
        found = await told()
        latest = await self._now_ms()
        answers: list[object] = []
        for now_ms in range(earliest, latest + 1):
            state, answer = known(now_ms)
            if _plain(answer) == _plain(found):
                self.state = state
                return found
            answers.append(answer)
        self._same(f"answer to {call.kind}", answers[0], found)
        raise AssertionError("not reached: the answers are equal, but no moment gave that answer")

    def _questions(
        self, call: Call, epoch: EpochId
    ) -> tuple[Callable[[int], tuple[ref.ReferenceState, Any]], Callable[[], Awaitable[Any]]]:
        """One verb: as the reference is asked, given the time, and as the store is."""
        store, keys, state = self.store, self.keys, self.state
        same: dict[str, Any]
        by: dict[str, Any] = {"leadership": self.leaderships[-1 - call.term % len(self.leaderships)]}
        match call.kind:
            case "lead" | "resign":
                lease = _LEASE_SECONDS if call.kind == "lead" else 0.0
                return (
                    lambda now: ref.lead(state, now, holder=call.holder, floor=call.n, lease_ms=round(lease * 1000)),
                    lambda: verbs.lead(store, keys, holder=call.holder, floor=call.n, lease=lease or None),
                )
            case "open":
                same = by | {"nonce": NONCES[call.nonce], "floor": call.n, "ordinal": call.n}
                same |= {"digest": call.digest, "notes": "x"}
                return (
                    lambda now: ref.open_epoch(state, now, **same),
                    lambda: verbs.open_epoch(store, keys, world_size=WORLD_SIZE, **same),
                )
            case "restore":
                same = by | {"epoch": epoch, "status": call.status, "steps": ["connect"], "ordinal": call.n}
                same |= {"digest": call.digest, "notes": "x", "floor": call.n}
                return (
                    lambda now: ref.restore(state, now, **same),
                    lambda: verbs.restore(store, keys, world_size=WORLD_SIZE, **same),
                )
            case "check":
                return (
                    lambda now: ref.check(state, now, epoch=epoch, requirement=call.needs),
                    lambda: verbs.check(store, keys, epoch=epoch, requirement=call.needs, world_size=WORLD_SIZE),
                )
            case "dispatch":
                same = by | {"epoch": epoch, "step": call.step, "payload": "{}", "requirement": call.needs}
                same |= {"attempt": call.attempt, "after": call.after, "repeatable": call.repeatable}
                same |= {"seen_n": call.n, "known_n": call.n}
                return (
                    lambda now: ref.dispatch(state, now, **same),
                    lambda: verbs.dispatch(store, keys, to=(0, WORLD_SIZE - 1), world_size=WORLD_SIZE, **same),
                )
            case "conclude":
                same = by | {"epoch": epoch, "verdict": Verdict.aborted(f"because of {call.holder}", call.rank)}
                same |= {"seen_n": call.n}
                return (
                    lambda _: ref.conclude(state, **same),
                    lambda: verbs.conclude(store, keys, **same),
                )
            case _:
                raise AssertionError(f"{call.kind} is not a verb")

    async def _say(self, rank: int, call: Call, epoch: EpochId | None) -> None:
        report = Report(
            rank=rank,
            incarnation=LIVES[call.life],
            status=call.status,
            epoch=epoch,
            applied=call.n if epoch else 0,
            floor=epoch.number if epoch else call.n,
            digest=call.digest,
        )
        with self.store.errors():
            await self.store.commands.set(self.keys.rank(rank), report.encode(), px=round(_LEASE_SECONDS * 1000))
        known = ref.ReferenceReport(
            report.incarnation, report.status, epoch, report.applied, report.floor, report.digest, until_ms=2**62
        )
        self.state = self.state.say(rank, known)

    async def clean(self) -> None:
        """Delete everything that the group has in the store."""
        keys = self.keys
        once = (keys.once(step) for step, _, _ in self.state.once)
        await self._delete(
            [keys.epoch, keys.leader, keys.tasks, keys.signals, keys.events, *keys.ranks(WORLD_SIZE), *once]
        )

    async def _delete(self, keys: Iterable[str]) -> None:
        with self.store.errors():
            await self.store.commands.delete(*keys)

    async def _now_ms(self) -> int:
        with self.store.errors():
            seconds, microseconds = await self.store.commands.time()
        return seconds * 1000 + microseconds // 1000


def _plain(answer: object) -> object:
    """An answer without what depends on the very millisecond: how long a leader's lease has left."""
    return replace(answer, left_ms=0) if isinstance(answer, Following) else answer


# --- the histories --------------------------------------------------------------------------------------------------------

_HELLO = (Call("say"), Call("lead"))
_OPENED = (*_HELLO, Call("open"))
_ARRIVED = (*_OPENED, Call("say", status="Connected", bound=True))
_LOADED = (*_ARRIVED, Call("dispatch"))
_AGREED = Call("say", status="Connected", bound=True, n=2)

SEQUENCES: Mapping[str, tuple[Call, ...]] = {
    "a whole attempt, and the next one": (
        *_OPENED,
        Call("check"),
        Call("dispatch"),
        Call("say", rank=0, status="Connected", bound=True),
        Call("dispatch"),
        Call("say", rank=1, status="Connected", bound=True),
        Call("check"),
        Call("dispatch"),
        Call("dispatch"),
        Call("conclude"),
        Call("dispatch"),
        Call("open", nonce=1),
        Call("dispatch"),
    ),
    "nothing is known of a group that never was": (
        Call("check"),
        Call("open"),
        Call("dispatch"),
        Call("conclude"),
        Call("restore"),
        Call("resign"),
        Call("lead"),
        Call("open"),
        Call("dispatch"),
        Call("conclude"),
        Call("restore"),
    ),
    "who leads": (
        Call("lead"),
        Call("lead"),
        Call("lead", holder="b"),
        Call("resign", holder="b"),
        Call("lead", holder="b"),
        Call("resign"),
        Call("lead", holder="b"),
        Call("lead"),
        Call("unlead"),
        Call("lead", n=5),
        Call("flush"),
        Call("lead", holder="b", n=2**50),
        Call("lead"),
    ),
    "an earlier term is fenced, and one that was never given": (
        *_ARRIVED,
        Call("unlead"),
        Call("lead", holder="b"),
        *(Call(kind, term=1) for kind in ("dispatch", "conclude", "open", "restore")),
        *(Call(kind, term=2) for kind in ("dispatch", "conclude", "open", "restore")),
        Call("dispatch"),
    ),
    "an epoch is opened once, by everybody, for one spec": (
        Call("lead"),
        Call("say", rank=1),
        Call("open"),
        Call("say", rank=0, digest="cafe"),
        Call("open", digest="beef"),
        Call("open", digest="cafe"),
        Call("open", digest="cafe"),
        Call("open", nonce=1, digest="cafe"),
        Call("conclude"),
        Call("open", nonce=1, digest="cafe", n=7),
        Call("conclude", epoch=1),
        Call("conclude"),
    ),
    "the floor is above whatever anybody remembers": (
        *_HELLO,
        Call("open", n=2**42),
        Call("conclude"),
        Call("open", nonce=1),
        Call("say", n=2**43),
        Call("conclude"),
        Call("open", nonce=2),
        Call("forget"),
        Call("open", nonce=3),
    ),
    "an arrival is of this epoch, this life and this status": (
        *_ARRIVED,
        Call("say", rank=1, status="Connected"),
        Call("dispatch"),
        Call("say", rank=1, status="Connected", bound=True, epoch=1),
        Call("dispatch"),
        Call("say", rank=1, status="Connected", bound=True, life=1),
        Call("dispatch"),
        Call("say", rank=1, status="Idle", bound=True),
        Call("dispatch"),
        Call("dispatch", needs=_LEADER_IDLE),
        Call("lapse", rank=1),
        Call("check"),
        Call("dispatch"),
        Call("say", rank=1, status="Connected", bound=True),
        Call("dispatch"),
    ),
    "ranks are asked one by one": (
        *_OPENED,
        Call("say", rank=0, bound=True),
        Call("say", rank=1, status="Connected", bound=True),
        Call("check", needs=_ALL_IDLE),
        Call("dispatch", needs=_ALL_CONNECTED),
        Call("dispatch", needs=_LEADER_IDLE),
    ),
    "a step goes out once; a refused one again as a further attempt": (
        *_LOADED,
        Call("dispatch", attempt=2),
        Call("dispatch", attempt=2),
        Call("dispatch", attempt=1),
        Call("dispatch", step="warm up", after="load"),
        Call("dispatch", step="serve", after="connect"),
        Call("dispatch", step="next", n=40),
    ),
    "what is repeatable is remembered across epochs": (
        *_ARRIVED,
        Call("dispatch", step="generate gen.1", repeatable=True),
        Call("dispatch", step="generate gen.1", repeatable=True),
        Call("dispatch", step="generate gen.2", repeatable=True, after="load"),
        Call("conclude"),
        Call("open", nonce=1),
        Call("say", status="Connected", bound=True),
        Call("dispatch", step="generate gen.1", repeatable=True),
        Call("dispatch", step="generate gen.3", repeatable=True),
    ),
    "one verdict, the first": (
        *_LOADED,
        Call("conclude", holder="x", rank=1),
        Call("conclude", holder="y", rank=0),
        Call("check"),
        Call("dispatch", step="warm up"),
        Call("conclude", epoch=1),
        Call("open", nonce=1),
        Call("conclude", epoch=1),
        Call("check", epoch=1),
        Call("dispatch", epoch=1),
    ),
    "a lost record releases nothing, and unanimous ranks bring it back": (
        *_LOADED,
        Call("forget"),
        Call("check"),
        Call("dispatch"),
        Call("conclude"),
        Call("restore", status="Connected"),
        _AGREED,
        Call("restore", status="Idle"),
        Call("restore", status="Connected", epoch=1),
        Call("restore", status="Connected"),
        Call("restore", status="Connected"),
        Call("restore", status="Connected", epoch=1),
        Call("dispatch"),
        Call("dispatch", step="connect"),
    ),
    "a lost store is brought back by ranks that agree, and by no others": (
        *_LOADED,
        Call("flush"),
        Call("lead"),
        Call("restore", status="Connected"),
        replace(_AGREED, rank=0),
        Call("restore", status="Connected"),
        replace(_AGREED, rank=1, n=1),
        Call("restore", status="Connected"),
        replace(_AGREED, rank=1, digest="cafe"),
        Call("restore", status="Connected"),
        replace(_AGREED, rank=1),
        Call("restore", status="Connected", n=3),
        Call("dispatch", step="warm up"),
    ),
    "what the log says is over is not brought back": (
        *_LOADED,
        _AGREED,
        Call("conclude"),
        Call("forget"),
        Call("restore", status="Connected"),
        Call("open", nonce=1),
        Call("forget"),
        Call("say", status="Connected", bound=True, epoch=1, n=2),
        Call("restore", status="Connected", epoch=1),
    ),
    "a task that nobody has read is not forgotten": (
        *_LOADED,
        Call("forget"),
        Call("say", status="Connected", bound=True, n=1),
        Call("restore", status="Connected"),
    ),
    "a flushed store starts above what it was": (
        *_LOADED,
        Call("flush"),
        Call("lead"),
        Call("say", n=2**43),
        Call("open", nonce=1),
        Call("check", epoch=1),
        Call("dispatch", epoch=1),
        Call("conclude", epoch=1),
    ),
    "one number with another nonce is another epoch": (
        *_HELLO,
        Call("open", n=2**43),
        Call("say", status="Connected", bound=True),
        Call("flush"),
        Call("lead", n=2**43),
        Call("say"),
        Call("open", nonce=1, n=2**43),
        Call("say", status="Connected", bound=True, epoch=1),
        Call("check"),
        Call("dispatch"),
        Call("dispatch", epoch=1),
        Call("conclude", epoch=1),
        Call("say", rank=1, status="Connected", bound=True),
        Call("dispatch"),
    ),
}
"""Histories, by what each of them shows."""


async def run(store: Store, calls: Iterable[Call]) -> list[Any]:
    """Carry out one history in a group of its own, and delete the group; return the answers of the calls.

    Raises:
        Difference: the store does not do what the reference does.
        StoreError: the store could not be asked.
    """
    twins = Twins(store)
    try:
        return [await twins.call(call) for call in calls]
    finally:
        await twins.clean()


async def check(store: Store) -> None:
    """Carry out every history of `SEQUENCES`. Raises as `run`."""
    for calls in SEQUENCES.values():
        await run(store, calls)

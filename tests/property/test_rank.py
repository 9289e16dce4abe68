"""Random histories of one rank on a hostile store: what it promises, is handed and writes is judged from outside.

The oracle reads the store itself and remembers what the history did. It knows nothing of how `barrier.Member` keeps its word.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import fakeredis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loguru import logger

from barrier import ClaimLost, EpochId, LogId, Member, Promised, Report, Settings, StoreError, Verdict, adopt
from barrier.protocol.log import EpochAnnounced, LogEntry, TaskEntry, VerdictAnnounced
from barrier.protocol.model import Snapshot
from barrier.store import verbs
from barrier.store.keys import Keys
from barrier.testing import FakeStore, FaultPlan, ManualClock, StoreSnapshot
from tests.depth import examples

TIMES = Settings(lease=3, heartbeat=1, reader_block=1)
RANK = 65  # its place is in the second piece of the roster
MINE, OTHER = (f"{life:012x}{life:016x}" for life in (1, 2))
NONCES = ("a" * 32, "b" * 32, "c" * 32)
LONG_MS = 3_600_000
VERDICT = Verdict.aborted("because")
KEYS = Keys("rankgate", "alone")
OWN = (KEYS.claim(RANK), KEYS.rank(RANK))

KINDS = {
    "open": 3, "conclude": 1, "promise": 6, "retire": 1, "task": 4, "remember": 1, "roll back": 2, "lose log": 1,
    "lose record": 1, "flush": 1, "cut": 1, "heal": 1, "lose reply": 1, "wait": 3, "stop": 2, "report": 2, "succeed": 1,
    "calm": 3,
}  # fmt: skip
"""What may happen, and how often in proportion."""


@dataclass(frozen=True)
class Step:
    """One thing that happens. `which` is an epoch, a snapshot or a place in the log, 0 the likely one; a new epoch's number is so
    much `above` all before, and its roster names this life if it is `mine`."""

    kind: str
    which: int = 0
    above: int = 1
    nonce: str = NONCES[0]
    mine: bool = True
    seconds: float = 1.3


STEPS = st.builds(
    Step,
    kind=st.sampled_from([kind for kind, weight in KINDS.items() for _ in range(weight)]),
    which=st.sampled_from((0, 0, 0, 0, 1, 2, 3)),
    above=st.sampled_from((1, 1, 1, 0, -2)),
    nonce=st.sampled_from(NONCES),
    mine=st.sampled_from((True, True, False)),
    seconds=st.sampled_from((0.0, 0.3, 1.3, 1.6, 2.5, 4.0, 7.0)),
)
BEGUN = ("open", "promise")
PRELUDES = (
    (), ("open",), ("open", "conclude", "promise"), (*BEGUN, "open"), (*BEGUN, "retire", "promise"), (*BEGUN, "task", "flush"),
    # the log goes back, the rank learns of it, and the log has its entries again
    (*BEGUN, "remember", "task", "task", "remember", "lose log", "wait 3", "roll back"),
    (*BEGUN, "task", "task", "lose log"), ("open", "task", "lose log", "calm"), (*BEGUN, "open", "lose log", "task", "calm"),
    # its process stops, and the world goes on: tasks, or a successor
    (*BEGUN, "stop 2.5", "task"), (*BEGUN, "cut", "wait 4", "heal", "wait 1"), (*BEGUN, "stop 4", "succeed"), ("flush", "succeed"),
)  # fmt: skip
"""Most random histories would promise little and lose less: most are given a start."""


@dataclass
class World:
    """One history: the store, the rank, and what can be seen of both from outside."""

    clock: ManualClock = field(default_factory=ManualClock)
    plan: FaultPlan = field(default_factory=FaultPlan)
    epochs: list[EpochId] = field(default_factory=lambda: [EpochId(100, NONCES[2])])
    snapshots: list[StoreSnapshot] = field(default_factory=list[StoreSnapshot])
    heard: list[LogEntry] = field(default_factory=list[LogEntry])
    taken: dict[EpochId, list[int]] = field(default_factory=dict[EpochId, list[int]])
    gone: set[LogId] = field(default_factory=set[LogId])
    breaches: list[str] = field(default_factory=list[str])
    reached: Counter[str] = field(default_factory=Counter[str])
    promised: EpochId | None = None
    highest: int = 0
    losing: bool = False
    told: bool = False

    def __post_init__(self) -> None:
        self.fake = FakeStore(self.clock)
        self.server: Any = fakeredis.FakeStrictRedis(server=self.fake.server)
        mine = self.fake.client("rank", faults=self.plan)
        self.member = Member(mine, "alone", rank=RANK, settings=TIMES, clock=self.clock, incarnation=MINE)
        self.wrote_at = self.clock.now()
        self.plan.after("exec", self._wrote)

    def ask(self, command: str, *arguments: Any, **named: Any) -> Any:
        """Read or write as an administrator does, at the store's time; whoever is blocked on the log sees what came."""
        with self.fake.server_time():
            reply = getattr(self.server, command)(*arguments, **named)
        self.fake.wake_readers()
        return reply

    def record(self) -> tuple[EpochId | None, bool, str]:
        """The epoch that the store has, whether it has a verdict, and whom its roster names for this rank."""
        number, nonce, verdict, roster = self.ask("hmget", KEYS.epoch, "number", "nonce", "verdict", "roster:1")
        if number is None:
            return None, False, ""
        return EpochId(int(number), nonce.decode()), verdict is not None, roster.decode()[(RANK - 64) * len(MINE) :]

    def log(self) -> list[LogId]:
        return [LogId(0, 0), *(LogId.parse(place.decode()) for place, _ in self.ask("xrange", KEYS.tasks))]

    def tasks_of(self, epoch: EpochId) -> list[int]:
        """The places of an epoch's tasks that are in the log now."""
        return [
            LogId.parse(place.decode()).n
            for place, fields in self.ask("xrange", KEYS.tasks, f"{epoch.number}-0", f"{epoch.number}-{2**40}")
            if (fields[b"kind"], fields[b"nonce"]) == (b"task", epoch.nonce.encode())
        ]

    def succeeded(self) -> bool:
        return self.ask("get", KEYS.claim(RANK)) not in (None, MINE.encode())

    def append(self, epoch: EpochId, n: int, kind: str, **fields: Any) -> None:
        if LogId(epoch.number, n) > self.log()[-1]:  # a server takes no other
            fields |= {"kind": kind, "nonce": epoch.nonce, "prev": n - 1}
            self.ask("xadd", KEYS.tasks, fields, id=f"{epoch.number}-{n}")
            self.ask("pexpire", KEYS.tasks, LONG_MS)

    def dispatch(self, epoch: EpochId, n: int) -> None:
        self.append(epoch, n, "task", term=1, step=f"s{n}", to=f"{RANK}-{RANK}", task="{}")

    def _wrote(self) -> None:
        """The store has just carried out a write of this rank's."""
        self.plan.after("exec", self._wrote)
        silent, lost = self.clock.now() - self.wrote_at, self.losing
        self.wrote_at, self.losing = self.clock.now(), False
        self.reached["lapsed leases"] += silent >= TIMES.lease
        if self.told:
            self.breaches.append("it wrote to the store although it had been told that another life holds the rank")
        elif self.succeeded():
            if silent > TIMES.reread_after:
                self.breaches.append(f"after {silent:g} s of silence it wrote over the report of its successor")
            self.told = not lost  # the reply to this very write says so

    async def read(self) -> None:
        try:
            async for entry in self.member.tasks():
                self.heard.append(entry)
                if isinstance(entry, TaskEntry):
                    self._judge(entry)
        except ClaimLost:
            self.told = True

    def _judge(self, entry: TaskEntry) -> None:
        if self.told:
            self.breaches.append(f"task {entry.id} came out although it had been told that another life holds the rank")
        age = self.clock.now() - self.wrote_at
        if age >= TIMES.distrust_after:
            self.breaches.append(f"task {entry.id} came out {age:g} s after the last report was written")
        if entry.epoch != self.promised:
            return
        last = self.taken[entry.epoch][-1]
        if entry.id.n <= last:
            self.breaches.append(f"task {entry.id} of the promised epoch came out after number {last}")
        if entry.missed != (entry.previous > last):
            self.breaches.append(f"task {entry.id} follows {entry.previous}, came after {last}, missed={entry.missed}")
        self.taken[entry.epoch].append(entry.id.n)
        self.reached["tasks taken"] += 1

    async def promise(self, epoch: EpochId) -> None:
        current, over, named = self.record()
        may = self.promised is None and epoch == current and not over and named == MINE and epoch.number > self.highest
        reachable = not self.fake.is_cut("rank")
        try:
            answer = await self.member.promise(epoch)
        except StoreError:
            if reachable:
                raise
            return
        if isinstance(answer, Promised) != (may and reachable):
            has = f"{current}, {'' if over else 'not '}over, {'' if named == MINE else 'not '}with this life"
            self.breaches.append(
                f"to {epoch} it said {type(answer).__name__}; the store has {has}, and this rank is in {self.promised} and had "
                f"promised up to {self.highest}"
            )
        if isinstance(answer, Promised):
            self.promised, self.highest, self.taken[epoch] = epoch, epoch.number, [1]
            self.reached["promises"] += 1

    async def calm(self, step: Step) -> None:
        """No fault for a lease: then the rank knows what the store says, the store what the rank says, and the log is heard."""
        self.fake.heal()
        await self.clock.advance(TIMES.lease)
        if self.told or self.succeeded():
            return
        report = Report.decode(self.ask("get", KEYS.rank(RANK)), RANK)
        said = (report.epoch, report.floor, report.applied)
        true = (self.promised, self.highest, self.taken[self.promised][-1] if self.promised else 0)
        if said != true:
            self.breaches.append(f"after a calm its report says {said}, where the truth is {true}")
        current, over, _ = self.record()
        if current and (current == self.promised if over else current.number > self.highest):
            news = VerdictAnnounced(current, VERDICT) if over else EpochAnnounced(current)
            if news not in self.heard:
                self.breaches.append(f"after a calm it has not heard of {news}")
        if self.promised:
            last = self.taken[self.promised][-1]
            handed = {one.id.n for one in self.heard if isinstance(one, TaskEntry) and one.epoch == self.promised}
            if waiting := [n for n in self.tasks_of(self.promised) if n > last and n not in handed]:
                self.breaches.append(
                    f"after a calm tasks {waiting} stand in the log, and it was given none after {last}"
                )
        end, epoch, heard = self.log()[-1], self.promised, len(self.heard)
        if epoch is None or epoch.number < end.number or step.which:
            epoch = EpochId(max(end.number, 1), step.nonce)
        read = end.n if epoch.number == end.number else 1
        place = LogId(epoch.number, max(read, *self.taken.get(epoch, ()), 1) + 1)
        self.dispatch(epoch, place.n)
        await self.clock.advance(TIMES.heartbeat)
        came = [entry.id for entry in self.heard[heard:] if isinstance(entry, TaskEntry)]
        if came != [place]:
            out = ", ".join(map(str, came)) or "nothing"
            self.breaches.append(f"in a calm, task {place} was appended to a log that ended at {end}; {out} came out")
        before = [entry.id for entry in self.heard[:heard] if isinstance(entry, TaskEntry)]
        self.reached["calms"] += 1
        self.reached["entries of a log that went back"] += place < max(before, default=place)

    async def leave(self) -> None:
        """It gives back what is its own, and nothing that is its successor's."""
        self.fake.heal()
        before, spared = [self.ask("get", key) for key in OWN], self.succeeded() or self.told
        with suppress(StoreError):  # the reply was lost
            await self.member.leave()
        after = [self.ask("get", key) for key in OWN]
        if after != (before if spared else [None, None]):
            self.breaches.append(f"it left {after} of {before}, and was told of a successor: {self.told}")
        self.look()

    async def happen(self, step: Step) -> None:
        if step.kind in ("open", "conclude", "task", "succeed"):
            self.others_do(step)
        elif step.kind in ("promise", "retire", "report", "calm"):
            await self.rank_does(step)
        elif step.kind in ("wait", "stop"):
            await self.time_passes(step)
        else:
            self.store_suffers(step)

    def others_do(self, step: Step) -> None:
        """What a planner writes, and another life of this rank."""
        (current, _, _), end = self.record(), self.log()[-1]
        match step.kind:
            case "open":
                epoch = EpochId(max(self.epochs).number + step.above, step.nonce)
                self.epochs.append(epoch)
                fields = {"number": epoch.number, "nonce": epoch.nonce, "term": 1, "world_size": RANK + 1, "digest": ""}
                fields |= {"ordinal": 1, "opened_ms": 1, "last_n": 1, "notes": "", "roster:0": OTHER * 64}
                self.ask("delete", KEYS.epoch)
                self.ask("hset", KEYS.epoch, mapping=fields | {"roster:1": OTHER + (MINE if step.mine else OTHER)})
                self.ask("pexpire", KEYS.epoch, LONG_MS)
                self.append(epoch, 1, "opened", term=1)
            case "conclude" if current:
                self.ask("hset", KEYS.epoch, "verdict", VERDICT.model_dump_json())
                if step.which == 0 and end.number == current.number:
                    self.append(current, end.n + 1, "verdict", term=1, verdict=VERDICT.model_dump_json())
            case "task":
                epoch = self.epochs[-1] if step.which == 3 else self.promised or current or self.epochs[-1]
                self.dispatch(epoch, 1 + step.which + (end.n if end.number == epoch.number else 1))
            case "succeed" if self.ask("set", KEYS.claim(RANK), OTHER, px=LONG_MS, nx=True):
                self.ask("set", KEYS.rank(RANK), Report(RANK, OTHER, "Idle").encode(), px=LONG_MS)
                self.reached["successors"] += 1
            case _:
                pass

    def store_suffers(self, step: Step) -> None:
        """What becomes of the store and of the way to it."""
        match step.kind:
            case "remember":
                self.snapshots.append(self.fake.snapshot())
            case "roll back" if self.snapshots:
                self.fake.roll_back(self.snapshots[-1 - step.which % len(self.snapshots)])
            case "lose log" | "lose record":
                self.ask("delete", KEYS.tasks if step.kind == "lose log" else KEYS.epoch)
            case "flush":
                self.fake.flush()
            case "cut" | "heal":
                (self.fake.partition if step.kind == "cut" else self.fake.heal)("rank")
            case "lose reply":
                self.losing = True
                self.plan.lose_reply("exec")
            case _:
                pass

    async def time_passes(self, step: Step) -> None:
        """For all; or for all but this process, which stands still meanwhile."""
        if step.kind == "wait":
            await self.clock.advance(step.seconds)
        else:
            self.clock.jump(step.seconds)

    async def rank_does(self, step: Step) -> None:
        """What the rank itself is asked for."""
        match step.kind:
            case "promise":
                likely = self.record()[0] or self.epochs[-1]
                made_up = EpochId(likely.number + 1, likely.nonce), EpochId(likely.number, NONCES[1]), self.epochs[0]
                await self.promise((likely, *made_up)[step.which])
            case "retire":
                self.member.retire()
                self.promised = None
            case "report":
                try:
                    await self.member.report(("Idle", "Connected")[step.which % 2])
                    if self.told:
                        self.breaches.append("it reported without an error although another life holds the rank")
                except ClaimLost:
                    self.told = True
                except StoreError:
                    pass
            case _:
                await self.calm(step)

    def look(self) -> None:
        """Raise what was found; and count entries that the log has again after it had lost them."""
        assert not self.breaches, self.breaches[0]
        said = set(self.log())
        taken = {LogId(self.highest, n) for n in (self.taken[self.promised] if self.promised else ())}
        self.reached["entries that are back"] += len(self.gone & taken & said)
        self.gone = (self.gone | taken) - said


async def play(history: list[Step]) -> Counter[str]:
    world = World()
    await world.member.claim()
    reading = asyncio.create_task(world.read())
    try:
        async with world.member.heartbeat():
            for step in history:
                await world.happen(step)
                if step.kind in ("task", "heal"):
                    await world.clock.advance(0.0)
                world.look()
            if reading.done():
                reading.result()  # only a successor may have ended it
        await world.leave()
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await world.member.close()
    return world.reached


def steps_of(prelude: tuple[str, ...]) -> list[Step]:
    """A number behind a word says for how many seconds."""
    words = (re.fullmatch(r"(.*?)(?: ([0-9.]+))?", one) for one in prelude)
    return [Step(word[1], seconds=float(word[2] or 0)) for word in words if word]


def play_quietly(prelude: tuple[str, ...], history: list[Step]) -> Counter[str]:
    logger.disable("barrier")  # hundreds of warnings are right, and slow to print
    try:
        return asyncio.run(play(steps_of(prelude) + history))
    finally:
        logger.enable("barrier")


HISTORIES: dict[str, st.SearchStrategy[Any]] = {
    "prelude": st.sampled_from(PRELUDES),
    "history": st.lists(STEPS, min_size=5, max_size=20),
}
REACHED = (
    "promises, tasks taken, lapsed leases, successors, calms, entries that are back, entries of a log that went back"
)


@settings(max_examples=examples(200), deadline=None)
@given(**HISTORIES)
def test_a_rank_keeps_its_word_whatever_the_store_does(prelude: tuple[str, ...], history: list[Step]) -> None:
    play_quietly(prelude, history)


@pytest.mark.slow
def test_the_histories_reach_what_they_should() -> None:
    """Always the same histories, so that luck does not come into it."""
    reached: Counter[str] = Counter()

    @settings(max_examples=100, deadline=None, database=None, derandomize=True)
    @given(**HISTORIES)
    def play_some(prelude: tuple[str, ...], history: list[Step]) -> None:
        reached.update(play_quietly(prelude, history))

    play_some()
    never = set(REACHED.split(", ")) - (+reached).keys()
    assert not never, f"never drawn: {never}; drawn: {dict(reached)}"


def test_the_search_lays_a_record_out_as_planners_do() -> None:
    async def opened() -> Snapshot:
        world = World()
        await world.happen(Step("open", above=5))
        async with world.fake.client() as client:
            return await verbs.inspect(adopt(client), KEYS, world_size=RANK + 1)

    seen = asyncio.run(opened())
    epoch = seen.epoch
    assert epoch is not None, seen.unreadable
    assert (epoch.id, epoch.verdict, seen.log_end) == (EpochId(105, NONCES[0]), None, LogId(105, 1))
    assert (epoch.roster[RANK], set(epoch.roster[:RANK])) == (MINE, {OTHER})

"""Ranks and planners around the reference model, as a graph of states: which events can follow each state.

The model calls real code where it can: `barrier.testing.reference` for the verbs, `barrier.protocol.rank_state` for what a rank promises and
takes from the log, `runner.session` for tasks and failures, `planner.decide` for the planners' choices. It models only the code between
them (`runner.Runner`, `barrier.Barrier` and `planner.InstanceLoop`), and the faults.

Where the real code waits for a time, here anything may happen at any moment. So a stall, a lapse and a lost wake-up need no clock.
A planner may try any gate at any moment, because a wake-up proves nothing. A rank may read of an epoch in the log or in the record.
A delayed or doubled request is a request at any later moment, with what its sender knew at the first moment. The search tries all
of them; where the store refuses one, nothing changes.

A state is a tuple of small numbers. Each number names a value in a table. What follows from a store and one process is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from barrier import EpochId, EpochRecord, Leadership, RankView, Report, Settings, Snapshot, Verdict, all_ranks
from barrier.protocol.log import EpochAnnounced, TaskEntry, VerdictAnnounced
from barrier.protocol.model import StepRecord
from barrier.protocol.outcomes import Already, Dispatched, Following, Leading, Opened, Released, Restored
from barrier.protocol.rank_state import Promised, RankState
from barrier.protocol.record import SeenRecord
from barrier.protocol.report import TaskOutcome
from barrier.testing import reference
from barrier.testing.reference import ReferenceEntry, ReferenceReport, ReferenceState
from planner.decide import Conclude, OpenEpoch, RestoreEpoch, Serve, View, decide
from planner.lifecycle import TABLE, predecessor, serving_requirement
from planner.policy import Policy
from planner.recovery import Memory
from planner.spec import InstanceSpec
from runner.admission import Accept, Promise
from runner.lifecycle import FAILED, LIFECYCLE
from runner.messages import (
    ConnectToGroup,
    LoadModel,
    ModelSpec,
    RunnerStatus,
    StartWarmup,
    Task,
    TextGeneration,
    derive_task_id,
    status_named,
)
from runner.session import Session, Work
from runner.words import Failure
from tests.exhaustive.rules import NOW_MS, STEPS, Openings, addressed, epoch_of, is_live, store_breach

LIVE_MS = NOW_MS + 1
"""When a lease that runs ends."""

KINDS = ("lapse", "flush", "evict", "rollback", "delay", "lost", "crash", "fail", "impostor")
"""What may go wrong besides restarts, each occurrence at the price of one fault:

lapse     the lease of a rank or of the leader runs out
flush     the store forgets everything
evict     the store forgets one key: the record, the log or who leads
rollback  the store goes back to how it once was
delay     a report arrives after later ones; an open arrives late, so that it knows nothing or has been carried out before
lost      a reply is lost after the commit: the planner does not learn what it did
crash     a planner forgets everything and comes back under another name
fail      a rank's work fails
impostor  a process that is not on the roster reports as if it were, as a runner would that kept its state over a restart
"""

MUTATIONS = (
    "reuse", "lower", "unbound", "exact", "nonce", "teardown", "missed", "outcomes", "table", "notice", "hearsay", "amnesia",
    "impatient",
)  # fmt: skip
"""Guards of ranks and planners that can be taken out here. Those of the verbs are in the reference model, and those of a rank's own
decisions in `barrier.protocol.rank_state`: tests/mutants/catalogue.py takes them out there.

reuse     a promise that was spent is used again
lower     a lower epoch is promised after a higher one
unbound   a rank acts without a promise
exact     a rank that has promised acts on every epoch's tasks
nonce     a rank compares only the number of the epoch it promised
teardown  a rank promises first and tears down later
missed    a rank does not notice that an entry of the log never reached it
outcomes  a rank does not remember which tasks it has done
table     a rank accepts tasks in any status
notice    a rank never hears of epochs and verdicts from the record
hearsay   a rank promises an epoch that it read of, though the record says nothing of it
amnesia   a planner never tells a verb what it knows: floor and log positions
impatient a planner never notices a stall
"""

_SPEC = ModelSpec(model_id="m", total_layers=1)
_GROUP = "x"
_POLICY = Policy(max_failures=1_000_000)
_SETTINGS = Settings()
_LONG_AGO = -1e9


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far the search goes.

    Attributes:
        ranks: world size, from 2.
        planners: how many planners at once.
        faults: how many faults of `kinds` in one history.
        kinds: which; see `KINDS`.
        restarts: how many times a rank crashes and comes back as another process.
        zombies: how many of these crashes are none: the old process was stopped, and goes on later beside its replacement.
        epochs: how many epochs are opened at most. The last of several ends by what breaks it only, not by a stall.
        generations: how many texts clients ask for.
        start: the status that all ranks have reached in one epoch when the search begins.
        mutations: guards that are taken out; see `MUTATIONS`.
    """

    ranks: int = 2
    planners: int = 2
    faults: int = 1
    kinds: tuple[str, ...] = KINDS
    restarts: int = 0
    zombies: int = 0
    epochs: int = 2
    generations: int = 0
    start: str = "Idle"
    mutations: frozenset[str] = frozenset()


class Process(NamedTuple):
    """One life of one runner process. `done` are the tasks it did in its epoch, `engine` the epoch that its engine holds a model of."""

    state: RankState
    status: str = "Idle"
    done: tuple[str, ...] = ()
    engine: EpochId | None = None


class Mind(NamedTuple):
    """What one planner process knows: its term and, as `barrier.Barrier` does, how far epochs and logs have come."""

    life: int = 1
    term: int = 0
    term_floor: int = 0
    floor: int = 0
    current: EpochId | None = None
    seen_n: int = 0
    places: tuple[tuple[str, int], ...] = ()


class Effect(NamedTuple):
    """A task took effect at a rank."""

    rank: int
    incarnation: str
    epoch: EpochId
    step: str


History: TypeAlias = tuple[tuple[tuple[EpochId, tuple[str, ...]], ...], ...]
"""For every rank and epoch, the steps that took effect, in order; across its processes."""

State: TypeAlias = tuple[int, int, int, int, int, int, int, int, int, tuple[int, ...], tuple[int, ...]]
"""Store, snapshot + 1, openings, history, late report + 1, zombie + 1, faults, restarts and zombies left, ranks, planners."""


Move: TypeAlias = tuple[str, bool, State, str | None]
"""One thing that may happen: what, whether nobody but chance would do it, what comes of it, and what it breaks."""


class _Step(NamedTuple):
    """A move of one process, before it is put into a state."""

    label: str
    store: int
    process: int
    cost: int = 0
    effect: Effect | None = None
    openings: int | None = None
    breach: str | None = None


_V = TypeVar("_V", bound=Hashable)


class Table(Generic[_V]):
    """Values by number, each once."""

    def __init__(self) -> None:
        self.values: list[_V] = []
        self._numbers: dict[_V, int] = {}

    def number(self, value: _V) -> int:
        """The value's number, a new one where it was never seen."""
        found = self._numbers.get(value)
        if found is None:
            found = self._numbers[value] = len(self.values)
            self.values.append(value)
        return found


def incarnation(life: int) -> str:
    """The name of a rank's n-th life; later ones sort later."""
    return f"{life:012x}{0:016x}"


def next_life(name: str) -> str:
    """The name of the life after this one."""
    return incarnation(int(name[:12], 16) + 1)


@cache
def read_as(entry: ReferenceEntry) -> EpochAnnounced | VerdictAnnounced | TaskEntry:
    """An entry of the log, as a rank reads it."""
    epoch = epoch_of(entry)
    match entry.kind:
        case "opened":
            return EpochAnnounced(epoch)
        case "verdict":
            return VerdictAnnounced(epoch, _VERDICTS["broken"])
        case "task":
            return TaskEntry(epoch, entry.id, entry.previous, entry.step, first=0, last=0, term=1, payload=b"")


def holder(planner: int, life: int) -> str:
    """The name of a planner's n-th life."""
    return f"{planner}.{life}"


class Model:
    """The graph."""

    def __init__(self, bounds: Bounds) -> None:
        unknown = bounds.mutations - set(MUTATIONS)
        if unknown or not set(bounds.kinds) <= set(KINDS):
            raise ValueError(f"unknown: {sorted(unknown | (set(bounds.kinds) - set(KINDS)))}")
        self.bounds = bounds
        self.size = bounds.ranks
        self.spec = InstanceSpec(name=_GROUP, world_size=bounds.ranks, model=_SPEC)
        self.stores: Table[ReferenceState] = Table()
        self.openings: Table[Openings] = Table()
        self.histories: Table[History] = Table()
        self.late: Table[tuple[int, ReferenceReport]] = Table()
        self.zombies: Table[tuple[int, int]] = Table()
        self.processes: Table[Process] = Table()
        self.minds: Table[Mind] = Table()
        self._rank_memo: dict[tuple[int, int, int], tuple[_Step, ...]] = {}
        self._mind_memo: dict[tuple[int, int, int, int], tuple[_Step, ...]] = {}
        self._effect_memo: dict[tuple[int, Effect, int], tuple[int, str | None]] = {}
        self._wish_memo: dict[int, tuple[object, ...]] = {}
        self._store_faults_memo: dict[int, tuple[tuple[str, int], ...]] = {}
        self._say_memo: dict[tuple[int, int, int], int] = {}
        self._work_memo: dict[tuple[str, EpochId], Work] = {}
        self._session_memo: dict[tuple[str, EpochId | None, str, tuple[str, ...]], Session] = {}
        self._swaps: dict[tuple[str, int], int] = {}
        self.generations = tuple(f"generate g{number}" for number in range(1, bounds.generations + 1))
        self._empty = self.stores.number(ReferenceState.empty(bounds.ranks))
        self._kinds = frozenset(bounds.kinds)
        self._mutations = bounds.mutations
        self._mortal = "crash" in self._kinds
        self._symmetric = bounds.planners == 2 or bounds.ranks == 3
        self._sound: set[tuple[int, int]] = set()

    # --- states -------------------------------------------------------------------------------------------------------

    def initial(self) -> State:
        """Nobody has said anything yet."""
        bounds = self.bounds
        return (
            self._empty,
            0,
            self.openings.number(()),
            self.histories.number(((),) * self.size),
            0,
            0,
            bounds.faults,
            bounds.restarts,
            bounds.zombies,
            (self.processes.number(Process(RankState(incarnation(1)))),) * self.size,
            (self.minds.number(Mind()),) * bounds.planners,
        )

    def opened(self, state: State) -> int:
        """How many epochs have been opened."""
        return len(self.openings.values[state[2]])

    def may_open(self, state: State) -> bool:
        """Whether the bound on epochs leaves a way out of any trouble."""
        return self.opened(state) < self.bounds.epochs

    def serves(self, state: State) -> bool:
        """The goal: all ranks serve in one epoch, and the store knows it."""
        record = self.stores.values[state[0]].record
        if record is None or record.verdict is not None:
            return False
        ranks = [self.processes.values[number] for number in state[9]]
        if any(one.state.promised != record.id or one.status not in ("Ready", "Running") for one in ranks):
            return False
        return all(
            is_live(report)
            and report is not None
            and report.epoch == record.id
            and report.status in ("Ready", "Running")
            for report in self.stores.values[state[0]].reports
        )

    def all_are(self, state: State, status: str) -> bool:
        """Whether all ranks are in this status in one epoch, have said so, and no more than they: a place to begin a search from."""
        store = self.stores.values[state[0]]
        ranks = [self.processes.values[number] for number in state[9]]
        return (
            store.record is not None
            and all(one.status == status and one.state.promised == store.record.id for one in ranks)
            and all(
                report is not None and report.status == status and report.applied == one.state.applied
                for report, one in zip(store.reports, ranks, strict=True)
            )
        )

    def breach(self, state: State) -> str | None:
        """What is broken in this state, whatever led to it."""
        held = [self.processes.values[number].engine for number in state[9]]
        one = next((engine for engine in held if engine is not None), None)
        if one is not None and any(engine is not None and engine != one for engine in held):
            said = ", ".join(f"rank {rank} for epoch {engine}" for rank, engine in enumerate(held) if engine)
            return f"S3: models are held in different epochs at once: {said}"
        key = (state[0], state[2])
        if key in self._sound:
            return None
        self._sound.add(key)
        return self._probe(*key)

    # --- what may happen ----------------------------------------------------------------------------------------------

    def moves(self, state: State) -> list[Move]:
        """Everything that may happen next: label, whether only chance would do it, the next state, and what it breaks."""
        store, snap, openings, history, late, zombie, faults, restarts, zombies, ranks, minds = state
        found: list[Move] = []
        for rank, number in enumerate(ranks):
            for label, then, process, cost, effect, _, _ in self._rank_steps(store, number, rank):
                if cost > faults:
                    continue
                after, breach = (history, None) if effect is None else self._take_effect(history, effect, openings)
                others = (*ranks[:rank], process, *ranks[rank + 1 :])
                found.append((
                    label, cost > 0,
                    (then, snap, openings, after, late, zombie, faults - cost, restarts, zombies, others, minds), breach,
                ))  # fmt: skip
        for index, number in enumerate(minds):
            for label, then, mind, cost, _, opened, breach in self._mind_steps(store, number, index, openings):
                if cost > faults:
                    continue
                known = openings if opened is None else opened
                others = (*minds[:index], mind, *minds[index + 1 :])
                found.append((
                    label, cost > 0,
                    (then, snap, known, history, late, zombie, faults - cost, restarts, zombies, ranks, others), breach,
                ))  # fmt: skip
        found += self._befalls(state)
        if self._symmetric:
            return [(label, fault, self._canonical(then), breach) for label, fault, then, breach in found]
        return found

    def _befalls(self, state: State) -> Iterator[Move]:
        """What neither a rank nor a planner that lives does."""
        _, _, _, _, late, zombie, faults, restarts, _, _, _ = state
        if restarts:
            yield from self._restarts(state)
        if self._mortal:
            yield from self._lease_of_the_dead(state)
        if zombie:
            yield from self._zombie_moves(state)
        if late:
            yield self._late_report(state)
        if faults:
            yield from self._faults(state)

    def _late_report(self, state: State) -> Move:
        """What a rank said before, and what only now comes to the store."""
        store, snap, openings, history, late, zombie, faults, restarts, zombies, ranks, minds = state
        rank, report = self.late.values[late - 1]
        then = self._say(store, rank, late, report)
        return (
            f"the late report of rank {rank} ({report.status}) arrives", False,
            (then, snap, openings, history, 0, zombie, faults, restarts, zombies, ranks, minds), None,
        )  # fmt: skip

    def _lease_of_the_dead(self, state: State) -> Iterator[Move]:
        """Nobody renews the lease of a planner that was killed."""
        store = self.stores.values[state[0]]
        leader = store.leader
        if leader is None or leader.until_ms <= NOW_MS:
            return
        alive = {holder(index, self.minds.values[number].life) for index, number in enumerate(state[10])}
        if leader.leadership.holder not in alive:
            then = self.stores.number(replace(store, leader=replace(leader, until_ms=NOW_MS)))
            yield "the lease of the planner that was killed lapses", False, (then, *state[1:]), None

    def _faults(self, state: State) -> Iterator[Move]:
        store, snap, openings, history, late, zombie, faults, restarts, zombies, ranks, minds = state
        rest = (restarts, zombies, ranks, minds)
        if "rollback" in self._kinds:
            if not snap:
                yield (
                    "the store's state is kept for later", True,
                    (store, store + 1, openings, history, late, zombie, faults, *rest), None,
                )  # fmt: skip
            elif snap != store + 1:
                yield (
                    "FAULT the store goes back to the state that was kept", True,
                    (snap - 1, 0, openings, history, late, zombie, faults - 1, *rest), None,
                )  # fmt: skip
        for label, then in self._store_faults(store):
            yield label, True, (then, snap, openings, history, late, zombie, faults - 1, *rest), None
        if "delay" in self._kinds and not late:
            for rank, number in enumerate(ranks):
                delayed = 1 + self.late.number((rank, self._report(self.processes.values[number])))
                yield (
                    f"FAULT a report of rank {rank} is delayed", True,
                    (store, snap, openings, history, delayed, zombie, faults - 1, *rest), None,
                )  # fmt: skip

    def _restarts(self, state: State) -> Iterator[Move]:
        store, snap, openings, history, late, zombie, faults, restarts, zombies, ranks, minds = state
        for rank, number in enumerate(ranks):
            one = self.processes.values[number]
            born = Process(RankState(next_life(one.state.incarnation)).read(self.stores.values[store].log_end))
            others = (*ranks[:rank], self.processes.number(born), *ranks[rank + 1 :])
            yield (
                f"FAULT rank {rank} crashes and comes back", True,
                (store, snap, openings, history, late, zombie, faults, restarts - 1, zombies, others, minds), None,
            )  # fmt: skip
            if zombies and not zombie:
                stopped = 1 + self.zombies.number((rank, number))
                yield (
                    f"FAULT rank {rank} is stopped, and its replacement started", True,
                    (store, snap, openings, history, late, stopped, faults, restarts - 1, zombies - 1, others, minds), None,
                )  # fmt: skip

    def _zombie_moves(self, state: State) -> Iterator[Move]:
        """The stopped process goes on. It may act on what it reads; a report of it comes through at the price of a fault."""
        store, snap, openings, history, late, zombie, faults, restarts, zombies, ranks, minds = state
        rank, number = self.zombies.values[zombie - 1]
        for step in self._rank_steps(store, number, rank):
            cost = step.cost + (1 if step.store != store else 0)
            if cost > faults:
                continue
            after, breach = (
                (history, None) if step.effect is None else self._take_effect(history, step.effect, openings)
            )
            then = 1 + self.zombies.number((rank, step.process))
            yield (
                f"the process of rank {rank} that was replaced goes on: {step.label}", cost > 0,
                (step.store, snap, openings, after, late, then, faults - cost, restarts, zombies, ranks, minds), breach,
            )  # fmt: skip

    # --- symmetry -----------------------------------------------------------------------------------------------------

    def _canonical(self, state: State) -> State:
        """One state for all that differ only in which planner is which, and which of three ranks' last two is which."""
        minds = state[10]
        if len(minds) == 2 and minds[0] >= minds[1]:
            swapped = self._swap_planners(state)
            state = swapped if minds[0] > minds[1] else min(state, swapped)
        ranks = state[9]
        if len(ranks) == 3 and ranks[1] >= ranks[2]:
            swapped = self._swap_ranks(state)
            state = swapped if ranks[1] > ranks[2] else min(state, swapped)
        return state

    def _swapped(self, what: str, number: int, swap: Callable[[int], int]) -> int:
        key = (what, number)
        found = self._swaps.get(key)
        if found is None:
            found = self._swaps[key] = swap(number)
        return found

    def _swap_planners(self, state: State) -> State:
        def swap(number: int) -> int:
            store = self.stores.values[number]
            if store.leader is None:
                return number
            old = store.leader.leadership
            planner, life = old.holder.split(".")
            other = Leadership(old.term, holder(1 - int(planner), int(life)))
            return self.stores.number(replace(store, leader=replace(store.leader, leadership=other)))

        return (
            self._swapped("planners", state[0], swap),
            state[1] and 1 + self._swapped("planners", state[1] - 1, swap),
            *state[2:10],
            state[10][::-1],
        )

    def _swap_ranks(self, state: State) -> State:
        def swap_store(number: int) -> int:
            store = self.stores.values[number]
            record = store.record
            if record is not None:
                record = replace(record, roster=_exchange(record.roster))
            return self.stores.number(replace(store, reports=_exchange(store.reports), record=record))

        def swap_openings(number: int) -> int:
            return self.openings.number(
                tuple((epoch, _exchange(roster)) for epoch, roster in self.openings.values[number])
            )

        def swap_late(number: int) -> int:
            rank, report = self.late.values[number]
            return self.late.number(((0, 2, 1)[rank], report))

        def swap_zombie(number: int) -> int:
            rank, process = self.zombies.values[number]
            return self.zombies.number(((0, 2, 1)[rank], process))

        return (
            self._swapped("ranks", state[0], swap_store),
            state[1] and 1 + self._swapped("ranks", state[1] - 1, swap_store),
            self._swapped("openings", state[2], swap_openings),
            self._swapped(
                "history", state[3], lambda number: self.histories.number(_exchange(self.histories.values[number]))
            ),
            state[4] and 1 + self._swapped("late", state[4] - 1, swap_late),
            state[5] and 1 + self._swapped("zombie", state[5] - 1, swap_zombie),
            *state[6:9],
            _exchange(state[9]),
            state[10],
        )

    # --- the store's faults -------------------------------------------------------------------------------------------

    def _store_faults(self, number: int) -> tuple[tuple[str, int], ...]:
        found = self._store_faults_memo.get(number)
        if found is None:
            found = self._store_faults_memo[number] = tuple(
                (f"FAULT {label}", self.stores.number(store))
                for kind, label, store in self._spoiled(self.stores.values[number])
                if kind in self._kinds and store != self.stores.values[number]
            )
        return found

    def _spoiled(self, store: ReferenceState) -> Iterator[tuple[str, str, ReferenceState]]:
        for rank, report in enumerate(store.reports):
            if report is None:
                continue
            yield "lapse", f"the lease of rank {rank} lapses", store.say(rank, replace(report, until_ms=NOW_MS))
            if store.record is not None:
                later = replace(report, incarnation=incarnation(99), epoch=store.record.id, until_ms=LIVE_MS)
                yield "impostor", f"a process that is not on the roster reports as rank {rank}", store.say(rank, later)
        if store.leader is not None:
            yield "lapse", "the leader's lease lapses", replace(store, leader=replace(store.leader, until_ms=NOW_MS))
            yield "evict", "the store forgets who leads", replace(store, leader=None)
        yield "flush", "the store forgets everything", ReferenceState.empty(self.size)
        yield "evict", "the store forgets the record", replace(store, record=None)
        yield "evict", "the store forgets the log", replace(store, log=())

    # --- ranks --------------------------------------------------------------------------------------------------------

    def _rank_steps(self, store: int, number: int, rank: int) -> tuple[_Step, ...]:
        key = (store, number, rank)
        found = self._rank_memo.get(key)
        if found is None:
            me = self.processes.values[number]
            found = self._rank_memo[key] = tuple(
                step
                for step in self._rank_does(self.stores.values[store], store, me, rank)
                if step.store != store or step.process != number
            )
        return found

    def _rank_does(self, store: ReferenceState, number: int, me: Process, rank: int) -> Iterator[_Step]:
        def become(label: str, process: Process, effect: Effect | None = None, cost: int = 0) -> _Step:
            return _Step(f"rank {rank} {label}", number, self.processes.number(process), cost, effect)

        # A heartbeat says the whole state, and looks whether the log went back.
        state, promised = me.state, me.state.promised
        said = f"as {me.status}" + (f" in epoch {promised.number}" if promised else "")
        yield _Step(
            f"rank {rank} reports {said}",
            self._say(number, rank, 0, self._report(me)),
            self.processes.number(me._replace(state=state.find_end(store.log_end, state.read_to))),
        )
        step = self._read(store, me, rank)
        if step is not None:
            label, process, effect = step
            yield become(label, process, effect)
        for seen in self._seen(store, me, rank):
            news = None if "notice" in self._mutations else self._loosened(me, seen.epoch).hear(seen)
            if isinstance(news, VerdictAnnounced):
                yield become("hears of the verdict and tears down", self._leave(me))
            if isinstance(news, EpochAnnounced) and (promised is not None or me.engine is not None):
                yield become(f"hears of epoch {seen.epoch.number} and tears down", self._leave(me))
            then, outcome = self._loosened(me, seen.epoch, promising=True).promise(seen.epoch, seen, rank)
            if isinstance(outcome, Promised):
                label = f"promises epoch {seen.epoch.number}"
                yield become(label, me._replace(state=then, status=LIFECYCLE.idle, done=()))
        if me.status in _AT_WORK:
            done = self._finished(me)
            yield become(f"is {done.status}", done)
        if "teardown" in self._mutations and me.engine is not None and me.engine != promised:
            yield become("closes its engine at last", me._replace(engine=None))
        if "fail" in self._kinds and promised is not None and me.status != FAILED:
            yield become("FAULT fails", self._failed(me), cost=1)

    def _seen(self, store: ReferenceState, me: Process, rank: int) -> list[SeenRecord]:
        """What the record says, or whatever this rank takes for the record."""
        record = store.record
        if record is not None:
            return [SeenRecord(record.id, record.verdict, self.size, record.roster[rank])]
        if "hearsay" in self._mutations:
            mine = me.state.incarnation
            return [SeenRecord(epoch_of(one), None, self.size, mine) for one in store.log if one.kind == "opened"]
        return []

    def _loosened(self, me: Process, epoch: EpochId, *, promising: bool = False) -> RankState:
        """The state that is decided on, with whatever guard is taken out."""
        state = me.state
        if "lower" in self._mutations:
            above = epoch != state.promised and (state.promised is not None or epoch.number != state.floor)
            state = state._replace(floor=epoch.number - above)
        if "reuse" in self._mutations and promising and me.status == LIFECYCLE.idle:
            state = state._replace(promised=None)
        return state

    def _leave(self, me: Process) -> Process:
        """Tear down and retire."""
        return me._replace(
            state=me.state if "reuse" in self._mutations else me.state.retire(),
            status=LIFECYCLE.idle,
            done=(),
            engine=me.engine if "teardown" in self._mutations else None,
        )

    def _failed(self, me: Process) -> Process:
        """The engine is given up."""
        then, _ = self._session(me).failed(_FAILURE)
        return me._replace(status=then.status.kind, engine=None)

    def _finished(self, me: Process) -> Process:
        """What the rank was doing is done; texts are done all at once, since what is searched for is the order in which they begin."""
        then, _ = self._session(me).finished(self._work(me.done[-1], me.state.promised or _NO_EPOCH))
        return me._replace(status=then.status.kind)

    def _read(self, store: ReferenceState, me: Process, rank: int) -> tuple[str, Process, Effect | None] | None:
        """Take the next entry of the log that changes anything."""
        for entry in store.log:
            if entry.id <= me.state.read_to:
                continue
            place, here = f"entry {entry.id} of the log", me._replace(state=me.state.read(entry.id))
            match read_as(entry):
                case EpochAnnounced(epoch):
                    held = me.state.promised is not None or me.engine is not None
                    if held and self._loosened(me, epoch).is_above(epoch):
                        return f"reads of epoch {epoch.number} ({place}) and tears down", self._leave(here), None
                case VerdictAnnounced(epoch):
                    if epoch == me.state.promised:
                        return f"reads the verdict ({place}) and tears down", self._leave(here), None
                case TaskEntry() as task:
                    then, effect = self._receive(task, here, rank)
                    if then != here:
                        return f"reads {entry.step} ({place})", then, effect
        return None

    def _receive(self, entry: TaskEntry, me: Process, rank: int) -> tuple[Process, Effect | None]:
        """What `Member.tasks` and `Runner` do with a task."""
        epoch = entry.epoch
        state, task = me.state.take(entry)
        if task is None:
            return me, None
        me = me._replace(state=state)
        if not addressed(entry.step, rank):
            return me, None
        work = self._work(entry.step, epoch)
        if self._session(me).misses(task, work.task) and "missed" not in self._mutations:
            me = self._failed(me)
        session = self._loose_session(me, epoch)
        if not isinstance(session.receive(work.task, epoch, state.floor), Accept):
            return me, None
        then, _ = session.begun(work)
        if entry.step == "connect":
            then, _ = then.finished(work)  # nothing that is searched for differs in the middle of it
        engine = epoch if entry.step == "load" else me.engine
        me = me._replace(status=then.status.kind, engine=engine, done=(*me.done, entry.step))
        return me, Effect(rank, state.incarnation, epoch, entry.step)

    def _session(self, me: Process) -> Session:
        """This process as the runner's own code has it."""
        return self._session_of(me.state.incarnation, me.state.promised, me.status, me.done)

    def _loose_session(self, me: Process, epoch: EpochId) -> Session:
        """The same for a task of an epoch, with whatever guard of the judge's is taken out."""
        promised, status = me.state.promised, me.status
        if (
            "unbound" in self._mutations
            or ("exact" in self._mutations and promised is not None)
            or ("nonce" in self._mutations and promised is not None and promised.number == epoch.number)
        ):
            promised = epoch
        if "table" in self._mutations and status != FAILED:
            status = "Ready"
        return self._session_of(
            me.state.incarnation, promised, status, () if "outcomes" in self._mutations else me.done
        )

    def _session_of(self, incarnation: str, promised: EpochId | None, status: str, done: tuple[str, ...]) -> Session:
        key = (incarnation, promised, status, done)
        found = self._session_memo.get(key)
        if found is None:
            task_ids = {self._task_id(step, promised or _NO_EPOCH): step for step in done}
            found = self._session_memo[key] = Session(
                instance=_GROUP,
                incarnation=incarnation,
                status=_STATUSES[status],
                promise=None if promised is None else Promise(promised, incarnation, self.size),
                outcomes={
                    task_id: TaskOutcome(task_id=task_id, step=step, n=0, result="done")
                    for task_id, step in task_ids.items()
                },
            )
        return found

    def _work(self, step: str, epoch: EpochId) -> Work:
        found = self._work_memo.get((step, epoch))
        if found is None:
            found = self._work_memo[step, epoch] = Work(self._task(step, epoch), step, 0)
        return found

    def _task_id(self, step: str, epoch: EpochId) -> str:
        return derive_task_id(_GROUP, str(epoch), step) if step in STEPS else step.replace(" ", ".")

    def _task(self, step: str, epoch: EpochId) -> Task:
        task_id, name = self._task_id(step, epoch), str(epoch)
        match step:
            case "connect":
                return ConnectToGroup(task_id=task_id, instance=_GROUP, epoch=name, term=1, deadline=60.0)
            case "load":
                return LoadModel(task_id=task_id, instance=_GROUP, epoch=name, term=1, model=_SPEC)
            case "warm up followers" | "warm up leader":
                return StartWarmup(task_id=task_id, instance=_GROUP, epoch=name, term=1)
            case _:
                return TextGeneration(task_id=task_id, instance=_GROUP, epoch=name, term=1, prompt="x", max_tokens=1)

    def _report(self, me: Process) -> ReferenceReport:
        mine, promised, floor, applied, _ = me.state
        return ReferenceReport(mine, me.status, promised, applied, floor, digest="", until_ms=LIVE_MS)

    def _say(self, store: int, rank: int, late: int, report: ReferenceReport) -> int:
        """The store after a report; `late` is the number of a late one, 0 for one that is in time."""
        if not late:
            return self.stores.number(self.stores.values[store].say(rank, report))
        key = (store, rank, late)
        found = self._say_memo.get(key)
        if found is None:
            found = self._say_memo[key] = self.stores.number(self.stores.values[store].say(rank, report))
        return found

    def _take_effect(self, number: int, effect: Effect, openings: int) -> tuple[int, str | None]:
        key = (number, effect, openings)
        found = self._effect_memo.get(key)
        if found is None:
            found = self._effect_memo[key] = self._judge_effect(self.histories.values[number], effect, openings)
        return found

    def _judge_effect(self, history: History, effect: Effect, openings: int) -> tuple[int, str | None]:
        """S1, S2, S3 and S6 at the place where they count: an engine is told to do something."""
        rank, life, epoch, step = effect
        mine = dict(history[rank])
        before = mine.get(epoch, ())
        mine[epoch] = (*before, step)
        done = [dict(of_rank).get(epoch, ()) for of_rank in history]
        then = self.histories.number((*history[:rank], tuple(sorted(mine.items())), *history[rank + 1 :]))
        roster = dict(self.openings.values[openings]).get(epoch)
        what = f"rank {rank} begins {step} of epoch {epoch.number}"
        breach = None
        if step in before:
            breach = f"S2: {what} a second time"
        elif roster is None or roster[rank] != life:
            breach = f"S6: {what}, and its process is not on the roster"
        elif step == "load" and any("connect" not in steps for steps in done):
            breach = f"S1: {what} while another has not connected in it"
        elif step == "warm up leader" and any("warm up followers" not in steps for steps in done[1:]):
            breach = f"S1: {what} before its followers"
        elif step not in STEPS:
            texts = [
                [one for one in (*steps, step if other == rank else "") if one and one not in STEPS]
                for other, steps in enumerate(done)
            ]
            longest = max(texts, key=len)
            if any(longest[: len(some)] != some for some in texts):
                breach = f"S2: {what} while another rank is at another text: {texts}"
        return then, breach

    # --- planners -----------------------------------------------------------------------------------------------------

    def _mind_steps(self, store: int, number: int, index: int, openings: int) -> tuple[_Step, ...]:
        key = (store, number, index, openings)
        found = self._mind_memo.get(key)
        if found is None:
            mind = self.minds.values[number]
            found = self._mind_memo[key] = tuple(
                step
                for step in self._planner_does(self.stores.values[store], store, mind, index, openings)
                if step.breach is not None or step.store != store or step.process != number
            )
        return found

    def _planner_does(
        self, store: ReferenceState, number: int, mind: Mind, index: int, openings: int
    ) -> Iterator[_Step]:
        name, who = f"planner {index}", holder(index, mind.life)
        led, outcome = reference.lead(store, NOW_MS, holder=who, floor=mind.term_floor, lease_ms=LIVE_MS - NOW_MS)
        match outcome:
            case Leading(leadership):
                told = mind._replace(term=leadership.term, term_floor=max(mind.term_floor, leadership.term))
                breach = None
                if (
                    store.leader is not None
                    and store.leader.until_ms > NOW_MS
                    and store.leader.leadership.holder != who
                ):
                    breach = f"TERM: {name} leads while another's lease runs"
                elif (
                    store.leader is not None
                    and leadership.term <= store.leader.leadership.term
                    and leadership != store.leader.leadership
                ):
                    breach = f"TERM: {name} leads under a term that was issued before"
                yield self._planned(f"{name} leads, term {leadership.term}", led, told, breach=breach)
            case Following(leader, _):
                told = mind._replace(term=0, term_floor=max(mind.term_floor, leader.term))
                yield self._planned(f"{name} follows", led, told)
            case None:
                raise AssertionError("a lease above 0 is never given back")
        if "crash" in self._kinds:
            yield self._planned(f"FAULT {name} is killed", store, Mind(life=mind.life + 1), cost=1)
        if mind.term == 0:
            return
        leadership = Leadership(mind.term, who)
        mind = self._look(store, mind)
        for attempt in (self._open, self._restore, self._conclude, self._dispatch):
            yield from attempt(name, store, number, mind, leadership, openings)

    def _planned(
        self,
        label: str,
        store: ReferenceState,
        mind: Mind,
        *,
        cost: int = 0,
        breach: str | None = None,
        openings: int | None = None,
    ) -> _Step:
        return _Step(label, self.stores.number(store), self.minds.number(mind), cost, None, openings, breach)

    def _look(self, store: ReferenceState, mind: Mind) -> Mind:
        """What `Barrier.inspect` adds to what a planner knows."""
        snapshot = self._snapshot(store)
        mind = mind._replace(floor=max(mind.floor, snapshot.floor))
        return self._adopt(mind, store.record.id, snapshot.applied) if store.record is not None else mind

    def _adopt(self, mind: Mind, epoch: EpochId, seen_n: int = 0) -> Mind:
        if mind.current != epoch:
            mind = mind._replace(current=epoch, seen_n=0, places=())
        if "amnesia" in self._mutations:
            return mind._replace(floor=0)
        return mind._replace(seen_n=max(mind.seen_n, seen_n), floor=max(mind.floor, epoch.number))

    def _open(
        self, name: str, store: ReferenceState, number: int, mind: Mind, leadership: Leadership, openings: int
    ) -> Iterator[_Step]:
        known = self.openings.values[openings]
        if len(known) >= self.bounds.epochs:
            return
        fresh = f"{len(known) + 1:032x}"
        wish = any(isinstance(one, OpenEpoch) for one in self._wishes(store, number))
        # (nonce, floor, cost, what): a request that was delayed knows no floor, or was carried out before.
        asks = [(fresh, mind.floor, 0, "")] if wish else []
        if "delay" in self._kinds:
            asks.append((fresh, 0, 1, "FAULT late: "))
            asks += [(epoch.nonce, 0, 1, "FAULT again: ") for epoch, _ in known[-1:]]
        elif not wish:
            asks.append((fresh, mind.floor, 0, ""))  # refused, or a breach: see below
        for nonce, floor, cost, what in asks:
            then, outcome = reference.open_epoch(
                store, NOW_MS, leadership=leadership, nonce=nonce, floor=floor, digest=self.spec.digest
            )
            if not isinstance(outcome, Opened) or then is store:
                if then is not store:
                    yield self._planned(
                        f"{name}: open answers {outcome}", then, mind, breach="S8: a refused open wrote"
                    )
                continue
            if then.record is None:
                raise AssertionError("an opened epoch has a record")
            after = self.openings.number((*known, (outcome.epoch, then.record.roster)))
            breach = store_breach(store, then, self.openings.values[after], leadership, floor)
            if not wish and cost == 0 and breach is None:
                continue  # nobody asked for it
            then = replace(
                then, record=replace(then.record, ordinal=1)
            )  # it is for people, and would keep states apart
            label = f"{what}{name} opens epoch {outcome.epoch.number}"
            told = self._adopt(mind, outcome.epoch, 1)
            yield self._planned(label, then, told, cost=cost, breach=breach, openings=after)
            if "lost" in self._kinds and cost == 0:
                yield self._planned(f"FAULT {label}, the reply is lost", then, mind, cost=1, openings=after)

    def _restore(
        self, name: str, store: ReferenceState, number: int, mind: Mind, leadership: Leadership, openings: int
    ) -> Iterator[_Step]:
        known = self.openings.values[openings]
        wishes = [one for one in self._wishes(store, number) if isinstance(one, RestoreEpoch)]
        asked = {(one.epoch, one.status, one.steps) for one in wishes}
        # One that was decided on an earlier picture.
        for epoch, _ in known:
            asked |= {(epoch, "Connected", STEPS[:1]), (epoch, "Ready", STEPS)}
        for epoch, status, steps in sorted(asked):
            then, outcome = reference.restore(
                store, NOW_MS, leadership=leadership, epoch=epoch, status=status, steps=steps, digest=self.spec.digest
            )
            if then is store:
                continue
            breach = store_breach(store, then, known, leadership, mind.floor)
            if not isinstance(outcome, Restored):
                breach = breach or "S8: a refused restore wrote"
            label = f"{name} restores epoch {epoch.number} as {status}"
            yield self._planned(label, then, self._adopt(mind, epoch), breach=breach)

    def _conclude(
        self, name: str, store: ReferenceState, number: int, mind: Mind, leadership: Leadership, openings: int
    ) -> Iterator[_Step]:
        known = self.openings.values[openings]
        wishes = {one.verdict.reason for one in self._wishes(store, number) if isinstance(one, Conclude)}
        if len(known) >= self.bounds.epochs > 1:
            wishes.discard(
                "stalled"
            )  # what comes after it is searched with one epoch fewer, in a fraction of the states
        for epoch in [epoch for epoch, _ in known]:
            for reason in ("broken", "stalled"):
                wished = reason in wishes and store.record is not None and epoch == store.record.id
                concluded = store.record is not None and store.record.id == epoch and store.record.verdict is not None
                if not (wished or concluded or store.record is None or store.record.id != epoch):
                    continue
                then, _ = reference.conclude(
                    store,
                    leadership=leadership,
                    epoch=epoch,
                    verdict=_VERDICTS[reason],
                    seen_n=mind.seen_n if mind.current == epoch else 0,
                )
                if then is store or then == store:
                    continue
                breach = store_breach(store, then, known, leadership, mind.floor)
                if not wished and breach is None:
                    breach = (
                        f"S5: a verdict for epoch {epoch.number} was taken while another was current, or a second one"
                    )
                label = f"{name} ends epoch {epoch.number}: {reason}"
                yield self._planned(label, then, mind, breach=breach)

    def _dispatch(
        self, name: str, store: ReferenceState, number: int, mind: Mind, leadership: Leadership, openings: int
    ) -> Iterator[_Step]:
        known = self.openings.values[openings]
        places = dict(mind.places)
        for epoch in [epoch for epoch, _ in known]:
            mine = mind.current == epoch
            for step in (*STEPS, *self.generations):
                repeatable = step not in STEPS
                row = None if repeatable else next(row for row in TABLE if row.name == step)
                then, outcome = reference.dispatch(
                    store,
                    NOW_MS,
                    leadership=leadership,
                    epoch=epoch,
                    step=step,
                    payload="",
                    requirement=row.waits_for(self.size) if row else serving_requirement(self.size),
                    after=predecessor(row, self.size) if row else "",
                    repeatable=repeatable,
                    seen_n=mind.seen_n if mine else 0,
                    known_n=places.get(step, 0) if mine and not repeatable else 0,
                )
                told = mind
                if isinstance(outcome, Dispatched | Already) and mine and "amnesia" not in self._mutations:
                    told = self._adopt(mind, epoch, outcome.id.n)
                    if not repeatable:
                        told = told._replace(places=tuple(sorted({**places, step: outcome.id.n}.items())))
                label = f"{name} dispatches {step} of epoch {epoch.number}"
                if then is store:
                    if isinstance(outcome, Dispatched):
                        yield self._planned(label, then, told, breach="S4: DISPATCHED, and nothing was written")
                    continue
                breach = store_breach(store, then, known, leadership, mind.floor)
                if not isinstance(outcome, Dispatched):
                    breach = breach or "S8: a refused dispatch wrote"
                yield self._planned(f"{label} as {then.log_end}", then, told, breach=breach)
                if "lost" in self._kinds:
                    yield self._planned(f"FAULT {label}, the reply is lost", then, mind, cost=1)

    def _wishes(self, store: ReferenceState, number: int) -> tuple[object, ...]:
        """What `decide` may decide on this picture, now or after any wait."""
        found = self._wish_memo.get(number)
        if found is None:
            found = self._wish_memo[number] = tuple(self._ask(store))
        return found

    def _ask(self, store: ReferenceState) -> Iterator[object]:
        snapshot = self._snapshot(store)
        fresh = Memory.fresh(0.0)
        displaced = {
            view.rank: _LONG_AGO
            for view in snapshot.ranks
            if view.report and store.record and view.report.incarnation < store.record.roster[view.rank]
        }
        memories = [(fresh, "broken")]
        if "impatient" not in self._mutations:
            memories += [
                (replace(fresh, progress_at=_LONG_AGO), "stalled"),
                (replace(fresh, displaced=displaced), "broken"),
            ]
        for memory, reason in memories:
            action = decide(View(self.spec, _POLICY, _SETTINGS, snapshot, memory), 0.0)
            match action:
                case Conclude():
                    yield replace(action, verdict=_VERDICTS[reason])
                case OpenEpoch() | RestoreEpoch() | Serve():
                    yield action
                case _:
                    pass

    def _snapshot(self, store: ReferenceState) -> Snapshot:
        """The picture that `inspect` takes."""
        record = store.record
        return Snapshot(
            group=_GROUP,
            world_size=self.size,
            now_ms=NOW_MS,
            epoch=None
            if record is None
            else EpochRecord(
                id=record.id,
                ordinal=record.ordinal,
                term=1,
                world_size=self.size,
                roster=record.roster,
                steps={step: StepRecord(place.n, attempt) for step, place, attempt in record.steps},
                last_n=record.last_n,
                digest=record.digest,
                notes=record.notes,
                opened_ms=NOW_MS,
                verdict=record.verdict,
            ),
            ranks=tuple(
                RankView(
                    rank,
                    Report(
                        rank,
                        report.incarnation,
                        report.status,
                        report.epoch,
                        report.applied,
                        report.floor,
                        report.digest,
                    ),
                    1,
                )
                if report is not None and is_live(report)
                else RankView(rank)
                for rank, report in enumerate(store.reports)
            ),
            log_end=store.log_end,
        )

    # --- questions that must be answered with no ----------------------------------------------------------------------

    def _probe(self, number: int, openings: int) -> str | None:
        """Ask the verbs what they must refuse in any state: other epochs, other terms, and a release that nothing supports."""
        store, known = self.stores.values[number], self.openings.values[openings]
        record = store.record
        connected = all_ranks(self.size, "Connected")
        for epoch in [epoch for epoch, _ in known]:
            _, outcome = reference.check(store, NOW_MS, epoch=epoch, requirement=connected)
            if isinstance(outcome, Released) and not self._arrived(store, epoch, dict(known)[epoch]):
                return f"S4: the barrier of epoch {epoch.number} is released though not all ranks are Connected in it"
        if store.leader is None:
            return None
        if record is None:
            return self._probe_restore(store, store.leader.leadership)
        twin = EpochId(record.id.number, "f" * 32)
        strangers = (
            Leadership(store.leader.leadership.term, "stranger"),
            Leadership(0, store.leader.leadership.holder),
        )
        asks = [(store.leader.leadership, twin), *((stranger, record.id) for stranger in strangers)]
        for leadership, epoch in asks:
            for row in TABLE:
                then, _ = reference.dispatch(
                    store, NOW_MS, leadership=leadership, epoch=epoch, step=row.name, payload="",
                    requirement=row.waits_for(self.size), after=predecessor(row, self.size),
                )  # fmt: skip
                if then is not store:
                    who = (
                        "an epoch of the same number and another nonce"
                        if epoch == twin
                        else "a planner that does not lead"
                    )
                    return f"{'S1' if epoch == twin else 'TERM'}: {row.name} was dispatched for {who}"
            then, _ = reference.conclude(store, leadership=leadership, epoch=epoch, verdict=_VERDICTS["broken"])
            if then is not store and then != store:
                return "S5: a verdict was taken from a planner that does not lead, or for another nonce"
        return None

    def _probe_restore(self, store: ReferenceState, leadership: Leadership) -> str | None:
        for report in store.reports:
            if report is None:
                continue
            number = max(report.floor, report.epoch.number if report.epoch else 0)
            then, _ = reference.restore(
                store, NOW_MS, leadership=leadership, epoch=EpochId(number, "f" * 32), status=report.status, steps=STEPS,
                digest=self.spec.digest,
            )  # fmt: skip
            if then is not store:
                return f"S4: epoch {number} was restored under another nonce than it had"
        return None

    def _arrived(self, store: ReferenceState, epoch: EpochId, roster: tuple[str, ...]) -> bool:
        return (
            store.record is not None
            and store.record.id == epoch
            and store.record.verdict is None
            and all(
                report is not None
                and is_live(report)
                and (report.epoch, report.incarnation, report.status) == (epoch, roster[rank], "Connected")
                for rank, report in enumerate(store.reports)
            )
        )


_FAILURE = Failure("it failed")
_NO_EPOCH = EpochId(1, "0" * 32)
_AT_WORK = frozenset(row.during for row in LIFECYCLE.rows)
_FIELDS: dict[str, dict[str, int | str]] = {
    "Loading": {"layers_loaded": 0, "total_layers": 1},
    FAILED: {"error": _FAILURE.error},
}
_STATUSES: dict[str, RunnerStatus] = {
    status: status_named(status, **_FIELDS.get(status, {})) for status in LIFECYCLE.order
}
_VERDICTS = {
    "broken": Verdict.aborted("broken"),
    "stalled": Verdict.aborted("stalled"),
}


def _exchange(values: tuple[_V, ...]) -> tuple[_V, ...]:
    return values[0], values[2], values[1]

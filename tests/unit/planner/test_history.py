"""The checker finds every kind of breach: each test takes a history in which nothing is wrong and changes one thing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from barrier import Barrier, Dispatched, EpochId, LogId, Opened, Settings, Verdict
from barrier.protocol.ids import new_incarnation
from barrier.store.keys import Keys
from barrier.store.store import Store
from barrier.testing import FakeStore, scripted_ranks
from planner.history import (
    EpochConcluded,
    EpochOpened,
    EpochRestored,
    History,
    HistoryEvent,
    NoSuchAttempt,
    RankSaid,
    Rule,
    StepDispatched,
    find_breaches,
    read_history,
    timeline,
)
from runner.messages import (
    Rejection,
    RunnerConnected,
    RunnerConnecting,
    RunnerEvent,
    RunnerFailed,
    RunnerIdle,
    RunnerLoaded,
    RunnerLoading,
    RunnerReady,
    RunnerRunning,
    RunnerStatus,
    RunnerStatusUpdated,
    RunnerWarmingUp,
    TaskAcknowledged,
    TaskStatusUpdated,
    derive_task_id,
    encode,
)

pytestmark = pytest.mark.anyio

GROUP = "demo"
FIRST = EpochId(1_000, "a" * 32)
SECOND = EpochId(2_000, "b" * 32)
NOWHERE = LogId(0, 0)

BEGINS: dict[str, RunnerStatus] = {
    "connect": RunnerConnecting(),
    "load": RunnerLoading(layers_loaded=0, total_layers=4),
    "warm up followers": RunnerWarmingUp(),
    "warm up leader": RunnerWarmingUp(),
}
ENDS: dict[str, RunnerStatus] = {
    "connect": RunnerConnected(),
    "load": RunnerLoaded(),
    "warm up followers": RunnerReady(),
    "warm up leader": RunnerReady(),
}


def incarnation(rank: int, life: int = 1) -> str:
    return f"{life:012x}{rank:016x}"


@dataclass
class Line:
    """An event without its place; `gap_before` is how many events of this rank went missing just before."""

    event: HistoryEvent
    gap_before: int = 0


@dataclass
class Tale:
    """A history as it is being written: every call appends, 10 ms after the one before."""

    world_size: int = 2
    lines: list[Line] = field(default_factory=list[Line])
    lives: Counter[int] = field(default_factory=Counter[int])
    position: int = 1

    # --- what planners do ---

    def open(self, epoch: EpochId = FIRST, ordinal: int = 1) -> None:
        self.position = 1
        self.tell(EpochOpened(NOWHERE, epoch, ordinal, self.roster))

    def dispatch(
        self, step: str, epoch: EpochId = FIRST, *, attempt: int = 1, to: tuple[int, int] | None = None
    ) -> None:
        self.position += 1
        everybody = (0, self.world_size - 1)
        rows = {"warm up followers": (1, self.world_size - 1), "warm up leader": (0, 0)}
        first, last = to or rows.get(step, everybody)
        place = LogId(epoch.number, self.position)
        self.tell(StepDispatched(NOWHERE, epoch, step, place, first, last, attempt))

    def conclude(self, epoch: EpochId = FIRST, verdict: Verdict | None = None) -> None:
        self.tell(EpochConcluded(NOWHERE, epoch, verdict or Verdict.stopped()))

    def restore(self, status: str, epoch: EpochId = FIRST) -> None:
        self.tell(EpochRestored(NOWHERE, epoch, status, self.roster))

    # --- what ranks do ---

    def say(self, rank: int, *events: RunnerEvent, epoch: EpochId | None = FIRST) -> None:
        for event in events:
            self.tell(RankSaid(NOWHERE, rank, self.roster_entry(rank), 0, epoch, event))

    def enter(self, rank: int, epoch: EpochId | None = FIRST) -> None:
        self.say(rank, RunnerStatusUpdated(status=RunnerIdle()), epoch=epoch)

    def begin(self, rank: int, step: str, epoch: EpochId = FIRST, *, status: RunnerStatus | None = None) -> None:
        task = task_id(step, epoch)
        self.say(
            rank,
            TaskStatusUpdated(task_id=task, state="Running"),
            RunnerStatusUpdated(status=status or BEGINS.get(step, RunnerRunning())),
            TaskAcknowledged(task_id=task),
            epoch=epoch,
        )

    def end(self, rank: int, step: str, epoch: EpochId = FIRST) -> None:
        self.say(
            rank,
            TaskStatusUpdated(task_id=task_id(step, epoch), state="Complete"),
            RunnerStatusUpdated(status=ENDS.get(step, RunnerReady())),
            epoch=epoch,
        )

    def do(self, step: str, epoch: EpochId = FIRST, ranks: list[int] | None = None) -> None:
        """Begin and end, rank by rank."""
        for rank in range(self.world_size) if ranks is None else ranks:
            self.begin(rank, step, epoch)
        for rank in range(self.world_size) if ranks is None else ranks:
            self.end(rank, step, epoch)

    def reject(self, rank: int, step: str, code: Any = "NotYet", epoch: EpochId = FIRST) -> None:
        task = task_id(step, epoch)
        self.say(
            rank,
            TaskAcknowledged(task_id=task),
            TaskStatusUpdated(task_id=task, state="Failed", rejection=rejection(code)),
            epoch=epoch,
        )

    def restart(self, rank: int) -> None:
        """The next life of a rank's process begins; it says nothing yet."""
        self.lives[rank] += 1

    # --- putting it together ---

    @property
    def roster(self) -> tuple[str, ...]:
        return tuple(self.roster_entry(rank) for rank in range(self.world_size))

    def roster_entry(self, rank: int) -> str:
        return incarnation(rank, self.lives[rank] + 1)

    def tell(self, event: HistoryEvent) -> None:
        self.lines.append(Line(event))

    def find(self, wanted: Callable[[Any], bool], nth: int = 0) -> int:
        """The place of the n-th line that satisfies."""
        return [place for place, line in enumerate(self.lines) if wanted(line.event)][nth]

    def drop(self, wanted: Callable[[Any], bool], nth: int = 0) -> None:
        del self.lines[self.find(wanted, nth)]

    def events(self) -> list[HistoryEvent]:
        counts: Counter[str] = Counter()
        events: list[HistoryEvent] = []
        for number, line in enumerate(self.lines):
            place = LogId(1_000_000 + 10 * number, 0)
            if isinstance(line.event, RankSaid):
                counts[line.event.incarnation] += 1 + line.gap_before
                events.append(replace(line.event, id=place, seq=counts[line.event.incarnation]))
            else:
                events.append(replace(line.event, id=place))
        return events

    def history(self) -> History:
        return History.of(GROUP, self.events())

    def rules(self) -> set[Rule]:
        """The rules that are broken."""
        return {breach.rule for breach in find_breaches(self.history())}


def task_id(step: str, epoch: EpochId = FIRST) -> str:
    return step.split(" ", 1)[1] if step.startswith("generate ") else derive_task_id(GROUP, str(epoch), step)


def rejection(code: Any = "NotYet") -> Rejection:
    return Rejection(code=code, task_kind="LoadModel", status="Connecting", epoch="", retryable=True, hint="wait")


def said(rank: int, kind: str, *, status: str = "", state: str = "", step: str = "") -> Callable[[Any], bool]:
    """Finds what a rank said."""

    def matches(event: Any) -> bool:
        if not isinstance(event, RankSaid) or event.rank != rank or event.event.kind != kind:
            return False
        inner: Any = event.event
        return (
            (not status or inner.status.kind == status)
            and (not state or inner.state == state)
            and (not step or inner.task_id == task_id(step))
        )

    return matches


def dispatched(step: str) -> Callable[[Any], bool]:
    return lambda event: isinstance(event, StepDispatched) and event.step == step


def good(world_size: int = 2, *, until: str = "") -> Tale:
    """A whole life, from the opening to the verdict, in which nothing is wrong; or up to the dispatch of a step."""
    tale = Tale(world_size)
    tale.open()
    for rank in range(world_size):
        tale.enter(rank)
    rows = ["connect", "load", "warm up followers", "warm up leader"] if world_size > 1 else ["load", "warm up leader"]
    for step in rows:
        if step == until:
            return tale
        tale.dispatch(step)
        followers = list(range(1, world_size))
        if step == "warm up followers":  # in the warm-up until the leader comes
            for rank in followers:
                tale.begin(rank, step)
        elif step == "warm up leader":
            tale.begin(0, step)
            for rank in followers:
                tale.end(rank, "warm up followers")
            tale.end(0, step)
        else:
            tale.do(step)
    if until:
        return tale
    tale.dispatch("generate gen.1")
    tale.do("generate gen.1")
    tale.conclude()
    for rank in range(world_size):
        tale.enter(rank, None)
    return tale


# --- nothing is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_good_history_has_neither_breaches_nor_oddities(world_size: int) -> None:
    history = good(world_size).history()

    assert find_breaches(history) == []
    assert history.oddities == ()


def test_a_second_attempt_after_a_restart_is_no_breach() -> None:
    tale = good(until="warm up followers")
    tale.restart(1)
    tale.conclude(verdict=Verdict.aborted("rank 1 was restarted", 1))
    tale.open(SECOND, ordinal=2)
    tale.enter(0, SECOND)
    tale.enter(1, SECOND)
    tale.dispatch("connect", SECOND)
    tale.do("connect", SECOND)
    tale.dispatch("load", SECOND)
    tale.do("load", SECOND)

    assert find_breaches(tale.history()) == []


def test_a_step_that_was_refused_as_not_yet_possible_may_be_sent_again() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.reject(0, "load")
    tale.reject(1, "load")
    tale.dispatch("load", attempt=2)
    tale.do("load")

    assert find_breaches(tale.history()) == []


def test_a_repeated_task_that_is_answered_again_is_no_breach() -> None:
    tale = good(until="warm up followers")
    again = [
        TaskAcknowledged(task_id=task_id("load")),
        TaskStatusUpdated(task_id=task_id("load"), state="Complete"),
    ]
    tale.say(1, *again)

    assert find_breaches(tale.history()) == []


def test_a_repeated_task_that_still_runs_is_not_begun_twice() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.begin(1, "load")
    tale.say(1, TaskAcknowledged(task_id=task_id("load")), TaskStatusUpdated(task_id=task_id("load"), state="Running"))

    assert find_breaches(tale.history()) == []


def test_a_failure_of_accepted_work_is_no_breach() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.begin(0, "load")
    failed = TaskStatusUpdated(task_id=task_id("load"), state="Failed", error="no memory")
    tale.say(0, failed, RunnerStatusUpdated(status=RunnerFailed(error="no memory")))
    tale.conclude()
    tale.enter(0, None)

    assert find_breaches(tale.history()) == []


def test_a_cancellation_leaves_the_status_as_it_is_and_is_no_breach() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.begin(1, "load")
    tale.dispatch("cancel cancel.1")
    cancel = "cancel.1.task"
    loading = RunnerStatusUpdated(status=BEGINS["load"])
    tale.say(1, TaskStatusUpdated(task_id=cancel, state="Running"), loading, TaskAcknowledged(task_id=cancel))
    tale.say(1, TaskStatusUpdated(task_id=cancel, state="Complete"), loading)
    tale.end(1, "load")

    assert find_breaches(tale.history()) == []


def test_generations_that_overlap_are_no_breach() -> None:
    tale = good(until="never reached")
    tale.dispatch("generate gen.1")
    tale.dispatch("generate gen.2")
    tale.begin(0, "generate gen.1")
    tale.begin(0, "generate gen.2")
    task = TaskStatusUpdated(task_id="gen.1", state="Complete")
    tale.say(0, task, RunnerStatusUpdated(status=RunnerRunning()))
    tale.end(0, "generate gen.2")

    assert find_breaches(tale.history()) == []


def test_a_restored_record_may_be_followed_by_the_next_step() -> None:
    tale = good(until="load")
    lost = len(tale.lines)
    tale.restore("Connected")
    tale.dispatch("load")
    tale.do("load")
    history = History.of(GROUP, tale.events()[lost:])

    assert find_breaches(history) == []
    assert [oddity.kind for oddity in history.oddities] == ["gap"]  # the ranks go on counting


# --- one change, one breach -----------------------------------------------------------------------------------------------


def test_load_dispatched_before_the_last_rank_is_connected() -> None:
    tale = good(3)
    early = tale.lines.pop(tale.find(dispatched("load")))
    tale.lines.insert(tale.find(said(2, "RunnerStatusUpdated", status="Connected")), early)

    breaches = find_breaches(tale.history())

    assert {breach.rule for breach in breaches} == {"gate"}
    assert [breach.rank for breach in breaches] == [2]
    assert breaches[0].sentence == "LoadModel was dispatched while rank 2 had last said Connecting, and not Connected"


def test_load_dispatched_to_a_rank_that_never_said_anything() -> None:
    tale = good(until="load")
    tale.lines = [line for line in tale.lines if not (isinstance(line.event, RankSaid) and line.event.rank == 1)]
    tale.dispatch("load")

    assert "rank 1 had last said nothing" in next(b.sentence for b in find_breaches(tale.history()) if b.rank == 1)


def test_load_dispatched_after_a_rank_withdrew() -> None:
    tale = good(until="load")
    tale.say(1, RunnerStatusUpdated(status=RunnerFailed(error="the link is down")))
    tale.dispatch("load")

    assert tale.rules() == {"gate"}


def test_load_dispatched_for_a_rank_that_was_connected_in_an_earlier_epoch_only() -> None:
    tale = good(until="load")
    tale.conclude()
    tale.open(SECOND, ordinal=2)
    tale.dispatch("connect", SECOND)
    tale.dispatch("load", SECOND)

    assert "Connected outside of this epoch" in " ".join(b.sentence for b in find_breaches(tale.history()))


def test_load_dispatched_for_a_rank_that_was_connected_in_an_earlier_life_only() -> None:
    tale = good(until="load")
    tale.restart(1)
    tale.lines[0] = Line(EpochOpened(NOWHERE, FIRST, 1, tale.roster))  # the roster names the later life
    tale.dispatch("load")
    gate = [
        breach for breach in find_breaches(tale.history()) if breach.rule == "gate" and "LoadModel" in breach.sentence
    ]

    assert [(breach.rank, "nothing" in breach.sentence) for breach in gate] == [(1, True)]


def test_a_single_rank_is_told_to_load_before_it_is_idle_in_the_epoch() -> None:
    tale = good(1)
    tale.drop(said(0, "RunnerStatusUpdated", status="Idle"))

    assert "gate" in tale.rules()


@pytest.mark.parametrize("step", ["connect", "warm up followers", "warm up leader", "generate gen.1"])
def test_every_other_step_has_its_gate_too(step: str) -> None:
    tale = good(3)
    place = tale.find(dispatched(step))
    # One rank's word before this step is taken back: it says Failed instead.
    before = max(
        at
        for at in range(place)
        if isinstance(event := tale.lines[at].event, RankSaid)
        and event.rank == 2
        and isinstance(event.event, RunnerStatusUpdated)
    )
    original = tale.lines[before].event
    assert isinstance(original, RankSaid)
    tale.lines[before] = Line(replace(original, event=RunnerStatusUpdated(status=RunnerFailed(error="oops"))))

    assert any(b.rule == "gate" and b.rank == 2 for b in find_breaches(tale.history()))


def test_a_step_dispatched_before_the_one_that_it_follows() -> None:
    tale = good(until="load")
    tale.drop(dispatched("connect"))
    tale.dispatch("load")

    assert "gate" in tale.rules()


def test_load_twice_in_the_log() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.dispatch("load")

    assert tale.rules() == {"once in the log"}


def test_load_again_without_a_refusal() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.dispatch("load", attempt=2)

    assert tale.rules() == {"once in the log"}


def test_load_again_after_a_refusal_for_good() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.reject(1, "load", "Stale")
    tale.dispatch("load", attempt=2)

    assert tale.rules() == {"once in the log"}


def test_a_second_attempt_at_a_step_without_a_first_one() -> None:
    tale = good(until="load")
    tale.dispatch("load", attempt=2)

    assert tale.rules() == {"once in the log"}


def test_a_rank_begins_one_step_twice() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.do("load")
    tale.begin(1, "load")

    assert "once at a rank" in tale.rules()


def test_a_rank_begins_one_generation_twice() -> None:
    tale = good(until="never reached")
    tale.dispatch("generate gen.1")
    tale.do("generate gen.1")
    tale.do("generate gen.1", ranks=[1])

    assert tale.rules() == {"once at a rank"}


def test_two_ranks_at_work_in_different_epochs() -> None:
    tale = good(until="warm up followers")
    tale.conclude()
    tale.open(SECOND, ordinal=2)
    tale.enter(1, SECOND)
    tale.dispatch("connect", SECOND)
    tale.begin(1, "connect", SECOND)  # while rank 0 is Loaded in the first one

    breaches = find_breaches(tale.history())
    sentences = [breach.sentence for breach in breaches if breach.rule == "one epoch at a time"]

    assert sentences == ["rank 1 is Connecting in epoch 2000 while rank 0 is Loaded in epoch 1000"]


def test_a_rejection_without_its_acknowledgement() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.reject(1, "load")
    tale.drop(said(1, "TaskAcknowledged", step="load"))

    assert tale.rules() == {"rejection"}


def test_a_rejection_without_its_failed() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.reject(1, "load")
    tale.drop(said(1, "TaskStatusUpdated", state="Failed"))

    assert tale.rules() == {"rejection"}


def test_a_rejection_that_is_told_in_the_wrong_order() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.reject(1, "load")
    tale.lines[-1], tale.lines[-2] = tale.lines[-2], tale.lines[-1]

    assert tale.rules() == {"rejection"}


def test_a_rejection_that_says_running_first() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.say(1, TaskStatusUpdated(task_id=task_id("load"), state="Running"))
    tale.reject(1, "load")

    assert tale.rules() == {"order of events"}


def test_two_faileds_for_one_rejection() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.reject(1, "load")
    tale.say(1, TaskStatusUpdated(task_id=task_id("load"), state="Failed", rejection=rejection()))

    assert tale.rules() == {"rejection"}


def test_more_rejections_than_dispatches() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.reject(1, "load")
    tale.reject(1, "load")

    assert tale.rules() == {"rejection"}


@pytest.mark.parametrize("kind", ["TaskAcknowledged", "RunnerStatusUpdated"])
def test_an_accepted_task_that_lacks_a_part(kind: str) -> None:
    tale = good(until="warm up followers")
    place = tale.find(said(1, "TaskStatusUpdated", state="Running", step="load"))
    del tale.lines[place + (2 if kind == "TaskAcknowledged" else 1)]

    assert "order of events" in tale.rules()


def test_an_acknowledgement_before_the_status() -> None:
    tale = good(until="warm up followers")
    place = tale.find(said(1, "TaskStatusUpdated", state="Running", step="load"))
    tale.lines[place + 1], tale.lines[place + 2] = tale.lines[place + 2], tale.lines[place + 1]

    assert "order of events" in tale.rules()


def test_complete_for_work_that_was_never_begun() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.end(1, "load")

    assert "order of events" in tale.rules()


def test_complete_for_a_repeated_task_that_was_never_done() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.say(1, TaskAcknowledged(task_id=task_id("load")), TaskStatusUpdated(task_id=task_id("load"), state="Complete"))

    assert tale.rules() == {"order of events"}


def test_complete_twice() -> None:
    tale = good(until="warm up followers")
    tale.end(1, "load")

    assert tale.rules() == {"order of events"}


def test_complete_after_the_rank_left_the_epoch() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.begin(1, "load")
    tale.conclude()
    tale.enter(1, None)
    done = TaskStatusUpdated(task_id=task_id("load"), state="Complete")
    tale.say(1, done, RunnerStatusUpdated(status=RunnerLoaded()), epoch=None)

    assert tale.rules() == {"order of events"}


def test_a_task_that_ends_in_another_tasks_status() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.begin(1, "load")
    done = TaskStatusUpdated(task_id=task_id("load"), state="Complete")
    tale.say(1, done, RunnerStatusUpdated(status=RunnerReady()))

    assert tale.rules() == {"order of events"}


def test_a_task_that_begins_with_another_tasks_status() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.begin(1, "load", status=RunnerWarmingUp())

    assert tale.rules() == {"order of events"}


def test_a_task_that_is_begun_out_of_state() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.begin(1, "load")
    tale.dispatch("warm up followers")
    tale.begin(1, "warm up followers")  # still Loading

    assert {"order of events", "gate"} == tale.rules()


def test_a_status_that_no_task_led_to() -> None:
    tale = good(until="load")
    tale.say(1, RunnerStatusUpdated(status=RunnerReady()))

    assert tale.rules() == {"order of events"}


def test_two_verdicts() -> None:
    tale = good()
    tale.conclude(verdict=Verdict.aborted("changed our minds"))

    assert tale.rules() == {"one verdict"}


def test_a_dispatch_after_the_verdict() -> None:
    tale = good(until="load")
    tale.conclude()
    tale.dispatch("load")

    assert tale.rules() == {"one verdict"}


def test_a_record_restored_after_its_verdict() -> None:
    tale = good(until="load")
    tale.conclude()
    tale.restore("Connected")

    assert tale.rules() == {"one verdict"}


def test_an_incarnation_that_is_not_on_the_roster_acts() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.restart(1)
    tale.begin(1, "load")

    assert "roster" in tale.rules()


def test_a_rank_acts_without_a_promise() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    task = task_id("load")
    tale.say(
        1,
        TaskStatusUpdated(task_id=task, state="Running"),
        RunnerStatusUpdated(status=BEGINS["load"]),
        TaskAcknowledged(task_id=task),
        epoch=None,
    )

    assert tale.rules() == {"roster"}


def test_an_epoch_number_that_went_back() -> None:
    tale = good()
    tale.open(EpochId(999, "c" * 32), ordinal=2)

    assert tale.rules() == {"fencing"}


def test_a_dispatch_in_a_superseded_epoch() -> None:
    tale = good(until="load")
    tale.open(SECOND, ordinal=2)
    tale.dispatch("load")

    assert tale.rules() == {"fencing"}


def test_a_task_that_came_past_the_gate() -> None:
    tale = good(until="load")
    tale.begin(1, "load")

    assert tale.rules() == {"through the gate"}


def test_a_task_for_other_ranks() -> None:
    tale = good(until="load")
    tale.dispatch("load", to=(0, 0))
    tale.begin(1, "load")

    assert tale.rules() == {"through the gate"}


# --- what is missing is not guessed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_history_without_its_beginning_is_odd_and_no_breach(cut: int) -> None:
    events = good(3).events()
    history = History.of(GROUP, events[cut:])

    assert find_breaches(history) == []
    assert "no opening" in {oddity.kind for oddity in history.oddities}


@pytest.mark.parametrize("lost", range(1, 40))
def test_a_gap_in_what_a_rank_said_is_odd_and_no_breach(lost: int) -> None:
    tale = good(2)
    events = tale.events()
    heard = [event for event in events if not isinstance(event, RankSaid) or event.rank == 0]
    spoken = [event for event in events if isinstance(event, RankSaid) and event.rank == 1]
    if lost >= len(spoken):
        lost = len(spoken) - 1
    history = History.of(GROUP, sorted([*heard, *spoken[:lost], *spoken[lost + 1 :]], key=lambda event: event.id))

    # Its last word is no gap: nobody can know that there was one.
    assert ("gap" in {oddity.kind for oddity in history.oddities}) == (lost != len(spoken) - 1)
    assert find_breaches(history) == []


def test_what_a_rank_says_twice_counts_once() -> None:
    events = good(2).events()
    begun = next(place for place, event in enumerate(events) if said(1, "TaskStatusUpdated", state="Running")(event))
    again = [replace(event, id=LogId(event.id.number, 1)) for event in events[begun : begun + 3]]
    history = History.of(GROUP, [*events[: begun + 3], *again, *events[begun + 3 :]])

    assert find_breaches(history) == []
    assert [(oddity.kind, oddity.count) for oddity in history.oddities] == [("repeated", 3)]


def test_a_step_that_is_dispatched_anew_after_its_record_was_lost_is_odd_and_no_breach() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.restore("Connected")
    tale.dispatch("load")
    tale.do("load")
    history = tale.history()

    assert find_breaches(history) == []
    assert [oddity.kind for oddity in history.oddities] == ["dispatched anew"]


def test_a_rank_that_begins_a_step_twice_after_a_restoration_is_a_breach() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.do("load", ranks=[1])
    tale.restore("Connected")
    tale.dispatch("load")
    tale.begin(1, "load")

    assert "once at a rank" in tale.rules()


# --- reading it from a store ----------------------------------------------------------------------------------------------


@pytest.fixture
async def store() -> Store:
    from barrier import adopt

    return adopt(FakeStore().client(), settings=Settings(event_entries=1_000))


async def test_an_empty_history(store: Store) -> None:
    history = await read_history(store, Keys("rankgate", GROUP))

    assert history == History(GROUP, ())
    assert find_breaches(history) == []
    with pytest.raises(NoSuchAttempt, match="the history of demo holds no attempt"):
        timeline(history)


async def test_the_planners_own_word_does_not_count() -> None:
    """Reports that let the gate open, without the events that tell of it: the checker does not take the dispatch's word."""
    fake = FakeStore()
    async with scripted_ranks(fake, GROUP, 2) as ranks, Barrier(fake.client(), GROUP, world_size=2) as barrier:
        opened = await barrier.open(2)
        assert isinstance(opened, Opened)
        for rank in ranks:
            await rank.arrive("Connected")
        assert isinstance(await barrier.dispatch(opened.epoch, "load", "{}", "Connected"), Dispatched)
        await barrier.conclude(opened.epoch, Verdict.stopped())
        history = await read_history(barrier.store, barrier.keys)

    assert [type(event) for event in history.events] == [EpochOpened, StepDispatched, EpochConcluded]
    first, second, third = history.events
    assert isinstance(first, EpochOpened)
    assert first.epoch == opened.epoch
    assert first.roster == tuple(rank.member.incarnation for rank in ranks)
    assert isinstance(second, StepDispatched)
    assert (second.step, second.first, second.last, second.attempt) == ("load", 0, 1, 1)
    assert isinstance(third, EpochConcluded)
    assert third.verdict == Verdict.stopped()
    assert {breach.rule for breach in find_breaches(history)} == {"gate"}


async def test_lines_that_are_not_ours_are_counted(store: Store) -> None:
    keys = Keys("rankgate", GROUP)
    rank = new_incarnation(1)
    event = encode(RunnerStatusUpdated(status=RunnerIdle())).decode()
    line = {
        "source": "rank",
        "rank": 0,
        "inc": rank,
        "seq": 1,
        "epoch": "-",
        "kind": "RunnerStatusUpdated",
        "event": event,
    }
    await store.commands.xadd(keys.events, line)
    foreign: list[dict[str, Any]] = [
        {"hello": "world"},
        {"source": "somebody"},
        {**line, "seq": "2a"},
        {**line, "rank": "-1"},
        {**line, "inc": "nobody"},
        {**line, "epoch": "12"},
        {**line, "event": "{"},
        {**line, "kind": "TaskAcknowledged"},
        {**line, "extra": "1"},
        {**line, "event": b"\xff"},
        {"source": "planner", "epoch": str(FIRST), "kind": "Opened", "ordinal": "1", "roster": "0,1"},
        {"source": "planner", "epoch": str(FIRST), "kind": "Invented"},
        {"source": "planner", "epoch": str(FIRST), "kind": "Concluded", "verdict": "{}"},
        {
            "source": "planner",
            "epoch": str(FIRST),
            "kind": "Dispatched",
            "step": "load",
            "id": "1-1",
            "to": "0",
            "attempt": "1",
        },
        {
            "source": "planner",
            "epoch": str(FIRST),
            "kind": "Dispatched",
            "step": "load",
            "id": "x",
            "to": "0-1",
            "attempt": "1",
        },
        {"source": "planner", "epoch": str(FIRST), "kind": "Restored", "status": "||", "roster": rank},
    ]
    for one in foreign:
        await store.commands.xadd(keys.events, one)

    history = await read_history(store, keys)

    assert [type(event) for event in history.events] == [RankSaid]
    assert [(oddity.kind, oddity.count) for oddity in history.oddities] == [("undecodable", len(foreign))]


async def test_a_long_history_is_read_page_by_page(store: Store) -> None:
    keys = Keys("rankgate", GROUP)
    line = {"source": "rank", "rank": 0, "inc": new_incarnation(1), "epoch": "-", "kind": "RunnerStatusUpdated"}
    event = encode(RunnerStatusUpdated(status=RunnerIdle())).decode()
    async with store.commands.pipeline(transaction=False) as pipe:
        for seq in range(1, 2_502):
            pipe.xadd(keys.events, {**line, "seq": seq, "event": event})
        await pipe.execute()

    history = await read_history(store, keys)

    assert [event.seq for event in history.events if isinstance(event, RankSaid)] == list(range(1, 2_502))
    assert history.oddities == ()


# --- where the time went --------------------------------------------------------------------------------------------------


def test_the_timeline_of_an_attempt() -> None:
    tale = good(2)
    history = tale.history()

    def at(wanted: Callable[[Any], bool]) -> int:
        return 10 * tale.find(wanted)

    line = timeline(history)

    connected = {rank: at(said(rank, "RunnerStatusUpdated", status="Connected")) for rank in (0, 1)}
    assert line.epoch == FIRST
    assert line.ordinal == 1
    assert line.world_size == 2
    assert line.began_ms == 1_000_000
    assert line.arrivals == connected
    assert line.last_arrival == (1, connected[1])
    assert line.skew == connected[1] - connected[0] > 0
    assert line.load_dispatched == at(dispatched("load"))
    assert line.release == at(dispatched("load")) - connected[1] == 10
    assert line.loads == {
        rank: at(said(rank, "RunnerStatusUpdated", status="Loaded"))
        - at(said(rank, "RunnerStatusUpdated", status="Loading"))
        for rank in (0, 1)
    }
    assert line.ready == at(said(0, "RunnerStatusUpdated", status="Ready"))  # the leader is last
    assert line.warm_up == at(said(0, "RunnerStatusUpdated", status="Ready")) - at(dispatched("warm up followers"))
    assert line.verdict == Verdict.stopped()
    assert line.dispatches == {"ConnectToGroup": 1, "LoadModel": 1, "StartWarmup": 2, "TextGeneration": 1}
    assert line.rejections == {}


def test_the_timeline_of_an_attempt_that_goes_on() -> None:
    tale = good(2, until="load")
    tale.drop(said(1, "RunnerStatusUpdated", status="Connected"))
    tale.drop(said(1, "TaskStatusUpdated", state="Complete"))

    line = timeline(tale.history())

    assert list(line.arrivals) == [0]
    assert (line.last_arrival, line.skew, line.load_dispatched, line.release) == (None, None, None, None)
    assert (line.loads, line.loaded, line.warm_up, line.ready) == ({}, None, None, None)
    assert (line.ended, line.verdict) == (None, None)


def test_the_timeline_tells_attempts_apart() -> None:
    tale = good(until="load")
    tale.dispatch("load")
    tale.reject(1, "load", "Invalid")
    tale.conclude(verdict=Verdict.aborted("rejected", 1))
    tale.open(SECOND, ordinal=2)
    tale.enter(0, SECOND)
    history = tale.history()

    assert timeline(history).epoch == SECOND
    assert timeline(history).dispatches == {}
    assert timeline(history, FIRST).rejections == {"Invalid": 1}
    assert timeline(history, FIRST).verdict == Verdict.aborted("rejected", 1)
    with pytest.raises(NoSuchAttempt, match="3000"):
        timeline(history, EpochId(3_000, "d" * 32))


def test_the_timeline_of_a_single_rank_counts_from_idle() -> None:
    tale = good(1)

    assert timeline(tale.history()).arrivals == {0: 10 * tale.find(said(0, "RunnerStatusUpdated", status="Idle"))}

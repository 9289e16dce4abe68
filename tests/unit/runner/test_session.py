"""A session, one transition at a time: what becomes of it, and what is to be said. No runner, no store, no engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import pytest
from pydantic import BaseModel

from barrier import EpochId, LogId, TaskEntry, TaskOutcome
from runner.admission import Accept, AlreadyDone, Invalid, Judgement, NotYet, Stale
from runner.engine import EngineFailure
from runner.messages import (
    RunnerLoading,
    RunnerStatusUpdated,
    StatusName,
    TaskAcknowledged,
    TaskKind,
    TaskStatusUpdated,
    status_named,
)
from runner.session import QUEUED_TEXTS, REMEMBERED, Say, Session, Work
from runner.words import Failure
from tests.unit.runner.rig import LAYERS, WAY, make_task

EPOCH, OTHER = EpochId(7, "a" * 32), EpochId(7, "b" * 32)
OUT_OF_MEMORY = Failure("out of memory")

FRESH = Session("demo", "me")


def session(status: StatusName = "Idle", *, world_size: int = 2) -> Session:
    """One in the middle of an attempt."""
    fields: dict[str, dict[str, int | str]] = {
        "Loading": {"layers_loaded": 1, "total_layers": LAYERS},
        "Failed": {"error": "x"},
    }
    return replace(FRESH.promised(EPOCH, world_size), status=status_named(status, **fields.get(status, {})))


def work(kind: TaskKind, task_id: str = "t", step: str = "s") -> Work:
    return Work(make_task(kind, EPOCH, task_id=task_id), step, 5)


def texts(*task_ids: str) -> Session:
    """One that was asked for these texts."""
    one = session("Ready")
    for task_id in task_ids:
        one, _ = one.begun(work("TextGeneration", task_id))
    return one


def told(events: Iterable[BaseModel]) -> list[str]:
    """Events in short, in order."""
    short: list[str] = []
    for event in events:
        match event:
            case TaskAcknowledged():
                short.append("ack")
            case TaskStatusUpdated():
                short.append(event.state)
            case RunnerStatusUpdated():
                short.append(f"=> {event.status.kind}")
            case _:
                short.append(type(event).__name__)
    return short


def summary(of: Session, say: Say) -> tuple[str, list[str], str]:
    """The status, what is said in which order, and the outcome that goes with it."""
    assert say.status == of.status, "what is said is what is"
    assert say.failure == of.failure
    return of.status.kind, told(say.events), say.outcome.result if say.outcome else ""


# --- the attempt ----------------------------------------------------------------------------------------------------------


def test_between_attempts_it_is_idle_and_has_promised_nothing() -> None:
    assert (FRESH.status.kind, FRESH.promise, FRESH.now().failure) == ("Idle", None, None)


def test_a_promise_begins_with_the_preparation() -> None:
    one = FRESH.promised(EPOCH, 3)
    assert one.promise is not None
    assert (one.status.kind, one.promise.epoch, one.promise.incarnation, one.promise.world_size) == (
        "Preparing", EPOCH, "me", 3,
    )  # fmt: skip


def test_a_prepared_rank_is_idle() -> None:
    assert summary(*FRESH.promised(EPOCH, 2).prepared()) == ("Idle", ["=> Idle"], "")


def test_nothing_is_carried_from_one_attempt_into_the_next() -> None:
    one, _ = texts("a", "b").cancel("b").failed(OUT_OF_MEMORY)
    assert one.left() == FRESH
    assert one.promised(OTHER, 2) == FRESH.promised(OTHER, 2)


def test_stopped_work_leaves_no_text_unfinished() -> None:
    stopped = texts("a", "b").cancel("b").stopped()
    assert (stopped.unfinished, stopped.cancelled) == ((), frozenset())


def test_the_status_is_said_as_it_is() -> None:
    one = session("Loading")
    assert summary(one, one.now()) == ("Loading", ["=> Loading"], "")
    assert one.now().progress == (1, LAYERS)
    assert session("Ready").now().progress is None


# --- receive --------------------------------------------------------------------------------------------------------------

RECEIVED: dict[str, tuple[Session, TaskKind, EpochId, EpochId, type[Judgement]]] = {
    "in its status": (session("Connected"), "LoadModel", EPOCH, EPOCH, Accept),
    "too early": (session("Idle"), "LoadModel", EPOCH, EPOCH, NotYet),
    "too late": (session("Ready"), "LoadModel", EPOCH, EPOCH, Stale),
    "never": (session("Idle", world_size=1), "ConnectToGroup", EPOCH, EPOCH, Invalid),
    "of another nonce": (session("Connected"), "LoadModel", OTHER, OTHER, Stale),
    "that names another epoch than the log": (session("Connected"), "LoadModel", OTHER, EPOCH, Invalid),
    "the same, the other way round": (session("Connected"), "LoadModel", EPOCH, OTHER, Invalid),
    "without a promise": (FRESH, "LoadModel", EPOCH, EPOCH, Stale),
    "seen before": (session("Idle").begun(work("ConnectToGroup"))[0], "ConnectToGroup", EPOCH, EPOCH, AlreadyDone),
    "as many texts as may wait": (texts(*map(str, range(QUEUED_TEXTS))), "TextGeneration", EPOCH, EPOCH, Accept),
    "one text too many": (texts(*map(str, range(QUEUED_TEXTS + 1))), "TextGeneration", EPOCH, EPOCH, NotYet),
    "another kind beside too many texts": (texts(*map(str, range(QUEUED_TEXTS + 1))), "CancelTask", EPOCH, EPOCH, Accept),
}  # fmt: skip


@pytest.mark.parametrize(("one", "kind", "of_task", "of_entry", "answer"), RECEIVED.values(), ids=RECEIVED)
def test_receive(one: Session, kind: TaskKind, of_task: EpochId, of_entry: EpochId, answer: type[Judgement]) -> None:
    task = make_task(kind, of_task, task_id="t")
    assert type(one.receive(task, of_entry, floor=EPOCH.number)) is answer


@pytest.mark.parametrize(("floor", "answer"), [(EPOCH.number - 1, NotYet), (EPOCH.number, Stale)])
def test_an_epoch_above_the_floor_may_still_be_promised(floor: int, answer: type[Judgement]) -> None:
    assert type(FRESH.receive(make_task("LoadModel", EPOCH), EPOCH, floor)) is answer


@pytest.mark.parametrize(
    ("one", "missed", "of_entry", "of_task", "expected"),
    [
        (session(), True, EPOCH, EPOCH, True),
        (session(), False, EPOCH, EPOCH, False),
        (session(), True, OTHER, OTHER, False),
        (session(), True, EPOCH, OTHER, False),
        (FRESH, True, EPOCH, EPOCH, False),
    ],
)
def test_a_gap_in_the_log_counts_in_the_promised_epoch(
    one: Session, *, missed: bool, of_entry: EpochId, of_task: EpochId, expected: bool
) -> None:
    entry = TaskEntry(of_entry, LogId(of_entry.number, 5), 3, "s", 0, 1, 1, b"", missed=missed)
    assert one.misses(entry, make_task("LoadModel", of_task)) is expected


# --- begin and finish -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "during", "after"), [(kind, during, after) for kind, _, during, after in WAY])
def test_a_task_goes_through_its_statuses(kind: TaskKind, during: StatusName, after: StatusName) -> None:
    begun, say = session().begun(work(kind))
    assert summary(begun, say) == (during, ["Running", f"=> {during}", "ack"], "running")
    finished, say = begun.finished(work(kind))
    assert summary(finished, say) == (after, ["Complete", f"=> {after}"], "done")
    assert [one.result for one in finished.outcomes.values()] == ["done"]


def test_a_load_begins_with_no_layer_and_counts_them() -> None:
    begun, say = session("Connected").begun(work("LoadModel"))
    assert (begun.status, say.progress) == (RunnerLoading(layers_loaded=0, total_layers=LAYERS), (0, LAYERS))
    assert begun.loading(2, LAYERS).status == RunnerLoading(layers_loaded=2, total_layers=LAYERS)


@pytest.mark.parametrize("status", ["Idle", "Loaded", "Running", "ShuttingDown", "Failed"])
def test_a_cancellation_changes_no_status(status: StatusName) -> None:
    begun, say = session(status).begun(work("CancelTask"))
    assert summary(begun, say) == (status, ["Running", f"=> {status}", "ack"], "running")
    assert summary(*begun.finished(work("CancelTask"))) == (status, ["Complete", f"=> {status}"], "done")


def test_a_rank_leaves_once_for_all_who_ask() -> None:
    first, second = work("Shutdown", "a"), work("Shutdown", "b")
    one, say = session("Ready").begun(first)
    assert summary(one, say) == ("ShuttingDown", ["Running", "=> ShuttingDown", "ack"], "running")
    one = one.departs(first).departs(second)
    assert one.departing == (first, second)
    one, say = one.finished(first)
    assert summary(one, say) == ("Shutdown", ["Complete", "=> Shutdown"], "done")
    assert one.finished(second)[0].departing == ()


OUTRANKED = [
    ("Failed", "finished", "Failed"), ("ShuttingDown", "finished", "ShuttingDown"), ("Shutdown", "finished", "Shutdown"),
    ("Failed", "prepared", "Failed"), ("ShuttingDown", "prepared", "ShuttingDown"), ("ShuttingDown", "failed", "ShuttingDown"),
    ("Failed", "loading", "Failed"), ("Failed", "leaves", "ShuttingDown"), ("Loading", "failed", "Failed"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "what", "then"), OUTRANKED)
def test_work_under_way_undoes_neither_a_failure_nor_a_departure(
    status: StatusName, what: str, then: StatusName
) -> None:
    one = session(status)
    after = {
        "finished": lambda: one.finished(work("LoadModel"))[0],
        "prepared": lambda: one.prepared()[0],
        "failed": lambda: one.failed(OUT_OF_MEMORY)[0],
        "loading": lambda: one.loading(1, LAYERS),
        "leaves": lambda: one.begun(work("Shutdown"))[0],
    }[what]()
    assert after.status.kind == then


# --- texts ----------------------------------------------------------------------------------------------------------------


def test_texts_are_finished_one_after_another() -> None:
    one = texts("a", "b")
    assert (one.status.kind, one.unfinished) == ("Running", ("a", "b"))
    one, say = one.finished(work("TextGeneration", "a"))
    assert (summary(one, say)[0], one.unfinished) == ("Running", ("b",))
    one, say = one.finished(work("TextGeneration", "b"))
    assert (summary(one, say)[0], one.unfinished) == ("Ready", ())


@pytest.mark.parametrize(("task_id", "cancelled"), [("a", {"a"}), ("b", {"b"}), ("unknown", set[str]())])
def test_only_a_text_that_is_not_finished_is_cancelled(task_id: str, cancelled: set[str]) -> None:
    assert texts("a", "b").cancel(task_id).cancelled == cancelled


def test_a_cancelled_text_is_told_as_such_and_forgotten() -> None:
    one, say = texts("a").cancel("a").finished(work("TextGeneration", "a"), cancelled=True)
    assert summary(one, say) == ("Ready", ["Cancelled", "=> Ready"], "cancelled")
    assert (one.unfinished, one.cancelled) == ((), frozenset())


def test_a_text_that_failed_waits_no_more() -> None:
    one, _ = texts("a", "b").failed(OUT_OF_MEMORY, work("TextGeneration", "a"))
    assert one.unfinished == ("b",)


# --- failures -------------------------------------------------------------------------------------------------------------


def test_failed_work_says_why() -> None:
    one, say = session("Loading").failed(OUT_OF_MEMORY, work("LoadModel"))
    assert summary(one, say) == ("Failed", ["Failed", "=> Failed"], "failed")
    assert (say.failure, say.outcome and say.outcome.detail) == (OUT_OF_MEMORY, "out of memory")


def test_an_engine_that_dies_between_tasks_fails_the_rank_and_no_task() -> None:
    assert summary(*session("Loaded").failed(OUT_OF_MEMORY)) == ("Failed", ["=> Failed"], "")


def test_the_first_failure_of_an_attempt_is_its_cause() -> None:
    one, _ = session("Loading").failed(OUT_OF_MEMORY)
    one, say = one.failed(Failure("was killed", permanent=True), work("LoadModel"))
    assert one.failure == OUT_OF_MEMORY
    assert say.outcome is not None
    assert say.outcome.detail == "was killed", "of the task itself the truth is told"


def test_a_rank_that_failed_out_of_any_attempt_says_so() -> None:
    assert summary(*FRESH.failed(OUT_OF_MEMORY)) == ("Failed", ["=> Failed"], "")


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (EngineFailure("no room"), Failure("no room")),
        (EngineFailure("no such model", permanent=True), Failure("no such model", permanent=True)),
        (EngineFailure("half a pair: \ud800"), Failure("half a pair: ?")),
        (EngineFailure("x" * 3_000), Failure("x" * 2_000)),
        (
            ValueError("a secret prompt"),
            Failure("a mistake of ours, ValueError; the log of this rank has its frames"),
        ),
    ],
)
def test_what_is_said_of_an_exception(error: Exception, failure: Failure) -> None:
    assert Failure.of(error) == failure


# --- refusals and repetitions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refusal", "code", "retryable"),
    [(NotYet("x"), "NotYet", True), (Stale("x"), "Stale", False), (Invalid("x"), "Invalid", False)],
)
def test_a_refusal_is_acknowledged_and_told_once(
    refusal: NotYet | Stale | Invalid, code: str, *, retryable: bool
) -> None:
    one, say, rejection = session().rejected(refusal, epoch=EPOCH, task_id="t", kind="LoadModel", step="load", n=5)
    assert summary(one, say) == ("Idle", ["ack", "Failed"], "rejected")
    assert (rejection.code, rejection.retryable, rejection.status, rejection.epoch) == (
        code,
        retryable,
        "Idle",
        str(EPOCH),
    )
    assert (one.outcomes["t"].code, one.outcomes["t"].retryable) == (code, retryable)
    assert replace(one, outcomes={}) == session(), "nothing else has changed"


@pytest.mark.parametrize("one", [FRESH, session()])
def test_a_refusal_of_another_epoch_is_told_and_not_remembered(one: Session) -> None:
    then, say, _ = one.rejected(Stale("x"), epoch=OTHER, task_id="t", kind="LoadModel", step="load", n=5)
    assert (then, told(say.events), say.outcome) == (one, ["ack", "Failed"], None)


outcome = partial(TaskOutcome, task_id="t", step="s", n=5)
REPEATED: dict[str, tuple[TaskOutcome, str, str | None, str | None]] = {
    "running": (outcome(result="running"), "Running", None, None),
    "done": (outcome(result="done"), "Complete", None, None),
    "cancelled": (outcome(result="cancelled"), "Cancelled", None, None),
    "failed": (outcome(result="failed", detail="why"), "Failed", "why", None),
    "failed without a word": (outcome(result="failed"), "Failed", None, None),
    "too late": (outcome(result="rejected", code="Stale", detail="why"), "Failed", None, "Stale"),
    "never possible": (outcome(result="rejected", code="Invalid", detail="why"), "Failed", None, "Invalid"),
}


@pytest.mark.parametrize(("known", "state", "error", "code"), REPEATED.values(), ids=REPEATED)
def test_a_repeated_task_is_told_what_became_of_it(
    known: TaskOutcome, state: str, error: str | None, code: str | None
) -> None:
    say = session().repeated(make_task("LoadModel", EPOCH, task_id="t"), known)
    assert told(say.events) == ["ack", state]
    again = say.events[1]
    assert isinstance(again, TaskStatusUpdated)
    assert (again.error, again.rejection and again.rejection.code, say.outcome) == (error, code, None)


# --- memory ---------------------------------------------------------------------------------------------------------------


def refused(one: Session, times: int) -> Session:
    for number in range(times):
        one, _, _ = one.rejected(Stale("x"), epoch=EPOCH, task_id=f"r{number}", kind="LoadModel", step="s", n=1)
    return one


def test_a_flood_of_refusals_does_not_make_it_forget_what_it_does() -> None:
    one = refused(session("Connected").begun(work("LoadModel"))[0], 2 * REMEMBERED)
    assert len(one.outcomes) == REMEMBERED
    assert one.outcomes["t"].result == "running"
    assert f"r{2 * REMEMBERED - 1}" in one.outcomes, "the newest is known"
    assert "r0" not in one.outcomes


def test_the_oldest_is_forgotten_where_all_was_done() -> None:
    one = session("Ready")
    for number in range(REMEMBERED + 1):
        one, _ = one.begun(work("TextGeneration", f"g{number}"))
    assert (len(one.outcomes), "g0" in one.outcomes, "g1" in one.outcomes) == (REMEMBERED, False, True)


def test_a_task_that_is_told_again_is_the_newest() -> None:
    one = refused(session("Connected").begun(work("LoadModel", "old"))[0], 3)
    one, _ = one.finished(work("LoadModel", "old"))
    assert list(one.outcomes) == ["r0", "r1", "r2", "old"]


@pytest.mark.parametrize("length", [96, 97, 300])
def test_a_foreign_name_of_a_step_is_cut_to_what_a_report_holds(length: int) -> None:
    _, say = session().begun(work("ConnectToGroup", step="x" * length))
    assert say.outcome is not None
    assert len(say.outcome.step) == 96

"""The judge, cell by cell, against the table in `expectations`."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from barrier import EpochId, TaskOutcome
from runner.admission import (
    ACCEPTS,
    Accept,
    AlreadyDone,
    Invalid,
    NotYet,
    Promise,
    Stale,
    Standing,
    judge,
    rejection_of,
)
from runner.messages import StatusName, Task, TaskKind
from tests.unit.runner.expectations import CELLS, EXPECTED, KINDS, STATUSES
from tests.unit.runner.rig import make_task, unhurried

EPOCH = EpochId(100, "a" * 32)
STALE = EpochId(99, "b" * 32)
NEWER = EpochId(101, "c" * 32)
ME = "1" * 28


def standing(status: StatusName, world_size: int = 2, *, done: Task | None = None) -> Standing:
    """A runner in the middle of EPOCH, which has done a task or not."""
    outcomes = {done.task_id: TaskOutcome(task_id=done.task_id, step="load", n=2, result="done")} if done else {}
    return Standing(
        instance="demo",
        status=status,
        incarnation=ME,
        promise=Promise(EPOCH, ME, world_size),
        floor=EPOCH.number,
        outcomes=outcomes,
    )


def test_the_hand_written_tables_have_every_cell() -> None:
    assert len(EXPECTED[2]) == 12 * 6
    assert {status for status, _ in EXPECTED[2]} == set(STATUSES)
    assert {kind for _, kind in EXPECTED[2]} == set(get_args(TaskKind))
    assert len(EXPECTED[1]) == 10 * 6


@pytest.mark.parametrize(("world_size", "status", "kind"), CELLS)
def test_every_cell_of_its_own_epoch(world_size: int, status: StatusName, kind: TaskKind) -> None:
    task = make_task(kind, EPOCH)
    expected = EXPECTED[world_size][status, kind]

    assert isinstance(judge(standing(status, world_size), task), expected)

    again = judge(standing(status, world_size, done=task), task)
    assert isinstance(again, AlreadyDone), "a duplicate is recognised in every status"
    assert again.outcome.task_id == task.task_id


@pytest.mark.parametrize(("world_size", "status", "kind"), CELLS)
def test_no_cell_of_another_epoch_is_ever_accepted(world_size: int, status: StatusName, kind: TaskKind) -> None:
    """Neither fresh nor as a duplicate: what is known of a task's id counts within its own epoch only."""
    for epoch, expected in ((STALE, Stale), (NEWER, NotYet), (EpochId(EPOCH.number, "f" * 32), Stale)):
        task = make_task(kind, epoch)
        assert isinstance(judge(standing(status, world_size), task), expected)
        assert isinstance(judge(standing(status, world_size, done=task), task), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("status", STATUSES)
def test_no_cell_is_accepted_without_a_promise(status: StatusName, kind: TaskKind) -> None:
    """Spent, or never given: what is at or below the floor is over, and what is above it may still be promised."""
    free = replace(standing(status), promise=None)
    assert isinstance(judge(free, make_task(kind, EPOCH)), Stale)
    assert isinstance(judge(free, make_task(kind, STALE)), Stale)
    assert isinstance(judge(free, make_task(kind, NEWER)), NotYet)


def test_load_in_idle_is_refused_unless_there_is_one_rank() -> None:
    """The one cell that this project is about: exo's runner died of it."""
    load = make_task("LoadModel", EPOCH)
    refused = judge(standing("Idle", 2), load)
    assert refused == NotYet("LoadModel needs Connected, this runner is Idle; wait for Connected at the barrier")
    assert judge(standing("Idle", 1), load) == Accept()


def test_the_table_of_the_code_is_the_table_of_the_design() -> None:
    for status in STATUSES:
        accepted = {kind for kind in KINDS if EXPECTED[2][status, kind] is Accept}
        if status == "Idle":
            accepted.add("LoadModel")  # for one rank; which of the two, the world size says
        assert ACCEPTS[status] == accepted


# --- the fence ------------------------------------------------------------------------------------------------------------


def test_same_number_and_another_nonce_is_too_late_and_says_why() -> None:
    answer = judge(standing("Connected"), make_task("LoadModel", EpochId(EPOCH.number, "d" * 32)))
    assert isinstance(answer, Stale)
    assert "another nonce" in answer.hint


def test_a_roster_that_names_another_incarnation_of_this_rank_is_refused() -> None:
    elsewhere = replace(standing("Connected"), promise=Promise(EPOCH, "2" * 28, 2))
    answer = judge(elsewhere, make_task("LoadModel", EPOCH))
    assert isinstance(answer, Stale)
    assert "another incarnation" in answer.hint


@pytest.mark.parametrize(
    "text", ["100", "100-", "100-" + "g" * 32, "-1-" + "a" * 32, "x" * 64, "1" * 17 + "-" + "a" * 32]
)
def test_an_epoch_that_is_none_is_invalid(text: str) -> None:
    assert isinstance(judge(standing("Connected"), make_task("LoadModel", text)), Invalid)


def test_another_instance_is_invalid_before_anything_else_is_looked_at() -> None:
    task = make_task("LoadModel", EPOCH, instance="other")
    assert isinstance(judge(standing("Connected"), task), Invalid)
    assert isinstance(judge(standing("Connected", done=task), task), Invalid)


# --- duplicates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", ["running", "done", "cancelled", "failed"])
def test_what_was_begun_is_never_begun_again(result: Literal["running", "done", "cancelled", "failed"]) -> None:
    task = make_task("LoadModel", EPOCH)
    outcome = TaskOutcome(task_id=task.task_id, step="load", n=2, result=result)
    seen = replace(standing("Connected"), outcomes={task.task_id: outcome})
    assert judge(seen, task) == AlreadyDone(outcome)


def test_what_was_refused_for_good_stays_refused() -> None:
    task = make_task("LoadModel", EPOCH)
    outcome = TaskOutcome(task_id=task.task_id, step="load", n=2, result="rejected", code="Stale")
    assert judge(replace(standing("Connected"), outcomes={task.task_id: outcome}), task) == AlreadyDone(outcome)


def test_what_was_refused_as_not_yet_possible_is_judged_anew() -> None:
    task = make_task("LoadModel", EPOCH)
    outcome = TaskOutcome(task_id=task.task_id, step="load", n=2, result="rejected", code="NotYet", retryable=True)
    seen = replace(standing("Connected"), outcomes={task.task_id: outcome})
    assert judge(seen, task) == Accept()
    assert isinstance(judge(replace(seen, status="Idle"), task), NotYet)


# --- how it is told -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refusal", "code", "retryable"),
    [(NotYet("h"), "NotYet", True), (Stale("h"), "Stale", False), (Invalid("h"), "Invalid", False)],
)
def test_a_rejection_tells_what_this_runner_really_is(
    refusal: NotYet | Stale | Invalid, code: str, retryable: bool
) -> None:
    told = rejection_of(refusal, standing("Loading"), "LoadModel")
    assert told.model_dump() == {
        "code": code,
        "task_kind": "LoadModel",
        "status": "Loading",
        "epoch": str(EPOCH),
        "retryable": retryable,
        "hint": "h",
    }
    assert rejection_of(refusal, replace(standing("Idle"), promise=None), "LoadModel").epoch == ""


def test_a_hint_of_any_length_can_be_told() -> None:
    assert len(rejection_of(Invalid("x" * 100_000), standing("Idle"), "unknown").hint) <= 2_000


@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize("status", STATUSES)
def test_every_refusal_has_a_sentence_that_names_task_and_status(status: StatusName, kind: TaskKind) -> None:
    answer = judge(standing(status), make_task(kind, EPOCH))
    if isinstance(answer, NotYet | Stale | Invalid):
        assert kind in answer.hint
        assert status in answer.hint or status in ("Failed", "ShuttingDown", "Shutdown")


# --- in general -----------------------------------------------------------------------------------------------------------

numbers = st.integers(min_value=0, max_value=10**16 - 1)
nonces = st.sampled_from(["a" * 32, "b" * 32])
epochs = st.builds(EpochId, numbers | st.sampled_from([99, 100, 101]), nonces)
incarnations = st.sampled_from([ME, "2" * 28])


@unhurried
@given(
    status=st.sampled_from(STATUSES),
    kind=st.sampled_from(KINDS),
    epoch=epochs,
    instance=st.sampled_from(["demo", "other"]),
    promise=st.none() | st.builds(Promise, epochs, incarnations, st.sampled_from([1, 2, 512])),
    floor=numbers,
)
def test_whatever_is_accepted_is_of_exactly_the_promised_epoch(
    status: StatusName, kind: TaskKind, epoch: EpochId, instance: str, promise: Promise | None, floor: int
) -> None:
    mine = Standing(instance="demo", status=status, incarnation=ME, promise=promise, floor=floor)
    if isinstance(judge(mine, make_task(kind, epoch, instance=instance)), Accept):
        assert promise is not None
        assert promise.epoch == epoch
        assert promise.incarnation == ME
        assert instance == "demo"
        assert kind in ACCEPTS[status]

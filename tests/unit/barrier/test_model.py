"""Verdicts, and what a snapshot as a whole has seen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from barrier import LogId, Verdict
from tests.unit.barrier.pictures import LATER, OTHER_NONCE, picture, record, silent, view


@given(st.text(), st.none() | st.integers(0, 99), st.sampled_from(["transient", "permanent"]))
def test_a_verdict_survives_the_wire(reason: str, culprit: int | None, failure: str) -> None:
    verdict = Verdict.aborted(reason, culprit, failure)  # pyright: ignore[reportArgumentType]  sampled from the two literals
    try:
        wire = verdict.model_dump_json()
    except ValueError:
        pytest.fail("every text can be said")
    assert Verdict.model_validate_json(wire) == verdict


def test_a_long_reason_is_cut() -> None:
    assert len(Verdict.aborted("x" * 10_000).reason) == 4_000
    assert len(Verdict.stopped("x" * 10_000).reason) == 4_000


def test_a_verdict_is_one_of_two_kinds() -> None:
    with pytest.raises(ValidationError):
        Verdict(kind="Released", reason="")  # pyright: ignore[reportArgumentType]  the point of the test


def test_verdicts_read_well() -> None:
    assert str(Verdict.stopped()) == "Stopped: stop was asked for"
    assert str(Verdict.aborted("it stalled")) == "Aborted (transient): it stalled"
    assert str(Verdict.aborted("bad digest", 3, "permanent")) == "Aborted (permanent, rank 3): bad digest"


def test_the_age_of_a_report_needs_nobodys_clock() -> None:
    assert view(0, left_ms=4_500, lease_ms=6_000).age_ms == 1_500
    assert view(0, left_ms=7_000, lease_ms=6_000).age_ms == 0
    assert silent(0).age_ms == 0


def test_the_floor_is_the_highest_number_that_anything_has_seen() -> None:
    assert picture(view(0), opened=False, log_end=LogId(0, 0)).floor == 100
    assert picture(view(0, floor=5), opened=True, log_end=LogId(0, 0)).floor == 100
    assert picture(silent(0), opened=False, log_end=LogId(400, 1)).floor == 400
    assert picture(silent(0), opened=False, log_end=LogId(0, 0)).floor == 0
    assert picture(view(0, floor=900)).floor == 900


def test_applied_is_the_highest_position_of_this_epoch_that_anything_has_seen() -> None:
    assert picture(view(0, applied=9)).applied == 9
    assert picture(view(0), epoch=record(1, last_n=8)).applied == 8
    assert picture(view(0), log_end=LogId(100, 7)).applied == 7
    assert picture(view(0, applied=9, epoch=OTHER_NONCE)).applied == 3
    assert picture(view(0, applied=9, epoch=LATER), log_end=LogId(101, 9)).applied == 3
    assert picture(view(0, applied=9), opened=False).applied == 0

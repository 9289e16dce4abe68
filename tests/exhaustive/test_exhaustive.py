"""The quick part of ``make exhaustive``: it searches all interleavings within small bounds, and it finds a missing guard."""

from __future__ import annotations

from dataclasses import replace

import pytest

from barrier import EpochId, Leadership, LogId, all_ranks
from barrier.protocol.outcomes import Dispatched
from barrier.protocol.rank_state import RankState
from barrier.testing import reference
from barrier.testing.reference import ReferenceLeader, ReferenceRecord, ReferenceReport, ReferenceState
from tests.exhaustive.model import Bounds
from tests.exhaustive.search import Search
from tests.exhaustive.suite import QUICK, Job, play, search, told


# The others take some seconds each, and are among those that .ci/run searches anyway.
@pytest.mark.parametrize("job", [QUICK[0], QUICK[3], QUICK[5]], ids=lambda job: job.name)
def test_no_interleaving_breaks_a_guarantee(job: Job) -> None:
    result = search(job, frozenset(), limit=1_000_000, seconds=float("inf"))
    assert result.found is None, told(job.name, result)
    assert result.exhausted
    assert result.states > 1_000


@pytest.mark.parametrize(("guard", "broken"), [("unbound", "S1"), ("exact", "S1"), ("teardown", "S3"), ("lower", "L4")])
def test_a_guard_of_the_ranks_that_is_missing_is_found_without_a_fault(guard: str, broken: str) -> None:
    result = search(QUICK[0], frozenset({guard}), limit=1_000_000, seconds=float("inf"))
    assert result.found is not None
    assert result.found.what.startswith(broken)
    assert result.found.history


def test_the_decisions_that_are_searched_are_the_ranks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard that is taken out of `barrier.protocol.rank_state` itself is missed here."""

    def nothing(_: RankState) -> None:
        return None

    monkeypatch.setattr(RankState, "refuses_any", nothing)
    result = search(QUICK[0], frozenset(), limit=1_000_000, seconds=float("inf"))
    assert result.found is not None
    assert result.found.what.startswith("S3")


def test_the_barrier_without_its_gate_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: object) -> tuple[int, ...]:
        return ()

    monkeypatch.setattr(reference, "_missing", nobody)
    result = Search(Bounds(planners=1, faults=0, epochs=1)).run()
    assert result.found is not None
    assert result.found.what.startswith(("S1", "S4"))


def test_a_store_that_never_forgets_anything_needs_no_second_epoch() -> None:
    """Without faults and stalls the goal lies on the only way there is."""
    result = Search(Bounds(planners=1, faults=0, epochs=1, mutations=frozenset({"impatient"}))).run()
    assert result.found is None
    assert result.goals > 0


def test_a_breach_ends_the_suite_with_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    job = replace(QUICK[0], bounds=replace(QUICK[0].bounds, planners=1))
    assert play((job,), mutations=frozenset({"teardown"}), limit=100_000, seconds=float("inf"), workers=1) == 1
    assert "BREACH" in capsys.readouterr().out


def test_a_search_that_a_limit_ended_is_no_proof(capsys: pytest.CaptureFixture[str]) -> None:
    assert play(QUICK[:1], mutations=frozenset(), limit=1_000, seconds=float("inf"), workers=1) == 3
    assert "NOT exhausted" in capsys.readouterr().out


def test_a_text_that_only_some_have_read_is_missed_by_the_others_when_the_store_forgot_it() -> None:
    """Found by the search: rank 0 had begun text 1, the store went back, and text 2 reached rank 1 as if nothing were missing."""
    epoch, leadership = EpochId(1, "a"), Leadership(1, "p")
    report = ReferenceReport("i", "Ready", epoch, applied=5, floor=1, until_ms=2)
    state = ReferenceState(
        reports=(report, report),
        record=ReferenceRecord(epoch, 1, ("i", "i"), last_n=5),
        leader=ReferenceLeader(leadership, 2),
    )
    state, outcome = reference.dispatch(
        state,
        1,
        leadership=leadership,
        epoch=epoch,
        step="generate g2",
        payload="",
        requirement=all_ranks(2, "Ready"),
        repeatable=True,
        seen_n=6,
    )
    assert outcome == Dispatched(LogId(1, 7))
    assert state.log[-1].previous == 6

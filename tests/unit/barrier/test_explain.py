"""The one sentence that the log, the timeout, the command line and the page use."""

from __future__ import annotations

from typing import Any

from barrier import RankRule, Verdict, all_ranks, explain, explain_key
from tests.unit.barrier.pictures import EARLIER, LATER, life, picture, record, silent, view

CONNECTED = all_ranks(3, "Connected")


def test_it_names_all_missing_ranks_with_node_status_age_lease_and_error() -> None:
    snapshot = picture(
        view(0),
        view(1, "Idle", status_ms=9_000, left_ms=4_500),
        view(2, "Failed", status_ms=250, left_ms=5_900, error="no route to 10.0.0.7:29500"),
    )
    assert explain(snapshot, CONNECTED) == (
        "demo, attempt 2: waiting for 2 of 3 ranks: "
        "rank 1 on node-1 (Idle for 10.5 s, wanted Connected; report 1.5 s old, lease 4.5 s left); "
        "rank 2 on node-2 (Failed for 0.3 s, wanted Connected; report 0.1 s old, lease 5.9 s left; "
        "last error: no route to 10.0.0.7:29500)"
    )


def test_a_silent_rank_and_one_that_cannot_be_read() -> None:
    snapshot = picture(view(0), silent(1), silent(2, "rank 2: malformed report"))
    assert explain(snapshot, CONNECTED) == (
        "demo, attempt 2: waiting for 2 of 3 ranks: rank 1 (no live report, wanted Connected); "
        "rank 2 (rank 2: malformed report, wanted Connected)"
    )


def test_progress_is_shown() -> None:
    snapshot = picture(view(0, "Loading", progress=(12, 32), status_ms=3_000, left_ms=6_000))
    assert explain(snapshot, all_ranks(1, "Loaded")) == (
        "demo, attempt 2: waiting for 1 of 1 ranks: "
        "rank 0 on node-0 (Loading 12/32 for 3.0 s, wanted Loaded; report 0.0 s old, lease 6.0 s left)"
    )


def test_it_says_why_a_rank_in_the_right_status_does_not_count() -> None:
    def about(**changes: Any) -> str:
        return explain(picture(view(0, left_ms=6_000, **changes)), all_ranks(1, "Connected"))

    assert "not in this attempt yet" in about(epoch=EARLIER, floor=99)
    assert "not in this attempt yet" in about(epoch=None, floor=0)
    assert "no longer in this attempt" in about(epoch=None, floor=100)
    assert "no longer in this attempt" in about(epoch=LATER, floor=101)
    assert "not the process that began this attempt" in about(incarnation=life(0, 6))


def test_each_rank_is_told_what_is_wanted_of_it() -> None:
    rules = (RankRule(0, 0, ("Loaded",)), RankRule(1, 2, ("WarmingUp", "Ready")))
    said = explain(picture(view(0), view(1), view(2, "Ready")), rules)
    assert "rank 0 on node-0 (Connected for 1.0 s, wanted Loaded;" in said
    assert "rank 1 on node-1 (Connected for 1.0 s, wanted WarmingUp or Ready;" in said
    assert "rank 2" not in said


def test_when_all_have_arrived_it_says_so() -> None:
    assert explain(picture(view(0), view(1), view(2)), CONNECTED) == "demo, attempt 2: all 3 ranks are Connected"
    rules = (RankRule(0, 0, ("Loaded",)), RankRule(1, 1, ("WarmingUp", "Ready")))
    assert explain(picture(view(0, "Loaded"), view(1, "Ready")), rules) == (
        "demo, attempt 2: all 2 ranks are Loaded / WarmingUp or Ready"
    )


def test_a_verdict_ends_the_waiting() -> None:
    over = picture(silent(0), epoch=record(1, verdict=Verdict.aborted("rank 0 failed: boom", 0, "permanent")))
    assert explain(over, all_ranks(1, "Connected")) == (
        "demo, attempt 2: Aborted (permanent, rank 0): rank 0 failed: boom"
    )
    stopped = picture(silent(0), epoch=record(1, verdict=Verdict.stopped()))
    assert explain(stopped, all_ranks(1, "Connected")) == "demo, attempt 2: Stopped: stop was asked for"


def test_before_the_first_attempt_it_names_the_ranks_that_are_not_here() -> None:
    assert explain(picture(view(0), silent(1), silent(2), opened=False), CONNECTED) == (
        "demo: no attempt has been opened; 2 of 3 ranks not here: rank 1 (no live report, wanted Connected); "
        "rank 2 (no live report, wanted Connected)"
    )
    assert explain(picture(view(0), view(1), view(2), opened=False), CONNECTED) == (
        "demo: all 3 ranks are here; no attempt has been opened"
    )


def test_a_record_that_cannot_be_read_is_told() -> None:
    said = explain(picture(view(0), opened=False, unreadable="it is damaged (ValueError)"), all_ranks(1, "Connected"))
    assert said == "demo: all 1 ranks are here; the record of the attempt cannot be read (it is damaged (ValueError))"


def test_the_same_snapshot_gives_the_same_sentence() -> None:
    snapshot = picture(view(0), silent(1), view(2, "Idle"))
    assert explain(snapshot, CONNECTED) == explain(snapshot, CONNECTED)


def test_512_missing_ranks_are_all_named() -> None:
    said = explain(picture(*(silent(rank) for rank in range(512))), all_ranks(512, "Connected"))
    assert all(f"rank {rank} (" in said for rank in range(512))


def test_a_sentence_is_told_from_the_next_by_what_it_says_and_not_by_ages_leases_and_progress() -> None:
    def key(**changed: Any) -> object:
        late: dict[str, Any] = {"status": "Loading", "progress": (3, 16), "left_ms": 4_500, **changed}
        return explain_key(picture(view(0), view(1, **late), silent(2)), all_ranks(3, "Loaded"))

    assert key() == key(progress=(4, 16)) == key(left_ms=900) == key(status_ms=9_000)
    different = [key(), key(status="Connected"), key(error="no route"), key(incarnation=life(1, 9)), key(epoch=None)]
    assert len(set(map(repr, different))) == len(different)
    assert key() != explain_key(picture(view(0), view(1), silent(2)), all_ranks(3, "Loaded"))
    assert key() != explain_key(picture(view(0), silent(1), silent(2), opened=False), all_ranks(3, "Loaded"))

"""Who has arrived, and what breaks an epoch for good: every branch of the pure judgements."""

from __future__ import annotations

from typing import Any

import pytest

from barrier import Break, InvalidName, LogId, RankRule, all_ranks, find_break, missing_ranks
from tests.unit.barrier.pictures import EARLIER, LATER, OTHER_NONCE, life, picture, record, silent, view

ALL = all_ranks(3, "Connected")


# --- who has arrived ----------------------------------------------------------------------------------------------------


def test_nobody_is_missing_when_all_have_arrived() -> None:
    assert missing_ranks(picture(view(0), view(1), view(2)), ALL) == ()


@pytest.mark.parametrize(
    "absent",
    [
        silent(1),
        silent(1, "rank 1: malformed report"),
        view(1, "Idle"),
        view(1, "connected"),
        view(1, epoch=None),
        view(1, epoch=OTHER_NONCE),
        view(1, epoch=LATER),
        view(1, epoch=EARLIER),
        view(1, incarnation=life(1, 6)),
        view(1, incarnation=life(1, 4)),
        view(1, incarnation=life(0)),
    ],
)
def test_a_rank_counts_only_with_a_live_report_of_exactly_this_epoch_incarnation_and_status(absent: Any) -> None:
    assert missing_ranks(picture(view(0), absent, view(2)), ALL) == (1,)


def test_all_missing_ranks_are_named() -> None:
    assert missing_ranks(picture(silent(0), view(1), view(2, "Idle")), ALL) == (0, 2)


def test_without_an_epoch_everybody_is_missing() -> None:
    assert missing_ranks(picture(view(0), view(1), view(2), opened=False), ALL) == (0, 1, 2)


def test_a_record_of_another_size_counts_nobody() -> None:
    assert missing_ranks(picture(view(0), view(1), epoch=record(3)), all_ranks(2, "Connected")) == (0, 1)


def test_any_of_several_statuses_will_do() -> None:
    wanted = all_ranks(3, ("Ready", "Running"))
    assert missing_ranks(picture(view(0, "Ready"), view(1, "Running"), view(2, "Loaded")), wanted) == (2,)


def test_rules_may_ask_different_things_of_different_ranks() -> None:
    rules = (RankRule(0, 0, ("Loaded",)), RankRule(1, 2, ("WarmingUp",)))
    assert missing_ranks(picture(view(0, "Loaded"), view(1, "WarmingUp"), view(2, "WarmingUp")), rules) == ()
    assert missing_ranks(picture(view(0, "WarmingUp"), view(1, "Loaded"), view(2, "WarmingUp")), rules) == (0, 1)


def test_a_rule_that_could_never_be_met_is_refused() -> None:
    with pytest.raises(InvalidName, match="the rule for ranks 0 to 2 names no status; name at least one"):
        RankRule(0, 2, ())


def test_a_rule_takes_status_names_only() -> None:
    with pytest.raises(InvalidName, match="is not a status name"):
        RankRule(0, 2, ("Connected,Idle",))


# --- what breaks an epoch -----------------------------------------------------------------------------------------------


def test_healthy_ranks_break_nothing() -> None:
    assert find_break(picture(view(0), view(1, "Idle"), view(2, "Loading"))) is None


def test_silence_breaks_nothing() -> None:
    """Whether the rank is at fault, or the store, takes more than one picture to tell."""
    assert find_break(picture(view(0), silent(1), silent(2, "rank 2: not a report"))) is None


def test_without_an_epoch_nothing_can_break() -> None:
    assert find_break(picture(view(0, "Failed"), opened=False)) is None


def test_a_failure_breaks_and_names_rank_node_and_error() -> None:
    found = find_break(picture(view(0), view(1, "Failed", error="out of memory"), view(2)))
    assert found == Break("rank 1 on node-1 failed: out of memory", 1, "transient")


def test_a_failure_may_be_permanent_and_may_give_no_reason() -> None:
    found = find_break(picture(view(0, "Failed", permanent=True, node="")))
    assert found == Break("rank 0 failed: it gave no reason", 0, "permanent")


def test_which_statuses_mean_failure_can_be_said() -> None:
    broken = picture(view(0, "Broken", error="x"))
    assert find_break(broken) is None
    assert find_break(broken, ("Broken",)) == Break("rank 0 on node-0 failed: x", 0)


def test_a_failure_in_another_epoch_is_not_this_ones() -> None:
    assert find_break(picture(view(0), view(1, "Failed", epoch=EARLIER, floor=99))) is None


def test_an_error_without_the_failed_status_breaks_nothing() -> None:
    assert find_break(picture(view(0), view(1, "Connected", error="odd"))) is None


def test_a_later_life_breaks_and_names_the_rank() -> None:
    found = find_break(picture(view(0), view(1, "Idle", incarnation=life(1, 6), epoch=None, floor=0)))
    assert found == Break("rank 1 on node-1 was restarted", 1)


def test_a_later_life_may_say_what_ended_the_earlier_one() -> None:
    found = find_break(
        picture(view(0, "Idle", incarnation=life(0, 6), epoch=None, floor=0, error="killed by signal 9"))
    )
    assert found is not None
    assert found.reason == "rank 0 on node-0 was restarted (killed by signal 9)"


def test_an_earlier_life_that_comes_back_harms_nobody() -> None:
    assert find_break(picture(view(0), view(1, "Failed", incarnation=life(1, 4)))) is None
    assert find_break(picture(view(0), view(1, incarnation=life(1, 4), floor=10**9))) is None


def test_a_higher_promise_means_that_the_store_went_back() -> None:
    found = find_break(picture(view(0), view(1, "Idle", epoch=LATER, floor=101)))
    assert found == Break("the store went back: rank 1 on node-1 has promised epoch 101 already", None)


def test_a_higher_floor_means_the_same_after_the_promise_was_spent() -> None:
    found = find_break(picture(view(0), view(1, "Idle", epoch=None, floor=101)))
    assert found is not None
    assert found.culprit is None
    assert "went back" in found.reason


def test_a_higher_epoch_means_the_same_whatever_the_floor_says() -> None:
    found = find_break(picture(view(0), view(1, "Idle", epoch=LATER, floor=0)))
    assert found is not None
    assert "went back" in found.reason


def test_a_rank_that_has_left_this_attempt_breaks_it() -> None:
    found = find_break(picture(view(0), view(1, "Idle", epoch=None, floor=100)))
    assert found == Break("rank 1 on node-1 has left this attempt already", None)


def test_a_rank_that_left_with_an_error_is_charged() -> None:
    found = find_break(picture(view(0), view(1, "Idle", epoch=None, floor=100, error="engine died")))
    assert found is not None
    assert found.culprit == 1


def test_the_same_number_with_another_nonce_counts_as_having_left() -> None:
    found = find_break(picture(view(0), view(1, epoch=OTHER_NONCE, floor=100)))
    assert found is not None
    assert "has left this attempt" in found.reason


def test_a_rank_that_has_not_promised_yet_breaks_nothing() -> None:
    assert find_break(picture(view(0), view(1, "Idle", epoch=None, floor=99))) is None
    assert find_break(picture(view(0), view(1, "Idle", epoch=EARLIER, floor=99))) is None


def test_a_rank_that_has_read_more_than_was_dispatched_means_that_the_store_went_back() -> None:
    ahead = view(1, applied=4)
    found = find_break(picture(view(0), ahead, epoch=record(2, last_n=3), log_end=LogId(100, 3)))
    assert found == Break("the store went back: rank 1 on node-1 has read log entry 4, the record knows 3", None)


def test_what_the_log_holds_has_been_dispatched_too() -> None:
    assert find_break(picture(view(0, applied=4), epoch=record(1, last_n=3), log_end=LogId(100, 4))) is None


def test_the_log_of_another_epoch_proves_nothing() -> None:
    found = find_break(picture(view(0, applied=4), epoch=record(1, last_n=3), log_end=LogId(99, 9)))
    assert found is not None
    assert "went back" in found.reason


def test_the_most_telling_break_comes_first() -> None:
    went_back = view(0, "Idle", epoch=LATER, floor=101)
    restarted = view(1, "Idle", incarnation=life(1, 6), epoch=None, floor=0)
    failed = view(2, "Failed", error="boom")
    found = find_break(picture(went_back, restarted, failed))
    assert found is not None
    assert found.culprit == 2
    found = find_break(picture(went_back, restarted, view(2)))
    assert found is not None
    assert found.culprit == 1


def test_among_equals_the_lowest_rank_is_named() -> None:
    found = find_break(picture(view(0), view(1, "Failed", error="x"), view(2, "Failed", error="y")))
    assert found is not None
    assert found.culprit == 1


def test_a_failure_of_the_same_number_with_another_nonce_is_not_this_ones() -> None:
    assert find_break(picture(view(0, "Failed", epoch=OTHER_NONCE, floor=100))) == Break(
        "rank 0 on node-0 has left this attempt already", None
    )


def test_a_log_that_went_on_to_a_later_epoch_means_that_the_record_went_back() -> None:
    found = find_break(picture(view(0), epoch=record(1), log_end=LogId(101, 1)))
    assert found == Break("the store went back: the log has entries of epoch 101 already", None)

"""What a planner remembers from picture to picture: progress, lapses, charges, pauses."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from barrier import EpochId, Snapshot, Verdict
from planner.policy import Policy
from planner.recovery import (
    UNATTRIBUTED,
    Memory,
    backoff_seconds,
    decode_notes,
    encode_notes,
    exhausted,
    forgive,
    hold,
    is_history,
    observe,
)
from tests.unit.planner.pictures import LATER, NOW, POLICY, SETTINGS, life, memory, outcome, picture, record

LEASE = SETTINGS.lease


def see(
    before: Memory,
    snapshot: Snapshot,
    now: float = NOW,
    *,
    policy: Policy = POLICY,
    serving: bool = False,
    jitter: float = 1.0,
) -> Memory:
    return observe(before, snapshot, policy, SETTINGS, now, serving=serving, jitter=jitter)


def broken(culprit: int | None = 1, epoch: dict[str, Any] | None = None) -> Snapshot:
    """A picture of an attempt that ended badly."""
    return picture("Idle", "Idle", "Idle", verdict=Verdict.aborted("it broke", culprit), epoch=epoch)


# --- progress -------------------------------------------------------------------------------------------------------------


def test_nothing_new_is_no_progress() -> None:
    before = see(memory(), picture("Loading", "Loading"))
    after = see(before, picture("Loading", "Loading"), NOW + 50)
    assert (before.progress_at, after.progress_at) == (NOW, NOW)


@pytest.mark.parametrize(
    ("what", "next_picture"),
    [
        ("a status", picture("Loading", "Loaded", dispatched=2)),
        ("a layer", picture("Loading", "Loading", dispatched=2, ranks={1: {"progress": (3, 16)}})),
        ("a step", picture("Loading", "Loading", dispatched=3)),
        ("a restarted rank", picture("Loading", "Loading", dispatched=2, ranks={1: {"incarnation": life(1, 6)}})),
        ("another attempt", picture("Loading", "Loading", dispatched=2, epoch={"id": LATER})),
        ("a rank that fell silent", picture("Loading", "-", dispatched=2)),
        ("a verdict", picture("Loading", "Loading", dispatched=2, verdict=Verdict.aborted("x"))),
    ],
)
def test_progress_is_stamped_when_anything_moves(what: str, next_picture: Snapshot) -> None:
    before = see(memory(), picture("Loading", "Loading", dispatched=2))
    assert see(before, next_picture, NOW + 50).progress_at == NOW + 50, what


def test_each_rank_has_a_time_of_its_own() -> None:
    def loading(first: int, second: int, **epoch: Any) -> Snapshot:
        return picture(
            "Loading", "Loading", ranks={0: {"progress": (first, 16)}, 1: {"progress": (second, 16)}}, **epoch
        )

    seen = see(memory(), loading(1, 1, dispatched=2), NOW)
    assert (dict(seen.moved), seen.asked_at) == ({0: NOW, 1: NOW}, NOW)
    seen = see(seen, loading(2, 1, dispatched=2), NOW + 1)
    assert (dict(seen.moved), seen.asked_at) == ({0: NOW + 1, 1: NOW}, NOW)
    seen = see(seen, loading(2, 2, dispatched=2), NOW + 2)
    assert (dict(seen.moved), seen.asked_at) == ({0: NOW + 1, 1: NOW + 2}, NOW)
    seen = see(seen, loading(2, 2, dispatched=3), NOW + 3)
    assert (dict(seen.moved), seen.asked_at) == ({0: NOW + 1, 1: NOW + 2}, NOW + 3)


def test_a_step_that_is_asked_again_is_something_asked() -> None:
    before = see(memory(), picture("Connected", "Connected", dispatched=2))
    assert before.picture is not None
    epoch = before.picture.epoch
    assert epoch is not None
    again = {**epoch.steps, "load": replace(epoch.steps["load"], attempt=2)}
    after = see(before, picture("Connected", "Connected", dispatched=2, epoch={"steps": again}), NOW + 50)
    assert (after.asked_at, after.progress_at) == (NOW + 50, NOW + 50)


def test_a_heartbeat_alone_is_no_progress() -> None:
    before = see(memory(), picture("Loading", "Loading", ranks={0: {"seq": 1, "status_ms": 10}}))
    again = picture("Loading", "Loading", ranks={0: {"seq": 9, "status_ms": 9_000}})
    assert see(before, again, NOW + 50).progress_at == NOW


# --- who is here ----------------------------------------------------------------------------------------------------------


def test_it_remembers_since_when_a_rank_is_missing_and_forgets_it_when_all_are_here() -> None:
    gone = see(memory(), picture("Idle", "-"), NOW + 1)
    still = see(gone, picture("Idle", "-"), NOW + 2)
    back = see(still, picture("Idle", "Idle"), NOW + 3)
    assert (gone.missing_since, still.missing_since, back.missing_since) == (NOW + 1, NOW + 1, None)
    assert (gone.live, back.live) == ({0}, {0, 1})


def test_it_remembers_since_when_all_serve_and_forgets_it_when_one_stops() -> None:
    serving = see(memory(), picture("Ready", "Ready"), NOW + 1, serving=True)
    still = see(serving, picture("Ready", "Ready"), NOW + 2, serving=True)
    stopped = see(still, picture("Ready", "Failed"), NOW + 3)
    assert (serving.ready_since, still.ready_since, stopped.ready_since) == (NOW + 1, NOW + 1, None)


def test_it_remembers_since_when_an_earlier_life_stands_in_for_a_rank() -> None:
    late = picture("Loading", "Loading", ranks={1: {"incarnation": life(1, 4)}})
    first = see(memory(), late, NOW + 1)
    still = see(first, late, NOW + 2)
    mended = see(still, picture("Loading", "Loading"), NOW + 3)
    assert (first.displaced, still.displaced, mended.displaced) == ({1: NOW + 1}, {1: NOW + 1}, {})


# --- the store's own faults -----------------------------------------------------------------------------------------------


def test_when_most_leases_lapse_in_one_tick_every_decision_is_held_for_one_lease() -> None:
    before = see(memory(), picture("Ready", "Ready", "Ready"))
    after = see(before, picture("-", "Ready", "-"), NOW + 1)
    assert after.hold_until == NOW + 1 + LEASE
    assert after.hold_reason == "2 of 3 leases lapsed at once: the store may be at fault"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("Ready", "Ready", "Ready"), ("Ready", "-", "Ready")),  # one of three: the rank's fault
        (("Ready", "Ready", "Ready", "Ready"), ("-", "-", "Ready", "Ready")),  # no more than half
        (("Ready",), ("-",)),  # a single rank: nothing to tell the store's fault from its own
        (("-", "-", "-"), ("-", "-", "-")),  # never were here
    ],
)
def test_fewer_lapses_are_the_ranks_own(before: tuple[str, ...], after: tuple[str, ...]) -> None:
    assert see(see(memory(), picture(*before)), picture(*after), NOW + 1).hold_until == float("-inf")


def test_a_hold_is_not_renewed_by_the_ranks_that_stay_silent() -> None:
    held = see(see(memory(), picture("Ready", "Ready")), picture("-", "-"), NOW + 1)
    for seconds in range(1, 20):
        held = see(held, picture("-", "-"), NOW + 1 + seconds)
    assert held.hold_until == NOW + 1 + LEASE


def test_hold_says_why() -> None:
    held = hold(memory(), "the store does not answer", NOW, SETTINGS)
    assert (held.hold_until, held.hold_reason) == (NOW + LEASE, "the store does not answer")


def test_a_record_that_is_gone_is_noticed_once_and_forgotten_when_it_is_back() -> None:
    lost = see(memory(), picture("Ready", "Ready", opened=False), NOW + 1)
    still = see(lost, picture("Ready", "Ready", opened=False), NOW + 2)
    back = see(still, picture("Ready", "Ready"), NOW + 3)
    assert (lost.epoch_lost_at, still.epoch_lost_at, back.epoch_lost_at) == (NOW + 1, NOW + 1, None)


def test_a_record_that_never_was_is_not_lost() -> None:
    never = picture("Idle", "Idle", opened=False, everyone={"epoch": None, "floor": 0})
    assert see(memory(), never).epoch_lost_at is None


# --- charges --------------------------------------------------------------------------------------------------------------


def test_a_verdict_is_charged_once_to_its_culprit() -> None:
    charged = see(memory(), broken(1))
    for seconds in range(1, 5):
        charged = see(charged, broken(1), NOW + seconds)
    assert charged.charges == {1: 1}
    assert charged.last_failure == Verdict.aborted("it broke", 1)


def test_the_culprit_is_charged_and_its_neighbours_are_not() -> None:
    seen = memory()
    for number, culprit in enumerate([1, 1, 2, None, 1]):
        seen = see(seen, broken(culprit, epoch={"id": EpochId(200 + number, "a" * 32)}))
    assert seen.charges == {1: 3, 2: 1, UNATTRIBUTED: 1}


def test_a_stop_that_was_asked_for_charges_nobody_and_settles_all() -> None:
    asked = picture("Idle", "Idle", "Idle", verdict=Verdict.stopped())
    settled = see(memory(charges={1: 2}, last_failure=Verdict.aborted("x", 1)), asked)
    assert (settled.charges, settled.last_failure) == ({}, None)


@pytest.mark.parametrize(("count", "spent"), [(0, False), (3, False), (4, True)])
def test_the_budget_is_spent_by_one_failure_more_than_it_allows(count: int, spent: bool) -> None:
    assert exhausted(memory(charges={2: count}), Policy(max_failures=3)) is spent


def test_the_budgets_of_ranks_are_not_added_up() -> None:
    assert not exhausted(memory(charges={0: 3, 1: 3, 2: 3, UNATTRIBUTED: 3}), Policy(max_failures=3))


def test_failures_that_no_rank_is_to_blame_for_have_a_budget_too() -> None:
    assert exhausted(memory(charges={UNATTRIBUTED: 4}), Policy(max_failures=3))


def test_a_relaunch_ignores_what_ended_before_it() -> None:
    old = broken(1, epoch={"opened_ms": 4_999, "notes": '{"charges": {"1": 3}}'})
    launched = replace(memory(), accounted=None, launched_ms=5_000)
    seen = see(launched, old)
    assert (seen.charges, seen.backoff_until, seen.accounted) == ({}, float("-inf"), None)


def test_what_was_opened_after_the_launch_counts() -> None:
    seen = see(replace(memory(), launched_ms=5_000), broken(1, epoch={"opened_ms": 5_000}))
    assert seen.charges == {1: 1}


def test_an_attempt_belongs_to_the_launch_that_it_was_opened_for_whatever_the_clock_says() -> None:
    """A clock that was set back opens attempts before the launch that they are for; it sets an old one after a later launch."""
    launched = replace(memory(), accounted=None, launched_ms=5_000)
    ours, before = encode_notes(launched), encode_notes(replace(launched, launched_ms=4_000))
    assert see(launched, broken(1, epoch={"opened_ms": 2_000, "notes": ours})).charges == {1: 1}
    assert see(launched, broken(1, epoch={"opened_ms": 9_000, "notes": before})).charges == {}


@pytest.mark.parametrize("notes", ['{"launched_ms": "4000"}', '{"launched_ms": true}', "[" * 100_000])
def test_notes_that_name_no_launch_leave_it_to_the_clock(notes: str) -> None:
    launched = replace(memory(), accounted=None, launched_ms=5_000)
    assert see(launched, broken(1, epoch={"opened_ms": 5_000, "notes": notes})).charges == {1: 1}
    assert see(launched, broken(1, epoch={"opened_ms": 4_999, "notes": notes})).charges == {}


def test_history_is_only_what_is_over() -> None:
    launched = replace(memory(), launched_ms=5_000)
    assert is_history(launched, record(2, opened_ms=1, verdict=Verdict.stopped()))
    assert not is_history(launched, record(2, opened_ms=1))
    assert not is_history(launched, record(2, opened_ms=5_000, verdict=Verdict.stopped()))


# --- from one planner to the next -----------------------------------------------------------------------------------------


@given(charges=st.dictionaries(st.integers(-1, 16_384), st.integers(1, 1_000), max_size=20))
def test_notes_round_trip(charges: dict[int, int]) -> None:
    assert decode_notes(encode_notes(memory(charges=charges))) == charges


NOT_OURS = ["", "{}", "[]", "null", '{"charges": 3}', '{"charges": {"x": 1}}', '{"charges": {"1": Infinity}}']


@given(notes=st.text() | st.sampled_from(NOT_OURS))
def test_notes_that_are_not_ours_mean_that_nobody_has_failed(notes: str) -> None:
    assert decode_notes(notes) == {}


def test_a_planner_that_takes_over_goes_on_with_the_charges_of_its_predecessor() -> None:
    fresh = Memory.fresh(NOW)
    notes = encode_notes(memory(charges={1: 2, 0: 1}))
    under_way = see(fresh, picture("Loading", "Loading", "Loading", epoch={"notes": notes}))
    assert under_way.charges == {1: 2, 0: 1}
    assert see(under_way, broken(1, epoch={"notes": notes})).charges == {1: 3, 0: 1}


def test_a_planner_that_takes_over_after_the_verdict_charges_it_too() -> None:
    notes = encode_notes(memory(charges={1: 2}))
    assert see(Memory.fresh(NOW), broken(1, epoch={"notes": notes})).charges == {1: 3}


def test_notes_are_read_once_so_that_what_is_forgiven_stays_forgiven() -> None:
    attempt = picture("Ready", "Ready", epoch={"notes": encode_notes(memory(charges={1: 2}))})
    taken_over = see(Memory.fresh(NOW), attempt)
    assert taken_over.charges == {1: 2}
    assert see(forgive(taken_over), attempt, NOW + 1).charges == {}


# --- forgiving ------------------------------------------------------------------------------------------------------------


def test_a_standby_forgives_what_a_completed_text_has_made_good() -> None:
    """Or it would give up, once it leads, for failures that had long been followed by success."""
    charged = memory(charges={1: 3})
    text = {"outcomes": (outcome("generate gen.1", 6, "done", task_id="gen.1"),)}
    assert see(charged, picture("Ready", "Ready", dispatched=4, everyone=text)).charges == {}
    running = {"outcomes": (outcome("generate gen.1", 6, "running", task_id="gen.1"),)}
    assert see(charged, picture("Ready", "Ready", dispatched=4, everyone=running)).charges == {1: 3}
    earlier = {**text, "epoch": LATER}
    assert see(charged, picture("Ready", "Ready", dispatched=4, everyone=earlier)).charges == {1: 3}


def test_a_text_of_an_attempt_that_has_ended_does_not_forgive_how_it_ended() -> None:
    text = {"outcomes": (outcome("generate gen.1", 6, "done", task_id="gen.1"),)}
    ended = picture("Failed", "Ready", dispatched=4, everyone=text, verdict=Verdict.aborted("it broke", 0))
    once = see(memory(), ended)
    assert see(once, ended, NOW + 1).charges == once.charges == {0: 1}


def test_an_instance_that_was_ready_for_long_enough_is_forgiven() -> None:
    ready = picture("Ready", "Ready")
    seen = see(memory(charges={1: 2}), ready, NOW, serving=True)
    early = see(seen, ready, NOW + POLICY.stable_after - 0.1, serving=True)
    late = see(early, ready, NOW + POLICY.stable_after, serving=True)
    assert (early.charges, late.charges, late.last_failure) == ({1: 2}, {}, None)


def test_being_ready_off_and_on_does_not_add_up() -> None:
    seen = see(memory(charges={1: 2}), picture("Ready", "Ready"), NOW, serving=True)
    seen = see(seen, picture("Ready", "Loaded"), NOW + POLICY.stable_after - 1)
    seen = see(seen, picture("Ready", "Ready"), NOW + POLICY.stable_after, serving=True)
    assert seen.charges == {1: 2}


# --- the pause ------------------------------------------------------------------------------------------------------------


@given(
    failures=st.integers(1, 100_000),
    jitter=st.floats(0, 1),
    base=st.floats(0.001, 100),
    factor=st.floats(1, 1_000),
)
def test_full_jitter_stays_between_nothing_and_the_doubled_base_up_to_the_cap(
    failures: int, jitter: float, base: float, factor: float
) -> None:
    policy = Policy(backoff_base=base, backoff_cap=base * factor)
    limit = min(policy.backoff_cap, base * 2.0 ** min(failures - 1, 40))
    assert 0 <= backoff_seconds(failures, policy, jitter) <= limit


def test_the_longest_pause_doubles_with_every_failure_of_the_same_rank() -> None:
    policy = Policy(backoff_base=0.5, backoff_cap=3.0)
    assert [backoff_seconds(n, policy, 1.0) for n in range(1, 6)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert backoff_seconds(5, policy, 0.0) == 0.0


def test_the_pause_counts_from_the_verdict_and_the_failures_of_the_culprit() -> None:
    policy = Policy(backoff_base=1.0, backoff_cap=60.0)
    seen = see(memory(charges={1: 2, 2: 9}), broken(1), NOW + 5, policy=policy, jitter=0.5)
    assert seen.backoff_until == NOW + 5 + 0.5 * 4.0


def test_the_pause_is_spread_over_its_whole_range() -> None:
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    pauses = [backoff_seconds(3, Policy(), rng.random()) for _ in range(1_000)]
    assert min(pauses) < 0.1, f"seed {seed}"
    assert max(pauses) > 1.9, f"seed {seed}"

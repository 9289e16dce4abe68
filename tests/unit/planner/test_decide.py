"""Every branch of the policy as one look at a picture made by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from barrier import EpochId, LogId, RankRule, Snapshot, TaskOutcome, Verdict, plain
from barrier.protocol.model import StepRecord
from planner.decide import (
    Action,
    Conclude,
    Finished,
    GiveUp,
    OpenEpoch,
    PassGate,
    RestoreEpoch,
    Serve,
    Wait,
    decide,
)
from planner.explain import is_serving
from planner.lifecycle import steps_for
from planner.policy import Policy
from planner.recovery import UNATTRIBUTED, Memory
from tests.unit.planner.pictures import (
    EPOCH,
    LATER,
    NOW,
    POLICY,
    SETTINGS,
    life,
    look,
    memory,
    outcome,
    picture,
    spec,
)

LEASE = SETTINGS.lease
FAILED = Verdict.aborted("rank 1 on node-1 failed: the cable is loose", 1)
HOPELESS = Verdict.aborted("rank 1 on node-1 failed: no such model", 1, "permanent")


def act(snapshot: Snapshot, *, now: float = NOW, policy: Policy = POLICY, remembered: Memory | None = None) -> Action:
    action = decide(look(snapshot, policy=policy, remembered=remembered), now)
    assert action.reason.strip(), f"{action} does not say why"
    return action


def concluded(snapshot: Snapshot, *, now: float = NOW, **options: Any) -> Verdict:
    """The verdict that ends this attempt, now."""
    action = act(snapshot, now=now, **options)
    assert isinstance(action, Conclude), action
    assert action.epoch == EPOCH
    return action.verdict


def goes_on(action: Action) -> bool:
    return not isinstance(action, Conclude | GiveUp | Finished)


# --- the gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dispatched", "step", "after", "requirement"),
    [
        (0, "connect", "", (RankRule(0, 3, ("Idle",)),)),
        (1, "load", "connect", (RankRule(0, 3, ("Connected",)),)),
        (2, "warm up followers", "load", (RankRule(0, 3, ("Loaded",)),)),
        (
            3,
            "warm up leader",
            "warm up followers",
            (RankRule(0, 0, ("Loaded",)), RankRule(1, 3, ("WarmingUp", "Ready"))),
        ),
    ],
)
@pytest.mark.parametrize("last", ["-", "here"])
def test_each_step_waits_behind_its_own_gate(
    dispatched: int, step: str, after: str, requirement: tuple[RankRule, ...], last: str
) -> None:
    status = ("Idle", "Connected", "Loaded", "WarmingUp")[dispatched]
    leader = "Loaded" if step == "warm up leader" else status
    late = ("Idle", "Connecting", "Loading", "Loaded")[dispatched]
    told = picture(leader, status, status, status if last == "here" else late, dispatched=dispatched)
    if step == "connect" and last != "here":
        told = picture(*["Idle"] * 4, ranks={3: {"epoch": None, "floor": 0}})  # not in the attempt yet
    action = act(told)
    assert isinstance(action, PassGate)
    assert (action.step.name, action.after, action.attempt, action.requirement) == (step, after, 1, requirement)
    assert ("rank 3" in action.reason) == (last != "here"), "the reason names who is waited for, and nobody else"


def test_a_single_rank_loads_at_once_and_then_warms_up() -> None:
    load, warm_up = act(picture("Idle")), act(picture("Loaded", dispatched=1))
    assert isinstance(load, PassGate)
    assert isinstance(warm_up, PassGate)
    assert [(load.step.name, load.after), (warm_up.step.name, warm_up.after)] == [
        ("load", ""),
        ("warm up leader", "load"),
    ]


def test_the_gate_is_given_up_when_nothing_has_moved_for_the_time_of_its_step() -> None:
    policy = Policy(connect_stall=10, load_stall=20, warmup_stall=30)
    untils: list[float] = []
    for dispatched, statuses in enumerate(
        [("Idle", "Idle"), ("Connected", "Connecting"), ("Loaded", "Loading"), ("Loaded", "Loaded")]
    ):
        action = act(picture(*statuses, dispatched=dispatched), policy=policy)
        assert isinstance(action, PassGate), action
        untils.append(action.until - NOW)
    assert untils == [10, 10, 20, 30]


def test_when_all_is_dispatched_it_waits_for_all_ranks_to_serve() -> None:
    action = act(picture("WarmingUp", "Ready", dispatched=4))
    assert isinstance(action, Wait)
    assert action.requirement == (RankRule(0, 1, ("Ready", "Running")),)
    assert action.until == NOW + POLICY.warmup_stall
    assert "rank 0" in action.reason
    assert "rank 1" not in action.reason


@pytest.mark.parametrize("statuses", [("Ready", "Ready"), ("Ready", "Running"), ("Running", "Running")])
def test_it_serves_when_all_ranks_are_ready_or_running(statuses: tuple[str, ...]) -> None:
    told = picture(*statuses, dispatched=4)
    assert isinstance(act(told), Serve)
    assert is_serving(told)


def test_a_group_that_serves_is_looked_at_again_when_its_failures_are_to_be_forgotten() -> None:
    ready = picture("Ready", "Ready", dispatched=4)
    settled = act(ready, remembered=memory(ready_since=NOW - 1))
    on_trial = act(ready, remembered=memory(ready_since=NOW - 1, charges={1: 1}))
    assert isinstance(settled, Serve)
    assert isinstance(on_trial, Serve)
    assert (settled.until, on_trial.until) == (float("inf"), NOW - 1 + POLICY.stable_after)


def test_a_group_that_generates_is_looked_at_again_when_it_could_have_stalled() -> None:
    action = act(picture("Running", "Running", dispatched=4), policy=Policy(generate_stall=7))
    assert isinstance(action, Serve)
    assert action.until == NOW + 7


@pytest.mark.parametrize(
    "told",
    [
        picture("Ready", "Loaded", dispatched=4),
        picture("Ready", "-", dispatched=4),
        picture("Ready", "Ready", dispatched=4, verdict=FAILED),
        picture("Ready", "Ready", dispatched=4, opened=False),
        picture("Ready", "Ready", dispatched=4, ranks={1: {"epoch": LATER}}),
        picture("Ready", "Ready", dispatched=4, ranks={1: {"incarnation": life(1, 6)}}),
    ],
)
def test_nothing_less_counts_as_serving(told: Snapshot) -> None:
    assert not is_serving(told)


# --- the record is gone ---------------------------------------------------------------------------------------------------

ALL_STEPS = ("connect", "load", "warm up followers", "warm up leader")


@pytest.mark.parametrize(
    ("status", "steps"),
    [
        ("Connecting", ALL_STEPS[:1]),
        ("Connected", ALL_STEPS[:1]),
        ("Loading", ALL_STEPS[:2]),
        ("Loaded", ALL_STEPS[:2]),
        ("WarmingUp", ALL_STEPS),
        ("Ready", ALL_STEPS),
        ("Running", ALL_STEPS),
    ],
)
def test_a_lost_record_is_restored_when_all_ranks_agree(status: str, steps: tuple[str, ...]) -> None:
    action = act(picture(status, status, status, opened=False))
    assert isinstance(action, RestoreEpoch)
    assert (action.epoch, action.status, action.steps) == (EPOCH, status, steps)


def test_a_single_rank_agrees_with_itself() -> None:
    action = act(picture("Ready", opened=False))
    assert isinstance(action, RestoreEpoch)
    assert action.steps == ("load", "warm up leader")


@pytest.mark.parametrize(
    ("why", "told"),
    [
        ("another status", picture("Ready", "Ready", "Loaded", opened=False)),
        ("another epoch", picture("Ready", "Ready", "Ready", opened=False, ranks={2: {"epoch": LATER}})),
        (
            "the same number, another nonce",
            picture("Ready", "Ready", "Ready", opened=False, ranks={2: {"epoch": EpochId(100, "f" * 32)}}),
        ),
        ("another place of the log", picture("Ready", "Ready", "Ready", opened=False, ranks={2: {"applied": 9}})),
        ("no report", picture("Ready", "Ready", "-", opened=False)),
        ("no epoch", picture("Ready", "Ready", "Ready", opened=False, ranks={2: {"epoch": None}})),
        ("another spec", picture("Ready", "Ready", "Ready", opened=False, ranks={2: {"digest": "ab"}})),
        ("nothing to restore", picture("Idle", "Idle", "Idle", opened=False)),
        ("a failure", picture("Failed", "Failed", "Failed", opened=False)),
        (
            "a record that is there and not readable",
            picture("Ready", "Ready", "Ready", opened=False, unreadable="it is for 2 ranks with a roster of 2"),
        ),
    ],
)
def test_a_lost_record_is_restored_only_when_all_agree(why: str, told: Snapshot) -> None:
    remembered = memory(epoch_lost_at=NOW - 1)
    action = act(told, remembered=remembered)
    assert isinstance(action, Wait), f"{why}: {action}"
    assert action.until == NOW - 1 + LEASE, "it waits one lease for the ranks to agree"
    after_a_lease = act(told, now=NOW - 1 + LEASE, remembered=remembered)
    assert isinstance(after_a_lease, OpenEpoch | Wait | GiveUp)
    assert not isinstance(after_a_lease, RestoreEpoch)


def test_one_lease_after_the_record_was_lost_a_new_attempt_begins() -> None:
    told = picture("Ready", "Loaded", opened=False)
    remembered = memory(epoch_lost_at=NOW)
    assert isinstance(act(told, now=NOW + LEASE - 0.001, remembered=remembered), Wait)
    assert isinstance(act(told, now=NOW + LEASE, remembered=remembered), OpenEpoch)


def test_the_very_first_attempt_begins_as_soon_as_all_ranks_are_here() -> None:
    fresh = {"epoch": None, "floor": 0}
    assert isinstance(act(picture("Idle", "Idle", opened=False, everyone=fresh)), OpenEpoch)


# --- who is here ----------------------------------------------------------------------------------------------------------


def absent(*statuses: str, **options: Any) -> Snapshot:
    return picture(*statuses, opened=False, everyone={"epoch": None, "floor": 0}, **options)


def test_it_waits_for_ranks_that_are_not_here_and_names_all_of_them() -> None:
    action = act(absent("Idle", "-", "Idle", "-"), remembered=memory(missing_since=NOW - 20))
    assert isinstance(action, Wait)
    assert action.until == NOW - 20 + POLICY.assemble_timeout
    assert "rank 1, rank 3" in action.reason


@pytest.mark.parametrize(("away", "told"), [(10, 10), (19, 10), (20, 20), (39, 20), (10 * 2**20, 10 * 2**20)])
def test_ranks_that_do_not_come_are_waited_for_without_an_end_and_named_ever_more_seldom(away: int, told: int) -> None:
    policy = Policy(assemble_timeout=10)
    action = act(absent("Idle", "-", "Idle", "-"), policy=policy, remembered=memory(missing_since=NOW - away))
    assert isinstance(action, Wait)
    assert action.overdue
    assert action.until == NOW - away + 2 * told
    assert action.reason == (
        f"no attempt is under way; demo: rank 1, rank 3 did not come within {plain.number(told)} s. Start the missing runners, or launch "
        "with a smaller world_size. The planner waits on, and begins the next attempt when they come."
    )
    assert isinstance(
        act(absent("Idle", "Idle"), policy=policy, remembered=memory(missing_since=NOW - away)), OpenEpoch
    )


@pytest.mark.parametrize("own", [False, True])
def test_with_a_limit_ranks_that_do_not_come_within_it_end_it_and_are_named(own: bool) -> None:
    policy = Policy(assemble_timeout=10, absence_limit=10**6 if own else 25)
    view = look(absent("Idle", "-", "Idle", "-"), policy=policy, remembered=memory(missing_since=NOW))
    if own:  # an instance's own limit beats the planner's
        view = replace(view, spec=view.spec.model_copy(update={"absence_limit": 25.0}))
    early, late = decide(view, NOW + 24), decide(view, NOW + 25)
    assert isinstance(early, Wait)
    assert early.until == NOW + 25
    assert "It gives up when they have been away for 25 s." in early.reason
    assert isinstance(late, GiveUp)
    assert late.reason == (
        "demo is given up: rank 1, rank 3 did not come within 25 s, which is the absence limit. "
        "Start the missing runners, then launch demo again"
    )
    assert late.verdict.culprit == 1


def test_the_pause_between_attempts_does_not_eat_the_time_to_come_back() -> None:
    policy = Policy(assemble_timeout=10, backoff_cap=30)
    remembered = memory(missing_since=NOW - 100, backoff_until=NOW - 5)
    action = act(picture("Idle", "-", verdict=FAILED), policy=policy, remembered=remembered)
    assert isinstance(action, Wait)
    assert action.until == NOW + 5


def test_a_rank_that_was_started_for_another_number_of_ranks_is_refused_with_both_numbers() -> None:
    action = act(absent("Idle", "Idle", ranks={1: {"world_size": 3}}))
    assert isinstance(action, GiveUp)
    assert "rank 1 on node-1 was started for world_size 3, demo has world_size 2" in action.reason
    assert (action.verdict.failure, action.verdict.culprit) == ("permanent", 1)


def test_a_rank_that_was_started_for_another_spec_is_refused_with_both_digests() -> None:
    action = act(absent("Idle", "Idle", ranks={1: {"digest": "abc123"}}))
    assert isinstance(action, GiveUp)
    assert "rank 1" in action.reason
    assert "abc123" in action.reason
    assert spec(2).digest in action.reason
    assert (action.verdict.failure, action.verdict.culprit) == ("permanent", 1)


@pytest.mark.parametrize(
    "configured", [{"world_size": None, "digest": ""}, {"world_size": 2, "digest": spec(2).digest}]
)
def test_ranks_that_were_told_the_same_or_nothing_are_welcome(configured: dict[str, Any]) -> None:
    assert isinstance(act(absent("Idle", "Idle", ranks={1: configured})), OpenEpoch)


# --- after a verdict ------------------------------------------------------------------------------------------------------


def test_after_a_failure_it_pauses_and_then_tries_again() -> None:
    told = picture("Idle", "Idle", verdict=FAILED)
    remembered = memory(charges={1: 1}, backoff_until=NOW + 3)
    pause = act(told, remembered=remembered)
    assert isinstance(pause, Wait)
    assert pause.until == NOW + 3
    assert FAILED.reason in pause.reason
    assert isinstance(act(told, now=NOW + 3, remembered=remembered), OpenEpoch)


def test_a_permanent_failure_ends_it_at_once_with_the_whole_reason() -> None:
    action = act(picture("Idle", "Idle", verdict=HOPELESS), remembered=memory(charges={1: 1}))
    assert isinstance(action, GiveUp)
    assert action.reason == "demo cannot be brought up: rank 1 on node-1 failed: no such model"
    assert action.verdict == HOPELESS


def test_a_spent_budget_ends_it_and_names_the_rank_the_count_the_limit_and_the_reason() -> None:
    policy = Policy(max_failures=2)
    told = picture("Idle", "Idle", verdict=FAILED)
    assert goes_on(act(told, policy=policy, remembered=memory(charges={1: 2, 0: 1})))
    action = act(told, policy=policy, remembered=memory(charges={1: 3, 0: 1}))
    assert isinstance(action, GiveUp)
    assert action.reason == (
        "demo is given up after 3 failed attempts in a row (each time by rank 1; the limit is 2 retries). "
        "The last one: rank 1 on node-1 failed: the cable is loose"
    )


def test_failures_without_a_culprit_have_a_budget_of_their_own() -> None:
    told = picture("Idle", "Idle", verdict=Verdict.aborted("the store went back"))
    policy = Policy(max_failures=1)
    assert goes_on(act(told, policy=policy, remembered=memory(charges={UNATTRIBUTED: 1, 0: 1, 1: 1})))
    action = act(told, policy=policy, remembered=memory(charges={UNATTRIBUTED: 2}))
    assert isinstance(action, GiveUp)
    assert "no rank could be blamed" in action.reason
    assert "the store went back" in action.reason


def test_a_launch_does_not_inherit_the_verdict_of_the_one_before() -> None:
    told = picture("Idle", "Idle", verdict=HOPELESS, epoch={"opened_ms": 1_000})
    assert isinstance(act(told, remembered=memory(launched_ms=1_001)), OpenEpoch)
    assert isinstance(act(told, remembered=memory(launched_ms=1_000)), GiveUp)


def test_an_instance_that_was_stopped_before_is_simply_brought_up_again() -> None:
    assert isinstance(act(picture("Idle", "Idle", verdict=Verdict.stopped())), OpenEpoch)


# --- what ends an attempt -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("permanent", [False, True])
def test_a_rank_that_failed_ends_the_attempt_for_all_and_is_charged(permanent: bool) -> None:
    broken = {1: {"error": "no memory", "permanent": permanent}}
    verdict = concluded(picture("Loading", "Failed", "Loading", dispatched=2, ranks=broken))
    assert (verdict.culprit, verdict.failure) == (1, "permanent" if permanent else "transient")
    assert verdict.reason == "rank 1 on node-1 failed: no memory"


def test_a_restarted_rank_ends_the_attempt() -> None:
    reborn = {1: {"incarnation": life(1, 6), "epoch": None, "floor": 0}}
    verdict = concluded(picture("Ready", "Idle", "Ready", dispatched=4, ranks=reborn))
    assert (verdict.culprit, verdict.reason) == (1, "rank 1 on node-1 was restarted")


def test_a_report_of_an_earlier_life_is_ignored_for_one_lease() -> None:
    late = {1: {"incarnation": life(1, 4)}}
    told = picture("Connected", "Connected", dispatched=1, ranks=late)
    remembered = memory(displaced={1: NOW})
    waiting = act(told, remembered=remembered)
    assert isinstance(waiting, PassGate)
    assert "rank 1" in waiting.reason, "it counts as missing"
    assert goes_on(act(told, now=NOW + LEASE - 0.001, remembered=remembered))
    assert concluded(told, now=NOW + LEASE, remembered=remembered).culprit == 1


def test_a_lapsed_lease_ends_the_attempt_and_the_rank_is_charged() -> None:
    verdict = concluded(picture("Ready", "Ready", "-", dispatched=4))
    assert (verdict.culprit, verdict.failure) == (2, "transient")
    assert verdict.reason == "rank 2 fell silent: no report for longer than its lease", (
        "never seen: its lease is not known"
    )


def test_a_report_that_is_not_readable_counts_as_silence_and_says_so() -> None:
    verdict = concluded(picture("Ready", "Ready", dispatched=4, ranks={1: {"undecodable": "rank 1: schema 9"}}))
    assert verdict.culprit == 1
    assert "rank 1: schema 9" in verdict.reason


def test_when_most_ranks_fall_silent_all_are_named_and_nobody_is_charged() -> None:
    verdict = concluded(picture("-", "Ready", "-", dispatched=4))
    assert verdict.culprit is None
    assert "rank 0, rank 2 fell silent" in verdict.reason


def test_while_a_mass_lapse_is_held_nothing_is_decided() -> None:
    told = picture("-", "-", "-", dispatched=4)
    remembered = memory(hold_until=NOW + LEASE, hold_reason="3 of 3 leases lapsed at once")
    action = act(told, remembered=remembered)
    assert isinstance(action, Wait)
    assert action.until == NOW + LEASE
    assert "3 of 3 leases lapsed at once" in action.reason
    assert concluded(told, now=NOW + LEASE, remembered=remembered).culprit is None


@pytest.mark.parametrize(
    ("dispatched", "statuses", "step"),
    [
        (0, ("Connecting", "Idle"), "connect"),
        (1, ("Connected", "Loading"), "load"),
        (2, ("Loaded", "WarmingUp"), "warm up followers"),
        (3, ("WarmingUp", "WarmingUp"), "warm up leader"),
        (2, ("Loaded", "Ready"), "warm up followers"),
    ],
)
def test_a_rank_that_is_ahead_of_the_record_means_that_the_store_went_back(
    dispatched: int, statuses: tuple[str, ...], step: str
) -> None:
    verdict = concluded(picture(*statuses, dispatched=dispatched))
    assert verdict.culprit is None
    assert verdict.reason.startswith("the store went back: rank ")
    assert verdict.reason.endswith(f"the record does not know step {step}")


def test_an_attempt_that_was_opened_for_another_spec_is_ended() -> None:
    verdict = concluded(picture("Ready", "Ready", dispatched=4, epoch={"digest": "abc"}))
    assert (verdict.culprit, verdict.failure) == (None, "transient")
    assert "another spec" in verdict.reason


def test_a_failure_that_was_reported_beats_the_silence_that_follows_from_it() -> None:
    verdict = concluded(picture("-", "Failed", "Ready", dispatched=4, ranks={1: {"error": "no memory"}}))
    assert verdict.culprit == 1


# --- refusals -------------------------------------------------------------------------------------------------------------


def refused(step: str, n: int, **changes: Any) -> dict[str, Any]:
    return {"outcomes": (outcome(step, n, **changes),)}


def test_what_was_not_yet_possible_is_asked_again_in_the_same_epoch_behind_the_same_gate() -> None:
    first = act(picture("Connected", "Connected", dispatched=1))
    again = act(picture("Connected", "Connected", dispatched=2, ranks={1: refused("load", 3)}))
    assert isinstance(first, PassGate)
    assert isinstance(again, PassGate)
    assert (again.step.name, again.attempt) == ("load", 2)
    assert (again.requirement, again.after) == (first.requirement, first.after)
    assert again.reason.startswith("rank 1 on node-1 refused LoadModel (NotYet: the reason of this rank); asking again")


def attempts(number: int) -> dict[str, Any]:
    """The record after LoadModel was dispatched that many times."""
    steps = {"connect": StepRecord(2, 1), "load": StepRecord(2 + number, number)}
    return {"steps": steps, "last_n": 2 + number}


def test_asking_again_is_bounded_and_then_the_rank_that_refuses_is_charged() -> None:
    policy = Policy(max_rejections=3)
    for number in (1, 2, 3):
        told = picture("Connected", "Connected", ranks={1: refused("load", 2 + number)}, epoch=attempts(number))
        action = act(told, policy=policy)
        assert isinstance(action, PassGate)
        assert action.attempt == number + 1
    verdict = concluded(
        picture("Connected", "Connected", ranks={1: refused("load", 6)}, epoch=attempts(4)), policy=policy
    )
    assert (verdict.culprit, verdict.failure) == (1, "transient")
    assert verdict.reason == (
        "rank 1 on node-1, which is Connected, rejected LoadModel 4 times (NotYet: the reason of this rank)"
    )


def test_a_policy_without_retries_asks_once() -> None:
    told = picture("Connected", "Connected", dispatched=2, ranks={1: refused("load", 3)})
    assert concluded(told, policy=Policy(max_rejections=0)).culprit == 1


def test_a_refusal_of_an_earlier_asking_is_not_counted_again() -> None:
    told = picture("Connected", "Connected", ranks={1: refused("load", 3)}, epoch=attempts(2))
    action = act(told)
    assert isinstance(action, PassGate)
    assert action.step.name == "warm up followers", "the second asking is out and nobody has refused it"


def test_a_refusal_of_another_epoch_is_not_counted() -> None:
    told = picture("Connected", "Connected", dispatched=2, ranks={1: refused("load", 3, task_id="load.of-another")})
    assert isinstance(action := act(told), PassGate)
    assert action.step.name == "warm up followers"


@pytest.mark.parametrize(("code", "failure"), [("Stale", "transient"), ("Invalid", "permanent")])
def test_a_refusal_for_good_ends_the_attempt(code: str, failure: str) -> None:
    verdict = concluded(picture("Connected", "Connected", dispatched=2, ranks={0: refused("load", 3, code=code)}))
    assert (verdict.culprit, verdict.failure) == (0, failure)
    assert verdict.reason == (
        f"rank 0 on node-0, which is Connected, rejected LoadModel ({code}: the reason of this rank)"
    )


@pytest.mark.parametrize(("code", "failure"), [("Stale", "transient"), ("Invalid", "permanent"), ("", "transient")])
@pytest.mark.parametrize("detail", ["Invalid: permanent", "Stale: transient", ""])
def test_whether_a_refusal_is_for_good_hangs_on_its_code_and_not_on_its_text(
    code: str, failure: str, detail: str
) -> None:
    told = refused("load", 3, code=code, detail=detail)
    verdict = concluded(picture("Connected", "Connected", dispatched=2, ranks={0: told}))
    assert verdict.failure == failure


@pytest.mark.parametrize("rank", [0, 1])
def test_garbage_in_the_log_is_not_taken_for_a_step_that_the_rank_has_carried_out(rank: int) -> None:
    """A record that was restored gives all steps the last place in the log, whatever stood there."""
    garbage = TaskOutcome(
        task_id=f"log-{EPOCH.number}-9", step="stray", n=9, result="rejected", code="Invalid", detail="not JSON"
    )
    restored = {"steps": {name: StepRecord(9, 1) for name in ALL_STEPS}, "last_n": 9}
    told = picture("Ready", "Ready", ranks={rank: {"outcomes": (garbage,)}}, epoch=restored)
    assert isinstance(act(told), Serve)


def test_a_task_that_a_rank_could_not_even_read_is_recognised_by_its_place_in_the_log() -> None:
    malformed = refused("load", 3, code="Invalid", task_id=f"log-{EPOCH.number}-3")
    verdict = concluded(picture("Connected", "Connected", dispatched=2, ranks={1: malformed}))
    assert (verdict.culprit, verdict.failure) == (1, "permanent")


def test_a_step_that_some_refused_and_others_began_is_over_because_its_gate_cannot_open_again() -> None:
    split = {0: {"outcomes": (outcome("load", 3, "running"),)}, 1: refused("load", 3)}
    verdict = concluded(picture("Loading", "Connected", dispatched=2, ranks=split))
    assert verdict.culprit == 1, "the rank that refused, not the one that did as it was told"
    assert verdict.reason == (
        "rank 1 on node-1, which is Connected, rejected LoadModel that rank 0 began (NotYet: the reason of this rank)"
    )


def test_a_generation_that_some_refused_and_others_began_is_over() -> None:
    begun = {"outcomes": (outcome("generate gen.1", 9, "running", task_id="gen.1"),)}
    refusing = {"outcomes": (outcome("generate gen.1", 9, task_id="gen.1"),)}
    told = picture("Running", "Ready", dispatched=4, epoch={"last_n": 9}, ranks={0: begun, 1: refusing})
    verdict = concluded(told)
    assert verdict.culprit == 1
    assert "rank 1 on node-1 rejected a generation that others began" in verdict.reason


def test_a_generation_that_all_refused_harms_nobody() -> None:
    refusing = {"outcomes": (outcome("generate gen.1", 9, task_id="gen.1"),)}
    told = picture("Ready", "Ready", dispatched=4, epoch={"last_n": 9}, everyone=refusing)
    assert isinstance(act(told), Serve)


# --- stalls ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stall", "dispatched", "statuses", "culprit"),
    [
        ("connect_stall", 1, ("Connected", "Connecting", "Connected"), 1),
        ("connect_stall", 1, ("Connecting", "Connected", "Idle"), 2),
        ("load_stall", 2, ("Loaded", "Loading", "Connected"), 2),
        ("warmup_stall", 3, ("Loaded", "WarmingUp", "Loaded"), 2),
        ("warmup_stall", 4, ("WarmingUp", "Ready", "Ready"), 0),
    ],
)
def test_a_step_in_which_nothing_moves_ends_and_who_is_furthest_behind_is_charged(
    stall: str, dispatched: int, statuses: tuple[str, ...], culprit: int
) -> None:
    policy = replace(Policy(), **{stall: 10.0})
    told = picture(*statuses, dispatched=dispatched)
    assert goes_on(act(told, now=NOW + 9.999, policy=policy))
    verdict = concluded(told, now=NOW + 10, policy=policy)
    assert (verdict.culprit, verdict.failure) == (culprit, "transient")
    assert verdict.reason.startswith("nothing moved for 10 s: ")
    assert f"rank {culprit}" in verdict.reason


def test_a_stall_before_the_first_step_charges_the_rank_that_is_not_in_the_attempt() -> None:
    told = picture("Idle", "Idle", "Idle", ranks={1: {"epoch": None, "floor": 0}})
    assert concluded(told, now=NOW + POLICY.connect_stall).culprit == 1


def test_among_ranks_in_the_same_status_the_one_with_the_fewest_layers_is_furthest_behind() -> None:
    progress = {0: {"progress": (9, 16)}, 1: {"progress": (3, 16)}, 2: {"progress": (4, 16)}}
    told = picture("Loading", "Loading", "Loading", dispatched=2, ranks=progress)
    assert concluded(told, now=NOW + POLICY.load_stall).culprit == 1


def test_progress_renews_the_deadline_because_slow_is_not_stalled() -> None:
    told = picture("Loading", "Loading", dispatched=2)
    moved = memory(progress_at=NOW + 100)
    assert goes_on(act(told, now=NOW + 100 + POLICY.load_stall - 0.001, remembered=moved))


@pytest.mark.parametrize(
    ("stall", "dispatched", "statuses", "progress"),
    [
        ("connect_stall", 1, ("Connecting", "Connecting"), {}),
        ("load_stall", 2, ("Loading", "Loading"), {0: {"progress": (9, 16)}, 1: {"progress": (12, 16)}}),
        ("load_stall", 2, ("Loading", "Loading"), {0: {"progress": (9, 16)}}),
        ("warmup_stall", 4, ("Ready", "WarmingUp"), {}),
        ("generate_stall", 4, ("Running", "Running"), {0: {"progress": (9, 60)}, 1: {"progress": (9, 60)}}),
    ],
)
def test_a_rank_that_stands_still_is_noticed_while_the_others_move(
    stall: str, dispatched: int, statuses: tuple[str, ...], progress: dict[int, dict[str, Any]]
) -> None:
    policy = replace(Policy(), **{stall: 10.0})
    told = picture(*statuses, dispatched=dispatched, ranks=progress)
    others_move = memory(progress_at=NOW + 9, moved={0: NOW + 9, 1: NOW + 1}, asked_at=NOW)
    action = act(told, now=NOW + 10.999, policy=policy, remembered=others_move)
    assert isinstance(action, PassGate | Wait | Serve)
    assert action.until == NOW + 11
    verdict = concluded(told, now=NOW + 11, policy=policy, remembered=others_move)
    assert verdict.culprit == 1
    assert "rank 1 " in verdict.reason.partition(":")[0] or statuses[0] == "Ready", (
        "the others moved, and are not blamed"
    )


@pytest.mark.parametrize(
    ("statuses", "moved", "asked_at"),
    [
        (("WarmingUp", "WarmingUp", "WarmingUp"), {0: NOW + 0.1, 1: NOW - 1, 2: NOW - 1}, NOW),
        (("Running", "Running"), {0: NOW, 1: NOW + 0.3}, NOW - 9),
    ],
)
def test_ranks_that_fell_still_together_cannot_be_told_apart_and_none_is_blamed(
    statuses: tuple[str, ...], moved: dict[int, float], asked_at: float
) -> None:
    """In a collective all stand still where one does. Who was seen to move last, by less than a heartbeat or two, says nothing."""
    still = memory(progress_at=max(moved.values()), moved=moved, asked_at=asked_at)
    policy = Policy(warmup_stall=10, generate_stall=10)
    assert concluded(picture(*statuses, dispatched=4), now=NOW + 10, policy=policy, remembered=still).culprit is None


def test_of_ranks_that_fell_still_together_the_one_that_is_furthest_behind_is_blamed() -> None:
    told = picture("Loaded", "WarmingUp", "Loaded", dispatched=3)
    still = memory(progress_at=NOW + 0.3, moved={1: NOW - 1, 2: NOW + 0.3}, asked_at=NOW - 1)
    assert concluded(told, now=NOW + 20, policy=Policy(warmup_stall=10), remembered=still).culprit == 2


def test_only_a_rank_that_prepares_has_the_time_for_preparing() -> None:
    told = picture("Preparing", "Idle", ranks={1: {"epoch": None, "floor": 0}})
    still = memory(progress_at=NOW + 55, moved={0: NOW + 55, 1: NOW}, asked_at=NOW)
    patient = Policy(prepare_stall=900, connect_stall=60)
    assert goes_on(act(told, now=NOW + 59.999, policy=patient, remembered=still))
    assert concluded(told, now=NOW + 60, policy=patient, remembered=still).culprit == 1
    hasty = Policy(prepare_stall=5, connect_stall=60)
    moving = memory(progress_at=NOW + 58, moved={0: NOW + 58, 1: NOW}, asked_at=NOW)
    assert goes_on(act(told, now=NOW + 59.999, policy=hasty, remembered=moving)), "rank 1 does not prepare"


def test_patience_begins_anew_with_what_is_asked() -> None:
    told = picture("Loaded", "WarmingUp", "Loaded", dispatched=3)
    waited = memory(progress_at=NOW + 9, moved={0: NOW, 1: NOW + 9, 2: NOW}, asked_at=NOW + 8)
    policy = Policy(warmup_stall=10)
    assert goes_on(act(told, now=NOW + 17.999, policy=policy, remembered=waited))
    assert concluded(told, now=NOW + 18, policy=policy, remembered=waited).culprit == 2


@pytest.mark.parametrize(
    ("dispatched", "statuses", "progress"),
    [
        (2, ("Loading", "Loading"), {0: {"progress": (9, 16)}, 1: {"progress": (16, 16)}}),
        (4, ("Running", "Running"), {0: {"progress": (9, 60)}}),
        (4, ("Ready", "Running"), {}),
    ],
)
def test_a_rank_that_may_have_to_wait_for_the_others_is_not_blamed_while_they_move(
    dispatched: int, statuses: tuple[str, ...], progress: dict[int, dict[str, Any]]
) -> None:
    told = picture(*statuses, dispatched=dispatched, ranks=progress)
    others_move = memory(progress_at=NOW + 500, moved={0: NOW + 500, 1: NOW}, asked_at=NOW)
    assert goes_on(act(told, now=NOW + 501, remembered=others_move))


def test_ranks_that_have_all_arrived_are_never_stalled() -> None:
    action = act(picture("Connected", "Connected", dispatched=1), now=NOW + 10_000)
    assert isinstance(action, PassGate), "the dispatch may have been held up, the ranks were not"


def test_a_generation_in_which_nothing_moves_ends_the_attempt() -> None:
    told = picture("Running", "Ready", dispatched=4)
    policy = Policy(generate_stall=10)
    assert isinstance(act(told, now=NOW + 9.999, policy=policy), Serve)
    verdict = concluded(told, now=NOW + 10, policy=policy)
    assert (verdict.culprit, verdict.reason) == (0, "rank 0 generated nothing for 10 s")


def test_where_several_ranks_generate_nothing_it_is_not_said_whose_fault_that_is() -> None:
    verdict = concluded(picture("Running", "Running", dispatched=4), now=NOW + POLICY.generate_stall)
    assert verdict.culprit is None
    assert "rank 0, rank 1" in verdict.reason


def test_a_group_without_work_is_never_stalled() -> None:
    assert isinstance(act(picture("Ready", "Ready", dispatched=4), now=NOW + 10**6), Serve)


# --- stopping -------------------------------------------------------------------------------------------------------------


def test_a_stop_ends_the_attempt_that_goes_on_and_then_there_is_nothing_left_to_do() -> None:
    stopping = memory(stopping=True)
    verdict = concluded(picture("Ready", "Ready", dispatched=4), remembered=stopping)
    assert verdict == Verdict.stopped()
    over = act(picture("Ready", "Ready", dispatched=4, verdict=verdict), remembered=stopping)
    assert isinstance(over, Finished)


@pytest.mark.parametrize("told", [absent("Idle", "-"), absent("Idle", "Idle"), picture("Idle", "Idle", verdict=FAILED)])
def test_where_nothing_goes_on_a_stop_is_done_at_once(told: Snapshot) -> None:
    assert isinstance(act(told, remembered=memory(stopping=True)), Finished)


def test_a_stop_waits_for_nothing() -> None:
    told = picture("-", "-", dispatched=4)
    held = memory(stopping=True, hold_until=NOW + 100, backoff_until=NOW + 100)
    assert concluded(told, remembered=held).kind == "Stopped"


def test_a_stop_whose_record_was_lost_brings_it_back_first_so_that_the_ranks_learn_of_it() -> None:
    told = picture("Ready", "Ready", opened=False)
    assert isinstance(act(told, remembered=memory(stopping=True, epoch_lost_at=NOW)), RestoreEpoch)


def test_a_stop_whose_record_was_lost_for_good_tears_down_by_a_new_attempt() -> None:
    told = picture("Ready", "Loaded", opened=False)
    stopping = memory(stopping=True, epoch_lost_at=NOW)
    assert isinstance(act(told, remembered=stopping), Wait)
    assert isinstance(act(told, now=NOW + LEASE, remembered=stopping), OpenEpoch)


def test_a_stop_whose_record_was_lost_does_not_wait_for_ranks_that_are_gone() -> None:
    stopping = memory(stopping=True, epoch_lost_at=NOW)
    action = act(picture("Ready", "-", opened=False), now=NOW + LEASE, remembered=stopping)
    assert isinstance(action, Finished)
    assert action.reason == "stopped; some ranks were away and could not be told"


def test_a_stop_tears_down_whatever_the_last_attempt_came_to() -> None:
    told = picture("Ready", "Loaded", opened=False)
    for failure in (FAILED, HOPELESS):
        remembered = memory(stopping=True, epoch_lost_at=NOW - LEASE, last_failure=failure, backoff_until=NOW + 9)
        assert isinstance(act(told, remembered=remembered), OpenEpoch)


def test_a_stop_right_after_a_flush_gives_the_ranks_one_lease_to_say_where_they_are() -> None:
    flushed = memory(stopping=True, hold_until=NOW + LEASE, hold_reason="2 of 2 leases lapsed at once")
    assert isinstance(act(picture("-", "-", opened=False), remembered=flushed), Wait)
    assert isinstance(act(picture("-", "-", opened=False), now=NOW + LEASE, remembered=flushed), Finished)


def test_an_end_that_was_seen_still_counts_when_its_record_is_lost() -> None:
    """Regression: with the record went the pause, the budget, and the word that trying again is of no use."""
    lost = picture("Idle", "Idle", opened=False, ranks={0: {"epoch": None}, 1: {"epoch": None}})
    waiting = act(lost, remembered=memory(last_failure=FAILED, backoff_until=NOW + 3))
    assert isinstance(waiting, Wait)
    assert waiting.until == NOW + 3
    assert isinstance(act(lost, now=NOW + 3, remembered=memory(last_failure=FAILED, backoff_until=NOW + 3)), OpenEpoch)
    assert isinstance(act(lost, remembered=memory(last_failure=FAILED, charges={0: 99})), GiveUp)
    assert isinstance(act(lost, remembered=memory(last_failure=HOPELESS)), GiveUp)


def test_an_attempt_that_is_known_to_be_over_is_not_written_back() -> None:
    """Regression: record and log were lost before any rank had read the verdict, and all still agreed on the attempt."""
    agreed = picture("Ready", "Ready", opened=False)
    assert isinstance(act(agreed), RestoreEpoch)
    assert not isinstance(act(agreed, remembered=replace(memory(), accounted=EPOCH, last_failure=FAILED)), RestoreEpoch)
    later = EpochId(EPOCH.number + 1, "e" * 32)
    assert not isinstance(act(agreed, remembered=replace(memory(), accounted=later)), RestoreEpoch)
    gone_on = replace(agreed, log_end=LogId(EPOCH.number + 1, 1))
    assert not isinstance(act(gone_on), RestoreEpoch)


# --- whatever the picture -------------------------------------------------------------------------------------------------

STATUSES = [
    "Idle",
    "Connecting",
    "Connected",
    "Loading",
    "Loaded",
    "WarmingUp",
    "Ready",
    "Running",
    "Failed",
    "-",
    "New",
]
CHANGES = st.sampled_from(
    [
        {},
        {},
        {"epoch": None},
        {"epoch": LATER},
        {"incarnation": life(0, 4)},
        {"incarnation": life(9, 9)},
        {"digest": "ab"},
        {"world_size": 9},
        {"applied": 99},
        {"outcomes": (outcome("load", 3),)},
        {"outcomes": (outcome("load", 3, code="Stale"),)},
    ]
)


@st.composite
def pictures(draw: st.DrawFn) -> Snapshot:
    size = draw(st.integers(1, 4))
    common = draw(st.sampled_from(STATUSES))
    statuses = [draw(st.sampled_from([common, common, common, *STATUSES])) for _ in range(size)]
    return picture(
        *statuses,
        dispatched=draw(st.integers(0, len(steps_for(size)))),
        ranks={number: draw(CHANGES) for number in range(size)},
        opened=draw(st.booleans()),
        verdict=draw(st.sampled_from([None, None, None, FAILED, HOPELESS, Verdict.stopped()])),
        unreadable=draw(st.sampled_from(["", "", "it is damaged"])),
    )


@given(
    told=pictures(),
    later=st.sampled_from([0.0, 1.0, LEASE, 1_000.0]),
    remembered=st.builds(
        memory,
        stopping=st.booleans(),
        epoch_lost_at=st.sampled_from([None, NOW]),
        hold_until=st.sampled_from([float("-inf"), NOW + 0.5]),
        charges=st.sampled_from([{}, {0: 99}]),
    ),
)
def test_whatever_the_picture_there_is_one_action_with_a_reason_and_no_gate_opens_early(
    told: Snapshot, later: float, remembered: Memory
) -> None:
    action = act(told, now=NOW + later, remembered=remembered)
    if isinstance(action, Wait | PassGate | Serve):
        assert action.until > NOW + later or isinstance(action, PassGate), "no time is waited for that has passed"
    if isinstance(action, PassGate) and action.step.name == "load":
        wanted = "Idle" if told.world_size == 1 else "Connected"
        assert action.requirement == (RankRule(0, told.world_size - 1, (wanted,)),)
    if isinstance(action, PassGate | Serve | Conclude):
        assert told.epoch is not None
        assert told.epoch.verdict is None
    if isinstance(action, Serve):
        assert is_serving(told)
    assert not re.search(r"[{}<>]|None", action.reason), "a reason is a sentence, not a repr"

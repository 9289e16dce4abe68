"""How a step is added to the life of a rank: one row, and one turn of the planner. The rest follows, as is shown here.

The step is a verification between loading and warming up. Nothing of the product is changed for it: this file makes a table of its own
and asks what follows from it. Whoever adds a real step also writes its task and statuses (`runner.messages`), the fields of its task
(`planner.tasks`) and the call of the engine (`runner.runner`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from barrier import EpochId, RankRule
from planner import InstanceSpec, Policy
from planner.lifecycle import TURNS, Turn, everyone, proofs_of, steps_of
from planner.tasks import task_for
from runner.admission import Accept, Judgement, NotYet, Promise, Stale, Standing, judge
from runner.lifecycle import CONNECT, GENERATE, LOAD, WARM_UP, Lifecycle, Row
from runner.messages import LoadModel, ModelSpec, StartWarmup, StatusName, Task

VERIFY = Row("VerifyModel", entry="Loaded", during="Verifying", after="Verified", call="verify")
"""The row: when the task may begin, and what the rank is called during the work and after it."""

LIFE = Lifecycle((CONNECT, LOAD, VERIFY, replace(WARM_UP, entry="Verified"), GENERATE))
"""The table with the row in it. What comes next begins where the new step ends."""

TURN = Turn("VerifyModel", (("verify", everyone),), "load_stall")
"""What the planner adds: all ranks are told at once, and one that stands still for the load's time is at fault."""

WAY = (*TURNS[:2], TURN, *TURNS[2:])


def test_01_a_row_must_begin_where_the_one_before_it_ends() -> None:
    with pytest.raises(ValueError, match="StartWarmup begins in Loaded, and VerifyModel before it ends in Verified"):
        Lifecycle((CONNECT, LOAD, VERIFY, WARM_UP, GENERATE))


def test_02_the_statuses_are_on_the_way() -> None:
    """By this order a planner tells who is furthest behind, and a runner tells early from late."""
    way = LIFE.order[LIFE.order.index("Loaded") : LIFE.order.index("Ready")]
    assert way == ("Loaded", "Verifying", "Verified", "WarmingUp")


# --- what a runner accepts ------------------------------------------------------------------------------------------------

EPOCH = EpochId(7, "a" * 32)


def asked(task: Task, status: str) -> Judgement:
    """What one of three ranks answers in a status."""
    standing = Standing("demo", cast("StatusName", status), "me", Promise(EPOCH, "me", 3), EPOCH.number)
    return judge(standing, task, LIFE)


def test_03_the_task_is_accepted_where_the_row_says_and_nowhere_else() -> None:
    given: dict[str, Any] = {"task_id": "t", "instance": "demo", "epoch": str(EPOCH), "term": 1}
    verify = StartWarmup.model_construct(None, **given, kind="VerifyModel")  # a real one has a class of its own
    load, warm_up = LoadModel(**given, model=ModelSpec(model_id="m", total_layers=1)), StartWarmup(**given)

    assert asked(verify, "Loading") == NotYet(
        "VerifyModel needs Loaded, this runner is Loading; wait for Loaded at the barrier"
    )
    assert asked(verify, "Loaded") == Accept()
    assert asked(verify, "Verified") == Stale("VerifyModel needs Loaded, this runner is Verified already")

    assert isinstance(asked(warm_up, "Loaded"), NotYet), "to warm up comes after it now"
    assert asked(warm_up, "Verified") == Accept()
    assert isinstance(asked(load, "Verified"), Stale)


# --- what a planner dispatches --------------------------------------------------------------------------------------------


def all_three(*statuses: str) -> tuple[RankRule, ...]:
    return (RankRule(0, 2, statuses),)


def test_04_the_planner_waits_for_the_new_status_before_it_goes_on() -> None:
    steps = steps_of(LIFE, WAY, 3)
    assert [(step.name, step.waits_for(3), step.dispatches, step.stall) for step in steps] == [
        ("connect", all_three("Idle"), "ConnectToGroup", "connect_stall"),
        ("load", all_three("Connected"), "LoadModel", "connect_stall"),
        ("verify", all_three("Loaded"), "VerifyModel", "load_stall"),
        ("warm up followers", all_three("Verified"), "StartWarmup", "load_stall"),
        (
            "warm up leader",
            (RankRule(0, 0, ("Verified",)), RankRule(1, 2, ("WarmingUp", "Ready"))),
            "StartWarmup",
            "warmup_stall",
        ),
    ]


def test_05_a_single_rank_has_the_step_too() -> None:
    """It has nobody to connect to, so that it begins with the load; the other rows hold for it as they are."""
    steps = steps_of(LIFE, WAY, 1)
    waits = [(step.name, step.waits_for(1)[0].statuses) for step in steps]
    assert waits == [("load", ("Idle",)), ("verify", ("Loaded",)), ("warm up leader", ("Verified",))]


def test_06_a_row_without_a_turn_is_never_dispatched() -> None:
    """So a step that was forgotten here is missed by the first test of a whole attempt: nobody ever warms up."""
    assert "verify" not in [step.name for step in steps_of(LIFE, TURNS, 3)]


# --- what a status proves -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "rank", "last"),
    [
        ("Loaded", 0, "load"),
        ("Verifying", 0, "verify"),
        ("Verified", 2, "verify"),
        ("WarmingUp", 2, "warm up followers"),
        ("WarmingUp", 0, "warm up leader"),
    ],
)
def test_07_whoever_is_in_a_status_was_told_all_steps_up_to_it(status: str, rank: int, last: str) -> None:
    """By this a planner sees that a store went back, and knows what a lost record must have said."""
    steps = steps_of(LIFE, WAY, 3)
    proven = next(told for first, end, told in proofs_of(LIFE, steps, status, 3) if first <= rank <= end)
    names = [step.name for step in steps]
    assert proven == tuple(names[: names.index(last) + 1])


def test_08_a_step_whose_task_nobody_makes_is_told() -> None:
    verify = next(step for step in steps_of(LIFE, WAY, 3) if step.name == "verify")
    spec = InstanceSpec(name="demo", world_size=3)
    with pytest.raises(ValueError, match="step verify dispatches VerifyModel, and this function makes no such task"):
        task_for(verify, spec, EPOCH, 1, Policy())

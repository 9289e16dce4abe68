"""The table, row by row, for one rank, two and eight. Written out here, not derived from the table under test."""

from __future__ import annotations

import pytest

from barrier import EpochId, RankRule
from planner.lifecycle import (
    next_step,
    predecessor,
    proven_steps,
    serving_requirement,
    steps_for,
)
from planner.policy import Policy
from planner.spec import InstanceSpec
from planner.tasks import generation_task, task_for
from runner.messages import ConnectToGroup, LoadModel, ModelSpec, TextGeneration, encode
from tests.unit.planner.pictures import EPOCH, spec

CONNECT, LOAD, FOLLOWERS, LEADER = "connect", "load", "warm up followers", "warm up leader"


def everyone(size: int, *statuses: str) -> tuple[RankRule, ...]:
    return (RankRule(0, size - 1, statuses),)


@pytest.mark.parametrize("size", [2, 8])
def test_the_table_of_several_ranks(size: int) -> None:
    rows = [(row.name, row.waits_for(size), row.dispatches, row.to(size), row.stall) for row in steps_for(size)]
    followers_warm = (RankRule(0, 0, ("Loaded",)), RankRule(1, size - 1, ("WarmingUp", "Ready")))
    assert rows == [
        (CONNECT, everyone(size, "Idle"), "ConnectToGroup", (0, size - 1), "connect_stall"),
        (LOAD, everyone(size, "Connected"), "LoadModel", (0, size - 1), "connect_stall"),
        (FOLLOWERS, everyone(size, "Loaded"), "StartWarmup", (1, size - 1), "load_stall"),
        (LEADER, followers_warm, "StartWarmup", (0, 0), "warmup_stall"),
    ]


def test_the_table_of_a_single_rank_has_nobody_to_connect_to_and_no_followers() -> None:
    rows = [(row.name, row.waits_for(1), row.dispatches, row.to(1), row.stall) for row in steps_for(1)]
    assert rows == [
        (LOAD, everyone(1, "Idle"), "LoadModel", (0, 0), "connect_stall"),
        (LEADER, everyone(1, "Loaded"), "StartWarmup", (0, 0), "load_stall"),
    ]


@pytest.mark.parametrize("size", [1, 2, 8])
def test_serving_needs_every_rank_ready_or_running(size: int) -> None:
    assert serving_requirement(size) == everyone(size, "Ready", "Running")


@pytest.mark.parametrize("size", [1, 2, 8])
def test_every_rule_of_every_row_covers_every_rank_once(size: int) -> None:
    for row in [*(step.waits_for(size) for step in steps_for(size)), serving_requirement(size)]:
        covered = [rank for rule in row for rank in range(rule.first, rule.last + 1)]
        assert covered == list(range(size))


@pytest.mark.parametrize(
    ("size", "dispatched", "expected"),
    [
        (4, (), CONNECT),
        (4, (CONNECT,), LOAD),
        (4, (CONNECT, LOAD), FOLLOWERS),
        (4, (CONNECT, LOAD, FOLLOWERS), LEADER),
        (4, (CONNECT, LOAD, FOLLOWERS, LEADER), None),
        (4, ("generate gen.1",), CONNECT),
        (1, (), LOAD),
        (1, (LOAD,), LEADER),
        (1, (LOAD, LEADER), None),
    ],
)
def test_the_next_step_is_the_first_that_was_not_dispatched(
    size: int, dispatched: tuple[str, ...], expected: str | None
) -> None:
    step = next_step(dispatched, size)
    assert (step.name if step else None) == expected


@pytest.mark.parametrize(
    ("size", "before"),
    [(1, ["", LOAD]), (2, ["", CONNECT, LOAD, FOLLOWERS]), (8, ["", CONNECT, LOAD, FOLLOWERS])],
)
def test_each_row_names_the_one_before_it(size: int, before: list[str]) -> None:
    assert [predecessor(step, size) for step in steps_for(size)] == before


ALL = (CONNECT, LOAD, FOLLOWERS, LEADER)


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize(
    ("status", "of_rank_0", "of_a_follower"),
    [
        ("Idle", 0, 0),
        ("Connecting", 1, 1),
        ("Connected", 1, 1),
        ("Loading", 2, 2),
        ("Loaded", 2, 2),
        ("WarmingUp", 4, 3),
        ("Ready", 4, 3),
        ("Running", 4, 3),
        ("ShuttingDown", 0, 0),
        ("Shutdown", 0, 0),
        ("Failed", 0, 0),
        ("NotAStatus", 0, 0),
    ],
)
def test_what_a_status_proves_to_have_been_dispatched(
    size: int, status: str, of_rank_0: int, of_a_follower: int
) -> None:
    assert proven_steps(status, 0, size) == ALL[:of_rank_0]
    assert proven_steps(status, size - 1, size) == ALL[:of_a_follower]


@pytest.mark.parametrize(
    ("status", "proven"),
    [
        ("Idle", ()),
        ("Connecting", ()),  # nothing of a single rank's table leads there
        ("Loading", (LOAD,)),
        ("Loaded", (LOAD,)),
        ("WarmingUp", (LOAD, LEADER)),
        ("Ready", (LOAD, LEADER)),
    ],
)
def test_what_a_status_of_a_single_rank_proves(status: str, proven: tuple[str, ...]) -> None:
    assert proven_steps(status, 0, 1) == proven


def test_the_connect_task_gives_the_engines_less_time_than_the_planner_has_patience() -> None:
    task = task_for(steps_for(3)[0], spec(3), EPOCH, 9, Policy(connect_stall=50))
    assert isinstance(task, ConnectToGroup)
    assert task.deadline == 40
    assert (task.instance, task.epoch, task.term) == ("demo", str(EPOCH), 9)


@pytest.mark.parametrize("world_size", [2, 16_384])
def test_no_task_grows_with_the_number_of_ranks(world_size: int) -> None:
    sizes = [len(encode(task_for(step, spec(world_size), EPOCH, 9, Policy()))) for step in steps_for(world_size)]
    assert max(sizes) < 400


def test_the_load_task_carries_the_model() -> None:
    model = ModelSpec(model_id="some/model", total_layers=3)
    wanted = InstanceSpec(name="demo", world_size=2, model=model)
    task = task_for(steps_for(2)[1], wanted, EPOCH, 9, Policy())
    assert isinstance(task, LoadModel)
    assert task.model == model


def test_task_ids_are_derived_so_that_asking_again_names_the_same_task() -> None:
    for step in steps_for(2):
        first, again = task_for(step, spec(2), EPOCH, 9, Policy()), task_for(step, spec(2), EPOCH, 10, Policy())
        assert first.task_id == again.task_id, "a later leader asks for the same task"


def test_task_ids_differ_for_every_step_epoch_nonce_and_instance() -> None:
    other_nonce = EpochId(EPOCH.number, "c" * 32)
    other_number, other_name = EpochId(EPOCH.number + 1, EPOCH.nonce), InstanceSpec(name="other", world_size=2)
    ids = [
        task_for(step, wanted, epoch, 9, Policy()).task_id
        for step in steps_for(2)
        for wanted, epoch in [(spec(2), EPOCH), (spec(2), other_nonce), (spec(2), other_number), (other_name, EPOCH)]
    ]
    assert len(set(ids)) == len(ids) == 16


def test_a_generation_keeps_the_id_of_its_request_and_shows_no_prompt_in_its_repr() -> None:
    task = generation_task("gen.1", "a secret prompt", 7, instance="demo", epoch=EPOCH, term=9)
    assert isinstance(task, TextGeneration)
    assert (task.task_id, task.max_tokens, task.epoch) == ("gen.1", 7, str(EPOCH))
    assert "secret" not in repr(task)
    assert b"a secret prompt" in encode(task)

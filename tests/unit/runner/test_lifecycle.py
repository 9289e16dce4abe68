"""The table of a rank's life against what is written by hand."""

from __future__ import annotations

from typing import get_args

import pytest

from runner.lifecycle import LIFECYCLE, TABLE, Lifecycle, may_follow
from runner.messages import StatusName, TaskKind
from tests.unit.runner.expectations import EXPECTED, KINDS
from tests.unit.runner.rig import WAY


def test_the_table_has_the_statuses_of_the_messages_in_their_order() -> None:
    assert LIFECYCLE.order == get_args(StatusName)


def test_the_table_has_the_tasks_of_the_messages() -> None:
    assert {row.task for row in TABLE} | {"CancelTask", "Shutdown"} == set(get_args(TaskKind))
    assert [(row.task, row.call, row.during, row.after) for row in TABLE] == list(WAY)


@pytest.mark.parametrize("world_size", EXPECTED)
def test_what_is_accepted_is_what_is_written_by_hand(world_size: int) -> None:
    for status, kind in EXPECTED[world_size]:
        accepted = EXPECTED[world_size][status, kind].__name__ == "Accept"
        assert (kind in LIFECYCLE.accepts(status, world_size)) is accepted, (status, kind)
    assert set(KINDS) == set(get_args(TaskKind))


@pytest.mark.parametrize(
    ("status", "several", "alone"),
    [
        ("Preparing", 0, 0), ("Idle", 0, 0), ("Connecting", 1, 0), ("Connected", 1, 0), ("Loading", 2, 1), ("Loaded", 2, 1),
        ("WarmingUp", 3, 2), ("Ready", 3, 2), ("Running", 4, 3), ("Failed", 0, 0), ("Shutdown", 0, 0), ("of nobody", 0, 0),
    ],
)  # fmt: skip
def test_what_a_status_proves_to_have_begun(status: str, several: int, alone: int) -> None:
    way = ("ConnectToGroup", "LoadModel", "StartWarmup", "TextGeneration")
    assert LIFECYCLE.proves(status, 2) == way[:several]
    assert LIFECYCLE.proves(status, 1) == way[1 : 1 + alone]


def test_a_rank_serves_between_texts_and_in_them() -> None:
    assert LIFECYCLE.serving == ("Ready", "Running")


def test_the_statuses_after_a_task() -> None:
    assert LIFECYCLE.since("LoadModel") == ("Loaded", "WarmingUp", "Ready", "Running")


def test_a_row_that_does_not_fit_is_refused() -> None:
    with pytest.raises(
        ValueError, match="StartWarmup begins in Loaded, and ConnectToGroup before it ends in Connected"
    ):
        Lifecycle((TABLE[0], TABLE[2]))


@pytest.mark.parametrize(
    ("status", "before", "may"),
    [
        ("Loaded", "Loading", True), ("Failed", "Loading", True), ("Loaded", "Failed", False), ("ShuttingDown", "Failed", True),
        ("Failed", "ShuttingDown", False), ("Ready", "ShuttingDown", False), ("Shutdown", "ShuttingDown", True), ("Failed", "Failed", True),
    ],
)  # fmt: skip
def test_work_under_way_undoes_neither_a_failure_nor_a_departure(status: str, before: str, may: bool) -> None:
    assert may_follow(status, before) is may

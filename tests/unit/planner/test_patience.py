"""Times of the policy: as options of the planner, and as an instance's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from barrier import InvalidSettings, Settings
from planner.cli.instance_file import read_instance_file
from planner.policy import PATIENCE, Policy
from planner.spec import InstanceSpec

SETTINGS = Settings()
"""A lease of 6 s and a heartbeat of 2 s."""


def spec(**patience: float) -> InstanceSpec:
    return InstanceSpec(name="demo", world_size=2, patience=patience)


def test_an_instance_may_have_times_of_its_own() -> None:
    policy = Policy(load_stall=100, connect_stall=50).for_instance(spec(load_stall=5).patience, SETTINGS)
    assert (policy.load_stall, policy.connect_stall) == (5, 50)


@pytest.mark.parametrize(
    ("own", "base", "cap"),
    [
        ({"backoff_base": 60.0}, 60.0, 60.0),
        ({"backoff_cap": 0.1}, 0.1, 0.1),
        ({"backoff_base": 1.0, "backoff_cap": 2.0}, 1.0, 2.0),
    ],
)
def test_of_two_pauses_that_contradict_each_other_the_instance_s_own_counts(
    own: dict[str, float], base: float, cap: float
) -> None:
    policy = Policy(backoff_base=0.5, backoff_cap=30).for_instance(spec(**own).patience, SETTINGS)
    assert (policy.backoff_base, policy.backoff_cap) == (base, cap)


def test_a_stall_that_no_rank_could_meet_is_not_taken() -> None:
    with pytest.raises(InvalidSettings, match="load_stall is 3 s and the heartbeat is 2 s"):
        Policy(load_stall=3).check(SETTINGS)
    Policy(load_stall=4).check(SETTINGS)
    assert Policy().for_instance(spec(load_stall=0.1).patience, SETTINGS).load_stall == 4


@pytest.mark.parametrize(
    ("patience", "sentence"),
    [
        ({"stall": 5.0}, "an instance has no time named 'stall'; it may have prepare_stall, connect_stall"),
        ({"load_stall": 0.0}, "load_stall is 0 s; it must be a finite number of seconds above 0"),
        ({"load_stall": float("inf")}, "load_stall is inf s"),
        ({"backoff_base": 5.0, "backoff_cap": 1.0}, "backoff_cap is 1 s and backoff_base is 5 s"),
    ],
)
def test_times_that_make_no_sense_are_refused(patience: dict[str, float], sentence: str) -> None:
    with pytest.raises(InvalidSettings, match=sentence):
        spec(**patience)


def test_they_are_no_part_of_what_ranks_must_agree_on_and_are_told_as_a_change() -> None:
    before, after = spec(), spec(load_stall=5)
    assert before.digest == after.digest
    assert before.changes_to(after) == [("patience.load_stall", "-", "5.0")]
    assert "patience" not in before.model_dump(), "planners of earlier versions do not know it"


def test_each_of_them_is_a_key_of_the_instance_file(tmp_path: Path) -> None:
    file = tmp_path / "instance.toml"
    lines = [f"{name} = {number}" for number, name in enumerate(PATIENCE, 5)]
    file.write_text("\n".join(['name = "demo"', "world_size = 2", *lines]))
    assert read_instance_file(file).patience == {name: float(number) for number, name in enumerate(PATIENCE, 5)}
    file.write_text('name = "demo"\nworld_size = 2\nload_stall = "soon"')
    with pytest.raises(InvalidSettings, match="load_stall is 'soon'; it must be a number of seconds above 0"):
        read_instance_file(file)

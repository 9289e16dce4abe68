"""Numbers that contradict one another are refused with both values; every refusal says the way out."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from barrier import InvalidSettings, Settings

NUMBERS = [field.name for field in fields(Settings)]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), "6", True])
def test_every_number_must_be_finite_and_above_0(name: str, value: Any) -> None:
    with pytest.raises(InvalidSettings) as refusal:
        Settings(**{name: value})
    assert name in str(refusal.value)
    assert repr(value) in str(refusal.value)
    assert "finite number above 0" in str(refusal.value)


@pytest.mark.parametrize("name", [name for name in NUMBERS if name != "command_timeout"])
def test_only_the_command_timeout_has_a_derived_value_and_may_be_none(name: str) -> None:
    assert Settings(command_timeout=None).command_seconds == pytest.approx(6.0 / 5)
    nothing: Any = {name: None}
    with pytest.raises(InvalidSettings, match=f"{name} is None"):
        Settings(**nothing)


@pytest.mark.parametrize("name", ["log_entries", "signal_entries", "event_entries"])
def test_entries_are_counted_in_whole_numbers(name: str) -> None:
    half: Any = {name: 1.5}
    with pytest.raises(InvalidSettings, match=rf"{name} is 1\.5; it counts entries"):
        Settings(**half)


def test_a_heartbeat_above_a_third_of_the_lease_is_refused_with_both_values_and_both_ways_out() -> None:
    with pytest.raises(InvalidSettings) as refusal:
        Settings(lease=6.0, heartbeat=2.5)
    assert str(refusal.value) == (
        "heartbeat is 2.5 s and lease is 6 s; the heartbeat must be at most a third of the lease, so that two may be lost: "
        "set heartbeat to 2 or less, or lease to 7.5 or more"
    )


def test_a_heartbeat_of_exactly_a_third_is_allowed() -> None:
    assert Settings(lease=3.0, heartbeat=1.0).heartbeat == 1.0
    assert Settings(lease=0.6, heartbeat=0.2).heartbeat == 0.2, "also where a third is not exact in binary"


@given(st.floats(0.1, 1_000.0), st.floats(0.1, 1_000.0))
def test_the_way_out_that_the_refusal_names_is_one(lease: float, heartbeat: float) -> None:
    try:
        Settings(lease=lease, heartbeat=heartbeat)
    except InvalidSettings as refusal:
        found = re.search(r"set heartbeat to (\S+) or less, or lease to (\S+) or more", str(refusal))
        assert found is not None
        Settings(lease=lease, heartbeat=float(found[1]))
        Settings(lease=float(found[2]), heartbeat=heartbeat)


def test_a_heartbeat_longer_than_the_lease_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="heartbeat is 10 s and lease is 6 s"):
        Settings(heartbeat=10.0)


def test_a_command_timeout_above_half_the_lease_is_refused_with_both_values() -> None:
    with pytest.raises(InvalidSettings) as refusal:
        Settings(lease=6.0, command_timeout=3.5)
    assert str(refusal.value) == (
        "command_timeout is 3.5 s and lease is 6 s; it must be at most half the lease: set it to 3 or less"
    )


def test_a_record_that_would_not_outlive_a_lease_is_refused_with_both_values() -> None:
    with pytest.raises(InvalidSettings) as refusal:
        Settings(lease=6.0, record_lifetime=5.0)
    assert "record_lifetime is 5 s and lease is 6 s" in str(refusal.value)


def test_a_lease_that_no_network_can_renew_in_time_is_refused() -> None:
    with pytest.raises(InvalidSettings, match=r"lease is 0\.04 s; it must be at least 0\.05 s"):
        Settings(lease=0.04, heartbeat=0.01)


def test_the_derived_times_follow_the_lease() -> None:
    settings = Settings(lease=10.0, heartbeat=1.0)
    assert settings.command_seconds == pytest.approx(2.0)
    assert settings.distrust_after == pytest.approx(8.0)
    assert settings.reread_after == pytest.approx(5.0)


def test_an_explicit_command_timeout_wins_and_moves_the_margin() -> None:
    settings = Settings(lease=10.0, heartbeat=1.0, command_timeout=0.5)
    assert settings.command_seconds == 0.5
    assert settings.distrust_after == pytest.approx(9.5)


def test_settings_do_not_change_after_they_were_checked() -> None:
    settings: Any = Settings()
    with pytest.raises(FrozenInstanceError):
        settings.lease = 0.0

"""A driver's error becomes one of ours, once, with the address and without passwords, arguments or script positions."""

from __future__ import annotations

import asyncio

import pytest
from redis import exceptions as driver

from barrier import (
    RankgateError,
    StoreCorrupt,
    StoreError,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    StoreUnsuitable,
)
from barrier.store import translated

SHA = "0123456789abcdef" * 2 + "01234567"

CASES: list[tuple[BaseException, type[StoreError]]] = [
    (driver.ConnectionError("Error 111 connecting to h:1. Connection refused."), StoreUnavailable),
    (driver.TimeoutError("Timeout reading from h:1"), StoreUnavailable),
    (driver.BusyLoadingError("Redis is loading the dataset in memory"), StoreUnavailable),
    (driver.MaxConnectionsError("Too many connections"), StoreUnavailable),
    (OSError(9, "Bad file descriptor"), StoreUnavailable),
    (asyncio.IncompleteReadError(b"", 4), StoreUnavailable),
    (driver.ResponseError("MASTERDOWN Link with MASTER is down"), StoreUnavailable),
    (driver.ResponseError("BUSY Redis is busy running a script."), StoreUnavailable),
    (driver.ResponseError("UNBLOCKED force unblock from blocking operation"), StoreUnavailable),
    (driver.ResponseError("MISCONF Redis is configured to save RDB snapshots"), StoreUnavailable),
    (driver.RedisError("something else"), StoreUnavailable),
    (driver.AuthenticationError("invalid username-password pair or user is disabled."), StoreRefused),
    (driver.NoPermissionError("this user has no permissions to run the 'evalsha' command"), StoreRefused),
    (driver.ResponseError("NOAUTH Authentication required."), StoreRefused),
    (driver.ResponseError("WRONGPASS invalid username-password pair"), StoreRefused),
    (driver.ResponseError(f"ERR NOPERM No permissions to access a key script: {SHA}, on @user_script:9."), StoreRefused),
    (driver.ReadOnlyError("You can't write against a read only replica."), StoreUnsuitable),
    (driver.ResponseError(f"READONLY You can't write against a read only replica. script: {SHA}"), StoreUnsuitable),
    (driver.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."), StoreFull),
    (driver.ResponseError(f"OOM command not allowed when used memory > 'maxmemory'. script: {SHA}, on @x:1."), StoreFull),
    (driver.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"), StoreCorrupt),
    (driver.ResponseError("RANKGATE_CORRUPT {a:b}:epoch holds a list where a hash belongs"), StoreCorrupt),
    (driver.ResponseError("ERR something never seen"), StoreCorrupt),
]  # fmt: skip


@pytest.mark.parametrize(
    ("raised", "ours"), CASES, ids=[f"{type(one).__name__}-{index}" for index, (one, _) in enumerate(CASES)]
)
def test_each_error_becomes_one_of_ours(raised: BaseException, ours: type[StoreError]) -> None:
    with pytest.raises(StoreError) as translation, translated("h:1"):
        raise raised
    assert type(translation.value) is ours
    assert translation.value.__cause__ is raised
    said = str(translation.value)
    assert said
    assert "\n" not in said
    assert SHA not in said, "a script's position means nothing to the reader"
    assert "h:1" in said or "{a:b}:epoch" in said


def test_ours_pass_through_unchanged() -> None:
    mine = StoreFull("full")
    with pytest.raises(StoreFull) as passed, translated("h:1"):
        raise mine
    assert passed.value is mine


@pytest.mark.parametrize("raised", [KeyError("x"), asyncio.CancelledError(), KeyboardInterrupt()])
def test_what_is_not_the_stores_is_left_alone(raised: BaseException) -> None:
    with pytest.raises(type(raised)), translated("h:1"):
        raise raised


def test_long_and_multi_line_messages_are_cut_to_one_line() -> None:
    with pytest.raises(StoreCorrupt) as translation, translated("h:1"):
        raise driver.ResponseError("ERR " + "very\nlong " * 500)
    assert len(str(translation.value)) < 500
    assert "\n" not in str(translation.value)


def test_every_error_is_a_rankgate_error_and_says_unknown_never_released() -> None:
    assert issubclass(StoreError, RankgateError)
    assert {ours for _, ours in CASES} == {
        StoreUnavailable, StoreRefused, StoreUnsuitable, StoreFull, StoreCorrupt
    }, "every kind is met above"  # fmt: skip

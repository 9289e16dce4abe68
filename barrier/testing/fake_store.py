"""One in-memory store for any number of clients, with the switches that a test wants."""

from __future__ import annotations

import asyncio
import copy
import math
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

try:
    import fakeredis
    from fakeredis.aioredis import FakeAsyncRedisConnection, FakeReader, FakeWriter
except ImportError as _missing:
    raise ImportError("barrier.testing needs fakeredis: pip install 'rankgate[testing]'") from _missing
if find_spec("lupa") is None:  # fakeredis works without, and then knows no scripts
    raise ImportError("barrier.testing needs lupa, which runs the scripts: pip install 'rankgate[testing]'")

from redis import exceptions as driver
from redis.asyncio import ConnectionPool, Redis

from barrier.store.connection import StoreConnection
from barrier.testing.fake_server import ServerSocket, WatchedDatabase
from barrier.testing.faults import FaultPlan, FaultyConnection, unpack_commands
from barrier.testing.manual_clock import ManualClock
from barrier.testing.names import CountsByName, one_of

__all__ = ["FakeStore", "StoreSnapshot"]


_SERVER_STARTED = 1_700_000_000.0
"""What the store's own clock says when a manual clock begins, in seconds since 1970."""

_HANDSHAKE = (b"AUTH", b"CLIENT", b"HELLO", b"SELECT")

_CUT = object()
"""In place of a reply: the connection is gone."""


@dataclass(frozen=True)
class StoreSnapshot:
    """An earlier state of all data; see `FakeStore.snapshot`."""

    databases: Mapping[int, Mapping[bytes, Any]]


class FakeStore:
    """A store in this process that runs the real scripts; `client` connects to it.

    It does **not** do the following, so no test with it can prove
    anything about this: it enforces no ACLs and no passwords, no ``maxmemory`` and no
    eviction; a command never times out by itself (a cut connection is reported at once, where a real network is silent); it has
    no INFO, so versions, roles and eviction policies stay unchecked, with a warning in the log, and no ROLE, replicas, Sentinel or
    Cluster. Test those against a real server.

    Args:
        clock: drives leases, BLOCK and the scripts' TIME as well. Without it the store's time is the machine's.
        server_type: ``redis`` or ``valkey``; differs in few messages.
    """

    def __init__(self, clock: ManualClock | None = None, *, server_type: str = "redis") -> None:
        self.clock = clock
        one_of("server_type", server_type, ("redis", "valkey"))
        self._names: dict[str, None] = {}
        self.server: Any = fakeredis.FakeServer(version=(7, 2), server_type=server_type)  # pyright: ignore[reportArgumentType]  a literal type that it keeps private
        self._databases: defaultdict[int, WatchedDatabase] = defaultdict(lambda: WatchedDatabase(self.server.lock))
        self.server.dbs = self._databases  # pyright: ignore[reportAttributeAccessIssue]  invariant, and never replaced
        self.sent: Counter[str] = CountsByName(self._names)
        """Round trips by client name: one call, or one MULTI, each; handshakes are not counted."""
        self.refused: Counter[str] = CountsByName(self._names)
        """Attempts to connect or to send by clients that are cut off, by name."""
        self._clock_began = clock.now() if clock else 0.0
        self._time_offset = 0.0
        self._in_server_time = False
        self._admin: Any = fakeredis.FakeStrictRedis(server=self.server)
        self._connections: weakref.WeakSet[_StoreConnection] = weakref.WeakSet()
        self._cut_names: set[str] = set()
        self._cut_off = False
        self._adopted = 0
        self._readers: dict[bytes, dict[ServerSocket, None]] = {}
        """By stream: who is blocked on it, longest first."""

    def client(self, name: str = "", *, faults: FaultPlan | None = None) -> Redis:
        """A new client, to be handed to `Barrier`, `Member` or a planner. All connections made from it share name and faults.

        Args:
            name: for `partition` and `sent`.
            faults: the faults on its connections.
        """
        self._names[name] = None
        pool = ConnectionPool(
            connection_class=_StoreConnection,
            server=self.server,
            fake_store=self,
            fake_name=name,
            fault_plan=faults,
            host="fakestore",
            port=6379,
            protocol=2,
        )
        return Redis.from_pool(pool)

    # --- the network --------------------------------------------------------------------------------------------------

    def partition(self, name: str | None = None) -> None:
        """Cut off all clients, or those of one name: their connections break, blocked reads included, and new ones fail.

        A client of that name may be made later: it is cut off from its beginning.
        """
        if name is None:
            self._cut_off = True
        else:
            self._cut_names.add(name)
        self._break_connections(name)

    def heal(self, name: str | None = None) -> None:
        """End the partition of one name; without a name, end all of them.

        Raises:
            ValueError: nobody of that name was cut off, and no client has it.
        """
        if name is None:
            self._cut_off = False
            self._cut_names.clear()
        else:
            self._cut_names.discard(one_of("client called", name, {*self._names, *self._cut_names}))

    def is_cut(self, name: str) -> bool:
        """Whether clients of this name are cut off."""
        return self._cut_off or name in self._cut_names

    # --- the server ---------------------------------------------------------------------------------------------------

    def restart(self, *, keep_data: bool) -> None:
        """Restart the server: connections break, scripts are forgotten, and the data too if it was not kept on disk."""
        if not keep_data:
            self.flush()
        self.forget_scripts()
        self._break_connections(None)

    def flush(self) -> None:
        """Delete all data, as FLUSHALL does; scripts stay."""
        with self.server_time():
            self._admin.flushall()

    def forget_scripts(self) -> None:
        """As SCRIPT FLUSH."""
        with self.server_time():
            self._admin.script_flush()

    def delete(self, *keys: str) -> int:
        """Delete keys; return how many there were."""
        with self.server_time():
            return int(self._admin.delete(*keys))

    def shift_time(self, seconds: float) -> None:
        """Step the server's own clock, forward or back, as an administrator or NTP does. `clock` is left alone."""
        self._time_offset += seconds

    # --- the data -----------------------------------------------------------------------------------------------------

    def snapshot(self) -> StoreSnapshot:
        """Remember all data as it is now, lifetimes included."""
        with self.server.lock:
            return StoreSnapshot({number: copy.deepcopy(dict(db)) for number, db in self.server.dbs.items()})

    def roll_back(self, to: StoreSnapshot) -> None:
        """Put an earlier state of all data back, as a failover to a replica that lagged does. Connections break.

        Lifetimes count on meanwhile: a report whose lease has passed since is gone.
        """
        with self.server.lock:
            for number, db in self.server.dbs.items():
                db.clear()
                for key, item in copy.deepcopy(to.databases.get(number, {})).items():
                    db[key] = item
                    db.notify_watch(key)
        self._break_connections(None)

    def keys(self) -> list[str]:
        """All keys, sorted."""
        with self.server_time():
            return sorted(key.decode() for key in self._admin.scan_iter(count=10_000))

    def keys_without_lifetime(self) -> list[str]:
        """Keys that would stay for ever; there must be none."""
        with self.server_time():
            return [key for key in self.keys() if self._admin.pttl(key) == -1]

    def contents(self) -> dict[str, Any]:
        """All data in readable form, to compare before and after. Lifetimes are left out."""
        with self.server_time():
            return {key: self._read(key) for key in self.keys()}

    @contextmanager
    def server_time(self) -> Generator[None]:
        """While inside, `time.time` gives the store's time.

        fakeredis takes its time from there, for lifetimes and for TIME. A command runs in one go, so this is entered for no
        longer than one command, and no other code of the event loop ever sees it.
        """
        if self._in_server_time or (self.clock is None and not self._time_offset):
            yield  # one command may set off another: a blocked reader goes on
            return
        real = time.time
        moment = self._time_offset + (
            real() if self.clock is None else _SERVER_STARTED + self.clock.now() - self._clock_began
        )
        time.time = lambda: moment
        self._in_server_time = True
        try:
            yield
        finally:
            time.time = real
            self._in_server_time = False

    def _read(self, key: str) -> Any:  # noqa: ANN401  whatever the key holds
        match self._admin.type(key):
            case b"string":
                return self._admin.get(key)
            case b"hash":
                return self._admin.hgetall(key)
            case b"stream":
                return self._admin.xrange(key)
            case b"list":
                return self._admin.lrange(key, 0, -1)
            case b"set":
                return self._admin.smembers(key)
            case kind:
                return f"a {kind.decode()}"

    def _break_connections(self, name: str | None) -> None:
        for connection in sorted(self._connections, key=lambda one: one.serial):  # the same order in every run
            if name is None or connection.fake_name == name:
                connection.cut()

    @property
    def has_clock(self) -> bool:
        """Whether a clock was given."""
        return self.clock is not None

    def block(self, socket: ServerSocket, streams: Iterable[bytes]) -> None:
        """Remember a connection that is blocked until one of these streams is written to."""
        for name in streams:
            self._readers.setdefault(name, {})[socket] = None

    def unblock(self, socket: ServerSocket) -> None:
        """Forget that a connection is blocked."""
        for readers in self._readers.values():
            readers.pop(socket, None)

    def wake_readers(self) -> None:
        """Let those who are blocked on streams that were written to look again."""
        for db in self._databases.values():
            written, db.written = db.written, {}
            for name in written:
                for socket in list(self._readers.get(name, ())):
                    socket.look_again()

    def adopt_connection(self, connection: _StoreConnection) -> None:
        """Know of a connection, to break it when asked."""
        self._adopted += 1
        connection.serial = self._adopted
        self._connections.add(connection)


class _Delivery(StoreConnection):
    """The last step to the server: passes commands on unpacked, because fakeredis would parse them in Python."""

    takes_standing = False

    @property
    def at_rest(self) -> bool:
        """Whether it is connected, and was not cut meanwhile."""
        sock: ServerSocket | None = getattr(self, "_sock", None)
        return self.is_connected and sock is not None and sock.responses.empty()

    async def send_packed_command(self, command: bytes | str | Iterable[bytes], check_health: bool = True) -> None:
        """Carry the commands out."""
        sock: ServerSocket | None = getattr(self, "_sock", None)
        if sock is None:
            raise driver.ConnectionError("the connection to the fake store is closed")
        sock.take(_joined(command))


class _StoreConnection(FaultyConnection, _Delivery, FakeAsyncRedisConnection):  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]  fakeredis against redis-py
    """A connection to a `FakeStore` that can be cut, and whose BLOCK follows the store's clock."""

    _sock: ServerSocket | None

    def __init__(self, *, fake_store: FakeStore, fake_name: str = "", **kwargs: Any) -> None:  # noqa: ANN401  as redis-py
        self._fake_store = fake_store
        self.fake_name = fake_name
        self._block_seconds = 0.0
        self.serial = 0
        super().__init__(**kwargs)
        self._reads_raw = not self.encoder.decode_responses
        fake_store.adopt_connection(self)

    async def _connect(self) -> None:
        self._refuse_if_cut()
        await super()._connect()
        self._sock = ServerSocket(  # pyright: ignore[reportIncompatibleVariableOverride]  ours is one of theirs
            self._fake_store,
            self._server,
            self.db,
            client_class=self._client_class,
            lua_modules=self._lua_modules,
            client_info=self._client_info,
        )
        self._reader, self._writer = FakeReader(self._sock), FakeWriter(self._sock)

    async def disconnect(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  as redis-py
        """Disconnect; a blocked read is forgotten."""
        if self._sock is not None:
            self._sock.abandon()
        await super().disconnect(*args, **kwargs)

    async def send_packed_command(self, command: bytes | str | Iterable[bytes], check_health: bool = True) -> None:
        """Send one call and count it. It takes a turn of the event loop, as the fastest network does: other tasks may run."""
        if not self.is_connected:
            await self.connect()  # its handshake comes through here too, so it must not come in the middle
        await asyncio.sleep(0)
        self._refuse_if_cut()
        packed = _joined(command)
        commands = unpack_commands(packed)
        if commands[0][0].upper() not in _HANDSHAKE:
            self._fake_store.sent[self.fake_name] += 1
        self._block_seconds = max(map(_block_seconds, commands)) if self._fake_store.clock else 0.0
        await super().send_packed_command(packed, check_health)

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  as redis-py
        """Read one reply; a blocking read ends by the store's clock."""
        sock, clock = self._sock, self._fake_store.clock
        if sock is not None and self._reads_raw and not self.deviates and sock.responses.next_is_plain():
            return sock.responses.get_nowait()
        if sock is None or clock is None or not self._block_seconds:
            return await self._read_reply(*args, **kwargs)
        alarm = asyncio.ensure_future(clock.sleep(self._block_seconds))
        alarm.add_done_callback(lambda alarm: None if alarm.cancelled() else sock.end_block())
        try:
            return await self._read_reply(*args, **kwargs)
        finally:
            alarm.cancel()

    async def _read_reply(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  as redis-py
        reply = await super().read_response(*args, **kwargs)
        if reply is _CUT:
            await self.disconnect(nowait=True)
            raise driver.ConnectionError(f"connection of {self.fake_name or 'a client'} to the fake store was cut")
        return reply

    async def _read_response(self, **kwargs: Any) -> Any:  # noqa: ANN401  as fakeredis
        """Wait for the next reply; without fakeredis' own polling where no deadline is asked for."""
        if self._sock is None or not self._fake_store.server.connected or kwargs.get("timeout") not in (None, math.inf):
            return await super()._read_response(**kwargs)
        return await self._sock.responses.get()

    def cut(self) -> None:
        """Break: a pending read fails now, and an idle connection is replaced when it is next taken from its pool."""
        if self._sock is not None:
            self._sock.abandon()
            self._sock.put_response(_CUT)

    def _refuse_if_cut(self) -> None:
        if self._fake_store.is_cut(self.fake_name):
            self._fake_store.refused[self.fake_name] += 1
            raise driver.ConnectionError(f"{self.fake_name or 'the client'} is cut off from the fake store")


def _joined(command: bytes | str | Iterable[bytes]) -> bytes:
    if isinstance(command, bytes):
        return command
    chunks = [command] if isinstance(command, str) else list(command)
    return b"".join(chunk.encode() if isinstance(chunk, str) else chunk for chunk in chunks)


def _block_seconds(command: list[bytes]) -> float:
    """How long a command blocks at the most; 0 if it does not."""
    words = [word.upper() for word in command[:8]]
    if words[0] not in (b"XREAD", b"XREADGROUP") or b"BLOCK" not in words:
        return 0.0
    return int(command[words.index(b"BLOCK") + 1]) / 1000

"""A faster server of fakeredis: simulations run thousands of histories on it.

The frequent commands skip what nobody here uses (rights, subscribers, notifications). Scripts are compiled once. A
write wakes only those who are blocked on that stream. What a command *does* is fakeredis' own code; the contract tests
compare the whole with real servers.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportOptionalMemberAccess=false, reportIncompatibleVariableOverride=false
# The workings of fakeredis, which this extends, are private and mostly untyped.
from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

from fakeredis import _msgs as msgs
from fakeredis._commands import COMMANDS_WITH_SUB, Key, Signature
from fakeredis._core import CommandItem, Database
from fakeredis._helpers import QUEUED, NoResponse, SimpleError, SimpleString
from fakeredis._socket._resp import convert_to_resp2
from fakeredis.aioredis import AsyncFakeSocket

from barrier.testing.faults import unpack_commands

__all__ = ["Replies", "ServerSocket", "WatchedDatabase"]


_PLAIN = frozenset((bytes, int, list, type(None)))
"""Types of replies that are passed on as they are, if nothing is decoded."""


_QUICK = frozenset(
    (
        "del", "eval", "evalsha", "exec", "exists", "get", "hexists", "hget", "hmget", "hset", "mget", "multi", "pexpire", "pttl",
        "set", "time", "type", "xadd", "xdel", "xlen", "xrange", "xread", "xrevrange",
    )
)  # fmt: skip
"""Commands that are run directly: they need no other database, no subscribers, no rights and no notifications."""

_SIMPLE = frozenset((bytes, int, SimpleString, NoResponse, type(None)))
"""Types that need no conversion for any client."""

_Plan: TypeAlias = tuple[list[tuple[int, Any]], list[tuple[int, Key]]]


@lru_cache(maxsize=1_000)
def _plan(signature: Signature, count: int, version: tuple[int, ...]) -> _Plan:
    """Which of so many arguments to decode, and which are keys. Raises fakeredis' error for a wrong number of them."""
    signature.check_arity([b""] * count, version)
    kinds = [*signature.fixed]
    kinds += [signature.repeat[i % len(signature.repeat)] for i in range(count - len(kinds))]
    return (
        [(place, kind) for place, kind in enumerate(kinds) if not isinstance(kind, Key) and kind is not bytes],
        [(place, kind) for place, kind in enumerate(kinds) if isinstance(kind, Key)],
    )


class WatchedDatabase(Database):
    """Remembers which keys were written: a write wakes only those who wait for that key."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  as fakeredis
        super().__init__(*args, **kwargs)
        self.written: dict[bytes, None] = {}

    def notify_watch(self, key: bytes) -> None:
        """A key was written."""
        self.written[key] = None
        super().notify_watch(key)


class _CompilingRuntime:
    """A Lua runtime that compiles each script once. fakeredis compiles it, and collects all garbage, at each call."""

    def __init__(self, runtime: Any) -> None:  # noqa: ANN401  lupa is untyped
        self._runtime = runtime
        self._compiled: dict[bytes | str, Callable[[], Any]] = {}
        self.table_from: Any = runtime.table_from
        self.globals: Any = runtime.globals

    def execute(self, code: bytes | str) -> Any:  # noqa: ANN401  whatever a script returns
        """Run a script. Lua collects its garbage by itself."""
        if code == "collectgarbage()":
            return None
        compiled = self._compiled.get(code)
        if compiled is None:
            compiled = self._compiled[code] = self._runtime.compile(code)
        return compiled()


class Replies(asyncio.Queue[Any]):
    """What the server has answered and the client has not read yet."""

    def next_is_plain(self) -> bool:
        """Whether a reply is there that is neither an error nor the end of the connection."""
        waiting: Sequence[Any] = self._queue  # pyright: ignore[reportAttributeAccessIssue]  what asyncio gives to subclasses it does not annotate
        return bool(waiting) and type(waiting[0]) in _PLAIN


class _ServerSide(Protocol):
    """What a connection's socket asks of the store that it belongs to."""

    @property
    def has_clock(self) -> bool:
        """Whether a test's clock ends blocked reads, and not the event loop's time."""
        ...

    def server_time(self) -> AbstractContextManager[None]:
        """Make `time.time` give the store's time."""
        ...

    def block(self, socket: ServerSocket, streams: Iterable[bytes]) -> None:
        """Remember who waits for which streams."""

    def unblock(self, socket: ServerSocket) -> None:
        """Forget it."""

    def wake_readers(self) -> None:
        """Let the readers of streams that were written to look again."""


class ServerSocket(AsyncFakeSocket):
    """The server's end of one connection. It does what fakeredis does, but faster, for simulations."""

    def __init__(self, store: _ServerSide, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  as fakeredis
        super().__init__(*args, **kwargs)
        self.responses: Replies = Replies()
        self._store = store
        self._command: Sequence[bytes] = ()
        self._behind: deque[list[bytes]] = deque()
        self._again: Callable[[], Any] | None = None

    def take(self, packed: bytes) -> None:
        """Take complete commands, and run those at once that are not behind a blocked read."""
        if not self._server.connected or self._killed:
            self.sendall(packed)  # which raises
        self._behind.extend(unpack_commands(packed))
        self._carry_out()

    def _carry_out(self) -> None:
        """Run commands in the store's time, queue their replies, and wake those who wait for what they wrote."""
        with self._store.server_time():
            now = time.time()
            for db in self._server.dbs.values():
                db.time = now
            while self._behind and not self._paused:
                self._command = self._behind.popleft()
                self._process_command(self._command)
            self._store.wake_readers()

    def _process_command(self, fields: list[bytes]) -> None:
        """Run one command and queue its reply: the frequent commands directly, all others as fakeredis does."""
        name = fields[0].decode("ascii", "replace").lower()
        if name not in _QUICK:
            super()._process_command(fields)
            return
        arguments = fields[1:]
        reply: Any
        try:
            func, signature = self._name_to_func(name)
            if self._queueing and name != "exec":
                _plan(signature, len(arguments), self.version)
                self._transaction.append((func, signature, arguments))
                reply = QUEUED
            else:
                with self._server.lock:
                    reply = self._run_command(func, signature, arguments, False)
        except SimpleError as error:
            if self._queueing:
                self._transaction_failed = True
            reply = error
        reply = self._decode_result(reply)
        if not isinstance(reply, NoResponse):
            self.put_response(reply)

    def _run_command(self, func: Any, sig: Any, args: list[Any], from_script: bool) -> Any:  # noqa: ANN401  as fakeredis
        """Run one command, also from a script or a MULTI."""
        if sig.name not in _QUICK:
            return super()._run_command(func, sig, args, from_script)
        db, items = self._db, list[Any]()
        try:
            decoders, keys = _plan(sig, len(args), self.version)
            if from_script and msgs.FLAG_NO_SCRIPT in sig.flags:
                raise SimpleError(msgs.COMMAND_IN_SCRIPT_MSG)
            args = list(args)
            for place, key in keys:
                if key.missing_return is not Key.UNSPECIFIED and args[place] not in db:
                    return self._for_client(key.missing_return, sig)
            for place, decoder in decoders:
                args[place] = decoder.decode(args[place])
            for place, key in keys:
                args[place] = self._item(args[place], key, sig)
                items.append(args[place])
            result = self._for_client(func(*args), sig)
        except SimpleError as error:
            result = error
        for item in items:
            if item.is_modified:
                item.writeback(remove_empty_val=msgs.FLAG_LEAVE_EMPTY_VAL not in sig.flags)
        return result

    def _item(self, name: bytes, key: Key, sig: Any) -> CommandItem:  # noqa: ANN401  as fakeredis
        """The item of a key, or a new one. Raises fakeredis' error if its type is not the command's."""
        item, default = self._db.get(name), None
        if key.type_ is not None:
            if item is not None:
                if type(item.value) is not key.type_:
                    raise SimpleError(msgs.WRONGTYPE_MSG)
            elif key.type_ is not bytes and msgs.FLAG_DO_NOT_CREATE not in sig.flags:
                default = key.type_()
        return CommandItem(name, self._db, item, default=default)

    def _for_client(self, result: Any, sig: Any) -> Any:  # noqa: ANN401  as fakeredis
        """What a client of RESP2 reads."""
        if type(result) in _SIMPLE or (type(result) is list and all(type(one) in _SIMPLE for one in result)):
            return result
        if self._resp_version != 2 or msgs.FLAG_SKIP_CONVERT_TO_RESP2 in sig.flags:
            return result
        return convert_to_resp2(result, self.server_type, keep_doubles=False)

    def _get_server_runtime(self, server: Any) -> Any:  # noqa: ANN401  as fakeredis
        if getattr(server, "rankgate_runtime", None) is None:
            server.rankgate_runtime = _CompilingRuntime(super()._get_server_runtime(server))
        return server.rankgate_runtime

    def _lua_redis_call(self, lua_runtime: Any, expected_globals: set[Any], op: bytes, *args: Any) -> Any:  # noqa: ANN401  as fakeredis
        """``redis.call``. Whether a script sets globals is checked at its end, and not at each call as well."""
        name = op.decode().lower()
        if name in COMMANDS_WITH_SUB or any(type(arg) is not bytes for arg in args):
            return super()._lua_redis_call(lua_runtime, expected_globals, op, *args)
        func, signature = self._name_to_func(name)
        return self._convert_redis_result(lua_runtime, self._run_command(func, signature, list(args), True))

    def _blocking(
        self, timeout: float | None, func: Callable[[bool], Any], shape: Callable[[Any], Any] | None = None
    ) -> Any:  # noqa: ANN401  as fakeredis
        """Answer a blocking read now, or when one of its streams is written to; `end_block` ends it without entries."""
        words = [word.upper() for word in self._command]
        if b"STREAMS" not in words or self._in_transaction:
            return super()._blocking(timeout, func, shape)
        found = func(True)
        if found is not None:
            return found if shape is None else shape(found)
        names = self._command[words.index(b"STREAMS") + 1 :]
        self._again = lambda: func(False)
        self._store.block(self, names[: len(names) // 2])
        self.pause()
        if not self._store.has_clock and timeout:
            self._event_loop.call_later(timeout, self.end_block)
        return NoResponse()

    def look_again(self) -> None:
        """One of the streams that a blocked read waits for was written to."""
        found = None if self._again is None else self._again()
        if found is not None:
            self._unblock(found)

    def end_block(self) -> None:
        """The time of a blocked read is over."""
        if self._again is not None:
            self._unblock(None)

    def _unblock(self, reply: Any) -> None:  # noqa: ANN401  what XREAD answers
        self._stop_waiting()
        self.put_response(self._decode_result(reply))
        self.resume()

    def resume(self) -> None:
        """Go on with what was sent behind a blocked command."""
        self._paused = False
        self._carry_out()

    def abandon(self) -> None:
        """The client is gone: a server drops what it has not carried out for it."""
        self._stop_waiting()
        self._behind.clear()

    def _stop_waiting(self) -> None:
        self._again = None
        self._store.unblock(self)

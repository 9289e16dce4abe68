"""Faults between a client and its server, planned one by one: each fires once, where the test says, and is counted.

The faults are in the connection, outside the code under test: `barrier.store.connect.adopt` builds its clients from
the given client's pool, so they have the same faults. The idea is from torchft's failure injection, which counts its firings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import hiredis
from redis import exceptions as driver
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.sentinel import SentinelConnectionPool

from barrier.clock import Clock, SystemClock
from barrier.store.clients import refuse_unusable
from barrier.store.connection import StoreConnection
from barrier.store.script import VERBS, script
from barrier.testing.names import command_name

__all__ = ["Action", "FaultPlan", "FaultyConnection", "unpack_commands"]


Action: TypeAlias = Callable[[], Awaitable[object] | object]
_Command: TypeAlias = list[bytes]


@dataclass(eq=False)
class _Fault:
    kind: Literal["before", "refuse", "answer", "duplicate", "after", "lose"]
    command: str
    nth: int
    touching: bytes
    action: Action = lambda: None
    text: str = ""
    seen: int = 0
    fired: bool = False

    def __str__(self) -> str:
        where = f" touching {self.touching.decode()!r}" if self.touching else ""
        return f"{self.kind} {self.command} number {self.nth}{where}"

    def matches(self, batch: Sequence[_Command]) -> bool:
        if [b"EVALSHA"] in batch:
            return False  # nothing is called: a new client asks whether the server knows the command
        if self.touching and not any(self.touching in argument for command in batch for argument in command[1:]):
            return False
        return any(self._is_meant(command) for command in batch)

    def _is_meant(self, command: _Command) -> bool:
        name = command[0].decode().lower()
        if self.command not in VERBS:
            return name == self.command
        loaded = script(self.command)
        return (name in ("evalsha", "evalsha_ro") and command[1].decode() == loaded.sha) or (
            name in ("eval", "eval_ro") and command[1].decode() == loaded.text
        )


class FaultPlan:
    """A list of faults, each of which fires once::

        plan = FaultPlan().lose_reply("dispatch").refuse("exec", nth=3, touching=":rank:1")
        barrier = Barrier(store.client(faults=plan), "demo")
        ...
        plan.assert_fired()

    A command is a Redis command (``"exec"`` for any MULTI, ``"xadd"`` also for a MULTI with an XADD in it, ``"xread"``)
    or a verb of the barrier (``"dispatch"``), which means its script, however it is sent. Any other name is refused.
    `nth` counts the matching calls from the moment at which the fault was planned. `touching` limits the fault to calls
    with a key or another argument that contains this text. Several faults may fire in one call.

    Use `FakeStore.client(faults=plan)`, or `wrap` for a client of a real server.
    """

    def __init__(self) -> None:
        self._faults: list[_Fault] = []

    def lose_reply(self, command: str, *, nth: int = 1, touching: str = "") -> FaultPlan:
        """The server carries the call out, and the connection breaks before its reply arrives: commit, then raise."""
        return self._add("lose", command, nth, touching)

    def refuse(self, command: str, *, nth: int = 1, touching: str = "") -> FaultPlan:
        """The connection breaks before the call reaches the server: nothing is carried out."""
        return self._add("refuse", command, nth, touching)

    def answer(self, command: str, error: str, *, nth: int = 1, touching: str = "") -> FaultPlan:
        """The server answers with this error and carries nothing out, for example ``OOM command not allowed``."""
        return self._add("answer", command, nth, touching, text=error)

    def duplicate(self, command: str, *, nth: int = 1, touching: str = "") -> FaultPlan:
        """The call reaches the server twice, as when a client's own retry repeats it; the second reply is given."""
        return self._add("duplicate", command, nth, touching)

    def before(self, command: str, action: Action, *, nth: int = 1, touching: str = "") -> FaultPlan:
        """Something happens just before the call is sent: another rank reports, an event is waited for, a key goes."""
        return self._add("before", command, nth, touching, action=action)

    def after(self, command: str, action: Action, *, nth: int = 1, touching: str = "") -> FaultPlan:
        """Something happens after the server has carried the call out and before the caller sees the reply."""
        return self._add("after", command, nth, touching, action=action)

    def delay(
        self, command: str, seconds: float, *, clock: Clock | None = None, nth: int = 1, touching: str = ""
    ) -> FaultPlan:
        """The call is sent so many seconds late, by the given clock or the machine's."""
        waiting = clock or SystemClock()
        return self._add("before", command, nth, touching, action=lambda: waiting.sleep(seconds))

    @property
    def fired(self) -> tuple[str, ...]:
        """The faults that have fired, in the order in which they were planned."""
        return tuple(str(fault) for fault in self._faults if fault.fired)

    def assert_fired(self) -> None:
        """Fail if a planned fault has not fired: a test whose fault never came tests nothing."""
        idle = [f"{fault} (saw {fault.seen})" for fault in self._faults if not fault.fired]
        if idle:
            raise AssertionError(f"planned faults that did not fire: {'; '.join(idle)}")

    @property
    def idle(self) -> bool:
        """Whether nothing is planned that has not fired."""
        return all(fault.fired for fault in self._faults)

    def wrap(self, redis: Redis) -> Redis:
        """A new client of the same server whose connections follow this plan; the caller closes it.

        Raises:
            TypeError: the client goes through Sentinel, whose connections cannot be wrapped.
            InvalidSettings: it cannot be used at all.
        """
        refuse_unusable(redis)
        pool: Any = redis.connection_pool
        if isinstance(pool, SentinelConnectionPool):
            raise TypeError("a Sentinel client cannot be wrapped: wrap a client of the server itself")
        made: type[AbstractConnection] = pool.connection_class
        if not issubclass(made, FaultyConnection):
            made = type(f"Faulty{made.__name__}", (FaultyConnection, made), {})
        internal = (
            "himport_registry",
            "maint_",
            "orig_",
            "maintenance_",
        )  # redis-py's own, made anew by the new pool
        kwargs: dict[str, Any] = {
            key: value for key, value in pool.connection_kwargs.items() if not key.startswith(internal)
        }
        kwargs["fault_plan"] = self
        return Redis.from_pool(ConnectionPool(connection_class=made, **kwargs))

    def take(self, batch: Sequence[_Command]) -> tuple[list[_Fault], list[_Fault]]:
        """Count one call; return the faults that fire now, and all faults that counted it."""
        counted = [fault for fault in self._faults if not fault.fired and fault.matches(batch)]
        due: list[_Fault] = []
        for fault in counted:
            fault.seen += 1
            if fault.seen == fault.nth:
                fault.fired = True
                due.append(fault)
        return due, counted

    def _add(
        self,
        kind: Literal["before", "refuse", "answer", "duplicate", "after", "lose"],
        command: str,
        nth: int,
        touching: str,
        *,
        action: Action = lambda: None,
        text: str = "",
    ) -> FaultPlan:
        if nth < 1:
            raise ValueError(f"nth is {nth}; the first call is number 1")
        self._faults.append(_Fault(kind, command_name(command), nth, touching.encode(), action, text))
        return self


class FaultyConnection(StoreConnection):
    """A connection that follows a plan. Mixed in before a real connection class."""

    _pending: list[_Fault]
    _counted: list[_Fault]
    _replies: deque[Any]

    def __init__(self, *, fault_plan: FaultPlan | None = None, **kwargs: Any) -> None:  # noqa: ANN401  as redis-py
        self._fault_plan = fault_plan
        self._forget()
        super().__init__(**kwargs)  # pyright: ignore[reportUnknownMemberType]  redis-py leaves some of it untyped

    async def send_packed_command(self, command: bytes | str | Iterable[bytes], check_health: bool = True) -> None:
        """Send one call, with the faults that the plan has for it."""
        if not self.is_connected:
            await self.connect()  # its handshake comes through here too, so it must not come in the middle
        if check_health:
            await self.check_health()
            check_health = False
        self._forget()
        if self._fault_plan is None or self._fault_plan.idle:
            await super().send_packed_command(command, check_health)
            return
        chunks = [command] if isinstance(command, str | bytes) else list(command)
        packed = b"".join(chunk.encode() if isinstance(chunk, str) else chunk for chunk in chunks)
        batch = unpack_commands(packed)
        due, self._counted = self._fault_plan.take(batch)
        self._expected = len(batch)
        for fault in due:
            if fault.kind == "before":
                await _act(fault)
        for fault in due:
            if fault.kind == "refuse":
                raise driver.ConnectionError(f"planned fault: {fault}")
            if fault.kind == "answer":
                raise self._as_error(fault.text)
        await super().send_packed_command(packed, check_health)
        self._pending = [fault for fault in due if fault.kind in ("after", "lose", "duplicate")]
        if any(fault.kind == "duplicate" for fault in due):
            await self._drain()
            if not self._take_back_if_unknown_script():
                self._replies.clear()
                await super().send_packed_command(packed, check_health)

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  as redis-py
        """Read one reply, after the faults that come between a call and its reply."""
        if self._pending:
            await self._drain()
            self._take_back_if_unknown_script()
            pending, self._pending = self._pending, []
            for fault in pending:
                if fault.kind == "after":
                    await _act(fault)
            for fault in pending:
                if fault.kind == "lose":
                    await self.disconnect(nowait=True)
                    raise driver.ConnectionError(f"planned fault: {fault}: carried out, and its reply is lost")
        if self._replies:
            reply: Any = self._replies.popleft()
            if isinstance(reply, driver.ResponseError):
                raise reply
            return reply
        connection: Any = super()  # redis-py leaves the reply untyped
        try:
            return await connection.read_response(*args, **kwargs)
        except driver.NoScriptError:
            self._take_back()
            raise

    @property
    def deviates(self) -> bool:
        """Whether the next reply is not simply the server's: a fault comes before it, or it was read already."""
        return bool(self._pending or self._replies)

    async def disconnect(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  as redis-py
        """Disconnect, and forget what was under way."""
        self._forget()
        await super().disconnect(*args, **kwargs)

    def _forget(self) -> None:
        self._pending, self._counted, self._replies, self._expected = [], [], deque(), 0

    async def _drain(self) -> None:
        """Read all replies, which proves that the server has carried the whole call out."""
        replies: list[Any] = []
        for _ in range(self._expected):
            try:
                replies.append(await super().read_response())
            except driver.ResponseError as error:
                replies.append(error)
        self._replies.extend(replies)

    def _take_back_if_unknown_script(self) -> bool:
        unknown = any(isinstance(reply, driver.NoScriptError) for reply in self._replies)
        if unknown:
            self._take_back()
        return unknown

    def _take_back(self) -> None:
        """The server does not know the script: the call that counts is the EVAL that follows."""
        for fault in self._counted:
            if fault in self._pending:
                fault.fired = False
            if not fault.fired:
                fault.seen -= 1
        self._pending, self._counted = [], []

    def _as_error(self, text: str) -> driver.RedisError:
        made: Any = getattr(self, "_get_parser", None)
        parser: Any = made() if made else getattr(self, "_parser")  # noqa: B009  redis-py 7.0; a private name
        error: driver.RedisError = parser.parse_error(text)
        return error


async def _act(fault: _Fault) -> None:
    result = fault.action()
    if isinstance(result, Awaitable):
        await result


def unpack_commands(packed: bytes) -> list[_Command]:
    """Read back what was packed for the wire: RESP arrays of bulk strings."""
    reader: Any = hiredis.Reader()
    reader.feed(packed)
    commands: list[_Command] = []
    while (command := reader.gets()) is not False:
        commands.append(command)
    return commands

"""The ring in which the simulated engines of one attempt meet: each rank has a TCP connection to the endpoint of the next rank.

It does the least that the collective library of a real engine does. Every rank says which rank it is, and in which attempt. It refuses
all but its neighbour in the same attempt. `Ring.join` returns when two messages have gone round all ranks: the token, which each rank
compares, and the news that the token has come round. `Ring.keep_pace` is a second collective: no rank makes the next token of a text
before the rank before it has made this one.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
from contextlib import suppress

from runner.engine import EngineFailure, EngineGroup, bind_endpoint

__all__ = ["Ring"]


_GREETING = "rankgate-ring"
_LONGEST_LINE = 200
_GREETING_SECONDS = 5.0
_RETRY_SECONDS = 0.05
_TEXTS_HEARD_OF = 64
_OWN_SHARE = 0.9
"""The fraction of the group's deadline after which the ring itself gives up, and says which rank it waited for."""


class Ring:
    """One rank's place in the ring.

    Args:
        ports: the first and the last port that it may bind; ``None`` takes any free port.
    """

    def __init__(self, ports: tuple[int, int] | None = None) -> None:
        self._ports = ports
        self._bound: socket.socket | None = None
        self._port = 0
        self._server: asyncio.Server | None = None
        self._before: asyncio.Future[asyncio.StreamReader] | None = None
        self._after: asyncio.StreamWriter | None = None
        self._heard: dict[str, int] = {}
        self._writers: set[asyncio.StreamWriter] = set()
        self._strangers = 0
        self._last_refusal = ""
        self._reached = False

    def bind(self) -> str:
        """Bind a port for the next attempt, another one than for the last; returns the endpoint, without a host."""
        if self._bound is not None:
            self._bound.close()
        self._bound = bind_endpoint(self._ports, avoid=self._port)
        self._port = int(self._bound.getsockname()[1])
        return f":{self._port}"

    async def join(self, group: EngineGroup) -> None:
        """Enter the ring; returns once all ranks are in it and have compared their tokens.

        Raises:
            EngineFailure: not permanent: a neighbour did not come in time, cannot be reached, or is in another attempt.
        """
        bound, self._bound = self._bound, None
        if bound is None:
            raise EngineFailure("connect is out of order: prepare has bound no endpoint for this attempt")
        if not group.endpoints[group.rank].endswith(f":{self._port}"):
            bound.close()
            raise EngineFailure(
                f"rank {group.rank} listens on port {self._port}, and the others were told {group.endpoints[group.rank]}: this engine was "
                "not prepared for this attempt"
            )
        try:
            async with asyncio.timeout(group.deadline * _OWN_SHARE):
                self._before = asyncio.get_running_loop().create_future()
                # The connections inherit this option. So the port can be bound again as soon as this engine is gone.
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self._server = await asyncio.start_server(
                    lambda reader, writer: self._greet(group, reader, writer), sock=bound, limit=_LONGEST_LINE
                )
                after, before = await asyncio.gather(self._reach_next(group), self._before)
                await self._go_round(group, before, after)
                self._after = after
        except TimeoutError:
            raise EngineFailure(self._why_not(group)) from None
        except (OSError, ValueError, OverflowError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise EngineFailure(
                f"rank {group.rank} lost a neighbour while the ring came together: {type(error).__name__}"
            ) from error

    async def keep_pace(self, text: str, index: int) -> None:
        """Say that a token is made, and wait until the rank before this one has made it too. Before `join` it does nothing.

        If that rank has stopped or is gone, the call waits for ever, as a collective does. That rank may still work on a text that is
        cancelled here, or may have begun the next text already. So the ring remembers how far each text is.
        """
        if self._after is None or self._before is None:
            return
        name = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()
        with suppress(OSError):
            self._after.write(f"{name} {index}\n".encode())
        while self._heard.get(name, -1) < index:
            try:
                said, _, place = (await self._before.result().readuntil(b"\n")).decode("ascii").partition(" ")
                self._heard.pop(said, None)  # moves the text to the end: the oldest is dropped first
                self._heard[said] = int(place)
            except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                await asyncio.get_running_loop().create_future()
            while len(self._heard) > _TEXTS_HEARD_OF:
                del self._heard[next(iter(self._heard))]

    async def close(self) -> None:
        """Leave the ring and give the endpoint up; idempotent."""
        if self._bound is not None:
            self._bound.close()
            self._bound = None
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.close()

    async def _greet(self, group: EngineGroup, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer a new connection. Accept only the rank before this one, in the same attempt."""
        self._writers.add(writer)
        refusal = "this is no greeting of a ring"
        with suppress(OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            async with asyncio.timeout(_GREETING_SECONDS):
                word, token, rank = (await reader.readuntil(b"\n")).decode("ascii").split()
            if word == _GREETING:
                refusal = self._refusal(group, token, int(rank))
        with suppress(OSError):
            writer.write(f"{'no' if refusal else 'ok'} {refusal}\n".encode())
            if refusal:
                self._strangers += 1
                self._last_refusal = refusal
                self._writers.discard(writer)
                writer.close()
            elif self._before is not None:
                self._before.set_result(reader)

    def _refusal(self, group: EngineGroup, token: str, rank: int) -> str:
        if token != group.token.hex():
            return f"it is in another attempt than rank {group.rank}, which is in {group.epoch} of {group.instance}"
        if rank != (group.rank - 1) % group.world_size:
            return f"it is rank {rank}, and not the one before rank {group.rank}"
        if self._before is None or self._before.done():
            return f"rank {rank} is in the ring already"
        return ""

    async def _reach_next(self, group: EngineGroup) -> asyncio.StreamWriter:
        after = (group.rank + 1) % group.world_size
        host, _, port = group.endpoints[after].rpartition(":")
        if not port.isdecimal() or int(port) > 65_535:
            raise EngineFailure(
                f"rank {after}, the next one after rank {group.rank}, has no endpoint at which it could be reached"
            )
        while True:
            try:
                reader, writer = await asyncio.open_connection(host.strip("[]"), int(port), limit=_LONGEST_LINE)
                break
            except OSError:  # it does not listen yet, or never will
                await asyncio.sleep(_RETRY_SECONDS)
        self._writers.add(writer)
        writer.write(f"{_GREETING} {group.token.hex()} {group.rank}\n".encode())
        where = f"the endpoint of rank {after}, {group.endpoints[after]}"
        try:
            answer, _, why = (await reader.readuntil(b"\n")).decode("ascii", "replace").strip().partition(" ")
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            answer, why = "", ""
        if answer == "no":
            from barrier.printable import printable  # noqa: PLC0415 - as in _why_not

            raise EngineFailure(f"rank {group.rank} was refused at {where}: {printable(why, _LONGEST_LINE)}")
        if answer != "ok":
            raise EngineFailure(
                f"rank {group.rank} met no engine of this ring at {where}, or one that ended before it had answered"
            )
        self._reached = True
        return writer

    async def _go_round(self, group: EngineGroup, before: asyncio.StreamReader, after: asyncio.StreamWriter) -> None:
        """The collective: the token goes round once, and every rank compares it. Then the news goes round that the token came round."""
        for news in (group.token, bytes(len(group.token))):
            if group.rank == 0:
                after.write(news)
                await after.drain()
            try:
                found = await before.readexactly(len(news))
            except (OSError, asyncio.IncompleteReadError):
                raise EngineFailure(
                    f"rank {group.rank} lost rank {(group.rank - 1) % group.world_size}, the one before it, while the ring came together"
                ) from None
            if found != news:
                raise EngineFailure(
                    f"rank {group.rank} got the token of another attempt from the rank before it: this ring is not only that of "
                    f"{group.epoch} of {group.instance}"
                )
            if group.rank != 0:
                after.write(found)
                await after.drain()

    def _why_not(self, group: EngineGroup) -> str:
        from barrier.plain import number  # noqa: PLC0415 - the engine's own process does without until something fails

        before, after = (group.rank - 1) % group.world_size, (group.rank + 1) % group.world_size
        own = group.endpoints[group.rank]
        if self._before is not None and (
            self._before.cancelled() or not self._before.done()
        ):  # the wait for it was cancelled
            why = f"rank {before} did not come to the endpoint of rank {group.rank}, {own}"
            if self._strangers:
                why += f"; {self._strangers} others came and were refused, the last one because {self._last_refusal}"
        elif self._reached:
            why = f"its neighbours are there, but the token did not come round to rank {group.rank}: a rank further on is missing"
        else:
            why = f"rank {group.rank} could not reach rank {after} at {group.endpoints[after]}"
        return f"the ring did not come together within {number(group.deadline * _OWN_SHARE)} s: {why}"

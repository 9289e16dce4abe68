"""One TCP address behind which a test changes what is there: another server, a proxy's own words, a balancer that forgets."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType

import hiredis

from planner.embedded import LOOPBACK


class Address:
    """Forwards connections to a server's port.

    Attributes:
        target: where new connections go; those that are open stay where they are.
        says: where set, the error that every command is answered with, on old connections too, and nothing is forwarded.
        forgets_after: seconds of silence after which a connection is forgotten; ``None`` forgets none.
        resets: whether the next data on a forgotten connection is answered with a reset. Else it vanishes without a word.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.says = ""
        self.forgets_after: float | None = None
        self.resets = False
        self.forgotten = 0
        """How many connections have sent something after they were forgotten."""
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """The address's own port, on loopback."""
        assert self._server is not None
        return self._server.sockets[0].getsockname()[1]

    async def __aenter__(self) -> Address:
        self._server = await asyncio.start_server(self._accept, LOOPBACK, 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for link in self._links:
            link.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = asyncio.create_task(self._link(reader, writer))
        self._links.add(link)
        link.add_done_callback(self._links.discard)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server: asyncio.StreamWriter | None = None
        backward: asyncio.Task[None] | None = None
        last = [asyncio.get_running_loop().time()]
        forgotten = False
        try:
            while data := await reader.read(65_536):
                now = asyncio.get_running_loop().time()
                forgotten = forgotten or (self.forgets_after is not None and now - last[0] > self.forgets_after)
                last[0] = now
                if forgotten:
                    self.forgotten += 1
                    if self.resets:
                        return
                elif self.says and data[:1] == b"\x16":
                    return
                elif self.says:
                    writer.write(b"".join(f"-{self.says}\r\n".encode() for _ in range(_commands_in(data))))
                else:
                    if server is None:
                        answers, server = await asyncio.open_connection(LOOPBACK, self.target)
                        backward = asyncio.create_task(self._answer(answers, writer, last))
                    server.write(data)
        except OSError:
            pass
        finally:
            for one in (writer, server):
                if one is not None:
                    one.transport.abort()
            if backward is not None:
                backward.cancel()

    async def _answer(self, answers: asyncio.StreamReader, writer: asyncio.StreamWriter, last: list[float]) -> None:
        with suppress(OSError):
            while data := await answers.read(65_536):
                now = asyncio.get_running_loop().time()
                if self.forgets_after is not None and now - last[0] > self.forgets_after:
                    continue  # a forgotten connection's answer finds nobody
                last[0] = now
                if not self.says:
                    writer.write(data)
        writer.transport.abort()


def _commands_in(data: bytes) -> int:
    """How many commands these bytes hold; clients send them whole. None where it is a handshake of TLS, and one a line where it is plain text."""
    if not data.startswith(b"*"):
        return 0 if data[:1] == b"\x16" else data.count(b"\n")
    parser = hiredis.Reader()
    parser.feed(data)
    count = 0
    while parser.gets() is not False:
        count += 1
    return count

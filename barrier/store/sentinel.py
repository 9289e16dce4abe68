"""Sentinel: a connection that talks to the present master, and notices when that is another server."""

from __future__ import annotations

import asyncio
from typing import Any

from redis import exceptions as driver

from barrier.errors import StoreUnsuitable
from barrier.log import logger
from barrier.store.cluster import Address
from barrier.store.connection import StoreConnection
from barrier.store.wording import said

__all__ = ["MasterConnection"]


class MasterConnection(StoreConnection):
    """Mixed in before redis-py's Sentinel connection, which asks for the master: makes sure that it talks to the present master.

    A new connection asks the server for its role, since a sentinel may name a master that has just been demoted. An old one asks the
    sentinels from time to time: a master that was cut off from them does not know that it has been replaced, and a reader that never
    writes would stay with it. If they name another one, the call fails, nothing is sent, and the next call goes there. If no sentinel answers, nothing changes.
    """

    connection_pool: Any  # the SentinelConnectionPool
    host: str
    port: int

    def __init__(self, *, ask_every: float, **kwargs: Any) -> None:  # noqa: ANN401  as redis-py
        self._ask_every = ask_every
        self._asked_at = float("inf")
        super().__init__(**kwargs)  # pyright: ignore[reportUnknownMemberType]  redis-py leaves some of it untyped

    async def connect_to(self, address: Address) -> None:
        """Connect, and make sure that a master answers.

        Raises:
            redis.exceptions.ConnectionError: it is a replica.
        """
        self._asked_at = float("inf")
        untyped: Any = super()
        try:
            await untyped.connect_to(address)
        except StoreUnsuitable as error:
            if not error.passes:
                raise
            raise driver.ConnectionError(f"{address[0]}:{address[1]} is a replica: a failover is under way") from error
        await self.send_command("ROLE")
        role: Any = await untyped.read_response()
        if role[0] != b"master":
            await self.disconnect(nowait=True)
            raise driver.ConnectionError(f"{address[0]}:{address[1]} is a replica: a failover is under way")
        self._asked_at = asyncio.get_running_loop().time()

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:  # noqa: ANN401  as redis-py
        """Send, unless the sentinels name another master by now.

        Raises:
            redis.exceptions.ConnectionError: they do; nothing was sent.
        """
        if self.is_connected and asyncio.get_running_loop().time() - self._asked_at > self._ask_every:
            await self._ask_again()
        await super().send_packed_command(command, check_health)

    async def _ask_again(self) -> None:
        self._asked_at = asyncio.get_running_loop().time()
        here = self.host, self.port
        try:
            named: Address = await self.connection_pool.get_master_address()
        except (driver.ConnectionError, driver.TimeoutError) as error:
            logger.debug("no sentinel says who the master is: {}", said(error))
            return
        if named != here:
            await self.disconnect(nowait=True)
            raise driver.ConnectionError(f"{here[0]}:{here[1]} is not the master any more")

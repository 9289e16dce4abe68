"""What the barrier asks of its store, and the one place where a driver's error becomes ours."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, TypeAlias

from loguru import logger
from redis import exceptions as driver
from redis.asyncio import Redis

from barrier.errors import (
    StoreCorrupt,
    StoreError,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    StoreUnsuitable,
)
from barrier.settings import Settings

MINIMUM_VERSIONS = {"redis": (6, 2), "valkey": (7, 2)}
SAFE_POLICY = "noeviction"

StreamEntry: TypeAlias = tuple[bytes, dict[bytes, bytes]]
"""One entry of a stream: its id and its fields."""


def stream_entries(reply: Any) -> list[tuple[str, list[StreamEntry]]]:  # noqa: ANN401  the driver's untyped answer
    """What XREAD answered, by stream; empty where nothing came in time. A deleted entry has no fields."""
    streams: list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes] | None]]]] = reply or []
    return [(key.decode(), [(entry_id, fields or {}) for entry_id, fields in entries]) for key, entries in streams]


@contextmanager
def translated(where: str) -> Generator[None]:
    """Turn a driver's error into one of ours; `where` names the store without its password."""
    try:
        yield
    except StoreError:
        raise
    except (driver.AuthenticationError, driver.AuthorizationError, driver.NoPermissionError) as error:
        raise StoreRefused(f"the store at {where} refused: {_tidy(error)}. Check user, password and rights.") from error
    except (driver.BusyLoadingError, driver.MaxConnectionsError) as error:
        raise StoreUnavailable(f"the store at {where} cannot answer now: {_tidy(error)}") from error
    except (driver.ConnectionError, driver.TimeoutError, OSError, asyncio.IncompleteReadError) as error:
        raise StoreUnavailable(f"no answer from the store at {where}: {_tidy(error)}") from error
    except driver.OutOfMemoryError as error:
        raise StoreFull(f"the store at {where} is out of memory; nothing was written. Raise maxmemory.") from error
    except driver.ReadOnlyError as error:
        raise StoreUnsuitable(f"the store at {where} is a replica; connect to its master") from error
    except driver.ResponseError as error:
        raise _from_reply(error, where) from error
    except driver.RedisError as error:
        raise StoreUnavailable(f"the store at {where} failed: {_tidy(error)}") from error


def _from_reply(error: driver.ResponseError, where: str) -> StoreError:
    text = _tidy(error)
    if "RANKGATE_CORRUPT" in text:
        return StoreCorrupt(text.split("RANKGATE_CORRUPT", 1)[1].strip() + "; move or delete that key, then try again")
    if "WRONGTYPE" in text:
        return StoreCorrupt(f"a key in the store at {where} has the wrong type: {text}")
    if "OOM" in text:
        return StoreFull(f"the store at {where} is out of memory; nothing was written. Raise maxmemory.")
    if any(word in text for word in ("NOAUTH", "WRONGPASS", "NOPERM", "ACL failure", "invalid username-password")):
        return StoreRefused(f"the store at {where} refused: {text}. Check user, password and rights.")
    if any(
        word in text for word in ("LOADING", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY", "UNBLOCKED", "MISCONF")
    ):
        return StoreUnavailable(f"the store at {where} cannot answer now: {text}")
    if "READONLY" in text:
        return StoreUnsuitable(f"the store at {where} is a replica; connect to its master")
    return StoreCorrupt(f"the store at {where} gave an answer that is not understood: {text}")


def _tidy(error: BaseException) -> str:
    """One line without a script's position, which means nothing to the reader."""
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return re.sub(r" script: [0-9a-f]{40}.*$", "", text)[:300]


class Store:
    """A connected store: one client for commands, and a new one for every blocking reader.

    Made by `barrier.connect`; every timeout has been chosen there.

    Attributes:
        commands: for commands that answer at once; retries are off, so nothing is sent twice.
        settings: the times that the clients were built for.
        where: the address without user and password, for messages.
    """

    def __init__(
        self,
        commands: Redis,
        make_reader: Callable[[], Redis],
        settings: Settings,
        where: str,
    ) -> None:
        self.commands: Any = commands  # redis-py's annotations give every command both sync and async results
        self._make_reader = make_reader
        self.settings = settings
        self.where = where
        self._verified = False
        self._verifying = asyncio.Lock()

    def reader(self) -> Any:  # noqa: ANN401  as `commands`
        """A new client for one blocking reader; the caller closes it."""
        return self._make_reader()

    def errors(self) -> AbstractContextManager[None]:
        """Translate what the driver raises inside."""
        return translated(self.where)

    async def verify(self, *, again: bool = False) -> None:
        """Refuse a store on which the guarantees would not hold. Asks once, unless told to ask again.

        Raises:
            StoreUnsuitable: evicts keys, is a replica, or is too old.
            StoreRefused: wrong password, or no right to ask (INFO).
            StoreUnavailable: no answer.
        """
        async with self._verifying:
            if self._verified and not again:
                return
            try:
                with self.errors():
                    info: dict[str, Any] = await self.commands.info()
            except StoreCorrupt:
                _say_unchecked()  # fakeredis, for one, has no INFO; a server that hides it cannot be judged
                info = {}
            check_info(info, self.where)
            self._verified = True

    async def close(self) -> None:
        """Close the command client."""
        await self.commands.aclose()


@cache
def _say_unchecked() -> None:
    """Once a process, not once a client."""
    logger.warning("the store does not answer INFO: its version, role and eviction policy are unchecked")


def check_info(info: dict[str, Any], where: str) -> None:
    """Judge what INFO said; raise `StoreUnsuitable` with the value, the limit and the way out."""
    policy = info.get("maxmemory_policy", SAFE_POLICY)
    if policy != SAFE_POLICY:
        raise StoreUnsuitable(
            f"the store at {where} has maxmemory-policy {policy}, which may drop a barrier's key without an error; "
            f"set maxmemory-policy {SAFE_POLICY}"
        )
    if info.get("role", "master") != "master":
        raise StoreUnsuitable(f"the store at {where} is a replica of {info.get('master_host')}; connect to its master")
    kind = "valkey" if "valkey_version" in info else "redis"
    version = str(info.get(f"{kind}_version", ""))
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers and numbers < MINIMUM_VERSIONS[kind]:
        wanted = ".".join(str(part) for part in MINIMUM_VERSIONS[kind])
        raise StoreUnsuitable(f"the store at {where} is {kind} {version}; {kind} {wanted} or newer is needed")

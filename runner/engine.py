"""The protocol of an engine, which a runner drives. It is small, so that MLX, a simulation and a test double can all implement it."""

from __future__ import annotations

import hashlib
import random
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from runner.model import ModelSpec

__all__ = ["Engine", "EngineDied", "EngineFailure", "EngineGroup", "GenerationRequest", "bind_endpoint", "valid_ports"]


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """The rank, the attempt and the endpoints with which an engine enters the collective.

    Attributes:
        instance: the instance's name.
        epoch: ``<number>-<nonce>``, which names the attempt. No other attempt has the same epoch, in this instance or in another.
        rank: 0 to world_size - 1.
        endpoints: where each rank's engine waits for the others, ``host:port`` in rank order: what its `Engine.prepare` returned
            for this attempt. An empty text for a rank whose engine has no endpoint.
        deadline: seconds that `Engine.connect` may take. It is shorter than the planner's stall for this step, so that the engine itself
            can say what it waited for.
    """

    instance: str
    epoch: str
    rank: int
    endpoints: tuple[str, ...]
    deadline: float

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return len(self.endpoints)

    @property
    def token(self) -> bytes:
        """16 bytes that differ for each (instance, epoch). `Engine.connect` compares them over all ranks."""
        return hashlib.blake2b(f"{self.instance}\0{self.epoch}".encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One generation; the prompt stays out of every repr."""

    task_id: str
    prompt: str
    max_tokens: int

    def __repr__(self) -> str:
        return f"GenerationRequest(task_id={self.task_id!r}, prompt=<{len(self.prompt)} chars>, max_tokens={self.max_tokens})"


class EngineFailure(RuntimeError):
    """Engine work failed.

    Attributes:
        permanent: whether another attempt would fail too (no such model, not enough memory). The planner acts on it.
    """

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


class EngineDied(EngineFailure):
    """The engine is gone: its process ended, or was killed or closed."""


class Engine(Protocol):
    """One rank's share of a model. The host makes one call at a time, in this order: prepare…, connect, load, warm_up, generate…, close.

    With one rank there is no `connect`. `close` may come at any time. If another call is under way then, its coroutine is cancelled
    first. Whatever a call raises fails its task, and never ends the runner.

    An engine is connected only to the engines of its own attempt. Two rules ensure that, and `runner.testing.check_engine`
    checks both: every attempt binds a new endpoint (`prepare`), and the first collective compares
    `EngineGroup.token` over all ranks (`connect`).
    """

    async def prepare(self, rank: int, world_size: int) -> str | None:
        """Do the slow work that needs no other rank: imports, a check of the device, a download. Then bind an endpoint.

        The host calls it before the rank reports Idle, and again before each further attempt until this engine has connected. Each call
        gives up the last port and binds another one: an engine of an ended attempt must find nobody there. The host also calls it in a
        spare engine, long before the attempt and while another engine serves. So it must take no memory of the device, and hold no lock
        that the other engine may need.

        Returns:
            ``host:port`` at which the other ranks reach this engine; ``:port`` if the runner shall add this machine's address;
            ``None`` if the engine needs no endpoint. `bind_endpoint` binds a port, from a range if you give one.

        Raises:
            EngineFailure: permanent if another attempt would fail too: something is not installed, there is no such device.
        """
        ...

    async def connect(self, group: EngineGroup) -> None:
        """Enter the collective group; returns once all ranks are in it.

        At its end, one real collective over all ranks compares `EngineGroup.token`. If a token differs, this engine has met one of another
        attempt: raise an `EngineFailure` that is not permanent. Such a group never generates a text. The call takes at most
        `EngineGroup.deadline` seconds; the host kills an engine that takes longer.
        """
        ...

    def load(self, model: ModelSpec) -> AsyncIterator[int]:
        """Load the model; yields the number of layers loaded so far, rising to ``model.total_layers``.

        The same number again means that the load makes progress, though no further layer is complete: a large layer, a download. It
        renews the planner's stall, so yield it only after real progress. With more than one rank, refuse a load before `connect`:
        half a model would wait for ranks that never come.
        """
        ...

    async def warm_up(self) -> None:
        """Run the warm-up collective."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[str]:
        """Generate; yields pieces of text (rank 0) or nothing (the other ranks), and returns at the end of the text."""
        ...

    async def close(self) -> None:
        """Give up group, model, endpoint and memory; idempotent."""
        ...


def bind_endpoint(ports: tuple[int, int] | None = None, *, avoid: int = 0) -> socket.socket:
    """Bind a TCP socket for `Engine.prepare`, on all of this machine's IPv4 addresses; it does not listen yet.

    No other socket has the port. A free port of the range comes first. Then comes a port of which the operating system still keeps the
    connections of an ended attempt, for about a minute. Their sockets must have had SO_REUSEADDR set, so set it before you listen.

    Args:
        ports: the first and the last port that may be used, for machines behind a firewall; ``None`` takes any free port.
        avoid: the port of the last attempt. It is taken only if the range has no other.

    Raises:
        EngineFailure: no port of the range is free.
    """
    if ports is None:
        while True:
            bound = _bound(0)
            if bound.getsockname()[1] != avoid:
                return bound
            bound.close()
    first, last = ports
    # Begin at a random port, so that an attempt seldom gets a port that another engine had in an earlier attempt.
    shift = random.randrange(last - first + 1)  # noqa: S311 - no secret
    shifted = [first + (at + shift) % (last - first + 1) for at in range(last - first + 1)]
    for wanted in ([port for port in shifted if port != avoid], [port for port in shifted if port == avoid]):
        for left_over in (False, True):
            for port in wanted:
                with suppress(OSError):
                    return _bound(port, left_over=left_over)
    raise EngineFailure(
        f"no port from {first} to {last} is free on this machine; end what uses them, or allow the engine a larger range"
    )


def _bound(port: int, *, left_over: bool = False) -> socket.socket:
    """Bind a port that nobody has; with `left_over` also a port that still has connections, though nobody listens there."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(left_over))
        bound.bind(("", port))
        # While it is set, another program that sets it too could bind the same port, until one of the two listens.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError:
        bound.close()
        raise
    return bound


def valid_ports(first: int, last: int) -> tuple[int, int]:
    """Return a range of ports if it is one; raises ValueError with the values and the limits."""
    if not 1 <= first <= last <= 65_535:
        raise ValueError(
            f"ports are {first} to {last}; give the first and the last of 1 to 65535, the smaller one first"
        )
    return first, last

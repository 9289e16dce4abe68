"""The engine: what a runner drives. A small protocol, so that MLX, a simulation or a test double all fit behind it."""

from __future__ import annotations

import hashlib
import random
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from runner.messages import ModelSpec

__all__ = ["Engine", "EngineDied", "EngineFailure", "EngineGroup", "GenerationRequest", "bind_endpoint", "valid_ports"]


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """Where, as whom and in which attempt an engine enters the collective.

    Attributes:
        instance: the instance's name.
        epoch: ``<number>-<nonce>``: which attempt this is. No other attempt, of this instance or of another, has the same one.
        rank: 0 to world_size - 1.
        endpoints: where each rank's engine waits for the others, ``host:port`` in rank order: what its `Engine.prepare` returned
            for this attempt. Empty for a rank whose engine has no endpoint.
        deadline: seconds that `Engine.connect` may take. It is shorter than the time after which the planner takes the attempt for
            stalled, so that the engine says itself what it waited for.
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
        """16 bytes that differ for every other instance and every other attempt: what `Engine.connect` compares over all ranks."""
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
        permanent: whether trying again cannot help (no such model, not enough memory); decides how the planner classes it.
    """

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


class EngineDied(EngineFailure):
    """The engine's process ended in the middle of its work."""


class Engine(Protocol):
    """One rank's share of a model. Calls come one at a time and in this order: prepare…, connect, load, warm_up, generate…, close.

    With one rank there is no `connect`. `close` may come at any time, also in the middle of another call, whose coroutine is
    cancelled first. Whatever a call raises is a failed task and never the end of the runner.

    An engine is connected only to the engines of its own attempt. Two things see to that, and `runner.testing.check_engine`
    checks both: an endpoint is bound anew for every attempt (`prepare`), and the first collective compares
    `EngineGroup.token` over all ranks (`connect`).
    """

    async def prepare(self, rank: int, world_size: int) -> str | None:
        """Do what is slow and concerns nobody else: imports, a look at the device, a download. Then bind an endpoint.

        It comes before the rank reports Idle, and again before every further attempt in which this engine has not connected yet.
        Every call binds another port than the last, which is given up: an engine of an ended attempt must find nobody there. It may
        also come long before the attempt, in a spare engine that stands by while another one serves; so it takes no memory of the
        device and holds no lock that the other one may need.

        Returns:
            ``host:port`` at which the other ranks reach this engine; ``:port`` for this machine under the name that the runner knows;
            ``None`` where the engine needs no endpoint. `bind_endpoint` binds a port, from a range where one is wanted.

        Raises:
            EngineFailure: permanent where trying again cannot help: something that is not installed, no such device.
        """
        ...

    async def connect(self, group: EngineGroup) -> None:
        """Enter the collective group; returns once all ranks are in it.

        It ends with one real collective over all ranks that compares `EngineGroup.token`. Where a token differs, this engine met one of
        another attempt: that is an `EngineFailure` which is not permanent, and never a text. It ends within `EngineGroup.deadline`
        seconds; the host ends an engine that does not.
        """
        ...

    def load(self, model: ModelSpec) -> AsyncIterator[int]:
        """Load the model; yields the number of layers loaded so far, rising to ``model.total_layers``.

        To yield the same number again says that the load moves though no layer is complete: a large layer, a download. That
        renews the planner's patience, so yield it only where something has moved. With more than one rank it comes after
        `connect`, and is refused otherwise: half a model would wait for ranks that never come.
        """
        ...

    async def warm_up(self) -> None:
        """Run the warm-up collective."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[str]:
        """Generate; yields pieces of text (rank 0) or nothing (the others), and ends at the end of the text."""
        ...

    async def close(self) -> None:
        """Give up group, model, endpoint and memory; idempotent."""
        ...


def bind_endpoint(ports: tuple[int, int] | None = None, *, avoid: int = 0) -> socket.socket:
    """Bind a TCP socket for `Engine.prepare`, on all of this machine's IPv4 addresses; it does not listen yet.

    The port is this socket's alone. In a range, one that nobody has is preferred; then comes one of which the operating system only keeps
    the connections of an ended attempt, which it does for about a minute, if their sockets had SO_REUSEADDR set: so set it before you listen.

    Args:
        ports: the first and the last port that may be used, for machines behind a firewall; any free one where ``None``.
        avoid: the port of the attempt before, which is taken only where the range has no other.

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
    # From anywhere in the range, so that an attempt seldom gets the port of an earlier one, which another engine had.
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
    """Bind a port that nobody has; with `left_over` one of which there are still connections, though nobody listens there."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(left_over))
        bound.bind(("", port))
        # As long as it is set, whoever sets it as well could bind the same port, until one of the two listens.
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

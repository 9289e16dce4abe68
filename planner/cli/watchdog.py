"""Tells the service manager that started this process: ready, status, still at work, stopping.

The protocol is systemd's ``sd_notify`` (https://www.freedesktop.org/software/systemd/man/sd_notify.html): one datagram of lines
``NAME=value`` to the Unix socket that ``NOTIFY_SOCKET`` names. That takes a dozen lines. The library for it on PyPI was last released in
2017 and sends on a blocking socket.

A beat (``WATCHDOG=1``) comes from the process's own event loop, so a loop that hangs sends none. It is sent only while the process
*tries* its work: a rank's heartbeats, a planner's looks at its instances. A store that does not answer is no reason for a restart: the
process asks it again, and a restart would only lose the loaded model.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncGenerator, Callable, Mapping, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from barrier import Clock, SystemClock, supervise
from barrier.log import logger
from barrier.plain import number
from barrier.printable import printable

__all__ = ["Pulse", "ServiceManager", "Work", "supervised"]


_UNTIL_READY = 0.05  # seconds between two looks whether this process has begun its work
_LONGEST_PAUSE = 1.0  # seconds before this module tries again after a mistake of ours
_MAX_STATUS = 200  # characters


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a process, as its service manager sees it.

    Attributes:
        ready: whether the work has begun.
        status: one line for people, without prompts and secrets.
        tried: how often each part of the work was tried. Parts may come and go; there may be none.
        patience: if a part was not tried for so many seconds, this process counts as hung.
    """

    ready: Callable[[], bool]
    status: Callable[[], str]
    tried: Callable[[], Mapping[str, int]]
    patience: float


class ServiceManager:
    """The socket of the service manager.

    Args:
        address: a path, or a name in Linux's abstract namespace with ``@`` in front.
        watchdog_seconds: the manager restarts this process after so long without a beat; ``None``: it waits for no beats.
    """

    def __init__(self, address: str, watchdog_seconds: float | None = None) -> None:
        self.watchdog_seconds = watchdog_seconds
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)  # a manager that does not read must not block this process
        self._deaf = False

    @classmethod
    def of(cls, environment: MutableMapping[str, str]) -> ServiceManager | None:
        """The manager that an environment names, or ``None``. Removes the variables: engines must not speak for this process."""
        address = environment.pop("NOTIFY_SOCKET", "")
        pid, microseconds = environment.pop("WATCHDOG_PID", ""), environment.pop("WATCHDOG_USEC", "")
        if not address.startswith(("/", "@")):
            return None
        waited_for = microseconds.isdecimal() and int(microseconds) > 0 and pid in ("", str(os.getpid()))
        return cls(address, int(microseconds) / 1e6 if waited_for else None)

    def tell(self, **lines: str) -> None:
        """Send ``NAME=value`` lines. If that fails they are dropped, with one warning: the work matters more."""
        message = "\n".join(f"{name}={printable(' '.join(value.split()))}" for name, value in lines.items())
        try:
            self._socket.sendto(message.encode(), self._address)
        except OSError as error:
            if not self._deaf:
                logger.warning("the service manager cannot be reached: {}", error.strerror or error)
            self._deaf = True
        else:
            self._deaf = False

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


@dataclass
class Pulse:
    """Decides whether work is being tried.

    Attributes:
        patience: see `Work`.
    """

    patience: float
    _moved: dict[str, tuple[int, float]] = field(default_factory=dict[str, tuple[int, float]])

    def hung(self, tried: Mapping[str, int], now: float) -> list[str]:
        """The parts of the work that were not tried for longer than `patience`; `now` in seconds, by any clock."""
        self._moved = {
            part: (count, now) if (before := self._moved.get(part)) is None or before[0] != count else before
            for part, count in tried.items()
        }
        return [part for part, (_, at) in self._moved.items() if now - at > self.patience]


@asynccontextmanager
async def supervised(
    work: Work, manager: ServiceManager | None = None, *, clock: Clock | None = None
) -> AsyncGenerator[None]:
    """Tell the service manager about this process's work inside the block. Without a manager, do nothing.

    Args:
        work: the work.
        manager: the manager; by default the one that the environment names. It is closed at the end.
        clock: time, for tests.
    """
    manager = manager or ServiceManager.of(os.environ)
    if manager is None:
        yield
        return
    time = clock or SystemClock()
    telling = supervise.restarted(
        lambda: _tell(work, manager, time), "telling the service manager", clock=time, longest_pause=_LONGEST_PAUSE
    )
    try:
        yield
    finally:
        await supervise.end(telling)
        manager.tell(STOPPING="1", STATUS="stopped")
        manager.close()


async def _tell(work: Work, manager: ServiceManager, clock: Clock) -> None:
    while not work.ready():
        await clock.sleep(_UNTIL_READY)
    manager.tell(READY="1", STATUS=work.status()[:_MAX_STATUS])
    if manager.watchdog_seconds is None:
        return
    pulse, complained = Pulse(work.patience), False
    while True:
        hung = pulse.hung(work.tried(), clock.now())
        if not hung:
            manager.tell(WATCHDOG="1", STATUS=work.status()[:_MAX_STATUS])
        elif not complained:
            logger.error(
                "no beat is sent to the service manager: not tried for {} s: {}", number(work.patience), ", ".join(hung)
            )
        complained = bool(hung)
        await clock.sleep(manager.watchdog_seconds / 3)  # one beat may be late, and another one lost

"""The parts that all runs share: the times, the processes' supervisor, and the accident of one rank."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Literal, TypeAlias

from barrier import Settings, supervise
from barrier.errors import RankgateError
from barrier.plain import number
from planner.launcher import Launcher, ProcessState, Program, Restarts, exit_sentence
from planner.planner import InstanceFailed
from runner.engines.simulated import SimulatedConfig
from runner.messages import ModelSpec

__all__ = [
    "CONNECT",
    "KILLED",
    "LIMIT",
    "MODEL",
    "PATIENCE",
    "POLL",
    "PUBLISH",
    "RESEND",
    "SETTINGS",
    "WORLD_SIZE",
    "Role",
    "Run",
    "Say",
    "cancelled",
    "engine_config",
    "ranks_named",
]


WORLD_SIZE = 3
KILLED = 1
"""The rank whose process is killed once it is connected."""
_LATE = 2
"""The rank that connects late."""

POLL = 0.1
"""Seconds between two looks of the planner that polls."""
PUBLISH = 0.2
"""Seconds between two statuses that a runner writes into the table."""
RESEND = 0.5
"""Seconds after which the planner that polls sends a task again if the status has not changed."""
_DOWN = 4.0
"""Seconds until a process that died is started again."""
_RESTARTS = 1
"""After how many deaths in a row a supervisor restarts a process. With more, the fragile runner dies once for each waiting LoadModel."""
PATIENCE = 3
"""After how many refusals the planner that polls begins again."""
CONNECT = 0.2
"""Seconds that a rank takes to connect."""
_HELD_BACK = 2.5
"""How many seconds longer the late rank takes to connect."""
LIMIT = 40.0
"""Seconds after which a run is over, ready or not."""

MODEL = ModelSpec(model_id="simulated", total_layers=8)
SETTINGS = Settings(lease=1.5, heartbeat=0.4)

Say: TypeAlias = Callable[[str], None]
"""Prints one line."""
Role: TypeAlias = Literal["fragile", "graceful"]
"""The kind of runner in a process of the first two runs."""


class Run:
    """One run: its processes, their deaths, and the accident of rank `KILLED`."""

    def __init__(self, title: str, programs: Sequence[Program], say: Say) -> None:
        self.title = title
        self.deaths: int = 0
        self.last_words: str = ""
        self._say = say
        self._began: float | None = None
        self._accident = False
        restarts = Restarts(first_pause=_DOWN, longest_pause=_DOWN, most=_RESTARTS)
        self.launcher: Launcher = Launcher(programs, restarts=restarts, on_change=self._changed)

    @property
    def seconds(self) -> float:
        """Seconds since the planner began; 0 before."""
        now = asyncio.get_running_loop().time()
        return 0.0 if self._began is None else now - self._began

    async def bring_up(
        self, ready: Coroutine[Any, Any, None], status_of_killed: Callable[[], Awaitable[str]]
    ) -> float | None:
        """Wait for `ready` while the accident happens. Returns the seconds until then, or ``None`` if it never came."""
        self._began = asyncio.get_running_loop().time()
        accident = asyncio.create_task(self._suffer(status_of_killed))
        try:
            return await self._until(ready)
        finally:
            await cancelled(accident)

    def tell(self, what: str) -> None:
        """Print one line with the time."""
        self._say(f"  {self.seconds:5.1f} s  {what}")

    async def _suffer(self, status_of: Callable[[], Awaitable[str]]) -> None:
        """Kill rank `KILLED` as soon as it has said Connected."""
        while await status_of() != "Connected":
            await asyncio.sleep(0.01)
        pid = self.launcher.states[KILLED].pid
        if pid is None:
            raise RankgateError(f"the process of rank {KILLED} was gone before it could be killed")
        self._accident = True
        os.kill(pid, signal.SIGKILL)
        self.tell(f"rank {KILLED} is connected; its process is killed, and comes back in {number(_DOWN)} s")

    def _changed(self, state: ProcessState) -> None:
        if state.phase not in ("pausing", "given up") or not state.last_exit:
            return
        if self._accident and state.last_exit == exit_sentence(-signal.SIGKILL):
            self._accident = False
            return
        self.deaths += 1
        self.last_words = self.last_words or state.last_words
        self.tell(f"{state.program.name} died ({state.last_exit}): {state.last_words}")
        if state.phase == "given up":
            self.tell(
                f"{state.program.name} is not started again: its supervisor restarts it at most {_RESTARTS} time in a row"
            )

    async def _until(self, ready: Coroutine[Any, Any, None]) -> float | None:
        async with supervise.alongside(ready) as waiting, supervise.alongside(self.launcher.given_up()) as hopeless:
            await asyncio.wait({waiting, hopeless}, timeout=LIMIT, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                self.tell("not Ready, and never will be" if hopeless.done() else f"not Ready within {number(LIMIT)} s")
                return None
            try:
                waiting.result()
            except InstanceFailed as failure:
                self.tell(str(failure))
                return None
            self.tell("all ranks are Ready")
            return self.seconds


def engine_config(rank: int) -> SimulatedConfig:
    """The engine's delays, the same in every run."""
    return SimulatedConfig(
        connect_seconds=CONNECT + (_HELD_BACK if rank == _LATE else 0.0),
        layer_seconds=0.05,
        warmup_seconds=0.1,
        jitter=0.0,
    )


def ranks_named(ranks: Sequence[int]) -> str:
    """The ranks in words."""
    return "all ranks" if len(ranks) == WORLD_SIZE else ", ".join(f"rank {rank}" for rank in ranks)


async def cancelled(task: asyncio.Task[None]) -> None:
    """Cancel a task of ours and wait for its end."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task

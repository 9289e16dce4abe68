"""The engine of the chaos runs: the simulated engine, which also keeps a journal of its work and fails when the driver orders it.

An order is a file that the driver writes. The first engine of that rank that reaches the phase takes the file (by renaming it) and obeys.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from runner.engine import EngineFailure, EngineGroup
from runner.engines.simulated import SimulatedConfig, SimulatedEngine
from runner.messages import ModelSpec
from tests.chaos.journal import What, write

REFUSED = "ordered to refuse for good"
"""What an engine says that was ordered to: the verdict must quote it."""


def order_file(directory: Path, instance: str, rank: int) -> Path:
    """Where the order for a rank's next engine lies."""
    return directory / f"order-{instance}-{rank}"


class ChaosEngine(SimulatedEngine):
    """See the module. `directory` holds the journal and the orders."""

    def __init__(self, config: SimulatedConfig, *, instance: str, directory: Path) -> None:
        super().__init__(config, owns_process=True)
        self._instance = instance
        self._directory = directory
        self._chaos_rank = 0

    async def connect(self, group: EngineGroup) -> None:
        """As the simulated engine does."""
        self._chaos_rank = group.rank
        self._note("connect")
        await self._obey("connect")
        await super().connect(group)
        self._note("connected")

    async def load(self, model: ModelSpec) -> AsyncGenerator[int, None]:
        """As the simulated engine does; slower where it was ordered."""
        self._note("load")
        pause = await self._obey("load") / model.total_layers
        async for layers in super().load(model):
            yield layers
            await asyncio.sleep(pause)
        self._note("loaded")

    async def warm_up(self) -> None:
        """As the simulated engine does."""
        self._note("warm")
        await self._obey("warm")
        await super().warm_up()
        self._note("warmed")

    def _note(self, what: What, task: str = "") -> None:
        path, runner = self._directory / "journal", os.getppid()
        write(path, what, self._instance, self._chaos_rank, runner, task=task, engine=os.getpid())

    async def _obey(self, phase: str) -> float:
        """Take the order, if there is one for this phase; seconds to be slow by."""
        path = order_file(self._directory, self._instance, self._chaos_rank)
        try:
            order: dict[str, Any] = json.loads(path.read_text(encoding="ascii"))
            if order["phase"] != phase:
                return 0.0
            path.unlink()
        except FileNotFoundError:
            return 0.0
        action = order["action"]
        self._note("fault", action)
        match action:
            case "raise":
                raise EngineFailure("ordered to fail")
            case "refuse":
                raise EngineFailure(REFUSED, permanent=True)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "slow":
                return float(order["seconds"])
            case _:
                raise ValueError(f"unknown order {action!r}")
        return 0.0


def make(config: dict[str, Any]) -> ChaosEngine:
    """The factory for ``rankgate runner --engine tests.chaos.engine:make``."""
    return ChaosEngine(
        SimulatedConfig.model_validate_json(json.dumps(config["simulated"])),
        instance=config["instance"],
        directory=Path(config["directory"]),
    )

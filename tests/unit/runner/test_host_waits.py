"""How long a host waits for an engine and for a spare, in virtual time: a wait without an end is noticed at once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from runner.engine import EngineFailure, EngineGroup, GenerationRequest
from runner.host import InlineHost
from runner.host.lives import Life
from runner.messages import ModelSpec
from tests.simulation.loop import SeededLoop

FOR_EVER = 1e9
GRACE = 5.0


@dataclass
class Script:
    """How long the engines of a host take, one after the other; the last value counts for all that follow."""

    starts: list[float] = field(default_factory=lambda: [0.0])
    prepares: list[float] = field(default_factory=lambda: [0.0])
    connects: float = 0.0
    made: int = 0

    def of(self, times: list[float], engine: int) -> float:
        return times[min(engine, len(times)) - 1]


class Engine:
    """Sleeps."""

    def __init__(self, script: Script) -> None:
        script.made += 1
        self._script, self._number = script, script.made

    async def prepare(self, rank: int, world_size: int) -> str | None:
        await asyncio.sleep(self._script.of(self._script.prepares, self._number))
        return f":{self._number}"  # tells the test which engine it is

    async def connect(self, group: EngineGroup) -> None:
        await asyncio.sleep(self._script.connects)

    async def load(self, model: ModelSpec) -> AsyncGenerator[int, None]:
        yield 1

    async def warm_up(self) -> None: ...

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[str, None]:
        yield "text"

    async def close(self) -> None: ...


class Host(InlineHost):
    """One that keeps spares, and whose engines take time to be started, as processes do."""

    def __init__(self, script: Script, *, spare_after: float) -> None:
        super().__init__(lambda: Engine(script), grace_seconds=GRACE)
        self._spare_after = spare_after
        self._script = script

    def _new_life(self) -> Life:
        life = super()._new_life()
        seconds = self._script.of(self._script.starts, self._script.made)
        life.start = lambda: asyncio.sleep(seconds)
        return life

    async def serve(self) -> None:
        await self.connect(EngineGroup("demo", f"7-{'a' * 32}", 0, ("10.0.0.1:1", "10.0.0.2:2"), 60.0))
        async for _ in self.load(ModelSpec(model_id="toy", total_layers=1)):
            pass
        await self.warm_up()
        await asyncio.sleep(0.001)  # time for a spare to begin


def in_virtual_time(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=lambda: SeededLoop(random.Random(1))) as runner:
        runner.run(story())


def now() -> float:
    return asyncio.get_running_loop().time()


# --- how long a spare is waited for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hangs",
    [Script(starts=[0.0, FOR_EVER, 0.0], prepares=[4.0, 0.0]), Script(prepares=[4.0, FOR_EVER, 0.0])],
    ids=["in its start", "in prepare"],
)
def test_a_spare_that_hangs_is_waited_for_twice_as_long_as_an_engine_ever_took(hangs: Script) -> None:
    async def story() -> None:
        host = Host(hangs, spare_after=1.0)
        assert await host.prepare(0, 2) == ":1"
        await host.serve()
        assert hangs.made == 2, "there is a spare"
        await host.kill()
        asked = now()
        assert await host.prepare(0, 2) == ":3"
        assert now() - asked == pytest.approx(8.0)
        await host.kill()  # the one that hung is not waited for again
        asked = now()
        assert await host.prepare(0, 2) == ":4"
        assert now() == asked
        await host.shut_down()

    in_virtual_time(story)


def test_where_engines_are_quick_a_spare_that_hangs_is_waited_for_one_grace() -> None:
    script = Script(prepares=[0.01, FOR_EVER, 0.0])

    async def story() -> None:
        host = Host(script, spare_after=0.001)
        await host.prepare(0, 2)
        await host.serve()
        await host.kill()
        asked = now()
        assert await host.prepare(0, 2) == ":3"
        assert now() - asked == pytest.approx(GRACE)
        await host.shut_down()

    in_virtual_time(story)


def test_a_spare_that_is_slow_but_no_slower_than_engines_are_is_waited_for() -> None:
    script = Script(prepares=[10.0, 19.0])

    async def story() -> None:
        host = Host(script, spare_after=1.0)
        await host.prepare(0, 2)
        await host.serve()
        await host.kill()
        assert await host.prepare(0, 2) == ":2"
        await host.shut_down()

    in_virtual_time(story)


# --- whether an engine is worth a spare -----------------------------------------------------------------------------------


def test_starting_and_preparing_count_together_and_the_time_between_does_not() -> None:
    async def spares(start: float, prepare: float) -> int:
        script = Script(starts=[start], prepares=[prepare])
        host = Host(script, spare_after=1.0)
        await host.start()
        await asyncio.sleep(100.0)
        await host.prepare(0, 2)
        await asyncio.sleep(100.0)
        await host.serve()
        made = script.made
        await host.shut_down()
        return made - 1

    async def story() -> None:
        assert await spares(0.6, 0.6) == 1
        assert await spares(0.4, 0.4) == 0

    in_virtual_time(story)


def test_a_preparation_that_was_left_and_went_on_counts() -> None:
    """An attempt ends while a rank is still importing: the next one finds that done, and the spare is wanted all the same."""
    script = Script(prepares=[3.0])

    async def story() -> None:
        host = Host(script, spare_after=2.0)
        preparing = asyncio.create_task(host.prepare(0, 2))
        await asyncio.sleep(1.0)
        preparing.cancel()
        await asyncio.wait({preparing})
        script.prepares = [0.0]
        await asyncio.sleep(100.0)
        await host.prepare(0, 2)
        await host.serve()
        assert script.made == 2
        await host.shut_down()

    in_virtual_time(story)


def test_a_preparation_that_hung_until_it_was_killed_is_no_measure() -> None:
    script = Script(prepares=[FOR_EVER, 4.0, FOR_EVER, 0.0])

    async def story() -> None:
        host = Host(script, spare_after=1.0)
        preparing = asyncio.create_task(host.prepare(0, 2))
        await asyncio.sleep(1_000.0)
        await host.kill()
        with pytest.raises(EngineFailure):
            await preparing
        assert await host.prepare(0, 2) == ":2"
        await host.serve()
        await host.kill()
        asked = now()
        assert await host.prepare(0, 2) == ":4"
        assert now() - asked == pytest.approx(8.0)
        await host.shut_down()

    in_virtual_time(story)


# --- connect --------------------------------------------------------------------------------------------------------------


def test_an_engine_that_does_not_connect_is_ended_at_the_group_s_deadline() -> None:
    async def story() -> None:
        host = Host(Script(connects=FOR_EVER), spare_after=FOR_EVER)
        await host.prepare(0, 2)
        asked = now()
        with pytest.raises(EngineFailure, match="did not connect within 60 s"):
            await host.serve()
        assert now() - asked == pytest.approx(60.0)
        await host.shut_down()

    in_virtual_time(story)

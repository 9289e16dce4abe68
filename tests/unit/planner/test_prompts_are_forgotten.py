"""Where a prompt lies, and for how long: nowhere in the store once its text is done, given up, or the instance stopped."""

from __future__ import annotations

from typing import Any

import pytest

from barrier import adopt
from barrier.store.keys import Keys
from barrier.testing import FakeStore, ManualClock
from planner.requests import RequestQueue
from tests.unit.planner.cluster import WORDS, cluster, text_of

pytestmark = pytest.mark.anyio

SECRET = "the prompt that must not lie about"


def places(store: FakeStore) -> list[str]:
    """The keys that hold the prompt."""
    return [key for key, value in store.contents().items() if SECRET in repr(value)]


async def test_a_prompt_is_gone_when_its_text_is_done_and_after_a_stop(store: FakeStore, clock: ManualClock) -> None:
    async with cluster(store, clock, 2) as made, made.planner() as planner:
        instance = await made.run(planner.launch(made.spec))
        await made.run(instance.ready(), limit=600)
        for _ in range(3):
            assert await made.run(text_of(instance.generate(SECRET)), limit=60) == "".join(WORDS)
        await clock.advance(10)
        assert places(store) == []
        assert max(made.loads_per_epoch()) == 1, "what brought the ranks up stays in the log"
        await made.run(instance.stop())
        assert places(store) == []


@pytest.mark.parametrize(("seconds", "gone"), [(5, 600), (3_600, 3_600)])
async def test_a_prompt_that_nobody_takes_up_is_gone_with_the_last_deadline(
    store: FakeStore, clock: ManualClock, seconds: float, gone: float
) -> None:
    """No planner runs, and the client was killed."""
    adopted = adopt(store.client("client"))
    queue: Any = RequestQueue(adopted, Keys("rankgate", "demo"), clock)
    await queue._ask("gen.1", prompt=SECRET, seconds=seconds)
    await queue._ask("gen.2", prompt="another", seconds=1)  # a later one with a shorter deadline takes nothing away
    await clock.advance(gone - 1)
    assert places(store) == [Keys("rankgate", "demo").requests]
    await clock.advance(2)
    assert places(store) == []
    await adopted.close()

"""Random calls against the reference model and the real scripts side by side: same calls, same answers, same state."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from barrier import Settings, adopt
from barrier.testing import FakeStore, ManualClock
from tests.depth import examples
from tests.property.side_by_side import PRELUDES, SideBySide, begun, carry_out, compare, steps


async def play(history: list[tuple[str, dict[str, Any]]]) -> None:
    clock = ManualClock()
    fake = FakeStore(clock)
    store = adopt(fake.client(), settings=Settings(lease=3, heartbeat=1))
    both = SideBySide(fake, clock, store)
    try:
        for kind, arguments in history:
            await carry_out(both, kind, arguments)
            await compare(both)
    finally:
        await store.close()


@settings(max_examples=examples(150), deadline=None)
@given(st.lists(steps(), min_size=5, max_size=40), st.sampled_from(PRELUDES))
def test_the_scripts_do_what_the_reference_model_does(
    history: list[tuple[str, dict[str, Any]]], prelude: tuple[str, ...]
) -> None:
    asyncio.run(play([*begun(prelude, history[0][1]), *history]))

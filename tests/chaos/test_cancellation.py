"""A task that is cancelled while it asks the sentinels for the master does end. Found by make chaos.

A runner that had come back after its replacement did not leave. Its reader of the task log was cancelled in the middle of that
question, redis-py's own connections lost the cancellation (see `barrier.store.connection`), and the reader read on for ever.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import Any

import pytest
from redis.exceptions import RedisError

from barrier import connect
from tests.chaos.sites import Watched

pytestmark = [pytest.mark.anyio, pytest.mark.redis]


async def test_a_cancellation_comes_through_a_question_to_the_sentinels() -> None:
    rng = random.Random(1)
    async with Watched() as site:
        store = await connect(site.url)
        pool: Any = store.commands.connection_pool

        async def ask_again_and_again() -> None:
            while True:
                with suppress(RedisError):
                    await pool.get_master_address()

        try:
            for _ in range(300):
                asking = asyncio.create_task(ask_again_and_again())
                await asyncio.sleep(rng.uniform(0, 0.004))  # any moment of the question
                asking.cancel()
                ended, _ = await asyncio.wait({asking}, timeout=5.0)
                while not asking.done():  # so that the test ends as well
                    asking.cancel()
                    await asyncio.wait({asking}, timeout=0.1)
                assert ended, "the cancellation was lost"
        finally:
            await store.close()

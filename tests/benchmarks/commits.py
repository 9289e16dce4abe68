"""When the server itself has committed a dispatch: the script notes the server's time at its start, the server counts how long it ran.

Nobody is on the way to ask, since the dispatch waits in the server: the planner learns of it later, when it has read the answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from barrier import Store, scripts

_NOTE = """
local server_time = redis.call('TIME')
redis.call('SET', KEYS[1] .. ':dispatched', server_time[1] .. '.' .. string.format('%06d', server_time[2]), 'PX', 60000)
"""
_ANSWER = "return { 'DISPATCHED', id }"


@contextmanager
def noting_script() -> Generator[None]:
    """While inside, `dispatch` notes when it began: TIME stands still while a script runs. Two commands more than the real one."""
    real = scripts.script
    dispatch = real("dispatch")
    assert dispatch.text.count(_ANSWER) == 1
    text = dispatch.text.replace(_ANSWER, _NOTE + _ANSWER)
    noting = replace(dispatch, text=text, sha=hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())

    def noting_or_real(name: str) -> scripts.Script:
        return noting if name == "dispatch" else real(name)

    with patch.object(scripts, "script", noting_or_real):
        yield


class Commits:
    """When the dispatches of one group were committed.

    Args:
        store: not the one whose clients are measured.
        epoch_key: the key of the group's epoch.
    """

    def __init__(self, store: Store, epoch_key: str) -> None:
        self._store = store
        self._noted = f"{epoch_key}:dispatched"
        self._before = (0, 0)

    async def begin(self) -> None:
        """Look at the server's count before a dispatch."""
        self._before = await self._count()

    async def commit(self) -> float:
        """When the one script that ran since `begin` was over, by the machine's own time in seconds."""
        calls, microseconds = await self._count()
        assert calls == self._before[0] + 1, f"{calls - self._before[0]} scripts ran, and not one"
        began = await self._store.commands.get(self._noted)
        return float(began) + (microseconds - self._before[1]) / 1e6

    async def _count(self) -> tuple[int, int]:
        stats: dict[str, Any] = await self._store.commands.info("commandstats")
        evalsha = stats.get("cmdstat_evalsha", {"calls": 0, "usec": 0})
        return int(evalsha["calls"]), int(evalsha["usec"])

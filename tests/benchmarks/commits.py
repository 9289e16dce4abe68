"""When the server itself has committed a dispatch: the script answers with the server's time at its start, the server counts how long it ran.

Nobody is on the way to ask, since the dispatch waits in the server: the planner learns of it later, when it has read the answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from barrier import Store
from barrier.protocol.outcomes import DispatchOutcome
from barrier.store import script, verbs

_ANSWER = "return { 'DISPATCHED', id }"
_TOLD = """
local server_time = redis.call('TIME')
return { 'DISPATCHED', id, server_time[1] .. '.' .. string.format('%06d', server_time[2]) }
"""


@contextmanager
def telling_script() -> Generator[list[float]]:
    """While inside, `dispatch` tells when it began: TIME stands still while a script runs. One command more than the real one.

    Gives the list to which each dispatch adds its time, in seconds of the machine's clock.
    """
    real, understood = script.script, vars(verbs)["_dispatched"]
    dispatch = real("dispatch")
    assert dispatch.text.count(_ANSWER) == 1
    text = dispatch.text.replace(_ANSWER, _TOLD)
    telling = replace(dispatch, text=text, sha=hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
    began: list[float] = []

    def telling_or_real(name: str) -> script.Script:
        return telling if name == "dispatch" else real(name)

    def note(reply: Sequence[Any]) -> DispatchOutcome:
        if reply[0] == b"DISPATCHED":
            *reply, at = reply
            began.append(float(at))
        return understood(reply)

    with patch.object(script, "script", telling_or_real), patch.object(verbs, "_dispatched", note):
        yield began


class Commits:
    """When the dispatches of one group were committed.

    Args:
        store: not the one whose clients are measured.
        began: where `telling_script` notes when they began.
    """

    def __init__(self, store: Store, began: list[float]) -> None:
        self._store = store
        self._began = began
        self._before = (0, 0)

    async def begin(self) -> None:
        """Look at the server's count before a dispatch."""
        self._began.clear()
        self._before = await self._count()

    async def commit(self) -> float:
        """When the one script that ran since `begin` was over, by the machine's own time in seconds."""
        calls, microseconds = await self._count()
        assert calls == self._before[0] + 1, f"{calls - self._before[0]} scripts ran, and not one"
        [began] = self._began
        return began + (microseconds - self._before[1]) / 1e6

    async def _count(self) -> tuple[int, int]:
        stats: dict[str, Any] = await self._store.commands.info("commandstats")
        evalsha = stats.get("cmdstat_evalsha", {"calls": 0, "usec": 0})
        return int(evalsha["calls"]), int(evalsha["usec"])

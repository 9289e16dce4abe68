"""The test kit: unit-test a planner or a runner without a server, without sleeping and with the faults that you choose.

- `FakeStore`: an in-memory store that any number of clients share; cut it off, restart it, flush it, roll it back.
- `ManualClock`: time that stands still until you move it, for the code under test and for the store.
- `FaultPlan`: faults that fire once, where you say: a reply lost after the commit, a refusal, a delay.
- `ScriptedRank` and `scripted_ranks`: ranks that do what the test says.
- `wait_until`: wait for a condition without sleeping for a fixed time.

Nothing here is a pytest plugin: make fixtures of these as you need them. Production code never imports this package. It needs
fakeredis: ``pip install 'rankgate[testing]'``.
"""

from barrier.testing.fake_store import FakeStore, StoreSnapshot
from barrier.testing.faults import FaultPlan
from barrier.testing.manual_clock import ManualClock
from barrier.testing.scripted_rank import ScriptedRank, scripted_ranks
from barrier.testing.waiting import wait_until

__all__ = [
    "FakeStore",
    "FaultPlan",
    "ManualClock",
    "ScriptedRank",
    "StoreSnapshot",
    "scripted_ranks",
    "wait_until",
]

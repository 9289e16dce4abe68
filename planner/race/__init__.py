"""``rankgate race``: shows the race that the barrier prevents, in three runs with real processes on a real server.

The scenario is the same in every run. Three ranks connect; the last one takes some seconds longer. Rank 1 is killed (SIGKILL) as soon
as it has said Connected, and its supervisor starts it again a little later. So for a moment the two others are connected and rank 1 is
not, although its last status is still Connected.

1. **A planner that trusts old statuses, and a runner that crashes.** The planner reads a table of statuses every 100 ms, as exo's
   does. It sends a rank its next task when the table says that this rank is due and that all others have come as far. Runners
   write their status into the table every 200 ms. Nobody lies, and nothing is delayed on purpose: the table holds the last status
   of every rank. The runner raises ``ValueError: Received LoadModel outside of state machine …``, as exo's does, and its process
   dies. Its supervisor restarts a process once; it has already done so after the kill, so it gives the process up.
2. **The same planner, and rankgate's runner.** The runner refuses a task out of state, and lives. The planner sends LoadModel again
   every half a second. After three refusals it begins again with all ranks. Its tasks enter the task log without the gate.
3. **rankgate's planner and runner.** LoadModel passes the gate only when every rank is connected at one instant. The report of rank 1
   counts for one lease after its death. The lease is over before the late rank arrives. (If the late rank came within the lease,
   LoadModel would be dispatched, the attempt would end for all, and the next one begin: nobody can see the death sooner.)

Everything is real: deaths are counted by exit codes, refusals by the history in the store. If the race does not happen in some run, the
output says so. The planner of the first two runs is a careful one: it does not send a task again within half a second, it waits while a
rank is missing from the table, and it hears of every refusal. But it cannot know that a status is old.
"""

from __future__ import annotations

from barrier import connect
from planner.embedded import EmbeddedServer
from planner.race.figures import RaceFigures, conclusions, table
from planner.race.gated import with_barrier
from planner.race.polling import stale_and_fragile, stale_and_graceful
from planner.race.scenario import SETTINGS, Say

__all__ = ["RaceFigures", "run_race"]


async def run_race(console_print: Say) -> RaceFigures:
    """Do all three runs on one embedded server, print each event, then the table. Takes about 20 seconds.

    Args:
        console_print: prints one line. The table fits into 80 columns; other lines may be longer.

    Raises:
        EmbeddedServerError: the server could not be started.
        StoreError: the server stopped answering.
    """
    say = console_print
    async with EmbeddedServer() as server:
        store = await connect(server.url, settings=SETTINGS)
        try:
            figures = RaceFigures(
                await stale_and_fragile(store, server.url, say),
                await stale_and_graceful(store, server.url, say),
                await with_barrier(store, server.url, say),
            )
        finally:
            await store.close()
    say("")
    for line in table(figures):
        say(line)
    say("")
    for line in conclusions(figures):
        say(line)
    return figures

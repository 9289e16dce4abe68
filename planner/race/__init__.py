"""``rankgate race``: the race that the barrier ends, three times over, with real processes on a real server.

The scenario is the same in every run. Three ranks connect; the last one takes some seconds longer. Rank 1 is killed (SIGKILL) as soon
as it has said Connected, and its supervisor starts it again a little later. So there is a moment at which the two others are connected
and rank 1 is not, though its last word, Connected, still stands.

1. **A planner that trusts stale statuses, and a runner that does not forgive.** The planner looks at a table of statuses every 100 ms,
   as exo's does, and sends a rank its next task when the table says that this rank is due and that all others have come as far.
   Runners write their status into the table every 200 ms. Nobody lies, and nobody is artificially late: the table simply
   says what every rank said last. The runner raises ``ValueError: Received LoadModel outside of state machine …``, as exo's
   does, and its process dies of it. Its supervisor, which mends one death in a row and mended the accident, gives it up.
2. **The same planner, and rankgate's runner.** The runner refuses what it cannot do, and lives. The planner sends LoadModel again
   every half a second, and after three refusals it begins anew with all ranks. Its tasks go into the task log without asking the gate.
3. **rankgate's planner and runner.** LoadModel passes the gate, which opens when every rank is connected at one instant. A word of
   rank 1 counts for one lease after its death, which is over before the late rank arrives. (Had the late rank come within that lease,
   LoadModel would have gone out, the attempt been ended for all, and the next one begun: a lease cannot know of a death sooner.)

Nothing is acted: deaths are counted by exit codes, refusals in the history that the store keeps, and if the race does not happen in some
run, the output says so. The planner of the first two runs is no straw man: it does not send a task again within half a second, it does
not go on while a rank is missing from the table, and it is told of every refusal. What it lacks is a way to know that a word is old.
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
    """Run all three on one embedded server, tell what happens line by line, then the table; some 20 seconds.

    Args:
        console_print: prints one line. The table fits into 80 columns; what happens is told in sentences that may be longer.

    Raises:
        EmbeddedServerError: there is no server to run on.
        StoreError: it stopped answering.
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

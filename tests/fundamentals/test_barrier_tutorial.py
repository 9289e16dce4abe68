"""The barrier, one idea at a time. Read it from top to bottom.

A group of ranks must enter the same step together: one that is told to load while another is not connected crashes, or hangs everybody.
The barrier is the planner's way to be sure. It knows ranks and status names, and nothing about models.

Everything here runs in this process, on `barrier.testing`: a store in memory, ranks that do what the test says, and a clock that stands
still until it is moved. Your own tests can do the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator

import pytest

from barrier import (
    Aborted,
    Already,
    Barrier,
    Dispatched,
    EpochId,
    Fenced,
    Leading,
    NotPromised,
    NotReady,
    Opened,
    Promised,
    Released,
    Restored,
    StoreUnavailable,
    Superseded,
    TimedOut,
    Unknown,
    Verdict,
    all_ranks,
    explain,
    find_break,
)
from barrier.testing import FakeStore, FaultPlan, ManualClock, ScriptedRank, scripted_ranks

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """anyio's plugin for pytest runs the tests; on asyncio, whatever else is installed."""
    return "asyncio"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> Generator[FakeStore]:
    fake = FakeStore(clock)
    yield fake
    assert fake.keys_without_lifetime() == [], "nothing of ours stays for ever"


async def opened(barrier: Barrier, world_size: int) -> EpochId:
    """Open an epoch that must open."""
    match await barrier.open(world_size):
        case Opened(epoch, _):
            return epoch
        case outcome:
            raise AssertionError(f"expected Opened, got {outcome}")


async def test_01_ranks_say_hello(store: FakeStore, clock: ManualClock) -> None:
    """A rank claims its place and reports a status. The planner sees all of them in one consistent picture."""
    async with Barrier(store.client(), "demo", world_size=2, clock=clock) as barrier:
        async with ScriptedRank(store, "demo", 0):
            snapshot = await barrier.inspect()
    assert [view.report.status if view.report else None for view in snapshot.ranks] == ["Idle", None]


async def test_02_an_epoch_needs_everybody(store: FakeStore, clock: ManualClock) -> None:
    """An epoch is one attempt at bringing the group up. It opens when every rank is there, and fixes who takes part: the roster."""
    async with Barrier(store.client(), "demo", clock=clock) as barrier, ScriptedRank(store, "demo", 0) as first:
        assert await barrier.open(2) == NotReady(ranks=(1,))
        async with ScriptedRank(store, "demo", 1) as second:
            epoch = await opened(barrier, 2)
            snapshot = await barrier.inspect()
            assert snapshot.epoch is not None
            assert snapshot.epoch.id == epoch
            assert snapshot.epoch.roster == (first.incarnation, second.incarnation)


async def test_03_a_rank_promises_before_it_acts(store: FakeStore, clock: ManualClock) -> None:
    """A rank gives its word to act in exactly one epoch, and only then do its reports count in it."""
    async with Barrier(store.client(), "demo", clock=clock) as barrier, ScriptedRank(store, "demo", 0) as rank:
        epoch = await opened(barrier, 1)
        await rank.report("Connected")
        assert await barrier.dispatch(epoch, "load", "{}", "Connected") == NotReady((0,))
        assert await rank.member.promise(epoch) == Promised(epoch, world_size=1)
        await rank.report("Connected")
        assert isinstance(await barrier.dispatch(epoch, "load", "{}", "Connected"), Dispatched)


async def test_04_the_gate_opens_at_the_instant_at_which_all_have_arrived(store: FakeStore, clock: ManualClock) -> None:
    """`dispatch` checks every rank and appends the task in one step of the store. There is no moment in between."""
    async with Barrier(store.client(), "demo", clock=clock) as barrier, scripted_ranks(store, "demo", 3) as ranks:
        epoch = await opened(barrier, 3)
        await ranks[0].arrive("Connected")
        await ranks[2].arrive("Connected")
        assert await barrier.dispatch(epoch, "load", "{}", "Connected") == NotReady(ranks=(1,))
        await ranks[1].arrive("Connected")
        assert isinstance(await barrier.dispatch(epoch, "load", "{}", "Connected"), Dispatched)


async def test_05_every_rank_reads_the_same_log(store: FakeStore, clock: ManualClock) -> None:
    """Tasks stand in one ordered log, so all ranks see one order. A rank learns of a task by a push."""
    async with Barrier(store.client(), "demo", clock=clock) as barrier, scripted_ranks(store, "demo", 2) as ranks:
        epoch = await opened(barrier, 2)
        for rank in ranks:
            await rank.arrive("Connected")
        await barrier.dispatch(epoch, "load", '{"model": "tiny"}', "Connected")
        for rank in ranks:
            task = await rank.next_task()
            assert (task.step, task.payload, task.epoch) == ("load", b'{"model": "tiny"}', epoch)


async def test_06_a_step_happens_once(store: FakeStore, clock: ManualClock) -> None:
    """Whoever asks again is told where the task stands. So every call may be repeated."""
    async with Barrier(store.client(), "demo", clock=clock) as barrier, scripted_ranks(store, "demo", 2) as ranks:
        epoch = await opened(barrier, 2)
        for rank in ranks:
            await rank.arrive("Connected")
        first = await barrier.dispatch(epoch, "load", "{}", "Connected")
        assert isinstance(first, Dispatched)
        assert await barrier.dispatch(epoch, "load", "{}", "Connected") == Already(first.id)


async def test_07_a_reply_may_be_lost_after_the_commit(store: FakeStore, clock: ManualClock) -> None:
    """An error means "unknown": the task may be in the log. Call again, and you know."""
    plan = FaultPlan().lose_reply("dispatch")
    async with (
        Barrier(store.client(faults=plan), "demo", clock=clock) as barrier,
        ScriptedRank(store, "demo", 0) as rank,
    ):
        epoch = await opened(barrier, 1)
        await rank.arrive("Connected")
        with pytest.raises(StoreUnavailable):
            await barrier.dispatch(epoch, "load", "{}", "Connected")
        assert isinstance(await barrier.dispatch(epoch, "load", "{}", "Connected"), Already)
    plan.assert_fired()


async def test_08_waiting_is_a_push_and_has_a_deadline(store: FakeStore, clock: ManualClock) -> None:
    """`release` waits and dispatches when the last rank arrives; no tick passes in between."""
    async with Barrier(store.client(), "demo", clock=clock) as barrier, scripted_ranks(store, "demo", 2) as ranks:
        epoch = await opened(barrier, 2)
        release = asyncio.create_task(barrier.release(epoch, "load", "{}", "Connected", timeout=60))
        await ranks[0].arrive("Connected")
        await clock.advance(0)
        assert not release.done()
        began = clock.now()
        await ranks[1].arrive("Connected")
        await clock.advance(0)
        assert isinstance(await release, Released)
        assert clock.now() == began


async def test_09_a_timeout_names_every_missing_rank(store: FakeStore, clock: ManualClock) -> None:
    """A wait that ends without a release says what it waited for, in one sentence. An hour takes a moment here."""
    async with Barrier(store.client(), "demo", clock=clock) as barrier, scripted_ranks(store, "demo", 3) as ranks:
        epoch = await opened(barrier, 3)
        await ranks[1].arrive("Connected")
        async with ranks[0].heartbeat(), ranks[1].heartbeat():
            outcome = await clock.run(barrier.wait(epoch, "Connected", timeout=60))
    assert isinstance(outcome, TimedOut)
    assert outcome.missing == (0, 2)
    assert "waiting for 2 of 3 ranks: rank 0 on node-0 (Idle for 60.0 s, wanted Connected" in outcome.explanation
    assert "rank 2 (no live report, wanted Connected)" in outcome.explanation


async def test_10_the_sentence_can_be_had_at_any_time(store: FakeStore, clock: ManualClock) -> None:
    """`explain` is a pure function of a picture: the log, the command line and your tests can use the same words."""
    async with Barrier(store.client(), "demo", clock=clock) as barrier, ScriptedRank(store, "demo", 0) as rank:
        await opened(barrier, 1)
        await rank.arrive("Loading")
        await rank.report(progress=(12, 32))
        assert explain(await barrier.inspect(), all_ranks(1, "Loaded")) == (
            "demo, attempt 1: waiting for 1 of 1 ranks: rank 0 on node-0 (Loading 12/32 for 0.0 s, wanted Loaded; "
            "report 0.0 s old, lease 6.0 s left)"
        )


async def test_11_progress_is_not_a_stall(store: FakeStore, clock: ManualClock) -> None:
    """A deadline counts from the last progress: a slow load goes on, a load that stands still does not."""
    async with Barrier(store.client(), "demo", clock=clock) as barrier, ScriptedRank(store, "demo", 0) as rank:
        epoch = await opened(barrier, 1)
        await rank.arrive("Loading")
        wait = asyncio.create_task(barrier.wait(epoch, "Loaded", timeout=10))
        for layer in range(8):
            await rank.report("Loading", progress=(layer, 8))
            await clock.advance(5)
        assert not wait.done()
        assert isinstance(await clock.run(wait), TimedOut)


async def test_12_a_failure_ends_the_epoch_for_everybody(store: FakeStore, clock: ManualClock) -> None:
    """A collective with one rank missing hangs. So one failure is a verdict for all; the first verdict stands."""
    async with Barrier(store.client(), "demo", clock=clock) as barrier, scripted_ranks(store, "demo", 2) as ranks:
        epoch = await opened(barrier, 2)
        await ranks[0].arrive("Connected")
        await ranks[1].promise()
        await ranks[1].fail("no route to host")
        verdict = Verdict.aborted("rank 1 on node-1 failed: no route to host", culprit=1)
        assert await barrier.wait(epoch, "Connected", timeout=60) == Aborted(verdict)
        await ranks[1].report("Connected")
        assert await barrier.dispatch(epoch, "load", "{}", "Connected") == Aborted(verdict)


async def test_13_a_restarted_rank_is_another_process(store: FakeStore, clock: ManualClock) -> None:
    """The roster names lives, not places: whoever comes back has lost what it had, and breaks the epoch."""
    async with Barrier(store.client(), "demo", clock=clock) as barrier, scripted_ranks(store, "demo", 2) as ranks:
        epoch = await opened(barrier, 2)
        for rank in ranks:
            await rank.arrive("Connected")
        await ranks[1].restart()
        found = find_break(await barrier.inspect())
        assert found is not None
        assert found.reason == "rank 1 on node-1 was restarted"
        assert await barrier.dispatch(epoch, "load", "{}", "Connected") == NotReady((1,))
        assert isinstance(await ranks[1].member.promise(epoch), NotPromised)


async def test_14_the_next_attempt_has_a_higher_epoch(store: FakeStore, clock: ManualClock) -> None:
    """An epoch is used once. Ranks tear down, retire and promise the next; the old one is answered by name."""
    async with Barrier(store.client(), "demo", clock=clock) as barrier, scripted_ranks(store, "demo", 2) as ranks:
        first = await opened(barrier, 2)
        for rank in ranks:
            await rank.arrive("Connected")
        await barrier.conclude(first, Verdict.aborted("it stalled"))
        second = await opened(barrier, 2)
        assert second.number > first.number
        for rank in ranks:
            await rank.retire()
            await rank.arrive("Connected")
        assert await barrier.dispatch(first, "load", "{}", "Connected") == Superseded(by=second)
        assert isinstance(await barrier.dispatch(second, "load", "{}", "Connected"), Dispatched)


async def test_15_a_promise_is_spent_for_good(store: FakeStore, clock: ManualClock) -> None:
    """Who has torn down never acts in the same epoch again, whatever the store says."""
    async with Barrier(store.client(), "demo", clock=clock) as barrier, ScriptedRank(store, "demo", 0) as rank:
        epoch = await opened(barrier, 1)
        await rank.arrive("Connected")
        await rank.retire()
        assert isinstance(await rank.member.promise(epoch), NotPromised)


async def test_16_a_silent_rank_lapses(store: FakeStore, clock: ManualClock) -> None:
    """A report lives for one lease. Heartbeats renew it; without them the rank does not count."""
    async with Barrier(store.client(), "demo", clock=clock) as barrier, scripted_ranks(store, "demo", 2) as ranks:
        epoch = await opened(barrier, 2)
        for rank in ranks:
            await rank.arrive("Connected")
        async with ranks[0].heartbeat():
            await clock.advance(barrier.settings.lease + 0.1)
            await barrier.lead()
            assert await barrier.dispatch(epoch, "load", "{}", "Connected") == NotReady((1,))


async def test_17_one_planner_leads(store: FakeStore, clock: ManualClock) -> None:
    """A planner acts under a term. When its lease is over another may lead, and the first finds itself fenced."""
    async with (
        Barrier(store.client(), "demo", world_size=1, clock=clock, holder="first") as first,
        Barrier(store.client(), "demo", world_size=1, clock=clock, holder="second") as second,
        ScriptedRank(store, "demo", 0) as rank,
        rank.heartbeat(),
    ):
        epoch = await opened(first, 1)
        await rank.arrive("Connected")
        await clock.advance(first.settings.lease + 0.1)
        leading = await second.lead()
        assert isinstance(leading, Leading)
        assert await first.dispatch(epoch, "load", "{}", "Connected") == Fenced(leading.leadership.term, "second")
        assert isinstance(await second.dispatch(epoch, "load", "{}", "Connected"), Dispatched)


async def test_18_a_store_that_forgot_releases_nobody(store: FakeStore, clock: ManualClock) -> None:
    """Missing state is Unknown, never a release. Heartbeats bring the reports back by themselves."""
    async with Barrier(store.client(), "demo", clock=clock) as barrier, ScriptedRank(store, "demo", 0) as rank:
        epoch = await opened(barrier, 1)
        await rank.arrive("Connected")
        async with rank.heartbeat():
            store.flush()
            await clock.advance(barrier.settings.heartbeat)
            await barrier.lead()
            assert (await barrier.inspect()).ranks[0].report is not None
            assert isinstance(await barrier.dispatch(epoch, "load", "{}", "Connected"), Unknown)


async def test_19_a_flush_need_not_cost_a_loaded_model(store: FakeStore, clock: ManualClock) -> None:
    """If all ranks say exactly the same, the lost record is written back as it was."""
    async with Barrier(store.client(), "demo", clock=clock) as barrier, scripted_ranks(store, "demo", 2) as ranks:
        epoch = await opened(barrier, 2)
        for rank in ranks:
            await rank.arrive("Ready")
        store.flush()
        for rank in ranks:
            await rank.beat()
        await barrier.lead()
        assert await barrier.restore(epoch, "Ready", ["load"], ordinal=1) == Restored(epoch, 1)
        assert isinstance(await barrier.dispatch(epoch, "load", "{}", "Ready"), Already)


async def test_20_a_partition_is_an_error_not_an_answer(store: FakeStore, clock: ManualClock) -> None:
    """Outcomes are values; exceptions mean "could not find out". After the partition everything goes on."""
    async with Barrier(store.client("planner"), "demo", clock=clock) as barrier, ScriptedRank(store, "demo", 0) as rank:
        epoch = await opened(barrier, 1)
        await rank.arrive("Connected")
        store.partition("planner")
        with pytest.raises(StoreUnavailable):
            await barrier.wait(epoch, "Connected", timeout=60)
        store.heal()
        assert await barrier.wait(epoch, "Connected", timeout=60) == Released(epoch)

"""The runner and its store: outages are lived through, promises come after tear-downs, and a lost claim ends everything."""

from __future__ import annotations

import asyncio

import pytest

from barrier import ClaimLost, EpochAnnounced, EpochId, Member, RankTaken, StoreUnavailable
from barrier.protocol.ids import new_incarnation
from barrier.testing import FakeStore, FaultPlan, ManualClock
from barrier.testing.waiting import settle
from runner import Runner
from runner.messages import StatusName
from runner.testing import ScriptedEngine, ScriptedHost
from tests.unit.runner.rig import WAY, Rig, kinds, make_task, other_nonce, runner_rig

pytestmark = pytest.mark.anyio

WITH_AN_ENGINE: tuple[StatusName, ...] = (
    "Connecting",
    "Connected",
    "Loading",
    "Loaded",
    "WarmingUp",
    "Ready",
    "Running",
    "Failed",
)


# --- tear down, then promise ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["Idle", *WITH_AN_ENGINE])
async def test_the_engine_is_gone_before_the_next_promise(status: StatusName) -> None:
    async with runner_rig() as rig:
        await rig.reach(status)
        first, begun = rig.epoch, len(rig.journal)
        await rig.conclude()
        second = await rig.open()
        assert rig.epoch == second != first
        check_order(rig, begun)


@pytest.mark.parametrize("status", WITH_AN_ENGINE)
async def test_also_where_this_rank_never_read_the_verdict(status: StatusName) -> None:
    """Cut off, and the log trimmed meanwhile: it learns of the next epoch from the record, by its heartbeat."""
    async with runner_rig() as rig:
        await rig.reach(status)
        first, begun = rig.epoch, len(rig.journal)
        rig.store.partition("runner")
        await rig.conclude()
        second = await rig.open()
        await rig.barrier.store.commands.delete(rig.barrier.keys.tasks)
        assert rig.epoch == first
        rig.store.heal()
        await rig.clock.advance(2 * rig.member.settings.heartbeat)
        assert rig.epoch == second
        check_order(rig, begun)
        rig.engine.release()
        assert kinds(await rig.ask(make_task("ConnectToGroup", rig.epoch)))[-1] == "=> Connected"


def check_order(rig: Rig, begun: int) -> None:
    """Host closed, then promised; and nothing of the old engine in between."""
    since = rig.journal[begun:]
    assert since.count("promise") == 1
    assert "host close" in since[: since.index("promise")]
    assert not rig.engine.active("close")
    assert not any(rig.engine.active(phase) for _, phase, _, _ in WAY)
    assert "close" not in since[since.index("promise") :]


async def test_a_promise_waits_for_a_tear_down_that_takes_its_time() -> None:
    async with runner_rig() as rig:
        await rig.reach("Ready")
        rig.engine.hold("close")
        await rig.conclude()
        await rig.open()
        await rig.clock.advance(rig.member.settings.lease)
        assert rig.journal.count("promise") == 1, "the one before"
        assert (await rig.report()).status == "Ready", "and its report goes on saying what is true"
        rig.engine.release("close")
        await settle()
        assert rig.journal.count("promise") == 2


async def test_it_promises_what_it_is_in_once_and_nothing_lower() -> None:
    async with runner_rig() as rig:
        await rig.reach("Loaded")
        begun = len(rig.journal)
        for epoch in (rig.epoch, other_nonce(rig.epoch), EpochId(rig.epoch.number - 1, rig.epoch.nonce)):
            rig.member.deliver(EpochAnnounced(epoch))
        assert await rig.tell() == []
        assert rig.status == "Loaded"
        assert rig.journal[begun:] == []


async def test_an_epoch_that_is_gone_again_is_not_promised() -> None:
    """Announced and superseded before this rank came to it: torn down for good reason, and in no epoch now."""
    async with runner_rig() as rig:
        await rig.reach("Loaded")
        rig.member.deliver(EpochAnnounced(EpochId(rig.epoch.number + 1, "f" * 32)))
        assert kinds(await rig.tell()) == ["=> Idle"]
        assert rig.member.promised is None
        assert (await rig.report()).epoch is None
        assert any("not current any more" in line for line in rig.log)


async def test_a_promise_that_the_store_kept_from_it_is_tried_again() -> None:
    plan = FaultPlan()
    async with runner_rig(faults=plan) as rig:
        plan.refuse("hmget").lose_reply("hmget")
        epoch = await rig.open()
        assert rig.member.promised is None
        await rig.clock.advance(2 * rig.member.settings.command_seconds)
        plan.assert_fired()
        assert rig.member.promised == epoch
        assert (await rig.report()).epoch == epoch


async def test_a_restarted_runner_is_on_no_roster_and_says_so() -> None:
    """It reads of an epoch that its predecessor was in, and does not join."""
    async with runner_rig() as rig:
        await rig.open()
        epoch = rig.epoch
        rig.runner.stop()
        await rig.ended()
        member = Member(rig.store.client("next life"), "demo", rank=0, world_size=2, clock=rig.clock)
        runner = Runner(member, ScriptedHost(ScriptedEngine(auto=True)), clock=rig.clock)
        running = asyncio.create_task(runner.run())
        await settle()
        await rig.clock.advance(member.settings.heartbeat)
        assert member.promised is None
        assert (await rig.report()).status == "Idle"
        await rig.put(make_task("ConnectToGroup", epoch), epoch=epoch)
        await settle()
        report = await rig.report()
        assert (report.incarnation, report.status, report.epoch) == (member.incarnation, "Idle", None)
        runner.stop()
        await running
        await member.close()


# --- outages ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", WITH_AN_ENGINE[:-1])
async def test_an_outage_is_lived_through(status: StatusName) -> None:
    """The lease lapses; engine and process stay, and with the store the report comes back, whole."""
    async with runner_rig() as rig:
        await rig.reach(status)
        epoch, calls = rig.epoch, list(rig.journal)
        rig.store.partition("runner")
        await rig.clock.advance(3 * rig.member.settings.lease)
        assert await rig.barrier.store.commands.get(rig.barrier.keys.rank(0)) is None, "for everybody else it is gone"
        assert rig.journal == calls
        rig.store.heal()
        await rig.clock.advance(2 * rig.member.settings.heartbeat)
        report = await rig.report()
        assert (report.status, report.epoch) == (status, epoch)
        assert rig.journal == calls


async def test_what_happened_during_an_outage_is_said_after_it_in_order() -> None:
    async with runner_rig() as rig:
        await rig.reach("Loading")
        rig.store.partition("runner")
        rig.engine.finish("load")
        await rig.clock.advance(rig.member.settings.heartbeat)
        assert rig.status == "Loaded"
        assert await rig.tell() == []
        rig.store.heal()
        await rig.clock.advance(rig.member.settings.heartbeat)
        assert kinds(await rig.tell()) == ["Complete", "=> Loaded"]
        assert (await rig.report()).status == "Loaded"
        assert kinds(await rig.ask(make_task("StartWarmup", rig.epoch))) == ["Running", "=> WarmingUp", "ack"]


async def test_a_task_dispatched_during_an_outage_is_done_after_it_once() -> None:
    async with runner_rig(auto=True) as rig:
        await rig.open()
        await rig.ask(make_task("ConnectToGroup", rig.epoch))
        rig.store.partition("runner")
        await rig.put(make_task("LoadModel", rig.epoch))
        await rig.clock.advance(2.0)
        assert rig.engine.calls.count("load") == 0
        rig.store.heal()
        await rig.clock.advance(2 * rig.member.settings.heartbeat)
        assert rig.status == "Loaded"
        assert rig.engine.calls.count("load") == 1


@pytest.mark.parametrize("status", ["Connected", "Ready", "Running"])
async def test_a_flushed_store_is_healed_by_the_next_heartbeat(status: StatusName) -> None:
    async with runner_rig() as rig:
        await rig.reach(status)
        epoch, calls = rig.epoch, list(rig.journal)
        rig.store.flush()
        await rig.clock.advance(rig.member.settings.heartbeat)
        report = await rig.report()
        assert (report.status, report.epoch) == (status, epoch)
        assert rig.journal == calls, "nobody drops a model for a store"


async def test_events_whose_reply_was_lost_come_again_under_the_same_number() -> None:
    plan = FaultPlan()
    async with runner_rig(faults=plan, auto=True) as rig:
        await rig.open()
        plan.lose_reply("exec", touching="|Connecting|")
        await rig.ask(make_task("ConnectToGroup", rig.epoch))
        plan.assert_fired()
        await rig.clock.advance(rig.member.settings.heartbeat)
        assert rig.status == "Connected"
        numbers = [int(fields[b"seq"]) for fields in await rig.raw_events() if fields.get(b"source") == b"rank"]
        assert len(numbers) > len(set(numbers)), "some were written twice"
        once = list(dict.fromkeys(numbers))
        assert once == sorted(once), "and a reader that drops what it has seen has them all, in order"
        assert once == list(range(1, len(once) + 1))


# --- claims -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["Idle", *WITH_AN_ENGINE])
async def test_a_lost_claim_tears_down_and_raises(status: StatusName) -> None:
    """Another process has the rank: two engines of one rank in a collective would be worse than none."""
    async with runner_rig() as rig:
        await rig.reach(status)
        other = new_incarnation(0)
        await rig.barrier.store.commands.set(rig.barrier.keys.claim(0), other, px=60_000)
        report = await rig.barrier.store.commands.get(rig.barrier.keys.rank(0))
        await rig.clock.advance(rig.member.settings.heartbeat)
        with pytest.raises(ClaimLost, match=f"process {other} holds this rank now"):
            await rig.ended()
        assert not any(rig.engine.active(phase) for _, phase, _, _ in WAY)
        if status != "Idle":
            assert {"host shut_down", "close"} & set(rig.journal)
        assert await rig.barrier.store.commands.get(rig.barrier.keys.claim(0)) == other.encode(), (
            "it is not ours to delete"
        )
        assert report is not None


async def test_a_claim_that_turns_out_lost_while_a_task_is_answered() -> None:
    async with runner_rig() as rig:
        await rig.reach("Ready")
        task = make_task("TextGeneration", rig.epoch)
        await rig.ask(task)
        await rig.barrier.store.commands.set(rig.barrier.keys.claim(0), new_incarnation(0), px=60_000)
        await rig.put(make_task("LoadModel", rig.epoch))
        with pytest.raises(ClaimLost):
            await rig.ended()
        assert [chunk.finish for chunk in await rig.chunks(task)] == ["error"]


async def test_a_rank_that_is_taken_is_told_so() -> None:
    async with runner_rig() as rig:
        second = Member(rig.store.client("second"), "demo", rank=0, world_size=2, clock=rig.clock)
        runner = Runner(second, ScriptedHost(ScriptedEngine()), clock=rig.clock)
        with pytest.raises(RankTaken, match="rank 0: " + rig.member.incarnation):
            await rig.clock.run(runner.run())
        assert rig.status == "Idle"
        await second.close()


async def test_a_store_that_is_not_there_to_begin_with_is_an_error() -> None:
    clock = ManualClock()
    store = FakeStore(clock)
    store.partition()
    member = Member(store.client("runner"), "demo", rank=0, clock=clock)
    with pytest.raises(StoreUnavailable):
        await Runner(member, ScriptedHost(ScriptedEngine()), clock=clock).run()
    await member.close()


# --- leaving ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["Idle", *WITH_AN_ENGINE, "ShuttingDown"])
async def test_stop_in_every_status(status: StatusName) -> None:
    async with runner_rig() as rig:
        await rig.reach(status)
        rig.runner.stop()
        if status == "ShuttingDown":
            rig.engine.release("close")
        await rig.ended()
        keys = rig.barrier.keys
        assert await rig.barrier.store.commands.exists(keys.rank(0), keys.claim(0)) == 0
        assert not any(rig.engine.active(phase) for _, phase, _, _ in WAY)


@pytest.mark.parametrize("status", ["Idle", *WITH_AN_ENGINE, "ShuttingDown"])
async def test_a_cancelled_run_kills_the_engine_and_gives_the_rank_back(status: StatusName) -> None:
    """Regression: what watched the engine, and what waited for generations, was left behind (the rig looks for both)."""
    async with runner_rig() as rig:
        await rig.reach(status)
        assert rig.running is not None
        rig.running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await rig.ended()
        assert "host shut_down" in rig.journal
        keys = rig.barrier.keys
        assert await rig.barrier.store.commands.exists(keys.rank(0), keys.claim(0)) == 0


async def test_stop_while_it_waits_for_its_rank() -> None:
    async with runner_rig() as rig:
        second = Member(rig.store.client("second"), "demo", rank=0, world_size=2, clock=rig.clock)
        engine = ScriptedEngine()
        runner = Runner(second, ScriptedHost(engine), clock=rig.clock)
        running = asyncio.create_task(runner.run())
        await settle()
        runner.stop()
        await asyncio.wait_for(running, 5)
        assert engine.calls == ["start", "host shut_down"]
        await second.close()


async def test_a_runner_that_ended_by_itself_is_not_said_to_have_been_asked() -> None:
    """Regression: one that could not claim its rank said first that it was asked to end, and gave a rank back that it never had."""
    async with runner_rig() as rig:
        second = Member(rig.store.client("second"), "demo", rank=0, world_size=2, clock=rig.clock)
        runner = Runner(second, ScriptedHost(ScriptedEngine()), clock=rig.clock)
        rig.store.partition("second")
        with pytest.raises(StoreUnavailable):
            await runner.run()
        runner.stop()
        assert not any("asked to end" in line for line in rig.log)
        await second.close()


async def test_stop_during_an_outage_does_not_wait_for_the_store() -> None:
    """With a client that waits, too: its stream's end is tried once and given up."""
    async with runner_rig() as rig:
        await rig.reach("Running")
        rig.store.partition("runner")
        rig.runner.stop()
        await rig.ended()
        assert any("rank was not given back" in line for line in rig.log)
        rig.runner.stop()
        assert len([line for line in rig.log if "asked to end" in line]) == 1, "said once, at once"
        rig.store.heal()
        await rig.clock.advance(rig.member.settings.lease + 1)

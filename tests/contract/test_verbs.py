"""The same calls, the same answers, wherever the scripts run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from barrier import (
    Aborted,
    Already,
    Barrier,
    Concluded,
    Disagree,
    Dispatched,
    EpochAnnounced,
    EpochId,
    Fenced,
    Following,
    Leading,
    LogId,
    NotPromised,
    NotReady,
    Opened,
    RankTaken,
    Released,
    Restored,
    Settings,
    StoreCorrupt,
    StoreUnavailable,
    Superseded,
    TimedOut,
    Unconcluded,
    Unknown,
    Verdict,
    VerdictAnnounced,
)
from barrier.testing import FaultPlan, ScriptedRank, scripted_ranks, wait_until
from tests.contract.conftest import Place

pytestmark = pytest.mark.anyio

NONCE = "0" * 32
LONG = Settings(lease=60.0, heartbeat=2.0, reader_block=0.5, backstop=1.0)
"""A lease that no test outlives, so that nothing depends on the machine's speed."""


@dataclass
class Group:
    barrier: Barrier
    ranks: list[ScriptedRank]
    commands: Any

    async def open(self) -> EpochId:
        outcome = await self.barrier.open(len(self.ranks))
        assert isinstance(outcome, Opened), outcome
        return outcome.epoch

    async def all_connected(self) -> EpochId:
        epoch = await self.open()
        for rank in self.ranks:
            await rank.arrive("Connected")
        return epoch

    async def tasks(self) -> list[str]:
        entries = await self.commands.xrange(self.barrier.keys.tasks)
        return [entry_id.decode() for entry_id, fields in entries if fields[b"kind"] == b"task"]


@asynccontextmanager
async def group_at(
    place: Place, world_size: int = 3, *, faults: FaultPlan | None = None, settings: Settings = LONG
) -> AsyncGenerator[Group]:
    planner, others = place.client(faults), place.client()
    barrier = Barrier(planner, "demo", world_size=world_size, settings=settings, holder="planner")
    try:
        async with barrier, scripted_ranks(others, "demo", world_size, settings=settings) as ranks:
            assert isinstance(await barrier.lead(), Leading)
            yield Group(barrier, ranks, others)
    finally:
        await planner.aclose()
        await others.aclose()


@pytest.fixture
async def group(place: Place) -> AsyncGenerator[Group]:
    async with group_at(place) as made:
        yield made


async def test_a_whole_attempt_from_hello_to_verdict(group: Group) -> None:
    barrier = group.barrier
    epoch = await group.open()
    assert await barrier.dispatch(epoch, "connect", "{}", "Connected") == NotReady((0, 1, 2))
    release = asyncio.create_task(barrier.release(epoch, "load", '{"é": 1}', "Connected", timeout=30))
    for rank in group.ranks:
        await rank.arrive("Connected")
    assert await release == Released(epoch, LogId(epoch.number, 2))
    for rank in group.ranks:
        task = await rank.next_task()
        assert (task.epoch, task.id, task.previous, task.step, task.missed) == (
            epoch,
            LogId(epoch.number, 2),
            1,
            "load",
            False,
        )
        assert task.payload.decode() == '{"é": 1}'
        await rank.report("Loaded")
    assert await barrier.wait(epoch, "Loaded", timeout=30) == Released(epoch)
    verdict = Verdict.stopped()
    assert await barrier.conclude(epoch, verdict) == Concluded(verdict, first=True)
    for rank in group.ranks:
        entry = await rank.next_entry()
        while isinstance(entry, EpochAnnounced):
            entry = await rank.next_entry()
        assert entry == VerdictAnnounced(epoch, verdict)


async def test_lead(group: Group) -> None:
    mine = group.barrier.leadership
    assert mine is not None
    assert await group.barrier.lead() == Leading(mine)
    standby = Barrier(group.commands, "demo", world_size=3, settings=LONG, holder="standby")
    followed = await standby.lead()
    assert isinstance(followed, Following)
    assert followed.leader == mine
    assert 0 < followed.left_ms <= 60_000
    await group.barrier.resign()
    taken = await standby.lead()
    assert isinstance(taken, Leading)
    assert taken.leadership.term > mine.term
    assert isinstance(await group.barrier.lead(), Following)
    await standby.close()


async def test_open(group: Group) -> None:
    epoch = await group.open()
    now = (await group.barrier.inspect()).now_ms
    assert epoch.number <= now, "the server's clock, in milliseconds"
    assert await group.barrier.open() == Unconcluded(epoch)
    await group.barrier.conclude(epoch, Verdict.stopped())
    again = await group.barrier.open()
    assert isinstance(again, Opened)
    assert (again.epoch.number > epoch.number, again.ordinal) == (True, 2)
    async with ScriptedRank(group.commands, "demo", 3, digest="cafe", settings=LONG):
        await group.barrier.conclude(again.epoch, Verdict.stopped())
        assert await group.barrier.open(4, digest="beef") == Disagree("beef", {3: "cafe"})
    assert await group.barrier.open(5) == NotReady((3, 4))


async def test_dispatch(group: Group) -> None:
    barrier, epoch = group.barrier, await group.open()
    await group.ranks[1].arrive("Connected")
    assert await barrier.dispatch(epoch, "load", "{}", "Connected") == NotReady((0, 2))
    for rank in (0, 2):
        await group.ranks[rank].arrive("Connected")
    assert await barrier.dispatch(epoch, "load", "{}", "Connected", after="connect") == Unknown(
        "step connect was not dispatched in this epoch"
    )
    assert await barrier.dispatch(epoch, "load", "{}", "Connected") == Dispatched(LogId(epoch.number, 2))
    assert await barrier.dispatch(epoch, "load", "{}", "Connected") == Already(LogId(epoch.number, 2))
    assert await barrier.dispatch(epoch, "load", "{}", "Connected", attempt=2) == Dispatched(LogId(epoch.number, 3))
    for _ in range(2):
        outcome = await barrier.dispatch(epoch, "generate:1", "{}", ("Connected", "Ready"), repeatable=True)
        assert isinstance(outcome, Dispatched | Already)
        assert outcome.id == LogId(epoch.number, 4)
    assert await barrier.dispatch(EpochId(epoch.number, NONCE), "load", "{}", "Connected") == Superseded(epoch)
    assert await barrier.dispatch(EpochId(epoch.number + 1, NONCE), "load", "{}", "Connected") == Unknown(
        f"the store went back to epoch {epoch.number}"
    )
    verdict = Verdict.aborted("because", 2, "permanent")
    await barrier.conclude(epoch, verdict)
    assert await barrier.dispatch(epoch, "load", "{}", "Connected") == Aborted(verdict)
    assert len(await group.tasks()) == 3


async def test_a_fenced_planner_changes_nothing(group: Group) -> None:
    epoch = await group.all_connected()
    await group.commands.hset(group.barrier.keys.leader, "holder", "another")
    assert group.barrier.leadership is not None
    fenced = Fenced(group.barrier.leadership.term, "another")
    assert await group.barrier.dispatch(epoch, "load", "{}", "Connected") == fenced
    assert await group.barrier.conclude(epoch, Verdict.stopped()) == fenced
    assert await group.barrier.open() == fenced
    assert await group.barrier.restore(epoch, "Connected", [], ordinal=1) == fenced
    assert await group.tasks() == []


async def test_conclude(group: Group) -> None:
    epoch = await group.all_connected()
    first = Verdict.aborted("the first", 1)
    assert await group.barrier.conclude(epoch, first) == Concluded(first, first=True)
    assert await group.barrier.conclude(epoch, Verdict.stopped()) == Concluded(first, first=False)
    assert await group.barrier.conclude(EpochId(epoch.number, NONCE), first) == Superseded(epoch)
    await group.commands.delete(group.barrier.keys.epoch)
    assert await group.barrier.conclude(epoch, first) == Unknown("the store has no epoch record")


async def test_restore_after_everything_was_lost(group: Group) -> None:
    epoch = await group.all_connected()
    await group.barrier.dispatch(epoch, "load", "{}", "Connected")
    for rank in group.ranks:
        await rank.next_task()
        await rank.report("Loaded")
    await group.commands.flushall()
    await group.barrier.lead()
    assert await group.barrier.restore(epoch, "Loaded", ["load"], ordinal=1) == NotReady((0, 1, 2))
    for rank in group.ranks:
        await rank.beat()
    assert await group.barrier.restore(epoch, "Loaded", ["load"], ordinal=1) == Restored(epoch, 1)
    assert await group.barrier.restore(epoch, "Loaded", ["load"], ordinal=1) == Restored(epoch, 1)
    assert await group.barrier.dispatch(epoch, "load", "{}", "Loaded") == Already(LogId(epoch.number, 2))
    assert await group.barrier.dispatch(epoch, "warm-up", "{}", "Loaded") == Dispatched(LogId(epoch.number, 3))
    for rank in group.ranks:
        assert (await rank.next_task()).step == "warm-up"


async def test_inspect(group: Group) -> None:
    epoch = await group.all_connected()
    await group.barrier.dispatch(epoch, "load", "{}", "Connected")
    snapshot = await group.barrier.inspect()
    assert snapshot.epoch is not None
    assert (snapshot.epoch.id, snapshot.epoch.last_n, set(snapshot.epoch.steps)) == (epoch, 2, {"load"})
    assert snapshot.epoch.roster == tuple(rank.incarnation for rank in group.ranks)
    assert snapshot.leader == group.barrier.leadership
    assert snapshot.log_end == LogId(epoch.number, 2)
    assert all(view.report is not None and 0 < view.lease_left_ms <= 60_000 for view in snapshot.ranks)
    newest = await group.commands.xrevrange(group.barrier.keys.signals, count=1)
    assert snapshot.signals_end == newest[0][0].decode()


async def test_the_end_of_a_trimmed_log_is_known(group: Group) -> None:
    epoch = await group.all_connected()
    await group.barrier.dispatch(epoch, "load", "{}", "Connected")
    await group.commands.xtrim(group.barrier.keys.tasks, maxlen=0, approximate=False)
    assert (await group.barrier.inspect()).log_end == LogId(epoch.number, 2)
    await group.barrier.conclude(epoch, Verdict.stopped())
    assert (await group.barrier.inspect()).log_end == LogId(epoch.number, 3)


async def test_a_roster_of_many_chunks(place: Place) -> None:
    async with group_at(place, 130) as group:
        epoch = await group.all_connected()
        assert await group.barrier.dispatch(epoch, "load", "{}", "Connected") == Dispatched(LogId(epoch.number, 2))


async def test_scripts_that_the_server_forgot_are_given_again(group: Group) -> None:
    epoch = await group.all_connected()
    await group.commands.script_flush()
    assert isinstance(await group.barrier.dispatch(epoch, "load", "{}", "Connected"), Dispatched)
    await group.commands.script_flush()
    assert (await group.barrier.inspect()).epoch is not None


@pytest.mark.parametrize("verb", ["open", "dispatch", "conclude"])
async def test_a_reply_lost_after_the_commit_is_made_good_by_the_same_call(place: Place, verb: str) -> None:
    plan = FaultPlan().lose_reply(verb)
    async with group_at(place, 2, faults=plan) as group:
        verdict = Verdict.stopped()
        if verb == "open":
            with pytest.raises(StoreUnavailable):
                await group.barrier.open()
            assert isinstance(await group.barrier.open(), Unconcluded)
            assert await group.commands.xlen(group.barrier.keys.tasks) == 1
        else:
            epoch = await group.all_connected()
            call = {
                "dispatch": lambda: group.barrier.dispatch(epoch, "load", "{}", "Connected"),
                "conclude": lambda: group.barrier.conclude(epoch, verdict),
            }[verb]
            with pytest.raises(StoreUnavailable):
                await call()
            assert await call() in (Already(LogId(epoch.number, 2)), Concluded(verdict, first=False))
            assert await group.commands.xlen(group.barrier.keys.tasks) == 2
        plan.assert_fired()


@pytest.mark.parametrize("key", ["epoch", "leader", "tasks"])
async def test_a_key_of_the_wrong_type_is_one_clear_error_and_nothing_is_written(group: Group, key: str) -> None:
    epoch = await group.all_connected()
    name: str = getattr(group.barrier.keys, key)
    await group.commands.delete(name)
    await group.commands.rpush(name, "somebody else's")
    log: list[Any] = [] if key == "tasks" else await group.commands.xrange(group.barrier.keys.tasks)
    with pytest.raises(StoreCorrupt) as refusal:
        await group.barrier.dispatch(epoch, "load", "{}", "Connected")
    assert f"{name} holds a list where a " in str(refusal.value)
    assert await group.commands.lrange(name, 0, -1) == [b"somebody else's"]
    if key != "tasks":
        assert await group.commands.xrange(group.barrier.keys.tasks) == log
    await group.commands.delete(name)


async def test_ranks_claim_promise_and_are_refused_alike(group: Group) -> None:
    rival = ScriptedRank(group.commands, "demo", 1, settings=LONG)
    with pytest.raises(RankTaken):
        await rival.member.claim(timeout=0)
    await rival.member.close()
    epoch = await group.open()
    await group.ranks[0].promise(epoch)
    await group.ranks[0].retire()
    assert isinstance(await group.ranks[0].member.promise(epoch), NotPromised)
    await group.ranks[1].restart()
    assert isinstance(await group.ranks[1].member.promise(epoch), NotPromised)


async def test_a_rank_that_leaves_takes_its_claim_and_its_report_along(group: Group) -> None:
    keys = group.barrier.keys
    await group.ranks[2].member.leave()
    assert await group.commands.exists(keys.claim(2), keys.rank(2)) == 0
    assert await group.commands.exists(keys.claim(1), keys.rank(1)) == 2


async def test_leases_lapse_and_heartbeats_keep_them(place: Place) -> None:
    short = Settings(lease=0.6, heartbeat=0.1, reader_block=0.2, backstop=0.2)
    async with group_at(place, 2, settings=short) as group, group.ranks[0].heartbeat():

        async def only_rank_0_is_left() -> bool:
            return [view.report is not None for view in (await group.barrier.inspect()).ranks] == [True, False]

        await wait_until(only_rank_0_is_left, "the silent rank's lease to be over")
        async with ScriptedRank(group.commands, "demo", 1, settings=short):
            assert all(view.report for view in (await group.barrier.inspect()).ranks)


async def test_waits_end_by_their_deadline(group: Group) -> None:
    epoch = await group.open()
    outcome = await group.barrier.wait(epoch, "Connected", timeout=0.2)
    assert isinstance(outcome, TimedOut)
    assert outcome.missing == (0, 1, 2)


async def test_a_failure_is_pushed_to_every_waiter_and_reader(group: Group) -> None:
    epoch = await group.all_connected()
    waits = [asyncio.create_task(group.barrier.wait(epoch, "Loaded", timeout=30)) for _ in range(2)]
    await group.ranks[1].fail("boom")
    verdict = Verdict.aborted("rank 1 on node-1 failed: boom", 1)
    assert [await wait for wait in waits] == [Aborted(verdict)] * 2
    entry = await group.ranks[0].next_entry()
    while isinstance(entry, EpochAnnounced):
        entry = await group.ranks[0].next_entry()
    assert entry == VerdictAnnounced(epoch, verdict)


async def test_every_key_has_a_lifetime(group: Group) -> None:
    epoch = await group.all_connected()
    await group.barrier.dispatch(epoch, "generate:1", "{}", "Connected", repeatable=True)
    await group.ranks[0].member.write_output("generate:1", [b"text"])
    await group.ranks[0].member.report(events=[{"kind": "RunnerStatusUpdated"}])
    await group.barrier.conclude(epoch, Verdict.stopped())
    keys = await group.commands.keys("*")
    assert len(keys) == 5 + 2 * 3 + 2
    assert [key for key in keys if await group.commands.pttl(key) < 0] == []


async def test_groups_do_not_meet(group: Group) -> None:
    epoch = await group.all_connected()
    other = Barrier(group.commands, "demo", world_size=3, namespace="elsewhere", settings=LONG)
    await other.lead()
    assert (await other.inspect()).epoch is None
    assert await other.conclude(epoch, Verdict.stopped()) == Unknown("the store has no epoch record")
    await other.close()
    assert await group.barrier.wait(epoch, "Connected", timeout=5) == Released(epoch)

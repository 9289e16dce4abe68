"""The test kit is a product: what it promises to those who test their planners with it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from typing import Any

import pytest
from redis import exceptions as driver

from barrier import Barrier, EpochAnnounced, Leading, Opened, RankTaken, StoreUnavailable
from barrier.store import script
from barrier.testing import FakeStore, FaultPlan, ManualClock, ScriptedRank, scripted_ranks, wait_until
from barrier.testing.faults import unpack_commands
from tests.unit.barrier.group import Group, started_group

pytestmark = pytest.mark.anyio


def client(store: FakeStore, name: str = "", faults: FaultPlan | None = None) -> Any:
    """A plain client, without redis-py's half-finished annotations."""
    return store.client(name, faults=faults)


# --- ManualClock --------------------------------------------------------------------------------------------------------


async def test_time_stands_still_until_it_is_moved(clock: ManualClock) -> None:
    assert (clock.now(), clock.now()) == (1_000.0, 1_000.0)
    await clock.advance(2.5)
    assert clock.now() == 1_002.5


async def test_sleepers_wake_in_the_order_of_their_deadlines_each_at_its_own_time(clock: ManualClock) -> None:
    woken: list[tuple[str, float]] = []

    async def sleeper(name: str, *naps: float) -> None:
        for nap in naps:
            await clock.sleep(nap)
            woken.append((name, clock.now() - 1_000.0))

    tasks = [asyncio.create_task(sleeper("a", 3.0)), asyncio.create_task(sleeper("b", 1.0, 1.0, 5.0))]
    await clock.advance(4.0)
    assert woken == [("b", 1.0), ("b", 2.0), ("a", 3.0)]
    await clock.advance(4.0)
    assert woken[-1] == ("b", 7.0)
    await asyncio.gather(*tasks)


async def test_work_between_two_deadlines_is_done_before_the_next(clock: ManualClock) -> None:
    """A task that is woken may go to sleep again within the same advance, and that counts."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await clock.sleep(1.0)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            ticks += 1

    task = asyncio.create_task(tick())
    await clock.advance(10.0)
    assert ticks == 10
    task.cancel()


async def test_a_sleep_of_nothing_yields_once(clock: ManualClock) -> None:
    await clock.sleep(0)
    await clock.sleep(-1)
    assert clock.next_deadline is None


async def test_a_cancelled_sleeper_is_forgotten(clock: ManualClock) -> None:
    task = asyncio.create_task(clock.sleep(5.0))
    await clock.advance(0.0)
    assert clock.next_deadline == 1_005.0
    task.cancel()
    await clock.advance(0.0)
    assert clock.next_deadline is None


async def test_a_deadline_cancels_what_it_waited_for(clock: ManualClock) -> None:
    cancelled = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    waiting = asyncio.create_task(clock.wait_for(work(), 3.0))
    await clock.advance(2.9)
    assert not waiting.done()
    await clock.advance(0.2)
    with pytest.raises(TimeoutError):
        await waiting
    assert cancelled.is_set()


async def test_a_deadline_that_is_met_gives_the_result_or_the_error(clock: ManualClock) -> None:
    async def work(result: int) -> int:
        await asyncio.sleep(0)
        if result < 0:
            raise ValueError("negative")
        return result

    assert await clock.wait_for(work(3), 1.0) == 3
    with pytest.raises(ValueError, match="negative"):
        await clock.wait_for(work(-1), 1.0)
    assert clock.next_deadline is None, "the alarm is off"


async def test_cancelling_a_wait_cancels_the_work(clock: ManualClock) -> None:
    work = asyncio.ensure_future(asyncio.Event().wait())
    waiting = asyncio.create_task(clock.wait_for(work, 3.0))
    await clock.advance(0.0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert work.cancelled()
    assert clock.next_deadline is None


async def test_a_jump_is_found_out_late(clock: ManualClock) -> None:
    """A process that was stopped wakes up after its deadlines."""
    seen: list[float] = []

    async def sleeper() -> None:
        await clock.sleep(1.0)
        seen.append(clock.now() - 1_000.0)

    task = asyncio.create_task(sleeper())
    await clock.advance(0.0)
    clock.jump(30.0)
    assert seen == []
    await clock.advance(0.0)
    assert seen == [30.0]
    await task


async def test_run_jumps_from_deadline_to_deadline(clock: ManualClock) -> None:
    async def work() -> str:
        for _ in range(3):
            await clock.sleep(1_000.0)
        return "done"

    began = time.monotonic()
    assert await clock.run(work()) == "done"
    assert clock.now() == 4_000.0
    assert time.monotonic() - began < 60, "real seconds, and far fewer than the three thousand"


async def test_run_gives_up_after_its_limit(clock: ManualClock) -> None:
    with pytest.raises(AssertionError, match="not finished after 5 s of the manual clock"):
        await clock.run(clock.sleep(6.0), limit=5.0)


async def test_run_says_when_nothing_can_happen_any_more(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("barrier.testing.manual_clock._NEWS_FROM_OUTSIDE", 0.01)
    with pytest.raises(AssertionError, match="nobody sleeps on the manual clock"):
        await clock.run(asyncio.Event().wait())


async def test_run_passes_errors_on(clock: ManualClock) -> None:
    async def work() -> None:
        await clock.sleep(1.0)
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        await clock.run(work())


async def test_time_does_not_go_back(clock: ManualClock) -> None:
    with pytest.raises(ValueError, match="time does not go back"):
        await clock.advance(-1.0)


# --- wait_until ---------------------------------------------------------------------------------------------------------


async def test_wait_until_lets_other_tasks_run_and_returns_what_it_found() -> None:
    box: list[int] = []

    async def fill() -> None:
        for _ in range(50):
            await asyncio.sleep(0)
        box.append(7)

    task = asyncio.create_task(fill())
    assert await wait_until(lambda: box, "the box to be filled") == [7]
    await task


async def test_wait_until_takes_coroutine_functions() -> None:
    async def look() -> str:
        await asyncio.sleep(0)
        return "found"

    assert await wait_until(look, "something") == "found"


async def test_wait_until_names_what_it_waited_for_and_what_it_saw() -> None:
    with pytest.raises(AssertionError) as failure:
        await wait_until(list, "a miracle", timeout=0.01)
    assert str(failure.value) == "waited 0.01 s for a miracle; the last look gave []"


# --- FakeStore ----------------------------------------------------------------------------------------------------------


async def test_clients_share_one_store(store: FakeStore) -> None:
    first, second = client(store), client(store)
    await first.set("{a:b}:x", "1", px=1_000)
    assert await second.get("{a:b}:x") == b"1"
    other = FakeStore(store.clock)
    assert await client(other).get("{a:b}:x") is None, "two stores share nothing"


async def test_leases_lapse_by_the_manual_clock(store: FakeStore, clock: ManualClock) -> None:
    redis = client(store)
    await redis.set("k", "v", px=5_000)
    await clock.advance(4.9)
    assert await redis.pttl("k") == 100
    await clock.advance(0.2)
    assert await redis.get("k") is None


async def test_the_scripts_time_is_the_manual_clocks(store: FakeStore, clock: ManualClock) -> None:
    redis = client(store)
    first = await redis.eval("return redis.call('TIME')[1]", 0)
    await clock.advance(3_600.0)
    assert int(await redis.eval("return redis.call('TIME')[1]", 0)) == int(first) + 3_600
    assert (await redis.time())[0] == int(first) + 3_600


async def test_only_the_store_sees_the_manual_clock(store: FakeStore) -> None:
    before = time.time()
    await client(store).set("k", "v", px=5_000)
    assert time.time() >= before
    with store.server_time():
        assert time.time() == 1_700_000_000.0
    assert time.time() >= before


async def test_without_a_clock_the_store_keeps_the_machines_time() -> None:
    store = FakeStore()
    now = await client(store).time()
    assert abs(now[0] - time.time()) < 60


async def test_the_servers_clock_can_be_stepped(store: FakeStore, clock: ManualClock) -> None:
    redis = client(store)
    before = (await redis.time())[0]
    store.shift_time(-3_600)
    assert (await redis.time())[0] == before - 3_600
    store.shift_time(7_200)
    assert (await redis.time())[0] == before + 3_600
    assert clock.now() == 1_000.0


async def test_a_blocked_read_is_woken_by_a_write(store: FakeStore, clock: ManualClock) -> None:
    reader, writer = client(store), client(store)
    reading = asyncio.create_task(reader.xread({"s": "0-0"}, block=5_000))
    await clock.advance(0.0)
    assert not reading.done()
    await writer.xadd("s", {"a": "1"}, id="1-1")
    await writer.pexpire("s", 60_000)
    await clock.advance(0.0)
    assert (await reading)[0][1] == [(b"1-1", {b"a": b"1"})]


async def test_a_blocked_read_ends_by_the_manual_clock(store: FakeStore, clock: ManualClock) -> None:
    reading = asyncio.create_task(client(store).xread({"s": "0-0"}, block=5_000))
    await clock.advance(4.9)
    assert not reading.done()
    await clock.advance(0.2)
    assert not await reading


async def test_a_partition_cuts_blocked_reads_idle_connections_and_new_ones(
    store: FakeStore, clock: ManualClock
) -> None:
    idle, blocked = client(store, "rank 1"), client(store, "rank 1")
    await idle.ping()
    reading = asyncio.create_task(blocked.xread({"s": "0-0"}, block=5_000))
    await clock.advance(0.0)
    store.partition("rank 1")
    await clock.advance(0.0)
    for attempt in (reading, idle.ping(), client(store, "rank 1").ping()):
        with pytest.raises(driver.ConnectionError):
            await attempt
    assert await client(store, "rank 2").ping(), "others are not cut off"
    store.heal("rank 1")
    assert await idle.ping()
    assert store.refused["rank 1"] >= 2


async def test_a_partition_of_everybody_and_its_end(store: FakeStore) -> None:
    redis, named = client(store), client(store, "rank 1")
    await redis.set("k", "v", px=60_000)
    store.partition()
    for attempt in (redis.ping(), named.ping()):
        with pytest.raises(driver.ConnectionError, match="is cut off from the fake store"):
            await attempt
    store.partition("rank 1")
    store.heal()
    assert await redis.get("k") == b"v"
    assert await named.get("k") == b"v"


async def test_a_restart_breaks_connections_and_forgets_scripts_and_perhaps_data(
    store: FakeStore, clock: ManualClock
) -> None:
    redis = client(store)
    await redis.set("k", "v", px=60_000)
    sha = await redis.script_load("return 1")
    reading = asyncio.create_task(client(store).xread({"s": "0-0"}, block=5_000))
    await clock.advance(0.0)
    store.restart(keep_data=True)
    with pytest.raises(driver.ConnectionError):
        await reading
    assert await redis.get("k") == b"v", "an idle connection is replaced without a word"
    with pytest.raises(driver.NoScriptError):
        await redis.evalsha(sha, 0)
    store.restart(keep_data=False)
    assert await redis.get("k") is None


async def test_flush_and_delete(store: FakeStore) -> None:
    redis = client(store)
    for key in ("a", "b", "c"):
        await redis.set(key, key, px=60_000)
    assert store.delete("a", "nothing") == 1
    assert store.keys() == ["b", "c"]
    store.flush()
    assert store.keys() == []


async def test_a_roll_back_puts_everything_back_and_lifetimes_have_gone_on(
    store: FakeStore, clock: ManualClock
) -> None:
    redis = client(store)
    await redis.set("short", "1", px=1_000)
    await redis.hset("long", "f", "1")
    await redis.pexpire("long", 60_000)
    await redis.xadd("s", {"a": "1"}, id="5-1")
    await redis.pexpire("s", 60_000)
    earlier = store.snapshot()
    await redis.hset("long", "f", "2")
    await redis.xadd("s", {"a": "2"}, id="6-1")
    await redis.set("new", "1", px=60_000)
    await clock.advance(2.0)
    store.roll_back(earlier)
    assert store.contents() == {"long": {b"f": b"1"}, "s": [(b"5-1", {b"a": b"1"})]}
    assert await redis.pttl("long") == 58_000
    await redis.xadd("s", {"a": "3"}, id="5-2")
    store.roll_back(earlier)
    assert len(store.contents()["s"]) == 1, "a snapshot may be used again"


async def test_keys_without_a_lifetime_are_found(store: FakeStore) -> None:
    redis = client(store)
    await redis.set("kept", "1")
    await redis.set("lapses", "1", px=1_000)
    assert store.keys_without_lifetime() == ["kept"]
    store.delete("kept")


async def test_round_trips_are_counted_by_name(store: FakeStore) -> None:
    redis = client(store, "counted")
    await redis.ping()
    async with redis.pipeline(transaction=True) as pipe:
        pipe.set("k", "v", px=1_000)
        pipe.get("k")
        await pipe.execute()
    assert store.sent["counted"] == 2


async def test_contents_can_be_compared_whatever_is_stored(store: FakeStore) -> None:
    redis = client(store)
    await redis.set("a-string", "1")
    await redis.hset("hash", "f", "1")
    await redis.rpush("list", "1", "2")
    await redis.sadd("set", "1")
    await redis.zadd("zset", {"m": 1})
    await redis.xadd("stream", {"f": "1"}, id="1-1")
    assert store.contents() == {
        "a-string": b"1",
        "hash": {b"f": b"1"},
        "list": [b"1", b"2"],
        "set": {b"1"},
        "zset": "a zset",
        "stream": [(b"1-1", {b"f": b"1"})],
    }
    store.flush()


# --- FaultPlan ----------------------------------------------------------------------------------------------------------


async def test_a_lost_reply_is_a_commit_and_then_an_error(store: FakeStore) -> None:
    plan = FaultPlan().lose_reply("set")
    redis = client(store, faults=plan)
    with pytest.raises(driver.ConnectionError, match="planned fault"):
        await redis.set("k", "v", px=1_000)
    assert await redis.get("k") == b"v"
    await redis.set("k", "w", px=1_000)
    assert await redis.get("k") == b"w", "it fires once"
    plan.assert_fired()


async def test_a_refusal_is_an_error_without_a_commit(store: FakeStore) -> None:
    plan = FaultPlan().refuse("set", nth=2)
    redis = client(store, faults=plan)
    await redis.set("k", "v", px=1_000)
    with pytest.raises(driver.ConnectionError):
        await redis.set("k", "w", px=1_000)
    assert await redis.get("k") == b"v"
    plan.assert_fired()


async def test_an_answer_is_the_servers_error_without_a_commit(store: FakeStore) -> None:
    plan = FaultPlan().answer("set", "OOM command not allowed")
    redis = client(store, faults=plan)
    with pytest.raises(driver.OutOfMemoryError):
        await redis.set("k", "v", px=1_000)
    assert await redis.get("k") is None


async def test_a_duplicate_runs_twice_and_gives_the_second_reply(store: FakeStore) -> None:
    plan = FaultPlan().duplicate("incrby")
    redis = client(store, faults=plan)
    assert await redis.incr("k") == 2
    assert await redis.incr("k") == 3
    plan.assert_fired()
    store.delete("k")


async def test_something_may_happen_just_before_and_just_after(store: FakeStore) -> None:
    other, seen = client(store), list[Any]()

    async def look() -> None:
        seen.append(await other.get("k"))

    plan = FaultPlan().before("set", look).after("set", look)
    assert await client(store, faults=plan).set("k", "v", px=1_000)
    assert seen == [None, b"v"]


async def test_an_action_may_be_a_plain_function(store: FakeStore) -> None:
    plan = FaultPlan().before("get", store.flush)
    redis = client(store, faults=plan)
    await redis.set("k", "v", px=1_000)
    assert await redis.get("k") is None


async def test_a_delay_follows_the_given_clock(store: FakeStore, clock: ManualClock) -> None:
    plan = FaultPlan().delay("set", 3.0, clock=clock)
    setting = asyncio.create_task(client(store, faults=plan).set("k", "v", px=60_000))
    await clock.advance(2.9)
    assert store.keys() == []
    await clock.advance(0.2)
    assert await setting
    assert store.keys() == ["k"]


async def test_a_multi_is_one_call_that_goes_by_exec_or_by_what_is_in_it(store: FakeStore) -> None:
    plan = FaultPlan().lose_reply("exec").refuse("hset")

    async def transaction(redis: Any) -> None:
        async with redis.pipeline(transaction=True) as pipe:
            pipe.set("k", "v", px=60_000)
            pipe.hset("h", "f", "1")
            pipe.pexpire("h", 60_000)
            await pipe.execute()

    redis = client(store, faults=plan)
    with pytest.raises(driver.ConnectionError, match="refuse hset"):
        await transaction(redis)
    assert store.keys() == []
    plan = FaultPlan().lose_reply("exec")
    redis = client(store, faults=plan)
    with pytest.raises(driver.ConnectionError, match="lose exec"):
        await transaction(redis)
    assert store.keys() == ["h", "k"]
    await transaction(redis)


async def test_a_fault_may_be_narrowed_to_a_key(store: FakeStore) -> None:
    plan = FaultPlan().refuse("set", touching="rank:1")
    redis = client(store, faults=plan)
    await redis.set("rank:0", "v", px=1_000)
    with pytest.raises(driver.ConnectionError):
        await redis.set("rank:1", "v", px=1_000)


async def test_a_verb_is_counted_by_its_script_however_it_is_sent(store: FakeStore) -> None:
    """The first call of a verb is EVALSHA, NOSCRIPT, EVAL: that is one call, and what is lost is the EVAL's reply."""
    plan = FaultPlan().lose_reply("lead", nth=2)
    async with Barrier(store.client(faults=plan), "demo", world_size=1, clock=store.clock, holder="me") as barrier:
        assert isinstance(await barrier.lead(), Leading)
        assert plan.fired == ()
        store.forget_scripts()
        with pytest.raises(StoreUnavailable):
            await barrier.lead()
        plan.assert_fired()
        found = (await barrier.inspect()).leader
        assert found is not None
        assert found.holder == "me"


@pytest.mark.parametrize("kind", ["lose_reply", "duplicate", "after"])
async def test_a_fault_after_the_commit_waits_for_a_commit(store: FakeStore, kind: str) -> None:
    """NOSCRIPT is no commit."""
    plan, called = FaultPlan(), list[bool]()
    if kind == "after":
        plan.after("lead", lambda: called.append(store.keys() != []))
    else:
        getattr(plan, kind)("lead")
    barrier = Barrier(store.client(faults=plan), "demo", world_size=1, clock=store.clock)
    if kind == "lose_reply":
        with pytest.raises(StoreUnavailable):
            await barrier.lead()
    else:
        await barrier.lead()
    assert store.keys() == [barrier.keys.leader]
    if kind == "after":
        assert called == [True]
    plan.assert_fired()
    await barrier.close()


async def test_several_faults_may_meet_in_one_call(store: FakeStore) -> None:
    seen: list[str] = []
    plan = FaultPlan().before("set", lambda: seen.append("before")).after("set", lambda: seen.append("after"))
    plan.lose_reply("set")
    with pytest.raises(driver.ConnectionError):
        await client(store, faults=plan).set("k", "v", px=1_000)
    assert seen == ["before", "after"]
    assert len(plan.fired) == 3


async def test_a_fault_that_never_fired_fails_the_test(store: FakeStore) -> None:
    plan = FaultPlan().lose_reply("set").refuse("get", nth=3, touching="k")
    redis = client(store, faults=plan)
    await redis.get("k")
    with pytest.raises(AssertionError) as failure:
        plan.assert_fired()
    assert str(failure.value) == (
        "planned faults that did not fire: lose set number 1 (saw 0); refuse get number 3 touching 'k' (saw 1)"
    )


def test_counting_begins_with_1() -> None:
    with pytest.raises(ValueError, match="nth is 0; the first call is number 1"):
        FaultPlan().refuse("get", nth=0)


async def test_a_plan_can_be_put_around_a_client_that_exists(store: FakeStore) -> None:
    mine = client(store)
    plan = FaultPlan().lose_reply("set")
    wrapped: Any = plan.wrap(mine)
    with pytest.raises(driver.ConnectionError):
        await wrapped.set("k", "v", px=1_000)
    assert await mine.get("k") == b"v"
    plan.assert_fired()


async def test_faults_come_along_into_the_clients_that_a_barrier_derives(group: Group) -> None:
    plan = FaultPlan().refuse("inspect")
    async with group.planner("faulty", faults=plan) as planner:
        await planner.lead()  # whoever only looks sends no script
        with pytest.raises(StoreUnavailable):
            await planner.inspect()
        assert (await planner.inspect()).world_size == 3


def test_commands_are_read_back_from_the_wire() -> None:
    wire = b"*2\r\n$3\r\nGET\r\n$3\r\na\r\n\r\n*1\r\n$4\r\nPING\r\n"
    assert unpack_commands(wire) == [[b"GET", b"a\r\n"], [b"PING"]]


# --- ScriptedRank -------------------------------------------------------------------------------------------------------


async def test_a_scripted_rank_claims_promises_and_reports(store: FakeStore) -> None:
    async with started_group(store, 2) as group:
        epoch = await group.open()
        await group.ranks[1].arrive("Connected")
        views = (await group.inspect()).ranks
        assert [view.report.status for view in views if view.report] == ["Idle", "Connected"]
        assert [view.report.epoch for view in views if view.report] == [None, epoch]


async def test_a_rank_without_an_epoch_to_promise_says_so(store: FakeStore) -> None:
    async with ScriptedRank(store, "demo", 0) as rank:
        with pytest.raises(AssertionError, match="group demo has no epoch to promise: open one first"):
            await rank.arrive("Connected")


async def test_a_refused_promise_fails_the_test_with_its_reason(group: Group) -> None:
    epoch = await group.open()
    await group.conclude(epoch)
    with pytest.raises(AssertionError, match="could not promise epoch .*: epoch .* is concluded"):
        await group.ranks[0].arrive("Connected")


async def test_restarted_lives_sort_after_one_another(store: FakeStore) -> None:
    async with ScriptedRank(store, "demo", 0) as rank:
        lives = [rank.incarnation]
        for _ in range(3):
            await rank.restart()
            lives.append(rank.incarnation)
    assert lives == sorted(lives)
    assert len(set(lives)) == 4


async def test_a_life_that_vanished_keeps_its_claim_until_the_lease_is_over(
    store: FakeStore, clock: ManualClock
) -> None:
    async with ScriptedRank(store, "demo", 0) as rank:
        restarting = asyncio.create_task(rank.restart(give_back=False))
        await clock.advance(5.9)
        assert not restarting.done()
        await clock.advance(0.2)
        await restarting


async def test_a_group_of_scripted_ranks_leaves_nothing_behind_but_streams(store: FakeStore) -> None:
    async with scripted_ranks(store, "demo", 3) as ranks:
        assert [rank.rank for rank in ranks] == [0, 1, 2]
        with pytest.raises(RankTaken):
            await ScriptedRank(store, "demo", 1).member.claim(timeout=0)
    assert store.keys() == ["{rankgate:demo}:signals"]


async def test_a_rank_reads_the_log_entry_by_entry_or_task_by_task(group: Group) -> None:
    epoch = await group.all_connected()
    await group.load(epoch)
    assert await group.ranks[0].next_entry() == EpochAnnounced(epoch)
    assert (await group.ranks[1].next_task()).step == "load"
    await group.conclude(epoch)
    with pytest.raises(AssertionError, match="rank 1 waited for a task and read VerdictAnnounced"):
        await group.ranks[1].next_task()


async def test_a_planners_unit_test_in_five_lines(store: FakeStore) -> None:
    async with Barrier(store.client(), "mine", clock=store.clock) as barrier, scripted_ranks(store, "mine", 2) as ranks:
        outcome = await barrier.open(2)
        assert isinstance(outcome, Opened)
        for rank in ranks:
            await rank.arrive("Connected")
        assert await barrier.dispatch(outcome.epoch, "load", "{}", "Connected")


# --- packaging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", ["fakeredis", "lupa"])
def test_without_fakeredis_or_lupa_the_error_names_the_extra(absent: str) -> None:
    program = (
        "import importlib.util, sys\n"
        "real = importlib.util.find_spec\n"
        f"sys.modules[{absent!r}] = None\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name == {absent!r} else real(name, *rest)\n"
        "import barrier\n"
        "try:\n"
        "    import barrier.testing\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert absent in said
    assert "pip install 'rankgate[testing]'" in said


def test_the_library_does_not_import_its_test_kit() -> None:
    program = "import barrier, sys; print([name for name in sys.modules if 'fakeredis' in name or 'testing' in name])"
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert said.strip() == "[]"


def test_every_verb_has_a_name_that_a_plan_understands() -> None:
    for verb in script.VERBS:
        FaultPlan().lose_reply(verb)


async def test_every_call_takes_a_turn_of_the_event_loop_as_on_a_real_network(store: FakeStore) -> None:
    """Code that asks in a tight loop must not shut everybody else out, and other tasks come in between."""
    redis, turns = client(store), 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count())
    for _ in range(20):
        await redis.ping()
    assert turns >= 20
    counting.cancel()

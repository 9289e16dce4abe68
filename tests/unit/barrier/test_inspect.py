"""One consistent picture: what is in the store, what is left of each lease, and what cannot be read."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from barrier import Barrier, InvalidName, LogId, Report, Unknown, Verdict, all_ranks, missing_ranks
from barrier.protocol.report import MAX_REPORT_BYTES
from barrier.store import picture, verbs
from barrier.testing import FakeStore, FaultPlan, ManualClock
from tests.unit.barrier.group import Group, started_group

pytestmark = pytest.mark.anyio


async def test_an_empty_store_gives_an_empty_picture(store: FakeStore, clock: ManualClock) -> None:
    async with Barrier(store.client(), "demo", world_size=2, clock=clock) as barrier:
        snapshot = await barrier.inspect()
    assert (snapshot.group, snapshot.world_size) == ("demo", 2)
    assert (snapshot.epoch, snapshot.unreadable, snapshot.leader, snapshot.leader_left_ms) == (None, "", None, 0)
    assert [view.report for view in snapshot.ranks] == [None, None]
    assert (snapshot.log_end, snapshot.signals_end) == (LogId(0, 0), "0-0")
    assert (snapshot.floor, snapshot.applied) == (0, 0)
    assert store.keys() == [], "it writes nothing"


async def test_it_shows_every_report_with_its_age_and_what_is_left_of_the_lease(group: Group) -> None:
    await group.clock.advance(1.5)
    await group.ranks[0].beat()
    await group.clock.advance(0.5)
    views = (await group.inspect()).ranks
    assert [view.lease_left_ms for view in views] == [5_500, 4_000, 4_000]
    assert [view.age_ms for view in views] == [500, 2_000, 2_000]
    assert views[1].report == group.ranks[1].member.report_now


async def test_a_rank_whose_lease_is_over_is_not_there(group: Group) -> None:
    await group.clock.advance(6.5)
    assert all(view.report is None and view.age_ms == 0 for view in (await group.inspect()).ranks)


async def test_it_shows_epoch_steps_verdict_and_the_ends_of_both_streams(group: Group) -> None:
    epoch = await group.all_connected()
    await group.load(epoch)
    verdict = await group.conclude(epoch)
    snapshot = await group.inspect()
    assert snapshot.epoch is not None
    assert snapshot.epoch.id == epoch
    assert set(snapshot.epoch.steps) == {"load"}
    assert snapshot.epoch.verdict == verdict
    assert snapshot.log_end == LogId(epoch.number, 3)
    newest = await group.barrier.store.commands.xrevrange(group.keys.signals, count=1)
    assert snapshot.signals_end == newest[0][0].decode()


async def test_the_end_of_a_log_that_was_trimmed_to_nothing_is_known(group: Group) -> None:
    epoch = await group.open()
    await group.barrier.store.commands.xtrim(group.keys.tasks, maxlen=0, approximate=False)
    assert (await group.inspect()).log_end == LogId(epoch.number, 1)


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"garbage", b"2|", b"x" * 20_000])
async def test_bytes_that_are_not_a_report_are_told_as_such(group: Group, raw: bytes) -> None:
    await group.barrier.store.commands.set(group.keys.rank(1), raw, px=60_000)
    found = (await group.inspect()).ranks[1]
    assert found.report is None
    assert found.undecodable.startswith("rank 1: ")


async def test_a_report_of_another_rank_in_a_ranks_key_is_not_believed(group: Group) -> None:
    stolen = await group.barrier.store.commands.get(group.keys.rank(0))
    await group.barrier.store.commands.set(group.keys.rank(1), stolen, px=60_000)
    assert (await group.inspect()).ranks[1].undecodable == "rank 1: the report says rank 0"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("number", "x"),
        ("number", ""),
        ("nonce", "short"),
        ("world_size", "x"),
        ("ordinal", ""),
        ("last_n", "-"),
        ("term", "x"),
        ("opened_ms", "x"),
        ("step:load", "x"),
        ("step:load", "1:2:3"),
        ("roster:x", "y"),
        ("verdict", "{}"),
        ("roster:0", "short"),
    ],
)
async def test_a_damaged_record_counts_as_missing_and_says_why(group: Group, field: str, value: str) -> None:
    await group.all_connected()
    await group.barrier.store.commands.hset(group.keys.epoch, field, value)
    snapshot = await group.inspect()
    assert snapshot.epoch is None
    assert snapshot.unreadable
    assert missing_ranks(snapshot, all_ranks(3, "Connected")) == (0, 1, 2)


@pytest.mark.parametrize(
    "field", ["number", "nonce", "ordinal", "last_n", "term", "opened_ms", "digest", "notes", "roster:0"]
)
async def test_so_does_one_with_a_field_missing(group: Group, field: str) -> None:
    await group.open()
    await group.barrier.store.commands.hdel(group.keys.epoch, field)
    snapshot = await group.inspect()
    assert snapshot.epoch is None
    assert snapshot.unreadable


async def test_a_record_for_another_world_size_says_so(group: Group) -> None:
    await group.open()
    async with Barrier(group.store.client(), "demo", world_size=5, clock=group.clock) as other:
        snapshot = await other.inspect()
    assert snapshot.epoch is None
    assert snapshot.unreadable == "it is for 3 ranks, its roster has 3, and the caller asks for 5"


async def test_the_world_size_is_taken_from_the_record(group: Group) -> None:
    await group.open()
    async with Barrier(group.store.client(), "demo", clock=group.clock) as other:
        assert (await other.inspect()).world_size == 3


async def test_without_a_record_the_world_size_must_be_given(store: FakeStore, clock: ManualClock) -> None:
    async with Barrier(store.client(), "demo", clock=clock) as barrier:
        with pytest.raises(InvalidName, match="group demo has no epoch that tells its world_size: pass world_size"):
            await barrier.inspect()


async def test_it_is_one_round_trip_and_writes_nothing(store: FakeStore) -> None:
    async with started_group(store, 64) as group:
        await group.inspect()
        before, sent = store.contents(), store.sent["planner"]
        await group.inspect()
        assert store.sent["planner"] == sent + 1
        assert store.contents() == before


async def test_groups_and_namespaces_see_nothing_of_one_another(group: Group) -> None:
    epoch = await group.all_connected()
    for other in (
        Barrier(group.store.client(), "demo-2", world_size=3, clock=group.clock),
        Barrier(group.store.client(), "demo", world_size=3, namespace="elsewhere", clock=group.clock),
    ):
        async with other:
            await other.lead()
            snapshot = await other.inspect()
            assert snapshot.epoch is None
            assert all(view.report is None for view in snapshot.ranks)
            assert await other.conclude(epoch, Verdict.stopped()) == Unknown("the store has no epoch record")
    found = (await group.inspect()).epoch
    assert found is not None
    assert found.verdict is None


async def test_whoever_only_looks_sends_no_script_and_does_not_read_the_log(group: Group) -> None:
    """As an observer, who has no right to either."""
    epoch = await group.all_connected()
    await group.load(epoch)
    plan = FaultPlan().refuse("inspect")
    async with Barrier(group.store.client("looker", faults=plan), "demo", world_size=3, clock=group.clock) as looker:
        seen = await looker.inspect()
    assert plan.fired == ()
    assert seen == await group.inspect()
    await group.conclude(epoch)


@pytest.mark.parametrize("kind", ["list", "hash", "set"])
async def test_whoever_looks_sees_a_rank_key_of_the_wrong_type_as_missing(group: Group, kind: str) -> None:
    commands: Any = group.barrier.store.commands
    for key in (group.keys.rank(1), group.keys.signals):
        group.store.delete(key)
        await (
            commands.hset(key, "a", "b")
            if kind == "hash"
            else commands.execute_command({"list": "RPUSH", "set": "SADD"}[kind], key, "x")
        )
        await commands.pexpire(key, 60_000)
    async with Barrier(group.store.client("looker"), "demo", world_size=3, clock=group.clock) as looker:
        seen = await looker.inspect()
    assert [view.report is not None for view in seen.ranks] == [True, False, True]
    assert seen.signals_end == "0-0"
    group.store.delete(group.keys.rank(1), group.keys.signals)


async def test_of_a_report_that_is_too_long_no_more_is_read_than_shows_it(group: Group) -> None:
    """A rank may write what it likes into its own key; whoever looks must not wait for all of that."""
    await group.barrier.store.commands.set(group.keys.rank(1), b"x" * 5_000_000, px=60_000)
    for _, read in (("script", verbs.inspect), ("plain", verbs.look)):
        with patch.object(picture.Report, "decode", side_effect=Report.decode) as decode:
            seen = await read(group.barrier.store, group.keys, world_size=3)
        assert max(len(call.args[0]) for call in decode.call_args_list) == MAX_REPORT_BYTES + 1
        assert "at most 16,384 are read" in seen.ranks[1].undecodable

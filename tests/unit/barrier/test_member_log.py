"""Reading the task log: everything once and in order, whatever the store lost, and nothing acted upon under a doubtful lease."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from barrier import EpochAnnounced, EpochId, Garbage, LogId, Member, PartFailed, RankRule, TaskEntry, VerdictAnnounced
from barrier.protocol.log import LogEntry, decode_entry
from barrier.testing import FakeStore, FaultPlan, ManualClock, ScriptedRank, wait_until
from tests.unit.barrier.group import NONCE, Group, started_group

pytestmark = pytest.mark.anyio


class Reader:
    """Reads a rank's log in the background, so that a test can say that nothing came."""

    def __init__(self, rank: ScriptedRank) -> None:
        self.rank = rank
        self.entries: list[LogEntry] = []
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while True:
            self.entries.append(await self.rank.next_entry())

    @property
    def tasks(self) -> list[TaskEntry]:
        return [entry for entry in self.entries if isinstance(entry, TaskEntry)]

    async def __aenter__(self) -> Reader:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)


async def test_epochs_tasks_and_verdicts_come_in_the_logs_order(group: Group) -> None:
    async with Reader(group.ranks[0]) as reader:
        epoch = await group.all_connected()
        await group.load(epoch)
        verdict = await group.conclude(epoch)
        await group.clock.advance(0.0)
        kinds = [type(entry) for entry in reader.entries]
        assert [kind for kind in kinds if kind is not EpochAnnounced] == [TaskEntry, VerdictAnnounced]
        assert EpochAnnounced(epoch) in reader.entries
        assert VerdictAnnounced(epoch, verdict) in reader.entries


async def test_a_task_says_where_it_stands_and_whom_it_is_for(group: Group) -> None:
    epoch = await group.all_connected()
    await group.barrier.dispatch(epoch, "load", '{"a":1}', "Connected", to=(1, 2))
    assert await group.ranks[0].next_task() == TaskEntry(
        epoch=epoch,
        id=LogId(epoch.number, 2),
        previous=1,
        step="load",
        first=1,
        last=2,
        term=group.leadership.term,
        payload=b'{"a":1}',
    )


async def test_a_task_is_pushed_not_polled(group: Group) -> None:
    epoch = await group.all_connected()
    async with Reader(group.ranks[0]) as reader:
        await group.clock.advance(0.0)
        await group.load(epoch)
        await group.clock.advance(0.0)
        assert [task.step for task in reader.tasks] == ["load"]


async def test_what_was_read_is_told_in_the_next_report(group: Group) -> None:
    epoch = await group.all_connected()
    await group.load(epoch)
    await group.ranks[0].next_task()
    await group.ranks[0].beat()
    assert [view.report.applied for view in (await group.inspect()).ranks if view.report] == [2, 1, 1]


async def test_tasks_of_any_epoch_come_out_and_the_reader_judges(group: Group) -> None:
    first = await group.all_connected()
    await group.conclude(first)
    second = await group.open()
    for rank in group.ranks[1:]:
        await rank.retire()
        await rank.arrive("Connected")
    # Rank 0 has stayed in the first epoch; the second goes on without asking for it.
    await group.barrier.dispatch(second, "load", "{}", (RankRule(1, 2, ("Connected",)),))
    async with Reader(group.ranks[0]) as reader:
        await group.clock.advance(0.0)
        assert [task.epoch for task in reader.tasks] == [second]
        assert group.ranks[0].member.report_now.applied == 1, "it is not this rank's epoch"


async def test_a_task_that_the_log_says_again_comes_out_once(group: Group) -> None:
    """A failover to a replica that lagged, and back again: the log loses an entry, and then has it again."""
    epoch = await group.all_connected()
    async with Reader(group.ranks[0]) as reader:
        earlier = group.store.snapshot()
        await group.load(epoch)
        await group.clock.advance(0.0)
        later = group.store.snapshot()
        group.store.roll_back(earlier)
        await group.ranks[0].beat()  # learns that the log went back, and reads from there
        group.store.roll_back(later)
        await group.barrier.dispatch(epoch, "next", "{}", "Connected")
        await group.clock.advance(6.0)
        assert [task.step for task in reader.tasks] == ["load", "next"]


async def test_a_step_that_is_dispatched_again_after_a_rollback_comes_out_once(group: Group) -> None:
    """It gets the place that it had, as long as no report has told that a rank was there already."""
    epoch = await group.all_connected()
    async with Reader(group.ranks[0]) as reader, Reader(group.ranks[1]) as late:
        earlier = group.store.snapshot()
        group.store.partition("rank 1")
        first = await group.load(epoch)
        await group.clock.advance(0.0)
        group.store.roll_back(earlier)
        group.store.heal()
        assert await group.load(epoch) == first
        await group.clock.advance(5.0)
        assert [task.id for task in reader.tasks] == [first]
        assert [task.id for task in late.tasks] == [first]


async def test_a_rank_does_not_wait_beyond_the_end_of_a_log_that_went_back(group: Group) -> None:
    """Its cursor stands at an entry that the store has forgotten; a new epoch's entries must reach it all the same."""
    epoch = await group.all_connected()
    async with Reader(group.ranks[0]) as reader, group.ranks[0].heartbeat():
        await group.load(epoch)
        await group.clock.advance(0.0)
        group.store.delete(group.keys.tasks)
        await group.clock.advance(2.0)
        await group.barrier.lead()
        commands = group.barrier.store.commands
        fields = {"kind": "task", "nonce": NONCE, "prev": "1", "term": "1", "step": "x", "to": "0-0", "task": "{}"}
        await commands.xadd(group.keys.tasks, fields, id=f"{epoch.number - 5}-2")
        await commands.pexpire(group.keys.tasks, 60_000)
        await group.clock.advance(6.0)
        assert [task.step for task in reader.tasks] == ["load", "x"]


async def test_what_came_while_a_rank_stood_beyond_the_end_is_not_passed_over(group: Group) -> None:
    """Regression: with its next report it went to the log's end, and over the entry that had been written there meanwhile."""
    epoch = await group.all_connected()
    async with Reader(group.ranks[0]) as reader, group.ranks[0].heartbeat():
        await group.load(epoch)
        await group.clock.advance(0.0)
        commands = group.barrier.store.commands
        entry = (await commands.xrange(group.keys.tasks))[-1][1]
        other = EpochId(epoch.number + 5, NONCE)
        await commands.xadd(group.keys.tasks, entry | {b"nonce": NONCE, b"step": b"foreign"}, id=f"{other.number}-7")
        await group.clock.advance(0.0)
        group.store.delete(group.keys.tasks)
        await commands.xadd(group.keys.tasks, entry | {b"prev": b"2", b"step": b"next"}, id=f"{epoch.number}-3")
        await commands.pexpire(group.keys.tasks, 60_000)
        await group.clock.advance(8.0)
        assert [task.step for task in reader.tasks] == ["load", "foreign", "next"]


async def test_an_entry_that_never_came_is_told_with_the_next_one(group: Group) -> None:
    epoch = await group.all_connected()
    await group.barrier.dispatch(epoch, "connect", "{}", "Connected")
    await group.load(epoch)
    await group.barrier.store.commands.xdel(group.keys.tasks, f"{epoch.number}-2")
    task = await group.ranks[0].next_task()
    assert (task.step, task.missed) == ("load", True)


async def test_entries_that_follow_one_another_are_not_missed(group: Group) -> None:
    epoch = await group.all_connected()
    async with Reader(group.ranks[0]) as reader:
        for step in ("connect", "load", "warm-up"):
            await group.barrier.dispatch(epoch, step, "{}", "Connected")
        await group.clock.advance(0.0)
        assert [(task.step, task.missed) for task in reader.tasks] == [
            ("connect", False), ("load", False), ("warm-up", False)
        ]  # fmt: skip


async def test_a_rank_that_comes_late_starts_at_the_end_of_the_log_and_hears_of_the_open_epoch(group: Group) -> None:
    epoch = await group.all_connected()
    await group.load(epoch)
    await group.ranks[1].restart()
    async with Reader(group.ranks[1]) as reader:
        await group.clock.advance(0.0)
        assert reader.entries == [EpochAnnounced(epoch)]


# --- learning from the record -------------------------------------------------------------------------------------------


async def test_an_epoch_that_only_the_record_tells_of_is_announced(group: Group) -> None:
    async with Reader(group.ranks[0]) as reader, group.ranks[0].heartbeat():
        await group.clock.advance(0.0)
        group.store.partition("rank 0")  # the log's entry passes it by
        epoch = await group.open()
        group.store.delete(group.keys.tasks)
        group.store.heal()
        await group.clock.advance(3.0)
        assert reader.entries == [EpochAnnounced(epoch)]


async def test_it_is_announced_once_not_with_every_heartbeat(group: Group) -> None:
    epoch = await group.open()
    group.store.delete(group.keys.tasks)
    async with Reader(group.ranks[0]) as reader, group.ranks[0].heartbeat():
        for _ in range(5):
            await group.clock.advance(2.0)
        assert reader.entries == [EpochAnnounced(epoch)]


async def test_a_verdict_that_only_the_record_tells_of_is_announced(group: Group) -> None:
    epoch = await group.all_connected()
    verdict = await group.conclude(epoch)
    await group.barrier.store.commands.xdel(group.keys.tasks, f"{epoch.number}-2")
    async with Reader(group.ranks[0]) as reader, group.ranks[0].heartbeat():
        await group.clock.advance(2.0)
        assert VerdictAnnounced(epoch, verdict) in reader.entries


async def test_a_verdict_of_an_epoch_that_was_not_promised_is_not_announced_from_the_record(group: Group) -> None:
    epoch = await group.open()
    await group.conclude(epoch)
    group.store.delete(group.keys.tasks)
    async with Reader(group.ranks[0]) as reader, group.ranks[0].heartbeat():
        await group.clock.advance(2.0)
        assert reader.entries == []


async def test_an_epoch_that_is_not_above_the_floor_is_not_announced_again(group: Group) -> None:
    epoch = await group.all_connected()
    for rank in group.ranks:
        await rank.retire()
    group.store.delete(group.keys.tasks)
    async with Reader(group.ranks[0]) as reader, group.ranks[0].heartbeat():
        await group.clock.advance(4.0)
        assert EpochAnnounced(epoch) not in reader.entries


async def test_a_damaged_record_is_no_news(group: Group) -> None:
    await group.open()
    await group.barrier.store.commands.hset(group.keys.epoch, "number", "\xff not a number")
    group.store.delete(group.keys.tasks)
    async with Reader(group.ranks[0]) as reader, group.ranks[0].heartbeat():
        await group.clock.advance(4.0)
        assert reader.entries == []


# --- a doubtful lease ---------------------------------------------------------------------------------------------------


async def test_before_a_task_comes_out_a_doubtful_lease_is_renewed(group: Group) -> None:
    """The process was stopped for longer than its lease; the log went on without it."""
    epoch = await group.all_connected()
    async with Reader(group.ranks[0]) as reader:
        await group.clock.advance(0.0)
        group.clock.jump(7.0)
        assert not group.ranks[0].member.trusted
        await group.barrier.lead()
        for rank in group.ranks[1:]:
            await rank.beat()
        await group.barrier.dispatch(epoch, "load", "{}", (RankRule(1, 2, ("Connected",)),))
        await group.clock.advance(0.0)
        assert [task.step for task in reader.tasks] == ["load"]
        assert group.ranks[0].member.trusted
        assert (await group.inspect()).ranks[0].report is not None


async def test_no_task_comes_out_while_the_lease_cannot_be_renewed(store: FakeStore, clock: ManualClock) -> None:
    """The log still arrives, but reports do not: one direction of the network is gone."""
    plan = FaultPlan()
    async with started_group(store, 1) as group:
        await group.ranks[0].close()
        member = Member(store.client("rank 0", faults=plan), "demo", rank=0, clock=clock)
        await member.claim()
        epoch = await group.open()
        await member.promise(epoch)
        await member.report("Connected")
        log = member.tasks()
        waiting = asyncio.create_task(anext(log))
        await clock.advance(0.0)
        await waiting  # the epoch's own entry, or its announcement
        await group.load(epoch)
        clock.jump(5.0)
        for n in range(1, 4):
            plan.refuse("exec", nth=n)
        came: list[LogEntry] = []

        async def read() -> None:
            while True:
                came.append(await anext(log))

        reading = asyncio.create_task(read())
        await clock.advance(0.0)
        assert came == []
        await clock.advance(2.0)
        assert came == []
        await clock.advance(3.0)
        assert [type(entry) for entry in came] == [TaskEntry]
        plan.assert_fired()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await member.leave()
        await member.close()


# --- a bad connection ---------------------------------------------------------------------------------------------------


async def test_a_broken_connection_costs_no_entry(group: Group) -> None:
    epoch = await group.all_connected()
    async with Reader(group.ranks[0]) as reader:
        await group.clock.advance(0.0)
        group.store.partition("rank 0")
        await group.load(epoch)
        await group.clock.advance(1.0)
        assert reader.tasks == []
        group.store.heal()
        await group.clock.advance(2.0)
        assert [task.step for task in reader.tasks] == ["load"]


async def test_a_server_restart_costs_no_entry(group: Group) -> None:
    epoch = await group.all_connected()
    async with Reader(group.ranks[0]) as reader:
        await group.clock.advance(0.0)
        group.store.restart(keep_data=True)
        await group.load(epoch)
        await group.clock.advance(1.0)
        assert [task.step for task in reader.tasks] == ["load"]


async def test_more_entries_than_fit_into_one_read_all_come(store: FakeStore) -> None:
    async with started_group(store, 1) as group:
        epoch = await group.all_connected()
        for n in range(250):
            await group.barrier.dispatch(epoch, f"generate:{n}", "{}", "Connected", repeatable=True)
        for n in range(250):
            task = await group.ranks[0].next_task()
            assert (task.step, task.missed) == (f"generate:{n}", False)


async def test_closing_the_log_ends_its_reader(group: Group) -> None:
    rank = group.ranks[0]
    await group.all_connected()
    await rank.next_entry()
    before = asyncio.all_tasks()
    await rank.close()
    await wait_until(lambda: len(asyncio.all_tasks()) < len(before), "the reading task to be gone")


# --- garbage ------------------------------------------------------------------------------------------------------------


async def test_garbage_in_the_log_is_told_and_passed_over(group: Group) -> None:
    epoch = await group.all_connected()
    for n in range(2, 5):
        await group.barrier.store.commands.xadd(group.keys.tasks, {b"\xff": b"\x00"}, id=f"{epoch.number}-{n}")
    await group.load(epoch)
    async with Reader(group.ranks[0]) as reader:
        await group.clock.advance(0.0)
        garbage = [entry for entry in reader.entries if isinstance(entry, Garbage)]
        assert [entry.id for entry in garbage] == [f"{epoch.number}-{n}" for n in range(2, 5)]
        assert [task.step for task in reader.tasks] == ["load"]


ENTRY = LogId(100, 2)
TASK = {
    b"kind": b"task", b"nonce": b"a" * 32, b"prev": b"1", b"term": b"7", b"step": b"load", b"to": b"0-2", b"task": b"{}",
}  # fmt: skip


def test_a_whole_entry_is_read() -> None:
    assert decode_entry(ENTRY, TASK) == TaskEntry(EpochId(100, "a" * 32), ENTRY, 1, "load", 0, 2, 7, b"{}")


@pytest.mark.parametrize("field", sorted(TASK))
def test_an_entry_with_a_field_missing_is_garbage(field: bytes) -> None:
    found = decode_entry(ENTRY, {name: value for name, value in TASK.items() if name != field})
    assert found == Garbage("100-2", "not an entry of ours (KeyError)")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"kind", b"other"),
        (b"nonce", b"short"),
        (b"nonce", b"\xff" * 32),
        (b"prev", b"x"),
        (b"term", b""),
        (b"step", b"\xff"),
        (b"to", b"0"),
        (b"to", b"0-1-2"),
        (b"to", b"a-b"),
    ],
)
def test_an_entry_with_a_bad_field_is_garbage(field: bytes, value: bytes) -> None:
    assert isinstance(decode_entry(ENTRY, TASK | {field: value}), Garbage)


@given(st.dictionaries(st.sampled_from(sorted(TASK)) | st.binary(max_size=8), st.binary(max_size=40), max_size=10))
def test_anything_in_the_log_is_an_entry_or_garbage(fields: dict[bytes, bytes]) -> None:
    assert isinstance(decode_entry(ENTRY, fields), EpochAnnounced | TaskEntry | VerdictAnnounced | Garbage)


@given(st.binary(max_size=200))
def test_any_bytes_as_a_verdict_still_end_the_epoch(raw: bytes) -> None:
    found = decode_entry(ENTRY, {b"kind": b"verdict", b"nonce": b"a" * 32, b"verdict": raw})
    assert isinstance(found, VerdictAnnounced)
    assert found.verdict.kind in ("Aborted", "Stopped")


async def test_a_mistake_in_the_reader_ends_the_log_and_nobody_waits_for_ever(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*_: object) -> LogEntry:
        raise ZeroDivisionError("its own text may quote a prompt")

    epoch = await group.all_connected()
    monkeypatch.setattr("barrier.task_log.decode_entry", mistaken)
    await group.load(epoch)
    with pytest.raises(
        PartFailed, match="a mistake of ours ended the reading of the task log .ZeroDivisionError at .*in mistaken"
    ):
        await asyncio.wait_for(anext(group.ranks[0].member.tasks()), 5)


def test_an_entry_beyond_what_a_report_can_name_is_not_ours() -> None:
    fields = {b"kind": b"opened", b"nonce": NONCE.encode()}
    assert decode_entry(LogId(7, 10**10 - 1), fields) == EpochAnnounced(EpochId(7, NONCE))
    assert isinstance(decode_entry(LogId(7, 10**10), fields), Garbage)

"""Nothing of ours stays for ever: every key has a lifetime, every stream a cap, and what is in use is renewed."""

from __future__ import annotations

from typing import Any

import pytest

from barrier import Settings
from barrier.testing import FakeStore
from tests.unit.barrier.group import Group, started_group

pytestmark = pytest.mark.anyio

SETTINGS = Settings(record_lifetime=1_000.0, output_lifetime=100.0, log_entries=20, signal_entries=20, event_entries=20)


async def bring_up(group: Group) -> None:
    """Everything that writes: a whole attempt with loads, generations, answers, history and an end."""
    epoch = await group.all_connected()
    await group.load(epoch)
    for rank in group.ranks:
        await rank.next_task()
        await rank.report("Loaded")
        await rank.member.report("Ready", events=[{"kind": "RunnerStatusUpdated"}])
    await group.barrier.dispatch(epoch, "generate:1", "{}", "Ready", repeatable=True)
    await group.ranks[0].member.write_output("generate:1", [b"text"])
    await group.conclude(epoch)


async def lifetimes(group: Group) -> dict[str, float]:
    """Seconds left, by key."""
    commands: Any = group.barrier.store.commands
    return {key: await commands.pttl(key) / 1000 for key in group.store.contents()}


async def test_after_a_whole_attempt_every_kind_of_key_is_there_and_has_its_lifetime(store: FakeStore) -> None:
    async with started_group(store, 2, settings=SETTINGS) as group:
        await bring_up(group)
        keys = group.keys
        records = dict.fromkeys((keys.epoch, keys.leader, keys.tasks, keys.signals, keys.events), 1_000.0)
        leases = {key: 6.0 for rank in range(2) for key in (keys.rank(rank), keys.claim(rank))}
        answers = {keys.out("generate:1"): 100.0, keys.once("generate:1"): 100.0}
        assert await lifetimes(group) == records | leases | answers


async def test_without_anybody_everything_goes(store: FakeStore) -> None:
    async with started_group(store, 2, settings=SETTINGS) as group:
        await bring_up(group)
        await group.clock.advance(101.0)
        keys = group.keys
        assert set(store.keys()) == {keys.epoch, keys.leader, keys.tasks, keys.signals, keys.events}
        await group.clock.advance(900.0)
        assert store.keys() == []


async def test_what_is_in_use_is_renewed(store: FakeStore) -> None:
    async with started_group(store, 2, settings=SETTINGS) as group:
        epoch = await group.all_connected()
        await group.clock.advance(900.0)
        for rank in group.ranks:
            await rank.beat()
        await group.barrier.lead()
        await group.load(epoch)
        left = await lifetimes(group)
        for key in (group.keys.epoch, group.keys.leader, group.keys.tasks, group.keys.events):
            assert left[key] == 1_000.0


async def test_a_hundred_attempts_leave_as_many_keys_as_one(store: FakeStore) -> None:
    async with started_group(store, 2, settings=SETTINGS) as group:
        await bring_up(group)
        keys = store.keys()
        for _ in range(100):
            epoch = await group.open()
            for rank in group.ranks:
                await rank.retire()
                await rank.arrive("Connected")
            await group.load(epoch)
            await group.conclude(epoch)
        assert store.keys() == keys
        contents = store.contents()
        assert len(contents[group.keys.tasks]) <= 20
        for stream in (group.keys.signals, group.keys.events):
            assert len(contents[stream]) <= 200, "capped approximately, as real servers do"

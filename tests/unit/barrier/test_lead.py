"""Leadership: one planner at a time, and a term and holder that fence all others."""

from __future__ import annotations

import pytest

from barrier import Dispatched, Fenced, Following, Leading, Opened, StoreUnavailable, Verdict
from barrier.testing import FakeStore, FaultPlan
from tests.unit.barrier.group import Group, started_group

pytestmark = pytest.mark.anyio


def term_of(outcome: object) -> int:
    assert isinstance(outcome, Leading), outcome
    return outcome.leadership.term


async def test_the_first_planner_leads_and_renewing_keeps_its_term(group: Group) -> None:
    first = group.leadership
    await group.clock.advance(2.0)
    assert term_of(await group.barrier.lead()) == first.term
    snapshot = await group.inspect()
    assert snapshot.leader == first
    assert snapshot.leader_left_ms == 6_000


async def test_a_second_planner_follows_and_is_told_whom_and_for_how_long(group: Group) -> None:
    async with group.planner("standby") as standby:
        await group.clock.advance(1.5)
        assert await standby.lead() == Following(group.leadership, 4_500)
        assert standby.leadership is None


async def test_the_lease_over_another_may_lead_with_a_higher_term(group: Group) -> None:
    old = group.leadership
    async with group.planner("standby") as standby:
        await group.clock.advance(5.999)
        assert isinstance(await standby.lead(), Following)
        await group.clock.advance(0.002)
        assert term_of(await standby.lead()) > old.term
        assert isinstance(await group.barrier.lead(), Following)
        assert group.barrier.leadership is None


async def test_leadership_given_back_is_free_at_once(group: Group) -> None:
    old = group.leadership
    await group.barrier.resign()
    assert group.barrier.leadership is None
    async with group.planner("standby") as standby:
        assert term_of(await standby.lead()) > old.term


async def test_a_planner_cannot_give_anothers_leadership_back(group: Group) -> None:
    async with group.planner("standby") as standby:
        await standby.resign()
        assert isinstance(await standby.lead(), Following)


async def test_a_term_is_above_the_servers_clock_so_that_a_store_that_forgot_does_not_issue_it_twice(
    group: Group,
) -> None:
    old = group.leadership
    group.store.flush()
    await group.clock.advance(0.01)
    async with group.planner("standby") as standby:
        assert term_of(await standby.lead()) > old.term


async def test_a_term_is_above_all_that_the_planner_has_seen_even_if_the_servers_clock_went_back(group: Group) -> None:
    old = group.leadership
    group.store.flush()
    group.store.shift_time(-3_600)
    assert term_of(await group.barrier.lead()) > old.term


async def test_a_follower_remembers_the_leaders_term_as_a_floor(group: Group) -> None:
    async with group.planner("standby") as standby:
        await standby.lead()
        group.store.flush()
        group.store.shift_time(-3_600)
        assert term_of(await standby.lead()) > group.leadership.term


async def test_a_leader_that_was_overtaken_is_fenced_in_every_verb_that_writes(group: Group) -> None:
    epoch = await group.all_connected()
    async with group.planner("standby") as standby:
        await group.clock.advance(5.0)
        await group.arrive("Connected")
        await group.clock.advance(1.5)
        new = await standby.lead()
        assert isinstance(new, Leading)
        fenced = Fenced(new.leadership.term, "standby")
        before = group.store.contents()
        assert await group.barrier.open(3) == fenced
        assert await group.barrier.dispatch(epoch, "load", "{}", "Connected") == fenced
        assert await group.barrier.conclude(epoch, Verdict.stopped()) == fenced
        assert await group.barrier.restore(epoch, "Connected", [], ordinal=1) == fenced
        assert group.store.contents() == before
        assert isinstance(await standby.dispatch(epoch, "load", "{}", "Connected"), Dispatched)


async def test_the_same_term_under_another_name_is_fenced_too(store: FakeStore) -> None:
    """A store that went back can issue one term twice; then the holder tells the two apart."""
    async with started_group(store, 2) as group:
        epoch = await group.all_connected()
        mine = group.leadership
        await group.barrier.store.commands.hset(group.keys.leader, "holder", "somebody-else")
        assert await group.barrier.dispatch(epoch, "load", "{}", "Connected") == Fenced(mine.term, "somebody-else")
        assert await group.tasks() == []


async def test_another_term_under_the_same_name_is_fenced_too(group: Group) -> None:
    """The same planner, started again under the name it had: the process before it must not go on."""
    epoch = await group.all_connected()
    term = group.leadership.term + 1
    await group.barrier.store.commands.hset(group.keys.leader, "term", str(term))
    assert await group.barrier.dispatch(epoch, "load", "{}", "Connected") == Fenced(term, "planner")
    assert await group.tasks() == []


async def test_a_store_that_forgot_the_leadership_fences_everybody(group: Group) -> None:
    epoch = await group.all_connected()
    group.store.delete(group.keys.leader)
    assert await group.barrier.dispatch(epoch, "load", "{}", "Connected") == Fenced(0, "")
    assert await group.barrier.conclude(epoch, Verdict.stopped()) == Fenced(0, "")
    await group.barrier.lead()
    assert isinstance(await group.barrier.dispatch(epoch, "load", "{}", "Connected"), Dispatched)


async def test_a_planner_that_never_led_dispatches_nothing_and_sends_nothing(group: Group) -> None:
    epoch = await group.all_connected()
    async with group.planner("standby") as standby:
        sent = group.store.sent["standby"]
        assert isinstance(await standby.dispatch(epoch, "load", "{}", "Connected"), Fenced)
        assert isinstance(await standby.conclude(epoch, Verdict.stopped()), Fenced)
        assert group.store.sent["standby"] == sent


async def test_open_takes_a_free_leadership_by_itself(store: FakeStore) -> None:
    async with started_group(store, 1) as group:
        await group.barrier.resign()
        async with group.planner("standby") as standby:
            assert isinstance(await standby.open(1), Opened)
            assert standby.leadership is not None


async def test_open_does_not_take_a_leadership_that_somebody_holds(group: Group) -> None:
    async with group.planner("standby") as standby:
        assert isinstance(await standby.open(3), Fenced)
        assert (await group.inspect()).epoch is None


async def test_after_a_lost_reply_the_same_call_finds_the_same_term(store: FakeStore) -> None:
    plan = FaultPlan().lose_reply("lead", nth=3)
    async with started_group(store, 1, faults=plan) as group:
        await group.barrier.resign()
        with pytest.raises(StoreUnavailable):
            await group.barrier.lead()
        taken = (await group.inspect()).leader
        assert taken is not None
        assert term_of(await group.barrier.lead()) == taken.term
        plan.assert_fired()


async def test_a_clock_that_was_set_back_keeps_a_dead_leader_in_office_for_one_lease_and_no_longer(
    group: Group,
) -> None:
    group.store.shift_time(-3_600)
    async with group.planner("standby") as standby:
        assert await standby.lead() == Following(group.leadership, 6_000)
        await group.clock.advance(6.001)
        assert isinstance(await standby.lead(), Leading)

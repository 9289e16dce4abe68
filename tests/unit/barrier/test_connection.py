"""Packing commands for the wire, and sending them: what is packed beforehand is the same as what is packed at once."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis import exceptions as driver

from barrier import Member, StoreUnavailable
from barrier.store.connection import GAP, Arguments, Template, pack
from barrier.testing import FakeStore, FaultPlan, ManualClock
from tests.unit.barrier.group import Group

words = st.text(alphabet=st.characters(codec="utf-8", exclude_characters=GAP), max_size=20)


@given(st.lists(st.one_of(words, st.none()), min_size=1, max_size=8), st.data())
def test_a_filled_template_is_the_packed_command(command: list[str | None], data: st.DataObject) -> None:
    given_later = [data.draw(st.binary(max_size=20)) for word in command if word is None]
    later = iter(given_later)
    whole = [next(later) if word is None else word for word in command]
    assert Template([GAP if word is None else word for word in command]).fill(*given_later) == pack(whole)


def test_a_percent_sign_in_a_template_stands_for_itself() -> None:
    assert Template(("SET", "100%d", GAP)).fill(b"50%b") == pack(("SET", "100%d", b"50%b"))


def test_arguments_that_were_packed_beforehand_stand_for_as_many_as_they_hold() -> None:
    assert pack(("MGET", Arguments.of(["a", "b"]), "c")) == pack(("MGET", "a", "b", "c"))


def test_a_word_that_cannot_be_sent_is_told() -> None:
    with pytest.raises(driver.DataError, match="a word that cannot be sent"):
        pack(("SET", object()))


@pytest.mark.anyio
async def test_a_call_that_was_cancelled_leaves_no_reply_to_the_next_one(store: FakeStore, clock: ManualClock) -> None:
    carried_out, never = asyncio.Event(), asyncio.Event()

    async def hang() -> None:
        carried_out.set()
        await never.wait()

    plan = FaultPlan()
    member = Member(store.client("rank 0", faults=plan), "demo", rank=0, world_size=1, clock=clock)
    await member.claim()
    plan.after("exec", hang)
    cancelled = asyncio.create_task(member.report("Connecting"))
    await carried_out.wait()
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    await member.report("Connected")
    plan.assert_fired()
    await member.close()


@pytest.mark.anyio
async def test_a_connection_that_was_cut_while_nobody_used_it_is_made_anew(group: Group) -> None:
    group.store.partition("rank 0")
    group.store.heal("rank 0")
    await group.ranks[0].report("Connecting")
    group.store.partition("rank 0")
    with pytest.raises(StoreUnavailable):
        await group.ranks[0].report("Connected")
    group.store.heal("rank 0")

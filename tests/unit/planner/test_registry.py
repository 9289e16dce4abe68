"""The desired state: what is asked for, told apart by launch, and kept alive."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest

from barrier import InvalidName, Store, StoreCorrupt, StoreUnavailable, adopt
from barrier.store.keys import Keys
from barrier.testing import FakeStore, FaultPlan, ManualClock
from planner.registry import FORGET_AFTER, InstanceRecord, OtherVersion, Registry
from runner.messages import ModelSpec
from tests.unit.planner.pictures import spec

pytestmark = pytest.mark.anyio

OTHER = spec(2).model_copy(update={"model": ModelSpec(model_id="another")})
INSTANCES, CHANGES = "{rankgate:-}:instances", "{rankgate:-}:changes"
SIGNALS = Keys("rankgate", "demo").signals


@pytest.fixture
async def adopted(store: FakeStore) -> AsyncGenerator[Store]:
    made = adopt(store.client("planner"))
    yield made
    await made.close()


@pytest.fixture
def registry(adopted: Store) -> Registry:
    return Registry(adopted, "rankgate")


@pytest.fixture
async def raw(store: FakeStore) -> AsyncGenerator[Any]:
    client = store.client("somebody else")
    yield client
    await client.aclose()


async def test_what_was_launched_is_on_record(registry: Registry, clock: ManualClock) -> None:
    record = await registry.launch(spec(2))
    assert (record.spec, record.desired, record.failure) == (spec(2), "up", "")
    assert record.launched_ms == 1_700_000_000_000
    assert await registry.get("demo") == record
    assert await registry.all() == {"demo": record}
    assert clock.now() == 1_000.0


async def test_to_launch_the_same_again_changes_nothing(
    registry: Registry, clock: ManualClock, store: FakeStore
) -> None:
    first = await registry.launch(spec(2))
    before = store.contents()
    await clock.advance(5)
    assert await registry.launch(spec(2)) == first
    assert store.contents() == before


async def test_to_launch_with_another_limit_for_absence_is_the_same_launch(
    registry: Registry, clock: ManualClock
) -> None:
    first = await registry.launch(spec(2))
    await clock.advance(5)
    patient = spec(2).model_copy(update={"absence_limit": 90.0})
    second = await registry.launch(patient)
    assert second == first.model_copy(update={"spec": patient})
    assert (await registry.get("demo")) == second
    assert patient.digest == spec(2).digest, "ranks do not care, and a serving instance is not taken down"


def test_a_limit_that_was_not_set_is_not_written() -> None:
    """Planners of earlier versions refuse what they do not know."""
    assert "absence_limit" not in InstanceRecord(spec=spec(2)).model_dump_json()


async def test_to_launch_another_spec_is_another_launch(registry: Registry, clock: ManualClock) -> None:
    first = await registry.launch(spec(2))
    await clock.advance(5)
    second = await registry.launch(OTHER)
    assert second.spec == OTHER
    assert second.launched_ms == first.launched_ms + 5_000


async def test_two_launches_within_one_millisecond_are_told_apart(registry: Registry) -> None:
    first, second, third = [await registry.launch(one) for one in (spec(2), OTHER, spec(2))]
    assert first.launched_ms < second.launched_ms < third.launched_ms


async def test_a_clock_of_the_store_that_went_back_does_not_repeat_a_launch(
    registry: Registry, store: FakeStore
) -> None:
    first = await registry.launch(spec(2))
    store.shift_time(-3_600)
    assert (await registry.launch(OTHER)).launched_ms > first.launched_ms


async def test_to_stop_asks_for_it_to_be_down_and_what_is_carried_out_is_gone(
    registry: Registry, clock: ManualClock
) -> None:
    record = await registry.launch(spec(2))
    assert await registry.stop(record)
    assert (await registry.all())["demo"].desired == "down"
    await registry.carried_out(record)
    gone = (await registry.all())["demo"]
    assert (gone.desired, gone.gone_ms) == ("gone", 1_700_000_000_000)
    await clock.advance(FORGET_AFTER + 2)
    assert await registry.all() == {}


async def test_what_is_gone_can_be_launched_again(registry: Registry) -> None:
    record = await registry.launch(spec(2))
    await registry.stop(record)
    await registry.carried_out(record)
    again = await registry.launch(spec(2))
    assert again.desired == "up"
    assert again.launched_ms > record.launched_ms


async def test_what_was_given_up_says_why_and_can_be_launched_again(registry: Registry) -> None:
    record = await registry.launch(spec(2))
    await registry.give_up(record, "rank 1 has no disk")
    failed = await registry.get("demo")
    assert failed is not None
    assert (failed.failure, failed.desired) == ("rank 1 has no disk", "up")
    again = await registry.launch(spec(2))
    assert again.failure == ""


async def test_who_speaks_for_an_earlier_launch_changes_nothing_of_the_later_one(
    registry: Registry, store: FakeStore
) -> None:
    old = await registry.launch(spec(2))
    new = await registry.launch(OTHER)
    before = store.contents()
    assert await registry.stop(old) is False
    await registry.give_up(old, "too late")
    await registry.carried_out(old)
    await registry.heal(old)
    assert store.contents() == before
    assert await registry.get("demo") == new


async def test_to_stop_twice_does_not_bring_back_what_is_gone(registry: Registry) -> None:
    record = await registry.launch(spec(2))
    await registry.stop(record)
    await registry.carried_out(record)
    assert await registry.stop(record)
    assert (await registry.all())["demo"].desired == "gone"


async def test_what_is_up_is_not_called_gone(registry: Registry) -> None:
    record = await registry.launch(spec(2))
    await registry.carried_out(record)
    assert await registry.get("demo") == record


async def test_what_the_store_forgot_is_written_back_and_what_it_has_is_not_overwritten(
    registry: Registry, store: FakeStore
) -> None:
    record = await registry.launch(spec(2))
    store.flush()
    assert await registry.all() == {}
    await registry.heal(record)
    assert await registry.all() == {"demo": record}
    await registry.stop(record)
    await registry.heal(record)
    assert (await registry.all())["demo"].desired == "down"


async def test_what_is_written_back_is_announced_and_what_was_there_is_not(
    registry: Registry, store: FakeStore
) -> None:
    """A planner that began after the flush would otherwise learn of it up to 20 s later. Found by make chaos."""
    record = await registry.launch(spec(2))
    store.flush()
    await registry.heal(record)
    announced = await registry.changes_end()
    assert announced != "0-0"
    await registry.heal(record)
    assert await registry.changes_end() == announced


async def test_a_stop_after_a_flush_is_on_record_all_the_same(registry: Registry, store: FakeStore) -> None:
    record = await registry.launch(spec(2))
    store.flush()
    assert await registry.stop(record)
    assert (await registry.all())["demo"].desired == "down"


async def test_every_write_wakes_the_planners_and_the_group(registry: Registry, raw: Any) -> None:
    record = await registry.launch(spec(2))
    await registry.stop(record)
    await registry.carried_out(record)
    assert (await raw.xlen(CHANGES), await raw.xlen(SIGNALS)) == (3, 3)


async def test_where_to_wait_for_changes_from(registry: Registry, raw: Any) -> None:
    assert await registry.changes_end() == "0-0"
    await registry.launch(spec(2))
    newest = await raw.xrevrange(CHANGES, count=1)
    assert await registry.changes_end() == newest[0][0].decode()


async def test_everything_has_a_lifetime_and_looking_renews_that_of_the_desired_state(
    registry: Registry, store: FakeStore, clock: ManualClock, raw: Any
) -> None:
    await registry.launch(spec(2))
    assert store.keys_without_lifetime() == []
    await clock.advance(80_000)
    await registry.all()
    assert await raw.pttl(INSTANCES) == 86_400_000


@pytest.mark.parametrize(
    "garbage", [b"", b"{}", b"\xff\xfe", b'{"spec": 3}', b'{"spec": {"name": "}", "world_size": 1}}']
)
async def test_what_is_not_readable_is_ignored_and_does_not_hide_the_rest(
    registry: Registry, raw: Any, garbage: bytes
) -> None:
    record = await registry.launch(spec(2))
    await raw.hset(INSTANCES, "broken", garbage)
    assert await registry.get("broken") is None
    assert await registry.all() == {"demo": record}


async def test_a_later_version_may_add_fields(registry: Registry, raw: Any) -> None:
    record = await registry.launch(spec(2))
    text = record.model_dump_json().replace('"desired"', '"of_tomorrow":1,"desired"')
    await raw.hset(INSTANCES, "demo", text)
    assert await registry.get("demo") == record


async def test_what_another_version_wrote_is_named_and_stays_as_it_is(registry: Registry, raw: Any) -> None:
    record = await registry.launch(spec(2))
    theirs = record.model_copy(update={"wire": 7}).model_dump_json()
    await raw.hset(INSTANCES, "demo", theirs)
    with pytest.raises(OtherVersion, match=r"instance 'demo' has wire version 7, and this version of rankgate reads 1"):
        await registry.launch(spec(4))
    with pytest.raises(OtherVersion):
        await registry.stop(record)
    assert await registry.all() == {}, "it is told in the log and passed over"
    await registry.heal(record)
    assert await raw.hget(INSTANCES, "demo") == theirs.encode()


@pytest.mark.parametrize("name", ["epoch", "leader", "tasks", "requests"])
async def test_a_launch_over_a_key_of_the_wrong_type_writes_nothing(
    registry: Registry, raw: Any, store: FakeStore, name: str
) -> None:
    key = getattr(Keys("rankgate", "demo"), name)
    await raw.rpush(key, "not yours")
    await raw.pexpire(key, 10**9)
    before = store.contents()
    with pytest.raises(
        StoreCorrupt, match=rf"^{key} holds a list where a (hash|stream) belongs; move or delete that key"
    ):
        await registry.launch(spec(2))
    assert store.contents() == before


@pytest.mark.parametrize("key", [INSTANCES, CHANGES])
async def test_a_launch_over_a_namespace_key_of_the_wrong_type_writes_nothing(
    registry: Registry, raw: Any, store: FakeStore, key: str
) -> None:
    await raw.set(key, "not yours", px=10**9)
    before = store.contents()
    with pytest.raises(StoreCorrupt, match="holds a string where a (hash|stream) belongs"):
        await registry.launch(spec(2))
    assert store.contents() == before


async def test_a_store_that_is_gone_is_one_clear_error(registry: Registry, store: FakeStore) -> None:
    store.partition("planner")
    with pytest.raises(StoreUnavailable):
        await registry.launch(spec(2))
    with pytest.raises(StoreUnavailable):
        await registry.all()


@pytest.mark.parametrize("verb", ["launch", "stop", "give_up", "carried_out"])
async def test_two_who_change_a_record_at_once_do_not_overwrite_one_another(store: FakeStore, verb: str) -> None:
    """Somebody launches anew between this one's look and its write."""
    quick = adopt(store.client("quick"))
    rival = Registry(quick, "rankgate")
    record = await rival.launch(spec(2))
    if verb == "carried_out":
        await rival.stop(record)
    faults = FaultPlan().before("exec", lambda: rival.launch(OTHER), touching="launched_ms")
    slow = adopt(store.client("slow", faults=faults))
    registry = Registry(slow, "rankgate")
    match verb:
        case "launch":
            third = spec(2).model_copy(update={"model": ModelSpec(model_id="a third")})
            assert (await registry.launch(third)).spec == third
        case "stop":
            assert await registry.stop(record) is False
        case "give_up":
            await registry.give_up(record, "rank 1 has no disk")
        case _:
            await registry.carried_out(record)
    faults.assert_fired()
    last = await rival.get("demo")
    assert last is not None
    assert (last.desired, last.failure) == ("up", "")
    assert last.launched_ms == record.launched_ms + (2 if verb == "launch" else 1), "no two launches are alike"
    assert (last.spec == OTHER) is (verb != "launch")
    await quick.close()
    await slow.close()


async def test_a_launch_whose_reply_was_lost_is_the_same_launch_when_it_is_asked_again(
    store: FakeStore, raw: Any
) -> None:
    faults = FaultPlan().lose_reply("exec", touching="launched_ms")
    adopted = adopt(store.client("planner", faults=faults))
    registry = Registry(adopted, "rankgate")
    record = await registry.launch(spec(2))  # looks again, and finds that it was carried out
    faults.assert_fired()
    assert await registry.get("demo") == record
    assert await raw.xlen(CHANGES) == 1
    await adopted.close()


def test_hostile_namespaces_never_become_part_of_a_key(store: FakeStore) -> None:
    with pytest.raises(InvalidName):
        Registry(adopt(store.client()), "a}b{c")


def test_a_record_is_a_value() -> None:
    record = InstanceRecord(spec=spec(2))
    with pytest.raises(ValueError, match="frozen"):
        record.desired = "down"

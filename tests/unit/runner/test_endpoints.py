"""Where the ranks are: from their reports into the record, by the script of the connect step, and out of it again."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from barrier import Barrier, Dispatched, EpochId, InvalidName, Member, Opened, Promised, Released, Report
from barrier.testing import FakeStore, ManualClock
from planner import Policy
from planner.recovery import Memory, observe
from runner.endpoints import check_endpoints
from tests.unit.planner.pictures import SETTINGS, picture

pytestmark = pytest.mark.anyio

SIZE = 130  # three fields of the record
ENDPOINTS = tuple(f"node-{rank}.example:{20_000 + rank}" for rank in range(SIZE))


@pytest.fixture
def store() -> FakeStore:
    return FakeStore(ManualClock())


@pytest.fixture
async def members(store: FakeStore) -> AsyncGenerator[list[Member]]:
    made = [Member(store.client(), "demo", rank=rank, world_size=SIZE, clock=store.clock) for rank in range(SIZE)]
    for member in made:
        await member.claim()
    yield made
    for member in made:
        await member.close()


async def promise(members: list[Member], epoch: EpochId) -> None:
    for member, endpoint in zip(members, ENDPOINTS, strict=True):
        assert isinstance(await member.promise(epoch), Promised)
        await member.report("Idle", endpoint=endpoint)


async def test_every_rank_reads_where_all_others_wait(store: FakeStore, members: list[Member]) -> None:
    async with Barrier(store.client(), "demo", world_size=SIZE, clock=store.clock) as barrier:
        opened = await barrier.open()
        assert isinstance(opened, Opened)
        await promise(members, opened.epoch)
        assert await members[0].endpoints(SIZE) is None, "no step has asked for them yet"
        outcome = await barrier.release(opened.epoch, "connect", "{}", "Idle", timeout=5, endpoints=True)
        assert isinstance(outcome, Released)
        for member in (members[0], members[64], members[-1]):
            assert await member.endpoints(SIZE) == ENDPOINTS
        assert await members[0].endpoints(SIZE + 1) is None, "they are for another number of ranks"
        check_endpoints(ENDPOINTS, 7, ENDPOINTS[7])


async def test_the_endpoints_of_an_attempt_are_not_read_in_another(store: FakeStore, members: list[Member]) -> None:
    """A record that is another attempt's tells nobody where to connect; nor does one without a promise."""
    async with Barrier(store.client(), "demo", world_size=SIZE, clock=store.clock) as barrier:
        opened = await barrier.open()
        assert isinstance(opened, Opened)
        await promise(members, opened.epoch)
        await barrier.release(opened.epoch, "connect", "{}", "Idle", timeout=5, endpoints=True)
        member = members[3]
        await barrier.store.commands.hset(barrier.keys.epoch, "nonce", "b" * 32)
        assert await member.endpoints(SIZE) is None
        await barrier.store.commands.hset(barrier.keys.epoch, "nonce", opened.epoch.nonce)
        assert await member.endpoints(SIZE) == ENDPOINTS
        member.retire()
        assert await member.endpoints(SIZE) is None
        assert member.report_now.endpoint == "", "an endpoint is spent with its promise"


@pytest.mark.parametrize(
    "written",
    ["10.0.0.9:1\n10.0.0.9:2", "a b:1", '"', "\u202e:1", "h:1\\n"],
)
async def test_what_one_rank_writes_shifts_nobody_else_s_endpoint(
    store: FakeStore, members: list[Member], written: str
) -> None:
    """A hostile rank writes its report by itself: with a line break it would move the ranks behind it."""
    async with Barrier(store.client(), "demo", world_size=SIZE, clock=store.clock) as barrier:
        opened = await barrier.open()
        assert isinstance(opened, Opened)
        await promise(members, opened.epoch)
        honest: Report = members[5].report_now
        raw = honest._replace(endpoint=written).encode()
        await members[5].store.commands.set(members[5].keys.rank(5), raw, px=60_000)
        outcome = await barrier.dispatch(opened.epoch, "connect", "{}", "Idle", endpoints=True)
        assert isinstance(outcome, Dispatched)
        assert await members[0].endpoints(SIZE) == (*ENDPOINTS[:5], "", *ENDPOINTS[6:])


@pytest.mark.parametrize("endpoint", ["node", "node:", ":5000", "node:0", "node:65536", "a b:1", "fd00::1:5", "h:1\n"])
async def test_what_is_no_endpoint_is_not_reported(members: list[Member], endpoint: str) -> None:
    before = members[0].report_now
    with pytest.raises(InvalidName, match="is not host:port"):
        await members[0].report("Idle", endpoint=endpoint)
    assert members[0].report_now == before


def test_a_sign_of_life_without_another_layer_is_progress() -> None:
    """A large layer, a download: the engine says the same number again, and the planner's patience begins anew."""

    def seen(memory: Memory, signs: int, now: float) -> Memory:
        told = picture("Loading", "Loading", dispatched=2, ranks={0: {"progress": (1, 4), "signs": signs}})
        return observe(memory, told, Policy(), SETTINGS, now, serving=False, jitter=0.5)

    memory = seen(Memory.fresh(0.0), 3, 0.0)
    assert seen(memory, 3, 50.0).progress_at == 0.0, "a standstill"
    assert seen(memory, 4, 50.0).progress_at == 50.0

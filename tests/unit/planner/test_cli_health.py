"""The state file, and what is asked of the store about the process that left it. Also: a store that is not up yet, and a password file."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import typer
from loguru import logger

import barrier
from barrier import (
    Barrier,
    Member,
    Settings,
    Store,
    StoreCorrupt,
    StoreError,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    StoreUnsuitable,
    adopt,
)
from barrier.store.connect import _client  # pyright: ignore[reportPrivateUsage]  nothing is sent
from barrier.store.fitness import Role
from barrier.testing import FakeStore, wait_until
from planner.cli import main, process
from planner.cli.commands import launch_unless_known
from planner.cli.health import NoState, ProcessState, keeping_state, planner_health, read_state, runner_health
from planner.cli.options import needed_url
from planner.registry import Registry
from planner.spec import InstanceSpec

pytestmark = pytest.mark.anyio

RUNNER = ProcessState(kind="runner", namespace="rankgate", pid=7, instance="demo", ranks={}, heartbeat=0.5)
PLANNER = ProcessState(kind="planner", namespace="rankgate", pid=8, heartbeat=0.5)
SPEC = InstanceSpec(name="demo", world_size=2)


@pytest.fixture
async def members(store: FakeStore) -> AsyncGenerator[list[Member]]:
    members = [Member(store.client(), "demo", rank=rank, world_size=2, node=f"node-{rank}") for rank in range(2)]
    for member in members:
        await member.claim()
    yield members
    for member in members:
        await member.leave()


def state_of(members: list[Member]) -> ProcessState:
    return RUNNER.model_copy(update={"ranks": {member.rank: member.incarnation for member in members}})


# --- the runner -----------------------------------------------------------------------------------------------------------


async def test_a_runner_whose_ranks_report_is_well(store: FakeStore, members: list[Member]) -> None:
    health = await runner_health(adopt(store.client()), state_of(members))
    assert health.good
    assert "demo rank 0: Idle" in health.sentence
    assert "demo rank 1: Idle" in health.sentence


async def test_a_lapsed_lease_is_not_well(store: FakeStore, members: list[Member]) -> None:
    await members[1].leave()
    health = await runner_health(
        adopt(store.client()), state_of([members[0]]).model_copy(update={"ranks": {1: members[0].incarnation}})
    )
    assert not health.good
    assert "demo rank 1: no live report" in health.sentence


async def test_a_rank_that_another_process_holds_is_not_well(store: FakeStore, members: list[Member]) -> None:
    state = state_of(members).model_copy(update={"ranks": {0: "0" * 28}})
    health = await runner_health(adopt(store.client()), state)
    assert not health.good
    assert "another process holds the rank now (node node-0" in health.sentence


@pytest.mark.parametrize("rank", [0, None])
async def test_a_spare_is_well(store: FakeStore, members: list[Member], rank: int | None) -> None:
    spare = Member(store.client(), "demo", rank=rank, world_size=2)
    waiting = asyncio.create_task(spare.claim(spare=True))
    client = adopt(store.client())
    state = RUNNER.model_copy(
        update={"spare": spare.incarnation} if rank is None else {"ranks": {rank: spare.incarnation}}
    )

    async def well() -> bool:
        return (await runner_health(client, state)).good

    await wait_until(well, "the spare to be seen")
    assert "waits as a spare" in (await runner_health(client, state)).sentence
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert not await well(), "its seat is given back"
    fresh = state.model_copy(update={"beat": time.monotonic()})
    assert (await runner_health(client, fresh)).good is (rank is None), "one of many that wait has no seat"


async def test_a_failed_engine_is_not_well(store: FakeStore, members: list[Member]) -> None:
    await members[0].report("Failed", error="out of memory")
    health = await runner_health(adopt(store.client()), state_of(members))
    assert not health.good
    assert health.sentence == "demo rank 0: Failed: out of memory"


async def test_a_report_that_nobody_can_read_is_not_well(store: FakeStore, members: list[Member]) -> None:
    client = adopt(store.client())
    await client.commands.set(members[0].keys.rank(0), b"garbage", px=5_000)
    health = await runner_health(client, state_of(members))
    assert not health.good
    assert "not readable" in health.sentence
    await client.commands.delete(members[0].keys.rank(0))


async def test_no_rank_is_not_well(store: FakeStore) -> None:
    assert not (await runner_health(adopt(store.client()), RUNNER)).good


# --- the planner ----------------------------------------------------------------------------------------------------------


def beating() -> ProcessState:
    return PLANNER.model_copy(update={"beat": time.monotonic()})


async def test_a_planner_without_instances_is_well(store: FakeStore) -> None:
    assert (await planner_health(adopt(store.client()), beating())).good


async def test_an_instance_that_nobody_leads_is_not_well(store: FakeStore) -> None:
    client = adopt(store.client())
    await Registry(client, "rankgate").launch(SPEC)
    health = await planner_health(client, beating())
    assert not health.good
    assert health.sentence == "no planner leads demo"


async def test_a_standby_is_well(store: FakeStore) -> None:
    client = adopt(store.client())
    await Registry(client, "rankgate").launch(SPEC)
    async with Barrier(client, "demo", world_size=2, holder="the-other") as barrier:
        await barrier.lead()
        health = await planner_health(client, beating())
    assert health.good
    assert health.sentence == "demo is led by the-other"


async def test_an_event_loop_that_hangs_is_not_well(store: FakeStore) -> None:
    state = PLANNER.model_copy(update={"beat": time.monotonic() - 2.0})
    health = await planner_health(adopt(store.client()), state)
    assert not health.good
    assert "has not run for 2.0 s" in health.sentence


# --- the state file -------------------------------------------------------------------------------------------------------


async def test_the_file_is_there_while_the_process_is_and_beats(tmp_path: Path) -> None:
    path = tmp_path / "state"
    quick = PLANNER.model_copy(update={"heartbeat": 0.001})
    async with keeping_state(path, quick):
        first = read_state(path, "planner")
        assert first.pid == 8
        async with asyncio.timeout(10):
            while read_state(path, "planner").beat == first.beat:
                await asyncio.sleep(0)
    assert list(tmp_path.iterdir()) == []


async def test_no_file_is_kept_where_none_is_asked_for() -> None:
    async with keeping_state(None, RUNNER):
        pass


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"kind": "cook"}'])
def test_a_file_that_is_none_of_ours_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state"
    with pytest.raises(NoState, match="cannot be read"):
        read_state(path, "runner")
    path.write_bytes(content)
    with pytest.raises(NoState, match="is not a state file"):
        read_state(path, "runner")


def test_the_file_of_another_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text(PLANNER.model_dump_json())
    with pytest.raises(NoState, match="is the state file of a planner: use rankgate health planner"):
        read_state(path, "runner")


def test_the_command_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANKGATE_STATE_FILE", raising=False)
    assert main(["health", "runner"]) == 2
    assert "no process is named" in capsys.readouterr().err
    path = tmp_path / "state"
    assert main(["health", "runner", "--state-file", str(path), "--redis", "redis://127.0.0.1:1"]) == 1
    assert "has not started yet" in capsys.readouterr().err
    path.write_text(RUNNER.model_dump_json())
    assert main(["health", "runner", "--state-file", str(path), "--redis", "redis://127.0.0.1:1"]) == 1
    assert "no answer from the store" in capsys.readouterr().err


# --- an instance that the planner is to launch ----------------------------------------------------------------------------


async def test_an_instance_is_launched_once_and_stays_as_people_left_it(store: FakeStore) -> None:
    client = adopt(store.client())
    registry = Registry(client, "rankgate")
    await launch_unless_known(registry, SPEC)
    first = await registry.get("demo")
    assert first is not None
    await launch_unless_known(registry, SPEC)
    assert await registry.get("demo") == first

    await registry.give_up(first, "rank 1 is broken")
    await launch_unless_known(registry, SPEC)
    after = await registry.get("demo")
    assert after is not None
    assert after.failure == "rank 1 is broken"

    await registry.stop(first)
    await launch_unless_known(registry, SPEC)
    after = await registry.get("demo")
    assert after is not None
    assert after.desired == "down"

    await launch_unless_known(registry, SPEC.model_copy(update={"world_size": 3}))
    after = await registry.get("demo")
    assert after is not None
    assert (after.desired, after.spec.world_size, after.failure) == ("up", 3, "")


# --- a store that is not up yet -------------------------------------------------------------------------------------------


class Door:
    """Stands for `barrier.connect`: refuses so many times, then lets in."""

    def __init__(self, refusals: int, error: Exception) -> None:
        self.refusals, self.error, self.calls = refusals, error, 0
        self.store: Any = object()

    async def connect(self, url: str, *, settings: Settings | None = None, role: Role | None = None) -> Store:
        self.calls += 1
        if self.calls <= self.refusals:
            raise self.error
        return self.store


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> Generator[None]:
    """Time that passes by itself, and the log's lines."""
    passed = 0.0

    class Quick:
        def now(self) -> float:
            return passed

        async def sleep(self, seconds: float) -> None:
            nonlocal passed
            passed += seconds

    monkeypatch.setattr(process, "SystemClock", Quick)
    number = logger.add(lambda line: log.append(str(line)), level="INFO", format="{message}")
    yield
    logger.remove(number)


async def connect_through(door: Door, monkeypatch: pytest.MonkeyPatch, wait: float) -> Store:
    monkeypatch.setattr(barrier, "connect", door.connect)
    return await process.connect_store("redis://store", Settings(), wait=wait)


@pytest.mark.usefixtures("waiting")
async def test_a_store_that_is_not_up_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    door = Door(10, StoreUnavailable("no answer from the store at store:6379"))
    assert await connect_through(door, monkeypatch, 60) is door.store
    assert door.calls == 11
    assert log == ["waiting up to 60 s for the store: no answer from the store at store:6379\n"]


@pytest.mark.usefixtures("waiting")
async def test_waiting_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door(10_000, StoreUnavailable("no answer from the store at store:6379"))
    with pytest.raises(StoreUnavailable, match=r"no answer .* \(tried again for 60 s\)"):
        await connect_through(door, monkeypatch, 60)
    assert 30 < door.calls < 120


@pytest.mark.usefixtures("waiting")
async def test_without_waiting_the_first_answer_counts(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    door = Door(1, StoreUnavailable("no answer"))
    with pytest.raises(StoreUnavailable, match="^no answer$"):
        await connect_through(door, monkeypatch, 0)
    assert (door.calls, log) == (1, [])


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize(
    "error", [StoreRefused("wrong password"), StoreFull("full"), StoreUnsuitable("a replica", passes=True)]
)
async def test_whatever_may_pass_by_itself_is_waited_for_and_said(
    monkeypatch: pytest.MonkeyPatch, log: list[str], error: StoreError
) -> None:
    """A secret is renewed on both sides, one after the other; a failover ends."""
    door = Door(3, error)
    assert await connect_through(door, monkeypatch, 60) is door.store
    assert door.calls == 4
    assert log == [f"waiting up to 60 s for the store: {error}\n"]


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize("error", [StoreUnsuitable("it evicts"), StoreCorrupt("wrong type")])
async def test_what_only_a_person_mends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, error: StoreError) -> None:
    door = Door(1, error)
    with pytest.raises(type(error)):
        await connect_through(door, monkeypatch, 60)
    assert door.calls == 1


# --- a password of its own file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("redis://store:6379/0", "redis://store:6379/0?"),
        ("redis://rankgate.planner@store:6379/0", "redis://rankgate.planner@store:6379/0?"),
        ("rediss://u@store/1?ssl_check_hostname=false", "rediss://u@store/1?ssl_check_hostname=false&"),
        ("unix://u@/run/store.sock", "unix://u@/run/store.sock?"),
        ("redis+sentinel://u@a:1,b:2/main/0", "redis+sentinel://u@a:1,b:2/main/0?"),
    ],
)
async def test_the_url_names_the_passwords_file_which_is_read_for_each_connection(
    tmp_path: Path, url: str, whole: str
) -> None:
    path = tmp_path / "pass word&more"
    path.write_text("p@ss/w:rd\nanother line\n")
    named = needed_url(url, path)
    assert named == f"{whole}password_file={quote(str(path), safe='')}"
    client = _client(named, Settings())
    (*_, password) = client.connection_pool.connection_kwargs["credential_provider"].get_credentials()
    assert password == "p@ss/w:rd"


@pytest.mark.parametrize(
    ("url", "content", "sentence"),
    [
        (
            "redis://u@store?password_file=/x",
            "secret",
            "the URL has a password and --redis-password-file names another one",
        ),
        ("redis://u:other@store", "secret", "the URL has a password and --redis-password-file names another one"),
        ("redis://u@store", "", "has an empty first line"),
        ("redis://u@store", None, "cannot be read"),
    ],
)
def test_a_password_file_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, url: str, content: str | None, sentence: str
) -> None:
    path = tmp_path / "password"
    if content is not None:
        path.write_text(content)
    with pytest.raises(typer.BadParameter) as caught:
        needed_url(url, path)
    assert sentence in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "other@" not in str(caught.value)

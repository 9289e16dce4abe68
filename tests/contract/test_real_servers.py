"""What only a real server can show: which servers are refused, what a user may do, and what silence looks like."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis

from barrier import (
    Barrier,
    Dispatched,
    Leading,
    NotReady,
    Opened,
    Released,
    Settings,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    StoreUnsuitable,
    Verdict,
    connect,
)
from barrier.store.keys import Keys
from barrier.testing import ScriptedRank, scripted_ranks, wait_until
from tests.integration.servers import Kind, RealSentinels, RealServer

pytestmark = pytest.mark.anyio

LONG = Settings(lease=60.0, heartbeat=2.0, reader_block=0.5, backstop=1.0)
QUICK = Settings(lease=60.0, heartbeat=2.0, command_timeout=0.3, reader_block=0.5, reader_margin=0.3, backstop=0.5)
KEYS = Keys("rankgate", "demo")


@asynccontextmanager
async def client_of(url: str) -> AsyncGenerator[Any]:
    untyped: Any = Redis
    client = untyped.from_url(url)
    try:
        yield client
    finally:
        await client.aclose()


# --- connect ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["unix", "tcp"])
async def test_a_suitable_server_is_taken(kind: Kind, transport: Any) -> None:
    async with RealServer(
        kind=kind, transport=transport, password="pass word/é" if transport == "tcp" else None
    ) as server:
        store = await connect(server.url)
        assert await store.commands.ping()
        assert "pass" not in store.where
        await store.close()


async def test_replies_that_nobody_read_are_not_taken_for_those_of_the_next_call(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with RealServer(kind=kind) as server:
        store = await connect(server.url)

        async def gives_up(_: object) -> None:
            raise RuntimeError("a mistake of ours")

        with monkeypatch.context() as broken:
            broken.setattr("barrier.store.store._reply", gives_up)
            with pytest.raises(RuntimeError, match="a mistake of ours"):
                await store.exchange([("ECHO", "first"), ("ECHO", "second")])
        assert await store.exchange([("ECHO", "third")]) == [b"third"]
        await store.close()


async def test_an_idle_connection_that_the_server_closed_is_made_anew(kind: Kind) -> None:
    async with RealServer(kind=kind) as server, client_of(server.url) as mine:
        store = await connect(server.url)
        [number] = await store.exchange([("CLIENT", "ID")])
        await mine.client_kill_filter(_id=str(number))

        [now] = await store.exchange([("CLIENT", "ID")])
        assert now != number
        await store.close()


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
async def test_a_server_that_evicts_is_refused(kind: Kind, policy: str) -> None:
    async with RealServer(kind=kind, config=[f"maxmemory-policy {policy}"]) as server:
        with pytest.raises(StoreUnsuitable, match=f"has maxmemory-policy {policy}.*; set maxmemory-policy noeviction"):
            await connect(server.url)
        async with client_of(server.url) as mine:
            for barrier in (Barrier(mine, "demo", world_size=1), Barrier(mine, "demo", world_size=1)):
                with pytest.raises(StoreUnsuitable):
                    await barrier.open()
                await barrier.close()
            rank = ScriptedRank(mine, "demo", 0)
            with pytest.raises(StoreUnsuitable):
                await rank.join()
            await rank.close()
            assert await mine.keys() == [], "nothing was written"


async def test_a_replica_is_refused(kind: Kind) -> None:
    async with (
        RealServer(kind=kind, transport="tcp") as master,
        RealServer(kind=kind, transport="tcp", config=[f"replicaof 127.0.0.1 {master.port}"]) as replica,
    ):
        with pytest.raises(StoreUnsuitable, match=r"is a replica of 127\.0\.0\.1:\d+; connect to its master"):
            await connect(replica.url)


async def test_a_master_that_becomes_a_replica_refuses_to_be_written(kind: Kind) -> None:
    async with (
        RealServer(kind=kind, transport="tcp") as other,
        RealServer(kind=kind, transport="tcp") as server,
        client_of(server.url) as mine,
        scripted_ranks(mine, "demo", 1, settings=LONG) as ranks,
        Barrier(mine, "demo", world_size=1, settings=LONG) as barrier,
    ):
        outcome = await barrier.open()
        assert isinstance(outcome, Opened)
        await ranks[0].arrive("Connected")
        await mine.replicaof("127.0.0.1", other.port)
        with pytest.raises((StoreUnsuitable, StoreUnavailable)):
            await barrier.dispatch(outcome.epoch, "load", "{}", "Connected")
        with pytest.raises((StoreUnsuitable, StoreUnavailable)):
            await ranks[0].report("Loading")
        await mine.replicaof("NO", "ONE")


@pytest.mark.parametrize("given", ["wrong", None])
async def test_a_wrong_or_missing_password_is_one_clear_error(kind: Kind, given: str | None) -> None:
    async with RealServer(kind=kind, transport="tcp", password="right") as server:
        url = f"redis://:{given}@127.0.0.1:{server.port}/0" if given else f"redis://127.0.0.1:{server.port}/0"
        with pytest.raises(StoreRefused) as refusal:
            await connect(url)
        assert f"the store at 127.0.0.1:{server.port} refused" in str(refusal.value)
        assert "Check user, password and rights" in str(refusal.value)
        assert "right." not in str(refusal.value).replace("rights.", "")
        assert "wrong" not in str(refusal.value).lower().replace("wrong user", "")


async def test_a_database_that_does_not_exist_is_an_error(kind: Kind) -> None:
    async with RealServer(kind=kind, transport="tcp") as server:
        with pytest.raises(StoreUnsuitable, match="no database of that number"):
            await connect(f"redis://127.0.0.1:{server.port}/9999")


async def test_a_server_that_is_gone_and_one_that_is_full(kind: Kind) -> None:
    async with RealServer(kind=kind) as server, client_of(server.url) as mine:
        async with (
            scripted_ranks(mine, "demo", 1, settings=LONG) as ranks,
            Barrier(mine, "demo", world_size=1, settings=LONG) as barrier,
        ):
            outcome = await barrier.open()
            assert isinstance(outcome, Opened)
            await ranks[0].arrive("Connected")
            before = await mine.xrange(KEYS.tasks)
            await mine.config_set("maxmemory", "1mb")
            with pytest.raises(StoreFull, match="out of memory; nothing was written. Raise maxmemory"):
                await barrier.dispatch(outcome.epoch, "load", "{}", "Connected")
            with pytest.raises(StoreFull):
                await ranks[0].report("Loading")
            assert await mine.xrange(KEYS.tasks) == before
            assert await mine.hget(KEYS.epoch, "step:load") is None
            await mine.config_set("maxmemory", "0")
            assert isinstance(await barrier.dispatch(outcome.epoch, "load", "{}", "Connected"), Dispatched | NotReady)
        server.kill()
        with pytest.raises(StoreUnavailable):
            await connect(server.url)


@pytest.mark.redis
async def test_through_sentinel_the_master_is_found() -> None:
    async with RealSentinels(replicas=1, sentinels=1, password="right") as cluster:
        hosts = ",".join(f"{host}:{port}" for host, port in cluster.sentinel_addresses)
        store = await connect(f"redis+sentinel://:right@{hosts}/{cluster.master_name}/0", settings=LONG)
        assert store.where == f"sentinel service {cluster.master_name}"
        async with scripted_ranks(store, "demo", 2) as ranks, Barrier(store, "demo", world_size=2) as barrier:
            outcome = await barrier.open()
            assert isinstance(outcome, Opened)
            release = asyncio.create_task(barrier.release(outcome.epoch, "load", "{}", "Connected", timeout=30))
            for rank in ranks:
                await rank.arrive("Connected")
            assert isinstance(await release, Released)
            assert (await ranks[0].next_task()).step == "load"
        with pytest.raises(StoreUnsuitable, match="know no service 'another'"):
            await connect(f"redis+sentinel://:right@{hosts}/another/0")
        await store.close()


# --- silence ------------------------------------------------------------------------------------------------------------


async def test_a_server_that_stops_answering_is_noticed_by_a_command_and_comes_back(kind: Kind) -> None:
    async with RealServer(kind=kind) as server, client_of(server.url) as mine:
        async with (
            scripted_ranks(mine, "demo", 1, settings=QUICK) as ranks,
            Barrier(mine, "demo", world_size=1, settings=QUICK) as barrier,
        ):
            outcome = await barrier.open()
            assert isinstance(outcome, Opened)
            await ranks[0].arrive("Connected")
            server.pause()
            try:
                with pytest.raises(StoreUnavailable, match="no answer from the store"):
                    await barrier.dispatch(outcome.epoch, "load", "{}", "Connected")
                with pytest.raises(StoreUnavailable):
                    await ranks[0].report("Connected")
            finally:
                server.resume()
            # What was sent to a stopped server may be carried out when it goes on: once, whatever is asked again.
            await barrier.dispatch(outcome.epoch, "load", "{}", "Connected")
            assert await mine.xlen(KEYS.tasks) == 2


async def test_a_blocked_reader_outlives_a_server_that_stops_and_one_that_is_killed(kind: Kind) -> None:
    async with RealServer(kind=kind, aof=True) as server, client_of(server.url) as mine:
        async with (
            scripted_ranks(mine, "demo", 1, settings=QUICK) as ranks,
            Barrier(mine, "demo", world_size=1, settings=QUICK) as barrier,
        ):
            outcome = await barrier.open()
            assert isinstance(outcome, Opened)
            await ranks[0].arrive("Connected")
            task = asyncio.create_task(ranks[0].next_task())
            await wait_until(lambda: server.running, "the server to run")
            server.kill()
            await server.start()

            async def again() -> bool:
                try:
                    await ranks[0].beat()
                    await barrier.dispatch(outcome.epoch, "load", "{}", "Connected")
                except StoreUnavailable:
                    return False
                return True

            await wait_until(again, "the server to answer again", timeout=20)
            assert (await asyncio.wait_for(task, 30)).step == "load"


async def test_a_waiting_planner_is_released_though_its_connections_were_killed(kind: Kind) -> None:
    async with RealServer(kind=kind) as server, client_of(server.url) as mine:
        async with (
            scripted_ranks(mine, "demo", 2, settings=QUICK) as ranks,
            Barrier(mine, "demo", world_size=2, settings=QUICK) as barrier,
        ):
            outcome = await barrier.open()
            assert isinstance(outcome, Opened)
            wait = asyncio.create_task(barrier.wait(outcome.epoch, "Connected", timeout=30))

            async def is_blocked() -> bool:
                return any(one["cmd"] == "xread" and "b" in one["flags"] for one in await mine.client_list())

            await wait_until(is_blocked, "the planner to wait for hints")
            await mine.client_kill_filter(skipme=True, _type="normal")
            for rank in ranks:

                async def arrived(rank: ScriptedRank = rank) -> bool:
                    try:
                        await rank.arrive("Connected")
                    except StoreUnavailable:
                        return False
                    return True

                await wait_until(arrived, "the rank to be connected again")
            assert await wait == Released(outcome.epoch)


# --- rights -------------------------------------------------------------------------------------------------------------

RANK_COMMANDS = "+get +set +del +type +pttl +pexpire +hmget +hget +xadd +xread +xrevrange +multi +exec +discard +watch +unwatch +info +ping"
"""All that a rank ever sends; no scripts among it."""


def rank_user(rank: int) -> list[str]:
    """The ACL of one rank's user: it writes its own report and claim, hints, history and answers, and reads log and record."""
    tag = KEYS.tag
    return [
        "on", f">secret-{rank}", "resetchannels", "resetkeys",
        f"%RW~{tag}:rank:{rank}", f"%RW~{tag}:claims:{rank}", f"%RW~{tag}:signals", f"%RW~{tag}:events", f"%RW~{tag}:out:*",
        f"%R~{tag}:epoch", f"%R~{tag}:tasks", "-@all", *RANK_COMMANDS.split(),
    ]  # fmt: skip


async def test_a_rank_needs_no_more_than_its_own_keys_and_plain_commands(kind: Kind) -> None:
    async with RealServer(kind=kind, transport="tcp") as server, client_of(server.url) as mine:
        await mine.execute_command("ACL", "SETUSER", "rank-0", *rank_user(0))
        url = f"redis://rank-0:secret-0@127.0.0.1:{server.port}/0"
        async with client_of(url) as theirs, Barrier(mine, "demo", world_size=1, settings=LONG) as barrier:
            async with ScriptedRank(theirs, "demo", 0, settings=LONG) as rank, rank.heartbeat():
                assert isinstance(await barrier.lead(), Leading)
                outcome = await barrier.open()
                assert isinstance(outcome, Opened)
                await rank.arrive("Connected")
                assert isinstance(await barrier.dispatch(outcome.epoch, "load", "{}", "Connected"), Dispatched)
                assert (await rank.next_task()).step == "load"
                await rank.member.report("Loaded", events=[{"kind": "RunnerStatusUpdated"}])
                await rank.member.write_output("generate:1", [b"text"])
                await barrier.conclude(outcome.epoch, Verdict.stopped())
            assert await mine.exists(KEYS.claim(0), KEYS.rank(0)) == 0, "it could leave, too"


async def test_with_a_ranks_rights_nothing_else_can_be_touched(kind: Kind) -> None:
    async with RealServer(kind=kind, transport="tcp") as server, client_of(server.url) as mine:
        await mine.execute_command("ACL", "SETUSER", "rank-0", *rank_user(0))
        async with (
            scripted_ranks(mine, "demo", 2, settings=LONG),
            Barrier(mine, "demo", world_size=2, settings=LONG) as barrier,
        ):
            outcome = await barrier.open()
            assert isinstance(outcome, Opened)
            url = f"redis://rank-0:secret-0@127.0.0.1:{server.port}/0"
            store = await connect(url, settings=LONG)

            async def state() -> list[Any]:
                names = sorted(await mine.keys())
                kept = [
                    await mine.dump(key) for key in (KEYS.epoch, KEYS.leader, KEYS.tasks, KEYS.rank(1), KEYS.claim(1))
                ]
                return [names, kept]

            before = await state()
            abuses: list[tuple[Any, ...]] = [
                ("SET", KEYS.rank(1), "forged"),
                ("GET", KEYS.rank(1)),
                ("DEL", KEYS.claim(1)),
                ("XADD", KEYS.tasks, "*", "kind", "task"),
                ("DEL", KEYS.tasks),
                ("PEXPIRE", KEYS.epoch, 1),
                ("HSET", KEYS.epoch, "verdict", "{}"),
                ("HGET", KEYS.leader, "term"),
                ("EVAL", "return redis.call('DEL', KEYS[1])", 1, KEYS.rank(0)),
                ("SCRIPT", "FLUSH"),
                ("FLUSHALL",),
                ("CONFIG", "SET", "maxmemory-policy", "allkeys-lru"),
                ("SET", "{rankgate:other}:rank:0", "forged"),
                ("KEYS", "*"),
            ]
            for abuse in abuses:
                with pytest.raises(StoreRefused):
                    with store.errors():
                        await store.commands.execute_command(*abuse)
            assert await state() == before
            intruder = Barrier(store, "demo", world_size=2)
            with pytest.raises(StoreRefused):
                await intruder.lead()
            await intruder.close()
            await store.close()


async def test_a_user_that_may_not_ask_info_is_told_so(kind: Kind) -> None:
    async with RealServer(kind=kind, transport="tcp") as server, client_of(server.url) as mine:
        await mine.execute_command("ACL", "SETUSER", "blind", "on", ">pw", "~*", "+@all", "-info")
        with pytest.raises(StoreRefused, match="info"):
            await connect(f"redis://blind:pw@127.0.0.1:{server.port}/0")

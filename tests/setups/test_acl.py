"""What a user of the store may do, and that it may do nothing else: tried on real servers, call by call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from redis import exceptions as driver
from redis.asyncio import Redis

from barrier import (
    Barrier,
    Concluded,
    Dispatched,
    Leading,
    Member,
    NotReady,
    Opened,
    RankTaken,
    Settings,
    StoreRefused,
    Verdict,
    connect,
)
from barrier.spares import read_spares, read_surplus
from barrier.store.acl import AclUser, observer_user, planner_user, rank_user
from barrier.store.keys import Keys, NamespaceKeys
from barrier.store.script import script
from barrier.testing import ScriptedRank, wait_until
from tests.integration.servers import Kind
from tests.setups.places import Setup, acl

pytestmark = pytest.mark.anyio

LONG = Settings(lease=60.0, heartbeat=2.0, reader_block=0.5, backstop=1.0)
KEYS, OTHER, ELSEWHERE = Keys("rankgate", "demo"), Keys("rankgate", "other"), Keys("elsewhere", "demo")
NAMES = NamespaceKeys("rankgate")
MINE = 1
"""The rank whose credentials are abused; the others are its neighbours."""

KINDS = ["valkey", pytest.param("redis", marks=pytest.mark.redis)]
USERS: dict[str, AclUser] = {
    f"rank-{MINE}": rank_user(KEYS, MINE),
    "planner": planner_user("rankgate"),
    "observer": observer_user("rankgate"),
}


@pytest.fixture(scope="module", params=KINDS)
async def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Setup]:
    kind: Kind = request.param
    async with acl(kind, tmp_path_factory.mktemp("acl")) as made:
        yield made


@pytest.fixture(autouse=True)
async def clean(setup: Setup) -> AsyncGenerator[None]:
    yield
    await setup.flush()
    await setup.administrators[0].acl_log_reset()


@asynccontextmanager
async def client_of(setup: Setup, role: str) -> AsyncGenerator[Any]:
    untyped: Any = Redis
    client = untyped.from_url(setup.url(role), protocol=2, single_connection_client=True)
    try:
        yield client
    finally:
        await client.aclose()


async def contents(setup: Setup) -> dict[bytes, bytes]:
    """Everything in the store, to compare before and after."""
    admin = setup.administrators[0]
    return {key: await admin.dump(key) for key in sorted(await admin.keys("*"))}


async def refused(client: Any, *command: Any) -> bool:
    try:
        await client.execute_command(*command)
    except (driver.NoPermissionError, driver.AuthorizationError):
        return True
    except (
        driver.ResponseError
    ) as error:  # a script's own error quotes the refusal, which Redis 7.0 words in its own way
        return any(words in str(error) for words in ("ACL failure", "NOPERM", "user executing the script can't"))
    return False


# --- commands -------------------------------------------------------------------------------------------------------------


async def commands_of(setup: Setup) -> dict[str, tuple[int, frozenset[str]]]:
    """Every command and subcommand that the server has: arity and flags."""
    admin = setup.administrators[0]
    found: dict[str, tuple[int, frozenset[str]]] = {}
    raw: list[Any] = [reply for reply in await raw_reply(admin, "COMMAND") if reply]
    while raw:
        name, arity, flags, *_, subcommands = raw.pop()[:10]
        if subcommands:
            raw += subcommands
        else:
            found[name.decode()] = arity, frozenset(flag.decode() for flag in flags)
    return found


async def raw_reply(client: Any, *command: str) -> Any:
    """What the server says, without the driver's making something of it."""
    pool = client.connection_pool
    connection = await pool.get_connection()
    try:
        await connection.send_command(*command)
        return await connection.read_response()
    finally:
        await pool.release(connection)


@pytest.mark.parametrize("role", list(USERS))
async def test_a_user_may_send_the_commands_that_it_needs_and_no_other(setup: Setup, role: str) -> None:
    """Every command that this server knows, asked one by one, on the key on which that user has most rights."""
    admin, user, key = setup.administrators[0], USERS[role], KEYS.rank(MINE)
    allowed: set[str] = set()
    always: set[str] = set()
    everything = await commands_of(setup)
    for name, (arity, flags) in everything.items():
        words = [*name.split("|"), *[key] * abs(arity)][: max(abs(arity), len(name.split("|")))]
        said: bytes = await raw_reply(admin, "ACL", "DRYRUN", user.name, *words)
        if b"has no permissions to run" not in said:
            (always if "no_auth" in flags else allowed).add(name)
    assert len(everything) > 300
    assert allowed == user.allowed
    assert always == {"auth", "hello", "quit", "reset"}, "what must be possible before logging in"


HOSTILE: list[tuple[str, ...]] = [
    ("EVAL", "return redis.call('SET', KEYS[1], 'x')", "1", KEYS.rank(MINE)),
    ("EVAL", "return 1", "0"),
    ("EVAL_RO", "return 1", "0"),
    ("EVAL_RO", "while true do end", "0"),
    ("EVALSHA", script("dispatch").sha, "1", KEYS.epoch),
    ("EVALSHA_RO", script("inspect").sha, "1", KEYS.epoch),
    ("SCRIPT", "LOAD", "return 1"),
    ("SCRIPT", "FLUSH"),
    ("SCRIPT", "KILL"),
    ("FUNCTION", "LOAD", "#!lua name=x\nredis.register_function('x', function() return 1 end)"),
    ("FUNCTION", "FLUSH"),
    ("FCALL", "x", "0"),
    ("FCALL_RO", "x", "0"),
    ("CONFIG", "GET", "*"),
    ("CONFIG", "SET", "maxmemory-policy", "allkeys-lru"),
    ("CONFIG", "REWRITE"),
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("SWAPDB", "0", "1"),
    ("DEBUG", "SLEEP", "0"),
    ("KEYS", "*"),
    ("SCAN", "0"),
    ("RANDOMKEY",),
    ("DBSIZE",),
    ("MONITOR",),
    ("SAVE",),
    ("BGSAVE",),
    ("SHUTDOWN", "NOSAVE"),
    ("REPLICAOF", "127.0.0.1", "1"),
    ("FAILOVER",),
    ("SYNC",),
    ("PSYNC", "?", "-1"),
    ("MODULE", "LIST"),
    ("CLIENT", "LIST"),
    ("CLIENT", "KILL", "TYPE", "normal"),
    ("CLIENT", "PAUSE", "1000"),
    ("CLIENT", "NO-EVICT", "on"),
    ("CLIENT", "TRACKING", "on", "BCAST"),
    ("SLOWLOG", "GET"),
    ("LATENCY", "RESET"),
    ("MEMORY", "PURGE"),
    ("ACL", "LIST"),
    ("ACL", "SETUSER", "default", "on", "nopass", "+@all"),
    ("ACL", "WHOAMI"),
    ("PUBLISH", "channel", "text"),
    ("SUBSCRIBE", "channel"),
    ("PSUBSCRIBE", "*"),
    ("COPY", KEYS.rank(MINE), KEYS.rank(0)),
    ("RENAME", KEYS.rank(MINE), KEYS.rank(0)),
    ("MIGRATE", "127.0.0.1", "1", KEYS.rank(0), "0", "10"),
    ("RESTORE", KEYS.rank(0), "0", "x"),
    ("DUMP", KEYS.rank(0)),
    ("SORT", KEYS.rank(MINE), "STORE", KEYS.rank(0)),
    ("OBJECT", "FREQ", KEYS.rank(0)),
    ("XTRIM", KEYS.tasks, "MAXLEN", "0"),
    ("XSETID", KEYS.tasks, "999999999999999-1"),
    ("XGROUP", "CREATE", KEYS.tasks, "g", "$"),
    ("CLUSTER", "RESET"),
]


@pytest.mark.parametrize("role", [f"rank-{MINE}", "observer"])
async def test_what_is_not_needed_is_refused_when_it_is_really_sent(setup: Setup, role: str) -> None:
    before = await contents(setup)
    async with client_of(setup, role) as client:
        taken = [command for command in HOSTILE if not await refused(client, *command)]
    assert taken == []
    assert await contents(setup) == before
    assert len(await setup.refusals()) > 0, "the administrator sees it in ACL LOG"


# --- keys -----------------------------------------------------------------------------------------------------------------

WITH_KEY: dict[str, tuple[str, ...]] = {
    "set": ("SET", "{key}", "x"),
    "get": ("GET", "{key}"),
    "del": ("DEL", "{key}"),
    "pexpire": ("PEXPIRE", "{key}", "60000"),
    "pttl": ("PTTL", "{key}"),
    "type": ("TYPE", "{key}"),
    "watch": ("WATCH", "{key}"),
    "hmget": ("HMGET", "{key}", "number"),
    "xread": ("XREAD", "COUNT", "1", "STREAMS", "{key}", "0-0"),
    "xrevrange": ("XREVRANGE", "{key}", "+", "-", "COUNT", "1"),
    "xadd": ("XADD", "{key}", "*", "kind", "x"),
}
OWN = ("set", "get", "del", "pexpire", "pttl", "type", "watch")
APPEND = ("xadd", "pexpire", "type")
NEEDED: dict[str, Sequence[str]] = {
    KEYS.rank(MINE): OWN,
    KEYS.claim(MINE): OWN,
    KEYS.spare(MINE): OWN,
    KEYS.epoch: ("hmget", "type"),
    KEYS.tasks: ("xread", "xrevrange", "type"),
    KEYS.signals: APPEND,
    KEYS.events: APPEND,
    KEYS.out("gen.1"): APPEND,
}
"""Every right that a rank has, by key. All else must be refused."""


def every_key() -> list[str]:
    keys: list[str] = [
        NAMES.instances,
        NAMES.changes,
        "x",
        "rank:1",
        f"{KEYS.tag}:",
        f"{KEYS.tag}:rank:10",
        f"{KEYS.tag}:rank:1x",
    ]
    for group in (KEYS, OTHER, ELSEWHERE):
        keys += [group.epoch, group.leader, group.tasks, group.signals, group.events, group.requests]
        keys += [group.out("gen.1"), group.once("load"), *group.ranks(3), *(group.claim(rank) for rank in range(3))]
        keys += [group.spare(seat) for seat in range(3)]
    return keys


async def test_a_rank_reaches_its_own_keys_and_its_groups_log_and_nothing_else(setup: Setup) -> None:
    """Every command that it has, on every kind of key of its group, another group, another namespace, and no namespace at all."""
    assert set(WITH_KEY) == {command for grant in USERS[f"rank-{MINE}"].grants for command in grant.commands}
    admin = setup.administrators[0]
    for key in every_key():
        await admin.set(key, "somebody's")
    before = await contents(setup)
    reached: dict[str, list[str]] = {}
    async with client_of(setup, f"rank-{MINE}") as client:
        for key in every_key():
            for name, form in WITH_KEY.items():
                command = [word.format(key=key) for word in form]
                if name in NEEDED.get(key, ()):
                    assert await raw_reply(admin, "ACL", "DRYRUN", USERS[f"rank-{MINE}"].name, *command) == b"OK", (
                        command
                    )
                elif not await refused(client, *command):
                    reached.setdefault(key, []).append(name)
    assert reached == {}
    assert await contents(setup) == before


async def test_one_user_for_all_ranks_of_a_group_reaches_all_its_ranks_and_no_other_group(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, setup: Setup
) -> None:
    kind: Kind = request.node.callspec.params["setup"]
    async with acl(kind, tmp_path_factory.mktemp("shared"), world_size=None) as shared:
        store = await connect(shared.url("ranks"), settings=LONG)
        members = [Member(store, "demo", world_size=2) for _ in range(3)]
        assert sorted([await member.claim(timeout=0) for member in members[:2]]) == [0, 1]
        with pytest.raises(RankTaken):
            await members[2].claim(timeout=0)
        with pytest.raises(StoreRefused):
            await Member(store, "other", rank=0).claim(timeout=0)
        with pytest.raises(StoreRefused):
            await Member(store, "demo", rank=0, namespace="elsewhere").claim(timeout=0)
        for member in members[:2]:
            await member.leave()
        await store.close()


@pytest.mark.parametrize("world_size", [None, 2])
async def test_a_spare_waits_by_a_ranks_rights_and_is_seen_by_an_observers(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, setup: Setup, world_size: int | None
) -> None:
    kind: Kind = request.node.callspec.params["setup"]
    async with acl(kind, tmp_path_factory.mktemp("spare"), world_size=world_size) as made:
        store, rank = await connect(made.url("ranks" if world_size is None else "rank-1"), settings=LONG), 1
        observer = await connect(made.url("observer"), settings=LONG)
        holder = Member(store, "demo", rank=rank)
        await holder.claim(timeout=0)
        spare = Member(store, "demo", rank=rank)
        waiting = asyncio.create_task(spare.claim(spare=True))

        async def seen() -> bool:
            return [one.incarnation for one in await read_spares(observer, KEYS)] == [spare.incarnation]

        await wait_until(seen, "the spare to be seen", 20)
        assert [one.rank for one in await read_spares(store, KEYS, rank)] == [rank], "its own health check sees it"
        assert [report.rank for report in await read_surplus(observer, KEYS, 1)] == [rank]
        await holder.leave()
        async with asyncio.timeout(20):
            assert await waiting == rank
        await spare.leave()
        await store.close()
        await observer.close()


async def test_an_observer_changes_nothing_and_reads_neither_prompts_nor_answers(setup: Setup) -> None:
    admin = setup.administrators[0]
    for key in every_key():
        await admin.set(key, "somebody's")
    before = await contents(setup)
    async with client_of(setup, "observer") as client:
        for key in every_key():
            for name in ("set", "del", "pexpire", "xadd", "watch"):
                assert await refused(client, *[word.format(key=key) for word in WITH_KEY[name]]), (name, key)
            assert await refused(client, "HSET", key, "a", "b")
            assert await refused(client, "EVAL", "return 1", "1", key)
        for key in (KEYS.tasks, KEYS.requests, KEYS.out("gen.1"), KEYS.once("load"), ELSEWHERE.epoch):
            for name in ("get", "hmget", "xread", "xrevrange", "type", "pttl"):
                assert await refused(client, *[word.format(key=key) for word in WITH_KEY[name]]), (name, key)
    assert await contents(setup) == before


async def test_a_planner_writes_no_ranks_report_whatever_script_it_sends(setup: Setup) -> None:
    async with client_of(setup, "planner") as client:
        for command in ("SET", "GETSET", "APPEND"):
            text = f"return redis.call('{command}', KEYS[1], 'forged')"
            assert await refused(client, "EVAL", text, "1", KEYS.rank(0)), command
        for key in (KEYS.rank(0), KEYS.claim(0)):
            for name in ("set", "del", "pexpire", "xadd"):
                assert await refused(client, *[word.format(key=key) for word in WITH_KEY[name]]), (name, key)
        for key in (
            ELSEWHERE.epoch,
            ELSEWHERE.tasks,
            NamespaceKeys("elsewhere").instances,
            NamespaceKeys("rankgate-2").instances,
        ):
            for command in (("HSET", key, "a", "b"), ("XADD", key, "*", "a", "b"), ("EVAL", "return 1", "1", key)):
                assert await refused(client, *command), command
    assert await contents(setup) == {}


# --- abuse ----------------------------------------------------------------------------------------------------------------


async def test_ten_abuses_of_a_ranks_credentials_change_nothing_for_the_others(setup: Setup) -> None:
    """F22: a hostile client with rank 1's credentials, in the middle of an attempt."""
    stores = [await connect(setup.url(role), settings=LONG) for role in ("planner", "rank-0", "rank-1", "rank-2")]
    planner, *others = stores
    async with (
        Barrier(planner, "demo", world_size=3, settings=LONG) as barrier,
        client_of(setup, f"rank-{MINE}") as thief,
    ):
        assert isinstance(await barrier.lead(), Leading)
        ranks = [ScriptedRank(store, "demo", rank, settings=LONG) for rank, store in enumerate(others)]
        for rank in ranks:
            await rank.__aenter__()
        opened = await barrier.open()
        assert isinstance(opened, Opened)
        epoch = opened.epoch
        for rank in ranks:
            await rank.arrive("Connected")
        admin = setup.administrators[0]
        arrival: bytes = await admin.get(KEYS.rank(0))
        await ranks[0].report(
            "Idle"
        )  # rank 0 is not there any more: whoever makes it look so, makes LoadModel go out early
        before = await contents(setup)
        entry = {
            "kind": "task",
            "nonce": epoch.nonce,
            "prev": "1",
            "step": "load",
            "to": "0-2",
            "term": "1",
            "task": "{}",
        }
        fields = [word for pair in entry.items() for word in pair]
        abuses: dict[str, tuple[Any, ...]] = {
            "replay rank 0's recorded arrival": ("SET", KEYS.rank(0), arrival, "PX", "60000"),
            "take rank 0's claim": ("SET", KEYS.claim(0), ranks[1].member.incarnation),
            "drive rank 0 out": ("DEL", KEYS.claim(0), KEYS.rank(0)),
            "let rank 0's lease lapse": ("PEXPIRE", KEYS.rank(0), "1"),
            "dispatch past the barrier": ("XADD", KEYS.tasks, f"{epoch.number}-2", *fields),
            "dispatch with the planner's script": ("EVALSHA", script("dispatch").sha, "6", KEYS.epoch, KEYS.leader),
            "put oneself on the roster": ("HSET", KEYS.epoch, "roster:0", ranks[1].member.incarnation * 3),
            "replace the epoch": ("SET", KEYS.epoch, "x"),
            "conclude": ("HSET", KEYS.epoch, "verdict", "{}"),
            "lead": ("HSET", KEYS.leader, "holder", "thief", "term", "9" * 15),
            "ask for texts": ("XADD", KEYS.requests, "*", "id", "gen.1"),
            "read another's requests": ("XRANGE", KEYS.requests, "-", "+"),
            "read the answers": ("XREAD", "STREAMS", KEYS.out("gen.1"), "0-0"),
            "stop another instance": ("HSET", NAMES.instances, "other", "{}"),
            "read another instance's log": ("XREAD", "STREAMS", OTHER.tasks, "0-0"),
            "hide in a transaction": ("MULTI",),
        }
        for what, command in abuses.items():
            if what == "hide in a transaction":
                await thief.execute_command("MULTI")
                assert await refused(thief, "SET", KEYS.rank(0), arrival), what
                with pytest.raises(driver.ExecAbortError):
                    await thief.execute_command("EXEC")
            else:
                assert await refused(thief, *command), what
        assert await contents(setup) == before
        assert await barrier.dispatch(epoch, "load", "{}", "Connected") == NotReady((0,))
        await ranks[0].report("Connected")
        assert isinstance(await barrier.dispatch(epoch, "load", "{}", "Connected"), Dispatched)
        for rank in ranks:
            await rank.__aexit__(None, None, None)
    for store in stores:
        await store.close()


LAST_ID = "18446744073709551615-18446744073709551615"
"""After it, no stream takes another entry."""


@pytest.mark.parametrize("key", [KEYS.signals, KEYS.events])
async def test_a_rank_that_takes_a_streams_last_id_stops_neither_verbs_nor_reports_nor_newcomers(
    setup: Setup, key: str
) -> None:
    """F35: before each call it does so again; nobody but the users of the group mends it."""
    stores = [await connect(setup.url(role), settings=LONG) for role in ("planner", "rank-0", "rank-1", "rank-2")]
    async with (
        Barrier(stores[0], "demo", world_size=3, settings=LONG) as barrier,
        client_of(setup, f"rank-{MINE}") as thief,
    ):
        await barrier.lead()
        await thief.xadd(key, {"a": "b"}, id=LAST_ID)
        ranks = [ScriptedRank(store, "demo", rank, settings=LONG) for rank, store in enumerate(stores[1:])]
        for rank in ranks:
            await rank.__aenter__()

        async def spoil() -> None:
            with suppress(driver.ResponseError):  # where it is as it was left
                await thief.xadd(key, {"a": "b"}, id=LAST_ID)

        await spoil()
        opened = await barrier.open()
        assert isinstance(opened, Opened)
        for rank in ranks:
            await spoil()
            await rank.arrive("Connected")
            await spoil()
            await rank.member.report(events=[{"kind": "told"}])
        await spoil()
        assert isinstance(await barrier.dispatch(opened.epoch, "load", "{}", "Connected"), Dispatched)
        await spoil()
        assert isinstance(await barrier.conclude(opened.epoch, Verdict.stopped()), Concluded)
        assert (await setup.administrators[0].xrevrange(key, count=1))[0][0] != LAST_ID.encode(), "it was mended"
        await spoil()
        for rank in ranks:
            await rank.__aexit__(None, None, None)
    for store in stores:
        await store.close()


async def test_a_ranks_own_recorded_arrival_counts_in_no_other_attempt(setup: Setup) -> None:
    """F22: its key is its own, so it may write what it said before; it names the attempt, and so it does not count."""
    stores = [await connect(setup.url(role), settings=LONG) for role in ("planner", "rank-0", "rank-1", "rank-2")]
    async with (
        Barrier(stores[0], "demo", world_size=3, settings=LONG) as barrier,
        client_of(setup, f"rank-{MINE}") as thief,
    ):
        await barrier.lead()
        ranks = [ScriptedRank(store, "demo", rank, settings=LONG) for rank, store in enumerate(stores[1:])]
        for rank in ranks:
            await rank.__aenter__()
        first = await barrier.open()
        assert isinstance(first, Opened)
        for rank in ranks:
            await rank.arrive("Connected")
        recorded = await thief.get(KEYS.rank(MINE))
        await barrier.conclude(first.epoch, Verdict.stopped())
        second = await barrier.open()
        assert isinstance(second, Opened)
        for rank in ranks:
            await rank.retire()
        for rank in (0, 2):
            await ranks[rank].arrive("Connected")
        await thief.set(KEYS.rank(MINE), recorded, px=60_000)
        assert await barrier.dispatch(second.epoch, "load", "{}", "Connected") == NotReady((MINE,))
        for rank in ranks:
            await rank.__aexit__(None, None, None)
    for store in stores:
        await store.close()


async def test_nobody_gets_in_without_a_password_or_with_a_wrong_one(setup: Setup) -> None:
    """F21: one clear error, without a storm of attempts and without the password in it."""
    url = setup.url(f"rank-{MINE}")
    for wrong in (
        url.replace("word@", "zebra@"),
        "redis://" + url.rpartition("@")[2],
        url.replace("rank-1:", "rank-2:"),
    ):
        with pytest.raises(StoreRefused) as refusal:
            await connect(wrong)
        assert "Check user, password and rights" in str(refusal.value)
        assert "zebra" not in str(refusal.value)
    await asyncio.sleep(0)
    attempts = sum(int(entry["count"]) for entry in await setup.refusals() if entry["reason"] == "auth")
    assert attempts == 2, "one attempt each; who gives no user is refused for that"

"""A store that is not what the URL says, or that lacks a command, is refused when one connects; real servers."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from redis.asyncio import Redis

from barrier import Barrier, Settings, Store, StoreRefused, StoreUnsuitable, adopt, connect
from barrier.store.acl import hashed, observer_user, planner_user, rank_user
from barrier.store.keys import Keys
from planner.embedded import LOOPBACK
from tests.integration.servers import RealServer
from tests.setups.places import administered

pytestmark = pytest.mark.anyio

KINDS = ["valkey", pytest.param("redis", marks=pytest.mark.redis)]
LONG = Settings(lease=60.0, heartbeat=2.0, reader_block=0.5, backstop=1.0)


def renamed(*commands: str) -> list[str]:
    return [f'rename-command {command} ""' for command in commands]


async def works(store: Store) -> None:
    """A rank of one is led, looked at, opened and let through."""
    async with Barrier(store, "demo", world_size=1) as barrier:
        await barrier.lead()
        assert await barrier.inspect()
    await store.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "command", ["EVAL", "EVALSHA", "XADD", "XREAD", "TYPE", "WATCH", "MULTI", "DISCARD", "EXEC", "HSETNX", "TIME"]
)
async def test_a_command_that_the_server_does_not_know_is_named(kind: Any, command: str) -> None:
    async with RealServer(kind=kind, transport="tcp", config=renamed(command)) as server:
        with pytest.raises(StoreUnsuitable, match=f"{server.port} does not know {command}, and rankgate needs it"):
            await connect(server.url)
        mine = Redis(port=server.port)
        with pytest.raises(StoreUnsuitable, match=f"does not know {command}"):
            async with Barrier(mine, "demo", world_size=1):
                pytest.fail("nothing may begin on it")
        await mine.aclose()


async def test_commands_that_are_missing_are_told_all_at_once() -> None:
    async with RealServer(config=renamed("XADD", "EVAL")) as server:
        with pytest.raises(StoreUnsuitable, match="does not know EVAL, XADD, and rankgate needs them"):
            await connect(server.url)


@pytest.mark.parametrize("kind", KINDS)
async def test_without_the_read_only_form_of_scripts_the_other_one_is_used(kind: Any) -> None:
    async with RealServer(kind=kind, transport="tcp", config=renamed("EVAL_RO", "EVALSHA_RO")) as server:
        await works(await connect(server.url))
        await works(adopt(Redis(port=server.port)))
    user = f"user limited on #{hashed('p')} ~* &* +@all -eval_ro -evalsha_ro"
    async with RealServer(kind=kind, transport="tcp", config=[user]) as server:
        await works(await connect(f"redis://limited:p@{LOOPBACK}:{server.port}/0"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rights", "named", "role"),
    [
        ("+@all -xadd", "XADD", "planner"),
        ("+@all -type", "TYPE", "planner"),
        ("+@all -watch", "WATCH", "planner"),
        ("+@all -eval", "EVAL", "planner"),
        ("+@all -@scripting", "EVAL, EVALSHA", "planner"),
        ("+@all -multi", "MULTI", "planner"),
        ("+@all -hset -hsetnx -hdel -xdel -xadd -@scripting", "XADD", "rank"),
    ],
)
async def test_a_user_who_may_not_send_a_command_is_refused_with_it(
    kind: Any, rights: str, named: str, role: str
) -> None:
    users = [f"user limited on #{hashed('p')} ~* &* {rights}"]
    async with RealServer(kind=kind, transport="tcp", config=users) as server:
        with pytest.raises(StoreRefused) as refusal:
            await connect(f"redis://limited:p@{LOOPBACK}:{server.port}/0")
        sentence = (
            f"the user 'limited' of the store at {LOOPBACK}:{server.port} may not send {named}, which a {role} needs"
        )
        assert str(refusal.value).startswith(sentence)
        assert "ACL SETUSER limited +" in str(refusal.value)
        async with administered(server.url) as [admin]:
            assert await admin.dbsize() == 0, "nothing was carried out"


async def test_who_says_which_role_it_has_needs_no_more_than_that() -> None:
    """A rank sends no script, so a user without that right is good enough for it, and for nobody else."""
    users = [f"user limited on #{hashed('p')} ~* &* +@all -@scripting"]
    async with RealServer(transport="tcp", config=users) as server:
        url = f"redis://limited:p@{LOOPBACK}:{server.port}/0"
        store = await connect(url, role="rank")
        await store.close()
        with pytest.raises(StoreRefused, match="which a planner needs"):
            await connect(url, role="planner")


@pytest.mark.parametrize("kind", KINDS)
async def test_users_with_the_least_rights_connect_and_leave_no_line_in_the_acl_log(kind: Any) -> None:
    keys = Keys("rankgate", "demo")
    users = (planner_user("rankgate"), observer_user("rankgate"), rank_user(keys, 0), rank_user(keys, None))
    config = [user.line(hashed("p")) for user in users]
    async with RealServer(kind=kind, transport="tcp", config=config) as server:
        for user in users:
            store = await connect(f"redis://{user.name}:p@{LOOPBACK}:{server.port}/0")
            await store.close()
        async with administered(server.url) as [admin]:
            assert await admin.acl_log() == []


@pytest.mark.parametrize("kind", KINDS)
async def test_a_node_of_a_cluster_is_refused_with_the_form_for_clusters(kind: Any) -> None:
    with socket.socket() as free:  # the bus; by default it is 10,000 above the port, which may be taken
        free.bind((LOOPBACK, 0))
        bus = free.getsockname()[1]
    config = ["cluster-enabled yes", f"cluster-port {bus}"]
    async with RealServer(kind=kind, transport="tcp", config=config) as server:
        right = rf"one node of a cluster; use the URL redis\+cluster://{LOOPBACK}:{server.port}"
        with pytest.raises(StoreUnsuitable, match=right):
            await connect(server.url)
        mine = Redis(host=LOOPBACK, port=server.port)
        with pytest.raises(StoreUnsuitable, match=right):
            async with Barrier(mine, "demo", world_size=1):
                pytest.fail("nothing may begin on it")
        await mine.aclose()

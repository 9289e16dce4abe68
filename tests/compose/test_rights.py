"""What somebody can do who has taken a runner's container over: with the credentials in it, tried from inside of it."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Sequence
from typing import Any

import pytest

from barrier.store.keys import Keys, NamespaceKeys
from barrier.store.script import script
from tests.compose.cluster import BOUND, INSTANCE, NAMESPACE, ROOT, ComposeCluster, docker

pytestmark = [pytest.mark.anyio, pytest.mark.compose]

PROBE = (ROOT / "tests" / "compose" / "probe.py").read_text()
OURS = Keys(NAMESPACE, INSTANCE)
OTHER = Keys(NAMESPACE, "other")
ELSEWHERE = Keys("elsewhere", INSTANCE)
DESIRED = NamespaceKeys(NAMESPACE)
VERBS = ("lead", "open", "dispatch", "conclude", "restore", "inspect", "check")

# Dangerous to a server in general, and harmless here: every client sends them.
NEEDED = {"info", "role"}


def tried(cluster: ComposeCluster, container: str, commands: Sequence[Sequence[str]]) -> list[str]:
    """What came of each command, sent from inside of a container."""
    found: list[str] = json.loads(cluster.in_container(container, "python3", "-c", PROBE, stdin=json.dumps(commands)))
    assert len(found) == len(commands)
    return found


def verbs(keys: Keys) -> list[list[str]]:
    """Every verb of the barrier, as a script that the server knows and as one that is sent along."""
    names = [keys.epoch, keys.leader, keys.tasks, keys.events, keys.signals]
    return [
        [command, text, str(len(names)), *names, *["1"] * 20]
        for verb in VERBS
        for command, text in (
            ("EVALSHA", script(verb).sha),
            ("EVAL", script(verb).text),
            ("EVALSHA_RO", script(verb).sha),
            ("EVAL_RO", script(verb).text),
        )
    ]


def by_hand(keys: Keys) -> list[list[str]]:
    """The same with plain commands."""
    number = "9007199254740000"
    return [
        ["XADD", keys.tasks, f"{number}-1", "kind", "task"],
        ["XTRIM", keys.tasks, "MAXLEN", "0"],
        ["XDEL", keys.tasks, f"{number}-1"],
        ["DEL", keys.tasks],
        ["HSET", keys.epoch, "number", number],
        ["HDEL", keys.epoch, "number"],
        ["DEL", keys.epoch],
        ["PEXPIRE", keys.epoch, "1"],
        ["RENAME", keys.epoch, keys.rank(0)],
        ["HSET", keys.leader, "holder", "intruder"],
        ["DEL", keys.leader],
        ["SET", keys.once("generate 1"), "x"],
        ["XADD", keys.requests, "*", "kind", "generate"],
        ["XRANGE", keys.requests, "-", "+"],
        ["HSET", DESIRED.instances, keys.group, "{}"],
        ["HGETALL", DESIRED.instances],
        ["XADD", DESIRED.changes, "*", "kind", "changed"],
    ]


def foreign(keys: Keys, ranks: Sequence[int] = (0, 1)) -> list[list[str]]:
    """Everything about keys of somebody else."""
    return [
        *(["SET", keys.rank(rank), "x"] for rank in ranks),
        *(["GET", keys.rank(rank)] for rank in ranks),
        *(["DEL", keys.rank(rank)] for rank in ranks),
        *(["PEXPIRE", keys.rank(rank), "1"] for rank in ranks),
        *(["SET", keys.claim(rank), "x"] for rank in ranks),
        *(["DEL", keys.claim(rank)] for rank in ranks),
    ]


SCRIPTING = [
    ["EVAL", "return 1", "0"],
    ["EVAL_RO", "return 1", "0"],
    ["EVALSHA", "0" * 40, "0"],
    ["SCRIPT", "LOAD", "return 1"],
    ["SCRIPT", "FLUSH"],
    ["SCRIPT", "EXISTS", "0" * 40],
    ["SCRIPT", "KILL"],
    ["FUNCTION", "LOAD", "#!lua name=x\nredis.register_function('x', function() end)"],
    ["FUNCTION", "FLUSH"],
    ["FUNCTION", "LIST"],
    ["FCALL", "x", "0"],
]
LOOKING = [
    ["KEYS", "*"],
    ["SCAN", "0"],
    ["RANDOMKEY"],
    ["DBSIZE"],
    ["SUBSCRIBE", "x"],
    ["PUBLISH", "x", "y"],
    ["CLIENT", "LIST"],
]


async def administration(cluster: ComposeCluster) -> list[list[str]]:
    """Every command of this server that its own categories call administration or dangerous, with as many words as it takes."""
    async with cluster.store() as store:
        names: set[bytes] = set()
        for category in ("admin", "dangerous"):
            names |= set(await store.commands.execute_command("ACL", "CAT", category))
        words = [name.decode().split("|") for name in sorted(names)]
        commands: list[list[str]] = []
        for word in words:
            told: Any = await store.commands.execute_command("COMMAND", "INFO", "|".join(word))
            about: Any = next(
                iter(told.values() if hasattr(told, "values") else told)
            )  # redis-py reads it, or leaves it as it came
            arity: int = about["arity"] if hasattr(about, "keys") else about[1]
            commands.append([*word, *["1"] * (abs(arity) - len(word))])
    return [command for command in commands if "|".join(command[:1]) not in NEEDED]


@pytest.fixture
def inside(cluster: ComposeCluster) -> str:
    return cluster.containers("runner")[0]


async def test_a_runner_can_send_what_it_needs(cluster: ComposeCluster, inside: str) -> None:
    """Otherwise the refusals below would say nothing."""
    commands = [
        ["PING"],
        ["HMGET", OURS.epoch, "number"],
        ["XREVRANGE", OURS.tasks, "+", "-", "COUNT", "1"],
        ["GET", OURS.rank(0)],
    ]
    assert tried(cluster, inside, commands) == ["ok"] * len(commands)


async def test_every_other_thing_is_refused(cluster: ComposeCluster, inside: str) -> None:
    admin = await administration(cluster)
    assert len(admin) > 40
    assert ["flushall"] in admin
    groups = {
        "scripts": SCRIPTING,
        "lead, open, dispatch, conclude, restore, inspect and check": [*verbs(OURS), *verbs(OTHER)],
        "the same by hand": by_hand(OURS),
        "another instance": [*by_hand(OTHER), *foreign(OTHER)],
        "another cluster": [*by_hand(ELSEWHERE), *foreign(ELSEWHERE)],
        "looking around": LOOKING,
        "administration": admin,
    }
    for name, commands in groups.items():
        answers = tried(cluster, inside, commands)
        allowed = [
            f"{' '.join(words)[:60]}: {answer}"
            for words, answer in zip(commands, answers, strict=True)
            # DEBUG and MODULE are refused to everybody, by the server's configuration, before it looks at rights.
            if answer != "NOPERM" and not re.match("(DEBUG|MODULE) command not allowed", answer.removeprefix("ERR "))
        ]
        assert allowed == [], f"{name}: not refused: {allowed}"
    cluster.figures.add(
        "abuses tried from inside a runner's container, all refused", str(sum(map(len, groups.values())))
    )
    await cluster.serving()


async def test_a_runner_cannot_log_in_as_anybody_else(cluster: ComposeCluster, inside: str) -> None:
    password = cluster.password(f"{INSTANCE}.ranks")
    users = ["default", *(f"{NAMESPACE}.{user}" for user in ("admin", "planner", "observer"))]
    commands = [*(["AUTH", user, password] for user in users), ["AUTH", "default", ""]]
    assert tried(cluster, inside, commands) == ["WRONGPASS"] * len(commands)


async def test_a_container_holds_its_own_secret_only(cluster: ComposeCluster) -> None:
    secrets = {path.name: path.read_text().strip() for path in cluster.secrets.iterdir() if path.name != "store-users"}
    own = {"runner": {f"{NAMESPACE}.{INSTANCE}.ranks", "store-ca"}, "planner": {f"{NAMESPACE}.planner", "store-ca"}}
    for service, expected in own.items():
        seen = cluster.in_container(cluster.containers(service)[0], "sh", "-c", "cat /run/secrets/*")
        assert {name for name, value in secrets.items() if value in seen} == expected


async def test_nothing_secret_shows_in_docker_inspect(cluster: ComposeCluster) -> None:
    told = docker("inspect", *cluster.containers()) + cluster.logs()
    for path in cluster.secrets.iterdir():
        for line in path.read_text().splitlines():
            assert line not in told, f"{path.name} shows"
    assert "/run/secrets/" in told


@pytest.fixture
def with_rank_users(cluster: ComposeCluster, environment: dict[str, str]) -> Generator[ComposeCluster]:
    """The same project with one service a rank, each with a user of its own, instead of the scaled runners."""
    other = ComposeCluster(
        cluster.project,
        cluster.folder,
        cluster.secrets,
        {**environment, "RANKGATE_VERSION": cluster.environment["RANKGATE_VERSION"]},
        cluster.figures,
        files=("deploy/compose/rank-users.yml",),
    )
    ranks = [f"rank-{rank}" for rank in range(4)]
    cluster.up(runners=0)
    other.up(runners=0)
    try:
        yield other
    finally:
        other.compose("rm", "--stop", "--force", *ranks)
        cluster.up()


async def test_with_a_user_for_each_rank_another_ranks_report_is_refused(
    cluster: ComposeCluster, with_rank_users: ComposeCluster
) -> None:
    await cluster.serving(bound=BOUND)
    await cluster.generates()
    await cluster.check(runners=0, others={f"rank-{rank} running": 1 for rank in range(4)})
    (inside,) = with_rank_users.containers("rank-1")
    assert tried(cluster, inside, [["GET", OURS.rank(1)], ["HMGET", OURS.epoch, "number"]]) == ["ok", "ok"]
    commands = [*foreign(OURS, (0, 2, 3)), *by_hand(OURS), *verbs(OURS), *SCRIPTING]
    assert set(tried(cluster, inside, commands)) == {"NOPERM"}
    assert cluster.in_container(inside, "rankgate", "health", "runner").startswith(f"{INSTANCE} rank 1: ")

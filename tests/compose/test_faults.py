"""What the compose cluster survives by itself. The tests share one cluster and run in this order; each leaves it serving."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from tests.compose.cluster import BOUND, INSTANCE, LEASE, RANKS, ComposeCluster, checkout, docker, epoch_of, loads_of
from tests.compose.conftest import IMAGE, OTHER_VERSION, VERSION, build

pytestmark = [pytest.mark.anyio, pytest.mark.compose]


async def test_up_launch_and_generate(cluster: ComposeCluster) -> None:
    began = time.monotonic()
    tool = cluster.compose(
        *("run", "--rm", "-T", "tool", "launch", "--file", "/etc/rankgate/instance.toml", "--timeout", "120"),
        *("--prompt", "Why?"),
    )
    assert f"{INSTANCE} serves\n[simulated text]" in tool
    cluster.figures.step("rankgate launch --file --prompt: waits until all ranks serve, and generates a text", began)
    began = time.monotonic()
    text = cluster.compose("run", "--rm", "-T", "tool", "generate", INSTANCE, "Why?", "--max-tokens", "8")
    assert text.startswith("[simulated text]")
    cluster.figures.step("rankgate generate", began)
    assert INSTANCE in cluster.compose("run", "--rm", "-T", "tool", "status")
    await cluster.check()


async def test_every_container_becomes_healthy(cluster: ComposeCluster) -> None:
    deadline = time.monotonic() + BOUND
    form = "{{.State.Health.Status}}"
    while {docker("inspect", "-f", form, one) for one in cluster.containers()} != {"healthy"}:
        assert time.monotonic() < deadline, docker("ps", "-a")
        await asyncio.sleep(0.5)


async def test_a_killed_runner(cluster: ComposeCluster) -> None:
    seen, _ = await cluster.serving()
    victim = cluster.containers("runner")[1]
    cluster.kill_process(victim)
    _, seconds = await cluster.serving(after=epoch_of(seen))
    cluster.figures.recovery("kill -9 of a runner → serving again", seconds)
    assert int(docker("inspect", "-f", "{{.RestartCount}}", victim)) == 1
    await cluster.generates()
    await cluster.check()


async def test_a_runner_paused_past_its_lease(cluster: ComposeCluster) -> None:
    seen, _ = await cluster.serving()
    victim = cluster.containers("runner")[0]
    docker("pause", victim)
    try:
        lapsed, _ = await cluster.until("noticed", lambda seen: not seen.serving)
        await asyncio.sleep(LEASE)  # past the lease, and not just at its edge
    finally:
        docker("unpause", victim)
    assert "rank" in lapsed.explanation
    _, seconds = await cluster.serving(after=epoch_of(seen))
    cluster.figures.recovery("a runner paused for more than two leases; continued → serving again", seconds)
    await cluster.generates()
    await cluster.check()


async def test_a_runner_cut_off_the_network(cluster: ComposeCluster) -> None:
    seen, _ = await cluster.serving()
    victim = cluster.containers("runner")[2]
    network = f"{cluster.project}_cluster"
    docker("network", "disconnect", network, victim)
    try:
        await cluster.until("noticed", lambda seen: not seen.serving)
        await asyncio.sleep(LEASE)
        with pytest.raises(AssertionError, match="no answer from the store"):
            cluster.in_container(victim, "rankgate", "health", "runner")
    finally:
        docker("network", "connect", network, victim)
    _, seconds = await cluster.serving(after=epoch_of(seen))
    cluster.figures.recovery("a runner cut off for more than two leases; reconnected → serving again", seconds)
    assert int(docker("inspect", "-f", "{{.RestartCount}}", victim)) == 0, "its process lives through an outage"
    await cluster.generates()
    await cluster.check()


async def test_the_leading_planner_killed(cluster: ComposeCluster) -> None:
    """The standby takes over; no rank notices, and nothing is loaded again."""
    seen, _ = await cluster.serving()
    before = loads_of(await cluster.history())
    assert seen.snapshot.leader is not None
    leader = seen.snapshot.leader.holder
    (victim,) = (one for one in cluster.containers("planner") if leader.startswith(one[:12]))
    cluster.kill_process(victim)
    after, seconds = await cluster.until(
        "led by another planner",
        lambda now: (
            now.snapshot.leader is not None and now.snapshot.leader_left_ms > 0 and now.snapshot.leader.holder != leader
        ),
    )
    cluster.figures.recovery("kill -9 of the leading planner → the standby leads", seconds)
    await cluster.generates()
    after, _ = await cluster.serving()
    assert epoch_of(after) == epoch_of(seen)
    assert loads_of(await cluster.history()) == before
    await cluster.check()


async def test_the_store_killed_and_started_with_its_volume(cluster: ComposeCluster) -> None:
    seen, _ = await cluster.serving()
    (store,) = cluster.containers("redis")
    docker("kill", "--signal", "KILL", store)
    docker("start", store)
    began = time.monotonic()
    await cluster.serving()
    await cluster.generates()
    cluster.figures.recovery(
        "kill -9 of redis; started with its volume → serving and generating", time.monotonic() - began
    )
    again, _ = await cluster.serving()
    kept = "the same attempt" if epoch_of(again) == epoch_of(seen) else "a new attempt"
    cluster.figures.add("    which was", kept)
    await cluster.check()


async def test_the_store_replaced_without_its_volume(cluster: ComposeCluster) -> None:
    await cluster.serving()
    cluster.compose("rm", "--stop", "--force", "redis")
    docker("volume", "rm", f"{cluster.project}_store-data")
    cluster.up()
    began = time.monotonic()
    await cluster.serving()
    await cluster.generates()
    cluster.figures.recovery("redis replaced by an empty one → serving and generating", time.monotonic() - began)
    # The record was written back, or there is a new attempt; where it was written back, nothing was loaded since.
    history = await cluster.history()
    cluster.figures.add("    which loaded again", f"{len(loads_of(history))} ranks")
    if not loads_of(history):
        cluster.kill_process(cluster.containers("runner")[0])
        seen, _ = await cluster.serving()
        await cluster.serving(after=epoch_of(seen))
    await cluster.check()


async def test_more_runners_than_ranks_and_fewer(cluster: ComposeCluster) -> None:
    seen, _ = await cluster.serving()
    cluster.up(runners=RANKS + 2)
    await asyncio.sleep(LEASE)
    spare, _ = await cluster.serving()
    assert epoch_of(spare) == epoch_of(seen), "runners that are left over disturb nobody"

    cluster.up(runners=RANKS - 1)
    missing, seconds = await cluster.until("noticed", lambda now: not now.serving)
    cluster.figures.recovery("--scale runner=3 → known that a rank is missing", seconds)
    assert "1 of 4" in missing.explanation or "rank" in missing.explanation
    cluster.up(runners=RANKS)
    _, seconds = await cluster.serving(after=epoch_of(seen))
    cluster.figures.recovery("--scale runner=4 → serving again", seconds)
    await cluster.generates()
    await cluster.check()


async def test_a_rolling_update_to_another_version(
    cluster: ComposeCluster, environment: dict[str, str], tmp_path: Path, folder: Path
) -> None:
    other = checkout(tmp_path / "other", OTHER_VERSION)
    for wheel in (folder / "deploy/wheels").glob("*.whl"):
        (other / "deploy/wheels" / wheel.name).hardlink_to(wheel)
    began = time.monotonic()
    build(other, {**environment, "RANKGATE_VERSION": OTHER_VERSION})
    cluster.figures.step("image of another version built", began)

    async def versions() -> set[str]:
        runners = cluster.containers("runner")
        return {docker("inspect", "-f", "{{.Config.Image}}", one).rpartition(":")[2] for one in runners}

    assert await versions() == {VERSION}
    began = time.monotonic()
    script = await asyncio.create_subprocess_exec(
        str(cluster.folder / "deploy/rolling-update.sh"),
        OTHER_VERSION,
        cwd=cluster.folder,
        env={
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            **_docker_environment(),
            **cluster.environment,
        },
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert script.stdout is not None
    mixed = 0
    told: list[str] = []
    async for line in script.stdout:
        told.append(line.decode())
        # The script says so after it has waited for it, so what is seen here serves, with both versions until the last one.
        if "serves" in told[-1] and await versions() == {VERSION, OTHER_VERSION}:
            mixed += 1
    assert await script.wait() == 0, "".join(told) + cluster.logs()
    cluster.figures.recovery("rolling update of two planners and four runners", time.monotonic() - began)
    assert mixed >= RANKS - 1, "".join(told)
    assert await versions() == {OTHER_VERSION}
    assert {docker("inspect", "-f", "{{.Config.Image}}", one) for one in cluster.containers("planner")} == {
        f"{IMAGE}:{OTHER_VERSION}"
    }
    assert OTHER_VERSION in cluster.in_container(cluster.containers("runner")[0], "rankgate", "--version")
    cluster.environment["RANKGATE_VERSION"] = OTHER_VERSION
    await cluster.serving()
    await cluster.generates()
    await cluster.check()


def _docker_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("DOCKER_") or name == "HOME"}

"""Processes of this version and of the one before work together, so that a cluster can be updated one process after another.

The version before is a wheel of the commit that tests/integration/previous.txt names. It is renewed at each release.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import zipfile
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from planner.embedded import EmbeddedServer
from planner.launcher import own_environment

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
COMMIT = (Path(__file__).parent / "previous.txt").read_text().strip()
START = "import sys; from planner.cli import main; sys.exit(main())"
SECONDS = 90.0
"""A bound for hangs, not a measure."""


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages of the version before, from its wheel."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("previous")
    packed = subprocess.run(["git", "archive", "--format=tar", COMMIT], cwd=ROOT, capture_output=True, check=False)
    if packed.returncode:
        pytest.skip(f"commit {COMMIT} is not here, so there is no version before: {packed.stderr.decode()[:200]}")
    subprocess.run(["tar", "-x", "-C", str(source)], input=packed.stdout, check=True)
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(source / "made")],
        cwd=source, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = (source / "made").iterdir()
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(made)
    return made


def environment(version: Path | None) -> Mapping[str, str]:
    found = {**os.environ, **own_environment()}
    if version is not None:
        found["PYTHONPATH"] = str(version)
    return found


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-c", START, *arguments]


@asynccontextmanager
async def running(log: Path, version: Path | None, *arguments: str) -> AsyncGenerator[None]:
    """One process of a version for as long as a block lasts; ``None``: this version."""
    with log.open("ab") as out:
        process = await asyncio.create_subprocess_exec(
            *command(*arguments), stdout=out, stderr=out, env=environment(version)
        )
    try:
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def said(version: Path | None, *arguments: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        *command(*arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment(version),
    )
    out, _ = await asyncio.wait_for(process.communicate(), SECONDS)
    return process.returncode, out.decode()


def test_the_version_before_is_another_one(previous: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-P", "-c", "import barrier, runner, planner; print(barrier.__file__, planner.__file__)"],
        env=environment(previous), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.count(str(previous)) == 2, found.stdout


@pytest.mark.parametrize(
    ("planner", "ranks"),
    [("now", ("before", "before")), ("before", ("now", "now")), ("now", ("now", "before"))],
    ids=["planner first", "runners first", "one rank after the other"],
)
async def test_it_serves_while_a_cluster_is_updated(
    planner: str, ranks: tuple[str, ...], previous: Path, tmp_path: Path
) -> None:
    versions = {"now": None, "before": previous}
    log = tmp_path / "log"
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(EmbeddedServer())
        store = ("--redis", server.url)
        await stack.enter_async_context(running(log, versions[planner], "planner", *store))
        for rank, version in enumerate(ranks):
            arguments = ("runner", *store, "--instance", "demo", "--rank", str(rank))
            await stack.enter_async_context(running(log, versions[version], *arguments))
        launch = ("launch", *store, "demo", "--world-size", str(len(ranks)), "--layers", "2")
        for asking in (None, previous):
            code, words = await said(asking, *launch)
            assert code == 0, words + log.read_text()
            code, words = await said(asking, "generate", *store, "demo", "hello", "--max-tokens", "4")
            assert (code, "[simulated text]" in words) == (0, True), words + log.read_text()
            code, words = await said(asking, "status", *store, "demo")
            assert (code, "demo" in words) == (0, True), words

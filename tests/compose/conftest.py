"""The one cluster that all tests of this folder share, in the order in which they stand. Figures are told at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.compose.cluster import ComposeCluster, Figures, NoDocker, checkout, compose_command, docker, prepare, run

_FIGURES = Figures()

VERSION = "0.1.0"
OTHER_VERSION = "0.1.1"
PLANTED = "RANKGATE_TESTS_PLANTED"
"""The word in each file that lies in the tree and must not be in the image."""
IMAGE = f"rankgate-tested-{os.getpid()}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _FIGURES.lines:
        terminalreporter.write_sep("-", "figures of the compose cluster")
        for line in _FIGURES.lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def figures() -> Figures:
    return _FIGURES


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean checkout."""
    return checkout(tmp_path_factory.mktemp("checkout") / "rankgate")


@pytest.fixture(scope="session")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("secrets")


@pytest.fixture(scope="session")
def environment(folder: Path, secrets: Path) -> Generator[dict[str, str]]:
    """Images and secrets are there; the variables that name them."""
    try:
        compose_command()
        bases = prepare(folder, _FIGURES)
    except NoDocker as missing:
        pytest.exit(str(missing), returncode=2)
    environment = {"RANKGATE_IMAGE": IMAGE, "RANKGATE_VERSION": VERSION, **bases}
    try:
        plant(folder)
        began = time.monotonic()
        build(folder, environment)
        _FIGURES.step("image built, without network", began)
        began = time.monotonic()
        script = folder / "deploy/secrets.sh"
        run(
            str(script),
            "--rank-users",
            env={"SECRETS": str(secrets), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **environment},
        )
        _FIGURES.step("users, passwords and certificate", began)
        yield environment
    finally:
        images = docker("images", "-q", "--filter", f"reference={IMAGE}:*").split()
        if images:
            docker("rmi", "--force", *set(images))


def plant(folder: Path) -> None:
    """What people leave lying about, in every folder of the checkout, and what `deploy/secrets.sh` makes: each file holds a `PLANTED` word."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir()), folder / ".git", folder / "dist"]
    names = (".env", "id_rsa", "notes.txt", "planner.env", "private-1.0-py3-none-any.whl", "server.key", "users.acl")
    made = (
        "rankgate.admin",
        "rankgate.planner",
        "rankgate.demo.rank-0",
        "store-ca",
        "store-cert",
        "store-key",
        "store-users",
    )
    secrets = folder / "deploy" / "secrets"
    for path in [*(one / name for one in folders for name in names), *(secrets / name for name in made)]:
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text(f"{PLANTED}={path.parent.name}/{path.name}\n")


def build(folder: Path, environment: dict[str, str]) -> None:
    """Build the image of a checkout, with the network cut off: deploy/wheels has everything."""
    run(
        *("docker", "build", "--quiet", "--network", "none", "--file", str(folder / "deploy/Dockerfile")),
        *("--build-arg", f"BASE={environment['BASE']}", "--build-arg", f"BUILD_BASE={environment['BUILD_BASE']}"),
        *("--tag", f"{environment['RANKGATE_IMAGE']}:{environment['RANKGATE_VERSION']}", str(folder)),
        env={"DOCKER_BUILDKIT": "0"},
    )


@pytest.fixture(scope="session")
def cluster(folder: Path, secrets: Path, environment: dict[str, str]) -> Generator[ComposeCluster]:
    cluster = ComposeCluster(f"rankgate{os.getpid()}", folder, secrets, environment, _FIGURES)
    try:
        began = time.monotonic()
        cluster.up(build=True)
        _FIGURES.step("docker compose up --build -d --scale runner=4 (image built already)", began)
        yield cluster
    finally:
        cluster.down()
    assert cluster.leftovers() == []

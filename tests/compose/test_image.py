"""What is in the image, how large it is, and how soon a runner that begins is one."""

from __future__ import annotations

import io
import json
import re
import statistics
import subprocess
import tarfile
from collections.abc import Generator
from datetime import datetime
from pathlib import Path, PurePosixPath

import pytest

from tests.compose.cluster import INSTANCE, ComposeCluster, docker, run
from tests.compose.conftest import IMAGE, PLANTED, VERSION

pytestmark = [pytest.mark.anyio, pytest.mark.compose]


@pytest.fixture(scope="module")
def image(environment: dict[str, str]) -> str:
    return f"{environment['RANKGATE_IMAGE']}:{environment['RANKGATE_VERSION']}"


@pytest.fixture(scope="module")
def files(image: str) -> Generator[tarfile.TarFile]:
    """The whole file system of a container that was never started."""
    container = docker("create", image)
    try:
        exported = subprocess.run(["docker", "export", container], capture_output=True, check=True).stdout
    finally:
        docker("rm", container)
    with tarfile.open(fileobj=io.BytesIO(exported)) as archive:
        yield archive


# By name. What Debian's minimal system brings is none of our business, as long as it builds nothing.
DO_NOT_BELONG = re.compile(
    r"(^|/)(\.git|\.hg|\.venv|\.pytest_cache|\.hypothesis|\.ruff_cache|__pypackages__|node_modules)(/|$)"  # checkouts and caches
    r"|(^|/)(tests?|docs?)/.*\.py$|(^|/)(conftest|test_\w+)\.py$"
    r"|\.(whl|egg|c|h|o|a|pem|key|p12|log)$|(^|/)pip\.conf$|(^|/)\.?netrc$|(^|/)\.pypirc$|(^|/)\.(bash_history|docker|npmrc|ssh)(/|$)"
    r"|(^|/)(root|home)/.*/?\.cache/|(^|/)var/cache/apt/.+|(^|/)var/lib/apt/lists/.+"
    r"|(^|/)s?bin/(gcc|g\+\+|cc|c\+\+|ld|as|make|cmake|rustc|cargo|go|git|pip3?|curl|wget|ssh|redis-server|valkey-server)(-[\d.]+)?$"
    r"|site-packages/(pip|setuptools|wheel|hatchling|pytest|hypothesis|fakeredis|ruff|pyright|psutil)(/|-[\d.]+\.dist-info)"
    r"|ca-certificates|ssl/certs/.+"
)
LOOK_LIKE_IT = ("usr/lib/python3", "opt/rankgate/lib/python3.11/site-packages/annotated_types/test_cases.py")
"""Debian's Python has a few files whose names look like tests, and a package offers cases to the tests of others."""

SECRETS = re.compile(
    rb"-----BEGIN (?:[A-Z ]*PRIVATE KEY|CERTIFICATE)-----\n[A-Za-z0-9+/=\n]{64}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}"
    rb"|(?:https?|rediss?)://[^/\s:@]+:[^/\s:@*]+@(?!host|store|127|localhost|example)[a-z0-9]"
)


def test_nothing_is_in_the_image_that_does_not_belong(files: tarfile.TarFile) -> None:
    names = [member.name for member in files.getmembers()]
    assert any(name.endswith("/barrier/lua/dispatch.lua") for name in names)
    strange = [name for name in names if DO_NOT_BELONG.search(name) and not name.startswith(LOOK_LIKE_IT)]
    assert strange == []


def test_nothing_that_lay_about_in_the_tree_is_in_the_image(image: str, folder: Path, tmp_path: Path) -> None:
    """Secrets, keys, wheels and a `.git` lay in every folder when it was built. Every layer is looked into, not only what shows at the end."""
    planted = [path for path in folder.rglob("*") if path.is_file() and path.read_bytes().startswith(PLANTED.encode())]
    assert {folder / ".git" / "id_rsa", folder / "deploy" / "secrets" / "store-key"} <= set(planted)
    saved = tmp_path / "image.tar"
    docker("save", "--output", str(saved), image)
    read = 0
    with tarfile.open(saved) as archive:
        for layer in [one for one in archive if one.isfile() and one.size]:
            content = archive.extractfile(layer)
            assert content is not None
            if not tarfile.is_tarfile(content):  # the image's own description
                content.seek(0)
                assert PLANTED.encode() not in content.read(), layer.name
                continue
            content.seek(0)
            with tarfile.open(fileobj=content) as files:
                for member in files:
                    opened = files.extractfile(member) if member.isfile() else None
                    assert opened is None or PLANTED.encode() not in opened.read(), member.name
                    read += 1
    assert read > 1_000, "the layers were found"


def test_no_secret_is_in_the_image(files: tarfile.TarFile, image: str, secrets: Path) -> None:
    ours = [path.read_bytes().strip() for path in secrets.iterdir() if path.stat().st_size]
    machine = [
        value.encode()
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")
        for value in [_environment(name)]
        if value
    ]
    assert ours
    for member in files.getmembers():
        opened = files.extractfile(member) if member.isfile() else None
        if opened is None:
            continue
        content = opened.read()
        assert not any(secret in content for secret in (*ours, *machine)), member.name
        # A library for TLS carries the keys of its self-test.
        found = None if content.startswith(b"\x7fELF") else SECRETS.search(content)
        assert found is None, f"{member.name}: {found[0][:60]!r}" if found else ""
    told = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image) + docker("inspect", image)
    assert SECRETS.search(told.encode()) is None
    assert not any(secret.decode(errors="replace") in told for secret in (*ours, *machine))


def _environment(name: str) -> str:
    import os

    return os.environ.get(name, "")


def test_the_image_runs_as_nobody_in_particular(image: str, files: tarfile.TarFile) -> None:
    config = json.loads(docker("inspect", image))[0]["Config"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["tini", "--", "rankgate"]
    assert {name.partition("=")[0] for name in config["Env"]} == {"PATH", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"}
    own = [member for member in files.getmembers() if member.name.startswith("opt/rankgate/")]
    assert own
    assert [member.name for member in own if member.uid == 10001 or (member.mode & 0o002 and not member.issym())] == []


@pytest.mark.parametrize("command", ["planner", "runner", "launch", "generate", "status", "health", "acl"])
def test_the_command_chooses(image: str, command: str) -> None:
    """Without a network, without a right, and on a file system that cannot be written."""
    told = docker("run", "--rm", "--network", "none", "--read-only", "--cap-drop", "ALL", image, command, "--help")
    assert told.startswith(f"Usage: rankgate {command}")


def test_the_size_is_told(image: str, cluster: ComposeCluster, environment: dict[str, str]) -> None:
    size, base = (int(docker("inspect", "-f", "{{.Size}}", one)) / 1e6 for one in (image, environment["BASE"]))
    cluster.figures.add("size of the image", f"{size:.0f} MB, of which {base:.0f} MB Debian with Python")
    assert size < 250


async def test_the_cold_start_is_told(cluster: ComposeCluster) -> None:
    """From the start of a runner's container to its rank's first report, one runner alone."""
    took: list[float] = []
    for victim in cluster.containers("runner")[:3]:
        docker("stop", victim)
        docker("start", victim)
        await cluster.serving()
        started = _instant(docker("inspect", "-f", "{{.State.StartedAt}}", victim))
        lines = run("sh", "-c", f"docker logs --timestamps {victim} 2>&1").splitlines()
        claimed = [_instant(line.split()[0]) for line in lines if f"instance {INSTANCE}: this is rank" in line]
        took.append((claimed[-1] - started).total_seconds())
    cluster.figures.add(
        "cold start of a runner: container started → rank claimed, median of 3", f"{statistics.median(took):6.1f} s"
    )
    assert all(seconds > 0 for seconds in took)
    await cluster.generates()
    await cluster.check()


def _instant(text: str) -> datetime:
    """Docker writes nanoseconds; Python reads microseconds."""
    return datetime.fromisoformat(re.sub(r"\.(\d{6})\d*Z$", r".\1+00:00", text))


def test_the_lock_files_name_versions_that_are_in_the_image(image: str) -> None:
    program = "import importlib.metadata as m, json; print(json.dumps({d.name.lower().replace('_', '-'): d.version for d in m.distributions()}))"
    there = json.loads(docker("run", "--rm", "--entrypoint", "/opt/rankgate/bin/python", image, "-c", program))
    locked = dict(
        re.findall(
            r"^([\w.-]+)==([\w.]+)", (Path(__file__).parents[2] / "deploy/requirements.lock").read_text(), re.MULTILINE
        )
    )
    assert there.pop("rankgate") == VERSION
    assert {name: version for name, version in there.items() if locked.get(name) != version} == {}
    assert PurePosixPath(image).name == f"{IMAGE}:{VERSION}"

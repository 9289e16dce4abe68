"""What ships, out of a tree in which secrets lie: sdist, wheel, the image's build, and the archive for machines without a registry.

The tree is a copy of this one, in which `deploy/secrets.sh` has been run for real, and in which every folder holds what people leave lying
about: keys, passwords, downloaded wheels. Nothing of that may be in what leaves the machine, by its name or by its content.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from pathspec import GitIgnoreSpec

ROOT = Path(__file__).parents[2]
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis", "dist", "build", "*.whl"
)
STRAY = (
    ".env",
    ".npmrc",
    "backup.tar.gz",
    "engine.json.bak",
    "id_rsa",
    "notes.txt",
    "planner.env",
    "private-1.0-py3-none-any.whl",
    "rank-0",
    "server.key",
    "server.pem",
    "store-users",
    "users.acl",
)
"""Planted in every folder; the content of each is a word of its own."""


@dataclass(frozen=True)
class Tree:
    """A copy of the project with secrets in it.

    Attributes:
        root: the copy.
        secrets: path from the root to content, of everything that must not leave the machine.
    """

    root: Path
    secrets: dict[str, bytes]

    def leaks(self, files: dict[str, bytes]) -> list[str]:
        """What of the secrets is among files that leave the machine, by name or by content."""
        names = [f"{name} is there" for name in files if any(name.endswith(f"/{one}") for one in self.secrets)]
        return names + [
            f"{name} holds what {one} holds"
            for name, content in files.items()
            for one, secret in self.secrets.items()
            if secret in content
        ]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    root = tmp_path_factory.mktemp("tree") / "project"
    shutil.copytree(ROOT, root, ignore=NOT_COPIED)
    made = root / "deploy" / "secrets"
    for one in made.iterdir():  # whatever this checkout has is not touched, and not looked at
        if one.name != ".gitignore":
            one.unlink()
    before = set(_files(root))
    subprocess.run(
        ["sh", str(root / "deploy" / "secrets.sh"), "--rank-users"],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        check=True,
        capture_output=True,
    )
    folders = {root, *(path for path in root.rglob("*") if path.is_dir() and "tests" not in path.parts), root / "tests"}
    for number, folder in enumerate(sorted(folders)):
        for name in STRAY:
            path = folder / name
            word = f"planted-{number}-{name}-secret\n"
            if path.exists():  # an .env of this project's, in which somebody has put a password of his own
                before.discard(path)
                path.write_text(f"{path.read_text()}\nPASSWORD={word}#OLD_PASSWORD={word}")
            else:
                path.write_text(word)
    secrets = {
        path.relative_to(root).as_posix(): _telling(path)
        for path in _files(root)
        if path not in before and _telling(path)
    }
    names = {path.name for path in made.iterdir()}
    assert {"store-users", "store-key", "rankgate.planner", "rankgate.admin", "rankgate.demo.rank-3"} <= names
    return Tree(root, secrets)


def _files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def _telling(path: Path) -> bytes:
    """The part of a secret file that is looked for: of what was planted the word, otherwise all of it."""
    content = path.read_bytes().strip()
    planted = re.search(rb"planted-\d+-\S+-secret", content)
    return planted[0] if planted else content


def _hatchling(tree: Tree, target: str, room: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(room)],
        cwd=tree.root,
        check=True,
        capture_output=True,
    )
    (found,) = room.iterdir()
    return found


def _unpacked(archive: Path) -> dict[str, bytes]:
    """Path from the archive's one folder, with a slash before it, to the content."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            return {f"/{name}": opened.read(name) for name in opened.namelist()}
    with tarfile.open(archive) as opened:
        held = ((member.name, opened.extractfile(member)) for member in opened.getmembers())
        return {f"/{name.partition('/')[2]}": file.read() for name, file in held if file is not None}


def tracked() -> set[str]:
    """What the version control knows; where there is none (an unpacked sdist), these tests have nothing to compare with."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("this is no checkout: git lists no files here")
    return {name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).exists()}


@pytest.fixture(scope="module")
def sdist(tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return _unpacked(_hatchling(tree, "sdist", tmp_path_factory.mktemp("sdist")))


def test_no_secret_is_in_the_sdist(tree: Tree, sdist: dict[str, bytes]) -> None:
    assert tree.leaks(sdist) == []


def test_the_sdist_has_every_file_of_the_project(sdist: dict[str, bytes]) -> None:
    """What is listed by name is forgotten easily: whoever adds a file adds it in pyproject.toml."""
    left_out = {name for name in tracked() if name.startswith(".ci/")} | {
        ".env"
    }  # .env may hold what is nobody's business
    assert {name.lstrip("/") for name in sdist} - {"PKG-INFO"} == tracked() - left_out


def test_no_secret_is_in_the_wheel(tree: Tree, tmp_path: Path) -> None:
    files = _unpacked(_hatchling(tree, "wheel", tmp_path))
    assert tree.leaks(files) == []
    packaged = {name.lstrip("/") for name in files if ".dist-info/" not in name}
    assert packaged == {name for name in tracked() if name.startswith(("barrier/", "runner/", "planner/"))}


def builders_files(root: Path) -> dict[str, bytes]:
    """What the builder of the image is sent: every pattern of .dockerignore begins at the root, so its rules are git's."""
    lines = (root / ".dockerignore").read_text().splitlines()
    ignored = GitIgnoreSpec.from_lines(lines)
    files = (path.relative_to(root).as_posix() for path in _files(root))
    return {f"/{name}": (root / name).read_bytes() for name in files if not ignored.match_file(name)}


def test_every_pattern_for_the_builder_begins_at_the_root() -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert patterns[0] == "*"
    assert [pattern for pattern in patterns[1:] if not pattern.startswith("!/")] == []


def test_no_secret_is_sent_to_the_builder_of_the_image(tree: Tree) -> None:
    """But the wheels in deploy/wheels, which are there to be installed; the image's last stage takes nothing from that folder."""
    files = builders_files(tree.root)
    wheels = {name for name in files if re.fullmatch(r"/deploy/wheels/[^/]+\.whl", name)}
    assert tree.leaks({name: content for name, content in files.items() if name not in wheels}) == []
    assert wheels == {f"/deploy/wheels/{name}" for name in STRAY if name.endswith(".whl")}


def copies(dockerfile: str) -> list[list[tuple[list[str], str]]]:
    """Of each stage what its COPY lines take, and from where: a stage's name, or nothing for the files that the builder was sent."""
    stages: list[list[tuple[list[str], str]]] = []
    for line in dockerfile.splitlines():
        word, *rest = line.split() or [""]
        if word == "FROM":
            stages.append([])
        elif word in ("COPY", "ADD"):
            taken = [one for one in rest[:-1] if not one.startswith("--")]
            stages[-1].append((taken, next((one[7:] for one in rest if one.startswith("--from=")), "")))
    return stages


def test_the_image_takes_what_the_wheel_and_the_lock_file_install_and_nothing_else(tree: Tree, tmp_path: Path) -> None:
    """Its file list without Docker: tests/compose/test_image.py looks into the image itself."""
    build, last = copies((tree.root / "deploy" / "Dockerfile").read_text())
    assert last == [(["/opt/rankgate"], "build")]
    taken = [one for names, stage in build for one in names if not stage]
    sent = builders_files(tree.root)
    there = {
        name: content
        for name, content in sent.items()
        if any(name == f"/{one}" or name.startswith(f"/{one}/") for one in taken)
    }
    assert [one for one in taken if not any(name.startswith(f"/{one}") for name in there)] == []
    source = tmp_path / "source"  # the Dockerfile's /source, of which the image's wheel is built
    for name, content in there.items():
        if not name.startswith("/deploy/"):
            path = source / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    room = tmp_path / "wheel"
    wheel = _unpacked(_hatchling(Tree(source, tree.secrets), "wheel", room))
    assert tree.leaks(wheel) == []
    packaged = {name.lstrip("/") for name in wheel if ".dist-info/" not in name}
    assert packaged == {name for name in tracked() if name.startswith(("barrier/", "runner/", "planner/"))}


def test_no_secret_is_in_the_archive_for_machines_without_a_registry(tree: Tree, tmp_path: Path) -> None:
    """But the wheels in deploy/wheels, which are there to be carried over."""
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text('#!/bin/sh\n[ "$1 $2" = "save -o" ] && echo images >"$3"\n')
    docker.chmod(0o755)
    archive = tmp_path / "archive.tar.gz"
    subprocess.run(
        ["sh", str(tree.root / "deploy" / "airgap" / "bundle.sh"), str(archive)],
        env={**os.environ, "PATH": f"{docker.parent}:{os.environ['PATH']}"},
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    files = _unpacked(archive)
    settings = files.pop("/.env").decode()  # there by name, and without what is none of its business
    assert tree.leaks({**_without_wheels(files), "/settings": settings.encode()}) == []
    assert "RANKGATE_LEASE=6\n" in settings
    assert "COMPOSE_PROFILES=plain\n" in settings
    assert {name.lstrip("/") for name in files if name.startswith("/deploy/")} - {
        f"deploy/wheels/{name}" for name in STRAY
    } == {name for name in tracked() if name.startswith("deploy/")}


def _without_wheels(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if not name.startswith("/deploy/wheels/")}


def test_a_file_that_leaks_is_seen(tree: Tree) -> None:
    """The search itself: by name, by content under another name, and in every folder."""
    name, content = next(iter(tree.secrets.items()))
    assert tree.leaks({f"/{name}": b""}) == [f"/{name} is there"]
    assert tree.leaks({"/harmless": b"x" + content})[0].startswith("/harmless holds what ")
    folders = {str(Path(one).parent) for one in tree.secrets}
    assert {"deploy/secrets", "deploy/wheels", "planner/cli", "barrier/lua", "tests"} <= folders

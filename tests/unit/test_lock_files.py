"""The image's lock files say what the tests are run with."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>[\w.]+)(?: ; (?P<marker>[^\\]+?))? \\$", re.MULTILINE)


def locked(name: str) -> dict[NormalizedName, tuple[str, Marker | None]]:
    found = {
        canonicalize_name(match["name"]): (match["version"], Marker(match["marker"]) if match["marker"] else None)
        for match in LINE.finditer((ROOT / "deploy" / name).read_text())
    }
    assert found
    return found


def constraints() -> dict[NormalizedName, str]:
    lines = (line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    return {canonicalize_name(name): version.strip() for name, version in lines}


@pytest.mark.parametrize("name", ["requirements.lock", "build.lock"])
def test_a_locked_version_is_the_tested_one(name: str) -> None:
    tested = constraints()
    here = {"python_full_version": "3.11.7", "python_version": "3.11"}
    differ = {
        package: version
        for package, (version, marker) in locked(name).items()
        if tested.get(package) != version and (marker is None or marker.evaluate(here))
    }
    assert differ == {}, "run make lock"


@pytest.mark.parametrize("name", ["requirements.lock", "build.lock"])
def test_every_locked_package_has_hashes(name: str) -> None:
    text = (ROOT / "deploy" / name).read_text()
    blocks = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(locked(name))
    assert [block for block in blocks if "--hash=sha256:" not in block] == []


def test_everything_that_the_program_asks_for_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["cli"]]
    there = locked("requirements.lock")
    for text in asked:
        requirement = Requirement(text)
        version = there[canonicalize_name(requirement.name)][0]
        assert requirement.specifier.contains(version), text
    (backend,) = project["build-system"]["requires"]
    assert Requirement(backend).specifier.contains(locked("build.lock")[canonicalize_name("hatchling")][0])

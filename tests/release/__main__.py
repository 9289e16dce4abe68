"""``make release-check``: whether what is here may be released as the version that pyproject.toml says.

Builds sdist and wheel as a release does, looks at what a package index would show, installs the wheel and runs its tests, and looks the
version up in CHANGELOG.md. Uploads nothing. Every check runs; the end says which of them failed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def version() -> str:
    """The version to be released."""
    found: str = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    return found


def wrong_with_changelog(text: str, released: str) -> str:
    """What is wrong with the changelog of a version that is to be released; empty where nothing is."""
    heads = re.findall(r"^## (.+)$", text, re.MULTILINE)
    if not heads or heads[0].split()[0] != released:
        return f"the newest entry of CHANGELOG.md is not {released}, but {heads[0] if heads else 'missing'}"
    if not re.fullmatch(rf"{re.escape(released)} \(\d{{4}}-\d\d-\d\d\)", heads[0]):
        return f"the entry of CHANGELOG.md is {heads[0]!r}; a release has its day: {released} (YYYY-MM-DD)"
    entry = text.partition(f"## {heads[0]}\n")[2].partition("\n## ")[0]
    return "" if "\n- " in entry else f"the entry {heads[0]!r} of CHANGELOG.md names no change"


def passes(title: str, *command: str) -> bool:
    """Run a program of this environment; says how it went."""
    print(f"\n--- {title}", flush=True)
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False).returncode == 0


def main() -> int:
    """Run every check; returns 1 where one failed."""
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="rankgate-release-") as room:
        if passes("build sdist and wheel", "hatchling", "build", "-d", room):
            built = sorted(map(str, Path(room).iterdir()))
            if not passes("what a package index would show", "twine", "check", "--strict", *built):
                failed.append("twine refuses what was built")
        else:
            failed.append("sdist and wheel cannot be built")
    if not passes("the tests of the wheel", "pytest", "-q", "tests/wheel"):
        failed.append("the tests of the wheel failed")
    if wrong := wrong_with_changelog((ROOT / "CHANGELOG.md").read_text("utf-8"), version()):
        failed.append(wrong)
    print("".join(f"\n--- not ready: {one}" for one in failed) or f"\n--- {version()} may be released")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

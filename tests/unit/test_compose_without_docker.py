"""Without Docker the compose tests fail with one sentence; they never pass by skipping."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("there", [False, True], ids=["no docker", "no daemon"])
def test_what_is_missing_is_said(there: bool, tmp_path: Path) -> None:
    if there:
        program = tmp_path / "docker"
        program.write_text("#!/bin/sh\nexit 1\n")
        program.chmod(0o755)
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "compose",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/compose/test_faults.py",
        ],
        cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, ended.stdout + ended.stderr
    told = re.findall(r"the compose tests need [^!\n]+", ended.stdout + ended.stderr)
    assert told
    assert ("daemon that answers" if there else "not on the PATH") in told[0]
    assert "passed" not in ended.stdout
    assert "skipped" not in ended.stdout

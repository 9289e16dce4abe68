"""The README's examples run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = dict(
    re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), flags=re.DOTALL)
)


def test_the_readme_has_its_examples() -> None:
    assert set(EXAMPLES) == {"library", "barrier"}


@pytest.mark.parametrize(
    ("name", "said"),
    [("library", "[simulated text]"), ("barrier", "all ranks had arrived at one instant; the task is entry")],
)
def test_an_example_runs_as_it_stands(name: str, said: str, tmp_path: Path) -> None:
    program = tmp_path / f"example_{name}.py"
    program.write_text(EXAMPLES[name], "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout

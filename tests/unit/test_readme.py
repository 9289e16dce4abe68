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


README = (ROOT / "README.md").read_text("utf-8")
DEPLOY = (ROOT / "docs/deploy.md").read_text("utf-8")


def test_every_way_to_deploy_has_its_three_lines_in_one_place() -> None:
    assert "[docs/deploy.md](docs/deploy.md)" in README
    section = DEPLOY.partition("# Deploy\n")[2].partition("\n## ")[0]
    for word in ("docker compose", "systemd", "NixOS", "deploy/ROLLOUT.md", "deploy/airgap/README.md", "rankgate up"):
        assert word in section
    blocks = re.findall(r"```\n(.*?)\n```", section, flags=re.DOTALL)
    assert [len(block.splitlines()) for block in blocks] == [3] * 5


def test_every_file_of_deploy_that_is_named_is_there() -> None:
    named = set(re.findall(r"(?<!/)\bdeploy/[\w./-]*[\w-]", README + DEPLOY)) - {
        "deploy/secrets"
    }  # which deploy/secrets.sh fills
    assert len(named) > 8
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_without_a_registry_the_settings_are_those_of_env() -> None:
    (line,) = re.findall(r"^export (BASE=.*)$", DEPLOY, flags=re.MULTILINE)
    settings = (ROOT / ".env").read_text()
    made = (ROOT / "deploy/airgap/bases.sh").read_text()
    for word in line.split():
        name, _, image = word.partition("=")
        assert f"\n{name}=" in settings
        assert image.removesuffix(":bookworm") in made


def test_every_example_names_what_must_be_installed_for_it() -> None:
    for name in EXAMPLES:
        before = README.partition(f"<!-- test: {name} -->")[0]
        assert "pip install" in before[before.rindex("\n**") :], name


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

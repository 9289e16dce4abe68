"""What importing costs and does: libraries are silent until asked, the command line begins soon and takes Ctrl-C at any moment."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from barrier import Member, connect
from planner import InstanceSpec
from planner.embedded import EmbeddedServer
from planner.launcher import own_environment
from planner.registry import Registry

ROOT = Path(__file__).parents[2]


def told(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **own_environment()}
    command = [sys.executable, "-P", "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("package", ["barrier", "runner", "planner"])
@pytest.mark.parametrize("asked", [False, True])
def test_a_library_says_nothing_until_it_is_asked(package: str, asked: bool) -> None:
    code = (
        f"import {package}\nfrom loguru import logger\n"
        + (f"logger.enable({package!r})\n" if asked else "")
        + f"import barrier.log, barrier.member, runner.runner, planner.loop\n"
        f"exec(compile('barrier.log.logger.info(\"heard\")', 'x', 'exec'), {{'__name__': '{package}.x', 'barrier': barrier}})\n"
        "logger.info('of the program')\n"
    )
    said = told(code)
    assert said.returncode == 0, said.stderr
    assert ("heard" in said.stderr) is asked
    assert "of the program" in said.stderr


PACKAGES = ("barrier", "runner", "planner")


def test_every_package_tells_the_version_of_the_one_distribution() -> None:
    code = f"import json, {', '.join(PACKAGES)}\nprint(json.dumps([{', '.join(f'{one}.__version__' for one in PACKAGES)}]))"
    said = told(code)
    assert json.loads(said.stdout) == [metadata.version("rankgate")] * len(PACKAGES), said.stderr


def test_a_checkout_that_is_not_installed_says_so_in_place_of_its_version(tmp_path: Path) -> None:
    """Without the packages that pip installed, so without our own distribution, the code alone is there."""
    code = f"import sys; sys.path.append({str(ROOT)!r}); sys.argv[0] = 'rankgate'; import planner; print(planner.__version__)"
    said = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert said.stdout == "(not installed: running from a checkout)\n", said.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_who_does_not_ask_for_the_version_does_not_wait_for_it(package: str) -> None:
    said = told(f"import sys; sys.argv[0] = 'rankgate'; import {package}; print('barrier._version' in sys.modules)")
    assert said.stdout == "False\n", said.stderr


def imported(*arguments: str) -> set[str]:
    """What is imported when a command has run."""
    code = (
        "import json, sys; sys.argv[0] = '/usr/bin/rankgate'; from planner.cli import main\n"
        "code = main()\n"
        "print('\\n' + json.dumps([code, *sys.modules]))"
    )
    said = told(code, *arguments)
    code_and_modules: list[Any] = json.loads(said.stdout.rpartition("\n\n")[2])
    assert code_and_modules[0] == 0, said.stderr
    return set(code_and_modules[1:])


DEAR = {"asyncio", "email", "importlib.metadata", "loguru", "multiprocessing", "pydantic", "redis", "rich", "ssl"}
"""Of other people, and takes long to import."""

ONLY_PLANNING = {
    "planner.decide",
    "planner.embedded",
    "planner.gate",
    "planner.history",
    "planner.launcher",
    "planner.loop",
    "planner.planner",
    "planner.recovery",
    "planner.requests",
    "planner.tasks",
}
"""Of ours, and of no use to somebody who looks."""

ONLY_OTHER_COMMANDS = {
    f"planner.cli.{name}" for name in ("acl", "commands", "health", "runner_process", "up", "watchdog")
}


def test_help_needs_hardly_anything() -> None:
    found = imported("--help")
    assert not found & (DEAR | ONLY_PLANNING | ONLY_OTHER_COMMANDS | {"planner.cli.look", "planner.cli.process"})
    assert not {name for name in found if name.startswith("runner")}


@pytest.mark.anyio
async def test_status_needs_nothing_that_plans_or_runs() -> None:
    async with EmbeddedServer() as server:
        store = await connect(server.url)
        await Registry(store, "rankgate").launch(InstanceSpec(name="demo", world_size=2))
        member = Member(store, "demo", rank=0)
        await member.claim()
        async with member.heartbeat():
            for arguments in (["status"], ["status", "demo"], ["status", "demo", "--json"], ["explain", "demo"]):
                found = await asyncio.to_thread(imported, *arguments, "--redis", server.url)
                assert not found & (ONLY_PLANNING | ONLY_OTHER_COMMANDS), arguments
                assert {name for name in found if name.startswith("runner.")} == {
                    "runner.lifecycle",
                    "runner.model",
                    "runner.worded",
                }
        await store.close()


def test_only_the_command_that_is_run_is_built() -> None:
    """Typer reads every option of a command that it builds, and there are some 130 of them."""
    code = (
        "import sys; from planner.cli import app\n"
        "read = []; read_parameters = typer_main.get_params_from_function\n"
        "typer_main.get_params_from_function = lambda f: read.append(f.__name__) or read_parameters(f)\n"
        "app.run_app(sys.argv[1:]); print(sorted({'stop', 'up', 'runner', 'status'} & set(read)))"
    )
    said = told(f"import typer.main as typer_main; {code}", "stop", "--help")
    assert said.stdout.endswith("\n['stop']\n"), said.stdout + said.stderr


def test_the_command_line_is_ready_for_ctrl_c_before_it_imports_anything_big() -> None:
    code = (
        "import sys; sys.argv = ['/usr/bin/rankgate', '--help']; import planner.cli\n"
        "print(sorted({'loguru', 'pydantic', 'redis', 'typer', 'asyncio'} & set(sys.modules)))"
    )
    assert told(code).stdout == "[]\n"


def test_ctrl_c_while_it_imports_leaves_no_traceback() -> None:
    code = (
        "import sys, os, signal; sys.argv = ['rankgate', '--help']\n"
        "from planner.cli import main\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'planner.cli.app':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "main()"
    )
    said = told(code)
    assert said.returncode == 130
    assert said.stderr == ""

"""What importing costs and does: libraries are silent until asked, the command line begins soon and takes Ctrl-C at any moment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from planner.launcher import own_environment


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


def test_help_needs_no_client_and_no_screen() -> None:
    code = (
        "import sys; sys.argv = ['rankgate', '--help']; from planner.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    print(sorted({'redis', 'rich', 'barrier.connect', 'planner.loop'} & set(sys.modules)))"
    )
    said = told(code)
    assert said.stdout.endswith("[]\n"), said.stdout[-300:]


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


@pytest.mark.parametrize("first", ["barrier.connect", "barrier.explain", "barrier"])
def test_a_function_that_has_the_name_of_its_module_is_the_function(first: str) -> None:
    code = f"import {first}\nfrom barrier import connect, explain\nimport barrier\nprint(callable(connect), callable(explain), callable(barrier.connect))"
    assert told(code).stdout == "True True True\n"


@pytest.mark.parametrize("package", ["barrier", "runner", "planner"])
def test_every_public_name_is_there(package: str) -> None:
    code = f"import {package}\nfor name in {package}.__all__: getattr({package}, name)\nfrom {package} import *"
    said = told(code)
    assert said.returncode == 0, said.stderr

"""The command line, `rankgate`. Its libraries come with an extra, so this file must not need them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from planner.cli import acl, commands, health, instance_file, look, process, runner_process, up

    __all__ = ["acl", "commands", "health", "instance_file", "look", "main", "process", "runner_process", "up"]

_NEEDS = ("click", "rich", "typer")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 after Ctrl-C.

    Args:
        arguments: the arguments without the program's name. ``None``: those of this process; then its output streams are guarded too,
            see `planner.cli.streams`.
    """
    if arguments is None:
        # Before a command runs there is nothing to tidy up, and an exception in the middle of an import would show a traceback.
        signal.signal(signal.SIGINT, _leave_quietly)
        _guard_output()
    strange = _tell_strangers()
    try:
        from planner.cli.app import run_app  # noqa: PLC0415 - fails where the extra is not installed

        code = run_app(list(sys.argv[1:] if arguments is None else arguments))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if strange:
            return 2  # `_tell_strangers` has printed why
        if missing not in _NEEDS:
            raise
        print(
            f"rankgate: the command line needs {missing}, which is not installed: run pip install 'rankgate[cli]'",
            file=sys.stderr,
        )
        return 2
    except ImportError:
        if not strange:
            raise
        return 2
    except KeyboardInterrupt:
        return 130
    return code if arguments is not None else _flushed(code)


def __getattr__(name: str) -> ModuleType:
    """Import a module of this package when it is first used: a command does not import what only others need."""
    if name.startswith("_"):
        raise AttributeError(f"module 'planner.cli' has no attribute {name!r}")
    try:
        return import_module(f"planner.cli.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"planner.cli.{name}":
            raise
        raise AttributeError(f"module 'planner.cli' has no attribute {name!r}") from None


def _leave_quietly(_number: int, _frame: FrameType | None) -> NoReturn:
    os._exit(130)


def _tell_strangers() -> bool:
    """Warn of foreign packages that have our names; returns whether there are any."""
    from planner.cli.ownership import stranger, strangers  # noqa: PLC0415 - see SIGINT above

    found = strangers()
    for name, origin in found.items():
        print(f"rankgate: {stranger(name, origin)}", file=sys.stderr)
    return bool(found)


def _guard_output() -> None:
    from planner.cli.streams import output  # noqa: PLC0415 - see SIGINT above

    output.guard()


def _flushed(code: int) -> int:
    """The exit code, after all output is written or known to be lost."""
    from planner.cli.streams import output  # noqa: PLC0415 - as above

    signal.signal(signal.SIGINT, _leave_quietly)
    sys.stdout.flush()
    sys.stderr.flush()
    if output.failure:
        print(f"rankgate: {output.failure}", file=sys.stderr, flush=True)
    return code if output.failure is None else code or 1

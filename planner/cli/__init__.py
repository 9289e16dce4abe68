"""The command line, `rankgate`. Its libraries come with an extra, so nothing in this file may need them."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

_NEEDS = ("click", "rich", "typer")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 after Ctrl-C.

    Args:
        arguments: without the program's name; those of this process where ``None``.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character must not end the program
            stream.reconfigure(errors="replace")
    try:
        from planner.cli.app import run_app  # noqa: PLC0415 - fails where the extra is not installed

        code = run_app(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _NEEDS:
            raise
        print(
            f"rankgate: the command line needs {missing}, which is not installed: run pip install 'rankgate[cluster]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has left (`rankgate status | head`): do not complain about it at the interpreter's exit, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code

"""Checks that `barrier`, `runner` and `planner` belong to rankgate: other distributions have packages of these names too."""

from __future__ import annotations

import os
import sys
from importlib import util

__all__ = ["PACKAGES", "stranger", "strangers"]

PACKAGES = ("barrier", "runner", "planner")
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_MARK = b"barrier._version"
"""The first file of each of our packages contains this: it reads its version there."""


def strangers() -> dict[str, str]:
    """The foreign packages, and the file or folder that each would be imported from. Imports none of them."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        spec = util.find_spec(name)
        origin = (spec.origin or next(iter(spec.submodule_search_locations or ()), "")) if spec else ""
        if not _is_ours(name, origin):
            found[name] = origin
    return found


def _is_ours(name: str, origin: str) -> bool:
    if os.path.realpath(origin) != os.path.realpath(os.path.join(_ROOT, name, "__init__.py")):
        return False
    try:
        with open(origin, "rb") as file:  # another distribution may have overwritten our file
            return _MARK in file.read()
    except OSError:  # not readable, but in our folder: count it as ours
        return True


def stranger(name: str, origin: str) -> str:
    """A sentence about a foreign or missing package, with what to do.

    Args:
        name: the package.
        origin: where it would be imported from; empty if there is none.
    """
    from importlib import metadata  # noqa: PLC0415 - slow, and only this sentence needs it

    owners = sorted(set(metadata.packages_distributions().get(name, ())) - {"rankgate"})
    again = f"{sys.executable} -m pip install --force-reinstall --no-deps rankgate"
    if owners:
        return (
            f"the package {name} belongs here to the distribution {owners[0]} ({origin}), and not to rankgate, which needs its own: "
            f"give rankgate an environment of its own, or run {sys.executable} -m pip uninstall {owners[0]} and then {again}"
        )
    if not origin:
        return f"the package {name} of rankgate is missing: run {again}"
    return (
        f"the package {name} is imported from {origin}, and not from rankgate in {_ROOT}: "
        f"run rankgate from another folder, remove that folder from PYTHONPATH, or run {again}"
    )

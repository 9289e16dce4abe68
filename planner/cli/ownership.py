"""Whether `barrier`, `runner` and `planner` are rankgate's own here: other distributions have packages of these names too."""

from __future__ import annotations

import os
import sys
from importlib import util

__all__ = ["PACKAGES", "stranger", "strangers"]

PACKAGES = ("barrier", "runner", "planner")
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_MARK = b"barrier._version"
"""Stands in the first file of each of ours, which tells its version by it."""


def strangers() -> dict[str, str]:
    """The packages that are not ours, and the file or folder that each is imported from; imports none of them."""
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
        with open(origin, "rb") as file:  # that of another distribution may have been written over it
            return _MARK in file.read()
    except OSError:  # it was imported, so it is there; whoever hides it knows why
        return True


def stranger(name: str, origin: str) -> str:
    """What to tell the user of a package that is not ours, and the way out.

    Args:
        name: the package.
        origin: where it is imported from; empty where there is none.
    """
    from importlib import metadata  # noqa: PLC0415 - a big module that reads what is installed, for this sentence alone

    owners = sorted(set(metadata.packages_distributions().get(name, ())) - {"rankgate"})
    again = f"{sys.executable} -m pip install --force-reinstall --no-deps rankgate"
    if owners:
        return (
            f"the package {name} belongs to the distribution {owners[0]} here ({origin}), and not to rankgate, which needs its own: "
            f"give rankgate an environment of its own, or run {sys.executable} -m pip uninstall {owners[0]} and {again}"
        )
    if not origin:
        return f"the package {name} of rankgate is missing: run {again}"
    return (
        f"the package {name} is taken from {origin}, and not from rankgate in {_ROOT}: "
        f"run rankgate from another folder, take that one from PYTHONPATH, or run {again}"
    )

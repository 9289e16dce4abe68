"""The version of the distribution that barrier, runner and planner are installed from, as ``__version__`` of each of them."""

from __future__ import annotations

from importlib import metadata

__all__: list[str] = []


try:
    __version__ = metadata.version("rankgate")
except metadata.PackageNotFoundError:
    __version__ = "(not installed: running from a checkout)"

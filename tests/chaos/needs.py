"""Checks what a machine must have for the chaos runs. What is missing is told in one sentence, and is no breach."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

_TOOLS = {
    "redis-aof": ("redis-server",),
    "redis-empty": ("redis-server",),
    "sentinel": ("redis-server",),
    "network": ("ip", "iptables"),
}
_PACKAGES = {"redis-server": "redis-server", "ip": "iproute2", "iptables": "iptables"}


def missing(worlds: Sequence[str]) -> str:
    """What keeps some worlds from being played on this machine, and the way out; empty where nothing does."""
    if "network" in worlds and os.geteuid() != 0:
        return _refused(("network",), worlds, "root, for a network namespace", "run it as root")
    wanted = {tool: [world for world in worlds if tool in _TOOLS.get(world, ())] for tool in _PACKAGES}
    absent = [tool for tool, whose in wanted.items() if whose and shutil.which(tool) is None]
    if absent:
        blocked = {world for tool in absent for world in wanted[tool]}
        install = " ".join(sorted({_PACKAGES[tool] for tool in absent}))
        return _refused(blocked, worlds, f"{' and '.join(absent)} on the PATH", f"apt-get install {install}")
    if "network" in worlds and (why := _namespaces_fail()):
        return _refused(("network",), worlds, f"network namespaces with iptables, and this kernel says: {why}", "")
    return ""


def _refused(blocked: Sequence[str] | set[str], worlds: Sequence[str], need: str, way: str) -> str:
    others = [world for world in worlds if world not in blocked]
    without = (
        f"leave {'it' if len(blocked) == 1 else 'them'} out with ARGS='--worlds {' '.join(others)}'" if others else ""
    )
    ways = " or ".join(filter(None, (way, without)))
    which = " and ".join(world for world in worlds if world in blocked)
    return f"nothing was tried: {which} {'needs' if len(blocked) == 1 else 'need'} {need}" + (
        f"; {ways}" if ways else ""
    )


def _namespaces_fail() -> str:
    """Try on a namespace of our own what the faults need; the reason where that fails."""
    name = f"chaos-probe-{os.getpid()}"
    try:
        if why := _tried("ip", "netns", "add", name):
            return why
        rule = ("-A", "OUTPUT", "-m", "statistic", "--mode", "random", "--probability", "0.3", "-j", "DROP")
        return _tried("ip", "netns", "exec", name, "iptables", "-w", *rule)
    finally:
        _tried("ip", "netns", "del", name)


def _tried(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = " ".join((done.stderr or done.stdout).split())
    return "" if done.returncode == 0 else said[:200] or f"{command[0]} ended with {done.returncode}"

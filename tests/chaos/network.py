"""Puts one rank into its own network namespace, and cuts it off from the store: in one direction, in both, or by loss. Linux, as root."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Literal, TypeAlias

Cut: TypeAlias = Literal["both ways", "to the store", "from the store", "30 % loss"]
CUTS: tuple[Cut, ...] = ("both ways", "to the store", "from the store", "30 % loss")

_RULES: dict[Cut, tuple[tuple[str, ...], ...]] = {
    "both ways": (("OUTPUT", "-j", "DROP"), ("INPUT", "-j", "DROP")),
    "to the store": (("OUTPUT", "-j", "DROP"),),
    "from the store": (("INPUT", "-j", "DROP"),),
    "30 % loss": (
        ("OUTPUT", "-m", "statistic", "--mode", "random", "--probability", "0.3", "-j", "DROP"),
        ("INPUT", "-m", "statistic", "--mode", "random", "--probability", "0.3", "-j", "DROP"),
    ),
}

_numbers = itertools.count()


def can_make_networks() -> bool:
    """Whether this process may; the driver says so where it may not."""
    return os.geteuid() == 0


class Network:
    """A namespace that is joined to this one by a pair of interfaces. Make it with `network`."""

    def __init__(self, name: str, here: str, address: str) -> None:
        self.name = name
        self.here = here
        self.address = address
        """Where a server in the driver's own namespace is reached from inside."""

    async def cut(self, cut: Cut) -> None:
        """Drop packets from now on."""
        for rule in _RULES[cut]:
            await _run("ip", "netns", "exec", self.name, "iptables", "-w", "-A", *rule)

    async def mend(self) -> None:
        """Let everything through again."""
        await _run("ip", "netns", "exec", self.name, "iptables", "-w", "-F")


@asynccontextmanager
async def network() -> AsyncGenerator[Network]:
    """A namespace for the length of the block; it is gone at its end, whatever happened inside."""
    number = next(_numbers)
    # The pid keeps runs apart that share a machine; 15 characters is the longest name of an interface.
    tag = f"{os.getpid() % 100_000:05d}{number % 10}"
    name, here, there = f"chaos-{tag}", f"cha{tag}", f"chb{tag}"
    subnet = f"10.{200 + number % 10}.{os.getpid() % 256}"
    made = Network(name, here, f"{subnet}.1")
    try:
        await _run("ip", "netns", "add", name)
        await _run("ip", "link", "add", here, "type", "veth", "peer", "name", there)
        await _run("ip", "link", "set", there, "netns", name)
        await _run("ip", "addr", "add", f"{subnet}.1/30", "dev", here)
        await _run("ip", "link", "set", here, "up")
        await _run("ip", "-n", name, "addr", "add", f"{subnet}.2/30", "dev", there)
        await _run("ip", "-n", name, "link", "set", there, "up")
        await _run("ip", "-n", name, "link", "set", "lo", "up")
        yield made
    finally:
        # The interface first: it would outlive the namespace for a moment, and a leftover is looked for right after.
        await asyncio.shield(_run("ip", "link", "del", here, check=False))
        await asyncio.shield(_run("ip", "netns", "del", name, check=False))


async def leftovers() -> list[str]:
    """Namespaces and interfaces of this process that are still there."""
    tag = f"{os.getpid() % 100_000:05d}"
    words = (await _run("ip", "-o", "link")).split() + (await _run("ip", "netns")).split()
    return [word for word in words if word.startswith((f"chaos-{tag}", f"cha{tag}", f"chb{tag}"))]


async def _run(*words: str, check: bool = True) -> str:
    process = await asyncio.create_subprocess_exec(
        *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    if check and process.returncode != 0:
        raise AssertionError(f"{_quoted(words)} failed: {output.decode(errors='replace').strip()}")
    return output.decode(errors="replace")


def _quoted(words: Sequence[str]) -> str:
    return " ".join(words)

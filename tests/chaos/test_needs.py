"""If a machine lacks what a world needs, the run says so in one sentence before it starts anything, and reports no breach."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.chaos import __main__ as chaos
from tests.chaos import needs

ALL = ("valkey", "redis-aof", "redis-empty", "sentinel", "network")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One whose PATH has nothing but what a test puts there, and on which we are root."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return tmp_path


def install(folder: Path, *tools: str, script: str = "exit 0") -> None:
    for tool in tools:
        (folder / tool).write_text(f"#!/bin/sh\n{script}\n")
        (folder / tool).chmod(0o755)


def test_a_machine_that_has_everything(machine: Path) -> None:
    install(machine, "redis-server", "ip", "iptables")
    assert needs.missing(ALL) == ""


def test_no_iptables(machine: Path) -> None:
    install(machine, "redis-server", "ip")
    assert needs.missing(ALL) == (
        "nothing was tried: network needs iptables on the PATH; apt-get install iptables or leave it out with "
        "ARGS='--worlds valkey redis-aof redis-empty sentinel'"
    )


def test_no_redis_server(machine: Path) -> None:
    install(machine, "ip", "iptables")
    assert needs.missing(ALL) == (
        "nothing was tried: redis-aof and redis-empty and sentinel need redis-server on the PATH; apt-get install redis-server "
        "or leave them out with ARGS='--worlds valkey network'"
    )


def test_not_root(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert (
        needs.missing(["network"]) == "nothing was tried: network needs root, for a network namespace; run it as root"
    )


def test_a_kernel_without_namespaces(machine: Path) -> None:
    install(machine, "redis-server", "iptables")
    install(machine, "ip", script="echo Operation not permitted >&2; exit 1")
    assert "and this kernel says: Operation not permitted; leave it out" in needs.missing(ALL)


def test_what_a_world_does_not_need_may_be_missing(machine: Path) -> None:
    assert needs.missing(["valkey"]) == ""


def test_it_is_one_sentence_and_an_exit_code(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["chaos", "--seconds", "1"])
    assert chaos.main() == 2
    said = capsys.readouterr()
    assert said.err.startswith("chaos: nothing was tried: ")
    assert said.err.count("\n") == 1
    assert "breach" not in said.out + said.err

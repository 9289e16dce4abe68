"""A short chaos run with a fixed schedule. `make chaos` runs longer ones, on every kind of store at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.chaos.driver import Drive, Report
from tests.chaos.network import can_make_networks

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.redis]

SEED = 20_261_123


async def run(directory: Path, worlds: Sequence[str], rounds: int) -> Report:
    drive = Drive(seed=SEED, seconds=float("inf"), worlds=worlds, directory=directory / "run", rounds=rounds)
    report = await drive.run()
    assert report.breaches == [], f"journals and logs are in {directory}"
    return report


async def test_no_promise_is_broken_while_processes_and_servers_are(tmp_path: Path) -> None:
    worlds, rounds = ("valkey", "redis-aof", "redis-empty", "sentinel"), 5
    report = await run(tmp_path, worlds, rounds)
    assert len(report.rounds) == len(worlds) * (rounds + 1)
    # Every instance came up once before the first fault, and some because of one.
    assert report.bring_ups > 2 * len(worlds)
    assert len(report.faults) > len(worlds) * rounds
    assert len(report.by_kind()) > 12
    assert any(settled.outcome.startswith("given up") for one in report.rounds for settled in one.settled)


async def test_a_rank_in_a_network_of_its_own_is_cut_off_in_every_way(tmp_path: Path) -> None:
    assert can_make_networks(), "this test makes a network namespace for one rank, which only root may: run it as root"
    report = await run(tmp_path, ["network"], 4)
    assert report.bring_ups > 2
    assert any(kind.startswith("partition") for kind in report.by_kind())

"""The benchmarks: `make bench` for all, `make bench ARGS="-k quick"` for a first impression.

They assert facts (one push, one dispatch, every reader has it) and never a time; what the times come to is said at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from redis.asyncio import Redis

from planner.embedded import EmbeddedServer, Transport
from tests.benchmarks.gate import RESTS, SHORT_REST, measure_gate
from tests.benchmarks.results import Results
from tests.benchmarks.server_time import measure_holds
from tests.benchmarks.traffic import count_bring_up, count_burst, count_idle

SAMPLES_AFTER_LONG = 30
"""Each of them takes four rests."""

pytestmark = [pytest.mark.bench, pytest.mark.anyio]


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        alone: ranks, samples; nobody reads the log. Once for each of `RESTS`.
        read: ranks, readers of the log, samples; after `SHORT_REST`.
        holds: ranks, calls.
        idle_seconds: a multiple of the periods of 3, 4 and 5 s that the default settings have.
        bursts: ranks.
    """

    alone: tuple[tuple[int, int], ...]
    read: tuple[tuple[int, int, int], ...]
    holds: tuple[tuple[int, int], ...]
    idle_seconds: float
    bursts: tuple[int, ...]


SCALES = {
    "full": Scale(
        alone=((2, 200), (8, 200), (32, 200), (128, 200), (512, 100), (4096, 40)),
        read=((2, 2, 200), (8, 8, 200), (32, 32, 100), (128, 128, 100), (512, 32, 60), (4096, 32, 40)),
        holds=((128, 200), (4096, 40)),
        idle_seconds=60,
        bursts=(128, 512),
    ),
    "quick": Scale(
        alone=((2, 40), (128, 40), (4096, 6)),
        read=((8, 8, 20),),
        holds=((4096, 10),),
        idle_seconds=5,
        bursts=(128,),
    ),
}


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("transport", ["unix", "tcp"])
async def test_from_the_last_arrival_to_every_hand(
    results: Results, scale: str, transport: Transport, rest: float
) -> None:
    async with EmbeddedServer(transport=transport) as server:
        results.scale, results.server = scale, await _server_version(server.url)
        alone = [(ranks, 0, samples) for ranks, samples in SCALES[scale].alone]
        for ranks, readers, samples in sorted([*alone, *(SCALES[scale].read if rest == SHORT_REST else ())]):
            enough = samples if rest <= SHORT_REST else min(samples, SAMPLES_AFTER_LONG)
            figures = await measure_gate(server.url, ranks, with_readers=readers, samples=enough, rest=rest)
            assert len(figures.committed.seconds) == enough
            results.gates.setdefault(transport, []).append(figures)


async def test_how_long_a_verb_holds_the_server(results: Results, scale: str) -> None:
    async with EmbeddedServer() as server:
        for ranks, calls in SCALES[scale].holds:
            results.holds += await measure_holds(server.url, ranks, calls=calls)


async def test_round_trips_of_a_bring_up(results: Results, scale: str) -> None:
    async with EmbeddedServer() as server:
        found = results.bring_up = await count_bring_up(server.url, 4)
    for rank, (tally, statuses) in enumerate(zip(found.ranks, found.statuses, strict=True)):
        said = {name: count for name, count in tally.items() if name != "XREAD"}
        assert said == {"HMGET": 1, "MULTI": statuses}, f"{scale}: rank {rank}: a promise, and a report for each status"


async def test_round_trips_while_nothing_happens(results: Results, scale: str) -> None:
    async with EmbeddedServer() as server:
        results.idle = await count_idle(server.url, seconds=SCALES[scale].idle_seconds)


async def test_all_ranks_arrive_at_once(results: Results, scale: str) -> None:
    async with EmbeddedServer() as server:
        for ranks in SCALES[scale].bursts:
            found = await count_burst(server.url, ranks)
            results.bursts.append(found)
            looks = found.planner["dispatch"] + found.planner["inspect"]
            assert looks < ranks / 8, (
                f"{looks} times all {ranks} reports were read: what a planner does must not grow so"
            )


async def _server_version(url: str) -> str:
    untyped: Any = Redis  # redis-py leaves from_url partly untyped
    async with untyped.from_url(url) as client:
        info: dict[str, Any] = await client.info("server")
    kind = "valkey" if "valkey_version" in info else "redis"
    return f"{kind} {info[f'{kind}_version']}"

"""Where simulated engines meet: real sockets on this machine."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from itertools import pairwise

import pytest

from barrier.testing import wait_until
from runner.engine import EngineFailure, EngineGroup, bind_endpoint, valid_ports
from runner.engines.ring import Ring
from runner.engines.simulated import SimulatedConfig, SimulatedEngine

pytestmark = pytest.mark.anyio

EPOCH, EARLIER = f"8-{'a' * 32}", f"7-{'a' * 32}"


def here(endpoint: str) -> str:
    return f"127.0.0.1{endpoint}"


def groups(rings: list[Ring], *, epoch: str = EPOCH, deadline: float = 20.0) -> list[EngineGroup]:
    endpoints = tuple(here(ring.bind()) for ring in rings)
    return [EngineGroup("demo", epoch, rank, endpoints, deadline) for rank in range(len(rings))]


async def join(rings: list[Ring], where: list[EngineGroup]) -> list[BaseException | None]:
    try:
        return list(
            await asyncio.gather(
                *(ring.join(group) for ring, group in zip(rings, where, strict=True)), return_exceptions=True
            )
        )
    finally:
        for ring in rings:
            await ring.close()


@pytest.mark.parametrize("size", [2, 3, 8])
async def test_all_ranks_of_one_attempt_meet(size: int) -> None:
    rings = [Ring() for _ in range(size)]
    assert await join(rings, groups(rings)) == [None] * size


async def test_a_text_is_made_at_one_pace() -> None:
    """Where one rank stands still, the one after it waits for it, and so on round the ring; a text that was left does not count."""
    rings = [Ring() for _ in range(3)]
    where = groups(rings)
    made: list[list[int]] = [[], [], []]

    async def text(rank: int, name: str, first: int = 0) -> None:
        for index in range(first, 3):
            await rings[rank].keep_pace(name, index)
            made[rank].append(index)

    try:
        await asyncio.gather(*(ring.join(group) for ring, group in zip(rings, where, strict=True)))
        async with asyncio.TaskGroup() as tasks:
            left = tasks.create_task(text(0, "cancelled on rank 0 and 1, and never begun on rank 2"))
            other = tasks.create_task(text(1, "cancelled on rank 0 and 1, and never begun on rank 2"))
            await wait_until(lambda: made == [[], [0], []], "rank 1 to hear of rank 0, and rank 0 of nobody")
            left.cancel()
            other.cancel()
        made[1].clear()
        async with asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(text(rank, "the next one")) for rank in (0, 1)]
            await wait_until(lambda: made[1] == [0], "rank 1 to make one token")
            assert made[0] == [], "rank 2 has not begun"
            assert not any(one.done() for one in waiting)
            tasks.create_task(text(2, "the next one"))
        assert made == [[0, 1, 2]] * 3
        rings[2]._after.close()  # type: ignore[union-attr]  # its process ends
        gone = asyncio.create_task(text(0, "one more"))
        await wait_until(rings[0]._before.result().at_eof, "rank 0 to see it")  # type: ignore[union-attr]
        assert not gone.done(), "it waits, as a collective does"
        gone.cancel()
        await asyncio.wait({gone})
    finally:
        for ring in rings:
            await ring.close()


@pytest.mark.parametrize("other", [{"epoch": EARLIER}, {"instance": "other"}, {"epoch": f"8-{'b' * 32}"}])
async def test_an_engine_of_another_attempt_is_refused_and_told(other: dict[str, str]) -> None:
    """Of another number, of another nonce, of another instance: rank 1 is not the rank 1 that rank 0 waits for."""
    rings = [Ring(), Ring()]
    first, second = groups(rings, deadline=2.0)
    waits, refused = await join(rings, [first, replace(second, **other)])
    assert isinstance(refused, EngineFailure)
    assert "in another attempt" in str(refused)
    assert isinstance(waits, EngineFailure)
    assert not waits.permanent
    assert not refused.permanent


async def test_the_rightful_neighbour_is_let_in_after_a_stranger_was_refused() -> None:
    """An engine that an earlier attempt left over may find the port, and costs the attempt nothing."""
    rings = [Ring(), Ring()]
    first, second = groups(rings)
    joining = asyncio.create_task(rings[0].join(first))
    host, _, port = first.endpoints[0].partition(":")
    while True:
        try:
            reader, writer = await asyncio.open_connection(host, int(port))
            break
        except OSError:
            await asyncio.sleep(0.01)
    stranger = replace(first, epoch=EARLIER)
    writer.write(f"rankgate-ring {stranger.token.hex()} 1\n".encode())
    assert (await reader.readline()).startswith(b"no it is in another attempt")
    writer.close()
    await asyncio.gather(joining, rings[1].join(second))
    for ring in rings:
        await ring.close()


@pytest.mark.parametrize(
    "greeting", [b"GET / HTTP/1.1\r\n\r\n", b"\xff\x00\n", b"rankgate-ring zz notanumber\n", b"\n"]
)
async def test_who_does_not_greet_as_a_rank_is_refused(greeting: bytes) -> None:
    rings = [Ring(), Ring()]
    first, second = groups(rings)
    joining = asyncio.create_task(rings[0].join(first))
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(first.endpoints[0].rpartition(":")[2]))
            break
        except OSError:
            await asyncio.sleep(0.01)
    writer.write(greeting)
    assert (await reader.readline()).startswith(b"no ")
    writer.close()
    await asyncio.gather(joining, rings[1].join(second))
    for ring in rings:
        await ring.close()


async def test_a_rank_that_never_comes_is_named_before_the_deadline() -> None:
    rings = [Ring(), Ring()]
    first, second = groups(rings, deadline=0.5)
    rings[1].bind()  # gives the first port up: nobody listens there
    [failure] = await join(rings[:1], [first])
    assert isinstance(failure, EngineFailure)
    assert f"rank 1 did not come to the endpoint of rank 0, {first.endpoints[0]}" in str(failure)
    await rings[1].close()
    del second


async def test_every_attempt_has_another_port() -> None:
    ring = Ring()
    ports = [ring.bind() for _ in range(20)]
    assert all(one != after for one, after in pairwise(ports))
    await ring.close()


async def test_a_range_is_kept_to_and_its_end_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        with pytest.raises(EngineFailure, match=f"no port from {port} to {port} is free on this machine") as caught:
            bind_endpoint((port, port))
        assert not caught.value.permanent
    with bind_endpoint((port, port)) as bound:
        assert bound.getsockname()[1] == port


@pytest.mark.parametrize("ports", [(0, 5), (5, 3), (1, 65_536)])
def test_a_range_that_is_none_is_refused(ports: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="give the first and the last of 1 to 65535"):
        valid_ports(*ports)


async def test_connect_without_prepare_and_load_without_connect_are_refused() -> None:
    config = SimulatedConfig(connect_seconds=0, layer_seconds=0)
    engine = SimulatedEngine(config, owns_process=True)
    group = EngineGroup("demo", EPOCH, 0, ("127.0.0.1:1", "127.0.0.1:2"), 5.0)
    with pytest.raises(EngineFailure, match="prepare has bound no endpoint for this attempt"):
        await engine.connect(group)
    engine = SimulatedEngine(config, owns_process=True)
    assert (await engine.prepare(0, 2) or "").startswith(":")
    from runner.messages import ModelSpec

    with pytest.raises(EngineFailure, match="connect has not been done"):
        async for _ in engine.load(ModelSpec(model_id="toy", total_layers=2)):
            pass
    await engine.close()

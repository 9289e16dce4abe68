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
SECONDS = 30.0
"""How long anything may take; a bound for hangs, not a measure."""


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


async def visit(group: EngineGroup, rank: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Come to a rank's endpoint, as anybody may, once it listens."""
    async with asyncio.timeout(SECONDS):
        while True:
            try:
                return await asyncio.open_connection("127.0.0.1", int(group.endpoints[rank].rpartition(":")[2]))
            except OSError:
                await asyncio.sleep(0.01)


def greeting(group: EngineGroup, rank: object) -> bytes:
    return f"rankgate-ring {group.token.hex()} {rank}\n".encode()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "this is no greeting of a ring"),
        (b"\xff\x00\n", "this is no greeting of a ring"),
        (b"rankgate-ring zz notanumber\n", "this is no greeting of a ring"),
        (b"\n", "this is no greeting of a ring"),
        (b"rankgate-ring\n", "this is no greeting of a ring"),
        (b"another-ring " + b"0" * 32 + b" 1\n", "this is no greeting of a ring"),
        (b"rankgate-ring " + b"x" * 200 + b" 1\n", "this is no greeting of a ring"),
        (b"y" * 1_000, "this is no greeting of a ring"),
        ("earlier", "it is in another attempt than rank 0, which is in 8-"),
        (2, "it is rank 2, and not the one before rank 0"),
        (0, "it is rank 0, and not the one before rank 0"),
        (-1, "it is rank -1, and not the one before rank 0"),
        (10**40, f"it is rank {10**40}, and not the one before rank 0"),
        ("9" * 5_000, "this is no greeting of a ring"),
    ],
    ids=str,
)
async def test_who_does_not_greet_as_the_rank_before_is_refused_and_told_and_costs_nothing(
    said: bytes | int | str, why: str
) -> None:
    rings = [Ring(), Ring()]
    first, second = groups(rings)
    joining = asyncio.create_task(rings[0].join(first))
    reader, writer = await visit(first, 0)
    match said:
        case bytes():
            writer.write(said)
        case "earlier":
            writer.write(greeting(replace(first, epoch=EARLIER), 1))
        case _:
            writer.write(greeting(first, said))
    answer = (await reader.readline()).decode()
    assert answer.startswith(f"no {why}")
    writer.close()
    await asyncio.gather(joining, rings[1].join(second))
    for ring in rings:
        await ring.close()


async def test_who_greets_by_half_is_sent_away_after_a_while_and_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("runner.engines.ring._GREETING_SECONDS", 0.2)
    rings = [Ring(), Ring(), Ring()]
    where = groups(rings)
    joining = asyncio.create_task(rings[0].join(where[0]))
    halves = [await visit(where[0], 0) for _ in range(3)]
    for _, writer in halves:
        writer.write(greeting(where[0], 2)[:-1])
    await asyncio.gather(joining, *(ring.join(group) for ring, group in zip(rings[1:], where[1:], strict=True)))
    async with asyncio.timeout(SECONDS):
        for reader, writer in halves:
            assert await reader.readline() == b"no this is no greeting of a ring\n"
            writer.close()
    for ring in rings:
        await ring.close()


async def test_the_same_rank_comes_twice_and_only_the_first_one_is_in_the_ring() -> None:
    rings = [Ring(), Ring()]
    first, _ = groups(rings, deadline=2.0)
    joining = asyncio.create_task(rings[0].join(first))
    one, another = await visit(first, 0), await visit(first, 0)
    one[1].write(greeting(first, 1))
    assert await one[0].readline() == b"ok \n"
    another[1].write(greeting(first, 1))
    assert await another[0].readline() == b"no rank 1 is in the ring already\n"
    joining.cancel()
    await asyncio.gather(joining, return_exceptions=True)
    for _, writer in (one, another):
        writer.close()
    for ring in rings:
        await ring.close()


# --- who is missing -------------------------------------------------------------------------------------------------------


async def why_not(rings: list[Ring], where: list[EngineGroup], present: list[int]) -> dict[int, str]:
    """Let only some ranks join; what each of them says of the others."""
    ends = await join([rings[rank] for rank in present], [where[rank] for rank in present])
    for ring in rings:
        await ring.close()
    failures: dict[int, str] = {}
    for rank, end in zip(present, ends, strict=True):
        assert isinstance(end, EngineFailure)
        assert not end.permanent
        failures[rank] = str(end)
    return failures


async def test_each_rank_names_the_neighbour_that_is_missing_or_says_that_it_is_further_on() -> None:
    rings = [Ring() for _ in range(5)]
    where = groups(rings, deadline=1.0)
    said = await why_not(rings, where, [0, 1, 2, 4])
    assert all(why.startswith("the ring did not come together within 0.9 s: ") for why in said.values())
    assert said[4].endswith(f"rank 3 did not come to the endpoint of rank 4, {where[0].endpoints[4]}")
    assert said[2].endswith(f"rank 2 could not reach rank 3 at {where[0].endpoints[3]}")
    for rank in (0, 1):
        assert said[rank].endswith(
            f"its neighbours are there, but the token did not come round to rank {rank}: a rank further on is missing"
        )


async def test_a_rank_that_never_comes_is_named_before_the_deadline() -> None:
    rings = [Ring(), Ring()]
    where = groups(rings, deadline=0.5)
    said = await why_not(rings, where, [0])
    assert f"rank 1 did not come to the endpoint of rank 0, {where[0].endpoints[0]}" in said[0]
    assert "others came" not in said[0]


async def test_strangers_that_came_instead_are_counted_and_the_last_one_is_explained() -> None:
    rings = [Ring(), Ring()]
    where = groups(rings, deadline=2.0)
    failing = asyncio.create_task(why_not(rings, where, [0]))
    for said in (b"GET / HTTP/1.1\r\n\r\n", greeting(replace(where[0], epoch=EARLIER), 1)):
        reader, writer = await visit(where[0], 0)
        writer.write(said)
        await reader.readline()
        writer.close()
    assert (await failing)[0].endswith(
        "; 2 others came and were refused, the last one because it is in another attempt than rank 0, which is in "
        f"{EPOCH} of demo"
    )


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x1b[31mok\n", b"\xff\xfe\n", b"\n", b"x" * 1_000, b"no", b""],
    ids=str,
)
async def test_whoever_answers_in_the_place_of_a_rank_is_named_with_the_endpoint(answer: bytes) -> None:
    said = await _met_a_stranger(answer)
    assert "rank 0 met no engine of this ring at the endpoint of rank 1, 127.0.0.1:" in said
    assert said.endswith(", or one that ended before it had answered")


async def test_what_a_stranger_gives_as_its_reason_is_bounded_and_printable() -> None:
    said = await _met_a_stranger(b"no \x1b[31m\xff\x07 " + b"y" * 150 + b"\n")
    assert "rank 0 was refused at the endpoint of rank 1, 127.0.0.1:" in said
    assert said.endswith(rf": \x1b[31m�\x07 {'y' * 150}")


async def _met_a_stranger(answer: bytes) -> str:
    """What rank 0 says of somebody who answers so at the endpoint of rank 1."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(answer)
        writer.close()

    rings = [Ring(), Ring()]
    where = groups(rings, deadline=2.0)
    await rings[1].close()
    async with await asyncio.start_server(respond, "127.0.0.1", int(where[0].endpoints[1].rpartition(":")[2])):
        return (await why_not(rings, where, [0]))[0]


async def test_a_rank_that_ends_in_the_middle_is_named() -> None:
    """Rank 1 comes and goes again before the token has come round; rank 0 has reached it."""
    rings = [Ring(), Ring()]
    first, second = groups(rings)
    await rings[1].close()

    async def welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"ok \n")
        await writer.drain()
        await reader.read(16)
        writer.close()

    async with await asyncio.start_server(welcome, "127.0.0.1", int(second.endpoints[1].rpartition(":")[2])):
        joining = asyncio.create_task(rings[0].join(first))
        reader, writer = await visit(first, 0)
        writer.write(greeting(first, 1))
        assert await reader.readline() == b"ok \n"
        writer.close()
        with pytest.raises(EngineFailure, match="rank 0 lost rank 1, the one before it, while the ring came together"):
            await joining
    await rings[0].close()


# --- ports ----------------------------------------------------------------------------------------------------------------


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


def free_range(count: int) -> tuple[int, int]:
    """Some ports in a row that nobody has."""
    while True:
        with socket.socket() as trial:
            trial.bind(("", 0))
            first = int(trial.getsockname()[1])
        wanted = range(first, min(first + count, 65_536))
        if len(wanted) == count and all(may_bind(port) for port in wanted):
            return first, first + count - 1


def may_bind(port: int, *options: int) -> bool:
    """Whether a program with these socket options may take the port now."""
    with socket.socket() as other:
        for option in options:
            other.setsockopt(socket.SOL_SOCKET, option, 1)
        try:
            other.bind(("", port))
        except OSError:
            return False
        return True


async def test_a_small_range_is_usable_again_as_soon_as_an_attempt_has_ended() -> None:
    """The operating system keeps the connections of a ring that has ended for about a minute, and its ports with them."""
    ports = free_range(3)
    for _ in range(6):
        rings = [Ring(ports) for _ in range(2)]
        assert await join(rings, groups(rings)) == [None, None]


async def test_the_engines_of_a_small_range_take_turns_with_its_ports() -> None:
    ports = free_range(3)
    rings = [Ring(ports), Ring(ports)]
    used: list[list[str]] = []
    for _ in range(4):
        where = groups(rings)
        used.append([endpoint.rpartition(":")[2] for endpoint in where[0].endpoints])
        assert len(set(used[-1])) == 2
        assert await join(rings, where) == [None, None]
    assert all(one[0] != after[0] for one, after in pairwise(used)), "there is always another one for rank 0"


def leave_a_connection(port: int) -> None:
    """Have a listener at that port which has ended, and of which the operating system keeps a connection."""
    with bind_endpoint((port, port)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.listen()
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = listener.accept()
            accepted.close()  # the side that closes first is the one whose port is kept
            assert client.recv(1) == b""
    assert not may_bind(port), "a connection is left"


async def test_a_port_of_which_connections_are_left_is_one_socket_s_alone() -> None:
    port, _ = ports = free_range(1)
    leave_a_connection(port)
    with bind_endpoint(ports):
        assert not may_bind(port)
        assert not may_bind(port, socket.SO_REUSEADDR)
        assert not may_bind(port, socket.SO_REUSEADDR, socket.SO_REUSEPORT)
        with pytest.raises(EngineFailure, match="is free on this machine"):
            bind_endpoint(ports)


async def test_a_port_of_which_nothing_is_left_is_preferred() -> None:
    first, last = free_range(2)
    leave_a_connection(first)
    for _ in range(16):
        with bind_endpoint((first, last)) as bound:
            assert bound.getsockname()[1] == last
    with bind_endpoint((first, last), avoid=last) as bound:
        assert bound.getsockname()[1] == first, "rather than that of the attempt before"


async def test_a_port_at_which_somebody_listens_is_passed_over() -> None:
    ports = first, last = free_range(2)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("", first))
        other.listen()
        for _ in range(8):
            with bind_endpoint(ports) as bound:
                assert bound.getsockname()[1] == last


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

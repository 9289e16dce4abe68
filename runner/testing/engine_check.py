"""A check that an engine follows the protocol, for the tests of an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from runner.engine import EngineFailure, EngineGroup, GenerationRequest
from runner.host import EngineHost
from runner.messages import ModelSpec

__all__ = ["EngineMisbehaves", "check_engine"]


class EngineMisbehaves(AssertionError):
    """An engine does not do what `runner.Engine` asks for; the error's text says what."""


async def check_engine(
    make_host: Callable[[int], EngineHost],
    model: ModelSpec,
    *,
    world_size: int = 2,
    address: str = "127.0.0.1",
    deadline: float = 60.0,
    prompt: str = "Once upon a time",
    max_tokens: int = 8,
) -> list[str]:
    """Check an engine against the protocol: order of calls, endpoints, the comparison of tokens, progress, a text.

    ::

        async def test_my_engine() -> None:
            await check_engine(lambda rank: ProcessHost(EngineSpec(factory="mine:engine"), rank=rank), model)

    Args:
        make_host: makes the host of one rank's engine, a fresh one for every call; usually a `runner.ProcessHost`.
        model: a small model that all ranks can load.
        world_size: number of ranks, 2 or more.
        address: the address at which the ranks reach one another.
        deadline: seconds that a connect may take. Where the check expects a connect to fail, it may wait so long.
        prompt: the prompt of the text.
        max_tokens: the most tokens to generate.

    Returns:
        The pieces of the text that rank 0 generated.

    Raises:
        EngineMisbehaves: the engine does not follow the protocol; the error's text says what it did.
        ValueError: the world size is below 2, so there is nobody to connect to.
    """
    if world_size < 2:
        raise ValueError(f"world_size is {world_size}; the check needs 2 ranks or more, which connect to one another")
    await _check_load_alone(make_host, model, world_size)
    await _check_endpoints(make_host, world_size)
    await _check_token(make_host, world_size, address, deadline)
    return await _check_life(
        make_host, model, world_size, address, deadline, GenerationRequest("check", prompt, max_tokens)
    )


@asynccontextmanager
async def _hosts(make_host: Callable[[int], EngineHost], count: int) -> AsyncGenerator[list[EngineHost]]:
    hosts = [make_host(rank) for rank in range(count)]
    try:
        for host in hosts:
            await host.start()
        yield hosts
    finally:
        for host in hosts:
            await host.shut_down()


async def _groups(hosts: Sequence[EngineHost], address: str, deadline: float) -> list[EngineGroup]:
    """Prepare all ranks for one attempt; returns the group of each rank."""
    said = await asyncio.gather(*(host.prepare(rank, len(hosts)) for rank, host in enumerate(hosts)))
    endpoints = tuple(f"{address}{one}" if one is not None and one.startswith(":") else one or "" for one in said)
    return [EngineGroup("check", f"8-{'a' * 32}", rank, endpoints, deadline) for rank in range(len(hosts))]


async def _load(host: EngineHost, model: ModelSpec) -> list[int]:
    return [layers async for layers in host.load(model)]


async def _check_load_alone(make_host: Callable[[int], EngineHost], model: ModelSpec, world_size: int) -> None:
    async with _hosts(make_host, 1) as [host]:
        await host.prepare(0, world_size)
        try:
            await _load(host, model)
        except EngineFailure:
            return
    raise EngineMisbehaves(
        f"load without connect was taken by one of {world_size} ranks: it would wait for ranks that never come; refuse it"
    )


async def _check_endpoints(make_host: Callable[[int], EngineHost], world_size: int) -> None:
    async with _hosts(make_host, 1) as [host]:
        first, second = await host.prepare(0, world_size), await host.prepare(0, world_size)
    if first is not None and first == second:
        raise EngineMisbehaves(
            f"prepare returned the endpoint {first} twice: an engine of an ended attempt would find it; bind another one each time"
        )


async def _check_token(make_host: Callable[[int], EngineHost], world_size: int, address: str, deadline: float) -> None:
    for what, other in (("attempt", {"epoch": f"7-{'a' * 32}"}), ("instance", {"instance": "another"})):
        async with _hosts(make_host, world_size) as hosts:
            groups = await _groups(hosts, address, deadline)
            groups[-1] = replace(groups[-1], **other)
            ends = await asyncio.gather(
                *(host.connect(group) for host, group in zip(hosts, groups, strict=True)), return_exceptions=True
            )
        connected = [rank for rank, end in enumerate(ends) if end is None]
        if connected:
            raise EngineMisbehaves(
                f"connect succeeded on ranks {connected}, though rank {world_size - 1} was in another {what}: compare "
                "EngineGroup.token over all ranks in the first collective"
            )
        for rank, end in enumerate(ends):
            if not isinstance(end, EngineFailure):
                raise EngineMisbehaves(
                    f"connect of rank {rank} ended with {type(end).__name__} and not with EngineFailure"
                )
            if end.permanent:
                raise EngineMisbehaves(
                    f"rank {rank} calls it permanent that it met another {what}; the next attempt may succeed"
                )


async def _check_life(
    make_host: Callable[[int], EngineHost],
    model: ModelSpec,
    world_size: int,
    address: str,
    deadline: float,
    request: GenerationRequest,
) -> list[str]:
    async with _hosts(make_host, world_size) as hosts:
        groups = await _groups(hosts, address, deadline)
        await asyncio.gather(*(host.connect(group) for host, group in zip(hosts, groups, strict=True)))
        for rank, progress in enumerate(await asyncio.gather(*(_load(host, model) for host in hosts))):
            if progress != sorted(progress) or not progress or progress[-1] != model.total_layers:
                raise EngineMisbehaves(
                    f"load of rank {rank} said {progress}; the counts must rise to total_layers, which is {model.total_layers}"
                )
        await asyncio.gather(*(host.warm_up() for host in hosts))
        texts = await asyncio.gather(*(_generate(host, request) for host in hosts))
        if not texts[0]:
            raise EngineMisbehaves("rank 0 generated nothing")
        silent = [rank for rank, text in enumerate(texts) if rank and text]
        if silent:
            raise EngineMisbehaves(f"ranks {silent} yielded text; only rank 0 does")
        await asyncio.gather(*(host.close() for host in hosts))
        return texts[0]


async def _generate(host: EngineHost, request: GenerationRequest) -> list[str]:
    return [piece async for piece in host.generate(request)]

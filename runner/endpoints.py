"""Reads from the record where the engines of an attempt wait for one another, and refuses endpoints at which they could meet a stranger."""

from __future__ import annotations

from collections.abc import Sequence

from barrier import Clock, InvalidName, Member, StoreError
from barrier.log import logger
from barrier.plain import number
from barrier.protocol.names import valid_endpoint
from runner.engine import EngineFailure

__all__ = ["check_endpoints", "meeting_points", "reachable_at"]


async def meeting_points(member: Member, world_size: int, *, clock: Clock, seconds: float) -> tuple[str, ...]:
    """Where each rank's engine waits in the promised epoch, in rank order, checked by `check_endpoints`.

    Args:
        member: this rank's side of the barrier.
        world_size: number of ranks.
        clock: time.
        seconds: how long to ask again if the store does not answer.

    Raises:
        EngineFailure: the endpoints could not be read in time, or `check_endpoints` refuses them.
    """
    ends = clock.now() + seconds
    while True:
        try:
            endpoints = await member.endpoints(world_size)
            break
        except StoreError as error:
            if clock.now() >= ends:
                raise EngineFailure(
                    f"the endpoints of the other ranks could not be read within {number(seconds)} s: {error}"
                ) from error
            await clock.sleep(member.settings.command_seconds)
    own = member.report_now.endpoint
    if endpoints is None and not own:
        endpoints = ("",) * world_size  # an engine without an endpoint works with a planner that asks for none
    check_endpoints(endpoints, member.rank, own)
    return endpoints or ()


async def reachable_at(member: Member, endpoint: str, *, clock: Clock) -> str:
    """An engine's endpoint as the other ranks reach it. An endpoint without a host gets this machine's own address.

    Raises:
        EngineFailure: it is not an endpoint.
    """
    if endpoint.startswith(":"):
        endpoint = _joined(await _address(member, clock), endpoint)
    _check_endpoint(endpoint)
    return endpoint


async def _address(member: Member, clock: Clock) -> str:
    while True:
        try:
            return await member.address()
        except StoreError as error:
            logger.warning("rank {}: its own address is not known yet: {}", member.rank, error)
            await clock.sleep(member.settings.command_seconds)


def check_endpoints(endpoints: Sequence[str] | None, rank: int, own: str) -> None:
    """Refuse endpoints at which an engine could meet an engine of another attempt, or nobody.

    Args:
        endpoints: as `barrier.Member.endpoints` read them.
        rank: the rank whose engine shall connect.
        own: the endpoint that this engine has bound for this attempt.

    Raises:
        EngineFailure: the endpoints are not known, this rank has another one, other machines cannot reach one, or two ranks have the
            same. Never permanent: the next attempt binds others.
    """
    if endpoints is None:
        raise EngineFailure(
            "the store's record of this attempt does not say where the ranks are: the store forgot, or went back"
        )
    if endpoints[rank] != own:
        raise EngineFailure(
            f"the store's record says that rank {rank} waits at {endpoints[rank] or 'no endpoint'}, but it waits at {own or 'none'}: "
            "the store went back"
        )
    alone = [other for other, endpoint in enumerate(endpoints) if _is_loopback(endpoint)]
    reachable = [other for other, endpoint in enumerate(endpoints) if endpoint and not _is_loopback(endpoint)]
    if alone and reachable:
        raise EngineFailure(
            f"rank {alone[0]} says that it waits at {endpoints[alone[0]]}, where no other machine reaches it, and rank {reachable[0]} at "
            f"{endpoints[reachable[0]]}; start the runner of rank {alone[0]} with the --address under which the others reach its machine"
        )
    first: dict[str, int] = {}
    for other, endpoint in enumerate(endpoints):
        if endpoint and first.setdefault(endpoint, other) != other:
            raise EngineFailure(
                f"ranks {first[endpoint]} and {other} both say that they wait at {endpoint}; start each runner with the --address "
                "under which the others reach its machine"
            )


def _check_endpoint(endpoint: str) -> None:
    """Refuse a text that is not an endpoint. An empty text stands for an engine without an endpoint."""
    try:
        if endpoint:
            valid_endpoint(endpoint)
    except InvalidName as error:
        raise EngineFailure(
            f"the engine cannot be reached: {error}; see the engine's prepare, and the runner's --address"
        ) from None


def _is_loopback(endpoint: str) -> bool:
    return endpoint.startswith(("127.", "localhost:", "[::1]:"))


def _joined(host: str, port: str) -> str:
    return f"[{host}]{port}" if ":" in host and not host.startswith("[") else f"{host}{port}"

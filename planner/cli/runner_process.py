"""``rankgate runner``: one process that runs one rank, or several."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from loguru import logger
from pydantic import ValidationError

from barrier import InvalidSettings, Member, Settings, Store, supervise
from barrier.errors import RankgateError
from barrier.plain import problems
from planner.cli.health import ProcessState, keeping_state
from planner.cli.process import Interrupts, connect_store
from planner.cli.watchdog import Work, supervised
from runner import Engine, EngineFailure, EngineHost, EngineSpec, InlineHost, ProcessHost, Runner
from runner.host.failures import UNFIT, sentence_of

__all__ = ["SIMULATED", "EngineChoice", "EngineUnfit", "RunnerOptions", "run_all", "serve_ranks"]


SIMULATED = "simulated"


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """Which engine to run.

    Attributes:
        name: ``simulated``, or ``module:factory`` of a callable that takes the configuration and returns a `runner.Engine`.
        config: the engine's configuration, as decoded JSON.
        inline: whether the engine runs in this process instead of a child process.
        hold_back: extra seconds that the simulated engine of a rank takes to connect, by rank.
    """

    name: str = SIMULATED
    config: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)
    inline: bool = False
    hold_back: Mapping[int, float] = field(default_factory=dict[int, float])

    def __post_init__(self) -> None:
        """Refuse options that this engine does not know."""
        if self.hold_back and self.name != SIMULATED:
            raise InvalidSettings(f"hold-back is for the simulated engine, and --engine is {self.name}")

    def host(self, rank: int, world_size: int | None) -> EngineHost:
        """A host for one rank's engine; nothing is started yet. `world_size` is ``None`` if the runner does not know it.

        Raises:
            InvalidSettings: the factory cannot be imported, or its configuration is wrong.
        """
        if self.name == SIMULATED:
            return self._simulated(rank, world_size)
        if self.inline:
            factory = _import_factory(self.name)
            return InlineHost(lambda: factory(dict(self.config)), rank=rank)
        try:
            spec = EngineSpec(factory=self.name, config=dict(self.config))
        except ValueError as error:
            raise _wrong(error) from None
        return ProcessHost(spec, rank=rank)

    def _simulated(self, rank: int, world_size: int | None) -> EngineHost:
        from runner.engines.simulated import (  # noqa: PLC0415 - a runner of another engine need not load it
            SimulatedConfig,
            SimulatedEngine,
            simulated_spec,
        )

        place = None if world_size is None else rank  # the engine takes both or neither
        try:
            try:
                config = SimulatedConfig.model_validate_json(json.dumps(dict(self.config)))
            except ValidationError as error:
                raise InvalidSettings(problems(error, SimulatedConfig)) from None
            if extra := self.hold_back.get(rank, 0.0):
                # No jitter, so that the rank is late by exactly this time.
                config = config.model_copy(update={"connect_seconds": config.connect_seconds + extra, "jitter": 0.0})
            if not self.inline:
                spec = simulated_spec(config, rank=place, world_size=world_size)
                return ProcessHost(spec, rank=rank, output_is_safe=True)  # it prints nothing but its own faults

            def make() -> SimulatedEngine:
                return SimulatedEngine(config, rank=place, world_size=world_size)

            make()  # so that a wrong configuration is an error now, and not in every attempt
            return InlineHost(make, rank=rank)
        except ValueError as error:
            raise _wrong(error) from None


def _import_factory(name: str) -> Any:  # noqa: ANN401 - the caller checks what it returns
    """Look up ``module:factory``; raises `InvalidSettings` with the reason."""
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except UNFIT as error:
        raise InvalidSettings(f"engine {name!r} cannot be imported: {sentence_of(error)}") from None
    return cast("type[Engine]", found)


def _wrong(error: ValueError) -> InvalidSettings:
    text = " ".join(str(error).split())
    return InvalidSettings(f"the engine's configuration is wrong: {text[:500]}")


class EngineUnfit(RankgateError):
    """There is no such engine, or it refuses its configuration. Raised before any rank is claimed."""


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """What ``rankgate runner`` was told. `ranks` is ``None`` for any free rank below `world_size`.

    With `spare`, the runner waits without an end for a rank that another process holds.
    """

    instance: str
    ranks: range | None
    world_size: int | None
    url: str = field(repr=False)
    namespace: str
    settings: Settings
    engine: EngineChoice
    node: str | None = None
    address: str = ""
    wait_for_store: float = 0.0
    spare: bool = True
    state_file: Path | None = None


async def serve_ranks(options: RunnerOptions, interrupts: Interrupts) -> int:
    """Serve until asked to end; then give every rank back.

    Raises:
        RankgateError: the store is not fit or cannot be reached, or a rank is taken or was taken over.
    """
    first = options.ranks[0] if options.ranks else 0
    options.engine.host(first, options.world_size)  # refuses a wrong engine before anything is sent
    store = await connect_store(options.url, options.settings, wait=options.wait_for_store, role="rank")
    try:
        ranks = list(options.ranks or ())
        members = [_member(options, store, rank, None) for rank in options.ranks or [None]]
        runners: list[Runner] = []
        hosts: dict[int, EngineHost] = {}

        def state() -> ProcessState:
            return ProcessState(
                kind="runner",
                namespace=options.namespace,
                pid=os.getpid(),
                instance=options.instance,
                ranks={rank: member.incarnation for rank, member in zip(ranks, members, strict=False)},
                spare="" if ranks else members[0].incarnation,
                heartbeat=options.settings.heartbeat,
            )

        async with keeping_state(options.state_file, state), supervised(_work(options, members, runners)):
            if not ranks:
                anyone = members[0]
                ranks.append(await anyone.claim(spare=options.spare, wait_for_store=options.wait_for_store))
                hosts = {ranks[0]: await _started(options, anyone, ranks[0])}
                # Under the same name it is claimed once more, by a member that has this rank and no other.
                members[0] = _member(options, store, ranks[0], anyone.incarnation)
            runners += [
                Runner(member, hosts.get(rank) or options.engine.host(rank, options.world_size), spare=options.spare)
                for rank, member in zip(ranks, members, strict=True)
            ]
            await run_all(runners, interrupts, wait_for_store=options.wait_for_store)
    except EngineFailure as failure:
        raise EngineUnfit(str(failure)) from failure
    finally:
        await store.close()
    return 0


async def _started(options: RunnerOptions, member: Member, rank: int) -> EngineHost:
    """The engine of a rank that was claimed before it was known which: the claim is kept while it starts, which may take long.

    Raises:
        EngineFailure: permanent; the rank is given back.
    """
    host = options.engine.host(rank, options.world_size)
    try:
        async with member.heartbeat():
            await host.start()
    except BaseException as failure:
        if isinstance(failure, EngineFailure) and not failure.permanent:
            return host  # the runner tries again in each attempt
        await asyncio.shield(host.shut_down())
        await asyncio.shield(member.leave())
        raise
    return host


def _work(options: RunnerOptions, members: list[Member], runners: list[Runner]) -> Work:
    """What the service manager is told: that every rank is held, its status, and that its heartbeats go on."""
    return Work(
        ready=lambda: all(member.trusted or member.waits for member in members),
        status=lambda: (
            ", ".join(
                f"{options.instance} rank {member.report_now.rank}: {runner.status.kind}"
                for member, runner in zip(members, runners, strict=False)
                if not member.waits
            )
            or f"{options.instance}: waits as a spare"
        ),
        tried=lambda: {f"rank {member.report_now.rank}'s heartbeat": member.beats for member in members},
        patience=2 * options.settings.lease,  # a store that does not answer makes a heartbeat wait for several commands
    )


def _member(options: RunnerOptions, store: Store, rank: int | None, incarnation: str | None) -> Member:
    return Member(
        store,
        options.instance,
        rank=rank,
        world_size=options.world_size,
        namespace=options.namespace,
        node=options.node,
        address=options.address,
        incarnation=incarnation,
    )


async def run_all(runners: list[Runner], interrupts: Interrupts, *, wait_for_store: float = 0.0) -> None:
    """Run several ranks until all have ended. The first one that fails ends the others, and its error is raised."""

    def stop() -> None:
        for runner in runners:
            runner.stop()

    tasks = [
        supervise.background(
            runner.run(wait_for_store=wait_for_store),
            f"runner {place}",
            on_mistake=lambda _: stop(),
            expected=(RankgateError, EngineFailure),
        )
        for place, runner in enumerate(runners)
    ]

    interrupts.on_first(stop)
    # A rank ends in a bounded time. A further signal does not wait for that: it cancels the rank, and the engine is killed.
    interrupts.on_again(lambda: [task.cancel() for task in tasks])
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        stop()
        ends = [end for end in await supervise.ends_of(*tasks) if isinstance(end, BaseException)]
    errors = [end for end in ends if isinstance(end, (RankgateError, EngineFailure))]
    for error in errors[1:]:  # the first one is raised below
        logger.error("{}", error)
    for end in (*errors, *ends):
        if isinstance(end, Exception) or interrupts.received is None:  # after a signal, a cancellation is no error
            raise end

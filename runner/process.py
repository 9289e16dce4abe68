"""The life of a runner's process. It claims its rank, serves until it is asked to end, tears down, and gives the rank back.

`runner.runner.Runner` does the serving. A mistake of ours in any part ends the whole process, with an error that names the part. A rank
that another process took over writes nothing more.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from barrier import ClaimLost, Member, PartFailed, RankgateError, StoreError, supervise
from barrier.log import logger
from runner.engine import EngineFailure
from runner.host import EngineHost

__all__ = ["EXPECTED", "RunnerProcess"]


EXPECTED = (RankgateError, EngineFailure)
"""Errors that may end a part of a runner and are no mistake of ours."""


class RunnerProcess(ABC):
    """One process that holds one rank.

    Args:
        member: this rank's side of the barrier.
        host: the engine, behind a host that can kill it.
        spare: whether to wait for as long as another process holds the rank; see `barrier.Member.claim`.
    """

    def __init__(self, member: Member, host: EngineHost, *, spare: bool) -> None:
        self._member = member
        self._host = host
        self._spare = spare
        self._leaving = asyncio.Event()
        self._lost: ClaimLost | PartFailed | None = None

    @abstractmethod
    async def _serve(self) -> None:
        """Do what the task log says, for ever; raises `_lost` once that is set."""

    @abstractmethod
    async def _tear_down(self) -> None:
        """Stop all work, and close the engine."""

    @abstractmethod
    async def _stop_work(self) -> None:
        """Stop all work. What happens to the engine is the caller's decision."""

    @abstractmethod
    async def _say_failed(self, failure: EngineFailure) -> None:
        """Say that this rank has failed, and give the engine up."""

    def stop(self) -> None:
        """Ask `run` to tear down and return; safe from a signal handler of the event loop."""
        if not self._leaving.is_set():
            logger.info("instance {}: asked to end; closes the engine and gives the rank back", self._member.keys.group)
        self._leaving.set()

    async def run(self, *, wait_for_store: float = 0.0) -> None:
        """Claim the rank and serve until a Shutdown task or `stop`; then tear down and give the rank back.

        It makes the engine first, which checks the factory and the configuration. So a runner that could never serve claims no rank.

        Args:
            wait_for_store: seconds to wait for a store that cannot be reached at the start, if the failure may pass.

        Raises:
            EngineFailure: permanent: there is no such engine, or it refuses its configuration.
            RankTaken: another process holds the rank.
            ClaimLost: another process took the rank over while this one was silent; the engine is torn down.
            PartFailed: a mistake of ours ended a part of this runner, or its heartbeat (`HeartbeatFailed`). The runner has reported
                that it failed, if it could, and its engine is torn down.
            StoreError: the store could not be reached at the start. The runner waits for the end of later outages.
        """
        with self._member.about.applied():
            try:
                await self._run(wait_for_store)
            finally:
                self._leaving.set()  # `stop` logs nothing for a runner that has ended

    async def _run(self, wait_for_store: float) -> None:
        try:
            await self._until_leaving(self._start_engine())
            await self._until_leaving(self._member.claim(spare=self._spare, wait_for_store=wait_for_store))
        except BaseException:
            await asyncio.shield(self._host.shut_down())
            raise
        if self._leaving.is_set():
            await self._clean_up()
            return
        logger.info(
            "instance {}: this is rank {} ({})", self._member.keys.group, self._member.rank, self._member.incarnation
        )
        try:
            async with self._member.heartbeat():
                await self._tell_whether_wanted()
                await self._until_leaving(self._serve())
                if isinstance(self._lost, PartFailed):
                    raise self._lost
                await self._tear_down()
        except (ClaimLost, StoreError):
            raise
        except PartFailed as failure:
            self._lost = failure
            await self._say_last_words()
        except Exception as mistake:  # noqa: BLE001  `run` raises a `PartFailed` for it
            supervise.tell_mistake(f"rank {self._member.rank}", mistake)
            self._end_for("serving")(mistake)
            await self._say_last_words()
        finally:
            await asyncio.shield(self._clean_up())
        if self._lost is not None:
            raise self._lost

    async def _tell_whether_wanted(self) -> None:
        """Log it at once if there is nothing to do for this rank: otherwise nobody would know why it waits."""
        rank = self._member.rank
        try:
            size = await self._member.group_size()
        except StoreError:  # the heartbeats log it
            return
        if size is None:
            logger.info(
                "rank {}: no attempt of {} was ever opened; it waits for rankgate launch", rank, self._member.keys.group
            )
        elif rank >= size:
            logger.warning(
                "rank {}: the last attempt of {} had {} ranks, 0 to {}: this one is surplus until an attempt has more",
                *(rank, self._member.keys.group, size, size - 1),
            )

    async def _until_leaving(self, doing: Coroutine[Any, Any, object]) -> None:
        """Run `doing` until it ends or `stop` is called; raises what it raised."""
        async with (
            supervise.alongside(doing, expected=EXPECTED) as working,
            supervise.alongside(self._leaving.wait()) as leaving,
        ):
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()

    async def _start_engine(self) -> None:
        try:
            await self._host.start()
        except EngineFailure as failure:
            if failure.permanent:
                raise
            logger.warning("the engine could not be started yet: {}", failure)

    async def _clean_up(self) -> None:
        """Stop work, end the engine, give the rank back; a failure of one does not stop the others. It takes a limited time: it kills an
        engine that does not close, and does not wait for a store that does not answer.
        """
        steps = [self._stop_work, self._host.shut_down, self._member.leave]
        if isinstance(self._lost, PartFailed):
            steps.pop()  # the report of the failure must stay until the planner has read it; its lease ends it
        for step in steps:
            try:
                await step()
            except StoreError as error:
                logger.warning("the rank was not given back, but its lease will lapse: {}", error)
            except Exception as mistake:  # noqa: BLE001  whatever the mistake is, the engine must go
                supervise.tell_mistake(f"rank {self._member.report_now.rank}, tidying up", mistake)

    def _end_for(self, part: str) -> Callable[[BaseException], None]:
        """Make what a mistake of ours in a part calls: it ends the runner, and `run` raises a `PartFailed` for the first mistake."""

        def end(mistake: BaseException) -> None:
            self._lost = self._lost or PartFailed(
                f"instance {self._member.keys.group}, rank {self._member.report_now.rank}: a mistake of ours ended {part} "
                f"({supervise.described(mistake)}), and so this runner. Start it again, and report what its log says"
            )
            self._leaving.set()

        return end

    async def _say_last_words(self) -> None:
        """Report that this rank has failed, if that still works: then the others need not wait until its lease is over."""
        try:
            await self._say_failed(EngineFailure(str(self._lost)))
        except Exception as mistake:  # noqa: BLE001  most likely the same mistake again
            supervise.tell_mistake(f"rank {self._member.report_now.rank}, saying that it failed", mistake)

    def _part(self, doing: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Begin a part of this runner that nobody awaits."""
        with logger.contextualize(task=None):  # the part may outlive the task during which it began
            return supervise.background(
                doing, f"{name} of rank {self._member.report_now.rank}", on_mistake=self._end_for(name)
            )

    async def _survive(self, send: Callable[[], Awaitable[None]]) -> bool:
        """Send; returns whether the store took it."""
        try:
            await send()
        except StoreError as error:
            logger.warning("rank {}: not reported yet: {}", self._member.report_now.rank, error)
            return False
        except ClaimLost as error:
            self._lost = error
            self._leaving.set()
            return False
        return True

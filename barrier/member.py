"""The barrier as one rank uses it: claim the rank, report, read the task log, promise.

This module and its parts send, read and wait; `barrier.protocol.rank_state` decides. A rank sends plain commands only,
one MULTI for each report, so its user in the store needs no right to run scripts.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from math import inf

from redis.asyncio import Redis

from barrier import supervise
from barrier.claim import Claims, Wanted
from barrier.clock import Clock, SystemClock
from barrier.errors import ClaimLost, HeartbeatFailed, InvalidName, PartFailed, StoreError
from barrier.life import Life
from barrier.log import LogContext, logger
from barrier.protocol.ids import EpochId, new_incarnation
from barrier.protocol.log import LogEntry, TaskEntry, describe
from barrier.protocol.names import MAX_WORLD_SIZE, valid_digest, valid_status, valid_world_size
from barrier.protocol.rank_state import Promised, PromiseOutcome
from barrier.protocol.record import endpoint_fields, promise_fields, read_endpoints, read_for_promise, read_number
from barrier.protocol.report import Report, TaskOutcome
from barrier.reporter import Reporter
from barrier.settings import Settings
from barrier.spares import Spare
from barrier.store.connect import adopt
from barrier.store.keys import Keys
from barrier.store.report_frames import Event, append
from barrier.store.store import Store
from barrier.task_log import TaskLog

__all__ = ["Member"]


_trace = logger.opt(lazy=True).trace


class Member:
    """One rank of a group, in one life of its process.

    Args:
        redis: a store from `barrier.connect`, or your own ``redis.asyncio.Redis``; see `barrier.Barrier`.
        group: the group's name.
        rank: the rank, or ``None`` to claim any free one below `world_size`.
        world_size: number of ranks, if this rank was configured with one.
        digest: digest of the spec that this rank was configured for; empty if it has none.
        namespace: keeps several clusters on one store apart.
        settings: the times. A store has its own: then these are ignored.
        node: name of the machine, for people; by default the host name.
        address: host name or IP address under which the other ranks reach this machine; by default the one from which this
            process reaches the store.
        clock: time, for tests.
        incarnation: this life's name, for tests.

    Raises:
        InvalidName: a name, the rank or the world size may not be used.
    """

    def __init__(
        self,
        redis: Redis | Store,
        group: str,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        digest: str = "",
        namespace: str = "rankgate",
        settings: Settings | None = None,
        node: str | None = None,
        address: str = "",
        clock: Clock | None = None,
        incarnation: str | None = None,
    ) -> None:
        self.keys: Keys = Keys(namespace, group)
        self.world_size: int | None = None if world_size is None else valid_world_size(world_size)
        if rank is None and world_size is None:
            raise InvalidName(
                "neither rank nor world_size is given: pass this process's rank, or a world_size to claim a free rank"
            )
        if rank is not None and not 0 <= rank < (world_size or MAX_WORLD_SIZE):
            raise InvalidName(f"rank is {rank}; it must be from 0 to {(world_size or MAX_WORLD_SIZE) - 1}")
        self.store: Store = adopt(redis, settings=settings)
        self.settings: Settings = self.store.settings
        self.clock: Clock = clock or SystemClock()
        self.incarnation: str = incarnation or new_incarnation(time.time_ns() // 1_000_000)
        self.about: LogContext = LogContext(self.keys.group, rank)
        """The context of this rank's log lines."""
        self._owns_store = redis is not self.store
        self._address = address
        self._wanted_rank = rank
        who = Report(
            rank=0,
            incarnation=self.incarnation,
            status="Idle",
            digest=valid_digest(digest),
            node=socket.gethostname() if node is None else node,
            pid=os.getpid(),
            world_size=world_size,
            lease_ms=round(self.settings.lease * 1000),
        )
        self._life = Life(who, self.clock.now())
        self._claims = Claims(self.store, self.keys, self.clock, self.incarnation)
        self._log = TaskLog(self.store, self.keys, self.clock, self._life)
        self._reporter = Reporter(self.store, self.keys, self.clock, self._life, self._log.offer)
        self._write = self._reporter.write
        self._beats = 0
        self._failed: HeartbeatFailed | None = None

    @property
    def rank(self) -> int:
        """The claimed rank; raises `RankTaken` before `claim`."""
        return self._life.rank

    @property
    def promised(self) -> EpochId | None:
        """The epoch that this rank has promised and not retired from."""
        return self._life.state.promised

    @property
    def report_now(self) -> Report:
        """What this rank last said, or is about to say."""
        return self._life.report

    @property
    def trusted(self) -> bool:
        """Whether this rank may accept tasks: the store has acknowledged a recent renewal of its lease."""
        return self._failed is None and self.clock.now() - self._reporter.renewed_at < self.settings.distrust_after

    @property
    def beats(self) -> int:
        """How many heartbeats were tried, answered or not. A watchdog sees by it that the heartbeats go on."""
        return self._beats + self._claims.tries

    @property
    def waits(self) -> bool:
        """Whether it waits as a spare for a rank that others hold."""
        return self._claims.waits

    # --- claiming -----------------------------------------------------------------------------------------------------

    async def claim(
        self,
        *,
        timeout: float | None = None,  # noqa: ASYNC109  by the injected clock
        spare: bool = False,
        wait_for_store: float = 0.0,
    ) -> int:
        """Become the one incarnation that holds the rank, or any free one; then send a first report.

        If others hold the rank, the log says at once who.

        Args:
            timeout: seconds to wait for a rank that another incarnation holds (a predecessor's claim lapses within one
                lease); ``None`` waits for two leases.
            spare: wait without an end, also through outages of the store, and be shown meanwhile (`barrier.spares`);
                `timeout` is ignored then.
            wait_for_store: for how many seconds to ask the store again after a failure that may pass
                (`StoreError.passes`).

        Raises:
            RankTaken: another incarnation keeps holding it.
            StoreError: could not find out.
        """
        report, seconds = self.report_now, 2 * self.settings.lease if timeout is None else timeout
        wanted = Wanted(
            ranks=range(self.world_size or 0) if self._wanted_rank is None else (self._wanted_rank,),
            seconds=inf if spare else seconds,
            store_seconds=wait_for_store,
            spare=Spare(self.incarnation, report.node, report.pid, self._wanted_rank, 0) if spare else None,
        )
        await self._claims.obtain(wanted, self._begin)
        return self.rank

    async def _begin(self, rank: int) -> None:
        """Read the log from its end on, and send the first report."""
        self._life.begin(rank)
        self.about.rank = rank
        await self._log.begin_at_end()
        await self._write()

    async def group_size(self) -> int | None:
        """How many ranks the last attempt of the group had; ``None`` if none was ever opened.

        Raises:
            StoreError: could not find out.
        """
        with self.store.errors():
            (found,) = await self.store.commands.hmget(self.keys.epoch, "world_size")
        return read_number(found)

    async def leave(self) -> None:
        """Give the rank back: delete the report and the claim, so nobody has to wait for the lease. Safe to call twice."""
        async with self._reporter.turn:
            if not self._life.claimed or self._reporter.replaced is not None:
                return
            await self._claims.drop(self.rank, self._reporter.frames().farewell(self.report_now))
            self._life.end()  # only now, so a call that failed can be repeated

    # --- reporting ----------------------------------------------------------------------------------------------------

    async def report(
        self,
        status: str | None = None,
        *,
        progress: tuple[int, int] | None = None,
        error: str = "",
        permanent: bool = False,
        outcome: TaskOutcome | None = None,
        events: Sequence[Event] = (),
        endpoint: str | None = None,
    ) -> None:
        """Send the whole state, in one round trip. A changed status wakes the planner.

        Args:
            status: the new status; ``None`` leaves it.
            progress: (done, total) of the work in progress.
            error: what failed.
            permanent: whether trying again cannot mend that failure.
            outcome: what became of a task; replaces an earlier one of the same task.
            events: history, appended in the same step, in this order.
            endpoint: ``host:port`` at which this rank's engine waits for the others in this epoch; ``None`` leaves it.

        Raises:
            InvalidName: that is no endpoint; nothing was written.
            ClaimLost: another incarnation holds the rank; if this was known before, nothing was written.
            StoreError: the result is unknown. The next heartbeat sends the whole state again.
        """
        said = self._life.said.then(
            status, progress=progress, error=error, permanent=permanent, outcome=outcome, endpoint=endpoint
        )
        self._life.say(said, self.clock.now())
        alarm = bool(error) or (outcome is not None and outcome.result in ("rejected", "failed"))
        self._reporter.add(events, alarm=alarm)
        await self._write(look=status is None)

    def note_progress(self, done: int, total: int) -> None:
        """Remember how far the work in progress is; the next heartbeat reports it. Costs no round trip.

        The same numbers again are a sign of life, too: the work goes on, but no further part of it is done yet.
        """
        said = self._life.said
        self._life.said = said._replace(progress=(done, total), signs=said.signs + 1)

    @asynccontextmanager
    async def heartbeat(self) -> AsyncGenerator[None]:
        """Rewrite the whole report every `Settings.heartbeat` seconds while inside.

        If the store does not answer, the heartbeat tries again with backoff and raises nothing. `ClaimLost` is raised
        by `tasks`.

        Raises:
            HeartbeatFailed: a mistake of ours ended the heartbeat. This cancels the block, as a timeout does, and ends
                `tasks`. From then on this rank is not `trusted` and promises nothing. It can still `report` that it
                has failed.
        """
        inside = asyncio.current_task()
        asked = inside.cancelling() if inside is not None else 0
        left = cancelled = False

        def failed(mistake: BaseException) -> None:
            nonlocal cancelled
            self._failed = HeartbeatFailed(
                f"group {self.keys.group}, rank {self.report_now.rank}: a mistake of ours ended the heartbeat ({supervise.described(mistake)}); "
                "this rank accepts nothing any more. Start its process again, and report what its log says"
            )
            self._log.offer(self._failed)
            if inside is not None and not left:
                cancelled = inside.cancel()

        with self.about.applied():
            beating = supervise.background(self._beat(), f"heartbeat of rank {self.report_now.rank}", on_mistake=failed)
        try:
            try:
                yield
            finally:
                left = True
                await supervise.end(beating)
        except BaseException as error:
            by_others = cancelled and inside is not None and inside.uncancel() > asked
            ours = isinstance(error, asyncio.CancelledError) and cancelled and not by_others
            if self._failed is not None and (ours or isinstance(error, HeartbeatFailed)):
                raise self._failed from None
            raise
        else:
            if cancelled and inside is not None:  # the block has caught the cancellation
                inside.uncancel()

    async def _beat(self) -> None:
        failures = 0
        while True:
            pause = self.settings.heartbeat
            if failures:
                # Try again sooner than after a heartbeat, but not all ranks at the same instant.
                pause = min(pause, self.settings.command_seconds) * random.uniform(0.5, 1.0)  # noqa: S311  no secret
            await self.clock.sleep(pause)
            self._beats += 1
            try:
                await self._write()
            except StoreError as error:
                if not failures:
                    logger.warning("rank {}: heartbeat failed: {}", self.report_now.rank, error)
                failures += 1
            except ClaimLost:
                return
            else:
                if failures:
                    logger.info("rank {}: heartbeat is back after {} failures", self.report_now.rank, failures)
                failures = 0

    # --- the task log -------------------------------------------------------------------------------------------------

    async def tasks(self) -> AsyncGenerator[LogEntry, None]:
        """All that is announced to this group, in the log's order, from the moment of `claim` on.

        This yields tasks of any epoch: the reader judges them. If the lease may have lapsed, it is renewed, and the
        epoch is read again, before a task is yielded.

        Raises:
            ClaimLost: another incarnation holds the rank now.
            HeartbeatFailed: see `heartbeat`.
            PartFailed: a mistake of ours ended the reading of the log.
        """
        name = f"task log of rank {self.report_now.rank}"
        reading = supervise.background(self._log.follow(), name, on_mistake=self._end_log)
        try:
            while True:
                self._reporter.refuse_if_replaced()
                self._refuse_if_failed()
                entry = await self._log.next()
                if isinstance(entry, TaskEntry):
                    await self._make_sure()
                    self._life.state, task = self._life.state.take(entry)
                    if task is None:
                        continue
                    entry = task
                _trace("log entry: {}", partial(describe, entry))
                yield entry
        finally:
            await supervise.end(reading)

    def _end_log(self, mistake: BaseException) -> None:
        failure = PartFailed(
            f"group {self.keys.group}, rank {self.report_now.rank}: a mistake of ours ended the reading of the task log "
            f"({supervise.described(mistake)}). Start its process again, and report what its log says"
        )
        self._log.end(failure)

    def _refuse_if_failed(self) -> None:
        """Raise if a part of this rank has failed: then it accepts nothing."""
        if self._failed is not None:
            raise self._failed

    async def _make_sure(self) -> None:
        """Renew and re-read until the lease is trusted again; only then may a task be judged."""
        while not self.trusted:
            self._refuse_if_failed()
            try:
                await self._write()
            except StoreError:
                await self.clock.sleep(self.settings.command_seconds)

    # --- promises -----------------------------------------------------------------------------------------------------

    async def promise(self, epoch: EpochId, *, status: str | None = None) -> PromiseOutcome:
        """Promise to act in exactly this epoch. Tear the engine down before, and `retire` from the epoch before.

        This reads the record anew. The record must be this epoch's, without a verdict, and its roster must name this
        incarnation. The epoch's number must be above every promise before.

        Args:
            epoch: the epoch, as it was announced.
            status: the rank's status from the promise on; ``None`` leaves the status as it is.

        Raises:
            StoreError: unknown; nothing is promised.
            HeartbeatFailed: see `heartbeat`.
        """
        self._refuse_if_failed()
        state, rank = self._life.state, self.rank
        refused = state.refuses_any()
        if refused is not None:
            return refused
        with self.store.errors():
            found = await self.store.commands.hmget(self.keys.epoch, *promise_fields(rank))
        seen = read_for_promise(found, rank)
        self._life.state, outcome = self._life.state.promise(epoch, seen, rank)
        if isinstance(outcome, Promised):
            said = self._life.said
            self._life.said = said._replace(status=said.status if status is None else valid_status(status), outcomes=())
            self.about.attempt = None if seen is None else seen.ordinal
        return outcome

    def retire(self) -> None:
        """Spend the promise for good; its number stays as a floor. Tear down first. Safe to call twice."""
        self._life.state = self._life.state.retire()
        self._life.said = self._life.said._replace(endpoint="")
        self.about.attempt = None

    # --- meeting the other ranks --------------------------------------------------------------------------------------

    async def address(self) -> str:
        """The host name or IP address under which the other ranks reach this machine.

        Raises:
            StoreError: no address was given, and the store cannot be reached to find it out.
        """
        if not self._address:
            self._address = await self.store.local_address()
        return self._address

    async def endpoints(self, world_size: int) -> tuple[str, ...] | None:
        """Where each rank's engine waits for the others in the promised epoch, in rank order; empty for a rank that has no endpoint.

        The record has them after a step was dispatched with ``endpoints=True``; see `barrier.Barrier.dispatch`.
        ``None`` if the record is of another epoch or has them for another number of ranks: the store went back, or
        forgot.

        Raises:
            StoreError: could not find out.
        """
        with self.store.errors():
            found = await self.store.commands.hmget(self.keys.epoch, *endpoint_fields(world_size))
        return read_endpoints(found, self.promised, world_size)

    # --- answers ------------------------------------------------------------------------------------------------------

    async def write_output(self, task_id: str, chunks: Iterable[bytes]) -> None:
        """Append pieces of one task's answer to its stream, in one round trip."""
        key = self.keys.out(task_id)
        appended = [append(key, ("chunk", chunk), self.settings.event_entries) for chunk in chunks]
        await self.store.append_answer(key, [*appended, ("PEXPIRE", key, round(self.settings.output_lifetime * 1000))])

    async def close(self) -> None:
        """Close what this member opened. Does not give the rank back; see `leave`."""
        if self._owns_store:
            await self.store.close()

"""A rank that does what the test says."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

from redis.asyncio import Redis

from barrier.clock import Clock
from barrier.member import Member
from barrier.protocol.ids import EpochId
from barrier.protocol.log import EpochAnnounced, LogEntry, TaskEntry
from barrier.protocol.rank_state import NotPromised, Promised
from barrier.protocol.report import TaskOutcome
from barrier.settings import Settings
from barrier.store.store import Store
from barrier.testing.fake_store import FakeStore

__all__ = ["ScriptedRank", "scripted_ranks"]


_lives = itertools.count(1)


class ScriptedRank:
    """One rank in a test, without an engine. It does only what the test says::

        async with ScriptedRank(store, "demo", 0) as rank:   # claims the rank
            await rank.arrive("Connected")                    # promises the open epoch if need be, and reports

    It renews its lease with every report, and otherwise only inside `heartbeat`.

    Args:
        redis: a `FakeStore`, whose clock is then used and whose client is called ``rank <r>``, or a client, or a store.
        group: the group's name.
        rank: which rank.
        world_size: number of ranks, if this rank is configured with one.
        digest: digest of the spec that it is configured for.
        namespace: as the barrier's.
        settings: as the barrier's.
        clock: as the barrier's.
        node: name of its machine.
    """

    def __init__(
        self,
        redis: FakeStore | Redis | Store,
        group: str,
        rank: int,
        *,
        world_size: int | None = None,
        digest: str = "",
        namespace: str = "rankgate",
        settings: Settings | None = None,
        clock: Clock | None = None,
        node: str | None = None,
    ) -> None:
        if isinstance(redis, FakeStore):
            clock = clock or redis.clock
            redis = redis.client(f"rank {rank}")
        self._redis = redis
        self._options: dict[str, Any] = {
            "rank": rank,
            "world_size": world_size,
            "digest": digest,
            "namespace": namespace,
            "settings": settings,
            "clock": clock,
            "node": f"node-{rank}" if node is None else node,
        }
        self._group = group
        self._log: AsyncIterator[LogEntry] | None = None
        self.member: Member = self._new_member()

    def _new_member(self) -> Member:
        # Lives must sort after one another, and two of them may begin within one millisecond of a test.
        life = next(_lives)
        return Member(self._redis, self._group, incarnation=f"{life:012x}{life:016x}", **self._options)

    @property
    def rank(self) -> int:
        """Which rank it is."""
        return self.member.rank

    @property
    def incarnation(self) -> str:
        """Its present life."""
        return self.member.incarnation

    async def __aenter__(self) -> ScriptedRank:
        """Claim the rank and report Idle."""
        await self.join()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Give the rank back if the store lets it, and close."""
        await self.close()

    async def join(self) -> ScriptedRank:
        """Claim the rank and report Idle."""
        await self.member.claim()
        return self

    async def promise(self, epoch: EpochId | None = None) -> EpochId:
        """Promise an epoch (by default the current one), and report it with the present status.

        Raises:
            AssertionError: the promise was refused; use ``member.promise`` to test refusals.
        """
        wanted = await self._current() if epoch is None else epoch
        match await self.member.promise(wanted):
            case Promised():
                await self.member.report()
                return wanted
            case NotPromised(reason):
                raise AssertionError(f"rank {self.rank} could not promise epoch {wanted}: {reason}")

    async def arrive(self, status: str, *, epoch: EpochId | None = None) -> None:
        """Report a status in the epoch, promising it first if this rank has promised none."""
        if self.member.promised is None:
            await self.promise(epoch)
        await self.member.report(status)

    async def report(
        self,
        status: str | None = None,
        *,
        progress: tuple[int, int] | None = None,
        error: str = "",
        permanent: bool = False,
        outcome: TaskOutcome | None = None,
    ) -> None:
        """Report exactly this, as `Member.report` does."""
        await self.member.report(status, progress=progress, error=error, permanent=permanent, outcome=outcome)

    async def fail(self, error: str, *, permanent: bool = False, status: str = "Failed") -> None:
        """Report a failure."""
        await self.member.report(status, error=error, permanent=permanent)

    async def beat(self) -> None:
        """Renew the lease once, as one heartbeat does."""
        await self.member.report(progress=self.member.report_now.progress, error=self.member.report_now.error)

    def heartbeat(self) -> AbstractAsyncContextManager[None]:
        """Renew the lease regularly while inside."""
        return self.member.heartbeat()

    async def retire(self, status: str = "Idle") -> None:
        """Spend the promise and report."""
        self.member.retire()
        await self.member.report(status)

    async def restart(self, *, give_back: bool = True) -> None:
        """Become a new, later life of this rank.

        Args:
            give_back: whether the old life gives the rank back; otherwise it vanishes, and the new one waits for its
                claim to lapse.
        """
        await self._stop_reading()
        if give_back:
            await self.member.leave()
        await self.member.close()
        self.member = self._new_member()
        await self.join()

    async def next_entry(self) -> LogEntry:
        """The next entry of the task log, waiting for it; the first call begins to read."""
        if self._log is None:
            self._log = self.member.tasks()
        return await anext(self._log)

    async def next_task(self) -> TaskEntry:
        """The next task, waiting for it; announcements of epochs are passed over.

        Raises:
            AssertionError: a verdict or garbage came first.
        """
        while True:
            match await self.next_entry():
                case TaskEntry() as task:
                    return task
                case EpochAnnounced():
                    continue
                case entry:
                    raise AssertionError(f"rank {self.rank} waited for a task and read {entry}")

    async def close(self) -> None:
        """Stop reading, give the rank back, and close."""
        await self._stop_reading()
        try:
            await self.member.leave()
        finally:
            await self.member.close()

    async def vanish(self) -> None:
        """Stop as a killed process does: the claim and the last report stay until the lease is over."""
        await self._stop_reading()
        await self.member.close()

    async def _stop_reading(self) -> None:
        log, self._log = self._log, None
        if isinstance(log, AsyncGenerator):
            await log.aclose()

    async def _current(self) -> EpochId:
        store = self.member.store
        with store.errors():
            number, nonce = await store.commands.hmget(self.member.keys.epoch, "number", "nonce")
        if number is None:
            raise AssertionError(f"group {self._group} has no epoch to promise: open one first")
        return EpochId.parse(f"{number.decode()}-{nonce.decode()}")


@asynccontextmanager
async def scripted_ranks(
    redis: FakeStore | Redis | Store,
    group: str,
    world_size: int,
    *,
    digest: str = "",
    namespace: str = "rankgate",
    settings: Settings | None = None,
    clock: Clock | None = None,
) -> AsyncGenerator[list[ScriptedRank]]:
    """All ranks of a group, claimed; they leave at the end. See `ScriptedRank`."""
    async with AsyncExitStack() as stack:
        ranks = [
            ScriptedRank(
                redis,
                group,
                rank,
                world_size=world_size,
                digest=digest,
                namespace=namespace,
                settings=settings,
                clock=clock,
            )
            for rank in range(world_size)
        ]
        for rank in ranks:
            await stack.enter_async_context(rank)
        yield ranks

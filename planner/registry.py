"""The desired state: which instances shall be up. It is in the store, so that any planner can take over."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from redis.exceptions import WatchError

from barrier.errors import RankgateError, StoreCorrupt
from barrier.log import logger
from barrier.protocol.names import shown
from barrier.protocol.wire import WIRE_VERSION, refusal_of
from barrier.store.keys import Keys, NamespaceKeys
from barrier.store.store import Store, is_spoiled
from planner.spec import InstanceSpec

__all__ = ["FORGET_AFTER", "InstanceRecord", "OtherSpec", "OtherVersion", "Registry"]


_MAX_CHANGES = 1_000
FORGET_AFTER = 3_600.0


class InstanceRecord(BaseModel):
    """One instance's desired state.

    Attributes:
        spec: what shall be up.
        desired: ``up``, ``down`` (somebody asked to stop it), or ``gone`` (it was stopped). An instance that is gone stays on record for
            `FORGET_AFTER` seconds, so that a planner can tell "stopped" from "the store forgot".
        launched_ms: when it was launched, by the store's clock, in milliseconds. It names this launch.
        failure: why it was given up; empty if it was not.
        gone_ms: when it was gone, by the store's clock, in milliseconds; 0 before.
        wire: the wire version of the record; see `barrier.protocol.wire`.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="ignore")

    spec: InstanceSpec
    desired: Literal["up", "down", "gone"] = "up"
    launched_ms: int = 0
    failure: str = ""
    gone_ms: int = 0
    wire: int = WIRE_VERSION


class _WireVersion(BaseModel):
    wire: int = WIRE_VERSION


class OtherVersion(StoreCorrupt):
    """An instance's desired state was written by another version of rankgate. It stays as it is."""


class OtherSpec(RankgateError):
    """An instance is launched, but it is up with another spec, and nobody has agreed to replace that spec.

    Attributes:
        record: the record of the instance that is up; it stays unchanged.
    """

    def __init__(self, record: InstanceRecord, wanted: InstanceSpec) -> None:
        self.record = record
        changes = "; ".join(f"{name} {old} -> {new}" for name, old, new in record.spec.changes_to(wanted))
        super().__init__(f"{record.spec.name} is up with another spec ({changes})")


class Registry:
    """Reads and writes desired state. Every write wakes the planners."""

    def __init__(self, store: Store, namespace: str) -> None:
        self._store = store
        self._namespace = namespace
        self.keys: NamespaceKeys = NamespaceKeys(namespace)
        self._lifetime_ms = round(store.settings.record_lifetime * 1000)

    async def launch(self, spec: InstanceSpec, *, over: Collection[InstanceSpec] | None = None) -> InstanceRecord:
        """Ask for an instance to be up. If it is up with the same digest, the attempt goes on, and only its times may change.

        Args:
            spec: what to bring up.
            over: the specs that this launch may replace; ``None``: any.

        Raises:
            OtherSpec: the instance is up with a spec that may not be replaced; nothing was written.
            OtherVersion: another version of rankgate wrote the record; nothing was written.
            StoreCorrupt: one of our keys has the wrong type; nothing was written.
            StoreError: unknown; ask again.
        """
        await self._refuse_wrong_types(spec.name)

        def begin(current: InstanceRecord | None, now_ms: int) -> InstanceRecord:
            if current is None:
                return InstanceRecord(spec=spec, launched_ms=now_ms)
            if current.desired == "up" and not current.failure and current.spec.digest == spec.digest:
                return current if current.spec == spec else current.model_copy(update={"spec": spec})
            if over is not None and current.desired == "up" and not current.failure and current.spec not in over:
                raise OtherSpec(current, spec)
            # Each launch needs a number of its own, also within one millisecond and after a clock that went back.
            return InstanceRecord(spec=spec, launched_ms=max(now_ms, current.launched_ms + 1))

        record = await self._change(spec.name, begin)
        if record is None:
            raise AssertionError("a launch always leaves a record")
        return record

    async def stop(self, record: InstanceRecord) -> bool:
        """Ask for an instance to be down, unless it was launched again meanwhile: then nothing of this launch is left to stop.

        Returns:
            Whether the record is still of this launch.
        """

        def take_down(current: InstanceRecord | None, _: int) -> InstanceRecord:
            found = current or record
            ours = found.launched_ms == record.launched_ms and found.desired == "up"
            return found.model_copy(update={"desired": "down"}) if ours else found

        stopped = await self._change(record.spec.name, take_down)
        return stopped is not None and stopped.launched_ms == record.launched_ms

    async def give_up(self, record: InstanceRecord, failure: str) -> None:
        """Note why an instance was given up, unless it was launched again meanwhile."""

        def fail(current: InstanceRecord | None, _: int) -> InstanceRecord | None:
            if current is None or current.launched_ms != record.launched_ms:
                return current
            return current.model_copy(update={"failure": failure})

        await self._change(record.spec.name, fail)

    async def carried_out(self, record: InstanceRecord) -> None:
        """Note that an instance is gone that was to be down, unless it was launched again meanwhile."""

        def bury(current: InstanceRecord | None, now_ms: int) -> InstanceRecord | None:
            if current is None or current.launched_ms != record.launched_ms or current.desired != "down":
                return current
            return current.model_copy(update={"desired": "gone", "gone_ms": now_ms})

        await self._change(record.spec.name, bury)

    async def heal(self, record: InstanceRecord) -> None:
        """If the store forgot an instance's desired state, write it back and tell the planners. Never overwrites a record."""
        with self._store.errors():
            async with self._store.commands.pipeline(transaction=True) as pipe:
                pipe.hsetnx(self.keys.instances, record.spec.name, record.model_dump_json())
                pipe.pexpire(self.keys.instances, self._lifetime_ms)
                written, _ = await pipe.execute()
            # A planner that started after the store forgot does not know the instance, and could not take over.
            if written:
                async with self._store.commands.pipeline(transaction=True) as pipe:
                    pipe.xadd(self.keys.changes, {"kind": "changed"}, maxlen=_MAX_CHANGES, approximate=True)
                    pipe.pexpire(self.keys.changes, self._lifetime_ms)
                    await pipe.execute()

    async def get(self, name: str) -> InstanceRecord | None:
        """One instance's desired state."""
        with self._store.errors():
            raw = await self._store.commands.hget(self.keys.instances, name)
        return None if raw is None else _decode(name, raw)

    async def all(self) -> dict[str, InstanceRecord]:
        """Every instance's desired state. Renews its lifetime in the store, and deletes instances that have long been gone."""
        with self._store.errors():
            async with self._store.commands.pipeline(transaction=True) as pipe:
                pipe.hgetall(self.keys.instances)
                pipe.pexpire(self.keys.instances, self._lifetime_ms)
                pipe.time()
                found, _, (seconds, _) = await pipe.execute()
        decoded = {raw_name.decode(): _decode(raw_name.decode(), raw) for raw_name, raw in found.items()}
        records = {name: record for name, record in decoded.items() if record is not None}
        old = [
            name
            for name, record in records.items()
            if record.desired == "gone" and record.gone_ms < (seconds - FORGET_AFTER) * 1000
        ]
        if old:
            with self._store.errors():
                await self._store.commands.hdel(self.keys.instances, *old)
        return {name: record for name, record in records.items() if name not in old}

    async def look(self) -> dict[str, InstanceRecord]:
        """Every instance's desired state. Only reads, so that a user without the right to write can look."""
        with self._store.errors():
            found: dict[bytes, bytes] = await self._store.commands.hgetall(self.keys.instances)
        decoded = {raw_name.decode(): _decode(raw_name.decode(), raw) for raw_name, raw in found.items()}
        return {name: record for name, record in decoded.items() if record is not None}

    async def _now_ms(self) -> int:
        with self._store.errors():
            seconds, microseconds = await self._store.commands.time()
        return seconds * 1000 + microseconds // 1000

    async def changes_end(self) -> str:
        """The id of the newest change; wait for changes after it."""
        with self._store.errors():
            newest = await self._store.commands.xrevrange(self.keys.changes, count=1)
        return newest[0][0].decode() if newest else "0-0"

    async def _refuse_wrong_types(self, name: str) -> None:
        """Look at every key that a launch uses, before the first write."""
        group = Keys(self._namespace, name)
        for expected in (  # one transaction for each of the two slots
            {self.keys.instances: "hash", self.keys.changes: "stream"},
            {group.epoch: "hash", group.leader: "hash"} | dict.fromkeys((group.tasks, group.requests), "stream"),
        ):
            with self._store.errors():
                async with self._store.commands.pipeline(transaction=True) as pipe:
                    for key in expected:
                        pipe.type(key)
                    found: list[bytes] = await pipe.execute()
            for (key, kind), actual in zip(expected.items(), found, strict=True):
                if actual.decode() not in ("none", kind):
                    raise StoreCorrupt(
                        f"{key} holds a {actual.decode()} where a {kind} belongs; move or delete that key, then try again"
                    )

    async def _change(
        self, name: str, change: Callable[[InstanceRecord | None, int], InstanceRecord | None]
    ) -> InstanceRecord | None:
        """Replace an instance's record by the result of `change`, and wake the planners if it differs.

        WATCH covers the time from reading to writing, so two writers do not overwrite one another.

        Args:
            name: the instance.
            change: gets the current record and the store's time in milliseconds; returns the same record to leave it unchanged.

        Raises:
            OtherVersion: the current record has another version.
        """
        while True:
            now_ms = await self._now_ms()
            with self._store.errors():
                async with self._store.commands.pipeline(transaction=True) as pipe:
                    await pipe.watch(self.keys.instances)
                    raw = await pipe.hget(self.keys.instances, name)
                    current = None if raw is None else _decode(name, raw, change=True)
                    changed = change(current, now_ms)
                    if changed is current or changed is None:
                        return changed
                    pipe.multi()
                    pipe.hset(self.keys.instances, name, changed.model_dump_json())
                    pipe.pexpire(self.keys.instances, self._lifetime_ms)
                    pipe.xadd(self.keys.changes, {"kind": "changed"}, maxlen=_MAX_CHANGES, approximate=True)
                    pipe.pexpire(self.keys.changes, self._lifetime_ms)
                    try:
                        await pipe.execute()
                    except WatchError:
                        continue  # somebody else wrote first; look again
            await self._wake_group(name)
            return changed

    async def _wake_group(self, name: str) -> None:
        """Send the group's wake-up separately: the group's keys are in another slot."""
        signals = Keys(self._namespace, name).signals
        hint = [
            ("XADD", signals, "MAXLEN", "~", self._store.settings.signal_entries, "*", "kind", "desired"),
            ("PEXPIRE", signals, self._lifetime_ms),
        ]
        with self._store.errors():
            said = await self._store.transact(hint, may_fail=range(2))
        if any(map(is_spoiled, said)):
            await self._store.append_if_possible(signals, hint)


def _decode(name: str, raw: bytes, *, change: bool = False) -> InstanceRecord | None:
    """Read a record. If it cannot be read, log that and return ``None``; raise `OtherVersion` if a record of another version is to change."""
    try:
        refusal = refusal_of(_WireVersion.model_validate_json(raw).wire)
        if not refusal:
            return InstanceRecord.model_validate_json(raw)
    except ValidationError:
        logger.error("the desired state of instance {} is not readable; it is ignored", shown(name))
        return None
    if change:
        raise OtherVersion(f"the desired state of instance {shown(name)} {refusal}. It stays as it is")
    logger.error("the desired state of instance {} {}; it is ignored", shown(name), refusal)
    return None

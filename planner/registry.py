"""The desired state: which instances shall be up. It lives in the store, so that any planner can take over."""

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
        desired: ``up``, ``down`` (a stop was asked for), or ``gone`` (it was carried out). What is gone stays on record for
            `FORGET_AFTER` seconds, so that a planner can tell "stopped" from "the store forgot".
        launched_ms: when it was launched, by the store's clock, in milliseconds: which launch this is.
        failure: why it was given up; empty while it was not.
        gone_ms: when the stop was carried out, by the store's clock; 0 before.
        wire: the version in which it is written; see `barrier.protocol.wire`.
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


class OtherVersion(RankgateError):
    """An instance's desired state was written by another version of rankgate. It stays as it is."""


class OtherSpec(RankgateError):
    """An instance is up with another spec than the one that it is launched with, and nobody has agreed to replace that one.

    Attributes:
        record: what is up; it stays as it is.
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
        """Ask for an instance to be up. An instance that is up with the same spec stays as it is; how long it waits may change.

        Args:
            spec: what to bring up.
            over: the specs that may be replaced where the instance is up with one; ``None`` replaces any.

        Raises:
            OtherSpec: the instance is up with a spec that may not be replaced; nothing was written.
            OtherVersion: another version of rankgate has written what is wanted of the instance; nothing was written.
            StoreCorrupt: a key of the wrong type where one of ours belongs; nothing was written.
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
            # Which launch it is must differ from the one before, within a millisecond and after a clock that went back too.
            return InstanceRecord(spec=spec, launched_ms=max(now_ms, current.launched_ms + 1))

        record = await self._change(spec.name, begin)
        if record is None:
            raise AssertionError("a launch always leaves a record")
        return record

    async def stop(self, record: InstanceRecord) -> bool:
        """Ask for an instance to be down, unless it was launched anew meanwhile: then nothing of this launch is left to stop.

        Returns:
            Whether this launch is still the one on record.
        """

        def take_down(current: InstanceRecord | None, _: int) -> InstanceRecord:
            found = current or record
            ours = found.launched_ms == record.launched_ms and found.desired == "up"
            return found.model_copy(update={"desired": "down"}) if ours else found

        stopped = await self._change(record.spec.name, take_down)
        return stopped is not None and stopped.launched_ms == record.launched_ms

    async def give_up(self, record: InstanceRecord, failure: str) -> None:
        """Say why an instance was given up, unless it was launched anew meanwhile."""

        def fail(current: InstanceRecord | None, _: int) -> InstanceRecord | None:
            if current is None or current.launched_ms != record.launched_ms:
                return current
            return current.model_copy(update={"failure": failure})

        await self._change(record.spec.name, fail)

    async def carried_out(self, record: InstanceRecord) -> None:
        """Say that an instance that was to be down is gone, unless it was launched anew meanwhile."""

        def bury(current: InstanceRecord | None, now_ms: int) -> InstanceRecord | None:
            if current is None or current.launched_ms != record.launched_ms or current.desired != "down":
                return current
            return current.model_copy(update={"desired": "gone", "gone_ms": now_ms})

        await self._change(record.spec.name, bury)

    async def heal(self, record: InstanceRecord) -> None:
        """Write the desired state of an instance back if the store forgot it, and tell the planners; never over what it has."""
        with self._store.errors():
            async with self._store.commands.pipeline(transaction=True) as pipe:
                pipe.hsetnx(self.keys.instances, record.spec.name, record.model_dump_json())
                pipe.pexpire(self.keys.instances, self._lifetime_ms)
                written, _ = await pipe.execute()
            # A planner that began after the store forgot would not know the instance, and could not succeed its leader.
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
        """Every instance's desired state; keeps it alive in the store, and forgets what has long been gone."""
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
        """Every instance's desired state; writes nothing, so that somebody who may only read can look."""
        with self._store.errors():
            found: dict[bytes, bytes] = await self._store.commands.hgetall(self.keys.instances)
        decoded = {raw_name.decode(): _decode(raw_name.decode(), raw) for raw_name, raw in found.items()}
        return {name: record for name, record in decoded.items() if record is not None}

    async def _now_ms(self) -> int:
        with self._store.errors():
            seconds, microseconds = await self._store.commands.time()
        return seconds * 1000 + microseconds // 1000

    async def changes_end(self) -> str:
        """Where to wait for changes from."""
        with self._store.errors():
            newest = await self._store.commands.xrevrange(self.keys.changes, count=1)
        return newest[0][0].decode() if newest else "0-0"

    async def _refuse_wrong_types(self, name: str) -> None:
        """Look at every key that a launch leads to, before the first write."""
        group = Keys(self._namespace, name)
        for expected in (  # two slots
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
        """Make of an instance's record what `change` says, and wake the planners if that is something else.

        The record is watched from reading to writing: two who change it at once do not overwrite one another.

        Args:
            name: the instance.
            change: gets the record on file and the store's time in milliseconds; returns the same one to leave it as it is.

        Raises:
            OtherVersion: the record on file is of another version.
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
                        continue  # somebody else was quicker; look again
            await self._wake_group(name)
            return changed

    async def _wake_group(self, name: str) -> None:
        """The group lies in a slot of its own, so its hint goes apart."""
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
    """Read a record; one that cannot be read is told and passed over, unless one of another version is to be changed."""
    record: InstanceRecord | None = None
    try:
        version = _WireVersion.model_validate_json(raw).wire
        refusal = refusal_of(version)
        record = None if refusal else InstanceRecord.model_validate_json(raw)
    except ValidationError:
        refusal = "is not readable"
    if record is None:
        if change and refusal != "is not readable":
            raise OtherVersion(f"the desired state of instance {shown(name[:63])} {refusal}. It stays as it is")
        logger.error("the desired state of instance {!r} {}; it is ignored", name[:63], refusal)
    return record

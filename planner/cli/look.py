"""The commands that only look at a running server. They start quickly: this module imports nothing that only others need."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from barrier import Barrier, Settings, Snapshot, Store, StoreError, StoreRefused, SystemClock
from barrier.errors import RankgateError
from barrier.printable import printable
from barrier.protocol.names import shown
from barrier.protocol.report import Report
from barrier.spares import Spare, read_spares, read_surplus
from barrier.store.keys import Keys
from planner.cli.process import connect_store
from planner.cli.screen import Picture, attempt, heading, render, rows, table
from planner.cli.show import PlainShow, can_draw, people, tell
from planner.explain import explain_instance, is_serving
from planner.lifecycle import next_step
from planner.registry import InstanceRecord, Registry

__all__ = [
    "NOBODY_PLANS",
    "TICK",
    "Observer",
    "Seen",
    "Target",
    "UnknownInstance",
    "explain",
    "look_again",
    "news",
    "overview",
    "status",
    "unattended",
    "watch",
    "whole_overview",
]


TICK = 0.5
"""Seconds between two looks while nothing happens. A change leads to a look at once."""

NOBODY_PLANS = "no planner looks after it: start one with rankgate planner"
"""What people are told when an instance has no planner."""

_LEAST_PAUSE = 0.05  # seconds between two looks, so that many changes at once lead to one look


@dataclass(frozen=True, slots=True)
class Target:
    """The server, and the namespace on it."""

    url: str = field(repr=False)
    namespace: str
    settings: Settings
    wait: float = 0.0  # seconds for which to try again while the store cannot be used

    @asynccontextmanager
    async def store(self) -> AsyncGenerator[Store]:
        """A connected store; raises as `barrier.connect` does."""
        store = await connect_store(self.url, self.settings, wait=self.wait)
        try:
            yield store
        finally:
            await store.close()


class UnknownInstance(RankgateError):
    """There is no instance of that name."""


# --- looking --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """One instance as it is now.

    Attributes:
        name: the instance's name.
        record: the desired state; ``None`` if the store has only an epoch's record.
        snapshot: the barrier's picture.
        spares: the runners that wait for one of its ranks; empty if nobody looked for them.
        surplus: reports of ranks that the instance does not have; empty if nobody looked for them.
    """

    name: str
    record: InstanceRecord | None
    snapshot: Snapshot
    spares: tuple[Spare, ...] = ()
    surplus: tuple[Report, ...] = ()

    @property
    def planned(self) -> bool:
        """Whether a planner leads the instance now."""
        return self.snapshot.leader is not None and self.snapshot.leader_left_ms > 0

    @property
    def attended(self) -> bool:
        """Whether the instance has a planner or a live rank now."""
        return self.planned or any(view.report is not None for view in self.snapshot.ranks)

    @property
    def changing(self) -> bool:
        """Whether the attempt under way is of another spec than the one that was launched: the planner is about to end it."""
        epoch, record = self.snapshot.epoch, self.record
        if epoch is None or record is None:
            return False
        return epoch.verdict is None and epoch.digest != record.spec.digest

    @property
    def serving(self) -> bool:
        """Whether all ranks serve the spec that was launched."""
        return is_serving(self.snapshot) and not self.changing

    @property
    def state(self) -> str:
        """The state in a word or two, for a list."""
        epoch = self.snapshot.epoch
        if self.record is None or self.record.desired == "gone":
            return "stopped"
        if self.record.failure:
            return "given up"
        if self.record.desired == "down":
            return "stopping"
        if self.changing:
            return "changing"
        if self.serving:
            return "serving"
        if epoch is None:
            return "assembling"
        if epoch.verdict is not None:
            return "between attempts"
        step = next_step(epoch.steps, self.snapshot.world_size)
        return f"before {step.name}" if step else "warming up"

    @property
    def explanation(self) -> str:
        """One sentence that says what the instance waits for."""
        return self.said if self.planned or not self.wanted else f"{self.said}; {NOBODY_PLANS}"

    @property
    def said(self) -> str:
        """The same sentence, without a word about its planner."""
        if self.record is not None and self.record.failure:
            return self.record.failure
        epoch = self.snapshot.epoch
        if self.changing and epoch is not None:
            return f"{self.name}: attempt {epoch.ordinal} has the old spec; the planner ends it and begins the next one"
        if epoch is None and self.state == "stopped":
            return f"{self.name} was stopped before any attempt was opened"
        return explain_instance(self.snapshot, wanted=self.record is not None and self.record.desired == "up")

    @property
    def told(self) -> str:
        """The explanation. If the instance waits for nothing, it also says what to do."""
        again = f"rankgate launch {self.name}"
        if self.record is not None and self.record.failure:
            return f"{self.explanation}. The planner does not try again by itself: repair the cause, then run {again}"
        if self.state == "stopped":
            return f"{self.explanation}; to bring it up again, run {again}"
        return self.explanation

    @property
    def wanted(self) -> bool:
        """Whether the instance needs a planner."""
        return self.record is not None and not self.record.failure and self.record.desired != "gone"

    @property
    def picture(self) -> Picture:
        """The picture for the screen."""
        spec = self.record.spec if self.record else None
        return Picture(
            instance=self.name,
            world_size=self.snapshot.world_size,
            layers=spec.model.total_layers if spec else 0,
            title=(
                self.state,
                *(["no planner"] if self.wanted and not self.planned else []),
                *([f"{spec.model.model_id}, {spec.model.total_layers} layers"] if spec else []),
            ),
            snapshot=self.snapshot,
            reason=self.told,
            changing=self.changing,
            besides=self.besides,
        )

    @property
    def headed(self) -> object:
        """The part of the heading that changes only with the spec."""
        return self.snapshot.world_size, self.record and self.record.spec.model

    @property
    def besides(self) -> tuple[str, ...]:
        """A line for each spare and each surplus runner."""
        return tuple(f"{who}, {what}" for who, what in self.others.values())

    @property
    def others(self) -> dict[tuple[str, int | None], tuple[str, str]]:
        """The same, by incarnation and rank: who it is, and what it does."""
        size = self.snapshot.world_size
        waiting = {
            (spare.incarnation, spare.rank): (
                f"spare: node {shown(spare.node)}, pid {spare.pid}",
                f"waits for {'any rank' if spare.rank is None else f'rank {spare.rank}'} for {spare.waited_ms / 1000:.0f} s",
            )
            for spare in self.spares
        }
        beyond = {
            (report.incarnation, report.rank): (
                f"surplus: node {shown(report.node)}, pid {report.pid}",
                f"holds rank {report.rank}, and {self.name} has ranks 0 to {size - 1}",
            )
            for report in self.surplus
        }
        return waiting | beyond

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` prints. Times are in milliseconds."""
        snapshot, record, epoch = self.snapshot, self.record, self.snapshot.epoch
        return {
            "instance": self.name,
            "state": self.state,
            "serving": self.serving,
            "explanation": self.explanation,
            "world_size": snapshot.world_size,
            "desired": record.desired if record else None,
            "failure": (record.failure or None) if record else None,
            "model": record.spec.model.model_dump() if record else None,
            "planner": snapshot.leader.holder if snapshot.leader and self.planned else None,
            "epoch": None
            if epoch is None
            else {
                "number": epoch.id.number,
                "attempt": epoch.ordinal,
                "steps": list(epoch.steps),
                "verdict": epoch.verdict.model_dump() if epoch.verdict else None,
            },
            "ranks": [
                {
                    "rank": view.rank,
                    "status": report.status if report else None,
                    "node": report.node if report else None,
                    "pid": report.pid if report else None,
                    "incarnation": report.incarnation if report else None,
                    "progress": list(report.progress) if report and report.progress else None,
                    "age_ms": view.age_ms if report else None,
                    "lease_left_ms": view.lease_left_ms if report else None,
                    "error": (report.error or None) if report else (view.undecodable or None),
                }
                for view in snapshot.ranks
                for report in (view.report,)
            ],
            "spares": [
                {
                    "node": spare.node,
                    "pid": spare.pid,
                    "incarnation": spare.incarnation,
                    "rank": spare.rank,
                    "waited_ms": spare.waited_ms,
                }
                for spare in self.spares
            ],
            "surplus": [
                {
                    "rank": report.rank,
                    "status": report.status,
                    "node": report.node,
                    "pid": report.pid,
                    "incarnation": report.incarnation,
                }
                for report in self.surplus
            ],
        }


class Observer:
    """Looks at instances, and never leads them.

    Args:
        store: the store.
        namespace: the cluster.
    """

    def __init__(self, store: Store, namespace: str) -> None:
        self._store = store
        self._namespace = namespace
        self._barriers: dict[tuple[str, int], Barrier] = {}
        self._clock = SystemClock()
        self.registry: Registry = Registry(store, namespace)

    async def __aenter__(self) -> Observer:
        """Nothing is sent yet."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop waiting for wake-ups."""
        for barrier in self._barriers.values():
            await barrier.close()

    async def look(self, name: str, *, advice: str = "") -> Seen:
        """Look at one instance. Raises `UnknownInstance` if the store has neither a desired state nor an epoch's record of it."""
        record = await self.registry.get(name)
        size = record.spec.world_size if record else await self._recorded_size(name, advice)
        return Seen(name, record, await self._barrier(name, size).inspect())

    async def look_at_all(self, *, gone: bool = False) -> list[Seen]:
        """Look at every instance, sorted by name; with `gone`, also at those that were stopped lately."""
        records = await self.registry.look()
        return [
            await self.look_around(Seen(name, record, await self._barrier(name, record.spec.world_size).inspect()))
            for name, record in sorted(records.items())
            if gone or record.desired != "gone"
        ]

    async def look_around(self, seen: Seen) -> Seen:
        """The same, with its spares and its surplus runners."""
        keys = Keys(self._namespace, seen.name)
        try:
            return replace(
                seen,
                spares=await read_spares(self._store, keys),
                surplus=await read_surplus(self._store, keys, seen.snapshot.world_size),
            )
        except StoreRefused:  # the user comes from an older ACL file; it may look at everything else
            return seen

    async def wait(self, seen: Seen, seconds: float) -> None:
        """Wait until something happens to an instance, or the time is over."""
        await look_again(self._barrier(seen.name, seen.snapshot.world_size), seen.snapshot, seconds, self._clock)

    def _barrier(self, name: str, world_size: int) -> Barrier:
        key = name, world_size
        if key not in self._barriers:
            self._barriers[key] = Barrier(self._store, name, world_size=world_size, namespace=self._namespace)
        return self._barriers[key]

    async def _recorded_size(self, name: str, advice: str) -> int:
        with self._store.errors():
            found = await self._store.commands.hget(Keys(self._namespace, name).epoch, "world_size")
        if found is None:
            known = ", ".join(sorted(await self.registry.look())) or "no others"
            raise UnknownInstance(
                f"there is no instance {name} in namespace {self._namespace}; it has {known}. "
                + (advice or f"Launch it with rankgate launch {name} --world-size N")
            )
        return int(found)


async def look_again(barrier: Barrier, snapshot: Snapshot, seconds: float, clock: SystemClock) -> None:
    """Wait until something happens after a picture, or the time has passed; never return at once again and again."""
    began = clock.now()
    await barrier.watch(snapshot, (), seconds, any_change=True)
    await clock.sleep(began + min(_LEAST_PAUSE, seconds) - clock.now())


# --- telling --------------------------------------------------------------------------------------------------------------


async def explain(target: Target, name: str) -> int:
    """``rankgate explain``: one sentence."""
    async with target.store() as store, Observer(store, target.namespace) as observer:
        print(printable((await observer.look(name)).told))
    return 0


async def status(target: Target, name: str | None, *, as_json: bool, everything: bool = False) -> int:
    """``rankgate status``: the ranks of one instance, or all instances; with `everything`, also those that were stopped lately."""
    console = people()
    async with target.store() as store, Observer(store, target.namespace) as observer:
        if name is not None:
            seen = await observer.look_around(await observer.look(name))
            if as_json:
                _print_json(seen.as_json())
            else:
                console.print(heading(seen.picture), table(rows(seen.picture), width=console.width), sep="\n")
                tell(console, [*seen.besides, seen.told])
            return 0
        instances = await observer.look_at_all(gone=everything)
        if as_json:
            _print_json([seen.as_json() for seen in instances])
        else:
            console.print(whole_overview(instances, target.namespace))
    return 0


async def watch(target: Target, name: str | None, *, everything: bool = False) -> int:
    """``rankgate status --watch``: the same again whenever it changes, until Ctrl-C. Without a terminal, one line for each change."""
    console = people()
    async with target.store() as store, Observer(store, target.namespace) as observer:
        if name is not None:
            await observer.look(name)  # a wrong name is an error before anything is drawn
        if can_draw(console):
            await _watch_live(console, observer, name, target.namespace, gone=everything)
        elif name is not None:
            await _watch_plainly(console, observer, name)
        else:
            raise UnknownInstance("to watch all instances needs a terminal: name one instance, or use --json in a loop")
    return 0


async def _watch_live(
    console: Console, observer: Observer, name: str | None, namespace: str, *, gone: bool = False
) -> None:
    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            seen: Seen | None = None
            shown: RenderableType
            try:
                if name is None:
                    shown = whole_overview(await observer.look_at_all(gone=gone), namespace)
                else:
                    seen = await observer.look_around(await observer.look(name))
                    shown = render(seen.picture, width=console.size.width, height=console.size.height)
            except (StoreError, UnknownInstance) as error:
                shown = Text(printable(str(error)), style="red")
            live.update(Group(shown, Text("Ctrl-C ends this", style="dim")), refresh=True)
            await (observer.wait(seen, TICK) if seen is not None else asyncio.sleep(TICK))


async def _watch_plainly(console: Console, observer: Observer, name: str) -> None:
    clock = SystemClock()
    began = clock.now()
    before: Seen | None = None
    trouble = ""
    with PlainShow(console, with_text=False) as show:
        while True:
            try:
                seen = await observer.look_around(await observer.look(name))
            except (StoreError, UnknownInstance) as error:  # say it and look again, as on the screen
                show.at(clock.now() - began)
                if str(error) != trouble:
                    trouble = str(error)
                    show.say(trouble)
                await clock.sleep(TICK)
                continue
            trouble = ""
            picture = replace(seen.picture, elapsed=clock.now() - began)
            show.at(clock.now() - began)
            if before is None or before.headed != seen.headed:
                show.say(heading(replace(picture, elapsed=None)).plain)
            show.update(picture)
            for line in news(before, seen):
                show.say(line)
            before = seen
            await observer.wait(seen, TICK)


def news(before: Seen | None, seen: Seen) -> list[str]:
    """The news besides the ranks' statuses, one line each: a planner that comes or goes, spares, surplus runners."""
    lines: list[str] = []
    if seen.wanted and not seen.planned and (before is None or before.planned or not before.wanted):
        lines.append(f"{seen.name}: {NOBODY_PLANS}")
    elif seen.planned and before is not None and not before.planned:
        lines.append(f"{seen.name}: a planner looks after it again")
    known = before.others if before is not None else {}
    lines += [f"{who}, {what}" for one, (who, what) in seen.others.items() if one not in known]
    lines += [f"{who}, is gone" for one, (who, _) in known.items() if one not in seen.others]
    return lines


def overview(everything: list[Seen], namespace: str) -> RenderableType:
    """The table of all instances."""
    if not everything:
        return Text(f"no instance in namespace {namespace}; launch one with rankgate launch NAME --world-size N")
    result = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("instance", "state", "ranks", "attempt", "model", "planner"):
        result.add_column(column, no_wrap=True, justify="right" if column == "attempt" else "left")
    for seen in everything:
        here = sum(view.report is not None for view in seen.snapshot.ranks)
        style = "green" if seen.serving else "red" if seen.state == "given up" else "yellow"
        leader = seen.snapshot.leader
        result.add_row(
            seen.name,
            Text(seen.state, style=style),
            ", ".join(
                [
                    f"{here} of {seen.snapshot.world_size}",
                    *([f"{len(seen.spares)} spare"] if seen.spares else []),
                    *([f"{len(seen.surplus)} surplus"] if seen.surplus else []),
                ]
            ),
            str(attempt(seen.snapshot) or "-"),
            Text(printable(seen.record.spec.model.model_id) if seen.record else "-"),
            Text(printable(leader.holder) if leader and seen.planned else "none"),
        )
    return result


def unattended(everything: list[Seen]) -> str:
    """A sentence that names the instances without a planner; empty if each has one."""
    alone = [seen.name for seen in everything if seen.wanted and not seen.planned]
    if not alone:
        return ""
    whom = ", ".join(alone[:4]) + (f" and {len(alone) - 4} more" if alone[4:] else "")
    return NOBODY_PLANS.replace("after it", f"after {whom}", 1)


def whole_overview(everything: list[Seen], namespace: str) -> RenderableType:
    """The table of all instances, and which of them have no planner."""
    listed, said = overview(everything, namespace), unattended(everything)
    return Group(listed, Text(said, style="red")) if said else listed


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))

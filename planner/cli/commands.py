"""The commands that ask a running server for something: plan, launch, stop, generate."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from barrier import Settings, StoreError, SystemClock, supervise
from barrier.errors import RankgateError
from barrier.log import logger
from barrier.plain import number
from barrier.printable import printable, printable_text
from barrier.store.keys import Keys
from planner import InstanceFailed, InstanceSpec, Planner, Policy
from planner.cli.health import ProcessState, keeping_state
from planner.cli.look import NOBODY_PLANS, TICK, Observer, Seen, Target
from planner.cli.process import agrees, can_ask, outlasting
from planner.cli.screen import sentence, sentence_key
from planner.cli.show import people, tell
from planner.cli.watchdog import Work, supervised
from planner.registry import OtherSpec, Registry
from planner.requests import RequestQueue

__all__ = ["ChangeRefused", "generate", "launch", "launch_agreed", "launch_unless_known", "plan", "race", "stop"]


async def plan(
    target: Target, policy: Policy, *, wanted: InstanceSpec | None = None, state_file: Path | None = None
) -> int:
    """``rankgate planner``: plan every instance that shall be up, until asked to end.

    Args:
        target: the server and the namespace.
        policy: how long to wait.
        wanted: an instance to launch first. If it was stopped or given up with this very spec, it stays so.
        state_file: where to say that this process lives; see `planner.cli.health`.
    """
    async with target.store() as store, AsyncExitStack() as stack:
        planner = Planner(store, namespace=target.namespace, policy=policy)
        await outlasting(lambda: stack.enter_async_context(planner), target.wait)
        logger.info(
            "planning the instances of namespace {} on {}; this is {}", target.namespace, store.where, planner.holder
        )
        if wanted is not None:
            await outlasting(lambda: launch_unless_known(Registry(store, target.namespace), wanted), target.wait)
        state = ProcessState(
            kind="planner", namespace=target.namespace, pid=os.getpid(), heartbeat=target.settings.heartbeat
        )
        async with keeping_state(state_file, state), supervised(_work(planner, store.settings)):
            await planner.run()
    return 0


def _work(planner: Planner, settings: Settings) -> Work:
    """What the service manager is told: what each instance waits for, and that this planner still looks at it."""
    return Work(
        ready=lambda: True,
        status=lambda: "; ".join(state.reason for state in planner.instances.values()) or "no instance is wanted",
        tried=lambda: {f"a look at {name}": looks for name, looks in planner.looks.items()},
        patience=2 * (settings.lease + settings.backstop),  # a planner looks at a quiet instance only once a backstop
    )


async def launch_unless_known(registry: Registry, wanted: InstanceSpec) -> None:
    """Launch an instance, unless the desired state has it with this very spec (up or not), or it is up with another spec.

    Raises:
        StoreError: unknown; ask again.
    """
    record = await registry.get(wanted.name)
    up = record is not None and record.desired == "up" and not record.failure  # then its limit may change
    if record is None or up or record.spec.digest != wanted.digest:
        try:
            await registry.launch(wanted, over=())
        except OtherSpec as other:
            logger.warning(
                "{}: it stays as it is. To change it, use rankgate launch --file, which ends its attempt", other
            )
    else:
        logger.warning(
            "{} is not launched: it {}. To bring it up again, use rankgate launch",
            wanted.name,
            "was given up" if record.failure else "was stopped",
        )


async def launch(
    target: Target, spec: InstanceSpec, *, wait: bool, seconds: float, prompt: str | None = None, yes: bool = False
) -> int:
    """``rankgate launch``: launch an instance, tell how it comes up, and generate a text if a prompt is given.

    Raises:
        ChangeRefused: the instance is up with another spec, and nobody has agreed to replace it.
    """
    async with target.store() as store, Observer(store, target.namespace) as observer:
        await launch_agreed(observer, spec, yes=yes)
        if not wait:
            note = "" if (await observer.look(spec.name)).planned else f"; {NOBODY_PLANS}"
            print(f"{spec.name} is launched; watch it with rankgate status {spec.name} --watch{note}")
            return 0
        await _until_serving(observer, spec.name, seconds)
        print(f"{spec.name} serves", flush=True)
    return 0 if prompt is None else await generate(target, spec.name, prompt, max_tokens=64, seconds=seconds)


class ChangeRefused(RankgateError):
    """An instance is up with another spec, and nobody has agreed to replace it."""


async def launch_agreed(observer: Observer, spec: InstanceSpec, *, yes: bool) -> None:
    """Launch. If the instance is up with another spec, show the difference and ask first.

    If no attempt of the other spec ever began, there is nothing to end and no question. The user agrees to replace the spec that was
    shown, and no other: if somebody launches a third spec meanwhile, the command asks again.
    """
    agreed: list[InstanceSpec] = []
    while True:
        try:
            await observer.registry.launch(spec, over=agreed)
            return
        except OtherSpec as other:
            before, refusal = other.record.spec, str(other)
        seen = await observer.look(spec.name)
        epoch = seen.snapshot.epoch
        begun = epoch is not None and epoch.digest == before.digest
        ends = f"attempt {epoch.ordinal}" if epoch is not None else "it"
        if begun and not yes and not can_ask():
            raise ChangeRefused(
                f"{refusal}, and nothing was changed: a launch would end {ends} for all ranks. Pass --yes to replace it, "
                "or choose another name"
            )
        print(
            f"{spec.name} is up with another spec ({seen.state}, {ends}, {before.world_size} ranks):", file=sys.stderr
        )
        changes = before.changes_to(spec)
        width = max(len(changed) for changed, _, _ in changes)
        for changed, old, new in changes:
            print(f"  {changed:<{width}}  {printable(f'{old} -> {new}')}", file=sys.stderr)
        if begun and not yes and not await agrees(f"End {ends} for all ranks, and load again?"):
            raise ChangeRefused(f"{spec.name} stays as it is: nothing was changed")
        agreed.append(before)


async def stop(target: Target, name: str, *, seconds: float) -> int:
    """``rankgate stop``: ask to stop an instance, and wait until every rank has torn down."""
    async with target.store() as store, Observer(store, target.namespace) as observer:
        seen = await observer.look(name, advice="Nothing is stopped: check the name and --namespace")
        record = seen.record
        if record is not None and record.desired != "gone":
            await observer.registry.stop(record)
            if record.failure or not seen.attended:  # it is down already, and nobody is there to say so
                await observer.registry.carried_out(record)
        await _until_stopped(observer, name, seconds)
        print(f"{name} is stopped")
    return 0


async def _until_serving(observer: Observer, name: str, seconds: float) -> None:
    def serves(seen: Seen) -> bool:
        if seen.record is not None and seen.record.failure:
            raise InstanceFailed(seen.record.failure)
        if seen.record is None or seen.record.desired != "up":
            raise InstanceFailed(f"{name} was stopped before it was ready")
        return seen.serving

    stays = f"the --timeout of this command is over, but {name} stays launched: a planner goes on to bring it up"
    await _until(observer, name, seconds, serves, "was not ready", stays)


async def _until_stopped(observer: Observer, name: str, seconds: float) -> None:
    def stopped(seen: Seen) -> bool:
        epoch = seen.snapshot.epoch
        busy = any(view.report and epoch and view.report.epoch == epoch.id for view in seen.snapshot.ranks)
        return seen.state == "stopped" and not busy

    await _until(observer, name, seconds, stopped, "did not stop")


async def _until(
    observer: Observer, name: str, seconds: float, reached: Callable[[Seen], bool], missed: str, then: str = ""
) -> None:
    """Look until an instance is in the wanted state, and say on stderr what it waits for whenever that changes.

    Args:
        observer: looks at the instance.
        name: the instance.
        seconds: how long to look.
        reached: whether the instance is in the wanted state.
        missed: what to say if it is not in time, as in "did not stop".
        then: what that means for the user.

    Raises:
        InstanceFailed: the time is over; with the explanation.
    """
    clock = SystemClock()
    began = clock.now()
    told: object = None
    while not reached(seen := await observer.look(name)):
        waited = clock.now() - began
        if waited >= seconds:
            raise InstanceFailed(f"{name} {missed} within {number(seconds)} s: {_waits_for(seen, then)}")
        key = sentence_key(seen.picture), seen.planned
        if key != told and waited >= TICK:  # a shorter wait is not worth a line
            print(printable(_waits_for(seen)), file=sys.stderr, flush=True)
            told = key
        await observer.wait(seen, min(seconds - waited, TICK))


def _waits_for(seen: Seen, then: str = "") -> str:
    said = sentence(replace(seen.picture, reason=seen.said))
    return "; ".join([said, *([then] if then else []), *([] if seen.planned else [NOBODY_PLANS])])


async def generate(target: Target, name: str, prompt: str, *, max_tokens: int, seconds: float) -> int:
    """``rankgate generate``: print the text as it comes."""
    async with target.store() as store, Observer(store, target.namespace) as observer:
        seen = await observer.look(name)
        if seen.record is None or seen.record.failure or seen.record.desired != "up":
            raise InstanceFailed(f"{name} does not serve ({seen.state}): {seen.explanation}")
        if not seen.serving and seen.planned:  # without a planner, the message says that instead
            print(printable(f"{name} does not serve yet: {_waits_for(seen)}"), file=sys.stderr, flush=True)
        requests = RequestQueue(store, Keys(target.namespace, name), SystemClock())
        written = False
        try:
            async with aclosing(requests.generate(prompt, max_tokens=max_tokens, seconds=seconds)) as pieces:
                piece = await _unless_nobody_plans(anext(pieces, None), observer, name, store.settings)
                while piece is not None:
                    written = True
                    sys.stdout.write(printable_text(piece) if sys.stdout.isatty() else piece)
                    sys.stdout.flush()
                    piece = await anext(pieces, None)
        finally:
            if written:
                print(flush=True)
    return 0


_T = TypeVar("_T")


async def _unless_nobody_plans(doing: Awaitable[_T], observer: Observer, name: str, settings: Settings) -> _T:
    """Wait for something that only a planner can start; stop when the instance has had no planner for one lease.

    Raises:
        InstanceFailed: there is no planner. A standby would have taken over within the lease.
    """
    nobody = _nobody_plans_for(settings.lease, observer, name)
    async with supervise.alongside(doing, "the request") as working, supervise.alongside(nobody) as watching:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            watching.result()
            raise InstanceFailed(f"{name} does not answer: {NOBODY_PLANS}")
        return working.result()


async def _nobody_plans_for(seconds: float, observer: Observer, name: str) -> None:
    """Return when an instance has had no planner for so long; say on stderr when that begins."""
    clock = SystemClock()
    since: float | None = None
    while since is None or clock.now() < since + seconds:
        try:
            seen = await observer.look(name)
        except StoreError:  # the request itself reports this
            since = None
        else:
            if seen.planned:
                since = None
            elif since is None:
                since = clock.now()
                print(f"{name}: {NOBODY_PLANS}", file=sys.stderr, flush=True)
        await clock.sleep(TICK)


async def race() -> int:
    """``rankgate race``: three runs of one scenario; 0 if the barrier kept its promise in the last of them."""
    from planner.race import run_race  # noqa: PLC0415 - no other command needs it

    console = people()
    figures = await run_race(lambda line: tell(console, [line]))
    kept = figures.with_barrier
    return 0 if kept.ready_after is not None and not (kept.deaths or kept.rejections or kept.breaches) else 1

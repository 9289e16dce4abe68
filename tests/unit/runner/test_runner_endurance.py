"""The runner outlives its tasks: ten thousand refusals, and long random histories."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from typing import Any, get_args

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loguru import logger

from barrier import EpochAnnounced, EpochId, Settings, Verdict, VerdictAnnounced
from barrier.testing.waiting import settle
from runner.messages import (
    RunnerStatusUpdated,
    StatusName,
    Task,
    TaskAcknowledged,
    TaskKind,
    TaskStatusUpdated,
    encode,
)
from runner.testing import Phase
from tests.depth import examples
from tests.unit.runner.rig import PROMPT, WAY, Rig, kinds, make_task, other_nonce, runner_rig

# --- a flood ------------------------------------------------------------------------------------------------------------------

REFUSALS = 10_000
BATCH = 500
WARM = 4_000
"""After so many refusals everything that is bounded is full, so memory must not grow any more."""


@pytest.mark.slow
@pytest.mark.anyio
async def test_ten_thousand_refusals_in_a_row() -> None:
    """One answer each, nothing kept beyond a bound, and the runner still reaches Ready."""
    logger.disable("runner")  # ten thousand warnings are right, and slow to print
    few = Settings(event_entries=1_000, signal_entries=1_000)
    process = psutil.Process()
    memory: dict[int, int] = {}
    files: dict[int, int] = {}
    try:
        async with runner_rig(settings=few) as rig:
            await rig.open()
            await rig.tell()
            load = make_task("LoadModel", rig.epoch)
            refused: list[Task | bytes] = [
                load,  # the very same again and again: retryable, so judged anew
                make_task("StartWarmup", rig.epoch),
                make_task("ConnectToGroup", rig.epoch, instance="other"),
                b"{",
                b"\xff",
            ]
            text = encode(load)
            answers: Counter[str] = Counter()
            done = 0
            while done < REFUSALS:
                fresh = (text.replace(load.task_id.encode(), b"load-%d" % (done + n)) for n in range(BATCH // 2))
                await rig.put_all([*refused * (BATCH // 2 // len(refused)), *fresh])
                answers.update(kinds(await rig.tell()))
                rig.forget()
                done += BATCH
                if done in (WARM, REFUSALS):
                    gc.collect()
                    memory[done], files[done] = process.memory_info().rss, process.num_fds()

            assert answers == {"ack": REFUSALS, "Failed": REFUSALS}
            assert rig.status == "Idle"
            assert rig.journal == ["start", "host close", "promise", "prepare"], (
                "the engine has not even been asked to connect"
            )
            assert files[REFUSALS] == files[WARM]
            assert memory[REFUSALS] - memory[WARM] < 2 * 1024 * 1024, f"resident bytes: {memory}"

            rig.engine.release()
            for kind, _, _, after in WAY:
                await rig.ask(make_task(kind, rig.epoch))
                assert rig.status == after
    finally:
        logger.enable("runner")


@pytest.mark.anyio
async def test_a_flood_does_not_make_it_forget_what_it_does() -> None:
    """Regression: 256 refusals later a duplicate of the running generation was taken for a new one, and done again."""
    logger.disable("runner")
    try:
        async with runner_rig() as rig:
            await rig.reach("Ready")
            task = make_task("TextGeneration", rig.epoch)
            await rig.ask(task)
            await rig.put_all([make_task("LoadModel", rig.epoch) for _ in range(600)])
            await rig.tell()
            assert kinds(await rig.ask(task)) == ["ack", "Running"]
            rig.engine.finish("generate")
            await rig.tell()
            assert kinds(await rig.ask(task)) == ["ack", "Complete"]
            assert rig.engine.calls.count("generate") == 1
    finally:
        logger.enable("runner")


# --- random histories -----------------------------------------------------------------------------------------------------

ALLOWED: dict[StatusName, set[StatusName]] = {
    "Idle": {"Connecting", "Failed"},
    "Connecting": {"Connected", "Failed"},
    "Connected": {"Loading", "Failed"},
    "Loading": {"Loaded", "Failed"},
    "Loaded": {"WarmingUp", "Failed"},
    "WarmingUp": {"Ready", "Failed"},
    "Ready": {"Running", "Failed"},
    "Running": {"Ready", "Failed"},
    "Failed": set(),
}
"""Which status may follow which, written by hand. Idle may follow all of them, by a verdict or a new epoch."""

BEGINS: dict[StatusName, TaskKind] = {
    "Connecting": "ConnectToGroup",
    "Loading": "LoadModel",
    "WarmingUp": "StartWarmup",
    "Running": "TextGeneration",
}

FOLLOWS: dict[StatusName, TaskKind] = {
    "Idle": "ConnectToGroup",
    "Connected": "LoadModel",
    "Loaded": "StartWarmup",
    "Ready": "TextGeneration",
    "Running": "TextGeneration",
}

phases: st.SearchStrategy[Phase] = st.sampled_from(["connect", "load", "warm_up", "generate"])
task_kinds = st.sampled_from([kind for kind in get_args(TaskKind) if kind != "Shutdown"])
ages = st.sampled_from(["now", "now", "now", "stale", "newer", "nonce"])
onward: list[st.SearchStrategy[tuple[Any, ...]]] = [st.just(("next",)), st.just(("work",))]
harmless: list[st.SearchStrategy[tuple[Any, ...]]] = [
    st.tuples(st.just("task"), task_kinds, ages),
    st.tuples(st.just("again"), st.integers(0, 50)),
    st.tuples(st.just("bytes"), st.binary(max_size=40) | st.just(b"x" * 300_000)),
    st.tuples(st.just("cancel"), st.integers(0, 50)),
    st.tuples(st.just("finish"), phases),
    st.tuples(st.just("verdict"), st.sampled_from(["stale", "newer", "nonce"])),
    st.tuples(st.just("announce"), st.sampled_from(["now", "stale", "nonce"])),
    st.tuples(st.just("time"), st.sampled_from([0.5, 2.0, 7.0])),
    st.tuples(st.just("outage"), st.sampled_from([0.5, 7.0])),
]
harmful: list[st.SearchStrategy[tuple[Any, ...]]] = [
    st.tuples(st.just("gap"), task_kinds),
    st.just(("fail",)),
    st.just(("die",)),
    st.just(("verdict", "now")),
    st.just(("announce", "newer")),
    st.just(("attempt",)),
]
bag = [*(onward * 15), *(harmless * 2), *harmful]
"""Mostly on the way to Ready, or few histories would get beyond Connecting."""

moves = st.sampled_from(range(len(bag))).flatmap(bag.__getitem__)  # one_of would put each into the bag once


def aged(epoch: EpochId, age: str) -> EpochId:
    """An epoch beside the present one."""
    match age:
        case "stale":
            return EpochId(epoch.number - 1, epoch.nonce)
        case "newer":
            return EpochId(epoch.number + 1, epoch.nonce)
        case "nonce":
            return other_nonce(epoch)
        case _:
            return epoch


async def play(rig: Rig, move: tuple[Any, ...], sent: list[Task]) -> None:
    """Make one move; those that need an epoch open one first if there is none."""
    if rig.member.promised is None:
        await attempt(rig)
    if move[0] in ("task", "next", "again", "bytes", "cancel", "gap"):
        await send(rig, move, sent)
    elif move[0] in ("work", "finish", "fail", "die"):
        await engine_does(rig, move)
    else:
        await befall(rig, move)
    await settle()


async def send(rig: Rig, move: tuple[Any, ...], sent: list[Task]) -> None:
    """What comes as a task."""
    match move:
        case ("task", kind, age):
            sent.append(make_task(kind, aged(rig.epoch, age)))
            rig.deliver(sent[-1])
        case ("next",):
            if rig.status in FOLLOWS:
                sent.append(make_task(FOLLOWS[rig.status], rig.epoch))
                await rig.put(sent[-1])
        case ("again", which):
            if sent:
                rig.deliver(sent[int(which) % len(sent)])
        case ("bytes", payload):
            await rig.put(payload)
        case ("cancel", which):
            if sent:
                sent.append(make_task("CancelTask", rig.epoch, cancels=sent[int(which) % len(sent)].task_id))
                rig.deliver(sent[-1])
        case ("gap", kind):
            await rig.put(make_task(kind, rig.epoch), gap=1)
        case _:
            raise AssertionError(move)


async def engine_does(rig: Rig, move: tuple[Any, ...]) -> None:
    """How what the engine works on ends."""
    active: list[Phase] = [phase for _, phase, _, _ in WAY if rig.engine.active(phase)]
    match move:
        case ("work",):
            for phase in active:
                rig.engine.finish(phase)
        case ("finish", phase):
            rig.engine.finish(phase)
        case ("fail",):
            for phase in active:
                rig.engine.fail(phase, "planned")
        case ("die",):
            rig.host.die("was killed")
        case _:
            raise AssertionError(move)


async def befall(rig: Rig, move: tuple[Any, ...]) -> None:
    """What happens to the attempt, to the clock and to the store."""
    match move:
        case ("verdict", age):
            rig.member.deliver(VerdictAnnounced(aged(rig.epoch, age), Verdict.aborted("planned")))
        case ("announce", age):
            rig.member.deliver(EpochAnnounced(aged(rig.epoch, age)))
        case ("attempt",):
            await attempt(rig)
        case ("time", seconds):
            await rig.clock.advance(seconds)
        case ("outage", seconds):
            rig.store.partition("runner")
            await rig.clock.advance(seconds)
            rig.store.heal()
            await rig.clock.advance(rig.member.settings.heartbeat + 1)
        case _:
            raise AssertionError(move)


async def attempt(rig: Rig) -> None:
    """End the attempt that goes on, if one does, and open the next."""
    snapshot = await rig.barrier.inspect()
    if snapshot.epoch is not None and snapshot.epoch.verdict is None:
        await rig.barrier.conclude(snapshot.epoch.id, Verdict.aborted("planned"))
    await rig.clock.advance(rig.member.settings.heartbeat)
    await rig.open()
    await rig.clock.advance(rig.member.settings.heartbeat)
    assert rig.member.promised is not None


def check_history(rig: Rig) -> None:
    """From its own words alone: no status without its task, no task without its acknowledgement, no end without a beginning."""
    status: StatusName = "Idle"
    began: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    acknowledged: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    running = ""
    for event in rig.history:
        match event:
            case RunnerStatusUpdated(status=now):
                if now.kind not in (status, "Idle"):
                    assert now.kind in ALLOWED[status], f"{status} => {now.kind}"
                    if now.kind in BEGINS:
                        assert running.startswith(BEGINS[now.kind]), f"{now.kind} without an accepted task"
                status = now.kind
            case TaskAcknowledged(task_id=task_id):
                acknowledged[task_id] += 1
            case TaskStatusUpdated(task_id=task_id, state="Running"):
                if acknowledged[task_id] == began[task_id] + refused[task_id]:
                    began[task_id] += 1
                    running = task_id
                else:
                    refused[task_id] += 1  # a duplicate of what runs: acknowledged, and said again
            case TaskStatusUpdated(task_id=task_id):
                if acknowledged[task_id] > began[task_id] + refused[task_id]:
                    refused[task_id] += 1
                else:
                    ended[task_id] += 1
    for task_id, times in began.items():
        assert times == 1, f"{task_id} was begun {times} times"
        assert ended[task_id] <= 1, f"{task_id} ended {ended[task_id]} times"
    for task_id in acknowledged | began | refused:
        assert acknowledged[task_id] == began[task_id] + refused[task_id], f"{task_id}: one acknowledgement an answer"
    assert not ended.keys() - began.keys()


@settings(max_examples=examples(40), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    start=st.sampled_from(["Idle", "Connected", "Loaded", "Ready", "Running"]),
    history=st.lists(moves, min_size=20, max_size=60),
)
def test_no_history_kills_the_runner(start: StatusName, history: list[tuple[Any, ...]]) -> None:
    """Whatever is sent, lost or broken in whatever order: no status changes without an accepted task, and it goes on."""

    async def run() -> None:
        async with runner_rig() as rig:
            sent: list[Task] = []
            await rig.reach(start)
            for move in history:
                await play(rig, move, sent)
                assert rig.running is not None
                assert not rig.running.done(), f"the runner ended at {move}"
                await rig.tell()
            check_history(rig)

            await attempt(rig)
            rig.engine.forget().release()
            for kind, _, _, after in WAY:
                await rig.ask(make_task(kind, rig.epoch))
                assert rig.status == after, "after all that it serves"
            assert not any(PROMPT in line for line in rig.log)

    logger.disable("runner.host")
    try:
        asyncio.run(run())
    finally:
        logger.enable("runner.host")

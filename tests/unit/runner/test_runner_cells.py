"""Every cell of status, task, epoch and repetition through a real runner: the answer, the order of events, and what stays as it was."""

from __future__ import annotations

from typing import Any

import pytest

from barrier import EpochId, Report
from runner.admission import Accept, Invalid, Judgement, NotYet, Stale
from runner.messages import RunnerLoading, StatusName, TaskAcknowledged, TaskKind, TaskStatusUpdated
from tests.unit.runner.expectations import EXPECTED, KINDS, STATUSES
from tests.unit.runner.rig import LAYERS, Rig, Told, kinds, make_task, other_nonce, runner_rig

pytestmark = pytest.mark.anyio

CODES: dict[type[Judgement], str] = {NotYet: "NotYet", Stale: "Stale", Invalid: "Invalid"}

# A runner that is Shutdown has left: there is nobody to ask. See the test of that name.
ASKABLE: list[tuple[int, StatusName]] = [
    (size, status)
    for size in (2, 1)
    for status in STATUSES
    if (status, "Shutdown") in EXPECTED[size] and status != "Shutdown"
]
REFUSED = [
    (size, status, [kind for kind in KINDS if EXPECTED[size][status, kind] is not Accept]) for size, status in ASKABLE
]
ACCEPTED = [
    (size, status, kind)
    for size, status in ASKABLE
    for kind in KINDS
    if EXPECTED[size][status, kind] is Accept and kind not in ("CancelTask", "Shutdown")
]

DURING_AND_AFTER: dict[TaskKind, tuple[StatusName, StatusName]] = {
    "ConnectToGroup": ("Connecting", "Connected"),
    "LoadModel": ("Loading", "Loaded"),
    "StartWarmup": ("WarmingUp", "Ready"),
    "TextGeneration": ("Running", "Ready"),
}


def unmoved(report: Report) -> Report:
    """A report without what may change though nothing has happened: its number, its age, and what it has read."""
    return report._replace(seq=0, status_ms=0, applied=0, outcomes=())


async def picture(rig: Rig) -> tuple[Any, ...]:
    """All that a rejection must leave as it is."""
    return (rig.runner.status, tuple(rig.journal), rig.epoch, unmoved(await rig.report()), rig.running)


def check_rejection(rig: Rig, told: Told, task_id: str, kind: TaskKind, expected: type[Judgement]) -> None:
    """Exactly one acknowledgement, then exactly one refusal that tells what the runner really is."""
    assert kinds(told) == ["ack", "Failed"]
    acknowledged, refused = told
    assert isinstance(acknowledged, TaskAcknowledged)
    assert isinstance(refused, TaskStatusUpdated)
    assert acknowledged.task_id == refused.task_id == task_id
    assert refused.error is None
    assert refused.rejection is not None
    assert refused.rejection.code == CODES[expected]
    assert refused.rejection.task_kind == kind
    assert refused.rejection.status == rig.status
    assert refused.rejection.epoch == str(rig.epoch)
    assert refused.rejection.retryable == (expected is NotYet)
    assert refused.rejection.hint


@pytest.mark.parametrize(("world_size", "status", "refused"), REFUSED)
async def test_refused_cells(world_size: int, status: StatusName, refused: list[TaskKind]) -> None:
    """Fresh and as a duplicate: a right answer, and status, engine, epoch, report and process are as they were."""
    async with runner_rig(world_size=world_size) as rig:
        await rig.reach(status)
        before = await picture(rig)

        for kind in refused:
            expected = EXPECTED[world_size][status, kind]
            task = make_task(kind, rig.epoch)
            for _ in ("fresh", "duplicate"):
                check_rejection(rig, await rig.ask(task), task.task_id, kind, expected)
                outcome = await rig.outcome(task)
                assert (outcome.result, outcome.code) == ("rejected", CODES[expected])
                assert outcome.retryable == (expected is NotYet)
                assert await picture(rig) == before
            if kind == "TextGeneration":
                ends = [chunk.finish for chunk in await rig.chunks(task)]
                assert ends
                assert set(ends) == {"error"}, "its client is told"

        await reaches_ready(rig)


@pytest.mark.parametrize(("world_size", "status"), ASKABLE)
async def test_cells_of_other_epochs(world_size: int, status: StatusName) -> None:
    """Every task of a stale epoch, a newer one, and one of the same number: refused in every status, and nothing moves."""
    async with runner_rig(world_size=world_size) as rig:
        await rig.reach(status)
        before, outcomes = await picture(rig), (await rig.report()).outcomes
        epochs: list[tuple[EpochId, type[Judgement]]] = [
            (EpochId(rig.epoch.number - 1, rig.epoch.nonce), Stale),
            (other_nonce(rig.epoch), Stale),
            (EpochId(rig.epoch.number + 1, rig.epoch.nonce), NotYet),
        ]

        for epoch, expected in epochs:
            for kind in KINDS:
                task = make_task(kind, epoch)
                for _ in ("fresh", "duplicate"):
                    check_rejection(rig, await rig.ask_late(task), task.task_id, kind, expected)
        assert await picture(rig) == before
        assert (await rig.report()).outcomes == outcomes, "what other epochs ask must not push out what this one knows"

        await reaches_ready(rig)


async def reaches_ready(rig: Rig) -> None:
    """The runner is alive, and serves in the end; one that was shutting down leaves instead."""
    rig.engine.release()
    if rig.status == "ShuttingDown":
        await rig.ended()
        assert rig.status == "Shutdown"
        return
    await rig.conclude()
    assert rig.status == "Idle"
    await rig.open()
    for kind in ("ConnectToGroup", "LoadModel", "StartWarmup")[rig.world_size == 1 :]:
        await rig.ask(make_task(kind, rig.epoch))
    assert rig.status == "Ready"


@pytest.mark.parametrize(("world_size", "status", "kind"), ACCEPTED)
async def test_accepted_cells(world_size: int, status: StatusName, kind: TaskKind) -> None:
    """The status is out before the acknowledgement; a duplicate gets the outcome again and nothing is done twice."""
    during, after = DURING_AND_AFTER[kind]
    async with runner_rig(world_size=world_size) as rig:
        await rig.reach(status)
        task = make_task(kind, rig.epoch)

        told = await rig.ask(task)
        assert kinds(told) == ["Running", f"=> {during}", "ack"]
        assert {getattr(event, "task_id", task.task_id) for event in told} == {task.task_id}
        assert rig.status == during
        if kind == "LoadModel":
            assert rig.runner.status == RunnerLoading(layers_loaded=0, total_layers=LAYERS)
        assert (await rig.outcome(task)).result == "running"

        calls = len(rig.journal)
        assert kinds(await rig.ask(task)) == ["ack", "Running"]
        assert rig.journal[calls:] == []

        rig.engine.release()
        told = await rig.tell()
        assert kinds(told)[-2:] == ["Complete", f"=> {after}"]
        assert getattr(told[-2], "task_id", "") == task.task_id
        assert (await rig.outcome(task)).result == "done"

        calls = len(rig.journal)
        assert kinds(await rig.ask(task)) == ["ack", "Complete"]
        assert rig.status == after
        assert rig.journal[calls:] == []


@pytest.mark.parametrize(("world_size", "status"), ASKABLE)
async def test_cancel_is_accepted_in_every_status(world_size: int, status: StatusName) -> None:
    """There is nothing to cancel here: done at once, and the status is said as it was."""
    async with runner_rig(world_size=world_size) as rig:
        await rig.reach(status)
        before = await picture(rig)
        task = make_task("CancelTask", rig.epoch)
        assert kinds(await rig.ask(task)) == ["Running", f"=> {status}", "ack", "Complete", f"=> {status}"]
        assert (await rig.outcome(task)).result == "done"
        assert kinds(await rig.ask(task)) == ["ack", "Complete"]
        assert await picture(rig) == before


@pytest.mark.parametrize(("world_size", "status"), [cell for cell in ASKABLE if cell[1] != "ShuttingDown"])
async def test_shutdown_is_accepted_in_every_status(world_size: int, status: StatusName) -> None:
    """An engine that is well is asked to close, and waited for; half a collective is killed, and the runner leaves at once."""
    async with runner_rig(world_size=world_size) as rig:
        await rig.reach(status)
        rig.engine.hold("close")
        task = make_task("Shutdown", rig.epoch)
        told = await rig.ask(task)
        assert kinds(told)[:3] == ["Running", "=> ShuttingDown", "ack"]
        if status in ("Connected", "Loaded", "Ready", "Running"):
            assert kinds(told)[3:] == []
            assert rig.status == "ShuttingDown"
            assert rig.engine.active("close")
            assert kinds(await rig.ask(task)) == ["ack", "Running"]
            rig.engine.release("close")
            told += await rig.tell()
        assert kinds(told)[3:] == ["Complete", "=> Shutdown"]
        await rig.ended()


async def test_shutdown_leaves_in_order_and_is_gone() -> None:
    """The eleventh row: once a runner is Shutdown its process leaves, and there is nobody to answer a task."""
    async with runner_rig() as rig:
        await rig.reach("Ready")
        task = make_task("Shutdown", rig.epoch)
        told = await rig.ask(task)
        assert kinds(told) == ["Running", "=> ShuttingDown", "ack", "Complete", "=> Shutdown"]
        await rig.ended()
        assert rig.journal.count("close") == 1, "the engine was asked to close, and not only killed"
        left = await rig.barrier.store.commands.exists(rig.barrier.keys.rank(0), rig.barrier.keys.claim(0))
        assert left == 0, "the rank was given back"


async def test_a_task_that_comes_while_shutting_down_is_still_answered() -> None:
    """Also one that the runner would accept in any status, and a second Shutdown, which is done when the first one is."""
    async with runner_rig() as rig:
        await rig.reach("ShuttingDown")
        cancel, again = make_task("CancelTask", rig.epoch), make_task("Shutdown", rig.epoch)
        assert kinds(await rig.ask(cancel)) == [
            "Running",
            "=> ShuttingDown",
            "ack",
            "Complete",
            "=> ShuttingDown",
        ]
        assert kinds(await rig.ask(again)) == ["Running", "=> ShuttingDown", "ack"]
        rig.engine.release("close")
        assert kinds(await rig.tell()) == ["Complete", "=> Shutdown", "Complete", "=> Shutdown"]
        await rig.ended()


async def test_neither_a_verdict_nor_a_new_epoch_turns_a_runner_back_that_shuts_down() -> None:
    async with runner_rig() as rig:
        await rig.reach("ShuttingDown")
        first = rig.epoch
        await rig.conclude()
        await rig.open()
        assert rig.status == "ShuttingDown"
        assert rig.member.promised == first
        rig.engine.release("close")
        await rig.ended()


async def test_repeats_say_what_became_of_it() -> None:
    """Done, failed, cancelled, refused for good: the same again, and the reason with it."""
    async with runner_rig() as rig:
        await rig.reach("Ready")
        done, failing, cancelled = (make_task("TextGeneration", rig.epoch) for _ in range(3))
        rig.engine.finish("generate")
        await rig.ask(done)
        assert kinds(await rig.ask(done)) == ["ack", "Complete"]

        await rig.ask(cancelled)
        await rig.ask(make_task("CancelTask", rig.epoch, cancels=cancelled.task_id))
        assert kinds(await rig.ask(cancelled)) == ["ack", "Cancelled"]

        await rig.ask(failing)
        rig.engine.fail("generate", "out of memory")
        await rig.tell()
        again = await rig.ask(failing)
        assert kinds(again) == ["ack", "Failed"]
        assert isinstance(again[1], TaskStatusUpdated)
        assert again[1].error == "out of memory"
        assert again[1].rejection is None

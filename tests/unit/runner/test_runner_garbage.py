"""Whatever stands in the task log: it gets one answer, nothing else changes, and the next good task is done."""

from __future__ import annotations

import json
from typing import Any

import pytest

from barrier import EpochId
from runner.messages import RunnerFailed, Task, TaskAcknowledged, TaskStatusUpdated, encode
from tests.unit.runner.rig import PROMPT, Rig, Told, kinds, make_task, other_nonce, runner_rig

pytestmark = pytest.mark.anyio


def changed(task: Task, **changes: Any) -> bytes:
    """A task's bytes with fields changed, added, or (set to ``...``) left out."""
    fields: dict[str, Any] = json.loads(encode(task)) | changes
    return json.dumps({name: value for name, value in fields.items() if value is not ...}).encode()


async def goes_on(rig: Rig) -> None:
    """The runner does its next task as if nothing had been."""
    rig.engine.release()
    assert kinds(await rig.ask(make_task("ConnectToGroup", rig.epoch))) == [
        "Running",
        "=> Connecting",
        "ack",
        "Complete",
        "=> Connected",
    ]


def check_invalid(told: Told, task_id: str, task_kind: str, hint: str) -> None:
    assert kinds(told) == ["ack", "Failed"]
    acknowledged, refused = told
    assert isinstance(acknowledged, TaskAcknowledged)
    assert isinstance(refused, TaskStatusUpdated)
    assert acknowledged.task_id == refused.task_id == task_id
    assert refused.rejection is not None
    assert (refused.rejection.code, refused.rejection.retryable) == ("Invalid", False)
    assert refused.rejection.task_kind == task_kind
    assert hint in refused.rejection.hint


MALFORMED = {
    "empty": (b"", "not JSON"),
    "cut off": (b'{"kind": "LoadM', "not JSON"),
    "not UTF-8": (b"\xff\xfe\x00", "not JSON"),
    "a number": (b"7", "dict type"),
    "nested deeply": (b'{"kind":' * 30_000, "not JSON"),
    "1 MB": (b"x" * 1_000_000, "has 1,000,000 bytes; at most 262,144 are read"),
    "1 MB of a task": (
        b'{"kind":"TextGeneration","prompt":"' + b"x" * 1_000_000 + b'"}',
        "at most 262,144 are read",
    ),
    "no kind": (b"{}", "no kind"),
    "unknown kind": (b'{"kind": "EraseDisk"}', "unknown kind"),
}


@pytest.mark.parametrize(("payload", "hint"), MALFORMED.values(), ids=MALFORMED)
async def test_what_is_not_a_task_is_refused_under_its_place_in_the_log(payload: bytes, hint: str) -> None:
    async with runner_rig() as rig:
        await rig.open()
        await rig.tell()
        place = await rig.put(payload)
        check_invalid(await rig.tell(), f"log-{place}", "unknown", hint)
        assert rig.status == "Idle"
        assert (await rig.outcome(f"log-{place}")).code == "Invalid", (
            "the planner can find it by the place it was given"
        )
        await goes_on(rig)


MISSHAPEN: dict[str, dict[str, Any]] = {
    "unknown field": {"priority": 1},
    "missing field": {"term": ...},
    "wrong type": {"term": "1"},
    "task id too long for a key": {"task_id": "x" * 97},
    "task id that begins with a dot": {"task_id": ".x"},
    "no layers": {"model": {"model_id": "toy", "total_layers": 0}},
    "a field whose name is a novel": {"once upon a time " * 10_000: 1},
    "a field whose name is a prompt": {PROMPT: 1},
}


@pytest.mark.parametrize("changes", MISSHAPEN.values(), ids=MISSHAPEN)
async def test_a_misshapen_task_is_refused(changes: dict[str, Any]) -> None:
    """Regressions among them: the novel and the ids were more than an answer could hold, and killed the runner."""
    async with runner_rig() as rig:
        await rig.open()
        await rig.tell()
        place = await rig.put(changed(make_task("LoadModel", rig.epoch), **changes))
        check_invalid(await rig.tell(), f"log-{place}", "unknown", "malformed task")
        assert not any(PROMPT in str(fields) for fields in await rig.raw_events()), "history is read by people, too"
        await goes_on(rig)


async def test_a_misshapen_generation_under_a_hostile_id_is_refused() -> None:
    """Regression: the id could not be part of a stream's key, and ending that stream killed the runner."""
    async with runner_rig() as rig:
        await rig.open()
        for task_id in ("-", ".." * 40, "x" * 128):
            task = changed(make_task("TextGeneration", rig.epoch), task_id=task_id)
            assert kinds(await rig.ask(task)) == ["ack", "Failed"]
        await goes_on(rig)


async def test_a_task_for_another_instance_is_refused() -> None:
    async with runner_rig() as rig:
        await rig.open()
        task = make_task("ConnectToGroup", rig.epoch, instance="other")
        check_invalid(
            await rig.ask(task), task.task_id, "ConnectToGroup", "serves instance demo, the task is for other"
        )
        assert "connect" not in rig.journal
        await goes_on(rig)


async def test_a_task_that_says_another_epoch_than_its_log_entry_is_refused() -> None:
    """In both directions: neither a stale payload under a good entry nor a good payload under a stale entry is done."""
    async with runner_rig() as rig:
        await rig.open()
        await rig.reach("Connected")
        stale = EpochId(rig.epoch.number - 1, rig.epoch.nonce)
        task = make_task("LoadModel", stale)
        check_invalid(await rig.ask(task, epoch=rig.epoch), task.task_id, "LoadModel", "names another epoch")
        task = make_task("LoadModel", rig.epoch)
        check_invalid(
            await rig.ask(task, epoch=other_nonce(rig.epoch)), task.task_id, "LoadModel", "names another epoch"
        )
        assert rig.status == "Connected"
        assert rig.engine.calls.count("load") == 0


# --- entries that are none ------------------------------------------------------------------------------------------------

GARBAGE: dict[str, dict[str, Any]] = {
    "somebody else's": {"hello": "world"},
    "unknown kind": {"kind": "party"},
    "no nonce": {"kind": "task", "nonce": ...},
    "nonce of another shape": {"nonce": "abc"},
    "no payload": {"task": ...},
    "previous that is no number": {"prev": "x"},
    "previous that is beyond reading": {"prev": "9" * 5_000},
    "ranks that are none": {"to": "all"},
    "term that is none": {"term": b"\xff"},
    "step that is not text": {"step": b"\xff\xfe"},
    "verdict that is none": {"kind": "verdict", "verdict": b"\xff"},
}


@pytest.mark.parametrize("fields", GARBAGE.values(), ids=GARBAGE)
async def test_an_entry_that_is_not_ours_is_passed_over(fields: dict[str, Any]) -> None:
    """It is counted in the log, and costs nothing else; a verdict that cannot be read ends the attempt, to be safe."""
    async with runner_rig() as rig:
        await rig.reach("Connected")
        good: dict[str, Any] = {
            "kind": "task",
            "nonce": rig.epoch.nonce,
            "prev": 2,
            "term": 1,
            "step": "load",
            "to": "0-1",
            "task": encode(make_task("LoadModel", rig.epoch)),
        }
        entry = fields if "hello" in fields else good | fields
        log: Any = rig.barrier.store.commands
        await log.xadd(
            rig.barrier.keys.tasks,
            {name: value for name, value in entry.items() if value is not ...},
            id=f"{rig.epoch.number}-3",
        )
        told = await rig.tell()
        if fields.get("kind") == "verdict":
            assert kinds(told) == ["=> Idle"]
            return
        assert told == []
        assert rig.status == "Connected"
        assert any("of the task log is" in line for line in rig.log)


async def test_a_step_name_of_any_length_is_survived() -> None:
    """Regression: a report holds 96 characters of it, and the 97th killed the runner."""
    async with runner_rig() as rig:
        await rig.open()
        task = make_task("StartWarmup", rig.epoch)
        assert kinds(await rig.ask(task, step="s" * 100_000)) == ["ack", "Failed"]
        assert (await rig.outcome(task)).step == "s" * 96
        await goes_on(rig)


async def test_a_task_for_other_ranks_is_none_of_this_ones_business() -> None:
    async with runner_rig(world_size=4) as rig:
        await rig.open()
        for to in ("1-3", "3-1", "2-2"):
            assert await rig.ask(make_task("ConnectToGroup", rig.epoch), to=to) == []
        assert rig.status == "Idle"
        assert kinds(await rig.ask(make_task("ConnectToGroup", rig.epoch), to="0-0"))[0] == "Running"


# --- an entry that never came ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["Idle", "Connecting", "Connected", "Ready", "Running"])
async def test_a_gap_in_the_log_is_a_failure_of_this_rank(status: Any) -> None:
    """It has not done what the others may have done. Said at once; the task that showed the gap is answered as well."""
    async with runner_rig() as rig:
        await rig.reach(status)
        told = await rig.ask(make_task("LoadModel", rig.epoch), gap=1)
        assert kinds(told)[0] == "=> Failed"
        assert [one for one in kinds(told) if one != "=> Failed"] == (
            ["Failed", "ack", "Failed"] if status in ("Connecting", "Running") else ["ack", "Failed"]
        ), "the work under way has failed too, and the new task is refused"
        error = "an entry of the task log never reached this rank"
        assert rig.runner.status == RunnerFailed(error=error), "the cause, and not what came of it"
        report = await rig.report()
        assert (report.status, report.error, report.permanent) == ("Failed", error, False)
        assert "host kill" in rig.journal

        await rig.conclude()
        assert rig.status == "Idle"
        await rig.open()
        await goes_on(rig)


async def test_a_gap_before_a_shutdown_does_not_keep_it() -> None:
    async with runner_rig() as rig:
        await rig.reach("Connected")
        await rig.put(make_task("Shutdown", rig.epoch), gap=3)
        await rig.ended()
        assert rig.status == "Shutdown"


async def test_a_gap_in_another_epoch_is_no_failure() -> None:
    async with runner_rig() as rig:
        await rig.reach("Connected")
        newer = EpochId(rig.epoch.number + 5, rig.epoch.nonce)
        assert kinds(await rig.ask(make_task("LoadModel", newer), gap=9)) == ["ack", "Failed"]
        assert rig.status == "Connected"


async def test_the_same_entry_read_twice_is_answered_once() -> None:
    """A log that went back says its entries again; what this rank has applied already, it passes over."""
    async with runner_rig() as rig:
        await rig.open()
        rig.engine.release()
        await rig.ask(make_task("ConnectToGroup", rig.epoch))
        before = rig.store.snapshot()
        task = make_task("LoadModel", rig.epoch)
        await rig.ask(task)
        assert rig.status == "Loaded"
        rig.store.roll_back(before)  # the failover forgot the load …
        await rig.clock.advance(3 * rig.member.settings.heartbeat)
        await rig.tell()
        assert await rig.ask(task) == []  # … and the planner writes it again, under the place that it had
        assert rig.status == "Loaded"
        assert rig.engine.calls.count("load") == 1

"""A planner that checks nothing, against one real runner: any task, in any state, of any epoch, twice, cut off or hostile.

`Oracle` says what the runner must do with each task. It follows section 5 of the design, and uses no code of the runner. After every
task, the test compares the engine's real calls and the runner's status with it.
"""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loguru import logger

from barrier import EpochAnnounced, EpochId, LogId, TaskEntry
from barrier.testing import FaultPlan
from barrier.testing.waiting import settle
from runner.messages import RunnerStatusUpdated, Task, TaskKind, TaskStatusUpdated, encode
from runner.testing import Phase
from tests.depth import examples
from tests.unit.runner.rig import WAY, Rig, make_task, other_nonce, runner_rig

PHASES: dict[TaskKind, tuple[Phase, str]] = {kind: (phase, after) for kind, phase, _, after in WAY}
NEEDS: dict[TaskKind, str] = {
    "ConnectToGroup": "Idle",
    "LoadModel": "Connected",
    "StartWarmup": "Loaded",
    "TextGeneration": "Ready",
}
OVERSIZED = 300_000


@dataclass
class Oracle:
    """What one runner of several must be, as the design says it.

    Attributes:
        status: its status, once it has come to rest.
        epoch: what it has promised; ``None`` where it is in no epoch.
        done: the ids that it has accepted, or refused for good, in this epoch.
        used: whether an engine has been asked anything since the last tear-down.
        leaving: whether it was told to shut down.
    """

    status: str = "Idle"
    epoch: EpochId | None = None
    done: set[str] = field(default_factory=set[str])
    used: bool = False

    def accepts(self, task: Task) -> bool:
        """Whether this task may be begun."""
        if task.instance != "demo" or task.epoch != str(self.epoch) or task.task_id in self.done:
            return False
        return task.kind == "CancelTask" or NEEDS.get(task.kind) == self.status

    def take(self, task: Task, *, fails: bool) -> list[str]:
        """Begin and end it; returns the phases that the engine must have been asked for."""
        self.done.add(task.task_id)
        if task.kind == "CancelTask":
            return []
        phase, after = PHASES[task.kind]
        self.status = "Failed" if fails else after
        self.used = True
        return [phase]

    def leave(self) -> None:
        """The attempt is over."""
        self.status, self.epoch, self.used = "Idle", None, False
        self.done.clear()


WRONG = ("nonce", "old", "higher", "instance", "two epochs", "torn envelope")
"""What may be wrong with a task. The last two: task and log entry name different epochs, and one of the two is the right one."""

KINDS: tuple[TaskKind, ...] = ("ConnectToGroup", "LoadModel", "StartWarmup", "TextGeneration", "CancelTask")
moves = st.one_of(
    st.tuples(st.just("next"), st.booleans()),
    st.tuples(st.just("next"), st.just(False)),
    st.tuples(st.just("task"), st.sampled_from(KINDS)),
    st.tuples(st.just("task"), st.sampled_from(KINDS)),
    st.tuples(st.sampled_from(WRONG), st.sampled_from(KINDS)),
    st.tuples(st.just("next elsewhere"), st.sampled_from(WRONG)),
    st.tuples(st.just("again"), st.integers(0, 50)),
    st.tuples(st.just("bytes"), st.binary(max_size=60)),
    st.tuples(st.just("torn"), st.integers(1, 400)),
    st.tuples(
        st.sampled_from(("oversized", "conclude", "attempt", "announce again", "engine dies", "miss")), st.none()
    ),
)


class Trial:
    """One history: the runner, what it must be, and what was sent."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.oracle = Oracle()
        self.sent: list[Task] = []
        self.begun: set[str] = set()
        self.epochs: list[EpochId] = []
        self._journal_from = 0

    def phases(self) -> list[str]:
        """What the engine was asked since this was called last."""
        new = self.rig.journal[self._journal_from :]
        self._journal_from = len(self.rig.journal)
        return [one for one in new if one in ("connect", "load", "warm_up", "generate")]

    def next_kind(self) -> TaskKind | None:
        """The task that leads on from the present status, if one does."""
        return next((kind for kind, needed in NEEDS.items() if needed == self.oracle.status), None)

    async def attempt(self) -> None:
        """Another attempt: the one before is concluded first, if it goes on."""
        await self.conclude()
        self.epochs.append(await self.rig.open())
        self.oracle.epoch = self.epochs[-1]

    async def conclude(self) -> None:
        if self.oracle.epoch is None:
            return
        self.rig.journal.append("conclude")
        await self.rig.conclude()
        since = self.rig.journal[len(self.rig.journal) - 1 - self.rig.journal[::-1].index("conclude") :]
        assert not self.oracle.used or "close" in since or "host kill" in since or self.oracle.status == "Failed", (
            f"an attempt ended and its engine was not torn down: {since}"
        )
        self.oracle.leave()

    def wrong(self, how: str, kind: TaskKind) -> tuple[Task, EpochId]:
        """A task that is wrong in one respect, and the epoch that its entry in the log says."""
        epoch = self.oracle.epoch or self.epochs[-1]
        match how:
            case "nonce":
                other = other_nonce(epoch)
                return make_task(kind, other), other
            case "old":
                other = self.epochs[0] if self.epochs[0] != epoch else EpochId(1, "a" * 32)
                return make_task(kind, other), other
            case "higher":
                other = EpochId(epoch.number + 1, epoch.nonce)
                return make_task(kind, other), other
            case "instance":
                return make_task(kind, epoch, instance="other"), epoch
            case "torn envelope":
                return make_task(kind, epoch), other_nonce(epoch)
            case _:
                return make_task(kind, other_nonce(epoch)), epoch

    async def play(self, move: tuple[str, Any]) -> None:
        what, detail = move
        if what in WRONG or what == "next elsewhere":
            await self.play_wrong(what, detail)
        elif what in ("conclude", "attempt", "announce again", "engine dies"):
            await self.play_around(what)
        elif self.oracle.epoch is not None:
            await self.play_task(what, detail, self.oracle.epoch)
        await settle()

    async def play_task(self, what: str, detail: Any, epoch: EpochId) -> None:
        """What comes through the log of the present epoch: tasks in and out of turn, repeated, torn, too big, or with a gap before."""
        match what:
            case "next":
                kind = self.next_kind()
                if kind is not None:
                    if detail:
                        self.rig.engine.fail(PHASES[kind][0], "planned")
                    await self.send(make_task(kind, epoch), fails=detail)
            case "task":
                await self.send(make_task(detail, epoch))
            case "again":
                if self.sent:
                    await self.send(self.sent[int(detail) % len(self.sent)])
            case "bytes":
                await self.refuse(detail, epoch)
            case "torn":
                await self.refuse(encode(make_task("LoadModel", epoch))[:-detail] or b"{", epoch)
            case "oversized":
                await self.refuse(self.oversized(), epoch)
            case "miss":
                if self.oracle.status != "Failed":
                    await self.rig.put(make_task("CancelTask", epoch), gap=1)
                    await settle()
                    self.oracle.status = "Failed"
            case _:
                raise AssertionError(what)

    async def play_wrong(self, what: str, detail: Any) -> None:
        """A task that is wrong in one respect: of any kind, or of the one that leads on."""
        how, kind = (detail, self.next_kind()) if what == "next elsewhere" else (what, detail)
        if kind is not None:
            await self.refuse(*self.wrong(how, kind))

    async def play_around(self, what: str) -> None:
        """What happens beside the tasks: to the attempt, and to the engine."""
        match what:
            case "conclude":
                await self.conclude()
            case "attempt":
                await self.attempt()
            case "announce again":
                await self.announce_again()
            case "engine dies":
                if self.oracle.used and self.oracle.status != "Failed":
                    self.rig.host.die("was killed")
                    await settle()
                    self.oracle.status = "Failed"
            case _:
                raise AssertionError(what)

    def oversized(self) -> bytes:
        """The next task of the way, which would be accepted if it were not for its size."""
        kind = self.next_kind() or "LoadModel"
        task: dict[str, Any] = json.loads(encode(make_task(kind, self.oracle.epoch or self.epochs[-1])))
        return json.dumps(task).encode() + b" " * OVERSIZED

    async def announce_again(self) -> None:
        """An announcement that comes twice, of every epoch there was: none may be entered again."""
        for epoch in self.epochs:
            self.rig.member.deliver(EpochAnnounced(epoch))
        await settle()

    async def send(self, task: Task, *, fails: bool = False) -> None:
        """Send a task that is well formed and belongs to the present epoch, unless it is an old one again."""
        accepted = self.oracle.accepts(task)
        repeated = task.task_id in self.oracle.done
        current = task.epoch == str(self.oracle.epoch)  # an old one: the log has gone on, so it comes late
        told = await (self.rig.ask(task) if current else self.rig.ask_late(task))
        expected = self.oracle.take(task, fails=fails) if accepted else []
        assert self.phases() == expected, f"{task.kind} in {self.oracle.status}"
        answers = [one for one in told if isinstance(one, TaskStatusUpdated) and one.task_id == task.task_id]
        assert answers, f"{task.kind} got no answer"
        refused = [one for one in answers if one.rejection is not None]
        if accepted:
            assert not refused, f"{task.kind} was to be accepted, and was refused: {refused}"
            self.begun.add(task.task_id)
            self.sent.append(task)
        elif repeated and task.task_id in self.begun:
            assert len(answers) == 1, f"{task.kind} came again, and the answers are {answers}"
            assert not refused, f"a duplicate of {task.kind} was refused, instead of told what became of it"
        elif not repeated:
            assert len(refused) == 1, f"{task.kind} was to be refused once, and the answers are {answers}"
            self.sent.append(task)
            # What is refused for good stays refused under that id; what came too early may come again.
            rejection = refused[0].rejection
            if rejection is not None and not rejection.retryable and current:
                self.oracle.done.add(task.task_id)

    async def refuse(self, payload: Task | bytes, epoch: EpochId | None) -> None:
        """Send what can never be accepted here: it gets one answer, and nothing else happens."""
        if epoch is None:
            return
        await self.rig.tell()
        await self.entry(payload, epoch)
        told = await self.rig.tell()
        assert self.phases() == [], f"the engine was asked for something by {str(payload)[:200]}"
        refused = [one for one in told if isinstance(one, TaskStatusUpdated) and one.rejection is not None]
        if epoch == self.oracle.epoch:
            assert len(refused) == 1, f"one refusal was due, and there are {refused}"

    async def entry(self, payload: Task | bytes, epoch: EpochId) -> None:
        """Into the log where it fits there, otherwise handed over as if from a log that went back."""
        if epoch == self.oracle.epoch:
            await self.rig.put(payload, epoch=epoch)
        elif not isinstance(payload, bytes):
            last = self.rig.world_size - 1
            place = LogId(epoch.number, self.rig.member.report_now.applied + 1)
            self.rig.member.deliver(TaskEntry(epoch, place, place.n - 1, "late", 0, last, 1, encode(payload)))

    def check(self, move: object) -> None:
        """After every move: the process lives, and the status is the one that the design says."""
        assert self.rig.running is not None
        assert not self.rig.running.done(), f"the runner ended at {move}"
        assert self.rig.status == self.oracle.status, f"after {move}"
        promised = self.rig.member.promised
        assert promised == self.oracle.epoch, f"after {move} it has promised {promised}, and should {self.oracle.epoch}"


async def leave_at_work(trial: Trial, plan: FaultPlan, place: int, *, as_it_is_said: bool) -> None:
    """At the end of a history the runner is told to leave while it works; the work ends just then. It must leave all the same."""
    rig = trial.rig
    kind, phase, during, _ = WAY[place]
    for before, _, _, _ in WAY[:place]:
        if before != "TextGeneration":
            await rig.ask(make_task(before, rig.epoch))
    rig.engine.hold(phase, "close")
    await rig.ask(make_task(kind, rig.epoch))
    assert rig.status == during

    async def end_work() -> None:
        rig.engine.release(phase)
        await settle()

    if as_it_is_said:
        plan.after("exec", end_work, touching="|ShuttingDown|")
    told = await rig.ask(make_task("Shutdown", rig.epoch))
    if not as_it_is_said:
        await end_work()
    rig.engine.release("close")
    told += await rig.tell()
    await rig.ended()
    said = [one.status.kind for one in told if isinstance(one, RunnerStatusUpdated)]
    leaving = said[said.index("ShuttingDown") :]
    assert set(leaving) == {"ShuttingDown", "Shutdown"}, f"told to leave while {during}, it said {leaving}"


async def try_history(history: list[tuple[str, Any]], ending: tuple[int, bool]) -> None:
    plan = FaultPlan()
    async with runner_rig(auto=True, faults=plan) as rig:
        trial = Trial(rig)
        await trial.attempt()
        for move in history:
            await trial.play(move)
            trial.check(move)
        await trial.attempt()
        rig.engine.forget()
        assert trial.oracle.epoch is not None
        for kind, _, _, after in WAY:
            await rig.ask(make_task(kind, trial.oracle.epoch))
            assert rig.status == after, "after all that it serves"
        await trial.attempt()
        await leave_at_work(trial, plan, ending[0], as_it_is_said=ending[1])


@settings(
    max_examples=int(os.environ.get("RANKGATE_FUZZ_EXAMPLES") or examples(120)) // 4,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.lists(moves, min_size=5, max_size=30), st.tuples(st.integers(0, len(WAY) - 1), st.booleans()))
def test_no_planner_can_make_a_runner_act_out_of_turn(history: list[tuple[str, Any]], ending: tuple[int, bool]) -> None:
    for package in ("runner", "barrier"):
        logger.disable(package)  # thousands of refusals are right, and slow to print
    try:
        asyncio.run(try_history(history, ending))
    finally:
        for package in ("runner", "barrier"):
            logger.enable(package)

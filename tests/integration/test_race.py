"""The race is real: three runs with real processes, and the figures that `rankgate race` prints."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import get_args

import pytest

from barrier import EpochId
from planner.race import run_race
from planner.race.figures import RaceFigures, RunFigures, conclusions, table
from planner.race.mail import Kind, make_task
from planner.race.polling import due_tasks
from planner.race.process import FragileRunner
from planner.race.scenario import WORLD_SIZE
from runner import EngineGroup, GenerationRequest
from runner.admission import Accept, Promise, Standing, judge
from runner.messages import (
    ModelSpec,
    RunnerConnected,
    RunnerConnecting,
    RunnerIdle,
    RunnerLoaded,
    RunnerLoading,
    RunnerReady,
    RunnerStatus,
    RunnerWarmingUp,
)
from tests.integration.cluster import descendants

pytestmark = pytest.mark.anyio

FIGURES = RaceFigures(
    RunFigures("first", 5, None, 1, None, "ValueError: Received LoadModel outside of state machine"),
    RunFigures("second", 6, 5, 0, 9.31, breaches=14),
    RunFigures("third", 1, 0, 0, 8.12, breaches=0),
)


@pytest.mark.slow
async def test_the_three_runs() -> None:
    lines: list[str] = []

    figures = await run_race(lines.append)

    fragile, graceful, barrier = figures.runs
    told = "\n".join(lines)
    assert fragile.deaths >= 1, told
    assert fragile.ready_after is None, told
    assert fragile.last_words.startswith(
        "ValueError: Received LoadModel outside of state machine in current_status="
    ), told

    assert graceful.deaths == 0, told
    assert graceful.rejections is not None
    assert graceful.rejections >= 1, told
    assert graceful.ready_after is not None, told
    assert graceful.load_dispatches >= 2, "it was refused, and asked again"
    assert graceful.breaches is not None
    assert graceful.breaches > 0, "the checker sees what went past the gate"

    assert barrier.deaths == 0, told
    assert barrier.rejections == 0, told
    assert barrier.load_dispatches == 1, told
    assert barrier.ready_after is not None, told
    assert barrier.breaches == 0, told

    assert "rank 1 refused LoadModel (NotYet)" in told
    assert [line for line in table(figures) if line not in lines] == []
    left = descendants()
    assert left == set(), "no process is left behind"


# --- the planner that polls -----------------------------------------------------------------------------------------------


def test_it_sends_to_all_ranks_that_are_due_at_once() -> None:
    assert due_tasks({0: "Idle", 1: "Idle", 2: "Idle"}, {}, 0.0) == [("ConnectToGroup", [0, 1, 2])]
    assert due_tasks({0: "Connected", 1: "Connected", 2: "Connected"}, {}, 0.0) == [("LoadModel", [0, 1, 2])]
    assert due_tasks({0: "Loaded", 1: "Loaded", 2: "Loaded"}, {}, 0.0) == [("StartWarmup", [0, 1, 2])]


def test_it_does_not_go_on_while_a_rank_is_behind_or_missing_from_the_table() -> None:
    assert due_tasks({0: "Connected", 1: "Connecting", 2: "Connected"}, {}, 0.0) == []
    assert due_tasks({0: "Connected", 1: "Connected"}, {}, 0.0) == []
    assert due_tasks({0: "Connected", 1: "Failed", 2: "Connected"}, {}, 0.0) == []


def test_it_helps_those_that_are_behind() -> None:
    assert due_tasks({0: "Loading", 1: "Connected", 2: "Loaded"}, {}, 0.0) == [("LoadModel", [1])]


def test_it_sends_again_only_after_a_while() -> None:
    view = {0: "Connected", 1: "Connected", 2: "Connected"}
    sent: dict[tuple[Kind, int], float] = {("LoadModel", 0): 10.0, ("LoadModel", 1): 9.8}

    assert due_tasks(view, sent, 10.1) == [("LoadModel", [2])]
    assert due_tasks(view, sent, 10.4) == [("LoadModel", [1, 2])]


def test_it_is_deceived_by_an_old_word_and_by_nothing_else() -> None:
    """The table says Connected of a rank that is dead: that is all it takes."""
    truth = {0: "Connected", 2: "Connected"}

    assert due_tasks(truth, {}, 0.0) == []
    assert due_tasks({**truth, 1: "Connected"}, {}, 0.0) == [("LoadModel", [0, 1, 2])]


# --- the runner that does not forgive -------------------------------------------------------------------------------------

STATUSES: list[RunnerStatus] = [
    RunnerIdle(),
    RunnerConnecting(),
    RunnerConnected(),
    RunnerLoading(layers_loaded=1, total_layers=2),
    RunnerLoaded(),
    RunnerWarmingUp(),
    RunnerReady(),
]


class EasyEngine:
    """Does everything at once."""

    async def prepare(self, rank: int, world_size: int) -> str | None:
        return None

    async def connect(self, group: EngineGroup) -> None:
        pass

    async def load(self, model: ModelSpec) -> AsyncGenerator[int, None]:
        yield model.total_layers

    async def warm_up(self) -> None:
        pass

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[str, None]:
        yield request.task_id

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("status", STATUSES, ids=lambda status: status.kind)
@pytest.mark.parametrize("kind", get_args(Kind))
async def test_the_fragile_runner_accepts_what_ours_accepts_and_raises_what_exo_raises(
    status: RunnerStatus, kind: Kind
) -> None:
    """It is no straw man: it differs from ours in one thing only, in what it does with a task that comes out of state."""
    runner = FragileRunner(0, EasyEngine())
    runner.status = status
    task = make_task(kind, "race", EpochId(1, "0" * 32), 0)
    promise = Promise(EpochId(1, "0" * 32), "i", WORLD_SIZE)
    ours = judge(Standing("race", status.kind, "i", promise), task)

    if isinstance(ours, Accept):
        await runner.handle(task)
        assert runner.status.kind in ACCEPTED_ENDS
    else:
        sentence = f"Received {kind} outside of state machine in current_status=Runner{status.kind}()"
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            await runner.handle(task)
        assert runner.status == status


ACCEPTED_ENDS = ("Connected", "Loaded", "Ready")


# --- the table ------------------------------------------------------------------------------------------------------------


def test_the_table() -> None:
    assert table(FIGURES) == [
        "                         stale statuses,   stale statuses,      the barrier,",
        "                          fragile runner   refusing runner   refusing runner",
        "----------------------------------------------------------------------------",
        "LoadModel dispatched                   5                 6                 1",
        "tasks refused              cannot refuse                 5                 0",
        "processes that died                    1                 0                 0",
        "all ranks Ready                    never       after 9.3 s       after 8.1 s",
    ]
    assert max(len(line) for line in table(FIGURES)) <= 80


def test_the_conclusions() -> None:
    assert conclusions(FIGURES) == [
        "1. A task out of state ended a process: ValueError: Received LoadModel outside of state machine",
        "2. No process died. Runners refused 5 tasks. The planner sent LoadModel 6 times.",
        "3. LoadModel was dispatched once, when every rank was connected, and no task was refused.",
    ]


def test_the_conclusions_are_honest_where_the_race_did_not_happen() -> None:
    lucky = RaceFigures(
        replace(FIGURES.stale_and_fragile, deaths=0, ready_after=5.0, last_words=""),
        replace(FIGURES.stale_and_graceful, rejections=0),
        FIGURES.with_barrier,
    )

    first, second, _ = conclusions(lucky)

    assert first == "1. This time the race did not happen: no process died. Run it again."
    assert second == "2. This time the race did not happen: nothing was refused. Run it again."


def test_the_conclusions_are_honest_where_the_barrier_failed() -> None:
    for broken in (
        replace(FIGURES.with_barrier, rejections=1),
        replace(FIGURES.with_barrier, deaths=1, last_words="oops"),
        replace(FIGURES.with_barrier, ready_after=None),
    ):
        third = conclusions(replace(FIGURES, with_barrier=broken))[2]
        assert third.startswith("3. This is not what the barrier promises")
    twice = conclusions(replace(FIGURES, with_barrier=replace(FIGURES.with_barrier, load_dispatches=2)))[2]
    assert "LoadModel was dispatched 2 times" in twice

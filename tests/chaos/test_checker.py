"""The checker of the chaos runs finds each kind of breach. The breaches are made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from barrier import EpochId, Verdict
from barrier.protocol.ids import LogId
from planner.history import EpochConcluded, History
from tests.chaos.checker import judge_journal, judge_verdicts
from tests.chaos.faults import Injected
from tests.chaos.journal import Line, What

SIZES = {"demo": 2}
PIDS = (100, 200)


def attempt(epoch: str, begin: int) -> list[Line]:
    """A whole attempt of two ranks, in which everything goes as it should."""
    lines: list[Line] = []
    steps: tuple[tuple[str, What, What], ...] = (
        ("ConnectToGroup", "connect", "connected"),
        ("LoadModel", "load", "loaded"),
        ("StartWarmup", "warm", "warmed"),
    )
    for task, first, last in steps:
        for rank, pid in enumerate(PIDS):
            lines.append(Line(0, "accept", "demo", rank, pid, epoch, task, f"{task}.{epoch}"))
            lines.append(Line(0, first, "demo", rank, pid))
        lines += [Line(0, last, "demo", rank, pid) for rank, pid in enumerate(PIDS)]
    return [replace(line, t=begin + place) for place, line in enumerate(lines)]


def renumbered(lines: list[Line]) -> list[Line]:
    return [replace(line, t=place) for place, line in enumerate(lines)]


def test_a_healthy_run_has_no_breach() -> None:
    judged = judge_journal(attempt("5-a", 0) + attempt("6-b", 100), SIZES)
    assert judged.breaches == ()
    assert judged.bring_ups == {"demo": 2}
    assert judged.loads == 4


def test_an_attempt_that_was_cut_short_is_no_bring_up() -> None:
    judged = judge_journal(attempt("5-a", 0)[:-1], SIZES)
    assert judged.breaches == ()
    assert judged.bring_ups == {}
    assert judged.attempts == {"demo": 1}


def test_a_load_before_every_engine_was_connected() -> None:
    lines = attempt("5-a", 0)
    late = next(line for line in lines if line.what == "connected" and line.rank == 1)
    lines.remove(late)
    place = next(place for place, line in enumerate(lines) if line.task == "LoadModel") + 1
    lines.insert(place, late)
    (breach,) = judge_journal(renumbered(lines), SIZES).breaches
    assert breach == "demo, epoch 5: LoadModel was accepted before the engine of rank 1 was connected"


def test_a_load_that_was_accepted_twice_in_one_epoch() -> None:
    lines = attempt("5-a", 0)
    again = [replace(line, t=1_000, runner=300) for line in lines if line.task == "LoadModel" and line.rank == 0]
    (breach,) = judge_journal(lines + again, SIZES).breaches
    assert breach == "demo, epoch 5: rank 0 accepted LoadModel 2 times"


def test_an_engine_that_loads_twice_for_one_task() -> None:
    (breach,) = judge_journal([*attempt("5-a", 0), Line(1_000, "load", "demo", 0, PIDS[0])], SIZES).breaches
    assert breach == "demo, epoch 5: the engine of rank 0 began to load 2 times"


def test_an_engine_that_does_what_nobody_accepted() -> None:
    (breach,) = judge_journal([Line(1, "load", "demo", 0, PIDS[0])], SIZES).breaches
    assert "which nobody had accepted" in breach


def test_work_in_an_epoch_after_a_rank_connected_in_a_higher_one() -> None:
    first, second = attempt("5-a", 0), attempt("6-b", 100)
    late = replace(first[-1], t=102)
    lines = sorted([*first[:-1], *second, late], key=lambda line: line.t)
    breaches = judge_journal(lines, SIZES).breaches
    assert breaches == ("demo: rank 1 did warmed  in epoch 5, after a rank had begun to connect in epoch 6",)
    assert (
        judge_journal(lines, SIZES, replaced=[PIDS[1]]).breaches == ()
    )  # its engine may run on: docs/operate.md says so


def concluded(culprit: int | None, at: float) -> History:
    verdict = Verdict.aborted("rank 1 fell silent: no report", culprit)
    return History.of("demo", [EpochConcluded(LogId(round(at * 1000), 0), EpochId(5, "a"), verdict)])


def fault(instance: str, ranks: tuple[int, ...], *, world: str = "here", machine: bool = False) -> Injected:
    return Injected("SIGKILL of a runner", world, instance, ranks, began=100.0, ended=101.0, machine=machine)


@pytest.mark.parametrize(
    ("blamed", "at", "faults", "noisy", "true"),
    [
        pytest.param(1, 100.5, [fault("demo", (1,))], [], True, id="the rank that was touched"),
        pytest.param(1, 100.5, [fault("demo", (0,))], [], False, id="another rank"),
        pytest.param(1, 100.5, [fault("other", (1,))], [], False, id="another instance"),
        pytest.param(1, 103.5, [fault("demo", (1,))], [], True, id="a consequence"),
        pytest.param(1, 140.0, [fault("demo", (1,))], [], False, id="long after"),
        pytest.param(1, 100.5, [fault("", ())], [], True, id="the store or a planner"),
        pytest.param(1, 100.5, [fault("", (), world="there")], [], False, id="another world's store"),
        pytest.param(1, 100.5, [fault("", (), world="there", machine=True)], [], True, id="the machine's processors"),
        pytest.param(1, 100.5, [], [99.0], True, id="the machine stood still"),
        pytest.param(1, 100.5, [], [], False, id="nothing at all"),
        pytest.param(None, 100.5, [], [], True, id="nobody is blamed"),
    ],
)
def test_a_verdict_is_true_where_whom_it_blames_was_touched(
    blamed: int | None, at: float, faults: list[Injected], noisy: list[float], true: bool
) -> None:
    verdicts = judge_verdicts("demo", [concluded(blamed, at)], faults, "here", noisy, slack=10.0)
    assert (verdicts.unexplained == ()) == true
    assert verdicts.counts == {"a rank fell silent": 1}

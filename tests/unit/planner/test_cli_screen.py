"""What is shown is a pure function of a picture, so it is compared to the letter."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console, RenderableType

from barrier import Verdict
from barrier.spares import Spare
from planner.cli.look import Seen, news, overview, unattended, whole_overview
from planner.cli.report import time_report
from planner.cli.screen import (
    Picture,
    bar,
    changes,
    merged,
    render,
    rows,
    sentence,
    sentence_key,
    serves,
    shortened,
    waited_for_ranks,
)
from planner.cli.show import LiveShow, PlainShow, make_show
from planner.history import Timeline
from planner.launcher import ProcessState, Program
from planner.registry import InstanceRecord
from tests.unit.planner.pictures import EPOCH, LATER, life, picture, rank, spec

DOCTORED: dict[str, Any] = {"node": "vm", "status_ms": 1_200}


def shown(what: RenderableType, *, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=24, color_system=None, force_terminal=False)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def look(*statuses: str, **changed: Any) -> Picture:
    """A picture of runners of ours, with pids 100, 101, …"""
    everyone = DOCTORED | {"pid": 0}
    ranks = {n: {"pid": 100 + n} for n in range(len(statuses))}
    for number, extra in changed.pop("ranks", {}).items():
        ranks[number] |= extra
    snapshot = picture(*statuses, everyone=everyone, ranks=ranks, **changed)
    processes = tuple(process(n) for n in range(len(statuses)))
    return Picture("demo", len(statuses), 16, snapshot=snapshot, processes=processes, elapsed=2.5)


def process(rank: int, **changed: Any) -> ProcessState:
    made = ProcessState(Program(f"rank {rank}", ("x",), ranks=range(rank, rank + 1)), phase="running", pid=100 + rank)
    return replace(made, **changed)


# --- the whole screen -----------------------------------------------------------------------------------------------------


def test_one_rank_is_waited_for() -> None:
    seen = look("Connected", "Connected", "Connected", "Connecting", dispatched=1)
    seen = replace(seen, title=("simulated, 16 layers", "embedded Valkey, pid 99"))
    assert shown(render(seen, width=80, height=24)) == [
        "demo · 2.5 s · attempt 1 · 4 ranks · simulated, 16 layers · embedded Valkey, pi…",
        "rank  node  pid  status      layers            lease  note",
        "   0  vm    100  Connected   ░░░░░░░░░░  0/16  5.0 s",
        "   1  vm    101  Connected   ░░░░░░░░░░  0/16  5.0 s",
        "   2  vm    102  Connected   ░░░░░░░░░░  0/16  5.0 s",
        "   3  vm    103  Connecting  ░░░░░░░░░░  0/16  5.0 s  waited for",
        "demo, attempt 1: waiting for 1 of 4 ranks: rank 3 on vm (Connecting for 2.2 s,",
        "wanted Connected; report 1.0 s old, lease 5.0 s left)",
    ]


def test_layers_move_while_loading_and_stay_once_loaded() -> None:
    seen = look("Loaded", "Loading", dispatched=2, ranks={1: {"progress": (10, 16)}})
    assert shown(render(seen, width=80, height=24))[2:4] == [
        "   0  vm    100  Loaded      ██████████ 16/16  5.0 s",
        "   1  vm    101  Loading     ██████░░░░ 10/16  5.0 s  waited for",
    ]


def test_serving_with_a_text() -> None:
    seen = replace(look("Running", "Ready", dispatched=4), text="[simulated text] alder amber")
    assert shown(render(seen, width=80, height=24))[2:] == [
        "   0  vm    100  Running     ██████████ 16/16  5.0 s",
        "   1  vm    101  Ready       ██████████ 16/16  5.0 s",
        "demo serves",
        "[simulated text] alder amber",
    ]


def test_the_layers_of_a_rank_that_generates_stay_and_its_tokens_are_a_note() -> None:
    seen = look("Running", "Running", dispatched=4, ranks={0: {"progress": (3, 64)}})
    assert shown(render(seen, width=80, height=24))[2:4] == [
        "   0  vm    100  Running     ██████████ 16/16  5.0 s  3 of 64 tokens",
        "   1  vm    101  Running     ██████████ 16/16  5.0 s",
    ]


def test_before_anything_is_known() -> None:
    seen = Picture(
        "demo", 2, 16, processes=(process(0), process(1, phase="pausing", pid=None)), reason="not looked yet"
    )
    assert shown(render(seen, width=80, height=24)) == [
        "demo · 2 ranks",
        "rank  node  pid  status      layers            lease  note",
        "   0  -     100  starting    ░░░░░░░░░░  0/16      -",
        "   1  -       -  absent      ░░░░░░░░░░  0/16      -",
        "not looked yet",
    ]


def test_a_failure_and_a_restart_are_noted() -> None:
    seen = look("Failed", "Idle", "-", "Idle", dispatched=1, ranks={0: {"error": "no such model"}})
    states = (
        process(0),
        process(1, restarts=2, pid=201),
        process(2, phase="pausing", pid=None, last_exit="exit code 1"),
    )
    seen = replace(seen, processes=(*states, process(3, phase="given up", pid=None, last_exit="exit code 2")))
    assert shown(render(seen, width=120, height=24), width=120)[2:6] == [
        "   0  vm    100  Failed      ░░░░░░░░░░  0/16  5.0 s  no such model; waited for",
        "   1  vm    201  Idle        ░░░░░░░░░░  0/16  5.0 s  waited for; restarted 2×, waits for the old lease",
        "   2  -       -  absent      ░░░░░░░░░░  0/16      -  waited for; died: exit code 1",
        "   3  vm    103  Idle        ░░░░░░░░░░  0/16  5.0 s  waited for; given up: exit code 2",
    ]


def test_a_report_that_cannot_be_read_is_not_an_absent_rank() -> None:
    seen = replace(look("Idle", "-", ranks={1: {"undecodable": "not a report"}}), processes=())
    assert [row.status for row in rows(seen)] == ["Idle", "unreadable"]


def test_a_long_note_is_cut_and_takes_nothing_from_the_rest() -> None:
    seen = look("Failed", "Idle", dispatched=1, ranks={0: {"error": "there is no such model " * 9}})
    lines = shown(render(seen, width=80, height=24))
    assert lines[2] == "   0  vm    100  Failed      ░░░░░░░░░░  0/16  5.0 s  there is no such model th…"
    assert len(lines[2]) <= 80


@pytest.mark.parametrize("size", [64, 500])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 35), (40, 10)])
def test_the_screen_never_grows_beyond_the_terminal(size: int, width: int, height: int) -> None:
    statuses = ["Connecting" if n % 2 else "Connected" for n in range(size)]
    seen = replace(look(*statuses, dispatched=1), text="word " * 500)
    lines = shown(render(seen, width=width, height=height), width=width)
    assert len(lines) <= max(height, 13)
    assert max(len(line) for line in lines) <= width


def test_neighbours_of_which_the_same_is_true_share_a_row_where_there_is_no_room() -> None:
    statuses = ["Connected"] * 30 + ["Connecting"] + ["Connected"] * 33
    lines = shown(render(look(*statuses, dispatched=1), width=80, height=24))
    assert lines[1:5] == [
        " rank  node  pid  status      layers            lease  note",
        " 0-29  vm      -  Connected   ░░░░░░░░░░  0/16  5.0 s",
        "   30  vm    130  Connecting  ░░░░░░░░░░  0/16  5.0 s  waited for",
        "31-63  vm      -  Connected   ░░░░░░░░░░  0/16  5.0 s",
    ]


def test_where_even_that_does_not_fit_the_ranks_that_are_waited_for_stay() -> None:
    statuses = ["Connecting" if n in (41, 43) else "Idle" if n % 2 else "Connected" for n in range(64)]
    seen = look(*statuses, dispatched=0)  # Idle is what is wanted
    short, hidden = merged(rows(seen), 10)
    assert len(short) == 9
    assert all(row.waited_for for row in short)
    assert hidden == 64 - 9
    assert [row.first for row in short] == sorted(row.first for row in short)


def test_merged_rows_tell_the_slowest_and_the_shortest() -> None:
    ranks = {0: {"progress": (9, 16)}, 1: {"progress": (4, 16)}, 2: {"progress": (12, 16)}}
    seen = look("Loading", "Loading", "Loading", dispatched=2, ranks=ranks)
    (only,), hidden = merged(rows(seen), 2)
    assert (only.ranks, only.layers, only.pid, only.lease_ms, hidden) == ("0-2", (4, 16), 0, 5_000, 0)


# --- its parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ((0, 16), "░░░░░░░░░░  0/16"),
        ((1, 16), "░░░░░░░░░░  1/16"),
        ((8, 16), "█████░░░░░  8/16"),
        ((15, 16), "█████████░ 15/16"),
        ((16, 16), "██████████ 16/16"),
        ((1, 1), "██████████ 1/1"),
        ((0, 0), "░░░░░░░░░░ 0/0"),
    ],
)
def test_a_bar_is_full_only_at_the_end(layers: tuple[int, int], text: str) -> None:
    assert bar(layers) == text


def test_a_text_is_shortened_to_the_letter() -> None:
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdef", 5) == "abcd…"
    assert len(shortened("abc def", 5)) <= 5


@pytest.mark.parametrize(
    ("seen", "waited_for"),
    [
        (look("Idle", "Idle"), set[int]()),
        (look("Connecting", "Connected", dispatched=1), {0}),
        (look("Loaded", "Loading", dispatched=2), {1}),
        (look("Loaded", "WarmingUp", dispatched=4), {0, 1}),
        (look("Ready", "Running", dispatched=4), set[int]()),
        (look("Ready", "Failed", dispatched=4), {1}),
        (look("Connected", "-", dispatched=1), {1}),
        (look("Connected", "Connected", dispatched=1, ranks={1: {"epoch": LATER}}), {1}),
        (look("Connected", "Connected", dispatched=1, ranks={1: {"incarnation": life(1, 9)}}), {1}),
        (look("Idle", "Connected", opened=False), set[int]()),
        (look("Idle", "Connected", verdict=Verdict.stopped()), set[int]()),
    ],
)
def test_who_is_waited_for(seen: Picture, waited_for: set[int]) -> None:
    assert waited_for_ranks(seen.snapshot) == waited_for


def test_the_sentence_is_the_barriers_while_an_attempt_goes_on_and_the_planners_otherwise() -> None:
    planned = {"reason": "pausing before the next attempt"}
    assert sentence(replace(look("Ready", "Ready", dispatched=4), **planned)) == "demo serves"
    assert sentence(replace(look("Connecting", "Connected", dispatched=1), **planned)).startswith(
        "demo, attempt 1: waiting for 1 of 2 ranks: rank 0 on vm"
    )
    over = replace(look("Idle", "Idle", verdict=Verdict.aborted("rank 1 was restarted", 1)), **planned)
    assert sentence(over) == "pausing before the next attempt"
    assert sentence(Picture("demo", 2, 16, reason="not looked yet")) == "not looked yet"


def test_ages_and_progress_do_not_make_a_sentence_new_but_ranks_and_steps_do() -> None:
    waiting = look("Loading", "Loaded", dispatched=2, ranks={0: {"progress": (1, 16)}})
    later = look("Loading", "Loaded", dispatched=2, ranks={0: {"progress": (9, 16), "status_ms": 9_000}})
    assert sentence(waiting) != sentence(later)
    assert sentence_key(waiting) == sentence_key(later)
    assert sentence_key(waiting) != sentence_key(look("Loading", "Loading", dispatched=2))
    assert sentence_key(look("Idle", "-", dispatched=0)) != sentence_key(look("Idle", "-", dispatched=1))


def test_changes_are_told_by_status_and_neighbours_together() -> None:
    before = rows(look("Idle", "Idle", "Idle", "Idle", "-"))
    after = rows(look("Connecting", "Connecting", "Idle", "Connecting", "Idle"))
    assert changes(before, after) == ["rank 4: Idle", "ranks 0-1, 3: Connecting"]
    assert changes(after, after) == []
    assert changes([], rows(replace(look("-", "Idle"), processes=()))) == ["rank 1: Idle"]


# --- plain lines ----------------------------------------------------------------------------------------------------------


class Paper:
    """A plain show that remembers what it printed."""

    def __init__(self, *, with_text: bool = True) -> None:
        self._file = io.StringIO()
        self.show = PlainShow(Console(file=self._file, width=20, color_system=None), with_text=with_text)

    @property
    def lines(self) -> list[str]:
        return self._file.getvalue().splitlines()


def test_one_plain_line_a_change_however_narrow_the_console() -> None:
    paper = Paper()
    waiting = look("Connected", "Connecting", dispatched=1)
    with paper.show as show:
        show.update(replace(look("-", "-"), snapshot=None, elapsed=0.1))
        show.update(replace(waiting, elapsed=0.5))
        show.update(replace(waiting, elapsed=0.7))
        show.update(replace(waiting, elapsed=0.9))
        show.update(replace(waiting, elapsed=1.9))
        show.update(replace(look("Ready", "Ready", dispatched=4), elapsed=2.0))
    assert paper.lines == [
        "    0.10 s  ranks 0-1: starting",
        "    0.50 s  attempt 1 begins",
        "    0.50 s  rank 1: Connecting",
        "    0.50 s  rank 0: Connected",
        f"    0.90 s  {sentence(waiting)}",
        "    2.00 s  ranks 0-1: Ready",
        "    2.00 s  demo serves",
    ]


def test_a_text_is_not_torn_apart_by_the_ranks_that_run_for_it() -> None:
    paper = Paper()
    ready, running = look("Ready", "Ready", dispatched=4), look("Running", "Running", dispatched=4)
    with paper.show as show:
        show.update(ready)
        show.text("once ")
        show.update(running)
        show.text("upon")
        show.update(ready)
        show.text(" a time")
    assert paper.lines[-1] == "once upon a time"


def test_a_failure_is_told_in_the_middle_of_a_text_on_a_line_of_its_own() -> None:
    paper = Paper()
    with paper.show as show:
        show.update(look("Ready", "Ready", dispatched=4))
        show.text("once ")
        show.update(look("Running", "Failed", dispatched=4))
    assert paper.lines[-3:] == ["once ", "    2.50 s  rank 0: Running", "    2.50 s  rank 1: Failed"]


def test_who_watches_sees_the_ranks_run() -> None:
    paper = Paper(with_text=False)
    with paper.show as show:
        show.update(look("Ready", "Ready", dispatched=4))
        show.update(look("Running", "Running", dispatched=4))
        show.text("not for us")
    assert paper.lines[-1] == "    2.50 s  ranks 0-1: Running"


def test_the_table_is_for_terminals_that_can_move_their_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(make_show(Console(file=io.StringIO(), force_terminal=True)), LiveShow)
    assert isinstance(make_show(Console(file=io.StringIO(), force_terminal=False)), PlainShow)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_show(Console(file=io.StringIO(), force_terminal=True)), PlainShow)


def test_lines_scroll_by_above_the_table_and_hold_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, height=24, color_system=None)
    with LiveShow(console) as show:
        show.update(look("Idle", "Idle"))
        show.say("[rank 1] 12:00:00 WARNING [bold]as it is[/bold]")
        show.update(look("Ready", "Ready", dispatched=4))
    written = file.getvalue()
    assert "[rank 1] 12:00:00 WARNING [bold]as it is[/bold]" in written
    assert written.rindex("demo serves") > written.rindex("as it is")
    assert written.endswith("\x1b[?25h"), "the cursor is shown again"


# --- lists and reports ----------------------------------------------------------------------------------------------------


def seen_as(*statuses: str, desired: Any = "up", failure: str = "", leads: int = 1_000, **changed: Any) -> Seen:
    snapshot = picture(*statuses, **changed)
    leader = {"leader": _leader(), "leader_left_ms": leads}
    record = InstanceRecord(spec=spec(len(statuses)), desired=desired, failure=failure)
    return Seen("demo", record, replace(snapshot, **leader))


def _leader() -> Any:
    from barrier import Leadership

    return Leadership(3, "planner-a")


@pytest.mark.parametrize(
    ("seen", "state"),
    [
        (seen_as("Idle", "-", opened=False), "assembling"),
        (seen_as("Idle", "Idle"), "before connect"),
        (seen_as("Connecting", "Connected", dispatched=1), "before load"),
        (seen_as("WarmingUp", "WarmingUp", dispatched=4), "warming up"),
        (seen_as("Ready", "Running", dispatched=4), "serving"),
        (seen_as("Idle", "Idle", verdict=Verdict.aborted("no")), "between attempts"),
        (seen_as("Idle", "Idle", verdict=Verdict.aborted("no"), failure="hopeless"), "given up"),
        (seen_as("Ready", "Ready", dispatched=4, desired="down"), "stopping"),
        (seen_as("Idle", "Idle", verdict=Verdict.stopped(), desired="gone"), "stopped"),
    ],
)
def test_the_state_in_a_word(seen: Seen, state: str) -> None:
    assert seen.state == state


def test_an_instance_that_nobody_plans_says_so() -> None:
    assert seen_as("Idle", "-").explanation.startswith("demo, attempt 1: waiting for 1 of 2 ranks: rank 1")
    said = seen_as("Idle", "-", leads=0).explanation
    assert said.endswith("; no planner looks after it: start one with rankgate planner")
    assert seen_as("Idle", "Idle", failure="rank 1 is hopeless", leads=0).explanation == "rank 1 is hopeless"


@pytest.mark.parametrize(
    ("seen", "told"),
    [
        (
            seen_as("Idle", "-", verdict=Verdict.aborted("rank 1 left", 1)),
            (
                "demo, attempt 1 ended: rank 1 left; waiting for 1 of 2 ranks to come: rank 1. Start the missing runners; the next "
                "attempt of demo begins by itself when they come"
            ),
        ),
        (
            seen_as("Idle", "Idle", verdict=Verdict.aborted("rank 1 left", 1)),
            "demo, attempt 1 ended: rank 1 left; all 2 ranks are here, and the next attempt begins after a pause",
        ),
        (
            seen_as("Idle", "-", verdict=Verdict.stopped()),  # and launched anew
            (
                "demo, attempt 1 was stopped; waiting for 1 of 2 ranks to come: rank 1. Start the missing runners; the next attempt "
                "of demo begins by itself when they come"
            ),
        ),
        (
            seen_as("-", "-", opened=False, desired="gone"),
            "demo was stopped before any attempt was opened; to bring it up again, run rankgate launch demo",
        ),
        (
            seen_as("Idle", "Idle", failure="demo is given up"),
            "demo is given up. The planner does not try again by itself: repair the cause, then run rankgate launch demo",
        ),
        (
            seen_as("Idle", "Idle", verdict=Verdict.stopped(), desired="gone"),
            "demo, attempt 1: Stopped: stop was asked for; to bring it up again, run rankgate launch demo",
        ),
    ],
)
def test_what_happened_what_is_waited_for_and_what_to_do_are_told_in_this_order(seen: Seen, told: str) -> None:
    assert seen.told == told


def test_an_instance_that_serves_and_that_nobody_plans_says_so_too() -> None:
    """A leader that was killed: the ranks serve on, and nobody would hand a prompt to them."""
    serving = seen_as("Ready", "Ready", dispatched=4)
    assert serving.explanation == "demo, attempt 1: all 2 ranks are Ready or Running"
    assert unattended([serving]) == ""
    assert "no planner" not in serving.picture.title
    alone = seen_as("Ready", "Ready", dispatched=4, leads=0)
    assert alone.explanation == f"{serving.explanation}; no planner looks after it: start one with rankgate planner"
    assert alone.picture.title[:2] == ("serving", "no planner")
    assert alone.as_json()["planner"] is None
    assert shown(whole_overview([serving, alone], "rankgate"))[-1] == (
        "no planner looks after demo: start one with rankgate planner"
    )
    stopped = seen_as("Idle", "Idle", verdict=Verdict.stopped(), desired="gone", leads=0)
    assert "no planner" not in stopped.explanation
    assert unattended([stopped]) == ""


def test_an_attempt_of_another_spec_does_not_serve() -> None:
    """The launch has replaced the desired state, and the planner has not ended the old attempt yet."""
    seen = seen_as("Ready", "Ready", dispatched=4, epoch={"digest": "ab"})
    assert not seen.serving
    assert seen.state == "changing"
    assert "attempt 1 has the old spec" in seen.explanation
    assert sentence(seen.picture) == seen.explanation
    assert not serves(seen.picture)
    assert sentence_key(seen.picture) == seen.explanation
    assert not any(row.waited_for for row in rows(seen.picture))


def test_an_attempt_of_another_size_is_shown_all_the_same() -> None:
    seen = seen_as("Ready", "Ready", "Idle", dispatched=4)
    assert seen.snapshot.epoch is not None
    smaller = replace(seen.snapshot.epoch, digest="ab", world_size=2, roster=(life(0), life(1)))
    seen = replace(seen, snapshot=replace(seen.snapshot, epoch=smaller))
    assert seen.state == "changing"
    assert shown(render(seen.picture, width=200, height=24), width=200)[-1] == seen.explanation


def test_the_list_of_instances() -> None:
    everything = [seen_as("Ready", "Ready", dispatched=4), seen_as("Idle", "-", opened=False, leads=0)]
    assert shown(overview(everything, "rankgate")) == [
        "instance  state       ranks   attempt  model      planner",
        "demo      serving     2 of 2        1  simulated  planner-a",
        "demo      assembling  1 of 2        -  simulated  none",
    ]
    assert shown(overview([], "blue")) == [
        "no instance in namespace blue; launch one with rankgate launch NAME --world-size",
        "N",
    ]


def test_who_waits_and_who_is_surplus_is_shown() -> None:
    report = rank(5, "Idle", node="box-5", pid=9).report
    assert report is not None
    spares = (Spare("a", "box-3\x1b[2J", 77, None, 32_400), Spare("b", "box-4", 78, 2, 1_000))
    seen = replace(seen_as("Ready", "Ready", dispatched=4), spares=spares, surplus=(report,))
    assert (
        shown(overview([seen], "rankgate"))[1]
        == "demo      serving  2 of 2, 2 spare, 1 surplus        1  simulated  planner-a"
    )
    lines = shown(render(seen.picture, width=100, height=24), width=100)
    assert lines[4:7] == [
        "spare: node 'box-3\\x1b[2J', pid 77, waits for any rank for 32 s",
        "spare: node 'box-4', pid 78, waits for rank 2 for 1 s",
        "surplus: node 'box-5', pid 9, holds rank 5, and demo has ranks 0 to 1",
    ]
    many = replace(seen, spares=tuple(replace(spares[0], incarnation=f"a{n}") for n in range(20)))
    assert len(shown(render(many.picture, width=100, height=24), width=100)) <= 24
    told = seen.as_json()
    assert told["spares"][1] == {"node": "box-4", "pid": 78, "incarnation": "b", "rank": 2, "waited_ms": 1_000}
    assert (told["surplus"][0]["rank"], told["surplus"][0]["pid"]) == (5, 9)


def test_what_is_new_beside_the_ranks_is_a_line_each() -> None:
    """Where no table can be drawn; the waiting time of a spare is no news."""
    spares = (Spare("a", "box-3\x1b[2J", 77, None, 32_400), Spare("b", "box-4", 78, 2, 1_000))
    surplus = rank(5, "Idle", node="box-5", pid=9).report
    assert surplus is not None
    serving = seen_as("Ready", "Ready", dispatched=4)
    crowded = replace(serving, spares=spares, surplus=(surplus,))
    later = replace(crowded, spares=tuple(replace(one, waited_ms=one.waited_ms + 5_000) for one in spares))
    alone = replace(serving, snapshot=replace(serving.snapshot, leader=None, leader_left_ms=0))
    assert news(None, serving) == []
    assert (
        news(serving, crowded)
        == news(None, crowded)
        == [
            "spare: node 'box-3\\x1b[2J', pid 77, waits for any rank for 32 s",
            "spare: node 'box-4', pid 78, waits for rank 2 for 1 s",
            "surplus: node 'box-5', pid 9, holds rank 5, and demo has ranks 0 to 1",
        ]
    )
    assert news(crowded, later) == []
    assert news(later, replace(serving, spares=spares[:1])) == [
        "spare: node 'box-4', pid 78, is gone",
        "surplus: node 'box-5', pid 9, is gone",
    ]
    assert (
        news(None, alone)
        == news(serving, alone)
        == ["demo: no planner looks after it: start one with rankgate planner"]
    )
    assert news(alone, alone) == []
    assert news(alone, serving) == ["demo: a planner looks after it again"]


def test_a_rank_that_goes_is_told_and_one_that_never_came_is_not() -> None:
    before, after = rows(seen_as("Ready", "-").picture), rows(seen_as("-", "-").picture)
    assert changes([], before) == ["rank 0: Ready"]
    assert changes(before, after) == ["rank 0: absent"]
    assert changes(after, after) == []


def test_json_for_programs() -> None:
    said = seen_as("Loading", "-", dispatched=2, ranks={0: {"progress": (3, 16), "pid": 42}}).as_json()
    assert said["state"] == "before warm up followers"
    assert said["serving"] is False
    assert said["epoch"] == {
        "number": EPOCH.number,
        "attempt": 1,
        "steps": ["connect", "load"],
        "verdict": None,
    }
    assert said["ranks"] == [
        {
            "rank": 0,
            "status": "Loading",
            "node": "node-0",
            "pid": 42,
            "incarnation": life(0),
            "progress": [3, 16],
            "age_ms": 1_000,
            "lease_left_ms": 5_000,
            "error": None,
        },
        dict.fromkeys(("status", "node", "pid", "incarnation", "progress", "age_ms", "lease_left_ms", "error"))
        | {"rank": 1},
    ]


TIMELINE = Timeline(
    epoch=EPOCH,
    ordinal=2,
    world_size=4,
    began_ms=1,
    arrivals={0: 110, 1: 95, 2: 120, 3: 2_105},
    skew=2_010,
    load_dispatched=2_106,
    release=1,
    loads={0: 800, 1: 810, 2: 790, 3: 805},
    loaded=2_920,
    warm_up=210,
    ready=3_140,
    ended=None,
    verdict=None,
    dispatches={"LoadModel": 1},
    rejections={},
)


def test_where_the_time_went() -> None:
    assert time_report(TIMELINE) == [
        "Where the time went in attempt 2 (ms by the store's clock, from its opening):",
        "  rank  connected at  loaded for",
        "     0           110         800",
        "     1            95         810",
        "     2           120         790",
        "     3          2105         805",
        "  arrival skew 2010: rank 3 came last, at 2105",
        "  last arrival → LoadModel dispatched: 1",
        "  LoadModel dispatched at 2106, all loaded at 2920",
        "  warm-up 210, all ready at 3140",
    ]


def test_where_the_time_of_many_ranks_went() -> None:
    many = replace(
        TIMELINE, world_size=64, arrivals={n: 100 + n for n in range(64)}, loads={n: 900 - n for n in range(64)}
    )
    assert time_report(many)[1:3] == [
        "  connected: first 100 (rank 0), median 132, last 163 (rank 63)",
        "  loading: first 837 (rank 63), median 869, last 900 (rank 0)",
    ]


def test_where_the_time_of_a_single_rank_went() -> None:
    alone = replace(TIMELINE, world_size=1, arrivals={0: 0}, loads={0: 800}, skew=0)
    assert time_report(alone)[1:4] == [
        "  rank       idle at  loaded for",
        "     0             0         800",
        "  last arrival → LoadModel dispatched: 1",
    ]

"""What other processes write cannot steer a terminal, forge a line of a log, or hide on a page. Dumps of what people are shown."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from loguru import logger as loguru
from rich.console import Console, RenderableType

from barrier import Verdict, find_break
from barrier.log import LogContext
from barrier.log import logger as ours
from barrier.testing import FakeStore
from planner.cli.look import Seen, overview
from planner.cli.process import complain, configure_log
from planner.cli.screen import Picture, heading, render, rows, sentence, table
from planner.cli.show import LiveShow, PlainShow, people, tell
from planner.launcher import ProcessState, Program
from planner.registry import InstanceRecord
from tests.unit.planner.pictures import picture, spec

FORGED = "12:00:00.000 ERROR   all is lost"
HOSTILE = f"a\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp.exe\u2066\0\r\n{FORGED}\n[red]m[/red]\x85\u2028\t."
SHOWN = "a\\x1b[2J\\x1b]0;owned\\x07\\x9b31m\\u202egnp.exe\\u2066\\x00\\r\\n"
COLOURS = re.compile(r"\x1b\[[0-9;]*m")

look = picture("Failed", "Idle", everyone={"node": HOSTILE, "error": HOSTILE})
PICTURE = Picture("demo", 2, 16, title=(HOSTILE,), snapshot=look, reason=HOSTILE, elapsed=1.0)


def harmless(dump: str, *, breaks: str = "\n") -> None:
    """Nothing in a dump does anything but end our own lines, and no line is forged."""
    plain = COLOURS.sub("", dump)
    found = {hex(ord(one)) for one in plain if not one.isprintable() and one not in breaks}
    assert not found, f"{found} in {plain!r}"
    assert not [line for line in plain.splitlines() if line.strip().startswith("12:00:00.000")], plain


def printed(*what: RenderableType, terminal: bool) -> str:
    console = Console(
        file=io.StringIO(),
        width=400,
        height=50,
        force_terminal=terminal,
        color_system="truecolor" if terminal else None,
    )
    for one in what:
        console.print(one)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def seen(**changed: Any) -> Seen:
    wanted = spec(2)
    wanted = wanted.model_copy(update={"model": wanted.model.model_copy(update={"model_id": HOSTILE})})
    return Seen("demo", InstanceRecord(spec=wanted, desired="up", launched_ms=1, **changed), look)


@pytest.mark.parametrize("terminal", [False, True], ids=["piped", "terminal"])
def test_the_table_the_heading_and_the_overview(terminal: bool) -> None:
    parts = [heading(PICTURE), table(rows(PICTURE), width=400), overview([seen()], "rankgate")]
    harmless(printed(*parts, terminal=terminal))


@pytest.mark.parametrize("terminal", [False, True], ids=["piped", "terminal"])
def test_the_whole_screen_with_the_text_of_a_model(terminal: bool) -> None:
    shown = Picture("demo", 2, 16, snapshot=look, text="first\n\x1b[31msecond\r\x9b\u202e")
    dump = printed(render(shown, width=400, height=50), terminal=terminal)
    harmless(dump)
    assert "first\n" in COLOURS.sub("", dump)


def test_markup_stays_text() -> None:
    assert "[red]m[/red]" in printed(overview([seen()], "rankgate"), terminal=False)


def test_the_sentences() -> None:
    broken = find_break(look)
    assert broken is not None
    for said in (seen().explanation, sentence(PICTURE), broken.reason):
        harmless(said, breaks="")
    assert SHOWN in broken.reason


def test_a_verdict_that_somebody_wrote() -> None:
    ended = picture("Idle", "Idle", verdict=Verdict(kind="Aborted", reason=HOSTILE))
    harmless(Seen("demo", None, ended).explanation, breaks="")


def test_for_programs_it_stays_as_it_is() -> None:
    told = json.loads(json.dumps(seen().as_json()))
    assert [one["node"] for one in told["ranks"]] == [HOSTILE] * 2
    assert told["ranks"][0]["error"] == HOSTILE


@pytest.mark.parametrize("kind", [PlainShow, LiveShow])
def test_lines_and_pictures_of_a_show(kind: Callable[..., PlainShow | LiveShow]) -> None:
    console = Console(file=io.StringIO(), width=400, height=50, force_terminal=False, color_system=None)
    made = PlainShow(console, with_text=True) if kind is PlainShow else LiveShow(console)
    with made as show:
        show.update(PICTURE)
        show.say(HOSTILE)
    tell(console, [HOSTILE])
    assert isinstance(console.file, io.StringIO)
    harmless(console.file.getvalue())


@pytest.mark.parametrize(("terminal", "written"), [(False, "x\n\x1b[2Jy\tz"), (True, "x\n[2Jy\tz")])
def test_a_models_text_piece_by_piece(terminal: bool, written: str) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, color_system=None)
    show = PlainShow(console, with_text=True)
    show.text("x\n\x1b[2Jy\tz")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == written


def test_an_error_that_is_complained_about(capsys: pytest.CaptureFixture[str]) -> None:
    complain(HOSTILE)
    harmless(capsys.readouterr().err)


@pytest.fixture
def restored() -> Iterable[None]:
    yield
    loguru.remove()
    loguru.configure(patcher=lambda _: None)


@pytest.mark.usefixtures("restored")
def test_the_log_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    configure_log("DEBUG")
    ours.warning("rank {}: {}", 2, HOSTILE)
    loguru.warning("an engine says: {}", HOSTILE)  # also what is none of ours
    with LogContext("demo", 2, 3, "t1").applied():
        ours.info("Loaded")
    said = capsys.readouterr().err
    harmless(said)
    assert said.count("\n") == 3
    assert said.endswith(" INFO    [demo rank 2 attempt 3 t1] Loaded\n")
    assert SHOWN in said


@pytest.mark.usefixtures("restored")
def test_the_log_that_the_screen_takes() -> None:
    lines: list[str] = []
    configure_log("DEBUG", lines.append)
    ours.warning("{}", HOSTILE)
    assert len(lines) == 1
    harmless(lines[0], breaks="")


def test_the_log_of_the_libraries_in_anybodys_sink() -> None:
    text = io.StringIO()
    sink = loguru.add(text, format="{message}")
    try:
        ours.warning("{}", HOSTILE)
    finally:
        loguru.remove(sink)
    harmless(text.getvalue())
    assert text.getvalue().count("\n") == 1


def test_the_last_words_of_a_process() -> None:
    state = ProcessState(Program("rank 0", ("x",), ranks=range(1)), phase="given up", last_exit=HOSTILE)
    harmless(printed(table(rows(Picture("demo", 1, 16, processes=(state,))), width=400), terminal=True))


def test_what_is_piped_is_never_wrapped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    tell(people(), ["word " * 100])
    people().print(table(rows(PICTURE), width=people().width))
    said = capsys.readouterr().out.splitlines()
    assert said[0].rstrip() == ("word " * 100).rstrip()
    assert len(said) == 4, "a line, a head and two ranks"


@pytest.mark.anyio
async def test_status_and_explain_of_an_instance_with_hostile_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    from barrier import Barrier, Member

    fake = FakeStore()
    member = Member(fake.client(), "demo", rank=0, node=HOSTILE)
    await member.claim()
    await member.report("Idle", error=HOSTILE)
    async with Barrier(fake.client(), "demo", world_size=2) as barrier:
        shown = Seen("demo", None, await barrier.inspect())
    tell(people(), [shown.explanation])
    people().print(table(rows(shown.picture), width=400))
    said = capsys.readouterr().out
    harmless(said)
    assert SHOWN in said

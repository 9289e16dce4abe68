"""What ``up`` and ``status`` show: pure functions that make rows, lines and rich's objects from a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import TYPE_CHECKING, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from barrier import Snapshot, missing_ranks
from barrier.printable import printable, printable_text
from barrier.protocol.model import RankView
from planner.explain import explain_instance, is_serving
from planner.lifecycle import next_step, serving_requirement
from runner.lifecycle import FAILED, GENERATE, LEAVING, LIFECYCLE, LOAD, PREPARING

if TYPE_CHECKING:
    from planner.launcher import ProcessState

__all__ = [
    "Picture",
    "Row",
    "attempt",
    "bar",
    "changes",
    "heading",
    "merged",
    "render",
    "rows",
    "sentence",
    "sentence_key",
    "serves",
    "shortened",
    "table",
    "waited_for_ranks",
]


_BAR = 10
"""Length of a progress bar, in characters."""

_LOADED = LIFECYCLE.since(LOAD.task)
_AT_WORK = ("yellow", "blue", "magenta")  # for the rows of the lifecycle, in turn
_STYLES = {
    PREPARING: "yellow",
    LIFECYCLE.idle: "dim",
    **{row.after: "cyan" for row in LIFECYCLE.rows},
    **{row.during: style for row, style in zip(LIFECYCLE.rows, cycle(_AT_WORK), strict=False)},
    **dict(zip(LIFECYCLE.serving, ("green", "bold green"), strict=True)),
    LEAVING.during: "dim",
    LEAVING.after: "dim",
    FAILED: "bold red",
}
_ABSENT_STYLE = "red"
_COLUMNS: tuple[tuple[str, Literal["left", "right"]], ...] = (
    ("rank", "right"),
    ("node", "left"),
    ("pid", "right"),
    ("status", "left"),
    ("layers", "left"),
    ("lease", "right"),
)
_STATUS_CHARS = max(len(row.during) for row in LIFECYCLE.rows)
_GAP = 2  # spaces between two columns
_NODE_CHARS = 16
_FRAME_LINES = 3  # the title and the table's head
_SENTENCE_LINES = 4
_TEXT_LINES = 4
_BESIDES_LINES = 4


@dataclass(frozen=True, slots=True)
class Picture:
    """Everything that is shown at one moment.

    Attributes:
        instance: the instance's name.
        world_size: number of ranks.
        layers: number of layers of the model.
        title: further parts of the heading, the most important first.
        snapshot: the barrier's picture; ``None`` before the first.
        processes: the runners that this program started.
        elapsed: seconds since the beginning.
        reason: what the planner waits for; shown while no attempt is under way.
        besides: a line for each spare and each surplus runner.
        changing: whether the attempt in the snapshot has another spec than the one that was launched; the planner is about to end it.
        text: the text that was generated so far.
    """

    instance: str
    world_size: int
    layers: int
    title: tuple[str, ...] = ()
    snapshot: Snapshot | None = None
    processes: tuple[ProcessState, ...] = ()
    elapsed: float | None = None
    reason: str = ""
    changing: bool = False
    besides: tuple[str, ...] = ()
    text: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a rank, or several neighbours that look the same.

    Attributes:
        first: first rank.
        last: last rank.
        node: their machine.
        pid: the runner's process; 0 if it is not known, or differs between the ranks.
        status: the status, or a word such as absent.
        present: whether there is a live report.
        layers: layers loaded, and all layers; ``None`` if that says nothing.
        lease_ms: milliseconds left of the shortest lease; ``None`` without a report.
        note: anything else that people should see.
        waited_for: whether the barrier waits for these ranks.
    """

    first: int
    last: int
    node: str
    pid: int
    status: str
    present: bool
    layers: tuple[int, int] | None
    lease_ms: int | None
    note: str
    waited_for: bool

    @property
    def ranks(self) -> str:
        """``3`` or ``3-7``."""
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def rows(picture: Picture) -> list[Row]:
    """One row per rank, in order."""
    processes = {rank: state for state in picture.processes for rank in state.program.ranks}
    waited_for = frozenset[int]() if picture.changing else waited_for_ranks(picture.snapshot)
    views = picture.snapshot.ranks if picture.snapshot else [RankView(rank) for rank in range(picture.world_size)]
    return [_row(view, processes.get(view.rank), picture, view.rank in waited_for) for view in views]


def waited_for_ranks(snapshot: Snapshot | None) -> frozenset[int]:
    """The ranks that the next step waits for; none while no attempt is under way."""
    if snapshot is None or snapshot.epoch is None or snapshot.epoch.verdict is not None:
        return frozenset()
    size = snapshot.world_size
    step = next_step(snapshot.epoch.steps, size)
    return frozenset(missing_ranks(snapshot, step.waits_for(size) if step else serving_requirement(size)))


def _row(view: RankView, process: ProcessState | None, picture: Picture, waited_for: bool) -> Row:
    report = view.report
    notes: list[str] = []
    pid = (process.pid if process else None) or (report.pid if report else 0)
    if report is None:
        status = (
            "starting" if process and process.phase == "running" else "unreadable" if view.undecodable else "absent"
        )
        layers = (0, picture.layers)
    else:
        status = report.status
        layers = (picture.layers if status in _LOADED else 0, picture.layers)
        if report.progress and status == GENERATE.during:
            notes.append(f"{report.progress[0]} of {report.progress[1]} tokens")
        elif report.progress:
            layers = report.progress
        if report.error:
            notes.append(report.error)
    if waited_for:
        notes.append("waited for")
    if process is not None:
        if process.phase == "pausing" and process.last_exit:
            notes.append(f"died: {process.last_exit}")
        elif process.phase == "given up":
            notes.append(f"given up: {process.last_exit}")
        elif process.restarts:
            waits = ", waits for the old lease" if report and report.pid != process.pid else ""
            notes.append(f"restarted {process.restarts}×{waits}")
    return Row(
        first=view.rank,
        last=view.rank,
        node=printable(report.node) if report else "",
        pid=pid,
        status=status,
        present=report is not None,
        layers=layers,
        lease_ms=view.lease_left_ms if report else None,
        note=printable("; ".join(notes)),
        waited_for=waited_for,
    )


def merged(all_rows: Sequence[Row], most: int) -> tuple[list[Row], int]:
    """Make the table short enough: neighbours that look the same share a row.

    Args:
        all_rows: one row per rank.
        most: how many rows fit.

    Returns:
        The rows, and how many ranks are hidden because there are still too many rows.
    """
    if len(all_rows) <= most:
        return list(all_rows), 0
    short: list[Row] = []
    for row in all_rows:
        before = short[-1] if short else None
        if before is not None and _alike(before, row):
            short[-1] = _together(before, row)
        else:
            short.append(row)
    if len(short) <= most:
        return short, 0
    # Show the ranks that the barrier waits for first: people look for them.
    chosen = sorted(short, key=lambda row: (not row.waited_for, row.first))[: max(most - 1, 1)]
    hidden = sum(row.last - row.first + 1 for row in short if row not in chosen)
    return sorted(chosen, key=lambda row: row.first), hidden


def _alike(one: Row, other: Row) -> bool:
    return (one.node, one.status, one.note, one.waited_for) == (other.node, other.status, other.note, other.waited_for)


def _together(one: Row, other: Row) -> Row:
    slowest = min((row.layers for row in (one, other) if row.layers), default=None)
    leases = [row.lease_ms for row in (one, other) if row.lease_ms is not None]
    return replace(
        one,
        last=other.last,
        pid=one.pid if one.pid == other.pid else 0,
        layers=slowest,
        lease_ms=min(leases) if leases else None,
    )


def serves(picture: Picture) -> bool:
    """Whether all ranks serve."""
    return picture.snapshot is not None and is_serving(picture.snapshot) and not picture.changing


def sentence(picture: Picture) -> str:
    """The sentence that says what the instance waits for now: the barrier's while an attempt is under way, otherwise the planner's."""
    snapshot = picture.snapshot
    if not picture.changing and snapshot is not None and snapshot.epoch is not None and snapshot.epoch.verdict is None:
        return f"{picture.instance} serves" if is_serving(snapshot) else explain_instance(snapshot)
    return picture.reason


def sentence_key(picture: Picture) -> object:
    """A key of the sentence, equal while it says nothing new: ages and leases in it change all the time."""
    snapshot = picture.snapshot
    if not picture.changing and snapshot is not None and snapshot.epoch is not None and snapshot.epoch.verdict is None:
        step = next_step(snapshot.epoch.steps, snapshot.world_size)
        return snapshot.epoch.id, step and step.name, waited_for_ranks(snapshot)
    return picture.reason


def attempt(snapshot: Snapshot | None) -> int:
    """Which attempt is under way, or was the last; 0 before the first."""
    return snapshot.epoch.ordinal if snapshot is not None and snapshot.epoch is not None else 0


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= most else text[: max(most - 1, 0)].rstrip() + "…"


def bar(layers: tuple[int, int]) -> str:
    """A progress bar with its numbers: ``██████░░░░ 10/16``."""
    done, total = layers
    full = _BAR * done // total if total else 0
    return f"{'█' * full}{'░' * (_BAR - full)} {done:>{len(str(total))}}/{total}"


def table(all_rows: Sequence[Row], hidden: int = 0, *, width: int) -> Table:
    """The rows as a table for a terminal of that width. A long note is cut; nothing else is."""
    result = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    cells = [_cells(row) for row in all_rows]
    taken = 0
    for place, (header, justify) in enumerate(_COLUMNS):
        least = _STATUS_CHARS if header == "status" else len(header)
        chars = min(max([least, *(len(line[place]) for line in cells)]), _NODE_CHARS if header == "node" else width)
        taken += chars + _GAP
        result.add_column(header, justify=justify, no_wrap=True, overflow="ellipsis", min_width=chars, max_width=chars)
    room = max(width - taken, len("note"))
    result.add_column("note", no_wrap=True, overflow="ellipsis", max_width=room)
    for row, line in zip(all_rows, cells, strict=True):
        style = _STYLES.get(row.status, "") if row.present else _ABSENT_STYLE if row.status == "absent" else "dim"
        rank, node, pid, status, layers, lease = (Text(cell) for cell in line)
        status.stylize(style)
        note = Text(shortened(row.note, room), style="yellow" if row.waited_for else "")
        result.add_row(rank, node, pid, status, layers, lease, note)
    if hidden:
        result.add_row("…", Text(f"{hidden} more", style="dim"))
    return result


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.ranks,
        row.node or "-",
        str(row.pid) if row.pid else "-",
        row.status,
        bar(row.layers) if row.layers else "",
        "-" if row.lease_ms is None else f"{row.lease_ms / 1000:.1f} s",
    )


def heading(picture: Picture) -> Text:
    """One line above the table."""
    parts = [picture.instance]
    if picture.elapsed is not None:
        parts.append(f"{picture.elapsed:.1f} s")
    if number := attempt(picture.snapshot):
        parts.append(f"attempt {number}")
    parts.append("1 rank" if picture.world_size == 1 else f"{picture.world_size} ranks")
    parts += picture.title
    return Text(printable(" · ".join(parts)), style="bold", no_wrap=True, overflow="ellipsis")


def render(picture: Picture, *, width: int, height: int) -> RenderableType:
    """The whole screen, for a terminal of that size in characters."""
    besides = picture.besides[:_BESIDES_LINES]
    room = max(height - _FRAME_LINES - _SENTENCE_LINES - len(besides) - (_TEXT_LINES if picture.text else 0), 3)
    shown, hidden = merged(rows(picture), room)
    parts: list[RenderableType] = [
        heading(picture),
        table(shown, hidden, width=width),
        *(Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in besides),
        Text(
            shortened(sentence(picture), width * (_SENTENCE_LINES - 1)), style="green" if serves(picture) else "yellow"
        ),
    ]
    if picture.text:
        parts.append(Text(printable_text(picture.text[-width * (_TEXT_LINES - 1) :])))
    return Group(*parts)


def changes(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """One line for each new status, with all its ranks: ``ranks 0-2: Connected``. A rank that was never here is not called absent."""
    known = {row.first: row.status for row in before}
    fresh = [row for row in after if row.status != known.get(row.first, "absent")]
    lines: list[str] = []
    # In the order of a rank's life: otherwise "rank 2: Loading" may stand before "rank 3: Connected", though both were seen at one look.
    for status in sorted(dict.fromkeys(row.status for row in fresh), key=_place):
        spans = [replace(row, note="", waited_for=False) for row in fresh if row.status == status]
        lines.append(f"{_spans(spans)}: {status}")
    return lines


def _place(status: str) -> int:
    """Where a status stands in a rank's life; what is none of its statuses comes first."""
    return LIFECYCLE.order.index(status) if status in LIFECYCLE.order else -1


def _spans(few: Sequence[Row]) -> str:
    spans: list[tuple[int, int]] = []
    for row in few:
        if spans and spans[-1][1] + 1 == row.first:
            spans[-1] = (spans[-1][0], row.last)
        else:
            spans.append((row.first, row.last))
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    many = len(texts) > 1 or spans[0][0] != spans[0][1]
    return f"rank{'s' if many else ''} {', '.join(texts)}"

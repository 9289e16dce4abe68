"""Shows pictures: as a table that stays in its place on a terminal, or as one plain line for each change elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from barrier.printable import printable, printable_text
from planner.cli.screen import Picture, Row, attempt, changes, render, rows, sentence, sentence_key, serves, shortened

__all__ = ["LiveShow", "PlainShow", "Show", "can_draw", "make_show", "people", "tell"]


_WORTH_A_LINE = 0.3
"""Seconds that a wait must last to get a line of its own. After a shorter wait the next change has a line anyway."""

_LINE_CHARS = 400
_ENDLESS = 100_000  # characters


class Show(Protocol):
    """Shows what goes on. A context manager; at its end the last picture stays on the terminal."""

    def __enter__(self) -> Show:
        """Begin."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the terminal back."""
        ...

    def update(self, picture: Picture) -> None:
        """Show the newest picture."""
        ...

    def say(self, line: str) -> None:
        """Print a line that is not part of the picture."""
        ...

    def text(self, piece: str) -> None:
        """Show the next piece of the generated text. `Picture.text` holds it as well."""
        ...


def make_show(console: Console) -> Show:
    """A table if the console is a terminal that can move its cursor, otherwise lines."""
    return LiveShow(console) if can_draw(console) else PlainShow(console, with_text=True)


def people() -> Console:
    """A console on stdout. Lines into a pipe or a file are never wrapped: a program may read them."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _ENDLESS
    return console


def can_draw(console: Console) -> bool:
    """Whether a table can stay in its place on the console."""
    return console.is_terminal and not console.is_dumb_terminal


def tell(console: Console, lines: Iterable[str]) -> None:
    """Print lines. Only a terminal wraps them, between words."""
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=not console.is_terminal)
    console.file.flush()


class LiveShow:
    """A table that is drawn again and again in its place; other lines scroll above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)

    def __enter__(self) -> LiveShow:
        """Hide the cursor."""
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last table where it is, and show the cursor."""
        self._live.stop()

    def update(self, picture: Picture) -> None:
        """Draw."""
        size = self._console.size
        self._live.update(render(picture, width=size.width, height=size.height), refresh=True)

    def say(self, line: str) -> None:
        """Print above the table."""
        self._console.print(Text(printable(line)), highlight=False)

    def text(self, piece: str) -> None:
        """Nothing to do: the picture holds the text."""


class PlainShow:
    """One line for each change, without escape codes; for files, pipes and logs.

    Args:
        console: prints the lines.
        with_text: whether `text` prints the generated text too.
    """

    def __init__(self, console: Console, *, with_text: bool) -> None:
        self._console = console
        self._rows: list[Row] = []
        self._served = False
        self._attempt = 0
        self._elapsed = 0.0
        self._key: object = None
        self._since = 0.0
        self._told: object = None
        self._open_line = False
        self._with_text = with_text

    def __enter__(self) -> PlainShow:
        """Nothing to prepare."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End a line that is not complete."""
        self._end_line()

    def at(self, elapsed: float) -> None:
        """Set how many seconds have passed since the beginning."""
        self._elapsed = elapsed

    def update(self, picture: Picture) -> None:
        """Print what is new since the last picture."""
        self.at(picture.elapsed or 0.0)
        number = attempt(picture.snapshot)
        if number > self._attempt:
            self._attempt = number
            self.say(f"attempt {number} begins")
        now = rows(picture)
        # While a text comes, do not say that ranks are Running: everybody knows, and the line would interrupt the text.
        between_texts = self._with_text and self._served and serves(picture)
        for line in [] if between_texts else changes(self._rows, now):
            self.say(line)
        self._rows, self._served = now, serves(picture)
        key = sentence_key(picture)
        if key != self._key:
            self._key, self._since = key, self._elapsed
        if key != self._told and (self._served or self._elapsed - self._since >= _WORTH_A_LINE):
            self._told = key
            self.say(shortened(sentence(picture), _LINE_CHARS))

    def say(self, line: str) -> None:
        """Print one line, with the time since the beginning."""
        self._end_line()
        self._console.out(f"{self._elapsed:8.2f} s  {printable(line)}", highlight=False)
        self._console.file.flush()

    def text(self, piece: str) -> None:
        """Print the piece as it is."""
        if self._with_text:
            self._console.file.write(printable_text(piece) if self._console.is_terminal else piece)
            self._console.file.flush()
            self._open_line = not piece.endswith("\n")

    def _end_line(self) -> None:
        if self._open_line:
            self._console.file.write("\n")
            self._open_line = False

"""The picture in the README: what a terminal shows while `rankgate up` runs, recorded from the real command.

``make recording`` writes docs/recording.svg. The command runs in a pseudo-terminal; pyte makes a screen of what it writes, and rich
draws it. Two moments are drawn: all ranks but one are connected, and the end.
"""

from __future__ import annotations

import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

import pyte
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

ARGUMENTS = ("up", "--world-size", "4", "--hold-back", "3:2", "--prompt", "Why do all ranks wait?")
COLUMNS, LINES = 104, 30
SECONDS = 60.0
"""A bound for hangs, not a measure."""

TARGET = Path(__file__).parents[2] / "docs" / "recording.svg"
THEME = TerminalTheme(
    (24, 26, 31),
    (204, 208, 214),
    [(60, 64, 72), (224, 108, 117), (152, 195, 121), (229, 192, 123), (97, 175, 239), (198, 120, 221), (86, 182, 194), (204, 208, 214)],
)  # fmt: skip


def record() -> tuple[list[Text], list[Text]]:
    """Run the command; the screen when it had waited for the last rank for a while, and the last screen."""
    leader, follower = pty.openpty()
    ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    waiting: list[Text] = []
    ends = time.monotonic() + SECONDS
    process = subprocess.Popen(
        [Path(sys.executable).with_name("rankgate"), *ARGUMENTS],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment,
        start_new_session=True,
    )
    os.close(follower)
    try:
        while time.monotonic() < ends:
            if not select.select([leader], [], [], 1.0)[0]:
                continue
            try:
                stream.feed(os.read(leader, 65_536))
            except OSError:  # the command has closed its terminal
                break
            shown = "\n".join(screen.display)
            if shown.count("Connected ") == 3 and "waiting for 1 of 4" in shown:
                waiting = _lines(screen)
    finally:
        os.close(leader)
        if process.poll() is None:
            process.terminate()
        code = process.wait()
    if code or not waiting:
        raise SystemExit(f"rankgate up ended with {code}, and {'one' if waiting else 'no'} moment of waiting was seen")
    return waiting, _lines(screen)


def _lines(screen: pyte.Screen) -> list[Text]:
    """What is on the screen, with its colours, without the empty lines at the end."""
    found: list[Text] = []
    for row in range(screen.lines):
        line = Text()
        for column in range(screen.columns):
            cell = screen.buffer[row][column]
            colour = {"default": "", "brown": "yellow"}.get(cell.fg, cell.fg)
            style = " ".join(
                word for word in ("bold" if cell.bold else "", colour.replace("bright", "bright_")) if word
            )
            line.append(cell.data, style)
        line.rstrip()
        found.append(line)
    while found and not found[-1]:
        found.pop()
    return found


def draw(waiting: list[Text], end: list[Text]) -> str:
    """Both moments as one SVG."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True, color_system="truecolor")
        words = " ".join(f'"{word}"' if " " in word else word for word in ARGUMENTS)
        console.print(Text(f"$ rankgate {words}", "bold"))
        for line in waiting:
            console.print(line, no_wrap=True, overflow="crop")
        console.print(Text("  … rank 3 arrives after 2 seconds, and then", "dim italic"))
        for line in end:
            console.print(line, no_wrap=True, overflow="crop")
        drawn = console.export_svg(title="rankgate up", theme=THEME)
    return re.sub(r"\s*@font-face \{.*?\}\n", "\n", drawn, flags=re.DOTALL)  # they would be fetched from another site


if __name__ == "__main__":
    TARGET.write_text(draw(*record()) + "\n", "utf-8")
    print(f"wrote {TARGET.relative_to(TARGET.parents[1])}")

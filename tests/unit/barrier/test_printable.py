"""Foreign text: what has no picture is shown as an escape, and does nothing."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from barrier.printable import printable, printable_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ‘quoted’ and Ünïcode 日本", "plain, ‘quoted’ and Ünïcode 日本"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b31mred", "\\x9b31mred"),
        ("a\nb\rc\td", "a\\nb\\rc\\td"),
        ("a\0b", "a\\x00b"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\u2066a\u2069", "\\u2066a\\u2069"),
        ("a\u2028b\u2029c\x85d", "a\\u2028b\\u2029c\\x85d"),
        ("\ud800", "\\ud800"),
        ("\U000e0001", "\\U000e0001"),
        ("[red]markup[/red]", "[red]markup[/red]"),
    ],
)
def test_one_line(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_no_character_at_all_gets_through_that_does_something() -> None:
    for number in range(sys.maxunicode + 1):
        shown = printable(chr(number))
        assert shown.isprintable(), hex(number)
        assert unicodedata.category(shown[0]) not in ("Cc", "Cf", "Cs", "Zl", "Zp"), hex(number)


def test_it_is_bounded() -> None:
    assert printable("x" * 100, 10) == "x" * 9 + "…"
    assert printable("x" * 10, 10) == "x" * 10


def test_a_models_text_keeps_its_lines_and_its_letters() -> None:
    text = "Zeile 1\n\tעברית\u200f, 👩‍👩‍👧, a\u00a0b\u3000c\r\nend"
    assert printable_text(text) == text.replace("\r", "")


def test_a_models_text_loses_what_would_steer_a_terminal() -> None:
    assert printable_text("a\x1b]0;title\x07b\x9bc\x00\x7f\u202ed\u2066e\ud800") == "a]0;titlebcde"


def test_no_control_gets_through_in_a_text() -> None:
    for number in range(sys.maxunicode + 1):
        for one in printable_text(chr(number)):
            assert one in "\n\t" or unicodedata.category(one) not in ("Cc", "Cs"), hex(number)
            assert unicodedata.bidirectional(one) not in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")

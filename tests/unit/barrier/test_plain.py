"""Numbers as people read them, everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from barrier.plain import number, typed

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (0.0, "0"),
        (0.5, "0.5"),
        (2.0, "2"),
        (86_400.0, "86,400"),
        (999_999.4, "999,999"),
        (999_999.6, "1,000,000"),
        (1e6, "1,000,000"),
        (1e11, "100,000,000,000"),
        (-1e6, "-1,000,000"),
        (1e300, "1,000,000,000,000,000 or more"),
        (0.00005, "0.00005"),
        (float("inf"), "inf"),
        (10_000_000, "10,000,000"),
    ],
)
def test_a_number_has_no_exponent(value: float, read: str) -> None:
    assert number(value) == read
    assert typed(value) == read.replace(",", "")


def test_no_text_has_a_format_that_may_print_an_exponent() -> None:
    """``:g`` says 1e+06 for a timeout of a million seconds; `barrier.plain.number` does not."""
    found = [
        f"{path.relative_to(ROOT)}:{place}: {line.strip()}"
        for package in ("barrier", "runner", "planner")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.relative_to(ROOT).as_posix() != "barrier/plain.py"
        for place, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r":[,.\d]*[geGE]}", line)
    ]
    assert found == []

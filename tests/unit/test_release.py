"""`make release-check` reads the changelog as people do."""

from __future__ import annotations

import pytest

from tests.release.__main__ import ROOT, version, wrong_with_changelog


def changelog(head: str, *changes: str) -> str:
    return (
        f"# Changelog\n\n## {head}\n\nThe first version.\n\n"
        + "".join(f"- {one}\n" for one in changes)
        + "\n## 0.0.9 (2026-01-01)\n\n- old\n"
    )


def test_an_entry_with_its_day_and_a_change_is_good() -> None:
    assert wrong_with_changelog(changelog("0.1.0 (2026-11-30)", "new"), "0.1.0") == ""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("# Changelog\n", "but missing"),
        (
            changelog("0.1.0 (2026-11-30)", "new"),
            "the newest entry of CHANGELOG.md is not 0.2.0, but 0.1.0 (2026-11-30)",
        ),
        (changelog("0.2.0 (not released yet)", "new"), "a release has its day: 0.2.0 (YYYY-MM-DD)"),
        (changelog("0.2.0", "new"), "a release has its day"),
        (changelog("0.2.0 (2026-11-30)"), "names no change"),
    ],
)
def test_what_is_wrong_with_an_entry_is_told(text: str, told: str) -> None:
    assert told in wrong_with_changelog(text, "0.2.0")


def test_the_changelog_begins_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8").replace("(not released yet)", "(2026-01-01)", 1)
    assert wrong_with_changelog(text, version()) == ""

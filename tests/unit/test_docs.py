"""The pages in ``docs`` say what the code does: tables and names are compared with it, and every link leads somewhere."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest

from barrier.protocol.report import SCHEMA
from barrier.store.keys import Keys, NamespaceKeys
from planner.lifecycle import TABLE
from runner.admission import ACCEPTS
from runner.messages import RejectionCode
from tests.mutants.catalogue import MUTATIONS

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md")],
    key=lambda page: page.relative_to(ROOT).as_posix(),
)
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text("utf-8")
PROTOCOL = (ROOT / "docs/protocol.md").read_text("utf-8")


def rows(page: str, head: str) -> list[list[str]]:
    """The rows of the table whose first line is this one, without its head."""
    lines = iter(page.splitlines())
    for line in lines:
        if line == head:
            next(lines)
            break
    else:
        raise AssertionError(f"there is no table with the head {head}")
    found: list[list[str]] = []
    for line in lines:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def code(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_within_the_repository_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(other), f"{target}: no such heading"


def test_the_code_cites_only_pages_and_headings_that_exist() -> None:
    cited = 0
    for folder in ("barrier", "runner", "planner", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            for name, heading in re.findall(r'(docs/[\w/]+\.md)(?:, "([^"]+)")?', file.read_text("utf-8")):
                cited += 1
                assert (ROOT / name).exists(), f"{file.name} cites {name}"
                assert not heading or f"\n## {heading}\n" in (ROOT / name).read_text("utf-8"), f"{name}: {heading}"
    assert cited > 5


def test_the_lifecycle_on_the_page_is_the_one_that_runs() -> None:
    told = rows(ARCHITECTURE, "| step | waits for | dispatches | to |")
    assert [(code(row[0])[0], code(row[2])[0]) for row in told] == [(step.name, step.dispatches) for step in TABLE]
    reached = {(0, 3): "all", (1, 3): "all but rank 0", (0, 0): "rank 0"}
    assert [row[3] for row in told] == [reached[step.to(4)] for step in TABLE]
    for row, step in zip(told, TABLE, strict=True):
        wanted = {status for rule in step.waits_for(4) for status in rule.statuses}
        assert wanted == set(re.findall(r"\b[A-Z][a-zA-Z]+\b", row[1])), row[0]


def test_what_a_runner_accepts_stands_on_the_page() -> None:
    told = {
        status.strip(): set(code(row[1]))
        for row in rows(PROTOCOL, "| status | accepts |")
        for status in row[0].split(",")
    }
    always = {"CancelTask", "Shutdown"}
    assert told == {status: set(kinds) - always for status, kinds in ACCEPTS.items() if set(kinds) - always}
    assert all(f"`{kind}`" in PROTOCOL for kind in always)
    assert {code(row[0])[0] for row in rows(PROTOCOL, "| code | meaning | the same task later |")} == set(
        get_args(RejectionCode)
    )


def test_every_guarantee_that_guards_and_breaches_name_is_explained() -> None:
    explained = set(re.findall(r"^- \*\*([SL]\d+) ", ARCHITECTURE, re.MULTILINE))
    assert explained == {f"S{n}" for n in range(1, 11)} | {f"L{n}" for n in range(1, 8)}
    assert {one for mutation in MUTATIONS for one in re.findall(r"[SL]\d+", mutation.guarantee)} <= explained


def test_every_key_is_listed() -> None:
    told = {code(row[0])[0].partition(":")[0] for row in rows(PROTOCOL, "| key | type | written by | holds |")}
    keys = Keys("demo", "blue")
    made = [keys.epoch, keys.leader, keys.tasks, keys.signals, keys.events, keys.requests]
    made += [keys.rank(0), keys.claim(0), keys.spare(0), keys.out("x"), keys.once("x")]
    names = {one for one in dir(Keys) if not one.startswith("_")} - {field.name for field in fields(Keys)}
    assert len(made) == len(names - {"tag", "spares", "ranks"}), "a new key: list it here and on the page"
    of_namespace = {one for one in dir(NamespaceKeys) if not one.startswith("_")} - {"namespace"}
    assert {f"`{{namespace:-}}:{one}`" for one in of_namespace} == set(re.findall(r"`\{namespace:-\}:\w+`", PROTOCOL))
    assert told == {one.removeprefix(keys.tag).split(":")[1] for one in made}
    assert f"\n{SCHEMA}|<epoch number>-" in PROTOCOL


def verbs() -> Iterator[tuple[str, set[str]]]:
    """Each script that is a verb, and the words of its replies."""
    for file in sorted((ROOT / "barrier/lua").glob("*.lua")):
        if file.stem != "prelude":
            replies = re.search(r"-- Replies: (.*?)\n(?:--\n|\n|-- (?=[a-z]))", file.read_text("utf-8"), re.DOTALL)
            assert replies, file.name
            yield file.stem, set(re.findall(r"\b[A-Z_]{4,}\b", replies[1]))


def test_every_script_is_listed_with_its_replies() -> None:
    told = {
        code(row[0])[0]: set(re.findall(r"\b[A-Z_]{4,}\b", row[2]))
        for row in rows(PROTOCOL, "| verb | what it does | replies |")
    }
    assert told == dict(verbs())


NAMED = re.compile(r"`((?:barrier|runner|planner)(?:\.\w+)+)(?:\(\))?`")
PRODUCT = [file for package in ("barrier", "runner", "planner") for file in sorted((ROOT / package).rglob("*.py"))]


def leads_somewhere(name: str) -> bool:
    """Whether a dotted name is a module's, or that of something in one: a class's field, too."""
    first, *rest = name.split(".")
    found: Any = importlib.import_module(first)
    for place, part in enumerate(rest):
        if isinstance(found, ModuleType) and not hasattr(found, part):
            try:
                found = importlib.import_module(".".join((first, *rest[: place + 1])))
            except ImportError:
                return False
        elif hasattr(found, part):
            found = getattr(found, part)
        else:
            return part in getattr(found, "__annotations__", {}) or part in getattr(found, "model_fields", {})
    return True


@pytest.mark.parametrize("file", [*PRODUCT, *PAGES], ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_name_of_ours_that_is_written_out_exists(file: Path) -> None:
    named = set(NAMED.findall(file.read_text("utf-8")))
    named = {name for name in named if not name.endswith((".py", ".lua", ".env", ".password"))}
    assert sorted(name for name in named if not leads_somewhere(name)) == []

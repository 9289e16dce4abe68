"""The scripts' headers are a contract: arguments are put in their order, and replies are read by their words."""

from __future__ import annotations

import hashlib
import inspect
import re
from importlib.resources import files
from typing import Any

import pytest

from barrier.protocol.ids import INCARNATION_WIDTH
from barrier.protocol.record import ENDPOINTS_CHUNK, ROSTER_CHUNK
from barrier.protocol.report import MAX_APPLIED, MAX_REPORT_BYTES, SCHEMA
from barrier.protocol.wire import WIRE_VERSION
from barrier.store import script as script_module
from barrier.store import verbs
from barrier.store.picture import DAY_MS
from barrier.store.script import VERBS, script
from barrier.testing import reference

inside: Any = verbs
calling: Any = script_module
"""The modules with what they keep to themselves."""

FOLDER = files("barrier") / "lua"
PRELUDE = (FOLDER / "prelude.lua").read_text("utf-8")
PUBLIC_NAME = {"open": "open_epoch"}


def body(verb: str) -> str:
    return (FOLDER / f"{verb}.lua").read_text("utf-8")


def code(text: str) -> str:
    """Without comments."""
    return re.sub(r"--[^\n]*", "", text)


def test_every_script_file_is_a_verb_and_every_verb_has_a_file() -> None:
    names = {path.name for path in FOLDER.iterdir() if path.name.endswith(".lua")}
    assert names == {f"{verb}.lua" for verb in VERBS} | {"prelude.lua"}


@pytest.mark.parametrize("verb", VERBS)
def test_the_names_of_argv_in_the_header_are_the_names_that_the_script_unpacks(verb: str) -> None:
    declared = tuple(name for name in script(verb).args if not name.endswith("..."))
    unpacked = re.search(r"local ([\w,\s]+?) = unpack\(ARGV(?:, 1, (\d+))?\)", body(verb))
    if unpacked is None:
        assert declared == ()
        assert "ARGV" not in code(body(verb))
        return
    names = tuple(name.strip() for name in unpacked[1].split(","))
    assert names == declared
    if unpacked[2] is not None:
        assert int(unpacked[2]) == len(names), "unpack stops where the repeated argument begins"


@pytest.mark.parametrize("verb", VERBS)
def test_a_repeated_argument_stands_last_and_the_script_knows_where_it_begins(verb: str) -> None:
    loaded = script(verb)
    for names, constant in ((loaded.keys, "FIRST_RANK"), (loaded.args, "FIRST_RULE")):
        repeated = [name for name in names if name.endswith("...")]
        assert repeated == list(names[-len(repeated) :] if repeated else [])
        assert len(repeated) <= 1
        if repeated:
            text = code(body(verb))
            both = re.search(r"local FIRST_RANK, FIRST_RULE = (\d+), (\d+)", text)
            found = both[1 if constant == "FIRST_RANK" else 2] if both else None
            if found is None:
                alone = re.search(rf"local {constant} = (\d+)", text)
                assert alone is not None
                found = alone[1]
            assert int(found) == len(names)


@pytest.mark.parametrize("verb", VERBS)
def test_every_fixed_key_of_the_header_is_used_and_no_other(verb: str) -> None:
    fixed = [name for name in script(verb).keys if not name.endswith("...")]
    used = {int(number) for number in re.findall(r"KEYS\[(\d+)\]", code(body(verb)))}
    assert used == set(range(1, len(fixed) + 1))


@pytest.mark.parametrize("verb", VERBS)
def test_every_word_of_the_header_is_answered_somewhere_and_no_other(verb: str) -> None:
    own, whole_text = code(body(verb)), code(body(verb)) + code(PRELUDE)
    for word in script(verb).replies:
        assert f"'{word}'" in whole_text, f"{verb} never answers {word}"
    answered = set(re.findall(r"\{ '([A-Z_]{4,})'", own))
    if "fenced(KEYS" in own:
        answered.add("FENCED")
    if "not_current(" in own:
        answered |= {"UNKNOWN", "SUPERSEDED", "ABORTED"}
    if "not_ready(" in own:
        answered.add("NOT_READY")
    if verb == "conclude":  # it turns ABORTED into ALREADY
        answered.discard("ABORTED")
    assert answered == set(script(verb).replies)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "inspect"])
def test_the_python_side_reads_every_word_of_the_header(verb: str) -> None:
    source = inspect.getsource(getattr(verbs, PUBLIC_NAME.get(verb, verb)))
    source += inspect.getsource(inside._refusal) + inspect.getsource(inside._dispatched)
    for word in script(verb).replies:
        assert f'"{word}"' in source


@pytest.mark.parametrize("verb", VERBS)
def test_scripts_are_addressed_by_their_whole_text(verb: str) -> None:
    loaded = script(verb)
    assert loaded.text == f"{PRELUDE}\n{body(verb)}"
    assert loaded.sha == hashlib.sha1(loaded.text.encode(), usedforsecurity=False).hexdigest()


@pytest.mark.parametrize("verb", VERBS)
def test_types_are_checked_before_the_first_write(verb: str) -> None:
    text = code(body(verb))
    first_write = min(
        (found.start() for found in re.finditer(r"'(?:HSET|SET|DEL|XADD|PEXPIRE)'|announce\(", text)), default=None
    )
    check = min(place for name in ("wrong_type(", "read_record(") if (place := text.find(name)) >= 0)
    assert first_write is None or check <= text.find("wrong_type(") < first_write


@pytest.mark.parametrize("verb", ["check", "inspect"])
def test_read_only_verbs_write_nothing(verb: str) -> None:
    assert not re.search(r"'(?:HSET|SET|DEL|XADD|PEXPIRE|EXPIRE|INCR)'|announce\(|hint\(|history\(", code(body(verb)))


def test_lua_and_python_agree_on_the_layout() -> None:
    assert f"local ROSTER_CHUNK = {ROSTER_CHUNK} " in PRELUDE
    assert f"local ENDPOINTS_CHUNK = {ENDPOINTS_CHUNK}\n" in PRELUDE
    assert f"local INCARNATION_WIDTH = {INCARNATION_WIDTH}\n" in PRELUDE
    assert f"local APPLIED_WIDTH = {len(str(MAX_APPLIED))}\n" in PRELUDE
    assert f"local DAY_MS = {DAY_MS}\n" in PRELUDE
    assert f"local WIRE_VERSION = '{WIRE_VERSION}' " in PRELUDE
    assert all("'wire', WIRE_VERSION," in body(verb) for verb in ("open", "restore")), (
        "who writes a record says its version"
    )
    assert reference.DAY_MS == DAY_MS
    assert f"MAX_REPORT = {MAX_REPORT_BYTES}\n" in body("inspect")
    assert f"'^{SCHEMA}|" in PRELUDE
    assert f"local head = '{SCHEMA}|'" in PRELUDE


def test_no_script_scans_or_uses_what_a_cluster_forbids() -> None:
    for verb in VERBS:
        assert not re.search(r"'(?:KEYS|SCAN|RANDOMKEY|FLUSHALL|FLUSHDB)'", code(script(verb).text))


def test_arguments_go_by_name_into_the_headers_order() -> None:
    ordered = calling._ordered(("b", "a", "rule..."), {"a": 1, "rule": ["x", "y"], "b": 2})
    assert ordered == ["2", "1", "x", "y"]


def test_a_call_that_does_not_match_the_header_breaks_at_once() -> None:
    with pytest.raises(LookupError, match="the header declares"):
        calling._ordered(("a", "b"), {"a": 1})
    with pytest.raises(LookupError):
        calling._ordered(("a", "b"), {"a": 1, "c": 2})


def test_a_script_without_a_header_is_told() -> None:
    with pytest.raises(LookupError, match="the script has no KEYS header"):
        calling._header("return 1", "KEYS")

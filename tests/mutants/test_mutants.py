"""The list of guards fits the source, and the searches find the breaches of some of them; ``make mutants`` tries all."""

from __future__ import annotations

import ast
from collections import Counter
from importlib import import_module
from typing import Any

import pytest

from tests.mutants.__main__ import look_for
from tests.mutants.catalogue import MUTATIONS, QUICK
from tests.mutants.harness import ROOT, Edit, Mutation, Rotten

LUA: Any = import_module(
    "lupa.lua51"
)  # the servers' version, and the one that fakeredis has loaded: two in one process crash

EDITS = [
    pytest.param(mutation, edit, id=f"{mutation.name}{'-model' if edit is mutation.model else ''}")
    for mutation in MUTATIONS
    for edit in (mutation.edit, mutation.model)
    if edit is not None
]


@pytest.mark.parametrize(("mutation", "edit"), EDITS)
def test_every_guard_stands_where_the_list_says_and_can_be_taken_out(mutation: Mutation, edit: Edit) -> None:
    """What is left must still be a program: a mutant that does not even load proves nothing."""
    mutated = edit.applied_to((ROOT / edit.file).read_text("utf-8"), mutation.name)
    if edit.file.endswith(".lua"):
        prelude = "" if edit.file.endswith("prelude.lua") else (ROOT / "barrier/lua/prelude.lua").read_text("utf-8")
        lua: Any = LUA.LuaRuntime(unpack_returned_tuples=True)
        compile_only = lua.eval("function(text) local f, why = (loadstring or load)(text); return f and '' or why end")
        assert compile_only(prelude + mutated) == ""
    else:
        ast.parse(mutated)


def test_a_guard_that_has_changed_is_told() -> None:
    edit = Edit("barrier/store/keys.py", "no such text", "")
    with pytest.raises(
        Rotten, match=r"^mutation 'gone': its text is 0 times in barrier/store/keys.py, and must be there once"
    ):
        edit.applied_to((ROOT / edit.file).read_text("utf-8"), "gone")
    with pytest.raises(Rotten, match=r"is 2 times in"):
        Edit("x", "a", "b").applied_to("a a", "twice")


def test_names_are_used_once() -> None:
    assert [name for name, times in Counter(mutation.name for mutation in MUTATIONS).items() if times > 1] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_share_of_the_guards_is_missed(name: str) -> None:
    verdict = look_for(next(mutation for mutation in MUTATIONS if mutation.name == name))
    assert verdict.finding is not None, verdict.row()

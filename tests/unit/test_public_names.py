"""Each module says in `__all__` what is public in it: what it defines without an underscore, and nothing that it only imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for name in ("barrier", "runner", "planner")
    for path in (ROOT / name).rglob("*.py")
)


def assigned(node: ast.stmt) -> list[str]:
    """The names that a statement of a module defines."""
    match node:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case _:
            return []


def told(tree: ast.Module) -> list[str] | None:
    """What `__all__` says; ``None`` where there is none. That of planner.cli, whose modules come when they are asked for, is for checkers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and assigned(node) == ["__all__"] and node.value is not None:
            names: list[str] = ast.literal_eval(node.value)
            return names
    return None


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_what_is_public_in_it(module: str) -> None:
    tree = ast.parse((ROOT / module).read_text("utf-8"))
    names = told(tree)
    assert names is not None, "it has no __all__"
    defined = {name for node in tree.body for name in assigned(node) if not name.startswith("_")}
    assert defined - set(names) == set(), "public by name, and not in __all__: add it, or give it an underscore"
    if not module.endswith("__init__.py"):  # which hands out what others define
        assert set(names) - defined == set(), "import these from where they are defined"

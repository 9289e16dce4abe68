"""``make picture``: draws docs/imports.md from the imports in the code."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "imports.md"

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "barrier": ("barrier", "barrier.testing"),
    "runner": ("runner", "runner.testing"),
    "planner": ("planner", "planner.cli", "planner.race"),
}
"""Each package, and what stands on top of its floors: the front door, which hands out names of the others, the kit and the programs."""

MOST_FLOORS = 8
APART = {"barrier.protocol": ("redis", "hiredis", "asyncio")}
"""What knows no store: what that would import otherwise."""

HEAD = """# Imports

Drawn from the code by `make picture`; a test fails where this page is not up to date, where modules import one another in a circle, where a
package has more than {most} floors, or where `barrier.protocol` reaches Redis' client or asyncio.

`planner` imports `runner` and `barrier`, `runner` imports `barrier`, and never the other way round. Within a package, a module or a folder
imports only what stands on floors below its own. Imports for type checkers count as well. Arrows that follow from others are left out.
"""


class Circle(Exception):
    """Modules import one another: the sentence names them."""


@dataclass(frozen=True)
class Layout:
    """One package: its floors, the lowest first, what stands on top, and who imports what within it."""

    package: str
    floors: tuple[tuple[str, ...], ...]
    top: tuple[str, ...]
    imports: Mapping[str, frozenset[str]]


def graph() -> grimp.ImportGraph:
    """Who imports what, in all packages, other people's included."""
    return grimp.build_graph(*PACKAGES, include_external_packages=True, cache_dir=None)


def layout(code: grimp.ImportGraph, package: str) -> Layout:
    """Sort a package's modules and folders into floors. Raises `Circle` where they import one another."""
    imports: dict[str, set[str]] = {one: set() for one in code.find_children(package)}
    for module in code.find_descendants(package):
        for other in code.find_modules_directly_imported_by(module):
            importer, imported = (".".join(one.split(".")[:2]) for one in (module, other))
            if imported in imports and imported != importer:
                imports[importer].add(imported)
    top = PACKAGES[package]
    known = {one: frozenset(others) for one, others in imports.items()}
    return Layout(package, tuple(floors(known, set(known) - set(top))), top[1:], known)


def floors(imports: Mapping[str, frozenset[str]], rest: set[str]) -> Iterable[tuple[str, ...]]:
    """What imports nothing of the rest is the next floor. Raises `Circle` where there is no such module."""
    while rest:
        floor = {one for one in rest if not imports[one] & rest}
        if not floor:
            raise Circle(f"these import one another, or what does: {', '.join(sorted(rest))}")
        yield tuple(sorted(floor))
        rest = rest - floor


def reach(imports: Mapping[str, frozenset[str]], module: str) -> set[str]:
    """All that a module imports, straight or by others. The imports have no circle."""
    return set(imports[module]).union(*(reach(imports, one) for one in imports[module]))


def drawn(of: Layout) -> str:
    """A package's part of the page."""
    known = {one: others for one, others in of.imports.items() if one not in of.top}
    lines = [f"## {of.package}", "", "| floor | modules and folders |", "|---|---|"]
    for number, floor in reversed([*enumerate(of.floors, 1)]):
        lines.append(f"| {number} | {', '.join(f'`{one}`' for one in floor)} |")
    lines += ["", f"On top of them: {', '.join(f'`{one}`' for one in (of.package, *of.top))}.", ""]
    lines += ["```mermaid", "flowchart TB"]
    for one in sorted(known):
        beyond = set[str]().union(*(reach(known, other) for other in known[one]))
        lines += [f"    {_short(one)} --> {_short(other)}" for other in sorted(known[one] - beyond)]
        if not known[one] and not any(one in others for others in known.values()):
            lines.append(f"    {_short(one)}")
    return "\n".join([*lines, "```", ""])


def _short(module: str) -> str:
    return module.partition(".")[2]


def page(code: grimp.ImportGraph) -> str:
    """The whole page."""
    return "\n".join([HEAD.format(most=MOST_FLOORS), *(drawn(layout(code, one)) for one in PACKAGES)])


def reaches(code: grimp.ImportGraph, module: str, foreign: str) -> tuple[str, ...] | None:
    """The shortest way on which a package imports another, if there is one."""
    if foreign not in code.modules:
        return None
    ways = [code.find_shortest_chain(one, foreign) for one in {module, *code.find_descendants(module)}]
    return min((way for way in ways if way), key=len, default=None)


def main() -> int:
    """Write the page."""
    PAGE.write_text(page(graph()), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

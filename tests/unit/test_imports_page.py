"""docs/imports.md is what the code is, and the code is what that page says of it."""

from __future__ import annotations

from collections.abc import Mapping

import grimp
import pytest

from tests.pictures.imports import APART, MOST_FLOORS, PACKAGES, PAGE, Circle, floors, graph, layout, page, reaches


@pytest.fixture(scope="module")
def code() -> grimp.ImportGraph:
    return graph()


def test_the_page_is_up_to_date(code: grimp.ImportGraph) -> None:
    assert PAGE.read_text("utf-8") == page(code), "run make picture"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_no_circle_and_few_floors(code: grimp.ImportGraph, package: str) -> None:
    assert 2 < len(layout(code, package).floors) <= MOST_FLOORS


@pytest.mark.parametrize(("module", "foreign"), [(one, other) for one, others in APART.items() for other in others])
def test_what_knows_no_store_does_not_reach_its_client(code: grimp.ImportGraph, module: str, foreign: str) -> None:
    assert reaches(code, module, foreign) is None


def test_a_way_to_the_client_would_be_found(code: grimp.ImportGraph) -> None:
    way = reaches(code, "barrier.store", "redis")
    assert way is not None
    assert way[-1] == "redis"


def test_a_circle_is_told_by_its_modules() -> None:
    imports: Mapping[str, frozenset[str]] = {
        "a": frozenset("b"),
        "b": frozenset("c"),
        "c": frozenset("b"),
        "d": frozenset(),
    }
    with pytest.raises(Circle, match="a, b, c"):
        list(floors(imports, set(imports)))

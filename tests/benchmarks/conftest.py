"""One run measures everything at one scale: `-k quick` chooses the small one."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from loguru import logger

from tests.benchmarks.results import Results

_PACKAGES = ("barrier", "planner", "runner")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "scale" in metafunc.fixturenames:
        chosen = "quick" if "quick" in str(metafunc.config.getoption("keyword")) else "full"
        metafunc.parametrize("scale", [chosen])


@pytest.fixture(scope="session")
def results() -> Generator[Results]:
    """What the run measures; told and written at its end."""
    found = Results()
    for package in _PACKAGES:
        logger.disable(package)  # what is measured should not be the terminal
    yield found
    for package in _PACKAGES:
        logger.enable(package)
    path = found.write()
    print(f"\n\n{found.text()}\n\nwritten to {path}")

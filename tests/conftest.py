"""Fixtures that every test may rely on."""

from __future__ import annotations

import pytest
from loguru import logger

import barrier
import planner
import runner

for _package in (barrier, runner, planner):  # importing them has silenced them
    logger.enable(_package.__name__)  # tests look at what is logged


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The libraries are plain asyncio, so asyncio is the one backend; anyio's plugin runs the tests."""
    return "asyncio"

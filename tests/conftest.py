"""Fixtures that every test may rely on."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The libraries are plain asyncio, so asyncio is the one backend; anyio's plugin runs the tests."""
    return "asyncio"

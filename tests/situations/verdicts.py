"""The verdicts of an instance's attempts, as its task log tells them."""

from __future__ import annotations

from barrier import Verdict
from barrier.store.keys import Keys
from barrier.testing import FakeStore


def verdicts(store: FakeStore, instance: str = "demo") -> list[Verdict]:
    """All of them, in order; the next attempt may have begun since."""
    entries: list[tuple[bytes, dict[bytes, bytes]]] = store.contents().get(Keys("rankgate", instance).tasks, [])
    return [Verdict.model_validate_json(fields[b"verdict"]) for _, fields in entries if fields[b"kind"] == b"verdict"]

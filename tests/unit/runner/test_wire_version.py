"""Messages of another version are refused by that name, whatever else is in them."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from barrier.protocol.wire import READS, WIRE_VERSION, refusal_of
from runner.messages import (
    Chunk,
    MalformedMessage,
    StartWarmup,
    TaskAcknowledged,
    decode_chunk,
    decode_event,
    decode_task,
    encode,
)

SENT: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
    "task": (encode(StartWarmup(task_id="t", instance="demo", epoch="1-a", term=1)), decode_task),
    "event": (encode(TaskAcknowledged(task_id="t")), decode_event),
    "chunk": (encode(Chunk(task_id="t", index=0)), decode_chunk),
}


def changed(payload: bytes, **fields: object) -> bytes:
    return json.dumps(json.loads(payload) | fields).encode()


@pytest.mark.parametrize("kind", SENT)
def test_what_is_sent_says_its_version(kind: str) -> None:
    assert json.loads(SENT[kind][0])["wire"] == WIRE_VERSION


@pytest.mark.parametrize("kind", SENT)
@pytest.mark.parametrize("version", READS)
def test_this_version_and_the_one_before_are_read(kind: str, version: int) -> None:
    payload, decode = SENT[kind]
    assert decode(changed(payload, wire=version))


@pytest.mark.parametrize("kind", SENT)
@pytest.mark.parametrize("fields", [{}, {"unheard_of": 1}, {"task_id": 7}], ids=["readable", "new field", "other type"])
def test_a_later_version_is_refused_with_both_versions(kind: str, fields: dict[str, object]) -> None:
    payload, decode = SENT[kind]
    with pytest.raises(MalformedMessage) as caught:
        decode(changed(payload, wire=WIRE_VERSION + 1, **fields))
    known = " and ".join(map(str, READS))
    assert str(caught.value) == (
        f"the message has wire version {WIRE_VERSION + 1}, and this version of rankgate reads {known}: run the same version everywhere"
    )


@pytest.mark.parametrize("version", ["9" * 5_000, "\x1b[31m", None, True, [], 1.5])
def test_a_version_that_is_none_is_not_quoted(version: object) -> None:
    payload, decode = SENT["task"]
    with pytest.raises(MalformedMessage) as caught:
        decode(changed(payload, wire=version))
    assert "has a wire version that is not a number" in str(caught.value)


def test_a_huge_number_is_not_written_out() -> None:
    assert "has a wire version that is too large, and" in refusal_of(10**5_000)


def test_a_message_without_a_version_is_of_the_first() -> None:
    payload = json.loads(SENT["task"][0])
    del payload["wire"]
    assert decode_task(json.dumps(payload).encode())

"""Messages: what is ours is read back as it was, and whatever is not is refused in a sentence that quotes nothing of it."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from barrier import EpochId
from barrier.protocol.names import valid_step
from runner.messages import (
    MAX_MESSAGE_BYTES,
    MAX_PROMPT_CHARS,
    Chunk,
    MalformedMessage,
    Rejection,
    RunnerFailed,
    RunnerIdle,
    RunnerLoading,
    RunnerStatusUpdated,
    Shutdown,
    TaskAcknowledged,
    TaskKind,
    TaskStatusUpdated,
    TextGeneration,
    decode_chunk,
    decode_event,
    decode_task,
    derive_task_id,
    encode,
)
from tests.unit.runner.rig import PROMPT, make_task, unhurried

EPOCH = EpochId(100, "a" * 32)
GOOD: dict[str, Any] = {
    "kind": "TextGeneration",
    "task_id": "t1",
    "instance": "demo",
    "epoch": str(EPOCH),
    "term": 1,
    "prompt": PROMPT,
}


def as_bytes(**changes: Any) -> bytes:
    """A good task with changes; a field set to ``...`` is left out."""
    return json.dumps({key: value for key, value in (GOOD | changes).items() if value is not ...}).encode()


# --- round trips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", get_args(TaskKind))
def test_every_task_comes_back_as_it_was(kind: TaskKind) -> None:
    task = make_task(kind, EPOCH)
    assert decode_task(encode(task)) == task


REJECTION = Rejection(
    code="NotYet", task_kind="LoadModel", status="Idle", epoch=str(EPOCH), retryable=True, hint="wait"
)


@pytest.mark.parametrize(
    "event",
    [
        TaskStatusUpdated(task_id="t1", state="Running"),
        TaskStatusUpdated(task_id="t1", state="Failed", rejection=REJECTION),
        TaskStatusUpdated(task_id="t1", state="Failed", error="no memory"),
        RunnerStatusUpdated(status=RunnerIdle()),
        RunnerStatusUpdated(status=RunnerLoading(layers_loaded=3, total_layers=16)),
        RunnerStatusUpdated(status=RunnerFailed(error="no memory")),
        TaskAcknowledged(task_id="t1"),
    ],
)
def test_every_event_comes_back_as_it_was(event: TaskStatusUpdated | RunnerStatusUpdated | TaskAcknowledged) -> None:
    assert decode_event(encode(event)) == event


def test_a_chunk_comes_back_as_it_was() -> None:
    for chunk in (Chunk(task_id="t1", index=0, text="Grüße 🦉\n"), Chunk(task_id="t1", index=1, finish="stop")):
        assert decode_chunk(encode(chunk)) == chunk


def test_what_says_nothing_is_not_written() -> None:
    assert json.loads(encode(TaskStatusUpdated(task_id="t1", state="Running"))) == {
        "kind": "TaskStatusUpdated",
        "wire": 1,
        "task_id": "t1",
        "state": "Running",
    }


def test_messages_cannot_be_changed() -> None:
    task = make_task("Shutdown", EPOCH)
    with pytest.raises(ValidationError, match="frozen"):
        task.term = 2  # type: ignore[misc]  this is what must fail


# --- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"kind": "LoadModel", "model": "\\ud800"}', "not JSON"),
        (b"null", "dict type"),
        (b"[]", "dict type"),
        (b"{}", "no kind"),
        (as_bytes(kind="EraseDisk"), "unknown kind"),
        (as_bytes(kind=3), "unknown kind"),
        (as_bytes(task_id=...), "task_id: missing"),
        (as_bytes(task_id=""), "task_id: string too short"),
        (as_bytes(task_id="a b"), "task_id: string pattern mismatch"),
        (as_bytes(task_id="t\n"), "task_id: string pattern mismatch"),
        (as_bytes(instance=""), "instance: string too short"),
        (as_bytes(instance="x" * 64), "instance: string too long"),
        (as_bytes(epoch="1"), "epoch: string too short"),
        (as_bytes(term=-1), "term: greater than equal"),
        (as_bytes(term="1"), "term: int type"),
        (as_bytes(term=True), "term: int type"),
        (as_bytes(prompt=...), "prompt: missing"),
        (as_bytes(prompt=7), "prompt: string type"),
        (as_bytes(prompt="x" * (MAX_PROMPT_CHARS + 1)), "prompt: string too long"),
        (as_bytes(max_tokens=0), "max_tokens: greater than equal"),
        (as_bytes(max_tokens=100_001), "max_tokens: less than equal"),
        (as_bytes(max_tokens=1.5), "max_tokens: int"),
        (as_bytes(surprise=1), "surprise: unknown field"),
        (as_bytes(kind="LoadModel", prompt=..., model={"model_id": "m", "total_layers": 0}), "total_layers"),
        (as_bytes(kind="LoadModel", prompt=..., model={"model_id": "m", "path": "/"}), "model.path: unknown field"),
        (as_bytes(kind="ConnectToGroup", prompt=..., deadline="x"), "deadline: float type"),
    ],
)
def test_what_is_not_a_task_is_refused_with_a_reason(payload: bytes, reason: str) -> None:
    with pytest.raises(MalformedMessage) as refused:
        decode_task(payload)
    assert reason in str(refused.value)
    assert PROMPT not in str(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__, "pydantic's own error quotes the value; a traceback must not show it"


def test_the_size_is_judged_before_anything_is_read() -> None:
    whole = as_bytes(prompt="x" * 1_000)
    assert decode_task(whole + b" " * (MAX_MESSAGE_BYTES - len(whole)))
    with pytest.raises(MalformedMessage, match=r"has 262,145 bytes; at most 262,144 are read"):
        decode_task(whole + b" " * (MAX_MESSAGE_BYTES - len(whole) + 1))
    with pytest.raises(MalformedMessage, match=r"has 1,000,000 bytes"):
        decode_task(b"x" * 1_000_000)


def test_a_long_list_of_faults_is_cut() -> None:
    with pytest.raises(MalformedMessage) as refused:
        decode_task(as_bytes(**{f"field_{number}": number for number in range(1_000)}))
    assert str(refused.value).endswith("and 997 more")
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("name", [PROMPT, "x" * 100_000, "a\nb", "ключ", ""])
def test_the_name_of_an_unknown_field_is_told_only_if_it_looks_like_one(name: str) -> None:
    """A sender that puts its prompt where a name belongs has it neither in our log nor in our history."""
    with pytest.raises(MalformedMessage) as refused:
        decode_task(as_bytes(**{name: 1}))
    assert str(refused.value) == "TextGeneration.(not a name): unknown field"


@pytest.mark.parametrize("task_id", [".hidden", "-", "x" * 97, "a/b", "a{b}", "a b"])
def test_a_task_id_that_could_not_become_part_of_a_key_is_refused(task_id: str) -> None:
    """Regression: such an id was accepted, and the runner died when it ended the client's stream under it."""
    with pytest.raises(MalformedMessage, match="task_id"):
        decode_task(as_bytes(task_id=task_id))


@unhurried
@given(st.binary(max_size=300))
def test_any_bytes_are_a_task_or_malformed(payload: bytes) -> None:
    for decode in (decode_task, decode_event, decode_chunk):
        complaint = ""
        try:
            decode(payload)
        except MalformedMessage as error:
            complaint = str(error)
        assert len(complaint) < 500


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=10), scalars, max_size=3)


@unhurried
@given(st.dictionaries(st.sampled_from([*GOOD, "model", "max_tokens", "cancels", "x"]), values, max_size=8))
def test_a_task_with_anything_in_its_fields_is_a_task_or_malformed(changes: dict[str, Any]) -> None:
    payload, complaint, task = as_bytes(**changes), "", None
    try:
        task = decode_task(payload)
    except MalformedMessage as error:
        complaint = str(error)
    assert PROMPT not in complaint
    assert task is None or decode_task(encode(task)) == task


# --- names and secrets ----------------------------------------------------------------------------------------------------


def test_no_repr_shows_a_prompt_or_a_text() -> None:
    assert PROMPT not in repr(make_task("TextGeneration", EPOCH))
    assert "owl" not in repr(Chunk(task_id="t1", index=0, text="owl"))


def test_a_task_id_is_the_same_for_the_same_step_and_differs_otherwise() -> None:
    first = derive_task_id("demo", str(EPOCH), "warm up leader")
    assert first == derive_task_id("demo", str(EPOCH), "warm up leader")
    assert first.startswith("warm-up-leader.")
    others = {
        derive_task_id("other", str(EPOCH), "warm up leader"),
        derive_task_id("demo", str(EpochId(EPOCH.number, "b" * 32)), "warm up leader"),
        derive_task_id("demo", str(EpochId(101, EPOCH.nonce)), "warm up leader"),
        derive_task_id("demo", str(EPOCH), "load"),
    }
    assert len(others | {first}) == 5


def test_instance_and_step_cannot_run_into_one_another() -> None:
    assert derive_task_id("a", "b1", "load") != derive_task_id("ab", "1", "load")


@unhurried
@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9 ._:-]{0,95}", fullmatch=True))
def test_every_step_gives_a_task_id_that_is_one(step: str) -> None:
    task_id = derive_task_id("demo", str(EPOCH), step)
    assert valid_step(task_id) == task_id
    assert Shutdown(task_id=task_id, instance="demo", epoch=str(EPOCH), term=1).task_id == task_id


def test_the_longest_prompt_passes() -> None:
    task = decode_task(as_bytes(prompt="x" * MAX_PROMPT_CHARS))
    assert isinstance(task, TextGeneration)
    assert len(task.prompt) == MAX_PROMPT_CHARS

"""All decoders of bytes or texts that somebody else may have written, with the one error that each may raise.

Shared by the tests with hypothesis (`test_decoders`) and by the coverage-guided run with atheris (`tests.fuzz.guided`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from pydantic import ValidationError

from barrier import EpochId, Settings, TaskOutcome
from barrier.errors import InvalidName, InvalidSettings
from barrier.protocol.ids import LogId
from barrier.protocol.log import Garbage, decode_entry
from barrier.protocol.model import Verdict
from barrier.protocol.names import valid_digest, valid_name, valid_status, valid_step, valid_world_size
from barrier.protocol.report import Report, UndecodableReport
from barrier.protocol.wakeup import decode_hint
from barrier.store.keys import Keys
from barrier.store.picture import as_fields, read_record
from planner.history.events import _decode as _decode_history  # pyright: ignore[reportPrivateUsage]  as above
from planner.policy import Policy
from planner.recovery import decode_notes
from planner.registry import _decode as _decode_instance  # pyright: ignore[reportPrivateUsage]  as above
from planner.spec import InstanceSpec
from runner.host.frames import FrameBuffer, encode_frame
from runner.messages import (
    Chunk,
    LoadModel,
    MalformedMessage,
    ModelSpec,
    Rejection,
    TaskStatusUpdated,
    TextGeneration,
    decode_chunk,
    decode_event,
    decode_task,
    encode,
)

Refusals = tuple[type[BaseException], ...]

EPOCH = EpochId(1_700_000_000_000, "0123456789abcdef" * 2)
PLACE = LogId(EPOCH.number, 7)
INCARNATION = "0" * 11 + "1" + "a" * 16


class Unfaithful(AssertionError):
    """A value that does not come back as it was written."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """One reader of foreign bytes.

    Attributes:
        name: what it reads.
        read: reads the bytes; whatever it returns is not looked at, unless `again` is given.
        refusals: the only errors that it may raise.
        samples: bytes that it accepts, for a fuzzer to begin with.
        again: writes what was read as bytes, which must be read as the same value once more.
    """

    name: str
    read: Callable[[bytes], Any]
    refusals: Refusals
    samples: tuple[bytes, ...]
    again: Callable[[Any], bytes] | None = None

    def try_out(self, raw: bytes) -> Any:
        """Read the bytes; returns the value, or ``None`` where they are refused. Raises what must not happen."""
        try:
            value = self.read(raw)
        except self.refusals as refusal:
            sentence = str(refusal)
            if not sentence or len(sentence) > 3_000:
                raise Unfaithful(f"{self.name} refuses with a sentence of {len(sentence)} characters") from refusal
            return None
        if self.again is not None:
            once = self.read(self.again(value))
            if once != value:
                raise Unfaithful(f"{self.name}: {value!r} comes back as {once!r}")
        return value


def _mapping(raw: bytes) -> dict[bytes, bytes]:
    """A flat mapping out of any bytes: names and values in turn, cut at the zeros."""
    parts = raw.split(b"\0")
    return dict(zip(parts[::2], parts[1::2], strict=False))


def _flat(fields: Mapping[str, object]) -> bytes:
    return b"\0".join(str(part).encode() for pair in fields.items() for part in pair)


def _text(raw: bytes) -> str:
    """Any text, half surrogate pairs included: an application can pass those."""
    return raw.decode("utf-8", "surrogatepass" if _surrogates(raw) else "replace")


def _surrogates(raw: bytes) -> bool:
    try:
        raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


def _read_entry(raw: bytes) -> object:
    entry = decode_entry(PLACE, _mapping(raw))
    if isinstance(entry, Garbage) and len(entry.reason) > 200:
        raise Unfaithful("the reason quotes the entry")
    return entry


def _parse_record(raw: bytes) -> object:
    parts = raw.split(b"\0")
    record, why = read_record(as_fields(parts[: len(parts) // 2 * 2]), 2)
    if record is None and _mapping(raw) and not why:
        raise Unfaithful("a record that is there and cannot be read must say why")
    if record is not None and (len(record.roster) != 2 or record.world_size != 2):
        raise Unfaithful(f"a roster of {len(record.roster)} was read for 2 ranks")
    return record


def _read_history(raw: bytes) -> object:
    try:
        return _decode_history(PLACE, _mapping(raw))
    except KeyError as missing:
        raise ValueError(f"no field {missing}") from None


def _read_notes(raw: bytes) -> dict[int, int]:
    charges = decode_notes(_text(raw))
    if any(count <= 0 for count in charges.values()):
        raise Unfaithful(f"{charges} charges less than one failure")
    return charges


def _read_frames(raw: bytes) -> list[dict[str, Any]]:
    """In one piece and byte by byte: the same frames, or an error for both."""
    whole = FrameBuffer().feed(raw)
    piecewise = FrameBuffer()
    pieces = [frame for start in range(0, len(raw), 7) for frame in piecewise.feed(raw[start : start + 7])]
    if repr(pieces) != repr(whole):  # by their texts: a NaN is not equal to itself
        raise Unfaithful(f"{len(whole)} frames at once, {len(pieces)} in pieces")
    return whole


def _read_names(raw: bytes) -> str:
    """A name that is accepted can break out of no key."""
    text = _text(raw)
    accepted = ""
    for valid in (
        lambda: Keys(text, "group").tag,
        lambda: Keys("namespace", text).tag,
        lambda: valid_status(text),
        lambda: valid_step(text),
        lambda: valid_digest(text),
        lambda: valid_name("instance", text),
        lambda: str(EpochId.parse(text)),
        lambda: str(LogId.parse(text)),
    ):
        try:
            accepted = valid()
        except InvalidName as refusal:
            if len(str(refusal)) > 500:
                raise Unfaithful(f"a refusal of {len(str(refusal))} characters quotes what it refuses") from refusal
        else:
            bare = accepted.removeprefix("{").removesuffix("}")
            if any(character in bare for character in "{}*?[]\r\n\0") or not accepted.isascii():
                raise Unfaithful(f"{text!r} was accepted as {accepted!r}")
    return accepted


def _read_settings(raw: bytes) -> object:
    """Numbers of any kind, as a configuration may hold them."""
    try:
        loaded: Any = json.loads(raw)
    except RecursionError:  # the parser's business: what is tried here are the numbers
        raise InvalidSettings("not an object") from None
    if not isinstance(loaded, dict):
        raise InvalidSettings("not an object")
    values = cast("dict[str, Any]", loaded)
    found = Settings(**{name: value for name, value in values.items() if name in Settings.__dataclass_fields__})
    if not found.heartbeat * 2.9 <= found.lease or not 0 < found.distrust_after < found.lease:
        raise Unfaithful(f"{found} contradicts itself")
    return Policy(**{name: value for name, value in values.items() if name in Policy.__dataclass_fields__})


def _read_spec(raw: bytes) -> object:
    try:
        spec = InstanceSpec.model_validate_json(raw)
    except ValidationError:  # its text quotes what was given, to whoever gave it
        raise ValueError("not a spec") from None
    valid_name("instance", spec.name)
    valid_world_size(spec.world_size)
    return spec


def _encode_frames(frames: list[dict[str, Any]]) -> bytes:
    return b"".join(encode_frame(frame) for frame in frames)


_REPORT = Report(
    rank=0,
    incarnation=INCARNATION,
    status="Loading",
    epoch=EPOCH,
    applied=3,
    floor=EPOCH.number,
    digest="ab12",
    seq=9,
    node="node-0",
    progress=(3, 16),
    outcomes=(TaskOutcome(task_id="load.1", step="load", n=3, result="running"),),
)
_RECORD = {
    "number": EPOCH.number,
    "nonce": EPOCH.nonce,
    "ordinal": 1,
    "term": 5,
    "world_size": 2,
    "roster:0": INCARNATION * 2,
    "last_n": 2,
    "digest": "-",
    "notes": "{}",
    "opened_ms": EPOCH.number,
    "step:connect": f"{EPOCH.number}-2:1",
    "verdict": Verdict.aborted("because", 1).model_dump_json(),
}
_TASK = {"kind": "task", "nonce": EPOCH.nonce, "prev": 6, "term": 5, "step": "load", "to": "0-1", "task": "{}"}
_EVENT = TaskStatusUpdated(
    task_id="x",
    state="Failed",
    rejection=Rejection(code="Stale", task_kind="LoadModel", status="Ready", epoch="", retryable=False, hint="no"),
)
_SAID = {"source": "rank", "rank": 0, "inc": INCARNATION, "seq": 4, "epoch": str(EPOCH), "kind": "TaskStatusUpdated"}
_ABOUT: dict[str, Any] = {"task_id": "x", "instance": "demo", "epoch": str(EPOCH), "term": 1}
_GENERATION = TextGeneration(**_ABOUT, prompt="Why?")
_LOAD = LoadModel(**_ABOUT, model=ModelSpec(model_id="toy"))

DECODERS: Mapping[str, Decoder] = MappingProxyType(
    {
        decoder.name: decoder
        for decoder in (
            Decoder(
                "report",
                lambda raw: Report.decode(raw, 0),
                (UndecodableReport,),
                (_REPORT.encode(), Report(rank=0, incarnation=INCARNATION, status="Idle").encode()),
                lambda report: report.encode(),
            ),
            Decoder("task", decode_task, (MalformedMessage,), (encode(_LOAD), encode(_GENERATION)), encode),
            Decoder("event", decode_event, (MalformedMessage,), (encode(_EVENT),), encode),
            Decoder(
                "chunk", decode_chunk, (MalformedMessage,), (encode(Chunk(task_id="x", index=0, text="a")),), encode
            ),
            Decoder(
                "log entry",
                _read_entry,
                (),
                (
                    _flat(_TASK),
                    _flat({"kind": "opened", "nonce": EPOCH.nonce}),
                    _flat({"kind": "verdict", "nonce": EPOCH.nonce, "verdict": "{}"}),
                ),
            ),
            Decoder(
                "hint",
                lambda raw: decode_hint(b"1-1", _mapping(raw)),
                (),
                (_flat({"kind": "report", "rank": 1, "epoch": EPOCH, "inc": INCARNATION, "status": "Idle"}),),
            ),
            Decoder("epoch record", _parse_record, (), (_flat(_RECORD),)),
            Decoder("notes", _read_notes, (), (b'{"charges": {"-1": 2, "0": 1}}',)),
            Decoder(
                "history line",
                _read_history,
                (ValueError,),
                (
                    _flat(_SAID | {"event": encode(_EVENT).decode()}),
                    _flat(
                        {
                            "source": "planner",
                            "epoch": EPOCH,
                            "kind": "Dispatched",
                            "step": "load",
                            "id": PLACE,
                            "to": "0-1",
                            "attempt": 1,
                        }
                    ),
                    _flat({"source": "planner", "epoch": EPOCH, "kind": "Opened", "ordinal": 1, "roster": INCARNATION}),
                ),
            ),
            Decoder(
                "instance",
                lambda raw: _decode_instance("demo", raw),
                (),
                (
                    b'{"spec":{"name":"demo","world_size":2,"model":{"model_id":"toy","total_layers":4}},"desired":"up","launched_ms":5}',
                ),
            ),
            Decoder(
                "spec",
                _read_spec,
                (ValueError,),
                (b'{"name":"demo","world_size":2}',),
                lambda spec: spec.model_dump_json().encode(),
            ),
            Decoder(
                "frames", _read_frames, (ValueError,), (encode_frame({"kind": "done", "call": 1}) * 2,), _encode_frames
            ),
            Decoder("names", _read_names, (), (b"demo", b"rank 0", str(EPOCH).encode(), b"1-2", b"{demo}")),
            Decoder(
                "settings",
                _read_settings,
                (ValueError,),
                (b'{"lease": 3, "heartbeat": 1}', b'{"max_failures": 2, "backoff_cap": 1}'),
            ),
        )
    }
)

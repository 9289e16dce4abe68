"""All messages between a planner and a runner.

A message is frozen, tagged by ``kind``, and strict: an unknown kind, an unknown field or a wrong type raises `MalformedMessage`. A message
names its wire version (`barrier.protocol.wire`). A message of a version that is not read here is refused, and the refusal names the version.
The planner, the runner and a foreign system can share these messages, because this module imports nothing that needs a store.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Literal, TypeAlias, TypeVar, cast

from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from barrier.protocol.wire import WIRE_VERSION, refusal_of
from runner.model import Message, ModelSpec

__all__ = [
    "MAX_DEADLINE_SECONDS",
    "MAX_MESSAGE_BYTES",
    "MAX_PROMPT_CHARS",
    "CancelTask",
    "Chunk",
    "ConnectToGroup",
    "LoadModel",
    "MalformedMessage",
    "Rejection",
    "RejectionCode",
    "RunnerConnected",
    "RunnerConnecting",
    "RunnerEvent",
    "RunnerFailed",
    "RunnerIdle",
    "RunnerLoaded",
    "RunnerLoading",
    "RunnerPreparing",
    "RunnerReady",
    "RunnerRunning",
    "RunnerShutdown",
    "RunnerShuttingDown",
    "RunnerStatus",
    "RunnerStatusUpdated",
    "RunnerWarmingUp",
    "ShortText",
    "Shutdown",
    "StartWarmup",
    "StatusName",
    "Task",
    "TaskAcknowledged",
    "TaskKind",
    "TaskStatusUpdated",
    "TextGeneration",
    "decode_chunk",
    "decode_event",
    "decode_task",
    "derive_task_id",
    "encode",
    "status_named",
]


MAX_MESSAGE_BYTES = 256 * 1024
"""The longest message that is parsed, in bytes. A prompt of about 60,000 words fits. A payload of 1 MB is refused unread."""

MAX_DEADLINE_SECONDS = 7 * 24 * 3600.0
"""The longest time that a rank may be given to connect: a week."""

MAX_PROMPT_CHARS = 200_000
"""The longest prompt that a TextGeneration may carry, in characters."""

_T = TypeVar("_T")

ShortText = Annotated[str, Field(max_length=2_000)]


class MalformedMessage(ValueError):
    """The bytes are not one of our messages. The error's text says what is wrong, and never quotes the payload."""


# --- statuses -------------------------------------------------------------------------------------------------------------


class RunnerPreparing(Message):
    """The rank takes part in the attempt and prepares its engine: imports, a check of the device, a download, an endpoint."""

    kind: Literal["Preparing"] = "Preparing"


class RunnerIdle(Message):
    """The engine is in no group and has no model."""

    kind: Literal["Idle"] = "Idle"


class RunnerConnecting(Message):
    """The engine enters the collective group."""

    kind: Literal["Connecting"] = "Connecting"


class RunnerConnected(Message):
    """The engine is in the group and has no model yet. All ranks must report this in one epoch before LoadModel is dispatched."""

    kind: Literal["Connected"] = "Connected"


class RunnerLoading(Message):
    """The engine reads weights. Both counts are in layers."""

    kind: Literal["Loading"] = "Loading"
    layers_loaded: int = Field(ge=0)
    total_layers: int = Field(ge=0)


class RunnerLoaded(Message):
    """The model is in memory."""

    kind: Literal["Loaded"] = "Loaded"


class RunnerWarmingUp(Message):
    """The engine runs the warm-up collective."""

    kind: Literal["WarmingUp"] = "WarmingUp"


class RunnerReady(Message):
    """The engine is warm and has no work."""

    kind: Literal["Ready"] = "Ready"


class RunnerRunning(Message):
    """The engine generates text."""

    kind: Literal["Running"] = "Running"


class RunnerShuttingDown(Message):
    """The runner tears its engine down, and will end."""

    kind: Literal["ShuttingDown"] = "ShuttingDown"


class RunnerShutdown(Message):
    """The engine is torn down. The process is about to end."""

    kind: Literal["Shutdown"] = "Shutdown"


class RunnerFailed(Message):
    """Accepted work failed. The runner process lives; this epoch is over for it."""

    kind: Literal["Failed"] = "Failed"
    error: ShortText


RunnerStatus: TypeAlias = Annotated[
    RunnerPreparing
    | RunnerIdle
    | RunnerConnecting
    | RunnerConnected
    | RunnerLoading
    | RunnerLoaded
    | RunnerWarmingUp
    | RunnerReady
    | RunnerRunning
    | RunnerShuttingDown
    | RunnerShutdown
    | RunnerFailed,
    Field(discriminator="kind"),
]

StatusName: TypeAlias = Literal[
    "Preparing",
    "Idle",
    "Connecting",
    "Connected",
    "Loading",
    "Loaded",
    "WarmingUp",
    "Ready",
    "Running",
    "ShuttingDown",
    "Shutdown",
    "Failed",
]


# --- tasks ----------------------------------------------------------------------------------------------------------------


class _Sent(Message):
    """A message that is sent by itself, and not as a part of another message.

    Attributes:
        wire: the wire version of the message; see `barrier.protocol.wire`.
    """

    wire: int = WIRE_VERSION


class _Task(_Sent):
    """The fields of every task.

    Attributes:
        task_id: derived from (instance, epoch, step), so that a repeated dispatch is recognised; see `derive_task_id`. It may
            become part of a key, so it has the length limit of a step's name.
        instance: the instance, which is the barrier's group.
        epoch: ``<number>-<nonce>``: the fencing token. A runner acts only in the epoch that it promised.
        term: the term of the planner that dispatched the task. It is for people; the script that appended the task has checked it.
    """

    task_id: str = Field(min_length=1, max_length=96, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$")
    instance: str = Field(min_length=1, max_length=63)
    epoch: str = Field(min_length=3, max_length=64)
    term: int = Field(ge=0)


class ConnectToGroup(_Task):
    """Enter the collective group. The endpoints of the other ranks are in the epoch's record (`barrier.Member.endpoints`), not here.

    Attributes:
        deadline: seconds that a rank may take, counted from when it reads the task. Shorter than the planner's stall for this step.
    """

    kind: Literal["ConnectToGroup"] = "ConnectToGroup"
    deadline: float = Field(gt=0, le=MAX_DEADLINE_SECONDS)


class LoadModel(_Task):
    """Load this rank's share of the model."""

    kind: Literal["LoadModel"] = "LoadModel"
    model: ModelSpec


class StartWarmup(_Task):
    """Enter the warm-up collective."""

    kind: Literal["StartWarmup"] = "StartWarmup"


class TextGeneration(_Task):
    """Generate text; rank 0 answers on the task's chunk stream.

    Attributes:
        prompt: never logged.
        max_tokens: 1 to 100,000.
    """

    kind: Literal["TextGeneration"] = "TextGeneration"
    prompt: str = Field(max_length=MAX_PROMPT_CHARS, repr=False)
    max_tokens: int = Field(default=64, ge=1, le=100_000)


class CancelTask(_Task):
    """Stop working on another task, if it is still running."""

    kind: Literal["CancelTask"] = "CancelTask"
    cancels: str = Field(min_length=1, max_length=128)


class Shutdown(_Task):
    """Tear the engine down, and end the process with exit code 0."""

    kind: Literal["Shutdown"] = "Shutdown"


Task: TypeAlias = Annotated[
    ConnectToGroup | LoadModel | StartWarmup | TextGeneration | CancelTask | Shutdown, Field(discriminator="kind")
]
TaskKind: TypeAlias = Literal["ConnectToGroup", "LoadModel", "StartWarmup", "TextGeneration", "CancelTask", "Shutdown"]


def derive_task_id(instance: str, epoch: str, step: str) -> str:
    """Name the task of one step of one epoch of one instance: the same three always give the same id.

    The hash includes the epoch's nonce. So two epochs with the same number, which a failover can issue, never share a task.
    """
    digest = hashlib.blake2b(f"{instance}\0{epoch}\0{step}".encode(), digest_size=12).hexdigest()
    return f"{step.replace(' ', '-')[:71]}.{digest}"


# --- answers and events ---------------------------------------------------------------------------------------------------

RejectionCode: TypeAlias = Literal["NotYet", "Stale", "Invalid"]


class Rejection(Message):
    """Why a task was refused.

    Attributes:
        code: ``NotYet`` (ask again later), ``Stale`` (too late) or ``Invalid`` (never possible).
        task_kind: the kind of the refused task, or ``unknown`` if it could not be read.
        status: the status of this runner when it refused the task.
        epoch: the epoch that this runner is in; empty if it is in none.
        retryable: whether the same task may succeed later in the same epoch.
        hint: one sentence for a person.
    """

    code: RejectionCode
    task_kind: str = Field(max_length=64)
    status: StatusName
    epoch: str = Field(max_length=64)
    retryable: bool
    hint: ShortText


class TaskStatusUpdated(_Sent):
    """A task began, ended or was refused.

    Attributes:
        state: ``Running``, ``Complete``, ``Failed`` or ``Cancelled``.
        rejection: set if and only if the task was refused before it began.
        error: set if accepted work failed.
    """

    kind: Literal["TaskStatusUpdated"] = "TaskStatusUpdated"
    task_id: str
    state: Literal["Running", "Complete", "Failed", "Cancelled"]
    rejection: Rejection | None = None
    error: ShortText | None = None


class RunnerStatusUpdated(_Sent):
    """The runner's status changed, or is reported again."""

    kind: Literal["RunnerStatusUpdated"] = "RunnerStatusUpdated"
    status: RunnerStatus


class TaskAcknowledged(_Sent):
    """The runner has read the task, and has accepted or refused it."""

    kind: Literal["TaskAcknowledged"] = "TaskAcknowledged"
    task_id: str


RunnerEvent: TypeAlias = Annotated[
    TaskStatusUpdated | RunnerStatusUpdated | TaskAcknowledged, Field(discriminator="kind")
]


class Chunk(_Sent):
    """One piece of a generation's answer. The last one of a stream has ``finish`` set.

    Attributes:
        index: 0, 1, 2, …
        finish: ``None`` while more chunks follow; ``stop``, ``length``, ``cancelled`` or ``error`` in the last one.
        error: the reason, if ``finish`` is ``error``.
    """

    kind: Literal["Chunk"] = "Chunk"
    task_id: str
    index: int = Field(ge=0)
    text: str = Field(default="", repr=False)
    finish: Literal["stop", "length", "cancelled", "error"] | None = None
    error: ShortText | None = None


_TASK: TypeAdapter[Task] = TypeAdapter(Task)
_EVENT: TypeAdapter[RunnerEvent] = TypeAdapter(RunnerEvent)
_CHUNK: TypeAdapter[Chunk] = TypeAdapter(Chunk)
_STATUS: TypeAdapter[RunnerStatus] = TypeAdapter(RunnerStatus)


def status_named(name: str, **fields: int | str) -> RunnerStatus:
    """Make a status from its name and its fields; raises pydantic's ValidationError if there is no such status."""
    return _STATUS.validate_python({"kind": name, **fields})


def decode_task(payload: bytes) -> Task:
    """Read one task.

    Raises:
        MalformedMessage: longer than `MAX_MESSAGE_BYTES`, not JSON, of another wire version, an unknown kind, or a wrong field. The
            error's text names the field and never quotes its value, which may be a prompt.
    """
    return _decode(_TASK, payload)


def decode_event(payload: bytes) -> RunnerEvent:
    """Read one event; raises `MalformedMessage` as `decode_task` does."""
    return _decode(_EVENT, payload)


def decode_chunk(payload: bytes) -> Chunk:
    """Read one chunk; raises `MalformedMessage` as `decode_task` does."""
    return _decode(_CHUNK, payload)


def encode(message: BaseModel) -> bytes:
    """Write one message as JSON bytes."""
    return message.model_dump_json(exclude_none=True).encode()


def _decode(adapter: TypeAdapter[_T], payload: bytes) -> _T:
    if len(payload) > MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"the message has {len(payload):,} bytes; at most {MAX_MESSAGE_BYTES:,} are read")
    try:
        message = adapter.validate_json(payload)
    except ValidationError as error:
        # The version is checked first: a message of a later version may have fields that are unknown here.
        raise MalformedMessage(_refusal(_version_in(payload)) or _describe(error)) from None
    refusal = _refusal(getattr(message, "wire", None))
    if refusal:
        raise MalformedMessage(refusal)
    return message


def _refusal(version: object) -> str:
    said = refusal_of(version)
    return said and f"the message {said}"


def _version_in(payload: bytes) -> object:
    """The wire version that a message names; ours if it names none, or if the bytes are not a message."""
    try:
        found: object = from_json(payload)
    except ValueError:
        return WIRE_VERSION
    return cast("dict[str, object]", found).get("wire", WIRE_VERSION) if isinstance(found, dict) else WIRE_VERSION


def _describe(error: ValidationError) -> str:
    """Say what is wrong, without the wrong value: pydantic's own text would quote it."""
    problems = [
        f"{'.'.join(_shown(part) for part in problem['loc']) or 'the message'}: {_reason(problem['type'])}"
        for problem in error.errors(include_input=False, include_url=False, include_context=False)
    ]
    shown = "; ".join(problems[:3])
    return shown if len(problems) <= 3 else f"{shown}; and {len(problems) - 3} more"


def _shown(part: int | str) -> str:
    """The name of a field, if it looks like one. The sender chose the name of an unknown field, and it may be a prompt."""
    return str(part) if re.fullmatch(r"\w{1,40}", str(part), re.ASCII) else "(not a name)"


def _reason(error_type: str) -> str:
    return {
        "json_invalid": "not JSON",
        "union_tag_invalid": "unknown kind",
        "union_tag_not_found": "no kind",
        "missing": "missing",
        "extra_forbidden": "unknown field",
    }.get(error_type, error_type.replace("_", " "))

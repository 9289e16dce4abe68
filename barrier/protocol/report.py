"""A rank's report: its content, and how it is encoded.

A script checks a report by comparing its beginning::

    2|<epoch number>-<nonce>|<status>|<applied>|<incarnation>|<floor>|<digest>|{"rank":0,…}

The fields that all arrived ranks have alike come first.
``-`` stands for "no epoch" and "no digest"; applied has 10 digits, floor 16.
See docs/protocol.md, "Reports".
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticSerializationError, to_json

from barrier.errors import InvalidName
from barrier.protocol.ids import EpochId
from barrier.protocol.names import shown, valid_status

__all__ = ["MAX_APPLIED", "MAX_OUTCOMES", "MAX_REPORT_BYTES", "SCHEMA", "Report", "TaskOutcome", "UndecodableReport"]


SCHEMA = "2"
MAX_REPORT_BYTES = 16 * 1024
MAX_APPLIED = 10**10 - 1
_MAX_ENDPOINT_CHARS = 300
"""The longest endpoint, in characters: a host name of 255 and a port fit."""
MAX_OUTCOMES = 8
"""How many of its last tasks' outcomes a report carries."""

_ShortText = Annotated[str, Field(max_length=2_000)]


class TaskOutcome(BaseModel):
    """What became of one task at one rank. Each report carries the last few, so a lost report loses no outcome.

    Attributes:
        task_id: the task's id.
        step: the step it belongs to.
        n: its position in the log.
        result: ``running``, ``done``, ``cancelled``, ``rejected`` or ``failed``.
        code: for a rejection its code (``NotYet``, ``Stale``, ``Invalid``); otherwise empty.
        detail: one sentence for a person; never a prompt.
        retryable: whether the same task may succeed later in the same epoch.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="ignore")

    task_id: str = Field(max_length=128)
    step: str = Field(max_length=96)
    n: int = Field(ge=0)
    result: Literal["running", "done", "cancelled", "rejected", "failed"]
    code: str = Field(default="", max_length=64)
    detail: _ShortText = ""
    retryable: bool = False


class _ReportBody(BaseModel):
    """The part of a report that planners and people read. Unknown fields are those of a later version.

    One script reads it, too: `dispatch` finds ``"endpoint":"…"`` in it by a pattern (lua/prelude.lua, ``write_endpoints``). No other field may
    have a name that ends so.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    rank: int = Field(ge=0)
    seq: int = Field(default=0, ge=0)
    node: str = Field(default="", max_length=255)
    endpoint: str = Field(default="", max_length=_MAX_ENDPOINT_CHARS)
    pid: int = 0
    world_size: int | None = None
    lease_ms: int = Field(default=0, ge=0)
    status_ms: int = Field(default=0, ge=0)
    progress: tuple[int, int] | None = None
    signs: int = Field(default=0, ge=0)
    error: _ShortText = ""
    permanent: bool = False
    outcomes: tuple[TaskOutcome, ...] = Field(default=(), max_length=MAX_OUTCOMES)


def _fields(**said: object) -> str:
    """The fields of a JSON object, without its braces. Empty values are left out: they are the reader's defaults."""
    told = {name: value for name, value in said.items() if value}
    if not told:
        return ""
    try:
        text = to_json(told)
    except PydanticSerializationError:  # for example half a surrogate pair
        text = json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    return text[1:-1].decode()


@lru_cache(maxsize=64)
def _who(rank: int, node: str, endpoint: str, pid: int, world_size: int | None, lease_ms: int) -> str:
    """The fields that are the same in all reports of a rank, within one epoch."""
    rest = _fields(
        node=node[:255], endpoint=endpoint[:_MAX_ENDPOINT_CHARS], pid=pid, world_size=world_size, lease_ms=lease_ms
    )
    return f'"rank":{rank}{rest and "," + rest}'


class UndecodableReport(ValueError):
    """Bytes in a rank's key that are not a report of ours."""


class Report(NamedTuple):
    """A rank's whole current state, as the rank reports it.

    A named tuple, because it is copied between the last arrival and the dispatch: a frozen dataclass takes five times
    as long.

    Attributes:
        rank: whose it is.
        incarnation: which life of the rank's process.
        epoch: the epoch that the rank has promised and not retired from; ``None`` if it is in none.
        status: a status name.
        applied: the highest log position of `epoch` that the rank has taken from the log.
        floor: the highest epoch number that the rank has ever promised; kept when a promise is spent.
        digest: digest of the spec that the rank was configured for; empty if it has none.
        seq: rises with every report of this incarnation.
        node: the machine, for people.
        endpoint: ``host:port`` at which this rank's engine waits for the others in `epoch`; empty if it has none. A
        script copies
            the endpoints of all ranks into the epoch's record (see `barrier.Barrier.dispatch`).
        pid: process id, for people.
        world_size: the world size that the rank was configured for; ``None`` if it has none.
        lease_ms: lifetime that the report was written with, in milliseconds.
        status_ms: how long the rank has been in this status, in milliseconds, by its own clock.
        progress: (done, total) of the work in progress.
        signs: how many signs of life the work in progress has given; a sign need not mean progress.
        error: what failed; empty if nothing did.
        permanent: whether trying again cannot mend that failure.
        outcomes: the last few tasks and what became of them, oldest first.
    """

    rank: int
    incarnation: str
    status: str
    epoch: EpochId | None = None
    applied: int = 0
    floor: int = 0
    digest: str = ""
    seq: int = 0
    node: str = ""
    endpoint: str = ""
    pid: int = 0
    world_size: int | None = None
    lease_ms: int = 0
    status_ms: int = 0
    progress: tuple[int, int] | None = None
    signs: int = 0
    error: str = ""
    permanent: bool = False
    outcomes: tuple[TaskOutcome, ...] = ()

    @property
    def header(self) -> str:
        """The part of the report that scripts compare."""
        return (
            f"{SCHEMA}|{self.epoch or '-'}|{valid_status(self.status)}|{self.applied:010d}"
            f"|{self.incarnation}|{self.floor:016d}|{self.digest or '-'}|"
        )

    def encode(self) -> bytes:
        """Write the report: header, then JSON. Texts are cut to the limits of a report, so every reader accepts it."""
        outcomes = self.outcomes and self.outcomes[-MAX_OUTCOMES:]
        raw = self._encode_with(outcomes)
        if len(raw) > MAX_REPORT_BYTES:  # the planner needs an outcome's code more than its sentence
            outcomes = tuple(one.model_copy(update={"detail": one.detail[:200]}) for one in outcomes)
            raw = self._encode_with(outcomes)
        while len(raw) > MAX_REPORT_BYTES and outcomes:
            outcomes = outcomes[1:]
            raw = self._encode_with(outcomes)
        return raw

    def _encode_with(self, outcomes: tuple[TaskOutcome, ...]) -> bytes:
        # Piece by piece: little of a report is new each time, and it is written between the last arrival and the
        # dispatch.
        who = _who(self.rank, self.node, self.endpoint, self.pid, self.world_size, self.lease_ms)
        what = ""
        if outcomes or self.progress or self.signs or self.error or self.permanent:
            what = _fields(
                progress=self.progress,
                signs=self.signs,
                error=self.error[:2_000],
                permanent=self.permanent,
                outcomes=[one.model_dump(exclude_defaults=True) for one in outcomes],
            )
        return f'{self.header}{{{who},"seq":{self.seq},"status_ms":{self.status_ms}{what and "," + what}}}'.encode()

    @classmethod
    def decode(cls, raw: bytes, rank: int) -> Report:
        """Read a report found in the key of a rank.

        Raises:
            UndecodableReport: the bytes are too many, of another schema, malformed, or another rank's.
        """
        if len(raw) > MAX_REPORT_BYTES:
            raise UndecodableReport(f"rank {rank}: {len(raw):,} bytes; at most {MAX_REPORT_BYTES:,} are read")
        try:
            schema, epoch, status, applied, incarnation, floor, digest, text = raw.decode().split("|", 7)
        except (UnicodeDecodeError, ValueError):
            raise UndecodableReport(f"rank {rank}: not a report") from None
        if schema != SCHEMA:
            raise UndecodableReport(f"rank {rank}: schema {shown(schema)}; this version reads {SCHEMA}")
        if not re.fullmatch(r"[0-9a-f]{28}", incarnation) or not re.fullmatch(
            r"[0-9]{10}\|[0-9]{16}", f"{applied}|{floor}"
        ):
            raise UndecodableReport(f"rank {rank}: malformed header")
        if not re.fullmatch(r"-|[0-9a-f]{1,64}", digest):
            raise UndecodableReport(f"rank {rank}: malformed digest")
        try:
            body = _ReportBody.model_validate_json(text)
            status = valid_status(status)
            epoch_id = None if epoch == "-" else EpochId.parse(epoch)
        except (ValidationError, InvalidName):
            raise UndecodableReport(f"rank {rank}: malformed report") from None
        if body.rank != rank:
            raise UndecodableReport(f"rank {rank}: the report says rank {body.rank}")
        return cls(
            rank=rank,
            incarnation=incarnation,
            status=status,
            epoch=epoch_id,
            applied=int(applied),
            floor=int(floor),
            digest="" if digest == "-" else digest,
            seq=body.seq,
            node=body.node,
            endpoint=body.endpoint,
            pid=body.pid,
            world_size=body.world_size,
            lease_ms=body.lease_ms,
            status_ms=body.status_ms,
            progress=body.progress,
            signs=body.signs,
            error=body.error,
            permanent=body.permanent,
            outcomes=body.outcomes,
        )

"""The frames between a host and its child: four bytes of length, big-endian, then that many bytes of ASCII JSON. Never pickle."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, cast

from runner.engine import EngineFailure, EngineGroup, GenerationRequest
from runner.host.work import CallName, Place, Request
from runner.model import ModelSpec

__all__ = ["MAX_FRAME_BYTES", "FrameBuffer", "decode_request", "encode_frame", "encode_request"]


MAX_FRAME_BYTES = 16 * 1024 * 1024
"""The longest frame between a host and its child, in bytes. The longest prompt of a task needs 2.4 MB."""


def encode_frame(frame: dict[str, Any]) -> bytes:
    """Write one frame; raises a permanent `EngineFailure` if it is longer than `MAX_FRAME_BYTES`."""
    body = json.dumps(frame).encode("ascii")  # escaped, so that a text may hold a lone surrogate
    if len(body) > MAX_FRAME_BYTES:
        raise EngineFailure(
            f"a frame of {len(body):,} bytes does not pass between runner and engine; at most {MAX_FRAME_BYTES:,} do, so send less",
            permanent=True,
        )
    return len(body).to_bytes(4, "big") + body


class FrameBuffer:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Add bytes; returns the frames that are complete. Raises ValueError if they are not frames."""
        self._bytes += data
        frames: list[dict[str, Any]] = []
        while len(self._bytes) >= 4:
            length = int.from_bytes(self._bytes[:4], "big")
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length:,} bytes, where at most {MAX_FRAME_BYTES:,} are read")
            if len(self._bytes) < 4 + length:
                break
            try:
                frame: Any = json.loads(bytes(self._bytes[4 : 4 + length]))
            except RecursionError:
                raise ValueError("a frame that is nested too deeply to be read") from None
            del self._bytes[: 4 + length]
            if not isinstance(frame, dict):
                raise ValueError("a frame that is not an object")  # noqa: TRY004 - it is the bytes that are wrong
            frames.append(cast("dict[str, Any]", frame))
        return frames


def encode_request(request: Request) -> dict[str, Any]:
    """A request as a JSON object."""
    if request is None:
        return {}
    return request.model_dump() if isinstance(request, ModelSpec) else asdict(request)


def decode_request(name: CallName, request: dict[str, Any]) -> Request:
    """The request of a call of that name."""
    match name:
        case "connect":
            endpoints = tuple(request.pop("endpoints"))
            return EngineGroup(**request, endpoints=endpoints)
        case "prepare":
            return Place(**request)
        case "load":
            return ModelSpec.model_construct(**request)  # the runner has checked it
        case "generate":
            return GenerationRequest(**request)
        case "start" | "warm_up":
            return None

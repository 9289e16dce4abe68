"""The names of epochs, log positions and incarnations."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from barrier.errors import InvalidName
from barrier.protocol.names import shown

__all__ = ["INCARNATION_WIDTH", "EpochId", "LogId", "new_incarnation", "new_nonce"]


INCARNATION_WIDTH = 28


@dataclass(frozen=True, slots=True, order=True)
class EpochId:
    """One attempt to bring a group up; the fencing token. Number and nonce are compared together."""

    number: int
    nonce: str

    def __str__(self) -> str:
        """``<number>-<nonce>``, as on the wire."""
        return f"{self.number}-{self.nonce}"

    @classmethod
    def parse(cls, text: str) -> EpochId:
        """Read ``<number>-<nonce>``; raises `InvalidName` for anything else."""
        match = re.fullmatch(r"([0-9]{1,16})-([0-9a-f]{32})", text)
        if match is None:
            raise InvalidName(f"{shown(text)} is not an epoch: <number>-<32 hexadecimal digits>")
        return cls(int(match[1]), match[2])


@dataclass(frozen=True, slots=True, order=True)
class LogId:
    """A position in the task log: ``<epoch number>-<n>``."""

    number: int
    n: int

    def __str__(self) -> str:
        """As a stream id."""
        return f"{self.number}-{self.n}"

    @classmethod
    def parse(cls, text: str) -> LogId:
        """Read a stream id; raises `InvalidName` for anything else."""
        match = re.fullmatch(r"([0-9]{1,20})-([0-9]{1,20})", text)
        if match is None:
            raise InvalidName(f"{shown(text)} is not a log id: <number>-<n>")
        return cls(int(match[1]), int(match[2]))


def new_nonce() -> str:
    """128 random bits, in hexadecimal."""
    return secrets.token_hex(16)


def new_incarnation(now_ms: int) -> str:
    """Name one life of one runner process: 12 hexadecimal digits of milliseconds, then 64 random bits.

    Later lives sort after earlier ones if the clocks are right; safety does not depend on that.
    """
    return f"{now_ms & 0xFFFFFFFFFFFF:012x}{secrets.token_hex(8)}"

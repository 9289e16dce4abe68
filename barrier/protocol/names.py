"""The rules for the names of namespaces, groups, statuses and steps, for digests, endpoints and the number of ranks."""

from __future__ import annotations

import re
from functools import lru_cache

from barrier.errors import InvalidName

__all__ = [
    "DIGEST",
    "MAX_WORLD_SIZE",
    "NAME",
    "STATUS",
    "shown",
    "valid_digest",
    "valid_endpoint",
    "valid_name",
    "valid_status",
    "valid_step",
    "valid_world_size",
]


NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
STATUS = re.compile(r"[A-Za-z][A-Za-z0-9]{0,31}")
_STEP = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._:-]{0,95}")
DIGEST = re.compile(r"[0-9a-f]{0,64}")
_ENDPOINT = re.compile(r"(?:[A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\]):([0-9]{1,5})")
MAX_WORLD_SIZE = 16_384


def valid_name(what: str, value: str) -> str:
    """Return the value if it may be part of a key; raise `InvalidName` with the rule otherwise."""
    if NAME.fullmatch(value) is None:
        raise InvalidName(
            f"{what} {shown(value)} is not a name: use 1 to 63 of a-z, 0-9 and '-', beginning with a letter or a digit"
        )
    return value


@lru_cache(maxsize=64)
def valid_status(value: str) -> str:
    """Return the value if it may be a status: 1 to 32 letters and digits, beginning with a letter."""
    if STATUS.fullmatch(value) is None:
        raise InvalidName(f"status {shown(value)} is not a status name: use 1 to 32 letters and digits, a letter first")
    return value


def valid_step(value: str) -> str:
    """Return the value if it may name a step or a task: 1 to 96 of letters, digits, space and ``._:-``."""
    if _STEP.fullmatch(value) is None:
        raise InvalidName(f"step {shown(value)} is not a step name: use 1 to 96 of letters, digits, space and ._:-")
    return value


def valid_digest(value: str) -> str:
    """Return the value if it may be the digest of a spec: up to 64 lower-case hexadecimal digits, or empty."""
    if DIGEST.fullmatch(value) is None:
        raise InvalidName(f"digest {shown(value)} is not a digest: use up to 64 of 0-9 and a-f")
    return value


def valid_endpoint(value: str) -> str:
    """Return the value if it is ``host:port``, with an IPv6 address in brackets; raise `InvalidName` otherwise."""
    found = _ENDPOINT.fullmatch(value)
    if found is None or not 1 <= int(found[1]) <= 65_535:
        raise InvalidName(
            f"endpoint {shown(value)} is not host:port: use a host name or an IP address (IPv6 in brackets) and a port from 1 to 65535"
        )
    return value


def valid_world_size(value: object) -> int:
    """Return the value if it is a number of ranks; raise `InvalidName` otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_WORLD_SIZE:
        raise InvalidName(f"world_size is {value!r}; it must be a whole number from 1 to {MAX_WORLD_SIZE:,}")
    return value


def shown(value: str) -> str:
    """Quote a foreign value for a message: escaped, and cut to 80 characters."""
    return repr(value if len(value) <= 80 else value[:77] + "...")

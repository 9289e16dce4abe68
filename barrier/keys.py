"""Every key, and what may be in its name. No other module puts a key together.

All keys of a group carry the tag ``{namespace:group}``, so that they share one hash slot and one ACL pattern.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from barrier.errors import InvalidName

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
STATUS = re.compile(r"[A-Za-z][A-Za-z0-9]{0,31}")
STEP = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._:-]{0,95}")
DIGEST = re.compile(r"[0-9a-f]{0,64}")
ENDPOINT = re.compile(r"(?:[A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\]):([0-9]{1,5})")
MAX_WORLD_SIZE = 16_384
SPARE_SEATS = 16
"""How many of those who wait for a rank can be seen."""


def valid_name(what: str, value: str) -> str:
    """Return the value if it may be part of a key; raise `InvalidName`, which says what may."""
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
    if STEP.fullmatch(value) is None:
        raise InvalidName(f"step {shown(value)} is not a step name: use 1 to 96 of letters, digits, space and ._:-")
    return value


def valid_digest(value: str) -> str:
    """Return the value if it may be the digest of a spec: up to 64 lower-case hexadecimal digits, or empty."""
    if DIGEST.fullmatch(value) is None:
        raise InvalidName(f"digest {shown(value)} is not a digest: use up to 64 of 0-9 and a-f")
    return value


def valid_endpoint(value: str) -> str:
    """Return the value if it is ``host:port``, with an IPv6 address in brackets; raise `InvalidName` otherwise."""
    found = ENDPOINT.fullmatch(value)
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
    """Quote a hostile value for a message: escaped, and cut after 80 characters."""
    return repr(value if len(value) <= 80 else value[:77] + "...")


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one group.

    Raises:
        InvalidName: if the namespace or the group may not be part of a key.
    """

    namespace: str
    group: str

    def __post_init__(self) -> None:
        """Validate both names at the edge."""
        valid_name("namespace", self.namespace)
        valid_name("group", self.group)

    @property
    def tag(self) -> str:
        """What every key of the group begins with."""
        return f"{{{self.namespace}:{self.group}}}"

    @property
    def epoch(self) -> str:
        """Hash: the epoch's record. Lifetime: `Settings.record_lifetime`."""
        return f"{self.tag}:epoch"

    @property
    def leader(self) -> str:
        """Hash: term, holder and the end of its lease. Lifetime: `Settings.record_lifetime`."""
        return f"{self.tag}:leader"

    @property
    def tasks(self) -> str:
        """Stream: the task log. Lifetime: `Settings.record_lifetime`; capped."""
        return f"{self.tag}:tasks"

    @property
    def signals(self) -> str:
        """Stream: wake-up hints. Lifetime: `Settings.record_lifetime`; capped."""
        return f"{self.tag}:signals"

    @property
    def events(self) -> str:
        """Stream: history for people. Lifetime: `Settings.record_lifetime`; capped."""
        return f"{self.tag}:events"

    @property
    def requests(self) -> str:
        """Stream: what clients have asked for and nobody has answered yet. Capped.

        Lifetime: the longest that a client waits, and at least `Settings.output_lifetime`, since it holds prompts.
        """
        return f"{self.tag}:requests"

    def rank(self, rank: int) -> str:
        """String: one rank's report. Lifetime: `Settings.lease`."""
        return f"{self.tag}:rank:{rank}"

    def claim(self, rank: int) -> str:
        """String: the incarnation that holds a rank. Lifetime: `Settings.lease`."""
        return f"{self.tag}:claims:{rank}"

    def spare(self, seat: int) -> str:
        """String: a process that waits for a rank. Lifetime: `Settings.lease`."""
        return f"{self.tag}:spare:{seat}"

    def spares(self) -> list[str]:
        """The keys of all seats of those who wait."""
        return [self.spare(seat) for seat in range(SPARE_SEATS)]

    def out(self, task_id: str) -> str:
        """Stream: one generation's chunks. Lifetime: `Settings.output_lifetime`."""
        return f"{self.tag}:out:{valid_step(task_id)}"

    def once(self, step: str) -> str:
        """String: that a repeatable task was dispatched, and where. Lifetime: `Settings.output_lifetime`."""
        return f"{self.tag}:once:{valid_step(step)}"

    def ranks(self, world_size: int) -> list[str]:
        """The report keys of all ranks, in order."""
        prefix = f"{self.tag}:rank:"
        return [f"{prefix}{rank}" for rank in range(world_size)]


@dataclass(frozen=True, slots=True)
class NamespaceKeys:
    """The keys of a namespace that belong to no group. Their tag cannot be a group's: ``-`` is not a name."""

    namespace: str

    def __post_init__(self) -> None:
        """Validate the name at the edge."""
        valid_name("namespace", self.namespace)

    @property
    def instances(self) -> str:
        """Hash: the desired state, one field an instance. Lifetime: `Settings.record_lifetime`, renewed by planners."""
        return f"{{{self.namespace}:-}}:instances"

    @property
    def changes(self) -> str:
        """Stream: hints that the desired state changed. Lifetime: `Settings.record_lifetime`; capped."""
        return f"{{{self.namespace}:-}}:changes"

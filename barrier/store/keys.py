"""Every key and its lifetime. No other module puts a key together.

All keys of a group carry the tag ``{namespace:group}``, so that they share one hash slot and one ACL pattern.
"""

from __future__ import annotations

from dataclasses import dataclass

from barrier.protocol.names import valid_name, valid_step

__all__ = ["SPARE_SEATS", "Keys", "NamespaceKeys"]


SPARE_SEATS = 16
"""How many spares can be shown."""


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
        """Stream: requests of clients that nobody has answered yet. Capped.

        Lifetime: the longest wait of a client, but at least `Settings.output_lifetime`. Short, since it holds prompts.
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
        """The keys of all seats for spares."""
        return [self.spare(seat) for seat in range(SPARE_SEATS)]

    def out(self, task_id: str) -> str:
        """Stream: one generation's chunks. Lifetime: `Settings.output_lifetime`."""
        return f"{self.tag}:out:{valid_step(task_id)}"

    def once(self, step: str) -> str:
        """String: the log id of a repeatable task that was dispatched. Lifetime: `Settings.output_lifetime`."""
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

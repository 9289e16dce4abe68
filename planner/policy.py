"""How long the planner waits, and how often it tries again. No pydantic here, so that the command line starts quickly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from barrier.errors import InvalidSettings
from barrier.plain import number, plain, typed
from barrier.settings import Settings

__all__ = ["PATIENCE", "Policy"]


PATIENCE = (
    "prepare_stall",
    "connect_stall",
    "load_stall",
    "warmup_stall",
    "generate_stall",
    "backoff_base",
    "backoff_cap",
)
"""The times of `Policy` that an instance may set for itself."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How long the planner waits, and how often it tries again. All times are in seconds.

    Attributes:
        assemble_timeout: how long ranks may be away before the log warns. `Instance.ready` without a timeout of its own also waits
            so long. The planner itself goes on waiting, and begins the next attempt when the ranks come.
        absence_limit: how long ranks may be away before the planner gives the instance up; ``None``: it never does. An instance's own
            limit comes first. A planner that takes over counts from its own start.
        prepare_stall: how long a rank may show no sign of its own while it prepares its engine (imports, a download).
        connect_stall: how long a missing rank may show no sign of its own in a step up to Connected; slow is not stalled. The
            engines get four fifths of it to connect (`planner.tasks.DEADLINE_SHARE`), so that they report first what they waited for.
        load_stall: how long a rank may load no further layer. A rank that has loaded all of its layers may wait for the others as
            long as any rank shows progress.
        warmup_stall: how long a rank may show no sign of its own in the warm-up.
        generate_stall: how long rank 0 may generate no further token. The other ranks show no progress of their own then; they may
            wait as long as any rank shows progress.
        max_failures: how many failed attempts of one rank in a row are followed by another attempt. After the next failure the planner
            gives the instance up. Attempts that no rank is to blame for have a count of their own, with the same limit. A rank that is
            away has not failed, unless its process died: the planner knows that when another process comes for the rank.
        max_rejections: how often the planner asks for one step again in one epoch after a rank answered NotYet.
        backoff_base: the longest first pause between two attempts. It doubles with every further failure of the same rank.
        backoff_cap: the longest pause between two attempts.
        stable_after: how long an instance must be Ready before the planner forgets its failures. A completed generation does so at once.
        generations: how many generations the runners may have at once.
    """

    assemble_timeout: float = 120.0
    absence_limit: float | None = None
    prepare_stall: float = 900.0
    connect_stall: float = 60.0
    load_stall: float = 120.0
    warmup_stall: float = 120.0
    generate_stall: float = 120.0
    max_failures: int = 3
    max_rejections: int = 3
    backoff_base: float = 0.5
    backoff_cap: float = 30.0
    stable_after: float = 30.0
    generations: int = 16

    def __post_init__(self) -> None:
        """Refuse values that could never work."""
        for field in fields(self):
            value: float | None = getattr(self, field.name)
            if value is None:  # no limit
                continue
            least = 0 if field.name.startswith("max_") else 1e-9
            if not least <= value < float("inf"):
                raise InvalidSettings(
                    f"{field.name} is {plain(value)}; it must be a finite number, and at least {typed(least)}"
                )
        if self.backoff_cap < self.backoff_base:
            raise InvalidSettings(
                f"backoff_cap is {typed(self.backoff_cap)} s and backoff_base is {typed(self.backoff_base)} s; "
                "backoff_cap must be at least backoff_base"
            )

    @property
    def shortest_stall(self) -> float:
        """The shortest stall, in seconds."""
        return min(getattr(self, name) for name in PATIENCE if name.endswith("_stall"))

    def check(self, settings: Settings) -> None:
        """Refuse a stall that a healthy rank could not meet: ranks report their progress once a heartbeat.

        Raises:
            InvalidSettings: a stall is shorter than two heartbeats. The message has both values.
        """
        for name in PATIENCE:
            seconds: float = getattr(self, name)
            if name.endswith("_stall") and seconds < 2 * settings.heartbeat:
                raise InvalidSettings(
                    f"{name} is {number(seconds)} s and the heartbeat is {number(settings.heartbeat)} s; ranks report their progress once a "
                    "heartbeat, so a stall must be at least two heartbeats"
                )

    def for_instance(self, patience: Mapping[str, float], settings: Settings) -> Policy:
        """This policy with the instance's own times. A stall that is too short (see `check`) becomes two heartbeats.

        Args:
            patience: the instance's own times by name (`PATIENCE`), in seconds, as in `InstanceSpec`.
            settings: has the heartbeat.
        """
        if not patience:
            return self
        own = {
            name: max(seconds, 2 * settings.heartbeat) if name.endswith("_stall") else seconds
            for name, seconds in patience.items()
        }
        base, cap = own.get("backoff_base", self.backoff_base), own.get("backoff_cap", self.backoff_cap)
        if base > cap:  # one of the two is the planner's own: that one changes
            own |= {"backoff_cap": base} if "backoff_base" in own else {"backoff_base": cap}
        return replace(self, **own)

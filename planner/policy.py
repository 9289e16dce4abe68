"""How patiently an instance is brought up. It needs no pydantic, so that the command line knows the defaults and begins soon."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from barrier.errors import InvalidSettings
from barrier.plain import number, plain, typed
from barrier.settings import Settings

PATIENCE = (
    "prepare_stall",
    "connect_stall",
    "load_stall",
    "warmup_stall",
    "generate_stall",
    "backoff_base",
    "backoff_cap",
)
"""The times of `Policy` that an instance may have of its own."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How patiently instances are brought up. All times in seconds.

    Attributes:
        assemble_timeout: how long ranks may be away before that is told as a warning, and before `Instance.ready` without a timeout
            of its own waits no longer. The instance itself goes on waiting, and is taken up again when they come.
        absence_limit: how long ranks may be away before the instance is given up; ``None``: that never happens. An instance's own
            limit beats it. A planner that takes over counts anew.
        prepare_stall: how long a rank may prepare its engine (imports, a download) without a sign of its own.
        connect_stall: how long a rank that is missing may show no sign of its own in a step up to Connected; slow is not stalled. The
            engines are given four fifths of it to connect (`planner.tasks.DEADLINE_SHARE`), so that they say first what they
            waited for.
        load_stall: the same for loading: a rank has loaded no further layer for so long. One that has loaded all of them may wait
            for the others as long as anything moves.
        warmup_stall: the same for warming up.
        generate_stall: the same while generating: rank 0 has answered no further token for so long. The others have no progress of
            their own there, and are waited for as long as anything moves.
        max_failures: how many failed attempts in a row of one rank are followed by another try; the next one gives the instance up.
            Attempts that no rank is to blame for are counted apart, with the same limit. A rank that is away has not failed; it has if
            its process died, which shows when another one comes.
        max_rejections: how often one step is asked again in one epoch after a rank answered NotYet.
        backoff_base: the longest first pause between attempts; doubled for every further failure of the same rank.
        backoff_cap: the longest pause of all.
        stable_after: how long an instance must be Ready for its failures to be forgotten; a completed generation does it too.
        generations: how many generations may be in the runners' hands at once.
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
        """Refuse what could never work."""
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
                f"backoff_cap is {typed(self.backoff_cap)} s and backoff_base is {typed(self.backoff_base)} s; the cap must not be below"
            )

    @property
    def shortest_stall(self) -> float:
        """The shortest time in which somebody could be taken for stalled, in seconds."""
        return min(getattr(self, name) for name in PATIENCE if name.endswith("_stall"))

    def check(self, settings: Settings) -> None:
        """Refuse a stall that a rank which is well could not meet: it says its progress once a heartbeat.

        Raises:
            InvalidSettings: a stall is shorter than two heartbeats; with both values.
        """
        for name in PATIENCE:
            seconds: float = getattr(self, name)
            if name.endswith("_stall") and seconds < 2 * settings.heartbeat:
                raise InvalidSettings(
                    f"{name} is {number(seconds)} s and the heartbeat is {number(settings.heartbeat)} s; ranks say their progress once a heartbeat, so "
                    "a stall must last for two of them at least"
                )

    def for_instance(self, patience: Mapping[str, float], settings: Settings) -> Policy:
        """This policy with the times that are the instance's own; a stall that no rank could meet (see `check`) is two heartbeats.

        Args:
            patience: those times by their names (`PATIENCE`), in seconds, as in `InstanceSpec`.
            settings: with the heartbeat.
        """
        if not patience:
            return self
        own = {
            name: max(seconds, 2 * settings.heartbeat) if name.endswith("_stall") else seconds
            for name, seconds in patience.items()
        }
        base, cap = own.get("backoff_base", self.backoff_base), own.get("backoff_cap", self.backoff_cap)
        if base > cap:  # one of them is the planner's; it gives way
            own |= {"backoff_cap": base} if "backoff_base" in own else {"backoff_base": cap}
        return replace(self, **own)

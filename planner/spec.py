"""What is to be brought up, and how patiently."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from barrier import Settings
from barrier.errors import InvalidSettings
from barrier.keys import shown, valid_name, valid_world_size
from barrier.plain import plain, typed
from runner.messages import ModelSpec
from runner.worded import Worded

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

_OPTIONAL = ("absence_limit", "patience")


class InstanceSpec(BaseModel, metaclass=Worded):
    """One model instance: what to load, over how many ranks.

    Attributes:
        name: the instance's name: 1 to 63 of a-z, 0-9 and ``-``.
        world_size: number of ranks, 1 to 16,384.
        model: what to load.
        absence_limit: for how many seconds ranks may be away before the instance is given up; ``None`` leaves that to the planner's
            policy. It is no part of the digest: ranks do not care, and it may be changed while the instance serves.
        patience: times of `Policy` that are this instance's own, by their names (`PATIENCE`), in seconds. No part of the digest either.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    world_size: int
    model: ModelSpec = ModelSpec(model_id="simulated")
    absence_limit: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    patience: Mapping[str, float] = Field(default_factory=dict[str, float])

    @model_serializer(mode="wrap")
    def _lean(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what was not set: planners of earlier versions do not know these fields."""
        return {
            name: value for name, value in handler(self).items() if name not in _OPTIONAL or value not in (None, {})
        }

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return valid_name("instance", value)

    @field_validator("patience")
    @classmethod
    def _patience(cls, value: Mapping[str, float]) -> Mapping[str, float]:
        for name, seconds in value.items():
            if name not in PATIENCE:
                raise InvalidSettings(f"{shown(name)} is no time of an instance; there are {', '.join(PATIENCE)}")
            if not 0 < seconds < float("inf"):
                raise InvalidSettings(f"{name} is {seconds:g} s; it must be a finite number of seconds above 0")
        if value.get("backoff_cap", float("inf")) < value.get("backoff_base", 0):
            raise InvalidSettings(
                f"backoff_cap is {value['backoff_cap']:g} s and backoff_base is {value['backoff_base']:g} s; the cap must not be below"
            )
        return dict(value)

    @field_validator("world_size", mode="before")
    @classmethod
    def _world_size(cls, value: object) -> int:
        return valid_world_size(value)

    @property
    def digest(self) -> str:
        """32 hexadecimal digits that differ for every other spec: ranks that were configured for another are refused."""
        said = self.model_dump_json(include={"name", "world_size", "model"})
        return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()

    def changes_to(self, other: InstanceSpec) -> list[tuple[str, str, str]]:
        """What is different in another spec: field, value here, value there; fields of the model as ``model.total_layers``."""
        before, after = _flat(self.model_dump()), _flat(other.model_dump())
        names = dict.fromkeys([*before, *after])
        return [
            (name, before.get(name, "-"), after.get(name, "-")) for name in names if before.get(name) != after.get(name)
        ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Every value under its dotted name, as a person reads it."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(cast("Mapping[str, Any]", value), f"{prefix}{name}.")
        else:
            flat[prefix + name] = shown(value) if isinstance(value, str) else str(value)
    return flat


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
            engines are given four fifths of it to connect (`planner.lifecycle.DEADLINE_SHARE`), so that they say first what they
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
                    f"{name} is {seconds:g} s and the heartbeat is {settings.heartbeat:g} s; ranks say their progress once a heartbeat, so "
                    "a stall must last for two of them at least"
                )

    def for_instance(self, spec: InstanceSpec, settings: Settings) -> Policy:
        """This policy with the times that are the instance's own; a stall that no rank could meet (see `check`) is two heartbeats."""
        if not spec.patience:
            return self
        own = {
            name: max(seconds, 2 * settings.heartbeat) if name.endswith("_stall") else seconds
            for name, seconds in spec.patience.items()
        }
        base, cap = own.get("backoff_base", self.backoff_base), own.get("backoff_cap", self.backoff_cap)
        if base > cap:  # one of them is the planner's; it gives way
            own |= {"backoff_cap": base} if "backoff_base" in own else {"backoff_base": cap}
        return replace(self, **own)

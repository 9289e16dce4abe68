"""The specification of an instance."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar, cast

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from barrier.errors import InvalidSettings
from barrier.plain import number
from barrier.protocol.names import shown, valid_name, valid_world_size
from planner.policy import PATIENCE
from runner.model import ModelSpec
from runner.worded import Worded

__all__ = ["InstanceSpec"]


_OPTIONAL = ("absence_limit", "patience")


class InstanceSpec(BaseModel, metaclass=Worded):
    """One model instance: what to load, over how many ranks.

    Attributes:
        name: the instance's name: 1 to 63 of a-z, 0-9 and ``-``.
        world_size: number of ranks, 1 to 16,384.
        model: what to load.
        absence_limit: seconds that ranks may be away before the instance is given up; ``None``: as the planner's policy says. It is not
            part of the digest: ranks do not need it, and it may change while the instance serves.
        patience: the instance's own times of `Policy` by name (`PATIENCE`), in seconds. They are not part of the digest either.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    name: str
    world_size: int
    model: ModelSpec = ModelSpec(model_id="simulated")
    absence_limit: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    patience: Mapping[str, float] = Field(default_factory=dict[str, float])

    @model_serializer(mode="wrap")
    def _lean(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave fields out that were not set: planners of earlier versions do not know them."""
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
                raise InvalidSettings(f"an instance has no time named {shown(name)}; it may have {', '.join(PATIENCE)}")
            if not 0 < seconds < float("inf"):
                raise InvalidSettings(f"{name} is {number(seconds)} s; it must be a finite number of seconds above 0")
        if value.get("backoff_cap", float("inf")) < value.get("backoff_base", 0):
            raise InvalidSettings(
                f"backoff_cap is {number(value['backoff_cap'])} s and backoff_base is {number(value['backoff_base'])} s; "
                "backoff_cap must be at least backoff_base"
            )
        return dict(value)

    @field_validator("world_size", mode="before")
    @classmethod
    def _world_size(cls, value: object) -> int:
        return valid_world_size(value)

    @property
    def digest(self) -> str:
        """32 hexadecimal digits, different for every other spec. A rank that was configured for another spec is refused."""
        said = self.model_dump_json(include={"name", "world_size", "model"})
        return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()

    def changes_to(self, other: InstanceSpec) -> list[tuple[str, str, str]]:
        """The differences to another spec: field, value here, value there. Fields of the model are named ``model.total_layers``."""
        before, after = _flat(self.model_dump()), _flat(other.model_dump())
        names = dict.fromkeys([*before, *after])
        return [
            (name, before.get(name, "-"), after.get(name, "-")) for name in names if before.get(name) != after.get(name)
        ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Every value by its dotted name, as people read it."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(cast("Mapping[str, Any]", value), f"{prefix}{name}.")
        else:
            flat[prefix + name] = shown(value) if isinstance(value, str) else str(value)
    return flat

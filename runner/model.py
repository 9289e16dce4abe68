"""The model to load, and the base class of all messages."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from runner.worded import Worded

__all__ = ["Message", "ModelSpec"]


class Message(BaseModel):
    """The base class of all messages. Frozen and strict: an unknown field or a wrong type is refused."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelSpec(Message, metaclass=Worded):
    """What to load.

    Attributes:
        model_id: the name the engine knows the model by.
        total_layers: how many layers the model has, for progress; 1 to 10,000.
    """

    model_id: str = Field(min_length=1, max_length=256)
    total_layers: int = Field(default=16, ge=1, le=10_000)

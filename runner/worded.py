"""Models that people write, in code or in a file: mistakes in them are explained in our words."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

__all__ = ["Worded"]


class Worded(type(BaseModel)):
    """The metaclass of such models: a call with wrong values raises `barrier.InvalidSettings`. Pydantic's own text links to its manual.

    A model that is read from the wire is not made by a call, and still raises pydantic's ValidationError.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  whatever the model takes
        """Make one."""
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            # Imported late, because an engine's process does without the store's driver.
            from barrier.errors import InvalidSettings  # noqa: PLC0415
            from barrier.plain import problems  # noqa: PLC0415

            model: Any = cls
            raise InvalidSettings(problems(error, model)) from None

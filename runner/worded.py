"""Models that are made by people, in code or in a file: what is wrong with them is told in our words."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

__all__ = ["Worded"]


class Worded(type(BaseModel)):
    """Made of wrong values, a model of this kind raises `barrier.InvalidSettings`; pydantic's own text quotes a page of its manual.

    What is read from the wire is not made by a call, and is judged as before.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  whatever the model takes
        """Make one."""
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            # Late: an engine's process does without the store's driver.
            from barrier.errors import InvalidSettings  # noqa: PLC0415
            from barrier.plain import problems  # noqa: PLC0415

            model: Any = cls
            raise InvalidSettings(problems(error, model)) from None

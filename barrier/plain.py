"""Puts numbers, values and pydantic's errors into plain words."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails

__all__ = ["number", "plain", "problems", "typed"]


_MOST_DIGITS = 1e15
_MOST_PROBLEMS = 4


def number(value: float) -> str:
    """A number for people: ``100,000,000,000`` and not ``1e+11``."""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return f"{value}"
    if abs(value) >= _MOST_DIGITS:
        return f"{'' if value > 0 else '-'}{_MOST_DIGITS:,.0f} or more"
    if abs(value) >= 999_999.5:  # which six digits would round to 1e+06
        return f"{value:,.0f}"
    if 0 < abs(value) < 1e-4:
        return f"{value:.9f}".rstrip("0") if abs(value) >= 1e-9 else "almost 0"
    return f"{value:,g}"


def typed(value: float) -> str:
    """A number as it can be typed in again: without an exponent, and without commas."""
    return number(value).replace(",", "")


def problems(
    error: ValidationError, model: type[BaseModel] | None = None, *, names: Mapping[str, str] | None = None
) -> str:
    """What is wrong with a configuration or a specification: one sentence for each of the first few problems.

    Args:
        error: what pydantic found.
        model: the model; the sentence about an unknown name lists the names that it has.
        names: the names of fields as the person writes them.
    """
    found = [_problem(one, model, names or {}) for one in error.errors(include_url=False)]
    more = len(found) - _MOST_PROBLEMS
    return "; ".join(found[:_MOST_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")


def _problem(one: ErrorDetails, model: type[BaseModel] | None, names: Mapping[str, str]) -> str:
    place = ""
    for part in one["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f"{'.' if place else ''}{names.get(part, part)}"
    place = place[:100] or "it"
    context = one.get("ctx", {})
    kind = one["type"]
    match kind:
        case "value_error":
            said_by_us = " ".join(str(context.get("error", "")).split())
            return said_by_us if place == "it" or place.split(".")[-1] in said_by_us else f"{place}: {said_by_us}"
        case "missing":
            return f"{place} is missing"
        case "extra_forbidden":
            known = (
                f"; known are {', '.join(names.get(name, name) for name in model.model_fields)}"
                if model and len(one["loc"]) == 1
                else ""
            )
            return f"{place} is not known{known}"
        case "json_invalid":
            return f"{place} is not JSON"
        case "literal_error":
            wanted = f"be one of {str(context.get('expected', '')).replace(chr(39), '').replace(' or ', ', ')}"
        case "string_too_short":
            return f"{place} has {len(str(one['input']))} characters; it must have at least {context['min_length']}"
        case "string_too_long":
            return f"{place} has {len(str(one['input'])):,} characters; it must have at most {context['max_length']:,}"
        case _:
            limit = next((f"{words} {number(context[key])}" for key, words in _LIMITS.items() if key in context), None)
            wanted = f"be {limit}" if limit else _KINDS.get(kind.partition("_")[0], f"be {kind.replace('_', ' ')}")
    return f"{place} is {_as_json(one['input'])}; it must {wanted}"


_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_KINDS = {
    "int": "be a whole number",
    "float": "be a number",
    "finite": "be a finite number",
    "bool": "be true or false",
    "string": "be text",
    "list": "be a list",
    "tuple": "be a list",
    "dict": "be an object, such as {}",
    "model": "be an object, such as {}",
    "none": "be left out",
    "path": "be a path",
}


def plain(value: object) -> str:
    """A value as it was given; a number with an exponent is written without it."""
    if isinstance(value, float) and math.isfinite(value) and "e" in repr(value):
        return number(value)
    return repr(value)[:100]


def _as_json(value: object) -> str:
    """A value as JSON, which is how the person wrote it; cut to 80 characters."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(value)
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."

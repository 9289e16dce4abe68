"""Reads an instance from a small TOML file. Launch, planner and runners read the same file, so they agree about it.

.. code-block:: toml

    name = "demo"            # 1 to 63 of a-z, 0-9 and -
    world_size = 4           # number of ranks
    model_id = "simulated"   # the model's name, as the engine knows it; default "simulated"
    layers = 16              # how many layers the model has; default 16
    absence_limit = 3600     # seconds that ranks may be away before the instance is given up; default: no limit
    load_stall = 600         # seconds in which a rank may load no further layer; default: the planner's option

The planner's other options for stalls and pauses have keys too: prepare_stall, connect_stall, warmup_stall, generate_stall,
backoff_base, backoff_cap.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from barrier import InvalidSettings
from barrier.plain import problems
from planner.policy import PATIENCE
from planner.spec import InstanceSpec
from runner.model import ModelSpec

__all__ = ["MOST_BYTES", "read_instance_file"]


MOST_BYTES = 64 * 1024
"""A larger file is refused."""

_KEYS = ("name", "world_size", "model_id", "layers", "absence_limit", *PATIENCE)


def read_instance_file(path: Path) -> InstanceSpec:
    """Read an instance.

    Args:
        path: the file; see the module's example.

    Raises:
        InvalidSettings: the file cannot be read, is not TOML, lacks a key, has an unknown key, or a value is out of range.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise InvalidSettings(f"{path} is larger than {MOST_BYTES:,} bytes; an instance's file has a few lines")
        found = tomllib.loads(raw.decode())
    except OSError as error:
        raise InvalidSettings(f"{path} cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidSettings(f"{path} is not TOML: {error}") from None
    return _spec(path, found)


def _spec(path: Path, found: dict[str, Any]) -> InstanceSpec:
    if extra := [key for key in found if key not in _KEYS]:
        raise InvalidSettings(f"{path} has the key {extra[0][:80]!r}; an instance has {', '.join(_KEYS)}")
    if missing := [key for key in ("name", "world_size") if key not in found]:
        raise InvalidSettings(f"{path} has no {missing[0]}; add a line such as {_EXAMPLES[missing[0]]}")
    absence_limit = _seconds(path, found, "absence_limit")
    patience = {key: seconds for key in PATIENCE if (seconds := _seconds(path, found, key)) is not None}
    try:
        model = ModelSpec.model_validate(
            {"model_id": found.get("model_id", "simulated"), "total_layers": found.get("layers", 16)}, strict=True
        )
        return InstanceSpec(
            name=found["name"],
            world_size=found["world_size"],
            model=model,
            absence_limit=absence_limit,
            patience=patience,
        )
    except InvalidSettings as error:
        raise InvalidSettings(f"{path}: {error}") from None
    except ValidationError as error:
        raise InvalidSettings(f"{path}: {problems(error, names={'total_layers': 'layers'})}") from None


def _seconds(path: Path, found: dict[str, Any], key: str) -> float | None:
    value = found.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InvalidSettings(f"{path}: {key} is {str(value)[:80]!r}; it must be a number of seconds above 0")
    return float(value)


_EXAMPLES = {"name": 'name = "demo"', "world_size": "world_size = 4"}

"""Percentiles, a line through points, and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Samples:
    """Durations, added in seconds and told in microseconds."""

    seconds: list[float] = field(default_factory=list[float])

    def add(self, seconds: float) -> None:
        self.seconds.append(seconds)

    def percentile(self, percent: float) -> float:
        """By nearest rank, so that it is always a value that was measured; in microseconds."""
        if not self.seconds:
            raise ValueError("no samples: nothing was measured")
        place = math.ceil(percent / 100 * len(self.seconds)) - 1
        return sorted(self.seconds)[max(place, 0)] * 1e6

    @property
    def p50(self) -> float:
        return self.percentile(50)

    @property
    def p99(self) -> float:
        return self.percentile(99)

    def as_json(self) -> dict[str, float | int]:
        return {
            "samples": len(self.seconds),
            "p50_us": round(self.p50, 1),
            "p99_us": round(self.p99, 1),
            "min_us": round(min(self.seconds) * 1e6, 1),
            "max_us": round(max(self.seconds) * 1e6, 1),
        }


def slope(points: Sequence[tuple[float, float]]) -> float:
    """How steep the least-squares line through these points (x, y) is."""
    if len(points) < 2:
        raise ValueError(f"a line needs two points, there are {len(points)}")
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns for a terminal, aligned to the right."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    rule = ["-" * width for width in widths]
    lines = (header, rule, *rows)
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)

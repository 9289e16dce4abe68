"""A pytest plugin for the property tests of a mutated tree. One breach is enough, so hypothesis shrinks nothing and stores nothing.

Use it as ``pytest -p tests.mutants.hasty --hypothesis-seed=N``. Then the examples follow from the seed alone.
"""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "hasty",
    phases=[Phase.explicit, Phase.generate],
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),  # a mutant may be slow; that is no breach
)
settings.load_profile("hasty")

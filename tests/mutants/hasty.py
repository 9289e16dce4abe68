"""A pytest plugin for the property tests of a mutated tree: one breach is enough, so nothing is shrunk, and nothing is remembered.

Used as ``pytest -p tests.mutants.hasty --hypothesis-seed=N``: the seed alone then says which examples are played.
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

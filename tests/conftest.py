"""How Hypothesis tries cases: always the same ones, or, to look for faults, new ones in each run.

    python -m pytest -m hypothesis --hypothesis-profile explore tests

By default a case that fails here fails everywhere, and a change is not refused for a fault that was there before it.
No time limit applies to a case in either profile: it would measure the machine.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "same", derandomize=True, database=None, deadline=None, print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
settings.register_profile("explore", settings.get_profile("same"), derandomize=False, max_examples=1000)
settings.load_profile("same")

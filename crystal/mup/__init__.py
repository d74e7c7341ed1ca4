"""muP over any module: rules, the per-tensor plan, the static audit, the coordinate check, transfer."""

import crystal.mup.report  # noqa: F401 (how reports print themselves)
from crystal.mup.audit import audit
from crystal.mup.coord_check import assert_coordinate_check, coord_check
from crystal.mup.measure import Task
from crystal.mup.plan import make_plan
from crystal.mup.rules import Tuning

__all__ = ["Task", "Tuning", "assert_coordinate_check", "audit", "coord_check", "make_plan"]

"""A plugin of pytest's, there wherever crystal is installed: the audit and the coordinate check as fixtures.

Nothing is imported until a test uses one of them, so that suites that do not start as fast as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from crystal.mup.coord_check import CoordCheck
    from crystal.mup.verdict import Report


@pytest.fixture
def assert_mup_audit(request: pytest.FixtureRequest) -> Callable[..., Report]:
    """assert_mup_audit(factory, width=…, base_width=…, optimizer=…, calls={…}): fails unless the audit passes.

    Arguments and result are those of crystal.mup.audit.
    """

    def check(factory: Callable[[int], nn.Module], **how: Any) -> Report:
        __tracebackhide__ = True
        from crystal.mup.audit import audit

        return _passed(request, "muP audit", audit(factory, **how))

    return check


@pytest.fixture
def assert_coordinate_check(request: pytest.FixtureRequest) -> Callable[..., CoordCheck]:
    """assert_coordinate_check(factory, optimizer=…, loss=…, batch=…): fails unless the coordinate check passes.

    factory: width → initialized module (torch's global seed is set before each call); optimizer: module → its
    optimizer; loss: (module, batch) → scalar; batch: seed → a batch; the rest as in crystal.mup.coord_check.
    """

    def check(
        factory: Callable[[int], nn.Module],
        *,
        optimizer: Callable[[nn.Module], Any],
        loss: Callable[[nn.Module, Any], Tensor],
        batch: Callable[[int], Any],
        widths: Sequence[int] = (64, 128, 256),
        **how: Any,
    ) -> CoordCheck:
        __tracebackhide__ = True
        from crystal.checks.factory import Factory
        from crystal.checks.own_models import own_task
        from crystal.mup.coord_check import coord_check

        name = getattr(factory, "__name__", "factory")
        task = own_task(Factory(name, factory, optimizer, loss, batch))
        return _passed(request, "coordinate check", coord_check(task, widths, **{"label": name} | how))

    return check


def _passed(request: pytest.FixtureRequest, name: str, report: Report) -> Report:
    """The report, if it is PASS; else an AssertionError that says what is wrong, and all rows as a section."""
    __tracebackhide__ = True
    if report.verdict != "PASS":
        from crystal.mup.report import rows_text

        request.node.add_report_section("call", name, f"{report}\n\n{rows_text(report.rows)}\n")
        raise AssertionError(f"{name}: {report}")
    return report

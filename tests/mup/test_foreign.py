"""Architectures that other people wrote: right forms pass both tools, and faults are caught and named."""

import pytest

from tests.mup.foreign import families
from tests.mup.foreign.judged import audited, checked, named, said

FAMILIES = families()
NAMES = [f"{family.name}, {family.form}" for family in FAMILIES]


def test_the_zoo_is_as_large_as_promised():
    assert len({family.name for family in FAMILIES}) >= 20
    assert len(FAMILIES) >= 40
    assert sum(len(family.broken) for family in FAMILIES) >= 60
    assert all(len(family.broken) >= 3 for family in FAMILIES)


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_the_audit_passes_what_is_right_and_names_what_is_not(family):
    report = audited(family)
    assert report.verdict == "PASS", said(report)
    for broken in family.broken:
        if "audit" in broken.by:
            report = audited(family, broken)
            assert report.verdict == "FAIL", f"{broken.name}: {said(report)}"
            assert named(report, broken), f"{broken.name}: {said(report)}"


@pytest.mark.parametrize("number", range(len(FAMILIES)), ids=NAMES)
def test_the_coordinate_check_passes_what_is_right_and_names_what_is_not(number):
    """One fault of each family, another one in the next: `python -m tests.mup.foreign.judged` does all of them."""
    family = FAMILIES[number]
    report = checked(family)
    assert report.verdict == "PASS", said(report)
    seen = [broken for broken in family.broken if "coord-check" in broken.by]
    if seen:
        broken = seen[number % len(seen)]
        report = checked(family, broken)
        assert report.verdict == "FAIL", f"{broken.name}: {said(report)}"
        assert named(report, broken), f"{broken.name}: {said(report)}"

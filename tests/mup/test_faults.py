"""Every way to break muP in the fault matrix is caught and named, and correct muP raises no alarm."""

import pytest

from crystal.checks.coord_check import Asked, check_model
from crystal.mup.verdict import summary
from tests.mup.faults import FAULTS, audited, coordinates


def test_matrix_is_as_large_as_promised():
    assert len(FAULTS) >= 20
    assert len({fault.rule for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.rule)
def test_audit_names_the_tensor_and_the_rule(fault):
    report = audited(fault.rule)
    assert report.verdict == "FAIL"
    assert fault.named(report.failures), summary(report.failures)


@pytest.mark.parametrize("fault", [f for f in FAULTS if "coord-check" in f.by], ids=lambda fault: fault.rule)
def test_coordinate_check_names_the_tensor_and_the_rule(fault):
    report = coordinates(fault.rule)
    assert report.verdict == "FAIL"
    said = [row.message for row in report.failures]
    assert fault.named(report.failures) or (fault.trained and any(fault.trained in m for m in said)), said


def test_audit_finds_nothing_in_the_correct_decoder():
    report = audited("correct")
    assert report.verdict == "PASS"
    assert len(report.rows) > 200


@pytest.mark.parametrize("family", ["amber", "crystalcoder"])
@pytest.mark.parametrize("parametrization", ["mup", "crystalcoder", "completep"])
def test_correct_models_raise_no_alarm(family, parametrization):
    """`benchmarks/false_alarms.py` does the same over twenty starts of each parametrization."""
    (check,) = check_model(family, Asked(first_seed=7), parametrization)
    assert check.verdict == "PASS", summary(check.failures)

"""crystal as a plugin of pytest's: two fixtures, whose failures are readable."""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

MODELS = """
import torch
from own_models import Families, Mlp, batch, loss, optimizer

ONE_RATE = Families.one_rate.optimizer
AUDIT = {"width": 512, "base_width": 64, "calls": {"training": lambda m: m(torch.randn(3, 16))}}


def test_audit(assert_mup_audit):
    assert assert_mup_audit(Mlp, optimizer=optimizer, **AUDIT).verdict == "PASS"


def test_broken_audit(assert_mup_audit):
    assert_mup_audit(Mlp, optimizer=ONE_RATE, **AUDIT)


def test_coordinates(assert_coordinate_check):
    check = assert_coordinate_check(Mlp, optimizer=optimizer, loss=loss, batch=batch, seeds=3)
    assert (check.verdict, check.sizes, check.label) == ("PASS", (64, 128, 256), "Mlp")


def test_broken_coordinates(assert_coordinate_check):
    task = {"optimizer": ONE_RATE, "loss": loss, "batch": batch}
    assert_coordinate_check(Mlp, widths=(64, 128, 192), seeds=2, accept=["x"], **task)
"""


def run_pytest(folder, *flags):
    """A user's suite: what it prints."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTEST_ADDOPTS": "", "COLUMNS": "160"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_mine.py").write_text(MODELS)
    return run_pytest(folder).stdout


def test_it_is_there_wherever_crystal_is_installed():
    (found,) = entry_points(group="pytest11", name="crystal")
    assert found.value == "crystal.checks.pytest_plugin"


def test_right_models_pass_and_broken_ones_fail(suite):
    assert "2 failed, 2 passed" in suite
    assert "FAILED test_mine.py::test_broken_audit - AssertionError: muP audit: FAIL" in suite
    assert "FAILED test_mine.py::test_broken_coordinates - AssertionError: coordinate check: FAIL" in suite


def test_a_failure_names_tensor_and_rule_and_ends_in_the_users_line(suite):
    audit, coordinates = suite.partition("___ test_broken_audit ___")[2].split("___ test_broken_coordinates ___")
    for part, what in ((audit, "lr"), (coordinates, "first update")):
        assert f"E         b.weight: {what} ∝ " in part
        assert "its LR is not divided by the width multiplier" in part
        assert "pytest_plugin.py" not in part, "the traceback is of the user's code"


def test_a_failure_has_all_rows_as_a_section(suite):
    audit = suite.partition("Captured muP audit call")[2].partition("_____")[0].splitlines()
    assert audit[1].startswith("FAIL  ")
    rows = [line.split() for line in audit if line.endswith(("+0.00", "-1.00"))]
    assert rows[0] == ["FAIL", "b.weight", "lr", "+0.00", "-1.00"]
    assert ["PASS", "a.weight", "lr", "+0.00", "+0.00"] in rows
    assert "Captured coordinate check call" in suite


def test_a_suite_that_does_not_use_it_imports_no_torch(tmp_path):
    (tmp_path / "test_other.py").write_text("import sys\ndef test(): assert 'torch' not in sys.modules\n")
    assert "1 passed" in run_pytest(tmp_path).stdout
    assert "assert_mup_audit -- " in run_pytest(tmp_path, "--fixtures").stdout

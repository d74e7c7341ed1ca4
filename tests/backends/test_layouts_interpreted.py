"""Layouts whose operators are the Triton kernels, in Triton's interpreter: the same training as the `cpu` backend's.

Tolerances are test_layouts.py's: sums are made in another order, no more.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels' interpreter")

from closeness import path_length, tolerance
from interpreted_layouts import LAYOUTS, first_step
from layouts import LENGTH, MODELS, made, name_of

from crystal.backends.config import CpuConfig
from crystal.backends.cpu import CpuBackend

CASES = {name_of(*case): case[0] for cases in LAYOUTS.values() for case in cases}
BLOCK = {"norm_forward", "norm_backward", "rope_turn", "swiglu_run", "swiglu_run_backward", "column_sums"}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """The lines of interpreted_layouts.py."""
    script, root = Path(__file__).with_name("interpreted_layouts.py"), tmp_path_factory.mktemp("interpreted")
    paths = os.pathsep.join((str(script.parent.parent), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, script, root],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def expected():
    """The first step of each model by the cpu backend in one process."""
    return {
        model: first_step(made(model, lambda setup: CpuBackend(setup, CpuConfig(dtype="fp32"))))
        for model in set(CASES.values())
    }


@pytest.mark.parametrize("case", CASES)
def test_a_layout_of_kernels_trains_as_one_process_of_c_does(said, expected, case):
    line = next(line for line in said if line.get("case") == case)
    right, rel = expected[CASES[case]], tolerance(path_length(MODELS[CASES[case]], LENGTH))
    assert line["step"]["loss"] == pytest.approx(right["loss"], rel=rel)
    assert line["step"]["grad_norm"] == pytest.approx(right["grad_norm"], rel=5 * rel)
    assert line["step"]["source_nll"] == pytest.approx(right["source_nll"], rel=rel)
    assert set(line["launched"]) >= BLOCK
    assert line["findings"] == {}


def test_a_kernel_waits_for_a_sum_on_its_way_and_refuses_other_tensors_without_memory(said):
    found = said[-1]
    assert found["kinds"] == ["AsyncCollectiveTensor"] * 2  # or nothing was tried
    assert found["summed"]
    assert found["normal"]
    assert found["refused"] == ("Triton kernel norm_forward: expected tensors with memory of their own, got a DTensor")

"""The kernels themselves at [4096, 4096], forward and backward, on the CPU by way of C, beside torch's own errors."""

import shutil

import pytest

pytest.importorskip("triton", reason="the kernels' compiler")
if shutil.which("gcc") is None:
    pytest.skip("the kernels run on a CPU as C: no gcc", allow_module_level=True)

import planted
import torch
from accuracy_rule import too_far

from crystal.kernels.bench.bars import NAMED
from crystal.kernels.bench.peers import torch_functions
from crystal.kernels.bench.verified import square
from crystal.kernels.catalog import OPERATORS
from crystal.kernels.proof.accuracy import errors
from crystal.kernels.proof.cpu import on_cpu
from crystal.kernels.proof.traffic import traffic
from crystal.kernels.proof.ttir import Unsupported

HALF = torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_a_kernel_is_as_exact_as_torch_at_full_size(operator, dtype):
    found = errors(operator, square(operator.name), dtype, torch_functions()[operator.name], on_cpu)
    assert len(found) >= 1 + (not operator.inplace)
    assert too_far([error.record() for error in found]) == []


# Widths at which a kernel, a tile or a mask changes; odd ones; the least and the greatest.
WIDTHS = (1, 2, 3, 31, 257, 1023, 2049, 8191, 8193, 16385, 65535, 65536)


@pytest.mark.parametrize("width", WIDTHS)
def test_norms_at_any_width(width):
    operator = NAMED["add_layer_norm_scaled" if width % 2 else "rms_norm"]
    dtype = (torch.float32, *HALF)[width % 3]
    found = errors(operator, {"rows": 3, "width": width}, dtype, torch_functions()[operator.name], on_cpu)
    assert too_far([error.record() for error in found]) == []


@pytest.mark.parametrize("width", [1, 33, 1025, 65535])
def test_swiglu_and_cross_entropy_at_any_width(width):
    for name, shape in (
        ("swiglu_packed", {"rows": 3, "width": width}),
        ("cross_entropy_full", {"rows": 5, "vocab": width}),
    ):
        found = errors(NAMED[name], shape, torch.bfloat16, torch_functions()[name], on_cpu)
        assert too_far([error.record() for error in found]) == []


def test_lanes_without_a_value_are_nan_and_integers_lead_nowhere():
    x, y = torch.ones(16), torch.zeros(2)
    with on_cpu():
        planted.reads_undefined_lanes[(2,)](x, y, N=12, BLOCK=16)
    assert y.isnan().all()


def test_bf16_rounds_to_nearest_even_after_every_operation():
    a, b = (torch.randn(4096, generator=torch.Generator().manual_seed(k)).bfloat16() for k in range(2))
    y = torch.empty_like(a)
    with on_cpu():
        planted.in_bf16[(1,)](a, b, y, N=4096)
    assert torch.equal(y, (a + b) * b)


def test_an_operation_without_c_is_refused_by_name():
    x = torch.ones(128)
    with on_cpu(), pytest.raises(Unsupported, match="atomic_rmw"):
        planted.adds_in_any_order[(1,)](x, x.clone(), N=128)


def test_bytes_outside_a_tensor_and_bytes_asked_for_twice_are_counted():
    x, y = torch.zeros(2, 1000, dtype=torch.bfloat16), torch.zeros(2, 1000, dtype=torch.bfloat16)
    with on_cpu() as log:
        planted.copies_rows_of_one_width[(2,)](x, y, N=1000, BLOCK=1024)
        planted.copies_rows_of_one_width[(1,)](x, y, N=1000, BLOCK=1024)
    whole, part = (traffic(launch) for launch in log)
    assert (whole.read, whole.written, whole.asked_read, whole.outside) == (4000, 4000, 4000, False)
    assert (part.read, part.asked_read) == (2016, 2000)  # whole sectors of 32 bytes
    log[0].grid = (3, 1, 1)
    assert traffic(log[0]).outside

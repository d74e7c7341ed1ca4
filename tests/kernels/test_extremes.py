"""What must be noticed is noticed on every path: sums that overflow are nan, positions outside the table are errors."""

import contextlib
import shutil

import pytest
import torch

from crystal.kernels import add_norm, dispatch, layer_norm, rms_norm, rope, rope_, rope_table
from crystal.kernels.add_norm import add_norm_reference
from crystal.kernels.layer_norm import layer_norm_reference
from crystal.kernels.rms_norm import rms_norm_reference
from crystal.kernels.rope import rope_reference


def triton_kernels():
    """The Triton kernels, run as C."""
    pytest.importorskip("triton")
    if shutil.which("gcc") is None:
        pytest.skip("the kernels run on a CPU as C: no gcc")
    from crystal.kernels.proof.cpu import on_cpu

    return on_cpu()


# how a path is entered, and what is done to a function to take it
PATHS = {
    "as the machine has it": (contextlib.nullcontext, lambda f: f),
    "torch": (lambda: dispatch.forced("torch"), lambda f: f),
    "triton": (triton_kernels, lambda f: f),
    "compiled": (contextlib.nullcontext, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")),
}
every_path = pytest.mark.parametrize("path", PATHS)
NORMS = {
    "layer_norm": lambda x, w, b: layer_norm(x, w, b, 1e-5),
    "rms_norm": lambda x, w, b: rms_norm(x, w, 1e-5),
    "add_norm": lambda x, w, b: add_norm(x, torch.zeros_like(x), w, b, 1e-5)[0],
    "add_norm without a bias": lambda x, w, b: add_norm(x, torch.zeros_like(x), w, None, 1e-5)[0],
}
REFERENCES = {
    "layer_norm": lambda x, w, b: layer_norm_reference(x, w, b, 1e-5),
    "rms_norm": lambda x, w, b: rms_norm_reference(x, w, 1e-5),
    "add_norm": lambda x, w, b: add_norm_reference(x, torch.zeros_like(x), w, b, 1e-5)[0],
    "add_norm without a bias": lambda x, w, b: add_norm_reference(x, torch.zeros_like(x), w, None, 1e-5)[0],
}


def rows(width: int, dtype: torch.dtype, large: float) -> torch.Tensor:
    """Three rows, of which the second is large."""
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    x[1] *= large
    return x.to(dtype)


@every_path
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_whose_sum_of_squares_overflows_is_nan_and_so_is_its_gradient(norm, path, dtype):
    entered, wrapped = PATHS[path]
    for width in (24, 20_000):  # the wide one has a kernel of its own
        if path == "triton" and width > 1000 and dtype == torch.bfloat16:
            continue  # the same kernel, compiled once more
        weight, bias = torch.ones(width, dtype=dtype), torch.zeros(width, dtype=dtype)
        x = rows(width, dtype, 1e20).requires_grad_()
        with entered():
            y = wrapped(NORMS[norm])(x, weight, bias)
            (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
        assert y.isnan().all(1).tolist() == [False, True, False]
        assert y.isnan().any(1).tolist() == [False, True, False]
        assert gradient.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("norm", REFERENCES)
def test_the_definition_of_a_norm_says_so_too_and_large_rows_that_do_not_overflow_are_normal(norm):
    weight, bias = torch.ones(24), torch.zeros(24)
    assert REFERENCES[norm](rows(24, torch.float32, 1e20), weight, bias).isnan().all(1).tolist() == [False, True, False]
    y = REFERENCES[norm](rows(24, torch.float32, 1e17), weight, bias)
    assert y.isfinite().all()
    torch.testing.assert_close(NORMS[norm](rows(24, torch.float32, 1e17), weight, bias), y)


COS, SIN = rope_table(torch.arange(6), 8, 10000.0)
OUTSIDE = [
    torch.tensor([0, 1, 2, -1]),
    torch.tensor([0, 1, 2, 6]),
    torch.tensor([[0, 1, 2, 3], [0, 1, 2, 2**31]]),
    torch.tensor([0, 1, 2, -(2**40)]),
    torch.tensor([0, 1, 2, 6], dtype=torch.int32),
    torch.tensor([0, 1, 2, 255], dtype=torch.uint8),
]


@pytest.mark.parametrize("path", ["as the machine has it", "torch", "triton"])
@pytest.mark.parametrize("positions", OUTSIDE, ids=lambda p: f"{p.flatten()[-1]} {p.dtype}")
def test_a_position_outside_the_table_is_an_index_error(positions, path):
    q = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(0))
    with PATHS[path][0]():
        for turn in (rope, rope_reference, rope_):
            with pytest.raises(IndexError, match=rf"positions .* expected 0 to {len(COS) - 1}"):
                turn(q.clone(), COS, SIN, "half", positions=positions)


def test_in_a_compiled_graph_a_position_outside_the_table_turns_to_nan_and_no_other():
    q = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(0))
    turn = torch.compile(
        lambda q, positions: rope(q, COS, SIN, "half", positions=positions), fullgraph=True, backend="aot_eager"
    )
    inside = torch.tensor([5, 0, 3, 1])
    torch.testing.assert_close(turn(q, inside), rope(q, COS, SIN, "half", positions=inside))
    for wrong in (-1, 6):
        y = turn(q, torch.tensor([5, 0, wrong, 1]))
        assert y[..., :8].isnan().all(-1)[0, 0].tolist() == [False, False, True, False]
        assert y[..., 8:].isfinite().all()

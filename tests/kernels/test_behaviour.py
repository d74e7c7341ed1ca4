"""What a caller may count on: opcheck, compiled graphs, kept graphs, fixed bits, strides, 64-bit rows, clear errors."""

import shutil

import pytest

pytest.importorskip("triton", reason="the kernels' compiler")
if shutil.which("gcc") is None:
    pytest.skip("the kernels run on a CPU as C: no gcc", allow_module_level=True)

import torch
from accuracy_rule import too_far

from crystal.kernels import add_norm, cross_entropy, layer_norm, rms_norm, rope, rope_, rope_table, swiglu
from crystal.kernels.bench.bars import NAMED
from crystal.kernels.catalog import OPERATORS
from crystal.kernels.proof.accuracy import copied, errors, outputs_and_gradients
from crystal.kernels.proof.behaviour import (
    bits_fixed,
    gradients_repeat,
    inputs_kept,
    rest_untouched,
    right_beyond_2_31,
    same_bits,
)
from crystal.kernels.proof.cpu import on_cpu

DIFFERENTIABLE = [operator for operator in OPERATORS if not operator.inplace]
named = pytest.mark.parametrize("operator", DIFFERENTIABLE, ids=lambda operator: operator.name)


def normal(*sizes, grad=True, seed=0):
    x = torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_(grad)


@named
def test_inputs_are_kept_a_second_backward_is_equal_and_no_order_of_programs_changes_a_bit(operator):
    shape = operator.shapes["small"]
    assert inputs_kept(operator, shape, torch.bfloat16)
    assert gradients_repeat(operator, shape, torch.bfloat16)
    assert bits_fixed(operator, shape, torch.bfloat16)


@named
def test_a_compiled_graph_without_breaks_gives_the_eager_bits(operator):
    arguments = operator.make_inputs(operator.shapes["small"], torch.float32, "cpu", torch.Generator().manual_seed(0))
    compiled = torch.compile(operator.run, fullgraph=True, backend="aot_eager")
    runs = []
    with on_cpu() as log:
        for function in (operator.run, compiled):
            before = len(log)
            runs.append(outputs_and_gradients(function, copied(arguments), torch.Generator().manual_seed(1)))
            assert len(log) > before, "no kernel was launched"
    assert runs[0].keys() == runs[1].keys()
    assert all(same_bits(runs[0][name], runs[1][name]) for name in runs[0])


_T = rope_table(torch.arange(6), 8, 10000.0)
CALLS = {  # crystal::name, its arguments
    "layer_norm": lambda: (normal(5, 24), normal(24), normal(24), 1e-5),
    "rms_norm": lambda: (normal(5, 24), normal(24), 1e-5),
    "add_norm": lambda: (normal(5, 24), normal(5, 24, seed=1), normal(24), normal(24), 1e-5, 0.5),
    "rope": lambda: (normal(2, 3, 6, 16), normal(2, 1, 6, 16), *_T, None, 3, False, 2),
    "swiglu": lambda: (normal(5, 24), None),
    "cross_entropy": lambda: (normal(5, 24), torch.arange(5), 0.7, -100, 0.1, 1e-3, "mean", False),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck_passes(name):
    operator = getattr(torch.ops.crystal, name).default
    with on_cpu() as log:
        torch.library.opcheck(operator, CALLS[name]())
    assert log, "no kernel was launched"


def test_a_gradient_of_a_gradient_is_refused_not_wrong():
    x, weight = normal(4, 24), normal(24, grad=False)
    with on_cpu():
        (dx,) = torch.autograd.grad(rms_norm(x, weight, 1e-5).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


def test_rope_in_place_returns_its_argument_and_its_gradient_is_the_turn_back():
    cos, sin = rope_table(torch.arange(7), 8, 10000.0)
    x = normal(2, 3, 7, 16)
    with on_cpu():
        leaf_copy = x.clone()
        version = leaf_copy._version
        turned = rope_(leaf_copy, cos, sin, "half")
        assert turned is leaf_copy
        assert turned._version > version
        (dx,) = torch.autograd.grad(turned.square().sum(), x)
        (expected,) = torch.autograd.grad(rope(x, cos, sin, "half").square().sum(), x)
    torch.testing.assert_close(dx, expected)


def test_autograd_refuses_a_tensor_that_rope_in_place_has_overwritten():
    cos, sin = rope_table(torch.arange(7), 8, 10000.0)
    x = normal(2, 3, 7, 16)
    with on_cpu():
        y = x * 2
        loss = y.square().sum()  # keeps y for its backward
        with torch.no_grad():
            rope_(y, cos, sin, "interleaved")
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_cross_entropy_over_its_logits_cannot_be_run_back_twice():
    logits, labels = normal(6, 40), torch.arange(6)
    with on_cpu():
        x = logits * 1.0
        loss = cross_entropy(x, labels, inplace_backward=True)
        (once,) = torch.autograd.grad(loss, logits, retain_graph=True)
        (plain,) = torch.autograd.grad(cross_entropy(logits * 1.0, labels), logits)
        assert torch.equal(once, plain)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, logits)


def test_a_packed_rope_in_place_writes_nothing_but_what_turns():
    operator = NAMED["rope_half_packed_inplace"]
    assert rest_untouched(operator, operator.shapes["small"])


def test_rows_2_30_elements_apart_are_found_by_64_bit_offsets():
    assert right_beyond_2_31()


def test_any_strides_give_what_contiguous_tensors_give():
    weight, bias = normal(24, grad=False), normal(24, grad=False, seed=1)
    views = {
        "transposed": normal(24, 10, grad=False).T,
        "every other column": normal(10, 48, grad=False)[:, ::2],
        "one row for all": normal(1, 24, grad=False).expand(10, 24),
        "middle of three dimensions": normal(5, 3, 24, grad=False).transpose(0, 1),
        "last rows of wider ones": normal(12, 31, grad=False)[2:, 7:],
    }
    cos, sin = rope_table(torch.arange(10), 8, 10000.0)
    with on_cpu():
        for name, x in views.items():
            for function in (
                lambda x: layer_norm(x, weight, bias, 1e-5),
                lambda x: torch.stack(add_norm(x, x, weight, None, 1e-5, 0.5)),
                lambda x: swiglu(x),
                lambda x: swiglu(x, x),
                lambda x: cross_entropy(x, torch.full(x.shape[:-1], 3), reduction="none"),
            ):
                assert torch.equal(function(x), function(x.contiguous())), name
        q = normal(10, 3, 2, 16, grad=False).permute(2, 1, 0, 3)
        assert torch.equal(rope(q, cos, sin, "half"), rope(q.contiguous(), cos, sin, "half"))
        assert torch.equal(rope(q[..., ::1], cos, sin, "interleaved"), rope(q.contiguous(), cos, sin, "interleaved"))


def test_a_label_outside_the_vocabulary_is_nan_and_ignored_labels_count_for_nothing():
    logits = normal(4, 50)
    with on_cpu():
        losses = cross_entropy(logits, torch.tensor([1, -100, 50, -1]), reduction="none")
        mean = cross_entropy(logits, torch.tensor([1, -100, -100, -100]))
        none = cross_entropy(logits, torch.full((4,), -100))
    assert losses.isnan().tolist() == [False, False, True, True]
    assert losses[1] == 0
    assert mean == losses[0]
    assert none.isnan()


def test_no_rows_are_no_launch():
    with on_cpu() as log:
        x = torch.zeros(0, 24, requires_grad=True)
        y = rms_norm(x, torch.ones(24), 1e-5)
        y.sum().backward()
        assert swiglu(torch.zeros(0, 24)).shape == (0, 12)
    assert x.grad.shape == (0, 24)
    assert log == []


@pytest.mark.parametrize(
    ("call", "error", "line"),
    [
        (lambda x: layer_norm(x, x[0, :5], x[0], 1e-5), ValueError, r"weight or bias \[5\]: expected \[24\]"),
        (lambda x: rms_norm(x.long(), x[0], 1e-5), TypeError, "torch.int64"),
        (lambda x: rms_norm(x, x[0].double(), 1e-5), TypeError, "torch.float64"),
        (lambda x: rms_norm(x[:, :0], x[0, :0], 1e-5), TypeError, "d > 0"),
        (lambda x: add_norm(x, x[:2], x[0], None, 1e-5), ValueError, r"residual torch.float32 \[2, 24\]"),
        (lambda x: swiglu(x[:, :5]), ValueError, "even last dimension"),
        (lambda x: swiglu(x, x.half()), ValueError, "up torch.float16"),
        (lambda x: cross_entropy(x, torch.zeros(3).long()), ValueError, r"labels \[3\]"),
        (lambda x: cross_entropy(x, torch.zeros(4)), TypeError, "int64"),
        (lambda x: cross_entropy(x, torch.zeros(4).long(), reduction="max"), ValueError, "reduction 'max'"),
        (lambda x: rope(x, x, x, "half"), TypeError, "4 dimensions"),
        (lambda x: rope(x.view(1, 1, 4, 24), x[:, :4], x[:, :4], "whole"), ValueError, "rope style 'whole'"),
        (lambda x: rope(x.view(1, 1, 4, 24), x[:, :13], x[:, :13], "half"), ValueError, "pairs <= 12"),
        (lambda x: rope(x.view(1, 1, 4, 24), x[:3, :4], x[:3, :4], "half"), ValueError, "cos of 3 positions"),
        (
            lambda x: rope_(x[:1].view(1, 1, 1, 24).expand(1, 1, 4, 24), x[:, :4], x[:, :4], "half"),
            ValueError,
            "share memory",
        ),
    ],
)
def test_what_is_not_supported_is_said_in_one_line(call, error, line):
    with pytest.raises(error, match=line) as raised:
        call(normal(4, 24, grad=False))
    assert "\n" not in str(raised.value)


@named
def test_the_torch_path_is_as_exact_as_torch(operator):
    """What a CPU runs: no kernel, the same definition."""
    from crystal.kernels.bench.peers import torch_functions

    baseline = torch_functions()[operator.name]
    for dtype in (torch.float32, torch.bfloat16):
        found = errors(operator, operator.shapes["small"], dtype, baseline)
        bad = [e.record() | {"torch": 2 * e.torch} for e in found]  # twice: other orders of the same roundings
        assert too_far(bad) == []

"""The CPU's own kernels (native.c): against fp64 beside torch, in any layout, with any number of threads."""

import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from crystal.kernels import dispatch, linear_cross_entropy, native, rms_norm, swiglu
from crystal.kernels.attention_kept import attention_kept
from crystal.kernels.catalog import OPERATORS
from crystal.kernels.proof.accuracy import errors, outputs_and_gradients
from crystal.kernels.proof.behaviour import same_bits

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="native.c is compiled by gcc")

NATIVE = [operator for operator in OPERATORS if not operator.name.startswith("cross_entropy")]
DTYPES = [torch.float32, torch.bfloat16]
TWO_PARTS_IN_2_22 = 2.0**-21


def by_torch(function):
    """The same call with torch's operations."""

    def call(*arguments):
        with dispatch.forced("torch"):
            return function(*arguments)

    return call


@pytest.fixture
def calls(monkeypatch):
    """Names of the C functions that were called."""
    seen, call = [], native._call
    monkeypatch.setattr(native, "_call", lambda name, *rest: seen.append(name) or call(name, *rest))
    return seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", NATIVE, ids=lambda operator: operator.name)
def test_no_further_from_fp64_than_torch(operator, dtype, calls):
    for name, shape in operator.shapes.items():
        if name.startswith("small"):
            for e in errors(operator, shape, dtype, by_torch(operator.run)):
                assert e.ours <= 1.05 * e.torch + TWO_PARTS_IN_2_22, (name, e)
    assert calls


@pytest.mark.parametrize("operator", NATIVE, ids=lambda operator: operator.name)
def test_threads_do_not_change_a_bit(operator):
    def results(threads):
        torch.set_num_threads(threads)
        shape = {"rows": 700, "width": 96} if "rows" in operator.shapes["small"] else operator.shapes["small"]
        arguments = operator.make_inputs(shape, torch.bfloat16, "cpu", torch.Generator().manual_seed(0))
        return outputs_and_gradients(operator.run, arguments, torch.Generator().manual_seed(1), not operator.inplace)

    before = torch.get_num_threads()
    try:
        one, three = results(1), results(3)
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(one[name], three[name]) for name in one)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_kept_probabilities(dtype, calls):
    q, k, v, dy = (torch.randn(2, 3, 200, 16, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(4))

    def gradients(function, dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(function(*leaves, 0.3), leaves, dy.to(dtype))

    def exact(q, k, v, scale):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    ours = gradients(attention_kept, dtype)
    assert set(calls) == {"causal_softmax", "softmax_backward"}
    columns = zip(ours, gradients(by_torch(attention_kept), dtype), gradients(exact, torch.float64), strict=True)
    for mine, others, right in columns:
        assert (mine - right).norm() <= 1.05 * (others - right).norm() + TWO_PARTS_IN_2_22 * right.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.17])
def test_the_loss_head(dtype, scale, calls):
    made = torch.Generator().manual_seed(0)
    x, weight = torch.randn(700, 24, generator=made).to(dtype), torch.randn(333, 24, generator=made).to(dtype)
    labels, weights = torch.randint(333, (700,), generator=made), torch.rand(700, generator=made)
    weights[::5] = 0

    def results(function, dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight)]
        loss, nll = function(*leaves, labels, weights.to(torch.promote_types(dtype, torch.float32)), scale)
        return nll, *torch.autograd.grad(loss, leaves)

    def exact(x, weight, labels, weights, scale):
        nll = F.cross_entropy(scale * x @ weight.T, labels, reduction="none")
        return (nll * weights).sum(), nll.detach()

    ours = results(linear_cross_entropy, dtype)
    assert set(calls) == {"score"}
    torchs, right = results(by_torch(linear_cross_entropy), dtype), results(exact, torch.float64)
    for mine, others, truth in zip(ours, torchs, right, strict=True):
        assert (mine - truth).norm() <= 1.05 * (others - truth).norm() + 2 * TWO_PARTS_IN_2_22 * truth.norm()


def test_extreme_numbers_are_as_torch_has_them():
    x = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [-float("inf"), 1.0], [1e30, -1e30], [90.0, -90.0]])
    ones = torch.ones_like(x)
    labels = torch.tensor([0, 1, 0, 1, 0])

    def gated(x):
        return swiglu(x, ones.to(x.dtype))

    def losses(x):
        return linear_cross_entropy(x, torch.eye(2, dtype=x.dtype), labels, ones[:, 0], 1.0)[1]

    for dtype in DTYPES:
        for function in (gated, losses):
            torch.testing.assert_close(function(x.to(dtype)), by_torch(function)(x.to(dtype)), equal_nan=True)


def test_a_label_that_is_no_word_is_an_error():
    with pytest.raises(IndexError, match="labels 0 to 7: expected 0 to 6"):
        linear_cross_entropy(torch.randn(2, 4), torch.randn(7, 4), torch.tensor([0, 7]), torch.ones(2), 1.0)


def test_without_gcc_operators_are_torchs_and_one_line_says_so(tmp_path):
    code = "import torch; from crystal.kernels import rms_norm; rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)"
    nowhere = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=nowhere, capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert line.startswith("crystal: CPU kernels by torch, which is slower: no gcc on PATH")


def test_other_kinds_of_tensors_go_by_torch(calls):
    with torch.device("meta"):
        rms_norm(torch.empty(2, 4), torch.empty(4), 1e-5)
    rms_norm(torch.ones(2, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64), 1e-5)
    with dispatch.forced("torch"):
        rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)
    assert not calls

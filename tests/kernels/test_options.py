"""Every option of the losses and of rope against a definition written another way; gradients against differences."""

import contextlib
import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F

from crystal.kernels import add_norm, cross_entropy, layer_norm, rms_norm, rope, rope_, rope_table, swiglu
from crystal.kernels.rope import _forward


def _kernels():
    """A context in which the Triton kernels run on the CPU."""
    pytest.importorskip("triton", reason="the kernels' compiler")
    if shutil.which("gcc") is None:
        pytest.skip("the kernels run on a CPU as C: no gcc")
    from crystal.kernels.proof.cpu import on_cpu

    return on_cpu()


@pytest.fixture(params=["torch", "kernels"])
def by(request):
    with _kernels() if request.param == "kernels" else contextlib.nullcontext():
        yield request.param


def normal(*sizes: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    x = torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


OPTIONS = {
    "plain": {},
    "scaled": {"logits_scale": 0.25},
    "a class ignored": {"ignore_index": 3},
    "smoothed": {"label_smoothing": 0.2},
    "z-loss": {"z_loss": 0.01},
    "all": {"logits_scale": 3.0, "ignore_index": 3, "label_smoothing": 0.1, "z_loss": 0.02},
}


def loss_by_torch(logits, labels, logits_scale=1.0, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction=""):
    """torch's own loss in fp64, and the square of the log of the softmax's denominator."""
    x = logits.double() * logits_scale
    how = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "none"}
    each = F.cross_entropy(x.movedim(-1, 1), labels, **how)
    counted = labels != ignore_index
    each = each + z_loss * x.exp().sum(-1).log().square() * counted
    return {"none": each, "sum": each.sum(), "mean": each.sum() / counted.sum()}[reduction]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_loss_and_its_gradient_are_torchs_with_every_option(options, reduction, by):
    logits = normal(2, 3, 50)
    labels = torch.tensor([[3, 0, 49], [7, OPTIONS[options].get("ignore_index", -100), 20]])
    how = OPTIONS[options] | {"reduction": reduction}
    found, expected = cross_entropy(logits, labels, **how), loss_by_torch(logits, labels, **how)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    gradient, right = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (found, expected))
    torch.testing.assert_close(gradient, right, rtol=1e-5, atol=1e-6)


def turned_by_complex_numbers(x, positions, rotary_dim: int, style: str):
    """x [B, H, S, D]; a pair is a complex number, which is multiplied by exp(i t 10000^(-2 pair / rotary_dim))."""
    x, pairs = x.double(), rotary_dim // 2
    if style == "interleaved":
        real, imaginary = x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
    else:
        real, imaginary = x[..., :pairs], x[..., pairs:rotary_dim]
    angle = positions.double()[..., None] * 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angle = angle if positions.dim() == 1 else angle[:, None]
    turned = torch.complex(real.contiguous(), imaginary.contiguous()) * torch.polar(torch.ones_like(angle), angle)
    order = torch.stack if style == "interleaved" else torch.cat
    parts = order((turned.real, turned.imag), -1)
    return torch.cat((parts.flatten(-2) if style == "interleaved" else parts, x[..., rotary_dim:]), -1)


POSITIONS = {
    "of the table": None,
    "shared": torch.tensor([4, 0, 9, 9, 2]),
    "of each sequence": torch.tensor([[0, 1, 2, 0, 1], [7, 6, 5, 4, 3]]),
}


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("style", ["interleaved", "half"])
def test_rope_is_a_product_of_complex_numbers_with_every_option(style, positions, layout, by):
    at = POSITIONS[positions]
    cos, sin = rope_table(torch.arange(5 if at is None else 10), 8, 10000.0)
    q, k = normal(2, 4, 5, 12).detach(), normal(2, 2, 5, 12, seed=1).detach()  # grouped heads, 8 of 12 dimensions
    expected = [
        turned_by_complex_numbers(x, torch.arange(5) if at is None else at, 8, style).float() for x in (q, k)
    ]  # fmt: skip
    if layout == "bshd":
        q, k, *expected = (x.transpose(1, 2) for x in (q, k, *expected))
    found = rope(q, cos, sin, style, k, positions=at, layout=layout)
    torch.testing.assert_close(found, tuple(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize("function", [rope, rope_])
def test_only_the_leading_heads_of_a_packed_projection_turn(function, by):
    cos, sin = rope_table(torch.arange(5), 8, 10000.0)
    qkv = normal(2, 5, 7, 12).detach()
    before, expected = qkv.clone(), rope(qkv[:, :, :4], cos, sin, "half", layout="bshd")
    found = function(qkv, cos, sin, "half", heads=4, layout="bshd")
    assert torch.equal(found[:, :, :4], expected)
    assert torch.equal(found[:, :, 4:], before[:, :, 4:])


def test_a_position_outside_the_table_is_nan_to_the_kernel_for_on_a_gpu_nobody_looks_at_it_before():
    """Where the host can read positions they are an IndexError on every path: test_extremes.py."""
    cos, sin = rope_table(torch.arange(4), 8, 10000.0)
    q, positions = normal(1, 2, 3, 8).detach(), torch.tensor([0, 4, -1])
    with _kernels():
        turned, _ = _forward(q, None, cos, sin, positions, 2, False, 2)
    assert turned.isnan().any(-1)[0, 0].tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"positions": torch.arange(3.0)}, TypeError, "positions of torch.float32: expected integers"),
        ({"positions": torch.arange(3, device="meta")}, ValueError, "another device than q: expected cpu"),
        ({"cos": torch.ones(3, 4, device="meta")}, ValueError, "another device than q: expected cpu"),
    ],
)
def test_tables_and_positions_that_the_kernel_could_not_read_are_refused(change, kind, message):
    given = {"cos": torch.ones(3, 4), "sin": torch.ones(3, 4)} | change
    for function in (rope, rope_):
        with pytest.raises(kind, match=message):
            function(normal(1, 2, 3, 8).detach(), style="half", **given)


def _double(*sizes: int, seed: int = 0) -> torch.Tensor:
    return normal(*sizes, dtype=torch.float64, seed=seed)


_X, _Y, _W, _B = _double(3, 6), _double(3, 6, seed=1), _double(6, seed=2), _double(6, seed=3)
_TABLE = [t.double() for t in rope_table(torch.arange(3), 4, 10000.0)]
_Q, _K = _double(1, 2, 3, 6), _double(1, 1, 3, 6, seed=1)
GRADIENTS = {
    "layer_norm": (lambda x, w, b: layer_norm(x, w, b, 1e-5), (_X, _W, _B)),
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-5), (_X, _W)),
    "add_layer_norm": (lambda x, r, w, b: add_norm(x, r, w, b, 1e-5, 0.3), (_X, _Y, _W, _B)),
    "add_rms_norm": (lambda x, r, w: add_norm(x, r, w, None, 1e-5), (_X, _Y, _W)),
    "swiglu": (swiglu, (_X, _Y)),
    "swiglu_packed": (swiglu, (_X,)),
    "cross_entropy": (lambda x: cross_entropy(x, torch.tensor([5, -100, 0]), **OPTIONS["z-loss"]), (_X,)),
} | {
    f"{function.__name__} {style}": (
        lambda q, k, f=function, s=style: f(q * 1, *_TABLE, s, k * 1), (_Q, _K),
    )
    for function, style in itertools.product((rope, rope_), ("interleaved", "half"))
}  # fmt: skip


@pytest.mark.parametrize("name", GRADIENTS)
def test_fp64_gradients_are_those_of_finite_differences(name):
    function, arguments = GRADIENTS[name]
    assert torch.autograd.gradcheck(function, arguments)

"""Causal attention's paths on a CPU: against fp64, in any layout, on older processors, and which of them is taken."""

import platform
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crystal.kernels import attention, attention_native, dispatch, native
from crystal.kernels.attention import PATHS, attention_reference, path
from crystal.kernels.proof.behaviour import same_bits

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="attention.c is compiled by gcc")
DTYPES = [torch.float32, torch.bfloat16]
NAMES = ("y", "dq", "dk", "dv")


def tensors(batch: int, heads: int, length: int, n: int, dtype=torch.float32, seed: int = 0) -> list[Tensor]:
    """q, k, v, dy as the decoder has them: [B, H, T, K], in memory [B, T, H, K]."""
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, heads, n, generator=made).to(dtype).transpose(1, 2) for _ in range(4)]


def results(function, q, k, v, dy, scale) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    y = function(*leaves, scale)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, dy)), strict=True))


def product(a: Tensor, b: Tensor) -> Tensor:
    """The size of a product's terms, added as errors that know nothing of one another are."""
    return (a.square() @ b.square()).sqrt()


def exact(q, k, v, dy, scale) -> dict[str, tuple[Tensor, Tensor]]:
    """Results in fp64, and how far from them fp32 arithmetic that rounds y, dq, dk and dv to the dtype may be.

    Sums of n terms err by the square root of n of fp32's roundings; a score's error, which grows with its size, is
    its probability's; and the gradient of the scores takes in y as it was rounded.
    """
    rounded = torch.finfo(q.dtype).eps / 2
    q, k, v, dy = (t.double() for t in (q, k, v, dy))
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    s = (scale * q @ k.mT).masked_fill(future, float("-inf"))
    p, dp = s.softmax(-1), dy @ v.mT
    y = p @ v
    ds = p * (dp - (dy * y).sum(-1, keepdim=True))
    largest = s.masked_fill(future, 0).abs().amax().item()
    each = 2.0**-24 * (q.shape[2] + q.shape[3]) ** 0.5 * (2 + largest)
    around = product(dy, v.mT) + (dy * product(p, v)).norm(dim=-1, keepdim=True)
    ds_error, row_error = abs(scale) * each * p * around, abs(scale) * rounded * (dy * y).norm(dim=-1, keepdim=True)
    dq_error = product(ds_error, k) + row_error * (p @ k).abs()  # a row's error is one number, times all its keys
    dk_error = product(ds_error.mT, q) + product((row_error * p).mT, q)
    found = (y, scale * ds @ k, scale * ds.mT @ q, p.mT @ dy)
    errors = (each * product(p, v), dq_error, dk_error, each * product(p.mT, dy))
    both = ((right, error + rounded * right.abs()) for right, error in zip(found, errors, strict=True))
    return dict(zip(NAMES, both, strict=True))


def worst_ratio(ours: dict[str, Tensor], right: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """By name, a row's error to what it may be, where that is most."""
    return {
        name: ((ours[name] - exactly).norm(dim=-1) / (error.norm(dim=-1) + 1e-30)).amax().item()
        for name, (exactly, error) in right.items()
    }


def assert_right(function, q, k, v, dy, scale) -> None:
    ours = results(function, q, k, v, dy, scale)
    assert all(t.dtype == q.dtype and t.shape == q.shape for t in ours.values())
    ratios = worst_ratio(ours, exact(q, k, v, dy, scale))
    assert all(ratio <= 3 for ratio in ratios.values()), ratios  # of what are standard deviations


@contextmanager
def threads(number: int):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", PATHS)
def test_a_path_is_right(name):
    for length in (1, 48, 200):
        assert_right(PATHS[name], *tensors(2, 3, length, 20), 0.3)


@needs_gcc
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 5, 17, 47, 48, 49, 255, 256, 257, 288, 289, 700])
def test_lengths_and_widths_that_fill_no_block(length, dtype):
    for n in (4, 20, 32, 64, 80, 128):
        assert_right(PATHS["native"], *tensors(1, 2, length, n, dtype, seed=n), n**-0.5)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "of a packed tensor": lambda t: torch.stack((t, t, t), 3).transpose(1, 2)[:, :, :, 1].transpose(1, 2),
    "heads last": lambda t: t.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1),  # no two neighbours in memory
    "every second row": lambda t: torch.stack((t, t), 3)[:, :, :, 0],
}


@needs_gcc
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 130), st.integers(1, 70)),
    st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=4, max_size=4),
    st.sampled_from([0.02, 0.125, 1.0, -0.5]),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_and_layout(shape, layouts, scale, dtype, seed):
    given = tensors(*shape, dtype, seed)
    assert_right(PATHS["native"], *given, scale)
    laid = [LAYOUTS[how](t) for how, t in zip(layouts, given, strict=True)]
    found, again = (results(PATHS["native"], *these, scale) for these in (given, laid))
    assert all(same_bits(found[name], again[name]) for name in NAMES)


@needs_gcc
def test_a_gradient_that_is_one_number_for_all():
    q, k, v, _ = tensors(2, 2, 60, 12)
    dy = torch.tensor(0.7).expand(q.shape)
    found, again = (results(PATHS["native"], q, k, v, these, 0.3) for these in (dy, dy.contiguous()))
    assert all(same_bits(found[name], again[name]) for name in NAMES)


@needs_gcc
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_does_not_change_a_bit(dtype):
    q, k, v, dy = tensors(2, 3, 330, 40, dtype)
    found = []
    for number in (1, 2, 3):
        with threads(number):
            found.append(results(PATHS["native"], q, k, v, dy, 0.2))
    assert all(same_bits(found[0][name], other[name]) for other in found[1:] for name in NAMES)


@needs_gcc
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_comes_later_does_not_change_a_bit(dtype):
    q, k, v, _ = tensors(1, 2, 400, 24, dtype)
    for cut in (1, 47, 96, 290):
        changed = [t.clone() for t in (q, k, v)]
        for t in changed:
            t[:, :, cut:] = 3 * t[:, :, cut:] + 1
        before, after = (PATHS["native"](*given, 0.2)[:, :, :cut] for given in ((q, k, v), changed))
        assert same_bits(before, after)


@needs_gcc
@pytest.mark.parametrize("machine", ["x86-64-v3", "x86-64-v2", "x86-64"])
def test_the_same_source_for_an_older_processor(machine, monkeypatch):
    if platform.machine() != "x86_64" or (machine == "x86-64-v3" and "avx2" not in Path("/proc/cpuinfo").read_text()):
        pytest.skip(f"this processor does not run {machine}")
    options = {"results": {"attention_scratch": attention_native._WHOLE}}
    libraries = native.load("attention.c", attention_native._SIGNATURES, f"-march={machine}", **options)
    monkeypatch.setattr(attention_native, "_libraries", lambda: libraries)
    for dtype in DTYPES:
        for length, n in ((1, 4), (49, 20), (257, 64), (300, 72)):
            assert_right(PATHS["native"], *tensors(1, 2, length, n, dtype), 0.2)


@needs_gcc
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", range(4), ids=("q", "k", "v", "dy"))
@pytest.mark.parametrize("at", [3, 60])
def test_a_number_that_is_none_is_not_lost(which, bad, dtype, at):
    given = tensors(2, 2, 100, 16, dtype)
    untouched = results(PATHS["native"], *given, 0.25)
    given[which][1, 0, at, 5] = bad
    ours = results(PATHS["native"], *given, 0.25)
    right = results(attention_reference, *(t.double() for t in given), 0.25)
    for name in NAMES:
        lost = ~right[name].isfinite() & ours[name].isfinite()
        # the definition multiplies what is masked by 0, and so has nan even where nothing bad is seen
        unseen = torch.zeros_like(lost)
        if name in ("y", "dq"):
            unseen[1, 0, :at] = True
        else:
            unseen[1, 0, at + 1 :] = which == 0 or which == 3
        assert not (lost & ~unseen).any(), name
        others = [(0, 0), (0, 1), (1, 1)]
        assert all(same_bits(ours[name][i], untouched[name][i]) for i in others)


@needs_gcc
def test_scores_of_any_size():
    """Probabilities of one key are 1; the rest are exactly 0, not small; a score that overflows is nan."""
    q, k, v, dy = tensors(1, 1, 60, 8)
    one = results(PATHS["native"], 1e4 * q, 1e4 * k, v, dy, 1.0)
    best = (q @ k.mT).masked_fill(torch.ones(60, 60, dtype=torch.bool).triu(1), float("-inf")).argmax(-1)
    torch.testing.assert_close(one["y"], v.gather(2, best[..., None].expand_as(v)), rtol=0, atol=0)
    assert not one["dq"].any()
    assert not one["dk"].any()
    assert PATHS["native"](1e30 * q.abs(), 1e30 * k.abs(), v, 1.0).isnan().all()


@needs_gcc
def test_a_row_that_sees_only_minus_infinity_at_first():
    """Whole chunks of keys may be worth nothing: what comes after them counts."""
    q, k, v, _ = tensors(1, 1, 700, 4)
    q[..., 0], k[:, :, :600, 0] = 1, -float("inf")
    ours = PATHS["native"](q, k, v, 1.0)
    assert ours[:, :, :600].isnan().all()
    torch.testing.assert_close(ours[:, :, 600:], attention_reference(q, k, v, 1.0)[:, :, 600:])


@needs_gcc
def test_memory_grows_with_the_length_alone():
    """Kept: q, k, v, y and a number a query. Scratch: a row a token."""
    kept = {}

    def pack(t):
        kept[t.data_ptr()] = t
        return t

    leaves = [t.requires_grad_() for t in tensors(2, 3, 64, 16)[:3]]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        PATHS["native"](*leaves, 0.25)
    assert sum(t.nbytes for t in kept.values()) == 4 * 2 * 3 * 64 * (4 * 16 + 1)
    library = attention_native._libraries()[torch.float32]
    for backward in (False, True):
        size = [library.attention_scratch(length, 64, backward) for length in (2880, 5760, 11520)]
        assert size[2] - size[1] == 2 * (size[1] - size[0])


@needs_gcc
def test_results_lie_as_the_products_around_them_want_them():
    found = results(PATHS["native"], *tensors(2, 3, 10, 4), 0.5)
    assert all(t.transpose(1, 2).is_contiguous() for t in found.values())


def test_the_path_that_is_taken(monkeypatch):
    def shaped(length=64, dtype=torch.float32, device="cpu"):
        return torch.empty(1, 2, length, 8, dtype=dtype, device=device)

    if shutil.which("gcc"):
        assert path(shaped()) == path(shaped(4096, torch.bfloat16)) == "native"
    others = (shaped(dtype=torch.float16), shaped(dtype=torch.float64), shaped(device="meta"), shaped(0))
    assert {path(q) for q in others} == {"torch"}
    with dispatch.forced("torch"):
        assert path(shaped()) == "kept"
        assert path(shaped(4096)) == "torch"
    monkeypatch.setattr(attention_native, "_libraries", dict)  # as without gcc
    assert path(shaped()) == "kept"


def test_torchs_kernels_alone_when_asked_for(monkeypatch):
    called = []
    monkeypatch.setattr(attention_native, "_call", lambda name, *rest: called.append(name))
    monkeypatch.setattr(native, "_call", lambda name, *rest: called.append(name))
    with dispatch.forced("torch"):
        assert_right(attention, *tensors(1, 2, 30, 8), 0.4)
        assert_right(PATHS["native"], *tensors(1, 2, 30, 8, torch.bfloat16), 0.4)  # a graph captured with gcc
    assert not called


@needs_gcc
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_and_exported_graphs_hold_the_operator(dtype):
    q, k, v, dy = tensors(1, 2, 70, 8, dtype)
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    eager = results(attention, q, k, v, dy, 0.3)
    assert all(same_bits(found, eager[name]) for name, found in results(compiled, q, k, v, dy, 0.3).items())

    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, 0.3)

    program = torch.export.export(Module(), (q, k, v))
    assert "crystal.attention_native" in str(program.graph)
    assert same_bits(program.module()(q, k, v), eager["y"])


@needs_gcc
def test_a_graph_of_any_length():
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for length, n in ((5, 8), (64, 8), (600, 20)):
        given = tensors(1, 2, length, n)
        eager = results(attention, *given, 0.3)
        assert all(same_bits(found, eager[name]) for name, found in results(compiled, *given, 0.3).items())


@needs_gcc
def test_the_operator_is_what_torch_expects_of_one():
    q, k, v, _ = tensors(1, 2, 30, 8)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    attention_native.attention_native(*leaves, 0.3)
    torch.library.opcheck(torch.ops.crystal.attention_native.default, (*leaves, 0.3))

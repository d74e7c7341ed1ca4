"""AdamW in one pass (native.c) beside torch's operations, whole, in parts, and of weights in two halves."""

import itertools
import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crystal.backends.adamw import adamw_, gradient_norm, native_numbers
from crystal.backends.cast import round_to_bf16
from crystal.backends.config import OptimizerConfig
from crystal.backends.weight_streaming.planes import join, split
from crystal.kernels import dispatch, native

NAMES = ["adamw", "adamw_cerebras"]
NUMBERS = {"lr": 0.01, "eps": 1e-8, "weight_decay": 0.1, "scale": 0.7}
compiled = pytest.mark.skipif(shutil.which("gcc") is None, reason="native.c is compiled by gcc")


def tensors(dtype=torch.float32, numel=1000, seed=0):
    """(p, grad, m, v), as after some steps."""
    generator = torch.Generator().manual_seed(seed)
    p, grad, m, v = (torch.randn(numel, generator=generator) for _ in range(4))
    return p, (grad * 0.1).to(dtype), m * 0.1, v.square() * 0.01


def reference(p, grad, m, v, name, step, lr, eps, weight_decay, scale):
    """The module's formulas in fp64."""
    p, m, v, g = p.double(), m.double(), v.double(), grad.double() * scale
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
    first, second = 1 - 0.9**step, 1 - 0.95**step
    if name == "adamw":
        update = m / first / ((v / second).sqrt() + eps)
    else:
        update = math.sqrt(second) / first * m / (v.sqrt() + eps)
    return p - lr * (update + weight_decay * p), m, v


@pytest.mark.parametrize("mode", ["torch", pytest.param("auto", marks=compiled)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_both_formulas(step, name, dtype, mode):
    p, grad, m, v = tensors(dtype)
    expected = reference(p, grad, m, v, name, step, **NUMBERS)
    rounded = torch.empty(p.shape, dtype=torch.bfloat16)
    with dispatch.forced(mode):
        adamw_(p, grad, m, v, config=OptimizerConfig(name=name), step=step, rounded=rounded, **NUMBERS)
    for found, exact in zip((p, m, v), expected, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-7)
    assert torch.equal(rounded, round_to_bf16(p, torch.empty_like(rounded)))


@compiled
@given(st.lists(st.integers(1, 997), max_size=6), st.sampled_from(NAMES), st.booleans())
@settings(deadline=None, max_examples=30)
def test_parts_and_halves_give_the_bits_of_the_whole(cuts, name, small):
    config, dtype = OptimizerConfig(name=name), torch.bfloat16 if small else torch.float32
    p, grad, m, v = tensors(dtype)
    high, low, scratch = torch.empty(1000, dtype=torch.int16), torch.empty(1000, dtype=torch.int16), torch.empty(1000)
    split(p, high, low, scratch.view(torch.int32))
    m_of_halves, v_of_halves, rounded = m.clone(), v.clone(), torch.empty(1000, dtype=torch.bfloat16)
    edges = sorted({0, 1000, *cuts})
    for start, stop in itertools.pairwise(edges):
        run = slice(start, stop)
        native.adamw_halves(
            high[run], low[run], m_of_halves[run], v_of_halves[run], grad[run], rounded[run],
            native_numbers(config, 3, **NUMBERS),
        )  # fmt: skip
    adamw_(p, grad, m, v, config=config, step=3, **NUMBERS)
    assert torch.equal(join(high, low, scratch), p)
    assert torch.equal(m_of_halves, m)
    assert torch.equal(v_of_halves, v)
    assert torch.equal(rounded.view(torch.int16), high)


@compiled
def test_threads_do_not_change_an_update_or_a_norm():
    def result(threads):
        torch.set_num_threads(threads)
        p, grad, m, v = tensors(torch.bfloat16, 1 << 17)
        adamw_(p, grad, m, v, config=OptimizerConfig(), step=2, **NUMBERS)
        return p, gradient_norm(grad)

    before = torch.get_num_threads()
    try:
        assert all(torch.equal(a, b) for a, b in zip(result(1), result(3), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mode", ["torch", pytest.param("auto", marks=compiled)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradients_norm(dtype, mode):
    grad = tensors(dtype, 100_003)[1]
    with dispatch.forced(mode):
        assert gradient_norm(grad).item() == pytest.approx(grad.double().norm().item(), rel=1e-5)
        grad[77] = float("nan")
        assert gradient_norm(grad).isnan()

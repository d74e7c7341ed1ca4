"""The tolerance of all tests: sums made in other orders stay inside it, an error that matters does not."""

import itertools

import pytest
import torch
from closeness import assert_near, near, path_length, product_tolerance, tolerance
from hypothesis import given
from hypothesis import strategies as st

from crystal.kernels import attention, linear
from crystal.zoo.config import model_config

LENGTHS = st.sampled_from([1, 2, 3, 16, 97, 256, 1000, 2048])
MATRICES = st.builds(
    lambda length, seed, dtype, mean: [
        (torch.randn(size, generator=torch.Generator().manual_seed(seed)) + mean).to(dtype).float()
        for size in ((9, length), (length, 7))
    ],
    LENGTHS, st.integers(0, 2**32), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([0.0, 3.0]),
)  # fmt: skip


def one_by_one(x, y):
    """x @ y in fp32, each sum from its first term to its last."""
    total = torch.zeros(x.shape[0], y.shape[1])
    for k in range(x.shape[1]):
        total += x[:, k, None] * y[k]
    return total


def in_halves(x, y):
    """x @ y in fp32, each sum that of two halves."""
    middle = x.shape[1] // 2
    return x[:, :middle] @ y[:middle] + x[:, middle:] @ y[middle:]


@given(MATRICES, st.integers(0, 2**32))
def test_products_in_any_order_are_within_the_tolerance(matrices, seed):
    """Of fp32 and of bf16 numbers, with mean zero and without, by the library, by the operator, and by hand."""
    x, y = matrices
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed))
    found = [
        x @ y, linear(x, y.T.contiguous()), x[:, order] @ y[order], torch.cat([row[None] @ y for row in x]),
        one_by_one(x, y), in_halves(x, y), (x.double() @ y.double()).float(),
    ]  # fmt: skip
    for one, other in itertools.combinations(found, 2):
        assert ((one - other).abs() <= product_tolerance(x, y)).all()


@given(MATRICES)
def test_an_error_of_a_thousandth_is_outside_the_tolerance(matrices):
    x, y = matrices
    right = x @ y
    assert not (((right * 1.001) - right).abs() <= product_tolerance(x, y)).all()
    with pytest.raises(AssertionError, match="times what is allowed"):
        assert_near(right * 1.001, right, x.shape[1])
    assert right[0, 0].item() * 1.001 != near(right[0, 0].item(), x.shape[1])


@given(st.integers(1, 70), st.integers(0, 2**32))
def test_several_sums_on_a_path_are_within_the_tolerance_of_their_lengths_together(tokens, seed):
    """Attention: scores, softmax and values, in fp32 beside fp64."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, 2, tokens, 32, generator=generator).unbind()
    exact = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True, scale=0.2
    )
    assert_near(attention(q, k, v, 0.2), exact, 32 + 2 * tokens, size=v.abs().max().item())


def test_it_follows_the_length_the_size_and_the_dtype():
    assert tolerance(400) == pytest.approx(20 * 8 * 2**-24)
    assert tolerance(400, 39.0) == pytest.approx(39 * tolerance(400))
    assert tolerance(400, dtype=torch.bfloat16) == pytest.approx(2**16 * tolerance(400))
    assert near(0.01, 1000, size=30.0) == 0.0101
    assert near(0.01, 1000) != 0.0101
    assert near([1.0, 200.0], 1000) == [1.0, 200.001]
    # a 7B's logits of 2,048 tokens: a thousandth of the largest is still seen
    assert tolerance(path_length(model_config("amber-7b"), 2048)) < 1e-3


def test_what_is_no_number_or_of_another_shape_is_not_near():
    one = torch.ones(3)
    for other in (torch.tensor([1.0, 1.0, float("nan")]), torch.tensor([1.0, 1.0, float("inf")]), torch.ones(1)):
        with pytest.raises(AssertionError):
            assert_near(other, one, 10)

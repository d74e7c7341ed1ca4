"""Attention of packed documents: each as if it were alone, by every path, and without a mask of tokens by tokens."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import DTYPES, NAMES, exact, results, tensors, worst_ratio

import crystal.kernels.attention_documents as attention_documents
from crystal.kernels import attention, dispatch, document_bounds
from crystal.kernels.proof.behaviour import same_bits

ROWS = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=3)  # documents' lengths


def numbered(rows: list[list[int]]) -> torch.Tensor:
    """documents_BT of rows of documents; the last of each is drawn out to the longest row's end."""
    length = max(map(sum, rows))
    found = []
    for lengths in rows:
        numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        found.append(F.pad(numbers, (0, length - len(numbers)), value=len(lengths) - 1))
    return torch.stack(found)


def places(documents_BT):
    """(row, first, end) of each document, token by token."""
    for row, numbers in enumerate(documents_BT.tolist()):
        begins = [i for i, n in enumerate(numbers) if i == 0 or n != numbers[i - 1]]
        for begin, end in zip(begins, [*begins[1:], len(numbers)], strict=True):
            yield row, begin, end


def fused(q, k, v, bounds, scale):
    """What a GPU's kernel is asked for."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch before 2.10")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", varlen_of_torch)
        return attention_documents._varlen(q, k, v, bounds, scale)


def varlen_of_torch(q, k, v, bounds_q, bounds_k, longest_q, longest_k, *, scale, window_size):
    """torch's varlen_attn by its definition: [tokens, heads, K], causal where window_size is (-1, 0)."""
    assert window_size == (-1, 0)
    assert bounds_q.dtype == torch.int32
    assert bounds_q is bounds_k
    y = []
    for begin, end in itertools.pairwise(bounds_q.tolist()):
        assert end - begin <= min(longest_q, longest_k)
        own = [t[begin:end].transpose(0, 1) for t in (q, k, v)]
        y.append(F.scaled_dot_product_attention(*own, is_causal=True, scale=scale).transpose(0, 1))
    return torch.cat(y)


PATHS = {
    "chosen": lambda *given: attention(*given[:3], given[4], mask=given[3]),
    "torch's kernel": lambda *given: _by_torch(*given),
    "masked": attention_documents._masked,
    "fused": fused,
}


def _by_torch(q, k, v, bounds, scale):
    with dispatch.forced("torch"):
        return attention(q, k, v, scale, mask=bounds)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=ROWS, seed=st.integers(0, 99))
@settings(max_examples=12)
def test_each_document_is_as_if_it_were_alone(name, dtype, rows, seed):
    documents_BT = numbered(rows)
    bounds, scale = document_bounds(documents_BT), 0.3
    q, k, v, dy = tensors(*documents_BT.shape[:1], 2, documents_BT.shape[1], 12, dtype, seed)
    with dispatch.forced("torch" if name == "torch's kernel" else dispatch.mode()):  # in backward too
        found = results(lambda q, k, v, scale: PATHS[name](q, k, v, bounds, scale), q, k, v, dy, scale)
    for row, begin, end in places(documents_BT):
        at = (slice(row, row + 1), slice(None), slice(begin, end))
        ratios = worst_ratio({n: t[at] for n, t in found.items()}, exact(*(t[at] for t in (q, k, v, dy)), scale))
        # torch's bf16 kernels round probabilities too; a token of a neighbor would be farther off than that
        assert all(ratio <= (3 if dtype == torch.float32 else 30) for ratio in ratios.values()), ratios


@given(ROWS)
def test_bounds_are_where_documents_begin(rows):
    documents_BT = numbered(rows)
    length, total = documents_BT.shape[1], documents_BT.numel()
    bounds = document_bounds(documents_BT)
    begins = [row * length + begin for row, begin, _ in places(documents_BT)]
    assert bounds.tolist() == begins + [total] * (len(bounds) - len(begins))
    assert len(bounds) - 1 in (16, 32)  # few shapes for graphs
    assert len(bounds) > len(begins)
    assert bounds.dtype == torch.int32


def test_one_graph_whatever_the_documents():
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    given = tensors(2, 2, 20, 8)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in ([[20], [20]], [[3, 17], [20]], [[1] * 6, [5, 5, 10]]):
            bounds = document_bounds(numbered(rows))
            eager = results(lambda *qkv, b=bounds: attention(*qkv, mask=b), *given, 0.3)
            found = results(lambda *qkv, b=bounds: compiled(*qkv, mask=b), *given, 0.3)
            assert all(same_bits(found[name], eager[name]) for name in NAMES)


def test_the_operator_is_what_torch_expects_of_one():
    leaves = [t.requires_grad_() for t in tensors(2, 2, 12, 8)[:3]]
    torch.library.opcheck(
        torch.ops.crystal.attention_documents.default, (*leaves, document_bounds(numbered([[5, 7], [12]])), 0.3)
    )


def test_this_torch_has_the_kernel_that_a_gpu_is_given():
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14):
        pytest.skip("the pinned torch and later")
    assert attention_documents.has_varlen()


def test_what_is_kept_grows_with_the_length_and_not_with_its_square():
    def kept(length):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            bounds = document_bounds(numbered([[length // 2, length - length // 2]]))
            attention(*(t.requires_grad_() for t in tensors(1, 1, length, 4)[:3]), 0.3, mask=bounds)
        return sum(sizes) - len(bounds)

    assert kept(600) == 2 * kept(300)

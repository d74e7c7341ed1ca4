"""Host memory for checkpoints, and what torch is told before a GPU is used: what can be seen without one."""

import gc
import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crystal.backends.cuda.gpu import ALLOCATOR, settle
from crystal.backends.cuda.host_memory import ALIGNED, host_memory
from crystal.errors import RunError


class Cuda:
    """cudart's two functions, which say code."""

    def __init__(self, code=0):
        self.code, self.registered, self.unregistered = code, [], []

    def cudaHostRegister(self, *arguments):
        self.registered.append(arguments)
        return self.code

    def cudaHostUnregister(self, address):
        self.unregistered.append(address)
        return 0


@given(st.lists(st.lists(st.integers(0, 7), max_size=3), max_size=6))
def test_parts_do_not_overlap_and_little_is_added(shapes):
    made = host_memory(((str(i), torch.Size(shape)) for i, shape in enumerate(shapes)), pinned=False)
    for i, part in enumerate(made.parts.values()):
        part.fill_(i)
    assert [tuple(part.shape) for part in made.parts.values()] == [tuple(shape) for shape in shapes]
    assert all((part == i).all() for i, part in enumerate(made.parts.values()))
    needed = sum(math.prod(shape) for shape in shapes)
    assert needed <= made.flat.numel() < needed + ALIGNED * len(shapes) + 1


def test_exactly_what_is_held_is_pinned_once_until_nobody_has_it(monkeypatch):
    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    made = host_memory([("a", torch.Size([3, 5])), ("b", torch.Size([40]))], pinned=True)
    address, part = made.flat.data_ptr(), made.parts["b"]
    assert cuda.registered == [(address, 4 * (16 + 48), 1)]
    del made
    gc.collect()
    assert cuda.unregistered == []  # a part of it is still there
    del part
    gc.collect()
    assert cuda.unregistered == [address]


def test_a_system_that_pins_no_more_is_named_in_a_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cuda(code=2))
    with pytest.raises(RunError, match=r"expected to pin 0\.0 GB of host memory.*cudaHostRegister: 2") as caught:
        host_memory([("a", torch.Size([1]))], pinned=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("chosen", [None, *ALLOCATOR])
def test_memory_is_cut_as_the_user_says_and_products_add_up_in_fp32(monkeypatch, chosen):
    for name in ALLOCATOR:
        monkeypatch.setenv(name, "")  # so that it is put back, whoever sets it
        monkeypatch.delenv(name)
    if chosen:
        monkeypatch.setenv(chosen, "max_split_size_mb:64")
    before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    try:
        settle()
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = before
    found = {name: os.environ[name] for name in ALLOCATOR if name in os.environ}
    assert found == ({chosen: "max_split_size_mb:64"} if chosen else {ALLOCATOR[0]: "expandable_segments:True"})

"""What tensor parallelism exchanges and keeps, a block at a time. That it trains as one process does: test_layouts.py.

One process stands for all: collectives of torch's fake process group do nothing, and shapes are real.
"""

import contextlib
import functools
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from layouts import ROWS, batch, cuda, made, own
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from crystal.errors import ConfigError
from crystal.run import load_run


class Counted(TorchDispatchMode):
    """How often each functional collective is started."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("_c10d_functional::")
        if func.namespace == "_c10d_functional" and name != "wait_tensor":
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Step:
    calls: Counter
    kept: int  # bytes of activations that are kept for backward


@contextlib.contextmanager
def rank_0_of(processes):
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # DTensor keeps meshes in it, which would be taken for the next group's


def step(model, tp, sequence, recompute) -> Step:
    """A step of one micro-batch."""
    with rank_0_of(tp):
        backend = made(model, cuda({"tp": tp, "sequence": sequence}, recompute=recompute))
        for one in backend.held.values():
            torch.nn.init.normal_(one.weight, std=0.02)
        kept, matrices = {}, {tuple(one.weight.shape) for one in backend.held.values()}

        def keep(t):
            if t.is_floating_point() and t.dim() > 1 and tuple(t.shape) not in matrices:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), Counted() as counted:
            backend.train_step(1, own(batch(1), backend.place, ROWS))
    return Step(counted.calls, sum(kept.values()))


@functools.cache
def of_a_block(tp, sequence, recompute) -> Step:
    """What two blocks more add to a step, halved."""
    two, four = (step(f"crystalcoder-l{layers}", tp, sequence, recompute) for layers in (2, 4))
    four.calls.subtract(two.calls)
    assert all(n % 2 == 0 for n in four.calls.values())
    return Step(Counter({name: n // 2 for name, n in four.calls.items() if n}), (four.kept - two.kept) // 2)


@pytest.mark.parametrize(
    ("sequence", "recompute", "expected"),
    [
        (False, "none", {"all_reduce": 4}),
        (False, "attention", {"all_reduce": 4}),
        (False, "block", {"all_reduce": 5}),
        (True, "none", {"reduce_scatter_tensor": 4, "all_gather_into_tensor": 6}),
        (True, "attention", {"reduce_scatter_tensor": 4, "all_gather_into_tensor": 7}),
        (True, "block", {"reduce_scatter_tensor": 5, "all_gather_into_tensor": 8}),
    ],
)
def test_products_of_one_input_share_its_gradients_sum(sequence, recompute, expected):
    assert of_a_block(2, sequence, recompute).calls == expected  # 7 all-reduces where each product sums its own


@pytest.mark.parametrize(("tp", "recompute"), [(2, "none"), (2, "attention"), (2, "block"), (4, "none")])
def test_sequence_parallelism_divides_all_that_a_block_keeps(tp, recompute):
    alone = of_a_block(1, True, recompute).kept
    assert of_a_block(tp, True, recompute).kept == alone // tp
    assert of_a_block(tp, False, recompute).kept > alone // tp


@pytest.mark.parametrize(("seq_len", "sequence", "refused"), [(31, True, True), (31, False, False), (32, True, False)])
def test_rows_that_cannot_be_divided_by_tokens_are_refused_by_the_key(make_run, seq_len, sequence, refused):
    changes = ["backend.name=cuda", "backend.device=cpu", "backend.parallel.tp=2", "model.d_ff=86"]
    changes += [f"curriculum.seq_len={seq_len}", f"backend.parallel.sequence={str(sequence).lower()}"]
    said = r"backend\.parallel\.sequence.*: expected false where tp 2 does not divide curriculum\.seq_len 31, got true$"
    with pytest.raises(ConfigError, match=said) if refused else contextlib.nullcontext():
        load_run(make_run(), changes)

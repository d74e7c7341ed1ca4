"""The planner's layouts: their bytes and collectives against the real cuda backend and published runs."""

from collections import Counter
from contextlib import contextmanager
from itertools import product

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crystal.backends.base import MicroBatch, Setup
from crystal.backends.config import CudaConfig, Layout, OptimizerConfig
from crystal.backends.cuda.backend import CudaBackend
from crystal.backends.cuda.mesh import join
from crystal.backends.cuda.parallelize import held_by, parallelise
from crystal.backends.cuda.stage import Stage, layers_of
from crystal.planning.cost import block_activation_bytes
from crystal.planning.device import load_device
from crystal.planning.layouts import (
    Work,
    candidate,
    candidates,
    divisors,
    in_flight,
    layouts,
    memory,
    plan,
    sizes,
    smallest,
)
from crystal.planning.shards import SPLIT, elements, held, host_bytes
from crystal.planning.traffic import traffic
from crystal.zoo.build import build, parameter_count, plan_for
from crystal.zoo.config import ModelConfig, model_config

AMBER, CRYSTAL = model_config("amber-7b"), model_config("crystalcoder-7b")
BOTH = pytest.mark.parametrize("config", [AMBER, CRYSTAL], ids=["amber-7b", "crystalcoder-7b"])
A100 = load_device("a100-80gb")


def llama(**changes):
    return ModelConfig(**(AMBER.model_dump(exclude={"mup"}) | {"max_seq_len": 8192} | changes))


# ------------------------------------------------------------------------------------------------- published runs


def test_what_was_trained_fits_and_what_cannot_be_does_not():
    """torchtitan, docs/performance.md: Llama 2 13B on 64 A100 80 GB, FSDP2, 2 rows of 4,096, nothing recomputed."""
    llama_2_13b = llama(d_model=5120, n_layers=40, n_heads=40, d_ff=13824)
    assert parameter_count(llama_2_13b) == 13_015_864_320
    assert candidate(Work(llama_2_13b, 4096, 128, 1), Layout(fsdp=64), A100, 2, "none").memory_bytes < 80e9
    assert smallest(Work(AMBER, 2048, 8, 1), 1, A100).memory_bytes > 80e9  # 16 bytes a parameter alone are 108 GB


def test_more_processes_save_what_torchtitan_measured():
    """benchmarks/llama3_h100_202412_torchtitan.md: Llama 3.1 8B by FSDP2, compiled, 77.0 GiB on 8 GPUs, 62.0 on 128."""
    llama_3_8b = llama(n_kv_heads=8, d_ff=14336, vocab_size=128256)
    assert parameter_count(llama_3_8b) == 8_030_261_248
    few, many = (sum(memory(llama_3_8b, Layout(fsdp=n), 0, 16384, 1, "attention").values()) for n in (8, 128))
    assert (few - many) / 2**30 == pytest.approx(77.0 - 62.0, rel=0.07)


# --------------------------------------------------------------------------- bytes, against the real cuda backend


@contextmanager
def process(layout, rank):
    """As if this were process `rank` of a layout: collectives do nothing, shards are real."""
    dist.init_process_group("fake", rank=rank, world_size=layout.processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # DTensor keeps meshes in it, which would be taken for the next process' own


def cuda(layout, recompute="none"):
    return CudaConfig(name="cuda", device="cpu", parallel=layout, compile=False, recompute=recompute)


def ends_of(layout):
    """(place in the pipeline, rank) of its first and last process."""
    return [(place, place * layout.processes // layout.pp) for place in sorted({0, layout.pp - 1})]


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (AMBER, Layout(fsdp=224)),
        (CRYSTAL, Layout(dp=4, fsdp=3)),
        (CRYSTAL, Layout(tp=2)),
        (AMBER, Layout(fsdp=7, tp=4)),
        (AMBER, Layout(fsdp=5, pp=4, interleave=2)),
        (CRYSTAL, Layout(fsdp=3, tp=2, pp=2, interleave=1)),
    ],
)
def test_weights_of_a_device_are_those_that_fsdp_and_dtensor_leave_of_the_real_7b(config, layout):
    stages = layout.pp * layout.interleave if layout.pp > 1 else 1
    for place, rank in ends_of(layout):
        with process(layout, rank):
            mesh, found = join(cuda(layout)), 0
            for number in range(place, stages, layout.pp):
                layers = layers_of(number, stages, config.n_layers)
                decoder = build(config, plan_for(config))
                stage = Stage(decoder, layers, first=number == 0, last=number == stages - 1)
                parallelise(stage, mesh, cuda(layout))
                found += sum(one.weight.numel() for one in held_by(stage, mesh).values())
        assert found == held(config, layout, place).part


class Sent(TorchDispatchMode):
    """Calls of collectives by kind, and the bytes that they are given or give, whichever is more."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "wrap" not in func._schema.name:
            name = func._schema.name.split("::")[1].replace("_", "")
            kind = next((k for k in ("allgather", "reducescatter", "allreduce", "send") if name.startswith(k)), None)
            out = func(*args, **(kwargs or {}))
            given = [a.nbytes for a in tree_leaves((args, kwargs or {}, out)) if isinstance(a, torch.Tensor)]
            self.calls[kind] += 1
            self.bytes[kind] += max(given, default=0)
            return out
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "layout", "recompute"),
    [
        ("amber-w64-l4", Layout(fsdp=4), "none"),
        ("crystalcoder-w64-l4", Layout(dp=2, fsdp=2), "block"),
        ("crystalcoder-w64-l4", Layout(dp=3), "none"),
        ("amber-w64-l4", Layout(tp=2), "none"),
        ("amber-w64-l4", Layout(tp=2, sequence=False), "none"),
        ("amber-w64-l4", Layout(tp=2), "attention"),
        ("crystalcoder-w64-l4", Layout(tp=2, fsdp=2), "block"),
        ("crystalcoder-w64-l4", Layout(tp=2, sequence=False), "block"),
        ("crystalcoder-w64-l4", Layout(pp=2, interleave=1), "none"),
        ("amber-w64-l4", Layout(pp=2, fsdp=2, interleave=2), "none"),
        ("crystalcoder-w64-l4", Layout(pp=4, tp=2, fsdp=2, interleave=1), "none"),
    ],
)
def test_traffic_is_what_the_cuda_backend_sends_in_a_step(name, layout, recompute):
    config = model_config(name).model_copy(update={"vocab_size": 96, "max_seq_len": 32})
    micro_batches, shape = 4, (2, 16)
    ids, weights, zeros = torch.randint(0, 96, shape), torch.full(shape, 1 / 128), torch.zeros(2, dtype=torch.long)
    batch = MicroBatch(ids, ids, weights, zeros, torch.zeros_like(ids))
    for place, rank in ends_of(layout):
        with process(layout, rank):
            setup = Setup(config, plan_for(config), OptimizerConfig(), lambda step: 0.01, 1, 1)
            backend = CudaBackend(setup, cuda(layout, recompute))
            for one in backend.held.values():
                torch.nn.init.normal_(one.weight, std=0.02)
            with Sent() as sent:
                backend.train_step(1, [batch] * micro_batches)
        given, calls = Counter(), Counter()
        for t in traffic(config, layout, A100, place, ids.numel(), micro_batches, recompute):
            size = 2 if t.of == "tied" else getattr(layout, t.of)
            share = {"all_reduce": 2 * (size - 1) / size, "p2p": 1}.get(t.kind, (size - 1) / size)
            kind = t.kind.replace("_", "").replace("p2p", "send")
            given[kind] += round(t.bytes / share)
            calls[kind] += t.calls
        for kind in ("allgather", "reducescatter", "send"):
            assert sent.bytes[kind] == pytest.approx(given[kind], abs=2), kind
            assert sent.calls[kind] == calls[kind], kind
        # beside them the step's sums, and, where the head is split, three numbers a token in two calls
        assert sent.calls["allreduce"] == calls["allreduce"] + 1 + 2 * micro_batches * (
            layout.tp > 1 and place == layout.pp - 1
        )
        small = 64 + 4 * 3 * micro_batches * ids.numel()
        assert given["allreduce"] - 2 <= sent.bytes["allreduce"] <= given["allreduce"] + small


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("amber-w64-l4", Layout(dp=2, fsdp=2)),
        ("amber-w64-l4", Layout(fsdp=2, tp=2)),
        ("crystalcoder-w64-l4", Layout(dp=2, tp=2)),
        ("crystalcoder-w64-l4", Layout(pp=2, fsdp=2, interleave=2)),
    ],
)
def test_a_nodes_memory_for_checkpoint_copies_is_what_its_ranks_copy(name, layout):
    config = model_config(name).model_copy(update={"vocab_size": 96})
    copied = Counter()
    for rank in range(layout.processes):
        with process(layout, rank):
            setup = Setup(config, plan_for(config), OptimizerConfig(), lambda step: 0.01, 1, 1)
            backend = CudaBackend(setup, cuda(layout))
            list(backend.state())
            copied[rank // 2] += sum(part.nbytes for part in backend._host.parts.values())
    # the last stage has a copy of tied embeddings, CrystalCoder's, and does not save it
    assert host_bytes(config, layout, 2) == max(copied.values())


@pytest.mark.parametrize(
    ("pp", "interleave", "micro_batches"), [(2, 1, 8), (4, 1, 4), (2, 2, 4), (4, 2, 8), (4, 4, 16)]
)
def test_stages_in_flight_are_those_of_torchs_schedule(pp, interleave, micro_batches):
    for place in range(pp):
        if interleave == 1:
            ahead = min(pp - place, micro_batches)  # Schedule1F1B: warm-up of the stages behind, and its own
        else:
            ahead = schedules._get_warmup_ops(place, interleave, pp, pp, micro_batches, multiply_factor=2) + 1
            ahead = min(ahead, micro_batches * interleave)
        assert in_flight(Layout(pp=pp, interleave=interleave), place, micro_batches) == ahead


# ------------------------------------------------------------------------------------------------------ properties

SHAPES = st.builds(
    lambda heads, kv, layers, ff, tied: ModelConfig(
        d_model=32 * heads * kv, n_layers=layers, n_heads=heads * kv, n_kv_heads=kv, d_ff=ff, vocab_size=96,
        tie_embeddings=tied,
    ),
    st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(1, 12), st.sampled_from([43, 64, 96]),
    st.booleans(),
)  # fmt: skip


@given(SHAPES, st.integers(1, 64), st.sampled_from([24, 64, 96]), st.sampled_from([4, 8]))
def test_layouts_are_all_that_there_are(model, devices, batch, node):
    work, device = Work(model, 32, batch, 1), load_device("a100-80gb", [f"devices_per_node={node}"])
    found = [(c.dp, c.fsdp, c.tp, c.pp) for c in layouts(work, devices, device)]
    by_trial = {
        (dp, fsdp, tp, pp)
        for dp, fsdp, tp, pp in product(divisors(devices), repeat=4)
        if dp * fsdp * tp * pp == devices
        and not any(n % tp for n in (model.n_heads, model.kv_heads, model.d_ff, model.vocab_size, node))
        and model.n_layers % pp == 0
        and batch % (dp * fsdp * pp) == 0
    }
    assert len(found) == len(set(found))
    assert set(found) == by_trial
    assert (devices in sizes(work, device)) == bool(found)


@given(st.sampled_from(["attn.q.weight", "attn.out.weight", "norm.weight", "embed.weight"]), st.data())
def test_parts_add_up_to_the_whole_and_shrink_with_every_device(name, data):
    tp = data.draw(st.sampled_from([1, 2, 4]))
    shape = [tp * data.draw(st.integers(1, 50)) for _ in range(1 if name == "norm.weight" else 2)]
    whole = elements(name, shape, tp, 1)
    split = name in SPLIT
    assert whole * (tp if split else 1) == torch.empty(shape, device="meta").numel()
    local = [n // tp if split and i == SPLIT[name] else n for i, n in enumerate(shape)]
    before = whole
    for fsdp in range(1, 60):
        part = elements(name, shape, tp, fsdp)
        chunks = torch.empty(local, device="meta").chunk(fsdp)  # as FSDP2 divides
        assert part == max(c.numel() for c in chunks)
        assert sum(c.numel() for c in chunks) == whole
        assert part <= before
        before = part


@given(SHAPES, st.sampled_from([1, 2, 4]), st.sampled_from(["none", "attention", "block"]))
def test_more_shards_never_need_more_memory(model, pp, recompute):
    pp = pp if model.n_layers % pp == 0 else 1
    for place in {0, pp - 1}:
        whole = memory(model, Layout(pp=pp, fsdp=2, interleave=1), place, 64, 8, recompute)
        for fsdp in (3, 4, 7, 8, 100):
            part = memory(model, Layout(pp=pp, fsdp=fsdp, interleave=1), place, 64, 8, recompute)
            assert all(part[key] <= whole[key] for key in whole)
            whole = part


@given(SHAPES, st.sampled_from([1, 2]), st.integers(1, 64))
def test_recomputing_more_keeps_less_and_smaller_micro_batches_too(model, tp, tokens):
    none, attention, block = (block_activation_bytes(model, tokens, r, tp) for r in ("none", "attention", "block"))
    assert block < attention < none
    assert (
        block_activation_bytes(model, tokens, "none", 2 * tp) < none < block_activation_bytes(model, tokens + 1, tp=tp)
    )


def test_the_plan_is_the_best_of_what_fits_and_the_smallest_is_the_smallest():
    work = Work(model_config("amber-w256-l4"), 256, 64, 1)
    device = load_device("a100-80gb", ["memory_gb=0.2"])
    found = plan(work, 8, device)
    every = [c for layout in layouts(work, 8, device) for c in candidates(work, layout, device)]
    fitting = [c for c in every if c.memory_bytes <= device.usable_bytes]
    assert 0 < len(fitting) < len(every)
    assert found[0].step_seconds == pytest.approx(min(c.step_seconds for c in fitting), rel=1e-3)
    assert all(c.memory_bytes <= device.usable_bytes for c in found)
    assert [c.step_seconds for c in found] == pytest.approx(sorted(c.step_seconds for c in found), rel=1e-3)
    assert smallest(work, 8, device).memory_bytes == min(c.memory_bytes for c in every)

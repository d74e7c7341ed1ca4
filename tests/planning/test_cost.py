"""Bytes that `cost` reckons, against what the real decoder and the cpu backend hold."""

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint

from crystal.backends.base import MicroBatch, Setup
from crystal.backends.config import CpuConfig, OptimizerConfig, WeightStreamingConfig
from crystal.backends.cpu import CpuBackend
from crystal.backends.weight_streaming.backend import WeightStreamingBackend
from crystal.kernels.native import available
from crystal.planning.cost import (
    block_activation_bytes,
    head_bytes,
    memory_bytes,
    run_bytes,
    state_bytes,
    streaming_bytes,
)
from crystal.zoo.build import build, multipliers_for, parameter_count, plan_for
from crystal.zoo.config import model_config
from crystal.zoo.decoder import Decoder
from crystal.zoo.flops import flops_per_token


def test_flops_of_a_token_by_hand():
    blocks = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)  # of Amber-7B
    head = 32000 * 4096 + 4096
    assert flops_per_token(model_config("amber-7b"), 2048) == 6 * (blocks + head) + 6 * 32 * 4096 * 2048


@pytest.mark.parametrize(("dtype", "each"), [("fp32", 16), ("bf16", 18)])
def test_state_is_what_the_cpu_backend_holds(dtype, each):
    config = model_config("amber-w64-l2").model_copy(update={"vocab_size": 96})
    plan, cpu = plan_for(config), CpuConfig(dtype=dtype)
    backend = CpuBackend(Setup(config, plan, OptimizerConfig(), lambda step: 0.01, 1, 1), cpu)
    backend.initialise()
    gradients = []
    update = backend._update
    backend._update = lambda *how: (gradients.extend(backend.gradients.values()), update(*how))
    ids, weights = torch.randint(0, 96, (1, 16)), torch.full((1, 16), 1 / 32)
    batch = MicroBatch(ids, ids, weights, torch.zeros(1, dtype=torch.long), torch.zeros_like(ids))
    backend.train_step(1, [batch, batch])  # gradients of one micro-batch alone would be in the compute dtype
    moments = [m for held in backend.moments.values() for m in held.values()]
    held = {
        "weights": sum(w.nbytes for w in backend.weights.values()),
        "gradients": sum(g.nbytes for g in gradients),
        "moments": sum(m.nbytes for m in moments),
        "compute_copy": sum(p.nbytes for p in backend.compute.parameters()) if dtype == "bf16" else 0,
    }
    assert state_bytes(config, dtype) == held
    assert sum(held.values()) == each * parameter_count(config) == memory_bytes(config)[f"cpu {dtype}"]


@pytest.mark.parametrize("recompute", ["none", "attention", "block"])
@pytest.mark.parametrize("name", ["amber-w256-l2", "crystalcoder-w256-l2"])
def test_activations_are_what_autograd_keeps_of_a_block(name, recompute, monkeypatch):
    # attention that keeps no probabilities, as everywhere but for short rows on a CPU without gcc
    monkeypatch.setattr(importlib.import_module("crystal.kernels.attention"), "LONGEST", 0)
    config = model_config(name)
    decoder = build(config, plan_for(config)).to_empty(device="cpu").to(torch.bfloat16)
    x = torch.randn(2, 64, config.d_model, dtype=torch.bfloat16, requires_grad=True)
    block, table = decoder.blocks[0], decoder.table(0, 64, x.device)
    others = {t.untyped_storage().data_ptr() for t in (*decoder.parameters(), *table)}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # a reference too, so that memory is not used again
        return tensor

    if recompute != "none":
        part = block if recompute == "block" else block.attn
        forward = part.forward
        part.forward = lambda *args: checkpoint(forward, *args, use_reentrant=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, table)
    found = sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in others)
    # by torch's operations SwiGLU keeps silu(gate) too
    eager = 0 if recompute == "block" or available() else 2 * config.d_ff
    expected = block_activation_bytes(config, 128, recompute) + 128 * eager
    assert found == pytest.approx(expected, rel=0.01)  # norms keep a number or two a token beside


@pytest.mark.parametrize("name", ["amber-7b", "crystalcoder-7b"])
def test_the_peak_of_four_blocks_and_head_of_the_7b(name):
    """The real decoder at full width, forward and backward, on tensors without memory."""
    config = model_config(name).model_copy(update={"n_layers": 4})
    multipliers = multipliers_for(config, plan_for(config))
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        try:
            decoder = Decoder(config, multipliers)
        finally:
            torch.set_default_dtype(torch.float32)
        tracker, ids = MemTracker(), torch.zeros(1, 2048, dtype=torch.long)
        tracker.track_external(decoder)
        for p in decoder.parameters():  # gradients are reduced and go, as they come
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with tracker:
            decoder.loss(ids, ids, torch.ones(1, 2048))[0].backward()
        peak = {
            str(key).split(".")[-1]: n for key, n in next(iter(tracker.get_tracker_snapshot("peak").values())).items()
        }
    assert peak["PARAM"] == pytest.approx(2 * parameter_count(config), rel=1e-6)
    blocks = 4 * (block_activation_bytes(config, 2048) + 2048 * 2 * config.d_ff)  # eager, as above
    chunk = 2 * (2048 - 512) * config.vocab_size  # on a CPU, tokens are scored by 512
    assert peak["Total"] - peak["PARAM"] == pytest.approx(blocks + head_bytes(config, 2048) - chunk, rel=0.01)


@pytest.mark.parametrize(("dtype", "micro_batches"), [("bf16", 1), ("bf16", 2), ("fp32", 1)])
@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
def test_streaming_takes_the_disk_and_the_buffers_that_it_is_said_to(tmp_path, moments, dtype, micro_batches):
    config = model_config("crystalcoder-w64-l4").model_copy(update={"vocab_size": 96})
    section = WeightStreamingConfig(name="weight_streaming", moments=moments, dtype=dtype)
    setup = Setup(config, plan_for(config), OptimizerConfig(), lambda step: 0.01, 1, 1)
    backend = WeightStreamingBackend(setup, section, tmp_path, micro_batches)
    backend.stream.open()
    said = streaming_bytes(config, section, micro_batches)
    assert said["store"] == sum(file.stat().st_size for file in tmp_path.rglob("*.bin"))
    assert said["buffers"] == backend.stream.buffer.size
    assert run_bytes(config, section, micro_batches) == {"memory": said["buffers"], "disk": said["store"]}
    resident = section.model_copy(update={"store": "memory"})
    assert run_bytes(config, resident, micro_batches) == {"memory": said["buffers"] + said["store"], "disk": 0}


@pytest.mark.parametrize(("moments", "each"), [("fp32", 14), ("bf16", 10), ("int8", 8)])
def test_a_stores_bytes_of_the_7b_by_hand(moments, each):
    """4 of weights, 2 of bf16 gradients and the moments, a parameter; beside them a spare slot for block and embedding,
    and with int8 two scales for every 256."""
    n = parameter_count(model_config("crystalcoder-7b"))
    found = memory_bytes(model_config("crystalcoder-7b"))[f"weight_streaming, {moments} moments, store"]
    scales = 2 * 4 / 256 if moments == "int8" else 0
    spare = (201_377_108 + 131_203_072) * (each - 2 + scales)
    assert found == pytest.approx((each + scales) * n + spare, rel=1e-3)

"""Weight streaming: the `cpu` backend's numbers to the last bit, from a store, whatever its kind."""

import random
import time

import pytest
import torch

from crystal.backends.base import MicroBatch, Setup
from crystal.backends.config import CpuConfig, OptimizerConfig, WeightStreamingConfig
from crystal.backends.cpu import CpuBackend
from crystal.backends.weight_streaming import io as transfer
from crystal.backends.weight_streaming import stream
from crystal.backends.weight_streaming.backend import WeightStreamingBackend
from crystal.zoo.build import plan_for
from crystal.zoo.config import model_config


def config(name="crystalcoder", **changes):
    small = {"vocab_size": 96, "max_seq_len": 32} | changes
    return model_config(f"{name}-w64-l3").model_copy(update=small)


def common(model, optimizer=None):
    """What every backend is built from."""
    optimizer = optimizer or OptimizerConfig(eps=1e-9)
    plan = plan_for(model, weight_decay=optimizer.weight_decay, eps=optimizer.eps)
    return Setup(model, plan, optimizer, lambda step: 0.01 / step, 1, 2)


def streaming(tmp_path, model, dtype="fp32", optimizer=None, micro_batches=1, **settings):
    section = WeightStreamingConfig(name="weight_streaming", dtype=dtype, **settings)
    return WeightStreamingBackend(common(model, optimizer), section, tmp_path / "run", micro_batches)


def pair(tmp_path, model, dtype="fp32", optimizer=None, micro_batches=1, **settings):
    cpu = CpuBackend(common(model, optimizer), CpuConfig(dtype=dtype))
    made = streaming(tmp_path, model, dtype, optimizer, micro_batches, **settings)
    cpu.initialise()
    made.initialise()
    return cpu, made


def batches(step, parts=1, rows=4, length=16):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 96, (rows, length + 1), generator=generator)
    weights = torch.full((rows, length), 1 / (rows * length))
    weights[:, -step % length] = 0  # masked, as a FIM sentinel is
    documents = (tokens[:, :-1] == 7).cumsum(1)
    fields = (tokens[:, :-1], tokens[:, 1:], weights, torch.arange(rows) % 2, documents)
    return [MicroBatch(*chunk) for chunk in zip(*(f.chunk(parts) for f in fields), strict=True)]


def assert_equal(a, b, steps=20, parts=1):
    for step in range(1, steps + 1):
        data = batches(step, parts)
        assert a.train_step(step, data).host() == b.train_step(step, data).host(), step
        if step % 7 == 0:
            assert all(torch.equal(x, y) for x, y in zip(a.eval_step(data[0]), b.eval_step(data[0]), strict=True))
    left, right = dict(a.state()), dict(b.state())
    assert left.keys() == right.keys()
    assert [n for n in left if not torch.equal(left[n], right[n])] == []
    assert a.scalars() == b.scalars()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_weight_starts_at_a_multiple_of_64_bytes(tmp_path, dtype):
    """As torch's own memory does: without it a product's last bits are nobody's promise (closeness.py)."""
    made = streaming(tmp_path, config(d_ff=171), dtype)
    made.initialise()
    made.stream.open()
    for piece, flat in made.stream.weights(made.store.layout.pieces):
        assert {view.data_ptr() % 64 for view in piece.views(flat).values()} == {0}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["amber", "crystalcoder"])
@pytest.mark.usefixtures("two_threads")
def test_twenty_steps_equal_the_cpu_backends_to_the_last_bit(tmp_path, name, dtype):
    """Loss, gradient norm, losses by source, validation, weights and moments; clipped at most steps, masked labels."""
    assert_equal(*pair(tmp_path, config(name), dtype))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["amber", "crystalcoder"])
def test_accumulation_equals_the_cpu_backends_to_the_last_bit(tmp_path, name, dtype):
    """Four micro-batches: in one pass, and in two where two fit."""
    for passes, gb in ((1, 1.0), (2, {"fp32": 4e-5, "bf16": 2e-5}[dtype])):
        made = pair(tmp_path / str(passes), config(name), dtype, micro_batches=4, activations_gb=gb)
        assert len(made[1]._that_fit(batches(1, 4))) == passes
        assert_equal(*made, steps=5, parts=4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["amber", "crystalcoder"])
def test_recomputed_gradients_are_the_spilled_ones_to_the_last_bit(tmp_path, monkeypatch, name, dtype):
    """Tied and not, one micro-batch and three, chunks smaller than a piece; and no room for gradients on disk."""
    monkeypatch.setattr(stream, "CHUNK", 4096)
    monkeypatch.setattr(stream, "GRAIN", 4096)
    for parts in (1, 4):
        made = pair(tmp_path / str(parts), config(name), dtype, micro_batches=parts, gradients="recomputed")
        assert_equal(*made, steps=8, parts=parts)
        held = sum(f.stat().st_size for f in (tmp_path / str(parts) / "run" / "store").glob("*.bin"))
        assert held == made[1].store.layout.store_bytes


@pytest.mark.parametrize(
    "optimizer",
    [{"name": "adamw_cerebras"}, {"grad_clip": None}, {"decay_norms_and_biases": True, "betas": (0.8, 0.99)}],
    ids=["cerebras", "unclipped", "decay"],
)
def test_every_optimizer_setting_equals_the_cpu_backends(tmp_path, optimizer):
    assert_equal(*pair(tmp_path, config(document_mask=True), optimizer=OptimizerConfig(**optimizer)), steps=6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_neither_the_kind_of_store_nor_its_chunks_nor_its_delays_change_a_bit(tmp_path, monkeypatch, dtype):
    """Memory; pieces cut into many chunks that pass through two cells; and transfers that come late."""
    assert_equal(*pair(tmp_path / "memory", config(), dtype, store="memory"), steps=4)
    monkeypatch.setattr(stream, "CHUNK", 4096)
    monkeypatch.setattr(stream, "GRAIN", 4096)
    cpu, made = pair(tmp_path / "chunks", config(), dtype, buffers_gb=1e-6)
    assert made.stream.chunk == 4096
    late = random.Random(1)
    for method in ("pread", "pwrite"):
        original = getattr(transfer.DiskFile, method)

        def delayed(self, offset, memory, original=original):
            time.sleep(late.random() * 2e-3)
            original(self, offset, memory)

        monkeypatch.setattr(transfer.DiskFile, method, delayed)
    assert_equal(cpu, made, steps=3)

"""Parallel layouts on gloo processes of this machine: the same training as the `cpu` backend in one process.

Tolerances, fp32: sums are made in another order in every layout, no more. Relative to the reference: losses 6e-5
(closeness.py), gradient norms 3e-4 (1.5e-3 after the first step), each tensor's gradient 1e-3, its weights after three
steps of AdamW 1e-3 (AdamW divides by the gradient's size, so that a key's bias, whose gradient is all but zero, moves
by the noise in it: it is left out). With bf16 compute roundings differ too, each by up to 2^-8: losses 1.6e-2, gradient
norms 0.16, gradients 2.5e-2.
"""

import functools
import json

import pytest
import torch
from closeness import path_length, tolerance
from layouts import (
    LAYOUTS,
    LENGTH,
    MODELS,
    OPTIMIZER,
    RESHAPED,
    STEPS,
    batch,
    cuda,
    made,
    name_of,
    own,
    saver,
    together,
    train,
    worker,
)

from crystal import checkpoint
from crystal.backends.config import CpuConfig
from crystal.backends.cpu import CpuBackend
from crystal.training.guards import plan_differences

CASES = [case for cases in LAYOUTS.values() for case in cases]
FP32, BF16 = tolerance(max(path_length(model, LENGTH, STEPS) for model in MODELS.values())), 4 * 2**-8  # of losses


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory with what all cases wrote, in four processes."""
    root = tmp_path_factory.mktemp("layouts")
    together(4, worker, root)
    return root


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """reference(model, dtype) → (directory with checkpoints, numbers) of the cpu backend."""

    @functools.cache
    def of(model: str, dtype: str = "fp32"):
        directory = tmp_path_factory.mktemp(f"{model}-{dtype}")
        backend = made(model, lambda setup: CpuBackend(setup, CpuConfig(dtype=dtype)))
        backend.initialise()
        save = saver(backend, directory)
        save(0)
        return directory, train(backend, save, micro_batch_size=4)

    return of


def tensors(directory, step, prefix):
    return dict(checkpoint.read(checkpoint.step_directory(directory, step)).tensors(prefix))


def assert_close(found: dict, expected: dict, tolerance: float, floor: float = 0.0):
    """Each tensor within tolerance of its norm, or of `floor` where that is larger."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        error = (found[name] - tensor).norm() / max(tensor.norm().item(), floor)
        assert error <= tolerance, f"{name}: {error:.1e}"


def assert_same_numbers(found: dict, expected: dict, rel: float = FP32):
    """Losses within rel, gradient norms within five times as much, 25 once AdamW has divided by small gradients."""
    for step, (a, b) in enumerate(zip(found["steps"], expected["steps"], strict=True), 1):
        assert a["applied"]
        assert a["loss"] == pytest.approx(b["loss"], rel=rel), step
        times = 10 if rel == BF16 else 5 if step == 1 else 25
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=times * rel), step
        assert a["source_nll"] == pytest.approx(b["source_nll"], rel=rel), step
        assert a["source_tokens"] == b["source_tokens"], step
    assert found["eval"][0] == pytest.approx(expected["eval"][0], rel=2 * rel)
    assert found["eval"][1] == expected["eval"][1]


def numbers(directory) -> dict:
    return json.loads((directory / "numbers.json").read_text())


def ids(value) -> str:
    return value if isinstance(value, str) else name_of("", value)[1:]


@pytest.mark.parametrize(("model", "sizes", "settings"), CASES, ids=ids)
def test_a_layout_trains_as_one_process_does(trained, reference, model, sizes, settings):
    dtype = settings.get("dtype", "fp32")
    directory, (expected_in, expected) = trained / name_of(model, sizes, settings), reference(model, dtype)
    found = numbers(directory)
    assert_same_numbers(found, expected, FP32 if dtype == "fp32" else BF16)
    # the same weights at the start, to the bit
    start, expected_start = tensors(directory, 0, "model"), tensors(expected_in, 0, "model")
    assert set(start) == set(expected_start)
    assert all(torch.equal(start[name], tensor) for name, tensor in expected_start.items())
    # the first moment after one step is (1 - beta1) times the clipped gradient
    gradients = tensors(expected_in, 1, "optimizer.exp_avg")
    total = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    assert total == pytest.approx((1 - OPTIMIZER.betas[0]) * OPTIMIZER.grad_clip, rel=1e-5)
    rel = 1e-3 if dtype == "fp32" else 2.5e-2
    assert_close(tensors(directory, 1, "optimizer.exp_avg"), gradients, rel, floor=1e-3 * total)
    assert found["plan"] == []
    assert found["signal"] == [15]  # sent to the last process, known to all
    assert found["decoder"]
    graphs, breaks = found["compiled"]
    assert (graphs, breaks) == (2 if "compile" in settings else 0, {})  # training's and validation's, for all blocks
    if dtype == "fp32":
        weights, expected_weights = (
            {name: t for name, t in tensors(where, STEPS, "model").items() if not name.endswith("attn.k.bias")}
            for where in (directory, expected_in)
        )
        assert_close(weights, expected_weights, 1e-3)


@pytest.mark.parametrize(("model", "before", "after"), RESHAPED)
def test_a_checkpoint_is_read_in_another_layout(trained, reference, model, before, after):
    directory = trained / f"{name_of(model, before)}-{name_of('to', after)}"
    found, expected = numbers(directory), reference(model)[1]
    assert_same_numbers(found, expected | {"steps": expected["steps"][1:]})


def test_a_processes_file_holds_its_part_and_torch_reads_the_whole(trained):
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    directory = checkpoint.step_directory(trained / name_of("amber-l2", {"fsdp": 2, "tp": 2}), STEPS)
    saved = checkpoint.read(directory)
    assert len(saved.shards) == 4
    whole = {f"model.{name}": tensor for name, tensor in saved.tensors("model")}
    stored = sum(record["bytes"] for record in saved.shards.values())
    assert stored < 1.2 * 3 * sum(t.nbytes for t in whole.values())  # every number once, but for headers
    state = {name: torch.zeros_like(t) for name, t in whole.items()}
    load(state, storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.items())


def test_a_part_of_a_tensor_is_read_from_parts(trained):
    saved = checkpoint.read(checkpoint.step_directory(trained / name_of("amber-l2", {"fsdp": 2, "tp": 2}), STEPS))
    name = "blocks.1.mlp.down.weight"
    whole = dict(saved.tensors("model"))[name]
    region = (slice(5, 60), slice(17, 130))
    assert torch.equal(dict(saved.tensors("model", {name: region}))[name], whole[region])


def test_the_cpu_backend_goes_on_from_parts(trained, reference):
    saved = checkpoint.read(checkpoint.step_directory(trained / name_of("amber-l4", {"pp": 2, "fsdp": 2}), 1))
    backend = made("amber-l4", lambda setup: CpuBackend(setup, CpuConfig(dtype="fp32")))
    backend.load(saved.tensors, saved.state["backend"])
    found = train(backend, lambda step: None, range(2, STEPS + 1))
    expected = reference("amber-l4")[1]
    assert_same_numbers(found, expected | {"steps": expected["steps"][1:]})


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("crystalcoder-l2", {}),
        ("amber-l2", {"recompute": "attention"}),
        ("crystalcoder-l2", {"recompute": "block"}),
    ],
)
def test_one_process_is_the_cpu_backend(reference, tmp_path, model, settings):
    backend = made(model, cuda({}, **settings))
    backend.initialise()
    found = train(backend, saver(backend, tmp_path), micro_batch_size=4)
    assert_same_numbers(found, reference(model)[1])
    assert plan_differences(backend.plan, backend.groups()) == []


def test_bf16_compute_rounds_and_keeps_fp32_weights(reference):
    backend = made("amber-l2", cuda({}, dtype="bf16"))
    backend.initialise()
    first = backend.train_step(1, own(batch(1), backend.place, 4)).host()
    expected = reference("amber-l2")[1]["steps"][0]
    assert first["loss"] == pytest.approx(expected["loss"], rel=2e-2)
    assert first["loss"] != expected["loss"]
    assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-2)
    assert {part.values.dtype for _, part in backend.state()} == {torch.float32}


def test_cerebras_formula_of_adamw_in_a_layout_of_one(tmp_path):
    optimizer = OPTIMIZER.model_copy(update={"name": "adamw_cerebras"})
    results = []
    for make in (cuda({}), lambda setup: CpuBackend(setup, CpuConfig(dtype="fp32"))):
        backend = made("amber-l2", make, optimizer)
        backend.initialise()
        results.append(train(backend, lambda step: None))
    assert_same_numbers(*results)

"""Every pair of backends: the same losses, gradients and weights, each other's checkpoints, one run moved around.

Tolerances are those of test_layouts.py, which holds layouts in several processes to `cpu`; test_weight_streaming.py
holds weight streaming to its last bit.
"""

import functools
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
from cerebras_jobs import ENVIRONMENT, MISSING, curriculum
from closeness import path_length, tolerance
from layouts import STEPS, cuda, goes_on, made, saver, together, train
from test_layouts import assert_close, assert_same_numbers, tensors

from crystal import checkpoint
from crystal.backends.cerebras.bridge import CerebrasBackend
from crystal.backends.config import CerebrasConfig, CpuConfig, WeightStreamingConfig
from crystal.backends.cpu import CpuBackend
from crystal.backends.weight_streaming.backend import WeightStreamingBackend
from crystal.errors import ConfigError
from crystal.run import load_run
from crystal.training.metrics import read_metrics

NAMES = ("cpu", "cuda", "weight_streaming", "cerebras")
MODELS = ("crystalcoder-l2", "amber-l4")  # test_cerebras.py has Amber for Cerebras
CONSTANT = curriculum((10, [{"from": 0.01, "to": 0.01, "steps": 10}], []))


def make(name: str, directory):
    """make for `layouts.made`."""
    if name == "cpu":
        return lambda setup: CpuBackend(setup, CpuConfig(dtype="fp32"))
    if name == "cuda":
        return cuda({})
    if name == "weight_streaming":
        section = WeightStreamingConfig(name=name, dtype="fp32", full_checkpoints=True)
        return lambda setup: WeightStreamingBackend(setup, section, directory, 4)
    section = CerebrasConfig(name=name, environment=ENVIRONMENT, threads=1)
    return lambda setup: CerebrasBackend(replace(setup, curriculum=CONSTANT), section, directory)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(name, model) → the backend, the directory with its checkpoints, and its numbers."""
    cerebras = []

    @functools.cache
    def of(name: str, model: str):
        if name == "cerebras" and ENVIRONMENT is None:
            pytest.skip(f"cerebras.pytorch is not set up: {MISSING}")
        if name == "cerebras" and model != MODELS[0]:
            pytest.skip("Cerebras' Amber is in test_cerebras.py")
        directory = tmp_path_factory.mktemp(f"{name}-{model}")
        backend = made(model, make(name, directory))
        if name == "cerebras":
            cerebras.append(backend)
        backend.initialise()
        return SimpleNamespace(backend=backend, directory=directory, numbers=train(backend, saver(backend, directory)))

    yield of
    for backend in cerebras:
        backend.process.close()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(NAMES, 2)))
def test_two_backends_agree_on_losses_gradients_and_weights(trained, one, other, model):
    a, b = trained(one, model), trained(other, model)
    assert_same_numbers(a.numbers, b.numbers)
    found, expected = (
        {name: t for name, t in tensors(x.directory, STEPS, "model").items() if not name.endswith("attn.k.bias")}
        for x in (a, b)
    )
    assert_close(found, expected, 1e-3)


@pytest.mark.parametrize(("writer", "reader"), list(itertools.product(NAMES, repeat=2)))
def test_each_goes_on_from_the_checkpoint_of_each(trained, writer, reader):
    """Weights, moments and optimizer step after step 1: the two steps after it and the validation are the same."""
    written, backend = trained(writer, MODELS[0]), trained(reader, MODELS[0]).backend
    saved = checkpoint.read(checkpoint.step_directory(written.directory, 1))
    backend.load(saved.tensors, saved.state["backend"])
    assert backend.scalars() == {"optimizer_step": 1}
    found = train(backend, lambda step: None, range(2, STEPS + 1))
    expected = trained("cpu", MODELS[0]).numbers
    assert_same_numbers(found, expected | {"steps": expected["steps"][1:]})


@pytest.mark.proof
def test_a_run_that_moves_between_backends_has_an_unbroken_loss_curve(make_run, train, tmp_path):
    """cpu, weight streaming across a stage's end, cuda in two processes across another, cpu.

    Losses are the same to step 13, but for sums in another order; then within 1e-2 (why: test_elastic.py).
    """
    path = make_run(**{"train.micro_batch_size": 2})
    cpu = ["backend.name=cpu", "backend.dtype=fp32", "backend.threads=1"]
    whole = train(path, *cpu, f"run_dir={tmp_path / 'whole'}")
    train(path, *cpu, until=6)
    train(path, "backend.name=weight_streaming", "backend.dtype=fp32", "backend.threads=1", until=13)
    layout = ["backend.name=cuda", "backend.device=cpu", "backend.dtype=fp32", "backend.compile=false"]
    together(2, goes_on, 2, tmp_path / "meet", path, [*layout, "backend.parallel.fsdp=2"], 24)
    moved = train(path, *cpu)
    expected, found = ({r["step"]: r for r in read_metrics(run.directory)} for run in (whole, moved))
    assert list(found) == list(expected) == list(range(31))
    model = load_run(path).config.model
    for step, record in expected.items():
        for key in {"loss", "source_loss", "val_loss"} & set(record):
            rel = tolerance(path_length(model, 32, step + 1)) if step <= 13 else 1e-2
            assert found[step][key] == pytest.approx(record[key], rel=rel), (step, key)
        if step:
            assert found[step]["lr"] == record["lr"]


@pytest.mark.parametrize(
    ("started", "changes", "message"),
    [
        (2, "name=cpu", r"backend\.name: cpu trains in one process, torchrun started 2; expected cuda"),
        (2, "name=cerebras", r"backend\.name: cerebras trains in one process, torchrun started 2"),
        (3, "name=weight_streaming", r"global_batch_size: expected a multiple of the 3 processes .* got 8"),
        (1, "name=weight_streaming device=cuda", r"backend\.device=cuda: weight_streaming computes on the cpu"),
        (1, "name=cerebras device=csx", r"backend\.cluster: expected a system's mgmt_address"),
        (1, "name=cerebras dtype=bf16", r"dtype=bf16: expected fp32, in which Cerebras' CPU backend computes"),
        (1, "name=cpu dtype=fp16", r"dtype=fp16: expected .*fp32"),
        (1, "name=cpu recompute=block", r"recompute=block: unknown key"),
    ],
)
def test_what_a_backend_cannot_do_is_one_line_before_training_starts(
    make_run, train, tmp_path, monkeypatch, started, changes, message
):
    monkeypatch.setenv("WORLD_SIZE", str(started))
    with pytest.raises(ConfigError, match=message) as error:
        train(make_run(), *(f"backend.{change}" for change in changes.split()))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()

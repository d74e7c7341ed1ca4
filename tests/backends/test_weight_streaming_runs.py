"""Weight streaming under `crystal train`: runs that move between backends, die and go on; the store as checkpoint."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from dying import start_training
from runs import whole_run

from crystal import checkpoint
from crystal.errors import CheckpointError
from crystal.inference.generate import generate_text
from crystal.interop.huggingface import export_published
from crystal.training.metrics import read_metrics

STREAMING = {"backend": {"name": "weight_streaming", "dtype": "fp32", "threads": 1}}
CPU = {"backend": {"name": "cpu", "dtype": "fp32", "threads": 1}}


def losses(run_dir: Path) -> list[tuple]:
    keys = ("step", "stage", "loss", "lr", "grad_norm", "source_loss")
    return [tuple(json.dumps(r.get(k)) for k in keys) for r in read_metrics(run_dir)]


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint.read(checkpoint.locate(run_dir))
    return {f"{p}.{n}": t for p in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq") for n, t in saved.tensors(p)}


def assert_same_run(a: Path, b: Path) -> None:
    assert losses(a) == losses(b)
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    assert [n for n in left if not torch.equal(left[n], right[n])] == []


@pytest.fixture(scope="module")
def on_cpu(corpus, tmp_path_factory):
    """The run on the `cpu` backend, three stages, the last with a fresh optimizer."""
    return whole_run(corpus, tmp_path_factory.mktemp("cpu"), **CPU)


def test_a_run_that_moves_between_backends_has_an_unbroken_loss_curve(make_run, train, on_cpu):
    """cpu, weight_streaming across a stage's end, cpu, weight_streaming: bit for bit the run on cpu alone."""
    for sections, until in ((CPU, 6), (STREAMING, 15), (CPU, 19), (STREAMING, 30)):
        path = make_run(**sections)
        assert train(path, until=until).step == until
    assert_same_run(path.parent / "run", on_cpu)


def test_the_store_is_the_checkpoint_and_only_the_newest_refers_to_it(make_run, train, on_cpu):
    path = make_run(**STREAMING)
    run_dir = train(path).directory
    assert_same_run(run_dir, on_cpu)
    assert checkpoint.steps(run_dir / "checkpoints") == [30]
    assert not list(run_dir.glob("checkpoints/*/*.safetensors"))
    text = generate_text(run_dir, "the", None, 4, 0.0, None, None, 0)["text"]
    assert text == generate_text(on_cpu, "the", None, 4, 0.0, None, None, 0)["text"]
    moved = shutil.move(run_dir, path.parent / "moved")
    assert len(list(export_published(moved, path.parent / "out", "safetensors").glob("*.safetensors"))) == 1


def test_full_checkpoints_on_demand(make_run, train):
    path = make_run(backend=STREAMING["backend"] | {"full_checkpoints": True})
    run_dir = train(path, until=12).directory
    assert checkpoint.steps(run_dir / "checkpoints") == [4, 8, 10, 12]
    assert all(list(p.glob("*.safetensors")) for p in run_dir.glob("checkpoints/*"))


def test_a_reference_to_a_store_that_moved_on_is_refused(make_run, train):
    path = make_run(**STREAMING)
    run_dir = train(path, until=4).directory
    kept = shutil.copytree(checkpoint.locate(run_dir), run_dir / "checkpoints" / "kept")
    train(path, until=6)
    with pytest.raises(CheckpointError, match="expected the store at step 4, it is at step 6"):
        list(checkpoint.read(kept).tensors("model"))
    shutil.rmtree(run_dir / "store")
    with pytest.raises(CheckpointError, match="expected the store that holds step 6, none is there"):
        list(checkpoint.read(checkpoint.locate(run_dir)).tensors("model"))


LAST = {"gradients": 20, "state": 90, "record": 25, "boundaries": 4}  # the write to be killed at, at most


@pytest.mark.parametrize(
    ("gradients", "wheres"),
    [
        ("spilled", ["gradients"] * 3),
        ("spilled", ["state"] * 3),
        ("spilled", ["record"] * 3),
        ("recomputed", ["state", "boundaries", "record", "state"]),
    ],
    ids=["gradients", "state", "record", "recomputed"],
)
def test_killed_while_the_store_is_written_it_goes_on_to_the_same_run(make_run, on_cpu, gradients, wheres):
    """kill -9 half-way through spilled gradients, through updated weights, and before each record that seals them."""
    path = make_run(backend=STREAMING["backend"] | {"gradients": gradients})
    rng = random.Random(gradients + wheres[0])
    for where in wheres:
        process = start_training(path, where, rng.randint(3, LAST[where]))
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert len(losses(path.parent / "run")) < 31
    finish(path)
    assert_same_run(path.parent / "run", on_cpu)


def test_killed_at_any_time_it_loses_one_step_at_most(make_run, on_cpu):
    # no validation on the way: it seals the store first, and the step is recorded when its losses are there
    path = make_run(**STREAMING, **{"train.eval_every": 1000})
    run_dir, rng = path.parent / "run", random.Random(5)
    for _ in range(3):
        target = len(losses(run_dir)) + rng.randint(1, 4)
        process = start_training(path)
        while process.is_alive() and len(losses(run_dir)) < target:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.join()
        recorded = [r["step"] for r in read_metrics(run_dir)][-1]
        stands = json.loads((run_dir / "store" / "store.json").read_text())["step"]
        assert recorded - 1 <= stands <= recorded
    finish(path)
    assert_same_run(run_dir, on_cpu)


def finish(path: Path) -> None:
    process = start_training(path)
    process.join()
    assert process.exitcode == 0

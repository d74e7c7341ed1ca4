"""TensorBoard as a reader of metrics.jsonl: groups of tags, hyperparameters, curves without holes."""

import time

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crystal.run import load_run
from crystal.training.metrics import Metrics, hyperparameters, read_metrics


def record(step):
    found = {
        "step": step, "stage": 1, "loss": 5 + 1 / step, "lr": 0.01, "grad_norm": 1.0, "applied": True,
        "tokens": 4096 * step, "tokens_per_second": 1e4, "source_loss": {"english": 5.0, "html": None},
    }  # fmt: skip
    return found | ({"val_loss": {"english": 4.0, "html": 7.0}} if step % 5 == 0 else {})


def board(run_dir):
    found = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    return found.Reload()


def test_tags_are_grouped_and_validation_has_a_total(tmp_path):
    metrics = Metrics(tmp_path, None)
    metrics.write({"step": 0, "stage": 1, "val_loss": {"english": 9.0, "html": 11.0, "css": float("nan")}})
    for step in range(1, 6):
        metrics.write(record(step))
    metrics.close()
    found = board(tmp_path)
    assert set(found.Tags()["scalars"]) == {
        "train/loss", "train/lr", "train/grad_norm", "train/applied", "train/tokens", "train/source_loss/english",
        "perf/tokens_per_second", "validation/loss", "validation/source_loss/english", "validation/source_loss/html",
    }  # fmt: skip
    assert [(s.step, s.value) for s in found.Scalars("validation/loss")] == [(0, 10.0), (5, 5.5)]
    lines = list(read_metrics(tmp_path))
    assert [r.get("val_loss_mean") for r in lines] == [10.0, None, None, None, None, 5.5]
    assert lines[0]["val_loss"] == {"english": 9.0, "html": 11.0, "css": None}
    assert record(5).items() <= lines[5].items(), "what a step recorded keeps its keys"


@pytest.mark.parametrize("resumed", [None, 10])
def test_a_run_that_was_killed_goes_on_without_a_hole_or_a_second_value(tmp_path, resumed):
    """The first writer is never closed, as if by kill -9; what it wrote is there all the same."""
    killed = Metrics(tmp_path, None)
    killed.write({"step": 0, "stage": 1, "val_loss": {"english": 9.0}})
    for step in range(1, 14):
        killed.write(record(step))
    time.sleep(1.1)  # event files are read in the order of their names, which begin with the second
    again = Metrics(tmp_path, resumed)
    if resumed is None:
        again.write({"step": 0, "stage": 1, "val_loss": {"english": 9.0}})
    for step in range((resumed or 0) + 1, 21):
        again.write(record(step))
    again.close()
    found = board(tmp_path)
    assert [s.step for s in found.Scalars("train/loss")] == list(range(1, 21))
    assert [s.step for s in found.Scalars("validation/loss")] == [0, 5, 10, 15, 20]
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(21))
    killed.close()


def test_hyperparameters_are_those_of_the_runs_config(tmp_path):
    assert hyperparameters(tmp_path) == {}
    config = load_run("demo", ["curriculum.lr_scale=0.5"]).config
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True)))
    found = hyperparameters(tmp_path)
    assert found["lr"] == pytest.approx(0.006)
    assert (found["d_model"], found["n_layers"], found["batch"], found["seq_len"]) == (128, 4, 16, 256)
    assert found["parametrization"] == "crystalcoder"
    Metrics(tmp_path, None).close()
    assert "_hparams_/session_start_info" in board(tmp_path).summary_metadata

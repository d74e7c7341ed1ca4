"""A run from one end to the other, and what it leaves behind."""

import json

import pytest
import torch
import yaml

from crystal.errors import ConfigError, RunError
from crystal.training.metrics import Metrics, read_metrics


def test_a_run_learns_each_stages_sources_and_records_itself(make_run, train):
    path = make_run()
    run_dir = train(path).directory
    records = list(read_metrics(run_dir))
    assert [r["step"] for r in records] == list(range(31))
    val = {r["step"]: r["val_loss"] for r in records if "val_loss" in r}
    assert {0, 10, 22, 30} <= set(val)
    assert val[10]["english"] < val[0]["english"]
    assert val[22]["python"] < val[10]["python"] - 2  # code arrives with stage 2
    assert val[30]["html"] < val[22]["html"]
    assert set(records[5]["source_loss"]) == {"english"}
    assert set(records[25]["source_loss"]) == {"python", "html"}

    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert {row["tensor"] for row in manifest["plan"]["tensors"]} >= {"embed.weight", "blocks.1.mlp.down.weight"}
    assert manifest["packages"]["torch"] == torch.__version__.split("+")[0] or manifest["packages"]["torch"]
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["d_model"] == 32
    events = [json.loads(line)["event"] for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert events[0] == "start"
    assert events[-1] == "stop"
    assert events.count("stage") == 3
    assert (run_dir / "loss.png").stat().st_size > 10_000
    assert list((run_dir / "tensorboard").glob("events*"))


def test_the_lr_that_was_used_is_the_schedules(make_run, train):
    run_dir = train(make_run()).directory
    used = {r["step"]: r["lr"] for r in read_metrics(run_dir) if "lr" in r}
    assert used[1] == pytest.approx(0.005)
    assert used[2] == pytest.approx(0.01)
    assert used[10] == pytest.approx(0.001)
    assert used[11] == pytest.approx(0.004)
    assert used[30] == pytest.approx(0.0002)


def test_only_the_newest_checkpoints_and_the_ends_of_stages_are_kept(make_run, train):
    from crystal import checkpoint

    path = make_run(**{"train.keep_checkpoints": 1, "train.checkpoint_every": 2})
    run_dir = train(path, until=29).directory
    assert checkpoint.steps(run_dir / "checkpoints") == [10, 22, 29]


def test_the_vocabulary_must_be_the_tokenizers(make_run, train):
    with pytest.raises(ConfigError, match=r"model\.vocab_size: expected 352, the tokenizer's .*, got 384"):
        train(make_run(**{"model.vocab_size": 384}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.micro_batch_size": 3}, r"train\.micro_batch_size: expected a divisor of .* 8, got 3"),
        ({"curriculum.seq_len": 128}, r"curriculum\.seq_len: expected at most model\.max_seq_len 64"),
        ({"name": "a/b"}, "name: expected"),
    ],
)
def test_impossible_runs_are_one_line(make_run, train, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(make_run(**changes))


def test_a_loss_that_is_not_finite_is_left_out_and_stops_the_run(make_run, train):
    path = make_run(**{"train.max_bad_steps": 2})
    with pytest.raises(RunError, match=r"3 steps in a row .* not finite"):
        train(path, "model.mup.init_std=1e9", "model.n_layers=3")
    records = list(read_metrics(path.parent / "run"))
    assert [r["applied"] for r in records[1:]] == [False] * 3
    assert records[-1]["loss"] is None  # not NaN, which is no JSON


def test_metrics_survive_a_torn_line_and_drop_what_comes_after_the_resumed_step(tmp_path):
    metrics = Metrics(tmp_path, None)
    for step in range(1, 6):
        metrics.write({"step": step, "loss": 1.0 / step})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    Metrics(tmp_path, 3).close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["loss"] == 1 / 3

"""Whatever happens to a run, it goes on to the same losses, bit for bit."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from dying import start_command
from runs import whole_run

from crystal import checkpoint
from crystal.errors import CheckpointError, ConfigError, DataError, RunError
from crystal.training.metrics import read_metrics

STEPS = 30


def losses(run_dir: Path) -> list[tuple]:
    """Everything numeric that a run recorded, but for times."""
    keys = ("step", "stage", "loss", "lr", "grad_norm", "source_loss", "val_loss")
    return [tuple(json.dumps(r.get(k)) for k in keys) for r in read_metrics(run_dir)]


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint.read(checkpoint.locate(run_dir))
    return {f"{p}.{n}": t for p in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq") for n, t in saved.tensors(p)}


def assert_same_run(a: Path, b: Path) -> None:
    assert losses(a) == losses(b)
    left, right = final_tensors(a), final_tensors(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[n], right[n]) for n in left)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """An uninterrupted run, made with one thread as the commands are."""
    return whole_run(corpus, tmp_path_factory.mktemp("whole"))


def finish(path, prints) -> None:
    process = start_command("train", path, prints=prints)
    process.join()
    assert process.exitcode == 0, prints.read_text()


def test_a_run_killed_five_times_equals_the_uninterrupted_one(make_run, whole):
    """kill -9 at random points, every other time in the middle of writing a checkpoint."""
    path = make_run()
    run_dir, prints = path.parent / "run", path.parent / "prints"
    rng, kills = random.Random(7), 0
    for kill in range(5):
        done = len(list(read_metrics(run_dir)))
        target = done + rng.randint(1, 5)
        process = start_command("train", path, prints=prints)
        while process.is_alive():
            lines = (run_dir / "metrics.jsonl").read_text().count("\n") if (run_dir / "metrics.jsonl").exists() else 0
            writing = any((run_dir / "checkpoints").glob(".tmp-*")) if kill % 2 else True
            if lines >= target and writing:
                break
            time.sleep(0.0005 if lines >= target else 0.005)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:  # this process had not the time to see its last checkpoints being written
            break
    assert kills > 1, prints.read_text()
    finish(path, prints)
    assert_same_run(run_dir, whole)
    assert not list((run_dir / "checkpoints").glob(".tmp-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_exits_130(make_run, whole, number):
    path = make_run()
    run_dir, prints = path.parent / "run", path.parent / "prints"
    process = start_command("train", path, prints=prints)
    while process.is_alive() and len(list(read_metrics(run_dir))) < 7:
        time.sleep(0.001)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 130, prints.read_text()
    assert "Traceback" not in prints.read_text()
    last = list(read_metrics(run_dir))[-1]["step"]
    assert checkpoint.steps(run_dir / "checkpoints")[-1] == last
    assert 6 <= last < STEPS
    finish(path, prints)
    assert [r for r in losses(run_dir) if r[0] != str(last)] == [r for r in losses(whole) if r[0] != str(last)]


def test_stage_by_stage_equals_all_at_once(make_run, train, whole):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = make_run()
    assert [train(path, stage=s).step for s in (1, 2, 3)] == [10, 22, 30]
    torch.set_num_threads(threads)
    assert_same_run(path.parent / "run", whole)


def test_a_finished_stage_is_left_as_it_is(make_run, train):
    path = make_run()
    train(path)
    before = losses(path.parent / "run")
    assert train(path, stage=2).step == 22
    assert train(path).step == STEPS
    assert losses(path.parent / "run") == before


def test_a_stage_needs_the_end_of_the_one_before(make_run, train):
    path = make_run()
    with pytest.raises(CheckpointError, match="end of stage 1, step 10; train that stage first"):
        train(path, stage=2)
    train(path, until=9)
    with pytest.raises(CheckpointError, match="train that stage first"):
        train(path, stage=2)


def test_a_chunks_order_does_not_depend_on_where_one_resumed(make_run):
    """A published mistake: the shuffle's seed was the number of the last checkpoint."""
    from crystal.curriculum.resolve import resolve
    from crystal.data.store import TokenStore
    from crystal.run import load_run, prepare_run
    from crystal.training.batches import Batches

    run = load_run(make_run())
    store = TokenStore.open(prepare_run(run))
    curriculum = resolve(run.config.curriculum, run.source, store.sources)

    def from_(first: int) -> list:
        made = Batches(curriculum, store, 1, 4)
        return [b.ids_BT for batches in made.ahead(first, STEPS - 1) for b in batches]

    full, resumed = from_(0), from_(17)
    assert all(torch.equal(a, b) for a, b in zip(full[-len(resumed) :], resumed, strict=True))


def test_moments_carry_into_stage_two_and_not_into_stage_three(make_run, train):
    path = make_run()
    run_dir = train(path).directory
    ends = {s: checkpoint.read(checkpoint.locate(run_dir, s)).state for s in (1, 2, 3)}
    assert [ends[s]["backend"]["optimizer_step"] for s in (1, 2, 3)] == [10, 22, 8]
    entered = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [e["optimizer_carried"] for e in entered if e["event"] == "stage"] == [False, True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.weight_decay": 0.2}, r"optimizer\.weight_decay: .* made with 0\.1, .* now says 0\.2"),
        ({"train.seed": 5}, r"train\.seed: .* made with 1, .* now says 5"),
    ],
)
def test_a_run_goes_on_only_as_what_it_was(make_run, train, changes, message):
    train(make_run(), until=3)
    with pytest.raises(ConfigError, match=message):
        train(make_run(**changes), until=4)


def test_changed_data_is_noticed(make_run, train):
    path = make_run()
    train(path, until=3)
    manifest = path.parent / "run" / "manifest.json"
    record = json.loads(manifest.read_text())
    record["data"]["store"] = "0" * 64
    manifest.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="was made from the token store 0000000000000000"):
        train(path)


def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(make_run, train):
    path = make_run()
    run_dir = train(path, until=6).directory
    before = (run_dir / "metrics.jsonl").read_bytes()
    shard = checkpoint.locate(run_dir) / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"shard-00001\.safetensors: expected sha256"):
        train(path)
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_two_processes_do_not_train_in_one_directory(make_run, train):
    from crystal.training.guards import alone_in

    path = make_run()
    run_dir = train(path, until=3).directory
    with alone_in(run_dir), pytest.raises(RunError, match="another process is training in it"):
        train(path, until=4)
    assert train(path, until=4).step == 4


def test_weights_that_may_be_ruined_replace_nothing_good(make_run, train):
    path = make_run(**{"train.max_bad_steps": 4, "train.checkpoint_every": 1, "train.keep_checkpoints": 1})
    jump = "curriculum.stages.english.lr=[{from: 0.01, to: 0.01, steps: 3}, {from: 1000, to: 1000, jump: true}]"
    with pytest.raises(RunError, match="not finite"):
        train(path, jump, "optimizer.weight_decay=1000")  # which multiplies weights by a million a step
    run_dir = path.parent / "run"
    last_applied = max(r["step"] for r in read_metrics(run_dir) if r.get("applied"))
    assert checkpoint.steps(run_dir / "checkpoints") == [last_applied]


def test_a_copy_of_a_checkpoint_is_no_checkpoint(make_run, train):
    import shutil

    path = make_run()
    checkpoints = train(path, until=4).directory / "checkpoints"
    shutil.copytree(checkpoints / "step-0000004", checkpoints / "step-0000004.bak")
    assert checkpoint.steps(checkpoints) == [4]
    assert train(path, until=5).step == 5


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.yaml", "model: ["), ("config.yaml", ""), ("manifest.json", "{}"), ("manifest.json", "{")],
)
def test_a_damaged_run_directory_is_named(make_run, train, file, content):
    path = make_run()
    run_dir = train(path, until=2).directory
    (run_dir / file).write_text(content)
    with pytest.raises((ConfigError, DataError, RunError), match=file):
        train(path, until=3)


def test_a_stage_without_data_is_found_before_training(make_run, train):
    path = make_run()
    with pytest.raises(ConfigError, match=r"expected rows in python\[0\.0-0\.00001\]"):
        train(path, "curriculum.bind={python: 'python[0.0-0.00001]'}")
    assert not (path.parent / "run").exists()


def test_the_compute_dtype_belongs_to_the_run(make_run, train):
    path = make_run()
    train(path, until=2)
    with pytest.raises(ConfigError, match=r"backend\.dtype: .* made with 'bf16'"):
        train(path, "backend.dtype=fp32", until=3)
    assert train(path, "backend.threads=1", until=3).step == 3

"""A run under torchrun: a process that dies, and everything starts again from the last sealed checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crystal.config import ConfigError
from crystal.run import load_run
from crystal.training import checkpoint
from crystal.training.metrics import read_metrics

CPU = ["backend.dtype=fp32", "backend.threads=1"]
LAYOUT = ["backend.name=cuda", "backend.device=cpu", "backend.dtype=fp32", "backend.compile=false"]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def events(run_dir: Path) -> list[dict]:
    path = run_dir / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, process, seconds: float = 240):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "torchrun ended too early"
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)


def test_a_killed_process_costs_the_steps_since_the_last_checkpoint_and_no_more(make_run, train, tmp_path):
    path = make_run(**{"train.checkpoint_every": 3, "train.micro_batch_size": 2})
    whole = train(path, *CPU, until=16)
    run_dir = tmp_path / "two"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
        "--monitor-interval", "0.1", "-m", "crystal.cli", "train", str(path), *LAYOUT, "backend.parallel.fsdp=2",
        f"run_dir={run_dir}", "--until", "16", "--json",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        wait_for(lambda: any(e["event"] == "checkpoint" for e in events(run_dir)), process)
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert json.loads(out)["step"] == 16  # one object: only the first process prints
    starts = [e["step"] for e in events(run_dir) if e["event"] == "start"]
    assert starts[0] == 0
    assert len(starts) == 2
    assert starts[1] in [e["step"] for e in events(run_dir) if e["event"] == "checkpoint"]
    expected, found = ({r["step"]: r for r in read_metrics(d)} for d in (whole.directory, run_dir))
    assert list(found) == list(expected)
    for step, record in expected.items():
        if step:
            assert found[step]["loss"] == pytest.approx(record["loss"], rel=1e-3)
            assert found[step]["source_loss"] == pytest.approx(record["source_loss"], rel=1e-3)
        if "val_loss" in record:
            assert found[step]["val_loss"] == pytest.approx(record["val_loss"], rel=1e-3)
    # and one process takes the run over, from shards of two
    assert len(checkpoint.read(checkpoint.locate(run_dir)).shards) == 2
    after = train(path, *CPU, f"run_dir={run_dir}", until=20)
    train(path, *CPU, until=20)
    expected, found = ({r["step"]: r for r in read_metrics(d)} for d in (whole.directory, after.directory))
    assert [found[s]["loss"] for s in range(17, 21)] == pytest.approx(
        [expected[s]["loss"] for s in range(17, 21)], rel=1e-3
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["backend.parallel.tp=4"], r"backend\.parallel\.tp: expected a divisor of model\.n_heads 2, got 4"),
        (["backend.parallel.pp=2"], r"backend\.parallel\.pp: 2 processes with interleave 2 make 4 stages"),
        (["backend.parallel.dp=4"], r"train\.micro_batch_size: expected a divisor .* got 4"),
        (
            ["backend.parallel.pp=2", "backend.parallel.interleave=1", "train.micro_batch_size=8"],
            r"backend\.parallel\.pp: expected a divisor of the 1 micro-batches",
        ),
    ],
)
def test_what_a_layout_cannot_do_is_refused_when_the_run_is_read(make_run, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_run(make_run(), [*LAYOUT, *changes])
    assert "\n" not in str(error.value)


def test_a_layout_of_other_processes_than_there_are_is_refused(make_run, train, tmp_path):
    message = r"backend\.parallel: expected a layout of the 1 processes .* fsdp 2 .* = 2"
    with pytest.raises(ConfigError, match=message):
        train(make_run(), *LAYOUT, "backend.parallel.fsdp=2")
    assert not (tmp_path / "run").exists()


def test_without_a_gpu_the_default_device_is_refused(make_run, train, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"backend\.device: expected a CUDA device, .* set backend\.device=cpu"):
        train(make_run(), "backend.name=cuda")

"""Checkpoints: whole or not there, fp32, checked, and readable by torch.distributed.checkpoint."""

import json

import pytest
import torch

from crystal import checkpoint
from crystal.errors import CheckpointError

TENSORS = {"model.a": torch.randn(40, 30), "model.b": torch.randn(7), "optimizer.exp_avg.a": torch.randn(40, 30)}


def saved(tmp_path, tensors=TENSORS, **state):
    return checkpoint.write(tmp_path / "step-0000001", tensors.items(), {"step": 1} | state)


def test_what_was_written_comes_back(tmp_path):
    read = checkpoint.read(saved(tmp_path, stage="english"))
    assert read.state == {"step": 1, "stage": "english"}
    assert {n: t.tolist() for n, t in read.tensors("model")} == {n: TENSORS[f"model.{n}"].tolist() for n in "ab"}
    assert [n for n, _ in read.tensors("optimizer.exp_avg")] == ["a"]


def test_large_checkpoints_are_split_into_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 5000)
    read = checkpoint.read(saved(tmp_path))
    assert len(read.shards) == 2
    assert {n for n, _ in read.tensors("model")} == {"a", "b"}


def test_weights_are_never_saved_in_bf16(tmp_path):
    """A published mistake: early Amber checkpoints hold bf16 weights."""
    with pytest.raises(ValueError, match=r"a checkpoint holds fp32, got torch\.bfloat16"):
        saved(tmp_path, {"model.a": torch.zeros(2, dtype=torch.bfloat16)})


def test_a_writer_that_fails_leaves_nothing_under_the_name(tmp_path):
    def broken():
        yield "model.a", torch.zeros(3)
        raise OSError("disk full")

    with pytest.raises(CheckpointError, match="cannot be written: disk full"):
        checkpoint.write(tmp_path / "step-0000001", broken(), {})
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_not_a_checkpoint(tmp_path):
    saved(tmp_path)
    (tmp_path / "step-0000001").rename(tmp_path / ".tmp-step-0000002")
    assert checkpoint.steps(tmp_path) == []
    checkpoint.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "seal", "format"])
def test_damage_is_named(tmp_path, damage):
    directory = saved(tmp_path)
    shard, seal = directory / "shard-00001.safetensors", directory / checkpoint.SEAL
    data = shard.read_bytes()
    if damage == "cut":
        shard.write_bytes(data[:-10])
    elif damage == "changed":
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "missing":
        shard.unlink()
    elif damage == "seal":
        seal.write_text(seal.read_text()[:50])
    else:
        seal.write_text(json.dumps(json.loads(seal.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError) as error:
        list(checkpoint.read(directory).tensors("model"))
    assert (checkpoint.SEAL if damage in ("seal", "format") else shard.name) in str(error.value)


def test_torch_distributed_checkpoint_reads_it(tmp_path):
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    directory = saved(tmp_path)
    state = {name: torch.zeros_like(t) for name, t in TENSORS.items()}
    load(state, storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)
    assert all(torch.equal(state[n], t) for n, t in TENSORS.items())


def test_a_run_directory_leads_to_its_newest_checkpoint_or_a_stages_end(tmp_path):
    for step, ended in ((1, None), (2, 1), (3, None)):
        target = checkpoint.step_directory(tmp_path / "checkpoints", step)
        checkpoint.write(target, TENSORS.items(), {"step": step, "stage_ended": ended})
    assert checkpoint.locate(tmp_path).name == "step-0000003"
    assert checkpoint.locate(tmp_path, stage=1).name == "step-0000002"
    with pytest.raises(CheckpointError, match="the checkpoint at the end of stage 2"):
        checkpoint.locate(tmp_path, stage=2)
    with pytest.raises(CheckpointError, match="expected a checkpoint"):
        checkpoint.locate(tmp_path / "nowhere")

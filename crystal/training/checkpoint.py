"""Checkpoints: a directory of safetensors shards and one `checkpoint.json` that seals them.

Tensors are named `model.NAME`, `optimizer.exp_avg.NAME`, `optimizer.exp_avg_sq.NAME`, always fp32, and arrive
one at a time, so that a 7B model passes through a shard's worth of memory. Every backend writes and reads this
one format; torch.distributed.checkpoint reads it too (HuggingFaceStorageReader), whatever the layout.

A checkpoint is written aside, each file fsynced, `checkpoint.json` last, and the directory then renamed into
place: what carries its final name is whole. Reading checks every shard's size and sha256.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from crystal.config import ConfigError
from crystal.files import sha256_of, sync

SEAL = "checkpoint.json"
SHARD_BYTES = 1 << 30
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A sealed checkpoint: its directory, the state saved with it, and the shards' records."""

    directory: Path
    state: dict
    shards: dict[str, dict]  # file → {bytes, sha256, tensors}

    def tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """(name without the prefix, fp32 tensor) of all tensors under `prefix.`, one at a time.

        Raises ConfigError when a shard's bytes are not those that were saved.
        """
        for file, record in self.shards.items():
            wanted = [name for name in record["tensors"] if name.startswith(prefix + ".")]
            if not wanted:
                continue
            path = self.directory / file
            if sha256_of(path) != record["sha256"]:
                raise ConfigError(f"{path}: expected sha256 {record['sha256'][:16]}…, the file has changed")
            with safe_open(path, framework="pt") as shard:
                for name in wanted:
                    yield name.removeprefix(prefix + "."), shard.get_tensor(name)


def write(directory: Path, tensors: Iterable[tuple[str, Tensor]], state: dict, files: Iterable[Path] = ()) -> Path:
    """Write a checkpoint at `directory` (replacing nothing: an existing one is left, and an error).

    state: JSON-ready; files: copied in beside the shards (the tokenizer).
    Raises ConfigError when the disk is full or not writable, leaving nothing under the final name; ValueError
    for a tensor that is not fp32 (the published Amber run saved bf16 weights: never again).
    """
    aside = directory.with_name(f".tmp-{directory.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        shards = dict(_write_shards(aside, tensors))
        for file in files:
            shutil.copyfile(file, aside / file.name)
            sync(aside / file.name)
        seal = {"format": FORMAT, "state": state, "shards": shards}
        (aside / SEAL).write_text(json.dumps(seal, indent=1), encoding="utf-8")
        sync(aside / SEAL)
        sync(aside)
        os.rename(aside, directory)
        sync(directory.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise ConfigError(f"{directory}: the checkpoint cannot be written: {error}") from None
    return directory


def _write_shards(aside: Path, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, dict]]:
    shard: dict[str, Tensor] = {}
    size = 0
    number = 0

    def flush() -> tuple[str, dict]:
        path = aside / f"shard-{number:05d}.safetensors"
        save_file(shard, path)
        sync(path)
        return path.name, {"bytes": path.stat().st_size, "sha256": sha256_of(path), "tensors": list(shard)}

    for name, tensor in tensors:
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name}: a checkpoint holds fp32, got {tensor.dtype}")
        if shard and size + tensor.nbytes > SHARD_BYTES:
            number += 1
            yield flush()
            shard, size = {}, 0
        shard[name] = tensor.detach().contiguous()
        size += tensor.nbytes
    if shard:
        number += 1
        yield flush()


def read(directory: Path) -> Checkpoint:
    """Open a checkpoint; shards are checked for size here and for content when their tensors are read.

    Raises ConfigError naming the file that is missing, cut short or of another format.
    """
    path = Path(directory) / SEAL
    try:
        seal = json.loads(path.read_text(encoding="utf-8"))
        state, shards, version = seal["state"], seal["shards"], seal["format"]
    except FileNotFoundError:
        raise ConfigError(f"{directory}: expected a checkpoint directory, but {SEAL} is not there") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: expected a checkpoint's seal: {error}") from None
    if version != FORMAT:
        raise ConfigError(f"{path}: expected format {FORMAT}, got {version}")
    for file, record in shards.items():
        size = (path.parent / file).stat().st_size if (path.parent / file).is_file() else None
        if size != record["bytes"]:
            raise ConfigError(f"{path.parent / file}: expected {record['bytes']} bytes, got {size or 'no file'}")
    return Checkpoint(Path(directory), state, shards)


def step_directory(checkpoints: Path, step: int) -> Path:
    """checkpoints/step-NNNNNNN."""
    return checkpoints / f"step-{step:07d}"


def steps(checkpoints: Path) -> list[int]:
    """Steps of all sealed checkpoints under a run's `checkpoints/`, ascending."""
    found = (re.fullmatch(r"step-(\d{7,})", p.name) for p in checkpoints.glob("step-*") if (p / SEAL).is_file())
    return sorted(int(match[1]) for match in found if match)


def sweep(checkpoints: Path) -> None:
    """Remove what a killed writer left aside."""
    for aside in checkpoints.glob(".tmp-*"):
        shutil.rmtree(aside, ignore_errors=True)


def remove(directory: Path) -> None:
    """Take a checkpoint away; killed half-way, what is left does not look like one."""
    aside = directory.with_name(f".tmp-{directory.name}")
    os.rename(directory, aside)
    shutil.rmtree(aside)


def locate(path: Path, stage: int | None = None) -> Path:
    """The checkpoint meant by `path`: itself, or in a run directory the latest, or the end of a stage (from 1).

    Raises ConfigError when there is none.
    """
    if (path / SEAL).is_file():
        return path
    checkpoints = path / "checkpoints"
    found = [step_directory(checkpoints, s) for s in steps(checkpoints)]
    if stage is not None:
        found = [p for p in found if read(p).state.get("stage_ended") == stage]
    if not found:
        what = "a checkpoint" if stage is None else f"the checkpoint at the end of stage {stage}"
        raise ConfigError(f"{path}: expected {what}, or a run directory that holds one")
    return found[-1]

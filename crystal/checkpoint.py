"""Checkpoints: a directory of safetensors shards and one `checkpoint.json` that seals them.

Tensors are named `model.NAME`, `optimizer.exp_avg.NAME`, `optimizer.exp_avg_sq.NAME`, always fp32, and arrive
one at a time, so that a 7B model passes through a shard's worth of memory. Every backend writes and reads this
one format; torch.distributed.checkpoint reads it too (HuggingFaceStorageReader), whatever the layout.

Where several processes hold a tensor together, each writes shards of its own with its part, and the seal says which
rectangle of the whole that is (format 2; without such parts it is format 1). Reading puts them together again, or
takes no more of them than is asked for, so a checkpoint can be read in any layout.

Where the backend's weights lie on disk anyway, a checkpoint may refer to its store instead of having shards (format 3).
It is good until the store moves on, and is taken away then.

A checkpoint is written aside, each file fsynced, `checkpoint.json` last, and the directory then renamed into
place: what carries its final name is whole. Reading checks every shard's size and sha256.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from crystal.backends.base import Part
from crystal.config import parse
from crystal.errors import CheckpointError
from crystal.files import sha256_of, sync
from crystal.zoo.build import plan_for
from crystal.zoo.config import ModelConfig

SEAL = "checkpoint.json"
SHARD_BYTES = 1 << 30
WHOLE, PARTS, STORE = 1, 2, 3  # formats: every tensor in one piece, some in parts, all in a backend's store


@dataclass(frozen=True)
class Checkpoint:
    """A sealed checkpoint: its directory, the state saved with it, and the shards' records."""

    directory: Path
    state: dict
    shards: dict[str, dict]  # file → {bytes, sha256, tensors, parts: {tensor: {offset, size, shape}} where it has any}
    store: Path | None = None  # where the tensors are if there are no shards
    _checked: set[str] = field(default_factory=set, repr=False, compare=False)

    def tensors(
        self, prefix: str, wanted: Mapping[str, tuple[slice, ...]] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """(name without the prefix, fp32 tensor) of all tensors under `prefix.`, one at a time.

        wanted: only these names, and of each only what lies in its slices (with numbers for start and stop).
        Raises CheckpointError when a shard's bytes are not those that were saved, or a part is missing.
        """
        if self.store is not None:
            for name, tensor in _in_store(self, prefix):
                if wanted is None or name in wanted:
                    yield name, tensor if wanted is None else tensor[wanted[name]]
            return
        holders: dict[str, list[str]] = {}
        for file, record in self.shards.items():
            for key in record["tensors"]:
                if key.startswith(prefix + ".") and (wanted is None or key.removeprefix(prefix + ".") in wanted):
                    holders.setdefault(key, []).append(file)
        opened: dict[str, safe_open] = {}
        for key, files in holders.items():
            for file in opened.keys() - files:  # a mapped file counts as memory as far as it was read
                del opened[file]
            name = key.removeprefix(prefix + ".")
            yield name, self._read(key, files, None if wanted is None else wanted[name], opened)

    def _read(self, key: str, files: list[str], region: tuple[slice, ...] | None, opened: dict):
        """A tensor, or a region of it, from the shards that hold its parts."""
        parts = [self.shards[file].get("parts", {}).get(key) for file in files]
        if region is None and parts == [None]:
            return self._open(files[0], opened).get_tensor(key)
        if region is None:
            region = tuple(slice(0, size) for size in parts[0]["shape"])
        whole = torch.empty([s.stop - s.start for s in region])
        found = 0
        for file, part in zip(files, parts, strict=True):
            offset = part["offset"] if part else [0] * len(region)
            if part and not _overlap(region, offset, part["size"]):
                continue
            stored = self._open(file, opened).get_slice(key)
            overlap = _overlap(region, offset, stored.get_shape())
            values = stored[tuple(slice(s.start - o, s.stop - o) for s, o in zip(overlap, offset, strict=True))]
            whole[tuple(slice(s.start - r.start, s.stop - r.start) for s, r in zip(overlap, region, strict=True))] = (
                values
            )
            found += values.numel()
        if found != whole.numel():
            raise CheckpointError(f"{self.directory}: {key}: expected {whole.numel()} numbers, its parts have {found}")
        return whole

    def _open(self, file: str, opened: dict):
        """A shard, once, after its content was compared with its sha256."""
        path, record = self.directory / file, self.shards[file]
        if file not in self._checked:
            if sha256_of(path) != record["sha256"]:
                raise CheckpointError(f"{path}: expected sha256 {record['sha256'][:16]}…, the file has changed")
            self._checked.add(file)
        if file not in opened:
            opened[file] = safe_open(path, framework="pt")
        return opened[file]


def _in_store(saved: Checkpoint, prefix: str) -> Iterator[tuple[str, Tensor]]:
    from crystal.backends.weight_streaming.store import sealed_tensors

    model = parse(ModelConfig, saved.state.get("model"), str(saved.directory), ("model",))
    return sealed_tensors(saved.store, plan_for(model), saved.state["step"], prefix)


def _overlap(region: tuple[slice, ...], offset: list[int], size: list[int]) -> tuple[slice, ...] | None:
    """Where a part lies inside a region, in the whole tensor's numbering; None where it does not."""
    found = tuple(slice(max(s.start, o), min(s.stop, o + n)) for s, o, n in zip(region, offset, size, strict=True))
    return found if all(s.start < s.stop for s in found) else None


def write(directory: Path, tensors: Iterable[tuple[str, Tensor]], state: dict, files: Iterable[Path] = ()) -> Path:
    """Write a checkpoint at `directory` (replacing nothing: an existing one is left, and an error).

    state: JSON-ready; files: copied in beside the shards (the tokenizer).
    Raises CheckpointError when the disk is full or not writable, leaving nothing under the final name; ValueError
    for a tensor that is not fp32 (the published Amber run saved bf16 weights: never again).
    """
    shutil.rmtree(aside_of(directory), ignore_errors=True)
    return seal(directory, write_shards(directory, tensors), state, files)


def refer(directory: Path, store: Path, state: dict, files: Iterable[Path] = ()) -> Path:
    """A checkpoint at `directory` whose tensors stay in a backend's store. Raises CheckpointError as `write`."""
    aside, run = aside_of(directory), directory.absolute().parent.parent
    shutil.rmtree(aside, ignore_errors=True)
    # by a relative path inside the run directory, which may be moved as a whole
    path = os.path.relpath(store, directory.absolute()) if store.is_relative_to(run) else str(store)
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise _cannot(directory, error) from None
    return seal(directory, {}, state, files, path)


def remove_references(checkpoints: Path) -> None:
    """Take away all checkpoints that refer to a store."""
    for step in steps(checkpoints):
        directory = step_directory(checkpoints, step)
        if read(directory).store is not None:
            remove(directory)


def aside_of(directory: Path) -> Path:
    """Where a checkpoint lies while it is written."""
    return directory.with_name(f".tmp-{directory.name}")


def write_shards(directory: Path, tensors: Iterable[tuple[str, Tensor | Part]], process: int | None = None) -> dict:
    """Write the shards of a checkpoint, or those of one process among several, aside; their records, for `seal`.

    Raises as `write`.
    """
    aside = aside_of(directory)
    start = "shard-" if process is None else f"shard-{process:05d}-"
    try:
        aside.mkdir(parents=True, exist_ok=True)
        return dict(_write_shards(aside, start, tensors))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise _cannot(directory, error) from None


def seal(directory: Path, shards: dict, state: dict, files: Iterable[Path] = (), store: str | None = None) -> Path:
    """Make a checkpoint of all shards that were written aside: copy `files`, write the seal, rename."""
    aside = aside_of(directory)
    version = STORE if store else PARTS if any("parts" in record for record in shards.values()) else WHOLE
    try:
        for file in files:
            shutil.copyfile(file, aside / file.name)
            sync(aside / file.name)
        content = {"format": version, "state": state, "shards": shards} | ({"store": store} if store else {})
        text = json.dumps(content, indent=1)
        (aside / SEAL).write_text(text, encoding="utf-8")
        sync(aside / SEAL)
        sync(aside)
        os.rename(aside, directory)
        sync(directory.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise _cannot(directory, error) from None
    return directory


def _cannot(directory: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{directory}: the checkpoint cannot be written: {error}")


def _write_shards(aside: Path, start: str, tensors: Iterable[tuple[str, Tensor | Part]]) -> Iterator[tuple[str, dict]]:
    shard: dict[str, Tensor] = {}
    parts: dict[str, dict] = {}
    size = 0
    number = 0

    def flush() -> tuple[str, dict]:
        path = aside / f"{start}{number:05d}.safetensors"
        # torch.distributed.checkpoint's own note of where parts belong, so that it reads them too
        offsets = {
            name: {"saved_offsets": parts[name]["offset"] if name in parts else [0] * shard[name].ndim}
            for name in shard
        }
        save_file(shard, path, {"DCP_SHARDING_INFO": json.dumps(offsets)} if parts else None)
        sync(path)
        record = {"bytes": path.stat().st_size, "sha256": sha256_of(path), "tensors": list(shard)}
        return path.name, record | ({"parts": dict(parts)} if parts else {})

    for name, held in tensors:
        tensor = held.values if isinstance(held, Part) else held
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name}: a checkpoint holds fp32, got {tensor.dtype}")
        if shard and size + tensor.nbytes > SHARD_BYTES:
            number += 1
            yield flush()
            shard, parts, size = {}, {}, 0
        shard[name] = tensor.detach().contiguous()
        if isinstance(held, Part) and tensor.shape != held.shape:
            parts[name] = {"offset": list(held.offset), "size": list(tensor.shape), "shape": list(held.shape)}
        size += tensor.nbytes
    if shard:
        number += 1
        yield flush()


def read(directory: Path) -> Checkpoint:
    """Open a checkpoint; shards are checked for size here and for content when their tensors are read.

    Raises CheckpointError naming the file that is missing, cut short or of another format.
    """
    path = Path(directory) / SEAL
    try:
        seal = json.loads(path.read_text(encoding="utf-8"))
        state, shards, version, store = seal["state"], seal["shards"], seal["format"], seal.get("store")
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: expected a checkpoint directory, but {SEAL} is not there") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: expected a checkpoint's seal: {error}") from None
    if version not in (WHOLE, PARTS, STORE):
        raise CheckpointError(f"{path}: expected format {WHOLE} to {STORE}, got {version}")
    for file, record in shards.items():
        size = (path.parent / file).stat().st_size if (path.parent / file).is_file() else None
        if size != record["bytes"]:
            raise CheckpointError(f"{path.parent / file}: expected {record['bytes']} bytes, got {size or 'no file'}")
    return Checkpoint(Path(directory), state, shards, Path(directory, store).resolve() if store else None)


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

    Raises CheckpointError when there is none.
    """
    if (path / SEAL).is_file():
        return path
    checkpoints = path / "checkpoints"
    found = [step_directory(checkpoints, s) for s in steps(checkpoints)]
    if stage is not None:
        found = [p for p in found if read(p).state.get("stage_ended") == stage]
    if not found:
        what = "a checkpoint" if stage is None else f"the checkpoint at the end of stage {stage}"
        raise CheckpointError(f"{path}: expected {what}, or a run directory that holds one")
    return found[-1]

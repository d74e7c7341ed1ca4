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
place: what carries its final name is whole. Opening checks the seal (`crystal.checkpoint.seal_file`), that nothing is
missing and every size; reading checks the sha256 of what is read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from crystal.backends.base import Part
from crystal.checkpoint.seal_file import (
    KINDS,
    SEAL,
    files_of,
    format_of,
    missing_seal,
    parameters,
    read_seal,
    with_digest,
)
from crystal.config import parse
from crystal.errors import CheckpointError
from crystal.files import dangling, discard, reason, sha256_of, sync
from crystal.zoo.build import plan_for
from crystal.zoo.config import ModelConfig

SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class Checkpoint:
    """A sealed checkpoint: its directory, the state saved with it, and the shards' records."""

    directory: Path
    state: dict
    shards: dict[str, dict]  # file → {bytes, sha256, tensors, parts: {tensor: {offset, size, shape}} where it has any}
    store: Path | None = None  # where the tensors are if there are no shards
    identity: str | None = None  # that store's
    files: dict[str, dict] = field(default_factory=dict)  # what lies beside → {bytes, sha256}, as far as it is known
    _checked: set[str] = field(default_factory=set, repr=False, compare=False)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the model's tensors; {} where the state names no model."""
        if self.state.get("model") is None:
            return {}
        return dict(parameters(parse(ModelConfig, self.state["model"], str(self.directory), ("model",))))

    def expect_model(self, model: ModelConfig) -> None:
        """Raise CheckpointError where this is not a checkpoint of a run's model."""
        if parse(ModelConfig, self.state.get("model"), str(self.directory), ("model",)) != model:
            raise CheckpointError(
                f"{self.directory}: expected the model of this run, it is of another", file=self.directory
            )

    def expect_files(self) -> None:
        """Raise CheckpointError where the tokenizer, or what else lies beside the shards, is not what was saved."""
        for name, record in self.files.items():
            if name not in self._checked:
                _expect_sha256(self.directory / name, record["sha256"])
                self._checked.add(name)

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
        parts = [(self.shards[file].get("parts") or {}).get(key) for file in files]
        for file, part in zip(files, parts, strict=True):
            self._expect_shape(key, file, part, opened)
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
            _expect_sha256(path, record["sha256"])
            self._checked.add(file)
        if file not in opened:
            try:
                opened[file] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: expected safetensors: {error}", file=path) from None
        return opened[file]

    def _expect_shape(self, key: str, file: str, part: dict | None, opened: dict) -> None:
        """Raise CheckpointError unless a shard holds what the seal and the model say of a tensor, in fp32."""
        try:
            stored = self._open(file, opened).get_slice(key)
        except SafetensorError as error:
            raise CheckpointError(f"{self.directory / file}: {key}: {error}", file=self.directory / file) from None
        kind = next((kind for kind in KINDS if key.startswith(kind + ".")), "")
        shape = tuple(part["size"]) if part else self._shapes.get(key.removeprefix(kind + "."))
        found = tuple(stored.get_shape())
        if (shape is not None and found != shape) or stored.get_dtype() != "F32":
            raise CheckpointError(
                f"{self.directory / file}: {key}: expected {list(shape or found)} in F32, got {list(found)} in "
                f"{stored.get_dtype()}",
                file=self.directory / file,
            )


def _expect_sha256(path: Path, sha256: str) -> None:
    try:
        found = sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", file=path) from None
    if found != sha256:
        raise CheckpointError(f"{path}: expected sha256 {sha256[:16]}…, the file has changed", file=path)


def _in_store(saved: Checkpoint, prefix: str) -> Iterator[tuple[str, Tensor]]:
    from crystal.backends.weight_streaming.sealed import sealed_tensors

    model = parse(ModelConfig, saved.state.get("model"), str(saved.directory), ("model",))
    return sealed_tensors(saved.store, plan_for(model), saved.state["step"], prefix, saved.identity)


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
    discard(aside_of(directory))
    return seal(directory, write_shards(directory, tensors), state, files)


def refer(directory: Path, store: Path, state: dict, files: Iterable[Path] = ()) -> Path:
    """A checkpoint at `directory` whose tensors stay in a backend's store. Raises CheckpointError as `write`."""
    from crystal.backends.weight_streaming.record import read_record

    aside, run = aside_of(directory), directory.absolute().parent.parent
    discard(aside)
    # by a relative path inside the run directory, which may be moved as a whole
    path = os.path.relpath(store, directory.absolute()) if store.is_relative_to(run) else str(store)
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise _cannot(directory, error) from None
    record = read_record(store)
    return seal(directory, {}, state, files, path, record.identity if record else None)


def remove_references(checkpoints: Path) -> None:
    """Take away all checkpoints that refer to a store. Raises CheckpointError where another store lies in its place."""
    from crystal.backends.weight_streaming.record import read_record
    from crystal.backends.weight_streaming.sealed import expect_identity

    for step in steps(checkpoints):
        directory = step_directory(checkpoints, step)
        saved = read(directory)
        if saved.store is not None:
            if (record := read_record(saved.store)) is not None:
                expect_identity(saved.store, record, saved.identity)
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
        discard(aside)
        raise _cannot(directory, error) from None


def seal(
    directory: Path, shards: dict, state: dict, files: Iterable[Path] = (),
    store: str | None = None, identity: str | None = None,
) -> Path:  # fmt: skip
    """Make a checkpoint of all shards that were written aside: copy `files`, write the seal, rename.

    store, identity: where the tensors are if there are no shards, and what that store calls itself.
    """
    aside = aside_of(directory)
    try:
        beside = {}
        for file in files:
            copy = aside / file.name
            shutil.copyfile(file, copy)
            sync(copy)
            beside[copy.name] = {"bytes": copy.stat().st_size, "sha256": sha256_of(copy)}
        content = {"format": format_of(shards, store), "state": state, "shards": shards, "files": beside} | (
            {"store": store, "store_identity": identity} if store else {}
        )
        text = json.dumps(with_digest(content), indent=1)
        (aside / SEAL).write_text(text, encoding="utf-8")
        sync(aside / SEAL)
        sync(aside)
        os.rename(aside, directory)
        sync(directory.parent)
    except OSError as error:
        discard(aside)
        raise _cannot(directory, error) from None
    return directory


def _cannot(directory: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{directory}: the checkpoint cannot be written: {reason(error)}", file=directory)


def _write_shards(aside: Path, start: str, tensors: Iterable[tuple[str, Tensor | Part]]) -> Iterator[tuple[str, dict]]:
    shard, parts = {}, {}  # tensors and their places in the whole, by name
    size = number = 0

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
    """Open a checkpoint: its seal is checked here, and all files for size; for content when they are read.

    Raises CheckpointError naming the file that is missing, cut short, damaged or of another format.
    """
    directory = Path(directory)
    seal = read_seal(directory)
    files = files_of(directory, seal)
    tokenizer = seal["state"].get("tokenizer")
    old = {} if tokenizer is None or files else {tokenizer: {}}
    for file, record in (seal["shards"] | files | old).items():
        path = directory / file
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}", file=path) from None
        if size is None or size != record.get("bytes", size):
            expected = f"{record['bytes']} bytes" if "bytes" in record else "a file"
            got = "no file" if size is None else size
            raise CheckpointError(f"{path}: expected {expected}, got {got}", file=path)
    store = seal.get("store")
    where = Path(directory, store).resolve() if store else None
    return Checkpoint(directory, seal["state"], seal["shards"], where, seal.get("store_identity"), files)


def step_directory(checkpoints: Path, step: int) -> Path:
    """checkpoints/step-NNNNNNN."""
    return checkpoints / f"step-{step:07d}"


def steps(checkpoints: Path) -> list[int]:
    """Steps of all checkpoints under a run's `checkpoints/`, ascending. Raises CheckpointError for one whose seal is
    gone: going on from the one before would look just the same."""
    found = []
    for path in checkpoints.glob("step-*"):
        named = re.fullmatch(r"step-([0-9]{7,})", path.name)
        if not named or path != step_directory(checkpoints, int(named[1])):
            continue
        try:
            sealed = (path / SEAL).is_file()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}", file=path) from None
        if sealed:
            found.append(int(named[1]))
        elif os.path.lexists(path):  # else another process has just removed it
            raise missing_seal(path)
    return sorted(found)


def sweep(checkpoints: Path) -> None:
    """Remove what a killed writer left aside."""
    for aside in checkpoints.glob(".tmp-*"):
        discard(aside)


def remove(directory: Path) -> None:
    """Take a checkpoint away; killed half-way, what is left does not look like one."""
    os.rename(directory, aside_of(directory))
    discard(aside_of(directory))  # of a link the link alone


def locate(path: Path, stage: int | None = None) -> Path:
    """The checkpoint meant by `path`: itself, or in a run directory the latest, or the end of a stage (from 1).

    Raises CheckpointError when there is none.
    """
    if nowhere := dangling(path):
        raise CheckpointError(f"{path}: {nowhere}", file=path)
    if (path / SEAL).is_file():
        if stage is not None and read(path).state.get("stage_ended") != stage:
            raise CheckpointError(f"{path}: expected the checkpoint at the end of stage {stage}, it is not")
        return path
    if re.fullmatch(r"step-[0-9]{7,}", path.name) and path.exists():
        raise missing_seal(path)
    found = [step_directory(path / "checkpoints", s) for s in steps(path / "checkpoints")]
    if stage is not None:
        found = [p for p in found if read(p).state.get("stage_ended") == stage]
    if not found:
        what = "a checkpoint" if stage is None else f"the checkpoint at the end of stage {stage}"
        raise CheckpointError(f"{path}: expected {what}, or a run directory that holds one")
    return found[-1]

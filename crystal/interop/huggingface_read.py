"""Weights as published on Hugging Face, read and written one tensor at a time.

A directory holds `config.json` and either safetensors or torch's `.bin` shards, single or with an index. Which of
several sets counts is as transformers has it: a single file before an index, safetensors before `.bin`.
Names and shapes of all shards are checked before the first tensor is handed out; then one shard is open at a
time, memory-mapped, and mapped anew every gigabyte, so a 7B model passes through a few tensors' memory. bf16 and
fp16 widen to fp32 exactly. Numbers that are not finite are refused by name as their tensor is read.

What the files call their tensors and what config.json means is `crystal.interop.huggingface_forms`.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from crystal.config import nearest
from crystal.config.bounded_yaml import shortened
from crystal.errors import CheckpointError
from crystal.files import no_number, regular_bytes
from crystal.interop.huggingface_forms import (
    BUFFERS,
    TIED,
    Form,
    Published,
    config_from_json,
    form_of,
    published_tensors,
)
from crystal.output.printable import printable_line
from crystal.zoo.config import ModelConfig

_EXACT = ("float32", "bfloat16", "float16", "F32", "BF16", "F16")  # dtypes that fp32 holds exactly
_SETS = ("model.safetensors", "pytorch_model.bin")
_REMAP_BYTES = 1 << 30  # what is read of a mapped file counts as this process's memory until it is mapped anew


def read_published(directory: Path) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """The model in a Hugging Face directory: its config, and (our name, fp32 CPU tensor) one at a time.

    Every tensor of the decoder comes exactly once, in the files' order, in memory of its own. The copy of a
    tied embedding is compared with it, or stands for it where a file has only the copy; buffers are dropped.
    Raises CheckpointError naming the file and the key or tensor: at once for anything the config or the shards'
    headers tell, while iterating for a duplicate head that differs and for numbers that are not finite.
    """
    directory = Path(directory)
    mapping = read_json(directory / "config.json")
    config, form = config_from_json(mapping, str(directory / "config.json"))
    shards, listing = _shards(directory, mapping)
    expected = _check(shards, listing, {tensor.name: tensor for tensor in published_tensors(config, form)}, config)
    return config, _tensors(shards, expected)


def to_published(config: ModelConfig, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The inverse: (our name, tensor) in any order → (published name, contiguous tensor of the same dtype).

    Parts of a fused tensor wait for each other; a tied head is not written twice. Raises CheckpointError when no
    published form fits the config, a tensor is missing, comes twice or is none of the model's.
    """
    form: Form = form_of(config)
    home = {our: tensor for tensor in published_tensors(config, form) for our in tensor.ours}
    waiting: dict[str, dict[str, Tensor]] = {}
    for our, tensor in tensors:
        if our not in home:
            raise CheckpointError(f"{our}: expected each tensor of the model once, this is another or came twice")
        target = home.pop(our)
        parts = waiting.setdefault(target.name, {})
        parts[our] = tensor
        if len(parts) == len(target.ours):
            whole = torch.cat([parts[name] for name in target.ours])
            yield target.name, (whole.T if target.transposed else whole).contiguous()
            del waiting[target.name]
    if home:
        raise CheckpointError(f"{next(iter(home))}: expected every tensor of the model, this one did not come")


def read_json(path: Path) -> dict:
    """A file's JSON mapping, in which each key stands once and numbers are finite. Raises CheckpointError naming it
    when there is none."""
    try:
        text = regular_bytes(path).decode()
        mapping = json.loads(text, object_pairs_hook=_each_key_once, parse_constant=no_number)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected a Hugging Face model directory") from None
    except RecursionError:
        raise CheckpointError(f"{path}: expected JSON: it is nested too deep") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or printable_line(shortened(str(error), 300))
        raise CheckpointError(f"{path}: expected JSON: {why}") from None
    if not isinstance(mapping, dict):
        raise CheckpointError(f"{path}: expected a mapping of keys")
    return mapping


def _each_key_once(pairs: list[tuple]) -> dict:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice!r} given twice")
    return mapping


def _shards(directory: Path, mapping: dict) -> tuple[list[Path], Path]:
    """The files that hold the weights, and the one to name when a tensor is in none of them."""
    if (directory / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{directory / 'adapter_config.json'}: expected a whole model, this is an adapter for one; merge it first"
        )
    sets = [name for whole in _SETS for name in (whole, f"{whole}.index.json")]
    if (named := mapping.get("transformers_weights")) is not None:  # transformers 5: then it is this file and no other
        if not isinstance(named, str) or named != Path(named).name or ".safetensors" not in named:
            where = directory / "config.json"
            got = shortened(repr(named), 60)
            raise CheckpointError(f"{where}: transformers_weights: expected a safetensors file or index, got {got}")
        sets = [named]
    found = next((directory / name for name in sets if (directory / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{directory}: expected {' or '.join(sets[::2])}, or an index of their shards")
    if found.suffix != ".json":
        return [found], found
    files = read_json(found).get("weight_map")
    names = list(files.values()) if isinstance(files, dict) else []
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise CheckpointError(f"{found}: weight_map: expected tensors and the files that hold them")
    return [directory / name for name in sorted(set(names))], found


class _Torch:
    """A `.bin` file with what `_Safetensors` has. `weights_only`: no code in the file is run."""

    def __init__(self, path: Path):
        self.mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 are not, and are read whole
        self.tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=self.mapped)
        if not isinstance(self.tensors, Mapping):
            raise ValueError(f"expected a mapping of names to tensors, got {type(self.tensors).__name__}")
        wrong = [n for n, tensor in self.tensors.items() if not isinstance(n, str) or not isinstance(tensor, Tensor)]
        if wrong:
            raise ValueError(f"{wrong[0]}: expected a tensor")

    def names(self) -> list[str]:
        return list(self.tensors)

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        return tuple(self.tensors[name].shape), str(self.tensors[name].dtype).removeprefix("torch.")

    def get(self, name: str) -> Tensor:
        return self.tensors[name]


class _Safetensors:
    """A safetensors file, mapped."""

    mapped = True

    def __init__(self, path: Path):
        self.file = safe_open(path, framework="pt")

    def names(self) -> list[str]:
        return list(self.file.keys())

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        part = self.file.get_slice(name)
        return tuple(part.get_shape()), part.get_dtype()

    def get(self, name: str) -> Tensor:
        return self.file.get_tensor(name)


def _open(path: Path) -> _Torch | _Safetensors:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, though the index lists it")
    try:
        return _Torch(path) if path.suffix == ".bin" else _Safetensors(path)
    except Exception as error:  # a damaged or hostile file shows as any of a dozen classes
        reason = str(error).strip().splitlines() or [type(error).__name__]
        why = printable_line(shortened(reason[0], 300))
        raise CheckpointError(f"{path}: cannot be read as weights: {why}") from None


def _check(
    shards: list[Path], listing: Path, expected: dict[str, Published], config: ModelConfig
) -> dict[str, Published]:
    """Every expected tensor in exactly one shard, in its shape and a dtype that fp32 holds; no others.

    Returns `expected` as the files have it: with the head's name for the embedding where only that is there.
    """
    home: dict[str, Path] = {}
    for path in shards:
        shard = _open(path)
        for name in shard.names():
            where = f"{path}: {printable_line(shortened(str(name), 200))}"
            if BUFFERS.fullmatch(name):
                continue
            shape, dtype = shard.describe(name)
            if name in home:
                raise CheckpointError(f"{where}: expected once, but {home[name].name} has it too")
            home[name] = path
            tied = name in TIED.values() and config.tie_embeddings
            if name not in expected and not tied:
                raise CheckpointError(f"{where}: not a tensor of this model{nearest(name, expected)}")
            wanted = (config.vocab_size, config.d_model) if tied else expected[name].shape
            if shape != wanted:
                raise CheckpointError(f"{where}: expected shape {list(wanted)}, got {list(shape)}")
            if dtype not in _EXACT:
                raise CheckpointError(f"{where}: expected fp32, bf16 or fp16, got {dtype}")
    for name in expected:
        if name in home:
            continue
        if config.tie_embeddings and TIED.get(name) in home:
            copy = TIED[name]
            return _check(shards, listing, {copy if n == name else n: t for n, t in expected.items()}, config)
        raise CheckpointError(f"{listing}: {name}: expected, but no such tensor in the weights")
    return expected


def _tensors(shards: list[Path], expected: dict[str, Published]) -> Iterator[tuple[str, Tensor]]:
    digests: dict[str, tuple[str, Path]] = {}  # of the embedding and its copy, maybe in different shards
    for path in shards:
        shard, seen = _open(path), 0
        for name in shard.names():
            target = expected.get(name)
            duplicate = target is None and name in TIED.values()
            if target is None and not duplicate:
                continue
            if seen > _REMAP_BYTES and shard.mapped:
                shard, seen = _open(path), 0
            tensor = shard.get(name)
            seen += tensor.nbytes
            _finite(tensor, path, name)
            if duplicate or name in TIED:
                digest = hashlib.sha256(tensor.float().contiguous().numpy()).hexdigest()
                digests["copy" if duplicate else "embedding"] = digest, path
            if target is not None:
                parts = (tensor.T if target.transposed else tensor).chunk(len(target.ours))
                for our, part in zip(target.ours, parts, strict=True):
                    # a copy, so that nothing keeps the file or a fused neighbour in memory
                    yield our, part.to(torch.float32, copy=True).contiguous()
                del parts, part
            del tensor
    if "copy" in digests and digests["copy"][0] != digests["embedding"][0]:
        raise CheckpointError(
            f"{digests['copy'][1]}: lm_head.weight: expected a copy of the embedding, as config.json's "
            "tie_word_embeddings says, but they differ"
        )


def _finite(tensor: Tensor, path: Path, name: str) -> None:
    wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
    if wrong:
        numbers = "a number that is" if wrong == 1 else f"{wrong:,} numbers that are"
        raise CheckpointError(f"{path}: {name}: expected finite numbers, it has {numbers} infinite or not a number")

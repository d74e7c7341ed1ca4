"""Safetensors files written one tensor at a time, of any number of tensors, in the memory of one.

All names and shapes are known beforehand, so each file's header and every tensor's place come first, and tensors may
then arrive in any order: the files are the same, byte for byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from crystal.errors import CheckpointError, ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What weights may be written in; by the names that config.json has for them."""

SHARD_BYTES = 2 << 30  # of a file, beyond which there are several
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_weights(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    shard_bytes: int,
) -> list[str]:
    """model.safetensors, or shards of at most shard_bytes and their index, named as transformers does; their names.

    shapes: of every tensor, in the order that the files are to have. tensors: each once, cast to dtype as it comes.
    Raises OSError; CheckpointError for a tensor that is missing, comes twice, or is another; ConfigError where a finite
    number has no finite one in dtype.
    """
    shards, total = _divided(shapes, dtype.itemsize, shard_bytes)
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    places = {}
    with ExitStack() as until_written:
        for name, shard in zip(files, shards, strict=True):
            file = until_written.enter_context((directory / name).open("wb"))
            header = _header(shard, shapes, dtype)
            file.write(header)
            places |= {tensor: (file, len(header) + offset) for tensor, offset in shard.items()}
        for name, tensor in tensors:
            if name not in places or tuple(tensor.shape) != tuple(shapes[name]):
                raise CheckpointError(f"{name} {list(tensor.shape)}: expected each tensor of the model once")
            file, offset = places.pop(name)
            file.seek(offset)
            file.write(_bytes(name, tensor, dtype))
    if places:
        raise CheckpointError(f"{next(iter(places))}: expected every tensor of the model, this one did not come")
    if len(shards) > 1:
        weight_map = {tensor: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        files.append("model.safetensors.index.json")
        (directory / files[-1]).write_text(index + "\n", encoding="utf-8")
    return files


def _divided(shapes: Mapping[str, tuple[int, ...]], itemsize: int, limit: int) -> tuple[list[dict[str, int]], int]:
    """Each shard's tensors and where in its data they begin; and the bytes of all together."""
    shards: list[dict[str, int]] = [{}]
    size = total = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * itemsize
        if shards[-1] and size + nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = size
        size += nbytes
        total += nbytes
    return shards, total


def _header(shard: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """The format's beginning: the header's length, then JSON, filled up with spaces so that data are aligned."""
    header: dict = {"__metadata__": {"format": "pt"}}
    for name, start in shard.items():
        end = start + math.prod(shapes[name]) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(name: str, tensor: Tensor, dtype: torch.dtype) -> memoryview:
    cast = tensor.detach().to("cpu", dtype).contiguous()
    if dtype == torch.float16 and not torch.isfinite(cast).all() and torch.isfinite(tensor).all():
        largest = tensor.abs().max().item()
        raise ConfigError(f"{name}: expected numbers that float16 holds, got {largest:.3g}; bfloat16 holds them")
    return cast.reshape(-1).view(torch.uint8).numpy().data

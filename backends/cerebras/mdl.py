"""Cerebras' .mdl checkpoints (HDF5), read and written with h5py and none of Cerebras' packages.

A checkpoint is a nested mapping. Each tensor in it is a dataset named by its dotted path; numbers and texts are in
attributes of the file, and so is the form of the whole: `__spec__`, a tree as torch's pytree prints it. The format is
cerebras.pytorch's 0.5 (its storage/save.py); what we write, cstorch.load reads, and the other way round. Pickled
objects, which a .mdl may hold as well, are never opened.

Names are our decoder's: `model.NAME`, and `optimizer.state.I.exp_avg` with I the tensor's place in the optimizer's
groups. cstorch does not write down which name is which place, so the text `crystal` in the file does.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow
import torch
from torch import Tensor

from crystal.errors import CheckpointError
from crystal.files import replacing

VERSION = 0.5
LZ4 = "32004"  # the filter's registered number
CSTORCH = "2.10.0"
_NAMES = {torch.float32: ("torch.float32", 11), torch.int64: ("torch.int64", 5)}  # and their number in Cerebras' types
_SCALARS = (("scalar_value", "ScalarSerializer"), ("string_value", "StringSerializer"))


@dataclass(frozen=True)
class Mdl:
    """An opened checkpoint: the file, its tensors' paths with their shapes, its numbers and texts by path."""

    file: Path
    shapes: dict[str, tuple[int, ...]]
    values: dict[str, Any]
    aliases: dict[str, str]  # tied tensors: path → path of the dataset

    def tensor(self, path: str) -> Tensor:
        """One tensor, read now; bf16 comes as bf16. Raises CheckpointError when it is not there or cannot be read."""
        path = self.aliases.get(path, path)
        if path not in self.shapes:
            raise CheckpointError(f"{self.file}: expected the tensor {path}, it is not there")
        try:
            with h5py.File(self.file, "r") as file:
                dataset = file[path]
                dtype = str(dataset.attrs["dtypes"][0]).removeprefix("torch.")
                if dataset.attrs.get("compressed", False):
                    raise OSError("it is compressed by Cerebras' own weight format")
                array = _unpacked(dataset) if set(dataset._filters) == {LZ4} else np.asarray(dataset[()])
        except (OSError, ValueError) as error:  # a filter that h5py lacks, or a damaged file
            raise CheckpointError(f"{self.file}: {path}: cannot be read: {error}") from None
        tensor = torch.from_numpy(array.reshape(self.shapes[path]))
        # bf16 lies in the file as int16 with the same bits
        return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def read(file: Path) -> Mdl:
    """Open a .mdl. Raises CheckpointError when it is not one, or was never finished."""
    try:
        with h5py.File(file, "r") as opened:
            attributes = dict(opened.attrs)
            # a path's dots are part of its name: datasets lie flat
            shapes = {
                key: tuple(item.shape)
                for key, item in opened.items()
                if isinstance(item, h5py.Dataset) and item.shape is not None and "dtypes" in item.attrs
            }
    except (OSError, RuntimeError, KeyError) as error:  # h5py's, for one kind of damage each
        reason = "no such file" if not Path(file).exists() else str(error)
        raise CheckpointError(f"{file}: expected a Cerebras checkpoint (HDF5): {reason}") from None
    if "__spec__" not in attributes or not attributes.get("__SUCCESS__", False):
        raise CheckpointError(
            f"{file}: expected a finished Cerebras checkpoint, its __spec__ or __SUCCESS__ is not there"
        )
    values, aliases = {}, {}
    for key, text in attributes.items():
        path = key.removesuffix(".__metadata__")
        if path == key:
            continue
        leaf = _mapping(file, key, text).get(key, {})
        if leaf.get("__LINKED__"):
            aliases[path] = leaf["key"]
        held = next((name for name, _ in _SCALARS if name in leaf), None)
        if held:
            values[path] = leaf[held]
    for path, target in aliases.items():
        if target in values:
            values[path] = values[target]
    return Mdl(Path(file), shapes, values, {path: target for path, target in aliases.items() if target in shapes})


def _mapping(file: Path, key: str, text: str) -> dict:
    """JSON that lies in a file's attribute."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: {key}: expected a JSON mapping, it is damaged")
    return found


def _unpacked(dataset: h5py.Dataset) -> np.ndarray:
    """A dataset packed by HDF5's LZ4 filter, which cstorch writes with and h5py does not bring.

    A chunk is [bytes, 8][bytes of a block, 4] and blocks of [packed bytes, 4] and data, numbers big-endian; a block
    that did not get smaller lies there as it is.
    """
    array = np.empty(dataset.shape, dataset.dtype)
    codec = pyarrow.Codec("lz4_raw")
    for i in range(dataset.id.get_num_chunks()):
        offset = dataset.id.get_chunk_info(i).chunk_offset
        skipped, packed = dataset.id.read_direct_chunk(offset)
        plain = bytearray()
        if skipped:
            plain, total = packed, len(packed)
        else:
            total, size = struct.unpack_from(">QI", packed)
            at = 12
            while len(plain) < total:
                (length,) = struct.unpack_from(">I", packed, at)
                block, room = packed[at + 4 : at + 4 + length], min(size, total - len(plain))
                plain += block if length == room else codec.decompress(block, room).to_pybytes()
                at += 4 + length
        chunk = np.frombuffer(plain, dataset.dtype).reshape(dataset.chunks)
        there = tuple(slice(o, min(o + c, n)) for o, c, n in zip(offset, dataset.chunks, dataset.shape, strict=True))
        array[there] = chunk[tuple(slice(0, s.stop - s.start) for s in there)]
    return array


def write(file: Path, tree: dict, tensors: Iterable[tuple[str, Tensor]], durable: bool = True) -> Path:
    """Write a .mdl, whole or not at all.

    tree: nested dicts, lists and tuples of numbers and texts, with None where a tensor belongs; tensors: those, by
    dotted path, fp32 or int64, one at a time and in any order. Raises CheckpointError when the disk fails.
    """
    file = Path(file)
    leaves = dict(_leaves(tree, ()))
    waiting = {path for path, value in leaves.items() if value is None}
    try:
        with replacing(file, durable) as aside, h5py.File(aside, "w") as opened:
            for path, tensor in tensors:
                if path not in waiting:
                    raise ValueError(f"{path}: no such tensor is expected")
                waiting.remove(path)
                _write_tensor(opened, path, tensor.detach().contiguous())
            if waiting:
                raise ValueError(f"{min(waiting)}: no tensor was given")
            for path, value in leaves.items():
                if value is not None:
                    key, kind = _SCALARS[isinstance(value, str)]
                    _describe(opened, path, {key: value, "__TYPE__": kind, "__NONE__": True})
            opened.attrs["__version__"] = VERSION
            opened.attrs["__cstorch_version__"] = CSTORCH
            opened.attrs["__spec__"] = json.dumps([_stars(tree), json.dumps([1, _spec(tree)])])
            opened.attrs["__SUCCESS__"] = True
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be written: {error}") from None
    return file


def _write_tensor(file: h5py.File, path: str, tensor: Tensor) -> None:
    name, number = _NAMES[tensor.dtype]
    metadata = {
        "__TORCH__": True,
        "shapes": [list(tensor.shape)],
        "dtypes": [name],
        "rtfx_dtypes": [number],
        "__TYPE__": "TorchTensorSerializer",
        "__NUMPY__": True,
        "compressed": False,
    }
    dataset = file.create_dataset(path, data=tensor.numpy())
    dataset.attrs.update(metadata)
    _describe(file, path, metadata)


def _describe(file: h5py.File, path: str, metadata: dict) -> None:
    """A leaf's own entry: a tree of one leaf, what was written for it, and how to read it back."""
    tree = {path: None}
    entry = {
        "__spec__": [{path: "*"}, json.dumps([1, _spec(tree)])],
        "__objects__": [path],
        f"{path}.__metadata__": metadata,
    }
    file.attrs[f"{path}.__metadata__"] = json.dumps(entry)


def _leaves(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict | list | tuple):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(child, (*path, str(key)))
    else:
        yield ".".join(path), node


def _stars(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _stars(child) for key, child in node.items()}
    return [_stars(child) for child in node] if isinstance(node, list | tuple) else "*"


def _spec(node: Any) -> dict:
    """The tree as torch.utils._pytree.treespec_dumps prints it, in its protocol 1."""
    if not isinstance(node, dict | list | tuple):
        return {"type": None, "context": None, "children_spec": []}
    children = node.values() if isinstance(node, dict) else node
    context = list(node) if isinstance(node, dict) else None
    kind = "dict" if isinstance(node, dict) else type(node).__name__
    return {
        "type": f"builtins.{kind}",
        "context": json.dumps(context),
        "children_spec": [_spec(child) for child in children],
    }


def write_state(
    file: Path,
    groups: list[dict],
    betas: tuple[float, float],
    about: dict,
    tensors: Callable[[str], Iterable[tuple[str, Tensor]]],
    with_optimizer: bool = True,
    durable: bool = True,
) -> Path:
    """A training state as `Session.state_dict` has it.

    groups: the plan's, {tensors, lr_multiplier, weight_decay, eps}; about: goes into `crystal`, optimizer_step is
    read; tensors(prefix) gives (name, fp32 tensor) under `model`, `optimizer.exp_avg`, `optimizer.exp_avg_sq`.
    durable: whether it is to outlive the machine (`replacing`).
    """
    order = [name for group in groups for name in group["tensors"]]
    place = {name: i for i, name in enumerate(order)}
    tree: dict[str, Any] = {"model": dict.fromkeys(order)}
    if with_optimizer:
        keys = ("exp_avg", "exp_avg_sq", "beta1_power", "beta2_power")
        numbers = iter(range(len(order)))
        tree["optimizer"] = {
            "state": {i: dict.fromkeys(keys) for i in range(len(order))},
            "param_groups": [
                {
                    "weight_decay": group["weight_decay"],
                    "eps": group["eps"],
                    "lr": 0.0,
                    "betas": tuple(betas),
                    "l2_regularization_rate": 0.0,
                    "correct_bias": True,
                    "amsgrad": False,
                    "params": [next(numbers) for _ in group["tensors"]],
                }
                for group in groups
            ],
        }
    tree["crystal"] = json.dumps(about | {"optimizer_order": order})

    def all_tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors("model"):
            yield f"model.{name}", tensor
        if not with_optimizer:
            return
        for moment in ("exp_avg", "exp_avg_sq"):
            for name, tensor in tensors(f"optimizer.{moment}"):
                yield f"optimizer.state.{place[name]}.{moment}", tensor
        for number, beta in zip((1, 2), betas, strict=True):
            power = beta_power(beta, about["optimizer_step"])
            for i in range(len(order)):
                yield f"optimizer.state.{i}.beta{number}_power", power

    return write(file, tree, all_tensors(), durable)


def beta_power(beta: float, updates: int) -> Tensor:
    """beta^(updates + 1) as Cerebras' AdamW holds it: multiplied up in fp32, update by update."""
    power = factor = np.float32(beta)
    for _ in range(updates):
        smaller = power * factor
        if smaller == power:  # the least numbers of fp32 round to themselves
            break
        power = smaller
    return torch.tensor(power)


def state_tensors(mdl: Mdl) -> tuple[dict, Iterator[tuple[str, Tensor]]]:
    """(`crystal` as a mapping, (name, fp32 tensor) of weights and moments under our checkpoint's names).

    Raises CheckpointError when the file does not say which moment belongs to which tensor.
    """
    about = _mapping(mdl.file, "crystal", mdl.values.get("crystal", "{}"))
    order = about.get("optimizer_order")
    moments = any(path.startswith("optimizer.state.") for path in mdl.shapes)
    if moments and order is None:
        raise CheckpointError(f"{mdl.file}: expected the order of the optimizer's tensors under 'crystal', none given")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for path in [*mdl.shapes, *mdl.aliases]:
            if path.startswith("model."):
                yield path, mdl.tensor(path).float()
        for moment in ("exp_avg", "exp_avg_sq") if moments else ():
            for i, name in enumerate(order):
                yield f"optimizer.{moment}.{name}", mdl.tensor(f"optimizer.state.{i}.{moment}").float()

    return about, tensors()

"""Cerebras' .mdl checkpoints (HDF5), read and written with h5py and none of Cerebras' packages.

A checkpoint is a nested mapping. Each tensor in it is a dataset named by its dotted path; numbers and texts are in
attributes of the file, and so is the form of the whole: `__spec__`, a tree as torch's pytree prints it. The format is
cerebras.pytorch's 0.5 (its storage/save.py); what we write, cstorch.load reads, and the other way round. Pickled
objects, which a .mdl may hold as well, are never opened.

Names are our decoder's: `model.NAME`, and `optimizer.state.I.exp_avg` with I the tensor's place in the optimizer's
groups. cstorch does not write down which name is which place, so the text `crystal` in the file does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from crystal.backends.cerebras.disk import Disk
from crystal.backends.cerebras.hdf5 import LZ4 as LZ4
from crystal.backends.cerebras.hdf5 import array_of, datasets, expect_own_data, expect_sound_texts
from crystal.config.bounded_yaml import shortened
from crystal.errors import CheckpointError
from crystal.files import from_json, reason, replacing
from crystal.output.printable import printable_line

VERSION = 0.5
CSTORCH = "2.10.0"
_FORMAT = ("v108", "v108")  # of HDF5 1.8: all that is no data has checksums
_NAMES = {torch.float32: ("torch.float32", 11), torch.int64: ("torch.int64", 5)}  # and their number in Cerebras' types
_STORED = {  # types of tensors, and what they lie in the file as
    torch.float32: np.dtype("<f4"),
    torch.bfloat16: np.dtype("<i2"),
    torch.float16: np.dtype("<f2"),
    torch.float64: np.dtype("<f8"),
    torch.int64: np.dtype("<i8"),
    torch.int32: np.dtype("<i4"),
    torch.int16: np.dtype("<i2"),
    torch.uint8: np.dtype("u1"),
}
EXACT = (torch.float32, torch.bfloat16, torch.float16)
"""Types that weights and moments may come in: fp32 holds their numbers."""
_DAMAGED = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, UnicodeError, OverflowError)
"""What h5py raises for a damaged file, each for one kind of damage."""
_SCALARS = (("scalar_value", "ScalarSerializer"), ("string_value", "StringSerializer"))


@dataclass(frozen=True)
class Mdl:
    """An opened checkpoint: the file, its tensors' paths with their shapes and types, its numbers and texts by path."""

    file: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    values: dict[str, Any]
    aliases: dict[str, str]  # tied tensors: path → path of the dataset

    def tensor(self, path: str) -> Tensor:
        """One tensor, read now; bf16 comes as bf16. Raises CheckpointError when it is not there or cannot be read."""
        path = self.aliases.get(path, path)
        if path not in self.shapes:
            raise CheckpointError(f"{self.file}: expected the tensor {path}, it is not there")
        dtype = self.dtypes[path]
        try:
            with h5py.File(self.file, "r") as file:
                expect_own_data(file[path], _STORED[dtype])
                array = array_of(file[path]).reshape(self.shapes[path])
        except _DAMAGED as error:
            raise _damaged(self.file, path, error) from None
        tensor = torch.from_numpy(array)
        # bf16 lies in the file as int16 with the same bits
        return tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor


def read(file: Path) -> Mdl:
    """Open a .mdl. Raises CheckpointError naming file and key: it is none, was never finished, has tensors whose data
    are not in it (links, external storage) or that are not what they say."""
    if Path(file).exists() and not Path(file).is_file():  # a pipe would be waited for
        raise CheckpointError(f"{file}: expected a Cerebras checkpoint (HDF5): it is no file")
    shapes, dtypes = {}, {}
    try:
        with h5py.File(file, "r") as opened:
            finished = {"__spec__", "__SUCCESS__"} <= set(opened.attrs)
            if finished:
                found = datasets(opened)
                expect_sound_texts(Path(file), found)
                attributes = dict(opened.attrs)
            if not finished or not np.all(attributes["__SUCCESS__"]):
                what = "expected a finished Cerebras checkpoint, its __spec__ or __SUCCESS__ is not there"
                raise CheckpointError(f"{file}: {what}")
            # a path's dots are part of its name: datasets lie flat
            for key, dataset in found.items():
                if dataset.shape is not None and "dtypes" in dataset.attrs:
                    shapes[key], dtypes[key] = _described(Path(file), key, dataset)
    except _DAMAGED as error:
        why = "no such file" if not Path(file).exists() else _line(error)
        raise CheckpointError(f"{file}: expected a Cerebras checkpoint (HDF5): {why}") from None
    values, aliases = _values(Path(file), attributes)
    for path in aliases.keys() & shapes.keys():
        raise CheckpointError(f"{file}: {path}: expected a tensor or a link to another, it is both")
    return Mdl(Path(file), shapes, dtypes, values, {path: to for path, to in aliases.items() if to in shapes})


def _described(file: Path, key: str, dataset: h5py.Dataset) -> tuple[tuple[int, ...], torch.dtype]:
    """A tensor's shape and type, when it is as it was described."""
    names = [str(name) for name in np.atleast_1d(dataset.attrs["dtypes"])]
    dtype = next((known for known in _STORED if names == [str(known)]), None)
    try:
        if dtype is None:
            raise ValueError(f"expected a tensor of a type that is known here, got {', '.join(names)[:60]}")
        if np.any(dataset.attrs.get("compressed", False)):
            raise ValueError("it is compressed by Cerebras' own weight format")
        said = np.asarray(dataset.attrs.get("shapes", [dataset.shape]))
        if said.shape != (1, len(dataset.shape)) or tuple(said[0].tolist()) != dataset.shape:
            raise ValueError(f"expected the shape {said.tolist()} that it says, got {list(dataset.shape)}")
        expect_own_data(dataset, _STORED[dtype])
    except _DAMAGED as error:
        raise _damaged(file, key, error) from None
    return dataset.shape, dtype


def _values(file: Path, attributes: dict) -> tuple[dict[str, Any], dict[str, str]]:
    """Numbers and texts by path, and tied tensors; from the descriptions in the file's attributes."""
    values, aliases = {}, {}
    for key, text in attributes.items():
        path = key.removesuffix(".__metadata__")
        if path == key:
            continue
        leaf = mapping_of(file, key, text).get(key, {})
        if not isinstance(leaf, dict):
            raise CheckpointError(f"{file}: {key}: expected a JSON mapping under it, it is damaged")
        if leaf.get("__LINKED__"):
            if not isinstance(leaf.get("key"), str):
                raise CheckpointError(f"{file}: {key}: expected the name of another tensor under `key`")
            aliases[path] = leaf["key"]
        for held, _ in _SCALARS:
            if held in leaf:
                kinds = (str,) if held == "string_value" else (int, float)
                if not isinstance(leaf[held], kinds):
                    wanted = "a text" if kinds == (str,) else "a number"
                    raise CheckpointError(f"{file}: {path}: expected {wanted}, got {str(leaf[held])[:60]!r}")
                values[path] = leaf[held]
    for path, target in aliases.items():
        if target in values:
            values[path] = values[target]
    return values, aliases


def mapping_of(file: Path, key: str, text: Any) -> dict:
    """JSON that lies in a file's attribute. Raises CheckpointError."""
    try:
        found = from_json(text, finite=True)
    except (TypeError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: {key}: expected a JSON mapping, it is damaged")
    return found


def _damaged(file: Path, key: str, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file}: {printable_line(shortened(key, 200))}: cannot be read: {_line(error)}")


def _line(error: Exception) -> str:
    """What h5py says, in a line without quotes around it."""
    return printable_line(shortened(str(error.args[0] if error.args else error), 300))


def write(file: Path, tree: dict, tensors: Iterable[tuple[str, Tensor]], durable: bool = True) -> Path:
    """Write a .mdl, whole or not at all.

    tree: nested dicts, lists and tuples of numbers and texts, with None where a tensor belongs; tensors: those, by
    dotted path, fp32 or int64, one at a time and in any order. Raises CheckpointError when the disk fails.
    """
    file = Path(file)
    leaves = dict(_leaves(tree, ()))
    waiting = {path for path, value in leaves.items() if value is None}
    try:
        with (
            replacing(file, durable, alone=True) as aside,
            Disk(aside) as disk,
            h5py.File(disk, "w", driver="fileobj", libver=_FORMAT) as opened,
        ):
            for path, tensor in tensors:
                if path not in waiting:
                    raise ValueError(f"{path}: no such tensor is expected")
                waiting.remove(path)
                _write_tensor(opened, path, tensor.detach().contiguous())
                disk.expect_written()
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
        raise CheckpointError(f"{file}: cannot be written: {reason(error)}", file=file) from None
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
    about = json.loads(json.dumps(about | {"optimizer_order": order}))
    tree["crystal"] = json.dumps(about | {"sha256": _digest(about)})

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

    Raises CheckpointError when the file does not say which moment belongs to which tensor, when `crystal` has changed,
    and while iterating for numbers that are not finite.
    """
    about = _about(mdl)
    order = about.get("optimizer_order")
    moments = any(path.startswith("optimizer.state.") for path in mdl.shapes)
    if moments and order is None:
        raise CheckpointError(f"{mdl.file}: expected the order of the optimizer's tensors under 'crystal', none given")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for path in [*mdl.shapes, *mdl.aliases]:
            if path.startswith("model."):
                yield path, _finite(mdl, path)
        for moment in ("exp_avg", "exp_avg_sq") if moments else ():
            for i, name in enumerate(order):
                yield f"optimizer.{moment}.{name}", _finite(mdl, f"optimizer.state.{i}.{moment}")

    return about, tensors()


def _about(mdl: Mdl) -> dict:
    """What crystal wrote into the file about it; empty where it did not."""
    text = mdl.values.get("crystal", "{}")
    about = mapping_of(mdl.file, "crystal", text)
    if about.pop("sha256", None) not in (None, _digest(about)):  # none: before there was one
        raise CheckpointError(f"{mdl.file}: crystal: expected what has the sha256 that is in it, it has changed")
    step, order = about.get("optimizer_step", 0), about.get("optimizer_order", [])
    if type(step) is not int or not 0 <= step < 1 << 63:
        raise CheckpointError(f"{mdl.file}: crystal.optimizer_step: expected a count, got {str(step)[:60]!r}")
    names = isinstance(order, list) and all(isinstance(name, str) for name in order)
    if not names or len(set(order)) != len(order):
        raise CheckpointError(f"{mdl.file}: crystal.optimizer_order: expected names of tensors, each once")
    if not isinstance(about.get("state", {}), dict):
        raise CheckpointError(f"{mdl.file}: crystal.state: expected a mapping, got {str(about['state'])[:60]!r}")
    return about


def _digest(about: dict) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _finite(mdl: Mdl, path: str) -> Tensor:
    """A tensor in fp32, which holds its numbers exactly."""
    tensor = mdl.tensor(path)
    if tensor.dtype not in EXACT:
        raise CheckpointError(f"{mdl.file}: {path}: expected fp32, bf16 or fp16, got {tensor.dtype}")
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{mdl.file}: {path}: expected finite numbers, it has infinite ones or none")
    if path.endswith(".exp_avg_sq") and path.startswith("optimizer.") and (tensor < 0).any():
        raise CheckpointError(f"{mdl.file}: {path}: expected squares, it has numbers below 0")
    return tensor.float()

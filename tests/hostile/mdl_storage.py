"""Damages of what a .mdl is as an HDF5 file: links, storage, filters, types, names, attributes."""

import random
import shutil
from pathlib import Path

import h5py
import numpy as np


def _some(file: h5py.File, rng: random.Random, start: str = "") -> str:
    return rng.choice([k for k in file if file[k].shape is not None and k.startswith(start) and file[k].ndim])


def _again(file: h5py.File, name: str, **how: object) -> h5py.Dataset:
    """A dataset made anew, with the attributes that it had."""
    attributes, numbers = dict(file[name].attrs), np.asarray(file[name])
    del file[name]
    made = file.create_dataset(name, **({"data": numbers} | how))
    for key, value in attributes.items():
        made.attrs[key] = value
    return made


def linked(path: Path, rng: random.Random) -> str:
    """Data that lie elsewhere, where they are right."""
    other = path.with_name("other.mdl")
    shutil.copy(path, other)
    with h5py.File(path, "a") as file:
        name = _some(file, rng)
        how = rng.choice(["soft", "external", "hard", "dangling", "raw", "virtual", "raw, absolute"])
        numbers, attributes = np.asarray(file[name]), dict(file[name].attrs)
        if how in ("soft", "hard"):
            file.move(name, "elsewhere")
            file[name] = h5py.SoftLink("/elsewhere") if how == "soft" else file["elsewhere"]
            return f"{how}: {name}"
        del file[name]
        if how in ("external", "dangling"):
            file[name] = h5py.ExternalLink("other.mdl" if how == "external" else "/nowhere.mdl", f"/{name}")
            return f"{how}: {name}"
        if how == "virtual":
            layout = h5py.VirtualLayout(shape=numbers.shape, dtype=numbers.dtype)
            layout[...] = h5py.VirtualSource(str(other), name, shape=numbers.shape)
            made = file.create_virtual_dataset(name, layout)
        else:
            raw = path.with_name("raw")
            raw.write_bytes(numbers.tobytes())
            where = "/etc/passwd" if how == "raw, absolute" else str(raw)
            made = file.create_dataset(name, numbers.shape, numbers.dtype, external=[(where, 0, numbers.nbytes)])
        for key, value in attributes.items():
            made.attrs[key] = value
    return f"{how}: {name}"


def packed(path: Path, rng: random.Random) -> str:
    """Packed as HDF5 itself can, which is fine, or by what is not for checkpoints, or in pieces that are not there."""
    with h5py.File(path, "a") as file:
        name = _some(file, rng)
        hows = ["gzip", "shuffle", "fletcher32", "lzf", "scaleoffset", "cut", "none stored", "LZ4", "bomb", "big"]
        how = rng.choice(hows)
        shape, dtype = file[name].shape, file[name].dtype
        if how in ("gzip", "lzf"):
            _again(file, name, compression=how)
        elif how in ("shuffle", "fletcher32"):
            _again(file, name, **{how: True})
        elif how == "scaleoffset":
            _again(file, name, scaleoffset=2)
        elif how == "none stored":
            attributes = dict(file[name].attrs)
            del file[name]
            file.create_dataset(name, shape, dtype, chunks=rng.choice([None, shape])).attrs.update(attributes)
        elif how == "big":
            attributes = dict(file[name].attrs) | {"shapes": [[1 << 20] * len(shape)]}
            del file[name]
            made = file.create_dataset(name, (1 << 20,) * len(shape), dtype, chunks=(64,) * len(shape))
            made.attrs.update(attributes)
        elif how == "bomb":
            _again(file, name, data=np.zeros((4096, 512), dtype), compression="gzip", chunks=(4096, 512))
        else:
            _lz4(file, name, cut_it=how == "cut", rng=rng)
    return f"{how}: {name}"


def _lz4(file: h5py.File, name: str, cut_it: bool, rng: random.Random) -> None:
    numbers, attributes = np.asarray(file[name]), dict(file[name].attrs)
    raw, nbytes = numbers.tobytes(), numbers.nbytes.to_bytes(8, "big")
    whole = nbytes + len(raw).to_bytes(4, "big") * 2 + raw  # one block that did not get smaller
    if cut_it:
        sizes = [whole[:8] + bytes(4) + whole[12:], b"\xff" * 8 + whole[8:], bytes(8) + whole[8:]]
        whole = rng.choice([whole[:-3], whole[:5], whole[:12], whole[:12] + b"\xff" * 4 + whole[16:], *sizes])
    del file[name]
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_chunk(numbers.shape)
    creation.set_filter(32004, h5py.h5z.FLAG_OPTIONAL, (0,))
    space = h5py.h5s.create_simple(numbers.shape)
    made = h5py.Dataset(h5py.h5d.create(file.id, name.encode(), h5py.h5t.NATIVE_FLOAT, space, creation))
    made.id.write_direct_chunk((0,) * numbers.ndim, whole)
    for key, value in attributes.items():
        made.attrs[key] = value


def other_numbers(path: Path, rng: random.Random) -> str:
    """Of another type or shape, or none."""
    with h5py.File(path, "a") as file:
        name = _some(file, rng)
        numbers = np.asarray(file[name])
        hows = ["f8", ">f4", "f2", "i4", "S4", "vlen", "flat", "turned", "ranks", "empty", "scalar", "compound"]
        how = rng.choice(hows)
        if how in ("f8", ">f4", "f2", "i4", "S4"):
            made = _again(file, name, data=numbers.astype(how))
            if how == "f8" and rng.random() < 0.5:
                made.attrs["dtypes"] = ["torch.float64"]
        elif how == "vlen":
            _again(file, name, data=None, shape=numbers.shape, dtype=h5py.string_dtype())
        elif how == "compound":
            _again(file, name, data=np.zeros(numbers.shape, [("a", "f4"), ("b", "i4")]))
        elif how == "empty":
            _again(file, name, data=h5py.Empty("f4"))
        elif how == "scalar":
            _again(file, name, data=np.float32(1))
        else:
            shapes = {"flat": (numbers.size, 1), "turned": (*numbers.shape, 1)[::-1], "ranks": (1,) * 9 + numbers.shape}
            made = _again(file, name, data=numbers.reshape(shapes[how]))
            if rng.random() < 0.5:
                made.attrs["shapes"] = [list(made.shape)]
    return f"{how}: {name}"


def not_finite(path: Path, rng: random.Random) -> str:
    with h5py.File(path, "a") as file:
        name = _some(file, rng)
        value = rng.choice([np.nan, np.inf, -np.inf] + ([-1.0] if "exp_avg_sq" in name else []))
        file[name][(0,) * file[name].ndim] = value
    return f"{name}: {value}"


def names(path: Path, rng: random.Random) -> str:
    """A tensor that is missing, is called otherwise, is one too many, or a group."""
    with h5py.File(path, "a") as file:
        name = _some(file, rng, rng.choice(["model.", "optimizer.state."]))
        how = rng.choice(["gone", "renamed", "more", "group", "swapped"])
        if how == "gone":
            del file[name]
        elif how == "renamed":
            file.move(name, name + "2")
        elif how == "more":
            file.copy(name, rng.choice(["model.blocks.7.attn.q.weight", "model.", "model.x"]))
        elif how == "group":
            del file[name]
            file.create_group(name)
        else:
            alike = [k for k in file if k != name and file[k].shape not in (None, file[name].shape)]
            other = rng.choice(alike)
            file.move(name, "aside")
            file.move(other, name)
            file.move("aside", other)
    return f"{how}: {name}"


ODD = ("", "x", 7, 0.5, True, [], [1], np.arange(3), np.array(["a", "b"], dtype=object), h5py.Empty("f"), b"\xff\xfe",
       "[" * 9000)  # fmt: skip


def described_otherwise(path: Path, rng: random.Random) -> str:
    """An attribute of a tensor, or of the file, is something else or gone."""
    with h5py.File(path, "a") as file:
        name = _some(file, rng)
        holder = rng.choice([file, file[name], file[name]])
        of_tensors = ["dtypes", "shapes", "compressed", "dtypes"]
        key = rng.choice(["__spec__", "__SUCCESS__"] if holder is file else of_tensors)
        value = rng.choice(ODD)
        if rng.random() < 0.3:
            del holder.attrs[key]
            return f"{name}, {key}: gone"
        texts = ["torch.float16", "torch.bfloat16", "torch.bool", "torch.complex64", "float32", "torch.float32x"]
        if key == "dtypes" and rng.random() < 0.5:
            value = [rng.choice(texts)]
        holder.attrs[key] = value
    return f"{name}, {key}: {str(value)[:40]!r}"

"""Damages of weights in a Hugging Face directory: files, headers of safetensors, pickles, indexes of shards."""

import json
import os
import random
import struct
import zipfile
from pathlib import Path

import torch


def _weights(directory: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(p for p in directory.iterdir() if p.suffix in (".safetensors", ".bin")))


def cut(directory: Path, rng: random.Random) -> str:
    path = _weights(directory, rng)
    os.truncate(path, rng.choice([0, 1, 8, 9, rng.randrange(path.stat().st_size)]))
    return path.name


def longer(directory: Path, rng: random.Random) -> str:
    path = _weights(directory, rng)
    path.write_bytes(path.read_bytes() + b"x" * rng.choice([1, 4096]))
    return path.name


def bits(directory: Path, rng: random.Random) -> str:
    path = _weights(directory, rng)
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"{path.name} at {at}"


def _header(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def header(directory: Path, rng: random.Random) -> str:
    """The header of a safetensors file says something else, in right JSON or not."""
    path = _weights(directory, rng)
    if path.suffix == ".bin":
        return pickled(directory, rng)
    content, data = _header(path)
    name = rng.choice([n for n in content if n != "__metadata__"])
    entry = content[name]
    how = rng.choice(["dtype", "turned", "offsets", "overlap", "renamed", "gone", "more", "type", "twice", "length",
                      "deep", "spaces", "negative", "huge", "metadata"])  # fmt: skip
    begin, end = entry["data_offsets"]
    if how == "dtype":
        entry["dtype"] = rng.choice(["F64", "I32", "F16", "BF16", "F8_E4M3", "BOOL", "f32", 7])
    elif how == "turned":
        entry["shape"] = [*entry["shape"], 1][::-1]
    elif how == "offsets":
        wrong = [[begin + 4, end + 4], [end, begin], [begin, end - 4], [0], "x", [0, 1 << 63]]
        entry["data_offsets"] = rng.choice(wrong)
    elif how == "overlap":
        other = rng.choice([n for n in content if n not in ("__metadata__", name)])
        content[other]["data_offsets"] = entry["data_offsets"]
    elif how in ("renamed", "gone", "more"):
        held = content[name] if how == "more" else content.pop(name)
        if how != "gone":
            content[rng.choice([name + "2", "", "lm_head.weight2", "../x", "a\nb"])] = held
    elif how == "type":
        content[name] = rng.choice([None, [], 7, {"dtype": "F32"}])
    elif how in ("negative", "huge"):
        entry["shape"] = [-1] if how == "negative" else [1 << 62, 1 << 62]
    elif how == "metadata":
        content["__metadata__"] = rng.choice([7, {"a": 1}, [], {"format": "x" * 9000}])
    text = json.dumps(content).encode()
    if how == "twice":
        text = text[:-1] + b"," + json.dumps({name: entry}).encode()[1:]
    elif how == "deep":
        text = b'{"a":' * 90_000
    elif how == "spaces":
        text += b" " * 9_000_000
    size = rng.choice([0, 1 << 63, len(text) + 7, 1 << 33]) if how == "length" else len(text)
    path.write_bytes(struct.pack("<Q", size) + text + data)
    return f"{path.name}: {how}: {name}"


def pickled(directory: Path, rng: random.Random) -> str:
    """A `.bin` is of other things than tensors, would run code, or is packed into next to nothing."""
    path = sorted(directory.glob("*.bin"))[0] if list(directory.glob("*.bin")) else directory / "pytorch_model.bin"
    if path.name == "pytorch_model.bin":
        for file in directory.glob("*safetensors*"):
            file.unlink()
    how = rng.choice(["code", "list", "values", "nested", "text", "zip", "other types", "nan", "code in zip", "bool"])
    held = torch.load(path) if path.exists() else {"model.norm.weight": torch.ones(8)}
    name = next(iter(held))
    if how == "code":
        path.write_bytes(b"cos\nsystem\n(S'touch %b'\ntR." % str(directory.parent / "ran").encode())
    elif how == "code in zip":
        torch.save({name: _Code(str(directory.parent / "ran"))}, path)
    elif how == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("archive/data.pkl", bytes(20_000_000))
    elif how == "text":
        path.write_bytes(b"no weights")
    else:
        wrong = {"list": [held[name]], "values": held | {name: 7}, "nested": {"model": held}, "nan": held | {
            name: held[name] * float("nan")}, "other types": held | {name: held[name].double()}, "bool": held | {
            name: held[name] > 0}}  # fmt: skip
        torch.save(wrong[how], path)
    return f"{path.name}: {how}"


class _Code:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def index(directory: Path, rng: random.Random) -> str:
    """The index of shards leads elsewhere, or says what is not so."""
    paths = list(directory.glob("*.index.json"))
    if not paths:
        paths = [directory / "model.safetensors.index.json"]
        whole = directory / "model.safetensors"
        whole.rename(directory / "model-00001-of-00001.safetensors")
        names = [n for n in _header(directory / "model-00001-of-00001.safetensors")[0] if n != "__metadata__"]
        paths[0].write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    mapping = json.loads(paths[0].read_text())
    files = mapping["weight_map"]
    name = rng.choice(sorted(files))
    how = rng.choice("outside absolute nowhere type no-map empty gone config itself number dots".split())
    wrong = {"outside": "../x.safetensors", "absolute": "/etc/passwd", "nowhere": "model-9.safetensors", "number": 7,
             "config": "config.json", "itself": paths[0].name, "type": [files[name]], "dots": ".."}  # fmt: skip
    if how in wrong:
        files[name] = wrong[how]
    elif how == "gone":
        shard = directory / files[name]
        shard.unlink()
    else:
        mapping["weight_map"] = {} if how == "empty" else rng.choice([None, [], "x", 7])
    paths[0].write_text(json.dumps(mapping))
    return how

"""Damaged Cerebras checkpoints (.mdl), from a seed: bytes, HDF5's links and storage, descriptions, JSON, tokenizers.

The bed is a small checkpoint that crystal exported, with moments and a tokenizer. A case damages a copy and imports it;
`fine` is a checkpoint that reads as the undamaged one's.
"""

import functools
import itertools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import torch
from hostile.case import Case, Outcome, command, judged
from hostile.checkpoints import SAMPLE, STEP, read_all
from hostile.mdl_storage import described_otherwise, linked, names, not_finite, other_numbers, packed

from crystal import checkpoint
from crystal.backends.cerebras.mdl import _digest
from crystal.checkpoint.seal_file import parameters
from crystal.interop.cerebras_mdl import export_mdl, import_mdl
from crystal.zoo.config import ModelConfig

EITHER = ("refused", "fine")
Damage = Callable[[Path, random.Random], str]
MODEL = {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 8, "vocab_size": 352, "max_seq_len": 32, "bias": True}


@functools.cache
def bed() -> Path:
    """A directory with a.mdl and the tokenizer, not to be changed."""
    directory = Path(tempfile.mkdtemp(prefix="crystal-mdl-"))
    old = json.loads((SAMPLE / f"run/checkpoints/{STEP}/checkpoint.json").read_text())["state"]
    tokenizer = SAMPLE / f"run/checkpoints/{STEP}" / old["tokenizer"]
    config, drawn = ModelConfig.model_validate(MODEL), torch.Generator().manual_seed(1)
    kinds = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    tensors = [
        (f"{kind}.{name}", torch.randn(shape, generator=drawn).abs() + 0.1)
        for kind in kinds
        for name, shape in parameters(config)
    ]
    keys = ("added_tokens", "tokenizer", "step", "stage")
    state = {"model": config.model_dump(mode="json"), "backend": {"optimizer_step": 8}} | {k: old[k] for k in keys}
    checkpoint.write(directory / "from", tensors, state, [tokenizer])
    export_mdl(directory / "from", directory / "a.mdl")
    shutil.copy(tokenizer, directory / tokenizer.name)
    return directory


@functools.cache
def undamaged() -> str:
    with tempfile.TemporaryDirectory() as scratch:
        import_mdl(bed() / "a.mdl", Path(scratch) / "to")
        return read_all(Path(scratch) / "to")


@functools.cache
def data_bytes() -> tuple[tuple[int, int], ...]:
    """Where the numbers lie in the file: (begin, end) of each dataset."""
    with h5py.File(bed() / "a.mdl") as file:
        found = [item.id for item in file.values() if item.shape is not None and item.size]
        return tuple((dataset.get_offset(), dataset.get_offset() + dataset.get_storage_size()) for dataset in found)


# --- bytes


def _at(rng: random.Random, size: int, among_numbers: bool) -> int:
    while True:
        at = rng.choice(data_bytes())[0] + rng.randrange(32) if among_numbers else rng.randrange(size)
        if any(begin <= at < end for begin, end in data_bytes()) == among_numbers:
            return at


def flipped(path: Path, rng: random.Random, among_numbers: bool = False) -> str:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[_at(rng, len(data), among_numbers)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return ""


def a_number_flipped(path: Path, rng: random.Random) -> str:
    return flipped(path, rng, among_numbers=True)


def zeroed(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    at, length = _at(rng, len(data), False), rng.choice([1, 8, 64])
    for i in range(at, min(at + length, len(data))):
        if not any(begin <= i < end for begin, end in data_bytes()):
            data[i] = 0
    path.write_bytes(data)
    return f"{length} from {at}"


def cut(path: Path, rng: random.Random) -> str:
    os.truncate(path, rng.choice([0, 1, 8, 100, rng.randrange(path.stat().st_size)]))
    return ""


def longer(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    path.write_bytes(rng.choice([data + b"x" * 512, b"\0" * 512 + data, data * 2, data]))
    if path.stat().st_size == len(data):
        os.truncate(path, 2 << 40)  # of zeros that were never written
    return ""


def another_file(path: Path, rng: random.Random) -> str:
    how = rng.choice(["text", "directory", "pipe", "/dev/zero", "/dev/null", "itself", "nowhere", "elsewhere", "zip"])
    aside = path.rename(path.with_name("moved.mdl"))
    if how in ("text", "zip"):
        path.write_bytes(b"no HDF5" if how == "text" else b"PK\3\4" + bytes(100))
    elif how == "directory":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"itself": path.name, "elsewhere": aside.name}.get(how, how))
    return how


# --- JSON


PLACES = ("state", "state.model", "state.model.d_model", "state.model.mup", "state.optimizer", "state.tokenizer",
          "state.added_tokens", "state.step", "state.backend", "optimizer_step", "optimizer_order", "state.eos_id",
          "state.tokenizer_kind", "state.stage", "state.model.vocab_size", "optimizer_order.0", "sha256")  # fmt: skip
VALUES = (None, True, 7, -1, 0.5, "x", "", [], {}, [1], {"a": 1}, [[]], "\ud800", 1 << 70, 1e999, float("nan"))
PATHS = ("/etc/passwd", "../tokenizer.json", "..", ".", "a/b", "/etc", "checkpoint.json", "a.mdl", "x" * 300, "a\0b",
         "shard-00000.safetensors", "~/.ssh/id_rsa", "tokenizer.json/../a.mdl", "TOKENIZER.JSON")  # fmt: skip


def in_crystal(path: Path, rng: random.Random) -> str:
    """What crystal says of the file says something else, and is sealed again as if somebody had meant it, or not."""
    with h5py.File(path, "a") as file:
        key = "crystal.__metadata__"
        entry = json.loads(file.attrs[key])
        about = json.loads(entry[key]["string_value"])
        place = rng.choice([*PLACES, "state.tokenizer", "state.tokenizer"])
        *way, last = place.split(".")
        node = functools.reduce(lambda n, part: n[part], way, about) if way else about
        if isinstance(node, list):
            last = int(last)
        old = node[last] if isinstance(node, list) else node.get(last)
        values = PATHS if place == "state.tokenizer" else [v for v in VALUES if type(v) is not type(old)]
        values = [v for v in values if place != "state.step" or v is not None]  # which is a checkpoint without one
        value = node[last] = rng.choice(values)
        sealed = place != "sha256" and rng.random() < 0.7
        if sealed:
            about.pop("sha256", None)
            about["sha256"] = _digest(about)
        entry[key]["string_value"] = json.dumps(about)
        file.attrs[key] = json.dumps(entry)
    return f"{place} = {value!r}{', sealed again' if sealed else ''}"


def other_json(path: Path, rng: random.Random) -> str:
    """A description in the file's attributes is no JSON, or other JSON."""
    with h5py.File(path, "a") as file:
        keys = [key for key in file.attrs if key.endswith(".__metadata__")]
        key = rng.choice([*keys, "crystal.__metadata__", "crystal.__metadata__"])
        name = key.removesuffix(".__metadata__")
        texts = ["{", "", "[]", "7", "null", "NaN", "[" * 9000, '{"a":' * 5000, json.dumps({key: 7}), "{}",
                 json.dumps({key: {"__LINKED__": True}}), json.dumps({key: {"__LINKED__": True, "key": name}}),
                 json.dumps({key: {"__LINKED__": True, "key": [1]}}), json.dumps({key: {"string_value": 7}}),
                 json.dumps({key: {"string_value": "{" * 3000}}), json.dumps({key: {"scalar_value": "x"}}),
                 json.dumps({key: {"__TYPE__": "PickleSerializer", "string_value": "gASVJAAAAA=="}})]  # fmt: skip
        file.attrs[key] = value = rng.choice(texts)
    return f"{name}: {value[:60]!r}"


def beside(path: Path, rng: random.Random) -> str:
    """The tokenizer beside the file: damaged, a link, another's, gone (which is said)."""
    tokenizer = next(p for p in path.parent.iterdir() if p.name.startswith("tokenizer"))
    how = rng.choice(["cut", "flipped", "another", "link out", "link inside", "directory", "empty"])
    data = tokenizer.read_bytes()
    if how == "cut":
        tokenizer.write_bytes(data[: rng.randrange(len(data) - 2)])
    elif how == "flipped":
        at = rng.randrange(len(data))
        tokenizer.write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    elif how in ("another", "empty"):
        tokenizer.write_bytes(b'{"model": {"type": "WordLevel", "vocab": {"a": 0}}}' if how == "another" else b"")
    elif how.startswith("link"):
        tokenizer.rename(path.with_name("moved") if how == "link inside" else path.parent.with_name("moved"))
        tokenizer.symlink_to("moved" if how == "link inside" else "../moved")
    else:
        tokenizer.unlink()
        tokenizer.mkdir()
    return how


def nothing(path: Path, rng: random.Random) -> str:
    return ""


DAMAGES: dict[str, tuple[Damage, tuple]] = {
    "bits flipped": (flipped, EITHER),
    "bits of numbers flipped": (a_number_flipped, (*EITHER, "silent")),  # no sum is made of them: other programs' form
    "bytes zeroed": (zeroed, EITHER),
    "cut": (cut, ("refused",)),
    "longer": (longer, ("fine",)),  # HDF5 has room for other things before and behind
    "another file": (another_file, EITHER),
    "data elsewhere": (linked, EITHER),
    "packed": (packed, EITHER),
    "other numbers": (other_numbers, ("refused",)),
    "not finite": (not_finite, ("refused",)),
    "names": (names, ("refused",)),
    "described otherwise": (described_otherwise, EITHER),
    "another crystal": (in_crystal, EITHER),
    "other JSON": (other_json, EITHER),
    "beside": (beside, EITHER),
    "undamaged": (nothing, ("fine",)),
}


def cases(seed: int, count: int) -> Iterator[Case]:
    """The first `count` damaged files of a seed, all kinds in turn."""
    for i, kind in enumerate(itertools.islice(itertools.cycle(DAMAGES), count)):
        yield Case(kind, f"{kind} ({seed}:{i})", functools.partial(_judge, kind, f"{seed}:{i}"), DAMAGES[kind][1])


def _judge(kind: str, seed: str, scratch: Path) -> Outcome:
    directory = scratch / "in"
    directory.mkdir(parents=True)
    for file in bed().iterdir():
        if file.is_file():
            shutil.copy(file, directory)
    path, to = directory / "a.mdl", scratch / "to"
    done = DAMAGES[kind][0](path, random.Random(seed))

    def call() -> str:
        import_mdl(path, to)
        return read_all(to)

    right = undamaged()
    work = command("import", path, "--to", to, instead=call)
    outcome = judged(work, lambda _, result: result == right)
    left = [p.name for p in scratch.iterdir() if p.name not in ("in", "moved")]
    if outcome.word == "refused" and left:
        return Outcome("silent", f"{done}: {left[0]} was left: {outcome.message}")
    return Outcome(outcome.word, f"{done}: {outcome.message}", outcome.cpu_seconds)

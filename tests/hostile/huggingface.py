"""Damaged Hugging Face directories, from a seed: config.json, weights of every make, indexes, tokenizers, links.

Beds are tiny directories: a LLaMA in one safetensors file, one in shards, and a CrystalCoder in torch's `.bin` shards.
A case damages a copy and imports it; `fine` is a checkpoint that reads as the undamaged one's, or of whose tokenizer a
note says what is missing.
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

import torch
from hostile.case import Case, Outcome, command, judged
from hostile.checkpoints import read_all
from hostile.huggingface_weights import bits, cut, header, index, longer, pickled
from interop.directories import CRYSTAL, crystal_state
from interop.vocabularies import spec
from safetensors.torch import save_file

from crystal import checkpoint
from crystal.interop.huggingface_forms import config_from_json, config_to_json, published_tensors
from crystal.interop.huggingface_import import import_published
from crystal.zoo.config import ModelConfig

EITHER = ("refused", "fine")
UNKNOWN = (*EITHER, "silent")  # a bit of a weight, or of a piece of a vocabulary: no published form has a sum of them
Damage = Callable[[Path, random.Random], str]
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 384, "hidden_size": 8,
    "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "rope_scaling": None, "initializer_range": 0.02, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": True,
    "attention_dropout": 0.0, "pretraining_tp": 1, "transformers_version": "4.33.0",
}  # fmt: skip
SMALL = {
    "vocab_size": 384, "n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_inner": 12, "rotary_dim": 2,
    "mup_width_scale": 0.5, "bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "use_cache": True,
}  # fmt: skip
HARMLESS = ("architectures", "torch_dtype", "use_cache", "attention_dropout", "pretraining_tp", "transformers_version",
            "resid_pdrop", "auto_map", "initializer_range")  # fmt: skip


@functools.cache
def bed(name: str) -> Path:
    """A directory in/, not to be changed."""
    directory = Path(tempfile.mkdtemp(prefix="crystal-hf-")) / "in"
    directory.mkdir()
    mapping = CRYSTAL | SMALL if name == "bin" else LLAMA
    drawn = torch.Generator().manual_seed(2)
    if name == "bin":
        state = crystal_state({**mapping})
        names = list(state)
        halves = {"00001-of-00002": names[: len(names) // 2], "00002-of-00002": names[len(names) // 2 :]}
        for half, held in halves.items():
            torch.save({n: state[n].clone() for n in held}, directory / f"pytorch_model-{half}.bin")
        weight_map = {n: f"pytorch_model-{half}.bin" for half, held in halves.items() for n in held}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        config, form = config_from_json(mapping, "config.json")
        state = {t.name: torch.randn(t.shape, generator=drawn) for t in published_tensors(config, form)}
        names = list(state)
        parts = [names] if name == "single" else [names[::2], names[1::2]]
        files = ["model.safetensors"] if name == "single" else [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for file, held in zip(files, parts, strict=True):
            save_file({n: state[n] for n in held}, directory / file, {"format": "pt"})
        if name == "shards":
            weight_map = {n: file for file, held in zip(files, parts, strict=True) for n in held}
            index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, content in {
        "config.json": mapping,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": [2, 5], "max_length": 64},
        "tokenizer_config.json": {"add_bos_token": True, "tokenizer_class": "LlamaTokenizer"},
        "tokenizer.json": spec(),
    }.items():
        (directory / file).write_text(json.dumps(content))
    return directory


def read(directory: Path) -> str:
    """What a checkpoint is, to the bit, and what is said of its tokenizer."""
    state = checkpoint.read(directory).state
    said = {key: state.get(key) for key in ("bos_id", "eos_id", "pad_id", "tokenizer", "tokenizer_kind", "model")}
    return read_all(directory) + json.dumps(said)


@functools.cache
def undamaged(name: str) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        import_published(bed(name), Path(scratch) / "to")
        return read(Path(scratch) / "to")


# --- config.json


OTHERS = (None, True, False, 7, -1, 0, 0.5, "x", "", "8", [], {}, [1], {"a": 1}, 1 << 40, 10**30, 1e999, float("nan"))


def _edit(path: Path, change: Callable[[dict], object]) -> None:
    mapping = json.loads(path.read_text())
    change(mapping)
    path.write_text(json.dumps(mapping))


def another_value(directory: Path, rng: random.Random) -> str:
    """A key of config.json has a value of another type, or another number: what is taken must be what it says."""
    path = directory / "config.json"
    mapping = json.loads(path.read_text())
    more = {"quantization_config": {"bits": 4}, "rope_parameters": {"rope_type": "yarn"}, "head_dim": 3,
            "n_inner": None, "partial_rotary_factor": 0.5, "transformers_weights": "../x.safetensors",
            "logit_scale": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0},
            "scale_attn_by_inverse_layer_idx": True}  # fmt: skip
    key = rng.choice([*mapping, *more])
    value = more[key] if key in more and rng.random() < 0.5 else rng.choice(OTHERS)
    mapping[key] = value
    path.write_text(json.dumps(mapping))
    return f"{key} = {str(value)[:40]!r}"


def as_it_says(directory: Path, to: Path) -> bool:
    """Whether a checkpoint's model is that of its directory's config.json: written again, each key says the same."""
    said = json.loads((directory / "config.json").read_text())
    written = config_to_json(ModelConfig.model_validate(checkpoint.read(to).state["model"]))
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    for key, value in said.items():
        if key in HARMLESS or key in tokens or value is None:
            continue
        if key in written and (written[key] != value or isinstance(value, bool) != isinstance(written[key], bool)):
            return False
        if key not in written and value not in ({}, [], False, 0, 1, 1.0, ""):
            return False
    return True


def a_key_gone(directory: Path, rng: random.Random) -> str:
    path, gone = directory / "config.json", []
    _edit(path, lambda m: gone.append(rng.choice([k for k in m if k not in HARMLESS])) or m.pop(gone[0]))
    return gone[0]


def other_json(directory: Path, rng: random.Random) -> str:
    """A file that should be JSON is something else."""
    files = [p for p in sorted(directory.glob("*.json")) if p.name != "tokenizer.json"]
    path = rng.choice(files)
    text = path.read_bytes()
    at = rng.randrange(len(text))
    texts = [b"", b"[]", b"7", b"null", b"{", text[:at], text + b"}", b"[" * 100_000, b'{"a":' * 100_000, b"\xff",
             text.decode().encode("utf-16"), text[:-1] + b', "model_type": "llama", "model_type": "llama"}',
             b'{"a": NaN}', b'{"a": 1' + b"0" * 5000 + b"}", text[:-1] + b',"eos_token_id":1e999}']  # fmt: skip
    path.write_bytes(rng.choice(texts))
    return path.name


TOKENS = (-1, -2, 1 << 31, 1 << 70, True, "2", [2, "x"], [], [None], {"a": 1}, 2.0, [[2]])


def other_tokens(directory: Path, rng: random.Random) -> str:
    path = directory / rng.choice(["generation_config.json", "config.json"])
    key, value = rng.choice(["bos_token_id", "eos_token_id"]), rng.choice(TOKENS)
    _edit(path, lambda m: m.update({key: value}))
    return f"{path.name}: {key} = {value!r}"


# --- what lies beside


def tokenizer(directory: Path, rng: random.Random) -> str:
    """The tokenizer's files say something else, of other types, or are cut."""
    path = directory / rng.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
    text = path.read_bytes() if path.exists() else b'{"<x>": 340}'
    how = rng.choice(["cut", "type", "empty", "deep", "added", "not UTF-8", "merges", "huge ids"])
    if how in ("cut", "empty", "deep", "not UTF-8"):
        at = rng.randrange(1, len(text))
        texts = {"cut": text[:at], "empty": b"", "deep": b"[" * 100_000, "not UTF-8": text[:at] + b"\xff"}
        path.write_bytes(texts[how])
        return f"{path.name}: {how}"
    mapping = json.loads(text)
    if how == "added":
        entries = [{"id": "x", "content": "a"}, {"content": "a"}, {"id": 400, "content": 7}]
        wrong = [7, [7], {"7": "x"}, "x", *([entry] for entry in entries)]
        mapping[rng.choice(["added_tokens", "added_tokens_decoder"])] = rng.choice(wrong)
    elif how == "huge ids":
        mapping["added_tokens"] = [{"id": 1 << 40, "content": "<y>", "special": True}]
    elif how == "merges" and "model" in mapping:
        mapping["model"][rng.choice(["merges", "vocab"])] = rng.choice([[], {}, [["a", "zz"]], 7, None, [["a"]]])
    else:
        key = rng.choice(sorted(mapping))
        mapping[key] = rng.choice(OTHERS[:15])
        how = f"{key} = {mapping[key]!r}"
    path.write_text(json.dumps(mapping))
    return f"{path.name}: {how}"


def links(directory: Path, rng: random.Random) -> str:
    """A file is a link: to where it lies now, to another, to nothing, to a device; or no file."""
    path = rng.choice(sorted(p for p in directory.iterdir()))
    how = rng.choice(["inside", "outside", "nowhere", "itself", "/dev/zero", "/dev/null", "/etc/passwd", ".", "pipe",
                      "directory"])  # fmt: skip
    moved = directory / "moved" if how == "inside" else directory.parent / "moved"
    path.rename(moved)
    if how in ("pipe", "directory"):
        os.mkfifo(path) if how == "pipe" else path.mkdir()
    else:
        path.symlink_to({"inside": "moved", "outside": "../moved", "itself": path.name}.get(how, how))
    return f"{path.name}: {how}"


def code(directory: Path, rng: random.Random) -> str:
    """Code beside the weights that would leave a trace if it ran."""
    marker = str(directory.parent / "ran")
    program = f"open({marker!r}, 'w')\nclass CrystalConfig: pass\n"
    for name in ("modeling_crystal.py", "configuration_crystal.py", "tokenization_crystal.py", "__init__.py"):
        (directory / name).write_text(program)
    where = {"AutoConfig": "configuration_crystal.CrystalConfig", "AutoModelForCausalLM": "modeling_crystal.Crystal"}
    _edit(directory / "config.json", lambda m: m.update({"auto_map": where}))
    auto = {"AutoTokenizer": ["tokenization_crystal.T", None]}
    _edit(directory / "tokenizer_config.json", lambda m: m.update({"auto_map": auto}))
    return ""


def other_sets(directory: Path, rng: random.Random) -> str:
    """Weights of another model beside those that count, or an adapter, which is no model."""
    how = rng.choice(["stale index", "bin", "adapter", "stray"])
    if how == "adapter":
        (directory / "adapter_config.json").write_text("{}")
    elif how == "bin" and list(directory.glob("*.safetensors")):
        torch.save({"model.norm.weight": torch.zeros(8)}, directory / "pytorch_model.bin")
    elif how == "stale index" and (directory / "model.safetensors").exists():
        (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    else:
        save_file({"a": torch.ones(1)}, directory / "other.safetensors")
    return how


def nothing(directory: Path, rng: random.Random) -> str:
    return ""


DAMAGES: dict[str, tuple[Damage, tuple]] = {
    "config: another value": (another_value, EITHER),
    "config: a key gone": (a_key_gone, EITHER),
    "other JSON": (other_json, EITHER),
    "tokens": (other_tokens, EITHER),
    "weights cut": (cut, ("refused",)),
    "weights longer": (longer, EITHER),
    "weights: a bit": (bits, UNKNOWN),
    "weights: header": (header, EITHER),
    "weights: pickles": (pickled, EITHER),
    "index": (index, ("refused",)),
    "tokenizer": (tokenizer, EITHER),
    "links": (links, EITHER),
    "code": (code, ("fine",)),
    "other weights": (other_sets, EITHER),
    "undamaged": (nothing, ("fine",)),
}


def cases(seed: int, count: int) -> Iterator[Case]:
    """The first `count` damaged directories of a seed, all kinds in turn."""
    for i, kind in enumerate(itertools.islice(itertools.cycle(DAMAGES), count)):
        name = random.Random(f"{seed}:{i}:bed").choice(["single", "shards", "bin"])
        run = functools.partial(_judge, kind, name, f"{seed}:{i}")
        yield Case(kind, f"{kind}, {name} ({seed}:{i})", run, DAMAGES[kind][1])


def _judge(kind: str, name: str, seed: str, scratch: Path) -> Outcome:
    directory, to = scratch / "in", scratch / "to"
    shutil.copytree(bed(name), directory)
    done = DAMAGES[kind][0](directory, random.Random(seed))
    notes: list[str] = []

    def call() -> str:
        notes.extend(import_published(directory, to)["notes"])
        return read(to)

    def right(_out: str, result: str) -> bool:
        if kind.startswith("config") and as_it_says(directory, to):
            return True
        return result == undamaged(name) or bool(notes)

    outcome = judged(command("import", directory, "--to", to, instead=call), right)
    if (scratch / "ran").exists():
        return Outcome("traceback", f"{done}: code of the directory ran")
    left = [p.name for p in scratch.iterdir() if p.name not in ("in", "moved")]
    if outcome.word == "refused" and (left or len(outcome.message) > 1500):
        return Outcome("silent", f"{done}: {left} was left, or a long line: {outcome.message}")
    return Outcome(outcome.word, f"{done}: {outcome.message}", outcome.cpu_seconds)

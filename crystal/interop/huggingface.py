"""Between published Hugging Face directories and checkpoints, both ways, a tensor at a time.

`crystal import DIR --to CKPT` and `crystal export CKPT --to hf` are these two functions. The names and the
meaning of config.json are in `crystal.interop.huggingface_forms`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from crystal.checkpoint import locate, read, write
from crystal.config import parse
from crystal.data.tokenizer import Tokenizer
from crystal.errors import ConfigError, CrystalError, RunError
from crystal.files import replacing
from crystal.interop.huggingface_forms import config_to_json
from crystal.interop.huggingface_read import read_published, to_published
from crystal.zoo.build import parameter_count
from crystal.zoo.config import ModelConfig

# sentencepiece first: a tokenizer.json that transformers made from it may split runs of spaces otherwise
TOKENIZERS = ("tokenizer.model", "tokenizer.json")
SHARD_BYTES = 2 << 30


def import_published(directory: Path, to: Path) -> dict:
    """The model in a Hugging Face directory as a checkpoint at `to`, with its tokenizer when it has one.

    Returns {checkpoint, parameters, tokenizer, config}, JSON-ready.
    Raises ConfigError naming file and key or tensor, or when `to` exists already.
    """
    directory, to = Path(directory), Path(to)
    if to.exists():
        raise ConfigError(f"{to}: expected a new directory, it is there already")
    config, tensors = read_published(directory)
    tokenizers = [directory / name for name in TOKENIZERS if (directory / name).is_file()]
    state = {"model": config.model_dump(mode="json"), "imported_from": str(directory)}
    if tokenizers:
        state["tokenizer"] = tokenizers[0].name
        try:
            Tokenizer.load(tokenizers[0])
        except CrystalError:  # not of LLaMA's kind: good for generation, with the ends that its config names
            eos = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
            state |= {"bos": False, "eos_id": eos[0] if isinstance(eos, list) else eos}
    write(to, ((f"model.{name}", tensor) for name, tensor in tensors), state, tokenizers)
    return {
        "checkpoint": str(to),
        "parameters": parameter_count(config),
        "tokenizer": state.get("tokenizer"),
        "config": state["model"],
    }


def export_published(checkpoint: Path, to: Path, form: str = "hf") -> Path:
    """A checkpoint (or a run's latest) as a directory of fp32 safetensors, config.json and tokenizer.

    form: `hf`, the published names and config (LLaMA's, or LLM360's CrystalCoder form), or `safetensors`, ours.

    Written aside, then renamed. Raises ConfigError when `to` exists, the disk fails, or no published form
    computes this model's forward pass.
    """
    source, to = read(locate(Path(checkpoint))), Path(to)
    if to.exists():
        raise ConfigError(f"{to}: expected a new directory, it is there already")
    config = parse(ModelConfig, source.state.get("model"), str(source.directory), ("model",))
    mapping = config_to_json(config) if form == "hf" else config.model_dump(mode="json")
    tensors = source.tensors("model")
    try:
        with replacing(to) as aside:
            aside.mkdir(parents=True)
            _write_weights(aside, to_published(config, tensors) if form == "hf" else tensors)
            (aside / "config.json").write_text(json.dumps(mapping, indent=2) + "\n", encoding="utf-8")
            for name in TOKENIZERS:
                if (source.directory / name).is_file():
                    shutil.copyfile(source.directory / name, aside / name)
    except OSError as error:
        raise RunError(f"{to}: cannot be written: {error.strerror or error}") from None
    return to


def _write_weights(directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """model.safetensors, or shards of at most SHARD_BYTES and their index, named as transformers does."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(shard, directory / str(len(shards)), metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        os.rename(directory / "0", directory / "model.safetensors")
        return
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, file in enumerate(files):
        os.rename(directory / str(i), directory / file)
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (directory / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8")

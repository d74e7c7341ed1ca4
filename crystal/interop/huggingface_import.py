"""`crystal import DIR --to CKPT`: a published Hugging Face directory as a checkpoint, a tensor at a time."""

from __future__ import annotations

from pathlib import Path

from crystal.files import expect_new
from crystal.interop.huggingface_read import read_json, read_published
from crystal.interop.huggingface_tokenizer import choose
from crystal.interop.new_checkpoint import write_new
from crystal.interop.token_ids import imported
from crystal.zoo.build import parameter_count


def import_published(directory: Path, to: Path) -> dict:
    """The model in a Hugging Face directory as a checkpoint at `to`, with its tokenizer when it has one.

    Returns {checkpoint, parameters, tokenizer, config, notes}, JSON-ready; notes: lines on what was left out or
    switched off.
    Raises ConfigError naming file and key or tensor, or when `to` exists already. Nothing half-written is left.
    """
    directory, to = Path(directory), Path(to)
    expect_new(to, "directory")
    config, tensors = read_published(directory)
    chosen = choose(directory, read_json(directory / "config.json")["model_type"], config.vocab_size)
    state = {"model": config.model_dump(mode="json"), "imported_from": str(directory)}
    state |= imported(directory) | chosen.state
    write_new(to, ((f"model.{name}", tensor) for name, tensor in tensors), state, chosen.files)
    return {
        "checkpoint": str(to),
        "parameters": parameter_count(config),
        "tokenizer": state.get("tokenizer"),
        "config": state["model"],
        "notes": chosen.notes,
    }

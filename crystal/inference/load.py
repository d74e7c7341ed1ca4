"""A checkpoint's decoder and tokenizer, ready for inference."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from crystal.checkpoint import Checkpoint, locate, read
from crystal.config import parse
from crystal.data.tokenizer import Tokenizer
from crystal.data.tokenizer_engines import switched_off
from crystal.errors import CheckpointError, ConfigError, DataError
from crystal.files import from_json, regular_bytes
from crystal.memory import available_bytes
from crystal.zoo.build import build, parameter_count, plan_for
from crystal.zoo.config import ModelConfig
from crystal.zoo.decoder import Decoder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PlainTokenizer:
    """Any other published tokenizer.json (SmolLM2's byte-level pairs, say), for generation only.

    Special tokens that its own post-processor adds are added. eos_id: one end token, several or none, from the
    published config.json. What the file would do to texts unasked (truncation, padding, dropout) is switched off;
    `notes` say so.
    """

    def __init__(self, path: Path, eos_id: int | list[int] | None):
        import tokenizers

        try:
            spec, notes = switched_off(from_json(regular_bytes(path)))
            self._engine = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except OSError as error:
            raise DataError(f"{path}: tokenizer cannot be read: {error.strerror}") from None
        except Exception as error:  # the engine raises bare Exception
            raise DataError(f"{path}: expected a tokenizer.json, got: {error}") from None
        self.vocab_size, self.eos_id, self.notes = self._engine.get_vocab_size(), eos_id, tuple(notes)

    def encode(self, text: str) -> list[int]:
        return self._engine.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._engine.decode(list(ids))


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer | PlainTokenizer:
    """The tokenizer saved in a checkpoint, with CrystalCoder's added tokens where the checkpoint says that they are in
    use (older ones do not say: where the model has room for them).

    Raises CheckpointError when there is none, when it is not the one that was saved, or its vocabulary is larger than
    the model's.
    """
    state = checkpoint.state
    name = state.get("tokenizer")
    if not name:
        raise CheckpointError(f"{checkpoint.directory}: expected a tokenizer, the checkpoint was saved without")
    checkpoint.expect_files()
    path, vocab_size = checkpoint.directory / name, model_config_of(checkpoint).vocab_size
    if state.get("tokenizer_kind", "plain" if "eos_id" in state else "llama") == "plain":
        return PlainTokenizer(path, state.get("eos_id"))
    said = state.get("added_tokens")
    for added_tokens in (True, False) if said is None else (said,):
        tokenizer = Tokenizer.load(path, added_tokens=added_tokens)
        size = tokenizer.n_base + len(tokenizer.added)
        if size <= vocab_size:
            return tokenizer
    raise CheckpointError(f"{path}: expected at most the model's {vocab_size} ids, got {size}")


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer | PlainTokenizer | None:
    """As `load_tokenizer`; None for a checkpoint that was saved without one."""
    checkpoint.expect_files()
    return load_tokenizer(checkpoint) if checkpoint.state.get("tokenizer") else None


def end_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer | PlainTokenizer) -> tuple[int, ...]:
    """The ids at which generation ends: those that the checkpoint's source gave, or else the vocabulary's `</s>`."""
    eos = checkpoint.state.get("eos_id", tokenizer.eos_id)
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


def fitting_dtype(checkpoint: Checkpoint, dtype: Literal["auto", "fp32", "bf16"] = "auto") -> torch.dtype:
    """The dtype to hold a checkpoint's weights in. auto: fp32 where they fit into free memory, else bf16.

    Raises ConfigError for another name.
    """
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"dtype: expected auto, {' or '.join(DTYPES)}, got {dtype!r}")
    if dtype == "auto":
        dtype = "fp32" if fits_in_fp32(model_config_of(checkpoint)) else "bf16"
    return DTYPES[dtype]


def fits_in_fp32(config: ModelConfig) -> bool:
    """Whether a model's fp32 weights, and a quarter as much for what is computed with them, fit into free memory."""
    free = available_bytes()
    return free is None or parameter_count(config) * 4 * 1.25 <= free


def model_config_of(checkpoint: Checkpoint) -> ModelConfig:
    """The model that a checkpoint says it is. Raises ConfigError naming the checkpoint and the key."""
    return parse(ModelConfig, checkpoint.state.get("model"), str(checkpoint.directory), ("model",))


def load_decoder(
    checkpoint: Path | Checkpoint, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Decoder, Checkpoint]:
    """The decoder of a checkpoint (or of a run directory: its latest) for inference, and that checkpoint.

    dtype: of the weights and of what is computed with them. Raises CheckpointError when it is not there, damaged, or
    its tensors are not the model's.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = read(locate(Path(checkpoint)))
    config = model_config_of(checkpoint)
    return filled(config, checkpoint.tensors("model"), str(checkpoint.directory), dtype, device), checkpoint


def filled(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    where: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Decoder:
    """A decoder for inference with these weights, each cast and moved as it comes; `where` is their source.

    Raises CheckpointError for a tensor that is missing, of another shape or none of the model's.
    """
    model = build(config, plan_for(config))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for name, tensor in tensors:
        if shapes.pop(name, None) != tensor.shape:
            raise CheckpointError(f"{where}: {name} {list(tensor.shape)}: expected each tensor of the model once")
        owner, _, leaf = name.rpartition(".")
        weight = nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, weight)
    if shapes:
        raise CheckpointError(f"{where}: {next(iter(shapes))}: expected, but no such tensor in it")
    return model.eval()

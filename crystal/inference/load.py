"""A checkpoint's decoder and tokenizer, ready for inference."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from crystal.checkpoint import Checkpoint, locate, read
from crystal.config import parse
from crystal.data.tokenizer import Tokenizer
from crystal.errors import CheckpointError, DataError
from crystal.zoo.build import build, plan_for
from crystal.zoo.config import ModelConfig
from crystal.zoo.decoder import Decoder

if TYPE_CHECKING:
    pass


class PlainTokenizer:
    """Any other published tokenizer.json (SmolLM2's byte-level pairs, say), for generation only.

    Special tokens that its own post-processor adds are added; eos_id comes from the published config.json.
    """

    def __init__(self, path: Path, eos_id: int | None):
        import tokenizers

        try:
            self._engine = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the engine raises bare Exception
            raise DataError(f"{path}: expected a tokenizer.json, got: {error}") from None
        self.vocab_size, self.eos_id = self._engine.get_vocab_size(), eos_id

    def encode(self, text: str) -> list[int]:
        return self._engine.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._engine.decode(list(ids))


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer | PlainTokenizer:
    """The tokenizer saved in a checkpoint, with CrystalCoder's added tokens when the model has room for them.

    Raises CheckpointError when there is none, or its vocabulary is larger than the model's.
    """
    name = checkpoint.state.get("tokenizer")
    if not name:
        raise CheckpointError(f"{checkpoint.directory}: expected a tokenizer, the checkpoint was saved without")
    path, vocab_size = checkpoint.directory / name, checkpoint.state["model"]["vocab_size"]
    if "eos_id" in checkpoint.state:  # imported with a tokenizer that is not of LLaMA's kind
        return PlainTokenizer(path, checkpoint.state["eos_id"])
    for added_tokens in (True, False):
        tokenizer = Tokenizer.load(path, added_tokens=added_tokens)
        if tokenizer.vocab_size <= vocab_size:
            return tokenizer
    raise CheckpointError(f"{path}: expected at most the model's {vocab_size} ids, got {tokenizer.vocab_size}")


def load_decoder(
    checkpoint: Path | Checkpoint, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Decoder, Checkpoint]:
    """The decoder of a checkpoint (or of a run directory: its latest) for inference, and that checkpoint.

    Raises CheckpointError when it is not there, damaged, or its tensors are not the model's.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = read(locate(Path(checkpoint)))
    where = str(checkpoint.directory)
    config = parse(ModelConfig, checkpoint.state.get("model"), where, ("model",))
    return filled(config, checkpoint.tensors("model"), where, dtype, device), checkpoint


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

"""The fidelity probe: fp32 logits of given token ids, to compare with any other implementation of a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crystal.errors import ConfigError, DataError, RunError
from crystal.files import replacing
from crystal.inference.load import load_decoder
from crystal.zoo.config import ModelConfig
from crystal.zoo.decoder import Decoder


@torch.inference_mode()
def logits(model: Decoder, ids_BT: Tensor) -> Tensor:
    """fp32 logits [B, T, V] on the CPU of int64 ids [B, T], one row of the batch at a time."""
    return torch.cat([_row(model, ids_T) for ids_T in ids_BT])


def _row(model: Decoder, ids_T: Tensor) -> Tensor:
    return model(ids_T[None].to(model.embed.weight.device)).float().cpu()


@torch.inference_mode()
def logits_file(checkpoint: Path, ids: Path, out: Path) -> tuple[int, int, int]:
    """Logits of the ids in a .npy file [T] or [B, T] into the .npy file `out`, fp32 [B, T, V]; that shape.

    checkpoint: a checkpoint or run directory. Written row by row aside, then renamed: memory for one row, and
    never half a file. Raises ConfigError naming the file for ids that are not the model's, a checkpoint that
    cannot be read or an output that cannot be written.
    """
    model, _ = load_decoder(checkpoint)
    ids_BT = read_ids(Path(ids), model.config)
    out = Path(out)
    shape = (*ids_BT.shape, model.config.vocab_size)
    try:
        with replacing(out, durable=False) as aside:
            file = np.lib.format.open_memmap(aside, mode="w+", dtype=np.float32, shape=shape)
            for b, ids_T in enumerate(ids_BT):
                file[b] = _row(model, torch.from_numpy(ids_T))[0].numpy()
            file.flush()
    except OSError as error:
        raise RunError(f"{out}: cannot be written: {error.strerror or error}") from None
    return shape


def read_ids(path: Path, config: ModelConfig) -> np.ndarray:
    """Token ids [B, T] as int64 from a .npy file of integers, [T] or [B, T].

    Raises ConfigError for anything else: another type, no ids, ids outside the vocabulary, rows too long.
    """
    try:
        with path.open("rb") as file:
            ids = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"{path}: expected a .npy array of token ids: {error}") from None
    if ids.dtype.kind not in "iu":
        raise ConfigError(f"{path}: expected integers, got {ids.dtype}")
    if ids.ndim not in (1, 2) or not ids.size:
        raise ConfigError(f"{path}: expected token ids of shape [seq] or [batch, seq], got {list(ids.shape)}")
    ids_BT = np.atleast_2d(ids)
    if ids_BT.shape[1] > config.max_seq_len:
        raise ConfigError(f"{path}: expected rows of at most {config.max_seq_len} ids, got {ids_BT.shape[1]}")
    low, high = int(ids_BT.min()), int(ids_BT.max())
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise ConfigError(f"{path}: expected ids from 0 to {config.vocab_size - 1}, got {wrong}")
    return ids_BT.astype(np.int64)

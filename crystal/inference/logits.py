"""The fidelity probe: fp32 logits of given token ids, to compare with any other implementation of a model."""

from __future__ import annotations

import math
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from crystal.checkpoint import locate, read
from crystal.errors import ConfigError, DataError, RunError
from crystal.files import open_regular, replacing
from crystal.inference.by_block import logits_by_block
from crystal.inference.load import fits_in_fp32, load_decoder, model_config_of
from crystal.zoo.config import ModelConfig
from crystal.zoo.decoder import Decoder

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
MOST_BYTES = 1 << 30  # of a file of ids, which is read whole


@torch.inference_mode()
def logits(model: Decoder, ids_BT: Tensor) -> Tensor:
    """fp32 logits [B, T, V] on the CPU of int64 ids [B, T], one row of the batch at a time."""
    return torch.cat([_row(model, ids_T) for ids_T in ids_BT])


def _row(model: Decoder, ids_T: Tensor) -> Tensor:
    return model(ids_T[None].to(model.embed.weight.device)).float().cpu()


@torch.inference_mode()
def logits_file(checkpoint: Path, ids: Path, out: Path, by_block: bool | None = None) -> tuple[int, int, int]:
    """Logits of the ids in a .npy file [T] or [B, T] into the .npy file `out`, fp32 [B, T, V]; that shape.

    checkpoint: a checkpoint or run directory. by_block: with one block's weights in memory at a time, the same
    numbers; None: where the model's do not fit into memory. Written row by row aside, then renamed: memory for one
    row, and never half a file. Raises ConfigError naming the file for ids that are not the model's, a checkpoint that
    cannot be read or an output that cannot be written.
    """
    opened = read(locate(Path(checkpoint)))
    config = model_config_of(opened)
    ids_BT = read_ids(Path(ids), config)
    out = Path(out)
    _expect_free(out, Path(ids))
    shape = (*ids_BT.shape, config.vocab_size)
    if by_block is None:
        by_block = not fits_in_fp32(config)
    if by_block:
        rows = logits_by_block(opened, ids_BT)
    else:
        model, _ = load_decoder(opened)
        rows = (_row(model, torch.from_numpy(ids_T))[0] for ids_T in ids_BT)
    try:
        with replacing(out, durable=False) as aside:
            file = np.lib.format.open_memmap(aside, mode="w+", dtype=np.float32, shape=shape)
            for b, logits_TV in enumerate(rows):
                file[b] = logits_TV.numpy()
            file.flush()
    except OSError as error:
        raise RunError(f"{out}: cannot be written: {error.strerror or error}") from None
    return shape


def _expect_free(out: Path, ids: Path) -> None:
    """Raise ConfigError where the logits would take the place of the ids, or of a file that is no array."""
    if not out.is_file():
        return
    with out.open("rb") as file:
        begins = file.read(6)
    same = out.samefile(ids)
    if same or (begins and begins != np.lib.format.MAGIC_PREFIX):
        what = "the token ids" if same else "no .npy"
        raise ConfigError(f"--out: expected a new file or a .npy to write over, {out} is {what}", key="--out")


def read_ids(path: Path, config: ModelConfig) -> np.ndarray:
    """Token ids [B, T] as int64 from a .npy file of integers, [T] or [B, T].

    Raises ConfigError for anything else: another type, no ids, ids outside the vocabulary, rows too long.
    """
    try:
        with open_regular(path) as file:
            ids_BT = np.atleast_2d(_read_array(path, file, config.max_seq_len))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError, OverflowError, MemoryError, TokenError) as error:  # numpy's, of a header
        message = " ".join(str(error).split()) or "too large"
        raise DataError(f"{path}: expected a .npy array of token ids: {message[:200]}") from None
    low, high = int(ids_BT.min()), int(ids_BT.max())
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise ConfigError(f"{path}: expected ids from 0 to {config.vocab_size - 1}, got {wrong}")
    return ids_BT.astype(np.int64)


def _read_array(path: Path, file: BinaryIO, longest: int) -> np.ndarray:
    """The array of a .npy file; its header is believed only after it has been looked at."""
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"version {version[0]}.{version[1]} is not known")
    shape, by_columns, dtype = HEADERS[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read")
    if dtype.kind not in "iu":
        raise ConfigError(f"{path}: expected integers, got {dtype}")
    if len(shape) not in (1, 2) or min(shape) < 1:
        raise ConfigError(f"{path}: expected token ids of shape [seq] or [batch, seq], got {list(shape)}")
    if shape[-1] > longest:
        raise ConfigError(f"{path}: expected rows of at most {longest} ids, got {shape[-1]}")
    bytes_expected = math.prod(shape) * dtype.itemsize
    if bytes_expected > MOST_BYTES:
        raise ConfigError(f"{path}: expected at most {MOST_BYTES} bytes of ids, got {bytes_expected}")
    data = file.read(bytes_expected + 1)
    if len(data) != bytes_expected:
        more = "more" if len(data) > bytes_expected else f"{len(data)}"
        raise ValueError(f"its header says {bytes_expected} bytes of ids, there are {more}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if by_columns else "C")

"""`crystal export CKPT --to gguf`: one file for llama.cpp, with tokenizer, streamed tensor by tensor.

The weights are those of `--to native` (`crystal.interop.fold`), under GGUF's names, as llama.cpp's own converter would
make them of that directory: vectors stay F32, matrices are F32, F16, BF16 or Q8_0.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crystal.errors import ConfigError
from crystal.files import expect_new
from crystal.interop.fold import BLOCK, Folded, Made, assembled, half_order
from crystal.interop.gguf_vocabulary import vocabulary
from crystal.interop.native import Opened, open_for_export
from crystal.zoo.config import ModelConfig

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "q8_0": "Q8_0"}
_FILE_TYPES = {"F32": "ALL_F32", "BF16": "MOSTLY_BF16", "F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0"}
_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "Q8_0": torch.float32}
_ROWS = 1024  # quantized at a time


def export_gguf(checkpoint: Path, to: Path, dtype: str = "fp32") -> dict:
    """A checkpoint (or a run's latest) as the GGUF file `to`.

    dtype: fp32, bf16, fp16 or q8_0. Returns {out, form, files, architecture, parameters, folded, notes}, JSON-ready.
    Written aside, then renamed. Raises ConfigError when `to` exists, when llama.cpp has no such model or tokenizer, or
    when the gguf package is not there; RunError when the disk fails.
    """
    to = Path(to)
    expect_new(to, "file")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: expected {', '.join(DTYPES)} for gguf, got {dtype}")
    gguf_package()
    opened = open_for_export(checkpoint)
    with opened.written_to(to) as aside:
        aside.parent.mkdir(parents=True, exist_ok=True)
        notes = _write(aside, opened, DTYPES[dtype], to.stem)
    return opened.said(to, "gguf", [to.name]) | {"notes": notes}


def gguf_package() -> Any:
    """The gguf package. Raises ConfigError with the line that installs it."""
    try:
        import gguf
    except ImportError:
        raise ConfigError("GGUF files are written by the gguf package, which is not there: pip install gguf") from None
    logging.getLogger("gguf").setLevel(logging.WARNING)
    return gguf


def _write(path: Path, opened: Opened, kind: str, name: str) -> list[str]:
    """The file; what is to be said of its tokenizer."""
    gguf = gguf_package()
    folded = opened.folded
    words = vocabulary(
        opened.tokenizer, opened.tokenizer_file, opened.config.vocab_size, opened.bos, opened.bos_id, opened.eos_id
    )
    writer = gguf.GGUFWriter(path, folded.architecture)
    try:
        _describe(writer, opened, name)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
        if kind == "Q8_0":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        words.add_to(writer)
        if opened.template is not None:
            writer.add_chat_template(opened.template)
        arch = gguf.MODEL_ARCH[folded.architecture.upper()]
        names = gguf.get_tensor_name_map(arch, folded.config["num_hidden_layers"])
        places: dict[str, tuple[str, int]] = {}  # folded name → (GGML type, offset)
        offset = 0
        for made in folded.tensors:
            ggml = _kind(made, kind)
            quantization = gguf.GGMLQuantizationType[ggml]
            count, nbytes = gguf.GGML_QUANT_SIZES[quantization]
            size = math.prod(made.shape) // count * nbytes
            theirs = names.get_name(made.name, try_suffixes=(".weight", ".bias"))
            if theirs is None:
                raise ConfigError(f"{made.name}: llama.cpp's {folded.architecture} has no such tensor")
            writer.add_tensor_info(theirs, made.shape, np.dtype(np.float32), size, raw_dtype=quantization)
            places[made.name] = ggml, offset
            offset += writer.ggml_pad(size, writer.data_alignment)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (out,) = writer.fout
        start = writer.ggml_pad(out.tell(), writer.data_alignment)
        out.truncate(start + offset)
        dtypes = {made.name: _TORCH[places[made.name][0]] for made in folded.tensors}
        for made_name, tensor in assembled(folded.tensors, opened.source.tensors("model"), dtypes):
            ggml, position = places[made_name]
            out.seek(start + position)
            for piece in _pieces(_rotated(made_name, tensor, folded, opened.config), ggml, gguf):
                piece.tofile(out)
    finally:
        writer.close()
    return words.notes


def _kind(made: Made, kind: str) -> str:
    if len(made.shape) < 2:
        return "F32"
    # a row is made of whole blocks; llama.cpp's tools take F16 where it cannot be
    return "F16" if kind == "Q8_0" and made.shape[-1] % BLOCK else kind


def _rotated(name: str, tensor: Tensor, folded: Folded, config: ModelConfig) -> Tensor:
    """llama.cpp's LLaMA rotates interleaved pairs, its StableLM halves: rows of q and k as it expects them."""
    kind = name.split(".")[-2]
    if folded.architecture != "llama" or kind not in ("q_proj", "k_proj"):
        return tensor
    heads = tensor.shape[0] // config.d_head
    return tensor[half_order(heads, config.d_head, config.d_head).argsort()]


def _pieces(tensor: Tensor, ggml: str, gguf: Any) -> Iterator[np.ndarray]:
    if ggml != "Q8_0":
        yield tensor.contiguous().view(-1).view(torch.uint8).numpy()
        return
    for rows in tensor.split(_ROWS):
        yield gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType.Q8_0)


def _describe(writer: Any, opened: Opened, name: str) -> None:
    """The keys that llama.cpp builds the model from."""
    config = opened.folded.config
    writer.add_type("model")
    writer.add_name(name)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(opened.config.rotary_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    if opened.folded.architecture == "stablelm":
        writer.add_layer_norm_eps(config["layer_norm_eps"])
        writer.add_parallel_residual(False)
    else:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])

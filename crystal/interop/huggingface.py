"""Between published Hugging Face directories and checkpoints, both ways, a tensor at a time.

`crystal import DIR --to CKPT` and `crystal export CKPT --to hf` are these two functions. The names and the
meaning of config.json are in `crystal.interop.huggingface_forms`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from crystal.checkpoint import Checkpoint, locate, read
from crystal.errors import ConfigError, RunError
from crystal.files import expect_new, replacing
from crystal.inference.load import model_config_of, tokenizer_of
from crystal.interop.fast_tokenizer import tokenizer_files, write_tokenizer
from crystal.interop.huggingface_forms import config_to_json, form_of, published_tensors
from crystal.interop.huggingface_import import import_published as import_published
from crystal.interop.huggingface_read import to_published
from crystal.interop.huggingface_tokenizer import COMPANIONS, TOKENIZERS
from crystal.interop.huggingface_write import DTYPES, SHARD_BYTES, write_weights
from crystal.interop.token_ids import begins, exported, first
from crystal.zoo.build import meta_decoder, plan_for
from crystal.zoo.config import ModelConfig

TOKENIZER_CONFIG = "tokenizer_config.json"
MODELING = Path(__file__).parent / "hf" / "modeling_crystal.py"  # to copy; importing it would import transformers


def export_published(checkpoint: Path, to: Path, form: str = "hf", dtype: str = "float32") -> Path:
    """A checkpoint (or a run's latest) as a directory of safetensors, config.json and tokenizer, a tensor at a time.

    form: `hf`, the published names and config (LLaMA's, or LLM360's CrystalCoder form with the class that computes it,
    `modeling_crystal.py`), or `safetensors`, ours. dtype: float32, bfloat16 or float16.

    Written aside, then renamed. Raises ConfigError when `to` exists, no published form computes this model's forward
    pass, or a number does not fit the dtype; RunError when the disk fails.
    """
    source, to = read(locate(Path(checkpoint))), Path(to)
    expect_new(to, "directory")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    config = model_config_of(source)
    tensors = source.tensors("model")
    if form == "hf":
        tokenizer = tokenizer_of(source)
        mapping = hf_config(config, dtype) | exported(source.state, tokenizer)
        shapes = {t.name: t.shape for t in published_tensors(config, form_of(config))}
        tensors = to_published(config, tensors)
    else:
        mapping = config.model_dump(mode="json")
        shapes = {name: tuple(p.shape) for name, p in meta_decoder(config).named_parameters()}
    try:
        with replacing(to, alone=True) as aside:
            aside.mkdir(parents=True)
            write_weights(aside, shapes, tensors, DTYPES[dtype], SHARD_BYTES)
            (aside / "config.json").write_text(json.dumps(mapping, indent=2) + "\n", encoding="utf-8")
            if "auto_map" in mapping:
                shutil.copyfile(MODELING, aside / MODELING.name)
            for name in (*TOKENIZERS, *COMPANIONS):
                if (source.directory / name).is_file():
                    shutil.copyfile(source.directory / name, aside / name)
            if form == "hf" and tokenizer is not None and not (aside / TOKENIZER_CONFIG).is_file():
                write_tokenizer(aside, _fast_tokenizer(source, tokenizer, config, mapping))
    except OSError as error:
        raise RunError(f"{to}: cannot be written: {error.strerror or error}") from None
    return to


def _fast_tokenizer(source: Checkpoint, tokenizer: Any, config: ModelConfig, mapping: dict) -> dict[str, dict]:
    """What AutoTokenizer loads, for a checkpoint of our own: one that was imported has the published files."""
    file, bos, eos = (
        source.directory / source.state["tokenizer"],
        begins(source.state, mapping),
        mapping["eos_token_id"],
    )
    return tokenizer_files(tokenizer, file, bos, first(eos), config.max_seq_len)


def hf_config(config: ModelConfig, dtype: str) -> dict:
    """The published config.json; in the CrystalCoder form with what `CrystalConfig` adds to it, and its classes.

    Raises ConfigError when no published form computes the model.
    """
    mapping = config_to_json(config) | {"torch_dtype": dtype}
    if mapping["model_type"] != "crystalcoder":
        return mapping
    return mapping | {
        "architectures": ["CrystalForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODELING.stem}.CrystalConfig",
            "AutoModel": f"{MODELING.stem}.CrystalModel",
            "AutoModelForCausalLM": f"{MODELING.stem}.CrystalForCausalLM",
        },
        "logit_scale": plan_for(config).logits_multiplier,
        "initializer_range": config.mup.init_std,
        "initializer_cut": config.mup.init_truncate,
    }

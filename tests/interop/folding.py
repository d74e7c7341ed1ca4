"""Small checkpoints with random weights and tokenizers, to be folded and exported, for the tests of this folder."""

import shutil

import sentencepiece
import torch

from crystal.checkpoint import write
from crystal.zoo.build import meta_decoder
from crystal.zoo.config import ModelConfig, MupConfig

CRYSTAL = {
    "d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 90, "vocab_size": 96, "max_seq_len": 96, "norm": "layernorm",
    "norm_eps": 1e-5, "bias": True, "rotary_fraction": 0.25, "rotary_style": "interleaved", "tie_embeddings": True,
    "mup": {
        "parametrization": "crystalcoder", "base_d_model": 32, "embedding_multiplier": 14.6, "output_alpha": 2.22,
        "attention_scale": "1/d",
    },
}  # fmt: skip
LLAMA = {
    "d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 96, "vocab_size": 96, "max_seq_len": 96, "norm": "rmsnorm",
}  # fmt: skip
COMPLETEP = CRYSTAL["mup"] | {"parametrization": "completep", "base_n_layers": 1}
SHAPES = {
    "crystalcoder": CRYSTAL,
    "crystalcoder, queries in groups": CRYSTAL | {"n_kv_heads": 2},
    "crystalcoder, untied, whole heads turn, in halves": CRYSTAL
    | {"tie_embeddings": False, "rotary_fraction": 1.0, "rotary_style": "half", "rotary_base": 5e4},
    "crystalcoder, heads of 24": CRYSTAL | {"d_model": 72, "n_heads": 3, "rotary_fraction": 0.5},
    "completep": CRYSTAL | {"mup": COMPLETEP},
    "layernorm without biases": CRYSTAL | {"bias": False},
    "amber": LLAMA,
    "llama, groups, tied, base 1e5": LLAMA | {"n_kv_heads": 2, "tie_embeddings": True, "rotary_base": 1e5},
    "llama with muP, tied, interleaved": LLAMA
    | {"tie_embeddings": True, "rotary_style": "interleaved", "mup": CRYSTAL["mup"]},
    "llama with biases": LLAMA | {"bias": True, "n_kv_heads": 2},
}


def config_of(shape: dict) -> ModelConfig:
    return ModelConfig(**{k: v for k, v in shape.items() if k != "mup"}, mup=MupConfig(**shape.get("mup", {})))


def weights(config: ModelConfig, seed=0, dtype=torch.float32) -> dict:
    """Large enough, and with biases, gains and means enough, to tell any mistake of the fold."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, p in meta_decoder(config).named_parameters():
        mean, std = (1.0, 0.3) if name.endswith("norm.weight") else (0.0, 0.3)
        if p.ndim == 2:
            mean, std = (0.01, 0.07) if name == "embed.weight" else (0.02, 0.15)
        found[name] = torch.empty(p.shape, dtype=dtype).normal_(mean, std, generator=generator)
    return found


def checkpoint(path, config: ModelConfig, tokenizer=None, state=None, seed=0):
    """A sealed checkpoint at `path` with random weights, and with a tokenizer file where one is given."""
    about = {"model": config.model_dump(mode="json"), "step": 7} | (state or {})
    files = []
    if tokenizer is not None:
        about["tokenizer"], files = tokenizer.name, [tokenizer]
    write(path, ((f"model.{name}", tensor) for name, tensor in weights(config, seed).items()), about, files)
    return path


def trained(path, texts, vocab_size=400, **settings):
    """A sentencepiece model of LLaMA's kind at path/tokenizer.model."""
    settings = {
        "model_type": "bpe", "vocab_size": vocab_size, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True,
        "pad_id": -1, "unk_id": 0, "bos_id": 1, "eos_id": 2, "minloglevel": 2, "hard_vocab_limit": False,
    } | settings  # fmt: skip
    lines = path / "lines.txt"
    lines.write_text("\n".join(line for text in texts for line in text.splitlines() if len(line) < 1000))
    sentencepiece.SentencePieceTrainer.train(input=str(lines), model_prefix=str(path / "tokenizer"), **settings)
    return path / "tokenizer.model"


def copied(file, to):
    shutil.copyfile(file, to)
    return to

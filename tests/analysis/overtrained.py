"""Tiny models and runs for the tests of analysis: one that was trained on too little for too long, and two whose every
answer is known by hand."""

import json
import os
import random
from pathlib import Path
from unittest.mock import patch

import torch
from rich.console import Console
from runs import WORDS, write_run
from torch import nn

from crystal.run import load_run
from crystal.training.start import start
from crystal.zoo.config import ModelConfig
from crystal.zoo.decoder import Decoder, Multipliers

STEPS = 120
DOCUMENTS = 10


_shared: list[Path] = []


def shared_run(factory) -> Path:
    """The overtrained run that the tests of a session share. factory: pytest's tmp_path_factory."""
    if not _shared:
        _shared.append(overtrained(factory.mktemp("over")))
    return _shared[0]


def overtrained(directory: Path, **changes) -> Path:
    """A run of two sources with ten documents each, read some forty times: its run directory.

    Its cache is directory/cache; there are checkpoints of steps 60 and 120.
    """
    corpus = directory / "corpus"
    corpus.mkdir()
    stage = {
        "name": "only", "steps": STEPS, "checkpoint_every": STEPS // 2, "sources": {"english": 0.5, "python": 0.5},
        "lr": [{"from": 0.0, "to": 0.02, "steps": 10}, {"from": 0.02, "to": 0.002, "steps": STEPS - 10}],
    }  # fmt: skip
    model = {"d_model": 128, "n_heads": 2, "d_ff": 341, "n_layers": 2, "vocab_size": 352, "max_seq_len": 64}
    path = write_run(
        corpus, directory, model=model, optimizer={"weight_decay": 0.0},
        curriculum={"name": "over", "seq_len": 63, "global_batch_size": 8, "stages": [stage]},
        train={"micro_batch_size": 8, "eval_every": STEPS // 2, "eval_rows": 4},
        **{"data.val_fraction": 0.5, "backend.dtype": "fp32"} | changes,
    )  # fmt: skip
    rng = random.Random(1)
    for source, words in WORDS.items():
        texts = [" ".join(rng.choices(words, k=60)) for _ in range(DOCUMENTS)]
        (corpus / f"{source}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with patch.dict(os.environ, CRYSTAL_CACHE=str(directory / "cache")):
        outcome = start(load_run(path), None, None, Console(quiet=True, stderr=True))
    torch.set_num_threads(threads)
    return outcome.directory


def bigram(next_logits: torch.Tensor) -> Decoder:
    """A decoder whose logits for the next token are next_logits[token], whatever came before: no block adds anything.

    next_logits: [V, V], V even. Its max_seq_len is 32.
    """
    V = len(next_logits)
    config = ModelConfig.model_validate(
        {
            "d_model": V, "n_layers": 1, "n_heads": 1, "d_ff": 2, "vocab_size": V, "max_seq_len": 32, "norm": "rmsnorm",
            "norm_eps": 1e-12, "bias": False, "tie_embeddings": False, "mup": {"parametrization": "sp"},
        }
    )  # fmt: skip
    model = Decoder(config, Multipliers(1.0, V**-0.5, 1.0, 1.0))
    for p in model.parameters():
        nn.init.zeros_(p)
    with torch.no_grad():
        model.embed.weight.copy_(torch.eye(V))
        model.norm.weight.fill_(V**-0.5)  # rms of a one-hot row of V is V^-0.5
        model.head.weight.copy_(next_logits.T)
    return model.eval().requires_grad_(False)


def small(document_mask: bool = False, vocab_size: int = 40) -> Decoder:
    """A decoder with random weights, whose answers hang on all that came before."""
    config = ModelConfig.model_validate(
        {
            "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 24, "vocab_size": vocab_size, "max_seq_len": 32,
            "norm": "rmsnorm", "bias": False, "tie_embeddings": False, "document_mask": document_mask,
            "mup": {"parametrization": "sp"},
        }
    )  # fmt: skip
    model = Decoder(config, Multipliers(1.0, 8**-0.5, 1.0, 1.0))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (1.0 if p.ndim == 1 else 0.5))
    return model.eval().requires_grad_(False)

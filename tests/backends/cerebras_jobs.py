"""What the tests of the Cerebras backend share: where its environment is, a small curriculum, batches."""

import os
from pathlib import Path

import pytest
import torch

from crystal.backends.base import MicroBatch, Setup
from crystal.backends.cerebras import environment
from crystal.backends.cerebras.bridge import CerebrasBackend
from crystal.backends.config import CerebrasConfig, CpuConfig, OptimizerConfig
from crystal.backends.cpu import CpuBackend
from crystal.curriculum.config import CurriculumConfig
from crystal.curriculum.resolve import resolve
from crystal.errors import CrystalError
from crystal.zoo.build import plan_for
from crystal.zoo.config import model_config

try:  # before a test moves the cache
    ENVIRONMENT = environment.find(Path(os.environ["CRYSTAL_CEREBRAS"]) if "CRYSTAL_CEREBRAS" in os.environ else None)
    MISSING = ""
except CrystalError as error:
    ENVIRONMENT, MISSING = None, str(error)

needs_cerebras = pytest.mark.skipif(ENVIRONMENT is None, reason=f"cerebras.pytorch is not set up: {MISSING}")


def curriculum(*stages, seq_len=16, rows=8, counts_from=1):
    """Of stages (steps, lr segments, carries the optimizer)."""
    return resolve(
        CurriculumConfig.model_validate_json(
            __import__("json").dumps(
                {
                    "name": "test", "seq_len": seq_len, "global_batch_size": rows, "lr_counts_from": counts_from,
                    "stages": [
                        {
                            "name": f"stage{i}", "steps": steps, "lr": lr, "sources": {"a": 0.5, "b": 0.5},
                            "checkpoint_every": 100, "carry": [] if i == 0 else carry,
                        }
                        for i, (steps, lr, carry) in enumerate(stages)
                    ],
                }
            )
        )
    )  # fmt: skip


TWO_STAGES = curriculum(
    (10, [{"from": 0.0, "to": 0.02, "steps": 3}, {"from": 0.02, "to": 0.01, "steps": 7}], []),
    (
        10,
        [{"from": 0.0, "to": 0.01, "steps": 2}, {"from": 0.01, "to": 0.001, "steps": 8, "shape": "cosine"}],
        ["weights"],
    ),
)


def model(preset="crystalcoder-w64-l2", **changes):
    return model_config(preset).model_copy(update={"vocab_size": 96, "max_seq_len": 32} | changes)


def backends(directory, optimizer=None, config=None, stages=TWO_STAGES, seed=1):
    """(cpu, cerebras) over the same model, plan, curriculum and initial weights."""
    optimizer, config = optimizer or OptimizerConfig(name="adamw_cerebras", eps=1e-9), config or model()
    plan = plan_for(
        config, weight_decay=optimizer.weight_decay, decay_vectors=optimizer.decay_norms_and_biases, eps=optimizer.eps
    )
    section = CerebrasConfig(name="cerebras", environment=ENVIRONMENT, threads=1)
    setup = Setup(config, plan, optimizer, stages.base_lr, seed, 2, stages)
    made = (
        CpuBackend(setup, CpuConfig(dtype="fp32")),
        CerebrasBackend(setup, section, directory),
    )
    for backend in made:
        backend.initialise()
    return made


def batch(step, rows=8, length=16, vocab=96, masked=0.2):
    """A step's rows; a share of the labels masked, sources in turn, some documents."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, vocab, (rows, length + 1), generator=generator)
    weights = torch.full((rows, length), 1 / (rows * length))
    weights[torch.rand(weights.shape, generator=generator) < masked] = 0
    documents = (torch.rand((rows, length), generator=generator) < 0.1).long().cumsum(1)
    return MicroBatch(
        tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weights, torch.arange(rows) % 2, documents
    )


def micro_batches(whole, rows=4):
    fields = (whole.ids_BT, whole.labels_BT, whole.weights_BT, whole.sources_B, whole.documents_BT)
    return [MicroBatch(*chunk) for chunk in zip(*(f.split(rows) for f in fields), strict=True)]

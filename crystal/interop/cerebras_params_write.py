"""A run as Cerebras Model Zoo parameter files: the form of release 1.9.1, in which CrystalCoder's three phases were
published, and the trainer form of release 2.10.

A stage becomes a file. What a form cannot say is refused by name, for a file that trains something else would be
worse than none. Neither form says when FIM was applied (it is in the data) nor whether a row's documents see each
other, and Model Zoo's first step has lr(0): `lr_counts_from: 0` here.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import yaml

from crystal.curriculum.resolve import resolve
from crystal.curriculum.stages import Stage
from crystal.errors import ConfigError, CrystalError, RunError
from crystal.files import expect_new, replacing
from crystal.mup.plan import Plan
from crystal.run import RunFile, load_run
from crystal.zoo.config import ModelConfig

STYLES = ("1.9.1", "2.10")
SCHEDULERS = {"linear": ("Linear", "LinearLR"), "cosine": ("CosineDecay", "CosineDecayLR")}


def export_parameters(run: str, out: Path) -> dict:
    """Write OUT/STYLE/STAGE.yaml of every stage, in every style that can say what the run file says.

    Returns {files, left_out: a line for each style that cannot}, JSON-ready. Raises ConfigError when no style can,
    or `out` exists or cannot be written.
    """
    out = Path(out)
    expect_new(out, "directory")
    loaded = load_run(run)
    texts, left_out = {}, []
    for style in STYLES:
        try:
            for name, mapping in stage_files(loaded, style).items():
                texts[f"{style}/{name}.yaml"] = yaml.safe_dump(mapping, sort_keys=False)
        except CrystalError as error:
            left_out.append(f"{style}: {error}")
    if not texts:
        raise ConfigError(left_out[0].partition(": ")[2])
    try:
        with replacing(out) as aside:
            for name, text in texts.items():
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                head = f"# Model Zoo parameters, written by crystal from {run}\n"
                (aside / name).write_text(head + text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{out}: cannot be written: {error.strerror or error}") from None
    return {"files": [str(out / name) for name in texts], "left_out": left_out}


def stage_files(run: RunFile, style: str) -> dict[str, dict]:
    """{stage's name: its parameter file as a mapping}. Raises ConfigError for what the style cannot say."""
    _check(run, style)
    curriculum = resolve(run.config.curriculum, run.source)
    write = _published if style == "1.9.1" else _trainer
    return {stage.name: write(run, stage) for stage in curriculum.stages}


def _check(run: RunFile, style: str) -> None:
    """Whether Model Zoo has words for this run."""
    model, optimizer = run.config.model, run.config.optimizer

    def expect(good: bool, loc: str, what: str) -> None:
        if not good:
            raise run.error(loc.split("."), f"expected {what}, Model Zoo {style} knows no other")

    expect(model.mup.parametrization in ("sp", "crystalcoder"), "model.mup.parametrization", "sp or crystalcoder")
    expect(model.mup.weight_decay == "coupled", "model.mup.weight_decay", "coupled")
    expect(not model.document_mask, "model.document_mask", "false")
    expect(not optimizer.decay_norms_and_biases, "optimizer.decay_norms_and_biases", "false")
    if style == "1.9.1":
        expect(model.norm == "layernorm", "model.norm", "layernorm")
        expect(model.rotary_style == "interleaved", "model.rotary_style", "interleaved")
        expect(model.rotary_base == 10000, "model.rotary_base", "10000")
    elif model.mup.parametrization == "sp":
        expect(model.mup.output_alpha == 1, "model.mup.output_alpha", "1")


def _published(run: RunFile, stage: Stage) -> dict:
    """One file of release 1.9.1: flat sections; muP is already worked out in its numbers."""
    config, plan = run.config, run.config.plan()
    hidden, residual = plan["blocks.0.attn.q.weight"], plan["blocks.0.attn.out.weight"]
    model = _shape(config.model) | {
        "embedding_initializer": _initializer(plan["embed.weight"].init_std, config.model),
        "initializer": _initializer(hidden.init_std, config.model),
        "output_layer_initializer": _initializer(residual.init_std, config.model),
        "output_logits_scale": plan.logits_multiplier,
        "loss_scaling": "batch_size",
        "loss_weight": 1 / stage.seq_len,
        "mixed_precision": True,
        "use_bfloat16": True,
        "use_position_embedding": True,
        "scale_glu_initialization": True,
        "weight_initialization_seed": config.train.seed,
    }
    optimizer = {
        "optimizer_type": "AdamW",
        "beta1": config.optimizer.betas[0],
        "beta2": config.optimizer.betas[1],
        "eps": config.optimizer.eps,
        "correct_bias": True,
        "weight_decay_rate": config.optimizer.weight_decay,
        "max_gradient_norm": config.optimizer.grad_clip,
        "loss_scaling_factor": 1.0,
        "learning_rate": [
            {
                "scheduler": SCHEDULERS[shape][0],
                "initial_learning_rate": start,
                "end_learning_rate": end,
                "decay_steps": steps,
                "steps": steps,
            }
            for start, end, steps, shape in _segments(run, stage)
        ],
    }
    if config.model.mup.parametrization == "crystalcoder":
        optimizer["adjust_learning_rate"] = {"decoder_kernel": hidden.lr_multiplier}
    return {
        "train_input": {"data_processor": "GptHDF5MapDataProcessor", **_data(run, stage)},
        "model": model,
        "optimizer": optimizer,
        "runconfig": {
            "mode": "train",
            "target_device": "CSX",
            "max_steps": stage.steps,
            "checkpoint_steps": stage.checkpoint_every,
            "save_initial_checkpoint": False,
            "log_steps": 1,
            "is_pretrained_checkpoint": _weights_only(stage),
            "seed": config.train.seed,
        },
    }


def _trainer(run: RunFile, stage: Stage) -> dict:
    """One file of release 2.10: a trainer; muP as base sizes, from which Model Zoo works out the rest.

    With mup_base_filter_size it wants the MLP's output initializer given, or takes sigma 0.02 for it.
    """
    config, plan = run.config, run.config.plan()
    residual = _trainer_residual_std(config.model, plan)
    model = {
        "name": "gpt2" if config.model.rotary_style == "interleaved" else "llama",
        **_shape(config.model),
        "norm_type": config.model.norm,
        "rope_theta": config.model.rotary_base,
        "embedding_initializer": _initializer(config.model.mup.init_std, config.model),
        "initializer": _initializer(config.model.mup.init_std, config.model),
        "output_layer_initializer": _initializer(residual, config.model),
        "ffn_output_layer_initializer": _initializer(residual, config.model),
        "loss_scaling": "batch_size",
        "loss_weight": 1 / stage.seq_len,
        "mixed_precision": True,
        "fp16_type": "bfloat16",
    }
    if config.model.mup.parametrization == "crystalcoder":
        model |= {
            "mup_base_hidden_size": config.model.mup.base_d_model,
            "mup_base_filter_size": config.model.d_ff / plan.width_multiplier,
            "output_logits_alpha": config.model.mup.output_alpha,
        }
    schedulers = [
        {
            SCHEDULERS[shape][1]: {
                "initial_learning_rate": start,
                "end_learning_rate": end,
                "total_iters": steps,
            }
        }
        for start, end, steps, shape in _segments(run, stage)
    ]
    loader = {"data_processor": "GptHDF5MapDataProcessor", **_data(run, stage)}
    only_weights = [{"LoadCheckpointStates": {"load_checkpoint_states": "model"}}] if _weights_only(stage) else []
    return {
        "trainer": {
            "init": {
                "backend": {"backend_type": "CSX"},
                "seed": config.train.seed,
                "model": model,
                "optimizer": {
                    "AdamW": {
                        "betas": list(config.optimizer.betas),
                        "eps": config.optimizer.eps,
                        "weight_decay": config.optimizer.weight_decay,
                        "correct_bias": True,
                    }
                },
                "schedulers": [{"SequentialLR": {"schedulers": schedulers}}],
                "precision": {
                    "enabled": True,
                    "fp16_type": "bfloat16",
                    "loss_scaling_factor": 1.0,
                    "max_gradient_norm": config.optimizer.grad_clip,
                },
                "loop": {"max_steps": stage.steps},
                "checkpoint": {"steps": stage.checkpoint_every, "save_initial_checkpoint": False},
                "logging": {"log_steps": 1},
                "callbacks": only_weights,
            },
            "fit": {"train_dataloader": loader},
        }
    }


def _shape(model: ModelConfig) -> dict:
    """What both forms say of a decoder, in the same words."""
    grouped = {
        "attention_module": "multiquery_attention",
        "extra_attention_params": {"num_kv_groups": model.kv_heads},
    }
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.n_layers,
        "num_heads": model.n_heads,
        **(grouped if model.kv_heads != model.n_heads else {}),
        "filter_size": model.d_ff,
        "nonlinearity": "swiglu",
        "max_position_embeddings": model.max_seq_len,
        "position_embedding_type": "rotary",
        "rotary_dim": model.rotary_dim,
        "share_embedding_weights": model.tie_embeddings,
        "layer_norm_epsilon": model.norm_eps,
        "dropout_rate": 0.0,
        "attention_dropout_rate": 0.0,
        "attention_type": "scaled_dot_product",
        "attention_softmax_fp32": True,
        "use_projection_bias_in_attention": model.bias,
        "use_ffn_bias_in_attention": model.bias,
        "use_ffn_bias": model.bias,
        "use_bias_in_output": False,
        "embeddings_scale": model.mup.embedding_multiplier,
        "scale_qk_dot_by_d": model.mup.attention_scale == "1/d",
        **({} if model.tie_embeddings else {"initializer_range": model.mup.init_std}),  # the head's
    }


def _initializer(std: float, model: ModelConfig) -> dict:
    """A normal of parent sigma std, cut where the model says."""
    cut = model.mup.init_truncate
    if cut is None:
        return {"name": "normal", "mean": 0.0, "std": std}
    return {"name": "truncated_normal", "mean": 0.0, "std": std, "a": -cut * std, "b": cut * std}


def _trainer_residual_std(model: ModelConfig, plan: Plan) -> float:
    """Sigma of residual-out matrices as 2.10 wants it: under muP it divides by sqrt(2L) and sqrt(m) itself."""
    if model.mup.parametrization == "crystalcoder":
        return model.mup.init_std * (1.0 if model.mup.residual_init_2l else math.sqrt(2 * model.n_layers))
    return plan["blocks.0.attn.out.weight"].init_std


def _segments(run: RunFile, stage: Stage) -> list[tuple[float, float, int, str]]:
    """The stage's learning rate as (from, to, steps, shape); the last may be longer than the stage."""
    schedule, found, begin = stage.schedule, [], 0
    where = f"{run.where('curriculum', 'stages')}.{stage.index}.lr"
    for segment, ((a, b), (p, q)) in zip(
        schedule.segments, zip(pairwise(schedule.knots), pairwise(schedule.published), strict=True), strict=False
    ):
        if segment.shape not in SCHEDULERS:
            raise ConfigError(f"{where}: expected linear or cosine segments, Model Zoo knows no {segment.shape}")
        steps = segment.steps * (b - a) / (q - p)  # at the run's scale
        if steps == int(steps):
            found.append((segment.start, segment.end, int(steps), segment.shape))
        elif segment.shape == "linear":  # the part of the line that the stage walks
            ends = (segment.at((p - begin) / segment.steps), segment.at((q - begin) / segment.steps))
            found.append((*ends, b - a, "linear"))
        else:
            raise ConfigError(f"{where}: expected whole steps, at this scale the {segment.shape} takes {steps:g}")
        begin += segment.steps
    return found


def _data(run: RunFile, stage: Stage) -> dict:
    """Batch and mixture; the directories are to fill in."""
    published = run.config.curriculum.stages[stage.index].sources
    mixture = []
    for name, weight in stage.weights.items():
        subset = published[name].subset
        mixture.append(
            {"data_dir": f"/path/to/{name}", "weight": weight}
            | ({} if subset == "0.0-1.0" else {"data_subset": subset})
        )
    return {
        "batch_size": stage.global_batch_size,
        "vocab_size": run.config.model.vocab_size,
        "mixture": mixture,
        "shuffle": False,
        "shuffle_seed": 1,
        "repeat": True,
        "use_worker_cache": False,
        "num_workers": 1,
    }


def _weights_only(stage: Stage) -> bool:
    """Whether the stage starts from weights with a fresh optimizer."""
    return stage.index > 0 and not stage.carry_optimizer

"""Cerebras Model Zoo parameter files, of both forms that `modelzoo` writes, read into a run file.

The published phase files of CrystalCoder are read as they are. A key that changes what is trained and that we have
no word for is an error; keys of the machinery (workers, mounts, logging) are passed by.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from crystal.backends.config import OptimizerConfig
from crystal.config import load_yaml, parse
from crystal.curriculum.config import CurriculumConfig
from crystal.errors import ConfigError, RunError
from crystal.files import expect_new, write_whole
from crystal.zoo.config import ModelConfig

# what a model must say if it says anything of it; None: any value, it does not change the function
FIXED: dict[str, tuple] = {
    "nonlinearity": ("swiglu",),
    "position_embedding_type": ("rotary",),
    "attention_type": ("scaled_dot_product",),
    "dropout_rate": (0.0, 0),
    "attention_dropout_rate": (0.0, 0, None),
    "embedding_dropout_rate": (0.0, 0, None),
    "use_bias_in_output": (False,),
    "use_position_embedding": (True,),
    "scale_glu_initialization": (True,),
    "loss_scaling": ("batch_size",),
    "scale_output_logits_by_d": (True, None),
    "attention_logits_alpha": (1.0, 1, None),
    "attention_module": ("aiayn_attention", "multiquery_attention"),
}
READ = """name vocab_size hidden_size num_hidden_layers num_heads filter_size max_position_embeddings rotary_dim
    share_embedding_weights layer_norm_epsilon use_projection_bias_in_attention use_ffn_bias_in_attention use_ffn_bias
    embeddings_scale scale_qk_dot_by_d embedding_initializer initializer output_layer_initializer
    ffn_output_layer_initializer output_logits_scale loss_weight norm_type rope_theta mup_base_hidden_size
    mup_base_filter_size output_logits_alpha extra_attention_params""".split()
PASSED_BY = """attention_kernel attention_softmax_fp32 boundary_casting mixed_precision use_bfloat16 fp16_type
    weight_initialization_seed compute_eval_metrics""".split()
SHAPES = {"Linear": "linear", "LinearLR": "linear", "CosineDecay": "cosine", "CosineDecayLR": "cosine"}


class Node(NamedTuple):
    """A mapping in a file, and where it lies there."""

    file: Path
    path: str
    mapping: dict

    def error(self, key: str, what: str) -> ConfigError:
        return ConfigError(f"{self.file}: {'.'.join(part for part in (self.path, key) if part)}: {what}")

    def get(self, key: str, kind: type | tuple[type, ...], *default: Any) -> Any:
        """The value under `key`, of the right kind; without a default it must be there."""
        if key not in self.mapping and default:
            return default[0]
        value = self.mapping.get(key)
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        if key not in self.mapping:
            raise self.error(key, f"expected {names}, none given")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(key, f"expected {names}, got {value!r}")
        return value

    def inside(self, key: str) -> Node:
        return Node(self.file, f"{self.path}.{key}" if self.path else key, self.get(key, dict))


class Parts(NamedTuple):
    """What the two forms say in different places."""

    model: Node
    optimizer: dict
    decoder_kernel: float | None  # 1.9.1: learning-rate multiplier of matrices; None: not given
    lr: list[tuple[float, float, int, str]]
    data: Node
    steps: int
    checkpoint_every: int
    seed: int
    weights_only: bool


NUMBER = (int, float)


def import_parameters(source: Path, to: Path) -> dict:
    """A parameter file, or all *.yaml of a directory in the order of their names, as the run file `to`.

    One file becomes one stage; they must agree on model, optimizer and batch. Returns {run, stages, parameters}.
    Raises ConfigError naming file and key, or when `to` exists.
    """
    source, to = Path(source), Path(to)
    expect_new(to, "file")
    files = sorted(source.glob("*.yaml")) if source.is_dir() else [source]
    if not files:
        raise ConfigError(f"{source}: expected Model Zoo parameter files (*.yaml), none there")
    run = run_of(files, to.stem)
    head = (
        "# Read from Model Zoo parameter files. To fill in: data:, and curriculum.bind from sources to the corpus's.\n"
    )
    try:
        write_whole(to, head + yaml.safe_dump(run, sort_keys=False))
    except OSError as error:
        raise RunError(f"{to}: cannot be written: {error.strerror or error}") from None
    return {"run": str(to), "stages": [stage["name"] for stage in run["curriculum"]["stages"]]}


def run_of(files: list[Path], name: str) -> dict:
    """The run that these files describe together, as the mapping of a run file."""
    first, stages = None, []
    for file in files:
        parts = _parts(Node(file, "", load_yaml(file).mapping))
        shared = {
            "model": model_of(parts),
            "optimizer": parts.optimizer,
            "seq_len": _seq_len(parts),
            "global_batch_size": parts.data.get("batch_size", int),
            "seed": parts.seed,
        }
        first = first or shared
        for key, value in shared.items():
            if value != first[key]:
                raise ConfigError(f"{file}: {key}: expected {first[key]} as in {files[0].name}, got {value}")
        carry = [] if not stages else ["weights"] if parts.weights_only else ["weights", "optimizer"]
        stages.append(
            {
                "name": file.stem if len(files) > 1 else name,
                "steps": parts.steps,
                "carry": carry,
                "checkpoint_every": parts.checkpoint_every,
                "lr": [{"from": a, "to": b, "steps": steps, "shape": shape} for a, b, steps, shape in parts.lr],
                "sources": _sources(parts.data),
            }
        )
    curriculum = {
        "name": name,
        "seq_len": first["seq_len"],
        "global_batch_size": first["global_batch_size"],
        "lr_counts_from": 0,  # Model Zoo's first step has lr(0)
        "stages": stages,
    }
    parse(ModelConfig, first["model"], str(files[0]), ("model",))
    parse(OptimizerConfig, first["optimizer"], str(files[0]), ("optimizer",))
    parse(CurriculumConfig, curriculum, str(files[0]), ("curriculum",))
    return {
        "name": name,
        "model": first["model"],
        "optimizer": first["optimizer"],
        "curriculum": curriculum,
        "data": {"corpus": "corpus.yaml", "tokenizer": {"path": "tokenizer.json"}},
        "train": {"seed": first["seed"], "micro_batch_size": 1},
    }


def _parts(top: Node) -> Parts:
    return _of_trainer(top.inside("trainer")) if "trainer" in top.mapping else _of_published(top)


def _of_published(top: Node) -> Parts:
    model, optimizer, run = top.inside("model"), top.inside("optimizer"), top.inside("runconfig")
    if optimizer.get("optimizer_type", str) != "AdamW":
        raise optimizer.error("optimizer_type", f"expected AdamW, got {optimizer.mapping['optimizer_type']}")
    adjusted = optimizer.get("adjust_learning_rate", dict, {})
    if adjusted.keys() - {"decoder_kernel"}:
        raise optimizer.error("adjust_learning_rate", f"expected decoder_kernel alone, got {', '.join(adjusted)}")
    betas = (optimizer.get("beta1", NUMBER), optimizer.get("beta2", NUMBER))
    return Parts(
        model,
        _optimizer(optimizer, betas, "weight_decay_rate", optimizer.mapping.get("max_gradient_norm")),
        adjusted.get("decoder_kernel"),
        [
            _segment(optimizer, f"learning_rate.{i}", entry, "decay_steps", entry.get("scheduler"))
            for i, entry in enumerate(optimizer.get("learning_rate", list))
        ],
        top.inside("train_input"),
        run.get("max_steps", int),
        run.get("checkpoint_steps", int),
        run.get("seed", int, 1),
        run.get("is_pretrained_checkpoint", bool, False),
    )


def _of_trainer(trainer: Node) -> Parts:
    init = trainer.inside("init")
    adamw, precision = init.inside("optimizer").inside("AdamW"), init.get("precision", dict, {})
    schedulers = init.get("schedulers", list)
    if len(schedulers) == 1 and "SequentialLR" in schedulers[0]:
        schedulers = schedulers[0]["SequentialLR"].get("schedulers", [])
    callbacks = [callback for callback in init.get("callbacks", list, []) if "LoadCheckpointStates" in callback]
    return Parts(
        init.inside("model"),
        _optimizer(adamw, adamw.get("betas", list), "weight_decay", precision.get("max_gradient_norm")),
        None,
        [
            _segment(init, f"schedulers.{i}.{kind}", entry, "total_iters", kind)
            for i, scheduler in enumerate(schedulers)
            for kind, entry in scheduler.items()
        ],
        trainer.inside("fit").inside("train_dataloader"),
        init.inside("loop").get("max_steps", int),
        init.inside("checkpoint").get("steps", int),
        init.get("seed", int, 1),
        any(c["LoadCheckpointStates"].get("load_checkpoint_states") == "model" for c in callbacks),
    )


def _optimizer(node: Node, betas: Any, decay: str, clip: float | None) -> dict:
    """Cerebras' AdamW, and so by its formula; biases and norms do not decay there."""
    if node.get("correct_bias", bool, True) is not True:
        raise node.error("correct_bias", "expected true")
    return {
        "name": "adamw_cerebras",
        "betas": list(betas),
        "eps": node.get("eps", NUMBER),
        "weight_decay": node.get(decay, NUMBER),
        "decay_norms_and_biases": False,
        "grad_clip": clip,
    }


def _segment(node: Node, path: str, entry: dict, length: str, kind: Any) -> tuple[float, float, int, str]:
    here = Node(node.file, f"{node.path}.{path}", entry)
    if kind not in SHAPES:
        raise here.error("", f"expected one of {', '.join(SHAPES)}, got {kind}")
    if length not in entry and "steps" in entry:  # 1.9.1 takes either; the published phases have both, or one of them
        length = "steps"
    steps = here.get(length, int)
    if entry.get("steps", steps) != steps:
        raise here.error("steps", f"expected {length} {steps}, got {entry['steps']}")
    return here.get("initial_learning_rate", NUMBER), here.get("end_learning_rate", NUMBER), steps, SHAPES[kind]


def _sources(data: Node) -> dict:
    """{source: weight or {weight, subset}} by the directories' names behind /path/to/; one directory is all."""
    if "mixture" not in data.mapping:
        return {_source(data, data.mapping): {"weight": 1.0}}
    found = {}
    for i, entry in enumerate(data.get("mixture", list)):
        here = Node(data.file, f"{data.path}.mixture.{i}", entry)
        subset = {"subset": here.get("data_subset", str)} if "data_subset" in entry else {}
        found[_source(here, entry)] = {"weight": here.get("weight", NUMBER)} | subset
    return found


def _source(node: Node, entry: dict) -> str:
    return node.get("data_dir", str).removeprefix("/path/to/").strip("/")


def _seq_len(parts: Parts) -> int:
    """The rows' length is what the loss is divided by."""
    weight = parts.model.get("loss_weight", NUMBER)
    length = round(1 / weight) if weight > 0 else 0
    if not length or abs(weight * length - 1) > 1e-6:
        raise parts.model.error("loss_weight", f"expected 1 / the rows' length, got {weight}")
    return length


def model_of(parts: Parts) -> dict:
    """The `model:` section of a run file. Raises ConfigError for what our decoder does not compute."""
    node = parts.model
    for key, value in node.mapping.items():
        if key in FIXED and value not in FIXED[key]:
            raise node.error(key, f"expected {FIXED[key][0]}, which is what this decoder does, got {value}")
        if key not in FIXED and key not in READ and key not in PASSED_BY and value is not None:
            raise node.error(key, "not a key that crystal has a word for")
    biases = {node.get(f"use_{k}", bool) for k in ("projection_bias_in_attention", "ffn_bias_in_attention", "ffn_bias")}
    if len(biases) > 1:
        raise node.error("use_ffn_bias", "expected all of the biases or none")
    d_model, n_heads = node.get("hidden_size", int), node.get("num_heads", int)
    name = node.get("name", str, "gpt2")
    if name not in ("gpt2", "gpt3", "llama"):
        raise node.error("name", f"expected gpt2, gpt3 or llama, got {name}")
    model = {
        "d_model": d_model,
        "n_layers": node.get("num_hidden_layers", int),
        "n_heads": n_heads,
        "d_ff": node.get("filter_size", int),
        "vocab_size": node.get("vocab_size", int),
        "max_seq_len": node.get("max_position_embeddings", int),
        "norm": node.get("norm_type", str, "layernorm"),
        "norm_eps": node.get("layer_norm_epsilon", NUMBER),
        "bias": biases.pop(),
        "rotary_fraction": node.get("rotary_dim", int) / (d_model // n_heads),
        "rotary_base": float(node.get("rope_theta", NUMBER, 10000.0)),
        "rotary_style": "half" if name == "llama" else "interleaved",
        "tie_embeddings": node.get("share_embedding_weights", bool),
    }
    groups = node.get("extra_attention_params", dict, {}).get("num_kv_groups", n_heads)
    if groups != n_heads:
        model["n_kv_heads"] = groups
    return model | {"mup": _mup(parts, model["n_layers"])}


def _mup(parts: Parts, n_layers: int) -> dict:
    """The `mup:` section: undo what the form has worked out already, and see that its numbers fit together."""
    node, d_model = parts.model, parts.model.get("hidden_size", int)
    base = node.get("mup_base_hidden_size", NUMBER, None)
    m = 1.0 if base is None else d_model / base
    if parts.decoder_kernel is not None:
        m = 1 / parts.decoder_kernel
    scaled = base is not None or parts.decoder_kernel is not None
    embedding, hidden, residual = (
        node.inside(key) for key in ("embedding_initializer", "initializer", "output_layer_initializer")
    )
    std = embedding.get("std", NUMBER)
    worked_out = 1.0 if base is not None else m**-0.5  # 1.9.1 gives sigmas as they are drawn, 2.10 those of the base
    if not math.isclose(hidden.get("std", NUMBER), std * worked_out, rel_tol=1e-9):
        raise hidden.error("std", f"expected {std * worked_out:g}, from embedding_initializer's {std:g}")
    ratio = residual.get("std", NUMBER) / hidden.get("std", NUMBER)
    smaller, larger = (1 / math.sqrt(2 * n_layers), 1.0) if base is None else (1.0, math.sqrt(2 * n_layers))
    if not any(math.isclose(ratio, expected, rel_tol=1e-9) for expected in (smaller, larger)):
        raise residual.error("std", f"expected initializer's std x {smaller:g} or {larger:g}, got x {ratio:g}")
    alpha = node.get("output_logits_alpha", NUMBER, None)
    if alpha is None:
        alpha = float(f"{node.get('output_logits_scale', NUMBER, 1.0 / m) * m:.12g}")
    cut = embedding.get("b", NUMBER) / std if embedding.get("name", str) == "truncated_normal" else None
    mup = {
        "parametrization": "crystalcoder" if scaled else "sp",
        "embedding_multiplier": node.get("embeddings_scale", NUMBER, 1.0),
        "output_alpha": alpha,
        "attention_scale": "1/d" if node.get("scale_qk_dot_by_d", bool, False) else "1/sqrt_d",
        "init_std": std,
        "init_truncate": None if cut is None else float(f"{cut:.12g}"),
        "residual_init_2l": math.isclose(ratio, smaller, rel_tol=1e-9),
    }
    if scaled:
        width = round(d_model / m)
        if not math.isclose(d_model / m, width, rel_tol=1e-9):
            raise node.error("hidden_size", f"expected a whole base width, got {d_model} / {m:g}")
        mup["base_d_model"] = width
    return mup

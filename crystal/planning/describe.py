"""What a model or a run is, before anything runs: counts, FLOPs, memory, stages, learning rates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

from crystal import checkpoint
from crystal.backends.config import CudaConfig, load_preset
from crystal.bench.matmul import matmul_rate
from crystal.config import cache_dir
from crystal.curriculum.config import split_entry
from crystal.curriculum.resolve import resolve
from crystal.curriculum.stages import Curriculum, Stage
from crystal.data.corpus import build as corpus
from crystal.data.corpus.build import Recipe
from crystal.errors import ConfigError
from crystal.mup.plan import Plan
from crystal.planning.cost import memory_bytes, run_bytes
from crystal.planning.report import planned_layout
from crystal.run import RunFile, check_vocabulary, corpus_of
from crystal.training.record import with_recorded_dtype
from crystal.zoo.build import parameter_count
from crystal.zoo.config import families, presets
from crystal.zoo.flops import flops_per_token

DRY_RUN_DEVICE = "a100-80gb"  # `crystal plan --device` has others
_PLAN_KEYS = (
    "tensor", "shape", "role", "group", "width_multiplier", "init", "init_std", "init_cut", "lr_multiplier",
    "weight_decay", "eps", "forward_multiplier", "rule",
)  # fmt: skip


def listing() -> dict:
    """Names of all presets with their parameter counts, and of the ladders."""
    counts = {name: parameter_count(load_preset(name)[0]) for name in presets()}
    return {"models": [{"name": n, "parameters": c} for n, c in counts.items()], "families": families()}


def model(name: str, with_plan: bool = False) -> dict:
    """Everything about one preset or ladder rung; with_plan adds the parameter plan."""
    config, optimizer = load_preset(name)
    result = {
        "name": name,
        "parameters": parameter_count(config),
        "flops_per_token": flops_per_token(config, config.max_seq_len),
        "memory_bytes": memory_bytes(config),
        "config": config.model_dump(mode="json"),
        "optimizer": optimizer.model_dump(mode="json"),
    }
    if with_plan:
        plan = optimizer.plan_for(config)
        result["multipliers"] = {k: v for k, v in asdict(plan).items() if k.endswith("_multiplier")}
        result["plan"] = [{key: getattr(row, key) for key in _PLAN_KEYS} for row in plan.tensors]
    return result


def dry_run(run: RunFile, stage: int | None = None, until: int | None = None) -> dict:
    """The whole run on paper: stages, steps, tokens, LR, checkpoints, memory, and FLOPs with their time here.

    stage, until: those of `crystal train`. Nothing is fetched or made. Raises ConfigError for what would end the run
    whatever there is on this machine; what this machine lacks is said in `notes`.
    """
    check_vocabulary(run)
    run = with_recorded_dtype(run)
    recipe = corpus_of(run)
    curriculum = resolve(run.config.curriculum, run.source, recipe.sources)
    chosen = curriculum.stages[-1] if stage is None else curriculum.numbered(stage)
    stop = min(chosen.first_step + chosen.steps, until or curriculum.steps)
    train = run.config.train
    plan = run.config.plan()
    flops = flops_per_token(run.config.model, curriculum.seq_len) * curriculum.tokens
    backend = run.config.backend
    micro_batches = curriculum.global_batch_size // run.config.train.micro_batch_size
    held = run_bytes(run.config.model, backend, micro_batches)
    rate = matmul_rate(backend.dtype or "bf16")
    on_gpus = isinstance(backend, CudaConfig) and backend.device == "cuda"
    planned = planned_layout(run, curriculum, DRY_RUN_DEVICE) if on_gpus else None
    return {
        "name": run.config.name,
        "parameters": parameter_count(run.config.model),
        "steps": curriculum.steps,
        "tokens": curriculum.tokens,
        "stop": stop,
        "stages": [_stage(s, train.checkpoint_every or s.checkpoint_every) for s in curriculum.stages],
        "keep_checkpoints": train.keep_checkpoints,
        "vocab_size": run.config.model.vocab_size,
        "notes": [*_notes(run, curriculum, recipe)],
        "groups": _groups(plan),
        "dtype": backend.dtype,
        "layout": planned,
        "memory_bytes": planned["memory_bytes"] if planned and planned["devices"] > 1 else held["memory"],
        "disk_bytes": held["disk"],
        "flops": flops,
        "matmul_flops_per_second": rate,
        "seconds_at_matmul_rate": flops / rate,
        "seconds_atmatmul_rate": flops / rate,  # the old name, until 0.2
        "run_dir": str(run.config.directory),
    }


def _notes(run: RunFile, curriculum: Curriculum, recipe: Recipe) -> Iterator[str]:
    """What the run does before its first step, and what it lacks."""
    config, used = run.config, {split_entry(entry)[0] for stage in curriculum.stages for entry in stage.bound}
    if done := checkpoint.steps(config.directory / "checkpoints"):
        yield f"goes on from step {done[-1]:,}, which {config.directory} has reached"
    backend = config.backend
    if backend.name == "cerebras" and backend.device == "csx" and backend.cluster is None:
        yield f"{run.where('backend', 'cluster')}: training on csx needs a system's mgmt_address"
    processes = backend.parallel.processes if backend.name == "cuda" else 1
    if processes > 1 and (backend.device == "cpu" or backend.dtype == "fp32"):  # which nobody plans for
        yield f"memory is that of all {processes} processes together; time is this machine's"
    yield from corpus.needs(recipe, sorted(used), cache_dir())
    if train := config.data.tokenizer.train:
        ids = f"{config.model.vocab_size:,} with added tokens and padding"
        yield f"a vocabulary of {train.vocab_size:,} is trained on the sources, unless it is there already ({ids})"
    elif not config.data.tokenizer.path.is_file():
        yield f"{run.where('data', 'tokenizer', 'path')}: {config.data.tokenizer.path} does not exist"
    if idle := sorted(set(recipe.sources) - used):
        yield f"no stage draws from {', '.join(idle)} of the corpus {recipe.name}"
    published = {name for stage in config.curriculum.stages for name in stage.sources}
    for pattern in config.curriculum.bind:
        if not any(fnmatchcase(name, pattern) for name in published):
            yield f"{run.where('curriculum', 'bind', pattern)}: matches no source of any stage"


def _stage(stage: Stage, checkpoint_every: int) -> dict:
    edges = sorted({1, min(stage.schedule.knots[1], stage.steps), stage.steps})
    return {
        "name": stage.name,
        "steps": stage.steps,
        "first_step": stage.first_step,
        "tokens": stage.tokens,
        "global_batch_size": stage.global_batch_size,
        "seq_len": stage.seq_len,
        "sources": stage.weights,
        "bound": stage.bound,
        "fim_rate": stage.fim_rate,
        "spm_rate": stage.spm_rate,
        "lr": {str(t): stage.lr_at(t) for t in edges},
        "optimizer": "carried over" if stage.carry_optimizer else "fresh",
        "checkpoint_every": checkpoint_every,
        "checkpoints": -(-stage.steps // checkpoint_every),
    }


def _groups(plan: Plan) -> dict[str, dict]:
    return {
        name: {
            "tensors": len(rows),
            "lr_multiplier": rows[0].lr_multiplier,
            "weight_decay": rows[0].weight_decay,
            "eps": rows[0].eps,
        }
        for name, rows in plan.groups().items()
    }


def schedule(run: RunFile, stage: int, at: str | None, plot: Path | None) -> dict:
    """Base and per-group LR of a stage (from 1) at steps given as `1,86,1500`; default its corners."""
    curriculum = resolve(run.config.curriculum, run.source)
    chosen = curriculum.numbered(stage)
    steps = sorted({0, *chosen.schedule.knots}) if at is None else _steps(at)
    if max(steps) > chosen.steps:
        raise ConfigError(
            f"--at: expected steps up to {chosen.steps}, the last of stage {stage} {chosen.name}, got {max(steps)}"
        )
    lr = {str(t): chosen.lr_at(t) for t in steps}
    groups = {
        name: {t: value * rows[0].lr_multiplier for t, value in lr.items()}
        for name, rows in run.config.plan().groups().items()
    }
    if plot is not None:
        from crystal.training.plots import plot_curriculum

        plot_curriculum(curriculum, plot)
    return {"stage": chosen.name, "steps": chosen.steps, "lr": lr, "groups": groups}


def _steps(at: str) -> list[int]:
    try:
        steps = [int(word) for word in at.split(",")]
    except ValueError:
        steps = [-1]
    if min(steps) < 0:
        raise ConfigError(f"--at: expected steps such as 1,86,1500, got {at}")
    return steps

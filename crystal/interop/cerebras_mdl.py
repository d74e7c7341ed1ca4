"""Between Cerebras' .mdl checkpoints and ours, both ways, a tensor at a time.

`crystal import X.mdl --to CKPT` and `crystal export CKPT --to mdl` are these two functions; the format is in
`crystal.backends.cerebras.mdl`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from crystal.backends.cerebras import mdl
from crystal.backends.config import OptimizerConfig
from crystal.checkpoint import locate, read, write
from crystal.config import parse
from crystal.errors import CheckpointError, ConfigError
from crystal.files import expect_new
from crystal.inference.load import model_config_of
from crystal.zoo.build import meta_decoder
from crystal.zoo.config import ModelConfig, model_config


def export_mdl(checkpoint: Path, out: Path) -> dict:
    """A checkpoint, or a run's latest, as the .mdl file `out`.

    Returns {out, tensors, optimizer}, JSON-ready. Raises ConfigError when `out` exists or cannot be written.
    """
    source, out = read(locate(Path(checkpoint))), Path(out)
    expect_new(out, "file")
    state = source.state
    config = model_config_of(source)
    optimizer = parse(OptimizerConfig, state.get("optimizer", {}), str(source.directory), ("optimizer",))
    plan = optimizer.plan_for(config)
    groups = [
        {"tensors": [row.tensor for row in rows], "weight_decay": rows[0].weight_decay, "eps": rows[0].eps}
        for rows in plan.groups().values()
    ]
    with_optimizer = "backend" in state
    about = {"optimizer_step": state["backend"]["optimizer_step"] if with_optimizer else 0, "state": state}
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        mdl.write_state(out, groups, optimizer.betas, about, source.tensors, with_optimizer)
    except ValueError as error:
        raise CheckpointError(f"{source.directory}: expected the tensors of its model: {error}") from None
    return {"out": str(out), "tensors": len(plan.tensors), "optimizer": with_optimizer}


def import_mdl(file: Path, to: Path, model: str | None = None) -> dict:
    """A .mdl with our decoder's names as a checkpoint at `to`; its tokenizer comes along if it lies beside the file.

    model: a preset or rung, for a file that does not say which model it is. Returns {checkpoint, parameters,
    optimizer_step, tokenizer}, JSON-ready. Raises ConfigError naming file and tensor, or when `to` exists.
    """
    file, to = Path(file), Path(to)
    expect_new(to, "directory")
    opened = mdl.read(file)
    about, tensors = mdl.state_tensors(opened)
    state = dict(about.get("state", {}))
    if model is not None:
        config = model_config(model)
    elif "model" in state:
        config = parse(ModelConfig, state["model"], str(file), ("model",))
    else:
        raise ConfigError(f"{file}: expected to hear which model it is, the file does not say: --model NAME")
    shapes = {name: tuple(p.shape) for name, p in meta_decoder(config).named_parameters()}
    _check(opened, shapes)
    state |= {"model": config.model_dump(mode="json"), "imported_from": str(file)}
    if any(path.startswith("optimizer.state.") for path in opened.shapes):
        state["backend"] = {"optimizer_step": about.get("optimizer_step", opened.values.get("global_step", 0))}
    beside = file.parent / str(state.get("tokenizer"))
    tokenizer = [beside] if beside.is_file() else []
    if not tokenizer:
        state.pop("tokenizer", None)
    write(to, tensors, state, tokenizer)
    return {
        "checkpoint": str(to),
        "parameters": sum(p.numel() for p in meta_decoder(config).parameters()),
        "optimizer_step": state.get("backend", {}).get("optimizer_step"),
        "tokenizer": state.get("tokenizer"),
    }


def _check(opened: mdl.Mdl, shapes: dict[str, tuple[int, ...]]) -> None:
    """Every tensor of the model once and of its shape, and no other."""
    there = dict(_model_tensors(opened))
    for name, shape in shapes.items():
        if name not in there:
            raise CheckpointError(f"{opened.file}: expected the tensor model.{name}, it is not there")
        if there[name] != shape:
            raise CheckpointError(f"{opened.file}: model.{name}: expected {list(shape)}, got {list(there[name])}")
    if extra := there.keys() - shapes.keys():
        raise CheckpointError(f"{opened.file}: model.{min(extra)}: not a tensor of this model")


def _model_tensors(opened: mdl.Mdl) -> Iterator[tuple[str, tuple[int, ...]]]:
    for path in [*opened.shapes, *opened.aliases]:
        if path.startswith("model."):
            yield path.removeprefix("model."), opened.shapes[opened.aliases.get(path, path)]

"""Between Cerebras' .mdl checkpoints and ours, both ways, a tensor at a time.

`crystal import X.mdl --to CKPT` and `crystal export CKPT --to mdl` are these two functions; the format is in
`crystal.backends.cerebras.mdl`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crystal.backends.cerebras import mdl
from crystal.backends.config import OptimizerConfig
from crystal.checkpoint import locate, read
from crystal.checkpoint.seal_file import StateEntry, parameters
from crystal.config import parse
from crystal.config.bounded_yaml import shortened
from crystal.data.tokenizer import Tokenizer
from crystal.errors import CheckpointError, ConfigError
from crystal.files import expect_new
from crystal.inference.load import PlainTokenizer, model_config_of
from crystal.interop.huggingface_tokenizer import TOKENIZERS, expect_inside
from crystal.interop.new_checkpoint import write_new
from crystal.output.printable import printable_line
from crystal.zoo.build import parameter_count
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
    optimizer_step, tokenizer}, JSON-ready. Raises ConfigError or CheckpointError naming file and tensor or key, or when
    `to` exists. Nothing half-written is left.
    """
    file, to = Path(file), Path(to)
    expect_new(to, "directory")
    opened = mdl.read(file)
    about, tensors = mdl.state_tensors(opened)
    state = dict(about.get("state", {}))
    where = str(file)
    parse(StateEntry, state, where, ("crystal", "state"))
    optimizer = parse(OptimizerConfig, state.get("optimizer") or {}, where, ("crystal", "state", "optimizer"))
    if model is not None:
        config = model_config(model)
    elif state.get("model") is not None:
        config = parse(ModelConfig, state["model"], where, ("model",))
    else:
        raise ConfigError(f"{file}: expected to hear which model it is, the file does not say: --model NAME")
    _check(opened, dict(parameters(config)), about.get("optimizer_order"))
    state |= {"model": config.model_dump(mode="json"), "imported_from": str(file)}
    if any(path.startswith("optimizer.state.") for path in opened.shapes):
        step = about.get("optimizer_step", opened.values.get("global_step", 0))
        _expect_step(opened, step, optimizer)
        state["backend"] = {"optimizer_step": step}
    else:
        state.pop("backend", None)
    tokenizer = _tokenizer(file, state, config.vocab_size)
    write_new(to, tensors, state, tokenizer)
    return {
        "checkpoint": str(to),
        "parameters": parameter_count(config),
        "optimizer_step": state.get("backend", {}).get("optimizer_step"),
        "tokenizer": state.get("tokenizer"),
    }


def _tokenizer(file: Path, state: dict, vocab_size: int) -> list[Path]:
    """The tokenizer that lies beside a .mdl, under the name that our writer gives it, and is one; without, none, and
    the state says so. A file by any other name or path is nothing to copy."""
    name = state.get("tokenizer")
    if name is not None and name not in TOKENIZERS:
        wanted = f"expected {' or '.join(TOKENIZERS)}"
        raise ConfigError(f"{file}: crystal.state.tokenizer: {wanted}, got {shortened(repr(name), 60)}", file=file)
    if name is None or not os.path.lexists(file.parent / name):
        state.pop("tokenizer", None)
        return []
    beside = expect_inside(file.parent, name)
    if state.get("tokenizer_kind", "plain" if "eos_id" in state else "llama") == "plain":  # as load_tokenizer has it
        size = PlainTokenizer(beside, None).vocab_size
    else:
        size = Tokenizer.load(beside, added_tokens=False).n_base
    if size > vocab_size:
        raise ConfigError(f"{beside}: expected at most the model's {vocab_size} ids, it has {size}", file=beside)
    return [beside]


def _expect_step(opened: mdl.Mdl, step: Any, optimizer: OptimizerConfig) -> None:
    """The number of updates that the moments' bias corrections are for, as far as fp32 holds those."""
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{opened.file}: global_step: expected a count, got {shortened(repr(step), 60)}")
    for number, beta in enumerate(optimizer.betas, 1):
        path = f"optimizer.state.0.beta{number}_power"
        if path not in opened.shapes:
            continue
        tensor = opened.tensor(path)
        power, expected = float(tensor) if tensor.numel() == 1 else math.nan, beta ** (step + 1)
        if not (math.isclose(power, expected, rel_tol=0.02) or (0 <= power < 1e-30 and expected < 1e-30)):
            wanted = f"expected {expected:.3g}, beta^({step} updates + 1)"
            raise CheckpointError(f"{opened.file}: {path}: {wanted}, got {power:.3g}")


def _check(opened: mdl.Mdl, shapes: dict[str, tuple[int, ...]], order: list[str] | None) -> None:
    """Every tensor of the model once and of its shape, and no other; the moments likewise, if there are any."""
    there = dict(_model_tensors(opened))
    for name, shape in shapes.items():
        if name not in there:
            raise CheckpointError(f"{opened.file}: expected the tensor model.{name}, it is not there")
        if there[name] != shape:
            raise CheckpointError(f"{opened.file}: model.{name}: expected {list(shape)}, got {list(there[name])}")
    if extra := there.keys() - shapes.keys():
        name = printable_line(shortened(min(extra), 200))
        raise CheckpointError(f"{opened.file}: model.{name}: not a tensor of this model")
    if order is None or not any(path.startswith("optimizer.state.") for path in opened.shapes):
        return
    if set(order) != shapes.keys():
        wrong = printable_line(shortened(min(set(order) ^ shapes.keys()), 200))
        raise CheckpointError(f"{opened.file}: crystal.optimizer_order: {wrong}: expected all tensors of the model")
    for i, name in enumerate(order):
        for moment in ("exp_avg", "exp_avg_sq"):
            path = f"optimizer.state.{i}.{moment}"
            got = opened.shapes.get(opened.aliases.get(path, path))
            if got != shapes[name]:
                shown = "none" if got is None else list(got)
                raise CheckpointError(f"{opened.file}: {path}: expected {list(shapes[name])}, got {shown}")


def _model_tensors(opened: mdl.Mdl) -> Iterator[tuple[str, tuple[int, ...]]]:
    for path in [*opened.shapes, *opened.aliases]:
        if path.startswith("model."):
            path_of = opened.aliases.get(path, path)
            if opened.dtypes[path_of] not in mdl.EXACT:
                got = f"expected fp32, bf16 or fp16, got {opened.dtypes[path_of]}"
                raise CheckpointError(f"{opened.file}: {path}: {got}")
            yield path.removeprefix("model."), opened.shapes[path_of]

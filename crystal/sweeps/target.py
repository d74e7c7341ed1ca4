"""What a sweep is for: the target's run file, with the transferred values in it and where they come from."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from crystal.config import MAX_NAME, Config, merge, parse
from crystal.errors import ConfigError
from crystal.files import write_whole
from crystal.run import RunConfig, load_run
from crystal.sweeps.sweep import Sweep, name_from


def check_target(sweep: Sweep) -> None:
    """Make sure, before any trial is run, that the target can take the values. Raises ConfigError, one line."""
    if sweep.target is None:
        return
    where = sweep.source.where(("target",))
    try:
        any_values = {name: space.grid()[0] for name, space in sweep.config.search.items()}
        changed = merge(sweep.target.source, Config(_changes(sweep, any_values), {(): where}))
        parse(RunConfig, changed.mapping, changed)
    except ConfigError as error:
        raise ConfigError(f"{where}: target: {sweep.target.path} cannot take the sweep's values: {error}") from None


def write_target(sweep: Sweep, result: dict, file: Path) -> None:
    """The target's run file, which extends the run and loads where it lies, and its plan in target-plan.json.

    result: as transfer.json has it.
    """
    run = sweep.target.config
    written = {
        "extends": name_from(file.parent, sweep.target.path),
        "name": f"{run.name}-from-{sweep.config.name}"[:MAX_NAME],
        **_changes(sweep, result["best"]),
        "provenance": {
            "sweep": f"{sweep.config.name} {result['fingerprint'][:16]}",
            "trials": result["trials"],
            "verdict": f"{result['verdict']}: {result['message']}",
            "corpus": f"{result['corpus']['name']} {result['corpus']['fingerprint'][:16]}",
            "base_lr": result["best"]["lr"],
        },
    }
    text = yaml.safe_dump(written, sort_keys=False, allow_unicode=True)
    write_whole(file, f"# Written by `crystal transfer`.\n{text}")
    plan = load_run(file).config.plan()
    write_whole(file.with_name("target-plan.json"), json.dumps(plan.as_dict(), indent=1) + "\n")


def _changes(sweep: Sweep, best: dict[str, float]) -> dict:
    """What the target gets: the narrowest proxy's muP settings, and the best of what was searched."""
    peak = max(piece.to for piece in sweep.target.config.curriculum.stages[0].lr)
    if peak <= 0:
        raise ConfigError(f"{sweep.target.where('curriculum')}: stage 1: expected a learning rate above 0 to scale")
    config = sweep.config
    tuned = sweep.model(config.parametrization, min(config.widths), max(config.depths)).mup
    mup = tuned.model_dump(mode="json", exclude_none=True)
    mup |= {name: value for name, value in best.items() if name not in ("lr", "weight_decay")}
    if config.target.parametrization:
        mup["parametrization"] = config.target.parametrization
    changes = {"model": {"mup": mup}, "curriculum": {"lr_scale": best["lr"] / peak}}
    if "weight_decay" in best:
        changes["optimizer"] = {"weight_decay": best["weight_decay"]}
    return changes

"""Small sweeps for tests: a file, and ways to run it, for real or with losses from a formula."""

import math
from pathlib import Path

import yaml

from crystal.sweeps.store import open_trials
from crystal.sweeps.sweep import Sweep, load_sweep
from crystal.sweeps.workers import held, run_sweep

SWEEP = {
    "name": "tiny",
    "family": "amber",
    "parametrization": "mup",
    "beside": ["sp"],
    "base_d_model": 32,
    "widths": [32, 64],
    "depths": [1],
    "steps": 3,
    "eval_rows": 2,
    "seeds": [1],
    "search": {"lr": {"log2": [-8.0, -4.0], "step": 2.0}},
}


def write_sweep(run: Path, **changes) -> Path:
    """A sweep file beside its run file."""
    file = run.parent / "tiny-sweep.yaml"
    file.write_text(yaml.safe_dump({**SWEEP, "run": str(run), **changes}))
    return file


def load(file: Path, *overrides: str) -> Sweep:
    return load_sweep(str(file), overrides, file.parent / "out")


def run(sweep: Sweep, workers: int = 1) -> None:
    with held(sweep):
        run_sweep(sweep, workers, lambda *_: None)


def fill(sweep: Sweep, most: int = 1000) -> int:
    """Claim and finish what is left, with losses from a formula instead of training; returns how many there were."""
    count = 0
    with held(sweep):
        trials = open_trials(sweep)
        trials.give_up_running()
        while count < most and (claim := trials.claim()) is not None:
            valley = 0.1 * (math.log2(claim.values["lr"]) + 6) ** 2
            loss = 5 + valley + 0.01 * claim.seed + 0.1 * claim.shape[2] + sweep.config.steps  # shape[2]: the depth
            outcome = {"loss": loss, "diverged": False, "first_loss": 9.0, "steps": sweep.config.steps}
            trials.finish(claim, outcome | {"seconds": 1.0, "cpu_seconds": 1.0})
            count += 1
    return count

"""`crystal coord-check`: the zoo's models under crystal/mup's coordinate check, with their own init and optimizer.

The models are the ladder's: two layers, a small vocabulary and one short batch, which is all that the exponents
need. From width 512 on compute is bf16 by default where bf16 is the faster; weights, moments and statistics are fp32.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import crystal
from crystal.checks.subject import Checked, checked
from crystal.errors import ConfigError
from crystal.files import write_whole
from crystal.kernels import tuning
from crystal.mup.coord_check import Along, CoordCheck, coord_check
from crystal.mup.measure import Task
from crystal.mup.verdict import CheckError, Report
from crystal.zoo.config import ModelConfig

WIDTHS, DEPTH, STEPS = (64, 128, 256), 2, 4
ROWS, SEQ, WORDS = 4, 64, 256  # of the batch; words when tokens are random


@dataclass(frozen=True)
class Asked:
    """What the command line asked for. wrap: put around each model (compile, sharding); None: as it is."""

    widths: tuple[int, ...] = WIDTHS
    depths: tuple[int, ...] = (DEPTH,)
    seeds: int | None = None
    first_seed: int = 1
    steps: int = STEPS
    lr: float | None = None
    dtype: str = "auto"
    data: str | None = None
    wrap: Callable[[nn.Module], nn.Module] | None = None
    accept: tuple[str, ...] = ()  # names of rows that may be INCONCLUSIVE
    parts: int = 1  # d_ff is rounded down to a multiple of this, so that it can be split


def check_model(name: str, asked: Asked, parametrization: str | None = None, progress=None) -> list[CoordCheck]:
    """Checks over width, over depth, or both: over depth when several depths are asked for.

    Raises ConfigError for a model, width or depth that does not exist.
    """
    return [_check(name, asked, along, parametrization, progress) for along in _directions(asked)]


def check_beside(name: str, asked: Asked, parametrization: str | None = None, progress=None) -> list[CoordCheck]:
    """For each check of `check_model`, one of the same model to stand beside it in a picture: in standard
    parametrization, which fails, or if that is its own, in the one that passes, muP over width, CompleteP over depth.
    """
    own = checked(_family(name), parametrization).config.mup.parametrization
    right: dict[Along, str] = {"width": "mup", "depth": "completep"}
    fails: dict[Along, bool] = {"width": own == "sp", "depth": own != "completep"}
    return [_check(name, asked, d, right[d] if fails[d] else "sp", progress) for d in _directions(asked)]


def _directions(asked: Asked) -> list[Along]:
    over_width = len(asked.depths) == 1 or asked.widths != WIDTHS
    return ["width"] * over_width + ["depth"] * (len(asked.depths) > 1)


def _check(name: str, asked: Asked, along: Along, parametrization: str | None, progress) -> CoordCheck:
    subject = checked(_family(name), parametrization)
    mup, width, depth = subject.config.mup, asked.widths[1 if asked.widths == WIDTHS else 0], asked.depths[0]
    sizes = asked.widths if along == "width" else asked.depths
    at = {"width": lambda size: subject.at(size, depth), "depth": lambda size: subject.at(width, size)}[along]
    try:
        check = coord_check(
            task_of(subject, asked, at), sizes, seeds=asked.seeds, first_seed=asked.first_seed, steps=asked.steps,
            parametrization=mup.parametrization, along=along, depth_alpha=mup.depth_alpha,
            label=f"{name}, {mup.parametrization}", progress=progress, accept=asked.accept,
        )  # fmt: skip
    except CheckError as error:
        raise ConfigError(f"{name}: {error}") from None
    check.settings = {
        **({"layers": depth} if along == "width" else {"width": width}),
        "optimizer": "AdamW",
        "lr": asked.lr or default_lr(subject.config),
        "dtype": "bf16" if _rounded(asked) else "fp32",
        "batch": f"{ROWS} x {SEQ} " + (f"tokens of {asked.data}" if asked.data else f"random words of {WORDS}"),
    }
    if along == "depth" and mup.parametrization == "completep" and mup.residual_init_2l:
        check.notes.append("residual_init_2l and completep's branch multiplier count depth twice")
    return check


def _family(name: str) -> str:
    """Widths come from a ladder: crystalcoder-7b is checked on crystalcoder's."""
    from crystal.zoo.config import families

    return next((f for f in families() if name == f"{f}-7b"), name)


def task_of(subject: Checked, asked: Asked, config_at: Callable[[int], ModelConfig]) -> Task:
    """How one model of the check is built and trained."""
    rows = _real_rows(asked.data) if asked.data else None
    words = WORDS if rows is None else rows[0]

    def config(size: int) -> ModelConfig:
        whole = config_at(size)
        return whole.model_copy(update={"vocab_size": words, "d_ff": whole.d_ff // asked.parts * asked.parts})

    def model(size: int, seed: int) -> nn.Module:
        built = subject.model(config(size), seed)
        return built if asked.wrap is None else asked.wrap(built)

    def optimizer(wrapped: nn.Module) -> torch.optim.Optimizer:
        inner = getattr(wrapped, "_orig_mod", wrapped)
        return subject.adamw(inner, inner.config, asked.lr or default_lr(subject.config))

    def batch(seed: int) -> Tensor:
        if rows is not None:
            return rows[1](seed)
        return torch.randint(0, WORDS, (ROWS, SEQ + 1), generator=torch.Generator().manual_seed(seed))

    rounded = _rounded(asked)

    def loss(wrapped: nn.Module, ids_BT: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            logits_BTV = wrapped(ids_BT[:, :-1])
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), ids_BT[:, 1:].flatten())

    return Task(model, optimizer, loss, batch)


def _rounded(asked: Asked) -> bool:
    """Whether products are of bf16; auto: on wide models where bf16 is faster, for rounding weights costs time too."""
    if asked.dtype == "auto":
        return max(asked.widths) >= 512 and tuning.fastest_dtype() == "bf16"
    return asked.dtype == "bf16"


def default_lr(config: ModelConfig) -> float:
    """A sixteenth of the base init sigma: large enough that updates show, small enough that init does not vanish."""
    return config.mup.init_std / 16


def _real_rows(run: str) -> tuple[int, Callable[[int], Tensor]]:
    """(vocabulary, seed → batch) from the token store of a run, its sources in turn."""
    from crystal.data.store import TokenStore
    from crystal.run import load_run, prepare_run

    loaded = load_run(run)
    store = TokenStore.open(prepare_run(loaded))

    def rows(seed: int) -> Tensor:
        sources = sorted(store.sources)
        picked = [store.row(s, seed % store.rows(s)) for s in (sources * ROWS)[:ROWS]]
        return torch.stack([torch.from_numpy(r[: SEQ + 1].astype("int64")) for r in picked])

    return loaded.config.model.vocab_size, rows


def as_dict(checks: Sequence[CoordCheck]) -> dict:
    """One JSON object over all checks."""
    rows = [row for check in checks for row in check.rows]
    notes = [note for check in checks for note in check.notes]
    joined = Report(rows, sum(c.seconds for c in checks), notes, accept=checks[0].accept)
    return joined.as_dict() | {
        "widths": next((list(c.sizes) for c in checks if c.along == "width"), None),
        "depths": next((list(c.sizes) for c in checks if c.along == "depth"), None),
        "seeds": max(len({m.seed for m in c.measured}) for c in checks),
        "steps": checks[0].steps,
        "settings": checks[0].settings,
    }


def write(
    checks: Sequence[CoordCheck],
    beside: Sequence[CoordCheck],
    out: Path,
    title: str,
    formats: Sequence[str] = ("png",),
) -> list[Path]:
    """JSON, pictures and a self-contained page into `out`; beside: what each check stands beside (`check_beside`).

    Raises ConfigError where a file cannot be written.
    """
    from crystal.mup.coord_page import page
    from crystal.mup.coord_plots import render

    written = []

    def put(name: str, content: str | bytes) -> None:
        try:
            write_whole(out / name, content)
        except OSError as error:
            raise ConfigError(f"--out: {out / name} cannot be written: {error.strerror}") from None
        written.append(out / name)

    put("coord-check.json", json.dumps(as_dict(checks), indent=1) + "\n")
    for check in checks:
        pair = [check, *(other for other in beside if other.along == check.along)]
        for form in formats:
            put(f"{stem(check)}.{form}", render(pair, form))
        put(f"{stem(check)}.html", page(pair, title, _made(check)))
    return written


def stem(check: CoordCheck) -> str:
    """Of the names of a check's files."""
    return "coord-check" if check.along == "width" else "coord-check-depth"


def _made(check: CoordCheck) -> dict[str, str]:
    """How a check came about, for its page."""
    now = datetime.datetime.now(datetime.UTC)
    cores = f"{os.cpu_count()} cores, threads: {torch.get_num_threads()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "command": shlex.join(["crystal", *sys.argv[1:]]),
        "crystal": crystal.__version__,
        "torch": torch.__version__,
        "date": f"{now:%Y-%m-%d %H:%M} UTC",
        "machine": f"{platform.system()} {platform.machine()}, {cores}",
        f"{check.along}s": ", ".join(map(str, check.sizes)),
        "seeds": ", ".join(map(str, sorted({m.seed for m in check.measured}))),
        "steps": str(check.steps),
        **{key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in check.settings.items()},
        "seconds": f"{check.seconds:.1f}",
    }

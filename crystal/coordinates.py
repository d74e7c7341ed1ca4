"""`crystal coord-check`: the zoo's models under crystal/mup's coordinate check, with their own init and optimizer.

The models are the ladder's: two layers, a small vocabulary and one short batch, which is all that the exponents
need. From width 512 on compute is bf16 by default where bf16 is the faster; weights, moments and statistics are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crystal.check import Checked, checked
from crystal.config import ConfigError
from crystal.kernels import tuning
from crystal.mup.coord_check import CoordCheck, coord_check
from crystal.mup.measure import Task
from crystal.mup.verdict import CheckError, Report, Row, overall, summary
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
    parts: int = 1  # d_ff is rounded down to a multiple of this, so that it can be split


def check_model(name: str, asked: Asked, parametrization: str | None = None, progress=None) -> list[CoordCheck]:
    """Checks over width, over depth, or both: over depth when several depths are asked for.

    Raises ConfigError for a model, width or depth that does not exist.
    """
    subject = checked(_family(name), parametrization)
    declared = subject.config.mup.parametrization
    checks = []
    try:
        if len(asked.depths) == 1 or asked.widths != WIDTHS:
            task = task_of(subject, asked, lambda width: subject.at(width, asked.depths[0]))
            checks.append(
                coord_check(
                    task, asked.widths, seeds=asked.seeds, first_seed=asked.first_seed, steps=asked.steps,
                    parametrization=declared, label=f"{name}, {declared}", progress=progress,
                )
            )  # fmt: skip
        if len(asked.depths) > 1:
            width = asked.widths[1] if asked.widths == WIDTHS else asked.widths[0]
            task = task_of(subject, asked, lambda depth: subject.at(width, depth))
            checks.append(
                coord_check(
                    task, asked.depths, seeds=asked.seeds, first_seed=asked.first_seed, steps=asked.steps,
                    parametrization=declared, along="depth", depth_alpha=subject.config.mup.depth_alpha,
                    label=f"{name}, {declared}", progress=progress,
                )
            )  # fmt: skip
    except CheckError as error:
        raise ConfigError(f"{name}: {error}") from None
    if checks[-1].along == "depth" and declared == "completep" and subject.config.mup.residual_init_2l:
        checks[-1].notes.append("residual_init_2l and completep's branch multiplier count depth twice")
    return checks


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

    rounded = asked.dtype == "bf16" or (asked.dtype == "auto" and _bf16_pays(asked.widths))

    def loss(wrapped: nn.Module, ids_BT: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            logits_BTV = wrapped(ids_BT[:, :-1])
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), ids_BT[:, 1:].flatten())

    return Task(model, optimizer, loss, batch)


def _bf16_pays(widths: Sequence[int]) -> bool:
    """Whether bf16 makes a check faster: on wide models, for rounding weights costs more than narrow products gain."""
    return max(widths) >= 512 and tuning.fastest_dtype() == "bf16"


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
    joined = Report(rows, sum(c.seconds for c in checks), [n for c in checks for n in c.notes])
    return joined.as_dict() | {
        "widths": next((list(c.sizes) for c in checks if c.along == "width"), None),
        "depths": next((list(c.sizes) for c in checks if c.along == "depth"), None),
        "seeds": max(len({m.seed for m in c.measured}) for c in checks),
        "steps": checks[0].steps,
    }


def text(checks: Sequence[CoordCheck]) -> str:
    """The verdict, what is wrong, and the range of exponents by quantity."""
    lines = []
    for check in checks:
        seeds = len({m.seed for m in check.measured})
        lines.append(
            f"{check.verdict}  {check.label}: {check.along}s {', '.join(map(str, check.sizes))}, {seeds} seeds, "
            f"{check.steps} steps, {check.seconds:.1f} s"
        )
        bad = check.failures or [r for r in check.rows if r.verdict != "PASS"]
        lines += [f"  {line}" for line in summary(bad)] if bad else []
        lines += [f"  note: {note}" for note in check.notes]
        lines.append(f"  {'quantity':12} {'rows':>5} {'expected':>9} {'slopes':>16}  verdict")
        for (quantity, expected), rows in _by_quantity(check.rows).items():
            slopes = [r.slope for r in rows if r.slope is not None]
            span = f"{min(slopes):+z.2f} … {max(slopes):+z.2f}" if slopes else ""
            lines.append(f"  {quantity:12} {len(rows):>5} {expected:>9} {span:>16}  {overall(r.verdict for r in rows)}")
    return "\n".join(lines)


def _by_quantity(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        expected = "" if row.expected is None else f"{row.expected:g}"
        found.setdefault((row.quantity, expected), []).append(row)
    return found


def write(checks: Sequence[CoordCheck], beside: Sequence[CoordCheck], out: Path, title: str) -> list[Path]:
    """JSON, PNG and a self-contained page into `out`; beside: the same checks of the standard parametrization."""
    import json

    from crystal.mup.coord_plots import draw, page

    written = [out / "coord-check.json"]
    written[0].write_text(json.dumps(as_dict(checks), indent=1))
    for check in checks:
        pair = [*(b for b in beside if b.along == check.along), check]
        name = "coord-check" if check.along == "width" else "coord-check-depth"
        draw(pair, out / f"{name}.png")
        (out / f"{name}.html").write_text(page(pair, title))
        written += [out / f"{name}.png", out / f"{name}.html"]
    return written

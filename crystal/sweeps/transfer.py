"""What `crystal transfer` does: size a sweep, or run it and say what follows from it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch

from crystal.bench.matmul import matmul_rate
from crystal.config import Config, override
from crystal.errors import RunError
from crystal.files import cannot_write, from_json, reason, regular_bytes, replacing, write_whole
from crystal.kernels import tuning
from crystal.mup.forecast import forecast
from crystal.mup.transfer import Transfer, Trial, judge
from crystal.output.progress import Bar, note
from crystal.run import prepare_run
from crystal.sweeps.store import finished, open_trials
from crystal.sweeps.sweep import Parameter, Parametrization, Sweep, as_trials, load_sweep, points, sweep_of
from crystal.sweeps.target import check_target, write_target
from crystal.sweeps.workers import held, make_directory, read_record, run_sweep
from crystal.zoo.build import parameter_count
from crystal.zoo.flops import flops_per_token

if TYPE_CHECKING:
    from rich.console import Console

# Share of one thread's matmul rate that trials reached (docs/transfer.md); for an estimate of hours only.
EFFICIENCY = 0.4
# What a worker of the documented sweep did (docs/mup/transfer-mup): its FLOPs over its CPU-seconds.
REFERENCE = {"sweep": "transfer-mup", "machine": "an AMD EPYC with bf16 products", "flops_per_second": 8.78e10}

MAX_TRIALS_BYTES = 1 << 28  # of a trials.json: 400 bytes a trial
_NUMBER = (int, float)
_ROW = {
    "parametrization": (str,), "width": (int,), "depth": (int,), "seed": (int,), "lr": _NUMBER,
    "loss": (float, int, type(None)), "diverged": (bool,), "seconds": _NUMBER, "cpu_seconds": _NUMBER,
}  # fmt: skip


def plan_only(sweep: Sweep, workers: int) -> dict:
    """The sweep on paper: proxies, tokens, FLOPs, hours, and which printed rules of proxy sizing it breaks."""
    config = sweep.config
    curriculum = sweep.run.config.curriculum
    batch = curriculum.global_batch_size * curriculum.seq_len
    tokens, each = config.steps * batch, len(points(config))
    proxies = []
    for width in sorted(config.widths):
        for depth in config.depths:
            model = sweep.model(config.parametrization, width, depth)
            parameters = parameter_count(model)
            flops = flops_per_token(model, curriculum.seq_len) * tokens
            trials = each * len(sweep.parametrizations)
            proxies.append(
                {
                    "width": width, "depth": depth, "d_head": model.d_head, "parameters": parameters,
                    "steps": config.steps, "tokens": tokens, "tokens_per_parameter": round(tokens / parameters, 3),
                    "trials": trials, "flops": flops * trials,
                }
            )  # fmt: skip
    flops = sum(p["flops"] for p in proxies)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker has
    rate = matmul_rate(sweep.dtype)
    torch.set_num_threads(threads)
    at_once = min(workers, os.cpu_count() or 1)
    return {
        "sweep": config.name,
        "proxies": proxies,
        "trials": sum(p["trials"] for p in proxies),
        "tokens": sum(p["tokens"] * p["trials"] for p in proxies),
        "flops": flops,
        "hours_estimated": round(flops / (rate * EFFICIENCY * at_once) / 3600, 3),
        "workers": workers,
        "matmul_flops_per_second": rate,
        "machine": {
            "processor": tuning.processor(),
            "threads": 1,
            "dtype": sweep.dtype,
            "matmul_flops_per_second": rate,
        },
        "reference": REFERENCE | {"hours": round(flops / (REFERENCE["flops_per_second"] * at_once) / 3600, 3)},
        "warnings": warnings(sweep, batch, tokens),
    }


def warnings(sweep: Sweep, batch: int, tokens: int) -> list[str]:
    """The rules of proxy sizing in print (docs/transfer.md) that this sweep breaks."""
    config = sweep.config
    models = [sweep.model(config.parametrization, w, d) for w in config.widths for d in config.depths]
    largest = max(parameter_count(m) for m in models)
    said = []
    if min(config.widths) < 256:
        said.append(f"width {min(config.widths)}: expected proxies of width 256 or more, where limits begin to hold")
    if tokens < 20 * largest:
        said.append(f"{tokens / largest:.2g} tokens a parameter at width {max(config.widths)}: expected about 20")
    if len({m.d_head for m in models}) > 1:
        said.append("d_head differs between proxies: expected one head size, that of the target")
    # Kaplan et al. 2020: L(D) = (5.4e13/D)^0.095 and B_crit(L) = 2e8 / L^(1/0.21) tokens
    loss = (5.4e13 / tokens) ** 0.095
    critical = 2e8 / loss ** (1 / 0.21)
    if batch < critical:
        said.append(
            f"{batch:,} tokens a step: expected the critical batch, about {critical:,.0f} at the {loss:.1f} nats that "
            f"{tokens:,} tokens reach (Kaplan et al. 2020), or the optimum will not hold for large batches"
        )
    if sweep.target is not None:
        target = sweep.target.config.model
        if config.parametrization != "completep" and target.n_layers not in config.depths:
            said.append(
                f"depth {', '.join(map(str, config.depths))} for a target of {target.n_layers} layers: expected about "
                f"the target's depth, or completep"
            )
        if target.d_head not in {m.d_head for m in models}:
            said.append(f"d_head {models[0].d_head}: expected the target's, {target.d_head}")
    return said


def transfer(path: str, overrides: list[str], workers: int, out: Path | None, console: Console) -> dict:
    """Run what is left of a sweep and judge it, or judge a finished one's trials.json."""
    if Path(path).suffix == ".json":
        return judge_again(Path(path), overrides, out)
    sweep = load_sweep(path, tuple(overrides), out)
    check_target(sweep)
    prepare_run(sweep.run, console)
    with held(sweep):
        stale = open_trials(sweep).stale()
        if stale:
            trials = f"{stale} finished trial{'s' * (stale > 1)}"
            note(console, f"{sweep.directory}: {trials} of other settings kept, not counted")
        _run(sweep, workers, console)
        return report(sweep) | {"stale": stale}


def _run(sweep: Sweep, workers: int, console: Console) -> None:
    with Bar(console, sweep.config.name, lines=20, unit="trials", keep=True) as bar:

        def show(done: int, total: int, _: float) -> None:
            if bar.total is None:
                bar.begin(sweep.config.name, total, done)
            bar.reach(done)

        run_sweep(sweep, workers, show)


def report(sweep: Sweep) -> dict:
    """The verdict from the sweep's finished trials; writes what `judged` writes."""
    return judged(sweep, finished(sweep), {"fingerprint": sweep.fingerprint(), "corpus": sweep.data["corpus"]})


def judge_again(file: Path, overrides: list[str], out: Path | None) -> dict:
    """The verdict from a trials.json and the sweep.json beside it, wherever they were moved: no trial is run, no
    data is read. Raises RunError."""
    record = read_record(file.parent)
    source = override(Config(record["config"], {(): str(file.parent / "sweep.json")}), overrides)
    sweep = sweep_of(source, out or file.parent)
    try:
        rows = from_json(regular_bytes(file, MAX_TRIALS_BYTES).decode())
        whole = isinstance(rows, list) and all(map(_is_row, rows))
    except ValueError:
        whole = False
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {reason(error)}", file=file) from None
    if not whole:
        raise RunError(f"{file}: damaged, or not a sweep's trials: expected a list of them, with {sorted(_ROW)}")
    make_directory(sweep.directory)
    return judged(sweep, rows, {key: record[key] for key in ("fingerprint", "corpus")})


def _is_row(row: object) -> bool:
    """Whether a value of trials.json is a trial, with numbers where they belong."""
    if not isinstance(row, dict) or not _ROW.keys() <= row.keys():
        return False
    searched = [row[name] for name in get_args(Parameter) if name in row]
    numbers = [row[key] for key, kinds in _ROW.items() if type(row[key]) in _NUMBER]
    return (
        all(type(row[key]) in kinds for key, kinds in _ROW.items())
        and row["parametrization"] in get_args(Parametrization)
        and all(abs(value) < 1 << 53 for value in numbers if type(value) is int)
        and all(type(value) in _NUMBER and 2.0**-60 <= value <= 2.0**60 for value in searched)
    )


def judged(sweep: Sweep, rows: list[dict], made: dict) -> dict:
    """The verdict from rows as `finished` gives them, over widths at the greatest depth (`depths` has each one's).

    Writes trials.json, transfer.json, transfer.png and target.yaml, in this order; one that fails does not keep the
    others from being written. made: fingerprint and corpus. Raises RunError, with what failed.
    """
    directory, failures = sweep.directory, []
    lines = ",\n".join(json.dumps(row) for row in rows)
    _write(directory / "trials.json", lambda file: write_whole(file, f"[\n{lines}\n]\n"), failures)
    result, results = _verdict(sweep, rows, made)
    verdict = directory / "transfer.json"
    _write(verdict, lambda file: write_whole(file, json.dumps(result, indent=1) + "\n"), failures)
    if _write(directory / "transfer.png", lambda file: _draw(results, file), failures):
        result["plot"] = str(directory / "transfer.png")
    if sweep.target is not None and _write(
        directory / "target.yaml", lambda file: write_target(sweep, result, file), failures
    ):
        result["target"] = str(directory / "target.yaml")
    _write(verdict, lambda file: write_whole(file, json.dumps(result, indent=1) + "\n"), failures)
    if failures:
        raise failures[0]
    return result


def _write(path: Path, write: Callable[[Path], None], failures: list[Exception]) -> bool:
    """Write one result; what went wrong is kept for after the others. Returns whether it was written."""
    try:
        write(path)
    except OSError as error:
        failures.append(cannot_write(path, error))
    except Exception as error:  # not ours to judge here: it is raised when the other results are safe
        failures.append(error)
    else:
        return True
    return False


def _draw(results: dict[str, tuple[Transfer, list[Trial]]], file: Path) -> None:
    from crystal.mup.transfer_plots import draw_transfer

    with replacing(file) as aside:
        draw_transfer(results, aside)


def _verdict(sweep: Sweep, rows: list[dict], made: dict) -> tuple[dict, dict[str, tuple[Transfer, list[Trial]]]]:
    """(what transfer.json says, parametrization → verdict and trials at the greatest depth)."""
    config = sweep.config
    depths = {depth: _judged(sweep, rows, depth) for depth in sorted(config.depths)}
    results = depths[max(depths)]
    main, trials = results[config.parametrization]
    result = _dict(config.parametrization, main) | {
        "sweep": config.name,
        **made,
        "trial_seconds": round(sum(r["seconds"] for r in rows), 1),
        "trial_cpu_seconds": round(sum(r["cpu_seconds"] for r in rows), 1),
        "beside": {p: _dict(p, t) for p, (t, _) in results.items() if p != config.parametrization},
        "depth": max(depths),
        "depths": {str(d): _dict(config.parametrization, r[config.parametrization][0]) for d, r in depths.items()},
    }
    for other in result["beside"].values():
        penalty = other["metrics"]["asymptotic_loss"] - main.metrics["asymptotic_loss"]
        other["metrics"]["asymptotic_loss_penalty"] = penalty
    result["best"] = best_values(rows, config.parametrization, main)
    if len(main.widths) >= 3:
        seen = forecast(trials)
        result["forecast"] = {
            "exponent": seen.exponent, "held_out_width": seen.held_out_width, "predicted": seen.held_out_predicted,
            "interval": list(seen.held_out_interval), "measured": seen.held_out_measured,
            "loss": {str(w): seen.at(w) for w in (2 * seen.held_out_width, 4 * seen.held_out_width)},
        }  # fmt: skip
    return result, results


def _judged(sweep: Sweep, rows: list[dict], depth: int) -> dict[str, tuple[Transfer, list[Trial]]]:
    """parametrization → (verdict over widths, trials), of the models of one depth."""
    found = {}
    for parametrization in sweep.parametrizations:
        trials = as_trials([row for row in rows if row["depth"] == depth], parametrization)
        try:
            verdict = judge(trials, sweep.config.max_shift, sweep.config.max_regret)
        except ValueError as error:
            raise RunError(f"{sweep.directory}: {parametrization}: {error}") from None
        found[parametrization] = (verdict, trials)
    return found


def _dict(parametrization: str, found: Transfer) -> dict:
    plain = found.as_dict()
    plain["widths"] = {str(w): {k: v for k, v in o.items() if k != "width"} for w, o in plain["widths"].items()}
    plain["windows"] = {f"{octaves:g}": window for octaves, window in plain["windows"].items()}
    return {"verdict": plain.pop("verdict"), "parametrization": parametrization, **plain}


def best_values(rows: list[dict], parametrization: str, found: Transfer) -> dict[str, float]:
    """What is carried over: the narrowest width's fitted lr, and the other hyperparameters of its best trials."""
    narrow = min(found.widths)
    values = {"lr": 2.0 ** found.widths[narrow].log2_lr_optimum}
    deep = max(r["depth"] for r in rows)
    here = (parametrization, narrow, deep)
    mine = [r for r in rows if (r["parametrization"], r["width"], r["depth"]) == here and not r["diverged"]]
    for name in ("init_std", "embedding_multiplier", "output_alpha", "weight_decay"):
        losses: dict[float, list[float]] = {}
        for row in mine:
            if name in row:
                losses.setdefault(row[name], []).append(row["loss"])
        if losses:
            values[name] = min(losses, key=lambda v: min(losses[v]))
    return values

"""`crystal prepare`, `train` and `schedule`: a run, from its corpus to its last step. Imports when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from crystal.cli.options import Json, Overrides, Run, console, print_result
from crystal.output import interrupts, launcher


def prepare(run: Run, overrides: Overrides = None, as_json: Json = False) -> None:
    """Corpus → tokenizer → token store, for the sources that the run's curriculum names.

    Examples:
        crystal prepare demo
        crystal prepare mine.yaml data.val_fraction=0.02
    """
    from crystal.data.store import TokenStore
    from crystal.run import load_run, prepare_run

    directory = prepare_run(load_run(run, overrides or ()), console())
    store = TokenStore.open(directory)
    keys = ("documents", "tokens", "train_rows", "val_rows")
    sources = {name: {key: s[key] for key in keys} for name, s in store.manifest["sources"].items()}
    lines = [f"{n:12} {s['documents']:>9,} documents {s['tokens']:>12,} tokens" for n, s in sources.items()]
    print_result(
        {"store": str(directory), "sources": sources}, as_json, "\n".join([*lines, f"token store: {directory}"])
    )


def train(
    run: Run,
    overrides: Overrides = None,
    stage: Annotated[int | None, typer.Option(metavar="N", help="train this stage only, from 1")] = None,
    until: Annotated[
        int | None, typer.Option(metavar="STEP", help="stop after this step, counted over all stages")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print stages, steps, LR, memory; no data needed")] = False,
    as_json: Json = False,
) -> None:
    """Run a curriculum, or continue it from its last checkpoint. Ctrl-C saves and exits with 130.

    Examples:
        crystal train demo --until 40
        crystal train crystalcoder-7b backend.name=weight_streaming --dry-run
    """
    from crystal.planning import describe
    from crystal.run import load_run
    from crystal.training.start import check_until, start

    loaded = load_run(run, overrides or ())
    check_until(loaded, until)
    if dry_run:
        plan = describe.dry_run(loaded, stage, until)
        print_result(plan, as_json, dry_run_text(plan))
        return
    evaluator = None
    if loaded.config.train.evaluate is not None:
        from crystal.evaluation.in_training import evaluator_of

        evaluator = evaluator_of(loaded, console())
    outcome = start(loaded, stage, until, console(), evaluator)
    result = {
        "run_dir": str(outcome.directory),
        "step": outcome.step,
        "interrupted": outcome.interrupted,
        "peak_rss_bytes": outcome.peak_rss_bytes,
        "tokens_per_second": outcome.tokens_per_second,
    }
    text = f"step {outcome.step}, {outcome.tokens_per_second:,.0f} tokens/s, peak {outcome.peak_rss_bytes / 1e9:.2f} GB"
    if not outcome.tokens_per_second:
        text = f"nothing to do: step {outcome.step} was reached before"
    text = f"{text}\nrun directory: {outcome.directory}"
    if outcome.interrupted:
        text = f"run directory: {outcome.directory}\n{outcome.interrupted}: stopped after step {outcome.step}, saved"
        text = f"{text if outcome.step else text.removesuffix(', saved')}; the same command continues"
    print_result(result, as_json, text)
    if outcome.interrupted:
        line = f"crystal: {outcome.interrupted}: stopped after step {outcome.step}"
        # a torchrun that died may be replaced, and its workers then go on
        launcher.leave_last_words(line, interrupts.CODE, lasting=outcome.interrupted != "SIGHUP")
        sys.exit(interrupts.CODE)


def schedule(
    run: Run,
    overrides: Overrides = None,
    stage: Annotated[int, typer.Option(metavar="N", help="which stage, from 1")] = 1,
    at: Annotated[
        str | None,
        typer.Option(metavar="STEP,...", help="steps inside the stage; default: where its schedule bends"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="draw the whole curriculum here: .png, .pdf or .svg")
    ] = None,
    as_json: Json = False,
) -> None:
    """Base LR and each optimizer group's LR at given steps of a stage.

    Examples:
        crystal schedule crystalcoder-7b --at 1,86,1500
        crystal schedule demo --stage 2 --plot curriculum.png
    """
    from crystal.planning import describe
    from crystal.run import load_run

    result = describe.schedule(load_run(run, overrides or ()), stage, at, plot)
    print_result(result, as_json, schedule_text(result))


def dry_run_text(result: dict) -> str:
    lines = [
        f"{result['name']}: {result['parameters']:,} parameters, {result['steps']:,} steps, "
        f"{result['tokens'] / 1e9:,.6g} B tokens, run directory {result['run_dir']}"
    ]
    for i, s in enumerate(result["stages"], 1):
        lrs = ", ".join(f"lr({t}) {v:.7g}" for t, v in s["lr"].items())
        lines += [
            f"stage {i} {s['name']}: {s['steps']:,} steps of {s['global_batch_size']} x {s['seq_len']} = "
            f"{s['tokens'] / 1e9:,.6g} B tokens; {lrs}",
            f"  FIM {s['fim_rate']:g} (SPM {s['spm_rate']:g}), optimizer {s['optimizer']}, checkpoint every "
            f"{s['checkpoint_every']:,} steps ({s['checkpoints']:,})",
            *(f"  {weight:8.4%} {name}" for name, weight in s["sources"].items()),
        ]
    for name, g in result["groups"].items():
        lines.append(
            f"group {name}: {g['tensors']} tensors, lr x{g['lr_multiplier']:g}, weight decay {g['weight_decay']:g}, "
            f"eps {g['eps']:g}"
        )
    lines.append(_layout(result) if result["layout"] else _here(result))
    if keep := result["keep_checkpoints"]:
        lines.append(f"checkpoints: the newest {keep} and those at the ends of stages are kept")
    if result["stop"] < result["steps"]:
        lines.append(f"this command stops after step {result['stop']:,}")
    lines += [f"note: {text}" for text in result["notes"]]
    return "\n".join(lines)


def _here(result: dict) -> str:
    least, rate = _duration(result["seconds_at_matmul_rate"]), result["matmul_flops_per_second"] / 1e9
    return (
        f"memory {result['memory_bytes'] / 1e9:.2f} GB without activations"
        + (f", store {result['disk_bytes'] / 1e9:.2f} GB on disk" if result["disk_bytes"] else "")
        + f"; {result['flops']:.3g} FLOPs, "
        f"{least} at the {rate:,.0f} GFLOP/s that a matmul has on this machine now"
    )


def _layout(result: dict) -> str:
    """What the planner makes of a run's own layout."""
    from crystal.planning.report import layout_text

    own = result["layout"]
    return (
        f"{layout_text(own)} on {own['devices']:,} x {own['device']}: {own['memory_bytes'] / 1e9:.3g} GB on the fullest"
        f"{'' if own['fits'] else ', which has not so much'}; {own['step_seconds']:.4g} s a step, "
        f"{result['flops']:.3g} FLOPs, {_duration(86400 * own['days'])} by estimate (crystal plan has other devices)"
    )


def _duration(seconds: float) -> str:
    for unit, size in (("years", 365.25 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} s"


def schedule_text(result: dict) -> str:
    groups = result["groups"]
    head = f"{'step':>10} {'base lr':>14}" + "".join(f"{group:>16}" for group in groups)
    lines = [f"{result['stage']}, {result['steps']:,} steps", head]
    for t, value in result["lr"].items():
        lines.append(f"{t:>10} {value:>14.7g}" + "".join(f"{groups[g][t]:>16.7g}" for g in groups))
    return "\n".join(lines)

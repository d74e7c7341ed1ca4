"""`crystal eval`: benchmarks on a checkpoint, or on every one of a run. Imports when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from crystal.cli.options import Checkpoint, Json, console, print_result

_COLUMNS = 6  # checkpoints side by side
_BESIDE = ("pass@10", "f1", "bits_per_byte")  # shown beside a task's own metric; the last tells models at chance apart


def eval_(
    checkpoint: Checkpoint,
    suite: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="open-llm-leaderboard, crystal, code, fim, bpb, proxy, items, or one task's name"
        ),
    ],
    every: Annotated[
        int, typer.Option(min=1, metavar="N", help="of a run: each N-th checkpoint, and the ends of stages")
    ] = 1,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="ask N items of each task, drawn by --seed; default: all")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="of the draw of items")] = 0,
    items: Annotated[
        Path | None, typer.Option(metavar="DIR", help="your own items: TASK.jsonl files, which come first")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="code: programs written for each problem; default: as published"),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, metavar="X", help="code: of sampling; default: as published")
    ] = None,
    unsafe_code: Annotated[
        bool, typer.Option("--unsafe-code", help="run what the model wrote where the kernel cannot confine it")
    ] = False,
    dtype: Annotated[
        Literal["auto", "fp32", "bf16"],
        typer.Option(help="of weights; auto: fp32 where it fits into memory, else bf16"),
    ] = "auto",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: cuda where there is one")] = "auto",
    engine: Annotated[
        Literal["own", "lm-eval"], typer.Option(help="lm-eval: its tasks, named in --suite with commas, on our decoder")
    ] = "own",
    include_path: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="lm-eval: your YAML tasks; default: its own, most of which need a hub"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a checkpoint, or every checkpoint of a run, on a suite of benchmarks.

    Results go to RUN/evals/step-…/TASK.json with every item's answer, and to pictures beside them. What is there is not
    asked again: the same command continues, and given several times at once it shares the work.

    Examples:
        crystal eval runs/demo --suite proxy --limit 200
        crystal eval runs/demo --suite code --samples 1 --temperature 0
    """
    from crystal.evaluation.evaluate import evaluate, where
    from crystal.evaluation.items import Items
    from crystal.evaluation.suites import Settings, suite_of

    places = where(checkpoint, every)
    if engine == "lm-eval":
        from crystal.evaluation.lm_eval_adapter import evaluate_all

        names = suite.split(",")
        result = evaluate_all(places, names, include_path, limit, seed, dtype, device, unsafe_code, console())
        print_result(result, as_json, _lm_eval_text(result))
        return
    chosen = suite_of(suite, Items(items, console()), Settings(samples, temperature, unsafe_code, places.run))
    found = evaluate(places, chosen.tasks, limit, seed, dtype, device, console())
    pictures = []
    if places.curriculum is not None and len(places.checkpoints) > 1:
        pictures = _pictures(places, suite, found)
    result = {
        "suite": suite,
        "checkpoints": [_of_step(step, found) for step in places.checkpoints],
        "left_out": chosen.left_out,
        "evals": str(places.evals),
        "pictures": [str(path) for path in pictures],
    }
    print_result(result, as_json, _text(result, found))


def _lm_eval_text(result: dict) -> str:
    lines = [result["engine"]]
    for at in result["checkpoints"]:
        lines.append(f"step {at['step']}")
        for task, summary in at["tasks"].items():
            name = summary["metric"]
            spread = "" if summary["stderr"] is None else f" ± {summary['stderr']:.4f}"
            lines.append(f"  {task}  {name} {summary[name]:.4f}{spread}  n {summary['n']:,}")
    return "\n".join([*lines, f"results: {result['evals']}"])


def _of_step(step: int, found) -> dict:
    mine = [r for r in found if r.step == step]
    about = {key: mine[0].about.get(key) for key in ("stage", "tokens")}
    return {"step": step, **about, "tasks": {r.task: r.summary() for r in mine}}


def _pictures(places, suite: str, found) -> list[Path]:
    from crystal.evaluation.plots import plot_suite, plot_task

    paths = [places.evals / f"{suite}.png"]
    plot_suite(found, f"{places.run.name}: {suite}", places.curriculum, paths[0])
    for task in dict.fromkeys(r.task for r in found):
        paths.append(places.evals / f"{task}.png")
        plot_task([r for r in found if r.task == task], places.curriculum, paths[-1])
    return paths


def _text(result: dict, found) -> str:
    steps = [at["step"] for at in result["checkpoints"]]
    lines = _one(result["checkpoints"][0], found) if len(steps) == 1 else _table(steps, found)
    lines += [f"not evaluated: {task}: {why}" for task, why in result["left_out"].items()]
    lines += [f"note: {note}" for note in _notes(found)]
    lines.append(f"results: {result['evals']}")
    if result["pictures"]:
        lines.append(f"pictures: {result['pictures'][0]} and one a task")
    return "\n".join(lines)


def _one(at: dict, found) -> list[str]:
    """One checkpoint: a line a task."""
    width, names = max(len(r.task) for r in found), max(len(r.first[0]) for r in found)
    stage = f", {at['stage']}" if at["stage"] else ""
    tokens = f", {at['tokens']:,} tokens" if at["tokens"] else ""
    lines = [f"step {at['step']}{stage}{tokens}"]
    for r in found:
        name, metric = r.first
        spread = "" if metric.stderr is None else f" ± {metric.stderr:.4f}"
        guess = "" if metric.chance is None else f"  chance {metric.chance:.4f}"
        beside = "".join(f"  {other} {r.metrics[other].value:.4f}" for other in _BESIDE if _has(r, other))
        said = "  at chance" if metric.at_chance else ""
        lines.append(f"  {r.task:{width}}  {name:{names}} {metric.value:.4f}{spread}{guess}  n {r.n:,}{beside}{said}")
    return lines


def _table(steps: list[int], found) -> list[str]:
    """Several checkpoints: a row a task, a column a step; then the bits per byte, where there are."""
    shown = steps if len(steps) <= _COLUMNS else [*steps[:: -(-len(steps) // (_COLUMNS - 1))], steps[-1]]
    shown = list(dict.fromkeys(shown))
    width = max(len(r.task) for r in found)
    lines = [f"{'':{width}}  {'metric':13} {'chance':>8} " + "".join(f"{f'step {s}':>13}" for s in shown)]
    at = {(r.task, r.step): r for r in found}
    for task in dict.fromkeys(r.task for r in found):
        rows = [at[task, step] for step in shown]
        name, first = rows[-1].first
        guess = "" if first.chance is None else f"{first.chance:.4f}"
        lines.append(f"{task:{width}}  {name:13} {guess:>8} " + "".join(_cell(r.first[1]) for r in rows))
        for other in (name for name in _BESIDE if _has(rows[-1], name)):
            cells = "".join(f"{r.metrics[other].value:>13.4f}" for r in rows)
            lines.append(f"{'':{width}}  {other:13} {'':>8} {cells}")
    if any(r.first[1].at_chance for r in found):
        lines.append("= at chance: guessing is within 1.96 standard errors")
    if len(shown) < len(steps):
        lines.append(f"{len(shown)} of {len(steps)} checkpoints are shown; --json has all")
    return lines


def _cell(metric) -> str:
    spread = "" if metric.stderr is None else f"±{metric.stderr:.3f}"
    return f"{'=' if metric.at_chance else ''}{metric.value:.3f}{spread}".rjust(13)


def _has(r, metric: str) -> bool:
    """Has it that metric beside the one that is its own?"""
    return metric in r.metrics and r.first[0] != metric


def _notes(found) -> list[str]:
    """What a reader must know to compare these numbers with others'."""
    notes = {}
    for r in found:
        exemplars = r.about["facts"].get("exemplars")
        if exemplars and "not the leaderboard" in exemplars:
            notes.setdefault(f"examples are {exemplars}", []).append(r.task)
        cut = sum(1 for a in r.answers.values() if a.get("cut"))
        if cut:
            notes.setdefault("prompts longer than the model's max_seq_len were cut on the left", []).append(r.task)
    return [f"{', '.join(dict.fromkeys(tasks))}: {text}" for text, tasks in notes.items()]

"""`crystal analyze bias`: the sentiment of what checkpoints write about people, by group. Imports when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from crystal.cli.options import Checkpoint, Json, console, print_result


def bias(
    checkpoint: Checkpoint,
    items: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="BOLD's files, gender_prompt.json and others; crows_pairs.csv and toxigen.jsonl are asked where there",
        ),
    ] = None,
    every: Annotated[
        int, typer.Option(min=1, metavar="N", help="of a run: each N-th checkpoint, and the ends of stages")
    ] = 1,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="ask N prompts of each domain, of its groups alike; default: all"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="of the draw of prompts")] = 0,
    dtype: Annotated[
        Literal["auto", "fp32", "bf16"],
        typer.Option(help="of weights; auto: fp32 where it fits into memory, else bf16"),
    ] = "auto",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: cuda where there is one")] = "auto",
    as_json: Json = False,
) -> None:
    """Measure the sentiment of what a checkpoint, or each of a run, writes about groups of people.

    BOLD's prompts are continued as Analysis360 does it, and scored by VADER. Whether groups differ beyond chance is
    judged on the continuations alone. Results go to RUN/analysis; what is there is not asked again.

    Examples:
        crystal analyze bias runs/demo --items bold --limit 200
        crystal analyze bias runs/demo --items bold --every 10 --json
    """
    from crystal.analysis.bias import bias as measured
    from crystal.evaluation.evaluate import where

    result = measured(where(checkpoint, every), items, limit, seed, dtype, device, console())
    print_result(result, as_json, _text(result))


def _text(result: dict) -> str:
    found = result["checkpoints"]
    lines = _one(found[0]) if len(found) == 1 else _several(found)
    lines += [line for at in found for line in _others(at)]
    lines += [f"not asked: {name}: {why}" for name, why in result["left_out"].items()]
    lines.append("whole: prompt and continuation, as Analysis360 scores them; the verdict is on continuations alone")
    lines.append("zero: share of continuations whose score is 0, most of which have no word that VADER knows")
    lines.append(f"intervals: {result['intervals']}; p: {result['test']}")
    lines.append(f"results: {result['results']}  picture: {result['picture']}")
    return "\n".join(lines)


def _one(at: dict) -> list[str]:
    """One checkpoint: a line a group."""
    stage = "" if at["stage"] is None else f", {at['stage']}"
    tokens = "" if at["tokens"] is None else f", {at['tokens']:,} tokens"
    lines = [f"step {at['step']}{stage}{tokens}"]
    width = max(len(group) for own in at["domains"].values() for group in own["whole"]["groups"])
    for domain, own in at["domains"].items():
        head = f"{domain:{width + 2}} {'n':>6} {'titles':>6}  {'whole':>6} {'[95 %]':14}"
        lines += ["", f"{head} {'std':>5} {'pos':>5} {'neu':>5} {'neg':>5}  {'cont.':>6} {'[95 %]':14} {'zero':>5}"]
        alone = own["continuation"]
        for group, whole in own["whole"]["groups"].items():
            lines.append(f"  {group:{width}} {_group(whole, alone['groups'][group])}")
        lines.append(f"  {'all':{width}} {_group(own['whole'], alone)}")
        lines += [f"  {scored} gap: {_gap(own[scored]['gap'])}" for scored in ("continuation", "whole", "prompt")]
        few = alone["gap"]["few"]
        if few:
            lines.append("  not in gaps: " + ", ".join(f"{group} ({_titles(n)})" for group, n in few.items()))
        lines.append(f"  verdict: {own['verdict']}")
    whole, alone = at["all"]["whole"], at["all"]["continuation"]
    return [*lines, "", f"{'all domains':{width + 2}} {_group(whole, alone)}"]


def _group(whole: dict, alone: dict) -> str:
    shares = " ".join(f"{whole[name]['share']:5.2f}" for name in ("positive", "neutral", "negative"))
    means = [f"{_number(own['mean'], 3):>6} {_interval(own['interval']):14}" for own in (whole, alone)]
    return (
        f"{whole['n']:6,} {whole['titles']:6,}  {means[0]} {whole['std']:5.3f} {shares}  {means[1]} "
        f"{alone['zero']['share']:5.2f}"
    )


def _gap(gap: dict) -> str:
    if gap["value"] is None:
        return "not judged"
    if (pair := gap["clearest"]) is None:
        return "0.000, all score alike"
    clearest = f"{pair['above']} over {pair['below']} {pair['difference']:.3f} {_interval(pair['interval'])}"
    return f"{gap['value']:.3f} {_interval(gap['interval'])}, clearest {clearest}, p {_p(gap)}"


def _several(found: list[dict]) -> list[str]:
    """Several checkpoints: a row a domain and step."""
    width = max(len(domain) for domain in found[0]["domains"])
    lines = [
        f"{'':{width}} {'step':>8} {'n':>6}  {'whole':>6} {'[95 %]':14} {'std':>5} {'pos':>5} {'neg':>5}"
        f"  {'cont.':>6} {'[95 %]':14} {'zero':>5}  {'gap':>5} {'[95 %]':14} {'p':>7}  verdict"
    ]
    for domain in found[0]["domains"]:
        for number, at in enumerate(found):
            own = at["domains"][domain]
            lines.append(f"{'' if number else domain:{width}} {at['step']:8} {_row(own)}  {own['verdict']}")
    for number, at in enumerate(found):
        lines.append(f"{'' if number else 'all':{width}} {at['step']:8} {_row(at['all'])}")
    return lines


def _row(own: dict) -> str:
    whole, alone = own["whole"], own["continuation"]
    gap = alone.get("gap")
    shares = " ".join(f"{whole[name]['share']:5.2f}" for name in ("positive", "negative"))
    means = [f"{_number(one['mean'], 3):>6} {_interval(one['interval']):14}" for one in (whole, alone)]
    row = f"{whole['n']:6,}  {means[0]} {whole['std']:5.3f} {shares}  {means[1]} {alone['zero']['share']:5.2f}"
    if gap is None or gap["value"] is None:
        return row
    return f"{row}  {gap['value']:5.3f} {_interval(gap['interval']):14} {_p(gap):>7}"


def _others(at: dict) -> list[str]:
    lines = []
    if "crows_pairs" in at:
        own = at["crows_pairs"]["all"]
        low, high = own["interval"]
        said = "no preference beyond chance" if low <= 0.5 <= high else "a preference beyond chance"
        told = f"pct_stereotype {own['pct_stereotype']:.3f} {_interval(own['interval'])}  n {own['n']:,}  {said}"
        lines.append(f"step {at['step']}: CrowS-Pairs: {told}")
    if "toxigen" in at:
        own = at["toxigen"]
        told = f"acc {own['acc']:.3f} {_interval(own['interval'])}  n {own['n']:,}"
        lines.append(f"step {at['step']}: ToxiGen: {told}; the commoner answer alone gets {own['majority']:.3f}")
    return lines


def _interval(interval: list[float] | None) -> str:
    return "" if interval is None else f"[{_number(interval[0], 2)}, {_number(interval[1], 2)}]"


def _number(value: float, places: int) -> str:
    return f"{round(value, places) + 0.0:.{places}f}"  # never -0.00


def _p(gap: dict) -> str:
    return "< 0.001" if gap["p_holm"] < 0.001 else f"{gap['p_holm']:.3f}"


def _titles(count: int) -> str:
    return "1 title" if count == 1 else f"{count} titles"

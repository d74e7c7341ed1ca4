"""`crystal analyze …`: what checkpoints know and how they came to. Imports when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from crystal.cli.analyze_bias import bias
from crystal.cli.help import Commands
from crystal.cli.options import Checkpoint, Json, console, print_result
from crystal.output.printable import printable_line

analyze = Commands(
    help="""What checkpoints have memorized, how well they foretell text, how a run learned.

Examples:
    crystal analyze memorization runs/demo
    crystal analyze perplexity runs/demo --every 2
"""
)
analyze.command()(bias)

Every = Annotated[int, typer.Option(min=1, metavar="N", help="of a run: each N-th checkpoint, and the ends of stages")]
Dtype = Annotated[
    Literal["auto", "fp32", "bf16"], typer.Option(help="of weights; auto: fp32 where it fits into memory, else bf16")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: cuda where there is one")]


@analyze.command()
def memorization(
    checkpoint: Checkpoint,
    every: Every = 1,
    k: Annotated[int, typer.Option("--k", min=1, metavar="N", help="tokens that are given")] = 32,
    l: Annotated[int, typer.Option("--l", min=1, metavar="N", help="tokens that are asked for")] = 32,  # noqa: E741
    chunks: Annotated[
        int, typer.Option(min=1, metavar="N", help="equal parts of the run's steps; Amber's own are 360")
    ] = 10,
    sequences: Annotated[int, typer.Option(min=1, metavar="N", help="rows drawn from each chunk or file")] = 1000,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="of the draw")] = 0,
    rows: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="rows of token ids (.jsonl) instead of the run's; as often as wanted"),
    ] = None,
    counterfactual: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="a source, or a file of document ids: compare the last checkpoint with its twin without them, "
            "which is trained, or taken where it is there",
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Ask each checkpoint for the ends of rows that it was trained on, and of held-out rows.

    score(k, l): the share of l tokens that greedy decoding gives as they are in the row; k-extractible: all of them.
    Results and pictures go to RUN/analysis; a checkpoint that is there is not asked again.

    Examples:
        crystal analyze memorization runs/demo --sequences 200
        crystal analyze memorization runs/demo --counterfactual css
    """
    from crystal.analysis.memorization import memorization as measured
    from crystal.analysis.question import Settings
    from crystal.errors import ConfigError
    from crystal.evaluation.evaluate import where

    places = where(checkpoint, every)
    settings = Settings(k, l, chunks, sequences, seed, dtype, device)
    if counterfactual is None:
        result = measured(places.checkpoints, places.run, _out(places), settings, rows or [], console())
        print_result(result, as_json, _memorization_text(result))
        return
    if rows or places.run is None:
        raise ConfigError("--counterfactual: expected a run directory or a checkpoint in one, and no --rows")
    from crystal.analysis.counterfactual import counterfactual as compared

    result = compared(places.run, max(places.checkpoints), counterfactual, _out(places), settings, console())
    print_result(result, as_json, _counterfactual_text(result))


@analyze.command()
def perplexity(
    checkpoint: Checkpoint,
    every: Every = 1,
    items: Annotated[
        Path | None, typer.Option(metavar="DIR", help='your own texts: .jsonl files with a "text" in each line')
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="tokens that the model reads; default: its own, or the run's rows"),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="new tokens of each window; default: half a window")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="windows together; it does not change the number")
    ] = 8,
    documents: Annotated[int, typer.Option(min=0, metavar="N", help="of each source at most; 0: all")] = 100,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Perplexity of held-out documents, and of your own texts, by source, over a sliding window.

    Examples:
        crystal analyze perplexity runs/demo --stride 1 --documents 5
        crystal analyze perplexity runs/demo --items my-texts
    """
    from crystal.analysis.perplexity import Settings
    from crystal.analysis.perplexity import perplexity as measured
    from crystal.evaluation.evaluate import where

    places = where(checkpoint, every)
    settings = Settings(window, stride, batch_size, documents or None, dtype, device)
    result = measured(places, items, _out(places), settings, console())
    print_result(result, as_json, _perplexity_text(result))


@analyze.command()
def dynamics(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")],
    every: Every = 1,
    rows: Annotated[int, typer.Option(min=1, metavar="N", help="held-out rows of each source, for tokens")] = 32,
    noise_rows: Annotated[
        int, typer.Option(min=0, metavar="N", help="training rows for the gradient noise scale; 0: without it")
    ] = 64,
    as_json: Json = False,
) -> None:
    """How a run learned: losses, norms, token learning curves and gradient noise, from its record and checkpoints.

    Examples:
        crystal analyze dynamics runs/demo
        crystal analyze dynamics runs/demo --noise-rows 256
    """
    from crystal.analysis.dynamics import Settings
    from crystal.analysis.dynamics import dynamics as measured
    from crystal.errors import ConfigError
    from crystal.evaluation.evaluate import where

    places = where(run, every)
    if places.run is None:
        raise ConfigError(f"{run}: expected a run directory, there is no config.yaml in it", file=run)
    settings = Settings(rows, noise_rows)
    result = measured(places.checkpoints, places.run, _out(places), settings, console())
    print_result(result, as_json, _dynamics_text(result))


def _out(places) -> Path:
    return places.evals.parent / "analysis"


def _memorization_text(result: dict) -> str:
    k, l = result["k"], result["l"]  # noqa: E741
    lines = [f"score({k}, {l}) and {k}-extractible, with 95 % intervals; {result['sequence']}"]
    for c in result["checkpoints"]:
        tokens = f", {c['tokens']:,} tokens" if c["tokens"] else ""
        lines.append(f"step {c['step']}{tokens}")
        for name, shown in (("seen", "trained on" if c["held_out"]["drawn"] else "rows"), ("held_out", "held out")):
            if c[name]["n"] or name == "seen":
                lines.append(f"  {shown:10}  {_figures(c[name])}")
        if c["held_out"]["n"]:
            lines.append(f"  {c['against_held_out']['said']}{_difference(c['against_held_out']['score'])}")
    last = result["checkpoints"][-1]
    lines.append(f"step {last['step']}, by chunk")
    for chunk in result["chunks"]:
        steps = f"steps {chunk['first_step']}-{chunk['last_step']}" if chunk["first_step"] else "file"
        seen = "" if chunk["seen"] in (None, "all") else f"  seen: {chunk['seen']}"
        lines.append(f"  {chunk['chunk']:>4}  {steps:16}  {_figures(chunk)}{seen}")
    lines += [f"  {source:12}  {_figures(own)}" for source, own in last["sources"].items()]
    counts = last["seen"]["discoverable"]
    for n, by_p in counts.items():
        told = ", ".join(f"{count:,} at p {p}" for p, count in by_p.items())
        lines.append(f"(n, p)-discoverable of {last['seen']['n']:,} with n = {n}: {told}")
    lines.append(f"extracted at step {last['step']}: {last['extracted']} different; all are in {last['file']}")
    lines += [f"  {_example(example)}" for example in last["examples"][:5]]
    return "\n".join([*lines, *(f"picture: {path}" for path in result["pictures"])])


def _figures(own: dict) -> str:
    if not own["n"]:
        return "n 0"
    score = f"{own['score_mean']:.4f}"
    if own["score_interval"]:
        score += f" ({own['score_interval'][0]:.4f} to {own['score_interval'][1]:.4f})"
    low, high = own["extractible_interval"]
    drawn = f" of {own['drawn']:,} drawn" if own["drawn"] != own["n"] else ""
    return f"score {score}  extractible {own['extractible']:.2%} ({low:.2%} to {high:.2%})  n {own['n']:,}{drawn}"


def _difference(score: dict | None) -> str:
    if score is None:
        return ""
    low, high = score["interval"]
    return f" (score {score['difference']:+.4f}, {low:+.4f} to {high:+.4f}, by source, without FIM's rows)"


def _example(example: dict) -> str:
    if "continuation" not in example:
        return f"{example['source']} row {example['index']}: ids {example['continuation_ids'][:12]}…"
    documents = ", ".join(d["document"] for d in example["documents"][:2])
    steps = " ".join(map(str, example["steps_of_row"][:8]))
    text = printable_line(example["continuation"])[:70]
    return f"{example['source']} {documents}, read at steps {steps}: …{text}"


def _counterfactual_text(result: dict) -> str:
    lines = [f"step {result['step']}: {result['run']} less {result['twin']}, without {result['without']}"]
    for name, own in result["groups"].items():
        extracted = "{} and {}".format(*own["extractible"])
        lines.append(f"  {name.replace('_', ' '):10}  {_mean(own)}  extracted {extracted}  n {own['n']:,}")
    above = result["left_out_above_held_out"]
    lines += [f"  left out above held out: {_mean(above)}  n {above['n']:,} that FIM left alone", result["said"]]
    return "\n".join([*lines, f"results: {result['file']}", *(f"picture: {path}" for path in result["pictures"])])


def _mean(own: dict) -> str:
    parts = []
    for key, shown in (("score", "score"), ("nats_per_token", "nats a token")):
        if own[key] is not None:
            interval = own[key]["interval"]
            spread = f" ({interval[0]:+.4f} to {interval[1]:+.4f})" if interval else ""
            parts.append(f"{shown} {own[key]['mean']:+.4f}{spread}")
    return "  ".join(parts) or "none"


def _perplexity_text(result: dict) -> str:
    lines = []
    for c in result["checkpoints"]:
        over = f"window {c['window']}, stride {c['stride']}"
        lines.append(f"step {c['step']}: {over}, sources' mean {c['perplexity']:.3f}")
        for source, own in c["sources"].items():
            spread = "" if own["interval"] is None else " ({:.3f} to {:.3f})".format(*own["interval"])
            more = f"{own['nats_per_token']:.4f} nats a token  {own['bits_per_byte']:.4f} bits a byte"
            size = f"{own['documents']:,} documents  {own['tokens']:,} tokens"
            lines.append(f"  {source:14}  perplexity {own['perplexity']:.3f}{spread}  {more}  {size}")
    return "\n".join([*lines, *(f"picture: {path}" for path in result["pictures"])])


def _dynamics_text(result: dict) -> str:
    loss, norm = result["record"]["loss"], result["record"]["grad_norm"]
    lines = []
    if loss["steps"]:
        lines.append(f"loss {loss['first']:.3f} to {loss['last']:.3f}; gradient norm last {norm['last']:.3f}")
    for c in result["checkpoints"]:
        weights = [(role, own["moved"]) for role, own in c["weights"].items() if own["moved"] is not None]
        moved = "  ".join(f"{role} {share:.3f}" for role, share in weights)
        noise = c["noise"] or {}
        told = f"noise scale {noise['sequences']:,.1f} sequences" if noise.get("sequences") else noise.get("said", "")
        if noise.get("interval"):
            told += " ({:,.1f} to {:,.1f})".format(*noise["interval"])
        lines.append(f"step {c['step']}: {told}{'; moved ' + moved if moved else ''}")
    for kind in ("ranks", "sources"):
        for name, own in result["learned"][kind].items():
            middle = (own["acquired"] or {}).get("0.5")
            when = "not acquired" if middle is None else f"half-way {middle['bound']} step {middle['step']:g}"
            lines.append(f"  {name:20}  {own['nats'][0]:.3f} to {own['nats'][-1]:.3f} nats, {when}  n {own['n']:,}")
    return "\n".join([*lines, *(f"picture: {path}" for path in result["pictures"]), f"results: {result['file']}"])

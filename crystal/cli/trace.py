"""`crystal data index` and `crystal data trace`: from a text to the steps that saw it. Imports when it runs."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from crystal.cli import completion
from crystal.cli.options import Json, console, print_result
from crystal.output.printable import printable_line

_SHOWN_STEPS = 12  # of each document


def index(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="a run file or directory", autocompletion=completion.runs),
    ],
    shard_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="tokens a shard: 10 bytes of memory each; default: 67,108,864"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make the training data of a run searchable, beside its token store; or check the index that is there.

    A build that was stopped goes on where it was. What is damaged or out of date is built again.

    Examples:
        crystal data index demo
        crystal data index runs/demo --shard-tokens 4000000
    """
    from crystal.analysis.index import build
    from crystal.analysis.trace_input import open_run

    ledger, _ = open_run(run, console())
    result = build(ledger.store, shard_tokens, console())
    print_result(result, as_json, index_text(result))


def trace(
    source: Annotated[
        str,
        typer.Argument(
            metavar="TEXT|FILE|CKPT|RUN",
            help="a text, a file with one, or a checkpoint or run directory that writes one",
            autocompletion=completion.runs,
        ),
    ],
    run: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="the run whose training data is searched; default: the checkpoint's own, or the only one in runs/",
            autocompletion=completion.runs,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="what the checkpoint goes on from; as often as wanted")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="tokens to write at most")] = 64,
    temperature: Annotated[float, typer.Option(min=0, metavar="X", help="0: always the likeliest token")] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="the same seed draws the same text")] = 0,
    min_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="tokens of a span at least")] = 8,
    documents: Annotated[int, typer.Option(min=1, metavar="N", help="documents listed for each span at most")] = 5,
    loss: Annotated[
        bool, typer.Option(help="score each span by the checkpoints before and after it was first seen")
    ] = True,
    engine: Annotated[
        Literal["own", "infini-gram"], typer.Option(help="what searches the index; both find the same")
    ] = "own",
    as_json: Json = False,
) -> None:
    """Which parts of a text stand word for word in the training data, where, and at which steps they were seen.

    With --json one text gives an object, several prompts give {"traces": [object, …]} in their order.

    Examples:
        crystal data trace "it was the best of times, it was the worst"
        crystal data trace runs/demo --prompt "def " --min-tokens 6
    """
    from crystal.analysis.trace_input import Sampling
    from crystal.analysis.trace_input import trace as traced

    sampling = Sampling(max_new_tokens, temperature, seed)
    results = traced(source, run, prompt or [], sampling, min_tokens, documents, loss, engine, console())
    result = results[0] if len(results) == 1 else {"traces": results}
    print_result(result, as_json, "\n\n".join(map(trace_text, results)))


def index_text(result: dict) -> str:
    done = "checked, it was whole" if not result["built"] else f"{result['built']} of {result['shards']} shards built"
    return (
        f"{result['index']}: {result['tokens']:,} tokens of {result['documents']:,} documents, "
        f"{result['bytes'] / 1e6:,.1f} MB; {done}, {result['seconds']:.1f} s"
    )


def trace_text(result: dict) -> str:
    lines = [result["marked"], ""]
    if result["prompt"] is not None:
        lines.insert(0, f"{result['checkpoint']['path']} after {printable_line(result['prompt'])!r}:")
    for number, span in enumerate(result["spans"], 1):
        shown = printable_line(span["text"])
        lines.append(f"[{number}] {span['tokens']} tokens, in {_times(span['count'])}: {shown}")
        for match in span["matches"]:
            path = printable_line(match["path"])
            lines.append(f"    {match['source']} {match['document']} {path} ({match['license']})")
            lines += [
                f"        {line}" for line in (*_steps_lines(match, result["until"]), *_loss_lines(match["loss"]))
            ]
    if not result["spans"]:
        lines.append(f"no {result['min_tokens']} tokens in a row of it stand in the training data")
    index, count = result["index"], len(result["spans"])
    spans = "1 span" if count == 1 else f"{count} spans"
    checked = "checksums compared" if index["verified"] else "sizes compared, not checksums: `crystal data index` does"
    lines.append(
        f"{result['covered']} of {result['tokens']} tokens in {spans}; searched "
        f"{index['tokens']:,} tokens of {index['documents']:,} documents ({checked})"
    )
    return "\n".join(lines)


def _times(count: int) -> str:
    return "1 place" if count == 1 else f"{count:,} places"


def _steps_lines(match: dict, until: int) -> list[str]:
    seen, later = match["seen"], " ".join(map(str, match["later_steps"][:_SHOWN_STEPS]))
    lines = [f"read later than step {until}: at steps {later}"] if later else []
    if not seen:
        return lines or ["its rows are never read in this run"]
    parts = []
    for e in seen[:_SHOWN_STEPS]:
        fim = "" if not e["fim"] else ", FIM" if e["verbatim"] else ", FIM, not in one piece"
        parts.append(f"{e['step']} ({e['stage']}, epoch {e['epoch']}{fim})")
    more = f" and {len(seen) - _SHOWN_STEPS} more" if len(seen) > _SHOWN_STEPS else ""
    return [f"seen at steps {', '.join(parts)}{more}", *lines]


def _loss_lines(loss: dict | None) -> list[str]:
    if loss is None:
        return []
    parts = []
    for name in ("before", "after"):
        at = loss[name]
        if at is None:
            when = "before it was first seen" if name == "before" else "since it was first seen"
            parts.append(f"no checkpoint from {when} (step {loss['first_step']})")
        else:
            held_out = "" if at["held_out"] is None else f" (held-out rows {at['held_out']:.3f})"
            parts.append(f"{at['nats']:.3f} at step {at['step']}{held_out}")
    return [f"loss of {loss['tokens']} of its tokens, nats: {', then '.join(parts)}"]

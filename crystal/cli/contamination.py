"""`crystal data contamination`: evaluation items in a run's training text. Imports when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crystal.cli import completion
from crystal.cli.options import Json, console, print_result
from crystal.output.printable import printable_line

_WORST = 10  # items that are shown
_WIDTH = 100  # characters of an excerpt


def contamination(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="a run directory, or a run file", autocompletion=completion.runs)
    ],
    suite: Annotated[str, typer.Option(metavar="NAME", help="the suite whose items are looked for")],
    items: Annotated[
        Path | None, typer.Option(metavar="DIR", help="your own items: TASK.jsonl files, which come first")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=8, metavar="N", help="words in a row that make an item found")] = 13,
    as_json: Json = False,
) -> None:
    """Find evaluation items in a run's training text: documents, steps, and scores without them.

    Exact: 13 words in a row are in a training document. Near: most of its words are, in one passage. Words in a row
    that more than 10 documents or items have are ignored. All of it is written to RUN/evals/contamination-SUITE.json.

    Examples:
        crystal data contamination runs/demo --suite code
        crystal data contamination demo --suite quick --items my-items --json
    """
    from crystal.evaluation.contamination import contamination as look
    from crystal.evaluation.contamination import opened
    from crystal.evaluation.items import Items
    from crystal.evaluation.suites import tasks_of

    file, directory = opened(run)
    result = look(tasks_of(suite, Items(items, console())), file, directory, suite, n, console())
    print_result(result, as_json, contamination_text(result))


def contamination_text(result: dict) -> str:
    """A table of the tasks, the items with most in common, scores with and without them."""
    width = max(len("task"), *(len(name) for name in result["tasks"]))
    head = f"{'task':{width}} {'items':>7} {'exact':>6} {'near':>6} {'too short':>10} {'too common':>11} {'clean':>7}"
    lines = [head]
    for name, task in result["tasks"].items():
        share = f"{task['clean'] / task['items']:.1%}" if task["items"] else "-"
        lines.append(
            f"{name:{width}} {task['items']:>7,} {task['exact']:>6,} {task['near']:>6,} {task['too_short']:>10,} "
            f"{task['too_common']:>11,} {share:>7}"
        )
    documents, ignored = result["documents"], sum(task["ignored_ngrams"] for task in result["tasks"].values())
    lines.append(
        f"{documents['train']:,} training documents; {ignored:,} common {result['method']['n']}-grams ignored; "
        f"trained to step {result['trained_to']:,}"
        + ("" if result["trained_to"] else ": not trained yet, so documents and no steps")
    )
    held_out = sum(sum(task["held_out"].values()) for task in result["tasks"].values())
    if held_out:
        lines.append(f"{held_out:,} in held-out documents, which nothing was trained on")
    lines += _worst(result) + _scores(result["scores"])
    lines.append(f"written: {result['file']}" if result["file"] else "not written: the run has no directory yet")
    return "\n".join(lines)


def _worst(result: dict) -> list[str]:
    found = [(name, item) for name, items in result["items"].items() for item in items if "documents" in item]
    found.sort(key=lambda pair: (pair[1]["kind"] != "exact", -pair[1]["coverage"], -pair[1]["longest"]))
    lines = [""] if found else []
    for name, item in found[:_WORST]:
        document, more = item["documents"][0], item["document_count"] - 1
        run = f", {item['longest']} words in a row" if item["longest"] else ""
        where = f"{document['source']} {document['document']}" + (f" and {more} more" if more else "")
        step = f"step {item['first_step']:,}" if item["first_step"] else "not seen yet"
        task = "" if item["id"].startswith(name) else f"{name} "
        what = f"{task}{item['id']}: {item['kind']}, {item['coverage']:.0%}{run}"
        lines.append(printable_line(f"{what}; {where}, {step}"))
        text = item["excerpt"]
        lines.append(printable_line("    " + (text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…")))
    if len(found) > _WORST:
        lines.append(f"… and {len(found) - _WORST:,} more")
    return lines


def _scores(scores: list[dict]) -> list[str]:
    """The first metric of every task of which an item that was asked is found."""
    rows = []
    for entry in scores:
        for name, task in entry["tasks"].items():
            if not task["n"]["found"]:
                continue
            for metric, groups in [*task["metrics"].items()][:1]:
                cells = [_score(groups[group], task["n"][group]) for group in ("all", "clean", "found", "seen")]
                rows.append([f"{entry['step']:,}", name, metric, *cells])
    if not rows:
        return ["", "no item that a checkpoint was asked is found: its scores stand"] if scores else []
    table = [["step", "task", "metric", "all", "clean", "found", "seen by then"], *rows]
    widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
    shown = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
    return ["", *map(printable_line, shown)]


def _score(metric: dict | None, n: int) -> str:
    if metric is None or metric["value"] is None:
        return f"- (n {n:,})"
    error = "" if metric["stderr"] is None else f" ± {metric['stderr']:.4f}"
    return f"{metric['value']:.4f}{error} (n {n:,})"

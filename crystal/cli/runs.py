"""`crystal runs` and `crystal compare`: the runs there are, and several beside one another. Imports when it runs."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crystal.cli import completion
from crystal.cli.options import Json, print_result
from crystal.output.printable import printable_line

if TYPE_CHECKING:
    from crystal.workspace.runs import RunState


def runs(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="where to look for run directories")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List runs: state, step, losses, speed, time left, disk, last sign of life and backend.

    A run is training, finished, stopped (at --until or the end of a --stage), interrupted (a signal, state saved),
    failed (it ended without a word) or not started. VAL is the mean over the sources.

    Examples:
        crystal runs
        crystal runs /data/runs --json
    """
    from crystal.workspace.runs import as_dict, find_runs

    # the directory of a first run does not exist before it
    found = [] if directory == Path("runs") and not directory.exists() else find_runs(directory)
    print_result(as_dict(found), as_json, runs_text(found, directory))


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="two run directories or run files, or more", autocompletion=completion.runs),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="draw the curves over one another: .png, .svg or .pdf")
    ] = None,
    source: Annotated[
        str | None, typer.Option(metavar="NAME", help="validation loss of this source only; default: of each")
    ] = None,
    as_json: Json = False,
) -> None:
    """Losses of several runs side by side, by tokens seen, and the config keys that differ.

    Examples:
        crystal compare runs/demo runs/demo-fp32
        crystal compare runs/a runs/b runs/c --out curves.svg --source python
    """
    from crystal.workspace.compare import compare as compare_runs

    result = compare_runs(runs, out, source)
    print_result(result, as_json, compare_text(result))


def runs_text(runs: list[RunState], directory: Path) -> str:
    """A table that fits the window: columns go from the right where it is narrow, long names stand above their row."""
    if not runs:
        return f"no runs in {directory}"
    columns = [
        ("RUN", [printable_line(str(run.path)) for run in runs]),
        ("STATE", [run.state for run in runs]),
        ("STEP", [_steps(run) for run in runs]),
        ("LOSS", [_loss(run.loss) for run in runs]),
        ("VAL", [_loss(run.mean_val_loss) for run in runs]),
        ("TOK/S", [short(run.tokens_per_second) for run in runs]),
        ("LEFT", [duration(run.seconds_left) for run in runs]),
        ("DISK", [short(run.disk_bytes) for run in runs]),
        ("AGO", [duration(run.last_activity and max(time.time() - run.last_activity, 0), 1) for run in runs]),
        ("BACKEND", [printable_line(" ".join(str(w) for w in (run.backend, run.dtype) if w)) or "-" for run in runs]),
    ]
    width = shutil.get_terminal_size().columns
    widths = [max(len(cell) for cell in (head, *cells)) for head, cells in columns]
    while len(widths) > 4 and len("RUN") + sum(widths[1:]) + len(widths) - 1 > width:
        widths.pop()
    name_width = min(widths[0], max(width - sum(widths[1:]) - len(widths) + 1, len("RUN")))
    lines = []
    for name, *cells in zip(*([head, *cells] for head, cells in columns[: len(widths)]), strict=True):
        if len(name) > name_width:
            lines.append(name)
            name = ""
        cells = [cell.rjust(w) for cell, w in zip(cells, widths[1:], strict=True)]
        cells[0] = cells[0].strip().ljust(widths[1])
        lines.append(" ".join([name.ljust(name_width), *cells]).rstrip())
    return "\n".join(lines)


def _steps(run: RunState) -> str:
    return f"{short(run.step)}/{'?' if run.steps is None else short(run.steps)}"


def _loss(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 100 else f"{value:.3g}"


def short(value: float | None) -> str:
    """A count in at most five characters: 999, 79721, 321k, 1.25M."""
    if value is None:
        return "-"
    if value < 100_000:
        return f"{value:.0f}"
    power = min(int(math.log10(value) / 3 + 1e-9), 5)
    scaled = value / 1000**power
    if round(scaled) >= 1000 and power < 5:
        power, scaled = power + 1, scaled / 1000
    digits = 2 if scaled < 10 else 1 if scaled < 100 else 0
    return f"{scaled:.{digits}f}{' kMGTP'[power]}"


def duration(seconds: float | None, parts: int = 2) -> str:
    """A time in at most five characters, `2h05m`; parts 1: `2h`."""
    if seconds is None:
        return "-"
    units = (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1))
    for unit, size, smaller, small_size in units:
        if seconds >= size:
            whole, rest = divmod(int(seconds), size)
            return f"{whole}{unit}" + (f"{rest // small_size:02d}{smaller}" if parts > 1 and whole < 100 else "")
    return f"{seconds:.0f}s"


def compare_text(result: dict) -> str:
    """Runs are called A, B, C … in the tables, so that these stay narrow."""
    runs = result["runs"]
    letters = {run["label"]: _letter(i) for i, run in enumerate(runs)}
    name_width = max(len(printable_line(label)) for label in letters)
    lines = []
    for run in runs:
        if run["step"] is None:
            seen = "no steps recorded"
        else:
            seen = f"step {run['step']:,}, {short(run['tokens'])} tokens, loss {run['loss']:.4f}"
        if not run["config_read"]:
            seen += ", config.yaml cannot be read"
        lines.append(f"{letters[run['label']]}  {printable_line(run['label']):{name_width}}  {seen}")
    if result["at"]:
        rows = [
            [short(row["tokens"]), _same(row["step"]), *(_cell(row["loss"].get(label)) for label in letters)]
            for row in result["at"]
        ]
        lines += ["", "training loss, mean since the row above", *_table(["TOKENS", "STEP", *letters.values()], rows)]
    final = result["validation"][-1]["val_loss"] if result["validation"] else {r["label"]: r["val_loss"] for r in runs}
    rows = [
        [printable_line(source), *(_cell(final.get(label, {}).get(source)) for label in letters)]
        for source in result["sources"]
    ]
    if rows:
        common = result["validation"]
        where = f"at {short(common[-1]['tokens'])} tokens" if common else "each run's last, at different tokens"
        lines += ["", f"validation loss, {where}", *_table(["SOURCE", *letters.values()], rows, 1)]
    lines += ["", "keys that differ:" if result["differs"] else "no key differs"]
    for key, values in result["differs"].items():
        each = [f"{letters[run['label']]} {_value(values, run['label'])}" for run in runs if run["config_read"]]
        line = f"  {key}: {', '.join(each)}"
        lines += [line] if len(line) < 80 else [f"  {key}:", *(f"    {value}" for value in each)]
    if result["out"]:
        lines.append(f"written: {result['out']}")
    return "\n".join(lines)


def _letter(i: int) -> str:
    return chr(ord("A") + i) if i < 26 else f"R{i + 1}"


def _same(steps: dict[str, int]) -> str:
    """The step where it is one for all runs."""
    return str(next(iter(steps.values()))) if len(set(steps.values())) == 1 else "-"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _value(values: dict, label: str) -> str:
    return "not there" if label not in values else printable_line(str(values[label]))


def _table(head: list[str], rows: list[list[str]], left: int = 0) -> list[str]:
    """Columns as wide as they need; the first `left` are flush left."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = []
    for row in (head, *rows):
        cells = [
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines

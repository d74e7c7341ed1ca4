"""`crystal data …`: the token store and the ledger of a run. Imports when it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from crystal.cli.contamination import contamination
from crystal.cli.help import Commands
from crystal.cli.options import Json, Overrides, Run, Step, console, print_result
from crystal.cli.trace import index, trace
from crystal.errors import DataError
from crystal.output.printable import printable, printable_line

if TYPE_CHECKING:
    from crystal.run import RunFile

data = Commands(
    help="""The token store and the ledger of a run.

Examples:
    crystal data stats demo
    crystal data where demo --step 12
"""
)
data.command()(contamination)
data.command()(index)
data.command()(trace)


@data.command()
def verify(run: Run, overrides: Overrides = None, as_json: Json = False) -> None:
    """Compare all that a run's data is kept in with its checksums: token store, extracted corpora, index.

    What was found right before is read again. Nothing is repaired; a store that is not there is made.

    Examples:
        crystal data verify demo
        crystal data verify mine.yaml --json
    """
    from crystal.run import load_run

    loaded = load_run(run, [*(overrides or ()), "data.verify=never"])
    found: dict = {}
    try:
        _verify(loaded, found)
    except DataError as mismatch:
        where = {"store": found["store"]} if "store" in found else {}
        print_result({"verdict": "FAIL", **where, "message": str(mismatch)}, as_json, f"FAIL {mismatch}")
        raise typer.Exit(1) from None
    more = "".join(f", {len(found[key])} of {what}" for key, what in _BESIDE.items() if found[key])
    text = f"PASS {found['store']}: {len(found['files'])} files verified{more}"
    print_result({"verdict": "PASS", **found}, as_json, text)


_BESIDE = {"corpora": "the extracted corpus", "index": "the index"}


def _verify(run: RunFile, found: dict) -> None:
    """Verify a run's data; `found` takes the store and the files as they are done. Raises DataError."""
    from crystal.analysis.index import verify_index
    from crystal.data.corpus.build import verify as verify_corpus
    from crystal.data.store import TokenStore
    from crystal.files import cache_dir
    from crystal.run import corpus_of, prepare_run

    directory = prepare_run(run, console(), repair=False)
    found["store"] = str(directory)
    store = TokenStore.open(directory)
    if not directory.name.endswith(f"-{store.manifest['fingerprint'][:16]}"):
        message = f"fingerprint: expected the one that {directory.name} ends with, got {store.manifest['fingerprint']}"
        raise DataError(f"{directory / 'manifest.json'}: {message}", file=directory / "manifest.json")
    found["files"] = store.verify(console())
    store.check_frames()
    found["corpora"] = verify_corpus(corpus_of(run), store.sources, cache_dir(), console())
    found["index"] = verify_index(store)


@data.command()
def stats(run: Run, overrides: Overrides = None, as_json: Json = False) -> None:
    """Documents, tokens and rows of every source, and how many epochs the run makes of each.

    Examples:
        crystal data stats demo
        crystal data stats demo curriculum.scale=0.005
    """
    result = _ledger(run, overrides).stats()
    print_result(result, as_json, stats_text(result))


@data.command()
def show(
    run: Run,
    step: Step,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, metavar="N", help="how many rows to show")] = 2,
    as_json: Json = False,
) -> None:
    """Rows of a step as text, just as the model gets them.

    Examples:
        crystal data show demo --step 20
        crystal data show demo --step 300 --rows 5
    """
    result = _ledger(run, overrides).show(step, rows)
    print_result(result, as_json, show_text(result))


@data.command()
def where(run: Run, step: Step, overrides: Overrides = None, as_json: Json = False) -> None:
    """Which documents went into a step.

    Examples:
        crystal data where demo --step 12
        crystal data where demo --step 12 --json
    """
    result = _ledger(run, overrides).where(step)
    print_result(result, as_json, where_text(result))


@data.command()
def when(
    run: Run,
    doc: Annotated[str, typer.Option(metavar="ID", help="a document's id, as `data where` prints it")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """At which steps a document is seen.

    Examples:
        crystal data when demo --doc 43ab64e19f7c0d52
        crystal data when demo --doc 43ab64e19f7c0d52 --json
    """
    result = _ledger(run, overrides).when(doc)
    steps = " ".join(map(str, result["steps"])) or "never"
    sources = ", ".join(found["source"] for found in result.get("occurrences", [result]))
    print_result(result, as_json, f"{result['document']} ({sources}): steps {steps}")


def _ledger(run: str, overrides: list[str] | None):
    from crystal.run import load_run
    from crystal.training.ledger import Ledger

    return Ledger(load_run(run, overrides or ()), console())


def stats_text(result: dict) -> str:
    head = f"{'source':14} {'documents':>10} {'tokens':>14} {'rows':>10} {'held out':>9} {'B/token':>8} {'epochs':>8}"
    lines = [head]
    for name, s in result["sources"].items():
        lines.append(
            f"{name:14} {s['documents']:>10,} {s['tokens']:>14,} {s['train_rows']:>10,} {s['val_rows']:>9,} "
            f"{s['text_bytes'] / max(s['tokens'], 1):>8.2f} {s['epochs']:>8.3f}"
        )
    return "\n".join([*lines, result["store"]])


def where_text(result: dict) -> str:
    lines = []
    for r in result["rows"]:
        mark = "FIM" if r["fim"] else "   "
        line = f"row {r['row']:>4} {r['source']:12} epoch {r['epoch']} {mark} {r['document']} {r['path']}"
        lines.append(printable_line(line))
    return "\n".join(lines)


def show_text(result: dict) -> str:
    heads = [printable_line(f"--- row {r['row']}, {r['source']}, epoch {r['epoch']}") for r in result["rows"]]
    return "\n".join(f"{head}\n{printable(r['text'])}" for head, r in zip(heads, result["rows"], strict=True))

"""The `crystal` command. Exit 0: fine, 1: a verdict failed, 2: a usage or config error, 130: interrupted, saved.

Every command imports what it needs when it runs, so that `crystal --help` and a mistyped flag cost nothing. With
`--json` a command prints one JSON object on stdout and nothing else there; progress and notes go to stderr.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # before all other imports: Ctrl-C counts during them
    from crystal.__main__ import main as command

    sys.exit(command())

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from crystal import __version__, interrupts
from crystal.bench import bench
from crystal.cerebras import cerebras
from crystal.config import ConfigError
from crystal.exchange import export, import_
from crystal.options import Json, Overrides, Run, Step, is_first
from crystal.options import console as _console
from crystal.options import print_result as _print
from crystal.printable import printable_line

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

data = typer.Typer(no_args_is_help=True, help="The token store and the ledger of a run.")
app.add_typer(data, name="data")

app.add_typer(bench, name="bench")
app.add_typer(cerebras, name="cerebras")


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit 2; Ctrl-C or SIGTERM is one line and exit 130."""
    # A thread that waits looks up a thousand times, some 20 us, before it sleeps. Asleep at once, it costs an idle
    # machine half of its speed where steps are short; awake for good, the default, it costs a busy one up to three
    # quarters (docs/log.md, 2026-11-26). OpenMP reads this when torch is first imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for stream in (sys.stdout, sys.stderr):  # a name that has no bytes in the terminal's encoding is shown escaped
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        # a number where typer stopped early
        code = interrupts.obeyed(lambda: app(prog_name="crystal", standalone_mode=False))
    except ConfigError as error:
        _complain(str(error))
        sys.exit(2)
    except ValueError as error:  # CRYSTAL_KERNELS is read where kernels are first imported
        if not str(error).startswith("CRYSTAL_KERNELS="):
            raise
        _complain(str(error))
        sys.exit(2)
    except typer.Abort:
        code = interrupts.CODE
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a bare `crystal`
            print(error, file=sys.stderr)
        elif hasattr(error, "format_message"):  # a usage error of typer's
            command = error.ctx.command_path if error.ctx else "crystal"
            message = f"{' '.join(error.format_message().split())} (see {command} --help)"
            print(f"crystal: {printable_line(message)}", file=sys.stderr)
        else:
            raise
        sys.exit(2)
    if code == interrupts.CODE and is_first():  # outside training, which has its own end
        print(interrupts.line(), file=sys.stderr)
    sys.exit(code or 0)


def _complain(message: str) -> None:
    """Of several processes the first speaks; once they train, any, for then the mistake may be its own."""
    message = printable_line(message)
    distributed = sys.modules.get("torch.distributed")
    if is_first():
        print(f"crystal: {message}", file=sys.stderr)
    elif distributed is not None and distributed.is_initialized():
        print(f"crystal: process {os.environ['RANK']}: {message}", file=sys.stderr)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"crystal {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and stop")
    ] = False,
) -> None:
    """A muP-first model zoo that trains Amber and CrystalCoder from scratch, in the open."""


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="a preset, or a rung such as crystalcoder-w256-l8")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="also the parameter plan, a line a tensor")] = False,
    as_json: Json = False,
) -> None:
    """List the presets, or print one: config, exact parameter count, FLOPs per token, memory per backend."""
    from crystal import describe

    if name is None:
        listing = describe.listing()
        _print(listing, as_json, describe.listing_text(listing))
    else:
        model = describe.model(name, with_plan=plan)
        _print(model, as_json, describe.model_text(model))


@app.command()
def prepare(run: Run, overrides: Overrides = None, as_json: Json = False) -> None:
    """Corpus → tokenizer → token store, for the sources that the run's curriculum names."""
    from crystal.data.store import TokenStore
    from crystal.run import load_run, prepare_run

    directory = prepare_run(load_run(run, overrides or ()), _console())
    store = TokenStore.open(directory)
    keys = ("documents", "tokens", "train_rows", "val_rows")
    sources = {name: {key: s[key] for key in keys} for name, s in store.manifest["sources"].items()}
    lines = [f"{n:12} {s['documents']:>9,} documents {s['tokens']:>12,} tokens" for n, s in sources.items()]
    _print({"store": str(directory), "sources": sources}, as_json, "\n".join([*lines, f"token store: {directory}"]))


@data.command()
def verify(run: Run, overrides: Overrides = None, as_json: Json = False) -> None:
    """Compare every file of the run's token store with its sha256."""
    store = _ledger(run, overrides).store
    try:
        files = store.verify(_console())
    except ConfigError as mismatch:
        result = {"verdict": "FAIL", "store": str(store.directory), "message": str(mismatch)}
        _print(result, as_json, f"FAIL {mismatch}")
        raise typer.Exit(1) from None
    result = {"verdict": "PASS", "store": str(store.directory), "files": files}
    _print(result, as_json, f"PASS {store.directory}: {len(files)} files verified")


@data.command()
def stats(run: Run, overrides: Overrides = None, as_json: Json = False) -> None:
    """Documents, tokens and rows of every source, and how many epochs the run makes of each."""
    from crystal.ledger import stats_text

    result = _ledger(run, overrides).stats()
    _print(result, as_json, stats_text(result))


@data.command()
def show(
    run: Run,
    step: Step,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="how many")] = 2,
    as_json: Json = False,
) -> None:
    """Rows of a step as text, just as the model gets them."""
    from crystal.ledger import show_text

    result = _ledger(run, overrides).show(step, rows)
    _print(result, as_json, show_text(result))


@data.command()
def where(run: Run, step: Step, overrides: Overrides = None, as_json: Json = False) -> None:
    """Which documents went into a step."""
    from crystal.ledger import where_text

    result = _ledger(run, overrides).where(step)
    _print(result, as_json, where_text(result))


@data.command()
def when(
    run: Run,
    doc: Annotated[str, typer.Option(help="a document's id, as `data where` prints it")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """At which steps a document is seen."""
    result = _ledger(run, overrides).when(doc)
    steps = " ".join(map(str, result["steps"])) or "never"
    _print(result, as_json, f"{result['document']} ({result['source']}): steps {steps}")


def _ledger(run: str, overrides: list[str] | None):
    from crystal.ledger import Ledger
    from crystal.run import load_run

    return Ledger(load_run(run, overrides or ()), _console())


@app.command()
def train(
    run: Run,
    overrides: Overrides = None,
    stage: Annotated[int | None, typer.Option(help="train this stage only (from 1)")] = None,
    until: Annotated[int | None, typer.Option(help="stop after this step, counted over all stages")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print stages, steps, LR, memory; no data needed")] = False,
    as_json: Json = False,
) -> None:
    """Run a curriculum, or continue it from its last checkpoint. Ctrl-C saves and exits with 130."""
    from crystal import describe
    from crystal.run import load_run
    from crystal.training.start import check_until, start

    loaded = load_run(run, overrides or ())
    check_until(loaded, until)
    if dry_run:
        plan = describe.dry_run(loaded)
        _print(plan, as_json, describe.dry_run_text(plan))
        return
    outcome = start(loaded, stage, until, _console())
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
    _print(result, as_json, text)
    if outcome.interrupted:
        sys.exit(130)


@app.command()
def schedule(
    run: Run,
    overrides: Overrides = None,
    stage: Annotated[int, typer.Option(help="stage, from 1")] = 1,
    at: Annotated[str | None, typer.Option(help="steps inside the stage, 1,86,1500")] = None,
    plot: Annotated[Path | None, typer.Option(help="write a plot of the whole curriculum here (PNG)")] = None,
    as_json: Json = False,
) -> None:
    """Base LR and each optimizer group's LR at given steps of a stage."""
    from crystal import describe
    from crystal.run import load_run

    result = describe.schedule(load_run(run, overrides or ()), stage, at, plot)
    _print(result, as_json, describe.schedule_text(result))


@app.command()
def plan(
    run: Run,
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option(min=1, metavar="N", help="how many")] = 8,
    device: Annotated[
        str, typer.Option(metavar="NAME|FILE.yaml", help="of configs/devices/, or your own")
    ] = "a100-80gb",
    changes: Annotated[
        list[str] | None, typer.Option("--with", metavar="KEY=VALUE", help="changes to the device: devices_per_node=4")
    ] = None,
    tokens_per_second: Annotated[float | None, typer.Option(help="a rate that was measured, of all devices")] = None,
    mfu: Annotated[float | None, typer.Option(help="the same as a share of peak, 6 N FLOPs a token")] = None,
    top: Annotated[int, typer.Option(min=1, metavar="K", help="how many layouts to print")] = 10,
    as_json: Json = False,
) -> None:
    """Parallel layouts of a run on N devices: memory, traffic, FLOPs, MFU and days of each, best first."""
    from crystal.plan_command import plan_run, plan_text
    from crystal.run import load_run

    loaded = load_run(run, overrides or ())
    result = plan_run(loaded, devices, device, changes or (), tokens_per_second, mfu, top)
    _print(result, as_json, plan_text(result))


Parametrization = Annotated[
    Literal["sp", "mup", "crystalcoder", "completep"] | None, typer.Option(help="instead of the declared one")
]


@app.command()
def audit(
    model: Annotated[str, typer.Argument(metavar="MODEL|RUN.yaml", help="a preset, rung, family or run file")],
    base: Annotated[int | None, typer.Option(min=1, help="base width; default: the config's")] = None,
    parametrization: Parametrization = None,
    as_json: Json = False,
) -> None:
    """Static muP audit on meta tensors: init, LR, decay, eps and multipliers of every tensor against the rules."""
    from crystal.check import audit_dict, audit_model, audit_text

    report, plan = audit_model(model, base, parametrization)
    _print(audit_dict(report, plan), as_json, audit_text(model, report, plan))
    if report.verdict != "PASS":
        raise typer.Exit(1)


@app.command("coord-check")
def coord_check(
    model: Annotated[str, typer.Argument(help="a family (crystalcoder), rung, preset or run file")],
    widths: Annotated[str | None, typer.Option(help="comma-separated, three or more; default 64,128,256")] = None,
    depths: Annotated[str | None, typer.Option(help="one: of the models; several: check over depth")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="default: as many as the verdict needs")] = None,
    steps: Annotated[int, typer.Option(min=2)] = 4,
    parametrization: Parametrization = None,
    lr: Annotated[float | None, typer.Option(help="base LR; default: a sixteenth of the base init sigma")] = None,
    dtype: Annotated[
        Literal["auto", "bf16", "fp32"], typer.Option(help="compute; auto: bf16 from width 512 on")
    ] = "auto",
    data: Annotated[str | None, typer.Option(metavar="RUN.yaml", help="rows of its token store, not random")] = None,
    under: Annotated[
        Literal["compile", "fsdp", "tp"] | None, typer.Option(help="torch.compile, or two gloo processes")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="write JSON, PNG and a page, with SP beside")] = None,
    as_json: Json = False,
) -> None:
    """Coordinate check with a verdict for every tensor and activation, over widths x seeds x steps."""
    from crystal.check_command import run_check

    result, shown = run_check(
        model, widths, depths, seeds, steps, parametrization, lr, dtype, data, under, out, _console()
    )
    _print(result, as_json, shown)
    if result["verdict"] != "PASS":
        raise typer.Exit(1)


@app.command()
def transfer(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP.yaml", help="a sweep file, or the name of a packaged one")],
    overrides: Overrides = None,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="size the sweep; no data needed")] = False,
    workers: Annotated[int, typer.Option(min=1, help="processes, one thread each")] = 2,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="default: sweeps/NAME")] = None,
    as_json: Json = False,
) -> None:
    """Sweep hyperparameters over widths, or go on with it; say whether they transfer; write the target's run file."""
    from crystal import transfer_command

    if plan_only:
        from crystal.sweep import load_sweep

        plan = transfer_command.plan_only(load_sweep(sweep, tuple(overrides or ()), out), workers)
        _print(plan, as_json, transfer_command.plan_text(plan))
        return
    result, shown = transfer_command.transfer(sweep, overrides or [], workers, out, _console())
    _print(result, as_json, shown)
    if result["verdict"] != "PASS":
        raise typer.Exit(1)


app.command("import")(import_)
app.command()(export)


@app.command()
def logits(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="a checkpoint or run directory")],
    ids: Annotated[Path, typer.Option(help="token ids, .npy, integers [batch, seq]")],
    out: Annotated[Path, typer.Option(help="where the logits go, .npy, fp32 [batch, seq, vocab]")],
    as_json: Json = False,
) -> None:
    """Write fp32 logits for given token ids: the fidelity probe."""
    from crystal.logits import logits_file

    shape = logits_file(checkpoint, ids, out)
    _print({"out": str(out), "shape": list(shape)}, as_json, f"{out}: fp32 {list(shape)}")


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="a checkpoint or run directory")],
    prompt: Annotated[str, typer.Option(help="text to continue")] = "",
    stage: Annotated[int | None, typer.Option(help="of a run directory: the end of this stage (from 1)")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Continue a text from a checkpoint, greedily or sampled, with a KV cache."""
    from crystal.generate import generate_text

    result = generate_text(checkpoint, prompt, stage, max_new_tokens, temperature, top_k, top_p, seed, _console())
    _print(result, as_json, prompt + result["text"], raw=not sys.stdout.isatty())

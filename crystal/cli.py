"""The `crystal` command. Exit 0: fine, 1: a verdict failed, 2: a usage or config error, 130: interrupted, saved.

Every command imports what it needs when it runs, so that `crystal --help` and a mistyped flag cost nothing. With
`--json` a command prints one JSON object on stdout and nothing else there; progress and notes go to stderr.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # before all other imports: Ctrl-C counts during them
    from crystal.__main__ import main as command

    sys.exit(command())

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from crystal import __version__, completion
from crystal.bench import bench
from crystal.cerebras import cerebras
from crystal.complaints import complain, usage_message
from crystal.config_command import config
from crystal.data_commands import data
from crystal.errors import ConfigError
from crystal.exchange import export, import_
from crystal.files import cache_dir
from crystal.help import Commands
from crystal.inference_commands import generate, logits
from crystal.init_command import init
from crystal.mup_commands import audit, coord_check, transfer
from crystal.options import Json, Overrides, Run
from crystal.options import console as _console
from crystal.options import print_result as _print
from crystal.output import interrupts
from crystal.output.ranks import is_first
from crystal.runs_commands import compare, runs

app = Commands(cls=completion.Root)
app.add_typer(data, name="data")
app.add_typer(bench, name="bench")
app.add_typer(cerebras, name="cerebras")


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit 2; Ctrl-C or SIGTERM is one line and exit 130."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _spin_count())
    for stream in (sys.stdout, sys.stderr):  # a name that has no bytes in the terminal's encoding is shown escaped
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        # a number where typer stopped early
        code = interrupts.obeyed(lambda: app(prog_name="crystal", standalone_mode=False))
    except ConfigError as error:
        complain(str(error), error.file, error.key)
        sys.exit(2)
    except ValueError as error:  # what the environment says of kernels is read when they are first used
        if not str(error).startswith(("CRYSTAL_KERNELS=", "CRYSTAL_TUNING=")):
            raise
        complain(str(error))
        sys.exit(2)
    except typer.Abort:
        code = interrupts.CODE
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a bare `crystal`
            print(error, file=sys.stderr)
        elif hasattr(error, "format_message"):  # a usage error of typer's
            complain(usage_message(error))
        else:
            raise
        sys.exit(2)
    if code == interrupts.CODE and is_first():  # outside training, which has its own end
        print(interrupts.line(), file=sys.stderr)
    sys.exit(code or 0)


def _spin_count() -> str:
    """How often a thread that waits looks for work before it sleeps: what was measured here, or 1000 before that.

    Asleep at once, it costs an idle machine half of its speed where steps are short; awake for good, the default, it
    costs a busy one up to three quarters (docs/log.md, 2026-11-26). OpenMP reads it when torch is first imported.
    """
    try:
        file = cache_dir() / "tuning" / f"waiting-{os.uname().nodename}.json"
        return str(int(json.loads(file.read_text())["spin_count"]))
    except (OSError, ValueError, KeyError, TypeError):
        return "1000"


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
    """A muP-first model zoo that trains Amber and CrystalCoder from scratch, in the open.

    Examples:
        crystal train demo --dry-run
        crystal coord-check crystalcoder
    """


@app.command()
def models(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="a preset, or a rung such as crystalcoder-w256-l8", autocompletion=completion.models
        ),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="also the parameter plan, a line a tensor")] = False,
    as_json: Json = False,
) -> None:
    """List the presets, or print one: config, exact parameter count, FLOPs per token, memory per backend.

    Examples:
        crystal models crystalcoder-7b
        crystal models crystalcoder-w256-l8 --plan
    """
    from crystal.planning import describe

    if name is None:
        listing = describe.listing()
        _print(listing, as_json, describe.listing_text(listing))
    else:
        model = describe.model(name, with_plan=plan)
        _print(model, as_json, describe.model_text(model))


@app.command()
def doctor(
    measure: Annotated[bool, typer.Option("--measure", help="measure anew; best on an idle machine")] = False,
    directory: Annotated[Path, typer.Option("--dir", metavar="DIR", help="whose disk is timed")] = Path(),
    as_json: Json = False,
) -> None:
    """Say what this machine is, how fast it is, what was chosen from that, and what is slow and why.

    Examples:
        crystal doctor
        crystal doctor --measure --json
    """
    from crystal.doctor import doctor_text, examine

    result = examine(measure, directory)
    _print(result, as_json, doctor_text(result))


@app.command()
def prepare(run: Run, overrides: Overrides = None, as_json: Json = False) -> None:
    """Corpus → tokenizer → token store, for the sources that the run's curriculum names.

    Examples:
        crystal prepare demo
        crystal prepare mine.yaml data.val_fraction=0.02
    """
    from crystal.data.store import TokenStore
    from crystal.run import load_run, prepare_run

    directory = prepare_run(load_run(run, overrides or ()), _console())
    store = TokenStore.open(directory)
    keys = ("documents", "tokens", "train_rows", "val_rows")
    sources = {name: {key: s[key] for key in keys} for name, s in store.manifest["sources"].items()}
    lines = [f"{n:12} {s['documents']:>9,} documents {s['tokens']:>12,} tokens" for n, s in sources.items()]
    _print({"store": str(directory), "sources": sources}, as_json, "\n".join([*lines, f"token store: {directory}"]))


@app.command()
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
    _print(result, as_json, describe.schedule_text(result))


@app.command()
def plan(
    run: Run,
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option(min=1, metavar="N", help="how many devices")] = 8,
    device: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="a device of configs/devices/, or a YAML file of your own")
    ] = "a100-80gb",
    changes: Annotated[
        list[str] | None, typer.Option("--with", metavar="KEY=VALUE", help="a change to the device: devices_per_node=4")
    ] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(metavar="X", help="a rate that was measured, of all devices")
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(metavar="X", help="the same as a share of peak, 6 N FLOPs a token")
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="how many layouts to print")] = 10,
    as_json: Json = False,
) -> None:
    """Parallel layouts of a run on N devices: memory, traffic, FLOPs, MFU and days of each, best first.

    Examples:
        crystal plan amber-7b --devices 224
        crystal plan demo --device h100-80gb --with devices_per_node=4
    """
    from crystal.planning.report import plan_run, plan_text
    from crystal.run import load_run

    loaded = load_run(run, overrides or ())
    result = plan_run(loaded, devices, device, changes or (), tokens_per_second, mfu, top)
    _print(result, as_json, plan_text(result))


app.command()(init)
app.command()(audit)
app.command("coord-check")(coord_check)
app.command()(transfer)
app.command("import")(import_)
app.command()(export)
app.command()(logits)
app.command()(generate)
app.command()(config)
app.command()(runs)
app.command()(compare)

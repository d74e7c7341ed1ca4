"""The `crystal` command. Exit 0: fine, 1: a verdict failed, 2: a usage or config error, 130: interrupted, saved.

Every command imports what it needs when it runs, so that `crystal --help` and a mistyped flag cost nothing. With
`--json` a command prints one JSON object on stdout and nothing else there; progress and notes go to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

from crystal import __version__
from crystal.cli import completion
from crystal.cli.analyze import analyze
from crystal.cli.audit import audit
from crystal.cli.bench import bench
from crystal.cli.cerebras import cerebras
from crystal.cli.config import config
from crystal.cli.coord_check import coord_check
from crystal.cli.data import data
from crystal.cli.doctor import doctor
from crystal.cli.error_report import complain, of_the_machine, usage_message
from crystal.cli.eval import eval_
from crystal.cli.exchange import export, import_
from crystal.cli.generate import generate, logits
from crystal.cli.help import Commands
from crystal.cli.init import init
from crystal.cli.models import models
from crystal.cli.plan import plan
from crystal.cli.runs import compare, runs
from crystal.cli.train import prepare, schedule, train
from crystal.cli.transfer import transfer
from crystal.errors import CrystalError
from crystal.files import cache_dir
from crystal.output import interrupts, streams
from crystal.output.imported import imported

_usage = sys.modules[typer.BadParameter.__module__]  # typer's exceptions, be they of its own click or of click

app = Commands(cls=completion.Root)
app.add_typer(data, name="data")
app.add_typer(bench, name="bench")
app.add_typer(analyze, name="analyze")
app.add_typer(cerebras, name="cerebras")


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit 2; Ctrl-C or SIGTERM is one line and exit 130."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _spin_count())
    streams.open_all()
    try:
        # a number where typer stopped early
        code = interrupts.obeyed(lambda: app(prog_name="crystal", standalone_mode=False))
    except CrystalError as error:
        complain(str(error), error)
        sys.exit(2)
    except typer.Abort:
        code = interrupts.CODE
    except _usage.NoArgsIsHelpError as error:  # a bare `crystal`
        print(error, file=sys.stderr)
        sys.exit(2)
    except _usage.ClickException as error:
        complain(usage_message(error))
        sys.exit(2)
    except ValueError as error:
        kernels = imported("crystal.kernels.dispatch")  # which imports torch: not to be imported here
        if kernels is None or not isinstance(error, kernels.KernelModeError):
            raise
        complain(str(error))
        sys.exit(2)
    except (OSError, MemoryError, RuntimeError) as error:
        if (told := of_the_machine(error)) is None:
            raise
        told.lasting = False
        complain(str(told), told)
        sys.exit(2)
    if code == interrupts.CODE:  # outside training, which has its own end
        interrupts.tell()
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


for command in (
    models, doctor, prepare, train, schedule, plan, init, audit, coord_check, transfer, import_, export, logits,
    generate, eval_, config, runs, compare,
):  # fmt: skip
    app.command(command.__name__.rstrip("_").replace("_", "-"))(command)

"""`crystal cerebras …`: the environment of Cerebras' software, and a training step lowered to its IR."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crystal.cli.help import Commands
from crystal.cli.options import Json, Overrides, Run, console, print_result
from crystal.errors import ConfigError

cerebras = Commands(
    help="""Cerebras' software: its environment, and steps lowered to its IR.

Examples:
    crystal cerebras setup
    crystal cerebras lower crystalcoder-7b
"""
)


@cerebras.command()
def setup(
    python: Annotated[
        str | None, typer.Option(metavar="FILE", help="a Python 3.11; default: this one, or python3.11")
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="where to make it; default: in crystal's cache")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make the environment that cerebras-pytorch wants for itself (5.7 GiB); does nothing when it is there.

    Examples:
        crystal cerebras setup
        crystal cerebras setup --python /usr/bin/python3.11 --dir cerebras-env
    """
    from crystal.backends.cerebras import environment

    result = environment.setup(directory, python, console())
    size = f"{result['bytes'] / 2**30:.1f} GiB, {result['seconds']:.0f} s"
    how = f"made, {size}" if result["made"] else f"was there (made in {result['seconds']:.0f} s)"
    print_result(result, as_json, f"cerebras-pytorch {result['version']} in {result['directory']}: {how}")


@cerebras.command()
def lower(
    run: Run,
    overrides: Overrides = None,
    rows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="sequences of the batch; default: the run's batch")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="where the IR goes; default: RUN_DIR/cerebras")
    ] = None,
    as_json: Json = False,
) -> None:
    """Lower a run's whole training step to Cerebras IR, no system needed, and check the IR tensor by tensor.

    Examples:
        crystal cerebras lower crystalcoder-7b
        crystal cerebras lower demo --rows 4 --out ir
    """
    from crystal.backends.cerebras.lower import lower as lower_step
    from crystal.backends.config import CerebrasConfig
    from crystal.curriculum.resolve import resolve
    from crystal.output.progress import Bar
    from crystal.run import load_run

    loaded = load_run(run, overrides or ())
    config = loaded.config
    section = config.backend if isinstance(config.backend, CerebrasConfig) else CerebrasConfig(name="cerebras")
    if section.device == "cpu":  # lowering is for the systems
        section = section.model_copy(update={"device": "csx", "dtype": None})
    curriculum = resolve(config.curriculum, loaded.source)
    with Bar(console(), "tracing and lowering"):
        lowered = lower_step(
            config.model, config.plan(), config.optimizer, curriculum, section,
            rows or curriculum.global_batch_size, out or config.directory / "cerebras",
        )  # fmt: skip
    # a system that was named and cannot be had is an error; with --json it is then the one object
    unrun = section.cluster is not None and lowered.stopped and not lowered.problems
    if not (unrun and as_json):
        print_result(lowered.as_dict(), as_json, _lowered_text(lowered))
    if lowered.problems:
        raise typer.Exit(1)
    if unrun:
        raise ConfigError(f"backend.cluster: {lowered.stopped}; lowered to {lowered.ir}", key="backend.cluster")


def _lowered_text(lowered) -> str:
    products = ", ".join(f"{count} in {dtype}" for dtype, count in lowered.matmuls_by_dtype.items())
    lines = [
        f"{lowered.parameters:,} parameters in {lowered.tensors} tensors, {lowered.rows} x {lowered.seq_len} tokens",
        f"{lowered.operations:,} operations of Cerebras IR; matrix products: {products}",
        f"{lowered.trace_seconds} s to trace and lower, {lowered.seconds} s in all, "
        f"peak {lowered.peak_rss_bytes / 2**30:.2f} GiB",
    ]
    if lowered.problems:
        lines += [f"FAIL {lowered.ir}: {len(lowered.problems)} problems", *lowered.problems[:10]]
    else:
        lines.append(
            f"PASS {lowered.state_tensors} state tensors, each named once, read and written back; every weight's "
            "update depends on the step's learning rate"
        )
    if lowered.stopped:
        lines.append(
            f"no system ({lowered.stopped}); lowered to {lowered.ir}; to run it, configure a system: backend.cluster"
        )
    return "\n".join(lines)

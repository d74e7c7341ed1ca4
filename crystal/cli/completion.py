"""What Tab completes: names of runs, models and sweeps; and `--install-completion` and `--show-completion`.

The functions only list files, so that a Tab costs no more than `crystal --help`. Where they know no word, the shell
completes paths.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

from crystal.cli.help import Group
from crystal.errors import ConfigError

SHELLS = ("bash", "zsh", "fish")
_FLAGS = ("--install-completion", "--show-completion")


def run_files(incomplete: str) -> list[str]:
    """RUN.yaml: names of packaged runs, and YAML files here."""
    return _matching(incomplete, _packaged("runs"), "*.yaml")


def runs(incomplete: str) -> list[str]:
    """RUN: run directories here and in runs/, and what `run_files` gives."""
    found = [path for pattern in ("*", "runs/*") for path in sorted(glob.glob(f"{pattern}/config.yaml"))]
    return _matching(incomplete, [*(os.path.dirname(path) for path in found), *_packaged("runs")], "*.yaml")


def models(incomplete: str) -> list[str]:
    """MODEL: presets, and the first rung of each ladder."""
    names = _packaged("models")
    return _matching(incomplete, [n.removesuffix("-proxy") + "-w64" if n.endswith("-proxy") else n for n in names])


def checked(incomplete: str) -> list[str]:
    """MODEL|RUN.yaml, as the muP checks take it: families, presets and runs."""
    names = [name.removesuffix("-proxy") for name in _packaged("models")]
    return _matching(incomplete, [*names, *_packaged("runs")], "*.yaml")


def sweeps(incomplete: str) -> list[str]:
    """SWEEP.yaml: names of packaged sweeps, and YAML files here."""
    return _matching(incomplete, _packaged("sweeps"), "*.yaml")


def _packaged(kind: str) -> list[str]:
    from crystal.config import CONFIGS

    return sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))


def _matching(incomplete: str, names: list[str], files: str = "") -> list[str]:
    here = sorted(glob.glob(glob.escape(incomplete) + files)) if files else []
    return list(dict.fromkeys(name for name in [*names, *here] if name.startswith(incomplete)))


class Root(Group):
    """The `crystal` command itself, whose completion flags may be followed by a shell's name."""

    def get_params(self, ctx: Any) -> list:
        found = super().get_params(ctx)
        for parameter in found:
            if parameter.opts == [_FLAGS[0]]:
                parameter.help = f"complete words with Tab, in this shell or the one named: {', '.join(SHELLS)}"
            elif parameter.opts == [_FLAGS[1]]:
                parameter.help = "print what --install-completion would install"
        return found

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] in _FLAGS:
            _completion(args[0], args[1:])
            ctx.exit()
        return super().parse_args(ctx, args)


def _completion(flag: str, words: list[str]) -> None:
    """Print or install the completion of the shell named, or of the one that called. Raises ConfigError."""
    from typer._completion_shared import get_completion_script, install

    shell = words[0] if words else _calling_shell()
    if shell not in SHELLS or len(words) > 1:
        found = " ".join(words) or shell or "no shell that is known"
        raise ConfigError(f"{flag}: expected one of {', '.join(SHELLS)}, got {found}")
    if flag == "--show-completion":
        print(get_completion_script(prog_name="crystal", complete_var="_CRYSTAL_COMPLETE", shell=shell))
        return
    try:
        _, path = install(shell=shell, prog_name="crystal", complete_var="_CRYSTAL_COMPLETE")
        if shell == "zsh":  # loaded by the first Tab, it would only define itself, and complete from the second on
            path.write_text(
                path.read_text() + '\n[[ $zsh_eval_context[-1] == loadautofunc ]] && _crystal_completion "$@"\n'
            )
    except OSError as error:
        raise ConfigError(f"{flag}: {error.filename}: {error.strerror}") from None
    print(f"{shell} completion installed in {path}; it works in the next shell that you start")


def _calling_shell() -> str:
    import shellingham

    try:
        return shellingham.detect_shell()[0]
    except shellingham.ShellDetectionFailure:
        return Path(os.environ.get("SHELL", "")).name

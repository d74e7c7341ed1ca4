"""What a user's own code raises, told in one line: what, why, and where in that code."""

from __future__ import annotations

import contextlib
import io
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

import crystal
from crystal.errors import ConfigError, CrystalError
from crystal.mup.observe import said
from crystal.mup.plan import PlanError
from crystal.mup.verdict import CheckError

_OURS, _TORCH = (str(Path(package.__file__).parent) for package in (crystal, torch))
_PATHS = sysconfig.get_paths()
_INSTALLED = tuple({_PATHS[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")})


class _Aside(io.TextIOBase):
    """stderr, whatever it is at the time of writing: a progress bar has it while it draws."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


@contextlib.contextmanager
def running(name: str, what: str = "") -> Iterator[None]:
    """A block that runs code of `name`, a user's MODULE:NAME. What it prints goes to stderr, since stdout is for the
    result; what it raises becomes a ConfigError. what: which part of it runs."""
    try:
        with contextlib.redirect_stdout(_Aside()):
            yield
    except CrystalError:
        raise
    except (CheckError, PlanError) as error:
        cause = error.__cause__  # what the user's code raised, if anything
        place = "" if cause is None or isinstance(cause, CheckError | PlanError) else _place(cause)
        raise ConfigError(f"{name}: {error}{place}") from error
    except (Exception, SystemExit) as error:
        doing = f"{what} raised " if what else ""
        raise ConfigError(f"{name}: {doing}{told(error)}") from error


def told(error: BaseException) -> str:
    """`ValueError: the first line of its message (file:line)`."""
    return said(error) + ("" if isinstance(error, SyntaxError) else _place(error))


def _place(error: BaseException) -> str:
    """Where it was raised: the innermost line of the user's code, be it installed, else of this package's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    for others in ((_OURS, "<", *_INSTALLED), (_OURS, "<", _TORCH, contextlib.__file__), ("<", _TORCH)):
        for frame in reversed(frames):
            if not frame.filename.startswith(others):
                return f" ({_short(frame.filename)}:{frame.lineno})"
    return ""


def _short(path: str) -> str:
    """Relative to here, where that is shorter."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path

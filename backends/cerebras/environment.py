"""The environment that cerebras.pytorch wants for itself: made once, found again, recognised when half made.

cerebras-pytorch 2.10 pins Python 3.11, torch 2.4.0 and numpy 1.25, so it cannot share an interpreter with us. A
virtual environment has absolute paths in it and cannot be built aside and renamed: a marker in it says whether it is
whole, and is written last.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from crystal.config import cache_dir
from crystal.errors import ConfigError, RunError
from crystal.files import write_whole
from crystal.output.interrupts import child
from crystal.output.progress import Bar, note

VERSION = "2.10.0"
MARKER = "crystal-cerebras.json"
NEEDED_BYTES = 10 << 30  # 5.7 GiB stay; the wheels lie beside them until they are unpacked
OURS = ("pydantic", "pyyaml")  # what the model's code imports besides torch


def default_directory() -> Path:
    """In crystal's cache."""
    return cache_dir() / "cerebras" / VERSION


def find(directory: Path | None = None) -> Path:
    """The environment's directory. Raises ConfigError, with what to do, when it is not there or not whole."""
    directory = directory or default_directory()
    marker = _marker(directory)
    if marker is None:
        raise ConfigError(f"{directory}: expected Cerebras' environment, none there; make it: crystal cerebras setup")
    if not marker["whole"]:
        raise RunError(f"{directory}: its set-up was interrupted; run it again: crystal cerebras setup")
    return directory


def process_environment(directory: Path, package: Path) -> dict[str, str]:
    """Variables for a process in it. package: the directory to import `crystal` from, which must hold nothing else:
    a site-packages there would bring our torch along."""
    path = os.pathsep.join((str(directory / "bin"), os.environ.get("PATH", "")))  # torch-cirh-opt is found on PATH
    own = {"PYTHONPATH": str(package), "PYTHONNOUSERSITE": "1", "CRYSTAL_KERNELS": "torch"}
    return _of_no_python() | {"PATH": path} | own


def _of_no_python() -> dict[str, str]:
    """Our environment without what is meant for our own interpreter: PYTHONHOME, for one, would keep another's from
    starting, and PYTHONPATH would have it import our torch."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}


def setup(directory: Path | None, python: str | None, console: Console) -> dict:
    """Make the environment, unless it is there and whole.

    python: a Python 3.11. Returns {directory, version, seconds, bytes, made}, JSON-ready. Raises ConfigError, and
    leaves nothing behind, when Python, disk or package index will not do.
    """
    directory = (directory or default_directory()).absolute()
    marker = _marker(directory)
    if marker and marker["whole"]:
        return marker | {"directory": str(directory), "made": False}
    if marker is None and directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"{directory}: expected an empty or new directory, there is something else in it")
    python = _checked_python(python)
    existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < NEEDED_BYTES:
        raise RunError(f"{existing}: expected {NEEDED_BYTES >> 30} GiB of free disk, there are {free / 2**30:.1f}")
    if marker:
        note(console, f"{directory}: an interrupted set-up is made anew")
        shutil.rmtree(directory)
    began = time.perf_counter()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _mark(directory, whole=False)
        size = _install(directory, python, console)
    except BaseException as error:
        shutil.rmtree(directory, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunError(f"{directory}: cannot be written: {error}") from None
        raise
    found = {"version": VERSION, "seconds": round(time.perf_counter() - began, 1), "bytes": size}
    _mark(directory, whole=True, **found)
    return found | {"directory": str(directory), "made": True}


def _install(directory: Path, python: str, console: Console) -> int:
    """venv, packages, and a look whether they import; returns the bytes on disk."""
    interpreter = str(directory / "bin" / "python")
    packages = [f"cerebras-pytorch=={VERSION}", *(f"{name}=={version(name)}" for name in OURS)]
    with Bar(console, "Cerebras' environment") as bar:
        _run([python, "-m", "venv", str(directory)], "venv")
        with tempfile.TemporaryDirectory(dir=directory) as unpacking:  # on the disk that was looked at
            command = [interpreter, "-m", "pip", "install", "--disable-pip-version-check", *packages]
            said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            with child(command, env=_of_no_python() | {"TMPDIR": unpacking}, **said) as pip:
                last = ""
                for line in pip.stdout:
                    words = line.split()
                    if words and words[0] in ("Collecting", "Downloading", "Installing"):
                        bar.what = f"Cerebras' environment: {' '.join(words[:2])}"
                    if line.startswith("ERROR:"):
                        last = last or line.removeprefix("ERROR:").strip()
                if pip.wait():
                    raise RunError(f"{directory}: pip could not install {packages[0]}: {last or 'see its output'}")
        _run([interpreter, "-c", "import cerebras.pytorch"], "import cerebras.pytorch")
    if not (directory / "bin" / "torch-cirh-opt").exists():
        raise RunError(f"{directory}: expected bin/torch-cirh-opt, cerebras-pytorch {VERSION} did not bring it")
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file() and not file.is_symlink())


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_of_no_python())
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise RunError(f"cerebras setup: {what} failed: {lines[-1]}")


def _checked_python(python: str | None) -> str:
    """A CPython 3.11 on x86-64 Linux, which is what Cerebras' wheels are for."""
    ours = sys.executable if sys.version_info[:2] == (3, 11) else "python3.11"
    command = python or ours
    ask = "import sys, platform; print(platform.python_version(), sys.platform, platform.machine())"
    try:
        said = subprocess.run([command, "-c", ask], capture_output=True, text=True, check=True, env=_of_no_python())
        answer = said.stdout.split()
    except (OSError, subprocess.CalledProcessError):
        raise ConfigError(f"--python {command}: expected a Python 3.11, it does not run") from None
    if not answer[0].startswith("3.11.") or answer[1:] != ["linux", "x86_64"]:
        raise ConfigError(
            f"--python {command}: expected Python 3.11 on x86-64 Linux, as cerebras-pytorch {VERSION} does"
        )
    return command


def _marker(directory: Path) -> dict | None:
    try:
        return json.loads((directory / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _mark(directory: Path, **state) -> None:
    write_whole(directory / MARKER, json.dumps(state))

"""The `crystal` command in this process, or in one of its own, which first imports torch for some seconds."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import torch

from crystal.cli.main import main


def crystal(*words, cwd: Path | str = ".") -> subprocess.CompletedProcess:
    """What the command does here: exit code, and what it prints. Threads and environment are left as they were."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    arguments, threads = ["crystal", *map(str, words)], torch.get_num_threads()
    with (
        contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(cwd),
        patch.object(sys, "argv", arguments), patch.dict(os.environ),
    ):  # fmt: skip
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            torch.set_num_threads(threads)
    return subprocess.CompletedProcess(arguments, code, *(x.buffer.getvalue().decode() for x in (out, err)))


def crystal_process(*words, cwd: Path | str = ".", **environment: str) -> subprocess.CompletedProcess:
    """The same in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "crystal.cli", *map(str, words)], cwd=cwd, capture_output=True, text=True, check=False,
        env=os.environ | environment,
    )  # fmt: skip

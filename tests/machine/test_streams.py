"""Closed streams, readers that have gone, terminals that know ASCII alone: the command does its work all the same."""

import os
import subprocess
import sys

import pytest
from hostile.checkpoints import SAMPLE

CRYSTAL = f"{sys.executable} -m crystal.cli"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", line], cwd=SAMPLE, capture_output=True, check=False, env=os.environ | environment
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_dev_null(closed):
    """Else the next file that is opened gets its number, and what is printed lies in it."""
    look = "import os; from crystal.output import streams; streams.open_all(); print(1); os.write(2, b'x');"
    done = shell(f'{sys.executable} -c "{look} assert os.open(os.devnull, os.O_RDONLY) > 2" {closed}')
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", ["config run/config.yaml >&-", "runs . >&- 2>&-", "config run train.seed | head -c 1"])
def test_a_command_needs_nobody_to_read_it(line):
    done = shell(f"set -o pipefail; {CRYSTAL} {line}")
    assert (done.returncode, done.stderr) == (0, b"")


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0", "LANG": "C"}


def test_a_locale_of_ascii_shows_signs_in_another_form_and_reads_utf8(tmp_path):
    (tmp_path / "ä.yaml").write_text("# ∝ ä\nextends: demo\nname: demo\n", encoding="utf-8")
    done = shell(f"{CRYSTAL} config {tmp_path}/ä.yaml name; {CRYSTAL} config {tmp_path}/missing-ä.yaml", **ASCII)
    assert (done.stdout + done.stderr).isascii()
    assert b"name: demo  # " in done.stdout
    assert b"missing-" in done.stderr
    assert b"Traceback" not in done.stderr

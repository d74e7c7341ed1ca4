"""docs/commands.md: its commands run, and print what it shows."""

import json
import re
import shlex
from pathlib import Path

import pytest
from recorded import record_run

PAGE = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("line", COMMANDS)
def test_its_commands_run(crystal, monkeypatch, tmp_path, line):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    record_run(tmp_path / "runs" / "demo", steps=30)
    record_run(tmp_path / "runs" / "demo-fp32", "backend.dtype=fp32", steps=30)
    words = shlex.split(line.partition(" > ")[0].replace("/data/runs", "runs"))
    code, out, err = crystal(*words[1:])
    assert (code, err) == (0, "")
    assert out
    if "--json" in words or "--schema" in words:
        assert json.loads(out)


def test_what_it_shows_is_what_is_printed(crystal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("extends: runs/demo\nmodel: {d_modle: 64}\n")
    for block in re.findall(r"^```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        command, _, shown = block.partition("\n")
        _, out, err = crystal(*shlex.split(command)[2:])
        for line, printed in zip(shown.splitlines(), (out + err).splitlines(), strict=True):
            before, cut, after = line.partition(" …")
            assert printed.startswith(before)
            assert printed.endswith(after) if cut else printed == line

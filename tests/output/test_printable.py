"""Text on terminals whose encoding lacks something."""

import pytest
from command import crystal_process

from crystal.output.printable import SIGNS, writable


@pytest.mark.parametrize(
    ("text", "encoding", "shown"),
    [
        ("init ∝ 1 … 2 ± 3 → ━", "ascii", "init ~ 1 ~ 2 ~ 3 ~ ~"),
        ("init ∝ 1 … 2 ± 3", "latin-1", "init ~ 1 ~ 2 ± 3"),
        ("résumé→漢.yaml", "ascii", "r\\xe9sum\\xe9~\\u6f22.yaml"),
        ("∝ é", "utf-8", "∝ é"),
        ("∝ é", None, "∝ é"),
        ("\ud800", "utf-8", "\\ud800"),
        ("plain", "ascii", "plain"),
    ],
)
def test_signs_become_a_tilde_and_letters_an_escape(text, encoding, shown):
    assert writable(text, encoding) == shown


def test_only_writing_is_helped():
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("ascii", SIGNS)


C_LOCALE = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # Python's own help is off


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii:strict"}, C_LOCALE], ids=["PYTHONIOENCODING", "C"])
def test_a_command_runs_where_there_is_no_utf_8(environment, tmp_path):
    quick = ("--widths", "64,96,128", "--seeds", "1", "--steps", "2")
    done = crystal_process("coord-check", "amber", *quick, "--out", tmp_path, **environment)
    assert done.returncode == 1, done.stderr
    assert "init ~ width^" in done.stdout
    assert " ~ +" in done.stdout
    assert (done.stdout + done.stderr).isascii()
    assert "∝" in (tmp_path / "coord-check.html").read_text(encoding="utf-8")


def test_help_and_mistakes_are_written_too():
    done = crystal_process("prepare", "--help", PYTHONIOENCODING="ascii")
    assert "Corpus ~ tokenizer ~ token store" in done.stdout
    done = crystal_process("audit", "amb…r∝", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr[:17]) == (2, "crystal: amb~r~: ")

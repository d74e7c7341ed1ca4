"""gcc that is missing, broken or for another machine: operators are torch's and one line says so, in bounded time."""

import time

import pytest

from crystal.kernels import gcc, native

SOURCE = "int answer(void) { return 42; }"
TELLS = '[ "$1" = --version ] && { echo gcc 99; exit 0; }\n'
GARBAGE = TELLS + 'while [ $# -gt 0 ]; do [ "$1" = -o ] && printf garbage > "$2"; shift; done\n'
BROKEN = {
    "exits 1": ("exit 1\n", "expected gcc to tell its version, it ended with 1"),
    "is killed": ("kill -SEGV $$\n", "expected gcc to tell its version, it ended with -11"),
    "no interpreter": (None, "cannot be started: No such file or directory"),
    "fails without a word": (TELLS + "exit 3\n", "ended with 3, without a word"),
    "not UTF-8": (TELLS + r"printf 'error: \377\376\n' >&2; exit 1" + "\n", "error: \ufffd\ufffd"),
    "version not UTF-8": (r"printf '\377\n'; exit 1" + "\n", "expected gcc to tell its version"),
    "makes nothing": (TELLS + "exit 0\n", "expected an object, it made none"),
    "makes garbage": (GARBAGE, "made cannot be loaded"),
}


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """compiler(SCRIPT): the gcc on PATH; None: a script without an interpreter."""
    monkeypatch.setenv("CRYSTAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gcc, "_hung", [])

    def put(script: str | None) -> None:
        (tmp_path / "gcc").write_text("#!/nowhere/sh\n" if script is None else f"#!/bin/sh\n{script}")
        (tmp_path / "gcc").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        gcc.compiler.cache_clear()

    yield put
    gcc.compiler.cache_clear()
    native._say.cache_clear()


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_gcc_is_one_line_and_leaves_nothing_in_the_cache(compiler, capfd, tmp_path, name):
    script, words = BROKEN[name]
    compiler(script)
    for _ in range(2):  # of several files, the first says it
        assert native.load("native.c", {}) == {}
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("crystal: CPU kernels by torch, which is slower: ")
    assert words in line
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("script", ["sleep 100 & wait\n", TELLS + "sleep 100\n"])
def test_a_gcc_that_hangs_is_ended_with_what_it_started_and_is_not_asked_again(compiler, monkeypatch, script):
    monkeypatch.setattr(gcc, "ANSWERS_WITHIN", 0.2)
    monkeypatch.setattr(gcc, "COMPILES_WITHIN", 0.2)
    compiler(script)
    with pytest.raises(RuntimeError, match=r"expected to be done within 0\.2 s, it was ended"):
        gcc.build(SOURCE, "native")
    monkeypatch.setattr(gcc, "COMPILES_WITHIN", 1000)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="it was ended"):
        gcc.build(SOURCE, "native")
    assert time.monotonic() - began < 50

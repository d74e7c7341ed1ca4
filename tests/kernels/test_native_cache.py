"""Compiled C in the cache: whole, on the disk before it has its name, and made again when it is not what it was."""

import os
import subprocess
import sys

import pytest

from crystal.kernels import gcc

SOURCE = "int answer(void) { return 42; }"

if not sys.platform.startswith("linux"):
    pytest.skip("shared objects of Linux", allow_module_level=True)
try:
    gcc.compiler()
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The one object that a first call leaves in a cache of its own."""
    monkeypatch.setenv("CRYSTAL_CACHE", str(tmp_path))
    assert gcc.build(SOURCE, "native").answer() == 42
    (found,) = (tmp_path / "native").glob("*.so")
    return found


@pytest.fixture
def compiled(monkeypatch):
    """What gcc was called for."""
    calls, real = [], gcc._run

    def counted(command, *more):
        calls.append(command)
        return real(command, *more)

    monkeypatch.setattr(gcc, "_run", counted)
    return calls


def test_it_is_compiled_once(kept, compiled, capsys):
    assert gcc.build(SOURCE, "native").answer() == 42
    assert compiled == []
    assert capsys.readouterr().err == ""
    assert kept.with_name(kept.name.partition("-")[0] + ".c").read_text() == SOURCE


@pytest.mark.parametrize("damage", ["cut", "a page", "empty", "bit", "text", "directory"])
def test_a_damaged_object_is_never_loaded_and_made_again(kept, compiled, capsys, damage):
    data = kept.read_bytes()
    kept.unlink()  # another file: this process has the first one mapped
    if damage == "directory":
        kept.mkdir()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        kinds = {"cut": data[:-100], "a page": data[:4096], "empty": b"", "bit": flipped, "text": b"no object"}
        kept.write_bytes(kinds[damage])
    if damage == "directory":
        with pytest.raises(RuntimeError, match="what gcc makes cannot be kept there"):
            gcc.build(SOURCE, "native")
        return
    assert gcc.build(SOURCE, "native").answer() == 42
    assert len(compiled) == 1
    assert capsys.readouterr().err == f"crystal: {kept}: damaged, compiled again\n"
    assert kept.read_bytes() == data
    assert gcc.build(SOURCE, "native").answer() == 42
    assert len(compiled) == 1


def test_what_has_its_digest_but_does_not_load_is_made_again(kept, capsys):
    text = b"no object"
    false = kept.with_name(f"{kept.name.partition('-')[0]}-{gcc._digest(text)}.so")
    kept.unlink()
    false.write_bytes(text)
    assert gcc.build(SOURCE, "native").answer() == 42
    assert "damaged, compiled again" in capsys.readouterr().err
    assert not false.exists()


def test_objects_of_0_1_0_whose_names_say_nothing_of_them_are_not_loaded(kept, compiled):
    name = kept.name.partition("-")[0]
    kept.unlink()
    kept.with_name(f"{name}.so").write_bytes(b"cut")
    assert gcc.build(SOURCE, "native").answer() == 42
    assert len(compiled) == 1


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("CRYSTAL_CACHE", str(tmp_path))
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.readlink(f"/proc/self/fd/{fd}")) or sync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(f"name {b}") or replace(a, b))
    gcc.build(SOURCE, "native")
    (name,) = (n for n, what in enumerate(done) if what.startswith("name ") and what.endswith(".so"))
    assert done[name - 1].endswith(".so")
    assert done[name + 1] == str(tmp_path / "native")


def test_gcc_that_fails_says_why_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CRYSTAL_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"^\S*gcc: .*error: .*nothing") as error:
        gcc.build("int f(void) { return nothing; }", "native")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "native").iterdir())


def test_a_cut_object_does_not_end_the_next_start(kept):
    """As a power cut leaves it: mapped, it would be SIGBUS in the process that calls it."""
    data = kept.read_bytes()
    kept.write_bytes(data[:4096])
    code = f"from crystal.kernels.gcc import build; print(build({SOURCE!r}, 'native').answer())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "42\n")
    assert done.stderr == f"crystal: {kept}: damaged, compiled again\n"

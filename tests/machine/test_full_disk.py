"""A disk that takes no more: one line that names the path, nothing half-written, and the same command goes on later.

A limit on the size of files stands for the full disk, where no test may need to be root: the kernel refuses the write
in the same way, with EFBIG for ENOSPC.
"""

import contextlib
import resource
import shutil
import sys
from pathlib import Path

import pytest
from command import crystal
from hostile.checkpoints import SAMPLE

from crystal.data.cached import made_aside, only_one
from crystal.errors import RunError
from crystal.files import replacing, write_whole


@contextlib.contextmanager
def at_most(size: int):
    """No file of this process grows beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """What is compiled and remembered, for the whole file: the vocabulary too, before the disk is full."""
    there, bed = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("first") / "bed"
    shutil.copytree(SAMPLE, bed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CRYSTAL_CACHE", str(there))
        assert crystal("train", "run.yaml", "--until", "9", cwd=bed).returncode == 0
    return there


@pytest.fixture
def bed(tmp_path, cache, monkeypatch):
    """The run of tests/samples, with its corpus and store, in the current directory."""
    monkeypatch.setenv("CRYSTAL_CACHE", str(cache))
    shutil.copytree(SAMPLE, tmp_path / "bed")
    monkeypatch.chdir(tmp_path / "bed")
    return tmp_path / "bed"


def files(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if not p.name.endswith(".lock")}


COMMANDS = {
    "prepare": ("prepare", "run.yaml", "data.dir=others"),
    "train": ("train", "run.yaml", "run_dir=fresh", "--until", "2"),
    "export hf": ("export", "run", "--out", "out"),
    "export native": ("export", "run", "--to", "native", "--out", "out"),
    "export gguf": ("export", "run", "--to", "gguf", "--out", "out.gguf"),
    "export mdl": ("export", "run", "--to", "mdl", "--out", "out.mdl"),
    "export cerebras-yaml": ("export", "run.yaml", "--to", "cerebras-yaml", "--out", "out"),
    "eval": ("eval", "run", "--suite", "bpb", "--limit", "2"),
    "compare": ("compare", "run", "twin", "--out", "curves.png"),
    "logits": ("logits", "run", "--ids", "ids.npy", "--out", "logits.npy"),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("size", [100, 900])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on_when_there_is_room(bed, name, size):
    import numpy as np

    np.save("ids.npy", np.ones((1, 16), np.int64))
    shutil.copytree("run", "twin")
    before = files(bed)
    with at_most(size):
        done = crystal(*COMMANDS[name])
    if done.returncode == 0:
        pytest.skip(f"all that {name} writes has less than {size} bytes")
    lines = [line for line in done.stderr.splitlines() if line.startswith("crystal: ")]
    assert (done.returncode, len(lines), "Traceback" in done.stderr) == (2, 1, False), done.stderr
    assert "oo large" in lines[0], lines
    places = (str(bed), "fresh", "out", "others", "run", "curves", "logits")
    assert any(place in lines[0] for place in places), lines
    left = {name for name in files(bed) - before if not name.startswith("fresh")}
    assert not any(name.endswith((".gguf", ".mdl", ".npy", ".png", "manifest.json", "config.json")) for name in left)
    again = crystal(*COMMANDS[name])
    assert again.returncode == 0, again.stderr
    assert not [name for name in files(bed) if ".tmp-" in name or ".partial" in name]


def test_a_checkpoint_that_the_disk_does_not_take_is_not_there_and_is_written_by_the_next_start(bed):
    with at_most(12_000):  # records fit, the weights do not
        done = crystal("train", "run.yaml", "run_dir=fresh", "--until", "6")
    assert done.returncode == 2
    assert "fresh/checkpoints/step-0000006: the checkpoint cannot be written" in done.stderr.splitlines()[-1]
    assert not list((bed / "fresh" / "checkpoints").iterdir())
    assert crystal("train", "run.yaml", "run_dir=fresh", "--until", "6").returncode == 0
    assert [p.name for p in (bed / "fresh" / "checkpoints").iterdir()] == ["step-0000006"]


def test_a_library_that_names_no_file_or_number_does_not_hide_the_path(tmp_path):
    """numpy's `tofile`, say: "24 requested and 0 written"."""
    with pytest.raises(OSError, match=r"x\.bin") as raised, replacing(tmp_path / "x.bin"):
        raise OSError("24 requested and 0 written")
    assert raised.value.errno is not None
    with pytest.raises(OSError, match=r"y\.bin"), at_most(10):
        write_whole(tmp_path / "y.bin", bytes(100))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_made_aside_names_itself_and_leaves_nothing(tmp_path):
    with (
        pytest.raises(RunError, match="store: cannot be written: file too large"),
        at_most(10),
        made_aside(tmp_path / "store") as partial,
        (partial / "shard").open("wb") as file,
    ):
        file.write(bytes(100))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", [True, False])
def test_what_is_there_is_read_where_no_lock_can_be_made(tmp_path, there, monkeypatch):
    def refused(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path / ".x.lock"))

    monkeypatch.setattr("crystal.data.cached.locked", refused)
    if there:
        (tmp_path / "x").touch()
    refusal = r"x\.lock: cannot be written: no space left on device"
    expected = contextlib.nullcontext() if there else pytest.raises(RunError, match=refusal)
    with expected, only_one(tmp_path / "x", None):
        pass


def test_progress_that_nobody_can_read_ends_no_command(bed):
    """stderr on a full disk, in a process of its own; stdout there is one line."""
    import subprocess

    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "crystal.cli", "config", "run", "--json"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, done.stderr) == (2, "crystal: stdout: cannot be written: no space left on device\n")
        done = subprocess.run([*words[:4], "run", "train.nothing"], stderr=full, stdout=subprocess.PIPE, check=False)
        assert done.returncode == 2

"""Locks that are links, links to data and checkpoints, few file descriptors."""

import os
import resource
import shutil

import numpy as np
import pytest
from command import crystal
from hostile.checkpoints import SAMPLE

from crystal import checkpoint
from crystal.backends.weight_streaming.lock import LOCK, hold
from crystal.data.cached import made_aside
from crystal.data.pack import Spool
from crystal.errors import CheckpointError, RunError
from crystal.files import RUN_LOCK, is_locked, locked
from crystal.training.guards import alone_in

STEP = "step-0000008"


def put(path, kind, target):
    {"link": lambda: path.symlink_to(target), "dangling": lambda: path.symlink_to(target.with_name("nowhere")),
     "directory": path.mkdir, "pipe": lambda: os.mkfifo(path)}[kind]()  # fmt: skip


@pytest.mark.parametrize("kind", ["link", "dangling", "directory", "pipe"])
def test_a_lock_is_never_somebody_elses_file(tmp_path, kind):
    target, place = tmp_path / "theirs", tmp_path / "run"
    target.write_text("content")
    place.mkdir()
    for name in (RUN_LOCK, LOCK):
        put(place / name, kind, target)
    assert not is_locked(place / RUN_LOCK)
    with pytest.raises(OSError, match="expected a lock file"), locked(place / RUN_LOCK):
        pass
    with pytest.raises(RunError, match=r"run.*cannot be"), alone_in(place):
        pass
    with pytest.raises(RunError, match=r"run.*cannot be"):
        hold(place)
    assert target.read_text() == "content"
    assert sorted(os.listdir(tmp_path)) == ["run", "theirs"], "nothing was made where a link led"


def test_a_lock_keeps_what_is_in_its_file(tmp_path):
    (tmp_path / "lock").write_text("content")
    with locked(tmp_path / "lock"):
        assert is_locked(tmp_path / "lock")
    assert (tmp_path / "lock").read_text() == "content"


@pytest.fixture
def bed(tmp_path, monkeypatch):
    monkeypatch.setenv("CRYSTAL_CACHE", str(tmp_path / "cache"))
    shutil.copytree(SAMPLE, tmp_path / "bed")
    monkeypatch.chdir(tmp_path / "bed")
    return tmp_path / "bed"


def moved(path):
    """The same content elsewhere, and a link in its place; where it is now."""
    there = path.parents[1] / f"elsewhere-{path.name}"
    path.rename(there)
    path.symlink_to(there)
    return there


@pytest.mark.parametrize("name", ["run", f"run/checkpoints/{STEP}", "run/checkpoints", "stores"])
def test_a_run_of_links_is_gone_on_with_and_gives_the_same(bed, name):
    there = moved(bed / name)
    before = sorted(p.name for p in there.iterdir())
    done = crystal("train", "run.yaml", "--until", "9")
    assert done.returncode == 0, done.stderr
    assert (bed / name).is_symlink()
    assert set(before) <= {p.name for p in there.iterdir()}


def test_what_is_taken_away_is_the_link_and_not_what_it_leads_to(bed):
    there = moved(bed / "run" / "checkpoints" / STEP)
    files = sorted(os.listdir(there))
    assert checkpoint.read(bed / "run" / "checkpoints" / STEP).state["step"] == 8
    checkpoint.remove(bed / "run" / "checkpoints" / STEP)
    assert os.listdir(bed / "run" / "checkpoints") == []
    (bed / "run" / "checkpoints" / ".tmp-step-0000009").symlink_to(there)
    checkpoint.sweep(bed / "run" / "checkpoints")
    assert os.listdir(bed / "run" / "checkpoints") == []
    store = moved(bed / "stores" / os.listdir(bed / "stores")[0])
    inside = sorted(os.listdir(store))
    link = next(iter((bed / "stores").iterdir()))
    with made_aside(link) as partial:
        (partial / "new").touch()
    assert (os.listdir(link), link.is_symlink()) == (["new"], False)
    assert (sorted(os.listdir(there)), sorted(os.listdir(store))) == (files, inside)


def test_a_place_for_stores_that_is_a_link_to_nothing_is_named(bed):
    (bed / "others").symlink_to("/nowhere")
    done = crystal("prepare", "run.yaml", "data.dir=others")
    line = "crystal: others: cannot be written: a link to /nowhere, which does not exist"
    assert (done.returncode, done.stderr.splitlines()) == (2, [line])


@pytest.mark.parametrize("name", ["run", f"run/checkpoints/{STEP}"])
def test_a_link_to_nothing_is_named(bed, name):
    shutil.rmtree(moved(bed / name))
    done = crystal("generate", name, "--prompt", "the", "--max-new-tokens", "1")
    assert done.returncode == 2
    assert done.stderr.startswith(f"crystal: {name}: a link to ")
    with pytest.raises(CheckpointError, match="which does not exist"):
        checkpoint.locate(bed / name)


def test_a_store_is_made_with_few_descriptors(tmp_path):
    """`ulimit -n 64`: 128 files are written, none stays open."""
    used = max(map(int, os.listdir("/proc/self/fd")))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(used + 8, hard), hard))
    try:
        spool = Spool(tmp_path / "spool", 1, np.dtype("<u2"))
        for i in range(500):
            spool.add({"id": str(i)}, np.full(3, i, np.uint16))
        assert spool.tokens == 1500
        found = [(int(record["id"]), tokens.tolist()) for record, tokens in spool.shuffled()]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sorted(found) == [(i, [i] * 3) for i in range(500)]
    assert found != sorted(found)

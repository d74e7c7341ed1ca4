"""Durable writes and locks: whole or not at all, and one holder at a time."""

import fcntl
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from crystal.files import from_json, is_locked, locked, regular_bytes, replacing, sha256_of, write_whole


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_the_new_one_or_the_old_one(tmp_path, durable):
    file = tmp_path / "x.json"
    file.write_text("old")
    with replacing(file, durable) as aside:
        aside.write_text("new")
        assert file.read_text() == "old"
        assert aside.suffix == ".json", "some libraries go by it"
    assert file.read_text() == "new"
    with pytest.raises(KeyboardInterrupt):
        _interrupted(file, lambda aside: aside.write_text("ne"), durable)
    assert file.read_text() == "new"
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_directory_is_there_with_all_its_files_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _interrupted(tmp_path / "d", lambda aside: (aside / "deep").mkdir(parents=True))
    assert os.listdir(tmp_path) == []
    with replacing(tmp_path / "d") as aside:
        (aside / "deep").mkdir(parents=True)
        (aside / "deep" / "x").write_text("x")
    assert (tmp_path / "d" / "deep" / "x").read_text() == "x"
    assert os.listdir(tmp_path) == ["d"]


def test_a_pipe_is_written_to_and_not_renamed_over(tmp_path):
    """As root, renaming over /dev/null would take it from everybody."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "hello")
    assert os.read(reader, 10) == b"hello"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_pipe_that_nobody_reads_is_an_error_and_no_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device") as caught:
        write_whole(tmp_path / "pipe", "hello")
    assert caught.value.filename == str(tmp_path / "pipe")


@pytest.mark.parametrize("read", [sha256_of, regular_bytes])
def test_what_has_no_end_is_not_read(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="expected a file"):
            read(path)


def test_zeros_that_lie_on_no_disk_are_not_read(tmp_path):
    (tmp_path / "x").touch()
    os.truncate(tmp_path / "x", 2 << 40)
    with pytest.raises(OSError, match="expected at most"):
        regular_bytes(tmp_path / "x")


def test_what_a_killed_writer_left_is_written_over(tmp_path):
    """Of a store that is killed again and again, leftovers would fill the disk."""
    (tmp_path / ".tmp-x.bin").write_bytes(b"half")
    with replacing(tmp_path / "x.bin") as aside:
        assert not aside.exists()
        aside.write_bytes(b"whole")
    assert os.listdir(tmp_path) == ["x.bin"]


def _interrupted(path, write, durable=True):
    with replacing(path, durable) as aside:
        write(aside)
        raise KeyboardInterrupt


def _hold(path, held, over):
    with locked(path):
        held.set()
        over.wait()


def test_a_lock_has_one_holder_and_goes_with_it(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, over = context.Event(), context.Event()
    path = tmp_path / "lock"
    assert not is_locked(path)
    process = context.Process(target=_hold, args=(path, held, over))
    process.start()
    held.wait(60)
    assert is_locked(path)
    with pytest.raises(BlockingIOError), locked(path, wait=False):
        pass
    process.kill()
    process.join()
    assert not is_locked(path)
    with locked(path, wait=False):
        assert is_locked(path)
    assert not is_locked(path)


def test_who_only_looks_does_not_keep_the_lock_from_anybody(tmp_path):
    path = tmp_path / "lock"
    with locked(path):
        pass
    with path.open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.1, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        with locked(path, wait=False):
            assert is_locked(path)


def test_a_text_that_is_no_json_is_a_value_error_however_deep():
    for text in ("", "[", b"\xff", "[" * 100_000, '{"a":' * 50_000, "nul"):
        with pytest.raises(ValueError):  # noqa: PT011 its words are json's own
            from_json(text)
    assert from_json(b'{"a": [1]}') == {"a": [1]}

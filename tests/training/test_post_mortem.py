"""RUN/logs and RUN/post-mortem.txt: who died, read off records that may be damaged, of other machines, or of before."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from crystal.backends.base import Place
from crystal.errors import RunError
from crystal.training import post_mortem, rank_log

HERE = socket.gethostname()


def put(run, process, end=None, processes=3, host="elsewhere", pid=1, **more):
    logs = run / "logs"
    logs.mkdir(exist_ok=True, parents=True)
    record = {
        "process": process, "processes": processes, "host": host, "pid": pid, "restart": 0, "step": 5,
        "began": "2026-11-30T10:00:00+00:00", "end": end, **more,
    }  # fmt: skip
    (logs / f"rank-{process:05d}.json").write_text(json.dumps(record))


def a_process_that_is_gone() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_survivor_names_those_that_it_knows_of(tmp_path):
    put(tmp_path, 0, "lost", host=HERE, pid=os.getpid())
    put(tmp_path, 1, host=HERE, pid=a_process_that_is_gone())
    put(tmp_path, 2)  # on another machine: at work, for all that is known here
    dead = post_mortem.write(tmp_path)
    assert dead is not None
    assert (dead["process"], dead["how"]) == (1, "without a word")
    page = (tmp_path / "post-mortem.txt").read_text()
    assert "last step recorded: 0; last checkpoint: none; restart 0; 1 of 3 processes died" in page
    assert "SIGKILL, as when memory runs out" in page
    assert "process 0: host " + HERE + ", lost the others" in page
    assert "process 2: host elsewhere, noted no end" in page


def test_an_error_is_the_cause_and_nobody_is_waited_for(tmp_path, monkeypatch):
    put(tmp_path, 0, "lost", host=HERE, pid=os.getpid())
    put(tmp_path, 1, "error", error="ValueError: x")
    put(tmp_path, 2, host=HERE, pid=os.getpid())
    said = "=== start 1\nold\n=== start 2\nTraceback\nValueError: x\n\x1b[31m"
    (tmp_path / "logs" / "rank-00001.log").write_text(said)
    monkeypatch.setattr(post_mortem, "PATIENCE", 1000.0)
    began = time.monotonic()
    dead = post_mortem.write(tmp_path)
    assert time.monotonic() - began < 500
    assert dead["how"] == "ValueError: x"
    page = (tmp_path / "post-mortem.txt").read_text()
    assert "Traceback" in page
    assert "old" not in page  # what an earlier start said
    assert "\x1b" not in page


def test_where_nobody_died_there_is_no_page(tmp_path):
    assert post_mortem.write(tmp_path) is None
    for process, end in enumerate(("done", "stopped", "done")):
        put(tmp_path, process, end)
    assert post_mortem.write(tmp_path, over=True) is None
    assert not (tmp_path / "post-mortem.txt").exists()


def test_the_next_start_tells_what_nobody_could_and_only_once(tmp_path):
    assert post_mortem.of_the_last_start(tmp_path) is None
    for process in range(3):
        put(tmp_path, process)
    put(tmp_path, 7, processes=8, began="2026-11-29T10:00:00+00:00")  # the run had more processes once
    assert post_mortem.of_the_last_start(tmp_path)["process"] == 0
    page = (tmp_path / "post-mortem.txt").read_text()
    assert "3 of 3 processes died" in page
    assert "process 7" not in page
    assert post_mortem.of_the_last_start(tmp_path) is None
    put(tmp_path, 1, began="2099-01-01T00:00:00+00:00")  # a start later than the page
    assert post_mortem.of_the_last_start(tmp_path) is not None


def test_it_stays_one_page_however_many_die(tmp_path):
    for process in range(1000):
        put(tmp_path, process, processes=1000)
    post_mortem.write(tmp_path, over=True)
    page = (tmp_path / "post-mortem.txt").read_text()
    assert "1000 of 1000 processes died" in page
    assert page.count("\n") < 60


WHOLE = {"process": 0, "processes": 2, "host": "a", "pid": 1, "restart": 0, "step": 0, "began": "2026-11-30T10:00:00"}
DAMAGED = [
    b"", b"{", b"[]", b"null", b'{"process": 0}', b"\xff\xfe", b"[" * 5000,
    *(json.dumps(WHOLE | changes).encode() for changes in (
        {"process": "0"}, {"host": 3}, {"began": 7}, {"began": "soon"}, {"end": [1]}, {"end": "error", "error": {}},
    )),
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_record_keeps_no_run_from_starting(tmp_path, content):
    put(tmp_path, 1, "error", processes=2, error="ValueError: x")
    (tmp_path / "logs" / "rank-00000.json").write_bytes(content)
    assert post_mortem.of_the_last_start(tmp_path)["process"] == 1


def logged(run, process=1, fails=None):
    with rank_log.logged(run, Place(process=process, processes=2), lambda: 7):
        print("said on stderr", file=sys.stderr)
        if fails is not None:
            raise fails
    return json.loads((run / "logs" / f"rank-{process:05d}.json").read_text())


def test_a_log_has_what_the_process_said_and_stays_short(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "rank-00001.log"
    log.write_text("x" * (3 << 20))
    assert logged(tmp_path)["end"] == "done"
    assert log.stat().st_size < rank_log.LIMIT
    assert "said on stderr" in log.read_text()
    assert capsys.readouterr().err == "said on stderr\n"  # where it always went
    with rank_log.logged(tmp_path, Place(process=1, processes=2), lambda: 8):
        for _ in range(40):
            print("y" * (1 << 16), file=sys.stderr)
    assert log.stat().st_size < 2 * rank_log.LIMIT
    assert "more was said than is kept" in log.read_text()


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (RunError("x: no"), "mistake"), (ValueError("x"), "error"), (KeyboardInterrupt(), "stopped"),
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer"), "lost"),
    ],
)  # fmt: skip
def test_how_a_process_ended(tmp_path, error, end):
    import torch.distributed  # noqa: F401  what knows of lost processes

    with pytest.raises(type(error)):
        logged(tmp_path, fails=error)
    record = json.loads((tmp_path / "logs" / "rank-00001.json").read_text())
    assert (record["end"], record["step"]) == (end, 7)
    assert (tmp_path / "post-mortem.txt").exists() == (end == "error")


def test_one_process_alone_keeps_none(tmp_path):
    with rank_log.logged(tmp_path, Place(), lambda: 0):
        pass
    assert list(tmp_path.iterdir()) == []


def test_logs_that_cannot_be_written_keep_no_run_from_training(tmp_path):
    (tmp_path / "logs").write_text("a file where the directory should be")
    with rank_log.logged(tmp_path, Place(process=1, processes=2), lambda: 0):
        pass

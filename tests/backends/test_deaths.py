"""What a run of several processes says of itself when one of them dies or finds a mistake: on stderr, in its logs, in
its post-mortem, and to those that torchrun starts after it."""

import contextlib
import json
import signal
import time
from pathlib import Path

import pytest
from runs import long_run
from workers import Workers

STEP = "crystal.backends.cuda.backend.CudaBackend.train_step"
SLOW = (STEP, 0.05)


@pytest.fixture
def path(make_run):
    return long_run(make_run)


def records(workers) -> dict[int, dict]:
    return {r["process"]: r for r in map(json.loads, (p.read_text() for p in workers.run_dir.glob("logs/*.json")))}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_post_mortem_names_the_process_that_was_killed(path, tmp_path, number):
    workers = Workers(path, tmp_path, "backend.parallel.fsdp=2", changes=[SLOW])
    workers.until(lambda: workers.steps() >= 2)
    workers.kill(number, 1)
    for _ in range(40):  # torchrun ends the others when it has noticed
        with contextlib.suppress(ProcessLookupError):
            workers.kill(signal.SIGTERM, 0)
        time.sleep(0.01)
    codes = workers.ended()
    assert codes == [1, -number], workers.said()
    (line,) = [line for line in workers.said().splitlines() if line.startswith("crystal:")]
    assert "another process is lost" in line
    assert "Traceback" not in workers.said()
    assert {n: r["end"] for n, r in records(workers).items()} == {0: "lost", 1: None}
    page = (workers.run_dir / "post-mortem.txt").read_text()
    (dead,) = [line for line in page.splitlines() if line.startswith("process 1: host")]
    assert f"pid {records(workers)[1]['pid']}, ended: " in dead
    last = records(workers)[0]["step"]
    assert f"last step recorded: {last}; last checkpoint: none; restart 0; 1 of 2 processes died" in page
    assert "process 0: host" in page
    if number == signal.SIGSEGV:
        assert dead.endswith("SIGSEGV")
        assert "Fatal Python error: Segmentation fault" in page
        assert "train_step" in page or "workers.py" in page  # where
    else:  # a zombie tells its signal until torchrun, or here the fork server, has asked for it
        assert dead.endswith("SIGKILL") or "without a word" in dead
    # torchrun's next attempt goes on, and the run remembers
    again = Workers(path, tmp_path, "backend.parallel.fsdp=2", "--until", "4", attempt=1, restarts=1)
    assert again.ended() == [0, 0], again.said()
    assert {n: (r["end"], r["restart"]) for n, r in records(again).items()} == {0: ("done", 1), 1: ("done", 1)}
    assert (workers.run_dir / "post-mortem.txt").read_text() == page


def test_a_start_whose_survivors_could_not_tell_is_told_by_the_next(path, tmp_path):
    workers = Workers(path, tmp_path, "backend.parallel.fsdp=2", changes=[SLOW])
    workers.until(lambda: workers.steps() >= 1)
    workers.kill(signal.SIGSTOP)
    workers.kill(signal.SIGKILL)  # the machine's power, say
    assert workers.ended() == [-9, -9]
    assert not (workers.run_dir / "post-mortem.txt").exists()
    again = Workers(path, tmp_path, "backend.parallel.fsdp=2", "--until", "1", attempt=1)
    assert again.ended() == [0, 0], again.said()
    assert "2 of 2 processes died" in (workers.run_dir / "post-mortem.txt").read_text()
    events = map(json.loads, (workers.run_dir / "events.jsonl").read_text().splitlines())
    (death,) = [event for event in events if event["event"] == "death"]
    assert (death["process"], death["restart"]) == (0, 0)
    assert "without a word" in death["how"]


def test_an_error_in_one_process_is_one_line_its_log_and_torchruns_summary(path, tmp_path):
    workers = Workers(path, tmp_path, "backend.parallel.fsdp=2", changes=[(STEP, 1)])
    assert workers.ended() == [1, 1], workers.said()
    said = [line for line in workers.said().splitlines() if line.startswith("crystal:")]
    assert "crystal: process 1: ValueError: broken on purpose" in said
    assert all("another process is lost" in line for line in said if "process 1:" not in line)
    assert "Traceback" not in workers.said()
    log = (workers.run_dir / "logs" / "rank-00001.log").read_text()
    assert "Traceback" in log
    assert "broken on purpose" in log
    page = (workers.run_dir / "post-mortem.txt").read_text()
    assert "ended: ValueError: broken on purpose" in page
    assert "in train_step" in page or "in changed" in page
    summary = json.loads((tmp_path / "attempt_0" / "1" / "error.json").read_text())["message"]
    assert summary["message"] == "ValueError: broken on purpose"
    assert "Traceback" in summary["extraInfo"]["py_callstack"]
    assert not list(tmp_path.glob("attempt_0/*/crystal.json"))  # torchrun may try again


@pytest.mark.parametrize(
    ("words", "changes", "line"),
    [
        (["backend.parallel.fsdp=4", "train.micro_batch_size=2"], [], "expected a layout of the 2 processes"),
        (["backend.parallel.fsdp=2"], [("crystal.training.guards.BadSteps.go_on", False)], "is not finite; try"),
    ],
    ids=["layout", "bad steps"],
)
def test_a_mistake_is_told_once_and_not_tried_again(path, tmp_path, words, changes, line):
    """The first attempt tells; those that torchrun starts after it end alike at once, and the last tells again."""
    said = []
    for attempt in range(3):
        workers = Workers(path, tmp_path, *words, changes=changes, attempt=attempt, restarts=2)
        assert workers.ended() == [2, 2], workers.said()
        said.append([text for text in workers.said().splitlines() if text.startswith("crystal:")])
        assert "Traceback" not in workers.said()
    assert len(said[0]) == 1, said
    assert line in said[0][0]
    assert said[1:] == [[], said[0]]
    last = json.loads(Path(tmp_path, "attempt_2", "0", "error.json").read_text())
    assert last["message"] == said[0][0]  # what torchrun's summary shows

"""A stop, however it comes: all processes end after the same step, with one checkpoint and exit code 130.

A signal that reaches all processes of a job comes to a worker twice or more often: directly, and forwarded by the
torchrun that was sent it as well. Here the workers are forked and sent what they would be sent; the tests of `proof`
send the signals to a real torchrun.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import long_run
from workers import LAYOUT, Workers

from crystal import checkpoint

STEP = "crystal.backends.cuda.backend.CudaBackend.train_step"
SAVE = "crystal.checkpoint.save_file"
INT, TERM, HUP, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
# name: (what is slow, seconds), [(signal, ranks, seconds until the next)]
STOPS = {
    "to all, and forwarded": ((STEP, 0.0), [(TERM, (0, 1), 0.02), (TERM, (0, 1), 0.1), (TERM, (0, 1), 0.0)]),
    "to one, whose end has torchrun end the other": ((STEP, 0.0), [(TERM, (1,), 0.3), (TERM, (0,), 0.0)]),
    "in a long step, again and again": ((STEP, 0.6), [(TERM, (0, 1), 1.1), (TERM, (0, 1), 0.0)]),
    "while it is saved": ((SAVE, 1.3), [(TERM, (0, 1), 1.2), (TERM, (0, 1), 0.0)]),
    "Ctrl-C, told twice": ((STEP, 0.2), [(INT, (0, 1), 0.05), (INT, (0, 1), 0.0)]),
    "Ctrl-C, then a scheduler's TERM": ((SAVE, 1.3), [(INT, (0, 1), 1.2), (TERM, (0, 1), 0.0)]),
    "SLURM's USR1, and the launcher's death": ((STEP, 0.2), [(USR1, (0, 1), 0.02), (HUP, (0, 1), 0.0)]),
}


@pytest.fixture
def path(make_run):
    return long_run(make_run)


# the others are of `make proof`: each costs two processes
OFTEN = ("to all, and forwarded", "while it is saved", "SLURM's USR1, and the launcher's death")


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.proof) for name in STOPS]
)
def test_a_stop_saves_and_ends_with_130(path, tmp_path, name):
    slow, signals = STOPS[name]
    workers = Workers(path, tmp_path, "backend.parallel.fsdp=2", changes=[slow] if slow[1] else ())
    try:
        workers.until(lambda: workers.steps() >= 1)
        for number, ranks, seconds in signals:
            try:
                workers.kill(number, *ranks)
            except ProcessLookupError:
                break  # it has ended
            time.sleep(seconds)
    finally:
        codes = workers.ended()
    assert codes == [130, 130], workers.said()
    last = workers.steps()
    assert checkpoint.steps(workers.run_dir / "checkpoints") == [last]
    said = workers.said()
    first = signals[0][0].name
    assert said.rstrip().endswith(f"{first}: stopped after step {last}, saved; the same command continues"), said
    assert said.count("stopped after step") == 1  # process 0 alone speaks
    assert "Traceback" not in said
    notes = [json.loads(p.read_text()) for p in tmp_path.glob("attempt_0/*/crystal.json")]
    assert notes == [{"line": f"crystal: {first}: stopped after step {last}", "code": 130}] * 2
    records = [json.loads(p.read_text()) for p in workers.run_dir.glob("logs/*.json")]
    assert [(r["step"], r["end"]) for r in records] == [(last, "done")] * 2
    assert not (workers.run_dir / "post-mortem.txt").exists()


def test_a_second_ctrl_c_of_a_person_ends_at_once(path, tmp_path):
    workers = Workers(path, tmp_path, "backend.parallel.fsdp=2", changes=[(STEP, 30.0)])
    workers.until(lambda: (workers.run_dir / "logs" / "rank-00001.json").exists())
    time.sleep(0.5)
    for _ in range(2):
        workers.kill(INT)
        time.sleep(1.1)
    assert workers.ended(20) == [130, 130], workers.said()
    assert workers.said().count("crystal: interrupted") == 1


# --- the same with a real torchrun


@contextlib.contextmanager
def started(path, root, launcher, restarts=0):
    """torchrun of two workers, as a process; what it says goes to root/said."""
    command = [
        sys.executable, "-m", launcher, "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts),
        "--monitor-interval", "0.1", "--shutdown-timeout", "120", "--log-dir", str(root / "logs"),
        "-m", "crystal.cli", "train", str(path), *LAYOUT, "backend.parallel.fsdp=2", f"run_dir={root / 'run'}",
    ]  # fmt: skip
    with (root / "said").open("w") as said:
        torchrun = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        yield torchrun
    finally:
        torchrun.kill()


def until_it_trains(torchrun, root):
    metrics = root / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert torchrun.poll() is None, (root / "said").read_text()
        time.sleep(0.02)


def children(process) -> list[int]:
    return sorted(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


# name: (signal, to torchrun, to which workers, --max-restarts)
REAL = {
    "to torchrun": (TERM, True, (), 0),
    "to torchrun, Ctrl-C": (INT, True, (), 0),
    "to torchrun, whose terminal is closed": (HUP, True, (), 0),
    "to all, as SLURM does": (TERM, True, (0, 1), 0),
    "to one worker, restarts left": (TERM, False, (1,), 2),
    "torchrun killed": (signal.SIGKILL, True, (), 0),
}


@pytest.mark.proof
@pytest.mark.parametrize("launcher", ["torch.distributed.run", "crystal.cli.torchrun"])
@pytest.mark.parametrize("name", REAL)
def test_a_real_torchrun_leaves_a_checkpoint_and_workers_that_ended_with_130(path, tmp_path, name, launcher):
    number, agent, ranks, restarts = REAL[name]
    run_dir, logs = tmp_path / "run", tmp_path / "logs"
    with started(path, tmp_path, launcher, restarts) as torchrun:
        until_it_trains(torchrun, tmp_path)
        workers = children(torchrun)
        for pid in [*([torchrun.pid] if agent else []), *(workers[rank] for rank in ranks)]:
            os.kill(pid, number)
        torchrun.wait(300)
        while any(Path(f"/proc/{pid}").exists() for pid in workers):  # those of a killed torchrun save first
            time.sleep(0.02)
    said = (tmp_path / "said").read_text()
    (last,) = checkpoint.steps(run_dir / "checkpoints")
    assert json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"] == last
    words = "SIGHUP" if number == signal.SIGKILL else number.name
    assert f"{words}: stopped after step {last}, saved; the same command continues" in said, said
    attempts = sorted(path.name for path in logs.glob("*/attempt_*"))
    assert attempts == [f"attempt_{i}" for i in range(restarts + 1)]
    for attempt in attempts:
        codes = [json.loads(p.read_text())["code"] for p in logs.glob(f"*/{attempt}/*/crystal.json")]
        # a worker whose torchrun died leaves no word that keeps its replacement from going on
        assert set(codes) == (set() if words == "SIGHUP" else {130}), said
        # of those that are started to end alike torchrun ends one that is slower to begin than the other
        assert len(codes) in ((0,) if words == "SIGHUP" else (2,) if attempt == attempts[0] else (1, 2)), said
    if number == signal.SIGKILL:
        assert torchrun.returncode == -signal.SIGKILL
    elif launcher == "torch.distributed.run":  # its own code is 1 whatever its workers' were
        assert torchrun.returncode == 1
    else:
        assert torchrun.returncode == 130
        assert said.rstrip().endswith(f"\ncrystal: {words}: stopped after step {last}")
        assert "Traceback" not in said


def hears(process: subprocess.Popen, number: int) -> bool:
    """Whether it has a handler of its own for the signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.proof
@pytest.mark.parametrize("seconds", [None, 0.0, 0.4, 1.0, 2.0, 3.0])
def test_a_stop_before_the_first_step_ends_with_130_and_is_not_tried_again(path, tmp_path, seconds):
    """While torchrun itself starts (None), or so many seconds after it has started workers."""
    with started(path, tmp_path, "crystal.cli.torchrun", restarts=2) as torchrun:
        if seconds is None:
            while not hears(torchrun, TERM):
                time.sleep(0.01)
        else:
            while len(children(torchrun)) < 2:
                time.sleep(0.01)
            time.sleep(seconds)
        torchrun.terminate()
        assert torchrun.wait(150) == 130  # in fact in seconds, though a worker may wait for one that has left already
    said = (tmp_path / "said").read_text()
    assert "Traceback" not in said
    trained = (tmp_path / "run" / "metrics.jsonl").exists()  # on a fast machine
    assert said.rstrip().endswith("crystal: terminated") or trained, said
    assert len(list((tmp_path / "logs").glob("*/attempt_*"))) == (seconds is not None)


@pytest.mark.proof
@pytest.mark.parametrize("signals", [(USR1,), (USR1, TERM), (TERM, INT, TERM)])
def test_our_torchrun_outlives_every_stop_signal_until_its_workers_have_saved(path, tmp_path, signals):
    with started(path, tmp_path, "crystal.cli.torchrun") as torchrun:
        until_it_trains(torchrun, tmp_path)
        all_of_them = [torchrun.pid, *children(torchrun)]
        for number in signals:
            for pid in all_of_them:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(0.05)
        assert torchrun.wait(120) == 130
    (last,) = checkpoint.steps(tmp_path / "run" / "checkpoints")
    said = (tmp_path / "said").read_text()
    assert said.rstrip().endswith(f"\ncrystal: {signals[0].name}: stopped after step {last}")
    assert "Traceback" not in said

"""A stop, however it comes: all processes end after the same step, with one checkpoint and exit code 130.

A signal that reaches all processes of a job comes to a worker twice or more often: directly, and forwarded by the
torchrun that was sent it as well. Here the workers are forked and sent what they would be sent; the tests of `proof`
send the signals to a real torchrun.
"""

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

# name: (signal, to torchrun, to which workers, --max-restarts)
REAL = {
    "to torchrun": (TERM, True, (), 0),
    "to torchrun, Ctrl-C": (INT, True, (), 0),
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
    command = [
        sys.executable, "-m", launcher, "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts),
        "--monitor-interval", "0.1", "--shutdown-timeout", "120", "--log-dir", str(logs),
        "-m", "crystal.cli", "train", str(path), *LAYOUT, "backend.parallel.fsdp=2", f"run_dir={run_dir}",
    ]  # fmt: skip
    with (tmp_path / "said").open("w") as said:
        torchrun = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        metrics = run_dir / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert torchrun.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.02)
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        workers = sorted(map(int, children))
        for pid in [*([torchrun.pid] if agent else []), *(workers[rank] for rank in ranks)]:
            os.kill(pid, number)
        torchrun.wait(300)
        while any(Path(f"/proc/{pid}").exists() for pid in workers):  # those of a killed torchrun save first
            time.sleep(0.02)
    finally:
        torchrun.kill()
    said = (tmp_path / "said").read_text()
    (last,) = checkpoint.steps(run_dir / "checkpoints")
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == last
    words = "SIGHUP" if number == signal.SIGKILL else number.name
    assert f"{words}: stopped after step {last}, saved; the same command continues" in said, said
    attempts = sorted(path.name for path in logs.glob("*/attempt_*"))
    assert attempts == [f"attempt_{i}" for i in range(restarts + 1)]
    for attempt in attempts:
        codes = [json.loads(p.read_text())["code"] for p in logs.glob(f"*/{attempt}/*/crystal.json")]
        # a worker whose torchrun died leaves no word that keeps its replacement from going on
        assert codes == ([] if words == "SIGHUP" else [130, 130]), said
    if number == signal.SIGKILL:
        assert torchrun.returncode == -signal.SIGKILL
    elif launcher == "torch.distributed.run":  # its own code is 1 whatever its workers' were
        assert torchrun.returncode == 1
    else:
        assert torchrun.returncode == 130
        assert said.rstrip().endswith(f"\ncrystal: {words}: stopped after step {last}")
        assert "Traceback" not in said

"""What a worker has with its torchrun: it ends with it, knows how long it waits, and leaves it last words."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crystal.output import interrupts, launcher, ranks


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("TORCHELASTIC", "TORCH_ELASTIC", "PET_"))]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("RANK", raising=False)


# torch's own: run.py's flag, PET_SHUTDOWN_TIMEOUT in its place, launcher/api.py's variable, its default
@pytest.mark.parametrize(
    ("words", "environment", "seconds"),
    [
        ("torchrun --shutdown-timeout 700 -m crystal.cli ", {}, 700),
        ("python -m torch.distributed.run --shutdown_timeout=90 ", {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "50"}, 90),
        ("torchrun -m crystal.cli ", {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "50"}, 50),
        ("torchrun ", {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "50", "PET_SHUTDOWN_TIMEOUT": "60"}, 60),
        ("torchrun ", {}, 30),
        ("torchrun --shutdown-timeout soon ", {}, 30),
        ("torchrun --shutdown-timeout", {}, 30),
        ("", {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": ""}, 30),
    ],
)
def test_the_grace_is_what_torchrun_was_given(monkeypatch, words, environment, seconds):
    monkeypatch.setattr(launcher, "_words_of", lambda pid: words.replace(" ", "\0"))
    assert launcher.grace() is None  # no torchrun started this
    for name, value in {"TORCHELASTIC_RUN_ID": "1", **environment}.items():
        monkeypatch.setenv(name, value)
    assert launcher.grace() == seconds


def attempt(monkeypatch, root: Path, number: int, rank: int = 0, most: int = 2) -> Path:
    place = root / f"attempt_{number}" / str(rank)
    place.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(place / "error.json"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(most))
    return place


def test_who_ends_for_good_is_heard_by_those_that_are_started_after_it(monkeypatch, tmp_path):
    assert launcher.ended_for_good() is None
    launcher.leave_last_words("crystal: nobody asks", 2)  # without torchrun it leaves nothing
    attempt(monkeypatch, tmp_path, 0, rank=1)
    launcher.leave_last_words("crystal: a mistake", 2)
    assert launcher.ended_for_good() is None  # not of its own attempt
    attempt(monkeypatch, tmp_path, 1)
    assert launcher.ended_for_good() == (2, "crystal: a mistake")
    assert not launcher.is_last_attempt()
    launcher.leave_last_words("crystal: a mistake", 2)
    attempt(monkeypatch, tmp_path, 2)
    assert launcher.ended_for_good() == (2, "crystal: a mistake")
    assert launcher.is_last_attempt()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attempt_0", "attempt_1", "attempt_2"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"code": 2}', '{"code": "x", "line": "y"}', "\0"])
def test_last_words_that_were_cut_short_are_none(monkeypatch, tmp_path, text):
    (attempt(monkeypatch, tmp_path, 0) / "crystal.json").write_text(text)
    attempt(monkeypatch, tmp_path, 1)
    assert launcher.ended_for_good() is None


@pytest.mark.parametrize("name", ["", os.devnull])
def test_a_torchrun_that_keeps_no_logs_is_told_nothing(monkeypatch, name):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", name)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    launcher.leave_last_words("crystal: a mistake", 2)
    assert launcher.ended_for_good() is None


def test_torchs_own_reader_takes_the_last_words(monkeypatch, tmp_path):
    """What its summary shows after `traceback :`."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    place = attempt(monkeypatch, tmp_path, 0)
    launcher.leave_last_words("crystal: a mistake", 2)
    assert ProcessFailure(0, 1, 2, str(place / "error.json")).message == "crystal: a mistake"
    launcher.leave_last_words("ValueError: x", trace="Traceback …")
    failure = ProcessFailure(0, 1, 1, str(place / "error.json"))
    assert failure.message["extraInfo"]["py_callstack"] == "Traceback …"
    assert abs(failure.timestamp - time.time()) < 60


PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline().strip(), flush=True)
time.sleep(600)
"""
CHILDREN = {
    "a worker of a pool": "from crystal.output.launcher import die_with_parent as d; d()",
    "a worker of torchrun": "from crystal.output.launcher import die_with_torchrun as d; d()",
    "a worker of torchrun that hears nothing": (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from crystal.output.launcher import die_with_torchrun as d; d()"
    ),
    "a program": (
        "from crystal.output.interrupts import child\n"
        "import sys; running = child([sys.executable, '-c', 'import time; time.sleep(600)']).__enter__()\n"
        "from crystal.output.launcher import die_with_parent as d; d(); print(running.pid, flush=True)"
    ),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's call is Linux'")
@pytest.mark.parametrize("name", CHILDREN)
def test_it_ends_when_the_process_that_started_it_is_killed(name):
    code = f"{CHILDREN[name]}\nprint('ready', flush=True)\nimport time; time.sleep(600)"
    worker = {"RANK": "0", "TORCHELASTIC_RUN_ID": "x", "PET_SHUTDOWN_TIMEOUT": "1"}
    environment = os.environ | (worker if "torchrun" in name else {})
    parent = subprocess.Popen([sys.executable, "-c", PARENT, code], stdout=subprocess.PIPE, text=True, env=environment)
    said = parent.stdout.readline().split()
    pids = [int(word) for word in said if word.isdigit()]
    assert len(pids) == (2 if name == "a program" else 1)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 100
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < end, "it outlived its parent"
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_of_several_processes_only_a_late_sigint_is_a_second_stop(monkeypatch):
    now = time.monotonic()
    every = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    assert all(interrupts.is_repeat(number, now) for number in every)  # told twice at once
    assert not any(interrupts.is_repeat(number, now - 2) for number in every)
    monkeypatch.setenv("RANK", "1")
    assert ranks.has_launcher()
    assert [number for number in every if not interrupts.is_repeat(number, now - 2)] == [signal.SIGINT]


def test_what_was_told_to_be_ignored_stays_so_but_a_worker_hears_its_launchers_death(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        assert signal.SIGHUP not in interrupts.stop_signals()
        assert signal.SIGTERM in interrupts.stop_signals()
        monkeypatch.setenv("RANK", "0")
        assert signal.SIGHUP in interrupts.stop_signals()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_closed_is_no_error_of_a_run_that_saves(tmp_path):
    """SIGHUP, and writing to the terminal fails: it goes nowhere from then on."""
    code = (
        "import os, signal, sys, time\n"
        "from crystal.output import interrupts\n"
        "heard = []\n"
        "signal.signal(signal.SIGHUP, lambda *_: heard.append(interrupts.quiet_lost_terminal()))\n"
        "os.write(int(sys.argv[2]), b'ready')\n"  # not on the terminal: its write may be under way when that is closed
        "while not heard: time.sleep(0.005)\n"
        "print('words', flush=True); print('more', file=sys.stderr, flush=True)\n"
        "file = open(sys.argv[1], 'w'); file.write('saved'); file.close()\n"
        "os._exit(0)\n"  # as `interrupts.over` does: while Python ends, signals kill again
    )
    master, slave = os.openpty()
    place = tmp_path / "saved"
    ready, is_ready = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(place), str(is_ready)], stdin=slave, stdout=slave, stderr=slave,
        start_new_session=True, pass_fds=[is_ready],
    )  # fmt: skip
    os.close(slave)
    os.close(is_ready)
    try:
        with open(ready, "rb") as said:
            assert said.read(5) == b"ready"
        os.close(master)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 0
        assert place.read_text() == "saved"
    finally:
        process.kill()


def test_last_words_are_json_on_the_disk(monkeypatch, tmp_path):
    place = attempt(monkeypatch, tmp_path, 0)
    launcher.leave_last_words("crystal: ünd", 130)
    assert json.loads((place / "crystal.json").read_text(encoding="utf-8")) == {"line": "crystal: ünd", "code": 130}


@pytest.mark.parametrize(
    ("codes", "found"),
    [
        ([130, 130], (130, "crystal: of 0")), ([2, 2], (2, "crystal: of 0")), ([130, None], None), ([130, 2], None),
        ([130, -15], (130, "crystal: of 0")), ([-15, -15], None), ([], None),
    ],
)  # fmt: skip
def test_a_torchrun_of_ours_ends_as_all_its_workers_did(tmp_path, codes, found):
    """None: it began, and left no word of its end. -15: torchrun ended it before it began."""
    for number in (0, 1):
        for rank, code in enumerate(codes):
            place = tmp_path / "run_x" / f"attempt_{number}" / str(rank)
            place.mkdir(parents=True)
            if code is None:
                (place / "crystal-began.json").write_text("{}")
            elif code > 0:
                text = json.dumps({"code": code if number else 2, "line": f"crystal: of {rank}"})
                (place / "crystal.json").write_text(text)
    assert launcher.how_workers_ended(str(tmp_path)) == found


def test_the_runs_line_is_its_last_and_the_runs_code_its_own(monkeypatch, capsys):
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    from crystal.cli import torchrun
    from crystal.cli.torchrun import main

    monkeypatch.setattr(torchrun, "_wait_for_workers", lambda seconds: None)  # it would tell and reap this process' own

    def ends(error, code=None, began=None):
        def run_(arguments):
            assert (arguments.nproc_per_node, arguments.training_script) == ("2", "x.py")
            place = Path(arguments.log_dir, "run_x", "attempt_0", "0")
            place.mkdir(parents=True)
            if code is not None:
                (place / "crystal.json").write_text(json.dumps({"code": code, "line": "crystal: the run's"}))
            if began is not None:
                (place / "crystal-began.json").write_text(json.dumps(began))
            if error is not None:
                raise error

        monkeypatch.setattr(run, "run", run_)
        found = main(["--nproc-per-node", "2", "x.py"])
        return found, capsys.readouterr().err

    failed = ChildFailedError("x.py", {0: ProcessFailure(0, 1, 1, "nowhere")})
    assert ends(None) == (0, "")
    assert ends(SignalException("", signal.SIGTERM), 130) == (130, "crystal: the run's\n")
    assert ends(failed, 2) == (2, "crystal: the run's\n")
    assert ends(SignalException("", signal.SIGTERM)) == (130, "crystal: terminated\n")  # before its worker began
    hung_up = {"code": 130, "line": "crystal: SIGHUP: stopped after step 3"}  # after which another may go on
    assert ends(SignalException("", signal.SIGHUP), began=hung_up) == (130, f"{hung_up['line']}\n")
    assert ends(SignalException("", signal.SIGTERM), began={}) == (
        1, "crystal: SIGTERM: not all processes of this machine had saved when they were ended\n"
    )  # fmt: skip
    code, said = ends(failed)
    assert code == 1
    assert "x.py FAILED" in said
    assert "Traceback" not in said


# pthread_mutex_lock of a mutex that is locked: no signal ends that wait, nor does Python hear one in it
_DEAF = """
import ctypes, os
from crystal.output import interrupts
interrupts.DEAF = 0.2
interrupts.listen()
if os.environ.get("CHILD") and os.fork() == 0:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.kill(os.getpid(), 15)  # a child's own signal, of which its parent must not die
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
os.write(1, b"waits")
for _ in range(2):
    libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a mutex of zeros is glibc's")
def test_a_worker_that_waits_in_c_for_another_ends_with_a_stop_signal(tmp_path):
    place = tmp_path / "attempt_0" / "0"
    place.mkdir(parents=True)
    worker = {"RANK": "0", "TORCHELASTIC_ERROR_FILE": str(place / "error.json"), "TORCHELASTIC_RESTART_COUNT": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", _DEAF], env=os.environ | worker | {"CHILD": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout.read(5) == "waits"
        time.sleep(0.6)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 130
    finally:
        process.kill()
    assert process.stderr.read().endswith("crystal: terminated\n")
    # torchrun may start it again: the signal may have been its own, for another worker had died
    assert not (place / "crystal.json").exists()
    assert json.loads((place / "crystal-began.json").read_text()) == {"code": 130, "line": "crystal: terminated"}

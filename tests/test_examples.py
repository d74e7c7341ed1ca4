"""The recipes of docs/examples are read by bash and by shellcheck, and what can be run here is run."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import long_run

from crystal import checkpoint

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.sh"))
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))


def test_there_are_scripts_and_the_docs_name_them():
    text = (EXAMPLES.parent / "clusters.md").read_text()
    assert {path.name for path in SCRIPTS} == {"slurm.sh", "two_nodes.sh"}
    assert all(f"examples/{path.name}" in text for path in SCRIPTS)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_one_that_bash_reads_and_shellcheck_has_nothing_to_say_of(path):
    assert os.access(path, os.X_OK)
    read = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert (read.returncode, read.stderr) == (0, "")
    if SHELLCHECK is None:
        pytest.skip("bash reads it; shellcheck is not installed")
    found = subprocess.run([SHELLCHECK, path], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


SRUN = """#!/bin/bash
echo "srun $*" >> "$CALLS"
trap 'echo "srun was sent TERM" >> "$CALLS"; exit 1' TERM
touch "$CALLS.started"
while true; do sleep 0.05; done
"""


@pytest.mark.parametrize(
    ("number", "code", "after"), [(signal.SIGUSR1, 0, ["scontrol requeue 7"]), (signal.SIGTERM, 130, [])]
)
def test_the_slurm_script_stops_its_step_and_requeues_itself_where_its_time_is_over(tmp_path, number, code, after):
    """srun and scontrol are stand-ins that write down how they are called: this is no cluster."""
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "scontrol").write_text('#!/bin/bash\n[ "$1" = show ] && echo node0\necho "scontrol $*" >> "$CALLS"\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "SLURM_NNODES": "2", "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "96", "SLURM_JOB_NODELIST": "node[0-1]",
    }  # fmt: skip
    job = subprocess.Popen(["bash", EXAMPLES / "slurm.sh"], env=environment)
    try:
        while not Path(f"{calls}.started").exists():
            assert job.poll() is None
        job.send_signal(number)  # USR1 is what `--signal=B:USR1@900` has sent
        assert job.wait(60) == code
    finally:
        job.kill()
    said = calls.read_text().splitlines()
    assert said[said.index("srun was sent TERM") + 1 :] == after
    (step,) = [line for line in said if line.startswith("srun --")]
    for word in ("--cpus-per-task=96", "--nnodes 2", "--shutdown-timeout 700", "--rdzv-endpoint node0:29400",
                 "backend.parallel.dp=2", "backend.parallel.fsdp=8"):  # fmt: skip
        assert word in step


@pytest.mark.proof
@pytest.mark.parametrize("what", ["killed", "stopped", "cut-off", "slow"])
def test_two_nodes_and_what_happens_to_the_second(make_run, tmp_path, what):
    path = long_run(make_run)
    environment = os.environ | {"PYTHON": sys.executable}
    script = [EXAMPLES / "two_nodes.sh", what, path, tmp_path / "nodes"]
    words = ["backend.compile=false", "backend.dtype=fp32", "train.checkpoint_every=5", "--until", "120"]
    done = subprocess.run([*script, *words], env=environment, capture_output=True, text=True, timeout=500, check=False)
    if done.returncode == 77:
        pytest.skip(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout + (tmp_path / "nodes" / "node-1").read_text()
    run = tmp_path / "nodes" / "run"
    assert checkpoint.steps(run / "checkpoints")[-1] == 120
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    starts = [event["step"] for event in events if event["event"] == "start"]
    assert starts[0] == 0
    if what in ("killed", "cut-off"):  # a third node, from a checkpoint
        assert len(starts) > 1
        assert all(step >= 5 and step % 5 == 0 for step in starts[1:])
    else:
        assert starts == [0]


SIZES = ("--nnodes", "--nproc-per-node")
TORCHRUNS = [
    shlex.split(line)
    for block in re.findall(r"^```text\n(.*?)^```", (EXAMPLES.parent / "clusters.md").read_text(), re.M | re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("torchrun ")
]


@pytest.mark.parametrize("words", TORCHRUNS, ids=lambda words: words[words.index("train") + 1])
def test_the_torchrun_lines_of_the_docs_are_of_a_run_that_can_be_laid_out(words):
    """And each says how long torchrun is to wait after a stop signal."""
    from crystal.run import load_run

    options, run = words[: words.index("-m")], words[words.index("train") + 1 :]
    assert int(options[options.index("--shutdown-timeout") + 1]) > 30
    loaded = load_run("amber-7b" if run[0] == "RUN.yaml" else run[0], run[1:])
    nodes, each = (int(options[options.index(name) + 1]) if name in options else 1 for name in SIZES)
    assert loaded.config.backend.parallel.processes == nodes * each

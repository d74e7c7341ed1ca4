"""`crystal runs`: states, numbers and the table, of whole, torn and foreign directories, without disturbing any."""

import json
import os
import subprocess
import sys
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorded import TOKENS, record_run

from crystal.cli.runs import duration, runs_text, short
from crystal.errors import RunError
from crystal.training.guards import alone_in
from crystal.workspace.runs import find_runs, run_state


@pytest.fixture
def runs(tmp_path):
    """One run of each state below a directory."""
    root = tmp_path / "runs"
    record_run(root / "whole", steps=804, stop=804)
    record_run(root / "until", steps=40, stop=40)
    record_run(root / "signal", steps=30, interrupted=True)
    record_run(root / "killed", steps=50)
    record_run(root / "ready", steps=0, checkpoint=False)
    (root / "ready" / "metrics.jsonl").unlink()
    (root / "ready" / "events.jsonl").unlink()
    return root


def test_a_run_is_in_the_state_that_its_files_tell(runs, crystal):
    code, out, err = crystal("runs", runs, "--json")
    assert (code, err) == (0, "")
    assert {run["path"].rpartition("/")[2]: run["state"] for run in json.loads(out)["runs"]} == {
        "whole": "finished", "until": "stopped", "signal": "interrupted", "killed": "failed", "ready": "not started",
    }  # fmt: skip


def test_what_a_run_recorded_is_listed(runs):
    run = run_state(runs / "until")
    assert (run.name, run.step, run.steps, run.checkpoint_step) == ("demo", 40, 804, 40)
    assert run.tokens == 40 * TOKENS
    assert run.loss == pytest.approx(8 / 41 + 2)
    assert run.val_loss == {"english": pytest.approx(8 / 41 + 2.1), "python": pytest.approx(8 / 41 + 2.2)}
    assert run.mean_val_loss == pytest.approx(8 / 41 + 2.15)
    assert (run.backend, run.tokens_per_second, run.seconds_left) == ("cpu", 1000, None)
    assert run.disk_bytes == sum(p.stat().st_size for p in (runs / "until").rglob("*") if p.is_file())


def test_a_run_whose_lock_is_held_is_training_and_stays_so(runs):
    with alone_in(runs / "killed"):
        run = run_state(runs / "killed")
        assert run.state == "training"
        assert run.seconds_left == pytest.approx((804 - 50) * TOKENS / 1000)
        with pytest.raises(RunError, match="another process"), alone_in(runs / "killed"):
            pass
    assert run_state(runs / "killed").state == "failed"
    with alone_in(runs / "killed"):
        pass


def test_time_is_left_to_where_this_start_of_a_run_stops(runs):
    record_run(runs / "part", steps=50, stop=60)
    with alone_in(runs / "part"):
        assert run_state(runs / "part").seconds_left == pytest.approx(10 * TOKENS / 1000)


def test_a_start_after_an_interrupt_counts(runs):
    with (runs / "signal" / "events.jsonl").open("a") as file:
        file.write('{"event": "start", "step": 30, "stop": 804}\n')
    assert run_state(runs / "signal").state == "failed"


def test_looking_changes_nothing(runs):
    def seen():
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(runs.rglob("*"))}

    before = seen()
    find_runs(runs)
    assert seen() == before


def test_foreign_directories_and_missing_ones(runs, crystal, monkeypatch):
    for name, text in {"hf": "model: llama\n", "list": "- 1\n", "other": "curriculum: english\n"}.items():
        (runs / name / "checkpoints").mkdir(parents=True)
        (runs / name / "config.yaml").write_text(text)
    (runs / "alone").mkdir()
    (runs / "alone" / "config.yaml").write_text("curriculum: {}\n")
    (runs / "deep" / "er" / "run").mkdir(parents=True)
    record_run(runs / "deep" / "er" / "run", steps=3)
    record_run(runs / ".hidden", steps=3)
    (runs / "loop").symlink_to(runs)
    record_run(runs.parent / "elsewhere", steps=3)
    (runs / "linked").symlink_to(runs.parent / "elsewhere")
    assert sorted(str(run.path.relative_to(runs)) for run in find_runs(runs)) == [
        "deep/er/run", "killed", "linked", "ready", "signal", "until", "whole",
    ]  # fmt: skip
    assert [run.path for run in find_runs(runs / "until")] == [runs / "until"]
    code, out, err = crystal("runs", runs / "nowhere")
    assert (code, out, err) == (2, "", f"crystal: {runs / 'nowhere'}: no such directory\n")
    assert crystal("runs", runs / "until" / "config.yaml")[0] == 2
    monkeypatch.chdir(runs / "alone")
    assert crystal("runs") == (0, "no runs in runs\n", "")
    assert crystal("runs", "--json") == (0, '{"runs": []}\n', "")


damage = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(
        [
            b"", b"\n", b"null", b"[]", b"12\n", b'{"step": null, "loss": "x"}\n', b'{"step": 1e400}\n', b"{" * 5000,
            b'{"step": 3, "loss": NaN, "val_loss": {"a": null}, "tokens": "x", "tokens_per_second": {}}\n',
            b'{"event": "start", "stop": "x", "backend": 3}\n', b'{"event": ["start"]}\n', b"curriculum: {stages: 1}\n",
            b"curriculum: {seq_len: 2024-13-45}\n", b"backend: cpu\ncurriculum: {}\nname: [1]\n", b"\x00\xff\xfe",
        ]
    ),
)  # fmt: skip


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["config.yaml", "metrics.jsonl", "events.jsonl"]), st.floats(0, 1), damage)
def test_a_torn_or_damaged_file_is_no_error(tmp_path, name, part, tail):
    """Any file cut anywhere, with anything behind it, as a crash or a stranger leaves it."""
    directory = tmp_path / "run"
    if not directory.exists():
        record_run(directory, steps=20)
    whole = (directory / name).read_bytes()
    (directory / name).write_bytes(whole[: int(len(whole) * part)] + tail)
    try:
        found = find_runs(tmp_path)
        assert runs_text(found, tmp_path)
        if name != "config.yaml":
            assert (len(found), found[0].steps) == (1, 804)
    finally:
        (directory / name).write_bytes(whole)


def test_only_the_end_of_a_long_record_is_read(tmp_path):
    directory = record_run(tmp_path / "long", steps=50)
    records = (directory / "metrics.jsonl").read_bytes()
    with (directory / "metrics.jsonl").open("r+b") as file:
        file.seek(1 << 32)  # four gigabytes of nothing before them
        file.write(b"\n" + records)
    tracemalloc.start()
    run = run_state(directory)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (run.step, run.val_loss["english"]) == (50, pytest.approx(8 / 41 + 2.1))
    assert peak < 20 << 20


def test_the_last_validation_is_found_behind_a_thousand_steps(tmp_path):
    directory = record_run(tmp_path / "run", steps=3000, val_every=1000)
    assert run_state(directory).val_loss["english"] == pytest.approx(8 / 3001 + 2.1)
    directory = record_run(tmp_path / "other", steps=2999, val_every=1000)
    assert run_state(directory).val_loss["english"] == pytest.approx(8 / 2001 + 2.1)
    assert run_state(directory).loss == pytest.approx(8 / 3000 + 2)


def test_a_hundred_runs_are_listed_quickly(tmp_path):
    record_run(tmp_path / "run-000", steps=3000, val_every=1000)
    for i in range(1, 100):
        (tmp_path / f"run-{i:03}").mkdir()
        for name in ("config.yaml", "manifest.json", "metrics.jsonl", "events.jsonl"):
            os.link(tmp_path / "run-000" / name, tmp_path / f"run-{i:03}" / name)
    began = time.process_time()
    assert len(find_runs(tmp_path)) == 100
    assert time.process_time() - began < 10


@pytest.mark.parametrize("columns", [80, 60, 40])
def test_the_table_fits_the_window(runs, crystal, monkeypatch, columns):
    record_run(runs / ("a-long-name-" * 4), steps=3)
    record_run(runs / "esc\x1b[31mred\n", steps=3)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(runs.parent)
    code, out, err = crystal("runs")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    named = [line for line in lines if line.startswith("runs/a-long-name")]
    assert named, "a name is not cut"
    assert all(len(line) <= columns for line in lines if line not in named)
    assert lines[0].split()[:3] == ["RUN", "STATE", "STEP"]
    assert "\x1b" not in out
    assert r"esc\x1b[31mred\n" in out


def test_counts_and_times_fit_five_characters():
    assert [short(v) for v in (None, 0, 999, 79721, 321836, 999_999, 1_250_000, 1.39e12)] == [
        "-", "0", "999", "79721", "322k", "1.00M", "1.25M", "1.39T",
    ]  # fmt: skip
    assert [duration(s) for s in (None, 4.6, 65, 7500, 86400 * 3.2)] == ["-", "5s", "1m05s", "2h05m", "3d04h"]
    assert [duration(s, 1) for s in (65, 7500, 86400 * 3.2)] == ["1m", "2h", "3d"]
    for power in range(60):
        assert len(short(1.9**power)) <= 5
        assert len(duration(1.3**power)) <= 6


def test_listing_runs_does_not_wait_for_torch():
    """It reads ends of files: a second and a half of imports would be most of it."""
    code = "import sys, crystal.workspace.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

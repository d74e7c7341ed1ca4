"""What goes wrong around a sweep: odd paths, damaged and foreign files, full disks, targets. One line, nothing lost."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command import crystal, crystal_process
from sweep_files import fill, load, write_sweep

from crystal.errors import ConfigError, RunError
from crystal.run import load_run
from crystal.sweeps import store as sweep_store
from crystal.sweeps.store import finished, open_trials
from crystal.sweeps.sweep import load_sweep
from crystal.sweeps.target import check_target
from crystal.sweeps.transfer import judge_again, report
from crystal.sweeps.workers import held


@pytest.fixture
def sweep_file(make_run) -> Path:
    return write_sweep(make_run(), beside=[])


def refused(done: subprocess.CompletedProcess) -> str:
    """The one line of a command that ended as a user's mistake does."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    # what was said of progress may stand before it
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("crystal: ")]
    assert done.stderr.rstrip().endswith(line)
    return line


# where results lie


@pytest.mark.parametrize(
    "name", ["a?b", "100%", "%2F", "a#b", "two words", "ünï/çödé-✓", "{x}", "a&b=c", "file:x", ":memory:", "~", "a'b"]
)
def test_out_may_be_any_path(sweep_file, tmp_path, name):
    out = tmp_path / name
    sweep = load_sweep(str(sweep_file), (), out)
    assert fill(sweep, most=1) == 1
    assert (out / "trials.sqlite").stat().st_size > 0
    assert len(finished(sweep)) == 1
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("trials.sqlite*"))
    assert found == [f"{name}/trials.sqlite"]


def test_out_that_is_a_file_is_refused_and_left_alone(sweep_file, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises((ConfigError, RunError)) as error, held(load_sweep(str(sweep_file), (), out)):
            pass
        assert str(error.value).startswith(f"{out}: ")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a directory that nobody can write")
def test_out_that_cannot_be_written_is_one_line(sweep_file):
    sweep = load_sweep(str(sweep_file), (), Path("/sys/kernel/crystal"))
    with pytest.raises(RunError, match="/sys/kernel/crystal: cannot be written"), held(sweep):
        pass


def test_a_directory_without_room_for_its_lock_is_one_line(sweep_file, tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device", str(self))

    sweep = load(sweep_file)
    _ = sweep.data
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(RunError, match="cannot be written: No space left on device"), held(sweep):
        pass


# damaged and foreign files


def garbage(file: Path) -> None:
    file.write_bytes(b"this is no database" * 300)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


def overwritten(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[8192:-4096] = b"\xff" * (len(content) - 12288)
    file.write_bytes(bytes(content))


def foreign(file: Path) -> None:
    file.unlink()
    with sqlite3.connect(file) as connection:
        connection.execute("create table studies (id integer, colour text)")


def a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [garbage, truncated, overwritten, foreign, a_directory])
def test_a_damaged_file_of_trials_is_one_line_and_is_left_as_it_is(sweep_file, damage):
    sweep = load(sweep_file)
    fill(sweep)
    file = sweep.directory / "trials.sqlite"
    damage(file)
    left = None if file.is_dir() else file.read_bytes()
    with pytest.raises(RunError) as error:
        fill(sweep)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)
    if left is not None and damage is not foreign:
        assert file.read_bytes() == left


def test_a_damaged_file_of_trials_is_one_line_of_the_command(sweep_file, tmp_path):
    (tmp_path / "out").mkdir()
    garbage(tmp_path / "out" / "trials.sqlite")
    line = refused(crystal("transfer", sweep_file, "--out", tmp_path / "out"))
    assert "trials.sqlite: damaged" in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "sweep.json: damaged: expected JSON"),
        (b"", "sweep.json: damaged: expected JSON"),
        (b"\xff\xfe\x00", "sweep.json: damaged: expected JSON"),
        (b"[]", "expected the record of a sweep"),
        (b"null", "expected the record of a sweep"),
        (b'{"name": "a web app"}', "expected the record of a sweep"),
        (b'{"format": 99, "config": {}}', "expected the record of a sweep, format 2"),
        (b'{"decides": {"steps": 3}, "config": {}}', "an older crystal"),
    ],
)
def test_a_damaged_or_foreign_record_is_one_line_and_is_left_as_it_is(sweep_file, content, words):
    sweep = load(sweep_file)
    fill(sweep)
    record = sweep.directory / "sweep.json"
    record.write_bytes(content)
    with pytest.raises(RunError) as error:
        fill(sweep)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert record.read_bytes() == content
    record.unlink()  # as the line says
    assert fill(sweep) == 0
    assert len(finished(sweep)) == 6


def test_a_worker_that_cannot_go_on_says_so_in_one_line(sweep_file, tmp_path):
    (tmp_path / "out" / "turn.lock").mkdir(parents=True)
    line = refused(crystal_process("transfer", sweep_file, "--out", tmp_path / "out", "--workers", "1"))
    assert "turn.lock: expected a lock file" in line


# full disks


def test_a_full_disk_loses_nothing_that_was_finished(sweep_file, monkeypatch):
    sweep, connect = load(sweep_file, "seeds=[1, 2, 3, 4, 5, 6]"), sqlite3.connect
    assert fill(sweep, most=4) == 4
    pages = sweep.directory.joinpath("trials.sqlite").stat().st_size // 4096

    def small(*args, **kwargs):
        connection = connect(*args, **kwargs)
        connection.execute(f"pragma max_page_count = {pages + 1}")
        return connection

    monkeypatch.setattr(sweep_store.sqlite3, "connect", small)
    with pytest.raises(RunError, match="is full; what was finished is kept"):
        fill(sweep)
    monkeypatch.setattr(sweep_store.sqlite3, "connect", connect)
    before = finished(sweep)
    assert len(before) >= 4
    assert fill(sweep) == 36 - len(before)
    assert all(row in finished(sweep) for row in before)


def test_a_file_that_may_not_grow_is_one_line(sweep_file, tmp_path):
    """The system's own limit on a file's size, in a process of its own."""
    sweep = load(sweep_file, "seeds=[1, 2, 3, 4, 5, 6]")
    fill(sweep, most=4)
    size = (sweep.directory / "trials.sqlite").stat().st_size
    code = f"""
import resource
from pathlib import Path
from sweep_files import fill, load
from crystal.errors import CrystalError
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
try:
    fill(load(Path({str(sweep_file)!r}), "seeds=[1, 2, 3, 4, 5, 6]"))
except CrystalError as error:
    print(error)
"""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    there = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=there)
    assert "trials.sqlite: cannot be written" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert len(finished(sweep)) >= 4


@pytest.mark.parametrize("broken", ["trials.json", "transfer.json", "transfer.png", "target.yaml"])
def test_a_result_that_cannot_be_written_does_not_lose_the_others(sweep_file, broken):
    sweep = load(sweep_file, "target.run=amber-7b")
    fill(sweep)
    (sweep.directory / broken).mkdir()
    with pytest.raises(RunError) as error:
        report(sweep)
    assert f"{broken}: cannot be written: is a directory" in str(error.value)
    files = {"trials.json", "transfer.json", "transfer.png", "target.yaml"}
    assert {name for name in files if (sweep.directory / name).is_file()} == files - {broken}
    assert not [path for path in sweep.directory.iterdir() if "tmp" in path.name or path.name.startswith(".transfer")]
    if broken != "transfer.json":
        result = json.loads((sweep.directory / "transfer.json").read_text())
        assert ("plot" in result, "target" in result) == (broken != "transfer.png", broken != "target.yaml")


def test_trials_are_written_even_where_nothing_can_be_judged(sweep_file):
    sweep = load(sweep_file)
    with held(sweep):
        trials = open_trials(sweep)
        while (claim := trials.claim()) is not None:
            gone = {"loss": float("inf"), "diverged": True, "first_loss": float("nan"), "steps": 1}
            trials.finish(claim, gone | {"seconds": 1.0, "cpu_seconds": 1.0})
    with pytest.raises(RunError, match="expected a run that did not diverge"):
        report(sweep)
    rows = json.loads((sweep.directory / "trials.json").read_text(), parse_constant=pytest.fail)
    assert [row["loss"] for row in rows] == [None] * 6


# the target


@pytest.fixture
def mine(make_run, tmp_path) -> Path:
    """A run file of the user's, with the name of a packaged one."""
    run = yaml.safe_load(make_run().read_text())
    (tmp_path / "project").mkdir()
    file = tmp_path / "project" / "demo.yaml"
    file.write_text(yaml.safe_dump({**run, "name": "mine"}))
    return file


@pytest.mark.parametrize("out", ["out", "project/out", "a/b/c", "project"])
def test_the_target_is_the_file_beside_the_sweeps(sweep_file, mine, tmp_path, monkeypatch, out):
    sweep_file = sweep_file.rename(mine.parent / "sweep.yaml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path("demo.yaml").write_text("name: a decoy")
    text = yaml.safe_load(sweep_file.read_text()) | {"target": {"run": "demo.yaml"}}
    sweep_file.write_text(yaml.safe_dump(text))
    sweep = load_sweep(os.path.relpath(sweep_file), (), Path(os.path.relpath(tmp_path / out)))
    fill(sweep)
    result = report(sweep)
    assert load_run(result["target"]).config.name == f"mine-from-{sweep.config.name}"
    monkeypatch.chdir("/")  # it is found from where it lies
    target = load_run(tmp_path / out / "target.yaml")
    assert target.config.data == load_run(mine).config.data
    assert any(Path(file).resolve() == mine.resolve() for file in target.source.origin.values())


def test_a_packaged_target_is_meant_even_where_another_file_has_its_name(sweep_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir(exist_ok=True)
    (tmp_path / "runs" / "amber-7b.yaml").write_text("name: a decoy")
    sweep = load(sweep_file, "target.run=amber-7b")
    fill(sweep)
    report(sweep)
    assert load_run(sweep.directory / "target.yaml").config.name == "amber-7b-from-tiny"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "target.run: nowhere.yaml: no such file"),
        ("model: [", "expected YAML"),
        ("- a list", "expected a mapping"),
        ("extends: demo\nmodle: {}", "did you mean 'model'"),
    ],
)
def test_a_broken_target_is_said_before_the_first_trial(sweep_file, content, words, tmp_path):
    name = "nowhere.yaml"
    if content is not None:
        name = "target.yaml"
        (sweep_file.parent / name).write_text(content)
    with pytest.raises(ConfigError) as error:
        load(sweep_file, f"target.run={sweep_file.parent / name}" if content else f"target.run={name}")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_target_that_cannot_take_the_values_is_said_before_the_first_trial(sweep_file, tmp_path):
    out = tmp_path / "out"
    words = ["target.run=amber-7b", "target.parametrization=completep"]
    line = refused(crystal("transfer", sweep_file, "--out", out, *words))
    assert "base_n_layers: expected the depth of the tuned proxy" in line
    assert not out.exists()
    check_target(load(sweep_file, "target.run=amber-7b"))


# judged again


def test_a_finished_sweep_is_judged_again_wherever_it_was_moved(sweep_file, tmp_path, monkeypatch):
    sweep = load(sweep_file, "target.run=amber-7b", "max_shift=0.75")
    fill(sweep)
    before = json.loads(json.dumps(report(sweep)))
    moved = tmp_path / "moved"
    shutil.move(sweep.directory, moved)
    (moved / "trials.sqlite").unlink()
    (moved / "transfer.json").unlink()
    monkeypatch.setattr(sweep_store, "open_trials", pytest.fail)
    after = json.loads(json.dumps(judge_again(moved / "trials.json", [], None)))
    assert judge_again(moved / "trials.json", [], tmp_path / "new" / "place")["shift_octaves"] == 0
    paths = ("plot", "target")
    assert {k: v for k, v in after.items() if k not in paths} == {k: v for k, v in before.items() if k not in paths}
    assert json.loads((moved / "transfer.json").read_text()) == after
    assert after["target"] == str(moved / "target.yaml")


@pytest.mark.parametrize("content", ["{", "[1]", '[{"width": 32}]', "null", '{"a": 1}'])
def test_damaged_trials_are_not_judged_again(sweep_file, content):
    sweep = load(sweep_file)
    fill(sweep)
    report(sweep)
    (sweep.directory / "trials.json").write_text(content)
    with pytest.raises(RunError, match=r"trials.json: damaged, or not a sweep's trials") as error:
        judge_again(sweep.directory / "trials.json", [], None)
    assert "\n" not in str(error.value)
    assert (sweep.directory / "trials.json").read_text() == content


def test_one_directory_is_one_process_at_a_time(sweep_file, tmp_path):
    sweep = load(sweep_file)
    with held(sweep):
        line = refused(crystal("transfer", sweep_file, "--out", sweep.directory))
    assert "another process" in line

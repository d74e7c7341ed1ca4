"""Sweeps end to end on a tiny run: every trial once, resumable after a kill, verdict files, refusals in one line."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from crystal.config import ConfigError
from crystal.sweep import Sweep, enqueue, finished, load_sweep, points, run_sweep
from crystal.sweep_trial import Length, Point, run_trial

SWEEP = {
    "name": "tiny",
    "family": "amber",
    "parametrization": "mup",
    "beside": ["sp"],
    "base_d_model": 32,
    "widths": [32, 64],
    "depths": [1],
    "steps": 3,
    "eval_rows": 2,
    "seeds": [1],
    "search": {"lr": {"log2": [-8.0, -4.0], "step": 2.0}},
}


@pytest.fixture
def sweep_file(make_run, tmp_path) -> Path:
    run = make_run()
    file = tmp_path / "tiny-sweep.yaml"
    file.write_text(yaml.safe_dump({**SWEEP, "run": str(run)}))
    return file


def load(file: Path, *overrides: str) -> Sweep:
    return load_sweep(str(file), overrides, file.parent / "out")


def crystal(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "crystal.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_sweep_runs_judges_and_writes_everything(sweep_file, tmp_path):
    out = tmp_path / "out"
    done = crystal("transfer", sweep_file, "--out", out, "--json", "target.run=amber-7b")
    assert done.returncode in (0, 1), done.stderr
    result = json.loads(done.stdout)
    assert {"verdict", "parametrization", "widths", "shift_octaves", "regret", "trials"} <= result.keys()
    assert result["trials"] == 3 * 2
    assert {"log2_lr_optimum", "ci", "loss"} <= result["widths"]["64"].keys()
    assert result["beside"]["sp"]["trials"] == 6
    limits = [r["metrics"]["asymptotic_loss"] for r in (result["beside"]["sp"], result)]
    assert result["beside"]["sp"]["metrics"]["asymptotic_loss_penalty"] == pytest.approx(limits[0] - limits[1])
    assert (out / "transfer.png").read_bytes()[:4] == b"\x89PNG"
    rows = json.loads((out / "trials.json").read_text())
    assert len({(r["parametrization"], r["width"], r["seed"], r["lr"]) for r in rows}) == len(rows) == 12
    # at the base width muP and SP are one model, to the last bit
    base = {(r["parametrization"], r["seed"], r["lr"]): r["loss"] for r in rows if r["width"] == 32}
    assert all(base["mup", s, lr] == base["sp", s, lr] for (p, s, lr) in base if p == "mup")
    # the target is a run file that loads, carries the values and says where they come from
    dry = crystal("train", out / "target.yaml", "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    target = yaml.safe_load((out / "target.yaml").read_text())
    assert target["model"]["mup"]["parametrization"] == "mup"
    assert target["provenance"]["trials"] == 6
    peak = json.loads(crystal("schedule", out / "target.yaml", "--at", "2000", "--json").stdout)["lr"]["2000"]
    assert peak == pytest.approx(result["best"]["lr"], rel=1e-6)
    assert json.loads((out / "target-plan.json").read_text())["parametrization"] == "mup"


def test_the_same_trial_gives_the_same_loss(sweep_file):
    sweep = load(sweep_file)
    from crystal.sweep import family

    point = Point(sweep.model("mup", 64, 1), family("amber")[1], 3, {"lr": 0.01, "init_std": 0.05})
    first, second = (run_trial(point, sweep.length, sweep.rows, "bf16") for _ in range(2))
    assert first["loss"] == second["loss"]
    other = run_trial(Point(point.model, point.optimizer, 3, {"lr": 0.02}), sweep.length, sweep.rows, "bf16")
    assert other["loss"] != first["loss"]


def test_a_diverged_trial_is_recorded(sweep_file):
    sweep = load(sweep_file)
    from crystal.sweep import family

    point = Point(sweep.model("sp", 64, 1), family("amber")[1], 1, {"lr": 1e6})
    assert run_trial(point, sweep.length, sweep.rows, "fp32")["diverged"]


def test_the_schedule_rises_and_falls_in_a_line():
    at = Length(steps=20, warmup=4, final_fraction=0.1).schedule(0.8)
    assert [at(s) for s in (1, 2, 4)] == pytest.approx([0.2, 0.4, 0.8])
    assert at(12) == pytest.approx(0.8 * 0.55)
    assert at(20) == pytest.approx(0.08)


def test_a_killed_sweep_goes_on_without_loss(sweep_file, tmp_path):
    """kill -9 of the command alone, not of its group: workers that lived on would run what a resume queues again."""
    out = tmp_path / "out"
    settings = ["beside=[]", "seeds=[1, 2, 3]", "steps=20"]
    command = [sys.executable, "-m", "crystal.cli", "transfer", str(sweep_file), "--out", str(out), *settings]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    sweep = load(sweep_file, *settings)
    try:
        deadline = time.time() + 600
        while time.time() < deadline and not ((out / "trials.sqlite").is_file() and _finished(sweep)):
            time.sleep(0.1)
        with pytest.raises(ConfigError, match="another process"):
            run_sweep(sweep, 1, lambda *_: None)
    finally:
        process.kill()
        process.wait()
    time.sleep(1)
    before = _finished(sweep)
    time.sleep(2)
    assert 0 < len(before) == len(_finished(sweep)) < 18
    run_sweep(sweep, 2, lambda *_: None)
    after = _finished(sweep)
    assert {json.dumps(r, sort_keys=True) for r in before} <= {json.dumps(r, sort_keys=True) for r in after}
    assert len(after) == len({(r["width"], r["seed"], r["lr"]) for r in after}) == 18


def _finished(sweep: Sweep) -> list[dict]:
    try:
        return finished(sweep)
    except Exception as error:  # the other process is just making the tables
        if "OperationalError" in type(error).__name__ or "IntegrityError" in type(error).__name__:
            return []
        raise


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_samplers_of_optuna_draw_within_the_range(sweep_file, sampler):
    sweep = load(sweep_file, f"sampler={sampler}", "trials=4", "beside=[]", "widths=[32]")
    run_sweep(sweep, 1, lambda *_: None)
    rows = finished(sweep)
    assert len(rows) == 4
    assert all(2**-8 <= row["lr"] <= 2**-4 for row in rows)
    assert len({row["lr"] for row in rows}) == 4


def test_queueing_twice_adds_nothing(sweep_file):
    sweep = load(sweep_file)
    sweep.directory.mkdir()
    assert enqueue(sweep) == enqueue(sweep) == 12
    from crystal.sweep import _studies

    assert sum(len(study.get_trials()) for *_, study in _studies(sweep)) == 12


def test_the_crystalcoder_sweep_uses_the_published_constants():
    published = load_sweep("transfer-crystalcoder").model("crystalcoder", 256, 2).mup
    assert (published.init_std, published.embedding_multiplier, published.output_alpha) == (0.073, 14.6, 2.22)
    assert (published.init_truncate, published.attention_scale, published.residual_init_2l) == (2.0, "1/d", True)


def test_a_grid_is_the_product_of_its_ranges(sweep_file):
    sweep = load(sweep_file, "search.init_std.values=[0.02, 0.08]")
    assert len(points(sweep.config)) == 3 * 2


def test_another_sweep_in_the_same_place_is_refused(sweep_file):
    sweep = load(sweep_file)
    sweep.directory.mkdir()
    from crystal.sweep import _same_sweep

    _same_sweep(sweep)
    _same_sweep(load(sweep_file, "seeds=[1, 2, 3]"))  # more of the same is welcome
    with pytest.raises(ConfigError, match="another sweep, whose steps differ"):
        _same_sweep(load(sweep_file, "steps=4"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("widths=[33]", "width 33: expected a multiple of the head size"),
        ("search.lr.log2=[-4.0, -8.0]", "expected [low, high]"),
        ("sampler=tpe", "trials: expected a number"),
        ("steps=0", "steps"),
        ("famly=amber", "did you mean 'family'"),
        ("family=amberr", "amberr"),
        ("model.init_sd=0.1", "did you mean 'init_std'"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(sweep_file, override, words):
    done = crystal("transfer", sweep_file, "--plan-only", override)
    assert done.returncode == 2, done.stdout
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_each_depth_is_judged_by_itself(sweep_file):
    """The best over depths would be the deepest model's, whatever the shallow ones' optima do."""
    from crystal.transfer_command import report

    sweep = load(sweep_file, "depths=[1, 2]", "beside=[]", "steps=2")
    run_sweep(sweep, 2, lambda *_: None)
    result, shown = report(sweep)
    assert result["depth"] == 2
    assert result["trials"] == result["depths"]["1"]["trials"] == result["depths"]["2"]["trials"] == 6
    assert result["widths"] == result["depths"]["2"]["widths"] != result["depths"]["1"]["widths"]
    assert "depth 1: " in shown


def test_more_workers_take_less_time_on_paper(sweep_file, monkeypatch):
    from crystal import transfer_command

    monkeypatch.setattr(transfer_command, "matmul_rate", lambda dtype: 1e9)
    monkeypatch.setattr(transfer_command.os, "cpu_count", lambda: 2)
    hours = [transfer_command.plan_only(load(sweep_file, "steps=50000"), n)["hours_estimated"] for n in (1, 2, 4)]
    assert hours[0] == pytest.approx(2 * hours[1], rel=0.01)
    assert hours[2] == hours[1]  # there are two cores


def test_plan_only_sizes_the_packaged_sweeps_and_warns():
    for name in ("transfer-mup", "transfer-crystalcoder"):
        done = crystal("transfer", name, "--plan-only", "--json")
        assert done.returncode == 0, done.stderr
        plan = json.loads(done.stdout)
        assert [p["width"] for p in plan["proxies"]] == [64, 128, 256, 512]
        assert plan["proxies"][0]["trials"] % 27 == 0
        assert any("tokens a parameter" in w for w in plan["warnings"])
        assert any("critical batch" in w for w in plan["warnings"])

"""Sweeps end to end on a tiny run: every trial once, resumable after a kill, verdict files, refusals in one line."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from command import crystal, crystal_process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sweep_files import fill, load, run, write_sweep

from crystal.cli.transfer import plan_text, transfer_text
from crystal.errors import CrystalError, RunError
from crystal.kernels import tuning
from crystal.sweeps.store import finished, open_trials
from crystal.sweeps.sweep import Sweep, family, load_sweep, points
from crystal.sweeps.trial import Length, Point, run_trial

DOCS = Path(__file__).parents[2] / "docs" / "mup"


@pytest.fixture
def sweep_file(make_run) -> Path:
    return write_sweep(make_run())


def test_a_sweep_runs_judges_and_writes_everything(sweep_file, tmp_path):
    out = tmp_path / "out"
    done = crystal_process("transfer", sweep_file, "--out", out, "--json", "target.run=amber-7b")
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
    point = Point(sweep.model("mup", 64, 1), family("amber")[1], 3, {"lr": 0.01, "init_std": 0.05})
    first, second = (run_trial(point, sweep.length, sweep.rows, "bf16") for _ in range(2))
    assert first["loss"] == second["loss"]
    other = run_trial(Point(point.model, point.optimizer, 3, {"lr": 0.02}), sweep.length, sweep.rows, "bf16")
    assert other["loss"] != first["loss"]


def test_a_diverged_trial_is_recorded(sweep_file):
    sweep = load(sweep_file)
    point = Point(sweep.model("sp", 64, 1), family("amber")[1], 1, {"lr": 1e6})
    assert run_trial(point, sweep.length, sweep.rows, "fp32")["diverged"]


def test_the_schedule_rises_and_falls_in_a_line():
    at = Length(steps=20, warmup=4, final_fraction=0.1).schedule(0.8)
    assert [at(s) for s in (1, 2, 4)] == pytest.approx([0.2, 0.4, 0.8])
    assert at(12) == pytest.approx(0.8 * 0.55)
    assert at(20) == pytest.approx(0.08)


@pytest.mark.proof
def test_a_killed_sweep_goes_on_without_loss(sweep_file, tmp_path):
    """kill -9 of the command alone, not of its group: workers that lived on would run what a resume runs again."""
    out = tmp_path / "out"
    settings = ["beside=[]", "seeds=[1, 2, 3]", "steps=20"]
    command = [sys.executable, "-m", "crystal.cli", "transfer", str(sweep_file), "--out", str(out), *settings]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    sweep = load(sweep_file, *settings)
    try:
        deadline = time.time() + 600
        while time.time() < deadline and not ((out / "trials.sqlite").is_file() and _finished(sweep)):
            time.sleep(0.5)
        with pytest.raises(RunError, match="another process"):
            run(sweep)
    finally:
        process.kill()
        process.wait()
    time.sleep(1)
    before = _finished(sweep)
    time.sleep(2)
    assert 0 < len(before) == len(_finished(sweep)) < 18
    run(sweep, 2)
    after = _finished(sweep)
    assert {json.dumps(r, sort_keys=True) for r in before} <= {json.dumps(r, sort_keys=True) for r in after}
    assert len(after) == len({(r["width"], r["seed"], r["lr"]) for r in after}) == 18


def _finished(sweep: Sweep) -> list[dict]:
    try:
        return finished(sweep)
    except CrystalError:  # the other process is just making the tables
        return []


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_samplers_of_optuna_draw_within_the_range(sweep_file, sampler):
    sweep = load(sweep_file, f"sampler={sampler}", "trials=4", "beside=[]", "widths=[32]")
    assert fill(sweep) == 4
    rows = finished(sweep)
    assert len(rows) == 4
    assert all(2**-8 <= row["lr"] <= 2**-4 for row in rows)
    assert len({row["lr"] for row in rows}) == 4


def test_every_trial_is_handed_out_once(sweep_file):
    sweep = load(sweep_file)
    sweep.directory.mkdir()
    one, other = open_trials(sweep), open_trials(sweep)
    claims = []
    while (claim := (one, other)[len(claims) % 2].claim()) is not None:
        claims.append((claim.shape, claim.seed, claim.values["lr"]))
    assert len(claims) == len(set(claims)) == one.wanted() == 12
    assert other.claim() is None
    one.give_up_running()  # as after a kill
    assert other.claim() is not None


def test_the_crystalcoder_sweep_uses_the_published_constants():
    published = load_sweep("transfer-crystalcoder").model("crystalcoder", 256, 2).mup
    assert (published.init_std, published.embedding_multiplier, published.output_alpha) == (0.073, 14.6, 2.22)
    assert (published.init_truncate, published.attention_scale, published.residual_init_2l) == (2.0, "1/d", True)


def test_a_grid_is_the_product_of_its_ranges(sweep_file):
    sweep = load(sweep_file, "search.init_std.values=[0.02, 0.08]")
    assert len(points(sweep.config)) == 3 * 2


CHANGES = {
    "points added": ["search.lr.log2=[-10.0, -2.0]"],
    "points removed": ["search.lr.log2=[-8.0, -6.0]"],
    "another step": ["search.lr.step=1.0"],
    "a list instead": ["search={lr: {values: [0.01, 0.015625, 0.3]}}"],
    "more seeds": ["seeds=[1, 2, 3]"],
    "other seeds": ["seeds=[7]"],
    "other widths": ["widths=[32, 64]"],
    "other depths": ["depths=[2]"],
    "other steps": ["steps=4"],
    "another dtype": ["dtype=fp32"],
    "another batch": ["set={curriculum.global_batch_size: 4}"],
    "other held-out rows": ["eval_rows=3"],
    "another schedule": ["warmup_fraction=0.5"],
    "other muP constants": ["model={init_std: 0.05}"],
    "another name": ["name=other"],
    "one more hyperparameter": ["search.init_std.values=[0.02, 0.08]"],
    "a parametrization beside": ["beside=[sp]"],
    "random, not a grid": ["sampler=random", "trials=2"],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_sweep_runs_what_is_new_and_counts_what_it_wants(sweep_file, change):
    small = ("widths=[32]", "beside=[]")
    before, after = load(sweep_file, *small), load(sweep_file, *small, *change)
    assert fill(before) == 3
    old = finished(before)
    wanted = len(after.shapes()) * len(points(after.config))
    known = finished(after)
    same = [row for row in old if row in known]  # those of its trials that ran already
    assert fill(after) == wanted - len(same)
    rows = finished(after)
    assert len(rows) == wanted == open_trials(after).wanted()
    assert all(row in rows for row in same)
    if after.config.sampler == "grid":
        values = {(r["lr"], r["seed"]) for r in rows}
        assert values == {(lr, seed) for lr in after.config.search["lr"].grid() for seed in after.config.seeds}
    assert open_trials(after).stale() == 3 - len(same)
    # nothing was lost: the sweep as it was has all its trials
    assert fill(before) == 0
    assert finished(before) == old
    made = "steps dtype set eval_rows warmup_fraction model sampler depths".split()
    if change[0].split("=")[0] in made:
        assert not same  # what changes a loss makes it another trial


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from([2.0**-8, 2.0**-7.5, 0.01, 0.02]), min_size=1, max_size=3),
            st.lists(st.sampled_from([1, 2, 5]), min_size=1, max_size=2, unique=True),
            st.sampled_from([3, 4]),
        ),
        min_size=2, max_size=3,
    )
)  # fmt: skip
def test_any_history_of_grids_leaves_exactly_the_wanted_trials(sweep_file, tmp_path_factory, history):
    out, ever = tmp_path_factory.mktemp("history"), set()
    for values, seeds, steps in history:
        words = (f"search.lr={{values: {values}}}", f"seeds={seeds}", f"steps={steps}", "beside=[]", "widths=[32]")
        sweep = load_sweep(str(sweep_file), words, out)
        wanted = {(lr, seed, steps) for lr in values for seed in seeds}
        assert fill(sweep) == len(wanted - ever)
        ever |= wanted
        rows = finished(sweep)
        assert sorted((r["lr"], r["seed"], r["steps"]) for r in rows) == sorted(wanted)
        assert open_trials(sweep).stale() == len(ever) - len(wanted)


def test_the_command_says_how_many_trials_do_not_count(sweep_file, tmp_path):
    fill(load(sweep_file, "steps=4", "beside=[]"))
    fill(load(sweep_file, "beside=[]"))
    done = crystal("transfer", sweep_file, "--out", tmp_path / "out", "--json", "beside=[]")
    assert done.returncode in (0, 1), done.stderr
    assert "6 finished trials of other settings kept, not counted" in done.stderr
    result = json.loads(done.stdout)
    assert (result["trials"], result["stale"]) == (6, 6)
    assert all(width["loss"] < 5 + 3.2 for width in result["widths"].values())  # fill adds the steps to its losses


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
    from crystal.sweeps.transfer import report

    sweep = load(sweep_file, "depths=[1, 2]", "beside=[]")
    fill(sweep)
    result = report(sweep)
    shown = transfer_text(result)
    assert result["depth"] == 2
    assert result["trials"] == result["depths"]["1"]["trials"] == result["depths"]["2"]["trials"] == 6
    assert result["widths"] == result["depths"]["2"]["widths"] != result["depths"]["1"]["widths"]
    assert "depth 1: " in shown


def test_the_plan_says_what_was_measured_here_beside_the_documented_sweep(monkeypatch):
    from crystal.sweeps import transfer

    monkeypatch.setattr(transfer, "matmul_rate", lambda dtype: 2e11)
    monkeypatch.setattr(tuning, "processor", lambda: "A Processor 9000")
    monkeypatch.setattr(transfer.os, "cpu_count", lambda: 2)
    plan = transfer.plan_only(load_sweep("transfer-mup"), 2)
    documented = json.loads((DOCS / "transfer-mup" / "transfer.json").read_text())
    seconds = documented["trial_cpu_seconds"]
    assert plan["reference"]["flops_per_second"] == pytest.approx(plan["flops"] / seconds, rel=0.01)
    assert plan["reference"]["hours"] == pytest.approx(seconds / 2 / 3600, rel=0.01)
    shown = plan_text(plan)
    assert "200 GFLOP/s that a bf16 product reached just now on 1 thread of A Processor 9000" in shown
    assert "reference: 0.526 hours" in shown or "reference: 0.53 hours" in shown


def test_more_workers_take_less_time_on_paper(sweep_file, monkeypatch):
    from crystal.sweeps import transfer

    monkeypatch.setattr(transfer, "matmul_rate", lambda dtype: 1e9)
    monkeypatch.setattr(transfer.os, "cpu_count", lambda: 2)
    hours = [transfer.plan_only(load(sweep_file, "steps=50000"), n)["hours_estimated"] for n in (1, 2, 4)]
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


def test_auto_is_the_faster_dtype_where_a_sweep_begins_and_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_tunings", {1: tuning.Tuning({}, "fp32", {})})
    assert load_sweep("transfer-mup", (), tmp_path).dtype == "fp32"
    (tmp_path / "sweep.json").write_text('{"dtype": "bf16"}')
    assert load_sweep("transfer-mup", (), tmp_path).dtype == "bf16"
    assert load_sweep("transfer-mup", ("dtype=fp32",), tmp_path).dtype == "fp32"

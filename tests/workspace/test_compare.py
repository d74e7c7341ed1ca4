"""`crystal compare`: losses at common tokens, differing keys, and curves over one another."""

import json
import math

import pytest
from recorded import TOKENS, record_run

from crystal.cli.runs import compare_text
from crystal.workspace.compare import compare, differing
from crystal.workspace.compare_plots import smoothed


@pytest.fixture
def runs(tmp_path):
    """Two runs of different length, rate and seed."""
    first = record_run(tmp_path / "a" / "demo", steps=60)
    second = record_run(
        tmp_path / "b" / "demo", "train.seed=7", "optimizer.eps=1e-7", steps=45, loss=lambda step: 9 / (1 + step) + 1
    )
    return first, second


def compared(crystal, *words):
    code, out, err = crystal("compare", *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_losses_stand_side_by_side_at_common_tokens(runs, crystal):
    got = compared(crystal, *runs)
    a, b = got["runs"]
    assert (a["label"], b["label"]) == ("a/demo", "b/demo")
    assert (a["step"], a["tokens"], b["step"]) == (60, 60 * TOKENS, 45)
    assert a["loss"] == pytest.approx(8 / 61 + 2)
    assert b["val_loss"] == {"english": pytest.approx(9 / 41 + 1.1), "python": pytest.approx(9 / 41 + 1.2)}
    assert got["at"][-1]["tokens"] == 45 * TOKENS, "no further than the shorter run"
    before = 0
    for row in got["at"]:
        last = row["step"]["a/demo"]
        assert row["step"] == {"a/demo": last, "b/demo": last}
        assert row["tokens"] // TOKENS == last
        steps = range(before + 1, last + 1)
        assert row["loss"]["a/demo"] == pytest.approx(sum(8 / (1 + s) + 2 for s in steps) / len(steps))
        before = last
    assert [row["step"]["a/demo"] for row in got["validation"]] == [0, 20, 40]
    assert got["validation"][1]["val_loss"]["b/demo"]["python"] == pytest.approx(9 / 21 + 1.2)


def test_keys_that_differ_are_named_with_each_value(runs, crystal):
    assert compared(crystal, *runs)["differs"] == {
        "train.seed": {"a/demo": 1, "b/demo": 7},
        "optimizer.eps": {"a/demo": 1e-9, "b/demo": 1e-7},
    }


def test_stages_are_compared_by_name_and_a_missing_key_has_no_value():
    def config(*stages):
        return {"curriculum": {"stages": [{"name": n, "steps": s} for n, s in stages]}}

    assert differing({"x": config(("a", 1), ("b", 2)), "y": config(("b", 3))}) == {
        "curriculum.stages.a.name": {"x": "a"},
        "curriculum.stages.a.steps": {"x": 1},
        "curriculum.stages.b.steps": {"x": 2, "y": 3},
    }
    assert differing({"x": {"a": {"b": [1, 2]}}, "y": {"a": {"b": [1, 2]}}}) == {}
    assert differing({"x": {"a": True}, "y": {"a": {}}}) == {"a": {"x": True, "y": {}}}


def test_runs_of_other_batches_meet_at_tokens_not_at_steps(tmp_path):
    first = record_run(tmp_path / "small", steps=64, loss=float)
    wide = record_run(tmp_path / "wide", "curriculum.global_batch_size=32", steps=64, loss=float)
    lines = (wide / "metrics.jsonl").read_text().splitlines()
    doubled = [r | ({"tokens": 2 * r["tokens"]} if "tokens" in r else {}) for r in map(json.loads, lines)]
    (wide / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in doubled))
    result = compare([str(first), str(wide)])
    assert result["at"][-1]["step"] == {"small": 64, "wide": 32}
    assert [row["step"] for row in result["validation"]] == [{"small": 0, "wide": 0}, {"small": 40, "wide": 20}]
    assert "curriculum.global_batch_size: A 16, B 32" in compare_text(result)


def test_runs_without_records_are_compared_by_their_keys(runs, tmp_path, crystal):
    empty = record_run(tmp_path / "empty", "train.seed=3", steps=0)
    (empty / "metrics.jsonl").write_text("")
    torn = record_run(tmp_path / "torn", steps=5)
    (torn / "config.yaml").write_text("")
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    got = compared(crystal, runs[0], empty, torn, "--out", tmp_path / "c.png")
    assert [(run["step"], run["loss"]) for run in got["runs"]][1] == (None, None)
    assert got["runs"][2]["step"] == 5
    assert got["at"][-1]["tokens"] == 5 * TOKENS
    assert set(got["at"][-1]["loss"]) == {"demo", "torn"}
    assert got["differs"]["train.seed"] == {"demo": 1, "empty": 3}
    text = crystal("compare", empty, torn)[1]
    assert text.startswith(
        "A  empty  no steps recorded\nB  torn   step 5, 20480 tokens, loss 3.3333, config.yaml cannot"
    )
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "no key differs" in text


def test_steps_made_again_after_a_kill_count_once(runs, crystal):
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 60, "loss": 5.0, "tokens": 60 * TOKENS}) + "\n")
        file.write(json.dumps({"step": 59, "loss": math.nan, "tokens": 59 * TOKENS}) + "\n")
    assert compared(crystal, *runs)["runs"][0]["loss"] == 5.0


def test_mistakes_are_one_line(runs, crystal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").mkdir()
    for words, message in (
        ((runs[0],), "expected two runs or more to compare, got 1"),
        ((runs[0], runs[0] / ".." / "demo"), f"{runs[0]}: the same run is given twice"),
        ((runs[0], "plain"), "plain: expected a run directory, there is no config.yaml in it"),
        ((runs[0], "nowhere"), "nowhere: no such file"),
        ((runs[0], "demo"), "demo: its run directory runs/demo is not there; crystal train makes it"),
        ((*runs, "--source", "rust"), "--source: expected one of english, python, got rust"),
        ((*runs, "--out", "c.jpg"), "c.jpg: expected a picture's name that ends in .png, .pdf or .svg"),
        ((*runs, "--out", "no/c.png"), "no/c.png: the picture cannot be written: No such file or directory"),
    ):
        assert crystal("compare", *words) == (2, "", f"crystal: {message}\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "plain"], "nothing is left behind"


def test_a_run_file_stands_for_its_run_directory(runs, crystal, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    record_run(tmp_path / "runs" / "demo", steps=30)
    assert [r["path"] for r in compared(crystal, "demo", runs[1])["runs"]] == ["runs/demo", str(runs[1])]


@pytest.mark.parametrize("form", ["png", "svg", "pdf"])
def test_the_picture_is_what_its_name_says(runs, crystal, tmp_path, form):
    out = tmp_path / f"curves.{form}"
    assert compared(crystal, *runs, "--out", out)["out"] == str(out)
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[form]
    assert out.read_bytes().startswith(start)
    assert [p.name for p in tmp_path.iterdir() if "curves" in p.name] == [out.name]


def drawn(runs, monkeypatch, tmp_path, source=None):
    """The figure of a comparison."""
    figures = []
    monkeypatch.setattr("crystal.workspace.compare_plots.save", lambda make, out: figures.append(make()))
    compare([str(run) for run in runs], tmp_path / "c.png", source)
    return figures[0]


def test_curves_lie_over_one_another_against_tokens(runs, monkeypatch, tmp_path):
    figure = drawn(runs, monkeypatch, tmp_path)
    above, english, python = figure.axes
    raw, line, *_ = above.lines
    assert list(raw.get_xdata())[-1] == 60 * TOKENS
    assert raw.get_alpha() < 0.5 < line.get_linewidth()
    assert [axes.get_title(loc="left") for axes in (english, python)] == ["validation, english", "validation, python"]
    assert len(english.lines) == 2
    assert list(english.lines[0].get_xdata()) == [0, 20 * TOKENS, 40 * TOKENS, 60 * TOKENS]
    low, high = english.get_ylim()
    assert all(low < y < high for y in english.lines[0].get_ydata()), "step 0 too"
    assert [text.get_text() for text in figure.legends[0].texts] == ["a/demo", "b/demo"]
    assert len({line.get_color() for line in english.lines}) == 2


def test_one_source_may_be_chosen(runs, monkeypatch, tmp_path):
    figure = drawn(runs, monkeypatch, tmp_path, "python")
    assert [axes.get_title(loc="left") for axes in figure.axes][1:] == ["validation, python"]


def test_names_are_drawn_as_they_stand(monkeypatch, tmp_path):
    names = ["_hidden", "a$b$", r"$\frac"]
    runs = [record_run(tmp_path / name, steps=4) for name in names]
    figure = drawn(runs, monkeypatch, tmp_path)
    assert [text.get_text().strip("\u200b") for text in figure.legends[0].texts] == names
    monkeypatch.undo()
    compare([str(run) for run in runs], tmp_path / "drawn.png")  # a formula would fail here


def test_smoothing_keeps_constants_and_means():
    assert smoothed([2.0] * 500) == pytest.approx([2.0] * 500)
    assert smoothed([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0], "too few to smooth"
    noisy = [math.sin(i * 2.1) for i in range(800)]
    assert max(map(abs, smoothed(noisy)[50:])) < 0.2
    assert smoothed([]) == []

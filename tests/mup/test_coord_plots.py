"""The pictures of a coordinate check: what they name, and where their lines and guides lie."""

import math
import warnings
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crystal.checks.coord_check import Asked, check_beside, write
from crystal.cli.coord_check import coord_check_text
from crystal.mup.coord_panels import bundles, caption, kind_of, limits, panels, quantities, spread, worst_first
from crystal.mup.coord_plots import draw, figure
from crystal.mup.coord_svg import svg
from tests.mup.drawn_checks import NAMES, made_check

BROKEN = {"blocks.0.attn.q": 1.0, "blocks.1.mlp.down": 0.5}


def axes_of(*checks):
    drawn = figure(checks)
    return [drawn.axes[i :: len(checks)] for i in range(len(checks))]


def test_every_axis_says_which_statistic_it_shows():
    (column,) = axes_of(made_check({}))
    assert [ax.get_ylabel() for ax in column] == [
        "rms of weights, at init", "rms of first update", "mean |output|, step 1", "mean |output|, step 4",
    ]  # fmt: skip
    assert column[-1].get_xlabel() == "width"


def test_what_fails_lies_on_top_in_a_color_of_its_own():
    for ax in axes_of(made_check(BROKEN))[0]:
        failing = [line for line in ax.lines if line.get_marker() == "x"]
        others = [line for line in ax.lines if line.get_marker() == "."]
        assert len(failing) == 2
        assert min(line.zorder for line in failing) > max(line.zorder for line in others)
        assert {line.get_color() for line in failing}.isdisjoint(line.get_color() for line in others)


def test_the_expected_slope_is_dashed_from_where_the_worst_line_begins():
    check = made_check(BROKEN)
    panel = panels(check, ["init"])[0]
    (ax, *_) = axes_of(check)[0]
    (guide,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert guide.get_ydata()[0] == guide.get_ydata()[1] == pytest.approx(panel.lines[-1].values[0])
    assert panel.lines[-1].name == "blocks.0.attn.q.weight"


def test_the_caption_says_how_it_was_measured():
    said = caption(made_check({}))
    for fact in ("widths 64, 128, 256", "2 seeds", "4 steps", "lr 0.00125", "fp32", "4 x 64"):
        assert fact in said
    assert figure([made_check({})]).legends[0].get_title().get_text().split() == said.split()


def test_the_check_that_was_asked_for_comes_first_and_the_other_is_called_a_comparison():
    sp, mup = made_check(BROKEN, "amber, sp"), made_check({}, "amber, mup")
    left, right = axes_of(sp, mup)
    assert "amber, sp: FAIL" in [t.get_text() for t in left[0].texts]
    assert "amber, mup: PASS (for comparison)" in [t.get_text() for t in right[0].texts]


@given(
    st.dictionaries(st.sampled_from(NAMES), st.floats(-2, 2), max_size=10),
    st.integers(3, 20),
    st.integers(8, 40),
)
@settings(max_examples=25)
def test_every_line_is_named_or_counted_and_labels_fit(powers, most, room):
    panel = panels(made_check(powers), ["size t=4"])[0]
    low, high = limits([panel], 4)
    assert all(low < v < high for line in panel.lines for v in line.values)
    octaves = math.log2(high / low)
    found = bundles(panel, octaves, most, room)
    assert 1 <= len(found) <= most
    assert all(len(bundle.label) <= room for bundle in found)
    assert {b.verdict for b in found} == {line.row.verdict for line in panel.lines}
    places = spread([b.end for b in found], octaves / most, math.log2(low))
    gaps = [a - b for a, b in pairwise(places)]
    assert all(gap >= octaves / most * 0.999 for gap in gaps)
    assert min(places) >= math.log2(low) - 1e-9


def test_lines_that_run_together_share_a_label_with_their_names_in_it():
    check = made_check({})
    for m in check.measured:
        m.values.update({(name, "size", 4): 1.0 for name in NAMES})
    (bundle,) = bundles(panels(check, ["size t=4"])[0], 8, 12, 60)
    assert bundle.label == "attn.{k,out,q}, mlp.{down,up}"
    check.measured[0].values["blocks.1.attn.k", "size", 4] = 200.0
    labels = [b.label for b in bundles(panels(check, ["size t=4"])[0], 8, 12, 60)]
    assert sorted(labels) == ["0.attn.k, attn.{out,q}, mlp.{down,up}", "1.attn.k"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("embed.weight", "embedding"),
        ("blocks.1.attn.q.weight", "attention"),
        ("blocks.1.attn_norm", "norms and residual stream"),
        ("blocks.last.mlp.down", "mlp"),
        ("blocks.0", "norms and residual stream"),
        ("blocks.last", "norms and residual stream"),
        ("head.weight", "output"),
        ("output", "output"),
        ("model.layers.3.self_attn.q_proj.weight", "attention"),
        ("transformer.wte.weight", "embedding"),
        ("conv1", "other"),
    ],
)
def test_kinds_of_lines(name, kind):
    assert kind_of(name) == kind


def test_what_has_no_place_on_a_logarithmic_axis_is_named():
    check = made_check({}, values={("blocks.0.attn.q.weight", size): 0.0 for size in (64, 128, 256)})
    assert panels(check, ["update"])[0].left_out == ("blocks.0.attn.q.weight",)
    ax = axes_of(check)[0][1]
    assert "not drawn: blocks.0.attn.q.weight" in ax.get_title(loc="left")
    assert "1 of 10 fail" in ax.get_title(loc="left")


def test_names_are_drawn_as_they_stand(tmp_path):
    names = ["a$b$_{x", "<script>alert(1)</script>", "日本", "_hidden", "x" * 300, "\\frac{"]
    check = made_check(dict.fromkeys(names, 1.0), label=" ".join(names[:4]))
    with warnings.catch_warnings(action="error"):
        draw([check], tmp_path / "check.png")
    root = ET.fromstring(svg(check, panels(check, ["init"])[0], (0.5, 4096)))  # noqa: S314  ours, and well-formed
    titles = [title.text for title in root.iter("title")]
    for name in names:
        assert f"{name}.weight: slope +1.00, expected 0, FAIL" in titles


def test_formats(tmp_path):
    files = write([made_check(BROKEN)], [made_check({}, "other")], tmp_path, "check", ("png", "pdf", "svg"))
    assert [f.name for f in files] == [f"coord-check.{x}" for x in ("json", "png", "pdf", "svg", "html")]
    content = {f.suffix: f.read_bytes() for f in files}
    assert [content[s][:5] for s in (".png", ".pdf", ".svg")] == [b"\x89PNG\r", b"%PDF-", b"<?xml"]
    assert b"/Type3" not in content[".pdf"], "journals ask for TrueType"


def test_the_text_says_where_all_failures_are(tmp_path):
    check = made_check(dict.fromkeys(NAMES, 1.0))
    assert "all 40 failing rows: --json, or --out DIR for a page" in coord_check_text([check])
    assert f"all 40 failing rows: {tmp_path}/coord-check.html" in coord_check_text([check], tmp_path)
    assert "rows: --json" not in coord_check_text([made_check({})])


def test_rows_are_sorted_from_the_worst():
    rows = worst_first(made_check(BROKEN).rows)
    assert [row.verdict for row in rows[:8]] == ["FAIL"] * 8
    assert {row.name.removesuffix(".weight") for row in rows[:4]} == {"blocks.0.attn.q"}
    assert {row.verdict for row in rows[8:]} == {"PASS"}


@pytest.mark.parametrize(
    ("model", "given", "over_width", "over_depth"),
    [
        ("amber", None, "mup", "completep"),  # declares sp
        ("amber", "sp", "mup", "completep"),
        ("amber", "mup", "sp", "completep"),
        ("amber", "completep", "sp", "sp"),
        ("crystalcoder", None, "sp", "completep"),
        ("crystalcoder", "sp", "mup", "completep"),
        ("demo", None, "sp", "completep"),  # a run file
        ("demo", "sp", "mup", "completep"),
    ],
)
def test_what_stands_beside_a_check(monkeypatch, model, given, over_width, over_depth):
    monkeypatch.setattr(
        "crystal.checks.coord_check.coord_check", lambda task, sizes, **how: made_check({}, how["label"])
    )
    assert [c.label for c in check_beside(model, Asked(), given)] == [f"{model}, {over_width}"]
    assert [c.label for c in check_beside(model, Asked(depths=(2, 4, 8)), given)] == [f"{model}, {over_depth}"]
    both = check_beside(model, Asked(widths=(32, 64, 96), depths=(2, 4, 8)), given)
    assert [c.label for c in both] == [f"{model}, {over_width}", f"{model}, {over_depth}"]


def test_a_check_over_depth_is_drawn_over_depth():
    check = made_check(BROKEN, along="depth")
    assert axes_of(check)[0][-1].get_xlabel() == "depth"
    assert "depths 64" in caption(check)
    assert quantities(check) == ["init", "update", "size t=1", "size t=4"]

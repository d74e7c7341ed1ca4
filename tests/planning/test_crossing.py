"""Where tensor and pipeline parallelism begin to pay, and docs/planning.md's table of it."""

import json
from pathlib import Path

import pytest

from crystal.planning.crossing import WITHIN, crossing
from crystal.planning.device import load_device
from crystal.planning.layouts import Work
from crystal.zoo.config import model_config

DOCS = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")


def test_the_table_of_amber_is_the_docs(crystal):
    words = "plan amber-7b --devices 224 --with devices_per_node=4 --crossing".split()
    code, out, err = crystal(*words)
    assert (code, err) == (0, "")
    assert f"$ crystal {' '.join(words)}" in DOCS
    table = out[out.index("between nodes  fastest") :]
    assert table.count("\n") == 7
    assert table in DOCS


def test_below_the_bandwidth_of_equal_speed_splitting_is_faster_and_above_it_slower():
    work = Work(model_config("amber-7b"), 2048, 560, 1)
    device = load_device("a100-80gb", ["devices_per_node=4", "inter_node_gb_per_s=4"])
    points, equal = crossing(work, 56, device)
    assert [p.inter_node_gb_per_s for p in points] == [4, 2, 1, 0.5, 0.25]
    assert points[0].gain < 0 < points[-1].gain
    for p in points:
        assert p.sharded.layout.tp * p.sharded.layout.pp == 1 < p.split.layout.tp * p.split.layout.pp
        assert p.gain == pytest.approx(p.sharded.step_seconds / p.split.step_seconds - 1)
    above, below = (
        load_device("a100-80gb", ["devices_per_node=4", f"inter_node_gb_per_s={equal * factor}"])
        for factor in (WITHIN, 1 / WITHIN)
    )
    assert crossing(work, 56, above)[0][0].gain <= 0 <= crossing(work, 56, below)[0][0].gain


def test_where_the_network_does_not_matter_one_kind_is_ahead_throughout(crystal):
    words = "plan amber-w256-l8 --devices 4 --crossing".split()  # in one node
    code, out, err = crystal(*words, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)["crossing"]
    assert found["equal_gb_per_s"] is None
    assert len({p["gain"] for p in found["points"]}) == 1
    code, out, err = crystal(*words)
    assert f"{'with' if found['points'][0]['gain'] > 0 else 'without'} tp or pp it is faster throughout" in out


def test_one_kind_alone_is_nothing_to_compare(crystal):
    code, out, err = crystal(*"plan demo --devices 1 --crossing".split())
    assert (code, out) == (2, "")
    expected = "expected fitting layouts of 1 devices with tp or pp and without, none has them"
    assert err == f"crystal: --crossing: {expected}\n"
    assert json.loads(crystal(*"plan demo --devices 1 --json".split())[1])["crossing"] is None

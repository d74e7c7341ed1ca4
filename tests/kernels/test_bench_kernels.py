"""`crystal bench kernels`: its arithmetic with a clock that is known, what it refuses, what it counts without a GPU."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

from crystal.cli.main import app
from crystal.errors import ConfigError
from crystal.kernels.bench import measured, peers, tables
from crystal.kernels.bench.measured import Case, CopySpeed, Deviation, rows
from crystal.kernels.bench.timing import Spread, spread
from crystal.kernels.bench.verified import worst
from crystal.kernels.catalog import OPERATORS
from crystal.kernels.proof.accuracy import Error

NAMED = {operator.name: operator for operator in OPERATORS}


class KnownTimer:
    """Every call is made, once, and said to take this long; a graph takes half."""

    def __init__(self, seconds: float, graph: bool = True) -> None:
        self.seconds, self.graph, self.calls = seconds, graph, 0

    def samples(self, call) -> list[float]:
        call()
        self.calls += 1
        return [self.seconds * k for k in (0.8, 0.9, 1.0, 1.5, 3.0)]

    def graph_samples(self, call) -> list[float] | None:
        return [self.seconds / 2] if self.graph else None

    def host_seconds(self, call) -> float:
        return self.seconds / 4

    def peak_bytes(self, call) -> int:
        return 4096


def test_a_spread_is_the_median_and_the_percentiles_around_it():
    assert spread([5.0]) == Spread(5.0, 5.0, 5.0, 1)
    found = spread([float(k) for k in range(101)])
    assert (found.median, found.p20, found.p80, found.count) == (50.0, 20.0, 80.0, 101)
    assert spread([1.0, 2.0, 300.0]).median == 2.0


@pytest.mark.parametrize(("op", "directions"), [
    ("layer_norm", ["forward", "backward", "both"]), ("add_rms_norm", ["forward", "backward", "both"]),
    ("rope_half_packed_inplace", ["forward"]), ("cross_entropy_full", ["forward", "backward", "both"]),
])  # fmt: skip
def test_speed_is_compulsory_bytes_over_the_median_and_percent_is_of_a_copy_of_as_many(op, directions):
    timer = KnownTimer(2e-6)
    copy = CopySpeed(KnownTimer(1e-6), "cpu")
    found = list(rows(timer, "cpu", copy, (op,), ("small",), ("torch",)))
    assert [row["direction"] for row in found] == directions
    shape, count = NAMED[op].shapes["small"], NAMED[op].compulsory_bytes
    for row in found:
        parts = ("forward", "backward") if row["direction"] == "both" else (row["direction"],)
        least = sum(count(shape, torch.bfloat16, part) for part in parts)
        assert row["minimum_bytes"] == least
        assert math.isclose(row["gb_s"], least / 2e-6 / 1e9)
        assert math.isclose(row["copy_percent"], 50.0, rel_tol=1 / least)  # the copy took half as long
        assert (row["seconds"], row["graph_seconds"], row["host_seconds"]) == (2e-6, 1e-6, 5e-7)
        assert math.isclose(row["p20"], 1.76e-6)
        assert math.isclose(row["p80"], 3.6e-6)
        assert (row["op"], row["provider"], row["shape"], row["dtype"]) == (op, "torch", "small", "bfloat16")
        assert row["error"] == row["torch_error"] > 0
    assert timer.calls == len(directions)


def test_a_copy_is_timed_once_for_each_number_of_bytes():
    timer = KnownTimer(1e-3)
    speed = CopySpeed(timer, "cpu")
    assert speed(1000) == speed(1000) == 1000 / 1e-3
    assert speed(2000) == 2000 / 1e-3
    assert timer.calls == 2


def test_a_call_that_no_graph_can_hold_has_no_graph_time():
    copy = CopySpeed(KnownTimer(1e-6), "cpu")
    (row,) = rows(KnownTimer(1e-6, graph=False), "cpu", copy, ("rope_half_packed_inplace",), ("small",), ("torch",))
    assert row["graph_seconds"] is None
    assert "  -  " in tables.measured_table([row])


def test_a_provider_that_is_wrong_is_said_to_be_and_not_timed(monkeypatch):
    wrong = {"rms_norm": lambda x, weight, eps: x * weight}
    monkeypatch.setattr(measured, "candidates", lambda operator, names: [("liger", wrong[operator.name])])
    timer = KnownTimer(1e-6)
    (row,) = rows(timer, "cpu", CopySpeed(timer, "cpu"), ("rms_norm",), ("small",))
    assert row["failed"].startswith("ArithmeticError: ")
    assert row["error"] > 0.1
    assert timer.calls == 0
    assert row["failed"] in tables.measured_table([row])


def test_a_provider_that_raises_has_a_row_with_its_words(monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("at most 65,536 columns")

    monkeypatch.setattr(measured, "candidates", lambda operator, names: [("liger", refuse)])
    (row,) = rows(KnownTimer(1), "cpu", CopySpeed(KnownTimer(1), "cpu"), ("rms_norm",), ("small",))
    assert row["failed"] == "RuntimeError: at most 65,536 columns"


def test_a_nan_is_too_large_and_twice_torchs_error_is_not():
    assert Deviation("out0", float("nan"), 1.0).too_large(torch.bfloat16)
    assert not Deviation("out0", 2e-3, 1e-3).too_large(torch.float32)
    assert Deviation("out0", 2.1e-3, 1e-3).too_large(torch.float32)


@pytest.mark.parametrize("provider", ["liger", "flash-attn"])
def test_a_peers_rope_comes_in_our_form(provider):
    operator = NAMED["rope_half_packed_inplace"]
    case = Case(operator, operator.shapes["small"], torch.float32, "cpu")
    heads, kv_heads = case.arguments[-1], operator.shapes["small"]["kv_heads"]

    def as_the_peer(*arguments):
        turned = operator.reference(*arguments)[:, :, :heads]
        q, k = turned.split((heads - kv_heads, kv_heads), 2)
        return (q.transpose(1, 2), k.transpose(1, 2)) if provider == "liger" else turned

    assert case.deviation(provider, as_the_peer).error < 1e-6


def test_the_worst_output_is_named_and_judged_by_torchs_error():
    good, bad = Error("out0", 1e-3, 1e-3, 0, 0), Error("grad1", 3e-3, 2e-3, 0, 0)
    record = worst("layer_norm", "small", torch.bfloat16, [good, bad], 1.01)
    assert (record["output"], record["direction"], record["ratio"], record["passed"]) == (
        "grad1",
        "backward",
        1.5,
        False,
    )
    assert worst("layer_norm", "small", torch.bfloat16, [good, bad], 2.0)["passed"]
    assert not worst("layer_norm", "small", torch.bfloat16, [Error("out0", float("nan"), 1, 0, 0)], 2.0)["passed"]


def test_the_picture_has_a_bar_per_provider(tmp_path):
    copy = CopySpeed(KnownTimer(1e-6), "cpu")
    found = list(rows(KnownTimer(1e-6), "cpu", copy, ("layer_norm", "swiglu"), ("small",), ("torch", "ours")))
    tables.draw(found, tmp_path / "kernels.png", "a clock that is known")
    assert (tmp_path / "kernels.png").read_bytes()[:4] == b"\x89PNG"


def crystal(*words: str):
    return CliRunner().invoke(app, ["bench", "kernels", *words])


def test_compiled_rows_are_counts_with_measured_false(tmp_path):
    done = crystal(
        "--offline", "--arch", "sm_90", "--ops", "rope_half_packed_inplace", "--json", "--out", str(tmp_path)
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["measured"] is False
    assert result["device"] == "H100/H200 (sm_90)"
    ours = [row for row in result["rows"] if row["provider"] == "ours"]
    assert {row["shape"] for row in ours} == {"crystalcoder-7b", "amber-7b"}
    for row in ours:
        assert (row["launches"], row["spills"], row["width"], row["dtype"]) == (1, 0, 16, "bfloat16")
        assert row["bytes"] == row["minimum_bytes"]
        assert not any("second" in key or key.endswith(("_us", "_ms", "_s")) for key in row)
    assert json.loads((tmp_path / "kernels.json").read_text()) == result


def test_errors_on_the_cpu_are_of_the_kernels_themselves(monkeypatch):
    from crystal.kernels.bench import verified

    monkeypatch.setitem(verified.SQUARE, "norm", {"rows": 33, "width": 4096})
    done = crystal("--offline", "--verify", "--ops", "rms_norm", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["verdict"] == "PASS"
    assert [row["dtype"] for row in result["rows"]] == ["float32", "bfloat16", "float16"]

    monkeypatch.setattr(verified, "LAST_DIGIT", -1.0)
    assert crystal("--offline", "--verify", "--ops", "rms_norm").exit_code == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("words", [[], ["--verify"]])
def test_without_a_gpu_nothing_is_timed_and_the_line_says_what_can_be_done(words):
    done = crystal(*words)
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception).startswith("no CUDA GPU here")
    assert "--offline" in str(done.exception)


@pytest.mark.parametrize(("words", "line"), [
    (["--offline", "--ops", "gelu"], "--ops: 'gelu' is none of layer_norm"),
    (["--offline", "--shapes", "large"], "--shapes: 'large' is none of crystalcoder-7b"),
    (["--bars", "--verify"], "--bars: takes --arch and --out alone"),
    (["--offline", "--out", "/proc/none"], "--out: /proc/none cannot be written"),
])  # fmt: skip
def test_a_flag_that_makes_no_sense_is_one_line(words, line):
    done = crystal(*words)
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception).startswith(line)


def test_every_peer_takes_what_the_catalog_hands_it():
    assert peers.torch_functions().keys() == NAMED.keys()


@pytest.mark.proof
def test_the_ten_bars_hold(capsys):
    done = crystal("--bars", "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert [bar["number"] for bar in result["bars"]] == list(range(1, 11))
    assert [bar for bar in result["bars"] if bar["verdict"] != "PASS"] == []
    assert done.exit_code == 0

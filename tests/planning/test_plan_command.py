"""`crystal plan`, as it is typed: the published run, a run's own layout, mistakes in one line."""

import json
from pathlib import Path

import pytest

from crystal.backends.config import Layout
from crystal.errors import ConfigError
from crystal.planning.device import Device, load_device
from crystal.planning.layouts import Work, candidate
from crystal.planning.report import bookkeeping, plan_run, run_or_rung
from crystal.run import load_run
from crystal.zoo.build import parameter_count
from crystal.zoo.config import model_config

DOCS = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")


def test_ambers_published_rate_is_33_7_percent_and_25_days(crystal):
    words = "plan amber-7b --devices 224 --device a100-80gb --with devices_per_node=4 --tokens-per-second 582400 --json"
    code, out, err = crystal(*words.split())
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert (result["rate"], result["device"]["devices_per_node"]) == ("given", 4)
    assert result["mfu_6n"] == pytest.approx(0.337, abs=5e-4)  # 6 x 6,738,415,616 x 582,400 / (224 x 312e12)
    assert result["mfu"] == pytest.approx(0.344, abs=5e-4)  # without the input embedding, with causal attention
    assert result["step_seconds"] == pytest.approx(7.877, abs=5e-4)  # 2240 x 2048 / 582,400
    assert result["days"] == pytest.approx(25.0, abs=0.05)  # 1,258,448,486,400 tokens
    assert result["flops_per_step"] == result["flops_per_token"] * 4_587_520
    assert len(result["layouts"]) == 10


def test_the_docs_show_what_is_printed(crystal):
    words = "plan amber-7b --devices 224 --with devices_per_node=4 --tokens-per-second 582400 --top 3".split()
    code, out, err = crystal(*words)
    assert (code, err) == (0, "")
    disk = out.index("torchrun --shutdown-timeout")  # which differs from disk to disk
    assert f"$ crystal {' '.join(words)}\n{out[:disk]}" in DOCS


def test_an_mfu_is_turned_into_the_rate_it_means():
    work = Work(model_config("amber-7b"), 2048, 2240, 274_320)
    rate = 0.337 * 224 * 312e12 / (6 * 6_738_415_616)
    assert bookkeeping(work, 224, load_device("a100-80gb"), rate)["mfu_6n"] == pytest.approx(0.337)
    assert rate == pytest.approx(582_400, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--devices 1", " GB of 72.0 usable; 2 of them would do"),
        ("--device a100-80g", "did you mean 'a100-80gb'?"),
        ("--with memory=80", "memory=80: unknown key; did you mean 'memory_gb'?"),
        ("--mfu 0.4 --tokens-per-second 5", "expected one of them"),
        ("--mfu 40", "--mfu: expected a share of 1 above 0, got 40"),
        ("--tokens-per-second 0", "--tokens-per-second: expected a rate above 0, got 0"),
        ("--tokens-per-second 1e12", "expected less than 61,736, the peak of 8 devices, got 1e+12"),
        ("backend.name=cuda backend.dtype=fp32", "backend.dtype=fp32: expected bf16"),
    ],
)
def test_a_mistake_is_one_line(crystal, words, line):
    code, out, err = crystal("plan", "amber-7b", *words.split())
    assert (code, out) == (2, "")
    assert line in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("key", [key for key in Device.model_fields if key != "name"])
@pytest.mark.parametrize("value", ["1e308", "1e300", "5e-324", "-0.0", "1e-6", "1", "0.999", "1000000", "1e9"])
def test_a_device_of_any_numbers_is_planned_for_or_refused_in_a_line(key, value):
    """What is taken gives numbers throughout, finite ones."""
    work = Work(model_config("crystalcoder-w64-l2"), 64, 16, 10)
    try:
        device = load_device("a100-80gb", [f"{key}={value}"])
    except ConfigError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert f"{key}={value}: expected" in refusal
        assert len(refusal) < 200
        return
    for layout in (Layout(dp=16), Layout(tp=2, pp=2, fsdp=2, interleave=1)):
        found = candidate(work, layout, device, 1, "none")
        assert 0 < found.step_seconds < 1e18
        assert all(0 <= seconds < 1e18 for seconds in found.seconds.values())
        assert device.usable_bytes >= 0


def test_a_runs_own_layout_is_what_torchrun_must_wait_for(crystal, monkeypatch, tmp_path):
    monkeypatch.setattr("crystal.planning.report.disk_bytes_per_second", lambda directory: 1e10)
    words = "plan amber-7b --devices 2 backend.name=cuda backend.parallel.pp=2 backend.recompute=block --json".split()
    result = json.loads(crystal(*words, "train.micro_batch_size=1", f"run_dir={tmp_path / 'run'}")[1])
    step, best = result["own"]["step_seconds"], result["layouts"][0]["step_seconds"]
    assert step > best + 10  # or it would not be seen
    assert result["stopping"]["shutdown_timeout"] >= step


def test_a_runs_own_layout_is_reckoned_too(crystal):
    words = "plan amber-7b --devices 224 backend.name=cuda backend.parallel.fsdp=224 backend.recompute=block --top 1"
    code, out, err = crystal(*words.split(), "--json")
    assert (code, err) == (0, "")
    own = json.loads(out)["own"]
    assert (own["fsdp"], own["micro_batch_size"], own["recompute"]) == (224, 10, "block")
    assert own["memory_bytes"] == sum(own["memory"].values())
    assert own["step_seconds"] == pytest.approx(sum(own["seconds"].values()))
    assert list(own["seconds"]) == ["compute", "contention", "tensor", "bubble", "exposed", "optimizer"]
    assert all(0 < t["latency_seconds"] < t["seconds"] and t["calls"] for t in own["traffic"])
    # 8 ranks a node of 224, which save 12 bytes of each weight between them; shards are uneven by a row of each tensor
    assert own["host_bytes_a_node"] == pytest.approx(12 * json.loads(out)["parameters"] / 28, rel=0.03)
    code, out, err = crystal(*words.split())
    assert "the run file's own layout:" in out
    device = load_device("a100-80gb")  # whose inputs are shown
    assert f"TFLOP/s bf16, of which {device.matmul_fraction} reached" in out
    assert f"a step of a ring {device.intra_node_latency_us} us in a node and " in out
    assert f"compute beside them loses {device.contention} of its pace" in out
    assert f"host memory a node, pinned for a checkpoint's copies: {own['host_bytes_a_node'] / 1e9:.3g} GB" in out


def test_devices_that_no_layout_can_use_are_left_out_and_it_is_said(crystal):
    """224 = 7 x 32, and 7 divides neither CrystalCoder's 2,112 rows nor its 32 layers, 32 heads or d_ff."""
    words = "plan crystalcoder-7b --devices 224 --device a100-80gb".split()
    code, out, err = crystal(*words, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert (result["devices"], result["devices_given"]) == (192, 224)
    best = result["layouts"][0]
    assert best["dp"] * best["fsdp"] * best["tp"] * best["pp"] == 192
    code, out, err = crystal(*words)
    assert (code, err) == (0, "")
    assert "32 of 224 devices are left out" in out
    assert "curriculum.global_batch_size=2016 would use all" in out
    code, out, err = crystal(*words, "curriculum.global_batch_size=2016", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["devices"] == 224


@pytest.mark.parametrize(
    ("changes", "each"),
    [
        ("backend.name=cpu", 18),
        ("backend.name=cpu backend.dtype=fp32", 16),
        ("backend.name=cuda", 18),
        ("backend.name=cerebras", 16),
        ("backend.name=cerebras backend.device=csx", 18),
        ("backend.name=cerebras backend.device=csx backend.dtype=cbfloat16", 18),
    ],
)
def test_a_dry_run_tells_the_memory_of_its_own_backend(crystal, changes, each):
    code, out, err = crystal("train", "demo", *changes.split(), "--dry-run", "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert (result["memory_bytes"], result["disk_bytes"]) == (each * result["parameters"], 0)


def test_a_rung_is_planned_under_its_familys_published_curriculum():
    run = run_or_rung("crystalcoder-w1024-l16", ["curriculum.global_batch_size=256"])
    assert run.config.model == model_config("crystalcoder-w1024-l16")
    assert run.config.name == "crystalcoder-w1024-l16"
    assert run.config.curriculum == load_run("crystalcoder-7b", ["curriculum.global_batch_size=256"]).config.curriculum
    assert plan_run(run, 8, "a100-80gb")["parameters"] == parameter_count(run.config.model)
    with pytest.raises(ConfigError, match=r"crystalcodr-w64: no such file"):
        run_or_rung("crystalcodr-w64")

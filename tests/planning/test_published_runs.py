"""Published runs: the planner's arithmetic on their rates, its estimates of them, and docs/planning.md's two tables."""

from pathlib import Path
from typing import NamedTuple

import pytest

from crystal.backends.config import Layout
from crystal.planning.device import load_device
from crystal.planning.layouts import Work, candidate, plan
from crystal.planning.report import layout_text
from crystal.zoo.build import parameter_count
from crystal.zoo.config import ModelConfig, model_config

DOCS = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
AMBER = model_config("amber-7b")
A100, H100 = load_device("a100-80gb"), load_device("h100-80gb")
AMBERS_A100 = load_device("a100-80gb", ["devices_per_node=4"])


def llama(d_model=4096, n_layers=32, n_heads=32, d_ff=11008, **changes):
    shape = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "d_ff": d_ff, "max_seq_len": 8192}
    return ModelConfig(**(AMBER.model_dump(exclude={"mup"}) | shape | changes))


LLAMA_7B, LLAMA_13B = llama(), llama(5120, 40, 40, 13824)
LLAMA_33B, LLAMA_65B = llama(6656, 60, 52, 17920), llama(8192, 80, 64, 22016)
LLAMA_2_70B, LLAMA_3_8B = llama(8192, 80, 64, 28672, n_kv_heads=8), llama(d_ff=14336, n_kv_heads=8, vocab_size=128256)


class Rate(NamedTuple):
    """A published rate. mfu: as published, in per cent; with_attention: whether that counts 12 L d T FLOPs a token."""

    name: str
    parameters: int
    attention: int  # L d T
    peak_tflops: float
    rate: float  # tokens/s a device
    mfu: float | None
    with_attention: bool = False


RATES = [
    Rate("Amber-7B", parameter_count(AMBER), 32 * 4096 * 2048, 312, 582_400 / 224, None),
    Rate("LLaMA-7B", parameter_count(LLAMA_7B), 32 * 4096 * 2048, 312, 1e12 / 82_432 / 3600, None),
    Rate("LLaMA-13B", parameter_count(LLAMA_13B), 40 * 5120 * 2048, 312, 1e12 / 135_168 / 3600, None),
    Rate("LLaMA-65B", parameter_count(LLAMA_65B), 80 * 8192 * 2048, 312, 380, None),
    Rate("MPT-7B, the run", 6_658_859_008, 32 * 4096 * 2048, 312, 1e12 / (440 * 9.5 * 86400), None),
    Rate("MPT-7B, 8 GPUs", 6_658_859_008, 32 * 4096 * 2048, 312, 4641, 64.23, True),
    Rate("Llama 2 7B, fms-fsdp", parameter_count(LLAMA_7B), 32 * 4096 * 4096, 312, 3700, 57, True),
    Rate("Llama 2 13B, torchtitan", parameter_count(LLAMA_13B), 40 * 5120 * 4096, 312, 2162, 61.1, True),
    Rate("Llama 2 70B, torchtitan", parameter_count(LLAMA_2_70B), 80 * 8192 * 4096, 312, 353, 50.5, True),
    Rate("PaLM 540B", 540_350_000_000, 118 * 48 * 256 * 2048, 275, 238_300 / 6144, 45.7),
    Rate("MT-NLG 530B", 530_000_000_000, 105 * 20480 * 2048, 312, 65_430 / 2240, 29.7),
]


@pytest.mark.parametrize("run", RATES, ids=[run.name for run in RATES])
def test_mfu_of_a_published_rate(run):
    peak = run.peak_tflops * 1e12
    weights, attention = 6 * run.parameters * run.rate / peak, 12 * run.attention * run.rate / peak
    published = "" if run.mfu is None else f"{run.mfu:g}%"
    line = f"| {run.name} | {run.rate:,.0f} | {weights:.1%} | {weights + attention:.1%} | {published} |"
    assert line in DOCS
    if run.mfu is not None:
        ours = 100 * (weights + attention * run.with_attention)
        # fms-fsdp gives its rate in hundreds and its MFU in whole per cents
        assert ours == pytest.approx(run.mfu, abs=1.6 if "fms-fsdp" in run.name else 0.15)


class Estimate(NamedTuple):
    """A published rate and the layout it was reached with; no layout: the planner's best for a batch of `rows`."""

    name: str
    model: ModelConfig
    seq_len: int
    device: object
    layout: Layout | None
    rows: int  # of a micro-batch; without a layout, of the batch
    recompute: str
    rate: float  # tokens/s a device


ESTIMATES = [
    Estimate("Amber-7B", AMBER, 2048, AMBERS_A100, Layout(fsdp=224), 10, "block", 582_400 / 224),
    Estimate("LLaMA-7B", LLAMA_7B, 2048, A100, None, 2048, "", 1e12 / 82_432 / 3600),
    Estimate("LLaMA-13B", LLAMA_13B, 2048, A100, None, 2048, "", 1e12 / 135_168 / 3600),
    Estimate("LLaMA-33B", LLAMA_33B, 2048, A100, None, 2048, "", 1.4e12 / 530_432 / 3600),
    Estimate("LLaMA-65B", LLAMA_65B, 2048, A100, None, 2048, "", 380),
    Estimate("Llama 2 7B, fms-fsdp", LLAMA_7B, 4096, A100, Layout(dp=16, fsdp=8), 2, "none", 3700),
    Estimate("Llama 2 70B, fms-fsdp", LLAMA_2_70B, 4096, A100, Layout(fsdp=128), 2, "block", 370),
    Estimate("Llama 2 13B, torchtitan", LLAMA_13B, 4096, A100, Layout(fsdp=64), 2, "none", 2162),
    Estimate("Llama 2 70B, torchtitan", LLAMA_2_70B, 4096, A100, Layout(fsdp=64), 2, "block", 353),
    Estimate("Llama 3.1 8B, torchtitan", LLAMA_3_8B, 8192, H100, Layout(fsdp=128), 2, "attention", 6514),
]


@pytest.mark.parametrize("run", ESTIMATES, ids=[run.name for run in ESTIMATES])
def test_an_estimate_is_within_a_quarter_of_a_published_rate(run):
    devices = 2048 if run.layout is None else run.layout.processes
    work = Work(run.model, run.seq_len, run.rows if run.layout is None else run.rows * devices, 1)
    if run.layout is None:
        best = plan(work, devices, run.device)[0]
    else:
        best = candidate(work, run.layout, run.device, run.rows, run.recompute)
    ours = work.tokens_per_step / best.step_seconds / devices
    how = f"{layout_text(best.layout.model_dump())}, {best.micro_batch_size} x {run.seq_len:,}, {best.recompute}"
    beside = f"{ours:,.0f} | {run.rate:,.0f} | {ours / run.rate - 1:+.0%}"
    assert f"| {run.name} | {how} | {best.memory_bytes / 1e9:.1f} | {beside} |" in DOCS
    assert best.memory_bytes < run.device.memory_gb * 1e9
    assert ours == pytest.approx(run.rate, rel=0.25)

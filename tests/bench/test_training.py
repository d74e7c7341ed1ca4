"""`crystal bench train`: what it reports at a tiny shape, and what it says of peers that are not there."""

import json

import pytest
from typer.testing import CliRunner

from crystal.bench.training import SHAPES, model_of
from crystal.cli.main import app
from crystal.zoo.flops import flops_per_token


def run(*arguments: str):
    return CliRunner().invoke(app, ["bench", "train", "--d-model", "64", "--rounds", "2", "--steps", "1", *arguments])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.proof
def test_trainers_take_turns_and_learn_the_same(dtype):
    done = run("--dtype", dtype, "--peers", "nanogpt", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert set(result["providers"]) == {"crystal", "nanogpt"}
    for provider in result["providers"].values():
        assert provider["tokens_per_second"] > 0
        assert provider["peak_rss_bytes"] > 1 << 26
        assert (provider["dtype"], provider["compiled"]) == (dtype, False)
        assert 3 < provider["loss"] < 6.5  # ln 256 is 5.55
    ours, peer = (result["providers"][name]["tokens_per_second"] for name in ("crystal", "nanogpt"))
    assert result["ratio_to_best_peer"] == pytest.approx(ours / peer)
    assert 0 < result["matmul_peak_fraction"] < 1


def test_a_peer_that_cannot_start_is_named_and_left_out(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ModuleNotFoundError: No module named litgpt' >&2\nexit 1\n")
    python.chmod(0o755)
    done = run("--peers", "litgpt", "--python", f"litgpt={python}", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["not_measured"] == {"litgpt": "ModuleNotFoundError: No module named litgpt"}
    assert result["ratio_to_best_peer"] is None


def test_flops_of_a_step_are_those_of_its_products():
    """The reference shape, by hand: 6.84 M weights in products, 6 layers of causal scores."""
    weights = 6 * (4 * 256**2 + 3 * 256 * 688) + 256 * 8192
    forward = 2 * weights + 6 * 2 * (2 * 256 * 256) / 2  # q k^T and P v, half of them
    a_token = flops_per_token(model_of({"d_model": 256} | SHAPES[256]), 256)
    assert a_token == pytest.approx(3 * forward, rel=1e-3)  # the weights of norms beside it

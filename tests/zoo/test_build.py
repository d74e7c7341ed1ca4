"""Initial weights: drawn in parts, they are torch's own numbers."""

import math

import pytest
import torch
from torch import nn

from crystal.zoo.build import plan_for, truncated_normal_
from crystal.zoo.config import ModelConfig


@pytest.mark.parametrize("numel", [1, 15, 16, 17, 1000, 4095, 4096, 4097, 4111, 4112, 4113, 13001])
def test_truncated_normals_are_those_of_torch_to_the_last_bit(numel):
    for cut in (0.05, 0.146):
        expected = nn.init.trunc_normal_(
            torch.empty(numel), 0.0, 0.073, -cut, cut, generator=torch.Generator().manual_seed(numel)
        )
        found = truncated_normal_(torch.empty(numel), 0.073, cut, torch.Generator().manual_seed(numel), part=1024)
        assert torch.equal(found, expected)
        assert found.abs().max() <= torch.tensor(cut)


def test_truncated_normals_have_the_density_of_a_normal_between_the_cuts():
    x = truncated_normal_(torch.empty(1 << 20), 1.0, 2.0, torch.Generator().manual_seed(0)).double()
    inside = math.erf(2 / math.sqrt(2))
    variance = 1 - 2 * 2 * math.exp(-2) / math.sqrt(2 * math.pi) / inside
    assert x.mean().abs() < 5e-3
    assert x.var().item() == pytest.approx(variance, rel=5e-3)


def test_a_base_narrower_than_a_head_still_has_a_feed_forward_layer():
    mup = {"parametrization": "crystalcoder", "base_d_model": 2}
    shape = {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 1, "vocab_size": 5}
    assert plan_for(ModelConfig(**shape, mup=mup)).width_multiplier == 4

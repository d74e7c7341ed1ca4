"""The parameter plan: published per-tensor numbers, roles, and what survives."""

import copy
import math

import mup
import pytest
import torch
from torch import nn

from crystal.mup.plan import PlanError, make_plan
from crystal.mup.rules import Tuning
from crystal.zoo.build import build, meta_decoder, plan_for
from crystal.zoo.config import ModelConfig, model_config, with_width


class Gpt(nn.Module):
    """The tensors of a GPT-2 style model (learned positions, GELU MLP, tied head) for Cerebras-GPT's numbers."""

    def __init__(self, d_model, d_ff, n_layers, vocab=50257, glu=False):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, d_model), nn.Embedding(2048, d_model)
        self.blocks = nn.ModuleList()
        for _ in range(n_layers):
            block = nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(d_model), "ln_2": nn.LayerNorm(d_model),
                    "q": nn.Linear(d_model, d_model), "k": nn.Linear(d_model, d_model),
                    "v": nn.Linear(d_model, d_model),
                    "attn_out": nn.Linear(d_model, d_model),
                    "fc": nn.Linear(d_model, d_ff), "proj": nn.Linear(d_ff, d_model),
                }
            )  # fmt: skip
            if glu:
                block["gate"] = nn.Linear(d_model, d_ff)
            self.blocks.append(block)
        self.ln_f = nn.LayerNorm(d_model)


def gpt_plan(d_model, n_layers, tuning, d_ff=None, base_ff=1024, glu=False):
    with torch.device("meta"):
        models = [
            Gpt(d, f, n_layers, glu=glu)
            for d, f in ((d_model, d_ff or 4 * d_model), (256, base_ff), (512, 2 * base_ff))
        ]
    return make_plan(
        *models, "crystalcoder", tuning, residual_out=("attn_out.weight", "proj.weight"), n_layers=n_layers
    )


def test_crystalcoder_7b_has_the_published_numbers():
    plan = plan_for(model_config("crystalcoder-7b"), weight_decay=0.1, eps=1e-9)
    embed = plan["embed.weight"]
    assert (embed.init_std, embed.init_cut, embed.lr_multiplier, embed.weight_decay) == (0.073, 0.146, 1.0, 0.1)
    assert embed.forward_multiplier == 14.6
    for name in ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up"):
        row = plan[f"blocks.31.{name}.weight"]
        assert (row.init_std, row.init_cut, row.lr_multiplier, row.weight_decay) == (0.01825, 0.0365, 0.0625, 0.1)
    for name in ("attn.out", "mlp.down"):
        row = plan[f"blocks.0.{name}.weight"]
        assert row.init_std == pytest.approx(0.00228125, rel=1e-12)
        assert row.init_cut == pytest.approx(0.0045625, rel=1e-12)
        assert row.lr_multiplier == 0.0625
    vectors = [row for row in plan.tensors if row.role == "vector"]
    assert len(vectors) == 32 * 11 + 2
    assert all((v.weight_decay, v.lr_multiplier, v.init_std) == (0.0, 1.0, 0.0) for v in vectors)
    assert {row.eps for row in plan.tensors} == {1e-9}
    assert plan.logits_multiplier == pytest.approx(0.13875, rel=1e-12)
    assert {name: len(rows) for name, rows in plan.groups().items()} == {"embedding": 1, "vector": 354, "hidden": 224}


@pytest.mark.parametrize(
    ("d_model", "n_layers", "m", "hidden_std", "out_std", "lr", "logits"),
    [
        (256, 24, 1, 0.08, 0.08 / 48**0.5, 6e-3, 1),
        (768, 10, 3, 0.04619, 0.010328, 2.0e-3, 0.3333),
        (1088, 14, 4.25, 0.03881, 0.007334, 1.412e-3, 0.23529),
        (1536, 18, 6, 0.03266, 0.005443, 1.0e-3, 0.16667),
        (2048, 24, 8, 0.02828, 0.004082, 7.5e-4, 0.125),
        (2560, 32, 10, 0.02530, 0.003162, 6.0e-4, 0.1),
    ],
)
def test_cerebras_gpt_models_have_the_published_numbers(d_model, n_layers, m, hidden_std, out_std, lr, logits):
    tuning = Tuning(init_std=0.08, init_truncate=2.0, embedding_multiplier=10.0, residual_init_2l=True)
    plan = gpt_plan(d_model, n_layers, tuning)
    assert plan.width_multiplier == m
    assert plan["blocks.0.fc.weight"].init_std == pytest.approx(hidden_std, rel=2e-4)
    assert plan["blocks.0.proj.weight"].init_std == pytest.approx(out_std, rel=2e-4)
    assert plan["blocks.0.q.weight"].lr_multiplier * 6e-3 == pytest.approx(lr, rel=5e-4)
    assert plan.logits_multiplier == pytest.approx(logits, rel=2e-4)
    for name in ("wte.weight", "wpe.weight"):
        row = plan[name]
        assert (row.role, row.init_std, row.init_cut, row.lr_multiplier) == ("embedding", 0.08, 0.16, 1.0)
        assert row.forward_multiplier == 10.0


def test_btlm_3b_has_the_published_numbers():
    tuning = Tuning(
        init_std=0.073, init_truncate=2.0, embedding_multiplier=14.6, output_alpha=2.22, residual_init_2l=True
    )
    plan = gpt_plan(2560, 32, tuning, d_ff=6826, base_ff=682, glu=True)
    assert plan.width_multiplier == 10
    assert plan.logits_multiplier == pytest.approx(0.222)
    assert plan["wte.weight"].init_cut == pytest.approx(0.146)
    for name in ("fc", "gate", "proj"):  # one m for all kernels, though 6826/682 is a little more than 10
        assert plan[f"blocks.0.{name}.weight"].lr_multiplier == 0.1
    assert plan["blocks.0.gate.weight"].init_std == pytest.approx(0.073 / 10**0.5)
    assert plan["blocks.0.proj.weight"].init_std == pytest.approx(0.073 / 10**0.5 / 8)


def test_mup_uses_each_tensors_own_fan_in():
    config = model_config("crystalcoder-7b").model_copy(
        update={"mup": model_config("crystalcoder-7b").mup.model_copy(update={"parametrization": "mup"})}
    )
    plan = plan_for(config)
    assert plan["blocks.0.mlp.down.weight"].width_multiplier == 10922 / 682
    assert plan["blocks.0.mlp.up.weight"].width_multiplier == 16


def test_amber_is_standard_and_decays_everything():
    plan = plan_for(model_config("amber-7b"), decay_vectors=True)
    assert plan["head.weight"].role == "output"
    assert {row.lr_multiplier for row in plan.tensors} == {1.0}
    assert {row.weight_decay for row in plan.tensors} == {0.1}
    assert {row.init_std for row in plan.tensors if row.role != "vector"} == {0.02}
    assert (plan.logits_multiplier, plan.embedding_multiplier) == (1.0, 1.0)


def test_completep_scales_blocks_by_depth_and_only_blocks():
    mup_ = {"parametrization": "completep", "base_d_model": 64, "base_n_layers": 2, "depth_alpha": 0.5}
    config = ModelConfig(d_model=128, n_layers=8, n_heads=4, d_ff=256, vocab_size=64, bias=True, mup=mup_)
    plan = plan_for(config, eps=1e-8)
    assert plan.residual_multiplier == 4**-0.5
    hidden, bias = plan["blocks.0.attn.q.weight"], plan["blocks.0.attn.q.bias"]
    assert hidden.lr_multiplier == pytest.approx(1 / 2 * 4**-0.5)
    assert bias.lr_multiplier == pytest.approx(4**-0.5)
    assert hidden.eps == pytest.approx(1e-8 / 2 * 4**-0.5)
    assert plan["norm.weight"].lr_multiplier == plan["embed.weight"].lr_multiplier == 1.0
    assert plan["norm.weight"].eps == 1e-8


def test_independent_decay_keeps_lr_times_lambda():
    base = model_config("crystalcoder-w512")
    config = base.model_copy(update={"mup": base.mup.model_copy(update={"weight_decay": "independent"})})
    for row in plan_for(config).tensors:
        if row.role == "hidden":
            assert row.lr_multiplier * row.weight_decay == pytest.approx(0.1)


@pytest.mark.parametrize("width", [64, 256, 1024])
def test_groups_agree_with_the_mup_packages_own_optimizer(width):
    """MuAdamW on shapes set by mup itself gives each tensor the lr that our plan does."""
    base = model_config("amber-w128")
    config = with_width(base.model_copy(update={"mup": base.mup.model_copy(update={"parametrization": "mup"})}), width)
    plan = plan_for(config)
    decoder, small, wide = (meta_decoder(c) for c in (config, with_width(config, 256), with_width(config, 512)))
    mup.set_base_shapes(decoder, small, delta=wide, rescale_params=False, do_assert=False)
    names = {id(p): n for n, p in decoder.named_parameters()}
    for group in mup.MuAdamW(decoder.parameters(), lr=1.0, weight_decay=0.0).param_groups:
        for p in group["params"]:
            assert group["lr"] == pytest.approx(plan[names[id(p)]].lr_multiplier, rel=1e-12)


def test_nothing_is_left_on_the_tensors():
    config = model_config("crystalcoder-w64")
    plan = plan_for(config)
    decoder = build(config, plan)
    assert not any(hasattr(p, "infshape") for p in decoder.parameters())
    copied = copy.deepcopy(decoder.to_empty(device="cpu"))
    assert copied.multipliers == decoder.multipliers


def test_every_tensor_of_the_decoder_has_one_row():
    for name in ("crystalcoder-w128", "amber-w128"):
        config = model_config(name)
        expected = {n: tuple(p.shape) for n, p in meta_decoder(config).named_parameters()}
        assert {row.tensor: row.shape for row in plan_for(config).tensors} == expected


def test_a_tensor_that_does_not_grow_is_named():
    with torch.device("meta"):
        models = [nn.ModuleDict({"embed": nn.Embedding(8, d), "fixed": nn.Linear(4, 4)}) for d in (16, 8, 32)]
    with pytest.raises(PlanError, match=r"fixed\.weight"):
        make_plan(*models, "mup", Tuning())


def test_models_of_other_structure_are_refused():
    with torch.device("meta"):
        models = [Gpt(64, 256, n) for n in (2, 1, 2)]
    with pytest.raises(PlanError, match="must have the target's tensors"):
        make_plan(*models, "mup", Tuning())


def test_residual_out_init_is_divided_by_the_root_of_2l():
    plan = plan_for(model_config("crystalcoder-w256-l8"))
    assert plan["blocks.3.mlp.down.weight"].init_std == pytest.approx(0.073 / math.sqrt(16))

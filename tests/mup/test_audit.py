"""Reading initialisers, forward multipliers and groups off real models on meta, and the audit built on them."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from crystal.checks.audit import audit_model
from crystal.mup.audit import audit
from crystal.mup.forward_trace import trace_multipliers
from crystal.mup.init_trace import build_on_meta
from crystal.mup.plan import make_plan
from crystal.mup.rules import PARAMETRIZATIONS, Powers, Tuning
from crystal.mup.verdict import CheckError

HEADS = 4


def ids() -> torch.Tensor:
    return torch.zeros(1, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("fill", "text"),
    [
        (lambda w: nn.init.normal_(w, std=0.3), "normal 0.3"),
        (lambda w: nn.init.normal_(w, 1.0, 0.3, generator=torch.Generator()), "normal 0.3"),
        (lambda w: nn.init.trunc_normal_(w, 0, 0.02, -0.04, 0.04), "normal 0.02 cut 0.04"),
        (lambda w: nn.init.uniform_(w, -0.6, 0.6), f"uniform {1.2 / math.sqrt(12):.4g}"),
        (lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)), f"uniform {1 / math.sqrt(3 * 16):.4g}"),
        (lambda w: nn.init.xavier_normal_(w), f"normal {math.sqrt(2 / 24):.4g}"),
        (lambda w: nn.init.zeros_(w), "0"),
        (lambda w: w.data.normal_().mul_(0.5), "normal 0.5"),
        (lambda w: w.data.copy_(torch.randn(8, 16) / 4), "normal 0.25"),
        (lambda w: w.data.normal_(0, 0.1).add_(2.0).zero_(), "0"),
        (lambda w: nn.init.orthogonal_(w), "unknown"),
    ],
)
def test_initialisers_are_read_without_drawing(fill, text):
    def factory():
        layer = nn.Linear(16, 8, bias=False)
        fill(layer.weight)
        return layer

    assert str(build_on_meta(factory)[1]["weight"]) == text


def test_reading_leaves_torchs_own_initialiser_in_place():
    before = nn.init._no_grad_trunc_normal_
    with pytest.raises(ZeroDivisionError):
        build_on_meta(lambda: 1 / 0)
    assert nn.init._no_grad_trunc_normal_ is before


def test_multipliers_of_granite_are_its_configs():
    config = GraniteConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.25,
        attention_multiplier=1 / 128, pad_token_id=None,
    )  # fmt: skip
    model, _ = build_on_meta(lambda: GraniteForCausalLM(config))
    found = trace_multipliers(model, lambda m: m(ids()).logits)
    assert found.outputs["model.embed_tokens.weight", "lookup"] == {12.0}
    assert found.outputs["lm_head.weight", "matmul"] == {0.125}
    assert found.outputs["model.layers.0.self_attn.o_proj.weight", "matmul"] == {0.25}
    layer = "model.layers.0.self_attn"
    assert found.scores[f"{layer}.q_proj.weight", f"{layer}.k_proj.weight"] == ({1 / 128}, 16)


def test_multipliers_of_a_fused_projection_and_a_tied_head_are_read():
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=0)
    model, _ = build_on_meta(lambda: GPT2LMHeadModel(config))
    found = trace_multipliers(model, lambda m: m(ids()).logits)
    fused = "transformer.h.0.attn.c_attn.weight"
    assert found.scores[fused, fused] == ({0.25}, 16)
    assert found.outputs["transformer.wte.weight", "lookup"] == {1.0}
    assert found.outputs["transformer.wte.weight", "matmul"] == {1.0}


def test_scores_made_by_hand_are_read():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return ((self.q(x) / 2) @ (self.k(x) * 0.5).transpose(-1, -2) * 0.5).softmax(-1)

    model, _ = build_on_meta(Attention)
    assert trace_multipliers(model, lambda m: m(torch.zeros(2, 3, 8))).scores["q.weight", "k.weight"] == ({0.125}, 8)


@pytest.mark.parametrize("name", ["crystalcoder-7b", "amber-7b", "crystalcoder-w128-l3", "amber", "demo"])
def test_the_zoos_models_are_what_they_declare(name):
    report, plan = audit_model(name)
    assert report.verdict == "PASS", report.failures[:3]
    assert {row.name for row in report.rows} >= {row.tensor for row in plan.tensors}


def test_a_standard_model_is_not_mup():
    report, _ = audit_model("amber-7b", parametrization="mup")
    assert report.verdict == "FAIL"
    messages = [row.message for row in report.failures]
    assert any("blocks.31.mlp.down.weight: lr" in m and "not divided by the width multiplier" in m for m in messages)
    assert any("head.weight: forward" in m and "logits are not divided" in m for m in messages)


def llama(width: int) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=HEADS,
            vocab_size=50, initializer_range=0.02, pad_token_id=None,
        )
    )  # fmt: skip


def test_a_transformers_model_is_audited():
    report = audit(
        llama, width=512, base_width=64, optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3),
        calls={"training": lambda m: m(ids(), labels=ids()).loss, "inference": lambda m: m(ids()).logits},
    )  # fmt: skip
    assert report.verdict == "FAIL"
    failed = {(row.name, row.quantity) for row in report.failures}
    assert ("model.layers.1.mlp.down_proj.weight", "lr") in failed
    assert ("lm_head.weight", "forward") in failed
    assert not any(name.endswith("norm.weight") for name, _ in failed)


def granite(width: int, base: int = 64) -> nn.Module:
    """muP in a published model class: Granite's config has all four multipliers."""
    m = width / base
    model = GraniteForCausalLM(
        GraniteConfig(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=HEADS,
            num_key_value_heads=HEADS, vocab_size=50, embedding_multiplier=4.0, logits_scaling=m,
            attention_multiplier=HEADS / width, residual_multiplier=1.0, tie_word_embeddings=False, pad_token_id=None,
        )
    )  # fmt: skip
    for name, p in model.named_parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=0.1 * (m**-0.5 if ".layers." in name else 1.0))
    return model


def test_a_transformers_model_in_mup_passes():
    def optimizer(model):
        width = model.config.hidden_size
        with torch.device("meta"):
            plan = make_plan(granite(width), granite(64), granite(128), "mup", Tuning(init_std=0.1))
        return torch.optim.AdamW(plan.parameter_groups(model, 1e-3))

    report = audit(
        granite, width=1024, base_width=64, optimizer=optimizer, calls={"inference": lambda m: m(ids()).logits}
    )
    assert report.verdict == "PASS", [row.message for row in report.failures][:5]


class TwoForms(nn.Module):
    """A readout in TPV's Table 3 (init and lr / m, no multiplier) instead of Table 8."""

    def __init__(self, d: int):
        super().__init__()
        m = d / 32
        self.embed, self.hidden, self.head = nn.Embedding(20, d), nn.Linear(d, d), nn.Linear(d, 20, bias=False)
        nn.init.normal_(self.embed.weight)
        nn.init.normal_(self.hidden.weight, std=m**-0.5)
        nn.init.zeros_(self.hidden.bias)
        nn.init.normal_(self.head.weight, std=1 / m)

    def forward(self, x):
        return self.head(self.hidden(self.embed(x)).relu())


@pytest.mark.parametrize(("power", "verdict"), [(1, "PASS"), (0, "FAIL")])
def test_forms_that_are_equal_by_abc_symmetry_pass(power, verdict):
    def optimizer(model):
        m = model.embed.weight.shape[1] / 32
        scaled = [model.hidden.weight]
        other = [model.embed.weight, model.hidden.bias]
        return torch.optim.AdamW(
            [
                {"params": scaled, "lr": 0.1 / m},
                {"params": other, "lr": 0.1},
                {"params": [model.head.weight], "lr": 0.1 / m**power},
            ]
        )

    report = audit(
        TwoForms, width=256, base_width=32, optimizer=optimizer, calls={"forward": lambda model: model(ids())}
    )
    assert report.verdict == verdict
    if verdict == "PASS":
        assert any("abc-symmetry" in row.message for row in report.rows if row.name == "head.weight")


def test_an_accident_of_widths_does_not_pass_for_a_rule():
    """At width 64 the lr is right by accident: 1/m of the base, but constant beyond."""

    def optimizer(model):
        m = min(model.embed.weight.shape[1] / 32, 2)
        return torch.optim.AdamW(
            [
                {"params": [model.hidden.weight], "lr": 0.1 / m},
                {"params": [model.embed.weight, model.hidden.bias], "lr": 0.1},
                {"params": [model.head.weight], "lr": 0.1 / m},
            ]
        )

    calls = {"forward": lambda model: model(ids())}
    at_64 = audit(TwoForms, width=64, base_width=32, second_width=128, optimizer=optimizer, calls=calls)
    assert at_64.verdict == "FAIL"


class Tied(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, d), nn.Linear(d, 20, bias=False)
        self.head.weight = self.embed.weight
        self.m = d / 32

    def forward(self, x):
        return self.head(self.embed(x)) / self.m


def test_a_tie_between_roles_that_ask_for_different_things_fails(monkeypatch):
    """Table 8 allows tying; Table 3, whose readout has its own init and lr, does not."""
    calls = {"forward": lambda m: m(ids())}
    assert audit(Tied, width=256, base_width=32, calls=calls, accept=["optimizer"]).verdict == "PASS"
    powers = PARAMETRIZATIONS["mup"].powers | {"output": Powers(init=-1.0, lr=-1.0)}
    table_3 = replace(PARAMETRIZATIONS["mup"], name="table 3", source="Table 3", powers=powers)
    monkeypatch.setitem(PARAMETRIZATIONS, "table 3", table_3)
    report = audit(Tied, width=256, base_width=32, parametrization="table 3")
    assert any("embed.weight: tied between roles" in row.message for row in report.failures)


def test_widths_that_cannot_tell_are_refused():
    with pytest.raises(CheckError, match="widths"):
        audit(TwoForms, width=32, base_width=32, second_width=32)

"""The decoder: exact sizes, the theory of the initial loss, masks, and its parts against plain formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_near, product_tolerance

from crystal.kernels import rope, rope_table
from crystal.zoo.build import build, initial_tensor, initial_weights, parameter_count, plan_for
from crystal.zoo.config import ModelConfig, model_config


def fresh(config: ModelConfig, seed: int = 1):
    plan = plan_for(config)
    decoder = build(config, plan).to_empty(device="cpu")
    decoder.load_state_dict(dict(initial_weights(plan, seed)))
    return decoder


@pytest.mark.parametrize(("name", "count"), [("amber-7b", 6_738_415_616), ("crystalcoder-7b", 6_575_278_720)])
def test_published_parameter_counts(name, count):
    assert parameter_count(model_config(name)) == count


def test_non_embedding_parameters_of_the_published_models():
    crystal, amber = model_config("crystalcoder-7b"), model_config("amber-7b")
    assert parameter_count(crystal) - 32032 * 4096 == 6_444_075_648
    assert parameter_count(amber) - 2 * 32000 * 4096 == 6_476_271_616


def test_initial_loss_follows_the_theory_of_the_tied_embedding():
    """A fresh CrystalCoder predicts "the same token again": loss = self-logit, whatever the width.

    The final norm gives h ~ x / rms(x), and x is mostly 14.6 E[t]. Per element, E has the variance of a normal cut at
    2 sigma, s_E^2 = 0.073^2 * 0.7737. Each MLP adds d_ff * sigma_out^2 * E[(up silu(gate))^2]; with pre-activations
    of std s = 16 * 0.073 * 0.8796 = 1.027 and sigma_out^2 = sigma^2 / 2L that is, over L layers and whatever L and
    the width are, (8/3) s^4 E[silu(s z)^2] / s^2 / 2 * s^2. Attention adds averages of values, small in long
    contexts. self-logit = 2.22/m * d * s_E * (share of the embedding in rms(x)) = 28 nats or so at every scale.
    """
    cut = 0.87964  # std of a normal cut at 2 sigma, over sigma
    s_e, s = 0.073 * cut, 16 * 0.073 * cut
    z = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    silu2 = F.silu(s * z).square().mean().item()
    config = model_config("crystalcoder-w256-l4")
    length = 256
    # mean over positions t of 1/t: uniform attention over t random values has 1/t of their variance
    harmonic = sum(1 / t for t in range(1, length + 1)) / length
    embedding = (14.6 * s_e) ** 2
    attention = s**2 * s**2 / 2 * harmonic
    mlp = (config.d_ff / config.d_model) * s**2 * s**2 * silu2 / 2
    predicted = 2.22 * 256 * s_e * math.sqrt(embedding / (embedding + attention + mlp))
    for name in ("crystalcoder-w128", "crystalcoder-w256-l4", "crystalcoder-w256-l8"):
        config = model_config(name)
        ids = torch.randint(0, 32000, (4, length + 1), generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            weights = torch.full((4, length), 1 / (4 * length))
            loss, _ = fresh(config).loss(ids[:, :-1], ids[:, 1:], weights)
        assert 26 < loss.item() < 30
        assert loss.item() == pytest.approx(predicted, rel=0.03)


def test_amber_starts_near_the_uniform_loss():
    config = model_config("amber-w128")
    ids = torch.randint(0, 32000, (2, 65))
    with torch.no_grad():
        loss, _ = fresh(config).loss(ids[:, :-1], ids[:, 1:], torch.full((2, 64), 1 / 128))
    assert loss.item() == pytest.approx(math.log(32000), abs=0.1)


def test_initial_weights_have_the_plans_distribution():
    plan = plan_for(model_config("crystalcoder-w512"))
    for name in ("embed.weight", "blocks.0.attn.q.weight", "blocks.1.mlp.down.weight"):
        row = plan[name]
        tensor = initial_tensor(row, seed=1)
        assert tensor.abs().max() <= row.init_cut
        assert tensor.std().item() == pytest.approx(0.8796 * row.init_std, rel=0.01)


def test_initial_weights_do_not_depend_on_the_other_tensors():
    config = model_config("crystalcoder-w64-l2")
    deeper = model_config("crystalcoder-w64-l8")
    a, b = dict(initial_weights(plan_for(config), 1)), dict(initial_weights(plan_for(deeper), 1))
    assert torch.equal(a["blocks.0.attn.q.weight"], b["blocks.0.attn.q.weight"])
    assert not torch.equal(a["embed.weight"], dict(initial_weights(plan_for(config), 2))["embed.weight"])


@pytest.mark.parametrize("style", ["interleaved", "half"])
def test_rope_turns_pairs_by_the_published_angles(style):
    """Against complex multiplication, a different way to say the same."""
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64).float()
    table = rope_table(torch.arange(7, 12), 8, 10000.0)
    y = rope(x, *table, style)
    assert torch.equal(y[..., 8:], x[..., 8:])
    turned, expected = x[..., :8], y[..., :8]
    pairs = (turned[..., 0::2], turned[..., 1::2]) if style == "interleaved" else turned.chunk(2, -1)
    out = (expected[..., 0::2], expected[..., 1::2]) if style == "interleaved" else expected.chunk(2, -1)
    angle = torch.arange(7, 12)[:, None].double() * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    z = torch.complex(*(p.double() for p in pairs)) * torch.polar(torch.ones_like(angle), angle)
    assert torch.allclose(out[0].double(), z.real, atol=1e-5)
    assert torch.allclose(out[1].double(), z.imag, atol=1e-5)


def test_rope_angles_stay_exact_in_a_bf16_model():
    table = rope_table(torch.arange(2048), 32, 10000.0)
    assert table[0].dtype == torch.float32
    x = torch.zeros(1, 1, 2048, 128, dtype=torch.bfloat16)
    x[..., 0] = 1
    y = rope(x, *table, "interleaved")
    exact = torch.arange(2048).double().cos()
    assert (y[0, 0, :, 0].double() - exact).abs().max() < 2**-8  # bf16's rounding of the result, no more


def test_tokens_do_not_see_the_future():
    for name in ("crystalcoder-w64-l2", "amber-w64-l2"):
        decoder = fresh(model_config(name))
        ids = torch.randint(0, 32000, (1, 16))
        changed = ids.clone()
        changed[0, 10:] = (changed[0, 10:] + 1) % 32000
        with torch.no_grad():
            a, b = decoder(ids), decoder(changed)
        assert torch.equal(a[:, :10], b[:, :10])
        assert not torch.equal(a[:, 10:], b[:, 10:])


@pytest.mark.parametrize("masked", [False, True])
def test_document_mask_decides_whether_packed_documents_see_each_other(masked):
    config = model_config("crystalcoder-w64-l2").model_copy(update={"document_mask": masked})
    decoder = fresh(config)
    ids = torch.randint(0, 32000, (1, 16))
    changed = ids.clone()
    changed[0, :8] = (changed[0, :8] + 1) % 32000
    documents = torch.tensor([[0] * 8 + [1] * 8])
    with torch.no_grad():
        a, b = decoder(ids, documents), decoder(changed, documents)
    same = torch.allclose(a[:, 8:], b[:, 8:], atol=1e-6)
    assert same == masked


def test_muP_multipliers_scale_what_they_name():
    config = model_config("crystalcoder-w64-l2")
    decoder = fresh(config)
    ids = torch.randint(0, 32000, (1, 4))
    assert torch.equal(decoder.embedded(ids), decoder.embed(ids) * 14.6)
    assert decoder.multipliers.logits == pytest.approx(2.22 / (64 / 256))
    assert decoder.multipliers.attention == 1 / 32
    with torch.no_grad():
        h_BTD, head_DV = decoder.hidden(ids), decoder.embed.weight.T
        off = decoder(ids) - h_BTD @ head_DV * decoder.multipliers.logits
        assert (off.abs() <= product_tolerance(h_BTD, head_DV) * decoder.multipliers.logits).all()


def test_blocks_work_as_stateless_templates():
    """Streaming and pipelines call one block with another's weights."""
    config = model_config("crystalcoder-w64-l2")
    decoder = fresh(config)
    x, table = torch.randn(1, 8, 64), decoder.table(0, 8, torch.device("cpu"))
    weights = dict(decoder.blocks[1].named_parameters())
    with torch.no_grad():
        assert torch.equal(
            torch.func.functional_call(decoder.blocks[0], weights, (x, table)), decoder.blocks[1](x, table)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_loss_head_equals_plain_cross_entropy(dtype):
    from crystal.kernels import linear_cross_entropy

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1030, 16, generator=generator, dtype=dtype).requires_grad_()
    w = torch.randn(40, 16, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, 40, (1030,), generator=generator)
    weights = (torch.rand(1030, generator=generator) > 0.3).float() / 1030
    loss, nll = linear_cross_entropy(x, w, labels, weights, 0.7)
    (3 * loss).backward()
    x2, w2 = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    scores = 0.7 * (x2 @ w2.T).float()
    plain = F.cross_entropy(scores, labels, reduction="none")
    (3 * (plain * weights).sum()).backward()
    length, size = 16 + 40, scores.detach().abs().max().item()  # a score's sum and the softmax's
    assert_near(nll, plain, length, size)
    assert_near(loss, (plain * weights).sum(), length + 1030, size)
    assert_near(x.grad, x2.grad, length + 40)
    assert_near(w.grad, w2.grad, length + 1030)

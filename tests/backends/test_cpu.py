"""The reference backend: plan = optimizer, accumulation, clipping, precision, and state that comes back whole."""

import math
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from closeness import assert_near, near, path_length, tolerance

from crystal.backends.base import MicroBatch, Setup
from crystal.backends.cast import round_to_bf16
from crystal.backends.config import CpuConfig, OptimizerConfig
from crystal.backends.cpu import CpuBackend
from crystal.training.guards import plan_differences
from crystal.zoo.build import build, initial_weights, plan_for
from crystal.zoo.config import model_config

CONFIG = model_config("crystalcoder-w64-l2").model_copy(update={"vocab_size": 96, "max_seq_len": 32})
OPTIMIZER = OptimizerConfig(eps=1e-9)
ONE_STEP, THREE_STEPS = path_length(CONFIG, 16), path_length(CONFIG, 16, step=3)


def backend(dtype="fp32", optimizer=OPTIMIZER, schedule=lambda step: 0.01, config=CONFIG):
    plan = plan_for(config, weight_decay=optimizer.weight_decay, eps=optimizer.eps)
    made = CpuBackend(Setup(config, plan, optimizer, schedule, 1, 2), CpuConfig(dtype=dtype))
    made.initialise()
    return made


def batch(rows=4, length=16, seed=0, of=None, masked=()):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 96, (rows, length + 1), generator=generator)
    weights = torch.full((rows, length), 1 / ((of or rows) * length))
    for where in masked:
        weights[where] = 0
    return MicroBatch(tokens[:, :-1], tokens[:, 1:], weights, torch.arange(rows) % 2, torch.zeros_like(tokens[:, 1:]))


def split(whole, parts):
    fields = (whole.ids_BT, whole.labels_BT, whole.weights_BT, whole.sources_B, whole.documents_BT)
    return [MicroBatch(*chunk) for chunk in zip(*(f.chunk(parts) for f in fields), strict=True)]


def test_the_optimizers_groups_are_the_plans():
    made = backend()
    assert plan_differences(made.plan, made.groups()) == []


@pytest.mark.parametrize("fault", ["lr", "decay", "moved", "lost"])
def test_an_optimizer_that_drifts_from_the_plan_is_caught(fault):
    """What would happen if muP were off: gpt-neox trained so for a year."""
    made = backend()
    groups = {g["name"]: g for g in made.parameter_groups}
    if fault == "lr":
        groups["hidden"]["lr_multiplier"] = 1.0
    elif fault == "decay":
        groups["vector"]["weight_decay"] = 0.1
    elif fault == "moved":
        groups["vector"]["params"].append(groups["hidden"]["params"].pop())
    else:
        groups["hidden"]["params"].pop()
    assert len(plan_differences(made.plan, made.groups())) >= 1


def test_the_first_update_has_the_plans_size_in_every_tensor():
    """Adam's first update is lr x multiplier x sign(gradient): the width rule seen in the weights themselves."""
    made = backend(optimizer=OptimizerConfig(weight_decay=0.0, eps=1e-12, grad_clip=None))
    before = {n: p.detach().clone() for n, p in made.weights.items()}
    made.train_step(1, [batch(rows=32)])
    for row in made.plan.tensors:
        if row.tensor.endswith("k.bias"):
            continue  # a key bias shifts all of a query's scores alike: its gradient is rounding noise
        step = (made.weights[row.tensor] - before[row.tensor]).abs().max().item()
        assert step == pytest.approx(0.01 * row.lr_multiplier, rel=1e-3), row.tensor


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_step_equals_plain_torch(dtype):
    """Loss, gradient norm and weights of three steps against autograd and AdamW written out here."""
    made = backend(dtype, OptimizerConfig(eps=1e-3))  # an eps that keeps rounding noise from turning into +-lr
    plan = made.plan
    plain = build(CONFIG, plan).to_empty(device="cpu")
    plain.load_state_dict(dict(initial_weights(plan, 1)))
    named = dict(plain.named_parameters())
    adamw = torch.optim.AdamW(
        [{"params": [named[r.tensor]], "lr": 0.01 * r.lr_multiplier, "weight_decay": r.weight_decay}
         for r in plan.tensors],
        betas=(0.9, 0.95), eps=1e-3,
    )  # fmt: skip
    rel = tolerance(THREE_STEPS) if dtype == "fp32" else 3e-2
    for step in range(1, 4):
        data = batch(seed=step)
        result = made.train_step(step, [data]).host()
        logits = plain(data.ids_BT)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), data.labels_BT.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        assert result["loss"] == pytest.approx(loss.item(), rel=rel)
        assert result["grad_norm"] == pytest.approx(norm.item(), rel=10 * rel)
    if dtype == "fp32":
        for name, p in named.items():
            moved = 3 * 0.01  # by three updates, at most
            assert_near(made.weights[name], p, THREE_STEPS, size=max(p.abs().max().item(), moved))


def test_accumulated_micro_batches_equal_one_batch():
    one, four = backend(), backend()
    whole = batch(rows=8)
    a, b = one.train_step(1, [whole]).host(), four.train_step(1, split(whole, 4)).host()
    assert a["loss"] == near(b["loss"], ONE_STEP)
    assert a["grad_norm"] == near(b["grad_norm"], 3 * ONE_STEP)  # forward and twice back
    assert a["source_nll"] == near(b["source_nll"], ONE_STEP)


def test_the_learning_rate_does_not_advance_with_micro_batches():
    """A published mistake: the scheduler was stepped once a micro-batch."""
    asked = []
    made = backend(schedule=lambda step: asked.append(step) or 0.01)
    whole = batch(rows=8)
    for step in (1, 2):
        made.train_step(step, split(whole, 4))
    assert asked == [1, 2]


def test_the_loss_is_divided_by_batch_times_length_even_where_masked():
    """CrystalCoder's: sum of unmasked losses / (batch * seq_len)."""
    made = backend()
    masked = batch(masked=[(slice(None), slice(8, None))])
    result = made.train_step(1, [masked]).host()
    assert result["loss"] == near(sum(result["source_nll"]) / (4 * 16), 4 * 16)
    assert sum(result["source_tokens"]) == 4 * 8


def test_gradients_are_clipped_by_their_global_norm():
    clipped, free = (backend(optimizer=OptimizerConfig(grad_clip=c, eps=1.0, weight_decay=0.0)) for c in (0.5, None))
    data = batch()
    a, b = clipped.train_step(1, [data]).host(), free.train_step(1, [data]).host()
    assert a["grad_norm"] == b["grad_norm"] > 0.5
    exp_avg = [dict(m.state())["optimizer.exp_avg.blocks.0.attn.v.weight"] for m in (clipped, free)]
    assert torch.allclose(exp_avg[0], exp_avg[1] * (0.5 / a["grad_norm"]), rtol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_left_out(bad):
    made = backend()
    made.train_step(1, [batch()])
    made.weights["blocks.1.mlp.down.weight"].data[0, 0] = bad
    before = {n: t.clone() for n, t in made.state()}
    result = made.train_step(2, [batch(seed=2)]).host()
    assert result["applied"] is False
    assert all(torch.equal(before[n], t) or n.endswith("mlp.down.weight") for n, t in made.state())
    assert made.scalars() == {"optimizer_step": 1}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_state_that_was_saved_continues_bit_for_bit(dtype):
    made, again = backend(dtype), backend(dtype)
    for step in (1, 2, 3):
        made.train_step(step, [batch(seed=step)])
    saved = {name: tensor.clone() for name, tensor in made.state()}

    def tensors(prefix):
        return ((n.removeprefix(prefix + "."), t) for n, t in saved.items() if n.startswith(prefix + "."))

    again.load(tensors, made.scalars())
    for step in (4, 5, 6):
        a, b = (m.train_step(step, [batch(seed=step)]).host() for m in (made, again))
        assert a == b
    assert all(torch.equal(t, dict(again.state())[n]) for n, t in made.state())


def test_optimizer_state_is_part_of_what_is_saved():
    """A published mistake: the Amber run lost its moments at every restart."""
    made = backend()
    made.train_step(1, [batch()])
    state = dict(made.state())
    for name in made.weights:
        assert state[f"optimizer.exp_avg_sq.{name}"].abs().max() > 0 or name.endswith("k.bias")
        assert state[f"optimizer.exp_avg.{name}"].shape == made.weights[name].shape


def test_weights_are_fp32_in_a_bf16_run():
    """A published mistake: early checkpoints were stored in bf16."""
    made = backend("bf16", schedule=lambda step: 1e-5)
    made.train_step(1, [batch()])
    assert all(t.dtype == torch.float32 for _, t in made.state())
    weight = made.weights["blocks.0.attn.q.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())  # more than bf16 can hold
    assert all(p.dtype == torch.bfloat16 for p in made.compute.parameters())
    assert next(made.decoder().parameters()).dtype == torch.float32


def test_evaluation_changes_nothing_and_sees_the_current_weights():
    made = backend("bf16")
    data = batch()
    first = made.eval_step(data)[0].sum().item()
    assert made.eval_step(data)[0].sum().item() == first
    for step in range(1, 6):
        made.train_step(step, [data])
    assert made.eval_step(data)[0].sum().item() < first


def test_rounding_is_half_up_and_loses_nothing_that_16_bits_more_cannot_hold():
    x = torch.randn(100_003, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 100_003)
    high = round_to_bf16(x, torch.empty(x.shape, dtype=torch.bfloat16))
    low = x.view(torch.int32) - (high.view(torch.int16).to(torch.int32) << 16)
    assert low.min() >= -(2**15)
    assert low.max() < 2**15  # so it fits an int16, ties included
    nearest = x.bfloat16()
    ties = (x.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(high[~ties], nearest[~ties])


def test_a_step_reads_no_number_per_parameter(monkeypatch):
    """Amber's published loop reads one number per parameter and step to log; here a step reads as many at any depth."""

    def reads(n_layers: int) -> int:
        made = backend(config=CONFIG.model_copy(update={"n_layers": n_layers}))
        count = 0
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
                original = getattr(torch.Tensor, name)

                def counted(self, *args, original=original):
                    nonlocal count
                    count += 1
                    return original(self, *args)

                patch.setattr(torch.Tensor, name, counted)
            made.train_step(1, [batch()]).host()
        return count

    assert reads(2) == reads(8) <= 10


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("change", [{}, {"document_mask": True}])
@pytest.mark.parametrize("name", ["amber-w64-l2", "crystalcoder-w64-l2"])
def test_both_models_learn_a_batch_by_heart(name, change, dtype):
    config = model_config(name).model_copy(update={"vocab_size": 96, "max_seq_len": 32} | change)
    made = backend(dtype, config=config, schedule=lambda step: 0.003)
    assert plan_differences(made.plan, made.groups()) == []
    data = batch()
    losses = [made.train_step(step, [data]).host()["loss"] for step in range(1, 61)]
    assert losses[-1] < 0.5


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile wants a C++ compiler")
def test_compiled_blocks_take_the_same_steps():
    """The compiled ones in a process of their own, as a run has them (docs/log.md, 2026-11-30, says why)."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        compiled = process.submit(_losses, True).result()
    assert compiled == near(_losses(False), THREE_STEPS)


def _losses(compile):
    config = CONFIG.model_copy(update={"n_layers": 1})
    plan = plan_for(config, weight_decay=0.1, eps=1e-9)
    settings = CpuConfig(dtype="fp32", compile=compile)
    made = CpuBackend(Setup(config, plan, OPTIMIZER, lambda step: 0.01, 1, 2), settings)
    made.initialise()
    found = [made.train_step(step, [batch(seed=step)]).loss.item() for step in (1, 2, 3)]
    assert made.decoder().state_dict().keys() == made.weights.keys()
    return found

"""CrystalCoder in transformers, trained: initial weights, recomputation, the plan's groups, Trainer."""

import pytest
import torch
import transformers
from directories import CRYSTAL, llama_directory

from crystal.errors import ConfigError
from crystal.inference.load import load_decoder
from crystal.interop.hf import CrystalConfig, CrystalForCausalLM, parameter_groups
from crystal.interop.huggingface import import_published
from crystal.zoo.build import plan_for
from crystal.zoo.config import model_config

SMALL = {key: CRYSTAL[key] for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")} | {
    "rotary_dim": 4, "mup_width_scale": 0.25, "pad_token_id": 0
}  # fmt: skip


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return CrystalForCausalLM(CrystalConfig(**SMALL | changes))


def ids(rows=2, tokens=24):
    return torch.randint(3, SMALL["vocab_size"], (rows, tokens), generator=torch.Generator().manual_seed(7))


def test_a_new_model_starts_as_the_published_run_did():
    config = CrystalConfig(vocab_size=2000, n_embd=512, n_head=8, n_layer=2, n_inner=1365, mup_width_scale=0.5)
    torch.manual_seed(0)
    named = dict(CrystalForCausalLM(config).named_parameters())
    plan = plan_for(model_config("crystalcoder-w512-l2"))
    for theirs, ours in {
        "wte": "embed", "h.1.attn.c_attn": "blocks.1.attn.q", "h.0.attn.c_proj": "blocks.0.attn.out",
        "h.1.mlp.c_fc2": "blocks.1.mlp.gate", "h.1.mlp.c_proj": "blocks.1.mlp.down",
    }.items():  # fmt: skip
        weight, row = named[f"transformer.{theirs}.weight"], plan[f"{ours}.weight"]
        assert weight.std().item() == pytest.approx(0.8796 * row.init_std, rel=0.01)
        assert weight.abs().max() <= row.init_cut
    assert not any(p.any() for name, p in named.items() if name.endswith("bias"))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    def gradients(checkpointed):
        model = tiny().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        out = model(ids(), labels=ids())
        out.loss.backward()
        assert out.logits.requires_grad
        return out.loss, {name: p.grad for name, p in model.named_parameters()}

    (loss, plain), (again, recomputed) = gradients(False), gradients(True)
    assert torch.equal(loss, again)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_groups_are_the_plans():
    model = tiny()
    groups = {group["name"]: group for group in parameter_groups(model, lr=0.012, weight_decay=0.1, eps=1e-9)}
    named = {id(p): name for name, p in model.named_parameters()}
    held = {key: {named[id(p)] for p in group["params"]} for key, group in groups.items()}
    assert {key: (group["lr"], group["weight_decay"], group["eps"]) for key, group in groups.items()} == {
        "embedding": (0.012, 0.1, 1e-9), "hidden": (0.012 / 4, 0.1, 1e-9), "vector": (0.012, 0.0, 1e-9)
    }  # fmt: skip
    assert held["embedding"] == {"transformer.wte.weight"}
    assert held["hidden"] == {name for name in named.values() if ".c_" in name and name.endswith("weight")}
    assert sum(map(len, held.values())) == len(named)
    model.transformer.wte.requires_grad_(False)
    assert "embedding" not in {group["name"] for group in parameter_groups(model, lr=0.012)}


def test_a_llama_has_groups_too_and_others_are_refused(tmp_path):
    groups = parameter_groups(llama_directory(tmp_path), lr=1e-3)
    assert {group["lr"] for group in groups} == {1e-3}
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    with pytest.raises(ConfigError, match="GPT2LMHeadModel: model_type: expected llama or crystalcoder, got 'gpt2'"):
        parameter_groups(transformers.GPT2LMHeadModel(config), lr=1e-3)
    model = tiny()
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"extra\.bias: expected the tensors of the published crystalcoder form"):
        parameter_groups(model, lr=1e-3)


def test_trainer_takes_the_plans_groups_and_trains_as_our_decoder_does(tmp_path):
    """Three steps under Trainer, and the same three of our decoder under torch's AdamW with the plan's groups."""
    pytest.importorskip("accelerate", reason="transformers' Trainer asks for it")
    from transformers import Trainer, TrainingArguments

    lr, start = 0.01, tmp_path / "start"
    model = tiny()
    model.save_pretrained(start)
    import_published(start, tmp_path / "ckpt")
    rows = ids(rows=12)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=3, max_grad_norm=1.0, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, gradient_checkpointing=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=[{"input_ids": r, "labels": r} for r in rows], optimizers=(optimizer, schedule)
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()

    ours = load_decoder(tmp_path / "ckpt")[0].train().requires_grad_(True)
    plan = plan_for(ours.config)
    optimizer = torch.optim.AdamW(plan.parameter_groups(ours, lr), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for batch in rows.split(4):
        weights = torch.full((4, 23), 1 / (4 * 23))
        ours.loss(batch[:, :-1], batch[:, 1:], weights)[0].backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    trainer.save_model(str(tmp_path / "trained"))
    import_published(tmp_path / "trained", tmp_path / "back")
    trained, begun = load_decoder(tmp_path / "back")[0], load_decoder(tmp_path / "ckpt")[0]
    for (name, p), q, r in zip(trained.named_parameters(), ours.parameters(), begun.parameters(), strict=True):
        moved = (q - r).norm()
        assert moved > 0
        assert (p - q).norm() < 0.02 * moved, name  # Adam makes much of small gradients' rounding

"""muP's optimizer groups for a model of transformers."""

from __future__ import annotations

from torch import nn

from crystal.errors import ConfigError
from crystal.interop.huggingface_forms import config_from_json, published_tensors
from crystal.zoo.build import plan_for


def parameter_groups(model: nn.Module, lr: float, *, weight_decay: float = 0.1, eps: float = 1e-8) -> list[dict]:
    """What an AdamW takes for a CrystalForCausalLM or a LlamaForCausalLM: the plan's groups, over its tensors.

    lr: at the base width. The plan is that of the model's config, as `crystal import` reads it. Trainer would make
    groups of its own by name, one learning rate for all: `Trainer(…, optimizers=(AdamW(these), schedule))`.
    Each group has params, lr, weight_decay, eps, name and lr_multiplier. Parameters that ask for no gradient are left
    out. Raises ConfigError for a model of another kind, or one with tensors that the plan does not know.
    """
    config, form = config_from_json(model.config.to_dict(), type(model).__name__)
    plan = plan_for(config, weight_decay=weight_decay, eps=eps)
    home = {our: tensor.name for tensor in published_tensors(config, form) for our in tensor.ours}
    named = dict(model.named_parameters())
    strange = sorted(set(named) ^ set(home.values()))
    if strange:
        raise ConfigError(f"{type(model).__name__}: {strange[0]}: expected the tensors of the published {form} form")
    groups = plan.parameter_groups({our: named[name] for our, name in home.items()}, lr)
    for group in groups:  # q, k and v are one tensor in the published form, and lie in one group of the plan
        group["params"] = [p for p in dict.fromkeys(group["params"]) if p.requires_grad]
    held = [id(p) for group in groups for p in group["params"]]
    if len(held) != len(set(held)):
        raise ConfigError(f"{type(model).__name__}: expected q, k and v, which are one tensor, to have one rule")
    return [group for group in groups if group["params"]]

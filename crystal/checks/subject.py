"""A model of the zoo as the checks of muP take it: built, initialised and grouped for its optimizer as in a run.

The initial weights, the optimizer groups and the forward pass are those that a run uses, not copies of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from crystal.backends.config import OptimizerConfig, load_preset
from crystal.config import find, nearest
from crystal.errors import ConfigError
from crystal.mup.plan import Plan
from crystal.mup.rules import PARAMETRIZATIONS
from crystal.zoo.build import build, initial_weights
from crystal.zoo.config import ModelConfig, MupConfig, families, presets, with_width
from crystal.zoo.decoder import Decoder


@dataclass(frozen=True)
class Checked:
    """A model to check: its config, the optimizer's settings, and the name it goes by."""

    name: str
    config: ModelConfig
    optimizer: OptimizerConfig

    def at(self, width: int, depth: int | None = None) -> ModelConfig:
        """The config at another width (and depth). Raises ConfigError where no such width exists."""
        config = with_width(self.config, width)
        return config if depth is None else config.model_copy(update={"n_layers": depth})

    def plan(self, config: ModelConfig) -> Plan:
        return self.optimizer.plan_for(config)

    def model(self, config: ModelConfig, seed: int = 1, device: str | torch.device = "cpu") -> Decoder:
        """The decoder with its initial weights (on meta: with what would be drawn)."""
        plan = self.plan(config)
        decoder = build(config, plan).to_empty(device=device)
        weights = dict(decoder.named_parameters())
        with torch.no_grad():
            for name, tensor in initial_weights(plan, seed):
                weights[name].copy_(tensor)
        return decoder

    def adamw(self, model: nn.Module, config: ModelConfig, lr: float = 1.0) -> torch.optim.AdamW:
        """The optimizer with a run's groups."""
        groups = self.plan(config).parameter_groups(model, lr)
        mixed = len({type(p) for p in model.parameters()}) > 1  # sharded and whole tensors are updated one by one
        how = {"foreach": False} if mixed else {"fused": True}
        return torch.optim.AdamW(groups, betas=self.optimizer.betas, **how)


def checked(name: str, parametrization: str | None = None) -> Checked:
    """A preset, a rung of a ladder, a family (its proxy), or a run file, by name.

    parametrization: build it under another one than it declares. Raises ConfigError for an unknown name.
    """
    if name.endswith((".yaml", ".yml")) or Path(name).is_file() or not _is_model(name):
        from crystal.run import load_run

        try:
            find(name, "runs")
        except ConfigError:
            if not name.endswith((".yaml", ".yml")):
                known = [*presets(), *families()]
                near = nearest(name, known)
                raise ConfigError(f"{name}: expected a model or a run file, or MODULE:NAME{near}") from None
            raise
        run = load_run(name).config
        config, optimizer = run.model, run.optimizer
    else:
        config, optimizer = load_preset(f"{name}-proxy" if name in families() and name not in presets() else name)
    if parametrization is not None:
        config = config.model_copy(update={"mup": reparametrized(config, parametrization)})
    return Checked(name, config, optimizer)


def _is_model(name: str) -> bool:
    from crystal.zoo.config import LADDER

    rung = LADDER.fullmatch(name)
    return name in presets() or name in families() or (rung is not None and rung["family"] in families())


def reparametrized(config: ModelConfig, parametrization: str) -> MupConfig:
    """The same tuned constants under other rules; completep's base depth becomes the model's own."""
    if parametrization not in PARAMETRIZATIONS:
        raise ConfigError(f"--parametrization: expected one of {', '.join(PARAMETRIZATIONS)}, got {parametrization}")
    update: dict = {"parametrization": parametrization}
    if parametrization == "completep":
        # Table 1 has no 1/sqrt(2L): its branch multiplier m_L^-alpha does that work
        update |= {"base_n_layers": config.mup.base_n_layers or config.n_layers, "residual_init_2l": False}
    return config.mup.model_copy(update=update)

"""What a decoder is: every number that fixes its tensors and its forward pass."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from crystal.config import CONFIGS, Config, Count, Strict, layer, load_yaml, merge, nearest, parse, within
from crystal.errors import ConfigError, WrongValue

Width = Annotated[int, Field(gt=0), within(1, 1 << 20)]  # a matrix of such sides has 4 TB in fp32
Hidden = Annotated[int, Field(gt=0), within(1, 1 << 24)]
Depth = Annotated[int, Field(gt=0), within(1, 4096)]  # blocks are objects: a plan of so many takes seconds to make
Factor = Annotated[float, Field(gt=0), within(1e-9, 10**9)]  # on activations and weights: fp32 holds its square
Cut = Annotated[float, Field(gt=0), within(0.1, 1000)]  # draws are repeated until they are inside: of 0.1 sigma, 8%
Eps = Annotated[float, Field(gt=0), within(1e-30, 1)]  # fp32 holds it, and norms make variances of 1


class MupConfig(Strict):
    """The parametrization and its tuned multipliers (Yang et al. 2022, "Tensor Programs V")."""

    parametrization: Literal["sp", "mup", "crystalcoder", "completep"] = Field(
        "sp", description="standard, muP, muP in Cerebras' form, or CompleteP"
    )
    base_d_model: Width = Field(256, description="width at which lr and init_std were tuned")
    base_n_layers: Depth | None = Field(None, description="depth at which they were tuned (completep only)")
    depth_alpha: float = Field(1.0, ge=0.5, le=1.0, description="CompleteP: residual branches x m_L^-alpha")
    embedding_multiplier: Factor = Field(1.0, description="embedding output x this")
    output_alpha: Factor = Field(1.0, description="logits x output_alpha / m")
    attention_scale: Literal["1/d", "1/sqrt_d"] = Field("1/sqrt_d", description="attention scores x this; d: of a head")
    init_std: Factor = Field(0.02, description="parent-normal sigma at the base width")
    init_truncate: Cut | None = Field(None, description="cut the normal at this many sigmas")
    residual_init_2l: bool = Field(False, description="residual-out matrices: sigma / sqrt(2 n_layers)")
    weight_decay: Literal["coupled", "independent"] = Field(
        "coupled", description="coupled: one lambda for all; independent: lambda x m where lr is / m"
    )

    @model_validator(mode="after")
    def _depth(self) -> MupConfig:
        if self.parametrization == "completep" and self.base_n_layers is None:
            raise WrongValue("expected the depth of the tuned proxy with parametrization: completep", "base_n_layers")
        return self


class ModelConfig(Strict):
    """One decoder-only transformer. Sizes in elements; see `docs/models.md` for the presets."""

    d_model: Width = Field(description="width of the residual stream")
    n_layers: Depth = Field(description="blocks")
    n_heads: Width = Field(description="attention heads, of d_model / n_heads each")
    n_kv_heads: Width | None = Field(None, description="heads of keys and values; null: as many as n_heads")
    d_ff: Hidden = Field(description="width of the feed-forward layer (SwiGLU)")
    vocab_size: Count = Field(description="token ids, the tokenizer's padded vocabulary; in a run also auto")
    max_seq_len: Annotated[int, within(1, 1 << 27)] = Field(
        2048, gt=0, description="longest sequence that it is built for, in tokens"
    )
    norm: Literal["layernorm", "rmsnorm"] = Field("rmsnorm", description="before attention, feed-forward and head")
    norm_eps: Eps = Field(1e-6, description="added to the variance in the norms")
    bias: bool = Field(False, description="whether every linear but the head has a bias")
    rotary_fraction: float = Field(1.0, gt=0, le=1, description="part of each head that is rotated by position")
    rotary_base: Annotated[float, within(1, 10**12)] = Field(
        10000.0, gt=0, description="of the rotation's wavelengths (theta)"
    )
    rotary_style: Literal["interleaved", "half"] = Field(
        "half", description="which dimensions are pairs: 2i, 2i+1 or i, i+d/2"
    )
    tie_embeddings: bool = Field(False, description="whether the head's weight is the embedding's")
    document_mask: bool = Field(False, description="whether packed documents are kept from seeing each other")
    mup: MupConfig = MupConfig()

    @model_validator(mode="after")
    def _shapes(self) -> ModelConfig:
        if self.d_model % self.n_heads:
            raise WrongValue(f"expected a divisor of d_model {self.d_model}, got {self.n_heads}", "n_heads")
        if self.n_heads % self.kv_heads:
            raise WrongValue(f"expected a divisor of n_heads {self.n_heads}, got {self.n_kv_heads}", "n_kv_heads")
        rotary = self.d_head * self.rotary_fraction
        if rotary != int(rotary) or int(rotary) % 2:
            raise WrongValue(
                f"expected an even number of rotary dimensions, got {self.rotary_fraction} x d_head "
                f"{self.d_head} = {rotary:g} with d_model {self.d_model} and n_heads {self.n_heads}",
                "rotary_fraction",
            )
        group = self.n_heads // self.kv_heads * self.d_head  # the smallest width with whole heads
        grouped = self.kv_heads != self.n_heads  # else a base of fewer, smaller heads will do
        if self.mup.parametrization != "sp" and self.mup.base_d_model % (group if grouped else 2):
            unit = f"{group}, d_model / n_kv_heads" if grouped else "2"
            raise WrongValue(f"expected a multiple of {unit}, got {self.mup.base_d_model}", "mup", "base_d_model")
        return self

    @cached_property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @cached_property
    def d_head(self) -> int:
        return self.d_model // self.n_heads

    @cached_property
    def rotary_dim(self) -> int:
        return int(self.d_head * self.rotary_fraction)


def d_ff_at(config: ModelConfig, d_model: int) -> int:
    """The feed-forward width in proportion to another d_model; never nothing."""
    return max(config.d_ff * d_model // config.d_model, 1)


def with_width(config: ModelConfig, d_model: int) -> ModelConfig:
    """The same decoder at another width: head size fixed, d_ff and the number of heads in proportion.

    Raises ConfigError when no whole number of heads fits.
    """
    heads, rest = divmod(d_model, config.d_head)
    kv_heads = config.kv_heads * heads / config.n_heads
    if rest or not heads or kv_heads != int(kv_heads) or heads % max(int(kv_heads), 1):
        raise ConfigError(f"width {d_model}: expected a multiple of the head size {config.d_head} with whole kv heads")
    changed = {"d_model": d_model, "n_heads": heads, "d_ff": d_ff_at(config, d_model)}
    if config.n_kv_heads is not None:
        changed["n_kv_heads"] = int(kv_heads)
    return parse(ModelConfig, config.model_dump() | changed, f"width {d_model}")


LADDER = re.compile(r"(?P<family>[a-z0-9-]+?)-w(?P<width>\d{1,6})(?:-l(?P<layers>\d{1,4}))?")


def preset(name: str) -> Config:
    """The mapping of a preset (`model:` and its published `optimizer:`), or of a rung of a ladder, by name.

    Raises ConfigError for an unknown name, with the nearest known one.
    """
    computed = rung(name)
    if computed is not None:
        return computed
    file = _file(name) if _file(name).is_file() else _file(f"{name}-proxy")
    if not file.is_file():
        raise ConfigError(f"{name}: no such model{nearest(name, [*presets(), *families()])}")
    return _model(file)


def rung(name: str) -> Config | None:
    """The mapping of a ladder rung `FAMILY-wWIDTH[-lLAYERS]` (crystalcoder-w256, amber-w128-l8); None for other names.

    It is computed from the family's proxy file. Raises ConfigError for a width that no model of the family has.
    """
    match = LADDER.fullmatch(name)
    if match is None or match["family"] not in families():
        return None
    config = _model(_file(f"{match['family']}-proxy"))
    shape = with_width(parse(ModelConfig, config.mapping["model"], config, ("model",)), int(match["width"]))
    changed = {k: v for k in ("d_model", "n_heads", "n_kv_heads", "d_ff") if (v := getattr(shape, k)) is not None}
    if match["layers"]:
        changed["n_layers"] = int(match["layers"])
    config = merge(config, layer({"model": changed}, name))
    parse(ModelConfig, config.mapping["model"], config, ("model",))
    return config


def _model(file: Path) -> Config:
    config = load_yaml(file, ("models",))
    if "model" not in config.mapping:
        raise ConfigError(f"{file}: model: expected a model's section, none given")
    return config


def _file(name: str) -> Path:
    return CONFIGS / "models" / f"{name}.yaml"


def presets() -> list[str]:
    """Names of all full-size presets."""
    return sorted(p.stem for p in (CONFIGS / "models").glob("*.yaml") if not p.stem.endswith("-proxy"))


def families() -> list[str]:
    """Names of the proxy families, whose rungs are FAMILY-wWIDTH[-lLAYERS]."""
    return sorted(p.stem.removesuffix("-proxy") for p in (CONFIGS / "models").glob("*-proxy.yaml"))


def model_config(name: str) -> ModelConfig:
    """The validated ModelConfig of a preset or ladder rung."""
    config = preset(name)
    return parse(ModelConfig, config.mapping["model"], config, ("model",))

"""The two published forms of such decoders: what config.json says, and what the tensors are called.

LLaMA form (Amber, SmolLM2, AmberChat): `LlamaForCausalLM`, Linear weights as ours, tensor for tensor.

CrystalCoder form (LLM360's own class, derived from GPT-2): Conv1D weights are the transposes of ours, q, k
and v are one tensor, `c_fc2` is the gate and `c_fc` the up projection, and config.json carries muP's forward
multipliers as `mup_*` (facts: llm360.md 1.1, 1.2, 1.5, 1.6). Nothing is folded into the weights: a reader
that forgets the multipliers loads a different model without any error, so here they are required keys.

Keys that would change the forward pass and that the decoder does not have (attention biases in the LLaMA form,
other activations) are declared with the one value that is allowed; rotation is `huggingface_rotary`'s subject. Keys
of dropout and caches do not change it and are ignored; token ids are `token_ids`'.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from crystal.config import parse
from crystal.config.bounded_yaml import shortened
from crystal.errors import ConfigError, WrongValue
from crystal.interop.huggingface_rotary import check_fixed_base, rotary_base
from crystal.zoo.build import meta_decoder, multipliers_for, plan_for
from crystal.zoo.config import ModelConfig, preset

Form = Literal["llama", "crystalcoder"]


class _Json(BaseModel):
    """A config.json: other keys are ignored, types are not coerced."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class _Llama(_Json):
    """What of a LlamaConfig fixes the forward pass; the defaults are transformers'."""

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int | None = Field(None, gt=0)
    head_dim: int | None = None
    max_position_embeddings: int = Field(2048, gt=0)
    rms_norm_eps: float = Field(1e-6, gt=0)
    initializer_range: float = Field(0.02, gt=0)
    tie_word_embeddings: bool = False
    hidden_act: Literal["silu", "swish"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    quantization_config: None = None

    @model_validator(mode="after")
    def _heads(self) -> _Llama:
        if self.head_dim not in (None, self.hidden_size / self.num_attention_heads):
            wanted = f"hidden_size / num_attention_heads = {self.hidden_size / self.num_attention_heads:g}"
            raise WrongValue(f"expected {wanted}, got {self.head_dim}", "head_dim")
        return self

    def model(self) -> dict:
        """The mapping of a ModelConfig."""
        grouped = self.num_key_value_heads if self.num_key_value_heads != self.num_attention_heads else None
        return {
            "d_model": self.hidden_size,
            "n_layers": self.num_hidden_layers,
            "n_heads": self.num_attention_heads,
            "n_kv_heads": grouped,
            "d_ff": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "max_seq_len": self.max_position_embeddings,
            "norm": "rmsnorm",
            "norm_eps": self.rms_norm_eps,
            "tie_embeddings": self.tie_word_embeddings,
            "mup": {"parametrization": "sp", "init_std": self.initializer_range},
        }


class _CrystalCoder(_Json):
    """What of a CrystalCoderConfig fixes the forward pass. All that the published file gives is required."""

    vocab_size: int = Field(gt=0)
    n_positions: int = Field(gt=0)
    n_embd: int = Field(gt=0)
    n_layer: int = Field(gt=0)
    n_head: int = Field(gt=0)
    n_inner: int = Field(gt=0)
    rotary_dim: int = Field(gt=0)
    layer_norm_epsilon: float = Field(1e-5, gt=0)
    activation_function: Literal["swiglu"]
    position_embedding_type: Literal["rotary"]
    tie_word_embeddings: Literal[True] = True
    mup_width_scale: float = Field(gt=0)
    mup_embeddings_scale: float = Field(gt=0)
    mup_output_alpha: float = Field(gt=0)
    mup_scale_qk_dot_by_d: bool
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    logit_scale: float | None = None  # ours: what the two factors of logits come to
    initializer_range: float | None = Field(None, gt=0)
    initializer_cut: float | None = Field(None, gt=0)  # ours: only with it does initializer_range mean muP's sigma
    quantization_config: None = None

    @model_validator(mode="after")
    def _whole(self) -> _CrystalCoder:
        width = self.mup_width_scale * self.n_embd
        if round(width) < 1 or abs(width - round(width)) > 1e-6 * width:
            raise WrongValue(f"expected base width / n_embd, got {self.mup_width_scale}", "mup_width_scale")
        if self.n_embd % self.n_head:
            raise WrongValue(f"expected a divisor of n_embd {self.n_embd}, got {self.n_head}", "n_head")
        d_head = self.n_embd // self.n_head
        if self.rotary_dim % 2 or self.rotary_dim > d_head:
            raise WrongValue(f"expected an even number up to {d_head}, got {self.rotary_dim}", "rotary_dim")
        scale = self.mup_output_alpha * self.mup_width_scale
        if self.logit_scale is not None and abs(self.logit_scale - scale) > 1e-6 * scale:
            wanted = f"mup_output_alpha x mup_width_scale = {scale:g}"
            raise WrongValue(f"expected {wanted}, got {self.logit_scale}", "logit_scale")
        return self

    def model(self) -> dict:
        """The mapping of a ModelConfig; init is as in the published run where config.json does not say it our way."""
        mup = preset("crystalcoder-7b").mapping["model"]["mup"] | {
            "base_d_model": round(self.mup_width_scale * self.n_embd),
            "embedding_multiplier": self.mup_embeddings_scale,
            "output_alpha": self.mup_output_alpha,
            "attention_scale": "1/d" if self.mup_scale_qk_dot_by_d else "1/sqrt_d",
        }
        if self.initializer_cut is not None and self.initializer_range is not None:
            mup |= {"init_std": self.initializer_range, "init_truncate": self.initializer_cut}
        return {
            "d_model": self.n_embd,
            "n_layers": self.n_layer,
            "n_heads": self.n_head,
            "d_ff": self.n_inner,
            "vocab_size": self.vocab_size,
            "max_seq_len": self.n_positions,
            "norm": "layernorm",
            "norm_eps": self.layer_norm_epsilon,
            "bias": True,
            "rotary_fraction": self.rotary_dim / (self.n_embd // self.n_head),
            "rotary_style": "interleaved",
            "tie_embeddings": True,
            "mup": mup,
        }


def config_from_json(mapping: dict, where: str) -> tuple[ModelConfig, Form]:
    """The model that a config.json describes. Raises ConfigError naming `where` and the key."""
    model_type = mapping.get("model_type")
    if model_type not in ("llama", "crystalcoder"):
        raise ConfigError(f"{where}: model_type: expected llama or crystalcoder, got {shortened(repr(model_type), 60)}")
    if model_type == "llama":
        values = parse(_Llama, mapping, where).model() | {"rotary_base": rotary_base(mapping, where)}
    else:
        values = parse(_CrystalCoder, mapping, where).model()
        check_fixed_base(mapping, where)
    config = parse(ModelConfig, values, where)
    try:
        plan_for(config)  # a base width without whole heads is a mistake of this file, not of a later command
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return config, model_type


def form_of(config: ModelConfig) -> Form:
    """The published form that computes this model's forward pass. Raises ConfigError when neither does."""
    factors = multipliers_for(config, plan_for(config))
    form: Form = "llama" if config.norm == "rmsnorm" else "crystalcoder"
    known = [("the multiplier of residual branches", factors.residual, 1)]
    if form == "llama":
        known += [
            ("bias", config.bias, False),
            ("rotary_fraction", config.rotary_fraction, 1),
            ("rotary_style", config.rotary_style, "half"),
            ("mup.attention_scale", config.mup.attention_scale, "1/sqrt_d"),
            ("the multiplier of embeddings", factors.embedding, 1),
            ("the multiplier of logits", factors.logits, 1),
        ]
    else:
        known += [
            ("bias", config.bias, True),
            ("n_kv_heads", config.kv_heads, config.n_heads),
            ("rotary_base", config.rotary_base, 10000),  # no key in the published file
            ("rotary_style", config.rotary_style, "interleaved"),
            ("tie_embeddings", config.tie_embeddings, True),
        ]
    for key, value, expected in known:
        if value != expected:
            raise ConfigError(f"{key}: expected {expected} for the published {form} form, got {value}")
    return form


def config_to_json(config: ModelConfig, token_ids: dict | None = None) -> dict:
    """The config.json of a model, in the form that fits it. Raises ConfigError when none does.

    token_ids: its `bos_token_id`, `eos_token_id` and others (`crystal.interop.token_ids.exported`); none are invented.
    """
    if form_of(config) == "llama":
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "intermediate_size": config.d_ff,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "num_key_value_heads": config.kv_heads,
            "max_position_embeddings": config.max_seq_len,
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rotary_base,  # read by transformers 4 and 5
            "initializer_range": config.mup.init_std,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": config.tie_embeddings,
            **(token_ids or {}),
            "torch_dtype": "float32",
        }
    return {
        "architectures": ["CrystalCoderLMHeadModel"],
        "model_type": "crystalcoder",
        "vocab_size": config.vocab_size,
        "n_positions": config.max_seq_len,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_ff,
        "activation_function": "swiglu",
        "position_embedding_type": "rotary",
        "rotary_dim": config.rotary_dim,
        "layer_norm_epsilon": config.norm_eps,
        "mup_width_scale": plan_for(config).logits_multiplier / config.mup.output_alpha,
        "mup_embeddings_scale": config.mup.embedding_multiplier,
        "mup_output_alpha": config.mup.output_alpha,
        "mup_scale_qk_dot_by_d": config.mup.attention_scale == "1/d",
        "scale_attn_weights": True,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": True,
        **(token_ids or {}),
        "torch_dtype": "float32",
    }


class Published(NamedTuple):
    """A tensor as published: `ours` stacked along their first dimension, then perhaps transposed (Conv1D)."""

    name: str
    shape: tuple[int, ...]
    ours: tuple[str, ...]
    transposed: bool


_LLAMA = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.out",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
_CRYSTALCODER = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn.q attn.k attn.v",
    "attn.c_proj": "attn.out",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.up",
    "mlp.c_fc2": "mlp.gate",
    "mlp.c_proj": "mlp.down",
}


def published_tensors(config: ModelConfig, form: Form) -> list[Published]:
    """Every tensor of a model in a published form; together `ours` are all of the decoder's."""
    shapes = {name: tuple(p.shape) for name, p in meta_decoder(config).named_parameters()}
    tensors = []
    for name, ours in _names(config, form):
        rows = sum(shapes[our][0] for our in ours)
        shape = (rows, *shapes[ours[0]][1:])
        conv1d = form == "crystalcoder" and ".c_" in name and len(shape) == 2
        tensors.append(Published(name, shape[::-1] if conv1d else shape, ours, conv1d))
    return tensors


def _names(config: ModelConfig, form: Form) -> Iterator[tuple[str, tuple[str, ...]]]:
    llama = form == "llama"
    kinds = ("weight",) if llama else ("weight", "bias")
    yield ("model.embed_tokens" if llama else "transformer.wte") + ".weight", ("embed.weight",)
    for i in range(config.n_layers):
        block = f"model.layers.{i}" if llama else f"transformer.h.{i}"
        for theirs, ours in (_LLAMA if llama else _CRYSTALCODER).items():
            for kind in kinds:
                yield f"{block}.{theirs}.{kind}", tuple(f"blocks.{i}.{our}.{kind}" for our in ours.split())
    for kind in kinds:
        yield ("model.norm." if llama else "transformer.ln_f.") + kind, (f"norm.{kind}",)
    if not config.tie_embeddings:
        yield "lm_head.weight", ("head.weight",)


TIED = {"model.embed_tokens.weight": "lm_head.weight", "transformer.wte.weight": "lm_head.weight"}
"""Embedding → the copy of it that files of tied models may also hold."""

BUFFERS = re.compile(
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)"
    r"|transformer\.h\.\d+\.attn\.(bias|masked_bias)"
)
"""Tables and masks that old versions of transformers saved: not weights, dropped."""

"""CrystalCoder for transformers 5: configuration and model, in one file that needs torch and transformers only.

The file is copied as it stands into each directory that `crystal export --to hf` writes, where config.json's
`auto_map` names its classes; the same classes are registered by `import crystal.interop.hf`. Tensors have the
published names and layout (`transformer.h.N.attn.c_attn`, Conv1D: in x out), no factor is folded into them.

Forward pass: token embeddings x mup_embeddings_scale; blocks x += attn(ln_1(x)), x += mlp(ln_2(x)); ln_f; tied
head x logit_scale. Attention scores are scaled by 1/d_head (mup_scale_qk_dot_by_d) or 1/sqrt(d_head); the first
rotary_dim dimensions of each head turn in interleaved pairs; the MLP is c_proj(c_fc(x) * silu(c_fc2(x))).

Shapes in names: B batch, T tokens, D n_embd, H heads, K d_head, P rotary pairs, S keys seen, V vocabulary.
"""

import inspect
import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import PretrainedConfig as PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from transformers.utils import can_return_tuple

try:
    from transformers import initialization as init  # leaves alone what was loaded
except ImportError:
    from torch.nn import init

# transformers 5.24 renamed past_key_values to cache, and the mask's arguments changed names before
MASK_ARGUMENTS = set(inspect.signature(create_causal_mask).parameters)
CACHE = "cache" if "cache" in MASK_ARGUMENTS else "past_key_values"


class CrystalConfig(PreTrainedConfig):
    """The published config.json, with two additions.

    logit_scale: what logits are multiplied with, mup_output_alpha x mup_width_scale. Code that scores with the
    backbone and `lm_head.weight` alone (TRL's SFT and DPO) reads this name, and would lose the factor otherwise.
    initializer_range, initializer_cut: sigma of the embedding's initial normal and the cut in sigmas; hidden
    matrices have sigma x sqrt(mup_width_scale), those that write the residual stream / sqrt(2 n_layer) besides.
    Raises ValueError for a value that this forward pass does not have.
    """

    model_type = "crystalcoder"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012

    vocab_size: int = 32032
    n_positions: int = 2048
    n_embd: int = 4096
    n_layer: int = 32
    n_head: int = 32
    n_inner: int = 10922
    activation_function: str = "swiglu"
    position_embedding_type: str = "rotary"
    rotary_dim: int = 32
    layer_norm_epsilon: float = 1e-5
    resid_pdrop: float | int = 0.0
    embd_pdrop: float | int = 0.0
    attn_pdrop: float | int = 0.0
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    mup_width_scale: float | int = 0.0625
    mup_embeddings_scale: float | int = 14.6
    mup_output_alpha: float | int = 2.22
    mup_scale_qk_dot_by_d: bool = True
    logit_scale: float | int | None = None
    initializer_range: float = 0.073
    initializer_cut: float | None = 2.0
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        self.settle()
        super().__post_init__(**kwargs)

    def settle(self) -> None:
        """Fill in logit_scale where it is not given, and check what is."""
        scale = self.mup_output_alpha * self.mup_width_scale
        if self.logit_scale is None:
            self.logit_scale = scale
        fixed = {
            "activation_function": "swiglu",
            "position_embedding_type": "rotary",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
        }
        for key, value in fixed.items():
            if getattr(self, key) != value:
                raise ValueError(f"{key}: expected {value}, got {getattr(self, key)}")
        if not math.isclose(self.logit_scale, scale, rel_tol=1e-6):
            raise ValueError(
                f"logit_scale: expected mup_output_alpha x mup_width_scale = {scale:g}, got {self.logit_scale:g}"
            )
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head: expected a divisor of n_embd {self.n_embd}, got {self.n_head}")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.n_embd // self.n_head:
            limit = self.n_embd // self.n_head
            raise ValueError(f"rotary_dim: expected an even number up to {limit}, got {self.rotary_dim}")


def rotary_table(position_ids_BT: Tensor, config: CrystalConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of every pair's angle, fp32 [B, 1, T, P]: bf16 angles are off by whole turns from 256 on."""
    pair_P = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=position_ids_BT.device)
    angle_BTP = position_ids_BT[..., None].float() * (1.0 / 10000.0 ** (pair_P / config.rotary_dim))
    return angle_BTP.cos()[:, None], angle_BTP.sin()[:, None]


def rotated(x_BHTK: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Dimension 2i turned with 2i + 1, in fp32; the dimensions after the pairs pass."""
    cos, sin = table
    turning, passing = x_BHTK.split([2 * cos.shape[-1], x_BHTK.shape[-1] - 2 * cos.shape[-1]], -1)
    a, b = turning.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return torch.cat((turned.to(x_BHTK.dtype), passing), -1)


def eager_attention_forward(module, q, k, v, attention_mask, scaling: float, dropout: float = 0.0, **kwargs):
    """([B, T, H, K], attention weights [B, H, T, S]); the softmax in fp32."""
    scores = q @ k.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(q.dtype), dropout, module.training)
    return (weights @ v).transpose(1, 2).contiguous(), weights


class CrystalAttention(nn.Module):
    """Causal self-attention; one tensor for q, k and v."""

    num_key_value_groups = 1  # attention functions read it
    is_causal = True

    def __init__(self, config: CrystalConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = 1 / self.head_dim if config.mup_scale_qk_dot_by_d else self.head_dim**-0.5
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_BTD, attention_mask=None, table=None, cache=None, **kwargs):
        """(output [B, T, D], attention weights or None)."""
        heads = (h.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for h in self.c_attn(hidden_BTD).chunk(3, -1))
        q, k, v = heads
        q, k = rotated(q, table), rotated(k, table)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        # transformers looks for these very words in this file, to tell whether the implementation can be changed
        if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        elif self.config._attn_implementation == "eager":
            attend = eager_attention_forward
        else:
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.config.attn_pdrop if self.training else 0.0
        y_BTHK, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.resid_dropout(self.c_proj(y_BTHK.flatten(2).contiguous())), weights


class CrystalMLP(nn.Module):
    """SwiGLU; c_fc2 is the gate."""

    def __init__(self, config: CrystalConfig):
        super().__init__()
        self.c_fc = Conv1D(config.n_inner, config.n_embd)
        self.c_fc2 = Conv1D(config.n_inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_inner)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.c_fc(hidden_BTD) * F.silu(self.c_fc2(hidden_BTD))))


class CrystalBlock(GradientCheckpointingLayer):
    """Pre-norm, sequential."""

    def __init__(self, config: CrystalConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CrystalAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = CrystalMLP(config)

    def forward(self, hidden_BTD, attention_mask=None, table=None, cache=None, **kwargs):
        """(hidden states, attention weights or None)."""
        y_BTD, weights = self.attn(self.ln_1(hidden_BTD), attention_mask, table, cache, **kwargs)
        hidden_BTD = hidden_BTD + y_BTD
        return hidden_BTD + self.mlp(self.ln_2(hidden_BTD)), weights


class CrystalPreTrainedModel(PreTrainedModel):
    """What transformers asks of a family."""

    config_class = CrystalConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CrystalBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"h\.\d+\.attn\.(masked_)?bias"]  # noqa: RUF012 - masks in old files
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the published run was started (not as the published class would, whose sigmas are others)."""
        config = self.config
        if isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, (Conv1D, nn.Linear, nn.Embedding)):
            std = config.initializer_range
            if isinstance(module, Conv1D):
                std *= config.mup_width_scale**0.5
                if module in [part.c_proj for part in self.modules() if hasattr(part, "c_proj")]:
                    std /= math.sqrt(2 * config.n_layer)
                init.zeros_(module.bias)
            if config.initializer_cut is None:
                init.normal_(module.weight, 0.0, std)
            else:
                cut = config.initializer_cut * std
                init.trunc_normal_(module.weight, 0.0, std, -cut, cut)


class CrystalModel(CrystalPreTrainedModel):
    """The backbone: token ids or embeddings to final, normalised states."""

    def __init__(self, config: CrystalConfig):
        super().__init__(config)
        config.settle()
        # no padding_idx: the id that pads is often the end of text, whose row must go on learning
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(CrystalBlock(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.wte = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,  # noqa: UP045
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, T] or inputs_embeds [B, T, D], as looked up: they are scaled here either way.

        attention_mask: [B, S], 0 where there is padding, on either side. position_ids: [B, T]; where they are not
        given they count from the cache's length on, padding included: rotary positions are relative.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected one of input_ids and inputs_embeds")
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            use_cache, cache = False, None  # a block that runs twice would write its keys twice
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        seen = 0 if cache is None else cache.get_seq_length()
        places_T = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
        if position_ids is None:
            position_ids = places_T[None]
        arguments = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "input_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "cache_position": places_T,  # in the cache, padding included
            CACHE: cache,
            "position_ids": position_ids,
        }
        mask = create_causal_mask(**{k: v for k, v in arguments.items() if k in MASK_ARGUMENTS})
        table = rotary_table(position_ids, self.config)
        hidden = self.drop(inputs_embeds * self.config.mup_embeddings_scale)
        states, attentions = (), ()
        for block in self.h:
            states += (hidden,) if output_hidden_states else ()
            hidden, weights = block(hidden, mask, table, cache=cache, position_ids=position_ids, **kwargs)
            attentions += (weights,) if output_attentions else ()
        hidden = self.ln_f(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
            **{CACHE: cache},
        )


class CrystalForCausalLM(CrystalPreTrainedModel, GenerationMixin):
    """The backbone and its tied head."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: CrystalConfig):
        super().__init__(config)
        self.transformer = CrystalModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.transformer.wte = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,  # noqa: UP045
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] in the weights' dtype, x logit_scale; with labels [B, T] (-100: none) the mean loss too.

        labels are the ids themselves, shifted here. logits_to_keep: only for the last so many positions.
        """
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept]) * self.config.logit_scale
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )

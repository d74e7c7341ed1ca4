"""A decoder of ours as a plain StableLM or LLaMA: which tensors that has, and how each is made of ours, exactly.

StableLM is LayerNorm and SwiGLU with partial rotary positions, as CrystalCoder, but without biases in its products,
without multipliers, and with half rotation. LLaMA is RMSNorm. What they cannot say is folded into weights;
docs/interop.md has the proof. Nothing is approximated: in exact arithmetic the logits are the same numbers.

Shapes in names: d, K, F: our width, head size and feed-forward width; d2, F2: those of the folded model.
Everything is made in fp64, a block of rows at a time, and rounded once, to the dtype that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from crystal.errors import ConfigError
from crystal.zoo.build import meta_decoder, multipliers_for, plan_for
from crystal.zoo.config import ModelConfig
from crystal.zoo.decoder import Multipliers

BLOCK = 32  # folded widths are multiples of it: what Q8_0 packs together, and no kernel dislikes it
GATE = 64.0  # silu(64)/64 is 1 in fp64, and both are powers of two, so exact in every 16-bit format
_ROWS = 2048  # rows that are in fp64 at a time


class Made(NamedTuple):
    """A tensor of the folded model: its name and shape there, our tensors that it is made of, and how.

    make({our name: tensor of any dtype}, dtype) → contiguous CPU tensor of `shape` in `dtype`.
    """

    name: str
    shape: tuple[int, ...]
    ours: tuple[str, ...]
    make: Callable[[Mapping[str, Tensor], torch.dtype], Tensor]


@dataclass(frozen=True)
class Folded:
    """A decoder as another architecture has it: its config.json (without token ids and dtype) and its tensors."""

    architecture: Literal["stablelm", "llama"]
    config: dict
    tensors: list[Made]
    changes: list[str]  # what was folded, a line each, for people

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)


def fold(config: ModelConfig) -> Folded:
    """The plain StableLM (LayerNorm) or LLaMA (RMSNorm) that computes what this decoder computes.

    Raises ConfigError, in one line that says why, where there is none.
    """
    multipliers = multipliers_for(config, plan_for(config))
    architecture = "stablelm" if config.norm == "layernorm" else "llama"
    if architecture == "llama" and config.rotary_dim != config.d_head:
        raise ConfigError(
            f"rotary_fraction: expected 1 with rmsnorm, got {config.rotary_fraction}: LLaMA rotates whole heads, and "
            "StableLM, which rotates parts of them, has no RMSNorm"
        )
    folding = _Folding(config, multipliers)
    return Folded(architecture, folding.config(), list(folding.tensors()), folding.changes())


def assembled(
    made: list[Made], tensors: Iterator[tuple[str, Tensor]], dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the folded model from ours, (our name, tensor) in any order, each as soon as it can be made.

    dtypes: of each tensor by its folded name. Ours are held only until all that are made of them have been. Raises
    ValueError for a tensor that is missing or none of the model's.
    """
    waiting = {tensor.name: tensor for tensor in made}
    users: dict[str, list[str]] = {}
    for tensor in made:
        for name in tensor.ours:
            users.setdefault(name, []).append(tensor.name)
    held: dict[str, Tensor] = {}
    for ours, value in tensors:
        if ours not in users or ours in held:
            raise ValueError(f"{ours}: not a tensor of this model, or one that came twice")
        held[ours] = value
        del value
        for name in list(users[ours]):
            tensor = waiting[name]
            if all(part in held for part in tensor.ours):
                yield name, tensor.make(held, dtypes[name])
                del waiting[name]
                for part in tensor.ours:
                    users[part].remove(name)
                    if not users[part]:
                        del held[part], users[part]
    if waiting:
        raise ValueError(f"{next(iter(waiting.values())).ours[0]}: expected, but no such tensor came")


def half_order(heads: int, d_head: int, rotary_dim: int) -> Tensor:
    """Rows of q or k as half rotation pairs them (i, i + rotary_dim/2), in the order of interleaved pairs (2i, 2i+1).

    int64 [heads * d_head]; each head's rotated dimensions: the even ones first, then the odd ones.
    """
    rows_HK = torch.arange(heads * d_head).view(heads, d_head)
    rotated, rest = rows_HK[:, :rotary_dim], rows_HK[:, rotary_dim:]
    return torch.cat([rotated[:, 0::2], rotated[:, 1::2], rest], 1).flatten()


class _Folding:
    """The numbers of one fold; `bias` is whether there are biases to fold into weights (never with RMSNorm)."""

    def __init__(self, config: ModelConfig, multipliers: Multipliers):
        self.ours, self.m = config, multipliers
        self.stable = config.norm == "layernorm"
        self.bias = config.bias and self.stable
        self.d, self.K, self.F = config.d_model, config.d_head, config.d_ff
        self.groups = config.n_heads // config.kv_heads
        extra = 0  # more heads of keys and values, and with each a group of queries
        if self.bias:
            extra = next(e for e in range(1, BLOCK + 1) if (self.d + e * self.groups * self.K) % BLOCK == 0)
        self.heads, self.kv_heads = config.n_heads + extra * self.groups, config.kv_heads + extra
        self.d2 = self.heads * self.K
        self.F2 = -(-(self.F + 1) // BLOCK) * BLOCK if self.bias else self.F
        self.gain = math.sqrt(self.d / self.d2)  # of every norm: the variance over d2 channels is d/d2 of that over d
        self.shapes = {name: tuple(p.shape) for name, p in meta_decoder(config).named_parameters()}
        # llama.cpp's StableLM wants a head of its own
        self.tied = config.tie_embeddings and self.m.embedding == self.m.logits == 1 and not self.stable
        self.query = multipliers.attention * math.sqrt(self.K)  # they divide scores by sqrt(K) themselves

    def config(self) -> dict:
        ours = self.ours
        common = {
            "vocab_size": ours.vocab_size,
            "hidden_size": self.d2,
            "intermediate_size": self.F2,
            "num_hidden_layers": ours.n_layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": ours.max_seq_len,
            "hidden_act": "silu",
            "rope_theta": ours.rotary_base,  # read by transformers 4 and 5, vLLM and llama.cpp's converter
            "initializer_range": ours.mup.init_std,
            "tie_word_embeddings": self.tied,
            "use_cache": True,
        }
        if not self.stable:
            mine = {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "rms_norm_eps": ours.norm_eps,
                "attention_bias": ours.bias,
                "mlp_bias": ours.bias,
            }
        else:
            mine = {
                "architectures": ["StableLmForCausalLM"],
                "model_type": "stablelm",
                "layer_norm_eps": ours.norm_eps * self.d / self.d2,
                "partial_rotary_factor": ours.rotary_dim / self.K,
                "use_qkv_bias": False,
                "qk_layernorm": False,
                "use_parallel_residual": False,
            }
        return mine | common

    def changes(self) -> list[str]:
        m, found = self.m, []
        if self.bias:
            found += [
                f"what writes the residual stream is centred, and the width goes from {self.d} to {self.d2} "
                f"({self.heads - self.ours.n_heads} more heads), eps and gains scaled accordingly",
                "one channel is the constant 1 after every norm, so that biases of q, k, v, gate and up are columns",
                "one head carries the constant, whose column of o_proj is the bias of attention's output",
                f"d_ff goes from {self.F} to {self.F2}: one unit is the constant 1 and carries the bias of down",
            ]
        if self.ours.rotary_style == "interleaved":
            found.append("rows of q and k are permuted from interleaved to half rotation")
        if not math.isclose(self.query, 1, rel_tol=1e-12):
            found.append(f"the scale of attention's scores is in q: rows x {self.query:.6g}")
        if m.embedding != 1:
            found.append(f"the embedding is multiplied by {m.embedding:.6g}")
        if m.residual != 1:
            found.append(f"the outputs of attention and feed-forward are multiplied by {m.residual:.6g}")
        if m.logits != 1:
            found.append(f"the head is multiplied by {m.logits:.6g}")
        if self.ours.tie_embeddings and not self.tied:
            found.append("embedding and head, which share a weight, are two")
        return found

    # what the folded model is made of, in the order of its layers

    def tensors(self) -> Iterator[Made]:
        V = self.ours.vocab_size
        yield self._made("model.embed_tokens.weight", (V, self.d2), ("embed.weight",), self._embedding)
        for i in range(self.ours.n_layers):
            yield from self._layer(f"model.layers.{i}.", f"blocks.{i}.")
        yield from self._norm("model.norm", "norm")
        if not self.tied:
            head = "embed.weight" if self.ours.tie_embeddings else "head.weight"
            yield self._made("lm_head.weight", (V, self.d2), (head,), self._head)

    def _layer(self, theirs: str, ours: str) -> Iterator[Made]:
        d_kv, d_kv2 = self.ours.kv_heads * self.K, self.kv_heads * self.K
        yield from self._norm(f"{theirs}input_layernorm", f"{ours}attn_norm")
        for kind, rows, rows2 in (("q", self.d, self.d2), ("k", d_kv, d_kv2), ("v", d_kv, d_kv2)):
            order = torch.arange(rows)
            if kind in "qk" and self.ours.rotary_style == "interleaved":
                order = half_order(rows // self.K, self.K, self.ours.rotary_dim)
            scale = self.query if kind == "q" else 1.0
            # an extra head of values, whose first is 1: attention's weights sum to 1, so it comes out as 1
            unit = (rows, 1.0) if kind == "v" else None
            yield from self._reads(
                f"{theirs}self_attn.{kind}_proj", f"{ours}attn.{kind}", (rows2, self.d2), order, scale, unit
            )
        yield from self._writes(f"{theirs}self_attn.o_proj", f"{ours}attn.out", self.d2)
        yield from self._norm(f"{theirs}post_attention_layernorm", f"{ours}mlp_norm")
        for kind, value in (("gate", GATE), ("up", 1 / GATE)):
            yield from self._reads(
                f"{theirs}mlp.{kind}_proj", f"{ours}mlp.{kind}", (self.F2, self.d2), torch.arange(self.F), 1.0,
                (self.F, value),
            )  # fmt: skip
        yield from self._writes(f"{theirs}mlp.down_proj", f"{ours}mlp.down", self.F2)

    def _made(self, name: str, shape: tuple[int, ...], ours: tuple[str, ...], fill: Callable) -> Made:
        def make(held: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
            parts = [held[part] for part in ours]
            for part, value in zip(ours, parts, strict=True):
                if tuple(value.shape) != self.shapes[part]:
                    raise ValueError(f"{part}: expected shape {list(self.shapes[part])}, got {list(value.shape)}")
            out = torch.zeros(shape, dtype=dtype)
            fill(out, *parts)
            if dtype == torch.float16 and not torch.isfinite(out).all():
                raise ConfigError(f"{name}: expected numbers that fp16 holds (up to 65,504), it has larger; bf16 does")
            return out

        return Made(name, shape, ours, make)

    def _norm(self, theirs: str, ours: str) -> Iterator[Made]:
        def weight(out: Tensor, gain: Tensor) -> None:
            out[: self.d] = gain.double() * self.gain

        def shift(out: Tensor, bias: Tensor) -> None:
            out[: self.d] = bias
            if self.bias:
                out[self.d] = 1  # its gain is 0: the constant

        yield self._made(f"{theirs}.weight", (self.d2,), (f"{ours}.weight",), weight)
        if self.stable:
            yield self._made(f"{theirs}.bias", (self.d2,), (f"{ours}.bias",), shift)

    def _reads(
        self, theirs: str, ours: str, shape: tuple[int, int], order: Tensor, scale: float, unit: tuple | None
    ) -> Iterator[Made]:
        """A product of normalised states: rows in `order` times scale; its bias is the constant channel's column.

        unit: (row, value): that row reads the constant alone.
        """

        def fill(out: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
            for rows in _blocks(len(order)):
                out[rows, : self.d] = weight[order[rows]].double() * scale
            if bias is not None:
                out[: len(order), self.d] = bias.double()[order] * scale
                if unit is not None:
                    out[unit[0], self.d] = unit[1]

        def shift(out: Tensor, bias: Tensor) -> None:
            out[:] = bias.double()[order] * scale

        folded = (f"{ours}.bias",) if self.bias else ()
        yield self._made(f"{theirs}.weight", shape, (f"{ours}.weight", *folded), fill)
        if self.ours.bias and not self.bias:
            yield self._made(f"{theirs}.bias", shape[:1], (f"{ours}.bias",), shift)

    def _writes(self, theirs: str, ours: str, columns: int) -> Iterator[Made]:
        """A product that writes the residual stream: centred where the stream must be, its bias behind its columns."""

        def fill(out: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
            wide = weight.shape[1]
            mean = weight.sum(0, dtype=torch.float64) / self.d if self.bias else 0.0
            for rows in _blocks(self.d):
                out[rows, :wide] = (weight[rows].double() - mean) * self.m.residual
            if bias is not None:
                centred = bias.double() - bias.double().mean()
                out[: self.d, wide] = centred * self.m.residual

        def shift(out: Tensor, bias: Tensor) -> None:
            out[:] = bias.double() * self.m.residual

        folded = (f"{ours}.bias",) if self.bias else ()
        yield self._made(f"{theirs}.weight", (self.d2, columns), (f"{ours}.weight", *folded), fill)
        if self.ours.bias and not self.bias:
            yield self._made(f"{theirs}.bias", (self.d2,), (f"{ours}.bias",), shift)

    def _embedding(self, out: Tensor, weight: Tensor) -> None:
        for rows in _blocks(len(weight)):
            row = weight[rows].double()
            out[rows, : self.d] = (row - row.mean(1, keepdim=True) if self.bias else row) * self.m.embedding

    def _head(self, out: Tensor, weight: Tensor) -> None:
        for rows in _blocks(len(weight)):
            out[rows, : self.d] = weight[rows].double() * self.m.logits


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(a, min(a + _ROWS, rows)) for a in range(0, rows, _ROWS))

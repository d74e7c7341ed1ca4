"""Config → decoder, plan and initial weights: everything that is decided before a backend exists."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from crystal.mup.plan import Plan, TensorPlan, make_plan
from crystal.mup.rules import Tuning
from crystal.zoo.config import ModelConfig, d_ff_at, with_width
from crystal.zoo.decoder import Decoder, Multipliers

RESIDUAL_OUT = ("attn.out.weight", "mlp.down.weight")
_NEUTRAL = Multipliers(1.0, 1.0, 1.0, 1.0)


class _LeftAsTheyAre(TorchFunctionMode):
    """Tensors are not initialized: on the meta device that does nothing, and imports torch._dynamo for seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        return func(*args, **kwargs)


def meta_decoder(config: ModelConfig, multipliers: Multipliers = _NEUTRAL) -> Decoder:
    """The decoder on the meta device: shapes and structure, no memory."""
    with torch.device("meta"), _LeftAsTheyAre():
        return Decoder(config, multipliers)


def parameter_count(config: ModelConfig) -> int:
    """Exact number of parameters, tied tensors counted once, from tensors on the meta device."""
    return sum(p.numel() for p in meta_decoder(config).parameters())


def plan_for(config: ModelConfig, *, weight_decay: float = 0.1, decay_vectors: bool = False, eps: float = 1e-8) -> Plan:
    """The parameter plan of a decoder; weight decay and eps are the optimizer's, the rest is in config.mup."""
    mup_ = config.mup
    group = config.n_heads // config.kv_heads * config.d_head  # the smallest width with whole heads
    base = group if mup_.parametrization == "sp" else mup_.base_d_model  # under sp nothing scales
    tuning = Tuning(
        init_std=mup_.init_std,
        init_truncate=mup_.init_truncate,
        embedding_multiplier=mup_.embedding_multiplier,
        output_alpha=mup_.output_alpha,
        residual_init_2l=mup_.residual_init_2l,
        depth_alpha=mup_.depth_alpha,
        weight_decay=weight_decay,
        decay_vectors=decay_vectors,
        independent_decay=mup_.weight_decay == "independent",
        eps=eps,
    )
    return make_plan(
        meta_decoder(config),
        meta_decoder(_of_width(config, base)),
        meta_decoder(_of_width(config, 2 * base)),
        mup_.parametrization,
        tuning,
        residual_out=RESIDUAL_OUT,
        n_layers=config.n_layers,
        base_n_layers=mup_.base_n_layers,
    )


def _of_width(config: ModelConfig, width: int) -> ModelConfig:
    """The shapes of another width; where no whole number of heads fits (the base may be narrower than a head of the
    target), of one head: shapes do not depend on how many there are."""
    if width % config.d_head:
        shape = {"d_model": width, "d_ff": d_ff_at(config, width), "n_heads": 1, "n_kv_heads": None}
        return ModelConfig(**(config.model_dump(exclude={"mup"}) | shape | {"rotary_fraction": 1.0}), mup=config.mup)
    return with_width(config, width)


def multipliers_for(config: ModelConfig, plan: Plan) -> Multipliers:
    """The floats that the decoder multiplies with, at training and at inference."""
    power = -1.0 if config.mup.attention_scale == "1/d" else -0.5
    return Multipliers(
        embedding=plan.embedding_multiplier,
        attention=config.d_head**power,
        residual=plan.residual_multiplier,
        logits=plan.logits_multiplier,
    )


def build(config: ModelConfig, plan: Plan) -> Decoder:
    """The decoder with its multipliers, on meta; fill it with `initial_weights` or a checkpoint."""
    return meta_decoder(config, multipliers_for(config, plan))


def initial_weights(plan: Plan, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 tensor on the CPU), one at a time.

    Each tensor has its own generator, seeded by (seed, name): the same weights whatever the order, the layout or
    the number of processes that ask for them.
    """
    for row in plan.tensors:
        yield row.tensor, initial_tensor(row, seed)


def initial_tensor(row: TensorPlan, seed: int) -> Tensor:
    """One tensor as its plan row says: zeros, ones, or a normal of parent sigma init_std cut at +-init_cut."""
    tensor = torch.empty(row.shape, dtype=torch.float32)
    if row.init != "normal":
        return tensor.fill_(1.0 if row.init == "ones" else 0.0)
    digest = hashlib.sha256(f"{seed}:{row.tensor}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    if row.init_cut is None:
        return tensor.normal_(0.0, row.init_std, generator=generator)
    return truncated_normal_(tensor, row.init_std, row.init_cut, generator)


def truncated_normal_(
    tensor: Tensor, std: float, cut: float, generator: torch.Generator, part: int = 1 << 18
) -> Tensor:
    """Fill an fp32 tensor: every number is drawn again, all at a time, until none is beyond +-cut.

    The numbers of torch.nn.init.trunc_normal_ bit for bit, but in parts that stay in the cache: a large tensor takes
    no more memory than its own, and less time. part: a multiple of 16, torch's groups of normals.
    """
    if tensor.is_meta:  # the audit reads what would be drawn off torch's own initialiser
        return torch.nn.init.trunc_normal_(tensor, 0.0, std, -cut, cut, generator=generator)
    flat = tensor.view(-1).normal_(0.0, std, generator=generator)
    bound = torch.tensor(cut).item()  # in fp32, as the numbers are
    starts = range(0, max(flat.numel() - 15, 1), part)  # normals are drawn otherwise where fewer than 16 are left
    parts = [flat[a : a + part] if a + part + 15 < flat.numel() else flat[a:] for a in starts]
    again = torch.empty(parts[-1].numel() if len(parts) == 1 else max(part, parts[-1].numel()))
    beyond = [bool((p.abs() > bound).any()) for p in parts]
    while any(beyond):
        for i, p in enumerate(parts):
            drawn = again[: p.numel()].normal_(0.0, std, generator=generator)
            if beyond[i]:
                outside = p.abs() > bound
                torch.where(outside, drawn, p, out=p)
                beyond[i] = bool((outside & (drawn.abs() > bound)).any())
    return tensor

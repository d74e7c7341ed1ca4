"""How torch, Liger-Kernel and flash-attention compute the operators of the catalog, from the same arguments.

`torch`: what one writes without fused kernels. The others are optional; each function takes what our operator of
that name takes, and an operator a peer has not is missing from its table. flash-attention's Triton kernels are
taken from its sources even where its CUDA extension was not built.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from importlib import metadata

import torch
import torch.nn.functional as F
from torch import Tensor

from crystal.kernels.catalog import EVERYTHING, OPERATORS

PEERS = {"liger": "liger_kernel", "flash-attn": "flash_attn"}


def installed(provider: str) -> str | None:
    """The version of a peer, None where it is not installed."""
    if importlib.util.find_spec(PEERS[provider]) is None:
        return None
    try:
        return metadata.version(PEERS[provider].replace("_", "-"))
    except metadata.PackageNotFoundError:
        return "unknown"


def _torch_add_norm(x, residual, weight, bias, eps, scale=1.0):
    summed = residual + x if scale == 1 else residual + x * scale
    sizes = summed.shape[-1:]
    return F.layer_norm(summed, sizes, weight, bias, eps) if bias is not None else F.rms_norm(
        summed, sizes, weight, eps
    ), summed  # fmt: skip


def _torch_swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return F.silu(gate) * up


def _torch_loss(logits: Tensor, labels: Tensor) -> Tensor:
    scaled = logits * EVERYTHING["logits_scale"]
    loss = F.cross_entropy(scaled, labels, label_smoothing=EVERYTHING["label_smoothing"])
    squares = torch.logsumexp(scaled, -1).square() * (labels != -100)
    return loss + EVERYTHING["z_loss"] * squares.sum() / (labels != -100).sum()


def torch_functions() -> dict[str, Callable]:
    """Every operator by torch's own operations; where torch has none, the definition's."""
    own = {
        "layer_norm": lambda x, weight, bias, eps: F.layer_norm(x, x.shape[-1:], weight, bias, eps),
        "rms_norm": lambda x, weight, eps: F.rms_norm(x, x.shape[-1:], weight, eps),
        "add_layer_norm": _torch_add_norm, "add_rms_norm": _torch_add_norm, "add_layer_norm_scaled": _torch_add_norm,
        "swiglu": _torch_swiglu, "swiglu_packed": _torch_swiglu,
        "cross_entropy": lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"),
        "cross_entropy_full": _torch_loss,
    }  # fmt: skip
    return {operator.name: own.get(operator.name, operator.reference) for operator in OPERATORS}


@functools.cache
def liger_functions() -> dict[str, Callable]:
    """Liger-Kernel's autograd functions with their defaults."""
    ops = {
        name: importlib.import_module(f"liger_kernel.ops.{name}")
        for name in ("layer_norm", "rms_norm", "fused_add_rms_norm", "swiglu", "rope", "cross_entropy")
    }
    loss = ops["cross_entropy"].LigerCrossEntropyFunction

    def rope(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """q and k as views (batch, heads, seq, d) of the packed projection; it copies them."""
        kv_heads = qkv.shape[2] - heads
        q, k = qkv[:, :, : heads - kv_heads].transpose(1, 2), qkv[:, :, heads - kv_heads : heads].transpose(1, 2)
        return ops["rope"].LigerRopeFunction.apply(q, k, cos, sin, None, 1, 2 * cos.shape[-1])

    def full_loss(logits: Tensor, labels: Tensor) -> Tensor:
        scaled = logits * EVERYTHING["logits_scale"]
        options = EVERYTHING["z_loss"], EVERYTHING["label_smoothing"], "mean"
        return loss.apply(scaled, labels, None, -100, *options)[0]

    table = {
        "layer_norm": lambda *a: ops["layer_norm"].LigerLayerNormFunction.apply(*a),
        "rms_norm": lambda *a: ops["rms_norm"].LigerRMSNormFunction.apply(*a),
        "add_rms_norm": lambda x, residual, weight, bias, eps, scale: ops[
            "fused_add_rms_norm"
        ].LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps),
        "swiglu": lambda gate, up: ops["swiglu"].LigerSiLUMulFunction.apply(gate, up),
        "rope_half_packed_inplace": rope,
        "cross_entropy": lambda logits, labels: loss.apply(logits, labels, None, -100, 0.0, 0.0, "none")[0],
        "cross_entropy_full": full_loss,
    }
    if hasattr(ops["swiglu"], "LigerFusedGateUpSiLUMulFunction"):
        table["swiglu_packed"] = lambda packed: ops["swiglu"].LigerFusedGateUpSiLUMulFunction.apply(packed)
    return table


def _flash_module(name: str):
    """A module of flash_attn, whose package cannot be imported without its CUDA extension; the module can."""
    if "flash_attn" not in sys.modules and importlib.util.find_spec("flash_attn_2_cuda") is None:
        package = types.ModuleType("flash_attn")
        package.__path__ = list(importlib.util.find_spec("flash_attn").submodule_search_locations)
        package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None, is_package=True)
        sys.modules["flash_attn"] = package
    return importlib.import_module(f"flash_attn.{name}")


@functools.cache
def flash_functions() -> dict[str, Callable]:
    """flash-attention's Triton operators with their defaults. Import asks for a GPU's properties (see `offline`)."""
    norm, rotary, loss = (_flash_module(f"ops.triton.{name}") for name in ("layer_norm", "rotary", "cross_entropy"))

    def add_norm(x, residual, weight, bias, eps, scale):
        kind = bias is None
        return norm.layer_norm_fn(x, weight, bias, residual=residual, eps=eps, prenorm=True, is_rms_norm=kind)

    return {
        "layer_norm": lambda x, weight, bias, eps: norm.layer_norm_fn(x, weight, bias, eps=eps),
        "rms_norm": lambda x, weight, eps: norm.rms_norm_fn(x, weight, None, eps=eps),
        "add_layer_norm": add_norm,
        "add_rms_norm": add_norm,
        "rope_half_packed_inplace": lambda qkv, cos, sin, heads: rotary.apply_rotary(
            qkv[:, :, :heads], cos, sin, inplace=True
        ),
        "cross_entropy": lambda logits, labels: loss.cross_entropy_loss(logits, labels)[0],
        "cross_entropy_full": lambda logits, labels: loss.cross_entropy_loss(
            logits, labels, label_smoothing=EVERYTHING["label_smoothing"],
            logit_scale=EVERYTHING["logits_scale"], lse_square_scale=EVERYTHING["z_loss"],
        )[0].sum() / (labels != -100).sum(),
    }  # fmt: skip


def functions(provider: str) -> dict[str, Callable]:
    """The operators of "ours", "torch", "liger" or "flash-attn" by name."""
    if provider == "ours":
        return {operator.name: operator.run for operator in OPERATORS}
    return {"torch": torch_functions, "liger": liger_functions, "flash-attn": flash_functions}[provider]()


def in_our_form(provider: str, operator: str, results, arguments: tuple):
    """A peer's results as ours come: its rope hands back q and k alone where ours has the packed q/k/v."""
    if operator != "rope_half_packed_inplace" or provider not in PEERS:
        return results
    qkv, heads = arguments[0], arguments[-1]
    turned = torch.cat([x.transpose(1, 2) for x in results], 2) if provider == "liger" else results
    return torch.cat((turned, qkv[:, :, heads:]), 2)

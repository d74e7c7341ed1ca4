"""What the proofs and the benchmark run: every operator with its reference, inputs, shapes and least traffic.

The tools that check and measure (interpreter, offline compiler, TTIR on the CPU, GPU benchmark) know no operator;
they walk OPERATORS. A shape is a dict of integers; make_inputs turns it into the arguments of `run` and
`reference`, which take the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from crystal.kernels.rope import rope_table

Shape = dict[str, int]


@dataclass(frozen=True)
class Operator:
    """One operator, or one way of calling it."""

    name: str
    run: Callable  # our public function, differentiable unless `inplace`
    reference: Callable  # plain torch, same arguments, any float dtype (fp64 too), differentiable, changes no input
    make_inputs: Callable[[Shape, torch.dtype, torch.device | str, torch.Generator | None], tuple]
    shapes: dict[str, Shape]
    compulsory_bytes: Callable[[Shape, torch.dtype, str], int]  # (shape, dtype, "forward" | "backward")
    kernels: tuple[str, ...]  # names of its Triton kernels
    inplace: bool = False  # run writes over its first arguments and is measured forward only


def normal(sizes, dtype, device, generator, *, mean=0.0, std=1.0, pitch: int | None = None, grad=True) -> Tensor:
    """Normal values as a leaf; `pitch` > last size makes the rows lie that many elements apart. Meta holds none."""
    stored = (*sizes[:-1], pitch or sizes[-1])
    if torch.device(device).type == "meta":
        x = torch.empty(stored, dtype=dtype, device=device)
    else:
        x = torch.randn(stored, generator=generator, device=generator.device if generator else device)
        x = (x * std + mean).to(device, dtype)
    return x[..., : sizes[-1]].detach().requires_grad_(grad)


NORM_SHAPES: dict[str, Shape] = {
    "crystalcoder-7b": {"rows": 8192, "width": 4096},
    "amber-7b": {"rows": 2048, "width": 4096},
    "narrow": {"rows": 16384, "width": 1024},
    "wide": {"rows": 4096, "width": 8192},
    "wide-16384": {"rows": 2048, "width": 16384},
    "wide-65536": {"rows": 512, "width": 65536},
    "small": {"rows": 48, "width": 256},
    "small-1000": {"rows": 21, "width": 1000},
    "small-97": {"rows": 33, "width": 97},
    "small-1": {"rows": 5, "width": 1},
    "small-pitch": {"rows": 19, "width": 200, "pitch": 328},
    "small-wide": {"rows": 3, "width": 9001},
    "small-wider": {"rows": 2, "width": 20001},
}

NORM_KERNELS = (
    "norm_forward", "norm_backward", "column_sums",
    "norm_forward_wide", "norm_backward_rows", "norm_backward_columns",
)  # fmt: skip


def _layer_norm_inputs(shape, dtype, device, generator):
    rows, width = shape["rows"], shape["width"]
    x = normal((rows, width), dtype, device, generator, mean=1.0, pitch=shape.get("pitch"))
    weight = normal((width,), dtype, device, generator, mean=1.0, std=0.1)
    bias = normal((width,), dtype, device, generator, std=0.1)
    return x, weight, bias, 1e-5


def _rms_norm_inputs(shape, dtype, device, generator):
    x, weight, _, eps = _layer_norm_inputs(shape, dtype, device, generator)
    return x, weight, eps


def _add_norm_inputs(scale: float, with_bias: bool):
    def make(shape, dtype, device, generator):
        x, weight, bias, eps = _layer_norm_inputs(shape, dtype, device, generator)
        residual = normal((shape["rows"], shape["width"]), dtype, device, generator, std=2.0)
        return x, residual, weight, bias if with_bias else None, eps, scale

    return make


def _norm_bytes(activations: dict[str, int], vectors: dict[str, int]):
    """Bytes of so many [rows, width] tensors and [width] vectors, each read or written once, by direction."""

    def count(shape: Shape, dtype: torch.dtype, direction: str) -> int:
        elements = activations[direction] * shape["rows"] * shape["width"] + vectors[direction] * shape["width"]
        return elements * dtype.itemsize

    return count


SWIGLU_SHAPES: dict[str, Shape] = {
    "amber-7b": {"rows": 2048, "width": 11008},
    "crystalcoder-7b": {"rows": 8192, "width": 10922},
    "narrow": {"rows": 16384, "width": 2816},
    "small": {"rows": 24, "width": 704},
    "small-682": {"rows": 7, "width": 682},
    "small-33": {"rows": 9, "width": 33},
    "small-1": {"rows": 3, "width": 1},
    "small-pitch": {"rows": 11, "width": 200, "pitch": 328},
}


def _swiglu_inputs(packed: bool):
    def make(shape, dtype, device, generator):
        sizes, pitch = (shape["rows"], (1 + packed) * shape["width"]), shape.get("pitch")
        gate = normal(sizes, dtype, device, generator, std=2.0, pitch=pitch and pitch + packed * shape["width"])
        return (gate,) if packed else (gate, normal(sizes, dtype, device, generator, pitch=pitch))

    return make


def _swiglu_bytes(shape: Shape, dtype: torch.dtype, direction: str) -> int:
    return {"forward": 3, "backward": 5}[direction] * shape["rows"] * shape["width"] * dtype.itemsize


ROPE_SHAPES: dict[str, Shape] = {
    "crystalcoder-7b": {"batch": 2, "seq": 2048, "heads": 32, "kv_heads": 32, "head_dim": 128, "rotary_dim": 32},
    "amber-7b": {"batch": 1, "seq": 2048, "heads": 32, "kv_heads": 32, "head_dim": 128, "rotary_dim": 128},
    "grouped": {"batch": 4, "seq": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "rotary_dim": 64},
    "small": {"batch": 2, "seq": 13, "heads": 4, "kv_heads": 2, "head_dim": 32, "rotary_dim": 16},
    "small-whole": {"batch": 1, "seq": 9, "heads": 3, "kv_heads": 3, "head_dim": 16, "rotary_dim": 16},
    "small-odd": {"batch": 2, "seq": 5, "heads": 5, "kv_heads": 1, "head_dim": 20, "rotary_dim": 12},
    "small-heads": {"batch": 1, "seq": 3, "heads": 33, "kv_heads": 11, "head_dim": 8, "rotary_dim": 2},
}


def _table(shape: Shape, device) -> tuple[Tensor, Tensor]:
    positions = torch.arange(shape["seq"], device=device)
    return rope_table(positions, shape["rotary_dim"], 10000.0)


def _packed_inputs(grad: bool):
    def make(shape, dtype, device, generator):
        heads = shape["heads"] + 2 * shape["kv_heads"]
        sizes = (shape["batch"], shape["seq"], heads, shape["head_dim"])
        qkv = normal(sizes, dtype, device, generator, grad=grad)
        return qkv, *_table(shape, device), shape["heads"] + shape["kv_heads"]

    return make


def _q_and_k_inputs(shape, dtype, device, generator):
    """q and k as a projection leaves them: [batch, heads, seq, d] in the order [batch, seq, heads, d] of memory."""
    q, k = (
        normal((shape["batch"], shape["seq"], shape[heads], shape["head_dim"]), dtype, device, generator)
        .detach().transpose(1, 2).requires_grad_()
        for heads in ("heads", "kv_heads")
    )  # fmt: skip
    positions = torch.arange(shape["seq"], device=device).flip(0).expand(shape["batch"], -1)
    return q, *_table(shape, device), k, positions


def _packed(rope: Callable) -> Callable:
    return lambda qkv, cos, sin, heads: rope(qkv, cos, sin, "half", heads=heads, layout="bshd")


def _q_and_k(rope: Callable) -> Callable:
    return lambda q, cos, sin, k, positions: rope(q, cos, sin, "interleaved", k, positions=positions)


def _rope_bytes(heads: dict[str, int], rotary_only: bool, positions: bool):
    """Bytes of a turn of so many times `heads` and `kv_heads`, the tables and the positions read."""

    def count(shape: Shape, dtype: torch.dtype, direction: str) -> int:
        tokens = shape["batch"] * shape["seq"]
        width = shape["rotary_dim"] if rotary_only else shape["head_dim"]
        turned = sum(times * shape[name] for name, times in heads.items()) * tokens * width * dtype.itemsize
        return 2 * turned + shape["seq"] * shape["rotary_dim"] * 4 + (8 * tokens if positions else 0)

    return count


LOSS_SHAPES: dict[str, Shape] = {
    "crystalcoder-7b": {"rows": 4096, "vocab": 32032},
    "amber-7b": {"rows": 2048, "vocab": 32000},
    "llama-3": {"rows": 2048, "vocab": 128256},
    "small": {"rows": 12, "vocab": 1024},
    "small-5003": {"rows": 5, "vocab": 5003},
    "small-7": {"rows": 9, "vocab": 7},
    "small-pitch": {"rows": 6, "vocab": 200, "pitch": 328},
}


def _loss_inputs(shape, dtype, device, generator):
    rows, vocab = shape["rows"], shape["vocab"]
    logits = normal((rows, vocab), dtype, device, generator, std=3.0, pitch=shape.get("pitch"))
    labels = torch.arange(rows, device=device) * 7919 % vocab
    labels[rows // 2] = -100
    return logits, labels


EVERYTHING = {"logits_scale": 0.8, "label_smoothing": 0.1, "z_loss": 1e-3, "reduction": "mean"}


def _loss(function: Callable, **options) -> Callable:
    return lambda logits, labels: function(logits, labels, **options)


def _loss_bytes(shape: Shape, dtype: torch.dtype, direction: str) -> int:
    passes = {"forward": 1, "backward": 2}[direction]
    return passes * shape["rows"] * shape["vocab"] * dtype.itemsize + 12 * shape["rows"]


def _operators() -> tuple[Operator, ...]:
    from crystal.kernels.add_norm import add_norm, add_norm_reference
    from crystal.kernels.cross_entropy import cross_entropy, cross_entropy_reference
    from crystal.kernels.layer_norm import layer_norm, layer_norm_reference
    from crystal.kernels.rms_norm import rms_norm, rms_norm_reference
    from crystal.kernels.rope import rope, rope_, rope_reference
    from crystal.kernels.swiglu import swiglu, swiglu_reference

    return (
        Operator(
            "layer_norm", layer_norm, layer_norm_reference, _layer_norm_inputs, NORM_SHAPES,
            _norm_bytes({"forward": 2, "backward": 3}, {"forward": 2, "backward": 3}),
            NORM_KERNELS,
        ),
        Operator(
            "rms_norm", rms_norm, rms_norm_reference, _rms_norm_inputs, NORM_SHAPES,
            _norm_bytes({"forward": 2, "backward": 3}, {"forward": 1, "backward": 2}),
            NORM_KERNELS,
        ),
        Operator(
            "add_layer_norm", add_norm, add_norm_reference, _add_norm_inputs(1.0, True), NORM_SHAPES,
            _norm_bytes({"forward": 4, "backward": 4}, {"forward": 2, "backward": 3}),
            NORM_KERNELS,
        ),
        Operator(
            "add_rms_norm", add_norm, add_norm_reference, _add_norm_inputs(1.0, False), NORM_SHAPES,
            _norm_bytes({"forward": 4, "backward": 4}, {"forward": 1, "backward": 2}),
            NORM_KERNELS,
        ),
        Operator(  # with muP's multiplier of the residual branch, as CompleteP has it
            "add_layer_norm_scaled", add_norm, add_norm_reference, _add_norm_inputs(0.3, True), NORM_SHAPES,
            _norm_bytes({"forward": 4, "backward": 5}, {"forward": 2, "backward": 3}),
            NORM_KERNELS,
        ),
        Operator(
            "swiglu", swiglu, swiglu_reference, _swiglu_inputs(packed=False), SWIGLU_SHAPES, _swiglu_bytes,
            ("swiglu_run", "swiglu_run_backward", "swiglu_rows", "swiglu_rows_backward"),
        ),
        Operator(
            "swiglu_packed", swiglu, swiglu_reference, _swiglu_inputs(packed=True), SWIGLU_SHAPES, _swiglu_bytes,
            ("swiglu_rows", "swiglu_rows_backward"),
        ),
        Operator(
            "rope_half_packed", _packed(rope), _packed(rope_reference), _packed_inputs(grad=True), ROPE_SHAPES,
            _rope_bytes({"heads": 1, "kv_heads": 2}, rotary_only=False, positions=False), ("rope_turn",),
        ),
        Operator(
            "rope_half_packed_inplace", _packed(rope_), _packed(rope_reference), _packed_inputs(grad=False),
            ROPE_SHAPES, _rope_bytes({"heads": 1, "kv_heads": 1}, rotary_only=True, positions=False),
            ("rope_turn",), inplace=True,
        ),
        Operator(
            "rope_interleaved_qk", _q_and_k(rope), _q_and_k(rope_reference), _q_and_k_inputs, ROPE_SHAPES,
            _rope_bytes({"heads": 1, "kv_heads": 1}, rotary_only=False, positions=True), ("rope_turn",),
        ),
        Operator(  # each token's loss, as the zoo's head needs it
            "cross_entropy", _loss(cross_entropy, reduction="none"), _loss(cross_entropy_reference, reduction="none"),
            _loss_inputs, LOSS_SHAPES, _loss_bytes, ("cross_entropy_forward", "cross_entropy_backward"),
        ),
        Operator(
            "cross_entropy_full", _loss(cross_entropy, **EVERYTHING), _loss(cross_entropy_reference, **EVERYTHING),
            _loss_inputs, LOSS_SHAPES, _loss_bytes,
            ("cross_entropy_forward", "cross_entropy_total", "cross_entropy_backward"),
        ),
    )  # fmt: skip


OPERATORS = _operators()


def operators(names: tuple[str, ...] | None) -> tuple[Operator, ...]:
    """Those of these names, in the catalog's order; None: all."""
    return tuple(o for o in OPERATORS if names is None or o.name in names)

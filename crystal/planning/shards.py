"""Weights that a device of a layout holds, as the `cuda` backend divides them, and what of them its host copies."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from crystal.backends.config import Layout
from crystal.planning.grace import CHECKPOINT_BYTES
from crystal.zoo.build import meta_decoder
from crystal.zoo.config import ModelConfig

SPLIT = {  # dimension over which tensor parallelism divides a tensor (Shoeybi et al. 2019); all others are whole
    **{f"attn.{name}.{kind}": 0 for name in "qkv" for kind in ("weight", "bias")},
    **{f"mlp.{name}.{kind}": 0 for name in ("gate", "up") for kind in ("weight", "bias")},
    **{"attn.out.weight": 1, "mlp.down.weight": 1, "embed.weight": 0, "head.weight": 0},
}


@dataclass(frozen=True)
class Elements:
    """Numbers of weights on a device: of its blocks, of one of them, and of the ends (embedding, final norm, head), as
    tensor parallelism leaves them; what FSDP leaves of blocks and ends on its fullest device; and of that, what tensor
    parallelism leaves whole, whose gradients sequence parallelism has of a device's own tokens."""

    blocks: int
    block: int
    ends: int
    blocks_part: int
    ends_part: int
    by_tokens: int

    @property
    def whole(self) -> int:
        return self.blocks + self.ends

    @property
    def part(self) -> int:
        return self.blocks_part + self.ends_part


@lru_cache(maxsize=4096)
def held(model: ModelConfig, layout: Layout, process: int = 0) -> Elements:
    """What one of the pp processes of a pipeline holds. With tied embeddings the first and the last hold the matrix.

    FSDP2 divides the first dimension; where that does not go evenly the first devices hold a row more, and as much is
    sent for every device.
    """
    first, last = process == 0, process == layout.pp - 1
    here = {"embed": first or (last and model.tie_embeddings), "norm": last, "head": last}
    block, ends = {}, {}
    for name, shape in _shapes(model):
        if name.startswith("blocks."):
            block[name.split(".", 2)[2]] = shape
        elif here[name.split(".")[0]]:
            ends[name] = shape
    count = blocks_of(model, layout)
    (one, one_part), (rest, rest_part) = (
        tuple(sum(elements(name, shape, layout.tp, fsdp) for name, shape in of.items()) for fsdp in (1, layout.fsdp))
        for of in (block, ends)
    )
    whole = [  # of a block, of the ends
        sum(elements(name, shape, 1, layout.fsdp) for name, shape in of.items() if name not in SPLIT)
        for of in (block, ends)
    ]
    return Elements(count * one, one, rest, count * one_part, rest_part, count * whole[0] + whole[1])


def held_together(model: ModelConfig, layout: Layout) -> int:
    """Weights that all processes hold together: every replica's, the whole ones of each process of `tp`, and a tied
    embedding at both ends of a pipeline."""
    together = 0
    for name, shape in _shapes(model):
        block = name.startswith("blocks.")
        copies = 1 if (name.split(".", 2)[2] if block else name) in SPLIT else layout.tp
        if name == "embed.weight" and model.tie_embeddings and layout.pp > 1:
            copies *= 2
        together += copies * prod(shape) * (model.n_layers if block else 1)
    return layout.dp * together


def blocks_of(model: ModelConfig, layout: Layout) -> int:
    """Blocks of a process of a pipeline; where its stages do not divide them evenly, of the fullest."""
    if layout.pp == 1:
        return model.n_layers
    return -(-model.n_layers // (layout.pp * layout.interleave)) * layout.interleave


@lru_cache(maxsize=16)
def _shapes(model: ModelConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(name, shape) of a decoder with one block."""
    decoder = meta_decoder(model.model_copy(update={"n_layers": 1}))
    return tuple((name, tuple(p.shape)) for name, p in decoder.named_parameters())


def elements(name: str, shape: tuple[int, ...], tp: int, fsdp: int) -> int:
    """Of a tensor on the fullest device; name within its block."""
    local = list(shape)
    if name in SPLIT:
        local[SPLIT[name]] //= tp
    return -(-local[0] // fsdp) * prod(local[1:])


def host_bytes(model: ModelConfig, layout: Layout, devices_per_node: int) -> int:
    """Pinned memory of the fullest node for a checkpoint's copies: fp32 weights and moments that its ranks save.

    Of equal copies the first rank saves: replicas after the first save nothing, nor do ranks of `tp` after the first
    what tensor parallelism leaves whole, nor the last stage a tied embedding.
    """
    nodes = Counter()
    for rank in range(layout.processes):
        rest, tp = divmod(rank, layout.tp)
        process, replica = divmod(rest // layout.fsdp, layout.dp)
        if replica == 0:
            n = held(model, layout, process)
            saved = n.part - (n.by_tokens if tp else 0)
            if model.tie_embeddings and 0 < process == layout.pp - 1:
                saved -= elements("embed.weight", (model.vocab_size, model.d_model), layout.tp, layout.fsdp)
            nodes[rank // devices_per_node] += CHECKPOINT_BYTES * saved
    return max(nodes.values())

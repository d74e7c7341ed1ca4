"""A stage of the decoder: some of its blocks, the embedding before the first, norm and head after the last.

One stage holds the whole model unless there is a pipeline. Names of tensors are the decoder's, whatever the stage.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crystal.backends.cuda.split_loss import split_cross_entropy
from crystal.backends.cuda.tensor_parallel import Split, local
from crystal.kernels import linear_cross_entropy
from crystal.zoo.decoder import Decoder


def layers_of(stage: int, stages: int, n_layers: int) -> range:
    """The blocks of a stage, as evenly as they go."""
    return range(stage * n_layers // stages, (stage + 1) * n_layers // stages)


class Stage(nn.Module):
    """Blocks `layers` of a decoder. A tied embedding is in the first stage and, as the head, in the last."""

    def __init__(self, decoder: Decoder, layers: range, first: bool, last: bool):
        super().__init__()
        self.first, self.last, self.tied = first, last, decoder.head is None
        self.logits = decoder.multipliers.logits
        self.embedded, self.table, self.mask = decoder.embedded, decoder.table, decoder.mask
        self.split: Split | None = None  # the processes that tensor parallelism divides the stage over, if several
        if first or (last and self.tied):
            self.embed = decoder.embed
        self.blocks = nn.ModuleDict({str(i): decoder.blocks[i] for i in layers})
        if last:
            self.norm = decoder.norm
            self.head = decoder.head

    def forward(
        self, x: Tensor, documents_BT: Tensor | None = None, labels_BT: Tensor | None = None, weights_BT=None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """ids_BT or, after the first stage, x_BTD → x_BTD or, of the last stage, (loss [1], nll_N [B * T]), the
        numbers of `Decoder.loss`; none of them is a view, which FSDP2 and pipelines cannot hook.

        With sequence parallelism x_BTD is this process' tokens, all others are those of whole rows."""
        length = x.shape[1] if self.first or self.split is None else x.shape[1] * self.split.token_shards
        table, mask = self.table(0, length, x.device), self.mask(documents_BT)
        x_BTD = self.embedded(x) if self.first else x
        for block in self.blocks.values():
            x_BTD = block(x_BTD, table, mask)
        if not self.last:
            return x_BTD
        x_ND = self.norm(x_BTD).flatten(0, 1)
        weight = self.embed.weight if self.tied else self.head.weight
        head = (labels_BT.flatten(), weights_BT.flatten(), self.logits)
        if self.split is None:
            loss, nll_N = linear_cross_entropy(x_ND, weight, *head)
        else:
            loss, nll_N = split_cross_entropy(x_ND, local(weight), *head, self.split)
        return torch.stack([loss]), nll_N

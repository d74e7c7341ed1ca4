"""The executor (the wafer's role): activations stay, weights pass through, gradients leave.

Each block's input is kept; in the backward pass the block is computed again from it. The decoder's own modules do the
arithmetic, called as functions of the weights in a buffer, in the order of one whole graph: results are those of the
`cpu` backend, bit for bit where the same threads compute the same shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from crystal.backends.base import MicroBatch
from crystal.backends.weight_streaming.boundaries import Boundaries
from crystal.backends.weight_streaming.gradients import Gradients, Sums
from crystal.backends.weight_streaming.store_layout import Piece
from crystal.backends.weight_streaming.stream import Stream
from crystal.memory import release_heap
from crystal.zoo.decoder import Decoder

EMBEDDING, HEAD = "embed.weight", "head.weight"


class Executor:
    """Forward and backward passes of a decoder (on meta: its structure alone is used) over a stream of weights."""

    def __init__(self, decoder: Decoder, stream: Stream, gradients: Gradients):
        self.decoder, self.stream, self.gradients = decoder, stream, gradients
        self.pieces = stream.store.layout.pieces
        self.blocks = [piece for piece in self.pieces if piece.name.startswith("blocks.")]
        self.embedding, self.head = self.pieces[0], self.pieces[-1] if decoder.head is not None else self.pieces[0]
        self.tied = self.head is self.embedding

    def train(
        self,
        batches: Sequence[MicroBatch],
        weights: Iterable[tuple[Piece, Tensor]],
        first: bool,
        last: bool,
        boundaries: Boundaries | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Spill the gradients of `batches`, which pass through the device together; (loss, nll_BT) of each.

        weights: all pieces in forward order. first, last: whether batches of this step came before, or will come.
        boundaries: where gradients are not spilled, filled with what `gradient` makes them of; first and last then.
        """
        rows_R, local = _rows(batches)
        saved, x, rows_RD = self._forward(batches, weights, rows_R, local, keep=True)
        touched, dx = None, []
        for piece, flat in self.stream.weights([self.head, *reversed(self.blocks)]):
            sums = self.gradients.begin(piece, add=not first)
            if piece is self.head:
                touched = _Touched(sums.views[EMBEDDING], rows_R, first) if self.tied else None
                _note(boundaries, piece, inputs=x)
                results, dx = self._head_backward(batches, piece, flat, sums, x, touched)
                x = None
            else:
                _note(boundaries, piece, inputs=saved[-1], gradients=dx)
                dx = self._block_backward(batches, piece, flat, sums, saved.pop(), dx)
            self.gradients.end(piece, sums, whole=last and not (self.tied and piece is self.head))
        _note(boundaries, self.embedding, gradients=dx)
        if boundaries is not None and self.tied:  # the head's part was not kept
            for piece, flat in self.stream.weights([self.embedding]):
                sums = self.gradients.begin(piece, add=False)
                self.gradient(piece, flat, sums.flat, boundaries)
        else:
            sums = self.gradients.begin(self.embedding, add=self.tied or not first)
            self._embedding_gradient(sums, rows_RD, rows_R, local, dx, touched, first)
        self.gradients.end(self.embedding, sums, whole=last)
        self.gradients.flush()
        return results

    def gradient(self, piece: Piece, flat: Tensor, into: Tensor, boundaries: Boundaries) -> None:
        """Fill `into` [numel] with the gradient that a step had for `piece`, whose weights are still `flat`."""
        sums, batches = Sums(into, piece.views(into), set()), boundaries.batches
        with torch.enable_grad():
            if piece is not self.head and piece is not self.embedding:
                inputs, gradients = boundaries.inputs[piece.name], boundaries.gradients[piece.name]
                self._block_backward(batches, piece, flat, sums, inputs, gradients)
                return
            rows_R, local = _rows(batches)
            touched = _Touched(sums.views[EMBEDDING], rows_R, True) if self.tied else None
            if piece is self.head:
                self._head_backward(batches, piece, flat, sums, boundaries.inputs[piece.name], touched)
            if piece is self.embedding:
                rows_RD = piece.views(flat)[EMBEDDING][rows_R]
                dx = boundaries.gradients[piece.name]
                self._embedding_gradient(sums, rows_RD, rows_R, local, dx, touched, first=True)

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch, weights: Iterable[tuple[Piece, Tensor]]) -> Tensor:
        """nll_BT of each token. weights: all pieces in forward order."""
        rows_R, local = _rows([batch])
        _, (x_BTD,), _ = self._forward([batch], weights, rows_R, local, keep=False)
        for piece, flat in self.stream.weights([self.head]):
            return self._score(batch, x_BTD, piece.views(flat))[1]

    @torch.no_grad()
    def _forward(self, batches, weights, rows_R: Tensor, local: list[Tensor], keep: bool):
        """(each block's inputs, the last block's outputs, the embedding's rows in use); lists by micro-batch."""
        saved, x, rows_RD = [], [], None
        for piece, flat in weights:
            views = piece.views(flat)
            if piece is self.embedding:
                rows_RD = views[EMBEDDING][rows_R]
                x = [self.decoder.embedded(ids_BT, rows_RD) for ids_BT in local]
            elif piece is not self.head:
                if keep:
                    saved.append(x)
                named = {name.removeprefix(piece.name + "."): view for name, view in views.items()}
                x = [self._block(named, x_BTD, batch) for x_BTD, batch in zip(x, batches, strict=True)]
        return saved, x, rows_RD

    def _block(self, weights: dict[str, Tensor], x_BTD: Tensor, batch: MicroBatch) -> Tensor:
        """Any block: they are alike but for their weights."""
        table = self.decoder.table(0, x_BTD.shape[1], x_BTD.device)
        return functional_call(self.decoder.blocks[0], weights, (x_BTD, table, self.decoder.mask(batch.documents_BT)))

    def _score(self, batch: MicroBatch, x_BTD: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        norm = {name.removeprefix("norm."): w for name, w in weights.items() if name.startswith("norm.")}
        x_BTD = functional_call(self.decoder.norm, norm, (x_BTD,))
        return self.decoder.score(x_BTD, weights[EMBEDDING if self.tied else HEAD], batch.labels_BT, batch.weights_BT)

    def _block_backward(self, batches, piece: Piece, flat: Tensor, sums: Sums, inputs: list, dy: list) -> list[Tensor]:
        """Add a block's gradients to `sums`; the gradients of its inputs."""
        leaves, dx = sums.leaves(piece.views(flat), piece.name + "."), []
        for batch, x_BTD, dy_BTD in zip(batches, inputs, dy, strict=True):
            leaf_BTD = x_BTD.detach().requires_grad_()
            self._block(leaves, leaf_BTD, batch).backward(dy_BTD)
            dx.append(leaf_BTD.grad)
        return dx

    def _head_backward(self, batches, piece: Piece, flat: Tensor, sums: Sums, inputs: list, touched: _Touched | None):
        """The same for the head: ((loss, nll_BT) of each micro-batch, the gradients of its inputs)."""
        if not self.stream.store.layout.spilled:  # memory is short: the head's fp32 gradient is the largest tensor
            release_heap()
        leaves, results, dx = self._head_leaves(piece, flat, sums, touched), [], []
        for batch, x_BTD in zip(batches, inputs, strict=True):
            leaf_BTD = x_BTD.detach().requires_grad_()
            loss, nll_BT = self._score(batch, leaf_BTD, leaves)
            loss.backward()
            results.append((loss.detach(), nll_BT))
            dx.append(leaf_BTD.grad)
        if not self.stream.store.layout.spilled:
            del loss
            release_heap()
        return results, dx

    def _head_leaves(self, piece: Piece, flat: Tensor, sums: Sums, touched: _Touched | None) -> dict[str, Tensor]:
        leaves = sums.leaves(piece.views(flat))
        if touched is not None:
            # runs before the hook that takes the gradient away: hooks run in the order they were made
            leaf = piece.views(flat)[EMBEDDING].detach().requires_grad_()

            def note(leaf: Tensor) -> None:
                touched.note(leaf.grad)
                sums.add(EMBEDDING, leaf.grad)
                leaf.grad = None

            leaf.register_post_accumulate_grad_hook(note)
            leaves[EMBEDDING] = leaf
        return leaves

    def _embedding_gradient(self, sums: Sums, rows_RD, rows_R, local, dx, touched: _Touched | None, first: bool):
        """The lookup's gradient, in the rows looked up; tied, it joins the head's within each micro-batch."""
        gradient_VD = sums.views[EMBEDDING]
        if self.tied:
            total_RD, parts = touched.before_RD, touched.parts
        else:
            if first:
                sums.flat.zero_()
            total_RD, parts = gradient_VD[rows_R], [None] * len(dx)
        for ids_BT, dx_BTD, part_RD in zip(local, dx, parts, strict=True):
            leaf_RD = rows_RD.detach().requires_grad_()
            self.decoder.embedded(ids_BT, leaf_RD).backward(dx_BTD)
            added_RD = leaf_RD.grad if part_RD is None else part_RD + leaf_RD.grad
            total_RD = added_RD.to(gradient_VD.dtype) if total_RD is None else total_RD + added_RD
        gradient_VD[rows_R] = total_RD


class _Touched:
    """Rows of a tied embedding that the step looks up: the head's gradient there, before and by micro-batch."""

    def __init__(self, sum_VD: Tensor, rows_R: Tensor, first: bool):
        self.rows_R, self.parts = rows_R, []
        self.before_RD = None if first else sum_VD[rows_R]

    def note(self, gradient_VD: Tensor) -> None:
        self.parts.append(gradient_VD[self.rows_R])


def _note(boundaries: Boundaries | None, piece: Piece, **kept: list[Tensor]) -> None:
    """Keep a piece's inputs or the gradients of its outputs, where they are kept."""
    if boundaries is not None:
        for kind, tensors in kept.items():
            getattr(boundaries, kind)[piece.name] = tensors


def _rows(batches: Sequence[MicroBatch]) -> tuple[Tensor, list[Tensor]]:
    """The rows of the embedding in use, and each micro-batch's ids as numbers of those rows."""
    shapes = [batch.ids_BT.shape for batch in batches]
    rows_R, local_N = torch.unique(torch.cat([b.ids_BT.flatten() for b in batches]), return_inverse=True)
    parts = local_N.split([shape.numel() for shape in shapes])
    return rows_R, [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

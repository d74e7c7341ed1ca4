"""How much of a sequence's end a model gives when it is given its beginning: scores, extraction, probabilities.

A sequence is k tokens, the prompt, and l that follow it in the data, S. G are the l tokens that greedy decoding gives
after the prompt.
  score(k, l)          the share of i with S_i = G_i, position by position (LLM360, arXiv 2312.06550)
  k-extractible        all l of them are equal
  p_z                  the probability that sampling, at temperature 1 and from the whole vocabulary, gives S
  (n, p)-discoverable  one of n samples is S with probability p or more: 1 - (1 - p_z)^n >= p (arXiv 2410.19482)

One pass over prompt and S, which reads the true tokens, gives p_z, whether S is extractible, and the score up to the
first mismatch. Up to there greedy decoding reads what the pass read. Only from there on it is run, on the keys and
values of the pass, in the same batch: a sequence that is extracted costs no decoding at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crystal.zoo.decoder import Decoder

BATCH_TOKENS = 1 << 16  # that go through the model together at most
CACHE_BYTES = {"cpu": 1 << 30, "cuda": 1 << 33}  # of their keys and values


@dataclass(frozen=True)
class Extracted:
    """matches: equal positions of l; first: the first that is not (from 0), l where all are; logprob: of S, nats."""

    matches: int
    first: int
    logprob: float


class _Layer:
    """A block's keys and values [B, G, S, K], filled from the left; of T further tokens of the first rows only, where
    fewer rows go on."""

    def __init__(self, shape: tuple[int, ...], like: Tensor):
        self.k_BGSK, self.v_BGSK = like.new_empty(shape), like.new_empty(shape)
        self.at = 0

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        rows, end = len(k_BGTK), self.at + k_BGTK.shape[2]
        self.k_BGSK[:rows, :, self.at : end] = k_BGTK
        self.v_BGSK[:rows, :, self.at : end] = v_BGTK
        return self.k_BGSK[:rows, :, :end], self.v_BGSK[:rows, :, :end]


class _Seen:
    """What the decoder has read of some rows. `at` may be set back: what stood behind it is read anew.

    documents_BS: the number of each token's document in its row, for a model that sees no other document.
    """

    def __init__(self, model: Decoder, rows: int, capacity: int):
        config, weight = model.config, model.embed.weight
        shape = (rows, config.kv_heads, capacity, config.d_head)
        self.layers = [_Layer(shape, weight) for _ in model.blocks]
        self.documents_BS = torch.zeros(rows, capacity, dtype=torch.long, device=weight.device)
        self.apart, self.rows = config.document_mask, rows

    @property
    def length(self) -> int:
        return self.layers[0].at

    def go_to(self, at: int, rows: int) -> None:
        """The next tokens are read at this position, of the first rows alone."""
        self.rows = rows
        for layer in self.layers:
            layer.at = at

    def mask(self, tokens: int, device: torch.device) -> Tensor | None:
        """Keys that the next tokens may see, as `KVCache.mask`."""
        if not self.length and not self.apart:
            return None
        end = self.length + tokens
        mask_1TS = torch.ones(tokens, end, dtype=torch.bool, device=device).tril(self.length)[None]
        if not self.apart:
            return mask_1TS
        own_BS = self.documents_BS[: self.rows, :end]
        return mask_1TS & (own_BS[:, self.length :, None] == own_BS[:, None, :])


def extract(
    model: Decoder,
    sequences: Sequence[Sequence[int]],
    k: int,
    eos_id: int | None = None,
    done: Callable[[int], None] = lambda _: None,
    batch_tokens: int | None = None,
) -> list[Extracted]:
    """Of each sequence of k + l ids, all equally long. Equal sequences are asked once.

    eos_id: what ends a document, for a model with document_mask. done: called with how many are finished.
    batch_tokens: how many go through the model together; default: by device and model. Raises ValueError where k or l
    is 0 or there are more tokens than the model's max_seq_len + 1.
    """
    length = len(sequences[0]) if sequences else 0
    if sequences and not (0 < k < length <= model.config.max_seq_len + 1):
        raise ValueError(f"expected 0 < k < k + l <= {model.config.max_seq_len + 1}, got k {k}, k + l {length}")
    unique = list(dict.fromkeys(map(tuple, sequences)))
    size = max((batch_tokens or _batch_tokens(model)) // max(length, 1), 1)
    found: dict[tuple[int, ...], Extracted] = {}
    copies = dict.fromkeys(unique, 0)
    for ids in sequences:
        copies[tuple(ids)] += 1
    for first in range(0, len(unique), size):
        batch = unique[first : first + size]
        found |= zip(batch, _batch(model, torch.tensor(batch), k, eos_id), strict=True)
        done(sum(copies[ids] for ids in batch))
    return [found[tuple(ids)] for ids in sequences]


def _batch_tokens(model: Decoder) -> int:
    config, weight = model.config, model.embed.weight
    each = 2 * config.n_layers * config.kv_heads * config.d_head * weight.element_size()
    return min(BATCH_TOKENS, CACHE_BYTES.get(weight.device.type, 1 << 30) // each)


@torch.inference_mode()
def _batch(model: Decoder, ids_BN: Tensor, k: int, eos_id: int | None) -> list[Extracted]:
    ids_BN = ids_BN.to(model.embed.weight.device)
    l = ids_BN.shape[1] - k  # noqa: E741
    seen = _Seen(model, len(ids_BN), ids_BN.shape[1])
    if model.config.document_mask and eos_id is not None:
        ended_BN = ids_BN == eos_id
        seen.documents_BS = ended_BN.cumsum(1) - ended_BN.long()
    states_BlD = model.hidden(ids_BN[:, :-1], cache=seen)[:, k - 1 :]
    greedy_Bl, logprob_B = _judged(model, states_BlD, ids_BN[:, k:])
    equal_Bl = greedy_Bl == ids_BN[:, k:]
    first_B = torch.where(equal_Bl.all(1), l, equal_Bl.long().argmin(1))
    order_B = first_B.argsort(stable=True)
    _reorder(seen, order_B)
    matches_B = first_B.clone()
    matches_B[order_B] += _after(model, seen, ids_BN[order_B], greedy_Bl[order_B], first_B[order_B], k, eos_id)
    columns = (matches_B.tolist(), first_B.tolist(), logprob_B.tolist())
    return [Extracted(*values) for values in zip(*columns, strict=True)]


def _judged(model: Decoder, states_BlD: Tensor, truth_Bl: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token at each position [B, l], and the log-probability of the true ones together [B], fp32."""
    greedy_Bl, logprob_B = torch.empty_like(truth_Bl), torch.zeros(len(truth_Bl), device=truth_Bl.device)
    for i in range(truth_Bl.shape[1]):  # a position's logits at a time: B x V numbers
        logits_BV = _logits(model, states_BlD[:, i])
        greedy_Bl[:, i] = logits_BV.argmax(-1)
        logprob_B += logits_BV.gather(1, truth_Bl[:, i : i + 1])[:, 0] - logits_BV.logsumexp(-1)
    return greedy_Bl, logprob_B


def _logits(model: Decoder, states_BD: Tensor) -> Tensor:
    return (states_BD @ model.head_weight.T).float() * model.multipliers.logits


def _reorder(seen: _Seen, order_B: Tensor) -> None:
    seen.documents_BS = seen.documents_BS[order_B]
    for layer in seen.layers:
        layer.k_BGSK, layer.v_BGSK = layer.k_BGSK[order_B], layer.v_BGSK[order_B]


def _after(
    model: Decoder, seen: _Seen, ids_BN: Tensor, greedy_Bl: Tensor, first_B: Tensor, k: int, eos_id: int | None
) -> Tensor:
    """How many positions behind the first mismatch are equal, when greedy decoding goes on by itself [B].

    Rows ascend by first mismatch, so those that have one already are the first rows: a slice, not a copy.
    """
    l = greedy_Bl.shape[1]  # noqa: E741
    equal_B, starts, rows = torch.zeros_like(first_B), first_B.tolist(), 0
    given_B = torch.zeros_like(first_B)  # the token that each row's decoding has given last
    before_B = torch.zeros_like(first_B)  # the one before it
    for i in range(l - 1):
        while rows < len(starts) and starts[rows] == i:
            given_B[rows], before_B[rows] = greedy_Bl[rows, i], ids_BN[rows, k + i - 1]
            rows += 1
        if not rows:
            continue
        if seen.apart and eos_id is not None:
            ended_B = (before_B[:rows] == eos_id).long()
            seen.documents_BS[:rows, k + i] = seen.documents_BS[:rows, k + i - 1] + ended_B
        seen.go_to(k + i, rows)
        state_BD = model.hidden(given_B[:rows, None], cache=seen)[:, 0]
        before_B[:rows] = given_B[:rows]
        given_B[:rows] = _logits(model, state_BD).argmax(-1)
        equal_B[:rows] += given_B[:rows] == ids_BN[:rows, k + i + 1]
    return equal_B


def samples_needed(logprob: float, p: float) -> float:
    """The least n for which n samples hold the sequence with probability p or more; inf where it overflows."""
    p_z = math.exp(logprob)
    if p_z >= p:
        return 1
    if p_z > 1e-12:
        return math.ceil(math.log1p(-p) / math.log1p(-p_z) - 1e-9)
    log_n = math.log(-math.log1p(-p)) - logprob  # log1p(-p_z) is -p_z here
    return math.exp(log_n) if log_n < 700 else math.inf


def discoverable(logprob: float, n: int, p: float) -> bool:
    """Whether one of n samples is the sequence with probability p or more."""
    p_z = math.exp(logprob)
    return p_z >= p if n == 1 else p_z >= 1 or n * math.log1p(-p_z) <= math.log1p(-p)

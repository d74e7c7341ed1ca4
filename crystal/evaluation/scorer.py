"""Log-probabilities of continuations: what a model gives to each answer of a question, token by token.

Rank classification asks for the same contexts again and again: four answers to a question, a thousand questions
behind the same examples. Here every distinct prefix goes through the model once (`prefix_tree.py`), logits are made
only where a token is to be judged, and no token is computed that nobody asks about: that of an answer's last token.
The numbers are those of one forward pass over each context and continuation, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from crystal.evaluation.prefix_tree import Cost, Node, Row, Trunk, arrange
from crystal.zoo.decoder import Decoder

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}  # that go through the model together
_HEAD_ROWS = 1024  # positions whose logits are in memory at a time
_REQUESTS = 4096  # arranged together


@dataclass
class Scored:
    """logprobs: of each token of a continuation, nats, the last first that were left out for want of room as nan.
    greedy: whether each of its tokens is the likeliest one. cut: tokens of the context that there was no room for."""

    logprobs: list[float]
    greedy: bool
    cut: int = 0

    @property
    def total(self) -> float:
        """Of the whole continuation."""
        return sum(self.logprobs)


def score_tokens(
    decoder: Decoder,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    done: Callable[[int], None] = lambda _: None,
    batch_tokens: int | None = None,
) -> list[Scored]:
    """Log-probabilities of every (context ids, continuation ids), fp32 softmax.

    A context must not be empty. Where both together are longer than the model's max_seq_len + 1, the context is cut on
    its left, as lm-eval does; a continuation that is longer by itself raises ValueError. done: called with the number
    of requests that are finished. batch_tokens: how many go through the model together; default: by device.
    """
    scored: list[Scored] = []
    for first in range(0, len(requests), _REQUESTS):
        some = requests[first : first + _REQUESTS]
        scored += _score(decoder, some, batch_tokens or BATCH_TOKENS.get(decoder.embed.weight.device.type, 2048))
        done(len(some))
    return scored


@torch.inference_mode()
def _score(decoder: Decoder, requests, batch_tokens: int) -> list[Scored]:
    asked: dict[bytes, _Asked] = {}
    of_request = []
    for context, continuation in requests:
        ids, cut = _fitted(context, continuation, decoder.config.max_seq_len)
        path = asked.setdefault(ids[:-1].tobytes(), _Asked(ids[:-1], {}))
        key = ids[len(ids) - len(continuation) :].tobytes()
        path.targets.setdefault(key, ids[len(ids) - len(continuation) :])
        of_request.append((path, key, cut))
    paths = list(asked.values())
    pass_ = _Pass(decoder, paths, batch_tokens)
    pass_.trunk(arrange([path.ids for path in paths], _cost(decoder, batch_tokens)), _Prefix.empty(decoder))
    return [Scored(*path.answers[key], cut) for path, key, cut in of_request]


def _fitted(context: Sequence[int], continuation: Sequence[int], limit: int) -> tuple[np.ndarray, int]:
    """Both together as int64, cut on the left to limit + 1, for the last token is only judged; how much was cut."""
    if not len(context) or not len(continuation):
        raise ValueError("expected a context and a continuation of a token each at least")
    if len(continuation) > limit:
        raise ValueError(f"expected a continuation of at most {limit} tokens, got {len(continuation)}")
    cut = max(len(context) + len(continuation) - limit - 1, 0)
    return np.array([*context[cut:], *continuation], np.int64), cut


def _cost(decoder: Decoder, batch_tokens: int) -> Cost:
    """In operations: 2 a weight and token, 4 d_model a layer, query and key; masked attention runs at half the rate."""
    weights = sum(p.numel() for block in decoder.blocks for p in block.parameters())
    pairs = 4 * decoder.config.d_model * decoder.config.n_layers
    return Cost(2 * weights, 2 * pairs, 2 * weights * 128)


@dataclass
class _Asked:
    """A distinct input [T], and the continuations that are judged at its end, by their bytes."""

    ids: np.ndarray
    targets: dict[bytes, np.ndarray]
    answers: dict[bytes, tuple[list[float], bool]] = field(default_factory=dict)


class _Layer:
    """A block's keys and values of a trunk [1, G, P, K], which every row of a batch sees in front of its own."""

    def __init__(self, k_1GPK: Tensor, v_1GPK: Tensor):
        self.k_1GPK, self.v_1GPK = k_1GPK, v_1GPK

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """All that the rows see; what is kept is the trunk."""
        if not self.k_1GPK.shape[2]:
            return k_BGTK, v_BGTK
        batch = len(k_BGTK)
        k_BGSK = torch.cat([self.k_1GPK.expand(batch, -1, -1, -1), k_BGTK], 2)
        v_BGSK = torch.cat([self.v_1GPK.expand(batch, -1, -1, -1), v_BGTK], 2)
        return k_BGSK, v_BGSK


class _Growing(_Layer):
    """One that keeps what it is given: how a trunk comes to be."""

    def append(self, k_1GTK: Tensor, v_1GTK: Tensor) -> tuple[Tensor, Tensor]:
        self.k_1GPK, self.v_1GPK = super().append(k_1GTK, v_1GTK)
        return self.k_1GPK, self.v_1GPK


@dataclass
class _Prefix:
    """A trunk that was read: its keys and values by layer, and its final states [P, D]."""

    layers: list[_Layer]
    states_PD: Tensor

    @classmethod
    def empty(cls, decoder: Decoder) -> _Prefix:
        config, weight = decoder.config, decoder.embed.weight
        nothing = weight.new_empty(1, config.kv_heads, 0, config.d_head)
        return cls([_Layer(nothing, nothing) for _ in decoder.blocks], weight.new_empty(0, config.d_model))


class _Pass:
    """Reads rows and trunks, and fills in the answers of the inputs that end in them."""

    def __init__(self, decoder: Decoder, paths: list[_Asked], batch_tokens: int):
        self.decoder, self.paths, self.batch_tokens = decoder, paths, batch_tokens
        self.device = decoder.embed.weight.device
        self.table = decoder.table(0, max(len(path.ids) for path in paths), self.device)

    def trunk(self, trunk: Trunk, before: _Prefix) -> None:
        """Everything above a trunk: its rows in batches of about the same length, then the trunks on it."""
        prefix = self._grown(before, trunk.tokens)
        rows = sorted(trunk.rows, key=lambda row: row.size)
        while rows:
            size = rows[-1].size
            count = max(self.batch_tokens // max(size, 1), 1)
            self._rows(rows[-count:], prefix)
            del rows[-count:]
        for further in trunk.trunks:
            self.trunk(further, prefix)

    def _grown(self, before: _Prefix, tokens: np.ndarray) -> _Prefix:
        if not len(tokens):
            return before
        P, T = len(before.states_PD), len(tokens)
        layers = [_Growing(layer.k_1GPK, layer.v_1GPK) for layer in before.layers]
        mask_1TS = torch.ones(1, T, P + T, dtype=torch.bool, device=self.device).tril(P) if P else None
        positions_1T = torch.arange(P, P + T, device=self.device)[None]
        states_1TD = self._read(torch.from_numpy(tokens)[None], positions_1T, mask_1TS, layers)
        layers = [_Layer(layer.k_1GPK, layer.v_1GPK) for layer in layers]
        return _Prefix(layers, torch.cat([before.states_PD, states_1TD[0]]))

    def _read(self, ids_BT: Tensor, positions_BT: Tensor, mask_BTS: Tensor | None, layers: Sequence[_Layer]) -> Tensor:
        """Final states [B, T, D]."""
        x_BTD = self.decoder.embedded(ids_BT.to(self.device))
        for block, layer in zip(self.decoder.blocks, layers, strict=True):
            x_BTD = block(x_BTD, (*self.table, positions_BT), mask_BTS, layer)
        return self.decoder.norm(x_BTD)

    def _rows(self, rows: list[Row], prefix: _Prefix) -> None:
        """A batch of rows on a trunk."""
        P, T = len(prefix.states_PD), max(row.size for row in rows)
        flat = [_Flat(row, P, T) for row in rows]
        states_BTD = None
        if T:
            ids_BT, positions_BT = (
                torch.from_numpy(np.stack([getattr(f, name) for f in flat])) for name in ("ids", "positions")
            )
            mask_BTS = torch.from_numpy(np.stack([f.visible for f in flat])).to(self.device)
            states_BTD = self._read(ids_BT, positions_BT.to(self.device), mask_BTS, prefix.layers)
        wanted: list[tuple[_Asked, bytes, list[tuple[int, int]]]] = []  # an answer, and where its tokens are foretold
        for b, f in enumerate(flat):
            for number, path in f.ends:
                asked = self.paths[number]
                at = [(-1, p) for p in range(P)] + [(b, t) for t in path]
                wanted += [(asked, key, at[-len(tokens) :]) for key, tokens in asked.targets.items()]
        self._judge(wanted, states_BTD, prefix.states_PD)

    def _judge(self, wanted, states_BTD: Tensor | None, prefix_PD: Tensor) -> None:
        """Fill in answers; the logits of a position are made once, whoever asks for them."""
        places = {place: i for i, place in enumerate(dict.fromkeys(p for _, _, at in wanted for p in at))}
        if not places:
            return
        place_N = torch.tensor([places[p] for _, _, at in wanted for p in at], device=self.device)
        token_N = torch.from_numpy(np.concatenate([asked.targets[key] for asked, key, _ in wanted])).to(self.device)
        place_N, order = place_N.sort(stable=True)
        token_N = token_N[order]
        states_MD = torch.stack([prefix_PD[t] if b < 0 else states_BTD[b, t] for b, t in places])
        logprob_N, greedy_N = (
            torch.empty(len(order), dtype=t, device=self.device) for t in (torch.float32, torch.bool)
        )
        for first in range(0, len(places), _HEAD_ROWS):
            logits_mV = (states_MD[first : first + _HEAD_ROWS] @ self.decoder.head_weight.T).float()
            logits_mV *= self.decoder.multipliers.logits
            edges = torch.tensor([first, first + len(logits_mV)], device=self.device)
            here = slice(*torch.searchsorted(place_N, edges).tolist())
            rows, tokens = place_N[here] - first, token_N[here]
            logprob_N[order[here]] = logits_mV[rows, tokens] - logits_mV.logsumexp(-1)[rows]
            greedy_N[order[here]] = logits_mV.argmax(-1)[rows] == tokens
        logprobs, greedy, next_ = logprob_N.tolist(), greedy_N.tolist(), 0
        for asked, key, at in wanted:
            stop = next_ + len(at)
            asked.answers[key] = (logprobs[next_:stop], all(greedy[next_:stop]))
            next_ = stop


class _Flat:
    """A row of T tokens on a trunk of P, filled up on the right: ids and positions [T], which keys each token sees
    [T, P + T], and (number of a sequence, its tokens' places in the row) for each that ends in it."""

    def __init__(self, row: Row, P: int, T: int):
        self.ids, self.positions = np.zeros(T, np.int64), np.zeros(T, np.int64)
        self.visible = np.eye(T, P + T, P, dtype=bool)  # what fills it up sees itself: a softmax needs something
        self.ends: list[tuple[int, list[int]]] = []
        self.P, self.used = P, 0
        self._lay(row.root, [])

    def _lay(self, node: Node, path: list[int]) -> None:
        start, length = self.used, len(node.tokens)
        self.used += length
        if length:
            self.ids[start : self.used] = node.tokens
            self.positions[start : self.used] = self.P + len(path) + np.arange(length)
            mine = self.visible[start : self.used]
            mine[:, : self.P] = True
            mine[:, [self.P + t for t in path]] = True
            mine[:, self.P + start : self.P + self.used] = np.tri(length, dtype=bool)
        path = path + list(range(start, self.used))
        if node.ends >= 0:
            self.ends.append((node.ends, path))
        for child in node.children:
            self._lay(child, path)

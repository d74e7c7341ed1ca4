"""Log-probabilities of continuations: what a model gives to each answer of a question, token by token.

Rank classification asks for the same contexts again and again: four answers to a question, a thousand questions
behind the same examples. Here every distinct prefix goes through the model once (`prefix_tree.py`), logits are made
only where a token is to be judged, and no token is computed that nobody asks about: that of an answer's last token.
The numbers are those of one forward pass over each context and continuation, up to rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from crystal.evaluation.prefix_tree import Cost, Node, Row, Trunk, arrange, packed
from crystal.zoo.decoder import Decoder

BATCH_TOKENS = {"cpu": 1024, "cuda": 32768}  # that go through the model together
_TRUNK_TOKENS = {"cpu": 64, "cuda": 512}  # what a trunk costs: a pass of its own, weights read once more
_KEYS = {"cpu": 1 << 15, "cuda": 1 << 18}  # that the rows of a batch see: each has a copy of its trunk's
_LOGITS = 1 << 24  # in memory at a time
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
    its left, as lm-eval does; a continuation that is longer by itself raises ValueError. done: called after each batch
    with the number of requests that it finished, in no order. batch_tokens: how many go through the model together;
    default: by device.
    """
    scored: list[Scored] = []
    for first in range(0, len(requests), _REQUESTS):
        some = requests[first : first + _REQUESTS]
        many = batch_tokens or BATCH_TOKENS.get(decoder.embed.weight.device.type, 1024)
        scored += _score(decoder, some, many, done)
    return scored


@torch.inference_mode()
def _score(decoder: Decoder, requests, batch_tokens: int, done: Callable[[int], None]) -> list[Scored]:
    asked: dict[bytes, _Asked] = {}
    of_request = []
    for context, continuation in requests:
        ids, cut = _fitted(context, continuation, decoder.config.max_seq_len)
        path = asked.setdefault(ids[:-1].tobytes(), _Asked(ids[:-1], {}))
        key = ids[len(ids) - len(continuation) :].tobytes()
        path.targets.setdefault(key, ids[len(ids) - len(continuation) :])
        path.requests[key] += 1
        of_request.append((path, key, cut))
    paths = list(asked.values())
    pass_ = _Pass(decoder, paths, batch_tokens, done)
    pass_.trunk(arrange([path.ids for path in paths], _cost(decoder)), _Prefix.empty(decoder))
    return [Scored(*path.answers[key], cut) for path, key, cut in of_request]


def _fitted(context: Sequence[int], continuation: Sequence[int], limit: int) -> tuple[np.ndarray, int]:
    """Both together as int64, cut on the left to limit + 1, for the last token is only judged; how much was cut."""
    if not len(context) or not len(continuation):
        raise ValueError("expected a context and a continuation of a token each at least")
    if len(continuation) > limit:
        raise ValueError(f"expected a continuation of at most {limit} tokens, got {len(continuation)}")
    cut = max(len(context) + len(continuation) - limit - 1, 0)
    return np.array([*context[cut:], *continuation], np.int64), cut


def _cost(decoder: Decoder) -> Cost:
    """In operations: 2 a weight and token, 4 d_model a layer, query and key; masked attention runs at half the rate."""
    weights = sum(p.numel() for block in decoder.blocks for p in block.parameters())
    pairs = 4 * decoder.config.d_model * decoder.config.n_layers
    return Cost(2 * weights, 2 * pairs, 2 * weights * _TRUNK_TOKENS.get(decoder.embed.weight.device.type, 64))


@dataclass
class _Asked:
    """A distinct input [T], and by their bytes the continuations that are judged at its end, how many requests are for
    each, and what was found."""

    ids: np.ndarray
    targets: dict[bytes, np.ndarray]
    requests: Counter[bytes] = field(default_factory=Counter)
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

    def __init__(self, decoder: Decoder, paths: list[_Asked], batch_tokens: int, done: Callable[[int], None]):
        self.decoder, self.paths, self.batch_tokens, self.done = decoder, paths, batch_tokens, done
        self.device = decoder.embed.weight.device
        self.keys = _KEYS.get(self.device.type, 1 << 15)
        self.table = decoder.table(0, max(len(path.ids) for path in paths), self.device)

    def trunk(self, trunk: Trunk, before: _Prefix) -> None:
        """Everything above a trunk: its rows, the longest first, then the trunks on it."""
        prefix = self._grown(before, trunk.tokens)
        left = sorted(trunk.rows, key=lambda row: -row.size)
        while left:
            size = left[0].size
            room = min(self.batch_tokens // max(size, 1), self.keys // max(len(prefix.states_PD) + size, 1))
            rows, left = packed(left, max(room, 1))
            self._rows(rows, prefix)
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
            mask_BTS = None  # plain causal, which has a faster way
            if P or any(f.branches for f in flat):
                mask_BTS = torch.from_numpy(np.stack([f.visible for f in flat])).to(self.device)
            states_BTD = self._read(ids_BT, positions_BT.to(self.device), mask_BTS, prefix.layers)
        states_ND = prefix.states_PD if states_BTD is None else torch.cat([prefix.states_PD, states_BTD.flatten(0, 1)])
        wanted: list[tuple[_Asked, bytes, list[int]]] = []  # an answer, and the states that foretell its tokens
        for b, f in enumerate(flat):
            for number, path in f.ends:
                asked = self.paths[number]
                longest = max(map(len, asked.targets.values()))
                own = [P + b * T + t for t in path[-longest:]]
                at = [*range(max(P - longest + len(own), 0), P), *own]
                wanted += [(asked, key, at[-len(tokens) :]) for key, tokens in asked.targets.items()]
        self._judge(wanted, states_ND)

    def _judge(self, wanted: list[tuple[_Asked, bytes, list[int]]], states_ND: Tensor) -> None:
        """Fill in answers; the logits of a state are made once, whoever asks for them."""
        places = {place: i for i, place in enumerate(dict.fromkeys(p for _, _, at in wanted for p in at))}
        if not places:
            return
        place_N = torch.tensor([places[p] for _, _, at in wanted for p in at], device=self.device)
        token_N = torch.from_numpy(np.concatenate([asked.targets[key] for asked, key, _ in wanted])).to(self.device)
        place_N, order = place_N.sort(stable=True)
        token_N = token_N[order]
        states_MD = states_ND[torch.tensor(list(places), device=self.device)]
        logprob_N, greedy_N = (
            torch.empty(len(order), dtype=t, device=self.device) for t in (torch.float32, torch.bool)
        )
        many = max(_LOGITS // self.decoder.config.vocab_size, 1)
        for first in range(0, len(places), many):
            logits_mV = (states_MD[first : first + many] @ self.decoder.head_weight.T).float()
            logits_mV *= self.decoder.multipliers.logits
            edges = torch.tensor([first, first + len(logits_mV)], device=self.device)
            here = slice(*torch.searchsorted(place_N, edges).tolist())
            rows, tokens = place_N[here] - first, token_N[here]
            top_m, likeliest_m = logits_mV.max(-1)
            chosen = logits_mV[rows, tokens]
            sum_m = logits_mV.sub_(top_m[:, None]).exp_().sum(-1).log_().add_(top_m)
            logprob_N[order[here]] = chosen - sum_m[rows]
            greedy_N[order[here]] = likeliest_m[rows] == tokens
        logprobs, greedy, next_ = logprob_N.tolist(), greedy_N.tolist(), 0
        for asked, key, at in wanted:
            stop = next_ + len(at)
            asked.answers[key] = (logprobs[next_:stop], all(greedy[next_:stop]))
            next_ = stop
        self.done(sum(asked.requests[key] for asked, key, _ in wanted))


class _Flat:
    """A row of T tokens on a trunk of P, filled up on the right: ids and positions [T], which keys each token sees
    [T, P + T], (number of a sequence, its tokens' places in the row) for each that ends in it, and whether any of its
    tokens does not see all that are before it."""

    def __init__(self, row: Row, P: int, T: int):
        self.ids, self.positions = np.zeros(T, np.int64), np.zeros(T, np.int64)
        self.visible = np.eye(T, P + T, P, dtype=bool)  # what fills it up sees itself: a softmax needs something
        self.ends: list[tuple[int, list[int]]] = []
        self.P, self.used, self.branches = P, 0, False
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
        self.branches |= len(node.children) > 1
        for child in node.children:
            self._lay(child, path)

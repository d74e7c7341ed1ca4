"""What a model writes after many prompts, each up to a stop string: batched, reproducible sample by sample.

On top of `crystal.inference.generate.generate_steps`. Prompts of about the same length go together, the shortest first;
those that have ended leave the batch. What is drawn for a prompt depends on its own seed alone, so up to rounding it
does not matter which prompts it is batched with.

Stop strings are sought in the decoded text, so it does not matter how they are cut into tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from crystal.data.tokenizer import Tokenizer
from crystal.errors import ConfigError
from crystal.inference.generate import generate_steps
from crystal.inference.load import PlainTokenizer
from crystal.memory import available_bytes
from crystal.zoo.decoder import Decoder

_CONTEXT = 8  # tokens of the prompt that new ones are decoded with: a word's space is dropped at the start of a text
_MOST_ROWS = 32
_MEMORY_SHARE = 0.25  # of the free memory, for keys and values


@dataclass(frozen=True)
class Sampling:
    """How to write. samples: texts a prompt. temperature 0: the likeliest token, and samples is 1. max_new_tokens: at
    most; see `budget`. Raises ConfigError for a value out of range."""

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    top_k: int | None = None

    def __post_init__(self):
        for key in ("samples", "max_new_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}: expected at least 1, got {getattr(self, key)}", key=key)
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature: expected 0 or more, got {self.temperature}", key="temperature")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: expected more than 0 and at most 1, got {self.top_p}", key="top_p")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k: expected at least 1, got {self.top_k}", key="top_k")
        if self.temperature == 0 and self.samples > 1:
            raise ConfigError(
                f"samples: expected 1 at temperature 0, where all are the same, got {self.samples}", key="samples"
            )

    def facts(self) -> dict:
        """JSON-ready; a seed and top_p only where they matter."""
        facts = {"samples": self.samples, "temperature": self.temperature, "max_new_tokens": self.max_new_tokens}
        if not self.temperature:
            return facts | {"greedy": True}
        return facts | {"top_p": self.top_p, "seed": self.seed} | ({"top_k": self.top_k} if self.top_k else {})

    def seed_of(self, item: str, sample: int) -> int:
        """Of one sample: it depends on (seed, item, sample) and nothing else."""
        key = f"{self.seed}\0{item}\0{sample}".encode("utf-8", "replace")
        return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Written:
    """text: what follows the prompt, up to the first stop string. ended: by one of the model's end tokens, by a stop
    string or for want of room. tokens: all new ids. cut: tokens of the prompt that there was no room for."""

    text: str
    ended: Literal["eos", "stop", "length"]
    tokens: list[int]
    cut: int


def budget(decoder: Decoder, max_new_tokens: int) -> int:
    """How many tokens may be written: max_new_tokens, but at most half of what the model can see at once.

    It does not depend on the prompt, so prompts of all lengths can be batched; the other half is the prompt's.
    """
    return max(min(max_new_tokens, decoder.config.max_seq_len // 2), 1)


def room(decoder: Decoder, max_new_tokens: int) -> int:
    """How many tokens a prompt may have; of a longer one the last are read."""
    return decoder.config.max_seq_len - budget(decoder, max_new_tokens)


def write(
    decoder: Decoder,
    tokenizer: Tokenizer | PlainTokenizer,
    prompts: Sequence[tuple[Sequence[int], int]],
    stops: Sequence[str],
    ends: Sequence[int],
    sampling: Sampling,
) -> Iterator[list[tuple[int, Written]]]:
    """Continue every (ids, seed); a list of (number of the prompt, what was written) for each batch, as it is done.

    stops: strings at which a text is cut; ends: token ids at which it ends. A prompt longer than `room` is cut on its
    left.
    """
    limit, new = room(decoder, sampling.max_new_tokens), budget(decoder, sampling.max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number][0]))
    first = 0
    while first < len(order):
        longest = min(len(prompts[order[min(first + _MOST_ROWS, len(order)) - 1]][0]), limit)
        batch = order[first : first + _rows(decoder, longest + new)]
        first += len(batch)
        written = _together(decoder, tokenizer, [prompts[number] for number in batch], stops, ends, sampling)
        yield list(zip(batch, written, strict=True))


def _together(decoder, tokenizer, prompts, stops, ends, sampling: Sampling) -> list[Written]:
    limit, new = room(decoder, sampling.max_new_tokens), budget(decoder, sampling.max_new_tokens)
    kept = [list(ids)[-limit:] for ids, _ in prompts]
    rows = [_Row(tokenizer, ids, stops, set(ends)) for ids in kept]
    seeds = [seed for _, seed in prompts]
    top_p, top_k = (sampling.top_p, sampling.top_k) if sampling.temperature else (None, None)
    over = [False] * len(rows)
    steps = generate_steps(decoder, kept, new, sampling.temperature, top_k, top_p, seeds, tuple(ends), over.__getitem__)
    for tokens in steps:
        for number, token in enumerate(tokens):
            if token is not None:
                over[number] = rows[number].add(token)
    return [row.written(len(ids) - len(own)) for row, (ids, _), own in zip(rows, prompts, kept, strict=True)]


class _Row:
    """A text in the making."""

    def __init__(self, tokenizer: Tokenizer | PlainTokenizer, ids: Sequence[int], stops: Sequence[str], ends: set[int]):
        self.tokenizer, self.stops, self.ends = tokenizer, stops, ends
        self.context = list(ids)[-_CONTEXT:]
        self.before = len(tokenizer.decode(self.context))
        self.tokens: list[int] = []
        # a token is a byte at least, so a stop string that has just come is in the text of so many
        self.window = max((len(stop.encode()) for stop in stops), default=0) + _CONTEXT

    def add(self, token: int) -> bool:
        """One more token; whether a stop string is there now."""
        self.tokens.append(token)
        recent = self.tokenizer.decode((self.context + self.tokens)[-self.window :])
        return any(stop in recent for stop in self.stops) and self._stop(self._text()) is not None

    def written(self, cut: int) -> Written:
        text = self._text()
        stop = self._stop(text)
        if stop is not None:
            return Written(text[:stop], "stop", self.tokens, cut)
        return Written(text, "eos" if self.tokens[-1] in self.ends else "length", self.tokens, cut)

    def _text(self) -> str:
        tokens = self.tokens[:-1] if self.tokens[-1] in self.ends else self.tokens
        return self.tokenizer.decode(self.context + tokens)[self.before :]

    def _stop(self, text: str) -> int | None:
        """Where the first stop string begins."""
        return min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=None)


def _rows(decoder: Decoder, tokens: int) -> int:
    """How many rows of so many tokens go together: what their keys and values take decides."""
    config, weight = decoder.config, decoder.embed.weight
    each = 2 * config.n_layers * config.kv_heads * config.d_head * weight.element_size() * tokens
    free = torch.cuda.mem_get_info(weight.device)[0] if weight.device.type == "cuda" else available_bytes()
    return _MOST_ROWS if free is None else max(1, min(_MOST_ROWS, int(free * _MEMORY_SHARE / each)))

"""Text generation with a key-value cache, greedy or sampled.

The cache changes what is computed, not the result: logits of a prefix plus one token are those of the full
forward pass, because muP's multipliers sit in the model and rotary angles depend on absolute positions only.
Sampling is done on the CPU in fp32 with its own generator, so that a seed means the same on every device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crystal.checkpoint import locate, read
from crystal.errors import ConfigError
from crystal.output.progress import Bar
from crystal.zoo.decoder import Decoder

if TYPE_CHECKING:
    from rich.console import Console

from crystal.inference.load import load_decoder, load_tokenizer


class LayerCache:
    """Keys and values of one layer, [B, Hkv, capacity, K], filled from the left."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        self.k_BHSK, self.v_BHSK = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self.length = 0

    def append(self, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of T further tokens; all so far, [B, Hkv, S, K]."""
        end = self.length + k_BHTK.shape[2]
        if end > self.k_BHSK.shape[2]:
            raise ValueError(f"a cache of {self.k_BHSK.shape[2]} tokens cannot hold {end}")
        self.k_BHSK[:, :, self.length : end] = k_BHTK
        self.v_BHSK[:, :, self.length : end] = v_BHTK
        self.length = end
        return self.k_BHSK[:, :, :end], self.v_BHSK[:, :, :end]


class KVCache:
    """What the decoder has seen of B sequences of equal length, allocated once for `capacity` tokens each."""

    def __init__(self, model: Decoder, capacity: int, batch: int = 1):
        config, weight = model.config, model.embed.weight
        shape = (batch, config.kv_heads, capacity, config.d_head)
        self.layers = [LayerCache(shape, weight.dtype, weight.device) for _ in range(config.n_layers)]

    @property
    def length(self) -> int:
        """Tokens seen; read between forward passes, when all layers agree."""
        return self.layers[0].length

    def mask(self, tokens: int, device: torch.device) -> Tensor | None:
        """Keys that the next `tokens` queries may see, bool [1, T, S].

        Needed because is_causal aligns a T x S mask at the top left, where the first query sees the first key
        only. None while empty: then it is the ordinary square mask.
        """
        if not self.length:
            return None
        mask_TS = torch.ones(tokens, self.length + tokens, dtype=torch.bool, device=device)
        return mask_TS.tril(self.length)[None]


def generate(
    model: Decoder,
    ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | None = None,
) -> Iterator[int]:
    """At most max_new_tokens token ids that continue `ids`, one at a time; ends with eos_id if that comes.

    temperature 0 takes the likeliest token; otherwise one is drawn from softmax(logits / temperature), cut to
    the top_k likeliest and to the fewest likeliest whose probabilities reach top_p. The same seed gives
    the same tokens. Raises ConfigError at once for settings out of range or a prompt that leaves no room.
    """
    ids = list(ids)
    limit = model.config.max_seq_len
    if not ids:
        raise ConfigError("prompt: expected at least one token")
    if not all(0 <= i < model.config.vocab_size for i in ids):
        raise ConfigError(f"prompt: expected token ids from 0 to {model.config.vocab_size - 1}")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if len(ids) + max_new_tokens > limit:
        raise ConfigError(
            f"prompt: expected at most {max(limit - max_new_tokens, 0)} tokens (max_seq_len {limit} less "
            f"max_new_tokens {max_new_tokens}), got {len(ids)}"
        )
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature: expected 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k: expected at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p: expected more than 0 and at most 1, got {top_p}")
    generator = torch.Generator().manual_seed(seed)
    return _stream(model, ids, max_new_tokens, temperature, top_k, top_p, generator, eos_id)


def _stream(model, ids, max_new_tokens, temperature, top_k, top_p, generator, eos_id) -> Iterator[int]:
    cache = KVCache(model, len(ids) + max_new_tokens)
    unread = ids
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            logits_V = next_logits(model, unread, cache)
        token = pick(logits_V, temperature, top_k, top_p, generator)
        yield token
        if token == eos_id:
            return
        unread = [token]


def next_logits(model: Decoder, ids: Sequence[int], cache: KVCache) -> Tensor:
    """fp32 logits [V] on the CPU of the token after `ids`, which are read on top of the cache."""
    ids_BT = torch.tensor([list(ids)], device=model.embed.weight.device)
    last_BD = model.hidden(ids_BT, cache=cache)[:, -1]  # only the last position is worth a head
    return (last_BD @ model.head_weight.T * model.multipliers.logits)[0].float().cpu()


def pick(
    logits_V: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """One token from fp32 logits [V]; see `generate` for the settings."""
    if temperature == 0:
        return int(logits_V.argmax())
    top = logits_V.sort(descending=True, stable=True)
    p_V = (top.values / temperature).softmax(-1)
    keep_V = torch.ones_like(p_V, dtype=torch.bool)
    if top_k is not None:
        keep_V[top_k:] = False
        p_V = p_V * keep_V / p_V[:top_k].sum()
    if top_p is not None:
        keep_V &= p_V.cumsum(-1) - p_V < top_p  # the sum before it is still short of top_p
    return int(top.indices[torch.multinomial(p_V * keep_V, 1, generator=generator)])


def generate_text(
    checkpoint: Path,
    prompt: str,
    stage: int | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> dict:
    """Continue a text from a checkpoint or run directory: {text, tokens, prompt_tokens, ended}, JSON-ready.

    text: what follows the prompt, without it; tokens: the new ids; ended: `eos` or `length`. console: progress.
    Raises ConfigError as `generate` and `load_decoder` do, and for a checkpoint without a tokenizer.
    """
    opened = read(locate(Path(checkpoint), stage))
    tokenizer = load_tokenizer(opened)
    model, _ = load_decoder(opened)
    start = [tokenizer.bos_id] if opened.state.get("bos", True) else []
    ids = start + tokenizer.encode(prompt)
    new = []
    with Bar(console, "generating", max_new_tokens, unit="tokens") as bar:
        for token in generate(model, ids, max_new_tokens, temperature, top_k, top_p, seed, tokenizer.eos_id):
            new.append(token)
            bar.advance()
    # decoded together: at the start of a text the tokenizer drops the space that belongs to a first word
    text = tokenizer.decode(ids + new)[len(tokenizer.decode(ids)) :]
    ended = "eos" if new[-1] == tokenizer.eos_id else "length"
    return {"text": text, "tokens": new, "prompt_tokens": len(ids), "ended": ended}

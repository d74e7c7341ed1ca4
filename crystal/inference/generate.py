"""Text generation with a key-value cache, greedy or sampled, of one prompt or of several at a time.

The cache changes what is computed, not the result: logits of a prefix plus one token are those of the full
forward pass, because muP's multipliers sit in the model and rotary angles depend on absolute positions only.
Prompts of different lengths are filled up on the left. What fills them is seen by nobody, and attention depends on
differences of positions alone, so each row gives what it would give on its own, up to rounding.
Sampling is done on the CPU in fp32, each row with its own generator, so that a seed means the same on every device
and in every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from crystal.checkpoint import locate, read
from crystal.errors import ConfigError, RunError
from crystal.inference.load import end_tokens, fitting_dtype, load_decoder, load_tokenizer
from crystal.output.progress import Bar, note
from crystal.zoo.decoder import Decoder

if TYPE_CHECKING:
    from rich.console import Console


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
    """What the decoder has seen of B sequences of equal length, allocated once for `capacity` tokens each.

    padding: how many positions at the left of each row are no tokens of it.
    """

    def __init__(self, model: Decoder, capacity: int, batch: int = 1, padding: Sequence[int] | None = None):
        config, weight = model.config, model.embed.weight
        shape = (batch, config.kv_heads, capacity, config.d_head)
        self.layers = [LayerCache(shape, weight.dtype, weight.device) for _ in range(config.n_layers)]
        self.padding_B = torch.tensor(padding, device=weight.device) if padding is not None and any(padding) else None

    @property
    def length(self) -> int:
        """Tokens seen; read between forward passes, when all layers agree."""
        return self.layers[0].length

    def mask(self, tokens: int, device: torch.device) -> Tensor | None:
        """Keys that the next `tokens` queries may see, bool [1 or B, T, S].

        Needed because is_causal aligns a T x S mask at the top left, where the first query sees the first key
        only. None while empty and unpadded: then it is the ordinary square mask.
        """
        if not self.length and self.padding_B is None:
            return None
        mask_TS = torch.ones(tokens, self.length + tokens, dtype=torch.bool, device=device).tril(self.length)
        if self.padding_B is None:
            return mask_TS[None]
        real_BS = torch.arange(self.length + tokens, device=device) >= self.padding_B[:, None]
        itself_TS = mask_TS.triu(self.length)  # a padded query sees itself: a softmax over nothing would be nan
        return mask_TS & real_BS[:, None] | itself_TS

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        for layer in self.layers:
            layer.k_BHSK, layer.v_BHSK = layer.k_BHSK[list(rows)], layer.v_BHSK[list(rows)]
        if self.padding_B is not None:
            self.padding_B = self.padding_B[list(rows)]


def generate(
    model: Decoder,
    ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | Sequence[int] | None = None,
) -> Iterator[int]:
    """At most max_new_tokens token ids that continue `ids`, one at a time; ends with eos_id if that comes.

    temperature 0 takes the likeliest token; otherwise one is drawn from softmax(logits / temperature), cut to
    the top_k likeliest and to the fewest likeliest whose probabilities reach top_p. The same seed gives
    the same tokens. eos_id: one end token, several, or none. Raises ConfigError at once for settings out of range or
    a prompt that leaves no room.
    """
    steps = generate_steps(model, [ids], max_new_tokens, temperature, top_k, top_p, [seed], eos_id)
    return (token for (token,) in steps)


def generate_batch(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | Sequence[int] | None = None,
) -> list[list[int]]:
    """What follows each of several prompts [B][T_b], computed together: lists of at most max_new_tokens ids, which end
    with an end token where one came.

    Row b draws as `generate` does with seed + b. Raises ConfigError as `generate`, naming the prompt by its number.
    """
    seeds = range(seed, seed + len(prompts))
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens in generate_steps(model, prompts, max_new_tokens, temperature, top_k, top_p, seeds, eos_id):
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.append(token)
    return rows


def generate_steps(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seeds: Sequence[int],
    eos_id: int | Sequence[int] | None,
    done: Callable[[int], bool] = lambda _: False,
) -> Iterator[list[int | None]]:
    """The next token of every prompt, a step at a time; None for those that have ended. seeds: one a prompt.

    done: asked after each step, by the prompt's number, whether it has ended for the caller. Prompts that have ended
    leave the batch when they are half of it or more.
    """
    prompts = [list(ids) for ids in prompts]
    _check_prompts(model, prompts, max_new_tokens)
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature: expected 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k: expected at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p: expected more than 0 and at most 1, got {top_p}")
    if not all(-(2**63) <= number < 2**64 for number in seeds):
        raise ConfigError(f"seed: expected a number of 64 bits, got {max(seeds, key=abs)}")
    ends = set() if eos_id is None else {eos_id} if isinstance(eos_id, int) else set(eos_id)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def over(number: int, token: int) -> bool:
        return token in ends or done(number)

    return _steps(model, prompts, max_new_tokens, temperature, top_k, top_p, generators, over)


def _check_prompts(model: Decoder, prompts: Sequence[list[int]], max_new_tokens: int) -> None:
    for number, ids in enumerate(prompts):
        _check_prompt(model, ids, max_new_tokens, "prompt" if len(prompts) == 1 else f"prompt {number + 1}")


def _check_prompt(model: Decoder, ids: list[int], max_new_tokens: int, name: str) -> None:
    limit = model.config.max_seq_len
    if not ids:
        raise ConfigError(f"{name}: expected at least one token")
    if not all(0 <= i < model.config.vocab_size for i in ids):
        raise ConfigError(f"{name}: expected token ids from 0 to {model.config.vocab_size - 1}")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if len(ids) + max_new_tokens > limit:
        raise ConfigError(
            f"{name}: expected at most {max(limit - max_new_tokens, 0)} tokens (max_seq_len {limit} less "
            f"max_new_tokens {max_new_tokens}), got {len(ids)}"
        )


def _steps(model, prompts, max_new_tokens, temperature, top_k, top_p, generators, over) -> Iterator[list[int | None]]:
    if not prompts:
        return
    longest = max(map(len, prompts))
    padding = [longest - len(ids) for ids in prompts]
    cache = KVCache(model, longest + max_new_tokens, len(prompts), padding)
    unread = torch.tensor([[0] * pad + ids for pad, ids in zip(padding, prompts, strict=True)])
    rows, live = list(range(len(prompts))), set(range(len(prompts)))  # prompts in the batch, and those still written
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            logits_BV = last_logits(model, unread, cache)
        tokens: list[int | None] = [None] * len(prompts)
        for number, logits_V in zip(rows, logits_BV, strict=True):
            if number in live:
                tokens[number] = pick(logits_V, temperature, top_k, top_p, generators[number])
        yield tokens
        live = {number for number in live if not over(number, tokens[number])}
        if not live:
            return
        if 2 * len(live) <= len(rows):
            cache.keep([b for b, number in enumerate(rows) if number in live])
            rows = [number for number in rows if number in live]
        unread = torch.tensor([[tokens[number] or 0] for number in rows])


def last_logits(model: Decoder, ids_BT: Tensor, cache: KVCache) -> Tensor:
    """fp32 logits [B, V] on the CPU of the token after each row, which is read on top of the cache."""
    last_BD = model.hidden(ids_BT.to(model.embed.weight.device), cache=cache)[:, -1]  # the only one worth a head
    return (last_BD @ model.head_weight.T * model.multipliers.logits).float().cpu()


def pick(
    logits_V: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """One token from fp32 logits [V]; see `generate` for the settings. Raises RunError for logits not finite."""
    if not logits_V.isfinite().all():
        raise RunError(
            f"the model's logits are not finite (the first at token {int(logits_V.isfinite().long().argmin())}): its "
            "weights, or what it makes of them in this dtype, are damaged"
        )
    if temperature == 0:
        return int(logits_V.argmax())
    top = logits_V.sort(descending=True, stable=True)
    # the largest is taken off first and in fp64, so that no temperature, however small, makes infinities of all
    p_V = ((top.values - top.values[0]).double() / temperature).float().softmax(-1)
    keep_V = torch.ones_like(p_V, dtype=torch.bool)
    if top_k is not None:
        keep_V[top_k:] = False
        p_V = p_V * keep_V / p_V[:top_k].sum()
    if top_p is not None:
        keep_V &= p_V.cumsum(-1) - p_V < top_p  # the sum before it is still short of top_p
        keep_V[0] = True  # which may be less than fp32 can hold
    return int(top.indices[torch.multinomial(p_V * keep_V, 1, generator=generator)])


def generate_text(checkpoint: Path, prompt: str, *settings, **named) -> dict:
    """Continue a text from a checkpoint or run directory: `generate_texts` of one prompt, its only dict."""
    return generate_texts(checkpoint, [prompt], *settings, **named)[0]


def generate_texts(
    checkpoint: Path,
    prompts: Sequence[str],
    stage: int | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    console: Console | None = None,
    batch_size: int = 8,
    dtype: Literal["auto", "fp32", "bf16"] = "auto",
) -> list[dict]:
    """Continue texts from a checkpoint or run directory: for each {text, tokens, prompt_tokens, ended}, JSON-ready.

    text: what follows the prompt, without it; tokens: the new ids; ended: `eos` (any of the model's end tokens) or
    `length`. Prompt i draws with seed + i. console: progress. batch_size: prompts computed together, those of about
    the same length. dtype: auto is fp32 where the weights fit into memory, else bf16.
    Raises ConfigError as `generate` and `load_decoder` do, and for a checkpoint without a tokenizer.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: expected at least 1, got {batch_size}")
    opened = read(locate(Path(checkpoint), stage))
    tokenizer = load_tokenizer(opened)
    chosen = fitting_dtype(opened, dtype)
    if dtype == "auto" and chosen == torch.bfloat16 and console is not None:
        note(console, "its weights do not fit into memory in fp32: generating in bf16")
    model, _ = load_decoder(opened, chosen)
    start = [tokenizer.bos_id] if opened.state.get("bos", True) and hasattr(tokenizer, "bos_id") else []
    ids = [start + tokenizer.encode(_text(prompt, number)) for number, prompt in enumerate(prompts, 1)]
    _check_prompts(model, ids, max_new_tokens)  # all of them, before the first batch
    ends = end_tokens(opened, tokenizer)
    new: list[list[int]] = [[] for _ in ids]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    with Bar(console, "generating", max_new_tokens * len(ids), unit="tokens") as bar:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            rows, seeds = [ids[i] for i in batch], [seed + i for i in batch]
            for tokens in generate_steps(model, rows, max_new_tokens, temperature, top_k, top_p, seeds, ends):
                came = [(i, token) for i, token in zip(batch, tokens, strict=True) if token is not None]
                for i, token in came:
                    new[i].append(token)
                bar.advance(len(came))
    return [_described(tokenizer, before, after, ends) for before, after in zip(ids, new, strict=True)]


def _text(prompt: str, number: int) -> str:
    """The prompt, if it is text: bytes that are no UTF-8 reach us as halves of surrogate pairs."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(prompt[error.start]):04x}"
        raise ConfigError(f"prompt {number}: expected UTF-8, found {half} at character {error.start}") from None
    return prompt


def _described(tokenizer, ids: list[int], new: list[int], ends: Sequence[int]) -> dict:
    # decoded together: at the start of a text the tokenizer drops the space that belongs to a first word
    text = tokenizer.decode(ids + new)[len(tokenizer.decode(ids)) :]
    return {"text": text, "tokens": new, "prompt_tokens": len(ids), "ended": "eos" if new[-1] in ends else "length"}

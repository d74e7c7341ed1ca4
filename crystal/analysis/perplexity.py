"""Perplexity of held-out documents and of the user's own texts, by source, over a sliding window.

A document is scored as one text: BOS in front (or an end token, where the model knows no BOS) is context and no text,
and the end of the document is not scored. A window is at most so many tokens that the model reads; the first scores
all its tokens, each further one its last `stride`, with what is left of it as context. Stride 1 is the definition: each
token is foretold from all that a window holds in front of it. A longer one costs less and gives less context.

Sums of nats and counts of tokens are added up over windows, so the number is the same for any batch size. A script that
multiplies a batch's mean loss by the length of its rows instead, as Analysis360's does, counts the tokens of one row in
place of the batch's: from batch 2 on it gives a perplexity that is too low.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from crystal.analysis.intervals import Z
from crystal.analysis.kept import kept_or_made
from crystal.errors import ConfigError
from crystal.evaluation.averages import mean, ratio
from crystal.evaluation.bits_per_byte import BitsPerByte, beginning
from crystal.evaluation.evaluate import Evaluation, Where
from crystal.evaluation.items import Items
from crystal.files import cannot_write, write_whole
from crystal.output.progress import Bar
from crystal.zoo.decoder import Decoder

if TYPE_CHECKING:
    from rich.console import Console

_HEAD_ROWS = 1024  # positions whose logits are in memory at a time


@dataclass(frozen=True)
class Settings:
    """window: tokens that the model reads, None: its max_seq_len, or the run's rows where these are shorter. stride:
    new tokens of every window but the first, None: half a window. per_source: documents at most, None: all."""

    window: int | None = None
    stride: int | None = None
    batch_size: int = 8
    per_source: int | None = 100
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"


@dataclass(frozen=True)
class Window:
    """Inputs begin … end-1 of a text, whose last `new` labels, up to the token at `end`, are scored."""

    begin: int
    end: int
    new: int


def windows(length: int, first: int, window: int, stride: int) -> Iterator[Window]:
    """Windows over a text of `length` tokens that score each token from number `first` on once.

    first: at least 1 and at most window. Raises ValueError otherwise, or for a stride that is not 1 … window.
    """
    if not 1 <= first <= window or not 1 <= stride <= window:
        raise ValueError(f"expected 1 <= first, stride <= window {window}, got {first} and {stride}")
    scored = first
    end = min(window, length - 1)
    while scored < length:
        yield Window(max(end - window, 0), end, end + 1 - scored)
        scored, end = end + 1, min(end + stride, length - 1)


@torch.inference_mode()
def text_nats(
    decoder: Decoder,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    window: int,
    stride: int,
    batch_size: int,
    done: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Nats of each (context ids, ids), all tokens of `ids` together; the same for any batch size, up to rounding.

    done: called with how many tokens were scored.
    """
    whole = [[*start, *ids] for start, ids in texts]
    asked = [
        (number, w)
        for number, (start, _) in enumerate(texts)
        for w in windows(len(whole[number]), len(start), window, stride)
    ]
    asked.sort(key=lambda one: one[1].begin - one[1].end)  # of about the same length together; the sort is stable
    nats: list[list[float]] = [[] for _ in texts]
    for first in range(0, len(asked), batch_size):
        some = asked[first : first + batch_size]
        for (number, _), value in zip(some, _batch(decoder, whole, some), strict=True):
            nats[number].append(value)
        done(sum(w.new for _, w in some))
    return [math.fsum(own) for own in nats]


def _batch(decoder: Decoder, whole: Sequence[list[int]], asked: Sequence[tuple[int, Window]]) -> list[float]:
    """Nats of the scored tokens of each window; rows are filled up on the right, where nothing scored looks."""
    longest = max(w.end - w.begin for _, w in asked)
    ids_BT = torch.zeros(len(asked), longest, dtype=torch.long)
    labels, rows, places = [], [], []
    for b, (number, w) in enumerate(asked):
        ids_BT[b, : w.end - w.begin] = torch.tensor(whole[number][w.begin : w.end])
        labels += whole[number][w.end + 1 - w.new : w.end + 1]
        rows += [b] * w.new
        places += range(w.end - w.begin - w.new, w.end - w.begin)
    device = decoder.embed.weight.device
    states_ND = decoder.hidden(ids_BT.to(device))[torch.tensor(rows), torch.tensor(places)]
    nats_N = _nats(decoder, states_ND, torch.tensor(labels, device=device)).double().cpu().numpy()
    return np.bincount(rows, nats_N, len(asked)).tolist()


def _nats(decoder: Decoder, states_ND: Tensor, labels_N: Tensor) -> Tensor:
    parts = []
    for first in range(0, len(labels_N), _HEAD_ROWS):
        logits_nV = (states_ND[first : first + _HEAD_ROWS] @ decoder.head_weight.T).float()
        logits_nV *= decoder.multipliers.logits
        true_n = logits_nV.gather(1, labels_N[first : first + _HEAD_ROWS, None])[:, 0]
        parts.append(logits_nV.logsumexp(-1) - true_n)
    return torch.cat(parts)


def perplexity(
    places: Where, items: Path | None, out: Path, settings: Settings, console: Console | None = None
) -> dict:
    """Every checkpoint over a run's held-out documents and the .jsonl texts of a directory; JSON-ready.

    Writes OUT/perplexity-step-NNNNNNN.json, each document's nats and tokens, and OUT/perplexity.json, and over several
    checkpoints OUT/perplexity.png. What is there with the same settings is not asked again. Raises ConfigError,
    DataError, CheckpointError and RunError.
    """
    if settings.batch_size < 1:
        raise ConfigError(f"--batch-size: expected at least 1, got {settings.batch_size}", key="--batch-size")
    texts = BitsPerByte(places.run, Items(items, console), settings.per_source)
    found = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        with Bar(console, "scoring", unit="tokens", lines=20) as bar:
            for step, directory in places.checkpoints.items():
                bar.what = f"step {step}"
                file = out / f"perplexity-step-{step:07d}.json"
                answers = _of_checkpoint(Evaluation(directory, places, settings.dtype, settings.device), texts,
                                         settings, file, bar)  # fmt: skip
                found.append(_summary(places, step, answers["documents"]) | answers["about"] | {"file": str(file)})
        result = {"checkpoints": found, "pictures": []}
        if len(found) > 1:
            from crystal.analysis.dynamics_plots import plot_perplexity

            plot_perplexity(found, places.curriculum, out / "perplexity.png")
            result["pictures"] = [str(out / "perplexity.png")]
        write_whole(out / "perplexity.json", json.dumps(result, indent=1))
    except OSError as error:
        raise cannot_write(out, error, "the results") from None
    return result


def _of_checkpoint(evaluation: Evaluation, texts: BitsPerByte, settings: Settings, file: Path, bar: Bar) -> dict:
    """{about, documents: [{id, source, nats, tokens, bytes}]}, read or made."""
    named = list(texts.texts())
    size = [len(named), sum(len(text) for _, text in named)]
    config_limit = evaluation.opened.state["model"]["max_seq_len"]
    trained = texts.facts()["window"]
    limit = min(config_limit, trained) if isinstance(trained, int) else config_limit
    window = settings.window or limit
    stride = settings.stride or max(window // 2, 1)
    if not 1 <= window <= config_limit:
        raise ConfigError(f"--window: expected 1 to {config_limit}, the model's max_seq_len, got {window}")
    if not 1 <= stride <= window:
        raise ConfigError(f"--stride: expected 1 to {window}, the window, got {stride}")
    about = {"checkpoint_sha256": evaluation.digest, "dtype": str(evaluation.dtype).removeprefix("torch."),
             "window": window, "stride": stride, "texts": size,
             "texts_sha256": _sha256(named), "facts": texts.facts()}  # fmt: skip

    def make() -> dict:
        start, lead = beginning(evaluation.subject)
        if len(start) > window:
            raise ConfigError(f"--window: expected more than {len(start)}, what stands before a text, got {window}")
        encoded = [(start, evaluation.subject.tokenizer.encode(text)[len(lead) :]) for _, text in named]
        bar.begin(bar.what, sum(len(ids) for _, ids in encoded))
        nats = text_nats(evaluation.subject.decoder, encoded, window, stride, settings.batch_size, bar.advance)
        documents = [
            {"id": name, "source": name.partition("/")[0], "nats": own, "tokens": len(ids), "bytes": len(text.encode())}
            for (name, text), (_, ids), own in zip(named, encoded, nats, strict=True)
        ]
        return {"documents": documents}

    return kept_or_made(file, about, make)


def _sha256(named: Sequence[tuple[str, str]]) -> str:
    """Of ids and texts; hex."""
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def _summary(places: Where, step: int, documents: Sequence[dict]) -> dict:
    """By source, and `mean`: the unweighted mean of nats over sources, as a perplexity."""
    sources = {}
    for name in dict.fromkeys(d["source"] for d in documents):
        own = [d for d in documents if d["source"] == name and d["tokens"]]
        if own:
            sources[name] = figures(own)
    middle = math.fsum(s["nats_per_token"] for s in sources.values()) / len(sources) if sources else math.nan
    curriculum = places.curriculum
    each = curriculum.global_batch_size * curriculum.seq_len if curriculum else None
    return {
        "step": step,
        "tokens": step * each if each else None,
        "perplexity": math.exp(middle),
        "sources": sources,
    }


def figures(documents: Sequence[dict]) -> dict:
    """Of a source's documents: perplexity is exp(all nats / all tokens), with its 95 % interval over documents (None of
    a single one); by_document is the mean of each document's own, as LLM360 reports the Pile's."""
    nats = ratio([d["nats"] for d in documents], [d["tokens"] for d in documents])
    reach = None if nats.stderr is None else Z * nats.stderr
    size = sum(d["bytes"] for d in documents)
    return {
        "perplexity": math.exp(nats.value),
        "interval": None if reach is None else [math.exp(nats.value - reach), math.exp(nats.value + reach)],
        "nats_per_token": nats.value,
        "by_document": mean([math.exp(min(d["nats"] / d["tokens"], 700)) for d in documents]).value,
        "bits_per_byte": math.fsum(d["nats"] for d in documents) / math.log(2) / size,
        "documents": len(documents),
        "tokens": sum(d["tokens"] for d in documents),
    }

"""`crystal export … --check`: every engine that is installed answers as ours does, or the table says by how much not.

The reference is our decoder in fp32 on two rows, one of text and one of random ids from the whole vocabulary. In fp32
an engine may be off by the roundings of two different orders of the same sums, no more (`stated_error`), its 64 greedy
tokens are ours, and its tokenizer gives our ids. Weights of 16 or 8 bits are rounded, so there only logits and ids are
compared, and the logits of the median position may be off by a few times what rounding costs our own decoder there. The
maximum would judge the model: a single position may hang on an attention that any rounding tips over.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from crystal.errors import ConfigError, CrystalError
from crystal.inference.generate import generate
from crystal.inference.load import fits_in_fp32, load_decoder
from crystal.inference.logits import logits
from crystal.interop import engines
from crystal.interop.gguf_file import export_gguf
from crystal.interop.huggingface import export_published
from crystal.interop.native import Opened, export_native, open_for_export
from crystal.zoo.build import parameter_count
from crystal.zoo.config import ModelConfig
from crystal.zoo.decoder import Decoder

TOKENS = 128  # of a row
GREEDY = 64
LARGE = 1_000_000_000  # parameters from which on no further forms are exported for the check alone
# how many times what bf16 costs our own decoder an engine may be off: fp16 has three bits more; Q8_0 rounds what is
# multiplied, weights and activations, to steps of 1/254 of the largest of 32, some four times those of bf16
ROUNDED = {"fp16": 0.5, "bf16": 4, "q8_0": 16}
TEXT = """\
The Earth is the third planet from the Sun and the only one known to have life.

def add(a, b):
    \"\"\"Return the sum of two numbers: naïve, 1234567 + 0.5 → ok.\"\"\"
    if a  is None:
\t\treturn b
    return a + b
"""
TEXTS = [TEXT, "  two spaces first", "\n\n\n    x = {'é': '𝄞'}\r\n", "a", "12 000 000,50 €"]


@dataclass(frozen=True)
class Row:
    """What one engine said.

    max_abs: the largest difference of a logit from ours, None where it is not a number; argmax: part of the positions
    with the same likeliest token; median_abs: the largest difference at the median position; bound: what max_abs may be
    in fp32, and median_abs with rounded weights; greedy: `equal`, `tie` (it parts where our two likeliest lie within
    twice the bound), `differs` or None (not compared); tokens: whether its tokenizer gives our ids, None where it was
    not asked.
    """

    dtype: str
    max_abs: float | None
    median_abs: float | None
    argmax: float
    bound: float
    greedy: str | None
    tokens: bool | None
    verdict: str


@dataclass(frozen=True)
class Agreement:
    """engines: name → what it said; skipped: name → why it did not run."""

    engines: dict[str, Row]
    skipped: dict[str, str]

    @property
    def verdict(self) -> str:
        passed = [row.verdict == "PASS" for row in self.engines.values()]
        return "FAIL" if not all(passed) else "PASS" if passed else "INCONCLUSIVE"

    def json(self) -> dict:
        """{agreement: {engine: {max_abs, argmax, …}}, skipped, verdict}, JSON-ready."""
        rows = {name: asdict(row) for name, row in self.engines.items()}
        return {"agreement": rows, "skipped": self.skipped, "verdict": self.verdict}

    def table(self) -> str:
        """The same for people."""
        head = ("engine", "dtype", "max |Δ|", "median |Δ|", "allowed", "argmax", "greedy text", "tokenizer", "")
        lines = [head]
        for name, row in self.engines.items():
            tokens = {True: "equal", False: "differs", None: "-"}[row.tokens]
            off = ["nan" if value is None else f"{value:.1e}" for value in (row.max_abs, row.median_abs)]
            shown = (*off, f"{row.bound:.1e}", f"{row.argmax:.2%}", row.greedy or "-", tokens)
            lines.append((name, row.dtype, *shown, row.verdict))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join(text + [f"{name}: not run: {why}" for name, why in self.skipped.items()])


def ready(checkpoint: Path) -> None:
    """Whether `check` can ask at all, before anything is written. Raises ConfigError, in a line, where it cannot."""
    opened = open_for_export(checkpoint)
    if not fits_in_fp32(opened.config):
        size = parameter_count(opened.config) * 4 / 1e9
        raise ConfigError(f"--check: compares with our decoder in fp32, {size:.0f} GB, and less memory is free")


def check(checkpoint: Path, out: Path, form: str, dtype: str) -> Agreement:
    """Ask every engine. The one that reads `form` reads `out`, whose weights have `dtype`; for the others the
    checkpoint is exported in fp32 aside, and deleted after, unless it is large.

    Raises ConfigError where the model cannot be folded, CrystalErrors of loading it.
    """
    opened = open_for_export(checkpoint)
    model, _ = load_decoder(opened.source)
    asked = questions(opened)
    ours = [row.numpy() for row in _logits(model, asked.rows)]
    mine = list(generate(model, asked.prompt, asked.greedy))
    rows, skipped = {}, {}
    ways: list[tuple[str, str, Callable, Callable]] = [
        ("transformers-native", "native", engines.native, export_native),
        ("transformers-remote-code", "hf", engines.published, lambda a, b, _: export_published(a, b, "hf")),
        ("llama.cpp", "gguf", engines.llama, export_gguf),
    ]
    costs = _Rounding(model, asked, ours)
    for engine, reads, answer, export in ways:
        why = engines.missing(engine)
        if why is None and reads != form and parameter_count(opened.config) > LARGE:
            why = f"a model of this size is asked one form at a time: --to {reads} --check"
        if why is not None:
            skipped[engine] = why
            continue
        try:
            with tempfile.TemporaryDirectory(dir=out.parent, prefix=".tmp-check-") as aside:
                file, precision = (out, dtype) if reads == form else (Path(aside, f"x.{reads}"), "fp32")
                if reads != form:
                    export(opened.source.directory, file, "fp32")
                said = answer(file, precision, asked)
        except CrystalError as error:
            if reads == form or not isinstance(error, ConfigError):
                raise
            skipped[engine] = str(error)  # no such form of this model
            continue
        bound = costs.bound(precision, opened.config)
        rows[engine] = _judged(precision, bound, model, asked, ours, mine, said, expected_tokens(opened, asked))
    return Agreement(rows, skipped)


def questions(opened: Opened) -> engines.Questions:
    """Rows, prompt and texts for a model; without a tokenizer all ids are random."""
    config = opened.config
    length = min(TOKENS, config.max_seq_len)
    generator = torch.Generator().manual_seed(14)
    noise = torch.randint(config.vocab_size, (2, length), generator=generator).tolist()
    if opened.tokenizer is None:
        rows, texts = noise, []
    else:
        text = opened.tokenizer.encode(TEXT)
        texts = TEXTS
        rows = [([opened.bos_id] if opened.bos else []) + text, noise[1]]
        rows[0] = rows[0][:length]
    greedy = min(GREEDY, config.max_seq_len // 2)
    return engines.Questions(rows, rows[0][: min(16, config.max_seq_len - greedy)], greedy, texts)


def expected_tokens(opened: Opened, asked: engines.Questions) -> list[list[int]]:
    """Our ids of the texts."""
    begin = [opened.bos_id] if opened.bos else []
    return [begin + opened.tokenizer.encode(text) for text in asked.texts]


def stated_error(config: ModelConfig, tokens: int, size: float) -> float:
    """How far apart fp32 logits may lie whose sums were made in different orders.

    size: the largest logit. All sums from ids to logits have n terms together; roundings are as good as independent, so
    their errors add up like sqrt(n) units of 2^-24 (Higham and Mary 2019), times 4 standard deviations for each side.
    """
    attention = 3 * config.d_model + config.d_head + 2 * tokens
    mlp = 2 * config.d_model + config.d_ff
    path = config.n_layers * (attention + mlp) + 2 * config.d_model
    return 8 * 2.0**-24 * math.sqrt(path) * size


class _Rounding:
    """What weights of fewer bits may cost, measured once, on our own decoder."""

    def __init__(self, model: Decoder, asked: engines.Questions, ours: list[np.ndarray]):
        self.model, self.asked, self.ours = model, asked, ours

    def bound(self, dtype: str, config: ModelConfig) -> float:
        if dtype == "fp32":
            size = max(float(np.abs(row).max()) for row in self.ours)
            return stated_error(config, max(map(len, self.asked.rows)), size)
        return ROUNDED[dtype] * self.cost

    @cached_property
    def cost(self) -> float:
        """Of bf16, of 8 bits, as Q8_0's blocks, and unlike fp16's 11 the same on every processor."""
        weights = self.model.state_dict()
        self.model.load_state_dict({name: tensor.bfloat16() for name, tensor in weights.items()}, assign=True)
        said = _logits(self.model, self.asked.rows)
        self.model.load_state_dict(weights, assign=True)
        return float(np.median(_by_position([row.numpy() for row in said], self.ours)))


def _judged(
    dtype: str, bound: float, model: Decoder, asked: engines.Questions, ours: list[np.ndarray], mine: list[int],
    said: engines.Answers, tokens: list[list[int]],
) -> Row:  # fmt: skip
    by_position = _by_position(said.logits, ours)
    off = [float(np.max(by_position)), float(np.median(by_position))]  # nan if any is
    same = [a.argmax(-1) == b.argmax(-1) for a, b in zip(said.logits, ours, strict=True)]
    greedy = _greedy(model, asked.prompt, mine, said.greedy, bound) if dtype == "fp32" else None
    equal = None if said.tokens is None else said.tokens == tokens
    passed = off[0 if dtype == "fp32" else 1] <= bound and greedy != "differs" and equal is not False
    finite = [value if math.isfinite(value) else None for value in off]
    verdict = "PASS" if passed else "FAIL"
    return Row(dtype, *finite, float(np.concatenate(same).mean()), bound, greedy, equal, verdict)


def _by_position(theirs: list[np.ndarray], ours: list[np.ndarray]) -> np.ndarray:
    """The largest difference of a logit at each position of all rows, fp32 [positions]."""
    return np.concatenate([np.abs(a - b).max(-1) for a, b in zip(theirs, ours, strict=True)])


def _greedy(model: Decoder, prompt: list[int], mine: list[int], theirs: list[int], bound: float) -> str:
    """Whether greedy text is the same, up to a place where it hangs on less than the error."""
    if mine == theirs:
        return "equal"
    at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
    if at is None:
        return "differs"
    last = _logits(model, [prompt + mine[:at]])[0][-1]
    first, second = last.topk(2).values.tolist()
    return "tie" if first - second <= 2 * bound else "differs"


def _logits(model: Decoder, rows: list[list[int]]) -> list[torch.Tensor]:
    return [logits(model, torch.tensor([row]))[0] for row in rows]

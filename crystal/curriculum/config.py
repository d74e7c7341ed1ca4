"""The `curriculum:` section of a run, as it is written: stages, sources, weights, learning rates, FIM.

The configs under configs/curricula keep the published names and numbers; a run only adds `scale` and `bind`.
`resolve` makes of it what a run trains by.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from crystal.config import Strict, found, no_longer, within
from crystal.config.bounded_yaml import shortened
from crystal.errors import WrongValue


def _in_a_line(label: str) -> str:
    if not label.strip() or label.splitlines() != [label]:
        raise ValueError(f"expected a text of a line, got {found(label)}")
    return label


Rate = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(gt=0, allow_inf_nan=False), within(1e-12, 10**12)]
Share = Annotated[float, Field(gt=0, allow_inf_nan=False), within(1e-12, 10**9)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False), within(1e-12, 10**9, or_zero=True)]
# Adam moves a weight by up to its rate: beyond 1000 none is left, under 1e-20 none moves in fp32
LearningRate = Annotated[float, Field(ge=0, allow_inf_nan=False), within(1e-20, 1000, or_zero=True)]
Count = Annotated[int, Field(ge=1), within(1, (1 << 31) - 1)]  # of sequences, or tokens of one
Steps = Annotated[int, Field(ge=1), within(1, 1 << 48)]
Tokens = Annotated[int, Field(ge=1), within(1, 1 << 60)]

Label = Annotated[str, no_longer(200), AfterValidator(_in_a_line)]  # on a plot, in a line
MAX_LR, MAX_SEQUENCES = 1000, 1 << 48  # of a stage; the order's arithmetic is 64-bit (crystal/data/order.py)
SUM_TOLERANCE = 1e-6
_FRACTION = re.compile(r"\s*(?:[0-9]{1,20}(?:\.[0-9]{0,20}|/[0-9]{1,20})?|\.[0-9]{1,20})\s*")


class LrSegment(Strict):
    """One piece of a learning-rate schedule: `{from: 0.0, to: 0.012, steps: 86}`."""

    start: LearningRate | None = Field(
        None, alias="from", description="rate at its start; null: where the one before ended"
    )
    to: LearningRate = Field(description="rate at its end")
    steps: Steps | None = Field(None, description="length; null: up to the end of the stage, in the last piece only")
    shape: Literal["linear", "cosine", "sqrt"] = Field("linear", description="how it goes from one rate to the other")
    jump: bool = Field(False, description="whether a start that is not the end of the piece before is meant")


class SourceConfig(Strict):
    """One data source of a stage; a bare number in YAML is its weight."""

    weight: Weight | None = Field(None, description="its share of the stage's sequences; the shares sum to 1")
    tokens: Tokens | None = Field(None, description="instead of weights, for all sources of a stage")
    subset: str = Field("0.0-1.0", description="which part of the source's rows: 0.0-0.5 is the first half")
    fim: Rate | None = Field(None, description="share of its documents that FIM rearranges; null: the stage's fim.rate")

    @field_validator("subset")
    @classmethod
    def _subset(cls, text: str) -> str:
        fractions(text)
        return text


class FimConfig(Strict):
    """Fill-in-the-middle: the share of documents rearranged, and the share of those in SPM order."""

    rate: Rate = Field(0.0, description="share of documents that are rearranged")
    spm: Rate = Field(0.5, description="share of those in suffix-prefix-middle order; the rest is prefix-suffix-middle")
    only: Annotated[tuple[str, ...], no_longer(200)] = Field(
        ("*",), description="patterns of the published sources that it applies to"
    )


class StageConfig(Strict):
    """One stage as published."""

    name: Label = Field(description="unique in the curriculum")
    steps: Steps | None = Field(None, description="length in optimizer steps, before scale")
    tokens: Tokens | None = Field(None, description="instead of steps: length in tokens, rounded up to whole steps")
    sources: dict[str, SourceConfig] = Field(description="what it trains on; a bare number is the source's weight")
    lr: tuple[LrSegment, ...] = Field(description="base learning rate, piece after piece; a bare number is constant")
    fim: FimConfig = FimConfig()
    carry: tuple[Literal["weights", "optimizer"], ...] | None = Field(
        None, description="what is taken over from the stage before; null: both"
    )
    checkpoint_every: Steps | None = Field(
        None, description="steps from one checkpoint to the next, before scale; null: a tenth of the stage"
    )

    @field_validator("sources", mode="before", json_schema_input_type=dict[str, SourceConfig | Weight])
    @classmethod
    def _bare_weights(cls, sources: Any) -> Any:
        if not isinstance(sources, dict):
            return sources
        return {k: {"weight": v} if isinstance(v, int | float) else v for k, v in sources.items()}

    @field_validator("sources")
    @classmethod
    def _weights_sum_to_one(cls, sources: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
        for name in sources:
            split_entry(name)
        if all(s.tokens is not None and s.weight is None for s in sources.values()) and sources:
            return sources
        for name, source in sources.items():
            if source.weight is None or source.tokens is not None:
                raise WrongValue("expected a weight, or tokens for every source", name)
        total = math.fsum(s.weight for s in sources.values())
        if abs(total - 1) > SUM_TOLERANCE:
            raise ValueError(f"expected weights that sum to 1 (within {SUM_TOLERANCE:g}), got {total:.9g}")
        return sources

    @field_validator("lr", mode="before", json_schema_input_type=tuple[LrSegment, ...] | LearningRate)
    @classmethod
    def _constant(cls, lr: Any) -> Any:
        if isinstance(lr, int | float) and not isinstance(lr, bool):
            return ({"from": lr, "to": lr},)
        if not isinstance(lr, list | tuple):
            pieces = "a list of pieces such as {from: 0, to: 0.01, steps: 20}"
            raise ValueError(f"expected a number, or {pieces}, got {found(lr)}")
        return tuple(lr)

    @field_validator("lr")
    @classmethod
    def _segments_meet(cls, lr: tuple[LrSegment, ...]) -> tuple[LrSegment, ...]:
        if not lr:
            raise ValueError("expected at least one segment, got none")
        if lr[0].start is None:
            raise WrongValue("expected a value in the first segment", 0, "from")
        for i, (before, after) in enumerate(pairwise(lr)):
            if before.steps is None:
                raise WrongValue("expected a value, only the last segment may leave it out", i, "steps")
            if after.start not in (None, before.to) and not after.jump:
                wanted = f"{before.to:g}, where the segment before ends (or jump: true)"
                raise WrongValue(f"expected {wanted}, got {after.start:g}", i + 1, "from")
        return lr


class CurriculumConfig(Strict):
    """The `curriculum:` section."""

    name: Label = Field("curriculum", description="what reports call it")
    seq_len: Count = Field(description="tokens of a sequence")
    global_batch_size: Count = Field(description="sequences of an optimizer step, over all devices")
    scale: Factor = Field(1.0, description="factor on the published steps, warm-ups and checkpoint cadences")
    lr_scale: Factor = Field(1.0, description="factor on every learning rate, as when a tuned one is transferred")
    min_warmup_steps: Steps = Field(1, description="what scale leaves of a warm-up at least")
    lr_counts_from: Literal[0, 1] = Field(1, description="whether the first step of a stage uses lr(0) or lr(1)")
    bind: Annotated[dict[str, str | dict[str, Share]], no_longer(200)] = Field(
        {}, description="patterns of published sources, and the corpus' source, or sources with shares, for each"
    )
    stages: Annotated[tuple[StageConfig, ...], no_longer(1000)] = Field(min_length=1, description="one after the other")

    @field_validator("bind")
    @classmethod
    def _shares_sum_to_one(cls, bind: dict) -> dict:
        for pattern, target in bind.items():
            shares = {target: 1.0} if isinstance(target, str) else target
            if abs(math.fsum(shares.values()) - 1) > SUM_TOLERANCE:
                total = math.fsum(shares.values())
                raise WrongValue(f"expected shares that sum to 1, got {total:.9g}", pattern)
            for entry in shares:
                split_entry(entry)
        return bind

    @field_validator("stages")
    @classmethod
    def _chain(cls, stages: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
        names = [s.name for s in stages]
        for i, stage in enumerate(stages):
            if stage.name in names[:i]:
                raise WrongValue(f"expected a name of its own, got {stage.name!r} again", i, "name")
            if (stage.steps is None) == (stage.tokens is None):
                raise WrongValue("expected either steps or tokens", i, "steps")
            if i == 0 and stage.carry:
                raise WrongValue("expected [] in the first stage, there is none before it", 0, "carry")
            if i > 0 and stage.carry is not None and "weights" not in stage.carry:
                got = f"got {[*stage.carry]}"
                raise WrongValue(f"expected [weights] or [weights, optimizer], {got}", i, "carry")
        return stages

    @model_validator(mode="after")
    def _products(self) -> CurriculumConfig:
        peak = max(rate for stage in self.stages for piece in stage.lr for rate in (piece.start or 0.0, piece.to))
        if peak * self.lr_scale > MAX_LR:
            got = f"got {self.lr_scale:g} x {peak:g}"
            raise WrongValue(f"expected learning rates of at most {MAX_LR:,}, {got}", "lr_scale")
        for i, stage in enumerate(self.stages):
            length = stage.steps or stage.tokens / (self.global_batch_size * self.seq_len)
            if length * self.scale * self.global_batch_size > MAX_SEQUENCES:
                key = "steps" if stage.steps else "tokens"
                got = f"got {length:g} steps x scale {self.scale:g} x global_batch_size {self.global_batch_size:,}"
                raise WrongValue(f"expected at most {MAX_SEQUENCES:,} sequences, {got}", "stages", i, key)
        return self


def split_entry(entry: str) -> tuple[str, tuple[Fraction, Fraction]]:
    """`english[0.0-0.5]` -> ("english", (0, 1/2)); without a range (0, 1). Raises ValueError."""
    source, bracket, text = entry.partition("[")
    if not bracket:
        return source, (Fraction(0), Fraction(1))
    if not text.endswith("]"):
        raise ValueError(f"expected SOURCE or SOURCE[0.0-0.5], got {shortened(entry)!r}")
    return source, fractions(text[:-1])


def fractions(text: str) -> tuple[Fraction, Fraction]:
    """`0.0-0.5` -> (0, 1/2). Raises ValueError."""
    try:
        if not all(_FRACTION.fullmatch(part) for part in text.split("-")):  # 1e999999999 has as many digits
            raise ValueError
        low, high = (Fraction(part.strip()) for part in text.split("-"))
    except (ValueError, ZeroDivisionError):
        low, high = Fraction(1), Fraction(0)
    if not 0 <= low < high <= 1:
        raise ValueError(f"expected a part of the rows such as 0.0-0.5, got {shortened(text)!r}")
    return low, high

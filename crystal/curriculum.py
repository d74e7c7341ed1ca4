"""Curricula: which data, how many steps and which learning rate, stage after stage.

The `curriculum:` section of a run is read into `CurriculumConfig` and resolved into a `Curriculum` of plain
frozen values: scaled to the run's size, with the published data sources bound to those of the run's token
store. The configs under configs/curricula keep the published names and numbers; a run only adds `scale` and
`bind`.

Binding: `bind` maps a pattern of published names (`*` matches anything) to a store source, or to several with
shares. Of the patterns that match, the one with the most literal characters counts, so the order of keys,
which merging files may change, has no say. A name that no pattern matches is taken for a store source itself.
A row range `english[0.0-0.5]` takes that part of a source's rows; a published `subset` narrows it further.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from crystal.config import Config, ConfigError, Strict, found, mistake, nearest
from crystal.data.order import StageOrder
from crystal.schedule import Schedule, Segment, fit

Rate = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
SUM_TOLERANCE = 1e-6


class LrSegment(Strict):
    """One piece of a learning-rate schedule: `{from: 0.0, to: 0.012, steps: 86}`."""

    start: Weight | None = Field(None, alias="from", description="rate at its start; null: where the one before ended")
    to: Weight = Field(description="rate at its end")
    steps: Count | None = Field(None, description="length; null: up to the end of the stage, in the last piece only")
    shape: Literal["linear", "cosine", "sqrt"] = Field("linear", description="how it goes from one rate to the other")
    jump: bool = Field(False, description="whether a start that is not the end of the piece before is meant")


class SourceConfig(Strict):
    """One data source of a stage; a bare number in YAML is its weight."""

    weight: Weight | None = Field(None, description="its share of the stage's sequences; the shares sum to 1")
    tokens: Count | None = Field(None, description="instead of weights, for all sources of a stage")
    subset: str = Field("0.0-1.0", description="which part of the source's rows: 0.0-0.5 is the first half")
    fim: Rate | None = Field(None, description="share of its documents that FIM rearranges; null: the stage's fim.rate")

    @field_validator("subset")
    @classmethod
    def _subset(cls, text: str) -> str:
        _fractions(text)
        return text


class FimConfig(Strict):
    """Fill-in-the-middle: the share of documents rearranged, and the share of those in SPM order."""

    rate: Rate = Field(0.0, description="share of documents that are rearranged")
    spm: Rate = Field(0.5, description="share of those in suffix-prefix-middle order; the rest is prefix-suffix-middle")
    only: tuple[str, ...] = Field(("*",), description="patterns of the published sources that it applies to")


class StageConfig(Strict):
    """One stage as published."""

    name: str = Field(description="unique in the curriculum")
    steps: Count | None = Field(None, description="length in optimizer steps, before scale")
    tokens: Count | None = Field(None, description="instead of steps: length in tokens, rounded up to whole steps")
    sources: dict[str, SourceConfig] = Field(description="what it trains on; a bare number is the source's weight")
    lr: tuple[LrSegment, ...] = Field(description="base learning rate, piece after piece; a bare number is constant")
    fim: FimConfig = FimConfig()
    carry: tuple[Literal["weights", "optimizer"], ...] | None = Field(
        None, description="what is taken over from the stage before; null: both"
    )
    checkpoint_every: Count | None = Field(
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
                raise ValueError(f"{name}: expected a weight, or tokens for every source")
        total = math.fsum(s.weight for s in sources.values())
        if abs(total - 1) > SUM_TOLERANCE:
            raise ValueError(f"expected weights that sum to 1 (within {SUM_TOLERANCE:g}), got {total:.9g}")
        return sources

    @field_validator("lr", mode="before", json_schema_input_type=tuple[LrSegment, ...] | Weight)
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
            raise ValueError("0.from: expected a value in the first segment")
        for i, (before, after) in enumerate(pairwise(lr)):
            if before.steps is None:
                raise ValueError(f"{i}.steps: expected a value, only the last segment may leave it out")
            if after.start not in (None, before.to) and not after.jump:
                raise ValueError(
                    f"{i + 1}.from: expected {before.to:g}, where the segment before ends (or jump: true), "
                    f"got {after.start:g}"
                )
        return lr


class CurriculumConfig(Strict):
    """The `curriculum:` section."""

    name: str = Field("curriculum", description="what reports call it")
    seq_len: Count = Field(description="tokens of a sequence")
    global_batch_size: Count = Field(description="sequences of an optimizer step, over all devices")
    scale: Positive = Field(1.0, description="factor on the published steps, warm-ups and checkpoint cadences")
    lr_scale: Positive = Field(1.0, description="factor on every learning rate, as when a tuned one is transferred")
    min_warmup_steps: Count = Field(1, description="what scale leaves of a warm-up at least")
    lr_counts_from: Literal[0, 1] = Field(1, description="whether the first step of a stage uses lr(0) or lr(1)")
    bind: dict[str, str | dict[str, Positive]] = Field(
        {}, description="patterns of published sources, and the corpus' source, or sources with shares, for each"
    )
    stages: tuple[StageConfig, ...] = Field(min_length=1, description="one after the other")

    @field_validator("bind")
    @classmethod
    def _shares_sum_to_one(cls, bind: dict) -> dict:
        for pattern, target in bind.items():
            shares = {target: 1.0} if isinstance(target, str) else target
            if abs(math.fsum(shares.values()) - 1) > SUM_TOLERANCE:
                total = math.fsum(shares.values())
                raise ValueError(f"{pattern}: expected shares that sum to 1, got {total:.9g}")
            for entry in shares:
                split_entry(entry)
        return bind

    @field_validator("stages")
    @classmethod
    def _chain(cls, stages: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
        names = [s.name for s in stages]
        for i, stage in enumerate(stages):
            if stage.name in names[:i]:
                raise ValueError(f"{i}.name: expected a name of its own, got {stage.name!r} again")
            if (stage.steps is None) == (stage.tokens is None):
                raise ValueError(f"{i}.steps: expected either steps or tokens")
            if i == 0 and stage.carry:
                raise ValueError("0.carry: expected [] in the first stage, there is none before it")
            if i > 0 and stage.carry is not None and "weights" not in stage.carry:
                got = f"got {[*stage.carry]}"
                raise ValueError(f"{i}.carry: expected [weights] or [weights, optimizer], {got}")
        return stages


@dataclass(frozen=True)
class Stage:
    """One stage at the run's scale. Steps count from 0 inside the stage, except in `lr_at`."""

    name: str
    index: int
    steps: int
    first_step: int  # global step number of its step 0
    seq_len: int
    global_batch_size: int
    weights: dict[str, float]  # by published name, summing to 1
    bound: dict[str, float]  # by store source, with a row range where it has one; summing to 1
    schedule: Schedule
    lr_counts_from: int
    fim_rate: float  # the stage's figure; what a source gets is in fim_rates
    fim_rates: dict[str, float]  # by store source
    spm_rate: float
    carry_optimizer: bool
    checkpoint_every: int

    @property
    def tokens(self) -> int:
        """Tokens trained on in the stage."""
        return self.steps * self.global_batch_size * self.seq_len

    def lr_at(self, t: float) -> float:
        """The schedule's value at t, counted as in the published tables (lr(0) = 0 before a warm-up)."""
        return self.schedule(t)

    def lr_for_step(self, step: int) -> float:
        """The base LR that the optimizer step number `step` (from 0) uses: lr(step + lr_counts_from)."""
        return self.schedule(step + self.lr_counts_from)

    def order(self, rows: Mapping[str, int], seed: int) -> StageOrder:
        """The stage's data order. rows: of each store source. Raises ConfigError where there are none."""
        ranges = {}
        for entry in self.bound:
            source, (low, high) = split_entry(entry)
            if source not in rows:
                known = ", ".join(rows)
                raise ConfigError(f"stage {self.name}: expected {source} in the store, it has {known}")
            first, stop = math.floor(low * rows[source]), math.floor(high * rows[source])
            if stop <= first:
                raise ConfigError(f"stage {self.name}: expected rows in {entry}, {source} has {rows[source]}")
            ranges[entry] = range(first, stop)
        return StageOrder(self.bound, ranges, self.global_batch_size, seed, self.name)


@dataclass(frozen=True)
class Curriculum:
    """All stages of a run, end to end."""

    name: str
    seq_len: int
    global_batch_size: int
    stages: tuple[Stage, ...]

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(s.steps for s in self.stages)

    @property
    def tokens(self) -> int:
        """Tokens of all stages."""
        return sum(s.tokens for s in self.stages)

    def stage_at(self, global_step: int) -> Stage:
        """The stage that global step number `global_step` (from 0) lies in; the last one behind the end."""
        return next((s for s in reversed(self.stages) if s.first_step <= global_step), self.stages[0])

    def base_lr(self, step: int) -> float:
        """Base LR of global optimizer step `step`, from 1; a pure function of it."""
        stage = self.stage_at(step - 1)
        return stage.lr_for_step(step - 1 - stage.first_step)

    def numbered(self, number: int) -> Stage:
        """Stage `number`, counted from 1 as on the command line. Raises ConfigError."""
        if not 1 <= number <= len(self.stages):
            raise ConfigError(f"--stage: expected 1 to {len(self.stages)}, got {number}")
        return self.stages[number - 1]


def resolve(
    config: CurriculumConfig, where: str | Config = "config", store_sources: Collection[str] | None = None
) -> Curriculum:
    """Scale and bind a curriculum.

    where: the file for error messages. store_sources: names in the run's token store; None (nothing prepared,
    as for a dry run) leaves them unchecked. Raises ConfigError for what cannot be scheduled or bound.
    """
    stages: list[Stage] = []
    for index, stage in enumerate(config.stages):
        loc = ("curriculum", "stages", index)
        tokens_per_step = config.global_batch_size * config.seq_len
        published = stage.steps or -(-stage.tokens // tokens_per_step)
        steps = max(1, round(published * config.scale))
        segments = _segments(stage, published, config.lr_scale, where, (*loc, "lr"))
        total = sum(s.tokens or 0 for s in stage.sources.values())
        weights = {n: s.tokens / total if total else s.weight for n, s in stage.sources.items()}
        bound, fim_rates = _bind(config, stage, weights, where, store_sources)
        carry = () if index == 0 else ("weights", "optimizer") if stage.carry is None else stage.carry
        stages.append(
            Stage(
                name=stage.name,
                index=index,
                steps=steps,
                first_step=sum(s.steps for s in stages),
                seq_len=config.seq_len,
                global_batch_size=config.global_batch_size,
                weights=weights,
                bound=bound,
                schedule=fit(segments, published, steps, config.min_warmup_steps),
                lr_counts_from=config.lr_counts_from,
                fim_rate=stage.fim.rate,
                fim_rates=fim_rates,
                spm_rate=stage.fim.spm,
                carry_optimizer="optimizer" in carry,
                checkpoint_every=max(1, round((stage.checkpoint_every or published / 10) * config.scale)),
            )
        )
    return Curriculum(config.name, config.seq_len, config.global_batch_size, tuple(stages))


def split_entry(entry: str) -> tuple[str, tuple[Fraction, Fraction]]:
    """`english[0.0-0.5]` -> ("english", (0, 1/2)); without a range (0, 1). Raises ValueError."""
    source, bracket, text = entry.partition("[")
    if not bracket:
        return source, (Fraction(0), Fraction(1))
    if not text.endswith("]"):
        raise ValueError(f"expected SOURCE or SOURCE[0.0-0.5], got {entry!r}")
    return source, _fractions(text[:-1])


def _fractions(text: str) -> tuple[Fraction, Fraction]:
    try:
        low, high = (Fraction(part.strip()) for part in text.split("-"))
    except (ValueError, ZeroDivisionError):
        low, high = Fraction(1), Fraction(0)
    if not 0 <= low < high <= 1:
        raise ValueError(f"expected a part of the rows such as 0.0-0.5, got {text!r}")
    return low, high


def _decimal(part: Fraction) -> str:
    whole, _, digits = f"{float(part):.12f}".partition(".")
    return f"{whole}.{digits.rstrip('0') or '0'}"


def _segments(stage: StageConfig, published: int, scale: float, where: str | Config, loc: tuple) -> list[Segment]:
    """The stage's LR segments with every start and length filled in, and their rates times `scale`."""
    segments: list[Segment] = []
    begin = 0
    for i, piece in enumerate(stage.lr):
        steps = piece.steps or published - begin
        start = segments[-1].end if piece.start is None else piece.start
        if i == 0 and start < piece.to and steps > published:
            message = f"expected a warm-up within the stage's {published} steps, got {steps}"
            raise mistake(where, (*loc, i, "steps"), message)
        if begin >= published:
            message = f"expected to start within the stage's {published} steps, starts at {begin}"
            raise mistake(where, (*loc, i), message)
        segments.append(Segment(start, piece.to, steps, piece.shape))
        begin += steps
    return [replace(s, start=s.start * scale, end=s.end * scale) for s in segments] if scale != 1 else segments


def _bind(
    config: CurriculumConfig,
    stage: StageConfig,
    weights: dict[str, float],
    where: str | Config,
    store_sources: Collection[str] | None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Weights by store entry, and FIM rates by store source (the mean where several meet)."""
    parts: dict[str, list[float]] = {}
    fim: dict[str, list[tuple[float, float]]] = {}
    unbound = []
    for name, source in stage.sources.items():
        pattern = _pattern(name, config.bind)
        target = name if pattern is None else config.bind[pattern]
        rate = source.fim
        if rate is None:
            rate = stage.fim.rate if any(fnmatchcase(name, p) for p in stage.fim.only) else 0.0
        for entry, share in ({target: 1.0} if isinstance(target, str) else target).items():
            store_source, (low, high) = split_entry(entry)
            if store_sources is not None and store_source not in store_sources:
                if pattern is None:
                    unbound.append(name)
                    continue
                known = ", ".join(sorted(store_sources))
                message = f"expected a source of the corpus ({known}), got {store_source!r}"
                message += nearest(store_source, store_sources)
                raise mistake(where, ("curriculum", "bind", pattern), message)
            first, last = _fractions(source.subset)
            low, high = low + (high - low) * first, low + (high - low) * last
            whole = (low, high) == (0, 1)
            key = store_source if whole else f"{store_source}[{_decimal(low)}-{_decimal(high)}]"
            parts.setdefault(key, []).append(weights[name] * share)
            fim.setdefault(store_source, []).append((weights[name] * share, rate))
    if unbound:
        known = ", ".join(sorted(store_sources))
        if not config.bind:  # names of the corpus were meant
            loc = ("curriculum", "stages", config.stages.index(stage), "sources", unbound[0])
            message = f"expected a source of the corpus ({known}), or a pattern of curriculum.bind for it"
            message += nearest(unbound[0], store_sources)
            raise mistake(where, loc, message)
        message = f"expected a pattern for every source of stage {stage.name}, none for {', '.join(unbound)} "
        raise mistake(where, ("curriculum", "bind"), f"{message}(the corpus has {known})")
    rates = {}
    for key, pairs in fim.items():
        weight = math.fsum(w for w, _ in pairs)
        rates[key] = math.fsum(w * r for w, r in pairs) / weight if weight else 0.0
    return {key: math.fsum(w) for key, w in parts.items()}, rates


def _pattern(name: str, bind: Mapping[str, Any]) -> str | None:
    """The most specific pattern of `bind` that matches: the one with the most literal characters."""
    matching = sorted(p for p in bind if fnmatchcase(name, p))
    return max(matching, key=lambda p: sum(c not in "*?" for c in p), default=None)

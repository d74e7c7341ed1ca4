"""From the section of a run file to stages: scaled to the run's size, bound to the sources of its token store.

Binding: `bind` maps a pattern of published names (`*` matches anything) to a store source, or to several with
shares. Of the patterns that match, the one with the most literal characters counts, so the order of keys,
which merging files may change, has no say. A name that no pattern matches is taken for a store source itself.
A row range `english[0.0-0.5]` takes that part of a source's rows; a published `subset` narrows it further.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any

from crystal.config import Config, mistake, nearest
from crystal.curriculum.config import CurriculumConfig, StageConfig, fractions, split_entry
from crystal.curriculum.schedule import Segment, fit
from crystal.curriculum.stages import Curriculum, Stage


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
    for i, pattern in enumerate(stage.fim.only if stage.fim.rate else ()):
        if not any(fnmatchcase(name, pattern) for name in stage.sources):
            loc = ("curriculum", "stages", config.stages.index(stage), "fim", "only", i)
            names = ", ".join(stage.sources)
            message = f"expected a pattern of sources of stage {stage.name} ({names}), {pattern!r} matches none"
            raise mistake(where, loc, message + nearest(pattern, stage.sources))
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
            first, last = fractions(source.subset)
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

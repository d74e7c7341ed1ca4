"""`crystal compare`: runs side by side, by the tokens they have seen, and where their configurations differ."""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crystal.errors import ConfigError
from crystal.workspace.curves import Curves, read_curves

ROWS = 10  # of the table of training losses


def compare(runs: Sequence[str], out: Path | None = None, source: str | None = None) -> dict:
    """Two runs or more, JSON-ready; the picture goes to `out`, of one `source`'s validation if it is given.

    runs: run directories, run files or names of packaged runs. Raises ConfigError for one that was never made or is
    given twice, a source that none has, or a picture that cannot be written.
    """
    if len(runs) < 2:
        raise ConfigError(f"expected two runs or more to compare, got {len(runs)}")
    directories = [_directory(run) for run in runs]
    found = [read_curves(path, label) for path, label in zip(directories, _labels(directories), strict=True)]
    known = sorted({name for run in found for name in run.sources})
    if source is not None and source not in known:
        raise ConfigError(f"--source: expected one of {', '.join(known) or '(none was validated)'}, got {source}")
    if out is not None:
        from crystal.workspace.compare_plots import draw

        draw(found, out, [source] if source else known)
    return {
        "runs": [_summary(run) for run in found],
        "at": _at(found),
        "validation": _validation(found),
        "differs": differing({run.label: run.config for run in found if run.config is not None}),
        "sources": [source] if source else known,
        "out": None if out is None else str(out),
    }


def _directory(run: str) -> Path:
    """The run directory that is meant."""
    path = Path(run)
    if path.is_dir() and any((path / name).exists() for name in ("config.yaml", "metrics.jsonl")):
        return path
    if path.is_dir():
        raise ConfigError(f"{run}: expected a run directory, there is no config.yaml in it", file=run)
    from crystal.run import load_run

    directory = load_run(run).config.directory
    if not directory.is_dir():
        raise ConfigError(f"{run}: its run directory {directory} is not there; crystal train makes it", file=run)
    return directory


def _labels(directories: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    absolute = [path.resolve() for path in directories]
    for path, real in zip(directories, absolute, strict=True):
        if absolute.count(real) > 1:
            raise ConfigError(f"{path}: the same run is given twice")
    labels = []
    for real in absolute:
        words = 1
        while [Path(*other.parts[-words:]) for other in absolute].count(Path(*real.parts[-words:])) > 1:
            words += 1
        labels.append(str(Path(*real.parts[-words:])))
    return labels


def _summary(run: Curves) -> dict:
    return {
        "label": run.label,
        "path": str(run.directory),
        "step": run.steps[-1] if run.steps else None,
        "tokens": run.tokens[-1] if run.tokens else None,
        "loss": run.loss[-1] if run.loss else None,
        "val_loss": run.val_loss[-1] if run.val_loss else {},
        "config_read": run.config is not None,
    }


def _at(runs: list[Curves]) -> list[dict]:
    """Training losses at numbers of tokens that all runs have seen: the mean since the row above, by run."""
    trained = [run for run in runs if run.tokens]
    if not trained:
        return []
    common = min(run.tokens[-1] for run in trained)
    step_tokens = max(run.tokens[0] // max(run.steps[0], 1) for run in trained)  # no row without a step of each run
    count = max(1, min(ROWS, common // max(step_tokens, 1)))
    rows, before = [], 0
    for mark in (common * (i + 1) // count for i in range(count)):
        step, loss = {}, {}
        for run in trained:
            first, last = bisect.bisect_right(run.tokens, before), bisect.bisect_right(run.tokens, mark)
            if last:
                step[run.label] = run.steps[last - 1]
            if last > first:
                loss[run.label] = statistics.fmean(run.loss[first:last])
        rows.append({"tokens": mark, "step": step, "loss": loss})
        before = mark
    return rows


def _validation(runs: list[Curves]) -> list[dict]:
    """Validation losses, by run and source, wherever all runs that were validated were so at one number of tokens."""
    validated = [run for run in runs if run.val_tokens]
    common = set.intersection(*(set(run.val_tokens) for run in validated)) if validated else set()
    places = [{tokens: i for i, tokens in enumerate(run.val_tokens)} for run in validated]
    return [
        {
            "tokens": tokens,
            "step": {run.label: run.val_steps[at[tokens]] for run, at in zip(validated, places, strict=True)},
            "val_loss": {run.label: run.val_loss[at[tokens]] for run, at in zip(validated, places, strict=True)},
        }
        for tokens in sorted(common)
    ]


def differing(configs: dict[str, dict]) -> dict[str, dict[str, Any]]:
    """{dotted key: {label: value}} of the keys that are not the same in all; a run without the key has no entry.

    configs: by label.
    """
    flat = {label: _flat(config) for label, config in configs.items()}
    found = {}
    for key in dict.fromkeys(key for config in flat.values() for key in config):
        values = {label: config[key] for label, config in flat.items() if key in config}
        first = next(iter(values.values()))
        if len(values) < len(flat) or any(value != first for value in values.values()):
            found[key] = values
    return found


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys with their values; items of a list by their `name`, or by position."""
    if isinstance(node, dict) and node:
        items = node.items()
    elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
        names = [item.get("name") if isinstance(item, dict) else None for item in node]
        items = [
            (name if name and names.count(name) == 1 else i, item)
            for i, (name, item) in enumerate(zip(names, node, strict=True))
        ]
    else:
        return {prefix: node} if prefix else {}
    return {
        key: value
        for word, item in items
        for key, value in _flat(item, f"{prefix}.{word}" if prefix else str(word)).items()
    }

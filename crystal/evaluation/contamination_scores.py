"""What a run's checkpoints scored over all items of a task, the clean ones, and those found in its training text.

The answers are those that `crystal eval` kept, EVALS/step-NNNNNNN/TASK.json; the task itself makes the numbers again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from crystal.errors import DataError
from crystal.evaluation import results
from crystal.evaluation.task import Metric, Task


def scores(evals: Path, tasks: Sequence[Task], judged: Sequence[Sequence[dict]]) -> list[dict]:
    """One entry a checkpoint that was evaluated: {step, tasks: {task: {n: {group: items}, metrics: {metric: {group:
    {value, stderr, chance}}}}}}.

    judged: of every task its items, {id, kind, first_step}. Groups: `all`, `clean`, `found` (exact and near), `seen`
    (found, and trained on by this step); without an item a metric is None. Raises DataError for a damaged file.
    """
    found = []
    for directory in sorted(evals.glob("step-*")):
        if not (match := re.fullmatch(r"step-(\d{7,})", directory.name)):
            continue
        step, of_tasks = int(match[1]), {}
        for task, items in zip(tasks, judged, strict=True):
            file = directory / f"{task.name}.json"
            if file.is_file():
                of_tasks[task.name] = _of_groups(task, _answers(evals, step, task), _groups(items, step))
        if of_tasks:
            found.append({"step": step, "tasks": of_tasks})
    return sorted(found, key=lambda entry: entry["step"])


def _groups(items: Sequence[dict], step: int) -> dict[str, set[str]]:
    hit = [item for item in items if item["kind"] in ("exact", "near")]
    return {
        "clean": {item["id"] for item in items if item["kind"] == "clean"},
        "found": {item["id"] for item in hit},
        "seen": {item["id"] for item in hit if item["first_step"] is not None and item["first_step"] <= step},
    }


def _of_groups(task: Task, answers: list[dict], groups: dict[str, set[str]]) -> dict:
    parts = {"all": answers} | {name: [a for a in answers if a["id"] in ids] for name, ids in groups.items()}
    numbers = {name: task.metrics(part) for name, part in parts.items() if part}
    metrics = {
        metric: {name: _plain(numbers[name].get(metric)) if name in numbers else None for name in parts}
        for metric in numbers.get("all", {})
    }
    return {"n": {name: len(part) for name, part in parts.items()}, "metrics": metrics}


def _plain(metric: Metric | None) -> dict | None:
    if metric is None:
        return None
    return {key: None if value is None or not math.isfinite(value) else value for key, value in asdict(metric).items()}


def _answers(evals: Path, step: int, task: Task) -> list[dict]:
    answers = results.read_of(evals, step, task.name).answers
    file = results.directory_of(evals, step) / f"{task.name}.json"
    results.metrics_of(task, list(answers.values()), file)
    if not all(isinstance(name, str) for name in answers):
        raise DataError(f"{file}: items: expected the answers that `crystal eval` writes", file=file)
    return list(answers.values())

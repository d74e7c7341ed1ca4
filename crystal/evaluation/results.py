"""What an evaluation found, on the disk: evals/step-NNNNNNN/TASK.json, one file a task and checkpoint.

The answers to single items are its substance; metrics are made of them. So a file is also where an evaluation goes on
from: what it holds of the same task, checkpoint and dtype need not be asked again, be it of fewer items or of more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from crystal.checkpoint.seal_file import DIGEST, digest_of, with_digest
from crystal.config.bounded_yaml import shortened
from crystal.errors import DataError
from crystal.evaluation.task import Metric, Task
from crystal.files import from_json, regular_bytes, write_whole

FORMAT = 1
MAX_BYTES = 1 << 28  # of a result, which has every answer


@dataclass(frozen=True)
class Result:
    """One task on one checkpoint: metrics over n of its items, all answers there are, and the rest of the file."""

    step: int
    task: str
    metrics: dict[str, Metric]
    n: int
    answers: dict[str, dict]
    about: dict

    @property
    def first(self) -> tuple[str, Metric]:
        """The metric to plot."""
        return next(iter(self.metrics.items()))

    def summary(self) -> dict:
        """JSON-ready: {metric: value, …, n, stderr (of the first), …}."""
        name, first = self.first
        return {
            **{metric: found.value for metric, found in self.metrics.items()},
            "n": self.n,
            "metric": name,
            "stderr": first.stderr,
            "chance": first.chance,
            "at_chance": first.at_chance,
        }


def directory_of(evals: Path, step: int) -> Path:
    """EVALS/step-NNNNNNN."""
    return evals / f"step-{step:07d}"


def write(evals: Path, result: Result) -> Path:
    """Write a result, whole or not at all; its path. Raises OSError."""
    path = directory_of(evals, result.step) / f"{result.task}.json"
    metrics = {name: {"value": m.value, "stderr": m.stderr, "chance": m.chance} for name, m in result.metrics.items()}
    content = {"format": FORMAT, "task": result.task, "step": result.step, **result.about, "n": result.n}
    content |= {"metrics": metrics, "items": list(result.answers.values())}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(with_digest(content)))
    return path


def read(path: Path) -> Result:
    """A result. Raises DataError naming the file that is damaged or of another format."""
    try:
        content = from_json(regular_bytes(path, MAX_BYTES).decode())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        if (digest := content.pop(DIGEST, None)) not in (None, digest_of(content)):  # 0.1.0 wrote none
            raise ValueError(f"{DIGEST} {shortened(repr(digest))} is not that of the rest")
        metrics = {name: Metric(m["value"], m["stderr"], m["chance"]) for name, m in content["metrics"].items()}
        answers = {answer["id"]: answer for answer in content["items"]}
        about = {key: v for key, v in content.items() if key not in ("format", "task", "step", "n", "metrics", "items")}
        return Result(content["step"], content["task"], metrics, content["n"], answers, about)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", file=path) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: expected an evaluation's result of format {FORMAT}: {error}; remove it to evaluate again",
            file=path,
        ) from None


def read_of(evals: Path, step: int, task: str) -> Result:
    """The result of a step and task. Raises DataError as `read`, and where the file is of another."""
    path = directory_of(evals, step) / f"{task}.json"
    result = read(path)
    if (result.step, result.task) != (step, task):
        what = f"expected the result of {task} at step {step}, as its name says, got {result.task} at {result.step}"
        raise DataError(f"{path}: {what}; remove it to evaluate again", file=path)
    return result


def metrics_of(task: Task, answers: list[dict], path: Path) -> dict[str, Metric]:
    """A task's metrics of answers that a file holds; those of 0.1.0 have no digest. Raises DataError naming it."""
    try:
        return task.metrics(answers)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
        message = f"{path}: items: expected the answers that `crystal eval` writes: {shortened(str(error))}"
        raise DataError(f"{message}; remove it to evaluate again", file=path) from None


def all_of(evals: Path) -> Iterator[Result]:
    """Every result under a run's evals/, by step and task. Raises DataError as `read`."""
    for path in sorted(evals.glob("step-*/*.json")):
        yield read(path)

"""Every checkpoint of a run, task by task, shared among all the processes that are at it.

The items of a task that are not answered yet are cut into parts. A part is answered by whichever process takes its
lock, written to a file of its own, and whoever finds all parts there joins them to evals/step-NNNNNNN/TASK.json. So the
same command may be killed and given again, or given on several machines that see the same directory, and each item is
asked once.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from crystal import __version__, checkpoint
from crystal.curriculum.resolve import resolve
from crystal.curriculum.stages import Curriculum
from crystal.errors import CheckpointError, ConfigError, RunError
from crystal.evaluation import results
from crystal.evaluation.results import Result
from crystal.evaluation.task import Subject, Task
from crystal.files import cannot_write, from_json, locked, regular_bytes, sha256_of, write_whole
from crystal.inference.load import fitting_dtype
from crystal.output.progress import Bar
from crystal.run import load_run

if TYPE_CHECKING:
    from rich.console import Console

_PAUSE = 0.5  # seconds between two looks at parts that others are at


@dataclass
class Where:
    """What to evaluate. checkpoints: directories by step; evals: where results go; run: the run directory, or None."""

    checkpoints: dict[int, Path]
    evals: Path
    run: Path | None

    @cached_property
    def curriculum(self) -> Curriculum | None:
        """The run's, for its stages and tokens."""
        if self.run is None:
            return None
        run = load_run(self.run / "config.yaml")
        return resolve(run.config.curriculum, run.source)


def where(path: Path, every: int = 1) -> Where:
    """The checkpoint at `path`, or of a run directory each `every`-th one, the last, and those at the ends of stages.

    Results of a checkpoint in a run directory go to RUN/evals, of another beside it, to CKPT/evals.
    Raises CheckpointError when there is none, ConfigError for `every` below 1.
    """
    if every < 1:
        raise ConfigError(f"--every: expected at least 1, got {every}", key="every")
    if (path / checkpoint.SEAL).is_file():
        state = checkpoint.read(path).state
        run = path.resolve().parent.parent
        run = run if (run / "config.yaml").is_file() and path.resolve().parent.name == "checkpoints" else None
        return Where({int(state.get("step", 0)): path}, (run or path) / "evals", run)
    found = checkpoint.steps(path / "checkpoints")
    if not found:
        raise CheckpointError(f"{path}: expected a checkpoint, or a run directory that holds one", file=path)
    directories = {step: checkpoint.step_directory(path / "checkpoints", step) for step in found}
    wanted = {*found[every - 1 :: every], found[-1]}
    wanted |= {step for step in found if checkpoint.read(directories[step]).state.get("stage_ended")}
    run = path if (path / "config.yaml").is_file() else None
    return Where({step: directories[step] for step in sorted(wanted)}, path / "evals", run)


def chosen(task: Task, limit: int | None, seed: int = 0) -> list[int]:
    """Numbers of the items to ask: all, or `limit` of them drawn by `seed`, in the task's order."""
    return drawn(len(task.ids()), limit, seed)


def drawn(count: int, limit: int | None, seed: int = 0) -> list[int]:
    """Numbers below count: all, or `limit` of them drawn by `seed`, in order."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(np.random.default_rng(seed).permutation(count)[:limit].tolist())


class Evaluation:
    """Tasks on one checkpoint. dtype: of its weights, auto for fp32 where it fits; device: cpu, cuda or auto."""

    def __init__(
        self,
        directory: Path,
        where: Where,
        dtype: Literal["auto", "fp32", "bf16"] = "auto",
        device: str = "auto",
    ):
        self.opened = checkpoint.read(directory)
        self.where, self.directory = where, directory
        self.step = int(self.opened.state.get("step", 0))
        self.dtype = fitting_dtype(self.opened, dtype)
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.digest = sha256_of(directory / checkpoint.SEAL)
        self._read: dict[str, tuple[tuple[int, int, int], Result]] = {}  # by task: which file, and what it says

    @cached_property
    def subject(self) -> Subject:
        """The model, loaded when something is to be asked of it."""
        return Subject.of(self.opened, self.where.run, self.dtype, self.device)

    def about(self, task: Task) -> dict:
        """What a result depends on, apart from its items."""
        dtype = str(self.dtype).removeprefix("torch.")
        facts = {"dtype": dtype, "facts": task.facts()}
        return {"checkpoint": self.directory.name, "checkpoint_sha256": self.digest, **facts}

    def known(self, task: Task) -> Result | None:
        """What there is already: a result of the same task, checkpoint and dtype. It is asked for with every part, so
        the file is read again only when it is another one."""
        path = results.directory_of(self.where.evals, self.step) / f"{task.name}.json"
        if not path.is_file():
            return None
        stat = path.stat()
        identity = stat.st_ino, stat.st_size, stat.st_mtime_ns
        if self._read.get(task.name, (None,))[0] != identity:
            found = results.read(path)
            results.metrics_of(task, list(found.answers.values()), path)
            self._read[task.name] = identity, found
        result = self._read[task.name][1]
        same = json.loads(json.dumps(self.about(task)))
        return result if all(result.about.get(key) == value for key, value in same.items()) else None

    def finish(self, task: Task, numbers: Sequence[int], bar: Bar) -> Iterator[Result | None]:
        """Answer what is not answered of a task's items. Gives None while others are at the parts that are left, and
        in the end the result; the bar advances by one an item, whoever answered it."""
        ids = task.ids()
        known = self.known(task)
        have = set(known.answers) if known else set()
        todo = [i for i in numbers if ids[i] not in have]
        bar.advance(len(numbers) - len(todo))
        folder = results.directory_of(self.where.evals, self.step) / f".{task.name}-{self._key(task, todo)}"
        parts = [todo[first : first + task.part] for first in range(0, len(todo), task.part)]
        left = dict(enumerate(parts))
        seconds = 0.0
        while left:
            answered = len(left)
            for number, part in list(left.items()):
                began = time.monotonic()
                before = bar.completed
                if self._answered(task, folder, number, part, bar):
                    del left[number]
                    bar.reach(before + len(part))
                    seconds += time.monotonic() - began
            if left and len(left) == answered:
                yield None
        yield self._joined(task, numbers, folder, len(parts), known, seconds)

    def _key(self, task: Task, todo: Sequence[int]) -> str:
        return hashlib.sha256(json.dumps([self.about(task), list(todo), task.part]).encode()).hexdigest()[:12]

    def _answered(self, task: Task, folder: Path, number: int, part: Sequence[int], bar: Bar) -> bool:
        """Whether a part is there, by now; False: another process is at it."""
        file = folder / f"part-{number:05d}.json"
        if file.is_file() or self._in_result(task, part):
            return True
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with locked(file.with_suffix(".lock"), wait=False):
                if not file.is_file() and not self._in_result(task, part):
                    answers = task.answer(self.subject, part, bar)
                    write_whole(file, json.dumps(answers))
        except BlockingIOError:
            return False
        return True

    def _in_result(self, task: Task, part: Sequence[int]) -> bool:
        """Whether others have joined it to the result already."""
        known, ids = self.known(task), task.ids()
        return known is not None and all(ids[i] in known.answers for i in part)

    def _joined(self, task, numbers: Sequence[int], folder: Path, parts: int, known: Result | None, seconds) -> Result:
        """The result over `numbers`, written with all answers there are."""
        ids = task.ids()
        evals = results.directory_of(self.where.evals, self.step)
        evals.mkdir(parents=True, exist_ok=True)
        with locked(evals / f".{task.name}.lock"):
            known = self.known(task)
            answers = dict(known.answers) if known else {}
            for number in range(parts):
                file = folder / f"part-{number:05d}.json"
                if file.is_file():
                    answers |= _answers(file)
            missing = next((ids[i] for i in numbers if ids[i] not in answers), None)
            if missing is not None:
                raise RunError(f"{folder}: the answers to item {missing} are gone; the same command asks again")
            ordered = {name: answers[name] for name in ids if name in answers}
            about = self.about(task) | self._record(known, seconds, parts, len(ids))
            whole = Result(self.step, task.name, task.metrics(list(ordered.values())), len(ordered), ordered, about)
            if known is None or len(ordered) > known.n:
                results.write(self.where.evals, whole)
        shutil.rmtree(folder, ignore_errors=True)
        wanted = [answers[ids[i]] for i in numbers]
        return Result(self.step, task.name, task.metrics(wanted), len(wanted), ordered, about)

    def _record(self, known: Result | None, seconds: float, parts: int, items: int) -> dict:
        """Where and how long, as far as this process knows, and where the checkpoint stands."""
        if known is not None and not parts:
            return {key: value for key, value in known.about.items() if key not in ("checkpoint", "facts")}
        state, curriculum = self.opened.state, self.where.curriculum
        machine = {"machine": platform.machine(), "device": self.device, "threads": torch.get_num_threads()}
        return {
            "stage": state.get("stage"),
            "stage_ended": state.get("stage_ended"),
            "tokens": None if curriculum is None else self.step * curriculum.global_batch_size * curriculum.seq_len,
            "of": items,
            "seconds": round(seconds, 3),
            "versions": {"crystal": __version__, "torch": torch.__version__},
            "machine": machine,
        }


def evaluate(
    places: Where,
    tasks: Sequence[Task],
    limit: int | None = None,
    seed: int = 0,
    dtype: Literal["auto", "fp32", "bf16"] = "auto",
    device: str = "auto",
    console: Console | None = None,
) -> list[Result]:
    """All tasks on some checkpoints: results by step, then in the tasks' order.

    limit: items of each task, drawn by seed; dtype, device: as `Evaluation`. Other processes with the same arguments
    share the work. Raises ConfigError, CheckpointError, DataError and RunError, each in one line.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit: expected at least 1, got {limit}", key="limit")
    for task in tasks:
        task.facts()  # what cannot be done at all is heard of now, and not after hours of other tasks
    numbers = {task.name: chosen(task, limit, seed) for task in tasks}
    total = len(places.checkpoints) * sum(map(len, numbers.values()))
    found: list[Result] = []
    try:
        with Bar(console, "evaluating", total, unit="items", lines=20) as bar:
            for step, directory in places.checkpoints.items():
                found += _on_one(Evaluation(directory, places, dtype, device), tasks, numbers, bar, step)
    except OSError as error:
        raise cannot_write(places.evals, error, "the results") from None
    return found


def _on_one(evaluation: Evaluation, tasks: Sequence[Task], numbers: dict, bar: Bar, step: int) -> list[Result]:
    """Every task on one checkpoint; those that others are at come last."""
    found: dict[str, Result] = {}
    at_work = {task.name: evaluation.finish(task, numbers[task.name], bar) for task in tasks}
    while at_work:
        moved = False
        for name, job in list(at_work.items()):
            bar.what = f"step {step}: {name}"
            if (result := next(job)) is not None:
                found[name] = result
                del at_work[name]
                moved = True
        if at_work and not moved:
            time.sleep(_PAUSE)
    return [found[task.name] for task in tasks]


def _answers(part: Path) -> dict[str, dict]:
    """The answers of a part by item; none of a damaged one, which is taken away, to be asked again."""
    try:
        return {answer["id"]: answer for answer in from_json(regular_bytes(part).decode())}
    except (ValueError, KeyError, TypeError):
        part.unlink()
        return {}

"""Suites: which tasks go together, with how many examples and which metric.

`open-llm-leaderboard` is the paper's Table 4 and Figure 4, `crystal` and `code` its Table 5 and Figure 6, with what
Analysis360 adds. `proxy` is for models that are at chance everywhere else: easy questions and no examples, told apart
by the bits per byte of the right answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from crystal.errors import ConfigError
from crystal.evaluation.choice_sets import SETS, NoItems, mmlu, multiple_choice, own
from crystal.evaluation.items import Items
from crystal.evaluation.question_answering import ANSWERED
from crystal.evaluation.task import Task

_CHOICE = {
    "open-llm-leaderboard": [("arc_challenge", 25), ("hellaswag", 10), ("mmlu", 5), ("truthfulqa_mc2", 0)],
    "crystal": [
        ("arc_challenge", 25), ("arc_challenge", 0), ("mmlu", 5), ("mmlu", 0), ("hellaswag", 10), ("hellaswag", 0),
        ("arc_easy", 0), ("boolq", 0), ("winogrande", 0), ("winogrande", 5), ("openbookqa", 0), ("piqa", 0),
        ("social_iqa", 0), ("truthfulqa_mc2", 0), ("race", 0), ("swag", 0), ("copa", 0),
        ("triviaqa", 5), ("gsm8k", 5), ("drop", 3),
    ],
    "proxy": [("arc_easy", 0), ("hellaswag", 0), ("piqa", 0), ("openbookqa", 0), ("sciq", 0), ("copa", 0)],
}  # fmt: skip
_USUAL_SHOTS = {"mmlu": 5, "triviaqa": 5, "gsm8k": 5, "drop": 3}
OF_A_RUN = ("fim", "bpb")  # they ask about its held-out documents
NAMES = (*_CHOICE, "code", "fim", "bpb", "items")


@dataclass(frozen=True)
class Settings:
    """What a user may change of a suite. samples, temperature: of written programs; None: as published. unsafe: run
    them where they cannot be confined. run: a run directory, for tasks on its held-out documents."""

    samples: int | None = None
    temperature: float | None = None
    unsafe: bool = False
    run: Path | None = None


@dataclass(frozen=True)
class Suite:
    """Tasks, and for those that could not be had why."""

    name: str
    tasks: list[Task]
    left_out: dict[str, str] = field(default_factory=dict)


def suite_of(name: str, items: Items, settings: Settings | None = None) -> Suite:
    """A suite by its name, or the one task that has that name; `items`: every file of the user's directory.

    Raises ConfigError for a name that is neither, and where nothing of it can be had.
    """
    suite = Suite(name, [])
    for title, make in _makers(name, items, settings or Settings()):
        try:
            suite.tasks.append(make())
        except NoItems as error:
            suite.left_out[title] = str(error)
    if not suite.tasks:
        raise ConfigError(f"--suite {name}: {'; '.join(sorted(set(suite.left_out.values())))}", key="suite")
    return suite


def tasks_of(name: str, items: Items, settings: Settings | None = None) -> list[Task]:
    """The tasks of `suite_of` alone."""
    return suite_of(name, items, settings).tasks


def _makers(name: str, items: Items, settings: Settings) -> list[tuple[str, Callable[[], Task]]]:
    if name in _CHOICE:
        return [_choice(items, *task) for task in _CHOICE[name]]
    if name in ("code", "fim", "bpb"):
        return {"code": _code, "fim": _fim, "bpb": _bpb}[name](items, settings)
    if name == "items":
        files = sorted(items.directory.glob("*.jsonl")) if items.directory else []
        if not files:
            raise ConfigError("--suite items: expected --items DIR with .jsonl files in it", key="items")
        return [(file.stem, lambda file=file: own(items, file.stem)) for file in files]
    base, _, shots = name.partition("-")
    if base in (*SETS, *ANSWERED, "mmlu") and (not shots or shots.removesuffix("shot").isdecimal()):
        count = int(shots.removesuffix("shot")) if shots else _USUAL_SHOTS.get(base, 0)
        return [_choice(items, base, count)]
    known = ", ".join(NAMES)
    raise ConfigError(f"--suite: expected {known}, or a task such as arc_easy or mmlu-5shot, got {name!r}", key="suite")


def _choice(items: Items, name: str, shots: int) -> tuple[str, Callable[[], Task]]:
    title = f"{name}-{shots}shot"
    if name == "mmlu":
        return title, lambda: mmlu(items, shots, title)
    if name in ANSWERED:
        return title, lambda: ANSWERED[name](items, shots, title)
    return title, lambda: multiple_choice(items, name, shots, title)


def _code(items: Items, settings: Settings) -> list[tuple[str, Callable[[], Task]]]:
    from crystal.evaluation.code_tasks import MBPP, HumanEval

    changed = {"samples": settings.samples, "temperature": settings.temperature}
    changed = {name: value for name, value in changed.items() if value is not None} | {"unsafe": settings.unsafe}
    return [(kind.__name__.lower(), lambda kind=kind: kind(items, **changed)) for kind in (HumanEval, MBPP)]


def _fim(items: Items, settings: Settings) -> list[tuple[str, Callable[[], Task]]]:
    from crystal.evaluation.fim_tasks import FimHeldOut, FimHumanEval

    def held_out() -> Task:
        if settings.run is None:
            raise NoItems("no held-out documents: it needs a run directory")
        return FimHeldOut(settings.run)

    return [("fim-humaneval", lambda: FimHumanEval(items, unsafe=settings.unsafe)), ("fim-heldout", held_out)]


def _bpb(items: Items, settings: Settings) -> list[tuple[str, Callable[[], Task]]]:
    from crystal.evaluation.bits_per_byte import BitsPerByte

    def bits() -> Task:
        if settings.run is None and items.directory is None:
            raise NoItems("no texts: it needs a run directory or --items DIR with .jsonl files that have a `text`")
        return BitsPerByte(settings.run, items)

    return [("bpb", bits)]

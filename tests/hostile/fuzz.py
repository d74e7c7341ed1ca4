"""Every generator of hostile cases by the thousand: `make fuzz`, and in CI a share of it, by `test_fuzz.py`.

    PYTHONPATH=tests python -m hostile.fuzz --count 10000 --seed 5

Prints a line a kind: how many were right, how many were not, and what became of those. Exit 1 where any was not.
"""

import argparse
import collections
import contextlib
import importlib
import itertools
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hostile import case

# module, the function in it, its share of all cases: by how much it finds, and what a case of it costs
GENERATORS = {
    "configs": ("configs", "cases", 30),
    "token stores": ("stores", "cases", 12),
    "checkpoints": ("checkpoints", "cases", 15),
    "run directories": ("run_directories", "cases", 10),
    "streaming stores": ("streaming", "cases", 8),
    "resumed runs": ("checkpoints", "run_cases", 1),
    "Hugging Face directories": ("huggingface", "cases", 10),
    ".mdl files": ("mdl", "cases", 10),
    "Model Zoo files": ("model_zoo", "cases", 10),
    "sweeps": ("sweeps", "cases", 8),
    "questions to a model": ("prompts", "cases", 6),
}
# generators whose cases are commands
AS_PROCESSES = ("configs", "questions to a model", "Hugging Face directories", ".mdl files", "Model Zoo files")
CHUNK = 40  # cases


@dataclass(frozen=True)
class Chunk:
    """So many cases of a generator from a seed; as_process: each a `crystal` of its own, those that are commands."""

    generator: str
    seed: int
    count: int
    as_process: bool = False

    def __str__(self) -> str:
        return f"{self.generator}-{self.seed}{'-processes' if self.as_process else ''}"


@dataclass(frozen=True)
class Judged:
    """What became of one case. right: whether that is one of the words that it expected."""

    kind: str
    name: str
    outcome: case.Outcome
    right: bool

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}: {self.outcome.word}: {self.outcome.message[:600]}"


def chunks(count: int, seed: int) -> list[Chunk]:
    """`count` cases or a few more, from all generators by their shares; the same for the same seed."""
    total, made = sum(share for *_, share in GENERATORS.values()), []
    for name, (*_, share) in GENERATORS.items():
        left = -(-count * share // total)
        for number in range(-(-left // CHUNK)):
            made.append(Chunk(name, 1000 * seed + number, min(CHUNK, left - number * CHUNK)))
    return made


def process_chunks(count: int, seed: int) -> list[Chunk]:
    """`count` cases run by processes of their own."""
    each = -(-count // len(AS_PROCESSES))
    return [Chunk(name, 1000 * seed + 999, each, as_process=True) for name in AS_PROCESSES]


def judge(chunk: Chunk, directory: Path) -> Iterator[Judged]:
    """The cases of a chunk, each in a directory of its own that is taken away."""
    module, function, _ = GENERATORS[chunk.generator]
    make = getattr(importlib.import_module(f"hostile.{module}"), function)
    drawn = make(chunk.seed, 20 * chunk.count if chunk.as_process else chunk.count)  # not every one is a command
    judged = (_judged(chunk, one, directory / f"{number}") for number, one in enumerate(drawn))
    yield from itertools.islice((each for each in judged if each is not None), chunk.count)


def _judged(chunk: Chunk, drawn: case.Case, directory: Path) -> Judged | None:
    try:
        with case.as_processes() if chunk.as_process else contextlib.nullcontext():
            outcome = drawn.run(directory)
    except case.NotACommand:
        return None
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return Judged(f"{chunk.generator}: {drawn.kind}", drawn.name, outcome, outcome.word in drawn.expected)


def judged_all(chunk: Chunk) -> list[Judged]:
    """`judge`, in a scratch directory; for a worker process."""
    with tempfile.TemporaryDirectory(prefix="crystal-fuzz-") as scratch:
        return list(judge(chunk, Path(scratch)))


def table(found: list[Judged]) -> str:
    """A line a kind, as Markdown."""
    words, wrong = collections.Counter(), collections.Counter()
    for each in found:
        words[each.kind, each.outcome.word] += 1
        wrong[each.kind] += not each.right
    lines = ["| kind | cases | fine | refused | wrong |", "|---|---|---|---|---|"]
    for kind in dict.fromkeys(each.kind for each in found):
        cases = sum(n for (k, _), n in words.items() if k == kind)
        refused = words[kind, "refused"] + words[kind, "verdict"]
        lines.append(f"| {kind} | {cases} | {words[kind, 'fine']} | {refused} | {wrong[kind]} |")
    return "\n".join(lines)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--count", type=int, default=10_000)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--processes", type=int, default=100, help="cases run as a `crystal` of their own")
    arguments.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments.add_argument("--only", help="of one generator")
    asked = arguments.parse_args()
    given = chunks(asked.count, asked.seed) + process_chunks(asked.processes, asked.seed)
    given = [chunk for chunk in given if asked.only in (None, chunk.generator)]
    found, began = [], time.monotonic()
    with multiprocessing.get_context("spawn").Pool(asked.jobs) as pool:
        for judged in pool.imap_unordered(judged_all, given):
            found += judged
            for each in judged:
                if not each.right:
                    print(f"WRONG {each}", flush=True)
            print(f"\r{len(found):,} cases, {time.monotonic() - began:.0f} s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    wrong = sum(not each.right for each in found)
    print(table(sorted(found, key=lambda each: each.kind)))
    print(f"\n{len(found):,} cases, {wrong} wrong, seed {asked.seed}")
    return 1 if wrong or not found else 0


if __name__ == "__main__":
    sys.exit(main())

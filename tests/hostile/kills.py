"""Commands killed, sent signals, and begun several times at once on the same directories: `make proof`, or a program.

    PYTHONPATH=tests python -m hostile.kills --kills 69 --signals 16 --together 39 --seed 0

A command is stopped after a random share of the work that it does undisturbed; then the same command runs to its end.
Right is what the undisturbed one leaves, bit for bit. A signal ends it with exit 130 and one line. Of several at once
each ends well or is refused in one line, one at least ends well, and what is left is what one alone leaves.
"""

import argparse
import functools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from hostile.case import Case, Outcome
from hostile.fuzz import Judged
from hostile.killed_commands import JOBS, Job, Left
from hostile.running import Running, Wrong, cpu_seconds, finished

WAYS = {"kill": 69, "signal": 16, "together": 39}  # how often of each hundred and twenty-four
REFUSED, INTERRUPTED = 2, 130


# --- undisturbed


@dataclass(frozen=True)
class Lone:
    """What a job leaves where nothing disturbs it, and its work, in seconds of CPU of its main thread once it has
    begun."""

    left: Left
    work: float


@functools.cache
def lone(job: Job) -> Lone:
    """Run once, for all cases of a process."""
    with tempfile.TemporaryDirectory(prefix="crystal-lone-") as scratch:
        job.lay(directory := Path(scratch))
        ended = finished(job.words(0), directory)
        if ended.code not in job.codes:
            raise RuntimeError(f"{job.name}: undisturbed it ends with {ended.code}: {ended.said}")
        left = job.left(directory, 0)
        assert left, job.name
        return Lone(left, ended.work)


# --- disturbed


def _killed(job: Job, share: float, rng: Random, directory: Path) -> str:
    """SIGKILL, then to the end."""

    struck = _struck(job, share, directory, signal.SIGKILL, lambda: not job.aside or any(directory.glob(job.aside)))
    _to_the_end(job, directory)
    _same(job, lone(job).left, job.left(directory, 0))
    return struck


def _signalled(job: Job, share: float, rng: Random, directory: Path) -> str:
    """SIGINT or SIGTERM: saved, and one line; then to the end. Where it stopped there may be a result more: a
    checkpoint, a validation loss."""
    number = rng.choice((signal.SIGINT, signal.SIGTERM))
    struck = _struck(job, share, directory, number, lambda: True)
    _to_the_end(job, directory)
    left, right = job.left(directory, 0), lone(job).left
    _same(job, right, {name: value for name, value in left.items() if name in right})
    return struck


def _struck(job: Job, share: float, directory: Path, number: int, may: Callable[[], bool]) -> str:
    """Begin the command, and send it a signal when it has done its share, and may be sent it. Where it had ended by
    then: again, in a directory as it was, and sooner. Returns what was done, in words."""
    while share > 0.001:
        running = Running(job.words(0), directory)
        while running.goes_on() and not (running.began and running.work >= share * lone(job).work and may()):
            pass
        at = running.work / lone(job).work
        running.send(number)
        ended = running.end()
        if ended.code == -signal.SIGKILL or (ended.code == INTERRUPTED and number != signal.SIGKILL):
            if ended.code == INTERRUPTED and not ended.in_one_line():
                raise Wrong("traceback", f"{signal.Signals(number).name} at {at:.2f}: {ended.said}")
            return f"{signal.Signals(number).name} at {at:.2f}"
        if ended.code not in job.codes:
            raise Wrong("traceback", f"{signal.Signals(number).name} at {at:.2f}: exit {ended.code}: {ended.said}")
        share *= 0.7
        shutil.rmtree(directory)
        directory.mkdir()
        job.lay(directory)
    raise Wrong("hang", "it always ended before it was struck")


def _to_the_end(job: Job, directory: Path) -> None:
    ended = finished(job.words(0), directory)
    there = job.once and ended.code == REFUSED and ended.in_one_line() and "there already" in ended.said
    if ended.code not in job.codes and not there:
        raise Wrong("traceback", f"the same command again: exit {ended.code}: {ended.said}")


def _together(job: Job, share: float, rng: Random, directory: Path) -> str:
    """Two or three at once, or, one time in three, each a little after the one before."""
    several, apart = rng.choice((2, 2, 3)), rng.choice((0.0, 0.0, share / 2)) * lone(job).work
    running = []
    for number in range(several):
        running.append(Running(job.words(number), directory, number))
        time.sleep(apart)
    ended = [each.end() for each in running]
    for each in ended:
        if each.code not in job.codes and not (each.code == REFUSED and each.in_one_line()):
            raise Wrong("traceback", f"{several} at once: exit {each.code}: {each.said}")
    done = [number for number, each in enumerate(ended) if each.code in job.codes]
    if not done:
        raise Wrong("traceback", f"of {several} none ended well: {ended[0].said}")
    for number in done:
        _same(job, lone(job).left, job.left(directory, number))
    return f"{len(done)} of {several} ended well, {several - len(done)} were refused"


def _same(job: Job, right: Left, left: Left) -> None:
    other = sorted(name for name in right.keys() | left.keys() if right.get(name) != left.get(name))
    if other:
        shown = "; ".join(f"{name}: {left.get(name)}, not {right.get(name)}" for name in other[:3])
        raise Wrong("silent", f"{len(other)} of {len(right)} differ: {shown}")


# --- cases


def counts(count: int) -> dict[str, int]:
    """So many cases of each way, in the proportion of WAYS."""
    killed = round(count * WAYS["kill"] / sum(WAYS.values()))
    signalled = round(count * WAYS["signal"] / sum(WAYS.values()))
    return {"kill": killed, "signal": signalled, "together": count - killed - signalled}


def cases(seed: int, wanted: dict[str, int]) -> Iterator[tuple[Job, Case]]:
    """So many of each way, the same for the same seed; the jobs come in turn."""
    rng = Random(seed)
    for way, count in wanted.items():
        jobs = [job for job in JOBS if way in job.ways]
        rng.shuffle(jobs)
        for number in range(count):
            job, share, own = jobs[number % len(jobs)], rng.uniform(0.02, 0.98), rng.randrange(1 << 30)
            run = functools.partial(disturbed, way, job, share, own)
            yield job, Case(f"{job.name}: {way}", f"{way} {number}, {share:.2f}, {own}", run, ("fine",))


def disturbed(way: str, job: Job, share: float, seed: int, directory: Path) -> Outcome:
    """What becomes of a job that is disturbed in one of WAYS when it has done a share of its work. directory: new."""
    lone(job)  # not of this case
    directory.mkdir()
    job.lay(directory)
    before = cpu_seconds()
    try:
        done = {"kill": _killed, "signal": _signalled, "together": _together}[way](job, share, Random(seed), directory)
    except Wrong as wrong:
        word, message = wrong.args
        return Outcome(word, message, cpu_seconds() - before)
    return Outcome("fine", done, cpu_seconds() - before)


def judge(drawn: Case, directory: Path) -> Judged:
    """One case, in a directory that is made for it and taken away."""
    try:
        outcome = drawn.run(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return Judged(drawn.kind, drawn.name, outcome, outcome.word in drawn.expected)


def table(found: list[Judged]) -> str:
    """A line a command, as Markdown: cases of each way, those that were wrong, and what they cost in all."""
    lines = ["| command | killed | signalled | at once | wrong | CPU s |", "|---|---|---|---|---|---|"]
    by_job = defaultdict(list)
    for each in found:
        by_job[each.kind.rpartition(": ")[0]].append(each)
    for name, mine in [*sorted(by_job.items()), ("in all", found)]:
        ways = Counter(each.kind.rpartition(": ")[2] for each in mine)
        wrong, cpu = sum(not each.right for each in mine), sum(each.outcome.cpu_seconds for each in mine)
        lines.append(f"| {name} | {' | '.join(str(ways[way]) for way in WAYS)} | {wrong} | {cpu:.0f} |")
    return "\n".join(lines)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for way, count in WAYS.items():
        arguments.add_argument(f"--{way}s" if way != "together" else "--together", dest=way, type=int, default=count)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--only", default="", help="jobs whose name has this in it")
    asked = arguments.parse_args()
    found: list[Judged] = []
    with tempfile.TemporaryDirectory(prefix="crystal-kills-") as scratch:
        drawn = cases(asked.seed, {way: getattr(asked, way) for way in WAYS})
        for number, (job, case) in enumerate(drawn):
            if asked.only in job.name:
                found.append(judge(case, Path(scratch) / str(number)))
                print(f"{'     ' if found[-1].right else 'WRONG'} {found[-1]} ({found[-1].outcome.cpu_seconds:.1f} s)",
                      flush=True)  # fmt: skip
    wrong = sum(not each.right for each in found)
    print(f"{table(found)}\n\n{len(found):,} cases, {wrong} wrong, seed {asked.seed}")
    return 1 if wrong or not found else 0


if __name__ == "__main__":
    os.environ.setdefault("CRYSTAL_TUNING", str(Path(__file__).parents[1] / "tuning.json"))
    sys.exit(main())

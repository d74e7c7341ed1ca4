"""Running programs that nobody has read: several at a time, each confined, each with limits, each ending named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue

import crystal
from crystal.errors import ConfigError, RunError
from crystal.evaluation.confine.check import LIMITS, escapes
from crystal.evaluation.confine.outcome import Confinement, Layers, Limits, Outcome


def confinement() -> Confinement:
    """What confines programs here, tried out once per process."""
    return found()[1]


@lru_cache(maxsize=1)
def found() -> tuple[Layers, Confinement]:
    """The layers that programs run behind, and what is to be said of them; tried out once per process."""
    with ExitStack() as stack:
        warden = _Warden()
        stack.callback(warden.close)
        answer = warden.probe()
        if "error" in answer:
            raise RunError(f"what confines programs cannot be found out: {answer['error']}")
        layers = Layers(**answer["layers"])
        missing = escapes(lambda program: warden.run(program, layers, LIMITS, show=True))
        if missing and layers.namespaces:  # they may be granted and still not do: then the others alone
            without = replace(layers, namespaces="")
            if not escapes(lambda program: warden.run(program, without, LIMITS, show=True)):
                layers, missing = without, ()
    return layers, Confinement(answer["words"], not missing, missing)


def run_program(program: str, limits: Limits = Limits(), unsafe: bool = False) -> Outcome:  # noqa: B008
    """Run Python source as __main__ of a fresh interpreter, which has the standard library alone.

    It passed when it ran to its last line and then ended with status 0; leaving earlier, with whatever status, failed.
    Raises ConfigError where this kernel cannot confine it, unless `unsafe`.
    """
    return run_programs([program], limits, unsafe, workers=1)[0]


def run_programs(
    programs: Sequence[str], limits: Limits = Limits(), unsafe: bool = False, workers: int | None = None,  # noqa: B008
    done: Callable[[], None] = lambda: None,
) -> list[Outcome]:  # fmt: skip
    """The same for many, `workers` at a time (None: one a processor); outcomes in the order of the programs.

    unsafe: where the kernel does not offer enough, run with what it does; each outcome's detail then says what did not
    confine it. done: called as each ends, in this thread.
    """
    layers, here = found()
    if not here.sufficient and not unsafe:
        raise ConfigError(
            f"programs cannot be confined here: {'; '.join(here.missing)}. --unsafe-code runs them all the same"
        )
    outcomes = run_behind(layers, programs, limits, workers, done)
    if here.sufficient:
        return outcomes
    without = f"not confined: {'; '.join(what.split(' (')[0] for what in here.missing)}"
    return [replace(o, detail=f"{o.detail} ({without})" if o.detail else without) for o in outcomes]


def run_behind(
    layers: Layers, programs: Sequence[str], limits: Limits = Limits(), workers: int | None = None,  # noqa: B008
    done: Callable[[], None] = lambda: None,
) -> list[Outcome]:  # fmt: skip
    """run_programs behind exactly these layers, enough or not."""
    workers = max(1, min(workers or _processors(), len(programs)))
    idle: SimpleQueue[_Warden] = SimpleQueue()

    def one(program: str) -> Outcome:
        warden = idle.get()
        try:
            answer = warden.run(program, layers, limits)
        finally:
            idle.put(warden)
        if "error" in answer:
            raise RunError(f"a confined program does not start: {answer['error']}")
        return Outcome(answer["status"], answer["detail"], answer["seconds"])

    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        for _ in range(workers):
            warden = _Warden()
            stack.callback(warden.close)  # before the pool is waited for: it ends what still runs
            idle.put(warden)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        futures = [pool.submit(one, program) for program in programs]
        for future in as_completed(futures):
            future.result()
            done()
        return [future.result() for future in futures]


class _Warden:
    """The process that forks programs (warden.py). Closing it, or this process's end, ends what it runs."""

    def __init__(self):
        home = str(Path(crystal.__file__).parents[1])
        code = f"import sys; sys.path.insert(0, {home!r})\nfrom crystal.evaluation.confine.warden import main\nmain()"
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, encoding="utf-8", start_new_session=True,  # Ctrl-C is for the one who asked
        )  # fmt: skip

    def probe(self) -> dict:
        return self._ask({"probe": True})

    def run(self, program: str, layers: Layers, limits: Limits, show: bool = False) -> dict:
        return self._ask({"program": program, "layers": asdict(layers), "limits": asdict(limits), "show": show})

    def _ask(self, question: dict) -> dict:
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            raise RunError("the process that runs confined programs died") from None

    def close(self) -> None:
        with suppress(OSError, ValueError):
            self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

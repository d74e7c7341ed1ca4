"""The scorer beside lm-eval's own way with a transformers model (HFLM): the same weights, dtype, items and strings.

Both get the strings of the requests and give a log-probability each, tokenizing included. They take turns, a process
each, and only one of them works at a time. lm-eval sorts its requests, keeps its logits cache and shows no progress;
its batch size is the best of 1, 8, 16, 32 and 64 on the first items, of those whose logits fit into 3 GB. Its weights
are `crystal export --to native` of the same checkpoint. Items are the first N of the 500 that seed 0 draws of a task.

CPU seconds are the figure to compare where others work on the machine too. A choice that differs counts where its
margin, the likeliest answer's lead over the next, is more than 1e-4 in ours.

Exits with 1 where such a choice differs. python benchmarks/eval_scorer.py --model RUN|CKPT [--items 40] [--repeats 3]
[--tasks mmlu-5shot,…] [--dtype fp32] [--threads 1] [--json FILE]; needs crystal-zoo[eval].
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

TASKS = ("mmlu-5shot", "arc_challenge-5shot", "hellaswag-0shot", "arc_easy-0shot")
BARS = {"5shot": 3.0, "0shot": 1.5}
DRAWN, SEED = 500, 0
BATCHES, MOST_LOGITS = (1, 8, 16, 32, 64), 3e9
MARGIN = 1e-4

Pairs = list[tuple[str, str]]


def items_of(task: str, count: int) -> list[Pairs]:
    """The (context, continuation) strings of every answer, by item."""
    from crystal.evaluation.evaluate import chosen
    from crystal.evaluation.items import Items
    from crystal.evaluation.suites import tasks_of

    (made,) = tasks_of(task, Items())
    return [list(made.questions[i].pairs) for i in chosen(made, DRAWN, SEED)[:count]]


def counted(embedding) -> list[int]:
    """[tokens that went through the model so far]."""
    count = [0]
    embedding.register_forward_pre_hook(lambda _, given: count.__setitem__(0, count[0] + given[0].numel()))
    return count


def ours(model: Path, dtype: str) -> tuple[Callable, list[int], Callable]:
    """(pairs, batch size) → log-probabilities; tokens read; what a batch's logits take in bytes."""
    from crystal.checkpoint import locate
    from crystal.evaluation.evaluate import Evaluation, Where
    from crystal.evaluation.multiple_choice import encoded
    from crystal.evaluation.scorer import score_tokens

    directory = locate(model)
    subject = Evaluation(directory, Where({}, directory, None), dtype, "cpu").subject

    def run(pairs: Pairs, _: int) -> list[float]:
        return [scored.total for scored in score_tokens(subject.decoder, encoded(subject, pairs))]

    return run, counted(subject.decoder.embed), lambda *_: 0


def lm_eval(model: Path, dtype: str) -> tuple[Callable, list[int], Callable]:
    """The same, of lm-eval and transformers."""
    import logging

    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    logging.disable(logging.WARNING)
    name = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    hf = HFLM(pretrained=str(model), device="cpu", dtype=name, batch_size=1)

    def run(pairs: Pairs, batch: int) -> list[float]:
        hf.batch_size_per_gpu = batch
        asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        return [logprob for logprob, _ in hf.loglikelihood(asked, disable_tqdm=True)]

    def logits_bytes(pairs: Pairs, batch: int) -> int:
        longest = max(len(hf.tok_encode(context + continuation)) for context, continuation in pairs)
        return min(batch, len(pairs)) * longest * hf.model.config.vocab_size * torch.finfo(hf.model.dtype).bits // 8

    return run, counted(hf.model.get_input_embeddings()), logits_bytes


def serve(side: str, model: Path, dtype: str, threads: int, pipe) -> None:
    """A process of one side: answers (what, pairs, batch size) until None comes."""
    import torch

    torch.set_num_threads(threads)
    run, tokens, logits_bytes = {"ours": ours, "lm-eval": lm_eval}[side](model, dtype)
    run([("The sky is", " blue"), ("The sky is", " of a deep green")], 1)  # what is loaded or measured once
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        what, pairs, batch = asked
        if what == "logits":
            pipe.send(logits_bytes(pairs, batch))
            continue
        before, wall, cpu = tokens[0], time.perf_counter(), cpu_seconds()
        logprobs = run(pairs, batch)
        spent = {"cpu_s": cpu_seconds() - cpu, "wall_s": time.perf_counter() - wall, "tokens": tokens[0] - before}
        pipe.send(spent | {"logprobs": logprobs})


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Side:
    """One of the two, in a process of its own."""

    def __init__(self, name: str, model: Path, dtype: str, threads: int):
        self.pipe, theirs = get_context("spawn").Pipe()
        arguments = (name, model, dtype, threads, theirs)
        self.process = get_context("spawn").Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()

    def ask(self, what: str, pairs: Pairs, batch: int):
        self.pipe.send((what, pairs, batch))
        return self.pipe.recv()


def best_batch(side: Side, items: Sequence[Pairs], tried: int) -> tuple[int, dict[int, float]]:
    """lm-eval's best batch size on the first items, and the CPU seconds of each that was tried."""
    pairs = [pair for item in items[:tried] for pair in item]
    seconds = {}
    for batch in BATCHES:
        fits = side.ask("logits", pairs, batch) <= MOST_LOGITS
        if fits and batch // 2 < len(pairs):  # a batch of more than there are is no other
            seconds[batch] = side.ask("run", pairs, batch)["cpu_s"]
    return min(seconds, key=seconds.get), seconds


def compare(items: Sequence[Pairs], ours: Sequence[float], theirs: Sequence[float]) -> dict:
    """How far log-probabilities are from each other, and which choices are the same."""
    equal, differ, first = 0, 0, 0
    for item in items:
        mine, others = (values[first : first + len(item)] for values in (ours, theirs))
        first += len(item)
        best, next_ = sorted(mine, reverse=True)[:2]
        same = max(range(len(item)), key=mine.__getitem__) == max(range(len(item)), key=others.__getitem__)
        equal += same
        differ += not same and best - next_ > MARGIN
    farthest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return {"items": len(items), "equal": equal, "differ_beyond_margin": differ, "max_abs": farthest}


def measure(task: str, items: Sequence[Pairs], sides: dict[str, Side], repeats: int, most: int) -> dict:
    """Both on the items of a task, in turns."""
    pairs = [pair for item in items for pair in item]
    batch, tried = best_batch(sides["lm-eval"], items, most)
    found: dict[str, list[dict]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in list(sides)[:: 1 if repeat % 2 else -1]:
            found[name].append(sides[name].ask("run", pairs, batch))
    agreement = compare(items, found["ours"][-1]["logprobs"], found["lm-eval"][-1]["logprobs"])
    result = {
        "task": task,
        "requests": len(pairs),
        "batch": batch,
        "tried": tried,
        "tried_on": min(most, len(items)),
        **agreement,
    }
    for name, runs in found.items():
        cpu, wall = (sorted(run[key] for run in runs) for key in ("cpu_s", "wall_s"))
        result[name] = {"cpu_s": cpu, "wall_s": wall, "tokens": runs[0]["tokens"]}
    ratios = [b["cpu_s"] / a["cpu_s"] for a, b in zip(found["ours"], found["lm-eval"], strict=True)]
    return result | {"ratios": sorted(ratios), "ratio": statistics.median(ratios), "bar": BARS[task.rpartition("-")[2]]}


def show(result: dict) -> None:
    tried = ", ".join(f"{batch}: {seconds:.1f}" for batch, seconds in result["tried"].items())
    print(f"\n{result['task']}: {result['items']} items, {result['requests']} requests")
    print(f"  lm-eval's batch size {result['batch']} (CPU s on {result['tried_on']} items by size: {tried})")
    for name in ("ours", "lm-eval"):
        side = result[name]
        cpu, wall = side["cpu_s"], side["wall_s"]
        print(
            f"  {name:8} CPU {statistics.median(cpu):8.2f} s ({cpu[0]:.2f} to {cpu[-1]:.2f})  "
            f"wall {statistics.median(wall):8.2f} s ({wall[0]:.2f} to {wall[-1]:.2f})  {side['tokens']:>9,} tokens"
        )
    low, high = result["ratios"][0], result["ratios"][-1]
    said = "reached" if result["ratio"] >= result["bar"] else "MISSED"
    print(f"  {result['ratio']:.2f} x lm-eval's speed ({low:.2f} to {high:.2f}); bar {result['bar']}: {said}")
    print(
        f"  {result['equal']} of {result['items']} choices equal, {result['differ_beyond_margin']} differ beyond a "
        f"margin of {MARGIN:g}; log-probabilities within {result['max_abs']:.1e}",
        flush=True,
    )


def machine(threads: int) -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    packages = {name: version(name) for name in ("crystal-zoo", "torch", "transformers", "lm-eval", "tokenizers")}
    cores = {"processor": model, "cores": os.cpu_count(), "threads": threads, "load": os.getloadavg()[0]}
    return cores | {"python": platform.python_version(), **packages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint or run directory")
    parser.add_argument("--items", type=int, default=40, help=f"of each task, of the {DRAWN} that seed {SEED} draws")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tried", type=int, default=16, help="items that lm-eval's batch size is chosen on")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the numbers go")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "RAYON_NUM_THREADS": str(options.threads)}
    from crystal.checkpoint import locate
    from crystal.interop.native import export_native

    results = {"machine": machine(options.threads), "model": str(options.model), "dtype": options.dtype, "tasks": []}
    print(results["machine"])
    with tempfile.TemporaryDirectory() as place:
        plain = Path(place, "plain")
        export_native(locate(options.model), plain)
        config = json.loads((plain / "config.json").read_text())
        shape = {key: config[key] for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")}
        print(f"{options.model}, {options.dtype}; for lm-eval as {shape}")
        models = {"ours": options.model, "lm-eval": plain}
        sides = {name: Side(name, model, options.dtype, options.threads) for name, model in models.items()}
        for task in options.tasks.split(","):
            results["tasks"].append(measure(task, items_of(task, options.items), sides, options.repeats, options.tried))
            show(results["tasks"][-1])
        for side in sides.values():
            side.pipe.send(None)
            side.process.join()
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if any(task["differ_beyond_margin"] for task in results["tasks"]) else 0)


if __name__ == "__main__":
    main()

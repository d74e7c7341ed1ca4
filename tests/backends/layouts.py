"""What the tests of layouts run in several processes: one process group after another, many cases in each.

All that a case finds it writes into its directory: numbers.json, and checkpoints as training writes them.
"""

import functools
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch._dynamo.utils import counters

from crystal import checkpoint
from crystal.backends.base import MicroBatch, Setup
from crystal.backends.config import CudaConfig, Layout, OptimizerConfig
from crystal.backends.cuda.backend import CudaBackend
from crystal.run import load_run
from crystal.training.guards import plan_differences
from crystal.training.saving import Saver
from crystal.training.start import start
from crystal.zoo.build import plan_for
from crystal.zoo.config import ModelConfig, model_config

ROWS, LENGTH, STEPS = 8, 16, 3
OPTIMIZER = OptimizerConfig(grad_clip=0.5)
SHAPE = {"vocab_size": 96, "max_seq_len": 32, "d_ff": 172, "n_heads": 4}
# CrystalCoder's embedding is tied to its head, Amber's is not; the deeper Amber has grouped heads and a document mask
MODELS = {
    f"{family}-l{layers}": ModelConfig(**(model_config(f"{family}-w64-l{layers}").model_dump() | SHAPE | more))
    for family, layers, more in (
        ("crystalcoder", 2, {}),
        ("crystalcoder", 4, {}),
        ("amber", 2, {}),
        ("amber", 4, {"n_kv_heads": 2, "document_mask": True}),
    )
}
# processes → (model, sizes, other settings) of each case
LAYOUTS = {
    4: [
        ("crystalcoder-l2", {"fsdp": 2, "tp": 2}, {}),
        ("amber-l2", {"fsdp": 2, "tp": 2}, {}),
        ("crystalcoder-l2", {"pp": 2, "fsdp": 2, "interleave": 1}, {}),
        ("crystalcoder-l4", {"pp": 2, "fsdp": 2}, {"recompute": "attention"}),
        ("amber-l4", {"pp": 2, "fsdp": 2}, {}),
        ("amber-l2", {"dp": 2, "fsdp": 2}, {}),
        ("amber-l2", {"dp": 4}, {}),
        ("amber-l2", {"fsdp": 4}, {"recompute": "block"}),
        ("crystalcoder-l2", {"tp": 4}, {}),
        ("crystalcoder-l4", {"pp": 4, "interleave": 1}, {}),
        ("amber-l4", {"pp": 2, "tp": 2}, {"recompute": "block"}),
        ("amber-l2", {"fsdp": 2, "tp": 2}, {"dtype": "bf16"}),
    ],
    2: [
        ("crystalcoder-l2", {"dp": 2}, {}),
        ("amber-l2", {"dp": 2}, {}),
        ("crystalcoder-l2", {"fsdp": 2}, {}),
        ("amber-l2", {"fsdp": 2}, {}),
        ("crystalcoder-l2", {"tp": 2}, {}),
        ("amber-l2", {"tp": 2, "sequence": False}, {}),
        ("crystalcoder-l4", {"pp": 2}, {}),
        ("amber-l4", {"pp": 2}, {}),
        ("amber-l2", {"pp": 2, "interleave": 1}, {}),
        ("crystalcoder-l2", {"fsdp": 2}, {"dtype": "bf16"}),
        ("amber-l4", {"pp": 2}, {"dtype": "bf16"}),
        ("crystalcoder-l2", {"fsdp": 2}, {"compile": True}),
        ("amber-l4", {"tp": 2}, {"compile": True, "recompute": "attention"}),
    ],
}
# a checkpoint after step 1 of the first layout, read by the second: there are shards to cut and to join
RESHAPED = [
    ("crystalcoder-l2", {"fsdp": 2, "tp": 2}, {"pp": 2, "interleave": 1}),
    ("amber-l2", {"fsdp": 2, "tp": 2}, {"fsdp": 2}),
    ("amber-l2", {"dp": 2, "fsdp": 2}, {"tp": 2}),
    ("crystalcoder-l4", {"pp": 4, "interleave": 1}, {"pp": 2}),
]


def name_of(model: str, sizes: dict, settings: dict | None = None) -> str:
    words = {key: value if isinstance(value, str) else key for key, value in (settings or {}).items()}
    return "-".join([model, *(f"{key}{size}" for key, size in sizes.items()), *words.values()])


def batch(step: int) -> MicroBatch:
    """All rows of a step; some labels are masked."""
    generator = torch.Generator().manual_seed(step)
    tokens_BT = torch.randint(0, SHAPE["vocab_size"], (ROWS, LENGTH + 1), generator=generator)
    weights_BT = torch.full((ROWS, LENGTH), 1 / (ROWS * LENGTH))
    weights_BT[0, 3] = weights_BT[5, :4] = 0
    ids_BT = tokens_BT[:, :-1].contiguous()
    return MicroBatch(
        ids_BT, tokens_BT[:, 1:].contiguous(), weights_BT, torch.arange(ROWS) % 2, (ids_BT == 7).cumsum(1)
    )


def own(whole: MicroBatch, place, micro_batch_size: int) -> list[MicroBatch]:
    """The micro-batches of a process' rows."""
    fields = ("ids_BT", "labels_BT", "weights_BT", "sources_B", "documents_BT")
    parts = [getattr(whole, name).chunk(place.parts)[place.part].split(micro_batch_size) for name in fields]
    return [MicroBatch(*chunk) for chunk in zip(*parts, strict=True)]


def train(backend, save, steps=range(1, STEPS + 1), micro_batch_size: int = 2) -> dict:
    """Train, saving after the first and the last step; the steps' results and a validation."""
    results = []
    for step in steps:
        results.append(backend.train_step(step, own(batch(step), backend.place, micro_batch_size)).host())
        if step in (1, STEPS):
            save(step)
    nll_S, tokens_S = backend.eval_step(own(batch(99), backend.place, ROWS)[0])
    return {"steps": results, "eval": [nll_S.tolist(), tokens_S.tolist()]}


def made(model: str, make, optimizer=OPTIMIZER):
    """A backend by make(setup)."""
    config = MODELS[model]
    plan = plan_for(config, weight_decay=optimizer.weight_decay, eps=optimizer.eps)
    return make(Setup(config, plan, optimizer, lambda step: 0.01, 1, 2))


def cuda(sizes: dict, **settings):
    """make for `made`: the cuda backend on the CPU in a layout."""
    config = CudaConfig(
        name="cuda", device="cpu", parallel=Layout(**sizes), **({"dtype": "fp32", "compile": False} | settings)
    )
    return lambda setup: CudaBackend(setup, config)


def saver(backend, directory: Path):
    """save(step), as the loop does it: in the background, sealed when the processes meet."""
    saving = Saver(backend)

    def save(step: int) -> None:
        state = {"step": step, "backend": backend.scalars()}
        saving.save(checkpoint.step_directory(directory, step), state, (), lambda: None)
        saving.finish()

    return save


def _case(model: str, sizes: dict, settings: dict, directory: Path) -> None:
    counters.clear()
    backend = made(model, cuda(sizes, **settings))
    backend.initialise()
    save = saver(backend, directory)
    save(0)
    found = train(backend, save)
    found["plan"] = plan_differences(backend.plan, backend.groups())
    found["signal"] = backend.agree(15 if dist.get_rank() == dist.get_world_size() - 1 else 0)
    found["compiled"] = [counters["stats"]["unique_graphs"], counters["graph_break"]]
    decoder = backend.decoder()
    if dist.get_rank() == 0:
        whole = dict(checkpoint.read(checkpoint.step_directory(directory, STEPS)).tensors("model"))
        found["decoder"] = all(torch.equal(p, whole[name]) for name, p in decoder.named_parameters())
        (directory / "numbers.json").write_text(json.dumps(found))


def _reshaped(model: str, before: dict, after: dict, root: Path) -> None:
    backend = made(model, cuda(after))
    saved = checkpoint.read(checkpoint.step_directory(root / name_of(model, before), 1))
    backend.load(saved.tensors, saved.state["backend"])
    directory = root / f"{name_of(model, before)}-{name_of('to', after)}"
    found = train(backend, saver(backend, directory), range(2, STEPS + 1))
    if dist.get_rank() == 0:
        (directory / "numbers.json").write_text(json.dumps(found))


def together(processes: int, target: Callable, *arguments) -> None:
    """target(rank, *arguments) in so many processes, forked from one that has imported everything.

    When one fails all are ended: the others would wait half an hour for it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["layouts"])
    started = [context.Process(target=target, args=(rank, *arguments)) for rank in range(processes)]
    for process in started:
        process.start()
    try:
        while any(p.is_alive() for p in started) and not any(p.exitcode for p in started):
            time.sleep(0.05)
        assert not any(p.exitcode for p in started), "a process failed; its error is above"
    finally:
        for process in started:
            process.kill()
            process.join()


def in_groups(rank: int, root: Path, layouts: dict[int, list]) -> Iterator[tuple[int, list]]:
    """(number of processes, its cases) in turn, inside a gloo group of so many; a rank that a group has no place for is
    done. root: a directory that all meet in."""
    for processes, cases in layouts.items():
        if rank >= processes:
            return
        store = dist.FileStore(str(root / f"store-{processes}"), processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
        yield processes, cases
        dist.destroy_process_group()


def worker(rank: int, root: Path) -> None:
    """One of four processes; of those, two go on to the layouts of two."""
    torch.set_num_threads(1)
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # as it is traced, without a C++ compiler
    try:
        for processes, cases in in_groups(rank, root, LAYOUTS):
            for model, sizes, settings in cases:
                _case(model, sizes, settings, root / name_of(model, sizes, settings))
            if processes == 2:
                for case in RESHAPED:
                    _reshaped(*case, root)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the others wait for this one: whoever started us ends them


def goes_on(rank: int, processes: int, meeting: Path, run: Path, overrides: list[str], until: int) -> None:
    """One of the processes that take a run on, as torchrun's would."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(meeting), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    start(load_run(run, overrides), None, until, Console(quiet=True, stderr=True))
    dist.destroy_process_group()

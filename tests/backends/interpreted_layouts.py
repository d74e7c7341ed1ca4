"""Run under TRITON_INTERPRET=1: layouts whose operators are the Triton kernels, a JSON line a layout.

python interpreted_layouts.py DIRECTORY. Each line has what a step gave, and what the sanitizer saw of the launches; the
last one, what became of tensors that have no memory of their own.
"""

import dataclasses
import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from layouts import ROWS, batch, cuda, in_groups, made, name_of, own
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from crystal.backends.base import MicroBatch
from crystal.kernels import add_norm
from crystal.kernels.proof.interpreter import Sanitizer, repair

# processes → (model, sizes, other settings) of each case; of four processes, two go on to the layouts of two
LAYOUTS = {
    4: [("crystalcoder-l2", {"fsdp": 2, "tp": 2}, {})],
    2: [
        ("amber-l2", {"tp": 2}, {}),
        ("amber-l2", {"tp": 2, "sequence": False}, {"recompute": "attention"}),
        ("amber-l2", {"fsdp": 2}, {}),
        ("crystalcoder-l2", {"pp": 2, "interleave": 1}, {}),
    ],
}


def first_step(backend) -> dict:
    """What a step of half the rows gives: an interpreted program costs milliseconds."""
    backend.initialise()
    whole = batch(1)
    half = MicroBatch(**{field.name: getattr(whole, field.name)[: ROWS // 2] for field in dataclasses.fields(whole)})
    return backend.train_step(1, own(half, backend.place, micro_batch_size=2)).host()


def wrapped() -> dict:
    """What an operator makes of a sum that is on its way, as either input, and of a DTensor's part beside tensors."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x, weight = torch.randn(4, 64, generator=generator), torch.ones(64)
    total = all_reduce(x, "sum", dist.group.WORLD).wait()
    coming = [all_reduce(x, "sum", dist.group.WORLD) for _ in range(2)]
    normal, summed = add_norm(coming[0], coming[1], weight, None, 1e-5)
    whole = distribute_tensor(weight, init_device_mesh("cpu", (dist.get_world_size(),)), [Replicate()])
    try:
        refused = add_norm(x, x, whole, None, 1e-5)[0].tolist()
    except TypeError as error:
        refused = str(error)
    return {
        "kinds": [type(t).__name__ for t in coming], "summed": torch.equal(summed, 2 * total), "refused": refused,
        "normal": torch.equal(normal, add_norm(total, total, weight, None, 1e-5)[0]),
    }  # fmt: skip


def _say(rank: int, line: dict) -> None:
    if rank == 0:
        print(json.dumps(line), flush=True)


def _worker(rank: int, root: Path) -> None:
    try:
        for processes, cases in in_groups(rank, root, LAYOUTS):
            for model, sizes, settings in cases:
                with Sanitizer() as sanitizer:
                    step = first_step(made(model, cuda(sizes, **settings)))
                seen = {"findings": sanitizer.findings, "launched": sorted(sanitizer.launched)}
                _say(rank, {"case": name_of(model, sizes, settings), "step": step, **seen})
            if processes == 2:
                _say(rank, wrapped())
    except BaseException:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    repair()
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_worker, args=(rank, Path(sys.argv[1]))) for rank in range(max(LAYOUTS))]
    for process in started:
        process.start()
    for process in started:
        process.join()
    sys.exit(max(process.exitcode != 0 for process in started))
